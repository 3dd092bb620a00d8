//! A whole cluster in one thread: the real machine and the real aggregation, with simulated workers whose integer
//! "gradients" betray any lane that is lost or counted twice. Messages of one connection keep their order; between
//! connections the seed decides. A failure prints its seed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::coordinator::{Change, Event, LeftReason, MemberInfo};
use super::messages::{FromWorker, LaneSums, StateSource, ToWorker};
use super::{Action, EvalSplit, Limits, Machine, RunPlan};
use crate::aggregate::{Aggregator, Offered, RootTotals, encode, totals_of};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::rng::philox;
use crate::spec::{
    Architecture, CheckpointConfig, ModelConfig, RunKind, RunSpec, ScheduleKind, TrainConfig,
};
use crate::tree::{Node, Tree};

const LEN: usize = 3;

struct Worker {
    inbox: VecDeque<ToWorker>,
    outbox: VecDeque<Out>,
    state: Option<(Step, Vec<f32>)>,
    own_root: Option<Vec<f32>>,
}

enum Out {
    Control(FromWorker),
    Push(Step, Node, Vec<f32>),
    Checkpoint(Step, Vec<f32>),
}

struct World {
    seed: u64,
    draws: u32,
    now: u64,
    machine: Machine,
    workers: BTreeMap<SessionId, Worker>,
    next_session: u64,
    aggregators: BTreeMap<Step, Aggregator>,
    checkpoints: BTreeMap<Step, Vec<f32>>,
    roots: BTreeMap<Step, [u8; 32]>,
    evals: BTreeMap<Step, LaneSums>,
    end: Option<Change>,
    plan: RunPlan,
}

/// What a lane contributes to a step: small integers that depend on the state, so that every sum is exact.
fn gradient(step: Step, lane: Lane, state: &[f32]) -> Vec<f32> {
    (0..LEN)
        .map(|i| ((step * 31 + u64::from(lane) * 7 + i as u64) % 64) as f32 + state[i] % 8.0)
        .collect()
}

fn sums_of(step: Step, lane: Lane) -> LaneSums {
    LaneSums {
        loss: (step * 3 + u64::from(lane)) as f64,
        weight: 4.0,
    }
}

fn apply(state: &[f32], root: &[f32]) -> Vec<f32> {
    state
        .iter()
        .zip(root)
        .map(|(s, r)| (s + r) % 1024.0)
        .collect()
}

fn plan(lanes: u32, steps: u64) -> RunPlan {
    let train = TrainConfig {
        steps,
        lanes,
        micro_batch: 1,
        accumulate: 1,
        learning_rate: 1.0,
        min_learning_rate: 1.0,
        warmup_steps: 0,
        schedule: ScheduleKind::Constant,
        decay_steps: 0,
        beta1: 0.9,
        beta2: 0.9,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip: 0.0,
        seed: 0,
        eval_every: 3,
        eval_samples: 0,
        min_workers: 1,
    };
    let model = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 8,
        context: 4,
        hidden_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        intermediate_size: 8,
        tie_word_embeddings: true,
        bias: false,
        dropout: 0.0,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        initializer_range: 0.02,
    };
    RunPlan {
        run: RunId::new("sim-1"),
        spec: Arc::new(RunSpec {
            kind: RunKind::Pretrain,
            model,
            train,
            checkpoint: CheckpointConfig { every: 4, keep: 2 },
            corpus: "corpus".into(),
            start: None,
        }),
        splits: Arc::from([EvalSplit {
            corpus: "corpus".into(),
            split: "validation".into(),
            label: "validation".into(),
            units: 5,
            windows: 1,
            ends_only: false,
        }]),
        source: StateSource::Seed,
    }
}

impl World {
    fn new(seed: u64, lanes: u32, steps: u64) -> Self {
        Self {
            seed,
            draws: 0,
            now: 0,
            machine: Machine::new(Limits::default()),
            workers: BTreeMap::new(),
            next_session: 1,
            aggregators: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            roots: BTreeMap::new(),
            evals: BTreeMap::new(),
            end: None,
            plan: plan(lanes, steps),
        }
    }

    fn draw(&mut self, below: usize) -> usize {
        self.draws += 1;
        philox(self.seed, [self.draws, 0, 0, 0])[0] as usize % below
    }

    fn lanes(&self) -> u32 {
        self.plan.spec.train.lanes
    }

    fn join(&mut self) {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        let worker = Worker {
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            state: None,
            own_root: None,
        };
        self.workers.insert(session, worker);
        let info = MemberInfo {
            host: "sim".into(),
            pid: 1,
            device: "cpu".into(),
            threads: 1,
            fingerprint: "sim".into(),
        };
        self.event(Event::Joined { session, info });
    }

    fn kill(&mut self, session: SessionId) {
        self.workers.remove(&session);
        let reason = LeftReason::ConnectionClosed;
        self.event(Event::Left { session, reason });
    }

    fn event(&mut self, event: Event) {
        self.now += 1;
        for action in self.machine.handle(self.now, event) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send { session, message } => {
                if let Some(worker) = self.workers.get_mut(&session) {
                    worker.inbox.push_back(message);
                }
            }
            Action::OpenStep { step, .. } => {
                self.aggregators
                    .insert(step, Aggregator::new(self.lanes(), LEN));
            }
            Action::ReleaseRoots { through, .. } => {
                self.aggregators.retain(|step, _| *step > through);
            }
            Action::Committed(record) => {
                let known = self.roots.entry(record.step).or_insert(record.root_hash);
                assert_eq!(*known, record.root_hash, "step {} differs", record.step);
            }
            Action::Evaluated { step, sums, .. } => {
                let known = self.evals.entry(step).or_insert(sums);
                assert_eq!(*known, sums, "validation of step {step} differs");
            }
            Action::Changed { change, .. } => match change {
                Change::Finished { .. } | Change::Failed { .. } => self.end = Some(change),
                _ => {}
            },
            Action::Close { .. } | Action::Note { .. } => {}
        }
    }

    /// Lets one message arrive: at a worker, or at the coordinator.
    fn deliver(&mut self) {
        let busy: Vec<(SessionId, bool)> = self
            .workers
            .iter()
            .flat_map(|(&s, w)| {
                let inbound = (!w.inbox.is_empty()).then_some((s, true));
                let outbound = (!w.outbox.is_empty()).then_some((s, false));
                inbound.into_iter().chain(outbound)
            })
            .collect();
        if busy.is_empty() {
            return;
        }
        let (session, inbound) = busy[self.draw(busy.len())];
        let worker = self.workers.get_mut(&session).expect("it is busy");
        if inbound {
            let message = worker.inbox.pop_front().expect("not empty");
            self.work(session, message);
            return;
        }
        match worker.outbox.pop_front().expect("not empty") {
            Out::Control(message) => self.event(Event::Said { session, message }),
            Out::Push(step, node, data) => self.push(step, node, &data),
            Out::Checkpoint(step, state) => {
                self.checkpoints.insert(step, state);
                let run = self.plan.run.clone();
                self.event(Event::CheckpointWritten { run, step });
            }
        }
    }

    fn push(&mut self, step: Step, node: Node, data: &[f32]) {
        let Some(aggregator) = self.aggregators.get(&step) else {
            return;
        };
        let offered: Offered = aggregator
            .offer(node, 0, &encode(data))
            .expect("honest peers");
        let totals: Option<RootTotals> = offered
            .all_complete
            .then(|| aggregator.totals().expect("all chunks are there"));
        let run = self.plan.run.clone();
        if !offered.delivered.is_empty() {
            self.event(Event::Delivered {
                run: run.clone(),
                step,
                lanes: offered.delivered,
            });
        }
        if let Some(totals) = totals {
            self.event(Event::RootComplete { run, step, totals });
        }
    }

    fn work(&mut self, session: SessionId, message: ToWorker) {
        let root = match &message {
            ToWorker::Commit { commit, .. } => self
                .aggregators
                .get(&commit.step)
                .and_then(|a| a.root(0))
                .map(|root| crate::aggregate::decode(&root.data)),
            _ => None,
        };
        let tree = Tree::new(self.lanes());
        let checkpoints = &self.checkpoints;
        let worker = self.workers.get_mut(&session).expect("it is alive");
        worker.work(message, tree, root, checkpoints);
    }
}

impl Worker {
    fn say(&mut self, message: FromWorker) {
        self.outbox.push_back(Out::Control(message));
    }

    fn work(
        &mut self,
        message: ToWorker,
        tree: Tree,
        root: Option<Vec<f32>>,
        checkpoints: &BTreeMap<Step, Vec<f32>>,
    ) {
        match message {
            ToWorker::Load { run, source, .. } => {
                let state = match source {
                    StateSource::Checkpoint(step) => checkpoints[&step].clone(),
                    StateSource::Seed | StateSource::Start => vec![1.0; LEN],
                };
                let step = source.step();
                self.state = Some((step, state));
                self.say(FromWorker::Loaded { run, step });
            }
            ToWorker::Compute {
                run,
                step,
                lanes,
                sole_owner,
                ..
            } => self.compute(run, step, &lanes, sole_owner, tree),
            ToWorker::Commit { run, commit } => {
                let (at, state) = self.state.take().expect("loaded before");
                let step = commit.step;
                assert_eq!(at + 1, step, "a worker skipped or repeated a commit");
                let root = self.own_root.take().or(root).expect("the root is kept");
                self.state = Some((step, apply(&state, &root)));
                self.say(FromWorker::Applied { run, step });
            }
            ToWorker::Evaluate {
                run,
                step,
                split,
                units,
            } => {
                for unit in units {
                    let sums = sums_of(step, unit);
                    self.say(FromWorker::UnitDone {
                        run: run.clone(),
                        step,
                        split,
                        unit,
                        sums,
                    });
                }
            }
            ToWorker::Snapshot { step, .. } => {
                let (at, state) = self.state.clone().expect("loaded before");
                assert_eq!(at, step, "a snapshot is taken at its boundary");
                self.outbox.push_back(Out::Checkpoint(step, state));
            }
            ToWorker::Unload { .. } => self.state = None,
        }
    }

    fn compute(&mut self, run: RunId, step: Step, lanes: &[Lane], sole: bool, tree: Tree) {
        let (at, state) = self.state.clone().expect("loaded before");
        assert_eq!(
            at + 1,
            step,
            "lanes are computed with the state before the step"
        );
        for &lane in lanes {
            self.say(FromWorker::LaneDone {
                run: run.clone(),
                step,
                lane,
                sums: sums_of(step, lane),
                micros: 1,
            });
        }
        for range in crate::lanes::ranges(lanes) {
            for node in tree.cover(range) {
                let mut sum = vec![0.0; LEN];
                for lane in node.lanes() {
                    crate::aggregate::add(&mut sum, &gradient(step, lane, &state));
                }
                if sole {
                    assert_eq!(node, tree.root());
                    let totals = totals_of(&sum);
                    self.own_root = Some(sum);
                    let run = run.clone();
                    self.say(FromWorker::RootReady { run, step, totals });
                } else {
                    self.outbox.push_back(Out::Push(step, node, sum));
                }
            }
        }
    }
}

/// The states and roots that a single faultless machine finds.
fn expected(lanes: u32, steps: u64) -> (Vec<f32>, BTreeMap<Step, [u8; 32]>) {
    let mut state = vec![1.0; LEN];
    let mut roots = BTreeMap::new();
    for step in 1..=steps {
        let mut root = vec![0.0; LEN];
        for lane in 0..lanes {
            crate::aggregate::add(&mut root, &gradient(step, lane, &state));
        }
        roots.insert(step, totals_of(&root).hash);
        state = apply(&state, &root);
    }
    (state, roots)
}

fn run_schedule(seed: u64) {
    let lanes = 1 + (seed % 9) as u32;
    let steps = 9;
    let mut world = World::new(seed, lanes, steps);
    world.join();
    let plan = world.plan.clone();
    world.event(Event::Submitted(plan));
    for round in 0..20_000 {
        if world.end.is_some() {
            break;
        }
        let faults = round < 3_000;
        match world.draw(60) {
            0 if faults && world.workers.len() < 6 => world.join(),
            1 if faults && !world.workers.is_empty() => {
                let nth = world.draw(world.workers.len());
                let session = *world.workers.keys().nth(nth).expect("in range");
                world.kill(session);
            }
            _ if world.workers.is_empty() => world.join(),
            _ => world.deliver(),
        }
    }
    let (state, roots) = expected(lanes, steps);
    let end = world.end.as_ref();
    assert!(
        matches!(end, Some(Change::Finished { step, .. }) if *step == steps),
        "seed {seed}: {end:?} in {:?}",
        world.machine
    );
    assert_eq!(world.roots, roots, "seed {seed}");
    assert_eq!(world.checkpoints[&steps], state, "seed {seed}");
    let scored: Vec<Step> = world.evals.keys().copied().collect();
    assert_eq!(scored, [0, 3, 6, 9], "seed {seed}");
}

/// Kills and joins at any moment change nothing in what is committed. `COHORT_SIM_SEEDS` sets the number of schedules.
#[test]
fn any_schedule_of_kills_and_joins_commits_the_same_roots() {
    let seeds = std::env::var("COHORT_SIM_SEEDS").ok();
    let seeds: u64 = seeds.and_then(|s| s.parse().ok()).unwrap_or(2_000);
    for seed in 0..seeds {
        run_schedule(seed);
    }
}

#[test]
fn a_worker_of_other_numerics_is_refused() {
    let mut machine = Machine::new(Limits::default());
    let info = |fingerprint: &str| MemberInfo {
        host: "host".into(),
        pid: 1,
        device: "cpu".into(),
        threads: 1,
        fingerprint: fingerprint.into(),
    };
    let join = |session, fingerprint| Event::Joined {
        session: SessionId(session),
        info: info(fingerprint),
    };
    assert_eq!(machine.handle(0, join(1, "avx2")), []);
    let actions = machine.handle(1, join(2, "avx512"));
    assert!(matches!(
        actions.as_slice(),
        [Action::Close {
            session: SessionId(2),
            reason: LeftReason::Fingerprint { .. }
        }]
    ));
    assert_eq!(machine.members().len(), 1);
}

#[test]
fn a_silent_worker_is_lost_after_the_deadline() {
    let mut world = World::new(1, 2, 1);
    world.join();
    world.now = 14_000;
    world.event(Event::Tick);
    assert_eq!(world.machine.members().len(), 1);
    world.now = 15_001;
    world.event(Event::Tick);
    assert!(world.machine.members().is_empty());
}

#[test]
fn runs_wait_in_a_queue_and_say_whom_they_wait_for() {
    let mut machine = Machine::new(Limits::default());
    let first = plan(2, 1);
    let second = RunPlan {
        run: RunId::new("sim-2"),
        ..plan(2, 1)
    };
    let waiting = machine.handle(0, Event::Submitted(first.clone()));
    let change = Change::Waiting { have: 0, need: 1 };
    let run = first.run.clone();
    assert_eq!(waiting, [Action::Changed { run, change }]);
    let queued = machine.handle(1, Event::Submitted(second.clone()));
    let change = Change::Queued { place: 1 };
    let run = second.run.clone();
    assert!(queued.contains(&Action::Changed { run, change }));
    machine.handle(2, Event::Cancelled(first.run));
    assert_eq!(machine.active_run(), Some(&second.run));
}
