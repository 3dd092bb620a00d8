//! Which files a corpus is made of: paths, directories and patterns become a list of source files in a fixed order.
//!
//! The kind of a file follows from its display name, not from where its bytes lie, so that uploaded content can be read
//! from a content store under the name it had. Nothing here looks into a file; `text.rs` does.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::error::{BadInput, CorpusError, Problem};

/// File name extensions that are taken from directories. A file that is named itself, or matched by a pattern, may have
/// any extension.
pub const TEXT_EXTENSIONS: &[&str] = &[
    "txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "jsonl", "rs", "py", "c", "h",
    "cc", "cpp", "cxx", "hpp", "cu", "cuh", "go", "java", "kt", "scala", "swift", "js", "mjs",
    "jsx", "ts", "tsx", "rb", "php", "pl", "lua", "jl", "r", "hs", "ml", "ex", "erl", "clj",
    "lisp", "zig", "cs", "fs", "sh", "bash", "sql", "html", "css", "toml", "yaml", "yml", "proto",
];

/// How a file is cut into documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// The whole file is one document.
    Text,
    /// Each line is a JSON object with a text field: one document per line.
    Jsonl,
}

/// How a file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// gzip, possibly of several members.
    Gzip,
    /// Zstandard, possibly of several frames.
    Zstd,
}

/// One file of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// The name shown in messages; its extension decides the kind.
    pub name: String,
    /// Where the bytes are.
    pub path: PathBuf,
    /// Files of one group fall on the same side of a split by document; without a group each document goes by its
    /// own content.
    pub group: Option<String>,
    /// How it is cut into documents.
    pub kind: SourceKind,
    /// How it is packed.
    pub compression: Compression,
}

impl SourceFile {
    /// A file whose bytes lie at `path` and whose kind follows from `name`: `.jsonl` is one document per line,
    /// everything else is text; `.gz` and `.zst` are unpacked.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let name = name.into();
        let lower = name.to_lowercase();
        let (stem, compression) = if let Some(stem) = lower.strip_suffix(".gz") {
            (stem, Compression::Gzip)
        } else if let Some(stem) = lower.strip_suffix(".zst") {
            (stem, Compression::Zstd)
        } else {
            (lower.as_str(), Compression::None)
        };
        let kind = match extension(stem) {
            Some("jsonl") => SourceKind::Jsonl,
            _ => SourceKind::Text,
        };
        Self {
            name,
            path: path.into(),
            group: None,
            kind,
            compression,
        }
    }

    /// The same file, in a group.
    pub fn in_group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }
}

/// The files of a corpus in their order, and what was left out on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// The files, in the order in which their documents follow each other.
    pub files: Vec<SourceFile>,
    /// What `skip_bad` left out while expanding.
    pub skipped: Vec<BadInput>,
}

impl From<Vec<SourceFile>> for Sources {
    fn from(files: Vec<SourceFile>) -> Self {
        Self {
            files,
            skipped: Vec::new(),
        }
    }
}

/// Turns files, directories and patterns into source files: the arguments in the order given, a directory's files
/// (those with one of [`TEXT_EXTENSIONS`], recursively, hidden ones left out) sorted by name, each file once.
///
/// # Errors
/// A path that does not exist (left out and reported if `skip_bad`), a pattern that is malformed or matches nothing, a
/// directory without text.
pub fn expand<P: AsRef<Path>>(inputs: &[P], skip_bad: bool) -> Result<Sources, CorpusError> {
    let mut sources = Sources::default();
    let mut seen = HashSet::new();
    for input in inputs {
        let input = input.as_ref();
        let mut found = Vec::new();
        if input.is_dir() {
            walk(input, &mut found)?;
        } else if input.exists() {
            found.push(input.to_path_buf());
        } else if is_pattern(input) {
            expand_pattern(input, &mut found)?;
        } else if skip_bad {
            sources.skipped.push(BadInput {
                file: input.display().to_string(),
                line: None,
                problem: Problem::Missing,
            });
        } else {
            return Err(CorpusError::NoSuchInput(input.display().to_string()));
        }
        for path in found {
            let identity = path.canonicalize().map_err(CorpusError::read(&path))?;
            if seen.insert(identity) {
                sources
                    .files
                    .push(SourceFile::new(path.to_string_lossy().into_owned(), path));
            }
        }
    }
    Ok(sources)
}

fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

fn expand_pattern(input: &Path, found: &mut Vec<PathBuf>) -> Result<(), CorpusError> {
    let pattern = input.to_string_lossy();
    let options = glob::MatchOptions {
        require_literal_leading_dot: true,
        require_literal_separator: true,
        case_sensitive: true,
    };
    let matches = glob::glob_with(&pattern, options).map_err(|error| CorpusError::BadPattern {
        pattern: pattern.to_string(),
        reason: error.msg.to_string(),
    })?;
    let before = found.len();
    for entry in matches {
        let path = entry.map_err(|error| CorpusError::Read {
            path: error.path().to_path_buf(),
            source: error.into(),
        })?;
        if path.is_dir() {
            walk(&path, found)?;
        } else {
            found.push(path);
        }
    }
    if found.len() == before {
        return Err(CorpusError::NoSuchInput(pattern.to_string()));
    }
    Ok(())
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<(), CorpusError> {
    let before = found.len();
    let walker = walkdir::WalkDir::new(directory)
        .follow_links(true)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|entry| {
            entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
        });
    for entry in walker {
        let entry = entry.map_err(|error| CorpusError::Read {
            path: error.path().unwrap_or(directory).to_path_buf(),
            source: error.into(),
        })?;
        if entry.file_type().is_file() && is_text_name(&entry.file_name().to_string_lossy()) {
            found.push(entry.into_path());
        }
    }
    if found.len() == before {
        return Err(CorpusError::NoTextInDirectory(
            directory.display().to_string(),
        ));
    }
    Ok(())
}

/// Whether a file of that name is taken from a directory: it has one of [`TEXT_EXTENSIONS`], packed or not.
pub fn is_text_name(name: &str) -> bool {
    let lower = name.to_lowercase();
    let stem = lower
        .strip_suffix(".gz")
        .or_else(|| lower.strip_suffix(".zst"))
        .unwrap_or(&lower);
    extension(stem).is_some_and(|ext| TEXT_EXTENSIONS.contains(&ext))
}

fn extension(name: &str) -> Option<&str> {
    let file = name.rsplit(['/', '\\']).next()?;
    file.rsplit_once('.').map(|(_, ext)| ext)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temporary directory");
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().expect("parent")).expect("create");
            std::fs::write(path, "x").expect("write");
        }
        dir
    }

    fn names(sources: &Sources, root: &Path) -> Vec<String> {
        sources
            .files
            .iter()
            .map(|f| {
                f.path
                    .strip_prefix(root)
                    .expect("below root")
                    .display()
                    .to_string()
            })
            .collect()
    }

    #[test]
    fn kinds_follow_the_name_and_not_the_path() {
        let file = SourceFile::new("data/a.JSONL.gz", "/store/0123");
        assert_eq!(
            (file.kind, file.compression),
            (SourceKind::Jsonl, Compression::Gzip)
        );
        let file = SourceFile::new("notes.zst", "x");
        assert_eq!(
            (file.kind, file.compression),
            (SourceKind::Text, Compression::Zstd)
        );
    }

    #[test]
    fn directories_are_sorted_and_leave_out_hidden_and_unknown_files() {
        let dir = tree(&[
            "b.txt",
            "a/z.md",
            "a/c.rs.gz",
            "a/.hidden.txt",
            ".git/x.txt",
            "p.png",
            "LICENSE",
        ]);
        let sources = expand(&[dir.path()], false).expect("expand");
        assert_eq!(
            names(&sources, dir.path()),
            ["a/c.rs.gz", "a/z.md", "b.txt"]
        );
    }

    #[test]
    fn patterns_and_files_keep_the_given_order_and_count_once() {
        let dir = tree(&["1.txt", "2.txt", "n/3.txt", "odd.xyz"]);
        let inputs = [
            dir.path().join("odd.xyz"),
            dir.path().join("*.txt"),
            dir.path().to_path_buf(),
        ];
        let sources = expand(&inputs, false).expect("expand");
        assert_eq!(
            names(&sources, dir.path()),
            ["odd.xyz", "1.txt", "2.txt", "n/3.txt"]
        );
    }

    #[test]
    fn what_names_nothing_is_an_error_or_is_reported() {
        let dir = tree(&["pictures/1.png"]);
        let missing = dir.path().join("no.txt");
        assert!(matches!(
            expand(&[&missing], false),
            Err(CorpusError::NoSuchInput(_))
        ));
        assert_eq!(
            expand(&[&missing], true).expect("expand").skipped[0].problem,
            Problem::Missing
        );
        assert!(matches!(
            expand(&[dir.path().join("*.txt")], false),
            Err(CorpusError::NoSuchInput(_))
        ));
        let error = expand(&[dir.path()], false).expect_err("no text");
        assert!(
            error
                .to_string()
                .contains("holds no text files (taken are: txt,"),
            "{error}"
        );
        assert!(matches!(
            expand(&[dir.path().join("a[.txt")], false),
            Err(CorpusError::BadPattern { .. })
        ));
    }
}
