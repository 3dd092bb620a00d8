//! What a control group leaves to this process: containers and batch systems set it, and few programs look. Both versions
//! of Linux's control groups are read; a limit of a group holds for all below it.

use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// What a control group leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Processor time, in cores.
    pub cores: Option<f64>,
    /// Memory, in bytes.
    pub memory: Option<u64>,
}

impl Limits {
    /// Of this process.
    pub fn of_this_process() -> Self {
        let read = |path: &Path| std::fs::read_to_string(path).ok();
        let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
        Self::of(&groups, read)
    }

    /// Of a process whose `/proc/PID/cgroup` is `groups`, where `read` reads the files of the groups.
    fn of(groups: &str, read: impl Fn(&Path) -> Option<String>) -> Self {
        let mut limits = Self::default();
        for line in groups.lines() {
            // `ID:CONTROLLERS:PATH`; version 2 has no controllers there.
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
                continue;
            };
            let has = |name: &str| controllers.split(',').any(|c| c == name);
            let root = match controllers {
                "" => PathBuf::from(ROOT),
                _ => Path::new(ROOT).join(controllers),
            };
            for group in Path::new(path.trim_start_matches('/')).ancestors() {
                let value = |file: &str| read(&root.join(group).join(file));
                if controllers.is_empty() {
                    limits.take(
                        value("cpu.max").as_deref().and_then(cores),
                        value("memory.max").as_deref().and_then(number),
                    );
                }
                if has("cpu") {
                    let quota = value("cpu.cfs_quota_us").as_deref().and_then(number);
                    let period = value("cpu.cfs_period_us").as_deref().and_then(number);
                    let cores = quota.zip(period).map(|(q, p)| q as f64 / p.max(1) as f64);
                    limits.take(cores, None);
                }
                if has("memory") {
                    let bytes = value("memory.limit_in_bytes").as_deref().and_then(number);
                    // Version 1 writes no limit as the largest number of pages.
                    limits.take(None, bytes.filter(|&bytes| bytes < 1 << 60));
                }
            }
        }
        limits
    }

    fn take(&mut self, cores: Option<f64>, memory: Option<u64>) {
        if let Some(cores) = cores {
            self.cores = Some(self.cores.map_or(cores, |own| own.min(cores)));
        }
        if let Some(memory) = memory {
            self.memory = Some(self.memory.map_or(memory, |own| own.min(memory)));
        }
    }
}

/// `QUOTA PERIOD` in cores; the word `max` is no limit.
fn cores(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0.0).then(|| quota / period)
}

/// A number; the word `max` and -1 are none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn limits(groups: &str, files: &[(&str, &str)]) -> Limits {
        let files: HashMap<PathBuf, &str> = files
            .iter()
            .map(|(path, text)| (Path::new(ROOT).join(path), *text))
            .collect();
        Limits::of(groups, |path| {
            files.get(path).map(|text| (*text).to_owned())
        })
    }

    #[test]
    fn the_narrowest_group_above_a_process_counts() {
        let found = limits(
            "0::/kubepods/pod7/main\n",
            &[
                ("kubepods/pod7/main/cpu.max", "250000 100000\n"),
                ("kubepods/pod7/main/memory.max", "max\n"),
                ("kubepods/pod7/cpu.max", "400000 100000\n"),
                ("kubepods/pod7/memory.max", "4294967296\n"),
                ("kubepods/memory.max", "8589934592\n"),
            ],
        );
        let expected = Limits {
            cores: Some(2.5),
            memory: Some(4 << 30),
        };
        assert_eq!(found, expected);
        // Within a container, its own group is the root.
        let found = limits(
            "0::/\n",
            &[("cpu.max", "max 100000\n"), ("memory.max", "1048576\n")],
        );
        let expected = Limits {
            cores: None,
            memory: Some(1 << 20),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn the_first_version_is_read_too() {
        let found = limits(
            "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/\n",
            &[
                ("cpu,cpuacct/job/cpu.cfs_quota_us", "150000\n"),
                ("cpu,cpuacct/job/cpu.cfs_period_us", "100000\n"),
                ("cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
                ("cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
                ("memory/job/memory.limit_in_bytes", "1073741824\n"),
                ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ],
        );
        let expected = Limits {
            cores: Some(1.5),
            memory: Some(1 << 30),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn nothing_is_no_limit() {
        for groups in ["", "0::/\n", "nonsense", "1:memory\n"] {
            assert_eq!(limits(groups, &[]), Limits::default(), "{groups}");
        }
    }
}
