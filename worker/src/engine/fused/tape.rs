//! The order of the operations of one forward, so that backward can go through them the other way round.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Tensor};

use super::buffers::Buffers;

/// A chain of operations, each on the result of the one before. What no operation needs any more goes back to the pool.
pub struct Tape<'a> {
    buffers: &'a Buffers,
    record: bool,
    entries: Vec<Entry>,
}

struct Entry {
    op: Box<dyn CustomOp1>,
    input: Tensor,
}

impl<'a> Tape<'a> {
    /// An empty chain; with `record`, backward is possible and inputs stay alive until then.
    pub fn new(buffers: &'a Buffers, record: bool) -> Self {
        Self {
            buffers,
            record,
            entries: Vec::new(),
        }
    }

    /// Applies `op` to `input`.
    pub fn apply(&mut self, input: Tensor, op: impl CustomOp1 + 'static) -> Result<Tensor> {
        let output = input.apply_op1_no_bwd(&op)?;
        match self.record {
            true => self.entries.push(Entry {
                op: Box::new(op),
                input,
            }),
            false => recycle(self.buffers, input)?,
        }
        Ok(output)
    }

    /// Calls the backward of each operation, last to first, with the gradient that the one after it returned; ends
    /// at the operation that returns none. `output` is the scalar that the chain ended in; its gradient is 1. `done` hears
    /// of each operation whose backward has returned, by its place in the chain.
    pub fn backward(self, mut output: Tensor, mut done: impl FnMut(usize)) -> Result<()> {
        let mut gradient = output.ones_like()?;
        for (place, Entry { op, input }) in self.entries.into_iter().enumerate().rev() {
            let of_input = op.bwd(&input, &output, &gradient)?;
            done(place);
            recycle(self.buffers, output)?;
            recycle(self.buffers, gradient)?;
            let Some(of_input) = of_input else {
                return recycle(self.buffers, input);
            };
            (output, gradient) = (input, of_input);
        }
        Ok(())
    }
}

/// Gives a tensor's memory back to the pool. Nobody else may hold the tensor.
pub fn recycle(buffers: &Buffers, tensor: Tensor) -> Result<()> {
    /// Takes the elements out of a tensor.
    struct Take(Mutex<Vec<f32>>);
    impl InplaceOp1 for Take {
        fn name(&self) -> &'static str {
            "take"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, _layout: &Layout) -> Result<()> {
            if let CpuStorage::F32(data) = storage {
                *self.0.lock().expect("no panic while taking") = std::mem::take(data);
            }
            Ok(())
        }
    }
    let taken = Take(Mutex::default());
    tensor.inplace_op1(&taken)?;
    buffers.give(taken.0.into_inner().expect("no panic while taking"));
    Ok(())
}
