//! What people call a corpus. Two requests that give the same tokens share one corpus, which has the name of the first; the
//! names of the others lie beside the shards, in `names.json`. Names are no part of the fingerprint.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::store::Corpus;

/// The file of further names.
pub const NAMES_FILE: &str = "names.json";
/// The version of the file.
const VERSION: u32 = 1;
/// Further names; of more the oldest is forgotten.
const MAX_NAMES: usize = 100;

#[derive(Serialize, Deserialize)]
struct Names {
    version: u32,
    names: Vec<String>,
}

/// The further names of the corpus in `directory`. A corpus with a file that cannot be read has none: it is found by its
/// first name and by its fingerprint.
pub(super) fn further(directory: &Path) -> Vec<String> {
    let json = std::fs::read(directory.join(NAMES_FILE)).unwrap_or_default();
    match serde_json::from_slice::<Names>(&json) {
        Ok(found) if found.version == VERSION => found.names,
        _ => Vec::new(),
    }
}

/// Writes that the corpus is called `name`, too, unless it is known; gives all its further names.
pub(super) fn add(corpus: &Corpus, name: &str) -> Result<Vec<String>, CorpusError> {
    let mut names = further(corpus.directory());
    if corpus.index().name == name || names.iter().any(|known| known == name) {
        return Ok(names);
    }
    names.push(name.to_owned());
    let old = names.len().saturating_sub(MAX_NAMES);
    names.drain(..old);
    let found = Names {
        version: VERSION,
        names,
    };
    let json = serde_json::to_vec_pretty(&found).expect("names serialise");
    corpus.put(NAMES_FILE, &json)?;
    Ok(found.names)
}

/// A name for a corpus whose text lies at `path`: the last part of the path without its extensions, in letters, digits and
/// `-`. What a URL has behind its path is left out, since it may be a secret.
pub fn name_of(path: &str) -> String {
    let path = path.strip_prefix("coordinator:").unwrap_or(path);
    let path = match path.split_once("://") {
        Some((_, place)) => place.split(['?', '#']).next().unwrap_or_default(),
        None => path,
    };
    let last = path
        .trim_end_matches(['/', '\\'])
        .rsplit(['/', '\\'])
        .next();
    let stem = last.and_then(|last| last.split('.').find(|part| !part.is_empty()));
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = stem.unwrap_or_default().chars().map(plain).collect();
    match name.trim_matches('-') {
        "" => "corpus".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corpora_are_named_after_their_path() {
        for (path, name) in [
            ("data/books/", "books"),
            ("a/tiny shakespeare.txt", "tiny-shakespeare"),
            ("coordinator:/data/x.jsonl.gz", "x"),
            ("coordinator:x.txt", "x"),
            ("@lists/news.txt", "news"),
            ("c:\\texts\\tales.txt", "tales"),
            ("what?.txt", "what"),
            ("*.txt", "corpus"),
            ("..", "corpus"),
            ("s3://bucket/", "bucket"),
            ("https://host/books.txt?sig=secret", "books"),
            ("https://host/books?sig=a/secret#b/secret", "books"),
            ("https://host/?sig=secret", "host"),
        ] {
            assert_eq!(name_of(path), name, "{path}");
        }
    }
}
