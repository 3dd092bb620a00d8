//! The trainer of a simulated worker: integer "gradients", a state of three numbers, and time that passes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::aggregate::{ChunkDigest, RootTotals};
use crate::cluster::messages::{Commit, Found, LaneSums, Owners, Scores};
use crate::cluster::worker::{Order, Report};
use crate::floats::add;
use crate::ids::{Lane, Step};
use crate::lanes;
use crate::tree::{Node, Tree};

/// Elements of a simulated gradient.
pub const LEN: usize = 3;

/// What a commit wants to know of a root, whose chunks are its elements.
pub fn totals(root: &[f32]) -> RootTotals {
    let digests: Vec<ChunkDigest> = root.iter().map(|x| ChunkDigest::of(&[*x])).collect();
    RootTotals::of(&digests)
}

/// Parameters and step.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub step: Step,
    pub params: Vec<f32>,
    /// The optimizer's count.
    pub updates: u64,
    /// Whether the run has steps out of the ordinary.
    pub wild: bool,
}

impl State {
    pub fn seed(wild: bool) -> Self {
        Self {
            step: 0,
            params: vec![1.0; LEN],
            updates: 0,
            wild,
        }
    }

    pub fn hash(&self) -> [u8; 32] {
        totals(&self.params).hash
    }

    /// A step without its update.
    pub fn pass_over(&mut self) {
        self.step += 1;
    }

    /// Integers below 1024, so that every sum is exact.
    pub fn update(&mut self, root: &[f32]) {
        self.step += 1;
        self.updates += 1;
        for (p, r) in self.params.iter_mut().zip(root) {
            *p = (*p + r) % 1024.0;
        }
    }

    /// What it writes after a prompt: tokens that depend on the state.
    pub fn writes(&self, prompt: u32) -> Vec<u32> {
        let params = self.params.iter().map(|p| *p as u32);
        [prompt].into_iter().chain(params).collect()
    }

    /// What a lane contributes to the next step: small integers that depend on the state.
    pub fn gradient(&self, lane: Lane) -> Vec<f32> {
        let step = self.step + 1;
        if lane == 0 && self.is_broken(step) {
            return vec![f32::NAN; LEN];
        }
        (0..LEN)
            .map(|i| {
                ((step * 31 + u64::from(lane) * 7 + i as u64) % 64) as f32 + self.params[i] % 8.0
            })
            .collect()
    }

    /// What a lane of the next step finds.
    pub fn sums(&self, lane: Lane) -> LaneSums {
        let step = self.step + 1;
        let mut sums = sums_of(step, lane);
        if lane == 0 && self.wild && step > 20 && step % 9 == 7 {
            sums.loss += 1e4;
        }
        if lane == 0 && self.is_broken(step) {
            sums.loss = f64::INFINITY;
        }
        sums
    }

    /// Whether a step has a lane that is not finite.
    fn is_broken(&self, step: Step) -> bool {
        self.wild && step % 9 == 3
    }
}

pub fn sums_of(step: Step, lane: Lane) -> LaneSums {
    LaneSums {
        loss: (step * 3 + u64::from(lane)) as f64,
        weight: 4.0,
    }
}

/// What a trainer does to the world.
pub enum Effect {
    Report(Report),
    Push(Step, Node, Vec<f32>),
    Upload(State),
}

/// A job, and how far it is.
enum Job {
    Compute {
        step: Step,
        lanes: Vec<Lane>,
        alone: bool,
        /// Lanes whose turn has come; a skipped one has no gradient.
        done: BTreeMap<Lane, Option<Vec<f32>>>,
    },
    Other(Order),
}

#[derive(Default)]
pub struct Trainer {
    pub state: Option<State>,
    jobs: VecDeque<Job>,
    /// Gradients of the next step.
    kept: BTreeMap<Lane, Vec<f32>>,
    skipped: BTreeSet<(Step, Lane)>,
    /// Steps up to here are committed: their lanes need not be computed any more.
    committed: Step,
    own_root: Option<Vec<f32>>,
    pub roots: BTreeMap<Step, Vec<f32>>,
    /// Whether roots can still arrive.
    attached: bool,
}

impl Trainer {
    pub fn give(&mut self, order: Order) {
        match order {
            Order::Skip { step, lanes } => {
                self.skipped.extend(lanes.into_iter().map(|l| (step, l)));
            }
            Order::Detach => self.attached = false,
            Order::Unload => *self = Self::default(),
            Order::Compute {
                step,
                lanes,
                owners,
            } => {
                // They are wanted after all.
                let wanted = |(s, lane): &(Step, Lane)| *s == step && lanes.contains(lane);
                self.skipped.retain(|skipped| !wanted(skipped));
                self.jobs.push_back(Job::Compute {
                    step,
                    lanes,
                    alone: owners == Owners::Alone,
                    done: BTreeMap::new(),
                });
            }
            Order::Commit(commit) => {
                self.committed = self.committed.max(commit.step());
                self.jobs.push_back(Job::Other(Order::Commit(commit)));
            }
            order => self.jobs.push_back(Job::Other(order)),
        }
    }

    /// A state has been got.
    pub fn install(&mut self, state: State) {
        self.roots.retain(|s, _| *s > state.step);
        self.state = Some(state);
        self.kept.clear();
        self.attached = true;
    }

    pub fn attach(&mut self) {
        self.attached = true;
        // What was given up is not committed here, and nothing is skipped any more.
        self.skipped.clear();
        self.committed = self.state.as_ref().map_or(0, |s| s.step);
    }

    /// How it stands, for a failure.
    pub fn describe(&self) -> String {
        let first = match self.jobs.front() {
            None => "idle".into(),
            Some(Job::Compute { step, lanes, .. }) => format!("computes {lanes:?} of {step}"),
            Some(Job::Other(Order::Commit(commit))) => format!("commits {}", commit.step()),
            Some(Job::Other(order)) => format!("{order:?}"),
        };
        let (jobs, attached) = (self.jobs.len(), self.attached);
        format!("{first}, {jobs} jobs, attached {attached}")
    }

    /// Whether there is something that can be done now.
    pub fn busy(&self) -> bool {
        match self.jobs.front() {
            Some(Job::Other(Order::Commit(commit))) => self.state.is_some() && self.can_end(commit),
            Some(_) => self.state.is_some(),
            None => false,
        }
    }

    fn can_end(&self, commit: &Commit) -> bool {
        self.own_root.is_some() || self.roots.contains_key(&commit.step()) || !self.attached
    }

    /// Does one piece of work, such as a lane.
    pub fn work(&mut self, tree: Tree, lane_ms: u64) -> Vec<Effect> {
        let mut out = Vec::new();
        let Some(job) = self.jobs.pop_front() else {
            return out;
        };
        match job {
            Job::Compute {
                step,
                lanes,
                alone,
                done,
            } => self.compute(step, lanes, alone, done, tree, lane_ms, &mut out),
            Job::Other(Order::Commit(commit)) => self.commit(&commit, &mut out),
            Job::Other(Order::Evaluate { step, split, units }) => {
                let state = self.state.as_ref().expect("loaded before");
                if state.step != step {
                    // A session that has ended wanted it.
                    return out;
                }
                for unit in units {
                    let found = match split {
                        0 => Found::Scores(Scores {
                            sums: sums_of(step, unit),
                            confusion: vec![1, u64::from(unit)],
                        }),
                        _ => Found::Written(state.writes(unit)),
                    };
                    out.push(Effect::Report(Report::UnitDone {
                        step,
                        split,
                        unit,
                        found,
                    }));
                }
            }
            Job::Other(Order::Snapshot { step }) => {
                // Where the commit before it was given up, nobody waits for it any more.
                let state = self.state.clone().filter(|s| s.step == step);
                out.extend(state.map(Effect::Upload));
            }
            Job::Other(order) => unreachable!("{order:?} is no job"),
        }
        out
    }

    #[allow(clippy::too_many_arguments)]
    fn compute(
        &mut self,
        step: Step,
        lanes: Vec<Lane>,
        alone: bool,
        mut done: BTreeMap<Lane, Option<Vec<f32>>>,
        tree: Tree,
        lane_ms: u64,
        out: &mut Vec<Effect>,
    ) {
        let state = self.state.as_ref().expect("loaded before");
        if step != state.step + 1 || self.committed >= step {
            return;
        }
        if let Some(&lane) = lanes.iter().find(|l| !done.contains_key(l)) {
            let skip = self.skipped.contains(&(step, lane));
            let gradient = (!skip).then(|| state.gradient(lane));
            if let Some(gradient) = &gradient {
                self.kept.insert(lane, gradient.clone());
                out.push(Effect::Report(Report::LaneDone {
                    step,
                    lane,
                    sums: state.sums(lane),
                    micros: lane_ms * 1000,
                }));
            }
            done.insert(lane, gradient);
        }
        if done.len() < lanes.len() {
            return self.jobs.push_front(Job::Compute {
                step,
                lanes,
                alone,
                done,
            });
        }
        for range in lanes::ranges(&lanes) {
            for node in tree.cover(range) {
                let Some(sum) = sum_node(step, node, &done, out) else {
                    continue;
                };
                if alone {
                    assert_eq!(node, tree.root());
                    let totals = totals(&sum);
                    self.own_root = Some(sum);
                    out.push(Effect::Report(Report::RootReady { step, totals }));
                } else {
                    out.push(Effect::Push(step, node, sum));
                }
            }
        }
    }

    fn commit(&mut self, commit: &Commit, out: &mut Vec<Effect>) {
        let step = commit.step();
        let root = self.own_root.take().or_else(|| self.roots.remove(&step));
        let Some(root) = root else {
            assert!(!self.attached, "a root that may still come");
            out.push(Effect::Report(Report::GaveUp { step }));
            return;
        };
        let state = self.state.as_mut().expect("loaded before");
        if state.step + 1 != step {
            // The commit before it was given up.
            out.push(Effect::Report(Report::GaveUp { step }));
            return;
        }
        match commit.proof.skipped {
            true => state.pass_over(),
            false => state.update(&root),
        }
        assert_eq!(state.updates, commit.updates);
        self.kept.clear();
        let state_hash = commit.hash_state.then(|| state.hash());
        out.push(Effect::Report(Report::Applied { step, state_hash }));
    }
}

/// The sum of a node, if no lane of it was skipped; else what there is of it is pushed.
fn sum_node(
    step: Step,
    node: Node,
    done: &BTreeMap<Lane, Option<Vec<f32>>>,
    out: &mut Vec<Effect>,
) -> Option<Vec<f32>> {
    let Some((left, right)) = node.children() else {
        return done[&node.first].clone();
    };
    let l = sum_node(step, left, done, out);
    let r = sum_node(step, right, done, out);
    match (l, r) {
        (Some(mut l), Some(r)) => {
            add(&mut l, &r);
            return Some(l);
        }
        (Some(l), None) => out.push(Effect::Push(step, left, l)),
        (None, Some(r)) => out.push(Effect::Push(step, right, r)),
        (None, None) => {}
    }
    None
}
