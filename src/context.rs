//! From the arguments about places as typed to the places as meant: the home directory, the coordinator, the token.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use cohort_common::home::Home;
use cohort_common::net::Token;

use crate::cli::{ConnectArgs, HomeArgs, TokenArgs};
use crate::client::Client;
use crate::failure::hinted;

/// Where a coordinator is looked for when nothing says where it is.
const DEFAULT_URL: &str = "http://127.0.0.1:7070";
/// Environment variable with the coordinator's address.
pub const COORDINATOR_VARIABLE: &str = "COHORT_COORDINATOR";
/// Environment variable with the token.
pub const TOKEN_VARIABLE: &str = "COHORT_TOKEN";

/// A cluster's token, and its text for child processes.
#[derive(Clone)]
pub struct Secret {
    /// As calls carry it.
    pub token: Token,
    /// As typed.
    pub text: String,
}

/// The places that a client works with.
pub struct Context {
    /// The home directory; may not exist yet.
    pub home: PathBuf,
    /// The coordinator that the user names.
    named: Option<String>,
    /// The token that the user gives.
    pub secret: Option<Secret>,
}

impl Context {
    /// Understands the arguments of a client.
    pub fn of(args: &ConnectArgs) -> Result<Self> {
        Ok(Self {
            home: home(&args.home)?,
            named: coordinator(args.coordinator.as_deref())?,
            secret: secret(&args.token)?,
        })
    }

    /// The address of the coordinator that is named or that runs on the home directory.
    pub fn running(&self) -> Option<String> {
        self.named.clone().or_else(|| holder_url(&self.home))
    }

    /// Connects to the coordinator that is named, or that runs on the home directory, or that listens where one does
    /// by default.
    pub async fn connect(&self) -> Result<Client> {
        let url = self.running().unwrap_or_else(|| DEFAULT_URL.into());
        self.connect_to(&url).await
    }

    /// Connects where [`running`](Self::running) names a coordinator; `None` means that the home directory is to be
    /// read instead.
    pub async fn connect_if_running(&self) -> Result<Option<Client>> {
        match self.running() {
            Some(url) => Ok(Some(self.connect_to(&url).await?)),
            None => Ok(None),
        }
    }

    /// Connects to a coordinator.
    pub async fn connect_to(&self, url: &str) -> Result<Client> {
        let token = self.secret.as_ref().map(|secret| secret.token.clone());
        let same_home = holder_url(&self.home).is_some_and(|held| held == url);
        Client::connect(url, token, same_home).await
    }
}

/// The home directory that is meant.
pub fn home(args: &HomeArgs) -> Result<PathBuf> {
    if let Some(home) = &args.home {
        return std::path::absolute(home)
            .with_context(|| format!("`{}` is no directory", home.display()));
    }
    directories::ProjectDirs::from("", "", "cohort")
        .map(|dirs| dirs.data_dir().to_path_buf())
        .ok_or_else(|| {
            hinted(
                "this platform has no place for data: there is no home directory of a user",
                "name a directory with `--home` or COHORT_HOME",
            )
        })
}

/// The coordinator that the user names, if any.
fn coordinator(argument: Option<&str>) -> Result<Option<String>> {
    let variable = std::env::var(COORDINATOR_VARIABLE).ok();
    let named = argument.map(str::to_owned).or(variable);
    Ok(named.filter(|url| !url.is_empty()).map(|url| {
        let url = match url.contains("://") {
            true => url,
            false => format!("http://{url}"),
        };
        // `http://host:7070/` is the same place.
        match url.strip_suffix('/') {
            Some(bare) if !bare.ends_with('/') => bare.to_owned(),
            _ => url,
        }
    }))
}

/// The coordinator of a worker: named, or of the home directory, or the default.
pub fn worker_url(argument: Option<&str>, home: &Path) -> Result<String> {
    let named = coordinator(argument)?.or_else(|| holder_url(home));
    Ok(named.unwrap_or_else(|| DEFAULT_URL.into()))
}

/// The token that the user gives, if any: the file wins over the variable.
pub fn secret(args: &TokenArgs) -> Result<Option<Secret>> {
    let (text, origin) = match &args.token_file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the token from `{}`", path.display()))?;
            (text, format!("`{}`", path.display()))
        }
        None => match std::env::var(TOKEN_VARIABLE) {
            Ok(text) if !text.is_empty() => (text, TOKEN_VARIABLE.to_owned()),
            _ => return Ok(None),
        },
    };
    let text = text.trim().to_owned();
    let token = Token::new(&text).map_err(|reason| anyhow!("{origin}: {reason}"))?;
    Ok(Some(Secret { token, text }))
}

fn holder_url(home: &Path) -> Option<String> {
    let home = Home::open_read_only(home).ok()?;
    home.holder()?.url
}
