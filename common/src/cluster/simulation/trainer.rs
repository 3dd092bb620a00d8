//! The trainer of a simulated worker: integer "gradients", a state of three numbers, and time that passes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use crate::aggregate::{ChunkDigest, RootTotals};
use crate::checkpoint::{chunk_digest, combine_digests};
use crate::cluster::division::{Digests, Keeper};
use crate::cluster::messages::{Commit, Found, LaneSums, Owners, Scores};
use crate::cluster::worker::{Order, Report};
use crate::floats::add;
use crate::ids::{Lane, SessionId, Step};
use crate::lanes;
use crate::tree::{Node, Tree};

/// Elements of a simulated gradient.
pub const LEN: usize = 3;

/// What a commit wants to know of a root, whose chunks are its elements.
pub fn totals(root: &[f32]) -> RootTotals {
    let digests: Vec<ChunkDigest> = root.iter().map(|x| ChunkDigest::of(&[*x])).collect();
    RootTotals::of(&digests)
}

/// Parameters, moments and step.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub step: Step,
    pub params: Vec<f32>,
    /// Where they are divided, those of others are NaN.
    pub moments: Vec<f32>,
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
            moments: vec![0.0; LEN],
            updates: 0,
            wild,
        }
    }

    pub fn hash(&self) -> [u8; 32] {
        let digests: Vec<[u8; 32]> = (0..LEN).map(|i| self.digest(i)).collect();
        combine_digests(&digests)
    }

    fn digest(&self, element: usize) -> [u8; 32] {
        chunk_digest(&[self.params[element]], &[self.moments[element]], &[0.0])
    }

    /// What a worker finds that keeps some of the moments.
    fn digests(&self, keeper: &Keeper) -> Digests {
        let kept = keeper.kept().into_iter().flatten().flatten();
        Digests {
            params: totals(&self.params).hash,
            kept: kept.map(|i| self.digest(i as usize)).collect(),
        }
    }

    /// Forgets the moments that others keep.
    fn divide(&mut self, keeper: &Keeper) {
        for (i, moment) in (0..).zip(&mut self.moments) {
            if !keeper.keeps(i) {
                *moment = f32::NAN;
            }
        }
    }

    /// Nothing but these slices.
    fn part(&self, slices: &[Range<u32>]) -> Self {
        let mut part = self.clone();
        for i in 0..LEN {
            if !slices.iter().any(|slice| slice.contains(&(i as u32))) {
                part.params[i] = f32::NAN;
                part.moments[i] = f32::NAN;
            }
        }
        part
    }

    /// Takes in what another has.
    pub fn join(&mut self, part: &Self) {
        for i in (0..LEN).filter(|i| !part.params[*i].is_nan()) {
            self.params[i] = part.params[i];
            self.moments[i] = part.moments[i];
        }
    }

    /// Whether nothing is missing.
    pub fn is_whole(&self) -> bool {
        !self.params.iter().chain(&self.moments).any(|x| x.is_nan())
    }

    /// A step without its update.
    pub fn pass_over(&mut self) {
        self.step += 1;
    }

    /// Integers below 1024, so that every sum is exact.
    pub fn update(&mut self, root: &[f32]) {
        self.step += 1;
        self.updates += 1;
        for (i, root) in root.iter().enumerate() {
            self.update_element(i, *root);
        }
    }

    fn update_element(&mut self, i: usize, root: f32) {
        self.moments[i] = (self.moments[i] + root) % 512.0;
        self.params[i] = (self.params[i] + self.moments[i]) % 1024.0;
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
    /// New parameters of a slice go to those who do not keep it, but not to this one, which does.
    Publish(Step, Range<u32>, Vec<f32>, Option<SessionId>),
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
    /// A commit that is applied to what is kept here.
    Rest(Commit),
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
    /// Which moments are kept, if not all.
    pub keeper: Option<Keeper>,
    /// Parameters of others' slices, as they arrive.
    params: BTreeMap<Step, Vec<Option<f32>>>,
    /// Slices that others may not have got.
    serves: Vec<(Step, Range<u32>)>,
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
            Order::Serve { step, chunks } => self.serves.push((step, chunks)),
            Order::Commit(commit) => {
                self.committed = self.committed.max(commit.step());
                self.jobs.push_back(Job::Other(Order::Commit(commit)));
            }
            order => self.jobs.push_back(Job::Other(order)),
        }
    }

    /// A state has been got.
    pub fn install(&mut self, mut state: State) {
        if let Some(keeper) = &self.keeper {
            state.divide(keeper);
        }
        self.roots.retain(|s, _| *s > state.step);
        self.state = Some(state);
        self.kept.clear();
        self.attached = true;
    }

    pub fn attach(&mut self) {
        self.attached = true;
        if self.keeper.is_some() {
            // They were in the exchange of before.
            self.roots.clear();
        }
        // What was given up is not committed here, and nothing is skipped any more.
        self.skipped.clear();
        self.committed = self.state.as_ref().map_or(0, |s| s.step);
    }

    /// How it stands, for a failure.
    pub fn describe(&self) -> String {
        let first = match self.jobs.front() {
            None => "idle".into(),
            Some(Job::Compute { step, lanes, .. }) => format!("computes {lanes:?} of {step}"),
            Some(Job::Rest(commit)) => format!("lacks parameters of {}", commit.step()),
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
            Some(Job::Rest(commit)) => self.rest_of(commit.step()).is_some(),
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
            Job::Other(Order::Commit(commit)) if self.keeper.is_some() => {
                self.commit_kept(commit, &mut out);
            }
            Job::Other(Order::Commit(commit)) => self.commit(&commit, &mut out),
            Job::Rest(commit) => self.commit_rest(&commit, &mut out),
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
            Job::Other(Order::Snapshot { step, slices }) => {
                // Where the commit before it was given up, nobody waits for it any more.
                if let Some(state) = self.state.as_ref().filter(|s| s.step == step) {
                    if slices.is_some() {
                        out.push(Effect::Report(self.digested(state)));
                    }
                    match slices {
                        None => out.push(Effect::Upload(state.clone())),
                        Some(slices) if slices.is_empty() => {}
                        Some(slices) => out.push(Effect::Upload(state.part(&slices))),
                    }
                }
            }
            Job::Other(order) => unreachable!("{order:?} is no job"),
        }
        out.extend(self.serve());
        out
    }

    fn digested(&self, state: &State) -> Report {
        let keeper = self.keeper.as_ref().expect("moments are divided");
        Report::Digested {
            step: state.step,
            digests: state.digests(keeper),
        }
    }

    /// What is said before a state is said to be loaded.
    pub fn digested_at_first(&self) -> Option<Report> {
        let state = self.state.as_ref().expect("loaded");
        self.keeper.as_ref().map(|_| self.digested(state))
    }

    /// Slices that are asked for, as soon as their step is made here.
    pub fn serve(&mut self) -> Vec<Effect> {
        let Some(state) = &self.state else {
            return Vec::new();
        };
        let made = match self.jobs.front() {
            Some(Job::Rest(commit)) => commit.step(),
            _ => state.step,
        };
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.serves)
            .into_iter()
            .partition(|(step, _)| *step <= made);
        self.serves = later;
        let publish = |(step, slice): (Step, Range<u32>)| {
            let params = state.params[slice.start as usize..slice.end as usize].to_vec();
            (step == made).then_some(Effect::Publish(step, slice, params, None))
        };
        due.into_iter().filter_map(publish).collect()
    }

    /// Parameters of another's slice arrive.
    pub fn take_params(&mut self, step: Step, first: u32, params: &[f32]) {
        let known = self.params.entry(step).or_insert_with(|| vec![None; LEN]);
        for (known, new) in known[first as usize..].iter_mut().zip(params) {
            *known = Some(*new);
        }
    }

    /// The rest of a step's parameters, NaN where they are kept here; `None` as long as some are missing.
    fn rest_of(&self, step: Step) -> Option<Vec<f32>> {
        let keeper = self.keeper.as_ref()?;
        let sent = self.params.get(&step);
        let of = |i: usize| match keeper.keeps(i as u32) {
            true => Some(f32::NAN),
            false => sent?[i],
        };
        (0..LEN).map(of).collect()
    }

    /// Nobody will send the rest of a step's parameters any more, if some are missing: the step.
    pub fn tear(&mut self) -> Option<Step> {
        let Some(Job::Rest(commit)) = self.jobs.front() else {
            return None;
        };
        let step = commit.step();
        *self = Self::default();
        Some(step)
    }

    fn commit_kept(&mut self, commit: Commit, out: &mut Vec<Effect>) {
        let step = commit.step();
        let root = self.roots.remove(&step).expect("everybody has it before");
        let keeper = self.keeper.clone().expect("moments are divided");
        let state = self.state.as_mut().expect("loaded before");
        assert_eq!(state.step + 1, step);
        if !commit.proof.skipped {
            for i in keeper.kept().into_iter().flatten().flatten() {
                state.update_element(i as usize, root[i as usize]);
            }
            if let Some([own, _]) = keeper.kept() {
                let params = state.params[own.start as usize..own.end as usize].to_vec();
                let second = keeper.division.second_of(keeper.session);
                out.push(Effect::Publish(step, own, params, second));
            }
        }
        match commit.proof.skipped {
            true => self.finish(&commit, out),
            false => self.jobs.push_front(Job::Rest(commit)),
        }
    }

    fn commit_rest(&mut self, commit: &Commit, out: &mut Vec<Effect>) {
        let rest = self.rest_of(commit.step()).expect("it was looked at");
        let state = self.state.as_mut().expect("loaded before");
        for (param, new) in state.params.iter_mut().zip(rest) {
            if !new.is_nan() {
                *param = new;
            }
        }
        state.updates += 1;
        self.finish(commit, out);
    }

    fn finish(&mut self, commit: &Commit, out: &mut Vec<Effect>) {
        let state = self.state.as_mut().expect("loaded before");
        state.step += 1;
        assert_eq!(state.updates, commit.updates);
        let step = state.step;
        self.kept.clear();
        self.params.retain(|s, _| *s > step);
        let state = self.state.as_ref().expect("loaded before");
        if commit.hash_state {
            out.push(Effect::Report(self.digested(state)));
        }
        let state_hash = None;
        out.push(Effect::Report(Report::Applied { step, state_hash }));
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
                out.push(Effect::Report(Report::LanesDone {
                    step,
                    lanes: vec![(lane, state.sums(lane))],
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
