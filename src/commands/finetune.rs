//! `cohort finetune`: a run from the weights of a checkpoint.

use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, bail};
use cohort_common::api::{StartFiles, TokenizerRef};
use cohort_common::checkpoint::{
    CHAT_TEMPLATE, CONFIG, Checkpoint, GENERATION, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS,
    WEIGHTS_INDEX, hex,
};
use cohort_common::corpus::{Objective, SupervisedConfig, Tokenizer};
use cohort_common::hf;
use cohort_common::home::CheckpointRef;
use cohort_common::spec::{
    FinetuneBase, LoraConfig, ModelConfig, SpecFile, SpecSource, StartPoint, TrainConfig,
};

use cohort_common::supervised::chat_template_of;

use crate::cli::FinetuneArgs;
use crate::commands::pretrain::{read_spec, spec_file, take_prompts};
use crate::commands::{resume, transfer};
use crate::prepare::{self, Material, Mixed};
use crate::references::{self, name_of};
use crate::submit::{Session, submission};
use crate::uploads;

/// What a finetuning run starts from.
pub struct Base {
    /// What to call it, and what finds it again: `RUN@STEP`, the directory, or the model of the hub.
    pub name: String,
    model: ModelConfig,
    /// How it was trained; absent for a foreign checkpoint.
    pub train: Option<TrainConfig>,
    tokenizer: Tokenizer,
    /// The chat template in its `tokenizer_config.json`, if there is one.
    template: Option<String>,
    start: StartPoint,
    /// What a run starts from.
    pub files: StartFiles,
    /// What whoever trains on samples should know of it.
    notes: Vec<String>,
}

/// A run that is ready to be submitted.
pub struct Planned {
    /// What it does.
    pub spec: cohort_common::spec::RunSpec,
    /// Where its start weights are.
    pub files: StartFiles,
    /// What of the spec was derived, inherited or set by default, a line each.
    pub notes: Vec<String>,
}

/// Runs the verb.
pub async fn run(args: FinetuneArgs) -> Result<ExitCode> {
    if let Some(run) = &args.resume {
        return resume::run(run, &args.text.set, &args.submit).await;
    }
    let reference = args.from.as_deref().context("`--from` is missing")?;
    let reference = references::parse(reference)?;
    let source = match &args.spec {
        Some(path) => read_spec(path)?,
        None => SpecSource::empty(),
    };
    let mut file = spec_file(source, &args.text)?;
    if args.lora.is_some() {
        file.lora.rank = args.lora;
    }
    file.train.replay = args.replay.or(file.train.replay);
    file.train.max_forgetting = args.max_forgetting.or(file.train.max_forgetting);
    take_prompts(&mut file, &args.submit);
    // The text and what no coordinator keeps are checked before anything is started.
    let options = SpecFile {
        corpus: file.corpus.clone(),
        samples: file.samples.clone(),
        ..SpecFile::default()
    };
    let material = Material::find(&options.validate()?.corpus)?;
    let outside = match references::outside(&reference).await? {
        Some(found) => Some((found.open()?, found.name)),
        None => None,
    };
    let submit = &args.submit;
    let mut session = Session::open(
        &submit.connect,
        &submit.local,
        &submit.notify,
        submit.json.output(),
    )
    .await?;
    let result = train(&mut session, &args, &reference, outside, (&file, &material)).await;
    session.close().await;
    result
}

async fn train(
    session: &mut Session,
    args: &FinetuneArgs,
    reference: &CheckpointRef,
    outside: Option<(Checkpoint, String)>,
    (file, material): (&SpecFile, &Material),
) -> Result<ExitCode> {
    let base = match outside {
        Some((checkpoint, name)) => of_directory(session, &checkpoint, name).await?,
        None => of_run(session, &reference.to_string()).await?,
    };
    let planned = plan(session, file, material, &base).await?;
    let spec = planned.spec;
    let stem = match &args.spec {
        Some(path) => prepare::name_of(&[path.display().to_string()]),
        None => "finetune".into(),
    };
    let mut submit = submission(spec.clone(), &args.submit, stem);
    submit.parent = Some(base.name.clone());
    submit.start = Some(planned.files);
    submit.notes = planned.notes;
    let launched = session.launch(submit, args.submit.detach).await?;
    let Some(run) = launched.finished else {
        return Ok(launched.code);
    };
    match transfer::conclude(session, args, &base, &run, &spec).await? {
        Ok(()) => Ok(launched.code),
        Err(code) => Ok(code),
    }
}

/// Prepares the corpus with the checkpoint's tokenizer and completes the spec.
pub async fn plan(
    session: &mut Session,
    file: &SpecFile,
    material: &Material,
    base: &Base,
) -> Result<Planned> {
    let meant = file.finetune_from(&FinetuneBase {
        name: &base.name,
        model: &base.model,
        train: base.train.as_ref(),
    })?;
    let mixed = Mixed::find(meant.mixture.as_ref(), &meant.corpus)?;
    let mut supervised = material.supervised(meant.sample_length(), base.template.clone());
    adopt_labels(supervised.as_mut(), base)?;
    let json = base.tokenizer.to_json().to_owned();
    let tokenizer = match base.tokenizer.spelling(base.tokenizer.eos()) {
        Some(eos) => TokenizerRef::Known { json, eos },
        None => TokenizerRef::Json(json),
    };
    if let Some(supervised) = &supervised {
        base.notes.iter().for_each(|note| session.out.say(note));
        if supervised.objective == Objective::Sft {
            let template = match &base.template {
                Some(_) => format!("inherited from {}", base.name),
                None => "Cohort's own, since the checkpoint has none".to_owned(),
            };
            session.out.say(format!("chat template ({template})"));
        }
    }
    let corpus = material
        .prepare(
            tokenizer,
            supervised.clone(),
            &mut session.client,
            session.out,
        )
        .await?;
    prepare::check_length(&corpus, meant.sample_length())?;
    for note in &meant.notes {
        session.out.say(note);
    }
    let start = Some(base.start.clone());
    let notes = meant.notes.clone();
    let mut spec = meant.run_spec(prepare::facts_of(&corpus), start)?;
    if let Some(mixed) = mixed {
        let (client, out) = (&mut session.client, session.out);
        let mixture = mixed.prepare(&corpus, supervised.as_ref(), client, out);
        spec.mixture = Some(mixture.await?);
    }
    session.adapt(&mut spec);
    Ok(Planned {
        spec,
        files: base.files.clone(),
        notes,
    })
}

/// A classifier is trained further on the labels that its head has. A head is new where the base has none.
fn adopt_labels(supervised: Option<&mut SupervisedConfig>, base: &Base) -> Result<()> {
    let labels = &base.model.labels;
    match supervised {
        Some(supervised) if supervised.objective == Objective::Classify => {
            if labels.is_empty() || supervised.labels == *labels {
                return Ok(());
            }
            if !supervised.labels.is_empty() {
                bail!(
                    "`corpus.labels` is {:?}, but {} has {:?}; remove it, or start from a language model",
                    supervised.labels,
                    base.name,
                    labels
                );
            }
            supervised.labels.clone_from(labels);
            Ok(())
        }
        _ if labels.is_empty() => Ok(()),
        _ => bail!(
            "{} is a classifier of {} labels and has no head for text; start from a language model, or pass `--classify`",
            base.name,
            labels.len()
        ),
    }
}

/// Adapters stand on weights that stay as they are, and a run trains one set of them.
fn refuse_adapters(name: &str, lora: Option<&LoraConfig>) -> Result<()> {
    match lora {
        Some(_) => bail!(
            "{name} is a base model with adapters; make one model of them first: `cohort merge {name} -o DIR`, then \
             `--from DIR`"
        ),
        None => Ok(()),
    }
}

/// A checkpoint that the coordinator keeps.
pub async fn of_run(session: &mut Session, reference: &str) -> Result<Base> {
    let resolved = session.client.resolve(reference).await?;
    let (run, step) = (resolved.run.as_str(), resolved.checkpoint.step);
    let name = name_of(&resolved);
    refuse_adapters(&name, resolved.spec.lora.as_ref())?;
    let mut data = session.client.data().await?;
    let files = data.checkpoint_files(run, step).await?;
    let weights = files.iter().find(|file| file.name == WEIGHTS);
    let weights = weights.ok_or_else(|| anyhow!("checkpoint {name} has no `{WEIGHTS}`"))?;
    let tokenizer = data.small_file(run, step, TOKENIZER).await?;
    let ids = data.small_file(run, step, GENERATION).await?;
    let ids = hf::parse_special_tokens(&String::from_utf8_lossy(&ids));
    let eos = ids.ok().and_then(|ids| ids.eos.first().copied());
    Ok(Base {
        start: StartPoint {
            source: name.clone(),
            weights: weights.hash.clone(),
            base_corpus: Some(resolved.spec.corpus.clone()),
        },
        tokenizer: fitting(&name, &tokenizer, eos, &resolved.spec.model)?,
        notes: Vec::new(),
        template: template_in(
            &name,
            data.small_file(run, step, TOKENIZER_CONFIG).await.ok(),
        )?,
        files: StartFiles::Checkpoint(name.clone()),
        model: resolved.spec.model,
        train: Some(resolved.spec.train),
        name,
    })
}

/// A directory in Hugging Face layout, whose files the coordinator gets; `name` is what the user calls it.
pub async fn of_directory(
    session: &mut Session,
    checkpoint: &Checkpoint,
    name: String,
) -> Result<Base> {
    refuse_adapters(&name, checkpoint.lora())?;
    let eos = checkpoint.tokens().eos.first().copied();
    let tokenizer = fitting(&name, &checkpoint.tokenizer()?, eos, checkpoint.model())?;
    let template = checkpoint.chat_template()?;
    let opened = checkpoint.clone();
    let weights = tokio::task::spawn_blocking(move || opened.weights_hash()).await??;
    let spec = checkpoint.run().map(|run| &run.spec);
    // The text of a checkpoint that was trained elsewhere may not be here.
    let base_corpus = match spec {
        Some(spec) => session
            .client
            .corpus(&spec.corpus)
            .await
            .ok()
            .map(|corpus| corpus.fingerprint),
        None => None,
    };
    let files = uploads::hash(files_of(checkpoint)?).await?;
    uploads::send(&session.client, &files).await?;
    let files = files
        .into_iter()
        .map(|upload| (upload.name, upload.hash))
        .collect();
    Ok(Base {
        start: StartPoint {
            source: name.clone(),
            weights: hex::encode(&weights),
            base_corpus,
        },
        files: StartFiles::Uploaded(files),
        tokenizer,
        notes: notes(checkpoint)?,
        template,
        model: checkpoint.model().clone(),
        train: spec.map(|spec| spec.train.clone()),
        name,
    })
}

/// The files that a run needs to start from a directory.
fn files_of(checkpoint: &Checkpoint) -> Result<Vec<(String, std::path::PathBuf)>> {
    let mut paths = checkpoint.weight_files()?;
    let others = [
        CONFIG,
        TOKENIZER,
        TOKENIZER_CONFIG,
        CHAT_TEMPLATE,
        WEIGHTS_INDEX,
    ];
    let others = others.map(|name| checkpoint.dir().join(name));
    paths.extend(others.into_iter().filter(|path| path.exists()));
    let named = paths.into_iter().map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        (name.into_owned(), path)
    });
    let mut files: Vec<_> = named.collect();
    files.sort();
    Ok(files)
}

/// What is unusual in a directory's tokenizer.
fn notes(checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let specials = checkpoint.special_texts()?;
    Ok(match (specials.pad, specials.eos) {
        (Some(pad), Some(eos)) if pad == eos => vec![format!(
            "tokenizer   its pad token `{pad}` is its end token; that does no harm here: what is learned is marked token by \
             token, and the end is learned"
        )],
        _ => Vec::new(),
    })
}

/// The chat template in a `tokenizer_config.json`.
fn template_in(name: &str, config: Option<Vec<u8>>) -> Result<Option<String>> {
    let Some(config) = config else {
        return Ok(None);
    };
    let unusable = || format!("the `{TOKENIZER_CONFIG}` of {name} cannot be used");
    let config = String::from_utf8(config).with_context(unusable)?;
    chat_template_of(&config).with_context(unusable)
}

/// A tokenizer that a model has embeddings for; `eos` is the token that ends its texts, where that is known.
fn fitting(name: &str, json: &[u8], eos: Option<u32>, model: &ModelConfig) -> Result<Tokenizer> {
    let tokenizer = match eos {
        Some(eos) => Tokenizer::from_json_with_eos_id(json, eos),
        None => Tokenizer::from_json(json, None),
    };
    let tokenizer = tokenizer.with_context(|| format!("the tokenizer of {name} cannot be used"))?;
    let (tokens, rows) = (tokenizer.vocab_size() as usize, model.vocab_size);
    if tokens > rows {
        bail!(
            "the tokenizer of {name} has {tokens} tokens, but its model embeds only {rows}; they do not belong together: \
             put the `{TOKENIZER}` there that the model was trained with"
        );
    }
    Ok(tokenizer)
}
