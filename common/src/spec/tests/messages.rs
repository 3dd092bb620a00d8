//! What each bad spec says to the person who wrote it.

use super::*;

/// The errors of several bad specs, one line each.
fn errors(specs: &[&str]) -> String {
    let lines: Vec<String> = specs
        .iter()
        .map(|text| match file(text).and_then(|f| f.validate()) {
            Ok(_) => format!("ACCEPTED: {text}"),
            Err(error) => error.to_string(),
        })
        .collect();
    lines.join("\n")
}

fn set_error(assignments: &[&str]) -> String {
    let mut source = SpecSource::parse("spec.toml", "[train]\nsteps = 100\n").unwrap();
    let outcome = assignments
        .iter()
        .try_for_each(|a| source.set(a))
        .and_then(|()| source.into_file())
        .and_then(|f| f.validate());
    outcome.expect_err("the override is bad").to_string()
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    insta::assert_snapshot!(errors(&[
        "[train]\nsteps = 5\nstepz = 10\n",
        "[train]\nlr = 1e-3\n",
        "[model]\nn_layer = 6\n",
        "[model]\nlearning_rate = 0.1\n",
        "[train]\nfrobnicate = 1\n",
        "[modle]\ncontext = 5\n",
        "[quantisation]\nbits = 4\n",
        "steps = 5\n",
        "wibble = 5\n",
    ]), @r#"
    unknown key `train.stepz` in table [train] (spec.toml, line 3); did you mean `train.steps`?
    unknown key `train.lr` in table [train] (spec.toml, line 2); did you mean `train.learning_rate`?
    unknown key `model.n_layer` in table [model] (spec.toml, line 2); did you mean `model.num_hidden_layers`?
    unknown key `model.learning_rate` in table [model] (spec.toml, line 2); did you mean `train.learning_rate`?
    unknown key `train.frobnicate` in table [train] (spec.toml, line 2); [train] takes steps, lanes, micro_batch, accumulate, learning_rate, min_learning_rate, warmup_steps, schedule, decay_steps, beta1, beta2, eps, weight_decay, grad_clip, precision, payload, sync, inner_steps, outer_learning_rate, outer_momentum, gradient_checkpointing, seed, eval_every, eval_samples, freeze_layers, layer_decay, unfreeze_every, data_share, replay, early_stopping_patience, max_forgetting, max_length, min_workers
    unknown table [modle] (spec.toml, line 1); did you mean [model]?
    unknown table [quantisation] (spec.toml, line 1); a spec has the tables model, corpus, tokenizer, train, checkpoint, mixture, lora, samples, watchdog
    unknown key `steps` outside any table (spec.toml, line 1); did you mean `train.steps`?
    unknown key `wibble` outside any table (spec.toml, line 1); a spec has the tables model, corpus, tokenizer, train, checkpoint, mixture, lora, samples, watchdog
    "#);
}

#[test]
fn wrong_types_say_what_was_expected() {
    insta::assert_snapshot!(errors(&[
        "[train]\nsteps = \"many\"\n",
        "[train]\n\nsteps = 1.5\n",
        "[train]\nsteps = -1\n",
        "[train]\nlearning_rate = true\n",
        "[train]\nschedule = \"cosinus\"\n",
        "[model]\narchitecture = \"bert\"\n",
        "[corpus]\nskip_bad = 1\n",
        "[corpus]\npaths = [1, 2]\n",
        "train = 5\n",
        "[train\nsteps = 5\n",
        "[train]\nsteps = 5\nsteps = 6\n",
    ]), @r#"
    `train.steps` must be a whole number, 0 or more, but it is the string "many" (spec.toml, line 2)
    `train.steps` must be a whole number, 0 or more, but it is the number 1.5 (spec.toml, line 3)
    `train.steps` must be a whole number, 0 or more, but it is the number -1 (spec.toml, line 2)
    `train.learning_rate` must be a number, but it is the boolean true (spec.toml, line 2)
    `train.schedule` must be one of `cosine`, `linear`, `wsd`, `constant`, but it is the string "cosinus" (spec.toml, line 2)
    `model.architecture` must be `llama` or `gpt2`, but it is the string "bert" (spec.toml, line 2)
    `corpus.skip_bad` must be true or false, but it is the number 1 (spec.toml, line 2)
    `corpus.paths` must be a string or a list of strings, but it is the list [1, 2] (spec.toml, line 2)
    `train` must be a table, as in `[train]`, but it is the number 5 (spec.toml, line 1)
    spec.toml, line 1: unclosed table, expected `]`; the file must be TOML
    spec.toml, line 3: duplicate key; the file must be TOML
    "#);
}

#[test]
fn impossible_models_name_value_bound_and_next_step() {
    insta::assert_snapshot!(errors(&[
        "[model]\nhidden_size = 100\nnum_attention_heads = 3\n",
        "[model]\nhidden_size = 100\nnum_attention_heads = 0\n",
        "[model]\nnum_attention_heads = 6\nnum_key_value_heads = 4\n",
        "[model]\nhidden_size = 15\nnum_attention_heads = 3\n",
        "[model]\ndropout = 0.1\n",
        "[model]\nbias = true\n",
        "[model]\nhead_dim = 15\n",
        "[model]\nhead_dim = 0\n",
        "[model]\nqk_norm = true\nattention_bias = true\n",
        "[model]\narchitecture = \"gpt2\"\nhead_dim = 32\n",
        "[model]\narchitecture = \"gpt2\"\nqk_norm = true\n",
        "[model]\narchitecture = \"gpt2\"\ndropout = 1.0\n",
        "[model]\narchitecture = \"gpt2\"\ndropout = nan\n",
        "[model]\narchitecture = \"gpt2\"\nrope_theta = 10000\n",
        "[model]\narchitecture = \"gpt2\"\ntie_word_embeddings = false\n",
        "[model]\nnum_key_value_heads = 2\narchitecture = \"gpt2\"\n",
        "[model]\ncontext = 0\n",
        "[model]\nnorm_eps = 1e-60\n",
        "[model]\nhidden_size = 65536\nnum_hidden_layers = 1024\n",
        "[model]\ndepth = 4\narchitecture = \"gpt2\"\n",
        "[model]\ndepth = 4\nnum_hidden_layers = 6\n",
        "[model]\ndepth = 0\n",
    ]), @r#"
    `model.hidden_size` is 100, but it must be a multiple of `model.num_attention_heads`, which is 3; 99 or 102 would do
    `model.num_attention_heads` is 0, but it must lie between 1 and 4096; heads of 64 are usual
    `model.num_key_value_heads` is 4, but it must divide `model.num_attention_heads`, which is 6; take one of 1, 2, 3, 6
    `model.num_attention_heads` is 3, but a head would be 5 wide, and rotary positions turn pairs; heads must divide 15 into even widths
    `model.dropout` is 0.1, but `llama` has no dropout; remove it, or take `model.architecture = "gpt2"`
    `model.bias` is true, but `llama` has no biases but those of `model.attention_bias`; remove it, or take `model.architecture = "gpt2"`
    `model.head_dim` is 15, but rotary positions turn pairs, so it must be even; 14 or 16 would do
    `model.head_dim` is 0, but it must lie between 1 and 1024; 64 is usual
    `model.qk_norm` is true, but no model of Hugging Face's has it together with `model.attention_bias`; remove one of the two
    `model.head_dim` is 32, but `gpt2` cuts `model.hidden_size` into heads; remove it, or take `model.architecture = "llama"`
    `model.qk_norm` is true, but it is of `llama` alone; `gpt2` has `model.bias`; remove it, or take `model.architecture = "llama"`
    `model.dropout` is 1, but it must be at least 0 and below 1; 0.1 or 0.2 are usual
    `model.dropout` is NaN, but it must be at least 0 and below 1; 0.1 or 0.2 are usual
    `model.rope_theta` is 10000, but `gpt2` learns its positions and rotates nothing; remove it, or take `model.architecture = "llama"`
    `model.tie_word_embeddings` is false, but `gpt2` always ties its head to the embedding; remove it, or take `model.architecture = "llama"`
    `model.num_key_value_heads` is 2, but `gpt2` has as many as `model.num_attention_heads`, which is 6; remove it, or take `model.architecture = "llama"`
    `model.context` is 0, but it must lie between 1 and 1048576; 256 is the default
    `model.norm_eps` is 1e-60, but it must be above 0, at most 1, and fit 32 bits; 1e-5 is usual
    `model.hidden_size` is 65536, but with 1024 layers that makes 52781255819264 parameters, and every worker would need 844.5 TB for them; make the model smaller
    `model.depth` is 4, but the dial is for `llama`, and the architecture is `gpt2`; give the sizes one by one, or remove `model.architecture`
    `model.depth` is 4, but `model.num_hidden_layers` is 6; remove one of the two
    `model.depth` is 0, but it must lie between 1 and 64; 6 makes a model of about 12 million parameters
    "#);
}

#[test]
fn impossible_recipes_name_value_bound_and_next_step() {
    insta::assert_snapshot!(errors(&[
        "[train]\nlanes = 0\n",
        "[train]\nlanes = 100000\n",
        "[train]\nsteps = 0\n",
        "[train]\nmicro_batch = 0\n",
        "[train]\nlearning_rate = -1e-3\n",
        "[train]\nlearning_rate = nan\n",
        "[train]\nlearning_rate = 1e-4\nmin_learning_rate = 1e-3\n",
        "[train]\nsteps = 10\nwarmup_steps = 20\n",
        "[train]\nsteps = 10\nschedule = \"wsd\"\ndecay_steps = 20\n",
        "[train]\nbeta2 = 1.0\n",
        "[train]\ngrad_clip = inf\n",
        "[train]\nweight_decay = -0.1\n",
        "[train]\nlanes = 2\nmin_workers = 3\n",
        "[train]\nlanes = 4096\nmicro_batch = 1000\naccumulate = 1000\n",
        "[train]\nmicro_batch = 65536\n[model]\ncontext = 65536\n",
        "[corpus]\nvalidation = 1.0\n",
        "[corpus]\nvalidation = nan\n",
        "[tokenizer]\nvocab_size = 10\n",
        "[tokenizer]\nkind = \"file\"\n",
        "[tokenizer]\nkind = \"char\"\nvocab_size = 300\n",
        "[checkpoint]\nkeep = 0\n",
    ]), @r#"
    `train.lanes` is 0, but it must lie between 1 and 16384; 8 is the default, and any number of workers shares them
    `train.lanes` is 100000, but it must lie between 1 and 16384; 8 is the default, and any number of workers shares them
    `train.steps` is 0, but it must lie between 1 and 2147483648; 1000 is the default
    `train.micro_batch` is 0, but it must lie between 1 and 65536; 4 is the default
    `train.learning_rate` is -0.001, but it must be above 0 and at most 1; 1e-3 suits a small model, 1e-4 a large one
    `train.learning_rate` is NaN, but it must be above 0 and at most 1; 1e-3 suits a small model, 1e-4 a large one
    `train.min_learning_rate` is 0.001, but it must lie between 0 and `train.learning_rate`, which is 0.0001; leave it out for a tenth of the peak
    `train.warmup_steps` is 20, but the run has only 10 steps; leave it out for a twentieth of the steps, or raise `train.steps`
    `train.decay_steps` is 20, but after warm-up the run has only 10 steps; leave it out for a fifth of the steps, or raise `train.steps`
    `train.beta2` is 1, but it must be at least 0 and below 1; 0.95 is usual
    `train.grad_clip` is inf, but it must be 0 or more and finite; 1.0 is usual, 0 turns clipping off
    `train.weight_decay` is -0.1, but it must lie between 0 and 1; 0.1 is usual
    `train.min_workers` is 3, but there are only 2 lanes to share; raise `train.lanes`, or wait for fewer workers
    `train.accumulate` is 1000, but a step would take 4096000000 samples, and the most is 2147483648; lower `train.lanes`, `train.accumulate` or `train.micro_batch`
    `train.micro_batch` is 65536, but with samples of 65536 that is 4294967296 tokens at once, and the most is 67108864; lower it and raise `train.accumulate`, which costs no memory
    `corpus.validation` is 1, but it must lie between 0 and 1, both excluded; 0.1 holds out a tenth
    `corpus.validation` is NaN, but it must lie between 0 and 1, both excluded; 0.1 holds out a tenth
    `tokenizer.vocab_size` is 10, but it must lie between 257 and 1048576; 256 of them are the bytes; 4096 suits a small model
    `tokenizer.path` is missing: the kind is `file`; name a tokenizer.json
    `tokenizer.vocab_size` is 300, but only `bpe` takes one; the others have the size that they have; remove it
    `checkpoint.keep` is 0, but it must lie between 1 and 1000000; the best one stays besides
    "#);
}

#[test]
fn samples_that_cannot_be_written_name_value_bound_and_next_step() {
    let many = format!("[samples]\nprompts = {:?}\n", ["a"; 17]);
    let long = format!("[samples]\nprompts = \"{}\"\n", "ab ".repeat(4000));
    insta::assert_snapshot!(errors(&[
        "[samples]\ntokens = 5\n",
        "[samples]\nprompts = [1]\n",
        &many,
        &long,
        "[samples]\nprompts = \"a\"\ntokens = 0\n",
        "[samples]\nprompts = \"a\"\ntokens = 2000\n",
        "[samples]\nprompts = \"a\"\ntemperature = -1\n",
        "[samples]\nprompts = \"a\"\ntemperature = nan\n",
        "[samples]\nprompts = \"a\"\ntop_k = 0\n",
        "[samples]\nprompts = \"a\"\nevery = 0\n",
        "[samples]\nprompt = \"a\"\n",
        "[samples]\nprompts = \"a\"\n[corpus]\nobjective = \"classify\"\n",
    ]), @r#"
    `samples.prompts` is missing: the spec has a [samples] table; set it, or pass `--sample-prompt TEXT`; or remove the table
    `samples.prompts` must be a string or a list of strings, but it is the list [1] (spec.toml, line 2)
    `samples.prompts` is a list of 17, but there may be at most 16; each is written after at every validation; keep those that tell most
    `samples.prompts` is "ab ab ab ab ab ab ab"... of 12000 bytes, but a prompt has at most 8192; take a shorter one
    `samples.tokens` is 0, but it must lie between 1 and 1024; 48 is the default
    `samples.tokens` is 2000, but it must lie between 1 and 1024; 48 is the default
    `samples.temperature` is -1, but it must be from 0 to 100; 0.8 is the default, and 0 always takes the likeliest token
    `samples.temperature` is NaN, but it must be from 0 to 100; 0.8 is the default, and 0 always takes the likeliest token
    `samples.top_k` is 0, but it must lie between 1 and 4294967295; leave it out to draw among all tokens
    `samples.every` is 0, but it must lie between 1 and 1000000; 1 writes at every validation
    unknown key `samples.prompt` in table [samples] (spec.toml, line 2); did you mean `samples.prompts`?
    `samples.prompts` is ["a"], but a classifier has no head for text and writes nothing; remove the [samples] table
    "#);
}

#[test]
fn overrides_name_themselves_in_errors() {
    let lines: Vec<String> = [
        vec!["train.steps"],
        vec!["=5"],
        vec!["train.steps="],
        vec!["train.stepz=5"],
        vec!["train.steps=many"],
        vec!["steps=5"],
        vec!["train.steps.x=5"],
        vec!["train=5", "train.steps=5"],
    ]
    .iter()
    .map(|a| set_error(a))
    .collect();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    `--set train.steps`: there is no `=`; write it as `--set train.steps=500`
    `--set =5`: there is no key before `=`; write it as `--set train.steps=500`
    `--set train.steps=`: there is no value after `=`; write it as `--set train.steps=500`
    unknown key `train.stepz` in table [train] (--set train.stepz=5); did you mean `train.steps`?
    `train.steps` must be a whole number, 0 or more, but it is the string "many" (--set train.steps=many)
    unknown key `steps` outside any table (--set steps=5); did you mean `train.steps`?
    unknown key `train.steps.x` in table [train] (--set train.steps.x=5); did you mean `train.steps`?
    `--set train.steps=5`: `train` is not a table; write it as `--set train.steps=500`
    "#);
}

#[test]
fn presets_that_do_not_exist_name_the_nearest() {
    let lines = ["smal", "nanogpt-shakespear", "llama-405b-instruct"]
        .map(|n| Preset::find(n).unwrap_err().to_string());
    insta::assert_snapshot!(lines.join("\n"), @r#"
    there is no preset `smal`; did you mean `small`?
    there is no preset `nanogpt-shakespear`; did you mean `nanogpt-shakespeare-cpu`?
    there is no preset `llama-405b-instruct`; there are tiny, shakespeare-quick, nanogpt-shakespeare-cpu, shakespeare-cpu, small, gpt2
    "#);
}
