//! Rows: samples of a supervised corpus, several packed into one sequence of a fixed length. **Pure.**
//!
//! Samples in a row do not see each other: each is a segment with positions of its own. What a row has left over at its
//! end is filled up with tokens that nobody is trained on.

use std::cmp::Reverse;

use super::objective::Objective;
use super::reader::Window;

/// Rows that are open for more samples at a time.
const OPEN: usize = 64;

/// One sample, tokenized.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// For each token, whether it is learned.
    pub trained: Vec<bool>,
}

/// One or several samples after each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Their tokens, and what fills the row up.
    pub tokens: Vec<u32>,
    /// For each token, whether it is learned.
    pub trained: Vec<bool>,
    /// Where the samples begin.
    pub starts: Vec<u32>,
}

impl Row {
    /// The row as the model sees it: of each sample, the tokens that are trained are the targets of those before them.
    pub fn window(self, objective: Objective) -> Window {
        let length = self.tokens.len();
        let mut starts = vec![0; length];
        let mut begins = vec![false; length];
        for &start in &self.starts {
            begins[start as usize] = true;
            starts[start as usize..].fill(start);
        }
        let mut inputs = self.tokens;
        let mut targets = inputs[1..].to_vec();
        targets.push(0);
        let counts = |place: usize| place < length && self.trained[place] && !begins[place];
        let weights = (1..=length).map(|next| f32::from(u8::from(counts(next))));
        let weights = weights.collect();
        if objective == Objective::Classify {
            // A label is no token: nothing may be read off the place where it is kept.
            let labels = inputs
                .iter_mut()
                .zip(&self.trained)
                .filter(|(_, label)| **label);
            labels.for_each(|(input, _)| *input = 0);
        }
        Window {
            inputs,
            targets,
            weights,
            starts,
        }
    }

    fn push(&mut self, sample: Sample) {
        self.starts.push(self.tokens.len() as u32);
        self.tokens.extend(sample.tokens);
        self.trained.extend(sample.trained);
    }
}

/// Packs samples into rows, as they come: each into the open row that it fills best. Depends on the samples alone.
pub struct Packer {
    length: usize,
    several: bool,
    fill: u32,
    open: Vec<Row>,
}

impl Packer {
    /// For rows of `length` tokens that are filled up with the token `fill`. Without `several`, one sample a row.
    pub fn new(length: usize, several: bool, fill: u32) -> Self {
        Self {
            length,
            several,
            fill,
            open: Vec::new(),
        }
    }

    /// Takes a sample of at most a row, and returns a row that is complete.
    ///
    /// # Panics
    /// If the sample has no token, or more than a row holds.
    pub fn push(&mut self, sample: Sample) -> Option<Row> {
        let size = sample.tokens.len();
        assert!(
            (1..=self.length).contains(&size),
            "{size} of {}",
            self.length
        );
        let room = |row: &Row| self.length - row.tokens.len();
        let fitting = self.open.iter().enumerate();
        let best = fitting
            .filter(|(_, row)| self.several && room(row) >= size)
            .min_by_key(|(_, row)| room(row))
            .map(|(index, _)| index);
        let Some(index) = best else {
            let mut row = Row::default();
            row.push(sample);
            self.open.push(row);
            let least = if self.several { OPEN } else { 0 };
            return (self.open.len() > least).then(|| self.close_fullest());
        };
        self.open[index].push(sample);
        match self.open[index].tokens.len() == self.length {
            true => Some(self.close(index)),
            false => None,
        }
    }

    /// The rows that are still open.
    pub fn finish(mut self) -> Vec<Row> {
        let open = std::mem::take(&mut self.open);
        open.into_iter().map(|row| self.filled(row)).collect()
    }

    fn close_fullest(&mut self) -> Row {
        let lengths = self.open.iter().map(|row| row.tokens.len()).enumerate();
        let fullest = lengths.max_by_key(|&(index, length)| (length, Reverse(index)));
        self.close(fullest.expect("one is open").0)
    }

    fn close(&mut self, index: usize) -> Row {
        let row = self.open.remove(index);
        self.filled(row)
    }

    fn filled(&self, mut row: Row) -> Row {
        row.tokens.resize(self.length, self.fill);
        row.trained.resize(self.length, false);
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(number: usize, length: usize) -> Sample {
        Sample {
            tokens: vec![number as u32 + 1; length],
            trained: (0..length).map(|i| i % 2 == 1).collect(),
        }
    }

    proptest! {
        #[test]
        fn every_sample_is_in_one_row_whole(
            lengths in prop::collection::vec(1usize..=16, 0..300), several in any::<bool>(),
        ) {
            let mut packer = Packer::new(16, several, 0);
            let mut rows = Vec::new();
            for (number, &length) in lengths.iter().enumerate() {
                rows.extend(packer.push(sample(number, length)));
            }
            rows.extend(packer.finish());
            let mut found = Vec::new();
            for row in &rows {
                prop_assert_eq!((row.tokens.len(), row.trained.len()), (16, 16));
                prop_assert_eq!(row.starts[0], 0);
                prop_assert!(several || row.starts.len() == 1);
                for &start in &row.starts {
                    let number = row.tokens[start as usize] as usize - 1;
                    let own = start as usize..start as usize + lengths[number];
                    let expected = sample(number, lengths[number]);
                    prop_assert_eq!(&row.tokens[own.clone()], &expected.tokens[..]);
                    prop_assert_eq!(&row.trained[own], &expected.trained[..]);
                    found.push(number);
                }
            }
            found.sort_unstable();
            prop_assert_eq!(found, (0..lengths.len()).collect::<Vec<_>>());
            let tokens: usize = lengths.iter().sum();
            if several && lengths.len() > 200 {
                prop_assert!(rows.len() * 16 <= tokens + tokens / 4 + 64 * 16);
            }
        }
    }
}
