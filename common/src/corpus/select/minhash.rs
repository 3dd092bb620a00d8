//! How alike two texts are, estimated from signatures of a fixed size. **Pure.**
//!
//! A text is taken for the set of its shingles: every [`SHINGLE_WORDS`] words that follow each other. Two texts are as
//! alike as their sets overlap, by Jaccard's coefficient |A ∩ B| / |A ∪ B|. Of a random order of all shingles, both sets
//! have the same first one with just that probability, so the share of many such orders on which they agree estimates it,
//! with a standard error of sqrt(J (1 - J) / k) for k orders (Broder 1997, "On the resemblance and containment of
//! documents").
//!
//! Which pairs are compared at all is decided by bands: a signature is cut into b bands of r values, and two documents are
//! candidates if they agree on a band as a whole, which happens with probability 1 - (1 - J^r)^b, an S-shaped curve in J
//! (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4).

use std::sync::LazyLock;

use crate::floats::widest;
use crate::rng::{derive_key, philox};

/// Words of a shingle.
pub const SHINGLE_WORDS: usize = 5;
/// Orders of the shingles that a signature looks at.
pub const PERMUTATIONS: usize = 128;
/// What the orders are derived from. Another number would be another selection.
const SEED: u64 = 0;
/// A pair at the threshold is to become a candidate with at least this probability.
const RECALL: f64 = 0.95;

/// The basis and the prime of FNV-1a with 64 bits (Fowler, Noll and Vo), here over characters.
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// Puts the shingles of a text into `out`, each as 64 bits, in order, repeated ones included.
///
/// A word is a run of letters and digits, in small letters; a character of a script that is written without spaces is a
/// word by itself, so that there a shingle is five characters. What is no word is not looked at. A text of fewer words
/// has one shingle, of all of them, and one without a word has none.
pub fn shingles(text: &str, out: &mut Vec<u64>) {
    let mut words = Words {
        last: [0; SHINGLE_WORDS],
        count: 0,
        open: None,
        out,
    };
    words.out.clear();
    for c in text.chars() {
        match c {
            'a'..='z' | '0'..='9' => words.letter(c),
            'A'..='Z' => words.letter(c.to_ascii_lowercase()),
            '\0'..='\x7f' => words.end(),
            c if stands_alone(c) => {
                words.end();
                words.letter(c);
                words.end();
            }
            c if c.is_alphanumeric() => c.to_lowercase().for_each(|c| words.letter(c)),
            _ => words.end(),
        }
    }
    words.end();
    if (1..SHINGLE_WORDS).contains(&words.count) {
        let all = shingle(&words.last[SHINGLE_WORDS - words.count..]);
        words.out.push(all);
    }
}

/// The words of a text, as they come.
struct Words<'a> {
    /// Hashes of the last ones, the newest at the end.
    last: [u64; SHINGLE_WORDS],
    count: usize,
    /// The hash of the word that has begun.
    open: Option<u64>,
    out: &'a mut Vec<u64>,
}

impl Words<'_> {
    #[inline]
    fn letter(&mut self, c: char) {
        let hash = self.open.unwrap_or(FNV_BASIS);
        self.open = Some((hash ^ u64::from(c)).wrapping_mul(FNV_PRIME));
    }

    #[inline]
    fn end(&mut self) {
        let Some(hash) = self.open.take() else {
            return;
        };
        self.last.rotate_left(1);
        self.last[SHINGLE_WORDS - 1] = mix(hash);
        self.count += 1;
        if self.count >= SHINGLE_WORDS {
            self.out.push(shingle(&self.last));
        }
    }
}

/// Whether a character belongs to a script that puts no spaces between words: Han, kana, Thai, Lao, Burmese, Khmer.
fn stands_alone(c: char) -> bool {
    let scripts = [
        '\u{0e00}'..='\u{0eff}',
        '\u{1000}'..='\u{109f}',
        '\u{1780}'..='\u{17ff}',
        '\u{3041}'..='\u{30ff}',
        '\u{3400}'..='\u{9fff}',
        '\u{f900}'..='\u{faff}',
        '\u{20000}'..='\u{3ffff}',
    ];
    scripts.iter().any(|script| script.contains(&c)) && c.is_alphanumeric()
}

/// One hash of several words, which depends on their order.
fn shingle(words: &[u64]) -> u64 {
    let together = |hash: u64, word: &u64| hash.wrapping_mul(FNV_PRIME).wrapping_add(*word);
    mix(words.iter().fold(FNV_BASIS, together))
}

/// Spreads every bit over all: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

/// The orders: shingle x stands at a x + b modulo 2^64, where a is odd, so each is a permutation of all 64-bit numbers.
struct Orders {
    factors: [u64; PERMUTATIONS],
    summands: [u64; PERMUTATIONS],
}

static ORDERS: LazyLock<Orders> = LazyLock::new(|| {
    let key = derive_key(SEED, "minhash");
    let words = |order: usize| philox(key, [order as u32, 0, 0, 0]);
    let wide = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    Orders {
        factors: std::array::from_fn(|order| wide(words(order)[0], words(order)[1]) | 1),
        summands: std::array::from_fn(|order| wide(words(order)[2], words(order)[3])),
    }
});

/// For each order the place of the first shingle of a text, its upper 32 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature(pub [u32; PERMUTATIONS]);

impl Signature {
    /// Of a text with these shingles; `None` where there are none.
    pub fn of(shingles: &[u64]) -> Option<Self> {
        if shingles.is_empty() {
            return None;
        }
        let mut least = [u64::MAX; PERMUTATIONS];
        absorb(shingles, &ORDERS.factors, &ORDERS.summands, &mut least);
        Some(Self(least.map(|place| (place >> 32) as u32)))
    }
}

/// Orders that are looked at together: as many as stay in registers.
const BLOCK: usize = 16;

widest! {
    fn absorb(
        shingles: &[u64],
        factors: &[u64; PERMUTATIONS],
        summands: &[u64; PERMUTATIONS],
        least: &mut [u64; PERMUTATIONS]
    ) {
        let orders = factors.as_chunks::<BLOCK>().0.iter().zip(summands.as_chunks::<BLOCK>().0);
        for ((factors, summands), least) in orders.zip(least.as_chunks_mut::<BLOCK>().0) {
            let mut found = *least;
            for shingle in shingles {
                for order in 0..BLOCK {
                    let place = factors[order].wrapping_mul(*shingle).wrapping_add(summands[order]);
                    found[order] = found[order].min(place);
                }
            }
            *least = found;
        }
    }
}

/// How signatures are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bands {
    /// Bands.
    pub bands: usize,
    /// Values of each.
    pub rows: usize,
}

impl Bands {
    /// The longest bands, hence the fewest needless comparisons, with which a pair at `threshold` still becomes a
    /// candidate with a probability of 0.95.
    pub fn for_threshold(threshold: f64) -> Self {
        let cut = |rows| Self {
            bands: PERMUTATIONS / rows,
            rows,
        };
        let finds = |bands: &Self| bands.candidates(threshold) >= RECALL;
        let longest = (1..=PERMUTATIONS).rev().map(cut).find(finds);
        longest.unwrap_or(cut(1))
    }

    /// The probability that documents of this similarity are candidates.
    pub fn candidates(&self, similarity: f64) -> f64 {
        let differs = 1.0 - libm::pow(similarity, self.rows as f64);
        1.0 - libm::pow(differs, self.bands as f64)
    }

    /// Values of a signature that the bands take.
    pub fn values(&self) -> usize {
        self.bands * self.rows
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> HashSet<u64> {
        let mut found = Vec::new();
        shingles(text, &mut found);
        found.into_iter().collect()
    }

    /// The share of orders on which two texts agree.
    fn estimate(a: &Signature, b: &Signature) -> f64 {
        let same = a.0.iter().zip(&b.0).filter(|(a, b)| a == b).count();
        same as f64 / PERMUTATIONS as f64
    }

    fn jaccard(a: &HashSet<u64>, b: &HashSet<u64>) -> f64 {
        a.intersection(b).count() as f64 / a.union(b).count() as f64
    }

    #[test]
    fn shingles_are_words_that_follow_each_other() {
        let count = |text: &str| {
            let mut found = Vec::new();
            shingles(text, &mut found);
            found.len()
        };
        assert_eq!(count("one two three four five six"), 2);
        assert_eq!(count("one two"), 1);
        assert_eq!(count(" -- !"), 0);
        assert_eq!(
            set("One, two; THREE-four\nfive!"),
            set("one two three four five")
        );
        assert_eq!(set("ÄPFEL und Öl von hier"), set("äpfel und öl von hier"));
        assert_ne!(
            set("one two three five four"),
            set("one two three four five")
        );
        assert_ne!(
            set("on etwo three four five"),
            set("one two three four five")
        );
        // Seven characters, or with two words of Latin letters among them nine words.
        assert_eq!(count("吾輩は猫である"), 3);
        assert_eq!(count("吾輩は cat で、dog ある"), 4);
        assert_eq!(count("สวัสดีครับ"), count("สวัสดีครับ "));
    }

    #[test]
    fn the_bands_of_a_threshold() {
        let bands = Bands::for_threshold(0.8);
        assert_eq!(bands, Bands { bands: 18, rows: 7 });
        assert!((bands.candidates(0.8) - 0.9855).abs() < 1e-4);
        assert!(bands.candidates(0.4) < 0.03);
        for threshold in [0.5, 0.6, 0.7, 0.9, 0.95, 1.0] {
            let bands = Bands::for_threshold(threshold);
            assert!(bands.candidates(threshold) >= RECALL && bands.values() <= PERMUTATIONS);
        }
    }

    /// Over many pairs the estimate is neither too large nor too small, and strays as Broder says.
    #[test]
    fn estimates_have_the_error_that_theory_gives() {
        let mut key = 0u64;
        for shared in [20usize, 50, 80, 95] {
            let (mut mean, mut square, pairs) = (0.0, 0.0, 300);
            for _ in 0..pairs {
                let mut next = || {
                    key += 1;
                    mix(key)
                };
                let both: Vec<u64> = (0..shared * 2).map(|_| next()).collect();
                let own: Vec<Vec<u64>> = (0..2)
                    .map(|_| (0..100 - shared).map(|_| next()).collect())
                    .collect();
                let of = |own: &Vec<u64>| Signature::of(&[both.clone(), own.clone()].concat());
                let pair = own.iter().map(of).map(|s| s.expect("shingles"));
                let pair: Vec<Signature> = pair.collect();
                // 2 s of s + 100 - s each: both sets together are 200.
                let error = estimate(&pair[0], &pair[1]) - shared as f64 / 100.0;
                mean += error / pairs as f64;
                square += error * error / pairs as f64;
            }
            let similarity = shared as f64 / 100.0;
            let expected = (similarity * (1.0 - similarity) / PERMUTATIONS as f64).sqrt();
            assert!(
                mean.abs() < 4.0 * expected / (pairs as f64).sqrt(),
                "{shared}: {mean}"
            );
            let ratio = square.sqrt() / expected;
            assert!((0.85..1.15).contains(&ratio), "{shared}: {ratio}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn estimates_are_near_the_true_similarity(
            words in prop::collection::vec("[a-d]{1,3}", 30..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), "[a-d]{1,3}"), 0..40),
        ) {
            let mut changed = words.clone();
            for (at, word) in changes {
                *at.get_mut(&mut changed) = word;
            }
            let (a, b) = (words.join(" "), changed.join(" "));
            let signature = |text: &str| {
                let mut found = Vec::new();
                shingles(text, &mut found);
                Signature::of(&found).expect("words")
            };
            let truth = jaccard(&set(&a), &set(&b));
            let error = estimate(&signature(&a), &signature(&b)) - truth;
            // Six standard errors, and one value where the similarity is 0 or 1.
            let bound = 6.0 * (truth * (1.0 - truth) / PERMUTATIONS as f64).sqrt() + 1.0 / PERMUTATIONS as f64;
            prop_assert!(error.abs() <= bound, "{} {}", truth, error);
        }
    }
}
