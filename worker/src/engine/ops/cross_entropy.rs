//! Softmax cross-entropy over rows of logits, weighted by token: `Σ_r w_r (log Σ_v e^z[r,v] - z[r, target r])`, in
//! nats. The gradient `w_r (softmax(z_r) - onehot(target r))` takes the place of the logits.

use rayon::prelude::*;

use super::simd::{self, simd_fn};

/// Rows in one task.
const ROWS: usize = 8;

/// Writes each row's weighted loss to `losses` and, if `gradient`, the gradient over the logits. A row of weight 0
/// has no loss and no gradient, whatever its target.
pub fn forward(
    logits: &mut [f32],
    vocab: usize,
    targets: &[u32],
    weights: &[f32],
    losses: &mut [f64],
    gradient: bool,
) {
    logits
        .par_chunks_mut(ROWS * vocab)
        .zip(targets.par_chunks(ROWS))
        .zip(weights.par_chunks(ROWS))
        .zip(losses.par_chunks_mut(ROWS))
        .for_each(|(((logits, targets), weights), losses)| {
            let rows = logits
                .chunks_exact_mut(vocab)
                .zip(targets)
                .zip(weights)
                .zip(losses);
            for (((row, &target), &weight), loss) in rows {
                *loss = one_row(row, target as usize, weight, gradient);
            }
        });
}

fn one_row(row: &mut [f32], target: usize, weight: f32, gradient: bool) -> f64 {
    if weight == 0.0 {
        row.fill(0.0);
        return 0.0;
    }
    let (max, own) = (simd::max(row), row[target]);
    let sum = simd::exp_in_place(row, max);
    if gradient {
        simd::scale(row, weight / sum);
        row[target] -= weight;
    }
    f64::from(weight) * (libm::log(f64::from(sum)) + f64::from(max) - f64::from(own))
}

simd_fn! {
    /// Turns one row of logits into probabilities.
    pub fn softmax(row: &mut [f32]) {
        let max = simd::max(row);
        let sum = simd::exp_in_place(row, max);
        simd::scale(row, 1.0 / sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::{check_gradient, random};

    #[test]
    fn loss_and_gradient_agree_with_the_definition() {
        let (rows, vocab) = (11, 45);
        let logits = random(rows * vocab, 1);
        let targets: Vec<u32> = (0..rows as u32).map(|r| r * 7 % 45).collect();
        let weights: Vec<f32> = (0..rows).map(|r| (r % 3) as f32).collect();
        let loss = |logits: &[f32]| -> f64 {
            (0..rows)
                .map(|r| {
                    let row: Vec<f64> = logits[r * vocab..(r + 1) * vocab]
                        .iter()
                        .map(|&z| f64::from(z))
                        .collect();
                    let sum: f64 = row.iter().map(|z| z.exp()).sum();
                    f64::from(weights[r]) * (sum.ln() - row[targets[r] as usize])
                })
                .sum()
        };
        let (mut gradient, mut losses) = (logits.clone(), vec![f64::NAN; rows]);
        forward(&mut gradient, vocab, &targets, &weights, &mut losses, true);
        assert!((losses.iter().sum::<f64>() - loss(&logits)).abs() < 1e-5);
        check_gradient(&logits, &gradient, 1, loss);
    }
}
