//! The home directory and the port: room, speed, what kind of file system, who is there already, and whether its secrets are
//! secret.

use std::path::PathBuf;

use cohort_common::security::{Listed, Role};
use cohort_common::spec::human_bytes;

use super::finding::Finding;
use crate::output::duration;

/// Free space below which the next checkpoint may not fit.
const NO_ROOM: u64 = 1 << 30;
/// Free space below which a few runs fill the disk.
const LITTLE_ROOM: u64 = 20 << 30;
/// Bytes a second below which checkpoints take long.
const SLOW_DISK: f64 = 50e6;
/// Seconds before a token's end in which it is worth a word.
pub const SOON: u64 = 3 * 86_400;

/// What is known of a home directory.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The directory.
    pub home: PathBuf,
    /// Whether it is there already.
    pub exists: bool,
    /// Bytes a second that reach its disk; why nothing can be written there.
    pub write: Result<f64, String>,
    /// Bytes that are free there, if that is known.
    pub free: Option<u64>,
    /// What kind of file system it is on.
    pub files: Files,
    /// The coordinator that works there.
    pub holder: Option<String>,
    /// Whether an address can be listened on, or why not; none if nobody wants to.
    pub port: Option<(String, Result<(), String>)>,
    /// Its tokens, if it is the home of a cluster.
    pub tokens: Option<Result<Vec<Listed>, String>>,
    /// A file with a secret that others can read.
    pub exposed: Option<PathBuf>,
    /// Seconds until the certificate of the worker of this home ends, if it has one.
    pub certificate: Option<Result<i64, String>>,
    /// Seconds since the epoch.
    pub now: u64,
}

/// A kind of file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Files {
    /// On a disk of this machine, as far as is known.
    #[default]
    Disk,
    /// In memory.
    Memory,
    /// The layer of a container.
    Layer,
    /// Of another machine.
    Network,
}

/// What to say of it.
pub fn findings(place: &Place) -> Vec<Finding> {
    let mut found = vec![home(place), space(place)];
    found.extend(kind(place));
    found.extend(port(place));
    found.extend(certificate(place));
    found.extend(secrets(place));
    found.extend(tokens(place));
    found
}

fn home(place: &Place) -> Finding {
    let home = place.home.display();
    match &place.write {
        Err(why) => Finding::problem(
            "home",
            format!("`{home}` cannot be written: {why}"),
            "choose another with `--home` or COHORT_HOME, or change its owner",
        ),
        Ok(speed) => {
            let there = match place.exists {
                true => "",
                false => " (not made yet)",
            };
            let text = format!(
                "`{home}`{there}: {}/s reach the disk",
                human_bytes(*speed as u64)
            );
            match *speed < SLOW_DISK {
                true => Finding::note(
                    "home",
                    text,
                    "a checkpoint of 100M parameters has 1.2 GB; use a faster disk, or checkpoint less often \
                     (`checkpoint.every`)",
                ),
                false => Finding::ok("home", text),
            }
        }
    }
}

fn space(place: &Place) -> Finding {
    let todo = "make room, choose another directory with `--home`, or keep fewer checkpoints (`checkpoint.keep`)";
    match place.free {
        None => Finding::ok("disk space", "not known on this platform"),
        Some(free) => {
            let text = format!("{} free", human_bytes(free));
            match free {
                ..NO_ROOM => Finding::problem("disk space", text, todo),
                NO_ROOM..LITTLE_ROOM => Finding::note(
                    "disk space",
                    format!("{text}; a checkpoint takes 12 bytes for each parameter"),
                    todo,
                ),
                _ => Finding::ok("disk space", text),
            }
        }
    }
}

fn kind(place: &Place) -> Option<Finding> {
    let check = "file system";
    match place.files {
        Files::Disk => None,
        Files::Memory => Some(Finding::note(
            check,
            "the home directory is in memory: what is there is gone after a restart, and counts as memory",
            "enough for a worker's cache; for a coordinator name a directory on a disk",
        )),
        Files::Layer => Some(Finding::note(
            check,
            "the home directory is a container's own layer: what is there is gone with the container",
            "enough for a worker's cache; for a coordinator mount a volume",
        )),
        Files::Network => Some(Finding::note(
            check,
            "the home directory is on a network file system, on which SQLite's locks may not hold",
            "enough for a worker's cache; for a coordinator name a directory on a disk of its own",
        )),
    }
}

fn port(place: &Place) -> Option<Finding> {
    let (address, bound) = place.port.as_ref()?;
    Some(match (bound, &place.holder) {
        (Ok(()), _) => Finding::ok("port", format!("{address} is free")),
        (Err(_), Some(holder)) => {
            Finding::ok("port", format!("{address}: {holder} works on this home"))
        }
        (Err(why), None) => Finding::problem(
            "port",
            format!("cannot listen on {address}: {why}"),
            "end the process that listens there (`ss -ltnp`), or choose another port with `cohort coordinator --listen`",
        ),
    })
}

fn certificate(place: &Place) -> Option<Finding> {
    let join = "start the worker with a token of `cohort token create --role worker`";
    Some(match place.certificate.as_ref()? {
        Err(why) => Finding::problem("certificate", why, join),
        Ok(left @ ..=0) => Finding::problem(
            "certificate",
            format!(
                "this worker's certificate ended {} ago",
                duration(-left as f64)
            ),
            join,
        ),
        Ok(left) => Finding::ok(
            "certificate",
            format!(
                "this worker's certificate is good for {}, and is renewed by itself",
                duration(*left as f64)
            ),
        ),
    })
}

fn secrets(place: &Place) -> Option<Finding> {
    let path = place.exposed.as_ref()?;
    Some(Finding::problem(
        "secrets",
        format!("everybody on this machine can read `{}`", path.display()),
        format!(
            "`chmod o= {}`, and if somebody may have read it: revoke the tokens, or make a new cluster",
            path.display()
        ),
    ))
}

fn tokens(place: &Place) -> Option<Finding> {
    let tokens = match place.tokens.as_ref()? {
        Err(why) => {
            return Some(Finding::problem(
                "tokens",
                why,
                "restore HOME/security from a backup: without it nobody is let in",
            ));
        }
        Ok(tokens) => tokens,
    };
    let left = |token: &Listed| token.expires.map(|end| end.saturating_sub(place.now));
    let good = |token: &&Listed| token.revoked.is_none() && left(token) != Some(0);
    let good: Vec<&Listed> = tokens.iter().filter(good).collect();
    // A worker's token only lets it in; it is meant to be brief.
    let soon = |token: &&&Listed| {
        token.role != Role::Worker && left(token).is_some_and(|left| left <= SOON)
    };
    let ending: Vec<String> = good
        .iter()
        .filter(soon)
        .map(|token| {
            let left = duration(left(token).unwrap_or_default() as f64);
            format!("{} ({}) in {left}", token.id, token.role)
        })
        .collect();
    let text = format!("{} of {} can be used", good.len(), tokens.len());
    Some(match ending.is_empty() {
        true => Finding::ok("tokens", text),
        false => Finding::note(
            "tokens",
            format!("{text}; these end soon: {}", ending.join(", ")),
            "make others with `cohort token create` where they are still needed",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::finding::render;
    use super::*;

    fn good() -> Place {
        Place {
            home: "/var/lib/cohort".into(),
            exists: true,
            write: Ok(800e6),
            free: Some(200 << 30),
            files: Files::Disk,
            holder: None,
            port: Some(("127.0.0.1:7070".into(), Ok(()))),
            tokens: None,
            exposed: None,
            certificate: None,
            now: 1_000_000,
        }
    }

    fn token(id: &str, role: Role, expires: Option<u64>, revoked: Option<u64>) -> Listed {
        Listed {
            id: id.into(),
            role,
            note: String::new(),
            created: 1,
            expires,
            revoked,
        }
    }

    #[test]
    fn a_good_place() {
        insta::assert_snapshot!(render(&findings(&good())), @r"
        ok       home        `/var/lib/cohort`: 800.0 MB/s reach the disk
        ok       disk space  214.7 GB free
        ok       port        127.0.0.1:7070 is free
        this machine is fit for Cohort
        ");
    }

    #[test]
    fn the_home_of_a_cluster_that_runs() {
        let tokens = vec![
            token("00000001", Role::Operator, None, None),
            token("00000002", Role::Viewer, Some(1_100_000), None),
            token("00000003", Role::Worker, Some(1_000_100), None),
            token("00000004", Role::Viewer, Some(999_999), None),
            token("00000005", Role::Operator, None, Some(5)),
        ];
        let place = Place {
            holder: Some("the coordinator with process id 7 at https://127.0.0.1:7070".into()),
            port: Some((
                "127.0.0.1:7070".into(),
                Err("Address already in use".into()),
            )),
            tokens: Some(Ok(tokens)),
            certificate: Some(Ok(500_000)),
            ..good()
        };
        insta::assert_snapshot!(render(&findings(&place)), @r"
        ok       home         `/var/lib/cohort`: 800.0 MB/s reach the disk
        ok       disk space   214.7 GB free
        ok       port         127.0.0.1:7070: the coordinator with process id 7 at https://127.0.0.1:7070 works on this home
        ok       certificate  this worker's certificate is good for 5 d 18 h, and is renewed by itself
        note     tokens       3 of 5 can be used; these end soon: 00000002 (viewer) in 1 d 3 h
                              -> make others with `cohort token create` where they are still needed
        this machine is fit for Cohort; 1 note
        ");
    }

    #[test]
    fn a_place_with_everything_against_it() {
        let place = Place {
            exists: false,
            write: Ok(20e6),
            free: Some(1 << 20),
            files: Files::Network,
            port: Some(("0.0.0.0:80".into(), Err("Permission denied".into()))),
            tokens: Some(Err("`tokens.json` is damaged: end of file".into())),
            exposed: Some("/var/lib/cohort/security/authority.key".into()),
            certificate: Some(Ok(-7200)),
            ..good()
        };
        insta::assert_snapshot!(render(&findings(&place)), @r"
        note     home         `/var/lib/cohort` (not made yet): 20.0 MB/s reach the disk
                              -> a checkpoint of 100M parameters has 1.2 GB; use a faster disk, or checkpoint less often (`checkpoint.every`)
        problem  disk space   1.0 MB free
                              -> make room, choose another directory with `--home`, or keep fewer checkpoints (`checkpoint.keep`)
        note     file system  the home directory is on a network file system, on which SQLite's locks may not hold
                              -> enough for a worker's cache; for a coordinator name a directory on a disk of its own
        problem  port         cannot listen on 0.0.0.0:80: Permission denied
                              -> end the process that listens there (`ss -ltnp`), or choose another port with `cohort coordinator --listen`
        problem  certificate  this worker's certificate ended 2 h 00 min ago
                              -> start the worker with a token of `cohort token create --role worker`
        problem  secrets      everybody on this machine can read `/var/lib/cohort/security/authority.key`
                              -> `chmod o= /var/lib/cohort/security/authority.key`, and if somebody may have read it: revoke the tokens, or make a new cluster
        problem  tokens       `tokens.json` is damaged: end of file
                              -> restore HOME/security from a backup: without it nobody is let in
        5 problems, 2 notes
        ");
        let place = Place {
            write: Err("Permission denied".into()),
            free: Some(5 << 30),
            files: Files::Layer,
            port: None,
            ..good()
        };
        insta::assert_snapshot!(render(&findings(&place)), @r"
        problem  home         `/var/lib/cohort` cannot be written: Permission denied
                              -> choose another with `--home` or COHORT_HOME, or change its owner
        note     disk space   5.4 GB free; a checkpoint takes 12 bytes for each parameter
                              -> make room, choose another directory with `--home`, or keep fewer checkpoints (`checkpoint.keep`)
        note     file system  the home directory is a container's own layer: what is there is gone with the container
                              -> enough for a worker's cache; for a coordinator mount a volume
        1 problem, 2 notes
        ");
    }
}
