//! The order of the operations of one forward, so that backward can go through them the other way round.

use candle_core::{CustomOp1, Result, Tensor};

/// A chain of operations, each on the result of the one before.
pub struct Tape {
    record: bool,
    entries: Vec<Entry>,
}

struct Entry {
    op: Box<dyn CustomOp1>,
    input: Tensor,
}

impl Tape {
    /// An empty chain; with `record`, backward is possible and inputs stay alive until then.
    pub fn new(record: bool) -> Self {
        Self {
            record,
            entries: Vec::new(),
        }
    }

    /// Applies `op` to `input`.
    pub fn apply(&mut self, input: Tensor, op: impl CustomOp1 + 'static) -> Result<Tensor> {
        let output = input.apply_op1_no_bwd(&op)?;
        if self.record {
            let op = Box::new(op);
            self.entries.push(Entry { op, input });
        }
        Ok(output)
    }

    /// Calls the backward of each operation, last to first, with the gradient that the one after it returned; ends
    /// at the operation that returns none. `output` is the scalar that the chain ended in; its gradient is 1.
    pub fn backward(self, mut output: Tensor) -> Result<()> {
        let mut gradient = output.ones_like()?;
        for Entry { op, input } in self.entries.into_iter().rev() {
            match op.bwd(&input, &output, &gradient)? {
                Some(of_input) => gradient = of_input,
                None => return Ok(()),
            }
            output = input;
        }
        Ok(())
    }
}
