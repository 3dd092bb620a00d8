//! How a worker's time goes, and what it does in it: counters that the trainer and the exchange feed and the session
//! sends. Each moment counts once, by what the trainer does, and where it does nothing, by whether gradients are on their
//! way. A few readings of the clock for each lane are all that this costs; nothing that is computed depends on it.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use cohort_common::figures::Counters;

/// What the trainer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doing {
    /// Nothing: it waits for a job or for a root.
    #[default]
    Nothing,
    /// It computes.
    Computing,
    /// It waits for text.
    Text,
}

/// The counters of a worker process.
#[derive(Debug)]
pub struct Meter(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Up to here, time is counted.
    counted: Instant,
    doing: Doing,
    sending: bool,
    receiving: bool,
    compute: Duration,
    exchange: Duration,
    wait: Duration,
    data: Duration,
    lanes: Duration,
    /// All that is no time.
    counts: Counters,
}

impl Default for Meter {
    fn default() -> Self {
        Self(Mutex::new(State::new(Instant::now())))
    }
}

impl State {
    fn new(now: Instant) -> Self {
        Self {
            counted: now,
            doing: Doing::Nothing,
            sending: false,
            receiving: false,
            compute: Duration::ZERO,
            exchange: Duration::ZERO,
            wait: Duration::ZERO,
            data: Duration::ZERO,
            lanes: Duration::ZERO,
            counts: Counters::default(),
        }
    }

    /// Counts the time up to now by what was going on in it.
    fn count(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted);
        self.counted = self.counted.max(now);
        let transfers = self.sending || self.receiving;
        let kind = match self.doing {
            Doing::Computing => &mut self.compute,
            Doing::Text => &mut self.data,
            Doing::Nothing if transfers => &mut self.exchange,
            Doing::Nothing => &mut self.wait,
        };
        *kind += passed;
    }

    fn counters(&self) -> Counters {
        let micros = |time: Duration| time.as_micros() as u64;
        Counters {
            compute_us: micros(self.compute),
            exchange_us: micros(self.exchange),
            wait_us: micros(self.wait),
            data_us: micros(self.data),
            lanes_us: micros(self.lanes),
            ..self.counts
        }
    }
}

impl Meter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic under this lock")
    }

    /// Begins at zero; what is going on goes on.
    pub fn begin(&self) {
        let mut state = self.lock();
        *state = State {
            doing: state.doing,
            sending: state.sending,
            receiving: state.receiving,
            ..State::new(Instant::now())
        };
    }

    /// The counters now.
    pub fn read(&self) -> Counters {
        let mut state = self.lock();
        state.count(Instant::now());
        state.counters()
    }

    /// From now on the trainer does this. Says what it did before.
    pub fn switch(&self, doing: Doing) -> Doing {
        let mut state = self.lock();
        state.count(Instant::now());
        std::mem::replace(&mut state.doing, doing)
    }

    /// Does some work of that kind; afterwards the trainer does again what it did before.
    pub fn during<T>(&self, doing: Doing, work: impl FnOnce() -> T) -> T {
        let before = self.switch(doing);
        let done = work();
        self.switch(before);
        done
    }

    /// Whether sums of this worker are on their way from now on.
    pub fn sending(&self, on: bool) {
        let mut state = self.lock();
        if state.sending != on {
            state.count(Instant::now());
            state.sending = on;
        }
    }

    /// Whether a root is arriving from now on.
    pub fn receiving(&self, on: bool) {
        let mut state = self.lock();
        if state.receiving != on {
            state.count(Instant::now());
            state.receiving = on;
        }
    }

    /// Lanes are computed that were begun so long ago.
    pub fn computed(&self, lanes: u64, tokens: u64, time: Duration) {
        let mut state = self.lock();
        state.counts.lanes += lanes;
        state.counts.tokens += tokens;
        state.lanes += time;
    }

    /// An update is made.
    pub fn updated(&self) {
        self.lock().counts.steps += 1;
    }

    /// Bytes of gradients went out.
    pub fn sent(&self, bytes: usize) {
        self.lock().counts.sent_bytes += bytes as u64;
    }

    /// Bytes of roots came in.
    pub fn received(&self, bytes: usize) {
        self.lock().counts.received_bytes += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A state at some moment, and what changes it a second later.
    fn later(state: &mut State, change: impl FnOnce(&mut State)) {
        state.count(state.counted + SECOND);
        change(state);
    }

    #[test]
    fn each_moment_counts_once() {
        let mut state = State::new(Instant::now());
        later(&mut state, |s| s.doing = Doing::Computing);
        later(&mut state, |s| s.sending = true);
        later(&mut state, |s| s.doing = Doing::Text);
        later(&mut state, |s| s.doing = Doing::Nothing);
        later(&mut state, |s| s.receiving = true);
        later(&mut state, |s| s.sending = false);
        later(&mut state, |s| s.receiving = false);
        later(&mut state, |_| {});
        let found = state.counters();
        assert_eq!(found.wait_us, 2_000_000, "before the work and after it");
        assert_eq!(found.compute_us, 2_000_000, "whatever is sent meanwhile");
        assert_eq!(found.data_us, 1_000_000);
        assert_eq!(found.exchange_us, 3_000_000);
        assert_eq!(found.wall_us(), 8_000_000);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_counts_nothing() {
        let now = Instant::now();
        let mut state = State::new(now + SECOND);
        state.count(now);
        assert_eq!(state.counters().wall_us(), 0);
        state.count(now + SECOND * 2);
        assert_eq!(state.counters().wall_us(), 1_000_000);
    }

    #[test]
    fn work_within_work_gives_back_what_was_before() {
        let meter = Meter::default();
        meter.switch(Doing::Computing);
        let seven = meter.during(Doing::Text, || 7);
        assert_eq!(seven, 7);
        assert_eq!(meter.switch(Doing::Nothing), Doing::Computing);
        meter.computed(2, 64, SECOND);
        meter.updated();
        let read = meter.read();
        assert_eq!((read.lanes, read.tokens, read.steps), (2, 64, 1));
        assert_eq!(read.lanes_us, 1_000_000);
        meter.begin();
        assert_eq!(meter.read().tokens, 0);
    }
}
