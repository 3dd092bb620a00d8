//! One function for each kind of input that comes from outside: it reads the bytes as the product does, and fails where they
//! cost a panic or where what was understood does not hold together. Errors are as it should be.
//!
//! libFuzzer calls them (`fuzz_targets/`, `run.sh`), and the tests do so with the seeds alone. What they need of the product
//! is public; nothing is opened up for them but `checkpoint::header_of` and `corpus::read_content`.

use cohort_common::checkpoint::{Manifest, RunState, header_of};
use cohort_common::corpus::{
    BadInput, CorpusError, CorpusIndex, Event, Objective, ReadOptions, SourceFile,
    SupervisedConfig, Tokenizer, read_content,
};
use cohort_common::hf;
use cohort_common::ledger::{Chain, Entry};
use cohort_common::seal::{Opener, Sealer};
use cohort_common::security::ClusterToken;
use cohort_common::spec::SpecSource;
use cohort_common::supervised::{ChatTemplate, Message, Role, SpecialTexts};
use cohort_common::wire;
use cohort_proto::v1;
use prost::Message as _;

/// What reads one kind of input.
pub type Target = fn(&[u8]);

/// All targets by their names.
pub const TARGETS: &[(&str, Target)] = &[
    ("arrow", arrow),
    ("checkpoint", checkpoint),
    ("chunk", chunk),
    ("csv", csv),
    ("index", index),
    ("json", json),
    ("jsonl", jsonl),
    ("ledger", ledger),
    ("packed", packed),
    ("parquet", parquet),
    ("safetensors", safetensors),
    ("spec", spec),
    ("template", template),
    ("token", token),
    ("tokenizer", tokenizer),
    ("warc", warc),
    ("wire", wire),
];

/// Bytes that a file may unpack to here: enough to get everywhere, and little enough to be quick.
const UNPACKED: u64 = 1 << 20;

/// Reads a file of that name for its texts, and for samples of both kinds.
fn documents(name: &str, content: &[u8]) {
    let file = SourceFile::new(name, name);
    let sample = |objective| Some(SupervisedConfig::new(objective, 64));
    for supervised in [None, sample(Objective::Sft), sample(Objective::Classify)] {
        let options = ReadOptions {
            text_field: "text".into(),
            max_file_bytes: Some(UNPACKED),
            supervised,
        };
        let mut open = false;
        let read = read_content(&file, content, &options, &mut |event| {
            match event {
                Event::Start(_) => assert!(!std::mem::replace(&mut open, true)),
                Event::Text(text) => {
                    assert!(open && !text.is_empty() && !text.contains('\0'));
                }
                Event::End => assert!(std::mem::replace(&mut open, false)),
                Event::Bad(BadInput { file, .. }) => assert!(!open && file == name),
            }
            Ok(())
        });
        match read {
            Ok(()) => assert!(!open),
            // What is wrong is said of that file, in words.
            Err(CorpusError::BadInput(bad)) => assert!(bad.to_string().starts_with('`')),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Lines of JSON.
pub fn jsonl(data: &[u8]) {
    documents("f.jsonl", data);
}

/// JSON objects in an array, or one after another.
pub fn json(data: &[u8]) {
    documents("f.json", data);
}

/// Cells parted by commas.
pub fn csv(data: &[u8]) {
    documents("f.csv", data);
}

/// Parquet.
pub fn parquet(data: &[u8]) {
    documents("f.parquet", data);
}

/// Arrow, as file or as stream.
pub fn arrow(data: &[u8]) {
    documents("f.arrow", data);
}

/// Records of the web.
pub fn warc(data: &[u8]) {
    documents("f.wet", data);
}

/// Files that are packed; the first byte says how.
pub fn packed(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let names = ["f.txt.gz", "f.txt.zst", "f.txt.bz2", "f.txt.xz"];
    documents(names[*first as usize % names.len()], rest);
}

/// The header of a file of tensors.
pub fn safetensors(data: &[u8]) {
    if let Ok(tensors) = header_of(data) {
        let elements: usize = tensors.iter().map(|tensor| tensor.elements()).sum();
        assert!(elements <= data.len());
    }
}

/// A `tokenizer.json`, and what it makes of a text.
pub fn tokenizer(data: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_json(data, None)
        && let Ok(tokens) = tokenizer.encode("The cat's hat, 12 €.")
    {
        assert!(tokens.iter().all(|token| *token < tokenizer.vocab_size()));
        let _ = tokenizer.decode(&tokens);
    }
}

/// An entry of a ledger, as bytes and as a line.
pub fn ledger(data: &[u8]) {
    let line = std::str::from_utf8(data).ok();
    let of_line = line.and_then(|line| Entry::from_json_line(line).ok());
    for entry in [Entry::decode(data), of_line].into_iter().flatten() {
        let bytes = entry.encode();
        let again = Entry::decode(&bytes).expect("what was written is read");
        assert_eq!(again.encode(), bytes);
        assert_eq!(again.hash(), entry.hash());
        let mut chain = Chain::new(entry.step, entry.first_position, entry.previous);
        if chain.push(&entry).is_ok() {
            assert!(chain.push(&entry).is_err(), "an entry follows itself");
        }
    }
}

/// A spec.
pub fn spec(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let file = SpecSource::parse("spec.toml", text).and_then(SpecSource::into_file);
        let _ = file.and_then(|file| file.validate());
    }
}

/// What workers send each other and the coordinator, in an exchange.
pub fn chunk(data: &[u8]) {
    let Ok(chunk) = v1::Chunk::decode(data) else {
        return;
    };
    let kind = chunk.kind.clone();
    let _ = Opener::default().chunk(chunk);
    // A checksum that fits is rarely met by chance.
    if let Some(kind) = kind {
        let is_node = matches!(kind, v1::chunk::Kind::Node(_));
        let opened = Opener::default().chunk(Sealer::default().chunk(kind.clone()));
        assert!(is_node || opened == Ok(Some(kind)));
    }
}

/// What coordinator and workers say to each other.
pub fn wire(data: &[u8]) {
    if let Ok(frame) = v1::Frame::decode(data) {
        let _ = Opener::default().frame::<v1::FromWorker>(frame);
    }
    if let Ok(message) = v1::FromWorker::decode(data)
        && let Ok(understood) = wire::from_worker_from(message)
    {
        assert!(wire::from_worker_from(wire::from_worker(understood)).is_ok());
    }
    if let Ok(message) = v1::ToWorker::decode(data)
        && let Ok(understood) = wire::to_worker_from(message)
    {
        assert!(wire::to_worker_from(wire::to_worker(&understood)).is_ok());
    }
}

/// A token of a cluster.
pub fn token(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = text.parse::<ClusterToken>()
    {
        let again = token.to_string().parse::<ClusterToken>();
        assert!(again.is_ok_and(|again| again == token));
    }
}

/// The index of a corpus, from another machine.
pub fn index(data: &[u8]) {
    if let Ok(index) = CorpusIndex::from_json(data) {
        assert_eq!(index.fingerprint, index.compute_fingerprint());
        let _ = (index.samples(8), index.shard_bytes());
    }
}

/// The small files of a checkpoint: manifest, state of the run, and the configurations of a model.
pub fn checkpoint(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(manifest) = Manifest::parse(text) {
        assert_eq!(manifest.to_json(), text);
        let _ = manifest.bytes();
    }
    let _ = serde_json::from_str::<RunState>(text);
    let _ = hf::parse_special_tokens(text);
    if let Ok((model, tokens)) = hf::parse_config(text) {
        let written = hf::config_json(&model, &tokens);
        assert!(hf::parse_config(&written).is_ok());
    }
}

/// A chat template, and what it makes of a conversation.
pub fn template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(template) = ChatTemplate::parse(source, &SpecialTexts::default()) {
        let said = |role, content: &str| Message {
            role,
            content: content.into(),
        };
        let turns = [
            said(Role::System, "be brief"),
            said(Role::User, "2 + 2?"),
            said(Role::Assistant, "4"),
        ];
        let _ = template.spans(&turns);
        let _ = template.prompt(&turns[..2]);
    }
}
