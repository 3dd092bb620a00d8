//! `cohort preview`: samples as the model will see them, token by token, with what is learned marked, and what cannot be
//! used counted. It prepares the corpus as a run would, in a place that is forgotten afterwards.

use std::io::IsTerminal;

use anyhow::{Context as _, Result, bail};
use cohort_common::checkpoint::Checkpoint;
use cohort_common::corpus::{
    Corpus, Objective, PrepareRequest, Split, SplitConfig, SplitMethod, Tokenizer, TokenizerConfig,
    Window, expand, prepare,
};
use cohort_common::spec::{FinetuneBase, SpecMeant, SpecSource, SplitKind, TokenizerChoice};
use serde::Serialize;

use crate::cli::PreviewArgs;
use crate::commands::generate::tokenizer_of;
use crate::commands::pretrain::{read_spec, spec_file};
use crate::context::Context;
use crate::prepare::{self, REMOTE};
use crate::{facts, references};

/// Green, for what is learned.
const LEARNED: &str = "\x1b[32m";
/// Grey, for what is only read.
const READ: &str = "\x1b[2m";
/// Back to normal.
const PLAIN: &str = "\x1b[0m";

/// A stretch of a sample.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Stretch {
    /// Its text, special tokens spelled out; of a classifier's target, the label.
    text: String,
    /// Its tokens.
    tokens: usize,
    /// Whether it is learned.
    learned: bool,
    /// Whether it is a label.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    label: bool,
}

/// One line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    row: u64,
    sample: usize,
    stretches: &'a [Stretch],
}

/// Runs the verb.
pub async fn run(args: PreviewArgs) -> Result<()> {
    let out = args.json.output();
    let source = match &args.spec {
        Some(path) => read_spec(path)?,
        None => SpecSource::empty(),
    };
    let file = spec_file(source, &args.text)?;
    let context = Context::of(&args.connect)?;
    let (meant, tokenizer, template) = match &args.from {
        Some(from) => {
            let found = references::find(&context, from).await?;
            let checkpoint = found.open()?;
            let meant = file.finetune_from(&FinetuneBase {
                name: &found.name,
                model: checkpoint.model(),
                train: checkpoint.run().map(|run| &run.spec.train),
            })?;
            let tokenizer = of_checkpoint(&checkpoint)?;
            (meant, tokenizer, checkpoint.chat_template()?)
        }
        None => {
            let meant = file.validate()?;
            let tokenizer = of_spec(&meant.tokenizer)?;
            (meant, tokenizer, None)
        }
    };
    let temporary = tempfile::tempdir().context("cannot make a temporary directory")?;
    let directory = temporary.path().to_owned();
    let request = request(&meant, tokenizer, template, true)?;
    let prepared = tokio::task::spawn_blocking(move || prepare(&directory, &request, &|_| {}));
    let corpus = prepared.await??.corpus;
    let color = match args.color {
        Some(color) => color,
        None => std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let length = meant.sample_length();
    let reader = corpus.reader(Split::Train);
    let rows = reader.samples(length)?.min(args.samples);
    let tokenizer = corpus.tokenizer()?;
    for row in 0..rows {
        let window = reader.sample(row, length)?;
        for (number, stretches) in samples(&corpus, &tokenizer, &window)?.iter().enumerate() {
            match out.json {
                true => out.line(&Line {
                    row,
                    sample: number,
                    stretches,
                })?,
                false => {
                    out.say(format!("--- row {row}, sample {number} ---"));
                    out.say(shown(stretches, color));
                }
            }
        }
    }
    out.say(summary(&corpus, color));
    Ok(())
}

/// The tokenizer of a checkpoint, as a run from it would ask for it.
pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<TokenizerConfig> {
    let tokenizer = tokenizer_of(checkpoint)?;
    Ok(TokenizerConfig::File {
        json: tokenizer.to_json().into(),
        eos: tokenizer.spelling(tokenizer.eos()),
    })
}

/// The tokenizer that a spec asks for.
pub fn of_spec(choice: &TokenizerChoice) -> Result<TokenizerConfig> {
    Ok(match choice {
        TokenizerChoice::Bpe { vocab_size } => TokenizerConfig::Bpe {
            vocab_size: u32::try_from(*vocab_size)?,
        },
        TokenizerChoice::Char => TokenizerConfig::Char,
        TokenizerChoice::File { path } => TokenizerConfig::from_file(path.as_ref(), None)?,
        TokenizerChoice::Inherited => {
            bail!("`--from` is missing: a checkpoint's tokenizer is meant")
        }
    })
}

/// The corpus that a run would ask for, of files of this machine. With `skip_bad` what is bad is counted.
pub fn request(
    meant: &SpecMeant,
    tokenizer: TokenizerConfig,
    template: Option<String>,
    skip_bad: bool,
) -> Result<PrepareRequest> {
    let options = &meant.corpus;
    options.require_paths()?;
    if let Some(remote) = options.paths.iter().find(|path| path.starts_with(REMOTE)) {
        bail!("`{remote}` lies on the coordinator's machine; this verb reads files of this one");
    }
    let sources = expand(&options.paths, skip_bad)?;
    let supervised = options.supervised.as_ref();
    Ok(PrepareRequest {
        split: SplitConfig {
            method: match options.split {
                SplitKind::Auto => SplitMethod::Auto,
                SplitKind::Document => SplitMethod::Document,
                SplitKind::Tail => SplitMethod::Tail,
            },
            fraction: options.validation,
        },
        text_field: options.text_field.clone(),
        skip_bad,
        supervised: supervised.map(|options| options.config(meant.sample_length(), template)),
        selection: options.selection.clone(),
        ..PrepareRequest::new(prepare::name_of(&options.paths), sources, tokenizer)
    })
}

/// The samples of a row, each in stretches of one kind.
fn samples(corpus: &Corpus, tokenizer: &Tokenizer, window: &Window) -> Result<Vec<Vec<Stretch>>> {
    let supervised = corpus.index().supervised.as_ref();
    let classifies = supervised.is_some_and(|s| s.objective == Objective::Classify);
    let mut ends: Vec<usize> = (1..window.inputs.len())
        .filter(|&at| {
            window
                .starts
                .get(at)
                .is_some_and(|&start| start as usize == at)
        })
        .collect();
    ends.push(window.inputs.len());
    let mut begin = 0;
    let mut all = Vec::new();
    for end in ends {
        let learned = |at: usize| at > begin && window.weights[at - 1] > 0.0;
        let row = end;
        let mut end = end;
        // What fills a row up belongs to nobody.
        let fills = |at: usize| window.inputs[at] == tokenizer.eos() && !learned(at);
        while supervised.is_some() && end > begin + 1 && fills(end - 1) {
            end -= 1;
        }
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut from = begin;
        while from < end {
            let kind = learned(from);
            let to = (from..end).find(|&at| learned(at) != kind).unwrap_or(end);
            let label = classifies && kind;
            let text = match (label, supervised) {
                (true, Some(supervised)) => {
                    let number = window.targets[from - 1] as usize;
                    supervised.labels.get(number).cloned().unwrap_or_default()
                }
                _ => tokenizer.decode_with_special(&window.inputs[from..to])?,
            };
            stretches.push(Stretch {
                text,
                tokens: to - from,
                learned: kind,
                label,
            });
            from = to;
        }
        begin = row;
        all.push(stretches);
    }
    Ok(all)
}

/// A sample for people: what is learned is green, or stands in brackets.
fn shown(stretches: &[Stretch], color: bool) -> String {
    let one = |stretch: &Stretch| {
        let text = match stretch.label {
            true => format!(" -> {}", stretch.text),
            false => stretch.text.clone(),
        };
        match (color, stretch.learned) {
            (true, true) => format!("{LEARNED}{text}{PLAIN}"),
            (true, false) => format!("{READ}{text}{PLAIN}"),
            (false, true) => format!("[[{text}]]"),
            (false, false) => text,
        }
    };
    stretches.iter().map(one).collect()
}

fn summary(corpus: &Corpus, color: bool) -> String {
    let index = corpus.index();
    let mut text = match color {
        true => format!("\n{LEARNED}learned{PLAIN} {READ}read only{PLAIN}\n"),
        false => "\n[[learned]] read only\n".to_owned(),
    };
    match &index.supervised {
        Some(supervised) => text += &facts::samples(supervised).join("\n"),
        None => {
            for split in Split::ALL {
                let side = index.split(split);
                text += &format!(
                    "  {split:<11} {} documents, {} tokens\n",
                    side.documents, side.tokens
                );
            }
        }
    }
    let skipped = &index.skipped;
    if skipped.count > 0 {
        text += &format!(
            "\n  unusable    {}, which a run stops at unless `--skip-bad` leaves them out:",
            skipped.count
        );
        for bad in skipped.first.iter().take(facts::SKIPPED_SHOWN) {
            text += &format!("\n    {bad}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_learned_stands_out() {
        let stretch = |text: &str, learned, label| Stretch {
            text: text.into(),
            tokens: 1,
            learned,
            label,
        };
        let chat = [
            stretch("2 + 2?\n", false, false),
            stretch("4<eos>", true, false),
        ];
        assert_eq!(shown(&chat, false), "2 + 2?\n[[4<eos>]]");
        assert_eq!(
            shown(&chat, true),
            "\x1b[2m2 + 2?\n\x1b[0m\x1b[32m4<eos>\x1b[0m"
        );
        let labelled = [stretch("free!", false, false), stretch("spam", true, true)];
        assert_eq!(shown(&labelled, false), "free![[ -> spam]]");
    }
}
