//! The verbs that say who may come into a cluster.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use cohort_common::security::Role;

use super::common::{HomeArgs, JsonArgs};

/// Arguments of `init`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort init                                           makes the cluster of this machine's home directory
  cohort coordinator --listen 0.0.0.0:7070              serves it, encrypted, from then on
  cohort init --name trainer.example.org --name 10.0.0.7  for browsers, which want to know it by its names

What it makes lies under HOME/security: whoever can read that is the cluster. See SECURITY.md.")]
pub struct InitArgs {
    /// A host name or address by which browsers, and the printed lines, call the coordinator; can be given several times
    /// [default: this machine's host name]
    #[arg(long, value_name = "HOST")]
    pub name: Vec<String>,
    /// How long the printed token lets workers in, such as `90m`, `24h`, `7d` or `never`; who is in stays in
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = life)]
    pub expires: Life,
    /// Do nothing, and succeed, where there is a cluster already
    #[arg(long)]
    pub if_needed: bool,
    /// Also write a worker's token there, which is good until it is revoked; the file is for workers to read
    #[arg(long, value_name = "FILE")]
    pub worker_token: Option<PathBuf>,
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
}

/// Arguments of `token`.
#[derive(Args, Debug)]
pub struct TokenVerbArgs {
    /// What to do with tokens.
    #[command(subcommand)]
    pub verb: TokenVerb,
}

/// The verbs of tokens. They work on the coordinator's machine, whether it runs or not, and count at once.
#[derive(Debug, Subcommand)]
pub enum TokenVerb {
    /// Make a token and print it
    Create(TokenCreateArgs),
    /// List the tokens, without their secrets
    Ls(TokenListArgs),
    /// Take a token back: its bearers are refused, and workers that came in by it have to leave
    Revoke(TokenRevokeArgs),
}

/// Arguments of `token create`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort token create --role worker                       lets workers in for 24 hours
  cohort token create --role viewer --note Ada --expires 30d > ada.token
  COHORT_TOKEN=$(cat ada.token) cohort runs --coordinator https://HOST:7070")]
pub struct TokenCreateArgs {
    /// What its bearer may do: a `viewer` sees everything, an `operator` also trains and deletes, a `worker` computes
    #[arg(long, value_name = "ROLE")]
    pub role: Role,
    /// How long it is good for, such as `90m`, `24h`, `7d` or `never`
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = life)]
    pub expires: Life,
    /// Whom it is for; listed with it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub note: String,
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
}

/// Arguments of `token ls`.
#[derive(Args, Debug)]
pub struct TokenListArgs {
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
}

/// Arguments of `token revoke`.
#[derive(Args, Debug)]
pub struct TokenRevokeArgs {
    /// The token's name, as `cohort token ls` lists it
    pub id: String,
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
}

/// How long a token is good for, in seconds; none is forever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life(pub Option<u64>);

fn life(text: &str) -> Result<Life, String> {
    let wrong = || "expected a time such as `90m`, `24h`, `7d`, or `never`".to_owned();
    if text == "never" {
        return Ok(Life(None));
    }
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    match number.checked_mul(unit) {
        Some(seconds @ 1..=3_153_600_000) => Ok(Life(Some(seconds))),
        _ => Err("expected from 1 second to 100 years".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives() {
        assert_eq!(life("90m"), Ok(Life(Some(5400))));
        assert_eq!(life("7d"), Ok(Life(Some(604_800))));
        assert_eq!(life("never"), Ok(Life(None)));
        for wrong in [
            "",
            "h",
            "24",
            "-1h",
            "0s",
            "1w",
            "99999999999999999d",
            "1 h",
        ] {
            assert!(life(wrong).is_err(), "{wrong}");
        }
    }
}
