//! From paths on the command line to a corpus at the coordinator: checks them early, sends what has to be sent, and shows
//! how the preparation goes.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use cohort_common::api::{CorpusInfo, PrepareCorpus, PrepareEvent, SourceRef, TokenizerRef};
use cohort_common::corpus::{
    self, BadInput, CorpusError, Event, MANIFEST, Problem, ReadOptions, Sources, Split,
    SupervisedConfig, Tokenizer, expand, read_documents, samples,
};
use cohort_common::spec::{
    CorpusFacts, CorpusOptions, MixedOptions, MixtureConfig, MixtureOptions, TokenizerChoice,
};
use cohort_objects::{Location, is_location};

use crate::client::Client;
use crate::facts;
use crate::follow::Bar;
use crate::output::Output;
use crate::uploads;

/// Before a path on the coordinator's machine.
pub const REMOTE: &str = "coordinator:";
/// Bytes of each file that are looked at before anything is started.
const LOOKED_AT: u64 = 1 << 20;

/// A file of this machine that stays with others on one side of the split.
#[derive(Clone, Debug)]
pub struct GroupedFile {
    /// Its name in messages.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// What it stays with.
    pub group: String,
}

/// Where text for a corpus is.
pub struct Text {
    inputs: Vec<Input>,
    /// What was left out, as `--skip-bad` allows.
    skipped: Vec<BadInput>,
}

enum Input {
    /// A path as the coordinator sees it.
    Remote(String),
    /// What the coordinator fetches.
    Url(String),
    /// A path here, and the files it stands for.
    Local(PathBuf, Sources),
    /// Files here, each with a group.
    Grouped(Vec<GroupedFile>),
}

impl Text {
    /// Understands paths. What is missing, empty, binary or of another encoding is an error now, before any process is
    /// started. A file that several paths stand for is taken once.
    pub fn find(options: &CorpusOptions) -> Result<Self> {
        options.require_paths()?;
        let mut seen = HashSet::new();
        let mut text = Self {
            inputs: Vec::new(),
            skipped: Vec::new(),
        };
        for path in &options.paths {
            if let Some(remote) = path.strip_prefix(REMOTE) {
                text.inputs.push(Input::Remote(remote.into()));
                continue;
            }
            if is_location(path) {
                Location::parse(path)?;
                text.inputs.push(Input::Url(path.clone()));
                continue;
            }
            let absolute = absolute(path).with_context(|| format!("`{path}` is no path"))?;
            let mut sources = expand(&[path], options.skip_bad)?;
            if !options.skip_bad {
                look_at(&sources, options)?;
            }
            sources.leave_out(&mut seen);
            text.skipped.append(&mut sources.skipped);
            text.inputs.push(Input::Local(absolute, sources));
        }
        Ok(text)
    }

    /// Files in groups.
    pub fn grouped(files: Vec<GroupedFile>) -> Self {
        Self {
            inputs: vec![Input::Grouped(files)],
            skipped: Vec::new(),
        }
    }

    /// Makes the text known to the coordinator, and sends it if it lies on another machine.
    async fn sources(&self, client: &Client, out: Output) -> Result<Vec<SourceRef>> {
        let mut refs = Vec::new();
        for input in &self.inputs {
            match input {
                Input::Remote(path) => refs.push(SourceRef::Paths(vec![path.clone()])),
                Input::Url(url) => refs.push(SourceRef::Url(url.clone())),
                Input::Local(path, _) if client.same_home() => {
                    refs.push(SourceRef::Paths(vec![path_text(path)?]));
                }
                // All that it stands for is there by other paths, or was left out.
                Input::Local(_, sources) if sources.files.is_empty() => {}
                Input::Local(_, sources) => {
                    let files = sources.files.iter();
                    let files = files.map(|file| (file.name.clone(), file.path.clone(), None));
                    refs.extend(upload(client, files.collect(), out).await?);
                }
                Input::Grouped(files) if client.same_home() => {
                    for file in files {
                        refs.push(SourceRef::Grouped {
                            name: file.name.clone(),
                            path: path_text(&file.path)?,
                            group: file.group.clone(),
                        });
                    }
                }
                Input::Grouped(files) => {
                    let files = files.iter().cloned();
                    let files = files.map(|file| (file.name, file.path, Some(file.group)));
                    refs.extend(upload(client, files.collect(), out).await?);
                }
            }
        }
        Ok(refs)
    }
}

/// The same path or manifest, wherever it is looked at from.
fn absolute(path: &str) -> std::io::Result<PathBuf> {
    let Some(manifest) = path.strip_prefix(MANIFEST) else {
        return std::path::absolute(path);
    };
    let mut named = OsString::from(MANIFEST.to_string());
    named.push(std::path::absolute(manifest)?);
    Ok(named.into())
}

/// What a corpus is to be made of.
pub struct Material {
    /// For people.
    pub name: String,
    /// How the text is read and split.
    pub options: CorpusOptions,
    /// The text.
    pub text: Text,
}

impl Material {
    /// Understands what a spec says about its text. See [`Text::find`].
    pub fn find(options: &CorpusOptions) -> Result<Self> {
        Ok(Self {
            name: name_of(&options.paths),
            text: Text::find(options)?,
            options: options.clone(),
        })
    }

    /// How lines become samples of at most `row` tokens, where the spec has an objective for them; conversations in that
    /// template.
    pub fn supervised(&self, row: usize, template: Option<String>) -> Option<SupervisedConfig> {
        let supervised = self.options.supervised.as_ref();
        supervised.map(|options| options.config(row, template))
    }

    /// Has the coordinator prepare it, or find that it is there already.
    pub async fn prepare(
        &self,
        tokenizer: TokenizerRef,
        supervised: Option<SupervisedConfig>,
        client: &mut Client,
        out: Output,
    ) -> Result<CorpusInfo> {
        for bad in &self.text.skipped {
            out.say(format!("skipped: {bad}"));
        }
        let request = PrepareCorpus {
            name: self.name.clone(),
            sources: self.text.sources(client, out).await?,
            text_field: self.options.text_field.clone(),
            validation: self.options.validation,
            split: self.options.split.to_string(),
            skip_bad: self.options.skip_bad,
            tokenizer,
            supervised,
            selection: self.options.selection.clone(),
        };
        let mut events = client.prepare_corpus(&request).await?;
        let mut shown: Option<(String, Bar)> = None;
        while let Some(event) = events.next_of_preparation().await? {
            match event {
                PrepareEvent::Progress { stage, done, total } => {
                    if shown.as_ref().is_none_or(|(name, _)| *name != stage) {
                        if let Some((_, bar)) = shown.take() {
                            bar.clear();
                        }
                        shown = Some((stage.clone(), Bar::bytes(&stage, total)));
                    }
                    if let Some((_, bar)) = &shown {
                        bar.set(done, total);
                    }
                }
                PrepareEvent::Done(corpus) => {
                    if let Some((_, bar)) = shown.take() {
                        bar.clear();
                    }
                    out.say(facts::corpus(&corpus));
                    return Ok(*corpus);
                }
            }
        }
        Err(anyhow!(
            "the coordinator ended the preparation without a result; see its log"
        ))
    }
}

/// The corpora that are mixed with a run's own, each read like it.
pub struct Mixed {
    options: MixtureOptions,
    materials: Vec<Material>,
}

impl Mixed {
    /// Understands what a spec says of them. See [`Text::find`].
    pub fn find(meant: Option<&MixtureOptions>, own: &CorpusOptions) -> Result<Option<Self>> {
        let Some(options) = meant else {
            return Ok(None);
        };
        let material = |mixed: &MixedOptions| {
            let options = CorpusOptions {
                paths: mixed.paths.clone(),
                ..own.clone()
            };
            Ok(Material {
                name: mixed.name.clone(),
                ..Material::find(&options)?
            })
        };
        let materials = options.corpora.iter().map(material);
        Ok(Some(Self {
            options: options.clone(),
            materials: materials.collect::<Result<_>>()?,
        }))
    }

    /// Has the coordinator prepare them with the tokenizer of the run's own corpus; gives what the run is told.
    pub async fn prepare(
        &self,
        own: &CorpusInfo,
        supervised: Option<&SupervisedConfig>,
        client: &mut Client,
        out: Output,
    ) -> Result<MixtureConfig> {
        let tokenizer = TokenizerRef::Corpus(own.fingerprint.clone());
        let mut fingerprints = Vec::new();
        let mut tokens = vec![own.train.tokens];
        for material in &self.materials {
            let corpus = material
                .prepare(tokenizer.clone(), supervised.cloned(), client, out)
                .await?;
            tokens.push(corpus.train.tokens);
            fingerprints.push(corpus.fingerprint);
        }
        Ok(self.options.resolve(fingerprints, &tokens))
    }
}

/// A name for people: that of the first path.
pub fn name_of(paths: &[String]) -> String {
    corpus::name_of(paths.first().map_or("corpus", String::as_str))
}

/// Reads and checks a tokenizer that is given, so that a bad one is an error early.
pub fn tokenizer(choice: &TokenizerChoice) -> Result<TokenizerRef> {
    Ok(match choice {
        TokenizerChoice::Bpe { vocab_size } => TokenizerRef::Bpe {
            vocab_size: u32::try_from(*vocab_size)?,
        },
        TokenizerChoice::Char => TokenizerRef::Char,
        TokenizerChoice::File { path } => {
            let json = std::fs::read(path)
                .with_context(|| format!("cannot read the tokenizer `{path}`"))?;
            let tokenizer = Tokenizer::from_json(&json, None)
                .with_context(|| format!("`{path}` cannot be used"))?;
            TokenizerRef::Json(tokenizer.to_json().into())
        }
        TokenizerChoice::Inherited => {
            return Err(anyhow!("only a finetuning run inherits its tokenizer"));
        }
    })
}

/// What a spec needs to know of a corpus.
pub fn facts_of(corpus: &CorpusInfo) -> CorpusFacts {
    let supervised = corpus.supervised.as_ref();
    CorpusFacts {
        vocab_size: corpus.vocab_size,
        fingerprint: corpus.fingerprint.clone(),
        labels: supervised.map_or(Vec::new(), |s| s.labels.clone()),
    }
}

/// An error where the corpus has not even one sample of that context.
pub fn check_length(corpus: &CorpusInfo, context: usize) -> Result<()> {
    if corpus.supervised.is_some() {
        return Ok(());
    }
    samples(Split::Train, corpus.train.tokens, context)?;
    Ok(())
}

/// Reads the beginning of each file.
fn look_at(sources: &Sources, options: &CorpusOptions) -> Result<()> {
    let supervised = options.supervised.as_ref();
    let options = ReadOptions {
        text_field: options.text_field.clone(),
        max_file_bytes: None,
        // The length of a sample does not matter yet.
        supervised: supervised.map(|supervised| supervised.config(usize::MAX, None)),
    };
    for file in &sources.files {
        let enough = || CorpusError::Unknown(String::new());
        let mut left = LOOKED_AT;
        let mut stopped = false;
        let read = read_documents(file, &options, &|_| {}, &mut |event| match event {
            Event::Bad(bad) => Err(CorpusError::BadInput(bad)),
            Event::Text(text) => {
                left = left.saturating_sub(text.len() as u64);
                stopped = left == 0;
                if stopped { Err(enough()) } else { Ok(()) }
            }
            Event::Start(_) | Event::End => Ok(()),
        });
        if let Err(error) = read
            && !stopped
        {
            return Err(error.into());
        }
    }
    if sources.files.is_empty() {
        let nothing = BadInput {
            file: "corpus".into(),
            place: None,
            problem: Problem::Empty,
        };
        return Err(CorpusError::BadInput(nothing).into());
    }
    Ok(())
}

async fn upload(
    client: &Client,
    files: Vec<(String, PathBuf, Option<String>)>,
    out: Output,
) -> Result<Vec<SourceRef>> {
    let groups: Vec<_> = files.iter().map(|(_, _, group)| group.clone()).collect();
    let files = files
        .into_iter()
        .map(|(name, path, _)| (name, path))
        .collect();
    let uploads = uploads::hash(files).await?;
    let sent = uploads::send(client, &uploads).await?;
    let count = uploads.len();
    out.say(match sent {
        0 => format!("sent        nothing: the coordinator has all {count} files"),
        _ => format!(
            "sent        {} of text",
            cohort_common::spec::human_bytes(sent)
        ),
    });
    let as_ref = |(upload, group): (uploads::Upload, Option<String>)| SourceRef::Uploaded {
        name: upload.name,
        hash: upload.hash,
        group,
    };
    Ok(uploads.into_iter().zip(groups).map(as_ref).collect())
}

fn path_text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        anyhow!(
            "`{}` is no Unicode, and cannot be told to the coordinator",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use cohort_common::corpus::Selection;
    use cohort_common::spec::SplitKind;

    use super::*;

    #[test]
    fn a_file_that_two_paths_name_is_taken_once() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| format!("{}/{name}", folder.path().display());
        for name in ["a.txt", "b.txt"] {
            std::fs::write(path(name), "some text").expect("write");
        }
        let options = CorpusOptions {
            paths: vec![path("b.txt"), path(""), path("a.txt")],
            text_field: "text".into(),
            validation: 0.1,
            split: SplitKind::Auto,
            skip_bad: false,
            supervised: None,
            selection: Selection::default(),
        };
        let text = Text::find(&options).expect("text");
        let files = text.inputs.iter().map(|input| match input {
            Input::Local(_, sources) => sources.files.len(),
            _ => panic!("a path of this machine"),
        });
        assert_eq!(files.collect::<Vec<_>>(), [1, 1, 0]);
    }
}
