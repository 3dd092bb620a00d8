//! What is in a corpus: what a selection leaves, and what people are shown of it.

use super::*;

/// A request that selects nothing has the key that it had before there were selections, and one that does another.
#[test]
fn a_selection_is_a_part_of_the_request_only_where_there_is_one() {
    let home = Home::new();
    let mut stories: Vec<String> = (0..30).map(story).collect();
    stories.push(story(3).replace('\n', "\r\n"));
    let files: Vec<PathBuf> = (0..)
        .zip(&stories)
        .map(|(i, story)| home.file(&format!("{i:02}.txt"), story))
        .collect();
    let plain = request(&files, bpe());
    let all = home.prepare(&plain).expect("prepare").corpus;
    assert_eq!(all.index().selection, None);
    assert!(!all.index().to_json().contains("selection"));
    let mut deduped = plain.clone();
    deduped.selection.dedup = Some(Dedup::Exact);
    let kept = home.prepare(&deduped).expect("prepare");
    assert!(!kept.reused);
    let index = kept.corpus.index();
    let both = [
        documents(&kept.corpus, Split::Train),
        documents(&kept.corpus, Split::Validation),
    ]
    .concat();
    assert_eq!(both.len(), 30);
    assert!(both.iter().all(|document| stories[..30].contains(document)));
    let summary = index.selection.as_ref().expect("a selection");
    assert_eq!((summary.documents, summary.dropped_documents()), (31, 1));
    assert_eq!(
        CorpusIndex::from_json(index.to_json().as_bytes()).expect("valid"),
        *index
    );
    assert!(home.prepare(&deduped).expect("again").reused);
    assert!(home.prepare(&plain).expect("again").reused);
    // One that leaves nothing out gives the corpus of all, and says what it itself came to, now and later.
    let mut long = plain.clone();
    long.selection.min_chars = Some(2);
    for _ in 0..2 {
        let found = home.prepare(&long).expect("prepare");
        assert!(found.reused);
        assert_eq!(found.corpus.index().fingerprint, all.index().fingerprint);
        let summary = found.corpus.index().selection.as_ref();
        let counts = summary.map(|summary| (summary.documents, summary.dropped_documents()));
        assert_eq!(counts, Some((31, 0)));
        let plain = home.prepare(&plain).expect("again").corpus;
        assert_eq!(plain.index().selection, None);
    }
    assert_eq!(home.names().len(), 2, "no file of signatures is left");
    // For any number of threads, and of near duplicates, too.
    deduped.selection.dedup = Some(Dedup::Near);
    let prints = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let other = Home::new();
        let near = || other.prepare(&deduped).expect("prepare").corpus;
        pool.expect("pool")
            .install(near)
            .index()
            .fingerprint
            .clone()
    });
    assert_eq!(prints[0], prints[1]);
}

/// What only documents have that are left out is no character of the vocabulary, and the tail is cut from what stays.
#[test]
fn characters_and_the_tail_are_those_of_what_stays() {
    let home = Home::new();
    let files = [
        home.file("a.txt", "0123456789".repeat(10)),
        home.file("b.txt", "abc"),
        home.file("c.txt", "9876543210".repeat(10)),
    ];
    let mut request = request(&files, TokenizerConfig::Char);
    request.selection.min_chars = Some(4);
    let corpus = home.prepare(&request).expect("prepare").corpus;
    assert_eq!(corpus.index().tokenizer.vocab_size, 11);
    let index = corpus.index();
    assert_eq!((index.train.bytes, index.validation.bytes), (180, 20));
    let counts = SourceTable::of(&corpus).expect("read").expect("a table");
    let documents: Vec<[u64; 2]> = counts
        .sources
        .iter()
        .map(|source| Split::ALL.map(|split| source.side(split).documents))
        .collect();
    assert_eq!(documents, [[1, 0], [0, 0], [1, 1]]);
    let found = head(
        &corpus,
        Split::Validation,
        HeadLimits {
            documents: 9,
            chars: 5,
            bytes: 100,
        },
    )
    .expect("head");
    assert_eq!(
        (found[0].text.as_str(), found[0].cut, found[0].tokens),
        ("98765", true, 21)
    );
    assert!(
        found[0]
            .source
            .as_ref()
            .is_some_and(|name| name.ends_with("c.txt"))
    );
}

/// Counts agree with what a walk over all tokens finds, whatever the shards.
#[test]
fn stats_count_what_is_there() {
    let home = Home::new();
    let files: Vec<PathBuf> = (0..40)
        .map(|i| home.file(&format!("{i:02}.txt"), story(i)))
        .collect();
    let mut request = request(&files, bpe());
    request.shard_tokens = 700;
    let corpus = home.prepare(&request).expect("prepare").corpus;
    let found = stats(&corpus).expect("stats");
    let mut counts = std::collections::HashMap::new();
    for split in Split::ALL {
        let tokens = all_tokens(&corpus, split);
        tokens
            .iter()
            .for_each(|token| *counts.entry(*token).or_insert(0u64) += 1);
        let eos = corpus.tokenizer().expect("tokenizer").eos();
        let mut lengths: Vec<u64> = tokens
            .split_inclusive(|t| *t == eos)
            .map(|d| d.len() as u64)
            .collect();
        lengths.sort_unstable();
        let side = if split == Split::Train {
            &found.train
        } else {
            &found.validation
        };
        assert_eq!(side.tokens, tokens.len() as u64);
        assert_eq!(side.documents, lengths.len() as u64);
        assert_eq!(
            (side.lengths.min, side.lengths.max),
            (lengths[0], *lengths.last().expect("one"))
        );
        assert_eq!(side.lengths.median, lengths[lengths.len().div_ceil(2) - 1]);
    }
    let top = &found.frequent[0];
    assert_eq!(counts.get(&top.id), Some(&top.count));
    assert_eq!(counts.values().max(), Some(&top.count));
    assert_eq!(found.unused_tokens, found.vocab_size - counts.len() as u64);
    let sources = found.sources.expect("sources");
    assert_eq!((sources.count, sources.largest.len()), (40, 20));
    assert_eq!(found.groups, None);
    let read = |split| {
        let limits = HeadLimits {
            documents: 100,
            chars: 1 << 20,
            bytes: 1 << 20,
        };
        let found = head(&corpus, split, limits).expect("head");
        assert!(found.iter().all(|document| !document.cut));
        found
            .into_iter()
            .map(|document| document.text)
            .collect::<Vec<_>>()
    };
    for split in Split::ALL {
        assert_eq!(read(split), documents(&corpus, split));
    }
}

/// Samples: the same one in other words of JSON is a duplicate, rows are filled up, and labels are no tokens.
#[test]
fn samples_are_selected_counted_and_shown() {
    let home = Home::new();
    let mut lines = String::new();
    for number in 0..30 {
        let label = ["ham", "spam"][number % 2];
        lines += &format!("{{\"text\": \"message {number}\", \"label\": \"{label}\"}}\n");
        lines += &format!("{{\"label\": \"{label}\", \"text\": \" message  {number} \"}}\n");
    }
    let file = home.file("mail.jsonl", lines);
    let mut request = request(&[file], TokenizerConfig::Char);
    request.supervised = Some(SupervisedConfig::new(Objective::Classify, 64));
    request.selection.dedup = Some(Dedup::Exact);
    let corpus = home.prepare(&request).expect("prepare").corpus;
    let supervised = corpus.index().supervised.clone().expect("samples");
    assert_eq!(supervised.train.samples + supervised.validation.samples, 30);
    let found = stats(&corpus).expect("stats");
    assert_eq!(found.train.lengths.max, "message 10".len() as u64);
    let limits = HeadLimits {
        documents: 100,
        chars: 100,
        bytes: 1000,
    };
    let texts = Split::ALL.map(|split| head(&corpus, split, limits).expect("head"));
    assert!(texts.concat().iter().all(|sample| {
        let number: usize = sample.text["message ".len()..].parse().expect("a number");
        sample.label.as_deref() == Some(["ham", "spam"][number % 2]) && !sample.cut
    }));
    assert_eq!(texts.concat().len(), 30);
}
