//! Encodes text stretch by stretch and remembers the tokens of each, for tokenizers that may be cut before white space
//! (see `pieces.rs` for why that changes nothing). Most stretches of a text are words that have been met before, so most
//! of the text never reaches the library: several times faster than its own cache, which sits behind the regular
//! expression.

use std::collections::HashMap;

use super::tokenizer::TokenizerError;

/// Longer stretches are hardly met twice.
const MAX_STRETCH_BYTES: usize = 48;
/// Stretches that are remembered: some 10 MB. When they are full they are forgotten, so that a change of language or
/// subject does not leave a cache of useless ones.
const MAX_STRETCHES: usize = 1 << 17;

/// The parts of `text` between the places where it may be cut: each is white space and what follows it.
pub(super) fn stretches(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = (1..rest.len()).find(|&at| may_cut(rest, at));
        let (stretch, later) = rest.split_at(end.unwrap_or(rest.len()));
        rest = later;
        Some(stretch)
    })
}

/// Whether byte `at` of `text`, not its first, is white space after something else.
pub(super) fn may_cut(text: &str, at: usize) -> bool {
    let bytes = text.as_bytes();
    if !matches!(bytes[at], b' ' | b'\n' | b'\r' | b'\t') {
        return false;
    }
    match bytes[at - 1] {
        before if before.is_ascii() => !char::from(before).is_whitespace(),
        _ => !text[..at]
            .chars()
            .next_back()
            .is_some_and(char::is_whitespace),
    }
}

/// Tokens of stretches that were met before.
#[derive(Default)]
pub(super) struct StretchCache {
    known: HashMap<Box<str>, (u32, u32)>, // where in `ids`
    ids: Vec<u32>,
}

impl StretchCache {
    /// Appends the tokens of `text` to `out`; `library` encodes what is new.
    pub fn encode(
        &mut self,
        text: &str,
        out: &mut Vec<u32>,
        library: impl Fn(&str) -> Result<Vec<u32>, TokenizerError>,
    ) -> Result<(), TokenizerError> {
        for stretch in stretches(text) {
            if let Some(&(start, end)) = self.known.get(stretch) {
                out.extend_from_slice(&self.ids[start as usize..end as usize]);
                continue;
            }
            let ids = library(stretch)?;
            out.extend_from_slice(&ids);
            if stretch.len() <= MAX_STRETCH_BYTES {
                self.remember(stretch, &ids);
            }
        }
        Ok(())
    }

    fn remember(&mut self, stretch: &str, ids: &[u32]) {
        if self.known.len() >= MAX_STRETCHES {
            self.known.clear();
            self.ids.clear();
        }
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.known
            .insert(stretch.into(), (start, self.ids.len() as u32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_is_white_space_and_what_follows() {
        let parts = |text| stretches(text).collect::<Vec<_>>();
        assert_eq!(
            parts("The  cat's\r\n\nhat.\n"),
            ["The", "  cat's", "\r\n\nhat.", "\n"]
        );
        assert_eq!(parts(" a\u{a0} b€ c"), [" a\u{a0} b€", " c"]);
        assert!(parts("").is_empty());
    }
}
