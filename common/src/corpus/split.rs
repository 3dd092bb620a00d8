//! Who trains and who validates: a pure decision from the documents' keys and the length of the text.
//!
//! Many documents are split by a hash of their content (or of their group), so that the side of a document does not
//! depend on its name or place and exact copies never face each other. A few documents are split like nanoGPT's: the
//! first characters train, the tail validates.

use serde::{Deserialize, Serialize};

/// Distinct keys from which on `auto` splits by document.
pub const MANY_DOCUMENTS: usize = 20;

/// A side of the split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What the weights are fitted to.
    Train,
    /// What is only scored.
    Validation,
}

impl Split {
    /// Both sides.
    pub const ALL: [Self; 2] = [Self::Train, Self::Validation];

    /// The word used in messages and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How the split is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitMethod {
    /// By document if there are at least [`MANY_DOCUMENTS`] distinct ones, else by the tail.
    Auto,
    /// Whole documents, chosen by the hash of their content or group.
    Document,
    /// The last characters of the text.
    Tail,
}

/// How the split is to be made, and how large the validation side is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitConfig {
    /// By document, by the tail, or whatever fits.
    pub method: SplitMethod,
    /// The validation side's share of the documents or of the characters, between 0 and 1.
    pub fraction: f64,
}

impl Default for SplitConfig {
    fn default() -> Self {
        Self {
            method: SplitMethod::Auto,
            fraction: 0.1,
        }
    }
}

/// The decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum SplitPlan {
    /// Documents whose key is at most `last_key` validate, the others train.
    Document {
        /// The largest key on the validation side.
        last_key: u64,
    },
    /// The first `train_chars` characters of all documents in order train, the others validate.
    Tail {
        /// Characters (Unicode scalar values) on the training side.
        train_chars: u64,
    },
}

impl std::fmt::Display for SplitPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Document { .. } => f.write_str("by document"),
            Self::Tail { train_chars } => write!(f, "by the tail, after character {train_chars}"),
        }
    }
}

/// Why there is no split.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SplitError {
    /// Not a share.
    #[error("the validation fraction is `{0}`, but must lie between 0 and 1, both excluded")]
    BadFraction(f64),
    /// A split by document needs two of them.
    #[error(
        "cannot split by document: the corpus has {0} distinct document(s) or groups, and both sides need one; \
         split by the tail instead"
    )]
    TooFewDocuments(u64),
    /// A side of the tail split would be empty.
    #[error(
        "cannot split by the tail: of {chars} characters, {train} would train and {validation} validate, and both \
         sides need one; give more text or another fraction"
    )]
    TooFewChars {
        /// Characters in all.
        chars: u64,
        /// Of which these would train.
        train: u64,
        /// And these validate.
        validation: u64,
    },
}

/// Decides the split of documents with the given `keys` (one per document, any order) and `chars` characters in all.
/// With the tail, exactly `int(chars * (1 - fraction))` characters train.
pub fn plan(config: &SplitConfig, keys: &[u64], chars: u64) -> Result<SplitPlan, SplitError> {
    let fraction = config.fraction;
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(SplitError::BadFraction(fraction));
    }
    let mut distinct = keys.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    let by_document = match config.method {
        SplitMethod::Document => true,
        SplitMethod::Tail => false,
        SplitMethod::Auto => distinct.len() >= MANY_DOCUMENTS,
    };
    if by_document {
        let n = distinct.len();
        if n < 2 {
            return Err(SplitError::TooFewDocuments(n as u64));
        }
        let validation = ((n as f64 * fraction).round() as usize).clamp(1, n - 1);
        return Ok(SplitPlan::Document {
            last_key: distinct[validation - 1],
        });
    }
    let train = ((chars as f64 * (1.0 - fraction)) as u64).min(chars);
    if train == 0 || train == chars {
        return Err(SplitError::TooFewChars {
            chars,
            train,
            validation: chars - train,
        });
    }
    Ok(SplitPlan::Tail { train_chars: train })
}

impl SplitPlan {
    /// The side of a document with this key; `None` if the plan goes by characters.
    pub fn of_document(&self, key: u64) -> Option<Split> {
        match *self {
            Self::Document { last_key } if key <= last_key => Some(Split::Validation),
            Self::Document { .. } => Some(Split::Train),
            Self::Tail { .. } => None,
        }
    }

    /// How many characters from position `char_position` on still train; `None` if the plan goes by documents.
    pub fn train_chars_left(&self, char_position: u64) -> Option<u64> {
        match *self {
            Self::Document { .. } => None,
            Self::Tail { train_chars } => Some(train_chars.saturating_sub(char_position)),
        }
    }
}

/// The key of a document or group: a keyed hash, so that it is independent of other uses of the same hash function.
pub struct KeyHasher(blake3::Hasher);

impl KeyHasher {
    /// A key from the text of a document.
    pub fn of_content() -> Self {
        Self(blake3::Hasher::new_derive_key(
            "cohort corpus split: document content, 1",
        ))
    }

    /// The key of a group, from its name.
    pub fn of_group(group: &str) -> u64 {
        let mut hasher = Self(blake3::Hasher::new_derive_key(
            "cohort corpus split: group, 1",
        ));
        hasher.update(group);
        hasher.finish()
    }

    /// Adds text.
    pub fn update(&mut self, text: &str) {
        self.0.update(text.as_bytes());
    }

    /// The key.
    pub fn finish(&self) -> u64 {
        let hash = self.0.finalize();
        u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(method: SplitMethod, fraction: f64) -> SplitConfig {
        SplitConfig { method, fraction }
    }

    /// `data[:int(n*0.9)]` of nanoGPT's `data/shakespeare_char/prepare.py`: 1,003,854 of 1,115,394 characters train.
    #[test]
    fn the_tail_equals_nanogpts() {
        let plan = plan(&SplitConfig::default(), &[7], 1_115_394).expect("plan");
        assert_eq!(
            plan,
            SplitPlan::Tail {
                train_chars: 1_003_854
            }
        );
    }

    #[test]
    fn auto_goes_by_the_number_of_distinct_documents() {
        let keys: Vec<u64> = (0..19).chain([18, 18]).collect();
        let auto = config(SplitMethod::Auto, 0.1);
        assert!(matches!(
            plan(&auto, &keys, 1000),
            Ok(SplitPlan::Tail { .. })
        ));
        let keys: Vec<u64> = (0..20).collect();
        assert_eq!(
            plan(&auto, &keys, 1000),
            Ok(SplitPlan::Document { last_key: 1 })
        );
    }

    #[test]
    fn an_empty_side_is_an_error() {
        let tail = |fraction, chars| plan(&config(SplitMethod::Tail, fraction), &[1], chars);
        assert!(matches!(tail(0.1, 1), Err(SplitError::TooFewChars { .. })));
        assert!(matches!(
            tail(0.999, 100),
            Err(SplitError::TooFewChars { .. })
        ));
        assert_eq!(tail(0.1, 2), Ok(SplitPlan::Tail { train_chars: 1 }));
        for fraction in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(matches!(
                tail(fraction, 100),
                Err(SplitError::BadFraction(_))
            ));
        }
        let document = config(SplitMethod::Document, 0.1);
        assert_eq!(
            plan(&document, &[5, 5, 5], 100),
            Err(SplitError::TooFewDocuments(1))
        );
    }

    proptest! {
        #[test]
        fn both_sides_get_documents_and_the_share_is_kept(
            keys in prop::collection::vec(any::<u64>(), 2..200),
            fraction in 0.01f64..0.99,
        ) {
            let mut distinct = keys.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assume!(distinct.len() >= 2);
            let plan = plan(&config(SplitMethod::Document, fraction), &keys, 0).expect("plan");
            let validation = distinct
                .iter()
                .filter(|&&key| plan.of_document(key) == Some(Split::Validation))
                .count();
            prop_assert!(validation >= 1 && validation < distinct.len());
            prop_assert!((validation as f64 - fraction * distinct.len() as f64).abs() <= 1.0);
        }
    }
}
