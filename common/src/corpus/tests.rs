//! The corpus as a whole: from files in a directory to samples, and what happens to damaged or odd input on the way.

use std::path::{Path, PathBuf};

use super::*;

mod contents;

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
    // Another option that leaves the tokens as they are leads to the same corpus, which has both names then.
    let mut same = request(&files, bpe());
    same.skip_bad = true;
    same.name = "other".into();
    assert!(home.prepare(&same).expect("prepare").reused);
    same.name = "third".into();
    assert!(home.prepare(&same).expect("again").reused);
    assert_eq!(home.names(), std::slice::from_ref(&fingerprint));
    for name in ["test", "other", "third"] {
        let found = find(&home.corpora(), name).expect(name);
        assert_eq!(found.index().fingerprint, fingerprint);
        assert!(found.is_called(name) && found.index().name == "test");
    }
    assert!(find(&home.corpora(), "fourth").is_err());
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
