//! Datasets of the Hugging Face hub: which files a commit of one has, and where they are fetched. Token, endpoint and cache
//! are found as `hf-hub` and other programs find them: `HF_TOKEN` (else what a login left in the cache), `HF_ENDPOINT`,
//! `HF_HOME`. What the cache of this machine has already is read there.
//!
//! The transfers are our own, so that one that is cut off goes on.

use cohort_common::checkpoint::is_plain_name;
use cohort_common::corpus::is_text_name;
use cohort_objects::web::Web;
use cohort_objects::{Dataset, ObjectError, Reach, Selection, Source, WebFile};
use hf_hub::{Cache, Repo, RepoType};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use serde::Deserialize;
use url::Url;

use super::listing::{Found, Named};

/// Where the hub is unless the environment says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// What the hub is asked for when nobody names a revision.
const DEFAULT_REVISION: &str = "main";
/// Longest answer about a dataset, in bytes.
const MAX_INFO: u64 = 256 << 20;
/// Files that describe a dataset and are no part of it.
const DESCRIPTIONS: &[&str] = &["README.md", "LICENSE.md", "LICENSE.txt"];

/// What the hub says of a dataset.
#[derive(Debug, Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
}

/// The hub, as this process may use it.
struct Hub {
    endpoint: Url,
    cache: Cache,
    web: Web,
    headers: HeaderMap,
}

/// The files of a dataset that are meant, by name.
pub async fn files(dataset: &Dataset) -> Result<Vec<Named>, ObjectError> {
    let hub = Hub::from_env(dataset)?;
    let info = hub.info(dataset).await?;
    let selection = Selection::of(&dataset.path)?;
    let mut names: Vec<&Sibling> = info
        .siblings
        .iter()
        .filter(|file| {
            let name = file.rfilename.as_str();
            let text = is_text_name(name) && !DESCRIPTIONS.contains(&name);
            selection.takes(name) && (selection.names(name) || text)
        })
        .collect();
    names.sort_by(|a, b| a.rfilename.cmp(&b.rfilename));
    names
        .into_iter()
        .map(|file| hub.named(dataset, &info.sha, file))
        .collect()
}

impl Hub {
    fn from_env(dataset: &Dataset) -> Result<Self, ObjectError> {
        let given = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let setup = |reason: &str| ObjectError::Setup {
            url: dataset.to_string(),
            reason: reason.into(),
        };
        if given("HF_HUB_OFFLINE").is_some_and(|value| !["0", "false"].contains(&&*value)) {
            return Err(setup("HF_HUB_OFFLINE forbids to ask the hub"));
        }
        // Without either, `hf-hub` has no place for its cache, and panics.
        if given("HF_HOME").is_none() && std::env::home_dir().is_none() {
            return Err(setup(
                "there is no home directory for the hub's cache; set HF_HOME",
            ));
        }
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let endpoint = Url::parse(&format!("{}/", endpoint.trim_end_matches('/')));
        let endpoint = endpoint.ok().filter(|url| url.has_host());
        let cache = Cache::from_env();
        let mut headers = HeaderMap::new();
        if let Some(token) = given("HF_TOKEN").or_else(|| cache.token()) {
            let bearer = HeaderValue::from_str(&format!("Bearer {token}"));
            let mut bearer = bearer.map_err(|_| setup("the token of the hub is none"))?;
            bearer.set_sensitive(true);
            headers.insert(AUTHORIZATION, bearer);
        }
        Ok(Self {
            endpoint: endpoint.ok_or_else(|| setup("HF_ENDPOINT is no URL"))?,
            cache,
            // The environment says where the hub is, not who asks for something on it.
            web: Web::new(Reach::Everywhere, true),
            headers,
        })
    }

    fn url(&self, parts: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .expect("an address with a host has segments")
            .pop_if_empty()
            .extend(parts);
        url
    }

    /// Which commit it is at, and what that has.
    async fn info(&self, dataset: &Dataset) -> Result<Info, ObjectError> {
        let revision = dataset.revision.as_deref().unwrap_or(DEFAULT_REVISION);
        let (owner, name) = (dataset.owner.as_str(), dataset.name.as_str());
        let mut url = self.url(&["api", "datasets", owner, name, "revision", revision]);
        url.set_query(Some("blobs=true"));
        let shown = dataset.with_path("").to_string();
        let file = WebFile {
            web: self.web.clone(),
            url,
            headers: self.headers.clone(),
            shown: shown.clone(),
            version: None,
        };
        let content = file.read(MAX_INFO).await?;
        let nonsense = |reason: String| ObjectError::Server {
            url: shown.clone(),
            reason,
            status: 200,
            transient: false,
        };
        let info: Info = serde_json::from_slice(&content)
            .map_err(|error| nonsense(format!("with what cannot be understood: {error}")))?;
        match is_plain_name(&info.sha) {
            true => Ok(info),
            false => Err(nonsense(format!(
                "with a commit `{}` that is none",
                info.sha
            ))),
        }
    }

    fn named(&self, dataset: &Dataset, sha: &str, file: &Sibling) -> Result<Named, ObjectError> {
        let path = file.rfilename.as_str();
        let shown = dataset.with_path(path).to_string();
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(ObjectError::Server {
                url: shown,
                reason: "with a file name that could lead elsewhere".into(),
                status: 200,
                transient: false,
            });
        }
        let repo = Repo::with_revision(dataset.id(), RepoType::Dataset, sha.into());
        let cached = self.cache.repo(repo).pointer_path(sha).join(path);
        let found = if cached.is_file() {
            Found::Here(cached)
        } else {
            let mut parts = vec!["datasets", &dataset.owner, &dataset.name, "resolve", sha];
            parts.extend(path.split('/'));
            Found::There(Source::Web(Box::new(WebFile {
                web: self.web.clone(),
                url: self.url(&parts),
                headers: self.headers.clone(),
                shown: shown.clone(),
                // The content of a commit never changes.
                version: Some(sha.into()),
            })))
        };
        Ok(Named {
            name: shown,
            bytes: match &found {
                Found::Here(_) => Some(0),
                Found::There(_) => file.size,
            },
            found,
        })
    }
}
