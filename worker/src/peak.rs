//! What this worker's processor can do: floating-point operations a second in a matrix product of f32, measured once, when
//! the process starts. It is what a run's share of the processor (MFU) is compared with; nothing that is computed depends
//! on it. `docs/mfu.md` says what it means and what it does not.

use std::time::{Duration, Instant};

use crate::engine::{DeviceChoice, EngineError, products};

/// How long products are repeated.
const TIME: Duration = Duration::from_millis(40);

/// Products in any case: the first ones find cold caches and sleeping cores.
const AT_LEAST: u32 = 3;

/// Floating-point operations a second of the fastest product: whatever else the machine does only makes others slower.
pub fn measure(device: DeviceChoice, threads: usize) -> Result<f64, EngineError> {
    let mut watch = Stopwatch::default();
    let operations = products(device, threads, || watch.goes_on(Instant::now()))?;
    Ok(operations / watch.best.as_secs_f64().max(1e-9))
}

/// The shortest time between two calls.
struct Stopwatch {
    began: Option<Instant>,
    last: Option<Instant>,
    count: u32,
    best: Duration,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self {
            began: None,
            last: None,
            count: 0,
            best: Duration::MAX,
        }
    }
}

impl Stopwatch {
    /// Called before the first product and after each; says whether another is wanted.
    fn goes_on(&mut self, now: Instant) -> bool {
        let began = *self.began.get_or_insert(now);
        if let Some(last) = self.last.replace(now) {
            self.best = self.best.min(now.saturating_duration_since(last));
            self.count += 1;
        }
        self.count < AT_LEAST || now.saturating_duration_since(began) < TIME
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_of_a_few_counts() {
        let start = Instant::now();
        let mut watch = Stopwatch::default();
        let mut at = |ms: u64| watch.goes_on(start + Duration::from_millis(ms));
        assert!(at(0));
        assert!(at(90), "too long already, but the first ones are cold");
        assert!(at(95));
        assert!(!at(102));
        assert_eq!(watch.best, Duration::from_millis(5));
    }

    #[test]
    fn this_machine_has_a_peak() {
        let peak = measure(DeviceChoice::Cpu, 1).expect("a CPU computes");
        // From a very slow machine under emulation to more than any core has.
        assert!((1e7..1e13).contains(&peak), "{peak:e}");
    }
}
