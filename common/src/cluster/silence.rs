//! Notices silence. The deadline adapts to what is normal for a connection: on a quick one it is the floor; where
//! messages come late and irregularly it grows, up to a ceiling. The estimate is that of TCP's retransmission timer
//! (RFC 6298): mean plus four times the mean deviation. **Pure.**

/// Signs of life that a coordinator takes in a second, about, and as many that it gives.
const BEATS: u64 = 1_000;

/// Bounds of the deadline.
#[derive(Clone, Copy, Debug)]
pub struct SilenceLimits {
    /// No connection is given up sooner.
    pub floor_ms: u64,
    /// Every connection is given up after this.
    pub ceiling_ms: u64,
}

impl Default for SilenceLimits {
    fn default() -> Self {
        Self {
            floor_ms: 2_000,
            ceiling_ms: 10_000,
        }
    }
}

impl SilenceLimits {
    /// Time between two signs of life: a deadline must survive several that are late.
    pub fn heartbeat_ms(&self) -> u64 {
        (self.floor_ms / 8).max(10)
    }

    /// The same where there are so many workers: all together give about a thousand signs of life a second, until each gives one
    /// in half of the shortest deadline.
    pub fn heartbeat_ms_of(&self, workers: usize) -> u64 {
        let spread = (workers as u64).saturating_mul(1000) / BEATS;
        spread.clamp(
            self.heartbeat_ms(),
            (self.floor_ms / 2).max(self.heartbeat_ms()),
        )
    }
}

/// What is normal for one connection.
#[derive(Clone, Debug)]
pub struct Silence {
    limits: SilenceLimits,
    last_ms: u64,
    mean: f64,
    deviation: f64,
}

impl Silence {
    /// A connection that was heard just now.
    pub fn new(limits: SilenceLimits, now_ms: u64) -> Self {
        Self {
            limits,
            last_ms: now_ms,
            mean: limits.heartbeat_ms() as f64,
            deviation: 0.0,
        }
    }

    /// Something was heard.
    pub fn heard(&mut self, now_ms: u64) {
        let gap = now_ms.saturating_sub(self.last_ms) as f64;
        // Messages that follow each other closely say nothing about how long a silence may be.
        if gap >= self.limits.heartbeat_ms() as f64 / 2.0 {
            self.deviation += ((gap - self.mean).abs() - self.deviation) / 4.0;
            self.mean += (gap - self.mean) / 8.0;
        }
        self.last_ms = self.last_ms.max(now_ms);
    }

    /// This end did not run for a while, so it could not hear anything either.
    pub fn forgive(&mut self, missed_ms: u64) {
        self.last_ms += missed_ms;
    }

    /// How long this connection may be silent.
    pub fn deadline_ms(&self) -> u64 {
        let normal = self.mean + 4.0 * self.deviation;
        // A few beats may be lost or late before silence means anything.
        let deadline = 3.0 * normal;
        (deadline as u64).clamp(self.limits.floor_ms, self.limits.ceiling_ms)
    }

    /// The time of silence, if it is too long.
    pub fn exceeded(&self, now_ms: u64) -> Option<u64> {
        let silent = now_ms.saturating_sub(self.last_ms);
        (silent > self.deadline_ms()).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_connection_is_given_up_at_the_floor() {
        let mut silence = Silence::new(SilenceLimits::default(), 0);
        for beat in 1..50 {
            silence.heard(beat * 250);
        }
        assert_eq!(silence.deadline_ms(), 2_000);
        assert_eq!(silence.exceeded(49 * 250 + 2_000), None);
        assert_eq!(silence.exceeded(49 * 250 + 2_001), Some(2_001));
    }

    #[test]
    fn a_slow_connection_is_given_more_time_but_not_without_end() {
        let mut silence = Silence::new(SilenceLimits::default(), 0);
        for beat in 1..50 {
            silence.heard(beat * 1_500);
        }
        assert!(silence.deadline_ms() > 4_000, "{}", silence.deadline_ms());
        for beat in 1..50u64 {
            silence.heard(100_000 + beat * 9_000);
        }
        assert_eq!(silence.deadline_ms(), 10_000);
    }

    #[test]
    fn a_large_cluster_beats_more_slowly_and_nobody_is_given_up_for_it() {
        let limits = SilenceLimits::default();
        let beats = [1, 250, 600, 1_000, 100_000].map(|workers| limits.heartbeat_ms_of(workers));
        assert_eq!(beats, [250, 250, 600, 1_000, 1_000]);
        let mut silence = Silence::new(limits, 0);
        // From one beat to the next the period may be four times as long.
        let mut now = 0;
        for beat in (0..20).map(|i| if i < 8 { 250 } else { 1_000 }) {
            assert_eq!(silence.exceeded(now + beat + 500), None);
            now += beat;
            silence.heard(now);
        }
    }

    #[test]
    fn a_burst_teaches_nothing_and_a_pause_of_ones_own_is_forgiven() {
        let mut silence = Silence::new(SilenceLimits::default(), 0);
        for now in 0..1_000 {
            silence.heard(now);
        }
        assert_eq!(silence.deadline_ms(), 2_000);
        silence.forgive(30_000);
        assert_eq!(silence.exceeded(32_000), None);
    }
}
