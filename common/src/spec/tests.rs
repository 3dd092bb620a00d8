//! The spec from outside: what defaults hold, what is derived, and that no text makes it panic.

use proptest::prelude::*;

use super::*;
use crate::layout::Layout;

mod messages;

fn corpus(vocab_size: usize, fingerprint: &str) -> CorpusFacts {
    CorpusFacts {
        vocab_size,
        fingerprint: fingerprint.into(),
        ..CorpusFacts::default()
    }
}

fn file(text: &str) -> Result<SpecFile, SpecError> {
    SpecSource::parse("spec.toml", text)?.into_file()
}

fn meant(text: &str) -> SpecMeant {
    file(text)
        .and_then(|f| f.validate())
        .unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn overrides_win_and_take_bare_strings() {
    let mut source = SpecSource::parse("spec.toml", "[train]\nsteps = 100\n").unwrap();
    for assignment in [
        "train.steps=7",
        "train.schedule=linear",
        " train.learning_rate = 1e-2 ",
        "corpus.paths=a b/*.txt",
        "tokenizer.path=\"x.json\"",
    ] {
        source.set(assignment).unwrap();
    }
    let meant = source.into_file().unwrap().validate().unwrap();
    assert_eq!(meant.train.steps, 7);
    assert_eq!(meant.train.schedule, ScheduleKind::Linear);
    assert_eq!(meant.train.learning_rate, 1e-2);
    assert_eq!(meant.corpus.paths, ["a b/*.txt"]);
    assert_eq!(
        meant.tokenizer,
        TokenizerChoice::File {
            path: "x.json".into()
        }
    );
}

#[test]
fn an_empty_spec_has_every_default() {
    let meant = meant("");
    assert_eq!(meant.train.lanes, 8);
    assert_eq!(meant.train.warmup_steps, 50);
    assert_eq!(meant.train.min_learning_rate, 1e-4);
    assert_eq!(
        meant.checkpoint,
        CheckpointConfig {
            every: 100,
            keep: 3
        }
    );
    let missing = meant.corpus.require_paths().unwrap_err();
    insta::assert_snapshot!(missing, @"`corpus.paths` is missing: there is no text to train on; pass `--corpus PATH` or set it in the spec");
}

#[test]
fn every_preset_is_valid_and_survives_a_short_run() {
    for preset in PRESETS {
        for steps in ["1", "7", "20"] {
            let mut source = preset.source().unwrap();
            source.set(&format!("train.steps={steps}")).unwrap();
            let spec = source.into_file().unwrap().validate().unwrap();
            assert!(spec.notes.is_empty(), "{}: {:?}", preset.name, spec.notes);
        }
    }
}

#[test]
fn nanogpts_recipe_is_nanogpts() {
    let meant = Preset::find("nanogpt-shakespeare-cpu")
        .and_then(|p| p.source()?.into_file()?.validate())
        .unwrap();
    let (m, t) = (&meant.model, &meant.train);
    assert_eq!(
        (
            m.hidden_size,
            m.num_hidden_layers,
            m.num_attention_heads,
            m.context
        ),
        (128, 4, 4, 64)
    );
    assert_eq!((m.intermediate_size, m.bias, m.dropout), (512, false, 0.0));
    assert_eq!(
        (t.lanes, t.micro_batch, t.accumulate, t.samples_per_step()),
        (4, 3, 1, 12)
    );
    assert_eq!(
        (t.steps, t.warmup_steps, t.schedule),
        (2000, 100, ScheduleKind::Cosine)
    );
    assert_eq!((t.learning_rate, t.min_learning_rate), (1e-3, 1e-4));
    assert_eq!(
        (t.beta1, t.beta2, t.weight_decay, t.grad_clip),
        (0.9, 0.99, 0.1, 1.0)
    );
    assert_eq!(meant.tokenizer, TokenizerChoice::Char);
    assert_eq!(
        (meant.corpus.validation, meant.corpus.split),
        (0.1, SplitKind::Tail)
    );
}

#[test]
fn gpt2_has_its_published_size() {
    let meant = Preset::find("gpt2")
        .and_then(|p| p.source()?.into_file()?.validate())
        .unwrap();
    assert_eq!(Layout::of(&meant.assumed_model()).len(), 124_439_808);
}

#[test]
fn depth_says_what_it_derives() {
    let meant = meant("[model]\ndepth = 8\ncontext = 256\n[train]\nlanes = 8\n");
    insta::assert_snapshot!(meant.notes.join("\n"), @r#"
    model.num_hidden_layers = 8 (from depth 8)
    model.hidden_size = 512 (from depth 8: 64 per layer)
    model.num_attention_heads = 8 (from depth 8: heads of 64)
    model.num_key_value_heads = 8 (from depth 8: one per head)
    model.intermediate_size = 1408 (from depth 8: 8/3 of the width)
    model.context = 256 (given; depth 8 would derive 512)
    train.learning_rate = 0.0023 (from depth 8: 0.3118 C^-0.125)
    train.lanes = 8 (given)
    train.micro_batch = 8 (from depth 8: about 2,048 tokens)
    train.accumulate = 8 (from depth 8: a batch near 106079 tokens, 0.292 C^0.3271)
    train.steps = 4242 (from depth 8: 20 tokens per parameter)
    train.warmup_steps = 84 (from depth 8: a fiftieth of the steps)
    "#);
}

#[test]
fn every_depth_is_a_valid_spec() {
    let mut last = 0;
    for depth in 1..=32 {
        let meant = meant(&format!("[model]\ndepth = {depth}\n"));
        let parameters = Layout::of(&meant.assumed_model()).len();
        assert!(
            parameters > last,
            "depth {depth} has {parameters} parameters"
        );
        last = parameters;
    }
}

fn base() -> RunSpec {
    meant("[model]\ncontext = 128\nrope_theta = 5e5\n[train]\nsteps = 2000\nlanes = 3\nlearning_rate = 2e-3\n")
        .run_spec(corpus(4096, "base-corpus"), None)
        .unwrap()
}

#[test]
fn finetuning_says_what_it_inherits_and_overrides() {
    let base = base();
    let base = FinetuneBase {
        name: "books@2000",
        model: &base.model,
        train: Some(&base.train),
    };
    let spec =
        file("[model]\ncontext = 128\nnorm_eps = 1e-5\n[train]\nmicro_batch = 2\nsteps = 50\n")
            .unwrap();
    let meant = spec.finetune_from(&base).unwrap();
    assert_eq!(meant.kind, RunKind::Finetune);
    assert_eq!(&meant.model, base.model);
    assert_eq!(meant.tokenizer, TokenizerChoice::Inherited);
    insta::assert_snapshot!(meant.notes.join("\n"), @r#"
    model.architecture = llama (inherited from books@2000)
    model.context = 128 (inherited from books@2000)
    model.hidden_size = 384 (inherited from books@2000)
    model.num_hidden_layers = 6 (inherited from books@2000)
    model.num_attention_heads = 6 (inherited from books@2000)
    model.num_key_value_heads = 6 (inherited from books@2000)
    model.intermediate_size = 1024 (inherited from books@2000)
    model.tie_word_embeddings = true (inherited from books@2000)
    model.bias = false (inherited from books@2000)
    model.norm_eps = 1e-5 (inherited from books@2000)
    model.rope_theta = 500000 (inherited from books@2000)
    model.initializer_range = 0.02 (inherited from books@2000)
    tokenizer (inherited from books@2000)
    train.lanes = 3 (inherited from books@2000)
    train.micro_batch = 2 (given; books@2000 had 4)
    train.accumulate = 1 (inherited from books@2000)
    train.beta1 = 0.9 (inherited from books@2000)
    train.beta2 = 0.95 (inherited from books@2000)
    train.eps = 1e-8 (inherited from books@2000)
    train.grad_clip = 1 (inherited from books@2000)
    train.learning_rate = 0.0002 (finetuning default: a tenth of the old peak, or 5e-5)
    train.steps = 50 (given)
    train.warmup_steps = 5 (finetuning default: a tenth of the steps)
    train.weight_decay = 0.01 (finetuning default)
    "#);
}

#[test]
fn what_only_some_models_have_is_taken_and_left_out_of_the_json_of_others() {
    let plain = meant("[model]\nhead_dim = 64\n").model;
    assert_eq!(plain, meant("").model, "the width that heads have anyway");
    let json = serde_json::to_string(&plain).unwrap();
    for key in ["head_dim", "attention_bias", "qk_norm", "rope_scaling"] {
        assert!(!json.contains(key), "{json}");
    }
    let wide = meant("[model]\nhidden_size = 100\nhead_dim = 48\nqk_norm = true\n").model;
    assert_eq!((wide.num_attention_heads, wide.head_dim), (2, Some(48)));
    assert!(wide.qk_norm && wide.attention_width() == 96);
    let scaled = ModelConfig {
        attention_bias: true,
        rope_scaling: Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }),
        ..wide
    };
    let json = serde_json::to_string(&scaled).unwrap();
    assert!(
        json.contains(r#""rope_scaling":{"rope_type":"llama3","factor":8.0"#),
        "{json}"
    );
    assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), scaled);
}

#[test]
fn impossible_scalings_are_named() {
    let llama3 = |factor, low, high, original| RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    };
    assert_eq!(llama3(8.0, 1.0, 4.0, 8192).fault(), None);
    assert_eq!(RopeScaling::Linear { factor: 2.0 }.fault(), None);
    for (bad, named) in [
        (RopeScaling::Linear { factor: 0.5 }, "`factor` is 0.5"),
        (llama3(f32::NAN, 1.0, 4.0, 8192), "`factor` is NaN"),
        (llama3(8.0, 4.0, 4.0, 8192), "`high_freq_factor` is 4"),
        (
            llama3(8.0, 1.0, 4.0, 0),
            "`original_max_position_embeddings` is 0",
        ),
    ] {
        let fault = bad.fault().unwrap();
        assert!(fault.contains(named), "{fault}");
    }
}

#[test]
fn finetuning_refuses_another_shape() {
    let base = base();
    let base = FinetuneBase {
        name: "books@2000",
        model: &base.model,
        train: None,
    };
    let lines = [
        "[model]\ncontext = 64\n",
        "[model]\narchitecture = \"gpt2\"\n",
        "[model]\ndepth = 2\n",
        "[model]\ndropout = 0.1\n",
        "[tokenizer]\nkind = \"char\"\n",
    ]
    .map(|text| {
        file(text)
            .unwrap()
            .finetune_from(&base)
            .unwrap_err()
            .to_string()
    });
    insta::assert_snapshot!(lines.join("\n"), @r#"
    `model.context` is 64, but books@2000 has 128; remove it: the shape comes with the weights
    `model.architecture` is gpt2, but books@2000 has llama; remove it: the shape comes with the weights
    `model.depth` is 2, but books@2000 has 6; remove it: the shape comes with the weights
    `model.dropout` is 0.1, but `llama` has no dropout; remove it
    `tokenizer` is given, but books@2000 has its own; remove the [tokenizer] table, the checkpoint's is used
    "#);
    let meant = file("").unwrap().finetune_from(&base).unwrap();
    assert_eq!(
        (
            meant.train.learning_rate,
            meant.train.steps,
            meant.train.warmup_steps
        ),
        (5e-5, 200, 20)
    );
    let error = meant.run_spec(corpus(5000, "c"), None).unwrap_err();
    insta::assert_snapshot!(error, @"`tokenizer.vocab_size` is 5000, but the checkpoint embeds 4096 tokens; finetune with the tokenizer that the checkpoint was trained with");
}

#[test]
fn a_run_introduces_itself() {
    insta::assert_snapshot!(base().describe(), @r#"
    pretrain llama, 12.2M parameters
      model       6 layers, 384 wide, 6 heads (6 key/value), feed-forward 1024, context 128, vocabulary 4096
      step        3 lanes x 1 micro-batches x 4 samples = 1536 tokens
      length      2000 steps, 3.1M tokens, seed 1337
      rate        0.002 to 0.0002 along a cosine, 100 steps of warm-up
      optimizer   AdamW, betas 0.9 and 0.95, eps 1e-8, weight decay 0.1, clip 1
      validation  every 200 steps, at most 1024 samples
      checkpoints every 200 steps, the last 3 and the best stay
      memory      about 552.2 MB per worker (195.1 MB state, 357.0 MB activations)
      corpus      base-corpus
    "#);
}

#[test]
fn identity_changes_with_what_changes_the_weights_only() {
    let spec = base();
    let id = spec.identity();
    assert_eq!(id.len(), 64);
    let with = |change: &dyn Fn(&mut RunSpec)| {
        let mut other = spec.clone();
        change(&mut other);
        other.identity()
    };
    assert_eq!(id, with(&|s| s.checkpoint.every = 1));
    assert_eq!(id, with(&|s| s.train.eval_every = 1));
    assert_eq!(id, with(&|s| s.train.eval_samples = 1));
    assert_eq!(id, with(&|s| s.train.min_workers = 2));
    assert_eq!(id, with(&|s| s.train.gradient_checkpointing = true));
    assert_eq!(id, with(&|s| s.samples = prompts("prompts = 'a'")));
    assert_ne!(id, with(&|s| s.train.seed = 1));
    assert_ne!(id, with(&|s| s.train.steps += 1));
    assert_ne!(id, with(&|s| s.train.lanes = 4));
    assert_ne!(id, with(&|s| s.train.learning_rate *= 1.0 + 1e-15));
    assert_ne!(id, with(&|s| s.model.context = 64));
    assert_ne!(id, with(&|s| s.corpus = "another".into()));
    let start = |source: &str, weights: &str| StartPoint {
        source: source.into(),
        weights: weights.into(),
        base_corpus: None,
    };
    let started = with(&|s| s.start = Some(start("books@2000", "aa")));
    assert_ne!(id, started);
    assert_eq!(
        started,
        with(&|s| s.start = Some(start("books@best", "aa")))
    );
    assert_ne!(
        started,
        with(&|s| s.start = Some(start("books@2000", "bb")))
    );
}

/// What a table `samples` means.
fn prompts(table: &str) -> Option<SampleConfig> {
    meant(&format!("[samples]\n{table}\n")).samples
}

#[test]
fn samples_have_defaults_and_a_run_that_goes_on_changes_some() {
    let first = prompts("prompts = 'Once'").unwrap();
    let shown = first.to_string();
    insta::assert_snapshot!(shown, @"1 prompt, up to 48 tokens each, temperature 0.8, at every validation");
    let table = |text: &str| file(&format!("[samples]\n{text}\n")).unwrap().samples;
    let changed = |text: &str| SampleConfig::changed(Some(&first), &table(text)).unwrap();
    assert_eq!(changed(""), Some(first.clone()));
    let greedy = changed("temperature = 0\nevery = 3\ntop_k = 5").unwrap();
    assert_eq!(greedy.prompts, first.prompts);
    let shown = greedy.to_string();
    insta::assert_snapshot!(shown, @"1 prompt, up to 48 tokens each, the likeliest, top 5, at the start, the end, and every 3 validations");
    assert_eq!(changed("prompts = ['a', 'b']").unwrap().prompts, ["a", "b"]);
    assert_eq!(changed("prompts = []"), None);
    assert_eq!(prompts("prompts = []\ntokens = 9"), None);
}

#[test]
fn a_spec_survives_being_written_and_read() {
    let mut spec = base();
    let text = serde_json::to_string(&spec).unwrap();
    // As it was before there were samples.
    assert!(!text.contains("\"samples\""), "{text}");
    assert_eq!(spec, serde_json::from_str(&text).unwrap());
    spec.samples = prompts("prompts = 'a'\ntop_k = 3");
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(spec, serde_json::from_str(&text).unwrap());
    for preset in PRESETS {
        let file = preset.source().unwrap().into_file().unwrap();
        let text = toml::to_string(&file).unwrap();
        assert_eq!(
            file,
            SpecSource::parse("again", &text)
                .unwrap()
                .into_file()
                .unwrap()
        );
    }
}

/// Plausible values, with the extremes that break careless arithmetic.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|i| i.to_string()),
        (0i64..5000).prop_map(|i| i.to_string()),
        any::<f64>().prop_map(|x| format!("{x:?}").replace("NaN", "nan")),
        Just("nan".into()),
        Just("true".into()),
        Just("\"llama\"".into()),
        Just("\"gpt2\"".into()),
        Just("\"wsd\"".into()),
        Just("[\"a\", \"b\"]".into()),
        Just("{ a = 1 }".into()),
        "[a-z=\\[\\]\"{}.#\n0-9]{0,20}",
    ]
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(\\PC|\n){0,200}") {
        let _ = file(&text).and_then(|f| f.validate());
    }

    #[test]
    fn no_toml_makes_it_panic(pairs in prop::collection::vec((prop::sample::select(file::known_keys()), value()), 0..8)) {
        let base = base();
        let base = FinetuneBase { name: "b", model: &base.model, train: Some(&base.train) };
        let mut source = SpecSource::empty();
        for (key, value) in &pairs {
            let _ = source.set(&format!("{key}={value}"));
        }
        if let Ok(file) = source.into_file() {
            for meant in [file.validate(), file.finetune_from(&base)].into_iter().flatten() {
                if let Ok(spec) = meant.run_spec(corpus(1000, "corpus"), None) {
                    prop_assert!(!spec.describe().is_empty());
                    prop_assert!(crate::schedule::learning_rate(&spec.train, 1).is_finite());
                }
            }
        }
    }

    #[test]
    fn no_override_makes_it_panic(assignment in "\\PC{0,60}") {
        let mut source = SpecSource::empty();
        if source.set(&assignment).is_ok() {
            let _ = source.into_file().and_then(|f| f.validate());
        }
    }
}
