//! `cohort token`: makes, lists and revokes the tokens of a cluster. Works on the files of the home: a coordinator that
//! runs sees the change with the next call.

use anyhow::Result;
use cohort_common::home::Home;
use cohort_common::security::{Listed, Security};

use crate::cli::{HomeArgs, TokenCreateArgs, TokenListArgs, TokenRevokeArgs, TokenVerb};
use crate::commands::init::until;
use crate::context;
use crate::failure::hinted;
use crate::output::{now_ms, table};

/// Runs the verb.
pub fn run(verb: TokenVerb) -> Result<()> {
    match verb {
        TokenVerb::Create(args) => create(args),
        TokenVerb::Ls(args) => list(args),
        TokenVerb::Revoke(args) => revoke(args),
    }
}

fn create(args: TokenCreateArgs) -> Result<()> {
    let security = open(&args.home)?;
    let authority = security.authority.fingerprint();
    let life = args.expires.0;
    let token = security
        .keyring
        .create(args.role, authority, &args.note, now(), life)?;
    eprintln!(
        "token {} of the role {}, good {}; it is not shown again",
        token.id,
        args.role,
        until(life)
    );
    println!("{token}");
    Ok(())
}

fn list(args: TokenListArgs) -> Result<()> {
    let tokens = open(&args.home)?.keyring.list()?;
    let out = args.json.output();
    if out.json {
        return tokens.iter().try_for_each(|token| out.line(token));
    }
    let mut rows = vec![
        ["token", "role", "state", "note"]
            .map(String::from)
            .to_vec(),
    ];
    for token in tokens {
        let state = state(&token, now());
        rows.push(vec![token.id, token.role.to_string(), state, token.note]);
    }
    out.say(table(&rows));
    Ok(())
}

fn revoke(args: TokenRevokeArgs) -> Result<()> {
    let token = open(&args.home)?.keyring.revoke(&args.id, now())?;
    println!("revoked the token {} of the role {}", token.id, token.role);
    Ok(())
}

fn state(token: &Listed, now: u64) -> String {
    match (token.revoked, token.expires) {
        (Some(_), _) => "revoked".into(),
        (None, Some(end)) if end <= now => "expired".into(),
        (None, end) => format!("good {}", until(end.map(|end| end - now))),
    }
}

fn open(home: &HomeArgs) -> Result<Security> {
    let home = Home::open_read_only(&context::home(home)?)?;
    let directory = home.security();
    match Security::is_in(&directory) {
        true => Ok(Security::open(&directory)?),
        false => Err(hinted(
            format!(
                "`{}` has no cluster that could have tokens",
                home.root().display()
            ),
            "make one with `cohort init`, on the coordinator's machine and with its `--home`",
        )),
    }
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    now_ms() / 1000
}
