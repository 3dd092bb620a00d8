//! Corpora through the real binary: what is left out while they are prepared, and what is looked at afterwards, at a
//! coordinator and without one.

use std::fmt::Write;

use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::support::{Scene, text, words};

/// Lines of JSON: forty documents of about 300 words, then what is to be left out.
fn write_lines(scene: &Scene) {
    let documents: Vec<String> = (0..40).map(|seed| words(seed + 10, 400)).collect();
    let mut lines = String::new();
    let mut line = |text: &str| {
        let _ = writeln!(lines, "{}", json!({ "text": text }));
    };
    documents.iter().for_each(|document| line(document));
    // Of the first, with other white space.
    line(&documents[0].replacen(' ', " \n", 20));
    // Of the second, with one word more in the middle.
    let (a, b) = documents[1].split_at(documents[1][1000..].find(' ').expect("a space") + 1000);
    line(&format!("{a} inserted{b}"));
    line("short");
    let german = "Es war einmal ein alter König, der hatte drei Söhne und wohnte in einem großen Schloss am Meer. ";
    line(&german.repeat(3));
    scene.write("lines.jsonl", &lines);
}

const PREPARE: &str = "corpus prepare lines.jsonl --vocab-size 300 --name";

#[test]
fn duplicates_and_strangers_are_left_out_and_counted() {
    let scene = Scene::new();
    write_lines(&scene);
    let _coordinator = scene.coordinator("");
    let options = "--dedup near --min-chars 20 --max-chars 100000";
    let prepared = &scene.events(&format!("{PREPARE} clean {options}"))[0];
    let selection = &prepared["selection"];
    assert_eq!(selection["documents"], 44);
    let dropped = selection["dropped"].as_array().expect("a list");
    let dropped: Vec<(&str, u64)> = dropped
        .iter()
        .map(|d| {
            (
                d["reason"].as_str().expect("a word"),
                d["documents"].as_u64().expect("a count"),
            )
        })
        .collect();
    assert_eq!(
        dropped,
        [
            ("too_short", 1),
            ("exact_duplicate", 1),
            ("near_duplicate", 1)
        ]
    );
    let documents = |corpus: &Value| {
        let of = |side: &str| corpus[side]["documents"].as_u64().expect("a count");
        of("train") + of("validation")
    };
    assert_eq!(documents(prepared), 41);

    // The same without options is another corpus, and the same with them the same.
    let all = &scene.events(&format!("{PREPARE} all"))[0];
    assert_eq!((documents(all), &all["selection"]), (44, &Value::Null));
    assert_ne!(all["fingerprint"], prepared["fingerprint"]);
    let again = &scene.events(&format!("{PREPARE} clean {options}"))[0];
    assert_eq!(
        (&again["reused"], &again["fingerprint"]),
        (&true.into(), &prepared["fingerprint"])
    );

    let shown = text(&scene.run("corpus show clean").stdout);
    let line = shown
        .lines()
        .find(|line| line.starts_with("left out"))
        .expect("a line");
    assert!(
        line.contains("3 of 44 documents")
            && line.ends_with("too short (1), exact duplicates (1), near duplicates (1)"),
        "{line}"
    );

    // From a spec; what is typed goes before it.
    scene.write(
        "select.toml",
        "[corpus]\nlanguages = \"de\"\ndedup = \"exact\"\nvalidation = 0.5\n",
    );
    let line = "corpus prepare lines.jsonl --spec select.toml --language fr --min-chars 20";
    let nothing = scene.fails(line);
    assert!(
        nothing.contains("no document stays: of 44, all are left out: "),
        "{nothing}"
    );
}

#[test]
fn options_that_cannot_be_are_refused() {
    let scene = Scene::new();
    let said = |line: &str| scene.fails(&format!("corpus prepare text.txt {line}"));
    assert_snapshot!(said("--dedup near --dedup-threshold 0.2"), @"error: `corpus.dedup_threshold` is 0.2, but it must lie between 0.5 and 1; 0.8 is the default");
    assert_snapshot!(said("--dedup exact --dedup-threshold 0.9"), @r#"error: `corpus.dedup_threshold` is 0.9, but it says something of near duplicates only; remove it, or set `corpus.dedup` to "near""#);
    assert_snapshot!(said("--min-chars 10 --max-chars 9"), @"error: `corpus.min_chars` is 10, but `corpus.max_chars` is 9, so no document would stay; lower it");
}

#[test]
fn what_is_in_a_corpus_is_told_with_and_without_a_coordinator() {
    let scene = Scene::new();
    write_lines(&scene);
    let (mut coordinator, _) = scene.coordinator("");
    scene.events(&format!("{PREPARE} lines --dedup exact"));
    coordinator.kill();
    let offline = scene.events("corpus stats lines").remove(0);
    assert_eq!(
        offline["sources"]["largest"][0]["name"],
        scene.path("lines.jsonl").display().to_string()
    );
    let train = &offline["train"];
    let histogram = train["lengths"]["histogram"].as_array().expect("a list");
    let counted: u64 = histogram
        .iter()
        .map(|range| range["documents"].as_u64().expect("a count"))
        .sum();
    assert_eq!(counted, train["documents"].as_u64().expect("a count"));
    assert_eq!(
        offline["selection"]["dropped"][0]["reason"],
        "exact_duplicate"
    );

    let head = scene.events("corpus head lines -n 3 --chars 30");
    let first = words(10, 400);
    let begins = |document: &Value| first.starts_with(document["text"].as_str().expect("a text"));
    let validates = scene.events("corpus head lines -n 1000 --chars 30 --split validation");
    assert!(head.len() == 3 && (begins(&head[0]) || validates.iter().any(begins)));
    assert!(
        head.iter()
            .all(|document| document["cut"] == true && document["source"] != Value::Null)
    );

    let _coordinator = scene.coordinator("");
    let mut online = scene.events("corpus stats lines").remove(0);
    online["seconds"] = offline["seconds"].clone();
    assert_eq!(online, offline);
    assert_eq!(scene.events("corpus head lines -n 3 --chars 30"), head);
    let shown = text(&scene.run("corpus stats lines").stdout);
    assert!(shown.contains("tokens per training document"), "{shown}");
}
