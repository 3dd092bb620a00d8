//! What the filters of length and quality say of one text. **Pure.**
//!
//! The rules of quality are four of those by which Gopher's training text was chosen (Rae et al. 2021, "Scaling language
//! models: methods, analysis & insights from training Gopher", appendix A.1.1, and table A1 for repeated lines). Its
//! bounds are named in `docs/corpora.md`; none is a default here.

use std::collections::HashSet;

use whatlang::Lang;

use super::language;
use super::{Reason, Selection};

/// The filters that are asked for.
pub struct Rules {
    selection: Selection,
    languages: Vec<Lang>,
}

impl Rules {
    /// Those of a selection that has been checked.
    pub fn new(selection: &Selection) -> Self {
        let languages = selection.languages.iter();
        Self {
            languages: languages.filter_map(|code| language::parse(code)).collect(),
            selection: selection.clone(),
        }
    }

    /// The first reason for which a document of `chars` characters is left out. `text` is its beginning, or all of it.
    pub fn judge(&self, text: &str, chars: u64) -> Option<Reason> {
        let asked = &self.selection;
        let fails = |reason| match reason {
            Reason::TooShort => asked.min_chars.is_some_and(|least| chars < least),
            Reason::TooLong => asked.max_chars.is_some_and(|most| chars > most),
            Reason::RepeatedLines => asked
                .max_repeated_lines
                .is_some_and(|most| repeated_lines(text) > most),
            Reason::Symbols => asked.max_symbols.is_some_and(|most| symbols(text) > most),
            Reason::WordLength => asked.word_length.is_some_and(|[least, most]| {
                let length = word_length(text);
                length < least || length > most
            }),
            Reason::NotAlphabetic => asked
                .min_alphabetic
                .is_some_and(|least| alphabetic_words(text) < least),
            Reason::Language => {
                !self.languages.is_empty()
                    && !language::is_one_of(text, &self.languages, asked.confidence())
            }
            // What an earlier document says decides these.
            Reason::ExactDuplicate | Reason::NearDuplicate => false,
        };
        Reason::ALL.into_iter().find(|&reason| fails(reason))
    }
}

/// Share of the lines, blank ones left out, that are the same as an earlier one but for white space around them.
fn repeated_lines(text: &str) -> f64 {
    let mut seen = HashSet::new();
    let (mut lines, mut repeated) = (0u64, 0u64);
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        lines += 1;
        repeated += u64::from(!seen.insert(line));
    }
    ratio(repeated, lines)
}

/// Hash signs, or ellipses (`…` and `...`), per word: the more frequent of the two.
fn symbols(text: &str) -> f64 {
    let hashes = text.matches('#').count();
    let ellipses = text.matches('…').count() + text.matches("...").count();
    ratio(
        hashes.max(ellipses) as u64,
        text.split_whitespace().count() as u64,
    )
}

/// Mean number of characters of a word.
fn word_length(text: &str) -> f64 {
    let (mut words, mut chars) = (0u64, 0u64);
    for word in text.split_whitespace() {
        words += 1;
        chars += word.chars().count() as u64;
    }
    ratio(chars, words)
}

/// Share of the words that have a letter.
fn alphabetic_words(text: &str) -> f64 {
    let (mut words, mut with) = (0u64, 0u64);
    for word in text.split_whitespace() {
        words += 1;
        with += u64::from(word.chars().any(char::is_alphabetic));
    }
    ratio(with, words)
}

/// A share of nothing is 0.
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_by_hand() {
        assert_eq!(repeated_lines("a\n\n a \nb\n\na"), 0.5);
        assert_eq!(repeated_lines("\n \n"), 0.0);
        assert_eq!(symbols("# one ... two … three"), 2.0 / 6.0);
        assert_eq!(word_length("ab abcd"), 3.0);
        assert_eq!(alphabetic_words("a1 22 3b ---"), 0.5);
        assert_eq!(alphabetic_words(""), 0.0);
    }

    #[test]
    fn bounds_are_included() {
        let text = "one two\none two\nthree four";
        let judge =
            |selection: Selection| Rules::new(&selection).judge(text, text.chars().count() as u64);
        let none = Selection::default;
        assert_eq!(judge(none()), None);
        for (selection, reason) in [
            (
                Selection {
                    min_chars: Some(27),
                    ..none()
                },
                Reason::TooShort,
            ),
            (
                Selection {
                    max_chars: Some(25),
                    ..none()
                },
                Reason::TooLong,
            ),
            (
                Selection {
                    max_repeated_lines: Some(0.33),
                    ..none()
                },
                Reason::RepeatedLines,
            ),
            (
                Selection {
                    word_length: Some([4.0, 10.0]),
                    ..none()
                },
                Reason::WordLength,
            ),
            (
                Selection {
                    word_length: Some([1.0, 3.0]),
                    ..none()
                },
                Reason::WordLength,
            ),
            (
                Selection {
                    languages: vec!["ja".into()],
                    min_chars: Some(99),
                    ..none()
                },
                Reason::TooShort,
            ),
        ] {
            assert_eq!(judge(selection), Some(reason));
        }
        for selection in [
            Selection {
                min_chars: Some(26),
                max_chars: Some(26),
                ..none()
            },
            Selection {
                max_repeated_lines: Some(1.0 / 3.0),
                ..none()
            },
            Selection {
                min_alphabetic: Some(1.0),
                max_symbols: Some(0.0),
                ..none()
            },
        ] {
            assert_eq!(judge(selection), None);
        }
    }
}
