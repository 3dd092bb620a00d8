//! The language of a text, by `whatlang`: trigrams and alphabets of 69 languages, compared in order of rank (Cavnar and
//! Trenkle 1994, "N-gram-based text categorization"). **Pure.**

use whatlang::Lang;

use super::beginning;

/// Bytes at the beginning of a text that are looked at: more hardly changes what is found.
const SAMPLE_BYTES: usize = 4 << 10;
/// Letters that a text must have to be judged: of fewer a language cannot be told.
const MIN_LETTERS: usize = 40;

/// Codes of two letters (ISO 639-1) beside those of three (639-3) that the detector knows.
const CODES: &[(&str, &str)] = &[
    ("af", "afr"),
    ("ak", "aka"),
    ("am", "amh"),
    ("ar", "ara"),
    ("az", "aze"),
    ("be", "bel"),
    ("bg", "bul"),
    ("bn", "ben"),
    ("ca", "cat"),
    ("cs", "ces"),
    ("cy", "cym"),
    ("da", "dan"),
    ("de", "deu"),
    ("el", "ell"),
    ("en", "eng"),
    ("eo", "epo"),
    ("es", "spa"),
    ("et", "est"),
    ("fa", "pes"),
    ("fi", "fin"),
    ("fr", "fra"),
    ("gu", "guj"),
    ("he", "heb"),
    ("hi", "hin"),
    ("hr", "hrv"),
    ("hu", "hun"),
    ("hy", "hye"),
    ("id", "ind"),
    ("it", "ita"),
    ("ja", "jpn"),
    ("jv", "jav"),
    ("ka", "kat"),
    ("km", "khm"),
    ("kn", "kan"),
    ("ko", "kor"),
    ("la", "lat"),
    ("lt", "lit"),
    ("lv", "lav"),
    ("mk", "mkd"),
    ("ml", "mal"),
    ("mr", "mar"),
    ("my", "mya"),
    ("nb", "nob"),
    ("ne", "nep"),
    ("nl", "nld"),
    ("no", "nob"),
    ("or", "ori"),
    ("pa", "pan"),
    ("pl", "pol"),
    ("pt", "por"),
    ("ro", "ron"),
    ("ru", "rus"),
    ("si", "sin"),
    ("sk", "slk"),
    ("sl", "slv"),
    ("sn", "sna"),
    ("sr", "srp"),
    ("sv", "swe"),
    ("ta", "tam"),
    ("te", "tel"),
    ("th", "tha"),
    ("tk", "tuk"),
    ("tl", "tgl"),
    ("tr", "tur"),
    ("uk", "ukr"),
    ("ur", "urd"),
    ("uz", "uzb"),
    ("vi", "vie"),
    ("yi", "yid"),
    ("zh", "cmn"),
    ("zu", "zul"),
];

/// The language of a code.
pub fn parse(code: &str) -> Option<Lang> {
    let known = CODES.iter().find(|(two, _)| *two == code);
    Lang::from_code(known.map_or(code, |(_, three)| three))
}

/// The codes of two letters, for a message.
pub fn codes() -> String {
    let codes: Vec<&str> = CODES.iter().map(|(two, _)| *two).collect();
    codes.join(", ")
}

/// Whether a text is in one of `languages`, with at least that confidence. One of fewer than [`MIN_LETTERS`] letters, of
/// which nobody can tell, counts as being so.
pub fn is_one_of(text: &str, languages: &[Lang], confidence: f64) -> bool {
    let sample = beginning(text, SAMPLE_BYTES);
    let letters = sample.chars().filter(|c| c.is_alphabetic());
    if letters.take(MIN_LETTERS).count() < MIN_LETTERS {
        return true;
    }
    whatlang::detect(sample)
        .is_some_and(|found| languages.contains(&found.lang()) && found.confidence() >= confidence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGLISH: &str = "It was a bright cold day in April, and the clocks were striking thirteen, so nobody in \
                           the street looked up when the old man opened his window and began to sing.";
    const GERMAN: &str = "Es war einmal ein König, der hatte eine Tochter, die war so schön, dass selbst die Sonne, die \
                          doch so vieles gesehen hat, sich wunderte, sooft sie ihr ins Gesicht schien.";

    #[test]
    fn every_code_leads_to_a_language() {
        for (two, three) in CODES {
            let language = parse(two).unwrap_or_else(|| panic!("{two}"));
            assert_eq!(language.code(), *three);
        }
        for language in Lang::all() {
            assert!(
                CODES.iter().any(|(_, three)| *three == language.code()),
                "{language}"
            );
        }
        assert_eq!(
            (parse("deu"), parse("xx"), parse("EN")),
            (Some(Lang::Deu), None, None)
        );
    }

    #[test]
    fn languages_are_told_apart_and_short_texts_stay() {
        assert!(is_one_of(ENGLISH, &[Lang::Eng], 0.5));
        assert!(!is_one_of(ENGLISH, &[Lang::Deu, Lang::Fra], 0.5));
        assert!(is_one_of(GERMAN, &[Lang::Eng, Lang::Deu], 0.5));
        assert!(!is_one_of(GERMAN, &[Lang::Eng], 0.0));
        assert!(is_one_of("Guten Tag! 12345", &[Lang::Eng], 1.0));
        let numbers = "1 2 3 ".repeat(1000);
        assert!(is_one_of(&numbers, &[Lang::Eng], 1.0));
    }
}
