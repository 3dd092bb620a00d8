//! What a finetuning run takes from the checkpoint it starts from, and the defaults that differ from pretraining.
//!
//! The shape and the tokenizer come with the weights, so a spec that says otherwise is refused; it may repeat what the
//! checkpoint says. The batch and the optimizer are inherited where the checkpoint is one of ours. The defaults are
//! for keeping what was learned: a rate at a tenth of the old peak (or 5e-5 where that is unknown, within the range of
//! Devlin et al., arXiv 1810.04805), warmed up over a tenth of the steps (there, and Howard and Ruder, arXiv
//! 1801.06146), because a rate raised back to the old peak costs more of the old task than it gains on the new one
//! (Ibrahim et al., arXiv 2403.08763); little weight decay; and a tenth of the steps.
//!
//! Every value that is inherited, defaulted or overridden becomes a line for the user.

use std::fmt::Debug;

use super::bounds::{number, real, shown};
use super::error::SpecError;
use super::file::{LoraTable, ModelTable, SpecFile, TokenizerTable, TrainTable};
use super::validate::{SpecMeant, TokenizerChoice};
use super::{Architecture, ModelConfig, RunKind, TrainConfig};

/// The checkpoint that a finetuning run starts from, as far as its spec is concerned.
#[derive(Clone, Copy, Debug)]
pub struct FinetuneBase<'a> {
    /// What the user named, resolved: `books@2000`, or a directory.
    pub name: &'a str,
    /// The shape of its weights.
    pub model: &'a ModelConfig,
    /// How it was trained; absent for a foreign checkpoint.
    pub train: Option<&'a TrainConfig>,
}

impl SpecFile {
    /// The finetuning run that is meant, from that checkpoint.
    pub fn finetune_from(&self, base: &FinetuneBase<'_>) -> Result<SpecMeant, SpecError> {
        let mut file = self.clone();
        refuse_tokenizer(&file.tokenizer, base)?;
        let mut notes = Vec::new();
        let model = inherit_model(&file.model, base, &mut notes)?;
        notes.push(format!("tokenizer (inherited from {})", base.name));
        let adapters = file.lora != LoraTable::default();
        fill_train(&mut file.train, base, adapters, &mut notes);
        file.meant(RunKind::Finetune, model, TokenizerChoice::Inherited, notes)
    }
}

fn refuse_tokenizer(table: &TokenizerTable, base: &FinetuneBase<'_>) -> Result<(), SpecError> {
    if *table == TokenizerTable::default() {
        return Ok(());
    }
    Err(SpecError::Inherited {
        key: "tokenizer".into(),
        given: "given".into(),
        base: base.name.into(),
        inherited: "its own".into(),
        next: "remove the [tokenizer] table, the checkpoint's is used".into(),
    })
}

fn inherit_model(
    table: &ModelTable,
    base: &FinetuneBase<'_>,
    notes: &mut Vec<String>,
) -> Result<ModelConfig, SpecError> {
    let mut model = base.model.clone();
    let single = |x: f32| number(x.to_string().parse().expect("a printed float parses"));
    let given_single = |x: Option<f64>| x.map(|x| single(x as f32));
    let whole = |x: Option<u64>| x.map(|x| x.to_string());
    let flag = |x: Option<bool>| x.map(|x| x.to_string());
    let given_llama = model.architecture == Architecture::Llama || table.rope_theta.is_some();
    let fields = [
        (
            "architecture",
            table.architecture.map(|a| a.to_string()),
            model.architecture.to_string(),
        ),
        (
            "depth",
            whole(table.depth),
            model.num_hidden_layers.to_string(),
        ),
        ("context", whole(table.context), model.context.to_string()),
        (
            "hidden_size",
            whole(table.hidden_size),
            model.hidden_size.to_string(),
        ),
        (
            "num_hidden_layers",
            whole(table.num_hidden_layers),
            model.num_hidden_layers.to_string(),
        ),
        (
            "num_attention_heads",
            whole(table.num_attention_heads),
            model.num_attention_heads.to_string(),
        ),
        (
            "num_key_value_heads",
            whole(table.num_key_value_heads),
            model.num_key_value_heads.to_string(),
        ),
        (
            "head_dim",
            whole(table.head_dim),
            model.head_dim().to_string(),
        ),
        (
            "attention_bias",
            flag(table.attention_bias),
            model.attention_bias.to_string(),
        ),
        ("qk_norm", flag(table.qk_norm), model.qk_norm.to_string()),
        (
            "intermediate_size",
            whole(table.intermediate_size),
            model.intermediate_size.to_string(),
        ),
        (
            "tie_word_embeddings",
            flag(table.tie_word_embeddings),
            model.tie_word_embeddings.to_string(),
        ),
        ("bias", flag(table.bias), model.bias.to_string()),
        (
            "norm_eps",
            given_single(table.norm_eps),
            single(model.norm_eps),
        ),
        (
            "rope_theta",
            given_single(table.rope_theta),
            single(model.rope_theta),
        ),
        (
            "initializer_range",
            given_single(table.initializer_range),
            single(model.initializer_range),
        ),
    ];
    // What only some models have is told where this one has it.
    let silent = |key: &str| match key {
        "depth" => true,
        "rope_theta" => !given_llama,
        "head_dim" => model.head_dim.is_none(),
        "attention_bias" => !model.attention_bias,
        "qk_norm" => !model.qk_norm,
        _ => false,
    };
    for (key, given, inherited) in fields {
        match given {
            Some(given) if given != inherited => return Err(refused(key, given, inherited, base)),
            None if silent(key) => {}
            _ => notes.push(format!(
                "model.{key} = {inherited} (inherited from {})",
                base.name
            )),
        }
    }
    if let Some(scaling) = model.rope_scaling {
        let line = format!(
            "model.rope_scaling = {scaling} (inherited from {})",
            base.name
        );
        notes.push(line);
    }
    override_dropout(table, &mut model, base, notes)?;
    Ok(model)
}

fn refused(key: &str, given: String, inherited: String, base: &FinetuneBase<'_>) -> SpecError {
    SpecError::Inherited {
        key: format!("model.{key}"),
        given,
        base: base.name.into(),
        inherited,
        next: "remove it: the shape comes with the weights".into(),
    }
}

/// Dropout changes no tensor, so finetuning may choose it.
fn override_dropout(
    table: &ModelTable,
    model: &mut ModelConfig,
    base: &FinetuneBase<'_>,
    notes: &mut Vec<String>,
) -> Result<(), SpecError> {
    let Some(dropout) = table.dropout else {
        return Ok(());
    };
    if model.architecture == Architecture::Llama && dropout != 0.0 {
        return Err(SpecError::impossible(
            "model.dropout",
            number(dropout),
            "`llama` has no dropout",
            "remove it",
        ));
    }
    let bound = "it must be at least 0 and below 1";
    real(
        "model.dropout",
        dropout,
        (0.0..1.0).contains(&(dropout as f32)),
        bound,
        "0.1 or 0.2 are usual",
    )?;
    notes.push(format!(
        "model.dropout = {} (given; {} had {})",
        number(dropout),
        base.name,
        model.dropout
    ));
    model.dropout = dropout as f32;
    Ok(())
}

fn fill_train(
    table: &mut TrainTable,
    base: &FinetuneBase<'_>,
    adapters: bool,
    notes: &mut Vec<String>,
) {
    let mut fill = Fill {
        name: base.name,
        notes,
    };
    if let Some(old) = base.train {
        fill.inherited("train.lanes", &mut table.lanes, u64::from(old.lanes));
        fill.inherited(
            "train.micro_batch",
            &mut table.micro_batch,
            u64::from(old.micro_batch),
        );
        fill.inherited(
            "train.accumulate",
            &mut table.accumulate,
            u64::from(old.accumulate),
        );
        fill.inherited("train.beta1", &mut table.beta1, old.beta1);
        fill.inherited("train.beta2", &mut table.beta2, old.beta2);
        fill.inherited("train.eps", &mut table.eps, old.eps);
        fill.inherited("train.grad_clip", &mut table.grad_clip, old.grad_clip);
    }
    // Adapters are few and begin at nothing: they stand, and need, about ten times the rate (Schulman et al., "LoRA
    // Without Regret", 2025).
    let (rate, why) = match (base.train, adapters) {
        (Some(old), true) => (old.learning_rate, "of adapters the old peak, or 5e-4"),
        (Some(old), false) => (old.learning_rate / 10.0, "a tenth of the old peak, or 5e-5"),
        (None, true) => (5e-4, "of adapters the old peak, or 5e-4"),
        (None, false) => (5e-5, "a tenth of the old peak, or 5e-5"),
    };
    let steps = base
        .train
        .map_or(200, |old| {
            let taken = old.steps * u64::from(old.inner_steps());
            (taken / 10).clamp(20, 2000)
        })
        .div_ceil(table.inner_steps_meant());
    fill.default("train.learning_rate", &mut table.learning_rate, rate, why);
    let steps = fill.default(
        "train.steps",
        &mut table.steps,
        steps,
        "a tenth of the old run, or 200",
    );
    fill.default(
        "train.warmup_steps",
        &mut table.warmup_steps,
        steps / 10,
        "a tenth of the steps",
    );
    fill.default("train.weight_decay", &mut table.weight_decay, 0.01, "");
}

/// Fills absent keys and tells where each value is from.
struct Fill<'a> {
    name: &'a str,
    notes: &'a mut Vec<String>,
}

impl Fill<'_> {
    fn inherited<T: Copy + Debug + PartialEq>(&mut self, key: &str, slot: &mut Option<T>, old: T) {
        let name = self.name;
        let line = match *slot {
            Some(given) if given != old => format!(
                "{key} = {} (given; {name} had {})",
                shown(given),
                shown(old)
            ),
            Some(given) => format!("{key} = {} (given, as {name})", shown(given)),
            None => format!("{key} = {} (inherited from {name})", shown(old)),
        };
        self.notes.push(line);
        slot.get_or_insert(old);
    }

    fn default<T: Copy + Debug>(
        &mut self,
        key: &str,
        slot: &mut Option<T>,
        default: T,
        why: &str,
    ) -> T {
        let reason = if why.is_empty() {
            String::new()
        } else {
            format!(": {why}")
        };
        let line = match *slot {
            Some(given) => format!("{key} = {} (given)", shown(given)),
            None => format!("{key} = {} (finetuning default{reason})", shown(default)),
        };
        self.notes.push(line);
        *slot.get_or_insert(default)
    }
}
