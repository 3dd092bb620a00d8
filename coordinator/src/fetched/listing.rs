//! Which files a URL means: an object, all below a prefix, those that a pattern matches, a file of the web, or files of a
//! dataset. From what was not named itself, only what is text by its name is taken, as from a directory.

use std::path::PathBuf;

use cohort_common::corpus::is_text_name;
use cohort_objects::web::Web;
use cohort_objects::{
    Bucket, BucketUrl, Location, Meta, ObjectError, Reach, Selection, Source, WebFile, shown,
};
use url::Url;

use super::hub;

/// A file that a URL means.
#[derive(Debug)]
pub struct Named {
    /// Its own URL, without secrets; the extension decides how it is read.
    pub name: String,
    /// Its size, if that is known before it is asked for.
    pub bytes: Option<u64>,
    /// Where it is.
    pub found: Found,
}

/// Where a file is.
#[derive(Debug)]
pub enum Found {
    /// On this machine already.
    Here(PathBuf),
    /// To be fetched.
    There(Source),
}

impl Named {
    /// What tells it from all other files. Not for people: it may hold a secret.
    pub fn identity(&self) -> &str {
        match &self.found {
            Found::There(Source::Web(file)) => file.url.as_str(),
            Found::There(Source::Object(..)) | Found::Here(_) => &self.name,
        }
    }
}

/// Finds the files that a URL means, by name.
///
/// # Errors
/// A URL that means nothing, or nothing that is text; a place that cannot be read.
pub async fn find(location: &Location, reach: Reach) -> Result<Vec<Named>, ObjectError> {
    let found = match location {
        Location::Bucket(url) => objects(url).await?,
        Location::Web(url) => vec![page(url, reach)?],
        Location::Hub(dataset) => hub::files(dataset).await?,
        Location::File(path) => vec![Named {
            name: location.to_string(),
            bytes: Some(0),
            found: Found::Here(path.clone()),
        }],
    };
    match found.is_empty() {
        false => Ok(found),
        true => Err(ObjectError::Missing {
            url: location.to_string(),
            reason: "nothing of that name, and no text below it".into(),
        }),
    }
}

async fn objects(url: &BucketUrl) -> Result<Vec<Named>, ObjectError> {
    let selection = Selection::of(&url.key)?;
    let bucket = Bucket::open(&Location::Bucket(url.with_key("")))?;
    if let Selection::Name(name) = &selection
        && let Some(meta) = bucket.head(name).await?
    {
        return Ok(vec![named(url, &bucket, meta)]);
    }
    let prefix = match &selection {
        Selection::Name(name) => format!("{name}/"),
        selection => selection.prefix().to_owned(),
    };
    let listed = bucket.list(&prefix).await?;
    let taken = listed.into_iter().filter(|meta| {
        let name = meta.name.as_str();
        meta.bytes > 0 && selection.takes(name) && (selection.names(name) || is_text_name(name))
    });
    Ok(taken.map(|meta| named(url, &bucket, meta)).collect())
}

fn named(url: &BucketUrl, bucket: &Bucket, meta: Meta) -> Named {
    Named {
        name: url.with_key(&meta.name).to_string(),
        bytes: Some(meta.bytes),
        found: Found::There(Source::Object(bucket.clone(), meta)),
    }
}

fn page(url: &Url, reach: Reach) -> Result<Named, ObjectError> {
    if url.path().contains(['*', '[']) {
        return Err(ObjectError::Unusable {
            url: shown(url),
            reason: "servers of the web cannot be asked for all files of a pattern; name each file"
                .into(),
        });
    }
    let file = WebFile::of(Web::new(reach, true), url.clone());
    Ok(Named {
        name: shown(url),
        bytes: None,
        found: Found::There(Source::Web(Box::new(file))),
    })
}
