//! The coordinator's machine, for people: load, memory, disk. Read once a second, beside everything else; where the
//! platform does not tell, nothing is said.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use cohort_common::api::SystemView;
use cohort_common::process::{self, Usage};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Looks at the machine for as long as somebody has the receiver.
pub fn watch_system(home: PathBuf) -> watch::Receiver<SystemView> {
    let (sender, receiver) = watch::channel(SystemView::default());
    tokio::spawn(async move {
        let mut looker = Looker::new(home);
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = sender.closed() => return,
            }
            // A disk may take its time to answer.
            let look = tokio::task::spawn_blocking(move || {
                let seen = looker.look();
                (looker, seen)
            });
            let Ok((again, seen)) = look.await else {
                return;
            };
            looker = again;
            sender.send_replace(seen);
        }
    });
    receiver
}

struct Looker {
    home: PathBuf,
    last: Option<(Instant, Usage)>,
}

impl Looker {
    fn new(home: PathBuf) -> Self {
        Self { home, last: None }
    }

    fn look(&mut self) -> SystemView {
        let usage = process::usage().map(|usage| (Instant::now(), usage));
        let cores = self
            .last
            .zip(usage)
            .and_then(|((then, before), (now, usage))| {
                let passed = now.saturating_duration_since(then).as_secs_f64();
                let used = usage.cpu_us.saturating_sub(before.cpu_us) as f64 / 1e6;
                (passed > 0.0).then(|| used / passed)
            });
        self.last = usage;
        let disk = fs4::statvfs(&self.home).ok();
        let memory = read("/proc/meminfo");
        let memory = |key| memory.as_deref().and_then(|text| kilobytes(text, key));
        SystemView {
            cpus: std::thread::available_parallelism()
                .ok()
                .and_then(|cores| u32::try_from(cores.get()).ok()),
            load: read("/proc/loadavg").as_deref().and_then(load),
            cores,
            rss_bytes: usage.map(|(_, usage)| usage.rss_bytes),
            memory_available_bytes: memory("MemAvailable:"),
            memory_bytes: memory("MemTotal:"),
            disk_free_bytes: disk.as_ref().map(fs4::FsStats::available_space),
            disk_bytes: disk.as_ref().map(fs4::FsStats::total_space),
            ..SystemView::default()
        }
    }
}

/// A file of the kernel; `None` elsewhere than on Linux.
fn read(path: &str) -> Option<String> {
    cfg!(target_os = "linux")
        .then(|| std::fs::read_to_string(path).ok())
        .flatten()
}

/// The first number of `/proc/loadavg`.
fn load(text: &str) -> Option<f64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// A line of `/proc/meminfo`, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        let text = "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    4000000 kB\n";
        assert_eq!(kilobytes(text, "MemTotal:"), Some(8_192_000_000));
        assert_eq!(kilobytes(text, "MemAvailable:"), Some(4_096_000_000));
        assert_eq!(kilobytes(text, "SwapTotal:"), None);
        assert_eq!(load("0.52 0.58 0.59 1/977 9\n"), Some(0.52));
        assert_eq!(load(""), None);
    }

    #[test]
    fn a_machine_has_a_disk_and_the_second_look_knows_what_is_used() {
        let home = tempfile::tempdir().expect("a directory");
        let mut looker = Looker::new(home.path().to_owned());
        let first = looker.look();
        assert!(first.disk_bytes >= first.disk_free_bytes);
        assert!(first.disk_bytes > Some(0));
        assert_eq!(first.cores, None);
        if cfg!(target_os = "linux") {
            assert!(first.memory_bytes > first.memory_available_bytes);
            assert!(first.rss_bytes > Some(1 << 20));
            assert!(looker.look().cores.is_some());
        }
    }

    #[tokio::test]
    async fn looks_are_told() {
        let home = tempfile::tempdir().expect("a directory");
        let mut seen = watch_system(home.path().to_owned());
        seen.changed().await.expect("somebody looks");
        assert!(seen.borrow().cpus > Some(0));
    }
}
