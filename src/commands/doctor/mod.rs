//! `cohort doctor`: looks at a machine before it is relied on, and says what to do. What is found out (`probe.rs`, `ask.rs`)
//! is kept apart from what it means (`machine.rs`, `place.rs`, `reach.rs`), which needs no machine of that kind to be tested.

mod ask;
mod cgroup;
mod finding;
mod machine;
mod place;
mod probe;
mod reach;

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::context::Context;
use finding::{Finding, Level};

/// A line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    #[serde(flatten)]
    finding: &'a Finding,
}

/// Runs the verb.
pub async fn run(args: DoctorArgs) -> Result<ExitCode> {
    let context = Context::of(&args.connect)?;
    let out = args.json.output();
    let running = context.running();
    // Where there is a coordinator none need be started.
    let default = || running.is_none().then(|| "127.0.0.1:7070".to_owned());
    let (home, listen) = (context.home.clone(), args.listen.or_else(default));
    let look = move || {
        let mut found = machine::findings(&probe::machine());
        found.extend(place::findings(&probe::place(&home, listen.as_deref())));
        found
    };
    let mut found = tokio::task::spawn_blocking(look).await?;
    match running {
        Some(places) => {
            for url in places.urls() {
                let reach = ask::coordinator(&context, url).await?;
                found.extend(reach::findings(&reach, env!("CARGO_PKG_VERSION")));
            }
        }
        None => found.push(Finding::ok(
            "coordinator",
            "none is named and none runs here; `--coordinator URL` looks at the way to one",
        )),
    }
    for finding in &found {
        let event = "finding";
        out.line(&Line { event, finding })?;
    }
    out.say(finding::render(&found));
    let sick = found.iter().any(|finding| finding.level == Level::Problem);
    Ok(ExitCode::from(u8::from(sick)))
}
