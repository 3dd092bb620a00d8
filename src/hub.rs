//! `hf://OWNER/NAME[@REVISION]`: a model of the Hugging Face hub, downloaded once into the cache that other programs
//! share with us. Only what a model needs is downloaded: config, tokenizer and safetensors.
//!
//! The environment is read as others read it: `HF_ENDPOINT` (where the hub is), `HF_HOME` (where its cache is),
//! `HF_TOKEN` (else the token that a login left in the cache) and `HF_HUB_OFFLINE` (take what the cache has).

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use cohort_common::checkpoint::{
    CONFIG, Checkpoint, GENERATION, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, WEIGHTS_INDEX,
    is_plain_name,
};
use cohort_common::home::HubModel;
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::failure::hinted;
use crate::follow::Bar;

/// Where the hub is unless the environment says otherwise.
const ENDPOINT: &str = "https://huggingface.co";

/// What the hub is asked for when nobody names a revision.
const DEFAULT_REVISION: &str = "main";

/// How often a download that breaks is taken up again.
const RETRIES: usize = 3;

/// The directory of a model, in Hugging Face layout. Downloads what is not there.
///
/// # Errors
/// A model that is not there or may not be read, one without safetensors or of a shape that cannot be used (found out
/// before its weights are downloaded), and a hub that does not answer while the cache does not have the model.
pub async fn fetch(model: &HubModel) -> Result<PathBuf> {
    let model = model.clone();
    tokio::task::spawn_blocking(move || Hub::from_env()?.fetch(&model)).await?
}

/// The hub and its cache.
struct Hub {
    endpoint: String,
    cache: Cache,
    api: Api,
    offline: bool,
}

impl Hub {
    fn from_env() -> Result<Self> {
        let given = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = Cache::from_env();
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(given("HF_TOKEN").or_else(|| cache.token()))
            .with_retries(RETRIES)
            .with_user_agent("cohort", env!("CARGO_PKG_VERSION"))
            .build();
        let offline =
            given("HF_HUB_OFFLINE").is_some_and(|value| !["0", "false"].contains(&&*value));
        Ok(Self {
            api: api.context("cannot prepare to download")?,
            endpoint,
            cache,
            offline,
        })
    }

    fn fetch(&self, model: &HubModel) -> Result<PathBuf> {
        let repo = repo(model, model.revision.as_deref().unwrap_or(DEFAULT_REVISION));
        let cached = || {
            let config = self.cache.repo(repo.clone()).get(CONFIG)?;
            config.parent().map(PathBuf::from)
        };
        if self.offline {
            return cached().ok_or_else(|| {
                hinted(
                    format!(
                        "`{model}` is not in the cache at `{}`",
                        self.cache.path().display()
                    ),
                    "HF_HUB_OFFLINE forbids to download it; unset it, or name a directory",
                )
            });
        }
        let info = match self.api.repo(repo.clone()).info() {
            Ok(info) => info,
            Err(error) => {
                let Some(directory) = cached().filter(|_| is_unreachable(&error)) else {
                    return Err(self.explain(model, error));
                };
                eprintln!(
                    "the hub at {} does not answer; `{model}` is taken from the cache",
                    self.endpoint
                );
                return Ok(directory);
            }
        };
        if !is_plain_name(&info.sha) {
            return Err(anyhow!(
                "the hub at {} names a commit `{}` that is none",
                self.endpoint,
                info.sha
            ));
        }
        let files = info.siblings.into_iter().map(|file| file.rfilename);
        let download = Download {
            hub: self,
            model,
            // All files are of one commit, even if another one comes meanwhile.
            repo: self.api.repo(self::repo(model, &info.sha)),
            cached: self.cache.repo(self::repo(model, &info.sha)),
            files: files.collect(),
        };
        let directory = download.all()?;
        let remembered = self.cache.repo(repo).create_ref(&info.sha);
        remembered.with_context(|| format!("cannot write to `{}`", self.cache.path().display()))?;
        Ok(directory)
    }

    /// What an error of the hub means, and what to do next.
    fn explain(&self, model: &HubModel, error: ApiError) -> anyhow::Error {
        let page = format!("{}/{}/{}", self.endpoint, model.owner, model.name);
        match status(&error) {
            Some(401) => hinted(
                format!(
                    "the hub at {} does not show `{model}`: there is no such model, or it is private or gated",
                    self.endpoint
                ),
                "check the name; for a model that your account may read, set HF_TOKEN to a token of it",
            ),
            Some(403) => hinted(
                format!(
                    "the hub at {} refuses `{model}`: the model is gated, and the token may not read it",
                    self.endpoint
                ),
                format!(
                    "accept the conditions on {page}, and set HF_TOKEN to a token of that account"
                ),
            ),
            Some(404) => hinted(
                format!("the hub at {} has no `{model}`", self.endpoint),
                "check owner, name and revision; a directory is written with `./` before it",
            ),
            _ if is_unreachable(&error) => {
                let message = format!("cannot reach the hub at {} for `{model}`", self.endpoint);
                let hint = "check the network and HF_ENDPOINT, or name a directory";
                hinted(format!("{message}: {error}"), hint)
            }
            _ => anyhow::Error::new(error).context(format!(
                "cannot download `{model}` from the hub at {}",
                self.endpoint
            )),
        }
    }
}

fn repo(model: &HubModel, revision: &str) -> Repo {
    let id = format!("{}/{}", model.owner, model.name);
    Repo::with_revision(id, RepoType::Model, revision.into())
}

/// The HTTP status that an error stands for.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// Whether nobody has answered.
fn is_unreachable(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(error) => matches!(
            **error,
            ureq::Error::Io(_)
                | ureq::Error::Timeout(_)
                | ureq::Error::HostNotFound
                | ureq::Error::ConnectionFailed
        ),
        ApiError::TooManyRetries(error) => is_unreachable(error),
        _ => false,
    }
}

/// One commit of a model on its way into the cache.
struct Download<'a> {
    hub: &'a Hub,
    model: &'a HubModel,
    repo: ApiRepo,
    cached: hf_hub::CacheRepo,
    files: BTreeSet<String>,
}

impl Download<'_> {
    /// Downloads what is needed; gives the directory. The small files come first, so that a model which cannot be used
    /// costs no more than them.
    fn all(&self) -> Result<PathBuf> {
        if !self.files.contains(CONFIG) {
            return Err(hinted(
                format!("`{}` has no `{CONFIG}`", self.model),
                "it is no model in the layout of `transformers`; name another",
            ));
        }
        let directory = self.file(CONFIG)?;
        let directory = directory
            .parent()
            .expect("a file has a directory")
            .to_owned();
        for name in [GENERATION, TOKENIZER, TOKENIZER_CONFIG] {
            if self.files.contains(name) {
                self.file(name)?;
            }
        }
        Checkpoint::open(&directory).with_context(|| format!("cannot use `{}`", self.model))?;
        for name in self.weights()? {
            self.file(&name)?;
        }
        Ok(directory)
    }

    /// The names of the files that hold the weights.
    fn weights(&self) -> Result<BTreeSet<String>> {
        if self.files.contains(WEIGHTS) {
            return Ok([WEIGHTS.to_owned()].into());
        }
        if !self.files.contains(WEIGHTS_INDEX) {
            return Err(hinted(
                format!(
                    "`{}` has no `{WEIGHTS}` and no index of several",
                    self.model
                ),
                "only safetensors are read; look for a conversion of the model",
            ));
        }
        let index = self.file(WEIGHTS_INDEX)?;
        let invalid = || format!("`{WEIGHTS_INDEX}` of `{}` is not valid", self.model);
        let content = std::fs::read(&index).with_context(invalid)?;
        let index: serde_json::Value = serde_json::from_slice(&content).with_context(invalid)?;
        let shards = index["weight_map"].as_object().into_iter().flatten();
        let names = shards.map(|(_, file)| {
            let name = file.as_str().filter(|name| is_plain_name(name));
            let name = name.ok_or_else(|| anyhow!("`{file}` is not a plain file name"));
            name.map(str::to_owned).with_context(invalid)
        });
        names.collect()
    }

    /// Where a file of the commit lies, downloaded if it did not.
    fn file(&self, name: &str) -> Result<PathBuf> {
        if let Some(path) = self.cached.get(name) {
            return Ok(path);
        }
        if !self.files.contains(name) {
            return Err(anyhow!(
                "`{}` has no file `{name}`, which its index names",
                self.model
            ));
        }
        let progress = Show(None);
        let downloaded = self.repo.download_with_progress(name, progress);
        downloaded.map_err(|error| {
            self.hub
                .explain(self.model, error)
                .context(format!("cannot download `{name}`"))
        })
    }
}

/// A bar for each file.
struct Show(Option<Bar>);

impl Progress for Show {
    fn init(&mut self, size: usize, _name: &str) {
        self.finish();
        self.0 = Some(Bar::bytes("downloading", size as u64));
    }

    fn update(&mut self, size: usize) {
        if let Some(bar) = &self.0 {
            bar.advance(size as u64);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.clear();
        }
    }
}
