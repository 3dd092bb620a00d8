//! The world around the machines: a network whose connections lose, copy, delay and swap messages, processes that crash
//! and freeze, a disk, and virtual time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use super::plan;
use super::trainer::{Effect, State, Trainer};
use crate::aggregate::{Aggregator, Stamp, decode, encode};
use crate::cluster::events::{Action, Change, Event, Happening, LeftReason, MemberInfo};
use crate::cluster::messages::{FromWorker, LaneSums, StateSource, ToWorker};
use crate::cluster::sequence::{Incoming, Outgoing};
use crate::cluster::silence::Silence;
use crate::cluster::worker::{Order, Report, WorkerEvent, WorkerMachine};
use crate::cluster::{Limits, Machine, RunPlan};
use crate::ids::{SessionId, Step};
use crate::ledger::{Chain, Entry, genesis};
use crate::rng::philox;
use crate::tree::{Node, Tree};

/// What is on its way up.
#[derive(Clone)]
enum Up {
    Control(FromWorker),
    Push(Step, Node, Vec<f32>),
}

/// What is on its way down.
#[derive(Clone)]
enum Down {
    Control(ToWorker),
    Root(Step, Vec<f32>),
}

/// What happens next.
#[derive(Clone)]
enum Next {
    Up(usize, SessionId, u64, Up),
    Down(usize, SessionId, u64, Down),
    /// The other end of a connection finds it closed.
    ClosedAbove(SessionId, LeftReason),
    ClosedBelow(usize, SessionId),
    Connect(usize),
    Beat(usize, u64),
    Work(usize, u64),
    Loaded(usize, u64, u64, StateSource),
    Uploaded(SessionId, State),
    CoordinatorTick(u64),
    CoordinatorStart,
    WorkerStart(usize),
}

/// One direction of a connection.
#[derive(Default)]
struct Direction {
    out: Outgoing,
    incoming: Incoming,
    last: u64,
}

#[derive(Default)]
struct Connection {
    control_up: Direction,
    push_up: Direction,
    control_down: Direction,
    root_down: Direction,
}

/// A worker process.
pub struct Worker {
    machine: WorkerMachine,
    trainer: Trainer,
    load: u64,
    pub alive: bool,
    /// Counts processes, so that what an earlier one had planned does not happen.
    life: u64,
    session: Option<SessionId>,
    connection: Connection,
    silence: Silence,
    pub frozen_until: u64,
    pub cut_until: u64,
    pub lane_ms: u64,
    /// Its clock, in thousandths of the true one's speed.
    pub skew: u64,
    working: bool,
}

struct Coordinator {
    machine: Machine,
    /// Open sessions, and what each wants of the exchange.
    sessions: BTreeMap<SessionId, (usize, Option<Step>)>,
    sums: BTreeMap<Step, Aggregator>,
    uploads: BTreeMap<Step, State>,
}

/// What survives a crash of the coordinator.
#[derive(Default)]
pub struct Disk {
    pub ledger: BTreeMap<Step, Arc<Entry>>,
    pub checkpoints: BTreeMap<Step, State>,
    workers: usize,
    finished: bool,
}

/// How often messages are harmed, in thousandths.
#[derive(Clone, Copy, Default)]
pub struct Harm {
    pub lost: u32,
    pub copied: u32,
    pub swapped: u32,
}

pub struct World {
    seed: u64,
    draws: u32,
    pub now: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    happenings: BTreeMap<u64, Next>,
    number: u64,
    coordinator: Option<Coordinator>,
    boots: u64,
    next_session: u64,
    pub workers: Vec<Worker>,
    pub disk: Disk,
    unwritten: Vec<Arc<Entry>>,
    pub evals: BTreeMap<Step, LaneSums>,
    pub end: Option<Change>,
    pub harm: Harm,
    pub happened: Vec<Happening>,
    pub withdrawn: u32,
    /// A fault of one worker's memory: it happens after this step.
    pub corrupt: Option<(usize, Step)>,
    lanes: u32,
    steps: Step,
}

impl World {
    pub fn new(seed: u64, lanes: u32, steps: Step) -> Self {
        let mut world = Self {
            seed,
            draws: 0,
            now: 0,
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            number: 0,
            coordinator: None,
            boots: 0,
            next_session: 0,
            workers: Vec::new(),
            disk: Disk::default(),
            unwritten: Vec::new(),
            evals: BTreeMap::new(),
            end: None,
            harm: Harm::default(),
            happened: Vec::new(),
            withdrawn: 0,
            corrupt: None,
            lanes,
            steps,
        };
        world.after(0, Next::CoordinatorStart);
        world
    }

    pub fn draw(&mut self, below: u64) -> u64 {
        self.draws += 1;
        u64::from(philox(self.seed, [self.draws, 0, 0, 0])[0]) % below
    }

    fn chance(&mut self, thousandths: u32) -> bool {
        thousandths > 0 && self.draw(1000) < u64::from(thousandths)
    }

    fn at(&mut self, time: u64, next: Next) {
        self.number += 1;
        self.queue.push(Reverse((time.max(self.now), self.number)));
        self.happenings.insert(self.number, next);
    }

    fn after(&mut self, delay: u64, next: Next) {
        self.at(self.now + delay, next);
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) {
        let Some(Reverse((time, number))) = self.queue.pop() else {
            return;
        };
        self.now = time;
        let next = self.happenings.remove(&number).expect("planned");
        if let Some(until) = self.blocked(&next) {
            // Things that a frozen process or a cut cable holds up keep their order.
            self.queue.push(Reverse((until, number)));
            self.happenings.insert(number, next);
            return;
        }
        self.happen(next);
    }

    fn blocked(&self, next: &Next) -> Option<u64> {
        let until = match *next {
            Next::Up(w, ..) => self.workers[w].cut_until,
            Next::Down(w, ..) => self.workers[w].cut_until.max(self.workers[w].frozen_until),
            Next::ClosedBelow(w, _) => self.workers[w].cut_until.max(self.workers[w].frozen_until),
            Next::Beat(w, _) | Next::Work(w, _) | Next::Connect(w) | Next::Loaded(w, ..) => {
                self.workers[w].frozen_until
            }
            _ => 0,
        };
        (until > self.now).then_some(until)
    }

    fn happen(&mut self, next: Next) {
        match next {
            Next::CoordinatorStart => self.start_coordinator(),
            Next::CoordinatorTick(boot) => self.tick(boot),
            Next::WorkerStart(w) => self.start_worker(w),
            Next::Connect(w) => self.connect(w),
            Next::Beat(w, life) => self.beat(w, life),
            Next::Work(w, life) => self.work(w, life),
            Next::Loaded(w, life, load, source) => self.loaded(w, life, load, source),
            Next::Up(w, session, number, up) => self.arrive_up(w, session, number, up),
            Next::Down(w, session, number, down) => self.arrive_down(w, session, number, down),
            Next::ClosedAbove(session, reason) => {
                if self.is_open(session) {
                    self.event(Event::Left { session, reason });
                }
            }
            Next::ClosedBelow(w, session) => {
                if self.workers[w].session == Some(session) {
                    self.down(w);
                }
            }
            Next::Uploaded(session, state) => self.uploaded(session, state),
        }
    }

    // The coordinator.

    fn start_coordinator(&mut self) {
        self.boots += 1;
        self.next_session = self.boots << 32;
        self.coordinator = Some(Coordinator {
            machine: Machine::new(Limits::default()),
            sessions: BTreeMap::new(),
            sums: BTreeMap::new(),
            uploads: BTreeMap::new(),
        });
        if !self.disk.finished {
            let plan = self.plan();
            self.event(Event::Submitted(plan));
        }
        self.after(0, Next::CoordinatorTick(self.boots));
    }

    fn plan(&self) -> RunPlan {
        let newest = self.disk.checkpoints.last_key_value();
        let source = newest.map_or(StateSource::Seed, |(s, _)| StateSource::Checkpoint(*s));
        let chain = match source.step() {
            0 => Chain::new(1, 0, genesis(b"simulated")),
            step => Chain::after(&self.disk.ledger[&step]),
        };
        let recent = self.disk.ledger.values().rev().take(8).rev().cloned();
        RunPlan {
            source,
            chain,
            recent: recent.collect(),
            expected: self.disk.workers,
            ..plan(self.lanes, self.steps)
        }
    }

    /// kill -9: what is not on the disk is gone.
    pub fn crash_coordinator(&mut self) {
        let Some(coordinator) = self.coordinator.take() else {
            return;
        };
        // The disk may or may not have got the last entry.
        if self.draw(2) == 0 {
            self.flush();
        }
        self.unwritten.clear();
        for (session, (w, _)) in coordinator.sessions {
            self.after(1, Next::ClosedBelow(w, session));
        }
        let pause = 50 + self.draw(4_000);
        self.after(pause, Next::CoordinatorStart);
    }

    fn flush(&mut self) {
        for entry in std::mem::take(&mut self.unwritten) {
            let known = self.disk.ledger.entry(entry.step).or_insert(entry.clone());
            assert_eq!(
                **known, *entry,
                "step {} was committed differently",
                entry.step
            );
        }
    }

    fn tick(&mut self, boot: u64) {
        if boot != self.boots || self.coordinator.is_none() {
            return;
        }
        self.event(Event::Tick);
        let limits = Limits::default();
        let beat = limits.silence.heartbeat_ms();
        if (self.now / limits.tick_ms).is_multiple_of(beat / limits.tick_ms) {
            let coordinator = self.coordinator.as_ref().expect("checked");
            let all: Vec<_> = coordinator
                .sessions
                .iter()
                .map(|(s, (w, _))| (*s, *w))
                .collect();
            for (session, w) in all {
                self.send_down(w, session, Down::Control(ToWorker::Ping));
            }
        }
        self.after(limits.tick_ms, Next::CoordinatorTick(boot));
    }

    fn is_open(&self, session: SessionId) -> bool {
        let coordinator = self.coordinator.as_ref();
        coordinator.is_some_and(|c| c.sessions.contains_key(&session))
    }

    fn event(&mut self, event: Event) {
        let Some(coordinator) = self.coordinator.as_mut() else {
            return;
        };
        if let Event::Left { session, .. } = &event {
            coordinator.sessions.remove(session);
        }
        for action in coordinator.machine.handle(self.now, event) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        let coordinator = self.coordinator.as_mut().expect("it acts");
        match action {
            Action::Send { session, message } => {
                if matches!(message, ToWorker::Commit { .. }) {
                    // What is committed before is on the disk before a commit goes out.
                    let last = self.unwritten.pop();
                    self.flush();
                    self.unwritten.extend(last);
                }
                let coordinator = self.coordinator.as_ref().expect("it acts");
                if let Some(&(w, _)) = coordinator.sessions.get(&session) {
                    self.send_down(w, session, Down::Control(message));
                }
            }
            Action::Close { session, .. } => {
                if let Some((w, _)) = coordinator.sessions.remove(&session) {
                    self.after(1, Next::ClosedBelow(w, session));
                }
            }
            Action::OpenStep { step, .. } => {
                let sums = Aggregator::new(self.lanes, super::trainer::LEN);
                coordinator.sums.insert(step, sums);
            }
            Action::ReleaseRoots { through, .. } => coordinator.sums.retain(|s, _| *s > through),
            Action::Committed(record) => {
                self.disk.workers = record.workers;
                self.unwritten.push(record.entry);
            }
            Action::Withdraw { after, .. } => {
                self.flush();
                self.withdrawn += 1;
                self.disk.ledger.retain(|s, _| *s <= after);
            }
            Action::DropCheckpoint { step, .. } => {
                coordinator.uploads.remove(&step);
            }
            Action::CheckpointGood { step, .. } => {
                if let Some(state) = coordinator.uploads.remove(&step) {
                    self.flush();
                    self.disk.checkpoints.insert(step, state);
                }
            }
            Action::Evaluated { step, sums, .. } => {
                let known = self.evals.entry(step).or_insert(sums);
                assert_eq!(*known, sums, "validation of step {step} differs");
            }
            Action::Changed { change, .. } => {
                if matches!(change, Change::Finished { .. } | Change::Failed { .. }) {
                    self.flush();
                    self.disk.finished = true;
                    self.end = Some(change);
                }
            }
            Action::Happened { what, .. } => self.happened.push(what),
            Action::Assigned { .. } | Action::Note { .. } => {}
        }
    }

    fn arrive_up(&mut self, w: usize, session: SessionId, number: u64, up: Up) {
        if !self.is_open(session) {
            return;
        }
        let connection = &mut self.workers[w].connection;
        let direction = match &up {
            Up::Control(_) => &mut connection.control_up,
            Up::Push(..) => &mut connection.push_up,
        };
        match direction.incoming.accept(number) {
            Ok(true) => {}
            Ok(false) => return,
            Err(gap) => {
                let reason = LeftReason::Protocol(gap.to_string());
                self.after(1, Next::ClosedBelow(w, session));
                return self.event(Event::Left { session, reason });
            }
        }
        match up {
            Up::Control(message) => self.event(Event::Said { session, message }),
            Up::Push(step, node, data) => self.pushed(session, step, node, &data),
        }
    }

    fn pushed(&mut self, from: SessionId, step: Step, node: Node, data: &[f32]) {
        let coordinator = self.coordinator.as_ref().expect("checked");
        let Some(sums) = coordinator.sums.get(&step) else {
            return;
        };
        let data = encode(data);
        let stamp = Stamp {
            check: crc32fast::hash(&data),
            from,
        };
        let offered = sums.offer(node, 0, &data, stamp).expect("honest peers");
        let totals = offered
            .all_complete
            .then(|| sums.totals().expect("complete"));
        let root = sums.root(0).map(|r| decode(&r.data));
        let run = plan(self.lanes, self.steps).run;
        if !offered.delivered.is_empty() {
            self.event(Event::Delivered {
                run: run.clone(),
                step,
                lanes: offered.delivered,
            });
        }
        let Some(totals) = totals else { return };
        let root = root.expect("complete");
        let coordinator = self.coordinator.as_ref().expect("checked");
        let wants = |(s, (w, after)): (&SessionId, &(usize, Option<Step>))| {
            after.is_some_and(|a| a < step).then_some((*s, *w))
        };
        let receivers: Vec<_> = coordinator.sessions.iter().filter_map(wants).collect();
        for (session, w) in receivers {
            self.send_down(w, session, Down::Root(step, root.clone()));
        }
        self.event(Event::RootComplete { run, step, totals });
    }

    fn uploaded(&mut self, session: SessionId, state: State) {
        let run = plan(self.lanes, self.steps).run;
        let step = state.step;
        if !self.is_open(session) {
            return self.event(Event::CheckpointLost { run, step });
        }
        let coordinator = self.coordinator.as_mut().expect("checked");
        let state_hash = state.hash();
        coordinator.uploads.insert(step, state);
        self.event(Event::CheckpointWritten {
            run,
            step,
            state_hash,
        });
    }

    // The network.

    fn latency(&mut self) -> u64 {
        match self.draw(50) {
            0 => 20 + self.draw(200),
            _ => self.draw(4),
        }
    }

    fn send_up(&mut self, w: usize, up: Up) {
        let Some(session) = self.workers[w].session else {
            return;
        };
        let arrival = self.now + self.latency();
        let connection = &mut self.workers[w].connection;
        let direction = match &up {
            Up::Control(_) => &mut connection.control_up,
            Up::Push(..) => &mut connection.push_up,
        };
        let number = direction.out.number();
        direction.last = direction.last.max(arrival);
        let arrival = direction.last;
        self.deliver(arrival, Next::Up(w, session, number, up));
    }

    fn send_down(&mut self, w: usize, session: SessionId, down: Down) {
        let arrival = self.now + self.latency();
        if self.workers[w].session != Some(session) {
            return;
        }
        let connection = &mut self.workers[w].connection;
        let direction = match &down {
            Down::Control(_) => &mut connection.control_down,
            Down::Root(..) => &mut connection.root_down,
        };
        let number = direction.out.number();
        direction.last = direction.last.max(arrival);
        let arrival = direction.last;
        self.deliver(arrival, Next::Down(w, session, number, down));
    }

    fn deliver(&mut self, arrival: u64, next: Next) {
        if self.chance(self.harm.lost) {
            return;
        }
        if self.chance(self.harm.copied) {
            let later = arrival + self.draw(20);
            self.at(later, next.clone());
        }
        let arrival = match self.chance(self.harm.swapped) {
            true => arrival + 30,
            false => arrival,
        };
        self.at(arrival, next);
    }

    // The workers.

    pub fn add_worker(&mut self) -> usize {
        let w = self.workers.len();
        let skew = 950 + self.draw(100);
        let lane_ms = match self.draw(6) {
            0 => 60,
            n => 3 + n,
        };
        self.workers.push(Worker {
            machine: WorkerMachine::default(),
            trainer: Trainer::default(),
            load: 0,
            alive: false,
            life: 0,
            session: None,
            connection: Connection::default(),
            silence: Silence::new(Limits::default().silence, 0),
            frozen_until: 0,
            cut_until: 0,
            lane_ms,
            skew,
            working: false,
        });
        self.start_worker(w);
        w
    }

    fn start_worker(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        if worker.alive {
            return;
        }
        worker.alive = true;
        worker.life += 1;
        worker.machine = WorkerMachine::default();
        worker.trainer = Trainer::default();
        worker.session = None;
        worker.frozen_until = 0;
        worker.working = false;
        let life = worker.life;
        self.after(0, Next::Connect(w));
        self.after(0, Next::Beat(w, life));
    }

    pub fn kill_worker(&mut self, w: usize, comes_back: bool) {
        let worker = &mut self.workers[w];
        if !worker.alive {
            return;
        }
        worker.alive = false;
        worker.frozen_until = 0;
        let cut = worker.cut_until > self.now;
        if let Some(session) = worker.session.take()
            && !cut
        {
            self.after(1, Next::ClosedAbove(session, LeftReason::ConnectionClosed));
        }
        if comes_back {
            let pause = 20 + self.draw(3_000);
            self.after(pause, Next::WorkerStart(w));
        }
    }

    pub fn ask_to_leave(&mut self, w: usize) {
        if self.workers[w].alive {
            self.tell(w, WorkerEvent::LeaveRequested);
        }
    }

    fn connect(&mut self, w: usize) {
        let worker = &self.workers[w];
        if !worker.alive || worker.session.is_some() {
            return;
        }
        let reachable = worker.cut_until <= self.now && self.coordinator.is_some();
        if !reachable || !worker.machine.settled() {
            let pause = 100 + self.draw(400);
            return self.after(pause, Next::Connect(w));
        }
        self.next_session += 1;
        let session = SessionId(self.next_session);
        let worker = &mut self.workers[w];
        worker.session = Some(session);
        worker.connection = Connection::default();
        worker.silence = Silence::new(Limits::default().silence, self.now);
        let holding = worker.machine.holding();
        let coordinator = self.coordinator.as_mut().expect("reachable");
        coordinator.sessions.insert(session, (w, None));
        let info = MemberInfo {
            host: "sim".into(),
            pid: w as u32,
            device: "cpu".into(),
            threads: 1,
            fingerprint: "sim".into(),
        };
        self.event(Event::Joined {
            session,
            info,
            holding,
        });
        self.tell(w, WorkerEvent::Up);
    }

    fn down(&mut self, w: usize) {
        let Some(session) = self.workers[w].session.take() else {
            return;
        };
        if self.workers[w].cut_until <= self.now {
            self.after(1, Next::ClosedAbove(session, LeftReason::ConnectionClosed));
        }
        self.tell(w, WorkerEvent::Down);
        if self.workers[w].machine.is_leaving() {
            self.workers[w].alive = false;
            return;
        }
        let pause = 100 + self.draw(200);
        self.after(pause, Next::Connect(w));
    }

    fn beat(&mut self, w: usize, life: u64) {
        let worker = &self.workers[w];
        if !worker.alive || worker.life != life {
            return;
        }
        if worker.session.is_some() {
            self.send_up(w, Up::Control(FromWorker::Heartbeat));
            if self.workers[w].silence.exceeded(self.now).is_some() {
                self.down(w);
            }
        }
        let every = Limits::default().silence.heartbeat_ms() * self.workers[w].skew / 1000;
        self.after(every, Next::Beat(w, life));
    }

    fn arrive_down(&mut self, w: usize, session: SessionId, number: u64, down: Down) {
        let now = self.now;
        let worker = &mut self.workers[w];
        if !worker.alive || worker.session != Some(session) {
            return;
        }
        worker.silence.heard(now);
        let direction = match &down {
            Down::Control(_) => &mut worker.connection.control_down,
            Down::Root(..) => &mut worker.connection.root_down,
        };
        match direction.incoming.accept(number) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => return self.down(w),
        }
        match down {
            Down::Control(message) => self.tell(w, WorkerEvent::Told(message)),
            Down::Root(step, root) => {
                worker.trainer.roots.insert(step, root);
                self.wake(w);
            }
        }
    }

    fn tell(&mut self, w: usize, event: WorkerEvent) {
        for order in self.workers[w].machine.handle(event) {
            self.obey(w, order);
        }
        self.wake(w);
    }

    fn obey(&mut self, w: usize, order: Order) {
        let worker = &mut self.workers[w];
        let life = worker.life;
        match order {
            Order::Say(message) => self.send_up(w, Up::Control(message)),
            Order::Load { load, source, .. } => {
                worker.load = load;
                worker.trainer = Trainer::default();
                worker.trainer.attach();
                self.open_exchange(w, source.step());
                let pause = 5 + self.draw(300);
                self.after(pause, Next::Loaded(w, life, load, source));
            }
            Order::Attach { step, .. } => {
                worker.trainer.attach();
                let load = worker.load;
                self.open_exchange(w, step);
                self.after(1, Next::Loaded(w, life, load, StateSource::Held(step)));
            }
            order => worker.trainer.give(order),
        }
    }

    fn open_exchange(&mut self, w: usize, after: Step) {
        let Some(session) = self.workers[w].session else {
            return;
        };
        let Some(coordinator) = self.coordinator.as_mut() else {
            return;
        };
        let Some(slot) = coordinator.sessions.get_mut(&session) else {
            return;
        };
        slot.1 = Some(after);
        let complete =
            |(step, sums): (&Step, &Aggregator)| Some((*step, decode(&sums.root(0)?.data)));
        let roots: Vec<_> = coordinator
            .sums
            .range(after + 1..)
            .filter_map(complete)
            .collect();
        for (step, root) in roots {
            self.send_down(w, session, Down::Root(step, root));
        }
    }

    fn loaded(&mut self, w: usize, life: u64, load: u64, source: StateSource) {
        let worker = &mut self.workers[w];
        if !worker.alive || worker.life != life || worker.load != load {
            return;
        }
        let step = source.step();
        let state = match source {
            StateSource::Held(_) => worker.trainer.state.clone(),
            StateSource::Checkpoint(step) => self.disk.checkpoints.get(&step).cloned(),
            StateSource::Seed | StateSource::Start => Some(State::seed()),
        };
        let Some(state) = state else { return };
        let state_hash = Some(state.hash());
        if !matches!(source, StateSource::Held(_)) {
            worker.trainer.install(state);
        }
        let report = Report::Loaded { step, state_hash };
        self.tell(w, WorkerEvent::Did { load, report });
    }

    fn wake(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        if worker.alive && !worker.working && worker.trainer.busy() {
            worker.working = true;
            let (cost, life) = (worker.lane_ms, worker.life);
            let jitter = self.draw(3);
            self.after(cost + jitter, Next::Work(w, life));
        }
    }

    fn work(&mut self, w: usize, life: u64) {
        let tree = Tree::new(self.lanes);
        let worker = &mut self.workers[w];
        if !worker.alive || worker.life != life {
            return;
        }
        worker.working = false;
        if worker.trainer.busy() {
            let load = worker.load;
            let lane_ms = worker.lane_ms;
            for effect in worker.trainer.work(tree, lane_ms) {
                match effect {
                    Effect::Report(report) => self.report(w, load, report),
                    Effect::Push(step, node, sum) => self.send_up(w, Up::Push(step, node, sum)),
                    Effect::Upload(state) => {
                        let pause = 5 + self.draw(400);
                        if let Some(session) = self.workers[w].session {
                            self.after(pause, Next::Uploaded(session, state));
                        }
                    }
                }
            }
        }
        self.wake(w);
    }

    fn report(&mut self, w: usize, load: u64, report: Report) {
        if let (Report::Applied { step, .. }, Some((victim, at))) = (&report, self.corrupt)
            && victim == w
            && *step >= at
        {
            self.corrupt = None;
            let state = self.workers[w].trainer.state.as_mut().expect("applied");
            state.params[1] += 1.0;
        }
        self.tell(w, WorkerEvent::Did { load, report });
    }

    /// How things stand, for a failure.
    pub fn describe(&self) -> String {
        let coordinator = self.coordinator.as_ref().map(|c| c.machine.summary());
        let worker = |(w, worker): (usize, &Worker)| {
            format!(
                "{w}: alive {}, session {:?}, state {:?}, settled {}, {}",
                worker.alive,
                worker.session,
                worker.trainer.state.as_ref().map(|s| s.step),
                worker.machine.settled(),
                worker.trainer.describe(),
            )
        };
        let workers: Vec<String> = self.workers.iter().enumerate().map(worker).collect();
        let now = self.now;
        format!("at {now} ms: {coordinator:#?}\n{}", workers.join("\n"))
    }
}
