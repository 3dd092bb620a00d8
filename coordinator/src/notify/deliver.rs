//! How notices go out: one after another, each to the command and to the webhook, with an end to every attempt.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{info, warn};

use super::{Notice, NotifyConfig};

/// How long a command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// How long one request may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Pauses before the second and the third request.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];

/// Where notices go.
pub(super) struct Delivery {
    command: Option<String>,
    webhook: Option<Webhook>,
}

struct Webhook {
    url: String,
    agent: ureq::Agent,
}

/// Why a request was in vain.
struct Failure {
    error: String,
    /// Whether another attempt may do better.
    again: bool,
}

impl Delivery {
    pub fn of(config: NotifyConfig) -> Self {
        Self {
            command: config.command,
            webhook: config.webhook.map(Webhook::new),
        }
    }

    /// Delivers until there is nothing more.
    pub async fn run(self, mut notices: mpsc::Receiver<Notice>) {
        while let Some(notice) = notices.recv().await {
            let (event, run) = (notice.event.word(), notice.run.as_str());
            let json = serde_json::to_string(&notice).expect("a notice is plain data");
            if let Some(command) = &self.command {
                match call(command, sleep(COMMAND_DEADLINE), &notice, &json).await {
                    Ok(()) => info!(event, run, "the command was told"),
                    Err(error) => warn!(event, run, error, "the command was not told"),
                }
            }
            if let Some(webhook) = &self.webhook {
                match webhook.post(&json).await {
                    Ok(()) => info!(event, run, host = webhook.host(), "the webhook was told"),
                    Err(error) => {
                        warn!(
                            event,
                            run,
                            host = webhook.host(),
                            error,
                            "the webhook was not told"
                        );
                    }
                }
            }
        }
    }
}

/// Runs the command with the notice on its stdin. It may take until `late` completes.
async fn call(
    command: &str,
    late: impl Future<Output = ()>,
    notice: &Notice,
    json: &str,
) -> Result<(), String> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .env("COHORT_EVENT", notice.event.word())
        .env("COHORT_RUN", &notice.run)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    #[cfg(unix)]
    shell.process_group(0);
    let mut child = shell
        .spawn()
        .map_err(|error| format!("cannot start `sh`: {error}"))?;
    let stdin = child.stdin.take();
    let line = format!("{json}\n");
    let ended = async {
        if let Some(mut stdin) = stdin {
            // A command that does not read is none the worse.
            let _ = stdin.write_all(line.as_bytes()).await;
        }
        child.wait().await
    };
    let ended = tokio::select! {
        ended = ended => Some(ended),
        () = late => None,
    };
    match ended {
        Some(Ok(status)) if status.success() => Ok(()),
        Some(Ok(status)) => Err(format!("it ended with {status}")),
        Some(Err(error)) => Err(format!("it cannot be waited for: {error}")),
        None => {
            kill(&mut child).await;
            let seconds = COMMAND_DEADLINE.as_secs();
            Err(format!("it took more than {seconds} s and was killed"))
        }
    }
}

/// Kills the shell and what it has started.
async fn kill(child: &mut Child) {
    #[cfg(unix)]
    if let Some(group) = child
        .id()
        .and_then(|id| rustix::process::Pid::from_raw(id as i32))
    {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.kill().await;
}

impl Webhook {
    fn new(url: String) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(REQUEST_DEADLINE))
            .max_redirects(0)
            .build();
        Self {
            url,
            agent: config.into(),
        }
    }

    /// What may be logged of the address: the rest may be a secret.
    fn host(&self) -> &str {
        let rest = self.url.split_once("://").map_or("", |(_, rest)| rest);
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        authority.rsplit('@').next().unwrap_or_default()
    }

    async fn post(&self, json: &str) -> Result<(), String> {
        let mut pauses = PAUSES.into_iter();
        loop {
            let (agent, url, json) = (self.agent.clone(), self.url.clone(), json.to_owned());
            let request = tokio::task::spawn_blocking(move || request(&agent, &url, &json));
            let failure = match request.await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(failure)) => failure,
                Err(panic) => return Err(panic.to_string()),
            };
            match pauses.next().filter(|_| failure.again) {
                Some(pause) => sleep(pause).await,
                None => return Err(failure.error),
            }
        }
    }
}

fn request(agent: &ureq::Agent, url: &str, json: &str) -> Result<(), Failure> {
    let sent = agent
        .post(url)
        .header("content-type", "application/json")
        .send(json);
    match sent {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(Failure {
            error: format!("it answered with status {}", answer.status().as_u16()),
            again: false,
        }),
        Err(error) => {
            let refused = |status: u16| (400..500).contains(&status) && status != 429;
            let again = !matches!(error, ureq::Error::StatusCode(status) if refused(status));
            let error = error.to_string();
            Err(Failure { error, again })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::Kind;
    use super::*;

    #[tokio::test]
    async fn a_command_that_takes_too_long_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let notice = Notice {
            event: Kind::Stalled,
            run: "one".into(),
            step: 3,
            text: String::new(),
            time_ms: 0,
        };
        let command = format!(
            "sleep 600 & echo $! > '{0}'; cat >> '{0}'; wait",
            file.display()
        );
        // It is late once it has started another process and read what it was told.
        let read = || std::fs::read_to_string(&file).unwrap_or_default();
        let deadline = Instant::now() + COMMAND_DEADLINE;
        let late = async {
            while read().lines().count() < 2 && Instant::now() < deadline {
                tokio::task::yield_now().await;
            }
        };
        let error = call(&command, late, &notice, "{}").await.unwrap_err();
        assert_eq!(error, "it took more than 30 s and was killed");
        let written = std::fs::read_to_string(&file).unwrap();
        let (pid, json) = written.split_once('\n').unwrap();
        assert_eq!(json, "{}\n");
        // It may take a moment until a process that was killed is gone.
        let process = std::path::PathBuf::from(format!("/proc/{pid}/stat"));
        let gone = || {
            let stat = std::fs::read_to_string(&process).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let deadline = Instant::now() + COMMAND_DEADLINE;
        while cfg!(target_os = "linux") && !gone() {
            assert!(Instant::now() < deadline, "process {pid} lives");
            tokio::task::yield_now().await;
        }
        let failed = call("exit 3", sleep(COMMAND_DEADLINE), &notice, "{}").await;
        assert_eq!(failed.unwrap_err(), "it ended with exit status: 3");
    }

    #[test]
    fn only_the_host_of_a_webhook_is_logged() {
        for (url, host) in [
            (
                "https://user:secret@hooks.example/T0/secret?k=1",
                "hooks.example",
            ),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://h?token=a@b", "h"),
        ] {
            assert_eq!(Webhook::new(url.into()).host(), host);
        }
    }
}
