//! A base model and its adapters become one model: `W' = W + scale · B A`. **Pure.**
//!
//! The product is summed in f64 and rounded once, with W: no element of the result is further from the true one than
//! half a unit in its last place.

use super::Loaded;
use crate::layout::{Layout, TensorSpec};
use crate::spec::{Architecture, LoraConfig, ModelConfig};

/// The parameters of one model, in the order of [`Layout::of`], from a base and the adapters `lora` of it.
///
/// # Panics
/// If `loaded` is of another shape: its layout must be that of `model` with `lora`.
pub fn merge(model: &ModelConfig, lora: &LoraConfig, loaded: &Loaded) -> Vec<f32> {
    let of = |name: &str| loaded.layout.get(name).map(|t| &loaded.params[t.range()]);
    let whole = Layout::of(model);
    let mut params = vec![0.0; whole.len()];
    for tensor in whole.tensors() {
        let values = &mut params[tensor.range()];
        values.copy_from_slice(of(&tensor.name).expect("the base has every tensor"));
        let Some(module) = tensor.name.strip_suffix(".weight") else {
            continue;
        };
        let part = |part: &str| of(&format!("{module}.lora_{part}.weight"));
        if let (Some(a), Some(b)) = (part("A"), part("B")) {
            add_product(values, tensor, (a, b), model.architecture, lora);
        }
    }
    params
}

/// Adds `scale · B A` to a matrix, or its transpose to one of GPT-2's, whose rows are inputs. A is `[rank, inputs]`, B
/// `[outputs, rank]`.
fn add_product(
    matrix: &mut [f32],
    tensor: &TensorSpec,
    (a, b): (&[f32], &[f32]),
    architecture: Architecture,
    lora: &LoraConfig,
) {
    let (rank, columns) = (lora.rank as usize, tensor.shape[1]);
    let scale = f64::from(lora.scale());
    // As `left [rows, rank] · right [rank, columns]`.
    let (left, right) = match architecture {
        Architecture::Llama => (wide(b), wide(a)),
        Architecture::Gpt2 => (transposed(a, tensor.shape[0]), transposed(b, rank)),
    };
    let mut sums = vec![0.0f64; columns];
    for (row, factors) in matrix
        .chunks_exact_mut(columns)
        .zip(left.chunks_exact(rank))
    {
        sums.fill(0.0);
        for (factor, right) in factors.iter().zip(right.chunks_exact(columns)) {
            let terms = sums.iter_mut().zip(right);
            terms.for_each(|(sum, right)| *sum += factor * right);
        }
        for (value, sum) in row.iter_mut().zip(&sums) {
            *value = (f64::from(*value) + scale * sum) as f32;
        }
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// The transpose of a matrix with rows of `columns`.
fn transposed(values: &[f32], columns: usize) -> Vec<f64> {
    let column = |c: usize| values[c..].iter().step_by(columns);
    (0..columns)
        .flat_map(column)
        .map(|&value| value.into())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::llama;

    fn lora(target: &str) -> LoraConfig {
        LoraConfig {
            rank: 4,
            alpha: 6.0,
            dropout: 0.0,
            rslora: true,
            target_modules: vec![target.into()],
        }
    }

    /// Every element against the formula, written out.
    #[test]
    fn a_product_is_added_to_what_has_adapters() {
        for (architecture, target) in [
            (Architecture::Llama, "down_proj"),
            (Architecture::Gpt2, "c_fc"),
        ] {
            let model = ModelConfig {
                architecture,
                tie_word_embeddings: true,
                num_key_value_heads: 4,
                ..llama()
            };
            let lora = lora(target);
            let layout = Layout::adapted(&model, Some(&lora));
            let loaded = Loaded {
                params: (0..layout.total())
                    .map(|i| libm::sinf(i as f32 * 0.37))
                    .collect(),
                layout,
                missing: Vec::new(),
            };
            let merged = merge(&model, &lora, &loaded);
            let whole = Layout::of(&model);
            assert_eq!(merged.len(), whole.len());
            for tensor in whole.tensors() {
                let of = |name: &str| loaded.layout.get(name).expect("it is there");
                let base = &loaded.params[of(&tensor.name).range()];
                let values = &merged[tensor.range()];
                let Some(module) = tensor.name.strip_suffix(&format!("{target}.weight")) else {
                    assert_eq!(values, base, "{}", tensor.name);
                    continue;
                };
                let part = |part: &str| {
                    let name = format!("{module}{target}.lora_{part}.weight");
                    (&loaded.params[of(&name).range()], of(&name).shape[1])
                };
                let ((a, inputs), (b, rank)) = (part("A"), part("B"));
                for (index, (&value, &base)) in values.iter().zip(base).enumerate() {
                    let (row, column) = (index / tensor.shape[1], index % tensor.shape[1]);
                    let (output, input) = match architecture {
                        Architecture::Llama => (row, column),
                        Architecture::Gpt2 => (column, row),
                    };
                    let terms = (0..rank).map(|k| {
                        f64::from(b[output * rank + k]) * f64::from(a[k * inputs + input])
                    });
                    let expected = f64::from(base) + f64::from(lora.scale()) * terms.sum::<f64>();
                    assert_eq!(value, expected as f32, "{}[{index}]", tensor.name);
                }
            }
        }
    }
}
