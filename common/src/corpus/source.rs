//! Which files a corpus is made of: paths, directories, patterns and manifests become a list of source files in a fixed
//! order.
//!
//! The kind of a file follows from its display name, not from where its bytes lie, so that uploaded content can be read
//! from a content store under the name it had. Nothing here looks into a file but into manifests; `text.rs` does.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::{BadInput, CorpusError, Problem};

/// File name extensions that are taken from directories. A file that is named itself, or matched by a pattern, may have
/// any extension.
pub const TEXT_EXTENSIONS: &[&str] = &[
    "txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "jsonl", "csv", "tsv", "parquet",
    "arrow", "warc", "wet", "rs", "py", "c", "h", "cc", "cpp", "cxx", "hpp", "cu", "cuh", "go",
    "java", "kt", "scala", "swift", "js", "mjs", "jsx", "ts", "tsx", "rb", "php", "pl", "lua",
    "jl", "r", "hs", "ml", "ex", "erl", "clj", "lisp", "zig", "cs", "fs", "sh", "bash", "sql",
    "html", "css", "toml", "yaml", "yml", "proto",
];

/// How a file is cut into documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// The whole file is one document.
    Text,
    /// Each line is a JSON object with a text field: one document per line.
    Jsonl,
    /// JSON objects in an array, or one after another: one document per object.
    Json,
    /// A table whose cells are parted by commas: one document per row.
    Csv,
    /// A table whose cells are parted by tabs.
    Tsv,
    /// A table in Apache Parquet's format.
    Parquet,
    /// A table in Apache Arrow's format, as file or as stream.
    Arrow,
    /// An archive of the web: one document per record of text.
    Warc,
    /// Several files in one, which is refused.
    Archive,
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
    /// bzip2, possibly of several streams.
    Bzip2,
    /// xz, possibly of several streams.
    Xz,
}

/// What the end of a name says of how the file is packed.
const PACKINGS: &[(&str, Compression)] = &[
    (".gz", Compression::Gzip),
    (".zst", Compression::Zstd),
    (".bz2", Compression::Bzip2),
    (".xz", Compression::Xz),
];

impl SourceKind {
    fn of(extension: Option<&str>) -> Self {
        match extension {
            Some("jsonl") => Self::Jsonl,
            Some("json") => Self::Json,
            Some("csv") => Self::Csv,
            Some("tsv") => Self::Tsv,
            Some("parquet") => Self::Parquet,
            Some("arrow" | "feather" | "ipc") => Self::Arrow,
            Some("warc" | "wet") => Self::Warc,
            Some("zip" | "tar" | "tgz" | "7z" | "rar") => Self::Archive,
            _ => Self::Text,
        }
    }
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
    /// A file whose bytes lie at `path` and whose kind follows from `name`: what is of no known kind is text; `.gz`,
    /// `.zst`, `.bz2` and `.xz` are unpacked.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let name = name.into();
        let lower = name.to_lowercase();
        let (stem, compression) = unpacked_name(&lower);
        let kind = SourceKind::of(extension(stem));
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

impl Sources {
    /// Leaves out the files that are among `seen`, by whatever path, and adds the others to them.
    pub fn leave_out(&mut self, seen: &mut HashSet<PathBuf>) {
        self.files.retain(|file| match file.path.canonicalize() {
            Ok(identity) => seen.insert(identity),
            // Whoever reads it finds out why it cannot be.
            Err(_) => true,
        });
    }
}

impl From<Vec<SourceFile>> for Sources {
    fn from(files: Vec<SourceFile>) -> Self {
        Self {
            files,
            skipped: Vec::new(),
        }
    }
}

/// Before the path of a manifest: a file that names others, one path or pattern a line.
pub const MANIFEST: char = '@';

/// Bytes of a manifest.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// Turns files, directories, patterns and manifests into source files: the arguments in the order given, a directory's files
/// (those with one of [`TEXT_EXTENSIONS`], recursively, hidden ones left out) sorted by name, each file once.
///
/// A manifest is named with an `@` before its path. Its lines are paths or patterns, relative to where it lies; empty ones
/// and those that begin with `#` are left out.
///
/// # Errors
/// A path that does not exist (left out and reported if `skip_bad`), a pattern that is malformed or matches nothing, a
/// directory without text.
pub fn expand<P: AsRef<Path>>(inputs: &[P], skip_bad: bool) -> Result<Sources, CorpusError> {
    let mut expansion = Expansion {
        sources: Sources::default(),
        seen: HashSet::new(),
        skip_bad,
    };
    for input in inputs {
        let input = input.as_ref();
        match input.to_str().and_then(|path| path.strip_prefix(MANIFEST)) {
            Some(manifest) => expansion.manifest(Path::new(manifest))?,
            None => expansion.add(input, as_pattern(&input.to_string_lossy()))?,
        }
    }
    Ok(expansion.sources)
}

/// What was found so far.
struct Expansion {
    sources: Sources,
    seen: HashSet<PathBuf>,
    skip_bad: bool,
}

impl Expansion {
    /// Adds what a path stands for, or what fits its `pattern` where it has one and is no file itself.
    fn add(&mut self, path: &Path, pattern: Option<&str>) -> Result<(), CorpusError> {
        let mut found = Vec::new();
        if path.is_dir() {
            walk(path, &mut found)?;
        } else if path.exists() {
            found.push(path.to_path_buf());
        } else if let Some(pattern) = pattern {
            expand_pattern(pattern, &mut found)?;
        } else if self.skip_bad {
            self.skip(path, Problem::Missing);
        } else {
            return Err(CorpusError::NoSuchInput(path.display().to_string()));
        }
        for path in found {
            let identity = path.canonicalize().map_err(CorpusError::read(&path))?;
            if !identity.is_file() {
                match self.skip_bad {
                    true => self.skip(&path, Problem::NotAFile),
                    false => return Err(CorpusError::BadInput(bad(&path, Problem::NotAFile))),
                }
            } else if self.seen.insert(identity) {
                let name = path.to_string_lossy().into_owned();
                self.sources.files.push(SourceFile::new(name, path));
            }
        }
        Ok(())
    }

    fn skip(&mut self, path: &Path, problem: Problem) {
        self.sources.skipped.push(bad(path, problem));
    }

    fn manifest(&mut self, manifest: &Path) -> Result<(), CorpusError> {
        let folder = manifest.parent().unwrap_or(Path::new(""));
        for (number, line) in manifest_lines(manifest)? {
            let wrong = |reason: String| CorpusError::BadManifest {
                manifest: manifest.display().to_string(),
                line: number,
                reason,
            };
            if line.starts_with(MANIFEST) {
                return Err(wrong("names another manifest; name that one itself".into()));
            }
            // What the folder is called is no pattern.
            let within = folder.join("").to_string_lossy().into_owned();
            let pattern = as_pattern(&line).map(|line| match Path::new(line).is_absolute() {
                true => line.to_owned(),
                false => glob::Pattern::escape(&within) + line,
            });
            match self.add(&folder.join(&line), pattern.as_deref()) {
                Err(CorpusError::NoSuchInput(_)) => {
                    return Err(wrong(format!("has `{line}`, which names no file")));
                }
                added => added?,
            }
        }
        Ok(())
    }
}

/// `text`, if it has a character that makes it a pattern.
fn as_pattern(text: &str) -> Option<&str> {
    text.contains(['*', '?', '[']).then_some(text)
}

fn bad(path: &Path, problem: Problem) -> BadInput {
    BadInput {
        file: path.display().to_string(),
        place: None,
        problem,
    }
}

/// What a manifest names, each with the number of its line.
///
/// # Errors
/// A manifest that cannot be read, is no text, or is too large.
pub fn manifest_lines(manifest: &Path) -> Result<Vec<(usize, String)>, CorpusError> {
    let mut text = String::new();
    let file = File::open(manifest).map_err(CorpusError::read(manifest))?;
    let read = file.take(MAX_MANIFEST_BYTES + 1).read_to_string(&mut text);
    if read.map_err(CorpusError::read(manifest))? as u64 > MAX_MANIFEST_BYTES {
        let problem = Problem::TooLarge(MAX_MANIFEST_BYTES);
        return Err(CorpusError::BadInput(bad(manifest, problem)));
    }
    let lines = text.trim_start_matches('\u{feff}').lines().zip(1..);
    let lines = lines.map(|(line, number)| (number, line.trim().to_owned()));
    Ok(lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .collect())
}

fn expand_pattern(pattern: &str, found: &mut Vec<PathBuf>) -> Result<(), CorpusError> {
    let options = glob::MatchOptions {
        require_literal_leading_dot: true,
        require_literal_separator: true,
        case_sensitive: true,
    };
    let matches = glob::glob_with(pattern, options).map_err(|error| CorpusError::BadPattern {
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
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if is_beside_the_point(&error) => continue,
            Err(error) => {
                return Err(CorpusError::Read {
                    path: error.path().unwrap_or(directory).to_path_buf(),
                    source: error.into(),
                });
            }
        };
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

/// A link to a directory around it leads to nothing new; a link to nowhere matters only where its name is that of text.
fn is_beside_the_point(error: &walkdir::Error) -> bool {
    let missing = error.io_error().map(std::io::Error::kind) == Some(std::io::ErrorKind::NotFound);
    let name = error.path().and_then(Path::file_name);
    let is_text = name.is_some_and(|name| is_text_name(&name.to_string_lossy()));
    error.loop_ancestor().is_some() || (missing && !is_text)
}

/// Whether a file of that name is taken from a directory: it has one of [`TEXT_EXTENSIONS`], packed or not.
pub fn is_text_name(name: &str) -> bool {
    let lower = name.to_lowercase();
    let (stem, _) = unpacked_name(&lower);
    extension(stem).is_some_and(|ext| TEXT_EXTENSIONS.contains(&ext))
}

/// The name without what says how the file is packed.
fn unpacked_name(name: &str) -> (&str, Compression) {
    PACKINGS
        .iter()
        .find_map(|(end, packing)| Some((name.strip_suffix(end)?, *packing)))
        .unwrap_or((name, Compression::None))
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
        for (name, kind, compression) in [
            ("CC.warc.wet.gz", SourceKind::Warc, Compression::Gzip),
            ("t.CSV.bz2", SourceKind::Csv, Compression::Bzip2),
            ("t.tsv.xz", SourceKind::Tsv, Compression::Xz),
            ("t.parquet", SourceKind::Parquet, Compression::None),
            ("t.feather", SourceKind::Arrow, Compression::None),
            ("t.tar.gz", SourceKind::Archive, Compression::Gzip),
        ] {
            let file = SourceFile::new(name, "x");
            assert_eq!((file.kind, file.compression), (kind, compression), "{name}");
        }
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
    fn what_was_taken_is_left_out_by_whatever_path() {
        let dir = tree(&["1.txt", "2.txt", "n/3.txt"]);
        let mut seen = HashSet::new();
        let mut taken = |path: &str| {
            let mut sources = expand(&[dir.path().join(path)], false).expect("expand");
            sources.leave_out(&mut seen);
            names(&sources, dir.path())
        };
        assert_eq!(taken("1.txt"), ["1.txt"]);
        assert_eq!(taken("n/../1.txt"), [""; 0]);
        assert_eq!(taken(""), ["2.txt", "n/3.txt"]);
        assert_eq!(taken("n"), [""; 0]);
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

    #[test]
    fn manifests_name_files_and_patterns_relative_to_themselves() {
        let dir = tree(&["data/[a]/1.txt", "data/[a]/2.txt", "data/b/3.txt"]);
        let list = dir.path().join("data/[a]/list.txt");
        std::fs::write(
            &list,
            "\u{feff}# what we read\n\n ../b/3.txt\r\n[0-9].txt\n",
        )
        .expect("write");
        let named = |list: &Path| PathBuf::from(format!("@{}", list.display()));
        let sources = expand(&[named(&list)], false).expect("expand");
        assert_eq!(
            names(&sources, dir.path()),
            ["data/[a]/../b/3.txt", "data/[a]/1.txt", "data/[a]/2.txt"]
        );
        std::fs::write(&list, "1.txt\nno.txt\n").expect("write");
        let error = expand(&[named(&list)], false).expect_err("a line names nothing");
        let said = error.to_string();
        assert!(
            said.ends_with("list.txt` line 2 has `no.txt`, which names no file"),
            "{said}"
        );
        let sources = expand(&[named(&list)], true).expect("expand");
        assert_eq!((sources.files.len(), sources.skipped.len()), (1, 1));
        std::fs::write(&list, "@other.txt\n").expect("write");
        assert!(matches!(
            expand(&[named(&list)], false),
            Err(CorpusError::BadManifest { line: 1, .. })
        ));
        assert!(expand(&[named(&dir.path().join("no"))], true).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_nowhere_or_around_are_left_out_and_pipes_are_refused() {
        let dir = tree(&["a/1.txt"]);
        let link = |to: &str, name: &str| {
            std::os::unix::fs::symlink(to, dir.path().join(name)).expect("link");
        };
        link("..", "a/up");
        link("nowhere", "a/broken.png");
        link("1.txt", "a/again.txt");
        let sources = expand(&[dir.path()], false).expect("expand");
        assert_eq!(names(&sources, dir.path()), ["a/1.txt"]);
        link("nowhere", "a/broken.txt");
        assert!(matches!(
            expand(&[dir.path()], false),
            Err(CorpusError::Read { .. })
        ));
        let device = Path::new("/dev/null");
        assert!(matches!(
            expand(&[device], false),
            Err(CorpusError::BadInput(_))
        ));
        assert_eq!(expand(&[device], true).expect("expand").skipped.len(), 1);
    }
}
