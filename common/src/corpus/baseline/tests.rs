use std::path::{Path, PathBuf};

use super::*;
use crate::corpus::{
    PrepareRequest, SplitConfig, SplitMethod, SupervisedConfig, TokenizerConfig, expand, prepare,
};

/// All of it learned.
fn text(documents: &[&[u32]]) -> Text {
    let begins = documents
        .iter()
        .flat_map(|document| (0..document.len()).map(|at| at == 0));
    let begins: Vec<bool> = begins.collect();
    Text::new(documents.concat(), &begins, vec![true; begins.len()])
}

/// Printed by `common/golden/ngram.py`, which counts in dictionaries.
#[test]
fn losses_are_those_of_plain_counting() {
    let train = text(&[
        &[1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 4, 5, 9],
        &[2, 3, 1, 2, 3, 9],
    ]);
    let validation = text(&[&[1, 2, 3, 1, 2, 3, 9], &[4, 1, 2, 6, 9]]);
    let golden = [
        1.910781602999,
        1.214145443888,
        1.274470244378,
        1.350466807221,
        1.285968720560,
    ];
    let losses = losses(&train, &validation, (10, 5), &|_| ());
    for (loss, golden) in losses.iter().zip(golden) {
        assert!((loss - golden).abs() < 1e-11, "{losses:?}");
    }
}

#[test]
fn what_is_not_learned_is_neither_counted_nor_scored() {
    let mut train = text(&[&[1, 2, 3, 2, 3]]);
    let mut validation = text(&[&[1, 2, 3]]);
    train.learned = vec![false, false, true, false, true];
    validation.learned = vec![false, false, true];
    let losses = losses(&train, &validation, (4, 2), &|_| ());
    // 3 is all that was seen: twice, of one kind.
    let unigram: f64 = (2.0 + 0.25) / 3.0;
    let bigram = (2.0 + unigram) / 3.0;
    let golden = [-unigram.ln(), -bigram.ln()];
    for (loss, golden) in losses.iter().zip(golden) {
        assert!((loss - golden).abs() < 1e-12, "{losses:?}");
    }
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn prepare(
        &self,
        name: &str,
        content: &str,
        change: impl FnOnce(&mut PrepareRequest),
    ) -> Corpus {
        let path: PathBuf = self.0.path().join(name);
        std::fs::write(&path, content).expect("a file is written");
        let sources = expand(&[path], false).expect("a file");
        let mut request = PrepareRequest::new("text", sources, TokenizerConfig::Char);
        change(&mut request);
        let prepared = prepare(&self.0.path().join("corpora"), &request, &|_| ());
        prepared.expect("a corpus").corpus
    }
}

#[test]
fn they_are_made_once_and_made_again_when_they_cannot_be_read() {
    let place = Place::new();
    let corpus = place.prepare("text.txt", &"abcabd ".repeat(200), |request| {
        request.split = SplitConfig {
            method: SplitMethod::Tail,
            fraction: 0.1,
        };
        request.shard_tokens = 100;
    });
    assert_eq!(baselines(&corpus).expect("nothing yet"), None);
    let made = keep_baselines(&corpus, &|_, _| ()).expect("baselines");
    // a, b, c, d, the space and the end of text.
    assert!((made.uniform - 6f64.ln()).abs() < 1e-12, "{made:?}");
    let ngram = made.ngram.expect("an n-gram model");
    assert!(made.unigram.expect("frequencies") < made.uniform);
    // After two characters all is known, but for the end.
    assert!(ngram.order >= 3 && ngram.loss < 0.1, "{ngram:?}");
    assert_eq!((ngram.counted, ngram.of, ngram.scored), (1261, 1261, 140));
    let bits = ngram.bits_per_byte.expect("text has bytes");
    assert!(
        (bits - ngram.loss / LN_2 * 141.0 / 140.0).abs() < 1e-12,
        "{bits}"
    );
    assert_eq!(baselines(&corpus).expect("they are kept"), Some(made));

    let file = corpus.directory().join(BASELINE_FILE);
    let kept = std::fs::read_to_string(&file).expect("the file");
    for bad in [
        kept.replace("\"version\": 1", "\"version\": 0"),
        "{".to_owned(),
    ] {
        std::fs::write(&file, &bad).expect("the file can be written");
        assert_eq!(baselines(&corpus).expect("the file is there"), None);
        let again = keep_baselines(&corpus, &|_, _| ()).expect("made again");
        assert_eq!(again, made);
        assert_eq!(std::fs::read_to_string(&file).expect("the file"), kept);
    }
    let kept = std::fs::read_dir(corpus.directory()).expect("the corpus");
    let hidden = kept.filter(|file| {
        let file = file.as_ref().expect("a file").file_name();
        file.to_string_lossy().starts_with('.')
    });
    assert_eq!(hidden.count(), 0, "nothing is left behind");
}

#[test]
fn a_classification_has_its_labels() {
    let place = Place::new();
    let line = |n: usize| {
        let label = if n.is_multiple_of(4) { "b" } else { "a" };
        format!("{{\"text\": \"number {n}\", \"label\": \"{label}\"}}\n")
    };
    let lines: String = (0..400).map(line).collect();
    let corpus = place.prepare("lines.jsonl", &lines, |request| {
        request.supervised = Some(SupervisedConfig::new(Objective::Classify, 16));
    });
    let made = compute_baselines(&corpus, &|_, _| ()).expect("baselines");
    assert!((made.uniform - LN_2).abs() < 1e-12);
    assert_eq!(made.ngram, None);
    // About a quarter of either side has the second label.
    let unigram = made.unigram.expect("frequencies");
    assert!((0.45..0.68).contains(&unigram), "{unigram}");
}

#[test]
fn samples_are_scored_where_they_are_learned() {
    let place = Place::new();
    let line =
        |n: usize| format!("{{\"prompt\": \"what is {n}\", \"response\": \"it is a number\"}}\n");
    let lines: String = (0..100).map(line).collect();
    let corpus = place.prepare("pairs.jsonl", &lines, |request| {
        request.supervised = Some(SupervisedConfig::new(Objective::Sft, 64));
    });
    let made = compute_baselines(&corpus, &|_, _| ()).expect("baselines");
    let ngram = made.ngram.expect("an n-gram model");
    assert_eq!(ngram.scored, corpus.index().scored(Split::Validation));
    assert!(ngram.loss < 0.2, "always the same response: {ngram:?}");
}

/// The last tenth of Shakespeare by characters; `common/golden/ngram.py FILE` finds the same.
#[test]
fn shakespeare_by_characters() {
    let root = std::env::var_os("COHORT_TEST_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
        PathBuf::from,
    );
    let path = root.join("shakespeare/tinyshakespeare.txt");
    let Ok(content) = std::fs::read_to_string(&path) else {
        eprintln!(
            "skipped: `{}` is not here (COHORT_TEST_DATA names another place)",
            path.display()
        );
        return;
    };
    let place = Place::new();
    let corpus = place.prepare("text.txt", &content, |request| {
        request.split.method = SplitMethod::Tail;
    });
    let made = compute_baselines(&corpus, &|_, _| ()).expect("baselines");
    let ngram = made.ngram.expect("an n-gram model");
    assert_eq!(ngram.order, 5);
    assert!((ngram.loss - 1.669043950545).abs() < 1e-9, "{ngram:?}");
    assert!((made.unigram.expect("frequencies") - 3.347394565602).abs() < 1e-9);
}
