//! A cluster that is treated badly: a coordinator and workers, each behind its own proxy, and a run whose events are
//! collected with the moment at which they came, whoever dies meanwhile.

use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::proxy::Proxy;
use super::signal::{self, Signal};
use super::{Ended, Process, Scene, text};

/// How long anything may take. Less than the suite's own, as these runs are short.
const DEADLINE: Duration = Duration::from_secs(120);
/// Between attempts to follow a run whose coordinator is gone.
const PAUSE: Duration = Duration::from_millis(50);
/// Lines of each process's log that a failure prints.
const TAIL: usize = 25;
/// The name of every run here. Each has a scene of its own.
pub const RUN: &str = "run";

/// Something that the run said, and when.
#[derive(Clone, Debug)]
pub struct Event {
    pub at: Instant,
    pub json: Value,
}

impl Event {
    pub fn is(&self, kind: &str) -> bool {
        self.json["event"] == kind
    }

    /// What it tells in words, if that is what it is for.
    pub fn text(&self) -> &str {
        self.json["text"].as_str().unwrap_or_default()
    }

    /// The step that this event commits.
    pub fn step(&self) -> Option<u64> {
        self.json["step"].as_u64().filter(|_| self.is("step"))
    }

    fn is_last(&self) -> bool {
        ["finished", "failed", "stopped", "paused", "cancelled"]
            .iter()
            .any(|kind| self.is(kind))
    }
}

/// A worker process and the network before it.
pub struct Worker {
    pub process: Process,
    pub proxy: Proxy,
    pub alive: bool,
    joined: bool,
}

impl Worker {
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until the coordinator has it. Before that, it need not know how to leave.
    pub fn wait_until_joined(&mut self) {
        if !self.joined {
            self.process.wait_for("joined");
            self.joined = true;
        }
    }

    /// Asks it to leave, and waits until it has; it must find that in order.
    pub fn leave(&mut self) {
        self.wait_until_joined();
        self.signal(Signal::Terminate);
        assert_eq!(self.process.wait(), Some(0), "it was asked to leave");
        self.alive = false;
    }

    pub fn signal(&self, signal: Signal) {
        assert!(self.alive, "a process that is gone has no id of its own");
        signal::send(self.pid(), signal);
    }

    pub fn kill(&mut self) {
        self.process.kill();
        self.alive = false;
    }

    /// What is left to do after something else has killed it.
    pub fn bury(&mut self) {
        self.process.wait();
        self.alive = false;
    }
}

/// A coordinator, workers, and one run.
pub struct Cluster<'s> {
    pub scene: &'s Scene,
    pub workers: Vec<Worker>,
    pub events: Vec<Event>,
    coordinator: Process,
    /// The coordinator's.
    flags: &'static str,
    /// Which sites workers are told they are of, one after the other and again from the first.
    sites: &'static [&'static str],
    /// Whether the coordinator runs.
    up: bool,
    port: u16,
    follower: Option<Process>,
    /// Events that the follower repeats from its beginning.
    repeated: usize,
    /// Events before the newest submission.
    old: usize,
}

impl<'s> Cluster<'s> {
    /// A coordinator and so many workers, which have joined.
    pub fn start(scene: &'s Scene, workers: usize) -> Self {
        Self::start_with(scene, workers, "")
    }

    /// The same with a coordinator of these flags.
    pub fn start_with(scene: &'s Scene, workers: usize, flags: &'static str) -> Self {
        Self::start_in(scene, workers, flags, &[])
    }

    /// The same with workers in sites.
    pub fn start_in(
        scene: &'s Scene,
        workers: usize,
        flags: &'static str,
        sites: &'static [&'static str],
    ) -> Self {
        let (coordinator, url) = scene.coordinator(flags);
        let port = url.rsplit(':').next().and_then(|port| port.parse().ok());
        let mut cluster = Self {
            scene,
            workers: Vec::new(),
            events: Vec::new(),
            coordinator,
            flags,
            sites,
            up: true,
            port: port.expect("an address ends with its port"),
            follower: None,
            repeated: 0,
            old: 0,
        };
        for _ in 0..workers {
            cluster.add_worker();
        }
        for worker in &mut cluster.workers {
            worker.wait_until_joined();
        }
        cluster
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// One more worker, behind a proxy and with a cache of its own; gives its index. Those with an odd index send their
    /// gradients, past whatever their proxy does; the others share memory with the coordinator.
    pub fn add_worker(&mut self) -> usize {
        let index = self.workers.len();
        let flag = ["", "--no-shared-memory"][index % 2];
        let mut sites = self.sites.iter().cycle();
        let site = sites.nth(index).map(|site| format!("--site {site}"));
        let site = site.unwrap_or_default();
        let proxy = Proxy::new(&format!("127.0.0.1:{}", self.port));
        let url = proxy.url();
        let process = self.scene.start(&format!(
            "worker --coordinator {url} --threads 1 --home cache-{index} {flag} {site}"
        ));
        self.workers.push(Worker {
            process,
            proxy,
            alive: true,
            joined: false,
        });
        index
    }

    /// Workers whose processes are there.
    pub fn alive(&self) -> Vec<usize> {
        let all = 0..self.workers.len();
        all.filter(|&index| self.workers[index].alive).collect()
    }

    pub fn coordinator_pid(&self) -> u32 {
        self.coordinator.pid()
    }

    pub fn kill_coordinator(&mut self) {
        self.coordinator.kill();
        self.up = false;
    }

    /// Asks the coordinator to end, and waits until it has.
    pub fn end_coordinator(&mut self) {
        signal::send(self.coordinator.pid(), Signal::Terminate);
        self.coordinator.wait();
        self.up = false;
    }

    /// Starts the coordinator again, on the same home and port.
    pub fn restart_coordinator(&mut self) {
        self.bring_up("");
    }

    /// The same, with limits of the shell's.
    pub fn restart_coordinator_limited(&mut self, limits: &str) {
        self.bring_up(limits);
    }

    fn bring_up(&mut self, limits: &str) {
        assert!(!self.up, "one coordinator at a time");
        let line = format!(
            "coordinator --listen 127.0.0.1:{} {}",
            self.port, self.flags
        );
        self.coordinator = match limits {
            "" => self.scene.start(&line),
            limits => self.scene.start_limited(&line, limits),
        };
        self.coordinator.wait_for("http://");
        self.up = true;
    }

    /// Submits the run and begins to follow it. A line without `--new` takes up what is unfinished.
    pub fn submit(&mut self, line: &str) {
        let url = self.url();
        self.scene
            .run(&format!("{line} --name {RUN} --coordinator {url} --detach"));
        self.old = self.events.len();
        self.follow();
    }

    fn follow(&mut self) {
        let line = format!("follow {RUN} --coordinator {} --json", self.url());
        self.follower = Some(self.scene.start(&line));
        self.repeated = self.events.len();
    }

    /// Reads the next event, if one comes before `until`. Once the run rests, none does.
    fn next_event(&mut self, until: Instant) -> bool {
        while Instant::now() < until {
            let Some(follower) = &mut self.follower else {
                self.pause(until);
                if self.up && !self.rests() {
                    self.follow();
                }
                continue;
            };
            match follower.next_line(until) {
                Ok(None) => return false,
                Err(Ended) => self.follower = None,
                Ok(Some(line)) => {
                    let json: Value = serde_json::from_str(&line.text).unwrap_or_default();
                    if json["event"].is_null() {
                        continue;
                    }
                    if self.repeated > 0 {
                        self.repeated -= 1;
                        continue;
                    }
                    self.events.push(Event { at: line.at, json });
                    return true;
                }
            }
        }
        false
    }

    fn pause(&self, until: Instant) {
        std::thread::sleep(PAUSE.min(until.saturating_duration_since(Instant::now())));
    }

    /// Whether nothing more will be said.
    pub fn rests(&self) -> bool {
        self.events[self.old..].last().is_some_and(Event::is_last)
    }

    /// Lets time pass, and reads what is said in it.
    pub fn run_for(&mut self, duration: Duration) {
        let until = Instant::now() + duration;
        while Instant::now() < until && !self.rests() {
            self.next_event(until);
        }
    }

    /// Waits until something holds; `what` names it. The end of the run is a failure.
    pub fn wait_until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !holds(self) {
            assert!(
                !self.rests(),
                "the run rests before {what}: {}",
                self.events.last().expect("it has rested").json
            );
            assert!(Instant::now() < deadline, "not in time: {what}");
            let soon = Instant::now() + PAUSE;
            self.next_event(soon.min(deadline));
        }
    }

    /// How many events say this.
    pub fn told(&self, what: &str) -> usize {
        let of = |event: &&Event| event.text().contains(what);
        self.events.iter().filter(of).count()
    }

    /// The newest committed step.
    pub fn step(&self) -> u64 {
        self.events.iter().rev().find_map(Event::step).unwrap_or(0)
    }

    /// Waits until a step is committed that is not below `step`.
    pub fn wait_for_step(&mut self, step: u64) {
        self.wait_until(&format!("step {step}"), |cluster| cluster.step() >= step);
    }

    /// Waits until the run rests; gives its last event.
    pub fn rest(&mut self) -> Value {
        let deadline = Instant::now() + DEADLINE;
        while !self.rests() {
            assert!(Instant::now() < deadline, "not in time: the run's end");
            self.next_event(deadline);
        }
        self.events.last().expect("it rests").json.clone()
    }

    /// Waits until the run is finished.
    pub fn finish(&mut self) {
        let last = self.rest();
        assert_eq!(last["event"], "finished", "{last}");
    }

    /// The last lines of every process.
    pub fn tails(&mut self) -> String {
        let mut tails = vec![self.coordinator.tail(TAIL)];
        for worker in &mut self.workers {
            tails.push(worker.process.tail(TAIL));
        }
        tails.extend(self.follower.as_mut().map(|follower| follower.tail(TAIL)));
        tails.join("\n")
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
        }
    }
}

/// What a run leaves behind when nothing disturbs it.
pub struct Reference {
    pub state_hash: Value,
    /// The ledger as JSON lines, where the binary can print it.
    pub ledger: Option<String>,
    /// Each step's event, without its speed.
    pub steps: Vec<Value>,
    /// Median time between two steps.
    pub median: Duration,
}

impl Reference {
    /// Runs `line` on so many undisturbed workers.
    pub fn of(scene: &Scene, line: &str, workers: usize) -> Self {
        let mut cluster = Cluster::start(scene, workers);
        cluster.submit(&format!("{line} --new"));
        cluster.finish();
        let steps: Vec<&Event> = cluster
            .events
            .iter()
            .filter(|e| e.step().is_some())
            .collect();
        let mut times: Vec<Duration> = steps.windows(2).map(|two| two[1].at - two[0].at).collect();
        times.sort();
        Self {
            state_hash: cluster.events.last().expect("it is finished").json["state_hash"].clone(),
            steps: steps.iter().map(|event| facts(&event.json)).collect(),
            ledger: ledger(scene),
            median: times[times.len() / 2],
        }
    }

    /// How a run differs from this one; nothing, if it is the same to the bit.
    pub fn differences(&self, cluster: &Cluster<'_>) -> Vec<String> {
        let mut found = Vec::new();
        let last = &cluster.events.last().expect("there are events").json;
        if last["state_hash"] != self.state_hash {
            found.push(format!("the state: {last}"));
        }
        found.extend(self.step_differences(&cluster.events));
        let ledger = ledger(cluster.scene);
        if ledger != self.ledger {
            found.push("the ledger".into());
        }
        found.extend(verify(cluster.scene).err());
        found
    }

    /// Each step must be there, and whatever was computed again must have come out the same.
    fn step_differences(&self, events: &[Event]) -> Vec<String> {
        let mut found = Vec::new();
        let mut seen = vec![false; self.steps.len()];
        for event in events {
            let Some(step) = event.step() else { continue };
            let at = step as usize - 1;
            if self.steps.get(at) != Some(&facts(&event.json)) {
                found.push(format!("step {step}: {}", event.json));
            }
            if let Some(seen) = seen.get_mut(at) {
                *seen = true;
            }
        }
        // One wrong step makes every later one wrong.
        found.truncate(1);
        let missing = seen.iter().position(|seen| !seen);
        found.extend(missing.map(|at| format!("no event of step {}", at + 1)));
        found
    }
}

/// A step's event without what depends on the clock.
fn facts(step: &Value) -> Value {
    let mut facts = step.clone();
    facts["tokens_per_second"].take();
    facts["mfu"].take();
    facts
}

/// Whether the binary has this verb.
fn has_verb(verb: &str) -> bool {
    static HELP: OnceLock<String> = OnceLock::new();
    let help = HELP.get_or_init(|| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_cohort"))
            .arg("--help")
            .output();
        text(&output.expect("the binary runs").stdout)
    });
    let begins = format!("  {verb} ");
    help.lines().any(|line| line.starts_with(&begins))
}

/// The run's ledger as JSON lines; `None` where the binary cannot print it.
pub fn ledger(scene: &Scene) -> Option<String> {
    has_verb("ledger").then(|| text(&scene.run(&format!("ledger {RUN}")).stdout))
}

/// Audits the run's ledger; an error is what the audit said. Nothing is wrong where the binary cannot audit.
pub fn verify(scene: &Scene) -> Result<(), String> {
    if !has_verb("verify") {
        return Ok(());
    }
    let output = scene.cohort(&format!("verify {RUN}")).output();
    let output = output.expect("the binary runs");
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "`cohort verify`: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        )),
    }
}

/// Whether the binary can audit a run.
pub fn can_verify() -> bool {
    has_verb("verify")
}

/// All files below a directory.
pub fn files(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.path().is_dir() {
            true => files(&entry.path()),
            false => vec![entry.path()],
        })
        .collect()
}

/// Flips the lowest bit of one byte of a file.
pub fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("the file is there");
    bytes[at] ^= 1;
    std::fs::write(path, bytes).expect("the file can be written");
}
