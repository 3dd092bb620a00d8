//! What the tests share: a scene of its own for each (home, corpus, spec), processes that die with it, and waiting with
//! deadlines. A failure prints what the processes logged.

#[cfg(unix)]
pub mod browser;
#[cfg(unix)]
pub mod cluster;
pub mod http;
pub mod hub;
#[cfg(unix)]
pub mod proxy;
#[cfg(unix)]
pub mod random;
pub mod s3;
#[cfg(unix)]
pub mod signal;
#[cfg(unix)]
pub mod terminal;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A time that is demanded where `COHORT_QUIET_MACHINE=1` says that nothing else runs; elsewhere it decides nothing.
pub fn on_a_quiet_machine(demanded: Duration) -> Duration {
    match std::env::var_os("COHORT_QUIET_MACHINE") {
        Some(_) => demanded,
        None => DEADLINE,
    }
}

/// How long anything may take before a test gives up. Far above what a slow machine needs.
pub const DEADLINE: Duration = Duration::from_secs(240);

/// A model and a run that train in about a second.
pub const SPEC: &str = r#"
[model]
architecture = "llama"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 64
context = 32

[corpus]
split = "tail"

[tokenizer]
kind = "bpe"
vocab_size = 300

[train]
steps = 12
lanes = 6
micro_batch = 2
accumulate = 2
learning_rate = 0.01
warmup_steps = 2
eval_every = 6
eval_samples = 16

[checkpoint]
every = 4
keep = 2
"#;

/// A temporary directory with a home, a corpus and a spec.
pub struct Scene {
    dir: TempDir,
    /// Variables of all its processes.
    pub environment: Vec<(String, String)>,
}

impl Scene {
    pub fn new() -> Self {
        let scene = Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
            environment: Vec::new(),
        };
        scene.write("text.txt", &words(1, 12_000));
        scene.write("spec.toml", SPEC);
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).expect("a file is written");
    }

    /// The binary with this scene's home and nothing of the caller's settings. Words are separated by spaces.
    pub fn cohort(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
        command
            .args(line.split_whitespace())
            .current_dir(self.dir.path())
            .env_remove("COHORT_COORDINATOR")
            .env_remove("COHORT_TOKEN")
            .env_remove("COHORT_LOG")
            .env_remove("COHORT_LOG_FORMAT")
            .env_remove("COHORT_OTLP")
            .env_remove("COHORT_OTLP_EVERY")
            .env_remove("COHORT_INSTRUCTION_SET")
            .env_remove("COHORT_STORE")
            .env("COHORT_HOME", self.path("home"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end; it must succeed.
    pub fn run(&self, line: &str) -> Output {
        let output = self.cohort(line).output().expect("the binary runs");
        if !output.status.success() {
            panic!(
                "`cohort {line}` failed: {}\n{}",
                text(&output.stderr),
                self.logs()
            );
        }
        output
    }

    /// Runs a command that must fail with exit code 1; gives what it said.
    pub fn fails(&self, line: &str) -> String {
        let output = self.cohort(line).output().expect("the binary runs");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "`cohort {line}`: {said}");
        said
    }

    /// Runs a command with `--json`; gives its events.
    pub fn events(&self, line: &str) -> Vec<Value> {
        let output = self.run(&format!("{line} --json"));
        let lines = text(&output.stdout);
        lines
            .lines()
            .map(|line| serde_json::from_str(line).expect("stdout is JSON lines"))
            .collect()
    }

    /// Runs a training command; gives its event `finished`, behind which a report may come.
    pub fn finished(&self, line: &str) -> Value {
        finished(&self.events(line)).clone()
    }

    /// Starts a process that is killed with the scene's test.
    pub fn start(&self, line: &str) -> Process {
        Self::spawn(self.cohort(line), line)
    }

    /// The same with a variable in its environment.
    pub fn start_with(&self, line: &str, (name, value): (&str, &str)) -> Process {
        let mut command = self.cohort(line);
        command.env(name, value);
        Self::spawn(command, line)
    }

    /// The same with limits that a shell sets first, such as `ulimit -f 900`.
    #[cfg(unix)]
    pub fn start_limited(&self, line: &str, limits: &str) -> Process {
        let plain = self.cohort("");
        let mut command = Command::new("bash");
        let exec = format!("{limits}; exec {} {line}", env!("CARGO_BIN_EXE_cohort"));
        command
            .args(["-c", &exec])
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Self::spawn(command, line)
    }

    fn spawn(mut command: Command, line: &str) -> Process {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let (sender, lines) = channel();
        let out = child.stdout.take().expect("piped");
        let err = child.stderr.take().expect("piped");
        let other = sender.clone();
        std::thread::spawn(move || forward(out, &sender));
        std::thread::spawn(move || forward(err, &other));
        Process {
            child,
            lines,
            seen: Vec::new(),
            line: line.into(),
        }
    }

    /// Starts a coordinator on a free port; gives it and its address.
    pub fn coordinator(&self, flags: &str) -> (Process, String) {
        let process = self.start(&format!("coordinator --listen 127.0.0.1:0 {flags}"));
        Self::listening(process)
    }

    /// The same at a free port of another address than the loopback's.
    pub fn coordinator_at(&self, address: std::net::IpAddr, flags: &str) -> (Process, String) {
        let process = self.start(&format!("coordinator --listen {address}:0 {flags}"));
        Self::listening(process)
    }

    /// The same with limits that a shell sets first.
    #[cfg(unix)]
    pub fn coordinator_limited(&self, limits: &str) -> (Process, String) {
        Self::listening(self.start_limited("coordinator --listen 127.0.0.1:0", limits))
    }

    fn listening(mut process: Process) -> (Process, String) {
        // A store's address may come before its own.
        let line = process.wait_for("http");
        let at = line.find("http").expect("an address");
        let url = line[at..]
            .split(|c: char| c.is_whitespace() || c == ',' || c == '"')
            .next()
            .expect("split gives one");
        let url = url.trim_end_matches(['/', '.']).to_owned();
        (process, url)
    }

    fn logs(&self) -> String {
        let logs = self.path("home").join("logs");
        let entries = std::fs::read_dir(&logs).into_iter().flatten().flatten();
        entries
            .map(|entry| {
                let content = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = content.lines().collect();
                let tail = lines[lines.len().saturating_sub(15)..].join("\n");
                format!("--- {}\n{tail}\n", entry.path().display())
            })
            .collect()
    }
}

/// The event with which a run ends that has done all its steps.
pub fn finished(events: &[Value]) -> &Value {
    let last = events.iter().rfind(|event| event["event"] == "finished");
    last.unwrap_or_else(|| panic!("the run did not finish: {:?}", events.last()))
}

fn forward(stream: impl std::io::Read, lines: &std::sync::mpsc::Sender<Line>) {
    for text in BufReader::new(stream).lines().map_while(Result::ok) {
        let at = Instant::now();
        if lines.send(Line { at, text }).is_err() {
            return;
        }
    }
}

/// A line that a process printed, and when it came.
#[derive(Clone, Debug)]
pub struct Line {
    pub at: Instant,
    pub text: String,
}

/// A process that ends with the test.
pub struct Process {
    pub child: Child,
    lines: Receiver<Line>,
    seen: Vec<Line>,
    line: String,
}

impl Process {
    /// Waits for a line with `text` in it, on stdout or stderr.
    pub fn wait_for(&mut self, text: &str) -> String {
        self.wait_until(text, |line| line.contains(text))
    }

    /// Waits for a line that satisfies `wanted`.
    pub fn wait_until(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if wanted(&line.text) {
                        return line.text;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.fail(&format!("no `{what}` in time")),
                Err(RecvTimeoutError::Disconnected) => {
                    self.fail(&format!("it ended before `{what}`"));
                }
            }
        }
    }

    /// The next line, if one comes before the deadline; an error once the process has ended and all is read.
    pub fn next_line(&mut self, deadline: Instant) -> Result<Option<Line>, Ended> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.seen.push(line.clone());
                Ok(Some(line))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Ended),
        }
    }

    /// Waits for the event of a step at or after `step`.
    pub fn wait_for_step(&mut self, step: u64) {
        self.wait_until(&format!("step {step}"), |line| {
            let event: Value = serde_json::from_str(line).unwrap_or_default();
            event["event"] == "step" && event["step"].as_u64() >= Some(step)
        });
    }

    /// Waits for the end; gives the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DEADLINE;
        while let Ok(line) = self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            self.seen.push(line);
        }
        self.child
            .wait()
            .expect("the child can be waited for")
            .code()
    }

    /// SIGKILL, and nothing else.
    pub fn kill(&mut self) {
        self.child.kill().expect("the child can be killed");
        self.child.wait().expect("the child can be waited for");
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed and was read, all of it.
    pub fn printed(&self) -> String {
        joined(&self.seen)
    }

    /// What it was started with, and the last lines that it printed.
    pub fn tail(&mut self, lines: usize) -> String {
        self.seen.extend(self.lines.try_iter());
        let from = self.seen.len().saturating_sub(lines);
        format!(
            "--- cohort {} (process {})\n{}",
            self.line,
            self.pid(),
            joined(&self.seen[from..])
        )
    }

    fn fail(&mut self, what: &str) -> ! {
        panic!(
            "`cohort {}`: {what}; it printed\n{}",
            self.line.clone(),
            self.tail(30)
        );
    }
}

/// A process has ended, and all that it printed was read.
#[derive(Clone, Copy, Debug)]
pub struct Ended;

fn joined(lines: &[Line]) -> String {
    let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
    texts.join("\n")
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Text of `count` made-up words that a model can learn something from; the same for the same seed.
pub fn words(seed: u32, count: usize) -> String {
    const WORDS: &[&str] = &[
        "lane", "tree", "step", "root", "the", "a", "sums", "of", "and", "worker", "holds",
        "sends", "cluster", "gradient", "commit", "never", "always", "waits", "for", "ledger",
    ];
    let mut state = seed;
    let mut out = String::new();
    for n in 1..=count {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.push_str(WORDS[(state >> 16) as usize % WORDS.len()]);
        out.push(if n % 11 == 0 { '\n' } else { ' ' });
    }
    out
}

/// Looks again and again, at what tells nobody of its changes, until something is found.
pub fn look<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Real data beside the repository, or in `COHORT_TEST_DATA`; says so where it is absent.
pub fn real_data(name: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let root = std::env::var_os("COHORT_TEST_DATA").map_or(beside, PathBuf::from);
    let path = root.join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there", path.display());
    None
}
