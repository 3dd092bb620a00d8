//! Who calls an object store: builders for each kind, filled from the environment as the stores' own tools read it.
//!
//! `object_store` knows the variables (`AWS_…`, `GOOGLE_…`, `AZURE_…`), roles of containers, and what a cloud's machines are
//! told about themselves. Added here is what it does not read: the file in which `aws configure` leaves keys.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::signer::Signer;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};

use crate::location::{BucketKind, BucketUrl};
use crate::web::Dialer;

/// A store, and who signs URLs for it.
pub type Opened = (Arc<dyn ObjectStore>, Arc<dyn Signer>);

fn opened(store: impl ObjectStore + Signer) -> Opened {
    let store = Arc::new(store);
    (store.clone(), store)
}

/// How often, and how long, a request is tried again.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: 8,
        retry_timeout: Duration::from_secs(60),
    }
}

/// Opens a bucket, with what the environment says.
pub fn open(url: &BucketUrl) -> object_store::Result<Opened> {
    let bucket = url.bucket.as_str();
    match url.kind {
        BucketKind::S3 => {
            let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
            if let Some(endpoint) = variable("AWS_ENDPOINT_URL_S3") {
                builder = builder.with_endpoint(endpoint);
            }
            if let Some(keys) = Keys::of_file() {
                builder = builder
                    .with_access_key_id(keys.id)
                    .with_secret_access_key(keys.secret);
                if let Some(token) = keys.token {
                    builder = builder.with_token(token);
                }
            }
            let builder = builder.with_http_connector(Dialer).with_retry(retries());
            Ok(opened(builder.build()?))
        }
        BucketKind::Gs => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
            let builder = builder.with_http_connector(Dialer).with_retry(retries());
            Ok(opened(builder.build()?))
        }
        BucketKind::Az => {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket);
            let builder = builder.with_http_connector(Dialer).with_retry(retries());
            Ok(opened(builder.build()?))
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Keys of an account of AWS.
#[derive(Debug, PartialEq, Eq)]
struct Keys {
    id: String,
    secret: String,
    token: Option<String>,
}

impl Keys {
    /// What `aws configure` has left, where no variable says who calls.
    fn of_file() -> Option<Self> {
        let said = [
            "AWS_ACCESS_KEY_ID",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_SKIP_SIGNATURE",
        ];
        if said.into_iter().any(|name| variable(name).is_some()) {
            return None;
        }
        let path = match variable("AWS_SHARED_CREDENTIALS_FILE") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(variable("HOME")?).join(".aws/credentials"),
        };
        let profile = variable("AWS_PROFILE").unwrap_or_else(|| "default".into());
        Self::parse(&std::fs::read_to_string(path).ok()?, &profile)
    }

    /// The keys of a profile in that file's text.
    fn parse(text: &str, profile: &str) -> Option<Self> {
        let (mut within, mut id, mut secret, mut token) = (false, None, None, None);
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                within = name.trim() == profile;
            } else if let (true, Some((name, value))) = (within, line.split_once('=')) {
                let slot = match name.trim() {
                    "aws_access_key_id" => &mut id,
                    "aws_secret_access_key" => &mut secret,
                    "aws_session_token" => &mut token,
                    _ => continue,
                };
                *slot = Some(value.trim().to_owned());
            }
        }
        Some(Self {
            id: id?,
            secret: secret?,
            token,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_profile() {
        let text = "[default]\naws_access_key_id = A\naws_secret_access_key=b=\n\n[ci]\nregion = x\naws_access_key_id=C\n\
                    aws_secret_access_key = d\naws_session_token = e\n[half]\naws_access_key_id=F\n";
        let keys = |id: &str, secret: &str, token: Option<&str>| {
            Some(Keys {
                id: id.into(),
                secret: secret.into(),
                token: token.map(str::to_owned),
            })
        };
        assert_eq!(Keys::parse(text, "default"), keys("A", "b=", None));
        assert_eq!(Keys::parse(text, "ci"), keys("C", "d", Some("e")));
        assert_eq!(Keys::parse(text, "half"), None);
        assert_eq!(Keys::parse(text, "none"), None);
    }
}
