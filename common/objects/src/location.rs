//! What a URL names. **Pure**: nothing is looked up here.
//!
//! Keys of object stores may have any character, so their URLs are cut at slashes and taken as they are; only the web's
//! URLs are parsed as URLs. Shown to people, and written down, a URL has neither a query nor credentials.

use std::fmt;
use std::path::PathBuf;

use glob::{MatchOptions, Pattern};
use url::Url;

/// Longest URL, in bytes.
const MAX_URL: usize = 8192;

/// How the pattern of an object's name matches: as a shell does it.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Where data lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In an object store.
    Bucket(BucketUrl),
    /// On the web.
    Web(Url),
    /// A dataset of the Hugging Face hub.
    Hub(Dataset),
    /// On this machine: `file:///PATH`.
    File(PathBuf),
}

/// `s3://BUCKET/KEY`, `gs://BUCKET/KEY` or `az://CONTAINER/KEY`. The key may be empty, a prefix or a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketUrl {
    /// Which kind of store.
    pub kind: BucketKind,
    /// The bucket; Azure's container.
    pub bucket: String,
    /// What follows it, without a slash at its beginning.
    pub key: String,
}

/// The kinds of object stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BucketKind {
    /// S3, and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
}

/// `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// Whose it is.
    pub owner: String,
    /// What the owner calls it.
    pub name: String,
    /// Which state of it; the newest if nobody says.
    pub revision: Option<String>,
    /// Which of its files: empty for all, else a path, a directory or a pattern.
    pub path: String,
}

/// Why a URL cannot be understood. Shows no more of it than its scheme and host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Nothing known.
    #[error(
        "`{0}://` is no place that data is read from; known are s3, gs, az, abfs, http, https, hf and file"
    )]
    Scheme(String),
    /// No name of a bucket.
    #[error(
        "`{0}` is no name of a bucket; write `SCHEME://BUCKET/KEY`, with 3 to 63 of the characters `a-z A-Z 0-9 . _ -` for the bucket"
    )]
    Bucket(String),
    /// An account in a URL.
    #[error(
        "the URL names an account; write `az://CONTAINER/KEY`, and name the account in AZURE_STORAGE_ACCOUNT_NAME"
    )]
    Account,
    /// A name or a password in a URL.
    #[error(
        "a URL must not hold a name or a password: it is shown and written down; use a signed URL, or a store whose \
         credentials are in the coordinator's environment"
    )]
    Credentials,
    /// Not a URL.
    #[error("`{scheme}://…` is no URL: {reason}")]
    Malformed {
        /// How it begins.
        scheme: String,
        /// Why.
        reason: String,
    },
    /// No dataset.
    #[error(
        "`{0}` names no dataset of the hub; write `hf://datasets/OWNER/NAME`, then `@REVISION` or `/PATH` if wanted"
    )]
    Dataset(String),
    /// A pattern that cannot be understood.
    #[error("`{pattern}` is no pattern: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// Why.
        reason: String,
    },
    /// A path of a file that is not whole.
    #[error("`file://{0}` is no whole path; write `file:///PATH`")]
    Relative(String),
}

/// Whether a text is meant as a URL, and not as a path.
pub fn is_location(text: &str) -> bool {
    let word = |scheme: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"+.-".contains(&b);
        scheme.len() > 1 && scheme.bytes().all(plain)
    };
    text.split_once("://")
        .is_some_and(|(scheme, _)| word(scheme))
}

impl Location {
    /// Understands a URL.
    pub fn parse(text: &str) -> Result<Self, LocationError> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let scheme = scheme.to_ascii_lowercase();
        let malformed = |reason: &str| LocationError::Malformed {
            scheme: scheme.clone(),
            reason: reason.into(),
        };
        if text.len() > MAX_URL {
            return Err(malformed(&format!("it is longer than {MAX_URL} bytes")));
        }
        if text.bytes().any(|b| b.is_ascii_control()) {
            return Err(malformed("it has a control character in it"));
        }
        match scheme.as_str() {
            "s3" | "s3a" => BucketUrl::parse(BucketKind::S3, rest).map(Self::Bucket),
            "gs" | "gcs" => BucketUrl::parse(BucketKind::Gs, rest).map(Self::Bucket),
            "az" | "abfs" | "abfss" => BucketUrl::parse(BucketKind::Az, rest).map(Self::Bucket),
            "hf" => {
                let dataset = rest.strip_prefix("datasets/").and_then(Dataset::parse);
                let dataset = dataset.ok_or_else(|| LocationError::Dataset(text.into()));
                dataset.map(Self::Hub)
            }
            "file" if rest.starts_with('/') => Ok(Self::File(rest.into())),
            "file" => Err(LocationError::Relative(rest.into())),
            "http" | "https" => {
                let mut url = Url::parse(text).map_err(|error| malformed(&error.to_string()))?;
                if !url.username().is_empty() || url.password().is_some() {
                    return Err(LocationError::Credentials);
                }
                url.set_fragment(None);
                Ok(Self::Web(url))
            }
            _ => Err(LocationError::Scheme(scheme)),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bucket(url) => url.fmt(f),
            Self::Web(url) => f.write_str(&shown(url)),
            Self::Hub(dataset) => dataset.fmt(f),
            Self::File(path) => write!(f, "file://{}", path.display()),
        }
    }
}

/// A URL of the web without its query, which may be a secret.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

impl BucketUrl {
    fn parse(kind: BucketKind, rest: &str) -> Result<Self, LocationError> {
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains('@') {
            return Err(match kind {
                BucketKind::Az => LocationError::Account,
                _ => LocationError::Credentials,
            });
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let holds = (3..=63).contains(&bucket.len())
            && bucket.bytes().all(plain)
            && bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
            && !bucket.contains("..");
        match holds {
            true => Ok(Self {
                kind,
                bucket: bucket.into(),
                key: key.trim_start_matches('/').into(),
            }),
            false => Err(LocationError::Bucket(bucket.into())),
        }
    }

    /// The URL of another key in the same bucket.
    pub fn with_key(&self, key: &str) -> Self {
        Self {
            key: key.into(),
            ..self.clone()
        }
    }
}

impl fmt::Display for BucketUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.kind.scheme(), self.bucket, self.key)
    }
}

impl BucketKind {
    fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
        }
    }
}

impl Dataset {
    /// From what follows `hf://datasets/`. Names are such that neither a path nor an address can be made to lead elsewhere.
    fn parse(text: &str) -> Option<Self> {
        let word = |text: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            !text.is_empty()
                && !text.starts_with('.')
                && text.len() <= 96
                && text.bytes().all(plain)
        };
        let (owner, rest) = text.split_once('/')?;
        let (dataset, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (name, revision) = match dataset.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (dataset, None),
        };
        let leads_out = path.split('/').any(|part| part == "..");
        let holds = word(owner) && word(name) && revision.is_none_or(word) && !leads_out;
        holds.then(|| Self {
            owner: owner.into(),
            name: name.into(),
            revision: revision.map(str::to_owned),
            path: path.trim_matches('/').into(),
        })
    }

    /// What the hub calls it.
    pub fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The same dataset, and one of its files.
    pub fn with_path(&self, path: &str) -> Self {
        Self {
            path: path.into(),
            ..self.clone()
        }
    }
}

impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://datasets/{}", self.id())?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match self.path.as_str() {
            "" => Ok(()),
            path => write!(f, "/{path}"),
        }
    }
}

/// Which names below a place are meant: one, all below a prefix, or those that a pattern matches.
#[derive(Clone, Debug)]
pub enum Selection {
    /// This one, or if there is none of that name, all below it.
    Name(String),
    /// All below it: it is empty or ends with a slash.
    Below(String),
    /// What the pattern matches.
    Pattern(Pattern),
}

impl Selection {
    /// Understands a key, a prefix or a pattern.
    pub fn of(key: &str) -> Result<Self, LocationError> {
        if key.contains(['*', '?', '[']) {
            let pattern = Pattern::new(key).map_err(|error| LocationError::Pattern {
                pattern: key.into(),
                reason: error.msg.into(),
            })?;
            return Ok(Self::Pattern(pattern));
        }
        Ok(match key.is_empty() || key.ends_with('/') {
            true => Self::Below(key.into()),
            false => Self::Name(key.into()),
        })
    }

    /// What all names that are meant begin with, up to a slash.
    pub fn prefix(&self) -> &str {
        match self {
            Self::Name(name) => name,
            Self::Below(prefix) => prefix,
            Self::Pattern(pattern) => {
                let text = pattern.as_str();
                let plain = &text[..text.find(['*', '?', '[']).unwrap_or(text.len())];
                &plain[..plain.rfind('/').map_or(0, |slash| slash + 1)]
            }
        }
    }

    /// Whether that name is meant. What is below a name or a prefix may be hidden: a part of it begins with a dot or an
    /// underscore, as where other programs keep notes beside data. It is meant only where a pattern says so.
    pub fn takes(&self, name: &str) -> bool {
        let below = |prefix: &str| {
            let rest = name.strip_prefix(prefix);
            rest.is_some_and(|rest| !rest.split('/').any(|part| part.starts_with(['.', '_'])))
        };
        match self {
            Self::Name(exact) => name == exact || below(&format!("{exact}/")),
            Self::Below(prefix) => below(prefix),
            Self::Pattern(pattern) => pattern.matches_with(name, MATCHING),
        }
    }

    /// Whether that name was spelled out, or matched by a pattern: then its extension does not matter.
    pub fn names(&self, name: &str) -> bool {
        match self {
            Self::Name(exact) => name == exact,
            Self::Below(_) => false,
            Self::Pattern(_) => self.takes(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        Location::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn places_are_told_apart_from_paths() {
        for url in ["s3://b/k", "HTTPS://x", "hf://datasets/a/b", "what://x"] {
            assert!(is_location(url), "{url}");
        }
        for path in ["a/b", "C://x", "a b://c", "coordinator:/data", "://"] {
            assert!(!is_location(path), "{path}");
        }
    }

    #[test]
    fn urls_are_read_and_shown_without_secrets() {
        for (text, shown) in [
            ("s3://books/a b/*.jsonl?", "s3://books/a b/*.jsonl?"),
            ("s3a://books", "s3://books/"),
            ("gs://books//x.txt", "gs://books/x.txt"),
            ("abfss://books/x", "az://books/x"),
            (
                "hf://datasets/a/b@v1/x/*.txt",
                "hf://datasets/a/b@v1/x/*.txt",
            ),
            ("hf://datasets/a/b", "hf://datasets/a/b"),
            (
                "https://Host/a%20b.txt?X-Amz-Signature=secret#x",
                "https://host/a%20b.txt",
            ),
            ("file:///data/x.txt", "file:///data/x.txt"),
        ] {
            assert_eq!(Location::parse(text).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        assert!(message("ftp://x/y").starts_with("`ftp://` is no place"));
        for bucket in [
            "s3://",
            "s3://a",
            "s3://../x",
            "s3://a%2fb/x",
            "s3://a..b/x",
            "s3://a:1/x",
        ] {
            assert!(
                message(bucket).contains("is no name of a bucket"),
                "{bucket}"
            );
        }
        assert_eq!(
            Location::parse("abfss://c@account.example.net/x"),
            Err(LocationError::Account)
        );
        for text in ["s3://me:secret@bucket/x", "https://me:secret@host/x"] {
            assert_eq!(Location::parse(text), Err(LocationError::Credentials));
        }
        for dataset in [
            "hf://a/b",
            "hf://datasets/a",
            "hf://datasets/a/..",
            "hf://datasets/a/b@/x",
            "hf://datasets/a/b/../../c/d",
            "hf://datasets/a/b?x",
        ] {
            assert!(message(dataset).contains("names no dataset"), "{dataset}");
        }
        assert!(message("file://x").contains("no whole path"));
        assert!(message("http://a b/").contains("is no URL"));
        assert!(message("s3://bucket/a\nb").contains("control character"));
    }

    #[test]
    fn keys_are_names_prefixes_or_patterns() {
        let takes = |key: &str, name: &str| Selection::of(key).unwrap().takes(name);
        assert!(takes("", "a/b.txt") && takes("a/", "a/b.txt") && takes("a", "a/b.txt"));
        assert!(!takes("a", "ab.txt") && !takes("a/", "a/_SUCCESS") && !takes("a", "a/.x/y"));
        assert!(takes("a/*.txt", "a/b.txt") && !takes("a/*.txt", "a/b/c.txt"));
        assert!(takes("a/**/*.txt", "a/b/c.txt") && takes("**/*.txt", "c.txt"));
        assert!(
            !Selection::of("a/").unwrap().names("a/x")
                && Selection::of("a/*").unwrap().names("a/x")
        );
        for (key, prefix) in [
            ("a/b*/c", "a/"),
            ("*.txt", ""),
            ("a/b/", "a/b/"),
            ("a/b", "a/b"),
        ] {
            assert_eq!(Selection::of(key).unwrap().prefix(), prefix);
        }
        assert!(matches!(
            Selection::of("a/**b"),
            Err(LocationError::Pattern { .. })
        ));
    }
}
