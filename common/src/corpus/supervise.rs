//! From lines of JSON to rows of tokens: what the model is to learn is marked token by token. **No I/O but the writer's.**
//!
//! A prompt with its response is tokenized span by span, so that the tokens before an answer are exactly those that a
//! prompt gives when the model is used. A text that is classified is followed by one more place, which holds the number
//! of its label: the target of the text's last token, where Hugging Face's classifiers read their score.

use std::path::Path;

use rayon::prelude::*;

use super::encode::Routed;
use super::error::{BadInput, CorpusError, Place, Problem};
use super::index::{SampleCounts, SkippedSummary, SplitIndex, Supervised};
use super::objective::{Objective, SupervisedConfig, TooLong};
use super::rows::{Packer, Sample};
use super::shard::ShardWriter;
use super::split::Split;
use super::tally::Tally;
use super::tokenizer::Tokenizer;
use crate::supervised::{ChatTemplate, Message, Record, Span, SpecialTexts, pair_spans};

/// Lines that are tokenized at a time, for each thread of rayon's current pool.
const LINES_PER_THREAD: usize = 256;

/// Most labels of a classification: a table of what each was taken for must fit into a message.
pub const MAX_LABELS: usize = 512;

/// The chat template of a model that has seen prompts and responses alone, as [`pair_spans`] puts them together.
const PAIR_TEMPLATE: &str = "{%- for message in messages -%}\
    {{- message.content -}}\
    {%- if message.role == 'assistant' -%}{{- eos_token -}}\
    {%- elif message.content and message.content.rstrip() == message.content -%}{{- '\\n' -}}{%- endif -%}\
    {%- endfor -%}";

/// Labels that an error lists.
const LISTED_LABELS: usize = 12;

/// Turns one line into a sample.
pub struct Sampler<'a> {
    config: &'a SupervisedConfig,
    tokenizer: &'a Tokenizer,
    template: ChatTemplate,
    eos: String,
}

/// A sample that fits into a row, and what there is to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its tokens.
    pub sample: Sample,
    /// Bytes of text that are learned.
    pub trained_bytes: u64,
    /// Whether it was cut.
    pub truncated: bool,
    /// Whether it is a conversation, which a template has rendered.
    pub conversation: bool,
}

impl<'a> Sampler<'a> {
    /// For lines of that kind.
    ///
    /// # Errors
    /// A chat template that does not parse.
    pub fn new(
        config: &'a SupervisedConfig,
        tokenizer: &'a Tokenizer,
    ) -> Result<Self, CorpusError> {
        let spelled = |id: u32| tokenizer.spelling(id);
        let specials = SpecialTexts {
            bos: tokenizer.bos().and_then(spelled),
            eos: spelled(tokenizer.eos()),
            ..SpecialTexts::default()
        };
        let template = match &config.template {
            None => ChatTemplate::default_for(&specials),
            Some(source) => ChatTemplate::parse(source, &specials)
                .map_err(|error| CorpusError::Template(error.to_string()))?,
        };
        Ok(Self {
            config,
            tokenizer,
            template,
            eos: specials.eos.unwrap_or_default(),
        })
    }

    /// The sample of a line; `None` where it is too long and such samples are dropped.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn encode(&self, line: &str, labels: &[String]) -> Result<Option<Encoded>, Problem> {
        let record = self.record(line)?;
        let mut encoded = match &record {
            Record::Conversation(messages) => self.conversation(messages)?,
            Record::Pair { prompt, response } => {
                let spans = pair_spans(prompt, response, &self.eos);
                self.plain([prompt, response])?;
                self.spans(&spans, true)?
            }
            Record::Labelled { text, label } => return self.labelled(text, label, labels),
        };
        let (tokens, row) = (encoded.sample.tokens.len(), self.config.row);
        if tokens > row {
            match self.config.too_long {
                TooLong::Error => return Err(Problem::TooLong { tokens, row }),
                TooLong::Drop => return Ok(None),
                TooLong::Truncate => {
                    encoded.sample.tokens.truncate(row);
                    encoded.sample.trained.truncate(row);
                    encoded.truncated = true;
                }
            }
        }
        // Nothing comes before the first token that could predict it.
        match encoded.sample.trained[1..].contains(&true) {
            true => Ok(Some(encoded)),
            false if encoded.truncated => Err(Problem::NothingTrained(
                " once it is cut to a row; raise the context or drop it",
            )),
            false => Err(Problem::NothingTrained("")),
        }
    }

    /// What a line says.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn record(&self, line: &str) -> Result<Record, Problem> {
        let record = self.config.record(line);
        record.map_err(|error| Problem::Record(error.to_string()))
    }

    fn conversation(&self, messages: &[Message]) -> Result<Encoded, Problem> {
        self.plain(messages.iter().map(|message| &message.content))?;
        let spans = self.template.spans(messages);
        let spans = spans.map_err(|error| Problem::Record(error.to_string()))?;
        Ok(Encoded {
            conversation: true,
            ..self.spans(&spans, false)?
        })
    }

    /// What a user or a model writes is text and no mark-up.
    fn plain<'b>(&self, texts: impl IntoIterator<Item = &'b String>) -> Result<(), Problem> {
        let mut special = texts
            .into_iter()
            .filter_map(|text| self.tokenizer.first_special(text));
        match special.next() {
            Some((_, token, _)) => Err(Problem::SpecialInText(token.to_owned())),
            None => Ok(()),
        }
    }

    fn spans(&self, spans: &[Span], begins: bool) -> Result<Encoded, Problem> {
        let mut sample = Sample::default();
        if let Some(bos) = self.tokenizer.bos().filter(|_| begins) {
            sample.tokens.push(bos);
        }
        let mut trained_bytes = 0;
        for span in spans {
            let tokens = self.tokenizer.encode_with_special(&span.text);
            sample.trained.resize(sample.tokens.len(), false);
            sample
                .tokens
                .extend(tokens.map_err(|error| Problem::Untokenizable(error.to_string()))?);
            sample.trained.resize(sample.tokens.len(), span.trained);
            if span.trained {
                trained_bytes += span.text.len() as u64;
            }
        }
        Ok(Encoded {
            sample,
            trained_bytes,
            truncated: false,
            conversation: false,
        })
    }

    fn labelled(
        &self,
        text: &str,
        label: &str,
        labels: &[String],
    ) -> Result<Option<Encoded>, Problem> {
        let Some(number) = labels.iter().position(|known| known == label) else {
            return Err(Problem::UnknownLabel {
                label: label.to_owned(),
                known: listed(labels),
            });
        };
        self.plain([&text.to_owned()])?;
        let row = self.config.row;
        let mut tokens: Vec<u32> = self.tokenizer.bos().into_iter().collect();
        let encoded = self.tokenizer.encode(text);
        tokens.extend(encoded.map_err(|error| Problem::Untokenizable(error.to_string()))?);
        let mut truncated = false;
        if tokens.len() + 1 > row {
            let tokens_needed = tokens.len() + 1;
            match self.config.too_long {
                TooLong::Error => {
                    return Err(Problem::TooLong {
                        tokens: tokens_needed,
                        row,
                    });
                }
                TooLong::Drop => return Ok(None),
                TooLong::Truncate => tokens.truncate(row - 1),
            }
            truncated = true;
        }
        if tokens.is_empty() {
            return Err(Problem::NothingTrained(
                ": a row has no room for a text and its label",
            ));
        }
        let mut trained = vec![false; tokens.len()];
        tokens.push(number as u32);
        trained.push(true);
        Ok(Some(Encoded {
            sample: Sample { tokens, trained },
            trained_bytes: 0,
            truncated,
            conversation: false,
        }))
    }
}

fn listed(labels: &[String]) -> String {
    let shown = labels.iter().take(LISTED_LABELS);
    let mut names: Vec<String> = shown.map(|label| format!("`{label}`")).collect();
    if labels.len() > LISTED_LABELS {
        names.push(format!("and {} more", labels.len() - LISTED_LABELS));
    }
    names.join(", ")
}

struct Line {
    side: usize,
    file: usize,
    place: Option<Place>,
    text: String,
}

/// Encodes routed lines into the shards of both sides.
pub(super) struct Supervisor<'a> {
    sampler: Sampler<'a>,
    labels: Vec<String>,
    skip_bad: bool,
    file_name: &'a (dyn Fn(usize) -> String + 'a),
    writers: [ShardWriter<'a>; 2],
    packers: [Packer; 2],
    counts: [SampleCounts; 2],
    documents: [u64; 2],
    sources: Tally,
    batch: Vec<Line>,
    batch_limit: usize,
    current: (Split, Option<Place>),
    skipped: SkippedSummary,
    conversations: bool,
}

/// What a [`Supervisor`] leaves besides shards.
pub(super) struct Supervision {
    pub sides: [SplitIndex; 2],
    pub supervised: Supervised,
    pub skipped: SkippedSummary,
    pub sources: Tally,
}

impl<'a> Supervisor<'a> {
    /// Writes shards into `directory`; `labels` are those that may occur, `skipped` is what was left out so far.
    pub fn new(
        sampler: Sampler<'a>,
        labels: Vec<String>,
        (directory, shard_tokens): (&'a Path, u64),
        file_name: &'a (dyn Fn(usize) -> String + 'a),
        (skip_bad, skipped): (bool, SkippedSummary),
    ) -> Self {
        let (row, packing) = (sampler.config.row, sampler.config.packing);
        let (eos, vocab) = (sampler.tokenizer.eos(), sampler.tokenizer.vocab_size());
        let writer = |split| ShardWriter::of_rows(directory, split, vocab, shard_tokens);
        Self {
            sampler,
            labels,
            skip_bad,
            file_name,
            writers: Split::ALL.map(writer),
            packers: Split::ALL.map(|_| Packer::new(row, packing, eos)),
            counts: Default::default(),
            documents: [0; 2],
            sources: Tally::default(),
            batch: Vec::new(),
            batch_limit: LINES_PER_THREAD * rayon::current_num_threads(),
            current: (Split::Train, None),
            skipped,
            conversations: false,
        }
    }

    /// Takes the next part of a line, of file number `file`.
    pub fn push(&mut self, file: usize, routed: Routed<'_>) -> Result<(), CorpusError> {
        match routed {
            Routed::Begin(split, place) => self.current = (split, place),
            Routed::Text(text) => self.batch.push(Line {
                side: self.current.0 as usize,
                file,
                place: self.current.1,
                text: text.to_owned(),
            }),
            Routed::End if self.batch.len() >= self.batch_limit => self.flush()?,
            Routed::End => {}
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        let (sampler, labels) = (&self.sampler, &self.labels);
        let encode = |line: &Line| sampler.encode(&line.text, labels);
        let encoded: Vec<_> = self.batch.par_iter().map(encode).collect();
        for (line, encoded) in std::mem::take(&mut self.batch).iter().zip(encoded) {
            match encoded {
                Ok(Some(encoded)) => self.take(line, encoded)?,
                Ok(None) => self.counts[line.side].dropped += 1,
                Err(problem) => {
                    let bad = BadInput {
                        file: (self.file_name)(line.file),
                        place: line.place,
                        problem,
                    };
                    match self.skip_bad {
                        true => self.skipped.add(&bad),
                        false => return Err(CorpusError::BadInput(bad)),
                    }
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &Line, encoded: Encoded) -> Result<(), CorpusError> {
        let side = line.side;
        let source = self.sources.of(line.file, side);
        source.documents += 1;
        source.tokens += encoded.sample.tokens.len() as u64;
        source.bytes += encoded.trained_bytes;
        let counts = &mut self.counts[side];
        counts.samples += 1;
        counts.tokens += encoded.sample.tokens.len() as u64;
        counts.trained += encoded.sample.trained[1..].iter().filter(|t| **t).count() as u64;
        counts.trained_bytes += encoded.trained_bytes;
        counts.truncated += u64::from(encoded.truncated);
        self.conversations |= encoded.conversation;
        match self.packers[side].push(encoded.sample) {
            Some(row) => {
                self.documents[side] += row.starts.len() as u64;
                self.writers[side].push_row(&row)
            }
            None => Ok(()),
        }
    }

    /// Encodes and writes what is left.
    ///
    /// # Errors
    /// [`CorpusError::NoSamples`] where a side has none.
    pub fn finish(mut self) -> Result<Supervision, CorpusError> {
        self.flush()?;
        let mut sides = Vec::with_capacity(2);
        let parts = self
            .writers
            .into_iter()
            .zip(self.packers)
            .zip(self.documents);
        for (split, ((mut writer, packer), mut documents)) in Split::ALL.into_iter().zip(parts) {
            for row in packer.finish() {
                documents += row.starts.len() as u64;
                writer.push_row(&row)?;
            }
            if documents == 0 {
                let counts = self.counts[split as usize];
                return Err(CorpusError::NoSamples {
                    split: split.name(),
                    dropped: counts.dropped,
                    skipped: self.skipped.count,
                });
            }
            sides.push(SplitIndex {
                tokens: writer.tokens(),
                documents,
                bytes: self.counts[split as usize].trained_bytes,
                unknown_tokens: 0,
                shards: writer.finish()?,
            });
        }
        let [train, validation] = self.counts;
        let config = self.sampler.config;
        let template = match (self.conversations, config.objective) {
            (true, _) => Some(self.sampler.template.source().to_owned()),
            (false, Objective::Sft) if config.template.is_none() => Some(PAIR_TEMPLATE.to_owned()),
            (false, _) => None,
        };
        Ok(Supervision {
            sides: sides.try_into().expect("two sides"),
            supervised: Supervised {
                objective: self.sampler.config.objective,
                row: self.sampler.config.row,
                labels: self.labels,
                template,
                train,
                validation,
            },
            skipped: self.skipped,
            sources: self.sources,
        })
    }
}

/// The labels of a classification: those that are given, else those of `found`, sorted; numbers by their value.
pub(super) fn labels_of(
    config: &SupervisedConfig,
    found: impl IntoIterator<Item = String>,
) -> Result<Vec<String>, CorpusError> {
    if config.objective != Objective::Classify || !config.labels.is_empty() {
        return Ok(config.labels.clone());
    }
    let mut labels: Vec<String> = found.into_iter().collect();
    match labels.iter().all(|label| label.parse::<i64>().is_ok()) {
        true => labels.sort_by_key(|label| label.parse::<i64>().expect("checked")),
        false => labels.sort_unstable(),
    }
    match labels.len() {
        2..=MAX_LABELS => Ok(labels),
        n => Err(CorpusError::BadOption {
            option: "the number of labels",
            value: n.to_string(),
            bound: "from 2 to 512",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervised::Role;

    #[test]
    fn the_template_of_pairs_says_what_a_pair_was_trained_as() {
        let specials = SpecialTexts {
            eos: Some("<end>".into()),
            ..SpecialTexts::default()
        };
        let template = ChatTemplate::parse(PAIR_TEMPLATE, &specials).expect("a template");
        let said = |role, content: &str| Message {
            role,
            content: content.into(),
        };
        for prompt in ["What is 2 + 2?", "Complete: \n", "", "a\n\nb"] {
            let turns = [said(Role::User, prompt), said(Role::Assistant, " Four. ")];
            let spans = pair_spans(prompt, " Four. ", "<end>");
            let whole: String = spans.iter().map(|span| span.text.as_str()).collect();
            assert_eq!(template.render(&turns, false).expect("a text"), whole);
            let asked: String = spans
                .iter()
                .filter(|s| !s.trained)
                .map(|s| s.text.as_str())
                .collect();
            assert_eq!(template.render(&turns[..1], true).expect("a text"), asked);
        }
    }

    #[test]
    fn lines_that_teach_nothing_are_named() {
        let json = crate::corpus::char_tokenizer("abcdef 1234?\n".chars());
        let config = SupervisedConfig::new(Objective::Sft, 12);
        let sampler = Sampler::new(&config, &json).expect("a sampler");
        let encode = |line: &str| sampler.encode(line, &[]);
        let pair = |prompt: &str, response: &str| {
            format!("{{\"prompt\": \"{prompt}\", \"response\": \"{response}\"}}")
        };
        let found = encode(&pair("ab?", "cd"))
            .expect("a sample")
            .expect("not dropped");
        // "ab?\n" is read, "cd" and the end are learned.
        assert_eq!(
            found.sample.trained,
            [false, false, false, false, true, true, true]
        );
        assert_eq!(found.sample.tokens[6], json.eos());
        let too_long = encode(&pair("abcdef", "abcdef"));
        assert_eq!(
            too_long,
            Err(Problem::TooLong {
                tokens: 14,
                row: 12
            })
        );
        assert!(matches!(encode(&pair("ab", "")), Err(Problem::Record(_))));
        let special = encode(&pair("ab", "<|endoftext|>"));
        assert_eq!(special, Err(Problem::SpecialInText("<|endoftext|>".into())));
        assert!(matches!(
            encode(&pair("ab", "XYZ")),
            Err(Problem::Untokenizable(_))
        ));
        let cut = SupervisedConfig {
            too_long: TooLong::Truncate,
            ..config.clone()
        };
        let sampler = Sampler::new(&cut, &json).expect("a sampler");
        let found = sampler
            .encode(&pair("abcdef", "abcdef"), &[])
            .expect("cut")
            .expect("kept");
        assert!(found.truncated && found.sample.tokens.len() == 12);
        let prompt_alone = sampler.encode(&pair("abcdefabcdef", "a"), &[]);
        assert!(matches!(prompt_alone, Err(Problem::NothingTrained(_))));
    }

    #[test]
    fn labels_are_sorted_and_others_refused() {
        let config = SupervisedConfig::new(Objective::Classify, 8);
        let found = |labels: &[&str]| labels.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
        let sorted = labels_of(&config, found(&["10", "9", "-1"])).expect("labels");
        assert_eq!(sorted, ["-1", "9", "10"]);
        let sorted = labels_of(&config, found(&["spam", "ham"])).expect("labels");
        assert_eq!(sorted, ["ham", "spam"]);
        assert!(labels_of(&config, found(&["one"])).is_err());
        let tokenizer = crate::corpus::char_tokenizer("abc".chars());
        let sampler = Sampler::new(&config, &tokenizer).expect("a sampler");
        let line = |label: &str| format!("{{\"text\": \"abc\", \"label\": \"{label}\"}}");
        let spam = sampler
            .encode(&line("spam"), &sorted)
            .expect("a sample")
            .expect("kept");
        // The label's number stands behind the text, and is what its last token is to give.
        assert_eq!(spam.sample.tokens.last(), Some(&1));
        assert_eq!(spam.sample.trained, [false, false, false, true]);
        let other = sampler.encode(&line("eggs"), &sorted);
        assert!(matches!(other, Err(Problem::UnknownLabel { .. })));
    }
}
