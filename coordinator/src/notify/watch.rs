//! What is worth telling. Time is an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cohort_common::api::RunEvent;

use super::{Kind, Notice};
use crate::driver::now_ms;

/// The active runs, and when each last moved.
pub(super) struct Watch {
    stall_after: Duration,
    runs: BTreeMap<String, Watched>,
}

struct Watched {
    moved: Instant,
    step: u64,
    /// What it was said to do last.
    state: String,
    stalled: bool,
}

impl Watch {
    pub fn new(stall_after: Duration) -> Self {
        Self {
            stall_after,
            runs: BTreeMap::new(),
        }
    }

    /// When the next run will have stalled, if none moves.
    pub fn next_stall(&self) -> Option<Instant> {
        let moving = self.runs.values().filter(|run| !run.stalled);
        moving
            .filter_map(|run| run.moved.checked_add(self.stall_after))
            .min()
    }

    /// The runs that have stalled just now.
    pub fn stalls(&mut self, now: Instant) -> Vec<Notice> {
        let after = self.stall_after;
        let stalled = |run: &Watched| !run.stalled && now.duration_since(run.moved) >= after;
        let mut notices = Vec::new();
        for (name, run) in self.runs.iter_mut().filter(|(_, run)| stalled(run)) {
            run.stalled = true;
            let text = format!(
                "run {name} has made no progress for {} s: {}; `cohort status {name}` shows what happened to its workers",
                now.duration_since(run.moved).as_secs(),
                run.state
            );
            notices.push(notice(Kind::Stalled, name, run.step, text));
        }
        notices
    }

    /// A run has committed, validated or checkpointed.
    pub fn progress(&mut self, now: Instant, name: &str, step: u64) -> Option<Notice> {
        let run = self.runs.get_mut(name)?;
        let stood = now.duration_since(run.moved).as_secs();
        run.moved = now;
        run.step = step;
        run.state = "it trains".into();
        let text = format!("run {name} moves again, at step {step}, after {stood} s");
        std::mem::take(&mut run.stalled).then(|| notice(Kind::Moving, name, step, text))
    }

    /// Something has become of a run.
    pub fn event(&mut self, now: Instant, event: &RunEvent) -> Option<Notice> {
        match event {
            RunEvent::Waiting { run, have, need } => {
                let state = format!("it waits for workers, {have} of {need} are there");
                self.active(now, run, state)
            }
            RunEvent::Loading { run, workers, .. } => {
                self.active(now, run, format!("{workers} workers get its state"))
            }
            RunEvent::Training { run, .. } => self.active(now, run, "it trains".into()),
            RunEvent::Finished(end) => {
                self.runs.remove(&end.run);
                let loss = end
                    .val_loss
                    .map_or(String::new(), |loss| format!(", validation loss {loss:.4}"));
                let text = format!("run {} has finished after step {}{loss}", end.run, end.step);
                Some(notice(Kind::Finished, &end.run, end.step, text))
            }
            RunEvent::Failed { run, error } => {
                let step = self.runs.remove(run).map_or(0, |watched| watched.step);
                let text = format!("run {run} has failed: {error}");
                Some(notice(Kind::Failed, run, step, text))
            }
            RunEvent::Paused { run, step, reason } => {
                self.runs.remove(run);
                let text = reason.clone()?;
                Some(notice(Kind::Paused, run, *step, text))
            }
            RunEvent::Stopped { run, .. } | RunEvent::Cancelled { run } => {
                self.runs.remove(run);
                None
            }
            _ => None,
        }
    }

    /// A run is active. That is no progress, but time counts from its first moment.
    fn active(&mut self, now: Instant, name: &str, state: String) -> Option<Notice> {
        let fresh = || Watched {
            moved: now,
            step: 0,
            state: String::new(),
            stalled: false,
        };
        let run = self.runs.entry(name.to_owned()).or_insert_with(fresh);
        run.state = state;
        None
    }
}

fn notice(event: Kind, run: &str, step: u64, text: String) -> Notice {
    Notice {
        event,
        run: run.to_owned(),
        step,
        text,
        time_ms: now_ms(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(10);

    fn waiting(run: &str) -> RunEvent {
        RunEvent::Waiting {
            run: run.into(),
            have: 0,
            need: 2,
        }
    }

    #[test]
    fn a_run_that_does_not_move_stalls_once_and_moves_again() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut watch = Watch::new(AFTER);
        assert_eq!(watch.next_stall(), None);
        assert_eq!(watch.event(at(0), &waiting("one")), None);
        // Still waiting, for another number of workers, is no progress.
        assert_eq!(watch.event(at(5), &waiting("one")), None);
        assert_eq!(watch.next_stall(), Some(at(10)));
        assert_eq!(watch.stalls(at(9)), []);
        let told = watch.stalls(at(10));
        assert_eq!((told.len(), told[0].event), (1, Kind::Stalled));
        assert!(told[0].text.contains("0 of 2"), "{}", told[0].text);
        assert_eq!(watch.stalls(at(30)), []);
        assert_eq!(watch.next_stall(), None);
        let told = watch.progress(at(31), "one", 1).expect("it moves");
        assert_eq!((told.event, told.step), (Kind::Moving, 1));
        assert_eq!(watch.progress(at(32), "one", 2), None);
        assert_eq!(watch.next_stall(), Some(at(42)));
    }

    #[test]
    fn a_run_that_rests_does_not_stall() {
        let now = Instant::now();
        let run = || "one".to_owned();
        let paused = |reason| RunEvent::Paused {
            run: run(),
            step: 7,
            reason,
        };
        for (event, told) in [
            (RunEvent::Cancelled { run: run() }, None),
            (paused(None), None),
            (paused(Some("the watchdog".into())), Some(Kind::Paused)),
            (
                RunEvent::Failed {
                    run: run(),
                    error: "no room".into(),
                },
                Some(Kind::Failed),
            ),
        ] {
            let mut watch = Watch::new(AFTER);
            watch.event(now, &waiting("one"));
            assert_eq!(watch.event(now, &event).map(|n| n.event), told);
            assert_eq!(watch.stalls(now + 2 * AFTER), []);
            assert_eq!(watch.progress(now, "one", 9), None);
        }
    }
}
