//! Selections as a whole: planted duplicates against brute force, and options that cannot be.

use std::collections::{BTreeSet, HashMap};

use super::selector::{Selected, Selector};
use super::*;
use crate::corpus::encode::Routed;
use crate::corpus::split::Split;
use crate::rng::philox;

/// Random numbers below a bound, one after the other.
struct Draw(u32);

impl Draw {
    fn below(&mut self, bound: usize) -> usize {
        self.0 += 1;
        philox(7, [self.0, 0, 0, 0])[0] as usize % bound
    }

    fn word(&mut self) -> String {
        format!("w{}", self.below(5000))
    }

    fn text(&mut self, words: usize) -> Vec<String> {
        (0..words).map(|_| self.word()).collect()
    }
}

fn select(selection: &Selection, documents: &[String], threads: usize) -> Selected {
    let directory = tempfile::tempdir().expect("temporary directory");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("pool").install(|| {
        let mut selector = Selector::new(selection, None, directory.path()).expect("a selector");
        for document in documents {
            for part in [
                Routed::Begin(Split::Train, None),
                Routed::Text(document),
                Routed::End,
            ] {
                selector.push(part).expect("taken");
            }
        }
        selector.finish().expect("selected")
    })
}

fn near(threshold: f64) -> Selection {
    Selection {
        dedup: Some(Dedup::Near),
        dedup_threshold: Some(threshold),
        ..Selection::default()
    }
}

/// Two hundred texts, and of each third one up to four copies with a share of its words changed.
fn planted() -> Vec<String> {
    let mut draw = Draw(0);
    let mut documents = Vec::new();
    for number in 0..200 {
        let length = 60 + draw.below(400);
        let words = draw.text(length);
        documents.push(words.join(" "));
        for copy in 0..if number % 3 == 0 { number % 5 } else { 0 } {
            let mut changed = words.clone();
            // From 0.2 to 6 % of the words.
            for _ in 0..=changed.len() * (copy * copy * 6 + 2) / 1000 {
                let at = draw.below(changed.len());
                changed[at] = draw.word();
            }
            let place = draw.below(documents.len() + 1);
            documents.insert(place, changed.join(if copy == 1 { "\n " } else { " " }));
        }
    }
    documents
}

/// The shingles of each document, as numbers in order.
fn shingles(documents: &[String]) -> Vec<Vec<usize>> {
    let mut numbers = HashMap::new();
    let mut of = |text: &str| {
        let words: Vec<&str> = text.split_whitespace().collect();
        let mut set = BTreeSet::new();
        for shingle in words.windows(minhash::SHINGLE_WORDS) {
            let next = numbers.len();
            set.insert(*numbers.entry(shingle.join(" ")).or_insert(next));
        }
        set.into_iter().collect()
    };
    documents.iter().map(|text| of(text)).collect()
}

/// Which documents are left out if every pair is compared by its true similarity.
fn brute_force(sets: &[Vec<usize>], threshold: f64) -> Vec<bool> {
    let mut first: Vec<usize> = (0..sets.len()).collect();
    for b in 0..sets.len() {
        for a in 0..b {
            let is_in_both = |shingle: &&usize| sets[b].binary_search(shingle).is_ok();
            let both = sets[a].iter().filter(is_in_both).count() as f64;
            if both / (sets[a].len() + sets[b].len()) as f64 >= threshold / (1.0 + threshold) {
                let (from, to) = (first[a].max(first[b]), first[a].min(first[b]));
                first
                    .iter_mut()
                    .filter(|f| **f == from)
                    .for_each(|f| *f = to);
            }
        }
    }
    first
        .iter()
        .enumerate()
        .map(|(own, first)| own != *first)
        .collect()
}

#[test]
fn planted_duplicates_are_found() {
    let documents = planted();
    let sets = shingles(&documents);
    for (threshold, least) in [(0.5, 0.97), (0.8, 0.9), (0.9, 0.9)] {
        let expected = brute_force(&sets, threshold);
        let found = select(&near(threshold), &documents, 2).dropped;
        let both = found.iter().zip(&expected);
        let hits = both
            .filter(|(found, expected)| **found && **expected)
            .count() as f64;
        let count = |these: &[bool]| these.iter().filter(|is| **is).count() as f64;
        let (precision, recall) = (hits / count(&found), hits / count(&expected));
        println!(
            "{threshold}: {} of {} documents expected, precision {precision:.3}, recall {recall:.3}",
            count(&expected),
            documents.len()
        );
        assert!(
            precision >= least && recall >= least,
            "{threshold}: {precision} {recall}"
        );
        assert!(count(&expected) > 40.0);
    }
}

#[test]
fn a_selection_does_not_depend_on_threads() {
    let mut documents = planted();
    documents.extend_from_within(10..20);
    let selection = Selection {
        min_chars: Some(500),
        ..near(0.8)
    };
    let first = select(&selection, &documents, 1);
    let reasons: Vec<Reason> = first.summary.dropped.iter().map(|d| d.reason).collect();
    assert_eq!(
        reasons,
        [
            Reason::TooShort,
            Reason::ExactDuplicate,
            Reason::NearDuplicate
        ]
    );
    for threads in [2, 5] {
        let again = select(&selection, &documents, threads);
        assert_eq!(again.dropped, first.dropped);
        assert_eq!(again.summary, first.summary);
    }
    let kept = documents
        .iter()
        .zip(&first.dropped)
        .filter(|(_, dropped)| !**dropped);
    let kept: Vec<&String> = kept.map(|(document, _)| document).collect();
    assert_eq!(
        first.bytes,
        kept.iter().map(|text| text.len() as u64).sum::<u64>()
    );
    assert_eq!(first.chars, first.bytes);
    let dropped: u64 = first.summary.dropped.iter().map(|d| d.bytes).sum();
    assert_eq!(first.summary.bytes, first.bytes + dropped);
    assert_eq!(
        first.summary.documents - first.summary.dropped_documents(),
        kept.len() as u64
    );
}

/// More documents of one template than are compared with each other.
#[test]
fn a_template_that_fills_many_pages_is_one_cluster() {
    let mut draw = Draw(0);
    let template = draw.text(300).join(" ");
    let mut documents: Vec<String> = (0..400).map(|n| format!("{template} page{n}")).collect();
    documents.push(draw.text(300).join(" "));
    let dropped = select(&near(0.8), &documents, 2).dropped;
    assert!(!dropped[0] && dropped[1..400].iter().all(|dropped| *dropped) && !dropped[400]);
}

#[test]
fn exact_duplicates_differ_in_white_space_at_most() {
    let documents = ["a b", "a  b\r\n", "a b.", "A b", " a\u{a0}b", "ab"].map(String::from);
    let exact = Selection {
        dedup: Some(Dedup::Exact),
        ..Selection::default()
    };
    let selected = select(&exact, &documents, 1);
    assert_eq!(selected.dropped, [false, true, false, false, true, false]);
    let dropped = Dropped {
        reason: Reason::ExactDuplicate,
        documents: 2,
        bytes: 11,
    };
    assert_eq!(selected.summary.dropped, [dropped]);
}

#[test]
fn options_that_cannot_be_name_their_bound() {
    let none = Selection::default;
    let said = |selection: Selection| selection.check().expect_err("impossible").to_string();
    let cases = [
        Selection {
            min_chars: Some(9),
            max_chars: Some(8),
            ..none()
        },
        Selection {
            max_symbols: Some(1.5),
            ..none()
        },
        Selection {
            min_alphabetic: Some(f64::NAN),
            ..none()
        },
        Selection {
            word_length: Some([10.0, 3.0]),
            ..none()
        },
        Selection {
            languages: vec!["en".into(), "english".into()],
            ..none()
        },
        Selection {
            language_confidence: Some(0.9),
            ..none()
        },
        Selection {
            dedup: Some(Dedup::Exact),
            dedup_threshold: Some(0.9),
            ..none()
        },
        near(0.4),
    ];
    let said: Vec<String> = cases.into_iter().map(said).collect();
    insta::assert_snapshot!(said.join("\n"), @r#"
    `corpus.min_chars` is 9, but `corpus.max_chars` is 8, so no document would stay; lower it
    `corpus.max_symbols` is 1.5, but it must lie between 0 and 1; 0.1 is usual
    `corpus.min_alphabetic` is NaN, but it must lie between 0 and 1; 0.8 is usual
    `corpus.word_length` is [10, 3], but it must be two numbers of characters, the smaller first; [3, 10] is usual
    `corpus.languages` is "english", but it must be one of af, ak, am, ar, az, be, bg, bn, ca, cs, cy, da, de, el, en, eo, es, et, fa, fi, fr, gu, he, hi, hr, hu, hy, id, it, ja, jv, ka, km, kn, ko, la, lt, lv, mk, ml, mr, my, nb, ne, nl, no, or, pa, pl, pt, ro, ru, si, sk, sl, sn, sr, sv, ta, te, th, tk, tl, tr, uk, ur, uz, vi, yi, zh, zu; three letters of ISO 639-3 do as well
    `corpus.language_confidence` is 0.9, but it says something of `corpus.languages` only; remove it, or name languages
    `corpus.dedup_threshold` is 0.9, but it says something of near duplicates only; remove it, or set `corpus.dedup` to "near"
    `corpus.dedup_threshold` is 0.4, but it must lie between 0.5 and 1; 0.8 is the default
    "#);
    for fine in [none(), near(0.5), near(1.0)] {
        fine.check().expect("possible");
    }
}
