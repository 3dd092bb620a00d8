//! Token embedding, with learned positions where the model has them: `x[r] = E[token r] (+ P[position r])`.
//! Backward adds each row of dx to the rows it came from, in the order of the rows.

use rayon::prelude::*;

use super::simd;
use super::{ROW_BLOCK, position};

/// Fills `x`, `[tokens, width]`. Row r has the position [`position`], `start` further on.
pub fn forward(
    x: &mut [f32],
    tokens: &[u32],
    width: usize,
    table: &[f32],
    positions: Option<&[f32]>,
    length: usize,
    (start, starts): (usize, &[u32]),
) {
    x.par_chunks_mut(ROW_BLOCK * width)
        .enumerate()
        .for_each(|(block, x)| {
            for (i, row) in x.chunks_exact_mut(width).enumerate() {
                let r = block * ROW_BLOCK + i;
                row.copy_from_slice(at(table, tokens[r] as usize, width));
                if let Some(positions) = positions {
                    simd::add(
                        row,
                        at(positions, start + position(r, length, starts), width),
                    );
                }
            }
        });
}

/// Adds rows of `dx` to rows of `dtable`, one after the other: tokens repeat, and the order decides the bits.
pub fn backward_tokens(dtable: &mut [f32], tokens: &[u32], width: usize, dx: &[f32]) {
    for (&token, row) in tokens.iter().zip(dx.chunks_exact(width)) {
        let token = token as usize;
        simd::add(&mut dtable[token * width..(token + 1) * width], row);
    }
}

/// Adds rows of `dx` to the rows of their positions, in the order of the rows.
pub fn backward_positions(
    dpositions: &mut [f32],
    width: usize,
    length: usize,
    starts: &[u32],
    dx: &[f32],
) {
    if starts.is_empty() {
        for sample in dx.chunks_exact(length * width) {
            simd::add(&mut dpositions[..length * width], sample);
        }
        return;
    }
    for (r, row) in dx.chunks_exact(width).enumerate() {
        let at = position(r, length, starts) * width;
        simd::add(&mut dpositions[at..at + width], row);
    }
}

fn at(table: &[f32], index: usize, width: usize) -> &[f32] {
    &table[index * width..(index + 1) * width]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::{check_gradient, random, weigh};

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (width, length, tokens) = (3, 4, [5, 1, 5, 0, 2, 5, 1, 1]);
        let (table, positions, dx) = (
            random(6 * width, 1),
            random(length * width, 2),
            random(8 * width, 3),
        );
        for starts in [&[][..], &[0, 0, 2, 2, 0, 1, 1, 3]] {
            let loss = |table: &[f32], positions: &[f32]| {
                let mut x = vec![f32::NAN; 8 * width];
                let places = (0, starts);
                forward(
                    &mut x,
                    &tokens,
                    width,
                    table,
                    Some(positions),
                    length,
                    places,
                );
                weigh(&x, &dx)
            };
            let (mut dtable, mut dpositions) = (vec![0.0; table.len()], vec![0.0; positions.len()]);
            backward_tokens(&mut dtable, &tokens, width, &dx);
            backward_positions(&mut dpositions, width, length, starts, &dx);
            check_gradient(&table, &dtable, 1, |table| loss(table, &positions));
            check_gradient(&positions, &dpositions, 1, |positions| {
                loss(&table, positions)
            });
        }
    }
}
