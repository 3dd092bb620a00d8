//! The world around the machines: a network whose connections lose, copy, delay and swap messages, processes that crash
//! and freeze, a disk, and virtual time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use super::sharing::{Link, Passed, Sharing};
use super::trainer::{LEN, State, Trainer, totals};
use super::{RUN, plan};
use crate::aggregate::{Aggregator, Data, Offered, encode};
use crate::cluster::events::{Action, Change, Event, Happening, LeftReason};
use crate::cluster::messages::{FromWorker, Owners, Scores, StateSource, ToWorker};
use crate::cluster::sequence::{Incoming, Outgoing};
use crate::cluster::silence::Silence;
use crate::cluster::worker::WorkerMachine;
use crate::cluster::{Anomaly, History, Limits, Losses, Machine, RunPlan};
use crate::floats::floats_of;
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::ledger::{Chain, Entry, genesis};
use crate::rng::philox;
use crate::tree::Node;
use crate::wire;
use prost::Message;

/// What is on its way up.
#[derive(Clone)]
pub(super) enum Up {
    Control(FromWorker),
    Push(Step, Node, Vec<f32>),
    Alive,
}

/// What is on its way down.
#[derive(Clone)]
pub(super) enum Down {
    Control(ToWorker),
    Root(Step, Vec<f32>),
    Alive,
}

/// What happens next.
#[derive(Clone)]
pub(super) enum Next {
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
    /// A worker without a session gives up what it waits for.
    Tear(usize, u64),
    /// A user goes on with a run that was paused under this coordinator.
    Resume(u64),
    /// A worker tries to reach another; the other has answered; the link is gone; it tries again.
    Dialled(u64),
    Linked(u64),
    Unlinked(usize, SessionId, SessionId, u64),
    Redial(usize, SessionId),
    /// Something goes over a link.
    Passed(u64, u64, Passed),
}

/// One direction of a connection.
#[derive(Default)]
pub(super) struct Direction {
    pub(super) out: Outgoing,
    pub(super) incoming: Incoming,
    pub(super) last: u64,
}

#[derive(Default)]
pub(super) struct Connection {
    pub(super) control_up: Direction,
    pub(super) push_up: Direction,
    pub(super) control_down: Direction,
    pub(super) root_down: Direction,
}

/// A worker process.
pub struct Worker {
    pub(super) machine: WorkerMachine,
    pub(super) trainer: Trainer,
    pub(super) load: u64,
    pub alive: bool,
    /// Counts processes, so that what an earlier one had planned does not happen.
    pub(super) life: u64,
    pub(super) session: Option<SessionId>,
    pub(super) connection: Connection,
    pub(super) silence: Silence,
    pub frozen_until: u64,
    pub cut_until: u64,
    pub lane_ms: u64,
    /// Its clock, in thousandths of the true one's speed.
    pub skew: u64,
    /// Time between its signs of life, as the coordinator last said.
    pub(super) beat_ms: u64,
    pub(super) working: bool,
    pub(super) sharing: Sharing,
}

pub(super) struct Coordinator {
    pub(super) machine: Machine,
    /// Open sessions, and what each wants of the exchange.
    pub(super) sessions: BTreeMap<SessionId, (usize, Option<Step>)>,
    /// One for each element.
    pub(super) sums: BTreeMap<Step, Vec<Aggregator>>,
    pub(super) uploads: BTreeMap<Step, State>,
    /// Of states whose moments are divided: what there is.
    pub(super) parts: BTreeMap<Step, State>,
    /// Who has given a sign of life since the last tick.
    pub(super) heard: Vec<SessionId>,
}

/// What the coordinator has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Events that its machine took in.
    pub events: u64,
    /// Messages that it sent to workers.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What survives a crash of the coordinator.
#[derive(Clone, Default)]
pub struct Disk {
    pub ledger: BTreeMap<Step, Arc<Entry>>,
    pub checkpoints: BTreeMap<Step, State>,
    pub(super) workers: usize,
    pub(super) finished: bool,
}

/// How often messages are harmed, in thousandths.
#[derive(Clone, Copy, Default)]
pub struct Harm {
    pub lost: u32,
    pub copied: u32,
    pub swapped: u32,
}

pub struct World {
    pub(super) seed: u64,
    pub(super) draws: u32,
    pub now: u64,
    pub(super) queue: BinaryHeap<Reverse<(u64, u64)>>,
    pub(super) happenings: BTreeMap<u64, Next>,
    pub(super) number: u64,
    pub(super) coordinator: Option<Coordinator>,
    pub(super) boots: u64,
    pub(super) next_session: u64,
    pub(super) links: BTreeMap<u64, Link>,
    pub(super) next_link: u64,
    pub workers: Vec<Worker>,
    pub disk: Disk,
    pub(super) unwritten: Vec<Arc<Entry>>,
    pub evals: BTreeMap<Step, Scores>,
    /// What was written after the prompts.
    pub written: BTreeMap<Step, Vec<Vec<u32>>>,
    pub end: Option<Change>,
    pub harm: Harm,
    /// Whether uploads of states break off, or arrive changed, now and then.
    pub harmed_uploads: bool,
    pub happened: Vec<Happening>,
    /// What people were told, and when.
    pub notes: Vec<(u64, String)>,
    pub unusual: Vec<Anomaly>,
    /// Where the watchdog has paused the run.
    pub pauses: Vec<Step>,
    pub withdrawn: u32,
    /// Steps that workers were told to sum themselves, and those that the coordinator took back.
    pub shared: BTreeSet<Step>,
    pub collected: BTreeSet<Step>,
    /// Those of the shared ones in which sites add up first.
    pub gathered: BTreeSet<Step>,
    /// Whether a coordinator stands by on another machine, and what is where it finds it: all that the machine of the one that
    /// leads had at some moment, and the validations of then.
    pub failover: bool,
    pub(super) store: (Disk, BTreeMap<Step, Scores>),
    /// Times that the machine of a coordinator was lost with its disk.
    pub machines_lost: u32,
    /// A fault of one worker's memory: it happens after this step.
    pub corrupt: Option<(usize, Step)>,
    /// Sessions that were opened.
    pub joined: u64,
    /// Of all coordinators; bytes only where they are counted.
    pub work: Work,
    pub counts_bytes: bool,
    /// Whether moments are divided among workers.
    pub divides: bool,
    /// Steps that were committed while they were.
    pub divided: BTreeSet<Step>,
    /// How many steps were committed once more.
    pub again: u32,
    /// Whose lanes are whose.
    pub assigned: Vec<(SessionId, Vec<Lane>)>,
    pub(super) lanes: u32,
    pub(super) steps: Step,
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
            links: BTreeMap::new(),
            next_link: 0,
            workers: Vec::new(),
            disk: Disk::default(),
            unwritten: Vec::new(),
            evals: BTreeMap::new(),
            written: BTreeMap::new(),
            end: None,
            harm: Harm::default(),
            harmed_uploads: false,
            happened: Vec::new(),
            notes: Vec::new(),
            unusual: Vec::new(),
            pauses: Vec::new(),
            withdrawn: 0,
            shared: BTreeSet::new(),
            gathered: BTreeSet::new(),
            collected: BTreeSet::new(),
            failover: false,
            store: Default::default(),
            machines_lost: 0,
            corrupt: None,
            joined: 0,
            work: Work::default(),
            counts_bytes: false,
            divides: false,
            again: 0,
            assigned: Vec::new(),
            divided: BTreeSet::new(),
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

    pub(super) fn chance(&mut self, thousandths: u32) -> bool {
        thousandths > 0 && self.draw(1000) < u64::from(thousandths)
    }

    pub(super) fn at(&mut self, time: u64, next: Next) {
        self.number += 1;
        self.queue.push(Reverse((time.max(self.now), self.number)));
        self.happenings.insert(self.number, next);
    }

    pub(super) fn after(&mut self, delay: u64, next: Next) {
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

    pub(super) fn blocked(&self, next: &Next) -> Option<u64> {
        if let Next::Dialled(link) | Next::Linked(link) | Next::Passed(link, ..) = next {
            let until = self.link_blocked(*link, next);
            return (until > self.now).then_some(until);
        }
        let until = match *next {
            Next::Up(w, ..) => self.workers[w].cut_until,
            Next::Down(w, ..) => self.workers[w].cut_until.max(self.workers[w].frozen_until),
            Next::ClosedBelow(w, _) | Next::Unlinked(w, ..) | Next::Redial(w, _) => {
                self.workers[w].cut_until.max(self.workers[w].frozen_until)
            }
            Next::Beat(w, _)
            | Next::Work(w, _)
            | Next::Connect(w)
            | Next::Tear(w, _)
            | Next::Loaded(w, ..) => self.workers[w].frozen_until,
            _ => 0,
        };
        (until > self.now).then_some(until)
    }

    pub(super) fn happen(&mut self, next: Next) {
        match next {
            Next::CoordinatorStart => self.start_coordinator(),
            Next::CoordinatorTick(boot) => self.tick(boot),
            Next::WorkerStart(w) => self.start_worker(w),
            Next::Connect(w) => self.connect(w),
            Next::Beat(w, life) => self.beat(w, life),
            Next::Work(w, life) => self.work(w, life),
            Next::Tear(w, life) => self.tear(w, life),
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
            Next::Resume(boot) => self.resume(boot),
            Next::Dialled(link) => self.dialled(link),
            Next::Linked(link) => self.linked(link),
            Next::Unlinked(w, own, peer, link) => self.unlinked(w, own, peer, link),
            Next::Redial(w, peer) => self.dial(w, peer),
            Next::Passed(link, place, passed) => self.passed(link, place, passed),
        }
    }

    pub(super) fn start_coordinator(&mut self) {
        self.boots += 1;
        self.next_session = self.boots << 32;
        self.coordinator = Some(Coordinator {
            machine: Machine::new(Limits {
                divides: self.divides,
                ..Limits::default()
            }),
            sessions: BTreeMap::new(),
            sums: BTreeMap::new(),
            uploads: BTreeMap::new(),
            parts: BTreeMap::new(),
            heard: Vec::new(),
        });
        if !self.disk.finished {
            let plan = self.plan();
            self.event(Event::Submitted(plan));
        }
        self.after(0, Next::CoordinatorTick(self.boots));
    }

    pub(super) fn plan(&self) -> RunPlan {
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
            losses: self.losses(),
            history: self.history(),
            shipped: self.failover.then(|| self.shipped()),
            ..plan(self.lanes, self.steps)
        }
    }

    /// The step up to which the ledger is in the store.
    fn shipped(&self) -> Step {
        self.store.0.ledger.keys().last().copied().unwrap_or(0)
    }

    /// What the machine has now is in the store.
    fn ship(&mut self) {
        self.store = (self.disk.clone(), self.evals.clone());
        let run = plan(self.lanes, self.steps).run;
        let step = self.shipped();
        self.event(Event::Shipped { run, step });
    }

    /// A user goes on with the run, unless the coordinator that paused it is gone: the next one does by itself here.
    fn resume(&mut self, boot: u64) {
        if boot == self.boots && self.coordinator.is_some() {
            let plan = self.plan();
            self.event(Event::Submitted(plan));
        }
    }

    /// A user wants a checkpoint.
    pub fn request_checkpoint(&mut self) {
        let run = RunId::new(RUN);
        self.event(Event::CheckpointRequested(run));
    }

    /// What the ledger says of the steps so far.
    fn history(&self) -> History {
        let mut history = History::default();
        self.disk.ledger.values().for_each(|e| history.push(e));
        history
    }

    /// What the validations so far have found.
    fn losses(&self) -> Losses {
        let mean = |scores: &Scores| scores.sums.loss / scores.sums.weight;
        Losses {
            own: self
                .evals
                .iter()
                .map(|(step, scores)| (*step, mean(scores)))
                .collect(),
            ..Losses::default()
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
        if self.failover && self.draw(2) == 0 {
            // Its machine is gone for good.
            self.machines_lost += 1;
            let (disk, evals) = self.store.clone();
            self.disk = disk;
            // Of the others' validations only the curve would be shorter.
            if super::is_patient(self.steps) {
                self.evals = evals;
            }
        }
        for (session, (w, _)) in coordinator.sessions {
            self.after(1, Next::ClosedBelow(w, session));
        }
        let pause = 50 + self.draw(4_000);
        self.after(pause, Next::CoordinatorStart);
    }

    pub(super) fn flush(&mut self) {
        for entry in std::mem::take(&mut self.unwritten) {
            let known = self.disk.ledger.entry(entry.step).or_insert(entry.clone());
            assert_eq!(
                **known, *entry,
                "step {} was committed differently",
                entry.step
            );
        }
    }

    pub(super) fn tick(&mut self, boot: u64) {
        if boot != self.boots || self.coordinator.is_none() {
            return;
        }
        let heard = self
            .coordinator
            .as_mut()
            .map(|c| std::mem::take(&mut c.heard));
        self.event(Event::Heard(heard.unwrap_or_default()));
        self.event(Event::Tick);
        if self.failover && self.draw(6) == 0 {
            self.ship();
        }
        let limits = Limits::default();
        let workers = self.coordinator.as_ref().map_or(0, |c| c.sessions.len());
        let beat = limits.silence.heartbeat_ms_of(workers);
        if (self.now / limits.tick_ms).is_multiple_of(beat / limits.tick_ms) {
            let coordinator = self.coordinator.as_ref().expect("checked");
            let all: Vec<_> = coordinator
                .sessions
                .iter()
                .map(|(s, (w, _))| (*s, *w))
                .collect();
            for (session, w) in all {
                self.send_down(
                    w,
                    session,
                    Down::Control(ToWorker::Ping {
                        heartbeat_ms: beat as u32,
                    }),
                );
                self.send_down(w, session, Down::Alive);
            }
        }
        self.after(limits.tick_ms, Next::CoordinatorTick(boot));
    }

    pub(super) fn is_open(&self, session: SessionId) -> bool {
        let coordinator = self.coordinator.as_ref();
        coordinator.is_some_and(|c| c.sessions.contains_key(&session))
    }

    pub(super) fn event(&mut self, event: Event) {
        let Some(coordinator) = self.coordinator.as_mut() else {
            return;
        };
        if let Event::Left { session, .. } = &event {
            coordinator.sessions.remove(session);
        }
        self.work.events += 1;
        for action in coordinator.machine.handle(self.now, event) {
            self.act(action);
        }
    }

    /// A message leaves the coordinator.
    fn send(&mut self, session: SessionId, message: ToWorker) {
        self.work.messages += 1;
        if self.counts_bytes {
            self.work.bytes += wire::to_worker(&message).encoded_len() as u64;
        }
        match &message {
            ToWorker::Compute {
                step,
                owners: Owners::Shares(shares),
                ..
            } => {
                self.shared.insert(*step);
                if !shares.sites.is_empty() {
                    self.gathered.insert(*step);
                }
            }
            ToWorker::Collect { step, .. } => drop(self.collected.insert(*step)),
            ToWorker::Commit { commit, .. } => {
                let coordinator = self.coordinator.as_ref().expect("it acts");
                if coordinator.machine.is_divided() {
                    self.divided.insert(commit.step());
                }
                // What was recorded before is on the disk before a commit goes out.
                self.flush();
            }
            _ => {}
        }
        let coordinator = self.coordinator.as_ref().expect("it acts");
        if let Some(&(w, _)) = coordinator.sessions.get(&session) {
            self.send_down(w, session, Down::Control(message));
        }
    }

    pub(super) fn act(&mut self, action: Action) {
        let coordinator = self.coordinator.as_mut().expect("it acts");
        match action {
            Action::Send { session, message } => self.send(session, message),
            Action::SendAll { sessions, message } => {
                for session in sessions {
                    self.send(session, message.clone());
                }
            }
            Action::Close { session, .. } => {
                if let Some((w, _)) = coordinator.sessions.remove(&session) {
                    self.after(1, Next::ClosedBelow(w, session));
                }
            }
            Action::OpenStep { step, .. } => {
                let sums = (0..LEN).map(|_| Aggregator::new(self.lanes, 1)).collect();
                coordinator.sums.insert(step, sums);
            }
            Action::ReleaseRoots { through, .. } => coordinator.sums.retain(|s, _| *s > through),
            Action::Committed(record) => {
                self.disk.workers = record.workers;
                self.again += u32::from(self.disk.ledger.contains_key(&record.entry.step));
                self.unwritten.push(record.entry);
            }
            Action::Withdraw { after, .. } => {
                self.flush();
                self.withdrawn += 1;
                self.disk.ledger.retain(|s, _| *s <= after);
            }
            Action::DropCheckpoint { step, .. } => {
                coordinator.uploads.remove(&step);
                coordinator.parts.remove(&step);
            }
            Action::CheckpointGood { step, .. } => {
                if let Some(state) = coordinator.uploads.remove(&step) {
                    self.flush();
                    self.disk.checkpoints.insert(step, state);
                }
            }
            Action::Evaluated { step, scores, .. } => {
                let known = self.evals.entry(step).or_insert_with(|| scores.clone());
                assert_eq!(*known, scores, "validation of step {step} differs");
            }
            Action::Sampled { step, written, .. } => {
                let known = self.written.entry(step).or_insert_with(|| written.clone());
                assert_eq!(*known, written, "what step {step} writes differs");
            }
            Action::Changed { change, .. } => {
                if let Change::Paused { step, .. } = change {
                    self.flush();
                    self.pauses.push(step);
                    let rest = 1 + self.draw(500);
                    self.after(rest, Next::Resume(self.boots));
                }
                if matches!(change, Change::Finished { .. } | Change::Failed { .. }) {
                    self.flush();
                    self.disk.finished = true;
                    self.end = Some(change);
                }
            }
            Action::Happened { what, .. } => self.happened.push(what),
            Action::Unusual { anomaly, .. } => self.unusual.push(anomaly),
            Action::Note { text, .. } => self.notes.push((self.now, text)),
            Action::Assigned { lanes, .. } => self.assigned = lanes,
        }
    }

    pub(super) fn arrive_up(&mut self, w: usize, session: SessionId, number: u64, up: Up) {
        if !self.is_open(session) {
            return;
        }
        let connection = &mut self.workers[w].connection;
        let direction = match &up {
            Up::Control(_) => &mut connection.control_up,
            Up::Push(..) | Up::Alive => &mut connection.push_up,
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
            Up::Control(FromWorker::Heartbeat) => {
                let coordinator = self.coordinator.as_mut().expect("it is open");
                coordinator.heard.push(session);
            }
            Up::Control(message) => self.event(Event::Said { session, message }),
            Up::Push(step, node, data) => self.pushed(session, step, node, &data),
            Up::Alive => {}
        }
    }

    pub(super) fn pushed(&mut self, from: SessionId, step: Step, node: Node, data: &[f32]) {
        let coordinator = self.coordinator.as_ref().expect("checked");
        let Some(sums) = coordinator.sums.get(&step) else {
            return;
        };
        let run = RunId::new(RUN);
        let mut offered = Offered::default();
        for (sums, value) in sums.iter().zip(data) {
            let data = encode(&[*value]);
            let check = crc32fast::hash(&data);
            // The elements of a node come together, so each tells the same.
            offered = match sums.offer(node, 0, Data::Wire { data, check }, from) {
                Ok(offered) => offered,
                Err(error) => {
                    let error = error.to_string();
                    return self.event(Event::RunBroken { run, error });
                }
            };
        }
        let root = root_of(sums).filter(|_| offered.all_complete);
        if !offered.delivered.is_empty() {
            self.event(Event::Delivered {
                run: run.clone(),
                step,
                lanes: offered.delivered,
            });
        }
        let Some(root) = root else { return };
        let totals = totals(&root);
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

    pub(super) fn uploaded(&mut self, session: SessionId, state: State) {
        let run = RunId::new(RUN);
        let step = state.step;
        if !self.is_open(session) {
            return self.event(Event::CheckpointLost { run, step });
        }
        if self.harmed_uploads && self.draw(8) == 0 {
            return self.event(Event::CheckpointLost { run, step });
        }
        let mut state = state;
        if self.harmed_uploads && self.draw(8) == 0 {
            state.params.iter_mut().for_each(|p| *p += 1.0);
        }
        let coordinator = self.coordinator.as_mut().expect("checked");
        if !state.is_whole() {
            let parts = coordinator.parts.entry(step).or_insert(state.clone());
            parts.join(&state);
            if !parts.is_whole() {
                return;
            }
            state = coordinator.parts.remove(&step).expect("it is there");
        }
        let state_hash = state.hash();
        coordinator.uploads.insert(step, state);
        self.event(Event::CheckpointWritten {
            run,
            step,
            state_hash,
        });
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
        let notes = &self.notes[self.notes.len().saturating_sub(8)..];
        format!(
            "at {now} ms: {coordinator:#?}\n{}\n{notes:#?}",
            workers.join("\n")
        )
    }
}

/// The root of a step, if it is complete.
pub(super) fn root_of(sums: &[Aggregator]) -> Option<Vec<f32>> {
    let root = |sums: &Aggregator| Some(floats_of(&sums.root(0)?.data)[0]);
    sums.iter().map(root).collect()
}
