//! `cohort corpus`: prepares, lists, shows and removes corpora.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cohort_common::api::CorpusInfo;
use cohort_common::corpus::{Dedup, Split, find};
use cohort_common::home::Home;
use cohort_common::spec::{
    CorpusTable, SpecFile, SpecSource, TokenizerKind, TokenizerTable, human_bytes,
};
use cohort_coordinator::offline;

use crate::cli::{
    CorpusListArgs, CorpusPrepareArgs, CorpusRemoveArgs, CorpusShowArgs, CorpusVerb, DedupKind,
    LocalArgs, NotifyArgs, SelectionArgs,
};
use crate::commands::contents;
use crate::commands::pretrain::read_spec;
use crate::context::Context;
use crate::facts;
use crate::output::{confirmed, duration};
use crate::prepare::{self, Material};
use crate::submit::Session;

/// Tokens of a sample that is shown.
const SAMPLE_TOKENS: usize = 120;

/// Runs the verb.
pub async fn run(verb: CorpusVerb) -> Result<()> {
    match verb {
        CorpusVerb::Prepare(args) => prepare(args).await,
        CorpusVerb::Ls(args) => list(args).await,
        CorpusVerb::Show(args) => show(args).await,
        CorpusVerb::Head(args) => contents::head(args).await,
        CorpusVerb::Stats(args) => contents::stats(args).await,
        CorpusVerb::Rm(args) => remove(args).await,
    }
}

async fn prepare(args: CorpusPrepareArgs) -> Result<()> {
    let meant = spec_of(&args)?.validate()?;
    let mut material = Material::find(&meant.corpus)?;
    if let Some(name) = args.name {
        material.name = name;
    }
    let tokenizer = prepare::tokenizer(&meant.tokenizer)?;
    let supervised = material.supervised(meant.sample_length(), None);
    let out = args.json.output();
    let mut session = Session::open(
        &args.connect,
        &LocalArgs::default(),
        &NotifyArgs::default(),
        out,
    )
    .await?;
    let begun = Instant::now();
    let corpus = material
        .prepare(tokenizer, supervised, &mut session.client, out)
        .await?;
    if !corpus.reused {
        out.say(took(&corpus, begun.elapsed()));
    }
    out.line(&corpus)
}

/// How long it took, and how much text that is in a second: what was left out has been read, too.
fn took(corpus: &CorpusInfo, time: Duration) -> String {
    let kept = corpus.train.bytes + corpus.validation.bytes;
    let bytes = corpus.selection.as_ref().map_or(kept, |s| s.bytes);
    let seconds = time.as_secs_f64();
    let speed = human_bytes((bytes as f64 / seconds.max(1e-9)) as u64);
    format!(
        "  took        {}, {speed} of text per second",
        duration(seconds)
    )
}

fn spec_of(args: &CorpusPrepareArgs) -> Result<SpecFile> {
    let source = match &args.spec {
        Some(path) => read_spec(path)?,
        None => SpecSource::empty(),
    };
    let mut file = source.into_file()?;
    file.corpus.paths = Some(args.paths.clone());
    if args.text_field.is_some() {
        file.corpus.text_field = args.text_field.clone();
    }
    file.corpus.validation = args.validation.or(file.corpus.validation);
    if args.skip_bad {
        file.corpus.skip_bad = Some(true);
    }
    select(&args.selection, &mut file.corpus);
    if args.characters || args.vocab_size.is_some() || args.tokenizer.is_some() {
        file.tokenizer = TokenizerTable {
            kind: args.characters.then_some(TokenizerKind::Char),
            vocab_size: args.vocab_size,
            path: args.tokenizer.clone(),
        };
    }
    Ok(file)
}

/// What is typed wins over what the spec says.
fn select(args: &SelectionArgs, table: &mut CorpusTable) {
    let dedup = args.dedup.map(|kind| match kind {
        DedupKind::Exact => Dedup::Exact,
        DedupKind::Near => Dedup::Near,
    });
    table.dedup = dedup.or(table.dedup);
    table.dedup_threshold = args.dedup_threshold.or(table.dedup_threshold);
    table.min_chars = args.min_chars.or(table.min_chars);
    table.max_chars = args.max_chars.or(table.max_chars);
    if !args.languages.is_empty() {
        table.languages = Some(args.languages.clone());
    }
}

async fn list(args: CorpusListArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let corpora = match context.connect_if_running().await? {
        Some(mut client) => client.corpora().await?,
        None => offline::corpora(&context.home)?,
    };
    let out = args.json.output();
    if out.json {
        return corpora.iter().try_for_each(|corpus| out.line(corpus));
    }
    match corpora.is_empty() {
        true => out.say("no corpora yet; `cohort corpus prepare PATH` makes one"),
        false => out.say(facts::corpora(&corpora)),
    }
    Ok(())
}

async fn show(args: CorpusShowArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let corpus = match context.connect_if_running().await? {
        Some(mut client) => client.corpus(&args.corpus).await?,
        None => show_offline(&context, &args.corpus)?,
    };
    let out = args.json.output();
    if out.json {
        return out.line(&corpus);
    }
    out.say(facts::whole_corpus(&corpus));
    Ok(())
}

fn show_offline(context: &Context, name: &str) -> Result<CorpusInfo> {
    let home = Home::open_read_only(&context.home)?;
    let corpus = find(&home.corpora(), name)?;
    let fingerprint = &corpus.index().fingerprint;
    let all = offline::corpora(&context.home)?;
    let Some(mut info) = all
        .into_iter()
        .find(|info| info.fingerprint == *fingerprint)
    else {
        bail!("corpus `{name}` has just been removed");
    };
    info.sample = Some(corpus.preview(Split::Train, 0, SAMPLE_TOKENS)?);
    Ok(info)
}

async fn remove(args: CorpusRemoveArgs) -> Result<()> {
    let out = args.json.output();
    let mut client = Context::of(&args.connect)?.connect().await?;
    let corpus = client.corpus(&args.corpus).await?;
    let what = format!(
        "corpus {} ({}, {})",
        corpus.name,
        facts::short(&corpus.fingerprint),
        human_bytes(corpus.bytes_on_disk)
    );
    if !args.yes && (out.json || !confirmed(&format!("delete {what}?"))?) {
        bail!("nothing was deleted: {what}; `--yes` deletes it without asking");
    }
    let removed = client.remove_corpus(&corpus.fingerprint).await?;
    out.line(&removed)?;
    out.say(format!("deleted {what}"));
    Ok(())
}
