//! `cohort plan`: what a run will take, before it is begun. It trains nothing, and leaves nothing behind but the plan.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cohort_common::checkpoint::Checkpoint;
use cohort_common::corpus::{
    Compression, Corpus, CorpusError, Objective, PrepareRequest, Split, Tokenizer, TokenizerConfig,
    prepare, prepared, samples, windows,
};
use cohort_common::home::Home;
use cohort_common::spec::{
    CorpusFacts, CorpusSize, FinetuneBase, Plan, Preset, RunKind, RunSpec, SpecMeant, SpecSource,
    Speed, TokenizerChoice, human_bytes, human_count, human_flops, worker_counts,
};
use cohort_objects::{Location, is_location};
use cohort_worker::engine::DeviceChoice;

use crate::cli::PlanArgs;
use crate::commands::pretrain::{read_spec, spec_file};
use crate::commands::{plan_against, preview};
use crate::context::Context;
use crate::output::{duration, table};
use crate::plans::KeptPlan;
use crate::prepare::REMOTE;
use crate::{facts, references};

/// How long the measurement takes.
const BUDGET: Duration = Duration::from_secs(4);
/// Gigabits per second of the coordinator's link, unless said otherwise.
const BANDWIDTH: f64 = 1.0;
/// Bytes of files that are prepared for the moment where nobody has prepared them before; of more, sizes are estimated.
const PREPARED_BYTES: u64 = 4 << 20;
/// How many times as large compressed text is, about, when it is unpacked.
const UNPACKED: u64 = 3;
/// Bits of text in a bit of a BPE token, about: a vocabulary of 4,096 has tokens of 3.3 bytes.
const BITS_PER_BYTE: f64 = 3.6;

/// Runs the verb.
pub async fn run(args: PlanArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let out = args.json.output();
    if let Some(run) = &args.against {
        return plan_against::run(&context, run, out).await;
    }
    let device: DeviceChoice = args.device.as_deref().unwrap_or("auto").parse()?;
    let asked = Asked::of(&args, &context).await?;
    for note in &asked.meant.notes {
        out.say(note);
    }
    let home = context.home.clone();
    let (spec, size, assumed) =
        tokio::task::spawn_blocking(move || asked.complete(&home)).await??;
    let plan = Plan::of(&spec, size, &worker_counts(spec.train.lanes));
    let measured = match args.no_measure {
        true => None,
        false => Some(measure(&spec, &plan, device, args.threads).await?),
    };
    let bandwidth = args.bandwidth.unwrap_or(BANDWIDTH);
    let kept = KeptPlan::new(spec, plan, measured, bandwidth, assumed);
    out.line(&kept)?;
    out.say(shown(&kept));
    kept.keep(&context.home)
}

async fn measure(
    spec: &RunSpec,
    plan: &Plan,
    device: DeviceChoice,
    threads: Option<usize>,
) -> Result<Speed> {
    if let Some(free) = free_memory().filter(|free| *free < plan.memory.total) {
        anyhow::bail!(
            "measuring needs about {} of memory, and {} are free here; `--no-measure` plans without times",
            human_bytes(plan.memory.total),
            human_bytes(free)
        );
    }
    let spec = spec.clone();
    let threads = threads.unwrap_or(0);
    let measuring =
        tokio::task::spawn_blocking(move || cohort_worker::measure(&spec, device, threads, BUDGET));
    Ok(measuring.await??)
}

/// Bytes of memory that are free or can be freed, where the system tells.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// What is asked for, before the corpus is known.
struct Asked {
    meant: SpecMeant,
    tokenizer: TokenizerConfig,
    /// The chat template of the checkpoint.
    template: Option<String>,
}

impl Asked {
    async fn of(args: &PlanArgs, context: &Context) -> Result<Self> {
        let source = match (&args.spec, &args.preset) {
            (Some(path), _) => read_spec(path)?,
            (None, Some(name)) => Preset::find(name)?.source()?,
            (None, None) => SpecSource::empty(),
        };
        let file = spec_file(source, &args.text)?;
        let Some(from) = &args.from else {
            let meant = file.validate()?;
            let tokenizer = preview::of_spec(&meant.tokenizer)?;
            return Ok(Self {
                meant,
                tokenizer,
                template: None,
            });
        };
        let found = references::find(context, from).await?;
        let checkpoint: Checkpoint = found.open()?;
        let meant = file.finetune_from(&FinetuneBase {
            name: &found.name,
            model: checkpoint.model(),
            train: checkpoint.run().map(|run| &run.spec.train),
        })?;
        Ok(Self {
            meant,
            tokenizer: preview::of_checkpoint(&checkpoint)?,
            template: checkpoint.chat_template()?,
        })
    }

    /// The complete spec, the size of its corpus where one is named, and what had to be assumed. Blocks.
    fn complete(
        self,
        home: &std::path::Path,
    ) -> Result<(RunSpec, Option<CorpusSize>, Vec<String>)> {
        let mut assumed = Vec::new();
        let length = self.meant.sample_length();
        let Some(request) = self.request(&mut assumed)? else {
            let facts = self.assumed_facts(&mut assumed)?;
            return Ok((self.meant.run_spec(facts, None)?, None, assumed));
        };
        // The home may not be there yet, and a corpus that cannot be opened is no help.
        let home = Home::open_read_only(home).ok();
        let found = match home {
            Some(home) => prepared(&home.corpora(), &request)?,
            None => None,
        };
        let bytes = text_bytes(&request);
        let (facts, size) = match found {
            Some(corpus) => known(&corpus, length)?,
            None if bytes <= PREPARED_BYTES => {
                let place = tempfile::tempdir().context("cannot make a temporary directory")?;
                known(&prepare(place.path(), &request, &|_| {})?.corpus, length)?
            }
            None => {
                assumed.push(format!(
                    "the corpus has not been prepared yet: its sizes are estimated from {} of text",
                    human_bytes(bytes)
                ));
                let facts = self.assumed_facts(&mut assumed)?;
                let size = self.estimated(bytes, facts.vocab_size);
                (facts, size)
            }
        };
        Ok((self.meant.run_spec(facts, None)?, Some(size), assumed))
    }

    /// The corpus that the run would ask for; `None` where there is no text that could be read here.
    fn request(&self, assumed: &mut Vec<String>) -> Result<Option<PrepareRequest>> {
        let options = &self.meant.corpus;
        if let Some(path) = options.paths.iter().find(|path| path.starts_with(REMOTE)) {
            assumed.push(format!(
                "`{path}` lies on the coordinator's machine: nothing is known of its size"
            ));
            return Ok(None);
        }
        if let Some(url) = options.paths.iter().find(|path| is_location(path)) {
            let shown = Location::parse(url)?;
            assumed.push(format!(
                "`{shown}` is fetched by the coordinator: nothing is known of its size"
            ));
            return Ok(None);
        }
        if options.paths.is_empty() {
            return Ok(None);
        }
        let (tokenizer, template) = (self.tokenizer.clone(), self.template.clone());
        preview::request(&self.meant, tokenizer, template, options.skip_bad).map(Some)
    }

    /// What can be said of a corpus that nobody has seen.
    fn assumed_facts(&self, assumed: &mut Vec<String>) -> Result<CorpusFacts> {
        let vocab_size = match &self.tokenizer {
            TokenizerConfig::Bpe { vocab_size } => *vocab_size as usize,
            TokenizerConfig::File { json, eos } => {
                Tokenizer::from_json(json, eos.as_deref())?.vocab_size() as usize
            }
            TokenizerConfig::Char => {
                let vocab_size = TokenizerChoice::Char.assumed_vocab();
                assumed.push(format!("a vocabulary of {vocab_size} characters"));
                vocab_size
            }
        };
        let supervised = self.meant.corpus.supervised.as_ref();
        let classifies = supervised.is_some_and(|s| s.objective == Objective::Classify);
        let mut labels = match supervised.filter(|_| classifies) {
            Some(supervised) => supervised.labels.clone(),
            None => Vec::new(),
        };
        if classifies && labels.is_empty() {
            labels.clone_from(&self.meant.model.labels);
        }
        if classifies && labels.is_empty() {
            assumed.push("two labels; `--set corpus.labels=[…]` names them".into());
            labels = vec!["0".into(), "1".into()];
        }
        Ok(CorpusFacts {
            vocab_size,
            fingerprint: String::new(),
            labels,
        })
    }

    fn estimated(&self, bytes: u64, vocab_size: usize) -> CorpusSize {
        let bytes_per_token = match self.tokenizer {
            TokenizerConfig::Char => 1.0,
            _ => (vocab_size as f64).log2() / BITS_PER_BYTE,
        };
        let tokens = bytes as f64 / bytes_per_token;
        let validation = self.meant.corpus.validation;
        let length = self.meant.sample_length();
        let side = |share: f64| (tokens * share) as u64;
        CorpusSize {
            tokens: side(1.0 - validation),
            samples: side(1.0 - validation) / length as u64,
            validation_samples: windows(side(validation), length),
            bytes: tokens as u64 * if vocab_size <= 1 << 16 { 2 } else { 4 },
            estimated: true,
        }
    }
}

/// Bytes of text in the files, unpacked, about.
fn text_bytes(request: &PrepareRequest) -> u64 {
    let files = request.sources.files.iter();
    let sizes = files.map(|file| {
        // What is missing was found before.
        let bytes = file.path.metadata().map_or(0, |metadata| metadata.len());
        match file.compression {
            Compression::None => bytes,
            _ => UNPACKED * bytes,
        }
    });
    sizes.sum()
}

/// What a spec and a plan need to know of a corpus.
fn known(corpus: &Corpus, length: usize) -> Result<(CorpusFacts, CorpusSize)> {
    let index = corpus.index();
    let supervised = index.supervised.as_ref();
    let facts = CorpusFacts {
        vocab_size: index.tokenizer.vocab_size as usize,
        fingerprint: index.fingerprint.clone(),
        labels: supervised.map_or(Vec::new(), |supervised| supervised.labels.clone()),
    };
    let (train, validation) = (index.train.tokens, index.validation.tokens);
    let row = supervised.map(|supervised| supervised.row);
    Ok((
        facts,
        size(train, validation, row, length, index.shard_bytes())?,
    ))
}

/// The size of a prepared corpus of so many tokens, in rows of so many where it has rows.
pub fn size(
    tokens: u64,
    validation: u64,
    row: Option<usize>,
    length: usize,
    bytes: u64,
) -> Result<CorpusSize, CorpusError> {
    let (train_samples, validation_samples) = match row {
        Some(row) => (tokens / row as u64, validation / row as u64),
        None => (
            samples(Split::Train, tokens, length)?,
            windows(validation, length),
        ),
    };
    Ok(CorpusSize {
        tokens,
        samples: train_samples,
        validation_samples,
        bytes,
        estimated: false,
    })
}

/// A plan for people.
fn shown(kept: &KeptPlan) -> String {
    let mut text = figures(kept).expect("writing to a string succeeds");
    text += &workers(kept);
    text
}

fn figures(kept: &KeptPlan) -> Result<String, std::fmt::Error> {
    let (plan, spec) = (&kept.plan, &kept.spec);
    let mut text = String::new();
    let out = &mut text;
    writeln!(
        out,
        "plan          {} {}",
        facts::kind(spec.kind),
        spec.model.architecture
    )?;
    for assumed in &kept.assumed {
        writeln!(out, "  assumed     {assumed}")?;
    }
    let parameters = &plan.parameters;
    writeln!(
        out,
        "  parameters  {}, {} trained, {} without embeddings",
        human_count(parameters.total),
        human_count(parameters.trained),
        human_count(parameters.non_embedding)
    )?;
    let memory = &plan.memory;
    writeln!(
        out,
        "  memory      about {} per worker: parameters {}, gradients {}, moments {}, activations {}",
        human_bytes(memory.total),
        human_bytes(memory.parameters),
        human_bytes(memory.gradients),
        human_bytes(memory.moments),
        human_bytes(memory.activations)
    )?;
    if spec.train.diloco.is_none() {
        let [two, four] = [2, 4].map(|workers| human_bytes(memory.divided(workers)));
        writeln!(
            out,
            "  divided     about {two} on each of 2 workers, {four} of 4, where the coordinator has `--optimizer sharded`"
        )?;
    }
    let mut tokens = format!(
        "{} in {} {}s of {}, {:.2} per parameter",
        human_count(plan.tokens),
        plan.steps,
        spec.train.step_word(),
        plan.tokens_per_step,
        plan.tokens_per_parameter
    );
    if spec.kind == RunKind::Pretrain {
        tokens += " (Chinchilla's measure is about 20, arXiv 2203.15556)";
    }
    writeln!(out, "  tokens      {tokens}")?;
    writeln!(
        out,
        "  compute     {} per token, {} in all",
        human_flops(plan.flops_per_token),
        human_flops(plan.flops)
    )?;
    match (&plan.corpus, plan.epochs) {
        (Some(corpus), Some(epochs)) => writeln!(
            out,
            "  corpus      {}{} training tokens, {} on disk; {epochs:.2} epochs",
            if corpus.estimated { "about " } else { "" },
            human_count(corpus.tokens),
            human_bytes(corpus.bytes)
        )?,
        _ => writeln!(
            out,
            "  corpus      none is named, so nothing is said of epochs"
        )?,
    }
    let checkpoints = &plan.checkpoints;
    writeln!(
        out,
        "  checkpoints {} are written, at most {} stay: {} of {} each",
        checkpoints.written,
        checkpoints.kept,
        human_bytes(checkpoints.total),
        human_bytes(checkpoints.each)
    )?;
    writeln!(
        out,
        "  validations {} of {} tokens",
        plan.validations.count,
        human_count(plan.validations.tokens_each)
    )?;
    match &kept.measured {
        Some(speed) => writeln!(
            out,
            "  speed       {} tokens/s on {}, threads: {}; a step {:.1} ms, of which the update {:.1} ms",
            human_count((plan.tokens_per_step as f64 / speed.step_seconds()) as u64),
            speed.device,
            speed.threads,
            1e3 * speed.step_seconds(),
            1e3 * speed.update_seconds
        )?,
        None => writeln!(out, "  speed       not measured")?,
    }
    Ok(text)
}

/// What the wire and the clock say, by number of workers.
fn workers(kept: &KeptPlan) -> String {
    let mut head = vec![
        "workers",
        "lanes",
        "sends",
        "gets",
        "coordinator gets",
        "coordinator sends",
    ];
    if kept.measured.is_some() {
        head.extend(["exchange", "step", "tokens/s", "time"]);
    }
    let mut rows = vec![head.into_iter().map(String::from).collect::<Vec<_>>()];
    for (place, wire) in kept.plan.wire.iter().enumerate() {
        let mut row = vec![
            wire.workers.to_string(),
            wire.lanes.to_string(),
            human_bytes(wire.sent),
            human_bytes(wire.received),
            human_bytes(wire.coordinator_received),
            human_bytes(wire.coordinator_sent),
        ];
        if let Some(time) = kept.estimates.get(place) {
            row.extend([
                format!("{:.1} ms", 1e3 * time.exchange_seconds),
                format!("{:.1} ms", 1e3 * time.step_seconds),
                human_count(time.tokens_per_second as u64),
                duration(time.seconds),
            ]);
        }
        rows.push(row);
    }
    let mut text = format!("\n{}\n\n", table(&rows));
    text += "Lanes are those of the worker that has most, bytes those of one step.";
    if kept.measured.is_some() {
        text += &format!(
            " A step is its lanes' share of the gradient, the\n\
             update, and the busier direction of the coordinator's link at {} Gbit/s, one after the other; the time has the\n\
             validations as well.",
            kept.bandwidth_gbit
        );
    }
    text
}
