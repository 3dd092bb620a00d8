//! An object store below a URL: `s3://BUCKET/PREFIX` and its like, or a directory of this machine, which stands in for one.
//! Names of objects are relative to the prefix.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::signer::Signer;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    UpdateVersion,
};
use tokio_stream::StreamExt;
use url::Url;

use crate::credentials;
use crate::error::{ObjectError, is_lost};
use crate::location::{BucketUrl, Location};
use crate::patience::patiently;

/// Objects that one list may have.
const MAX_LISTED: usize = 1_000_000;
/// Tries of a list or a deletion whose answer does not come. `object_store` asks again for most requests, but neither for
/// deletions, which it takes for something that cannot be done twice, nor for a list that is cut off in the middle.
const TRIES: u32 = 4;
/// The pause before the second one; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(250);

/// A place in an object store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bucket {
    pub(super) store: Arc<dyn ObjectStore>,
    signer: Option<Arc<dyn Signer>>,
    /// What stands before every name: empty, or with a slash at its end.
    prefix: String,
    /// The URL of the prefix, with a slash at its end.
    url: String,
    /// Whether it is a directory, which stands in for a store.
    directory: bool,
}

/// Which version of an object was read or written: what [`Bucket::replace`] is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    tag: Option<String>,
    generation: Option<String>,
}

impl From<Version> for UpdateVersion {
    fn from(version: Version) -> Self {
        Self {
            e_tag: version.tag,
            version: version.generation,
        }
    }
}

/// What a store knows of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Its name below the prefix.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// What changes with its content.
    pub version: Option<String>,
}

impl Bucket {
    /// Opens the place that a URL names, with the credentials of the environment. Asks nobody yet.
    pub fn open(location: &Location) -> Result<Self, ObjectError> {
        match location {
            Location::Bucket(url) => Self::of_bucket(url),
            Location::File(path) => Self::of_directory(path),
            Location::Web(_) | Location::Hub(_) => Err(ObjectError::Unusable {
                url: location.to_string(),
                reason: "it is no object store; those begin with `s3://`, `gs://` or `az://`"
                    .into(),
            }),
        }
    }

    fn of_bucket(url: &BucketUrl) -> Result<Self, ObjectError> {
        let prefix = url.key.trim_matches('/');
        let prefix = match prefix {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        let url = url.with_key(&prefix);
        let (store, signer) = credentials::open(&url).map_err(|error| {
            let reason = error.to_string();
            ObjectError::Setup {
                url: url.to_string(),
                reason,
            }
        })?;
        Ok(Self {
            store,
            signer: Some(signer),
            prefix,
            url: url.to_string(),
            directory: false,
        })
    }

    fn of_directory(path: &Path) -> Result<Self, ObjectError> {
        std::fs::create_dir_all(path).map_err(ObjectError::disk(path))?;
        // What a store has said to be there outlives a machine that loses its power; so it is here.
        let store = LocalFileSystem::new_with_prefix(path).map(|store| store.with_fsync(true));
        let url = format!("file://{}/", path.display());
        let store = store.map_err(|error| ObjectError::of_store(&url, error))?;
        Ok(Self {
            store: Arc::new(store),
            signer: None,
            prefix: String::new(),
            url,
            directory: true,
        })
    }

    /// A place in a store that is given, for tests.
    #[cfg(test)]
    pub(super) fn over(store: impl ObjectStore, prefix: &str) -> Self {
        Self {
            store: Arc::new(store),
            signer: None,
            prefix: prefix.into(),
            url: format!("memory://{prefix}"),
            directory: false,
        }
    }

    /// The URL of an object, for people; of the place itself for the empty name.
    pub fn url(&self, name: &str) -> String {
        format!("{}{name}", self.url)
    }

    pub(super) fn key(&self, name: &str) -> Result<Key, ObjectError> {
        Key::parse(format!("{}{name}", self.prefix)).map_err(|error| ObjectError::Unusable {
            url: self.url(name),
            reason: format!("{error}; name another object"),
        })
    }

    pub(super) fn failed(&self, name: &str) -> impl Fn(object_store::Error) -> ObjectError {
        let url = self.url(name);
        move |error| ObjectError::of_store(&url, error)
    }

    /// What is known of an object; `None` if there is none.
    pub async fn head(&self, name: &str) -> Result<Option<Meta>, ObjectError> {
        match self.store.head(&self.key(name)?).await {
            Ok(meta) => Ok(Some(self.meta(meta))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(name)(error)),
        }
    }

    fn meta(&self, meta: object_store::ObjectMeta) -> Meta {
        let key = meta.location.as_ref();
        Meta {
            name: key.strip_prefix(&self.prefix).unwrap_or(key).into(),
            bytes: meta.size,
            version: meta.e_tag,
        }
    }

    /// All objects whose names begin with a prefix up to a slash, by name. What is left of the prefix after its last slash
    /// is not looked at.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Meta>, ObjectError> {
        let directory = prefix.rfind('/').map_or("", |slash| &prefix[..slash]);
        let key = self.key(directory)?;
        let key = (!key.as_ref().is_empty()).then_some(key);
        let listed = patiently((TRIES, PAUSE), is_lost, || self.listed(key.as_ref())).await;
        let mut found = listed.map_err(self.failed(prefix))?;
        if found.len() > MAX_LISTED {
            return Err(ObjectError::Unusable {
                url: self.url(prefix),
                reason: format!("it has more than {MAX_LISTED} objects; name fewer"),
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// All objects below a key, or one more than a list may have.
    async fn listed(&self, below: Option<&Key>) -> object_store::Result<Vec<Meta>> {
        let mut listed = self.store.list(below);
        let mut found = Vec::new();
        while found.len() <= MAX_LISTED
            && let Some(meta) = listed.next().await
        {
            found.push(self.meta(meta?));
        }
        Ok(found)
    }

    /// The content of a small object.
    pub async fn read(&self, name: &str, most: u64) -> Result<Bytes, ObjectError> {
        let found = self.store.get(&self.key(name)?).await;
        let found = found.map_err(self.failed(name))?;
        if found.meta.size > most {
            return Err(ObjectError::Large {
                url: self.url(name),
                bytes: found.meta.size,
                most,
            });
        }
        found.bytes().await.map_err(self.failed(name))
    }

    /// What is behind that many bytes of an object, as long as it is still of that version.
    pub(super) async fn read_from(
        &self,
        name: &str,
        from: u64,
        version: Option<&str>,
    ) -> Result<GetResult, ObjectError> {
        let options = GetOptions {
            if_match: version.map(str::to_owned),
            range: (from > 0).then_some(GetRange::Offset(from)),
            ..GetOptions::default()
        };
        let found = self.store.get_opts(&self.key(name)?, options).await;
        found.map_err(self.failed(name))
    }

    /// Writes a small object, whole or not at all.
    pub async fn write(&self, name: &str, content: Vec<u8>) -> Result<(), ObjectError> {
        let key = self.key(name)?;
        let written = self.store.put(&key, PutPayload::from(content)).await;
        written.map(|_| ()).map_err(self.failed(name))
    }

    /// Writes a small object where there is none. Says whether there was none.
    pub async fn create(&self, name: &str, content: Vec<u8>) -> Result<bool, ObjectError> {
        let mode = PutOptions::from(PutMode::Create);
        let key = self.key(name)?;
        let again = content.clone();
        match self.store.put_opts(&key, content.into(), mode).await {
            Ok(_) => Ok(true),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok(false),
            Err(error) => match self.failed(name)(error) {
                // Some servers do not know the condition; asking first is the next best.
                ObjectError::Server { status: 501, .. } => match self.head(name).await? {
                    Some(_) => Ok(false),
                    None => self.write(name, again).await.map(|()| true),
                },
                error => Err(error),
            },
        }
    }

    /// Whether it is a directory, which stands in for a store, and cannot [`replace`](Self::replace).
    pub fn is_directory(&self) -> bool {
        self.directory
    }

    /// The content of a small object and its version; `None` if there is none.
    pub async fn read_version(
        &self,
        name: &str,
        most: u64,
    ) -> Result<Option<(Bytes, Version)>, ObjectError> {
        let found = match self.store.get(&self.key(name)?).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(self.failed(name))?,
        };
        if found.meta.size > most {
            return Err(ObjectError::Large {
                url: self.url(name),
                bytes: found.meta.size,
                most,
            });
        }
        let version = Version {
            tag: found.meta.e_tag.clone(),
            generation: found.meta.version.clone(),
        };
        let content = found.bytes().await.map_err(self.failed(name))?;
        Ok(Some((content, version)))
    }

    /// Writes a small object if what is there is still of that version; without one, if nothing is there. Gives its own
    /// version; `None` if something else is there, which may be what an earlier try has written whose answer was lost.
    ///
    /// # Errors
    /// Whether it was written is not known then.
    pub async fn replace(
        &self,
        name: &str,
        content: Vec<u8>,
        over: Option<Version>,
    ) -> Result<Option<Version>, ObjectError> {
        let mode = match over {
            Some(version) => PutMode::Update(version.into()),
            None => PutMode::Create,
        };
        let key = self.key(name)?;
        let put = self.store.put_opts(&key, content.into(), mode.into());
        match put.await {
            Ok(put) => Ok(Some(Version {
                tag: put.e_tag,
                generation: put.version,
            })),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok(None),
            Err(object_store::Error::NotImplemented { .. }) => Err(ObjectError::Unusable {
                url: self.url(name),
                reason: "this store cannot write on the condition that nobody else has written meanwhile".into(),
            }),
            Err(error) => Err(self.failed(name)(error)),
        }
    }

    /// Deletes an object. One that is not there is no error.
    pub async fn delete(&self, name: &str) -> Result<(), ObjectError> {
        let key = self.key(name)?;
        match patiently((TRIES, PAUSE), is_lost, || self.store.delete(&key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(name)(error)),
        }
    }

    /// A URL by which whoever has it reads the object for a while; `None` where URLs cannot be signed.
    pub async fn sign(&self, name: &str, lasts: Duration) -> Result<Option<Url>, ObjectError> {
        let Some(signer) = &self.signer else {
            return Ok(None);
        };
        let key = self.key(name)?;
        let signed = signer.signed_url(Method::GET, &key, lasts).await;
        signed.map(Some).map_err(self.failed(name))
    }

    /// Copies a file of this machine, open at its beginning, to an object (`put.rs`).
    pub async fn put(
        &self,
        name: &str,
        file: (&Path, std::fs::File),
        expected: &[u8; 32],
    ) -> Result<(), ObjectError> {
        crate::put::put(self, name, file, expected).await
    }
}
