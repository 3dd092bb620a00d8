//! The corpus as a whole: from files in a directory to samples, and what happens to damaged or odd input on the way.

use std::path::{Path, PathBuf};

use super::*;

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("temporary directory"),
        }
    }

    fn corpora(&self) -> PathBuf {
        self.dir.path().join("corpora")
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join("text").join(name);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("create");
        std::fs::write(&path, content).expect("write");
        path
    }

    fn prepare(&self, request: &PrepareRequest) -> Result<Prepared, CorpusError> {
        prepare(&self.corpora(), request, &|_| ())
    }

    /// Names in the directory of corpora, but for the requests.
    fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.corpora()) else {
            return Vec::new();
        };
        let names = entries.map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("name")
        });
        names.filter(|name| name != "requests").collect()
    }
}

fn request(files: &[PathBuf], tokenizer: TokenizerConfig) -> PrepareRequest {
    PrepareRequest::new("test", expand(files, false).expect("expand"), tokenizer)
}

fn bpe() -> TokenizerConfig {
    TokenizerConfig::Bpe { vocab_size: 300 }
}

/// Documents of varied length and content.
fn story(seed: u32) -> String {
    (0..10 + seed % 40)
        .map(|i| {
            format!(
                "Sentence {i} of story {seed}: the cat's hat, €{}.\n",
                seed.wrapping_mul(i)
            )
        })
        .collect()
}

fn all_tokens(corpus: &Corpus, split: Split) -> Vec<u32> {
    let reader = corpus.reader(split);
    let mut tokens = Vec::new();
    reader.copy(0..reader.tokens(), &mut tokens).expect("copy");
    tokens
}

/// The documents of one side, decoded.
fn documents(corpus: &Corpus, split: Split) -> Vec<String> {
    let tokenizer = corpus.tokenizer().expect("tokenizer");
    let tokens = all_tokens(corpus, split);
    let mut starts = Vec::new();
    let reader = corpus.reader(split);
    reader
        .for_each_start(0..reader.tokens(), &mut |start| starts.push(start as usize))
        .expect("starts");
    assert_eq!(starts.len() as u64, corpus.index().split(split).documents);
    let ends = starts[1..].iter().copied().chain([tokens.len()]);
    let decode = |(start, end): (&usize, usize)| {
        assert_eq!(tokens[end - 1], tokenizer.eos());
        tokenizer.decode(&tokens[*start..end - 1]).expect("decode")
    };
    starts.iter().zip(ends).map(decode).collect()
}

#[test]
fn every_document_is_on_one_side_exactly_once() {
    let home = Home::new();
    let stories: Vec<String> = (0..50).map(story).collect();
    let lines: Vec<String> = stories[..30]
        .iter()
        .map(|s| serde_json::json!({ "text": s }).to_string())
        .collect();
    let mut files = vec![home.file("lines.jsonl", lines.join("\n"))];
    files.extend(
        stories[30..]
            .iter()
            .enumerate()
            .map(|(i, s)| home.file(&format!("{i}.txt"), s)),
    );
    let mut request = request(&files, bpe());
    request.shard_tokens = 1000;
    let corpus = home.prepare(&request).expect("prepare").corpus;
    let (train, validation) = (
        documents(&corpus, Split::Train),
        documents(&corpus, Split::Validation),
    );
    assert_eq!((train.len(), validation.len()), (45, 5));
    let mut both = [train.clone(), validation.clone()].concat();
    let mut expected = stories.clone();
    both.sort();
    expected.sort();
    assert_eq!(both, expected);
    let bytes = |documents: &[String]| documents.iter().map(|d| d.len() as u64).sum::<u64>();
    assert_eq!(corpus.index().train.bytes, bytes(&train));
    assert_eq!(corpus.index().validation.bytes, bytes(&validation));
    assert!(corpus.index().train.shards.len() > 1);
    corpus.verify().expect("verify");
}

#[test]
fn the_side_of_a_document_does_not_depend_on_its_place() {
    let home = Home::new();
    let files: Vec<PathBuf> = (0..40)
        .map(|i| home.file(&format!("{i}.txt"), story(i)))
        .collect();
    let forward = home
        .prepare(&request(&files, bpe()))
        .expect("prepare")
        .corpus;
    let reversed: Vec<PathBuf> = files.iter().rev().cloned().collect();
    let backward = home
        .prepare(&request(&reversed, bpe()))
        .expect("prepare")
        .corpus;
    let mut backward = documents(&backward, Split::Validation);
    backward.reverse();
    assert_eq!(documents(&forward, Split::Validation), backward);
}

#[test]
fn files_of_a_group_stay_together() {
    let home = Home::new();
    let path = |i: u32| home.file(&format!("{i}.rs"), story(i));
    let files: Vec<SourceFile> = (0..120)
        .map(|i| {
            SourceFile::new(format!("crate{}/src/{i}.rs", i / 4), path(i))
                .in_group(format!("crate{}", i / 4))
        })
        .collect();
    let corpus = home
        .prepare(&PrepareRequest::new("crates", files, bpe()))
        .expect("prepare")
        .corpus;
    let validation = documents(&corpus, Split::Validation);
    assert_eq!(validation.len(), 12); // 3 of 30 groups, 4 files each
    let stories: Vec<String> = (0..120).map(story).collect();
    for group in stories.chunks(4) {
        let inside = group
            .iter()
            .filter(|story| validation.contains(story))
            .count();
        assert!(inside == 0 || inside == 4, "{inside}");
    }
}

#[test]
fn one_file_of_characters_is_split_like_nanogpts() {
    let home = Home::new();
    let text: String = story(37).chars().take(1001).collect();
    let corpus = home
        .prepare(&request(
            &[home.file("a.txt", &text)],
            TokenizerConfig::Char,
        ))
        .expect("prepare")
        .corpus;
    let train: String = text.chars().take(900).collect();
    let validation: String = text.chars().skip(900).collect();
    assert_eq!(documents(&corpus, Split::Train), [train]);
    assert_eq!(documents(&corpus, Split::Validation), [validation]);
    assert_eq!(
        (
            corpus.index().train.tokens,
            corpus.index().validation.tokens
        ),
        (901, 102)
    );
}

#[test]
fn the_same_request_is_found_and_the_same_text_has_the_same_name() {
    let home = Home::new();
    let files: Vec<PathBuf> = (0..25)
        .map(|i| home.file(&format!("{i:02}.txt"), story(i)))
        .collect();
    let first = home.prepare(&request(&files, bpe())).expect("prepare");
    assert!(!first.reused);
    let fingerprint = first.corpus.index().fingerprint.clone();
    assert!(home.prepare(&request(&files, bpe())).expect("again").reused);
    // Elsewhere, under other names, with other numbers of threads.
    for threads in [1, 2, 5] {
        let other = Home::new();
        let moved: Vec<PathBuf> = (0..25)
            .map(|i| other.file(&format!("x/{i:02}.md"), story(i)))
            .collect();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("pool");
        let again = pool
            .install(|| other.prepare(&request(&moved, bpe())))
            .expect("prepare");
        assert_eq!(
            again.corpus.index().fingerprint,
            fingerprint,
            "{threads} threads"
        );
    }
    // Another option that leaves the tokens as they are leads to the same corpus.
    let mut same = request(&files, bpe());
    same.skip_bad = true;
    assert!(!home.prepare(&same).expect("prepare").reused);
    assert_eq!(home.names(), std::slice::from_ref(&fingerprint));
    // A changed text does not.
    home.file("07.txt", story(7) + "!");
    let changed = home.prepare(&request(&files, bpe())).expect("prepare");
    assert!(!changed.reused && changed.corpus.index().fingerprint != fingerprint);
}

#[test]
fn bad_files_stop_the_preparation_or_are_reported() {
    let home = Home::new();
    let mut files: Vec<PathBuf> = (0..3)
        .map(|i| home.file(&format!("good{i}.txt"), story(i)))
        .collect();
    let mut late = story(9).repeat(1000).into_bytes();
    late.push(0xff);
    let bad: [(&str, &[u8], &str); 4] = [
        ("empty.txt", b"", "is empty"),
        (
            "binary.txt",
            b"a\0b",
            "is binary: it has a NUL byte at byte 1",
        ),
        ("latin.txt", &late, "is not UTF-8: byte "),
        (
            "lines.jsonl",
            b"{\"text\":\"a good line\"}\n{\"txt\":1}\n",
            "line 2 has no text field `text`",
        ),
    ];
    for (name, content, expected) in bad {
        let path = home.file(name, content);
        let error = home
            .prepare(&request(&[files[0].clone(), path.clone()], bpe()))
            .expect_err(name);
        let message = error.to_string();
        assert!(
            message.contains(name) && message.contains(expected),
            "{message}"
        );
        assert!(
            message.ends_with("or leave such input out with `--skip-bad`"),
            "{message}"
        );
        files.push(path);
    }
    files.push(home.file("gone.txt", "x"));
    let mut all = request(&files, bpe());
    std::fs::remove_file(files.last().expect("last")).expect("remove");
    all.skip_bad = true;
    let corpus = home.prepare(&all).expect("prepare").corpus;
    assert_eq!(corpus.index().skipped.count, 5);
    assert!(corpus.index().skipped.first[4].contains("gone.txt` does not exist"));
    assert_eq!(corpus.index().sources.files, 4);
    let text = [
        documents(&corpus, Split::Train),
        documents(&corpus, Split::Validation),
    ]
    .concat()
    .concat();
    assert_eq!(text, story(0) + &story(1) + &story(2) + "a good line");
    let mut nothing = request(&files[3..5], bpe());
    nothing.skip_bad = true;
    let error = home.prepare(&nothing).expect_err("nothing left");
    assert!(
        error
            .to_string()
            .starts_with("the corpus is empty: all of its 2 inputs were skipped"),
        "{error}"
    );
    assert_eq!(home.names().len(), 1, "nothing is left behind");
}

#[test]
fn an_unknown_character_names_the_document() {
    let home = Home::new();
    let json = char_tokenizer("abc".chars()).to_json().as_bytes().to_vec();
    let file = home.file(
        "b.jsonl",
        "{\"text\":\"abc\"}\n{\"text\":\"abd\"}\n{\"text\":\"abc\"}",
    );
    let error = home
        .prepare(&request(&[file], TokenizerConfig::File { json, eos: None }))
        .expect_err("unknown");
    assert!(error.to_string().ends_with("b.jsonl:2`"), "{error}");
    let source = std::error::Error::source(&error)
        .expect("source")
        .to_string();
    assert_eq!(
        source,
        "character 'd' (U+0064) is not in the tokenizer's vocabulary"
    );
    assert!(home.names().is_empty());
}

#[test]
fn impossible_options_are_refused_before_anything_is_read() {
    let home = Home::new();
    let file = home.file("a.txt", story(1));
    let mut zero = request(std::slice::from_ref(&file), bpe());
    zero.shard_tokens = 0;
    let error = home.prepare(&zero).expect_err("zero");
    assert_eq!(
        error.to_string(),
        "`corpus.shard_tokens` is `0`, but must be from 1 to 1073741824"
    );
    let small = request(
        std::slice::from_ref(&file),
        TokenizerConfig::Bpe { vocab_size: 100 },
    );
    assert!(
        home.prepare(&small)
            .expect_err("small")
            .to_string()
            .contains("`100` tokens is too small")
    );
    let mut single = request(&[file], bpe());
    single.split.method = SplitMethod::Document;
    assert!(matches!(
        home.prepare(&single),
        Err(CorpusError::Split(SplitError::TooFewDocuments(1)))
    ));
}

#[test]
fn torn_and_damaged_corpora_are_never_taken_for_whole() {
    let home = Home::new();
    let files: Vec<PathBuf> = (0..25)
        .map(|i| home.file(&format!("{i:02}.txt"), story(i)))
        .collect();
    let request = request(&files, bpe());
    let whole = home.prepare(&request).expect("prepare").corpus;
    let fingerprint = whole.index().fingerprint.clone();
    let shard = whole.shard_path(&whole.index().train.shards[0].file);
    let good = std::fs::read(&shard).expect("read");
    let damage = |path: &Path, content: &[u8]| std::fs::write(path, content).expect("write");

    // A flipped byte is found by hashing; a torn shard, a missing one, a torn index at once.
    let mut flipped = good.clone();
    flipped[100] ^= 1;
    damage(&shard, &flipped);
    let message = Corpus::open(whole.directory())
        .expect("open")
        .verify()
        .expect_err("flipped")
        .to_string();
    assert!(
        message.contains("train-00000.shard` is damaged"),
        "{message}"
    );
    damage(&shard, &good[..good.len() - 1]);
    assert!(Corpus::open(whole.directory()).is_err());
    assert_eq!(list(&home.corpora()).expect("list").broken.len(), 1);
    assert!(
        !home.prepare(&request).expect("repair").reused,
        "a torn corpus is made again"
    );
    std::fs::remove_file(&shard).expect("remove");
    assert!(!home.prepare(&request).expect("repair").reused);
    let index_path = whole.directory().join(INDEX_FILE);
    let index = std::fs::read_to_string(&index_path).expect("read");
    damage(
        &index_path,
        index.replace("\"eos\": 0", "\"eos\": 1").as_bytes(),
    );
    let message = Corpus::open(whole.directory())
        .expect_err("forged")
        .to_string();
    assert!(message.contains("it calls itself"), "{message}");
    damage(&index_path, &index.as_bytes()[..index.len() / 2]);
    assert!(Corpus::open(whole.directory()).is_err());
    let repaired = home.prepare(&request).expect("repair").corpus;
    assert_eq!(repaired.index().fingerprint, fingerprint);
    repaired.verify().expect("verify");
    assert_eq!(home.names(), [fingerprint]);
}

#[test]
fn corpora_are_listed_found_shown_and_removed() {
    let home = Home::new();
    assert!(list(&home.corpora()).expect("none yet").corpora.is_empty());
    let file = home.file("a.txt", story(30));
    let corpus = home
        .prepare(&request(&[file], bpe()))
        .expect("prepare")
        .corpus;
    let fingerprint = corpus.index().fingerprint.clone();
    std::fs::create_dir(home.corpora().join(".unfinished-1-2")).expect("create");
    std::fs::create_dir(home.corpora().join("something else")).expect("create");
    let listing = list(&home.corpora()).expect("list");
    assert_eq!((listing.corpora.len(), listing.broken.len()), (1, 0));
    assert_eq!(remove_unfinished(&home.corpora()).expect("clean"), 1);
    for text in ["test", &fingerprint[..6], &fingerprint] {
        assert_eq!(
            find(&home.corpora(), text)
                .expect("find")
                .index()
                .fingerprint,
            fingerprint
        );
    }
    assert!(matches!(
        find(&home.corpora(), "../text"),
        Err(CorpusError::Unknown(_))
    ));
    let shown = corpus.preview(Split::Train, 0, 12).expect("preview");
    assert!(
        !shown.is_empty() && story(30).starts_with(&shown),
        "{shown}"
    );
    assert!(
        corpus
            .preview(Split::Validation, 0, 100_000)
            .expect("preview")
            .ends_with(END_OF_TEXT)
    );
    assert!(matches!(
        corpus.preview(Split::Train, 1, 10),
        Err(CorpusError::OutOfRange { .. })
    ));
    assert!(matches!(
        remove(&home.corpora(), "../text"),
        Err(CorpusError::Unknown(_))
    ));
    assert!(remove(&home.corpora(), &fingerprint).expect("remove") > corpus.index().shard_bytes());
    assert!(find(&home.corpora(), &fingerprint).is_err());
    assert!(
        std::fs::read_dir(home.corpora().join("requests"))
            .expect("requests")
            .next()
            .is_none()
    );
}

#[test]
fn an_unwritable_home_is_named() {
    let home = Home::new();
    let file = home.file("a.txt", story(3));
    let not_a_directory = home.file("occupied", "x").join("corpora");
    let error =
        prepare(&not_a_directory, &request(&[file], bpe()), &|_| ()).expect_err("unwritable");
    assert!(
        error.to_string().contains("cannot write `") && error.to_string().contains("occupied"),
        "{error}"
    );
}

#[test]
fn progress_reaches_the_end_of_each_stage() {
    let home = Home::new();
    let files: Vec<PathBuf> = (0..4)
        .map(|i| home.file(&format!("{i}.txt"), story(i)))
        .collect();
    let last = std::cell::RefCell::new(Vec::<Progress>::new());
    let progress = |now: Progress| {
        let mut last = last.borrow_mut();
        match last.last_mut() {
            Some(before) if before.stage == now.stage => {
                assert!(before.done <= now.done);
                *before = now;
            }
            _ => last.push(now),
        }
    };
    prepare(&home.corpora(), &request(&files, bpe()), &progress).expect("prepare");
    let last = last.into_inner();
    let stages: Vec<Stage> = last.iter().map(|progress| progress.stage).collect();
    assert_eq!(
        stages,
        [Stage::Hash, Stage::Scan, Stage::Tokenizer, Stage::Encode]
    );
    assert!(
        last.iter()
            .all(|progress| progress.done == progress.total && progress.total > 0)
    );
}

/// Where real text lies that is not part of the repository; tests that want it are skipped where it is absent.
fn test_data(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("COHORT_TEST_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
        PathBuf::from,
    );
    let path = root.join(name);
    if !path.exists() {
        eprintln!(
            "skipped: `{}` is not here (COHORT_TEST_DATA names another place)",
            path.display()
        );
        return None;
    }
    Some(path)
}

#[test]
fn tiny_shakespeare_has_nanogpts_numbers() {
    let Some(path) = test_data("shakespeare/tinyshakespeare.txt") else {
        return;
    };
    let home = Home::new();
    let corpus = home
        .prepare(&request(&[path], TokenizerConfig::Char))
        .expect("prepare")
        .corpus;
    let index = corpus.index();
    // nanoGPT: 65 distinct characters, 1,003,854 of them in train.bin, 111,540 in val.bin; here `<|endoftext|>` besides.
    assert_eq!(index.tokenizer.vocab_size, 66);
    assert_eq!(
        (index.train.tokens, index.validation.tokens),
        (1_003_855, 111_541)
    );
    assert_eq!(
        (index.train.bytes, index.validation.bytes),
        (1_003_854, 111_540)
    );
}

#[test]
fn given_tokenizers_encode_real_text() {
    let (Some(text), Some(gpt2), Some(stories)) = (
        test_data("andersen/003-the-angel.txt"),
        test_data("models/gpt2-tokenizer/tokenizer.json"),
        test_data("models/stories260K-hf/tokenizer.json"),
    ) else {
        return;
    };
    let content = std::fs::read_to_string(&text).expect("read");
    for (path, vocab_size, eos, cut) in [
        (gpt2, 50257, 50256, Cut::BeforeWhitespace),
        (stories, 512, 2, Cut::Never),
    ] {
        let home = Home::new();
        let tokenizer = TokenizerConfig::from_file(&path, None).expect("read");
        let corpus = home
            .prepare(&request(std::slice::from_ref(&text), tokenizer))
            .expect("prepare")
            .corpus;
        assert_eq!(
            (
                corpus.index().tokenizer.vocab_size,
                corpus.index().tokenizer.eos
            ),
            (vocab_size, eos)
        );
        assert_eq!(corpus.tokenizer().expect("tokenizer").cut(), cut);
        let both = [
            documents(&corpus, Split::Train),
            documents(&corpus, Split::Validation),
        ]
        .concat()
        .concat();
        assert_eq!(both, content);
    }
}

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
