//! Writes `fuzz/seeds`: for each target a few inputs that are as they should be, for a fuzzer to change.
//! `cargo run -p cohort-fuzz --example seeds`, from the root of the repository.

use std::error::Error;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use cohort_common::checkpoint::{FORMAT, FileEntry, Manifest};
use cohort_common::cluster::messages::LaneSums;
use cohort_common::corpus::{PrepareRequest, SourceFile, TokenizerConfig, char_tokenizer, prepare};
use cohort_common::hf::{SpecialTokens, config_json};
use cohort_common::ledger::Entry;
use cohort_common::seal::Sealer;
use cohort_common::security::{ClusterToken, Fingerprint, Role};
use cohort_common::spec::{CorpusFacts, PRESETS, SpecSource};
use cohort_common::supervised::DEFAULT_TEMPLATE;
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use prost::Message as _;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    documents()?;
    tensors_and_tokens()?;
    specs_and_checkpoints()?;
    corpora()?;
    messages()
}

fn seed(target: &str, name: &str, content: impl AsRef<[u8]>) -> Outcome {
    let folder = Path::new("fuzz/seeds").join(target);
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join(name), content)?)
}

/// Files that others wrote, and small ones by hand.
fn documents() -> Outcome {
    let golden = Path::new("common/golden/formats");
    for (target, name) in [
        ("parquet", "docs-zstd.parquet"),
        ("parquet", "docs-delta-byte-array.parquet"),
        ("parquet", "docs-pages.parquet"),
        ("parquet", "docs-duckdb.parquet"),
        ("parquet", "nested.parquet"),
        ("arrow", "docs-datasets.arrow"),
        ("arrow", "docs-dictionary.arrow"),
        ("arrow", "docs-lz4.arrow"),
        ("arrow", "docs-polars.arrow"),
        ("arrow", "nested.arrow"),
    ] {
        seed(target, name, fs::read(golden.join(name))?)?;
    }
    let pairs =
        "{\"prompt\": \"2 + 2?\", \"response\": \"4\"}\n{\"text\": \"a\\n€\", \"label\": 1}\n";
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
    seed("jsonl", "pairs", pairs)?;
    seed("jsonl", "chat", chat)?;
    seed(
        "json",
        "array",
        format!("[{chat},\n {{\"text\": \"}}\\\"\"}}]"),
    )?;
    seed("json", "sequence", pairs)?;
    seed(
        "csv",
        "table",
        "text,label\r\n\"a, \"\"b\"\"\nc\",1\r\nd,spam\r\n",
    )?;
    seed("csv", "pairs", "\u{feff}prompt,response\n2 + 2?,4\n")?;
    let warc = |kind: &str, body: &str| {
        let length = body.len();
        format!("WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}\r\n\r\n")
    };
    seed(
        "warc",
        "records",
        warc("warcinfo", "a: b") + &warc("conversion", "some text, €"),
    )?;
    let text = "the cat sat on the mat, the cat sat on the mat\n".repeat(4);
    let mut gz = flate2::write::GzEncoder::new(vec![0], flate2::Compression::fast());
    gz.write_all(text.as_bytes())?;
    seed("packed", "gz", gz.finish()?)?;
    let zst = zstd::encode_all(text.as_bytes(), 1)?;
    seed("packed", "zst", [&[1], &zst[..]].concat())?;
    for (first, name) in [(2, "bz2"), (3, "xz")] {
        let packed = fs::read(golden.join(format!("docs.csv.{name}")))?;
        seed("packed", name, [&[first], &packed[..]].concat())?;
    }
    Ok(())
}

fn tensors_and_tokens() -> Outcome {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"#,
        r#""b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}"#
    );
    let length = (header.len() as u64).to_le_bytes();
    seed(
        "safetensors",
        "two",
        [&length, header.as_bytes(), &[0; 10]].concat(),
    )?;
    seed(
        "tokenizer",
        "char",
        char_tokenizer("abc €".chars()).to_json(),
    )?;
    let bpe = concat!(
        r#"{"version":"1.0","added_tokens":[{"id":0,"content":"<|endoftext|>","special":true,"single_word":false,"lstrip":false,"#,
        r#""rstrip":false,"normalized":false}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":"#,
        r#"false,"trim_offsets":true,"use_regex":true},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":"#,
        r#"{"<|endoftext|>":0,"t":1,"h":2,"e":3,"th":4,"the":5},"merges":["t h","th e"]}}"#
    );
    seed("tokenizer", "bpe", bpe)?;
    seed("template", "default", DEFAULT_TEMPLATE)?;
    seed(
        "template",
        "loop",
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m.content | trim }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    )
}

fn specs_and_checkpoints() -> Outcome {
    for preset in PRESETS {
        if preset.name.contains("tiny") {
            seed("spec", preset.name, preset.toml)?;
        }
    }
    let spec = "[corpus]\npaths = [\"a\"]\nobjective = \"sft\"\n[lora]\nrank = 4\n[train]\nsteps = 8\nlanes = 2\n";
    seed("spec", "lora", spec)?;
    let meant = SpecSource::parse("spec.toml", "[train]\nsteps = 8\n")?
        .into_file()?
        .validate()?;
    let facts = CorpusFacts {
        vocab_size: 300,
        fingerprint: "0".repeat(64),
        labels: Vec::new(),
    };
    let run = meant.run_spec(facts, None)?;
    seed(
        "checkpoint",
        "config",
        config_json(&run.model, &SpecialTokens::default()),
    )?;
    let hash = "0".repeat(64);
    let state = serde_json::json!({
        "run": "r", "spec": run, "step": 1, "samples": 8, "tokens": 99, "val_loss": 1.5, "ledger_head": hash,
        "state_hash": hash,
    });
    seed("checkpoint", "state", state.to_string())?;
    let manifest = Manifest {
        format: FORMAT,
        step: 1,
        state_hash: [7; 32],
        files: vec![FileEntry {
            name: "model.safetensors".into(),
            bytes: 12,
            blake3: [9; 32],
        }],
    };
    seed("checkpoint", "manifest", manifest.to_json())?;
    let entry = Entry {
        step: 3,
        first_position: 16,
        samples: 8,
        lanes: vec![
            LaneSums {
                loss: 1.5,
                weight: 4.0
            };
            2
        ],
        loss_sum: 3.0,
        weight: 8.0,
        grad_norm: 0.5,
        learning_rate: 1e-3,
        root_hash: [1; 32],
        state_hash_before: Some([2; 32]),
        skipped: false,
        previous: [3; 32],
    };
    seed("ledger", "bytes", entry.encode())?;
    seed("ledger", "line", entry.to_json_line())
}

fn corpora() -> Outcome {
    let home = std::env::temp_dir().join(format!("cohort-seeds-{}", std::process::id()));
    fs::create_dir_all(&home)?;
    let text = home.join("text.txt");
    fs::write(&text, "the cat sat on the mat\n".repeat(20))?;
    let files = vec![SourceFile::new("text.txt", &text)];
    let request = PrepareRequest::new("text", files, TokenizerConfig::Char);
    let corpus = prepare(&home.join("corpora"), &request, &|_| ())?.corpus;
    seed("index", "text", corpus.index().to_json())?;
    Ok(fs::remove_dir_all(home)?)
}

fn messages() -> Outcome {
    let mut sealer = Sealer::default();
    let node = v1::NodeChunk {
        step: 3,
        first: 0,
        size: 2,
        index: 1,
        check: cohort_common::seal::checksum(&[0; 16]),
        data: vec![0; 16].into(),
    };
    let open = v1::Open::default();
    for (name, kind) in [("node", Kind::Node(node)), ("open", Kind::Open(open))] {
        seed("chunk", name, sealer.chunk(kind).encode_to_vec())?;
    }
    use v1::from_worker::Kind as From;
    let lane = From::LaneDone(v1::LaneDone::default());
    let register = From::Register(v1::Register::default());
    for (name, kind) in [("lane", lane), ("register", register)] {
        let message = v1::FromWorker { kind: Some(kind) };
        seed("wire", name, message.encode_to_vec())?;
        seed(
            "wire",
            &format!("{name}-framed"),
            Sealer::default().frame(&message).encode_to_vec(),
        )?;
    }
    let token = ClusterToken::new(Role::Worker, Fingerprint::of(b"a certificate"));
    seed("token", "worker", token.to_string())
}
