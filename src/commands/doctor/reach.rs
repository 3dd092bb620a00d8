//! The way to a coordinator: whether it answers, how far and how wide the way is, whether the clocks agree, and what it
//! thinks of the token.

use std::time::Duration;

use cohort_common::api::Whoami;
use cohort_common::spec::human_bytes;

use super::finding::Finding;
use super::place::SOON;
use crate::output::duration;

/// A round trip that each step of a small model feels.
const FAR: Duration = Duration::from_millis(20);
/// Bytes a second below which gradients take longer than their computation, for most models.
const NARROW: f64 = 50e6;
/// Clocks that differ by so many milliseconds are worth a word.
const ODD_CLOCK: i64 = 5_000;
/// Clocks that differ by so many milliseconds may make certificates worthless: they begin ten minutes before they are made.
const WRONG_CLOCK: i64 = 300_000;

/// What is known of a coordinator.
#[derive(Clone, Debug, PartialEq)]
pub struct Reach {
    /// Where it is.
    pub url: String,
    /// What it answered, or why it did not.
    pub answer: Result<Answer, String>,
}

/// What a coordinator answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Whether it can do its work; none if it does not know that call.
    pub serving: Option<bool>,
    /// The middle one of some round trips, and the longest.
    pub round_trip: (Duration, Duration),
    /// What it thinks of the caller: refused, or older than that call, as a sentence.
    pub whoami: Result<Whoami, String>,
    /// What this machine's clock said then, in milliseconds since the epoch.
    pub now_ms: u64,
    /// Bytes a second there and back at the same time; why that was not measured.
    pub echo: Result<f64, String>,
}

/// What to say of it. `version` is this build's.
pub fn findings(reach: &Reach, version: &str) -> Vec<Finding> {
    let answer = match &reach.answer {
        Ok(answer) => answer,
        Err(why) => {
            return vec![Finding::problem(
                "coordinator",
                why,
                "check that it runs, the address and port, and the firewalls between",
            )];
        }
    };
    let mut found = vec![serving(reach, answer), way(answer)];
    found.extend(width(answer));
    match &answer.whoami {
        Ok(whoami) => {
            found.push(clock(whoami, answer.now_ms));
            found.push(token(whoami, answer.now_ms / 1000));
            found.extend(versions(whoami, version));
        }
        Err(why) => found.push(Finding::problem(
            "token",
            why,
            "ask whoever runs the coordinator for a token (`cohort token create`), and give it in COHORT_TOKEN or with \
             `--token-file`",
        )),
    }
    found
}

fn serving(reach: &Reach, answer: &Answer) -> Finding {
    let kind = match reach.url.starts_with("https://") {
        true => "encrypted",
        false => "not encrypted",
    };
    let text = format!("{} answers, {kind}", reach.url);
    match answer.serving {
        Some(false) => Finding::note(
            "coordinator",
            format!("{text}, but is not ready"),
            "it is about to end, or its driver or its disk hangs: look at its log and at /readyz",
        ),
        _ => Finding::ok("coordinator", text),
    }
}

fn way(answer: &Answer) -> Finding {
    let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
    let (middle, longest) = answer.round_trip;
    let text = format!("{} there and back, {} at most", ms(middle), ms(longest));
    match middle > FAR {
        true => Finding::note(
            "round trip",
            text,
            "each step waits for some round trips: give it more to do (`train.lanes`, `train.accumulate`), or move closer",
        ),
        false => Finding::ok("round trip", text),
    }
}

fn width(answer: &Answer) -> Option<Finding> {
    let speed = match &answer.echo {
        Ok(speed) => *speed,
        // Said of the token already.
        Err(_) if answer.whoami.is_err() => return None,
        Err(why) => return Some(Finding::ok("throughput", format!("not measured: {why}"))),
    };
    let text = format!("{}/s in each direction at once", human_bytes(speed as u64));
    Some(match speed < NARROW {
        true => Finding::note(
            "throughput",
            text,
            "a step sends 4 bytes for each parameter in each direction: `--set train.payload=int8` makes that a quarter, and with \
             `--set train.sync=diloco` it is sent once in many steps (docs/links.md)",
        ),
        false => Finding::ok("throughput", text),
    })
}

fn clock(whoami: &Whoami, now_ms: u64) -> Finding {
    let ahead = now_ms as i64 - whoami.time_ms as i64;
    let how = match ahead {
        0.. => "ahead of",
        _ => "behind",
    };
    let text = format!(
        "{:.1} s {how} the coordinator's",
        ahead.unsigned_abs() as f64 / 1000.0
    );
    let todo = "let both machines keep time by NTP (`timedatectl`)";
    match ahead.abs() {
        ..ODD_CLOCK => Finding::ok("clock", text),
        ODD_CLOCK..WRONG_CLOCK => Finding::note("clock", text, todo),
        _ => Finding::problem(
            "clock",
            format!("{text}: certificates may be refused"),
            todo,
        ),
    }
}

fn token(whoami: &Whoami, now: u64) -> Finding {
    let Some(role) = whoami.role else {
        return Finding::ok(
            "token",
            "all who reach this coordinator, and have its token if it has one, may do everything",
        );
    };
    let id = whoami.token.as_deref().unwrap_or("unknown");
    let text = format!("{id} lets in {}", role.phrase());
    match whoami.expires.map(|end| end.saturating_sub(now)) {
        None => Finding::ok("token", format!("{text}, until it is revoked")),
        Some(left @ ..SOON) => Finding::note(
            "token",
            format!("{text}, for another {}", duration(left as f64)),
            "ask for the next one in time; workers that are in stay in",
        ),
        Some(left) => Finding::ok(
            "token",
            format!("{text}, for another {}", duration(left as f64)),
        ),
    }
}

fn versions(whoami: &Whoami, version: &str) -> Option<Finding> {
    let other = &whoami.version;
    (other != version).then(|| {
        Finding::note(
            "version",
            format!("this is cohort {version}, the coordinator's is {other}"),
            "both work together; all workers of a run must be of one version (docs/upgrades.md)",
        )
    })
}

#[cfg(test)]
mod tests {
    use cohort_common::security::Role;

    use super::super::finding::render;
    use super::*;

    const NOW: u64 = 1_790_000_000_000;

    fn whoami() -> Whoami {
        Whoami {
            version: "0.1.0".into(),
            time_ms: NOW - 120,
            role: Some(Role::Operator),
            token: Some("00c0ffee".into()),
            expires: None,
        }
    }

    fn answer() -> Answer {
        Answer {
            serving: Some(true),
            round_trip: (Duration::from_micros(350), Duration::from_micros(1900)),
            whoami: Ok(whoami()),
            now_ms: NOW,
            echo: Ok(1.1e9),
        }
    }

    fn shown(answer: Result<Answer, String>) -> String {
        let url = "https://trainer:7070".into();
        render(&findings(&Reach { url, answer }, "0.1.0"))
    }

    #[test]
    fn a_coordinator_nearby() {
        insta::assert_snapshot!(shown(Ok(answer())), @r"
        ok       coordinator  https://trainer:7070 answers, encrypted
        ok       round trip   0.3 ms there and back, 1.9 ms at most
        ok       throughput   1.1 GB/s in each direction at once
        ok       clock        0.1 s ahead of the coordinator's
        ok       token        00c0ffee lets in an operator, until it is revoked
        this machine is fit for Cohort
        ");
    }

    #[test]
    fn a_coordinator_far_away_of_another_version_and_another_time() {
        let far = Answer {
            serving: Some(false),
            round_trip: (Duration::from_millis(45), Duration::from_millis(80)),
            whoami: Ok(Whoami {
                version: "0.2.0".into(),
                time_ms: NOW + 7_000,
                role: Some(Role::Worker),
                expires: Some(NOW / 1000 + 3600),
                ..whoami()
            }),
            echo: Ok(6e6),
            ..answer()
        };
        insta::assert_snapshot!(shown(Ok(far)), @r"
        note     coordinator  https://trainer:7070 answers, encrypted, but is not ready
                              -> it is about to end, or its driver or its disk hangs: look at its log and at /readyz
        note     round trip   45.0 ms there and back, 80.0 ms at most
                              -> each step waits for some round trips: give it more to do (`train.lanes`, `train.accumulate`), or move closer
        note     throughput   6.0 MB/s in each direction at once
                              -> a step sends 4 bytes for each parameter in each direction: `--set train.payload=int8` makes that a quarter, and with `--set train.sync=diloco` it is sent once in many steps (docs/links.md)
        note     clock        7.0 s behind the coordinator's
                              -> let both machines keep time by NTP (`timedatectl`)
        note     token        00c0ffee lets in a worker, for another 1 h 00 min
                              -> ask for the next one in time; workers that are in stay in
        note     version      this is cohort 0.1.0, the coordinator's is 0.2.0
                              -> both work together; all workers of a run must be of one version (docs/upgrades.md)
        this machine is fit for Cohort; 6 notes
        ");
    }

    #[test]
    fn one_that_is_not_there_or_does_not_let_in() {
        insta::assert_snapshot!(shown(Err("no coordinator answers at https://trainer:7070: connection refused".into())), @r"
        problem  coordinator  no coordinator answers at https://trainer:7070: connection refused
                              -> check that it runs, the address and port, and the firewalls between
        1 problem, 0 notes
        ");
        let strange = Answer {
            serving: None,
            whoami: Err("the token 00c0ffee was revoked 2 min ago; ask for a new one".into()),
            echo: Err("not let in".into()),
            ..answer()
        };
        insta::assert_snapshot!(shown(Ok(strange)), @r"
        ok       coordinator  https://trainer:7070 answers, encrypted
        ok       round trip   0.3 ms there and back, 1.9 ms at most
        problem  token        the token 00c0ffee was revoked 2 min ago; ask for a new one
                              -> ask whoever runs the coordinator for a token (`cohort token create`), and give it in COHORT_TOKEN or with `--token-file`
        1 problem, 0 notes
        ");
        let open = Answer {
            whoami: Ok(Whoami {
                time_ms: NOW - 400_000,
                role: None,
                token: None,
                ..whoami()
            }),
            echo: Err("the coordinator is older than this call".into()),
            ..answer()
        };
        insta::assert_snapshot!(shown(Ok(open)), @r"
        ok       coordinator  https://trainer:7070 answers, encrypted
        ok       round trip   0.3 ms there and back, 1.9 ms at most
        ok       throughput   not measured: the coordinator is older than this call
        problem  clock        400.0 s ahead of the coordinator's: certificates may be refused
                              -> let both machines keep time by NTP (`timedatectl`)
        ok       token        all who reach this coordinator, and have its token if it has one, may do everything
        1 problem, 0 notes
        ");
    }
}
