//! `cohort init`: makes the authority of a cluster, and prints how others come in.

use anyhow::Result;
use cohort_common::home::Home;
use cohort_common::security::{ClusterToken, Role, Security};

use crate::cli::InitArgs;
use crate::commands::token::now;
use crate::context::{self, OPERATOR_TOKEN, WORKER_TOKEN};

/// Runs the verb.
pub fn run(args: InitArgs) -> Result<()> {
    let home = Home::open(&context::home(&args.home)?)?;
    let directory = home.security();
    if args.if_needed && Security::is_in(&directory) {
        println!("there is a cluster in {}", directory.display());
        return Ok(());
    }
    let security = Security::create(&directory, &args.name, now())?;
    let authority = security.authority.fingerprint();
    let own = [
        (Role::Operator, OPERATOR_TOKEN, "clients on this machine"),
        (Role::Worker, WORKER_TOKEN, "workers on this machine"),
    ];
    for (role, file, note) in own {
        let token = create(&security, role, note, None)?;
        token.save(&directory.join(file))?;
    }
    if let Some(path) = &args.worker_token {
        let token = create(&security, Role::Worker, "given to init", None)?;
        token.save(path)?;
    }
    let join = create(&security, Role::Worker, "printed by init", args.expires.0)?;
    let host = match args.name.first() {
        Some(name) => name.clone(),
        None => hostname::get()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    };
    println!("made a cluster in {}", directory.display());
    println!("  authority {authority} (SHA-256)");
    println!();
    println!("serve it, encrypted:");
    println!(
        "  cohort coordinator --listen 0.0.0.0:7070 --home {}",
        home.root().display()
    );
    println!();
    println!(
        "start a worker anywhere; the line is a secret, it lets workers in {}:",
        until(args.expires.0)
    );
    println!("  COHORT_TOKEN={join} cohort worker --coordinator https://{host}:7070");
    println!();
    println!(
        "on this machine no token is needed; for others, `cohort token create --role operator` or `--role viewer`"
    );
    Ok(())
}

fn create(security: &Security, role: Role, note: &str, life: Option<u64>) -> Result<ClusterToken> {
    let authority = security.authority.fingerprint();
    let made = security.keyring.create(role, authority, note, now(), life);
    Ok(made?)
}

/// How long a token is good for, for people.
pub fn until(life: Option<u64>) -> String {
    match life {
        None => "until it is revoked".into(),
        Some(seconds @ ..120) => format!("for {seconds} s"),
        Some(seconds @ ..7200) => format!("for {} min", seconds / 60),
        Some(seconds @ ..172_800) => format!("for {} h", seconds / 3600),
        Some(seconds) => format!("for {} days", seconds / 86_400),
    }
}
