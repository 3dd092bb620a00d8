//! Private clusters: a coordinator and workers as child processes of this one, on this machine.
//!
//! The children's stdin is a pipe from this process: however this process dies, the pipe closes and they shut down. They
//! are in process groups of their own, so that a Ctrl-C in the terminal reaches this process only, which decides.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use cohort_common::home::{Holder, Home};
use cohort_common::net::Places;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::cli::OptimizerArg;
use crate::client::Client;
use crate::context::{self, COORDINATOR_VARIABLE, OPERATOR_TOKEN, Secret, TOKEN_VARIABLE};
use crate::failure::hinted;
use crate::logs;

/// How long a coordinator may take until it listens.
const COORDINATOR_DEADLINE: Duration = Duration::from_secs(60);
/// How long the workers may take until all have joined.
const WORKERS_DEADLINE: Duration = Duration::from_secs(120);
/// How long a process may take to end after it was asked to.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// How long a coordinator that holds the home, and seems to go on, is waited for.
const STAYS: Duration = Duration::from_secs(1);
/// How long one is waited for that is about to end.
const ENDS: Duration = Duration::from_secs(10);
/// Between looks at something that has no event to wait for.
const LOOK: Duration = Duration::from_millis(20);
/// Between looks at whether a process of the cluster has ended, while they take the processors from those that train.
const DEATHS: Duration = Duration::from_millis(100);
/// Lines of a log that are shown when its process has ended.
const TAIL_LINES: usize = 12;

/// What a local cluster consists of.
pub struct Options {
    /// Its home directory.
    pub home: PathBuf,
    /// Address of the coordinator.
    pub listen: String,
    /// Where the coordinator serves its page besides.
    pub http: Option<String>,
    /// Number of workers.
    pub workers: u32,
    /// Threads of each worker; `None` gives each its share of the cores.
    pub threads: Option<usize>,
    /// Who keeps the optimizer's moments.
    pub optimizer: OptimizerArg,
    /// The cluster's token.
    pub secret: Option<Secret>,
    /// Whether it serves a single command. Then unfinished runs of earlier clusters are set aside: the command's own
    /// run would wait behind them, perhaps for more workers than there are.
    pub private: bool,
    /// Where its coordinator keeps event files for TensorBoard, if anywhere.
    pub tensorboard: Option<PathBuf>,
    /// Flags of the coordinator that say who is told what becomes of runs.
    pub notify: Vec<String>,
    /// Variables of its processes' environment, beside those of this process.
    pub variables: Vec<(&'static str, String)>,
}

/// A cluster of child processes. Dropping it kills them.
pub struct LocalCluster {
    home: Home,
    url: String,
    coordinator: Process,
    workers: Vec<Process>,
    set_aside: Vec<String>,
}

/// A child process with its log.
pub struct Process {
    name: String,
    pid: u32,
    child: Child,
    log: PathBuf,
    pid_file: PathBuf,
}

impl LocalCluster {
    /// Starts the processes and waits until all workers have joined.
    pub async fn start(options: &Options) -> Result<Self> {
        let home = Home::open(&options.home)?;
        if let Some(holder) = lasting_holder(&home).await {
            return Err(hinted(
                format!(
                    "the home directory `{}` is in use by {holder}",
                    home.root().display()
                ),
                "leave `--local` out to use that cluster, or choose another directory with `--home`",
            ));
        }
        let mut coordinator = coordinator(options, &home)?;
        let url = published_url(&home, &mut coordinator).await?;
        let mut cluster = Self {
            home,
            url,
            coordinator,
            workers: Vec::new(),
            set_aside: Vec::new(),
        };
        let token = context::token_for(
            &cluster.url,
            options.secret.as_ref(),
            &options.home,
            OPERATOR_TOKEN,
        )?;
        let places = Places::new([cluster.url.clone()]).expect("it is one");
        let mut client = Client::connect(&places, token, Some(&cluster.url)).await?;
        if options.private {
            cluster.set_aside = set_aside(&mut client).await?;
        }
        for number in 1..=options.workers {
            let worker = worker(options, &cluster.home, &cluster.url, number)?;
            cluster.workers.push(worker);
        }
        cluster.joined(&mut client).await?;
        Ok(cluster)
    }

    /// Where the coordinator listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where a browser on this machine finds the page.
    pub fn page(&self) -> String {
        format!("{}/", self.url.replace("//0.0.0.0:", "//127.0.0.1:"))
    }

    /// All processes with their ids, the coordinator first.
    pub fn processes(&self) -> impl Iterator<Item = (&str, u32)> {
        let all = std::iter::once(&self.coordinator).chain(&self.workers);
        all.map(|process| (process.name.as_str(), process.pid))
    }

    /// Unfinished runs of earlier clusters that this one does not go on with by itself.
    pub fn set_aside(&self) -> &[String] {
        &self.set_aside
    }

    /// Where the logs are.
    pub fn logs(&self) -> PathBuf {
        self.home.logs()
    }

    /// Waits for a process to end by itself. A lost worker is news, as the others take its lanes over; without a
    /// coordinator or any worker nothing goes on, which is an error.
    pub async fn next_loss(&mut self) -> Result<String> {
        loop {
            if let Some(status) = self.coordinator.ended()? {
                return Err(self.coordinator.obituary(&status));
            }
            for index in 0..self.workers.len() {
                let Some(status) = self.workers[index].ended()? else {
                    continue;
                };
                let worker = self.workers.remove(index);
                let obituary = worker.obituary(&status);
                return match self.workers.is_empty() {
                    true => Err(obituary.context("no worker is left")),
                    false => Ok(format!("{obituary}\nthe other workers take its work over")),
                };
            }
            sleep(DEATHS).await;
        }
    }

    /// Ends all processes: politely, and after a while by force.
    pub async fn end(mut self) {
        for worker in &mut self.workers {
            worker.ask_to_end();
        }
        for worker in &mut self.workers {
            worker.end().await;
        }
        self.coordinator.ask_to_end();
        self.coordinator.end().await;
    }

    async fn joined(&mut self, client: &mut Client) -> Result<()> {
        let deadline = Instant::now() + WORKERS_DEADLINE;
        loop {
            let present = client.cluster().await?.workers.len();
            if present >= self.workers.len() {
                return Ok(());
            }
            for process in std::iter::once(&mut self.coordinator).chain(&mut self.workers) {
                if let Some(status) = process.ended()? {
                    return Err(process.obituary(&status));
                }
            }
            if Instant::now() > deadline {
                bail!(
                    "only {present} of {} workers joined within {} s; their logs are in `{}`",
                    self.workers.len(),
                    WORKERS_DEADLINE.as_secs(),
                    self.home.logs().display()
                );
            }
            sleep(LOOK).await;
        }
    }
}

impl Process {
    fn spawn(
        name: String,
        home: &Home,
        options: &Options,
        arguments: &[impl AsRef<OsStr>],
    ) -> Result<Self> {
        let log = home.logs().join(format!("{name}.log"));
        let file = std::fs::File::create(&log)
            .with_context(|| format!("cannot write the log `{}`", log.display()))?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .arg("--home")
            .arg(home.root())
            .arg("--exit-with-parent")
            .env_remove(COORDINATOR_VARIABLE)
            .env_remove(TOKEN_VARIABLE)
            .stdin(Stdio::piped())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true);
        command.envs(options.variables.iter().cloned());
        // A token of an initialised cluster says what its bearer is: these processes have their own.
        if let Some(secret) = options.secret.as_ref().filter(|s| !s.is_of_cluster()) {
            command.env(TOKEN_VARIABLE, &secret.text);
        }
        if std::env::var_os(logs::VARIABLE).is_none() {
            command.env(logs::VARIABLE, "info");
        }
        #[cfg(unix)]
        command.process_group(0);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let pid = child.id().unwrap_or_default();
        let pid_file = log.with_extension("pid");
        std::fs::write(&pid_file, format!("{pid}\n"))
            .with_context(|| format!("cannot write `{}`", pid_file.display()))?;
        Ok(Self {
            name,
            pid,
            child,
            log,
            pid_file,
        })
    }

    /// How the process has ended, if it has.
    fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        let ended = self.child.try_wait();
        ended.with_context(|| format!("cannot watch {}", self.name))
    }

    fn obituary(&self, status: &std::process::ExitStatus) -> anyhow::Error {
        let tail = tail(&self.log);
        anyhow!(
            "{} (process {}) has ended ({status}); the end of its log `{}`:\n{tail}",
            self.name,
            self.pid,
            self.log.display()
        )
    }

    /// Closes the pipe that keeps it alive.
    fn ask_to_end(&mut self) {
        drop(self.child.stdin.take());
    }

    async fn end(&mut self) {
        if timeout(END_DEADLINE, self.child.wait()).await.is_err() {
            tracing::warn!(process = self.name, "does not end; killing it");
            let _ = self.child.kill().await;
        }
        let _ = std::fs::remove_file(&self.pid_file);
    }
}

/// Stops the runs that a coordinator has taken up.
async fn set_aside(client: &mut Client) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for run in client.runs().await? {
        if matches!(run.status.as_str(), "queued" | "running") {
            client.stop(&run.name).await?;
            names.push(run.name);
        }
    }
    Ok(names)
}

fn coordinator(options: &Options, home: &Home) -> Result<Process> {
    let mut arguments = vec![
        "coordinator".as_ref(),
        "--listen".as_ref(),
        OsStr::new(&options.listen),
    ];
    if options.optimizer != OptimizerArg::default() {
        arguments.extend(["--optimizer", options.optimizer.word()].map(OsStr::new));
    }
    if let Some(http) = &options.http {
        arguments.extend(["--http".as_ref(), OsStr::new(http)]);
    }
    if let Some(directory) = &options.tensorboard {
        arguments.extend(["--tensorboard".as_ref(), directory.as_os_str()]);
    }
    if options.private {
        // Only this machine reaches it, and only for this command.
        arguments.extend(["--insecure", "open"].map(OsStr::new));
    }
    arguments.extend(options.notify.iter().map(OsStr::new));
    Process::spawn("coordinator".into(), home, options, &arguments)
}

fn worker(options: &Options, home: &Home, url: &str, number: u32) -> Result<Process> {
    let threads = options.threads.unwrap_or_else(|| share(options.workers));
    let threads = threads.to_string();
    let arguments = ["worker", "--coordinator", url, "--threads", &threads];
    let name = format!("worker-{number}");
    Process::spawn(name, home, options, &arguments)
}

/// A worker's share of the cores.
pub fn share(workers: u32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / workers.max(1) as usize).max(1)
}

/// Who holds the home, unless it lets go soon: a coordinator that was told to end, or whose parent is gone, is busy with its
/// last files for a moment. It takes its address back first.
async fn lasting_holder(home: &Home) -> Option<Holder> {
    let begun = Instant::now();
    loop {
        let holder = home.holder()?;
        let patience = if holder.url.is_some() { STAYS } else { ENDS };
        if begun.elapsed() > patience {
            return Some(holder);
        }
        sleep(LOOK).await;
    }
}

async fn published_url(home: &Home, coordinator: &mut Process) -> Result<String> {
    let deadline = Instant::now() + COORDINATOR_DEADLINE;
    loop {
        if let Some(holder) = home.holder()
            && holder.pid == coordinator.pid
            && let Some(url) = holder.url
        {
            return Ok(url);
        }
        if let Some(status) = coordinator.ended()? {
            return Err(coordinator.obituary(&status));
        }
        if Instant::now() > deadline {
            bail!(
                "the coordinator does not listen after {} s; its log is `{}`",
                COORDINATOR_DEADLINE.as_secs(),
                coordinator.log.display()
            );
        }
        sleep(LOOK).await;
    }
}

/// The end of a log, indented.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(TAIL_LINES);
    let tail: Vec<String> = lines[first..]
        .iter()
        .map(|line| format!("  {line}"))
        .collect();
    match tail.is_empty() {
        true => "  (empty)".into(),
        false => tail.join("\n"),
    }
}

/// Completes when this process is to end: on Ctrl-C, on a polite signal, or, for a child of a local cluster, when its
/// parent is gone.
pub async fn shutdown(exit_with_parent: bool) {
    tokio::select! {
        () = interrupt() => {}
        () = parent_gone(), if exit_with_parent => {}
    }
}

/// Completes at Ctrl-C or a polite signal.
pub async fn interrupt() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Ends the process at once when it is asked to end once more.
pub async fn end_at_the_next_signal() {
    interrupt().await;
    std::process::exit(130);
}

/// Completes when stdin is closed. A thread of its own reads it, as a blocked read must not hold up the runtime's end.
pub async fn parent_gone() {
    let (gone, wait) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = gone.send(());
    });
    let _ = wait.await;
}
