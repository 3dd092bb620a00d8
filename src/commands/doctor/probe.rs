//! Finds out what is known of this machine and of a home directory. Nothing is left behind, and nothing is judged.

use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cohort_common::home::{Home, IDENTITY, SECURITY};
use cohort_common::process;
use cohort_common::security::{Credential, Security};
use cohort_common::segment::Segment;
use cohort_worker::engine::ops::{gemm, simd};

use super::cgroup::Limits;
use super::machine::{Gpus, Machine};
use super::place::{Files, Place};
use crate::commands::token::now;

/// Bytes that are written to see how fast a disk is, at most.
const WRITTEN: usize = 128 << 20;
/// Bytes of one write.
const PIECE: usize = 4 << 20;
/// How long that may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes of a segment that is made to see whether that is possible.
const SEGMENT: usize = 4096;

/// This machine.
pub fn machine() -> Machine {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = |line: &str| {
        line.strip_prefix("model name")
            .map(|rest| rest.trim_matches([' ', '\t', ':']).to_owned())
    };
    let cores = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    Machine {
        processor: cpuinfo
            .lines()
            .find_map(named)
            .unwrap_or_else(|| std::env::consts::ARCH.into()),
        instructions: simd::instruction_set(),
        amx: gemm::has_amx(),
        cores: cores.max(usable),
        usable,
        limits: Limits::of_this_process(),
        memory: fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| memory(&text)),
        files: process::open_files(),
        shared_memory: shared_memory(),
        gpus: gpus(Path::new("/proc/driver/nvidia")),
    }
}

/// Bytes in all, and those that are available, in `/proc/meminfo`.
fn memory(meminfo: &str) -> Option<(u64, u64)> {
    let value = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        Some(kilobytes * 1024)
    };
    Some((value("MemTotal:")?, value("MemAvailable:")?))
}

fn shared_memory() -> Result<(), String> {
    let segment = Segment::shared(SEGMENT).map_err(|error| error.to_string())?;
    let address = segment.address().ok_or("it has no address")?;
    Segment::open(address, SEGMENT as u64).map_err(|error| error.to_string())?;
    Ok(())
}

/// What NVIDIA's driver tells of itself and its cards.
fn gpus(driver: &Path) -> Gpus {
    let version = fs::read_to_string(driver.join("version")).unwrap_or_default();
    // `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar …`
    let first = version.lines().next().unwrap_or_default();
    let is_version =
        |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    let entries = fs::read_dir(driver.join("gpus"))
        .into_iter()
        .flatten()
        .flatten();
    let mut cards: Vec<String> = entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("information")).ok())
        .filter_map(|text| {
            Some(
                text.lines()
                    .find_map(|l| l.strip_prefix("Model:"))?
                    .trim()
                    .to_owned(),
            )
        })
        .collect();
    cards.sort();
    Gpus {
        driver: first.split_whitespace().find(is_version).map(str::to_owned),
        cards,
        build: cfg!(feature = "cuda"),
    }
}

/// A home directory, which need not exist, and an address to listen on, if a coordinator is to be started here.
pub fn place(home: &Path, listen: Option<&str>) -> Place {
    // What does not exist yet will be made in the nearest directory that does.
    let there = home.ancestors().find(|path| path.is_dir()).unwrap_or(home);
    let security = home.join(SECURITY);
    let now = now();
    let (free, files) = file_system(there);
    Place {
        home: home.to_owned(),
        exists: home.is_dir(),
        write: write_speed(there).map_err(|error| error.to_string()),
        free,
        files,
        holder: Home::open_read_only(home)
            .ok()
            .and_then(|home| home.holder())
            .map(|holder| holder.to_string()),
        port: listen.map(|address| (address.to_owned(), bind(address))),
        tokens: Security::is_in(&security).then(|| {
            let tokens = Security::open(&security).and_then(|security| security.keyring.list());
            tokens.map_err(|error| error.to_string())
        }),
        exposed: exposed(&security),
        certificate: certificate(home, now),
        now,
    }
}

fn bind(address: &str) -> Result<(), String> {
    TcpListener::bind(address)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Bytes a second that reach the disk of a directory.
fn write_speed(directory: &Path) -> io::Result<f64> {
    // It has no name, so nothing stays behind, however this process ends.
    let mut file = tempfile::tempfile_in(directory)?;
    // Not zeros: some file systems would not store them.
    let piece: Vec<u8> = (0..PIECE)
        .map(|i| ((i * 2_654_435_761) >> 7) as u8)
        .collect();
    let started = Instant::now();
    let mut written = 0;
    while written < WRITTEN && started.elapsed() < PATIENCE {
        file.write_all(&piece)?;
        written += PIECE;
        file.sync_data()?;
    }
    Ok(written as f64 / started.elapsed().as_secs_f64().max(1e-9))
}

/// Free bytes, and the kind of file system.
#[cfg(target_os = "linux")]
fn file_system(directory: &Path) -> (Option<u64>, Files) {
    let Ok(found) = rustix::fs::statfs(directory) else {
        return (None, Files::Disk);
    };
    // Numbers of statfs(2).
    let files = match found.f_type as u32 {
        0x0102_1994 | 0x8584_58F6 => Files::Memory,
        0x794C_7630 => Files::Layer,
        // NFS, SMB, CIFS, SMB2, Ceph, Lustre, FUSE.
        0x6969 | 0x517B | 0xFF53_4D42 | 0xFE53_4D42 | 0x00C3_6400 | 0x0BD0_0BD0 | 0x6573_5546 => {
            Files::Network
        }
        _ => Files::Disk,
    };
    let free = found.f_bavail.saturating_mul(found.f_bsize as u64);
    (Some(free), files)
}

#[cfg(not(target_os = "linux"))]
fn file_system(_: &Path) -> (Option<u64>, Files) {
    (None, Files::Disk)
}

/// A file of a cluster's that everybody on the machine can read.
fn exposed(security: &Path) -> Option<PathBuf> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let secret = [
            "authority.key",
            "tokens.json",
            "operator.token",
            "worker.token",
        ];
        let readable = |path: &PathBuf| {
            let metadata = fs::metadata(path);
            metadata.is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0)
        };
        // Whoever cannot enter the directory cannot read what is in it.
        let entered = fs::metadata(security).is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
        secret
            .map(|name| security.join(name))
            .into_iter()
            .filter(|_| entered)
            .find(readable)
    }
    #[cfg(not(unix))]
    None.filter(|_: &PathBuf| security.exists())
}

/// Seconds until the certificate of the worker of a home ends.
fn certificate(home: &Path, now: u64) -> Option<Result<i64, String>> {
    let file = identity(home)?;
    Some(match Credential::open(&file) {
        Ok(credential) => Ok(credential.ends() as i64 - now as i64),
        Err(error) => Err(error.to_string()),
    })
}

/// The file with the certificate of the worker of a home, if it has one.
pub fn identity(home: &Path) -> Option<PathBuf> {
    let file = Home::open_read_only(home).ok()?.worker().join(IDENTITY);
    file.exists().then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_writes_is_read() {
        let text = "MemTotal:       24689712 kB\nMemFree:        16012345 kB\nMemAvailable:   23456789 kB\n";
        assert_eq!(memory(text), Some((24_689_712 * 1024, 23_456_789 * 1024)));
        assert_eq!(memory("MemTotal: 1 kB\n"), None);

        let directory = tempfile::tempdir().unwrap();
        assert_eq!(
            gpus(directory.path()),
            Gpus {
                build: cfg!(feature = "cuda"),
                ..Gpus::default()
            }
        );
        let card = directory.path().join("gpus/0000:01:00.0");
        fs::create_dir_all(&card).unwrap();
        fs::write(
            card.join("information"),
            "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   99\n",
        )
        .unwrap();
        let version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 12.2.0\n";
        fs::write(directory.path().join("version"), version).unwrap();
        let found = gpus(directory.path());
        assert_eq!(found.driver.as_deref(), Some("550.54.15"));
        assert_eq!(found.cards, ["NVIDIA H100 80GB HBM3"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_secret_that_others_can_read_is_found() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let security = directory.path().join(SECURITY);
        Security::create(&security, &[], 1).unwrap();
        assert_eq!(exposed(&security), None);
        let key = security.join("authority.key");
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap()
        };
        mode(&key, 0o644);
        // The directory is still closed.
        assert_eq!(exposed(&security), None);
        mode(&security, 0o755);
        assert_eq!(exposed(&security), Some(key));
    }

    #[test]
    fn this_machine_has_what_a_test_needs() {
        let machine = machine();
        assert!(machine.cores >= machine.usable && machine.usable >= 1);
        let directory = tempfile::tempdir().unwrap();
        let place = place(&directory.path().join("not/made/yet"), Some("127.0.0.1:0"));
        assert!(!place.exists && place.write.is_ok(), "{place:?}");
        assert_eq!(place.port, Some(("127.0.0.1:0".into(), Ok(()))));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
