//! From the arguments about places as typed to the places as meant: the home directory, the coordinator, the token.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use cohort_common::home::{Home, SECURITY};
use cohort_common::net::{Places, Token};

use crate::cli::{ConnectArgs, HomeArgs, TokenArgs};
use crate::client::Client;
use crate::failure::hinted;

/// Where a coordinator is looked for when nothing says where it is.
const DEFAULT_URL: &str = "http://127.0.0.1:7070";
/// Environment variable with the coordinator's address.
pub const COORDINATOR_VARIABLE: &str = "COHORT_COORDINATOR";
/// Environment variable with the token.
pub const TOKEN_VARIABLE: &str = "COHORT_TOKEN";
/// File of an initialised home with the token of clients on its machine.
pub const OPERATOR_TOKEN: &str = "operator.token";
/// File of an initialised home with the token of workers on its machine.
pub const WORKER_TOKEN: &str = "worker.token";

/// A cluster's token, and its text for child processes.
#[derive(Clone)]
pub struct Secret {
    /// As calls carry it.
    pub token: Token,
    /// As typed.
    pub text: String,
}

impl Secret {
    /// Whether it is a token of an initialised cluster, and not one that is shared by all.
    pub fn is_of_cluster(&self) -> bool {
        self.token.of_cluster().is_some()
    }
}

/// The places that a client works with.
pub struct Context {
    /// The home directory; may not exist yet.
    pub home: PathBuf,
    /// The coordinators that the user names, of which one leads.
    named: Option<Places>,
    /// The token that the user gives.
    pub secret: Option<Secret>,
}

impl Context {
    /// Understands the arguments of a client.
    pub fn of(args: &ConnectArgs) -> Result<Self> {
        let secret = secret(&args.token)?;
        Ok(Self {
            home: home(&args.home)?,
            named: coordinators(&args.coordinator, secret.as_ref()),
            secret,
        })
    }

    /// The coordinators that are named, or the one that runs on the home directory.
    pub fn running(&self) -> Option<Places> {
        self.named
            .clone()
            .or_else(|| Places::new(holder_url(&self.home)))
    }

    /// Connects to the coordinator that is named, or that runs on the home directory, or that listens where one does
    /// by default.
    pub async fn connect(&self) -> Result<Client> {
        match self.running() {
            Some(places) => self.connect_to_leader(&places).await,
            None => self.connect_to(DEFAULT_URL).await,
        }
    }

    /// Connects where [`running`](Self::running) names a coordinator; `None` means that the home directory is to be
    /// read instead.
    pub async fn connect_if_running(&self) -> Result<Option<Client>> {
        match self.running() {
            Some(places) => Ok(Some(self.connect_to_leader(&places).await?)),
            None => Ok(None),
        }
    }

    /// Connects to a coordinator, or to the one that leads instead of it.
    pub async fn connect_to(&self, url: &str) -> Result<Client> {
        let places = Places::new([url.to_owned()]).expect("it is one");
        self.connect_to_leader(&places).await
    }

    /// Connects to the coordinator that leads.
    async fn connect_to_leader(&self, places: &Places) -> Result<Client> {
        places.are_private()?;
        let token = self.token_for(places.first())?;
        Client::connect(places, token, holder_url(&self.home).as_deref()).await
    }

    /// What each coordinator says of itself, where there are several; nothing where the only one leads.
    pub async fn survey(&self, client: &Client) -> Vec<(String, String)> {
        match self.running() {
            Some(places) if !places.is_single() => places.survey(client.credentials()).await,
            _ => client.standing_by().to_vec(),
        }
    }

    /// What calls to a coordinator carry: the token that the user gives, or else the home's own.
    pub fn token_for(&self, url: &str) -> Result<Option<Token>> {
        token_for(url, self.secret.as_ref(), &self.home, OPERATOR_TOKEN)
    }
}

/// What calls to a place carry: the token that the user gives, or else, where it is encrypted, one that an initialised home
/// has for this machine. It is shown to nobody but the home's own cluster.
pub fn token_for(
    url: &str,
    given: Option<&Secret>,
    home: &Path,
    own: &str,
) -> Result<Option<Token>> {
    if let Some(secret) = given {
        return Ok(Some(secret.token.clone()));
    }
    let path = home.join(SECURITY).join(own);
    if !url.starts_with("https://") || !path.exists() {
        return Ok(None);
    }
    Ok(Some(read_secret(&path)?.token))
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

/// The coordinators that the user names, if any. Where only a host is named, the token says how it is reached.
fn coordinators(arguments: &[String], secret: Option<&Secret>) -> Option<Places> {
    let variable = std::env::var(COORDINATOR_VARIABLE).ok();
    let variable = variable.iter().flat_map(|urls| urls.split(','));
    let named: Vec<&str> = match arguments.is_empty() {
        true => variable.collect(),
        false => arguments.iter().map(String::as_str).collect(),
    };
    let named = named.into_iter().map(str::trim);
    Places::new(named.filter(|url| !url.is_empty()).map(|url| {
        let url = match url.contains("://") {
            true => url.to_owned(),
            false => {
                let private = secret.is_some_and(Secret::is_of_cluster);
                format!("{}://{url}", if private { "https" } else { "http" })
            }
        };
        // `http://host:7070/` is the same place.
        match url.strip_suffix('/') {
            Some(bare) if !bare.ends_with('/') => bare.to_owned(),
            _ => url,
        }
    }))
}

/// The coordinators of a worker: named, or the one of the home directory, or the default.
pub fn worker_places(arguments: &[String], home: &Path, secret: Option<&Secret>) -> Places {
    let named = coordinators(arguments, secret);
    let or_here = || Some(holder_url(home).unwrap_or_else(|| DEFAULT_URL.into()));
    let places = named.or_else(|| Places::new(or_here()));
    places.expect("there is a default")
}

/// The token that the user gives, if any: the file wins over the variable.
pub fn secret(args: &TokenArgs) -> Result<Option<Secret>> {
    match &args.token_file {
        Some(path) => read_secret(path).map(Some),
        None => match std::env::var(TOKEN_VARIABLE) {
            Ok(text) if !text.is_empty() => secret_of(&text, TOKEN_VARIABLE).map(Some),
            _ => Ok(None),
        },
    }
}

fn read_secret(path: &Path) -> Result<Secret> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the token from `{}`", path.display()))?;
    secret_of(&text, &format!("`{}`", path.display()))
}

fn secret_of(text: &str, origin: &str) -> Result<Secret> {
    let text = text.trim().to_owned();
    let token = Token::new(&text).map_err(|reason| anyhow!("{origin}: {reason}"))?;
    Ok(Secret { token, text })
}

fn holder_url(home: &Path) -> Option<String> {
    let home = Home::open_read_only(home).ok()?;
    home.holder()?.url
}
