//! The worker processes of the simulation.

use super::plan;
use super::sharing::Sharing;
use super::trainer::{Effect, State, Trainer};
use super::world::{Connection, Down, Next, Up, Worker, World, root_of};
use crate::aggregate::Aggregator;
use crate::cluster::Limits;
use crate::cluster::events::{Event, LeftReason, MemberInfo};
use crate::cluster::messages::{FromWorker, StateSource, ToWorker};
use crate::cluster::silence::Silence;
use crate::cluster::worker::{Order, Report, WorkerEvent, WorkerMachine};
use crate::ids::{SessionId, Step};
use crate::tree::Tree;

/// How long a worker without a session waits for the rest of a step's parameters.
const DETACHED_MS: u64 = 3_000;

impl World {
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
            sharing: Sharing::default(),
            silence: Silence::new(Limits::default().silence, 0),
            frozen_until: 0,
            cut_until: 0,
            lane_ms,
            skew,
            beat_ms: Limits::default().silence.heartbeat_ms(),
            working: false,
        });
        self.start_worker(w);
        w
    }

    pub(super) fn start_worker(&mut self, w: usize) {
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
        self.leave_exchange(w);
        let worker = &mut self.workers[w];
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

    /// Nothing comes from a worker or gets to it for a while.
    pub fn cut_off(&mut self, w: usize, millis: u64) {
        self.workers[w].cut_until = self.now + millis;
    }

    pub fn ask_to_leave(&mut self, w: usize) {
        if self.workers[w].alive {
            self.tell(w, WorkerEvent::LeaveRequested);
        }
    }

    pub(super) fn connect(&mut self, w: usize) {
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
        self.joined += 1;
        let session = SessionId(self.next_session);
        let worker = &mut self.workers[w];
        worker.session = Some(session);
        worker.connection = Connection::default();
        worker.silence = Silence::new(Limits::default().silence, self.now);
        let holding = worker.machine.holding();
        let coordinator = self.coordinator.as_mut().expect("reachable");
        coordinator.sessions.insert(session, (w, None));
        let info = MemberInfo {
            host: format!("host-{}", w / 2),
            pid: w as u32,
            device: "cpu".into(),
            threads: 1,
            fingerprint: "sim".into(),
            listens: self.listens(w),
            site: self.site(w),
        };
        self.event(Event::Joined {
            session,
            info,
            holding,
        });
        self.tell(w, WorkerEvent::Up);
    }

    pub(super) fn down(&mut self, w: usize) {
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

    pub(super) fn beat(&mut self, w: usize, life: u64) {
        let worker = &self.workers[w];
        if !worker.alive || worker.life != life {
            return;
        }
        if worker.session.is_some() {
            self.send_up(w, Up::Control(FromWorker::Heartbeat));
            self.send_up(w, Up::Alive);
            if self.workers[w].silence.exceeded(self.now).is_some() {
                self.down(w);
            }
        }
        let every = self.workers[w].beat_ms * self.workers[w].skew / 1000;
        self.after(every, Next::Beat(w, life));
    }

    pub(super) fn arrive_down(&mut self, w: usize, session: SessionId, number: u64, down: Down) {
        let now = self.now;
        let worker = &mut self.workers[w];
        if !worker.alive || worker.session != Some(session) {
            return;
        }
        worker.silence.heard(now);
        if let Down::Control(ToWorker::Ping { heartbeat_ms }) = &down {
            worker.beat_ms = u64::from(*heartbeat_ms);
        }
        let direction = match &down {
            Down::Control(_) => &mut worker.connection.control_down,
            Down::Root(..) | Down::Alive => &mut worker.connection.root_down,
        };
        match direction.incoming.accept(number) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => return self.down(w),
        }
        match down {
            Down::Control(message) => self.tell(w, WorkerEvent::Told(message)),
            Down::Alive => {}
            Down::Root(step, root) => {
                worker.trainer.roots.insert(step, root);
                self.wake(w);
            }
        }
    }

    pub(super) fn tell(&mut self, w: usize, event: WorkerEvent) {
        for order in self.workers[w].machine.handle(event) {
            self.obey(w, order);
        }
        self.wake(w);
    }

    pub(super) fn obey(&mut self, w: usize, order: Order) {
        let worker = &mut self.workers[w];
        let life = worker.life;
        match order {
            Order::Say(message) => self.send_up(w, Up::Control(message)),
            Order::Load { load, state } => {
                let source = state.source;
                worker.load = load;
                worker.trainer = Trainer::default();
                worker.trainer.keeper = state.keeper;
                worker.trainer.attach();
                self.leave_exchange(w);
                self.open_exchange(w, source.step());
                let pause = 5 + self.draw(300);
                self.after(pause, Next::Loaded(w, life, load, source));
            }
            Order::Attach { step, keeper, .. } => {
                worker.trainer.keeper = keeper;
                worker.trainer.attach();
                let load = worker.load;
                self.leave_exchange(w);
                self.open_exchange(w, step);
                self.after(1, Next::Loaded(w, life, load, StateSource::Held(step)));
            }
            Order::Peers { gone, peers } => self.introduced(w, &gone, peers),
            Order::Collect { step } => self.collected(w, step),
            order => {
                match &order {
                    Order::Compute { step, owners, .. } => self.owned(w, *step, owners),
                    // Whoever keeps a slice gets and gives what belongs to a commit even then, for a while.
                    Order::Detach if worker.trainer.keeper.is_some() => {
                        self.after(DETACHED_MS, Next::Tear(w, life));
                    }
                    Order::Detach | Order::Unload => self.leave_exchange(w),
                    _ => {}
                }
                let trainer = &mut self.workers[w].trainer;
                trainer.give(order);
                let served = trainer.serve();
                self.publish(w, served);
            }
        }
    }

    pub(super) fn open_exchange(&mut self, w: usize, after: Step) {
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
        let complete = |(step, sums): (&Step, &Vec<Aggregator>)| Some((*step, root_of(sums)?));
        let roots: Vec<_> = coordinator
            .sums
            .range(after + 1..)
            .filter_map(complete)
            .collect();
        for (step, root) in roots {
            self.send_down(w, session, Down::Root(step, root));
        }
    }

    pub(super) fn loaded(&mut self, w: usize, life: u64, load: u64, source: StateSource) {
        let worker = &mut self.workers[w];
        if !worker.alive || worker.life != life || worker.load != load {
            return;
        }
        let step = source.step();
        let state = match source {
            StateSource::Held(_) => worker.trainer.state.clone(),
            StateSource::Checkpoint(step) => self.disk.checkpoints.get(&step).cloned(),
            StateSource::Seed | StateSource::Start => {
                Some(State::seed(plan(self.lanes, self.steps).spec.skips()))
            }
        };
        let Some(state) = state else { return };
        let mut state_hash = Some(state.hash());
        if !matches!(source, StateSource::Held(_)) {
            worker.trainer.install(state);
        }
        if let Some(report) = worker.trainer.digested_at_first() {
            state_hash = None;
            self.tell(w, WorkerEvent::Did { load, report });
        }
        let report = Report::Loaded { step, state_hash };
        self.tell(w, WorkerEvent::Did { load, report });
    }

    pub(super) fn wake(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        if worker.alive && !worker.working && worker.trainer.busy() {
            worker.working = true;
            let (cost, life) = (worker.lane_ms, worker.life);
            let jitter = self.draw(3);
            self.after(cost + jitter, Next::Work(w, life));
        }
    }

    pub(super) fn work(&mut self, w: usize, life: u64) {
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
                    Effect::Push(step, node, sum) => self.push(w, step, node, sum),
                    publish @ Effect::Publish(..) => self.publish(w, vec![publish]),
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

    /// A worker that lost its session does not wait for parameters for ever.
    pub(super) fn tear(&mut self, w: usize, life: u64) {
        let worker = &mut self.workers[w];
        if !worker.alive || worker.life != life || worker.session.is_some() {
            return;
        }
        if let Some(step) = worker.trainer.tear() {
            let load = worker.load;
            self.leave_exchange(w);
            self.report(w, load, Report::Torn { step });
        }
    }

    pub(super) fn report(&mut self, w: usize, load: u64, report: Report) {
        if let (Report::Applied { step, .. }, Some((victim, at))) = (&report, self.corrupt)
            && victim == w
            && *step >= at
        {
            self.corrupt = None;
            let state = self.workers[w].trainer.state.as_mut().expect("applied");
            state.params[1] += 1.0;
        }
        if let Report::Applied { step, .. } = &report {
            self.forget_shared(w, *step);
        }
        self.tell(w, WorkerEvent::Did { load, report });
    }

    /// Some clusters are told which sites they have.
    fn site(&self, w: usize) -> Option<String> {
        let told = self.seed % 4 == 1;
        told.then(|| format!("site-{}", w % 2))
    }

    /// Where others reach it: some workers are not to be reached.
    fn listens(&self, w: usize) -> Option<String> {
        let nobody = self.seed.is_multiple_of(3);
        let not_this_one = w == 1 && self.seed.is_multiple_of(5);
        (!nobody && !not_this_one).then(|| w.to_string())
    }
}
