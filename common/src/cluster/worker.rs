//! The worker's state machine: what it holds, what its trainer was told, and what survives the end of a session. It is
//! pure, like the coordinator's; the session, the network and the trainer's thread belong to the driver around it.
//!
//! A session that ends takes nothing with it. The trainer finishes or gives up what it is doing, the state and the
//! gradients computed for the next step stay, and the next session presents them.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::aggregate::{ChunkDigest, RootTotals};
use crate::cluster::division::{Digests, Keeper};
use crate::cluster::links::Link;
use crate::cluster::messages::{
    Commit, Found, FromWorker, Holding, LaneSums, LoadState, Owners, Peer, Proof, StateSource,
    ToWorker,
};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::ledger::Entry;

/// Bytes of entries that are kept for a coordinator, at most. They must fit into the message with which a worker registers.
const MOST_KEPT: usize = 1 << 20;

/// What happens to a worker.
#[derive(Clone, Debug)]
pub enum WorkerEvent {
    /// A session is open: the coordinator has said welcome.
    Up,
    /// The session has ended.
    Down,
    /// The coordinator said something.
    Told(ToWorker),
    /// The trainer, or whoever prepares its work, has done something.
    Did {
        /// The load that it belongs to, as in [`Order::Load`].
        load: u64,
        /// What.
        report: Report,
    },
    /// The process was asked to end.
    LeaveRequested,
}

/// What the trainer reports.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The state is in memory, and the way to the owners is open.
    Loaded {
        /// The state's step.
        step: Step,
        /// The state's hash.
        state_hash: Option<[u8; 32]>,
    },
    /// Gradients of lanes are computed and kept.
    LanesDone {
        /// The step.
        step: Step,
        /// The lanes, and what each found.
        lanes: Vec<(Lane, LaneSums)>,
        /// Time that each took, in microseconds.
        micros: u64,
    },
    /// The root of a step that this worker owns alone.
    RootReady {
        /// The step.
        step: Step,
        /// Norm and hash.
        totals: RootTotals,
    },
    /// The peers to which this worker can push now.
    Reaches {
        /// Their sessions.
        peers: Vec<SessionId>,
    },
    /// How fast the way to a peer is.
    Link {
        /// The peer.
        peer: SessionId,
        /// What was measured.
        link: Link,
    },
    /// The slice that this worker owns has these lanes for every chunk.
    Held {
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Vec<Lane>,
    },
    /// The root of the slice that this worker owns.
    SliceReady {
        /// The step.
        step: Step,
        /// Those of its chunks, in index order.
        digests: Vec<ChunkDigest>,
    },
    /// The roots of all slices are here.
    RootHeld {
        /// The step.
        step: Step,
    },
    /// What there is of a state whose moments are divided.
    Digested {
        /// The step.
        step: Step,
        /// What was found.
        digests: Digests,
    },
    /// A commit is applied.
    Applied {
        /// The step.
        step: Step,
        /// The hash of the state, if it was asked for.
        state_hash: Option<[u8; 32]>,
    },
    /// A commit is applied to what this worker keeps, but the rest of the new parameters did not arrive: the state is torn.
    Torn {
        /// The step.
        step: Step,
    },
    /// A commit could not be applied, because its root did not arrive before the session ended.
    GaveUp {
        /// The step.
        step: Step,
    },
    /// A unit is scored, or written.
    UnitDone {
        /// The state's step.
        step: Step,
        /// Index of the split.
        split: u32,
        /// The unit.
        unit: u32,
        /// What it found.
        found: Found,
    },
    /// A snapshot could not be uploaded.
    SnapshotLost {
        /// The state's step.
        step: Step,
    },
    /// The run cannot go on here. Its state is dropped.
    Failed {
        /// The step.
        step: Step,
        /// For people.
        message: String,
        /// Whether another worker may be able to.
        only_here: bool,
    },
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Say this to the coordinator.
    Say(FromWorker),
    /// Get a state, replace whatever is in memory, and open the way to the owners. Ends with a report.
    Load {
        /// Tells the reports about this state from those about an earlier one.
        load: u64,
        /// Which; its source is never `Held`.
        state: LoadState,
    },
    /// Keep the state and the computed lanes, open the way to the owners again. Ends with a report.
    Attach {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// Which moments are kept, if not all: as many as before, but the workers have other names.
        keeper: Option<Keeper>,
    },
    /// Compute lanes; those that are computed already are delivered again.
    Compute {
        /// The step.
        step: Step,
        /// The lanes, ascending.
        lanes: Vec<Lane>,
        /// Who sums the gradient.
        owners: Owners,
    },
    /// The coordinator owns this step's gradient from now on: what was computed for it goes there.
    Collect {
        /// The step.
        step: Step,
    },
    /// What is new of the other workers of the run.
    Peers {
        /// Those that are there no more.
        gone: Vec<SessionId>,
        /// Those that may push here, and can be pushed to where they have an address.
        peers: Vec<Peer>,
    },
    /// These lanes need not be begun.
    Skip {
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Vec<Lane>,
    },
    /// Apply a commit. Ends with a report.
    Commit(Commit),
    /// Score units, or write after prompts.
    Evaluate {
        /// The state's step.
        step: Step,
        /// Index of the split.
        split: u32,
        /// Units, ascending.
        units: Vec<u32>,
    },
    /// Copy the state and upload it.
    Snapshot {
        /// The state's step.
        step: Step,
        /// Where moments are divided: the slices to upload; and what there is of the state is digested.
        slices: Option<Vec<Range<u32>>>,
    },
    /// Send the parameters of a slice to whoever has not got them.
    Serve {
        /// The state's step.
        step: Step,
        /// The slice.
        chunks: Range<u32>,
    },
    /// The session has ended: no root will come any more, and nobody waits for units.
    Detach,
    /// Forget the run.
    Unload,
}

/// A worker's state.
#[derive(Debug, Default)]
pub struct WorkerMachine {
    up: bool,
    leaving: bool,
    loads: u64,
    run: Option<Held>,
}

/// The run in memory.
#[derive(Debug)]
struct Held {
    run: RunId,
    /// Whether the state is being got.
    loading: bool,
    /// Updates that the state has seen.
    step: Step,
    /// The proof of that step, as the commit brought it.
    proof: Option<Proof>,
    /// The entries before it that are not known to be where they outlive the coordinator, ascending and without a gap.
    earlier: VecDeque<Arc<Entry>>,
    /// The step up to which they are.
    safe: Step,
    /// Lanes of the next step that are computed.
    lanes: BTreeSet<Lane>,
    /// Commits that the trainer has been given and has not reported.
    commits: VecDeque<Proof>,
    /// Which moments it keeps, if not all.
    keeper: Option<Keeper>,
}

impl WorkerMachine {
    /// Takes in one event and says what to do.
    pub fn handle(&mut self, event: WorkerEvent) -> Vec<Order> {
        let mut out = Vec::new();
        match event {
            WorkerEvent::Up => {
                self.up = true;
                if self.leaving {
                    out.push(Order::Say(FromWorker::Leaving));
                }
            }
            WorkerEvent::Down => self.down(&mut out),
            WorkerEvent::Told(message) => self.told(message, &mut out),
            WorkerEvent::Did { load, report } if load == self.loads => self.did(report, &mut out),
            WorkerEvent::Did { .. } => {}
            WorkerEvent::LeaveRequested => {
                let first = !std::mem::replace(&mut self.leaving, true);
                if first && self.up {
                    out.push(Order::Say(FromWorker::Leaving));
                }
            }
        }
        self.check_invariants();
        out
    }

    /// Whether the process was asked to end.
    #[cfg(test)]
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Whether nothing is under way that would change the state. Only then may a session be opened.
    pub fn settled(&self) -> bool {
        self.run.as_ref().is_none_or(|r| r.commits.is_empty())
    }

    /// What the next session presents.
    pub fn holding(&self) -> Option<Holding> {
        assert!(self.settled(), "the state is about to change");
        let held = self.run.as_ref().filter(|r| !r.loading)?;
        Some(Holding {
            run: held.run.clone(),
            proof: held.proof.clone()?,
            earlier: held.earlier.iter().cloned().collect(),
            lanes: held.lanes.iter().copied().collect(),
            keeper: held.keeper.clone(),
        })
    }

    /// Forgets the state: the coordinator has found that it is not what it should be.
    pub fn forget(&mut self) -> Vec<Order> {
        let had = self.run.take().is_some();
        had.then_some(Order::Unload).into_iter().collect()
    }

    fn down(&mut self, out: &mut Vec<Order>) {
        self.up = false;
        out.push(Order::Detach);
        if self.run.as_ref().is_some_and(|r| r.loading) {
            out.extend(self.forget());
        }
    }

    fn told(&mut self, message: ToWorker, out: &mut Vec<Order>) {
        match message {
            ToWorker::Ping { .. } => {}
            ToWorker::Load(state) => self.load(state, out),
            ToWorker::Compute {
                run,
                step,
                lanes,
                owners,
                ..
            } if self.has(&run) => out.push(Order::Compute {
                step,
                lanes,
                owners,
            }),
            ToWorker::Collect { run, step } if self.has(&run) => out.push(Order::Collect { step }),
            ToWorker::Peers { run, gone, peers } if self.has(&run) => {
                out.push(Order::Peers { gone, peers });
            }
            ToWorker::Skip { run, step, lanes } if self.has(&run) => {
                out.push(Order::Skip { step, lanes });
            }
            ToWorker::Commit { run, commit } if self.has(&run) => {
                let held = self.run.as_mut().expect("checked");
                held.commits.push_back(commit.proof.clone());
                held.safe = held.safe.max(commit.safe);
                out.push(Order::Commit(commit));
            }
            ToWorker::Evaluate {
                run,
                step,
                split,
                units,
            } if self.has(&run) => out.push(Order::Evaluate { step, split, units }),
            ToWorker::Snapshot { run, step, slices } if self.has(&run) => {
                out.push(Order::Snapshot { step, slices });
            }
            ToWorker::Serve { run, step, chunks } if self.has(&run) => {
                out.push(Order::Serve { step, chunks });
            }
            ToWorker::Unload { run } if self.has(&run) => out.extend(self.forget()),
            // About a run that is not here any more.
            _ => {}
        }
    }

    fn load(&mut self, mut state: LoadState, out: &mut Vec<Order>) {
        if let StateSource::Held(step) = state.source {
            let LoadState { run, keeper, .. } = state;
            match &mut self.run {
                Some(held) if held.run == run && held.step == step && !held.loading => {
                    held.keeper = keeper.clone();
                    out.push(Order::Attach { run, step, keeper });
                }
                other => {
                    let have = other
                        .as_ref()
                        .map(|h| format!("step {} of {}", h.step, h.run));
                    let have = have.unwrap_or_else(|| "nothing".into());
                    let message =
                        format!("asked for step {step} of {run} from memory, but {have} is there");
                    out.push(Order::Say(FromWorker::Failed {
                        run,
                        step,
                        message,
                        only_here: true,
                    }));
                }
            }
            return;
        }
        let stays = |held: &&mut Held| {
            let same = held.run == state.run && held.step == state.source.step();
            state.lanes_stay && same && !held.loading && held.commits.is_empty()
        };
        state.lanes_stay = self.run.as_mut().filter(stays).is_some();
        // The proof of a state that is loaded is not known, unless it is the one that was here.
        let known = match self.run.take_if(|_| state.lanes_stay) {
            Some(held) => (held.proof, held.earlier, held.safe, held.lanes),
            None => {
                out.extend(self.forget());
                Default::default()
            }
        };
        let (proof, earlier, safe, lanes) = known;
        self.loads += 1;
        self.run = Some(Held {
            run: state.run.clone(),
            loading: true,
            step: state.source.step(),
            proof,
            earlier,
            safe,
            lanes,
            commits: VecDeque::new(),
            keeper: state.keeper.clone(),
        });
        let load = self.loads;
        out.push(Order::Load { load, state });
    }

    fn did(&mut self, report: Report, out: &mut Vec<Order>) {
        let Some(held) = &mut self.run else { return };
        let run = held.run.clone();
        let say = match report {
            Report::Loaded { step, state_hash } => {
                if step != held.step {
                    return;
                }
                held.loading = false;
                FromWorker::Loaded {
                    run,
                    step,
                    state_hash,
                }
            }
            Report::LanesDone {
                step,
                lanes,
                micros,
            } => {
                if step == held.step + 1 {
                    held.lanes.extend(lanes.iter().map(|(lane, _)| *lane));
                }
                if self.up {
                    out.extend(lanes.into_iter().map(|(lane, sums)| {
                        Order::Say(FromWorker::LaneDone {
                            run: run.clone(),
                            step,
                            lane,
                            sums,
                            micros,
                        })
                    }));
                }
                return;
            }
            Report::RootReady { step, totals } => FromWorker::RootReady { run, step, totals },
            Report::Reaches { peers } => FromWorker::Reaches { run, peers },
            Report::Link { peer, link } => FromWorker::Link { run, peer, link },
            Report::Held { step, lanes } => FromWorker::Held { run, step, lanes },
            Report::SliceReady { step, digests } => FromWorker::SliceReady { run, step, digests },
            Report::RootHeld { step } => FromWorker::RootHeld { run, step },
            Report::Digested { step, digests } => FromWorker::Digested { run, step, digests },
            Report::Torn { step } => {
                let proof = held.commits.pop_front().expect("a commit was given");
                assert_eq!(proof.step, step, "commits are applied in order");
                // It presents nothing, and has to load again.
                held.loading = true;
                held.proof = None;
                held.earlier.clear();
                return;
            }
            Report::Applied { step, state_hash } => {
                let proof = held.commits.pop_front().expect("a commit was given");
                assert_eq!(proof.step, step, "commits are applied in order");
                held.keep(proof);
                held.step = step;
                held.lanes.clear();
                FromWorker::Applied {
                    run,
                    step,
                    state_hash,
                }
            }
            Report::GaveUp { step } => {
                let proof = held.commits.pop_front().expect("a commit was given");
                assert_eq!(proof.step, step, "commits are given up in order");
                return;
            }
            Report::UnitDone {
                step,
                split,
                unit,
                found,
            } => FromWorker::UnitDone {
                run,
                step,
                split,
                unit,
                found,
            },
            Report::SnapshotLost { step } => FromWorker::SnapshotLost { run, step },
            Report::Failed {
                step,
                message,
                only_here,
            } => {
                self.run = None;
                FromWorker::Failed {
                    run,
                    step,
                    message,
                    only_here,
                }
            }
        };
        if self.up {
            out.push(Order::Say(say));
        }
    }

    fn has(&self, run: &RunId) -> bool {
        self.run.as_ref().is_some_and(|held| held.run == *run)
    }

    fn check_invariants(&self) {
        let Some(held) = &self.run else { return };
        let proof = held.proof.as_ref();
        assert!(
            proof.is_none_or(|p| p.step == held.step),
            "a proof of another step"
        );
        let steps: Vec<Step> = held.commits.iter().map(|c| c.step).collect();
        assert!(
            steps.windows(2).all(|w| w[0] + 1 == w[1]),
            "a commit was skipped or came twice: {steps:?}"
        );
        assert!(steps.first().is_none_or(|s| *s > held.step), "{steps:?}");
        let newest = proof.and_then(|proof| proof.entry.as_ref());
        let kept = held.earlier.iter().chain(newest);
        let kept: Vec<Step> = kept.map(|entry| entry.step).collect();
        assert!(
            kept.windows(2).all(|w| w[0] + 1 == w[1]),
            "an entry that is kept is missing: {kept:?}"
        );
    }
}

impl Held {
    /// Keeps the proof of the newest step, and the entries before it that may be needed with it. Where the coordinator has not
    /// said for too long that they are safe, the oldest go: then it may have to go on from a checkpoint.
    fn keep(&mut self, proof: Proof) {
        let follows = |before: &Proof| before.step + 1 == proof.step;
        let before = self.proof.take().filter(follows);
        match before.and_then(|before| before.entry) {
            Some(entry) => self.earlier.push_back(entry),
            None => self.earlier.clear(),
        }
        let len = proof.entry.as_ref().map_or(1, |entry| entry.encoded_len());
        let most = (MOST_KEPT / len).max(1);
        let unneeded = |earlier: &VecDeque<Arc<Entry>>| match earlier.front() {
            Some(first) => first.step <= self.safe || earlier.len() > most,
            None => false,
        };
        while unneeded(&self.earlier) {
            self.earlier.pop_front();
        }
        self.proof = Some(proof);
    }
}

#[cfg(test)]
mod tests;
