//! The embedding as a candle operation. It begins the chain, so its argument is a mere anchor without a gradient.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{Pass, slice};
use crate::engine::ops::{dropout::Mask, embedding};

/// Place of the embedding's dropout; the blocks' places follow.
const PLACE: usize = 0;

/// `x = dropout(E[tokens] (+ P[positions]))`, `[rows, hidden]`.
pub struct Embed {
    pass: Arc<Pass>,
}

impl Embed {
    pub fn new(pass: Arc<Pass>) -> Self {
        Self { pass }
    }

    fn mask(&self) -> Option<Mask> {
        self.pass
            .site
            .and_then(|site| Mask::new(site, PLACE, self.pass.fused.model.dropout))
    }
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, _anchor: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let pass = &*self.pass;
        let (rows, width) = (pass.rows(), pass.width());
        let mut x = vec![0.0; rows * width];
        pass.embed(&mut x, 0);
        if let Some(mask) = self.mask() {
            mask.apply(&mut x);
        }
        Ok((CpuStorage::F32(x), Shape::from((rows, width))))
    }

    fn bwd(&self, _anchor: &Tensor, _x: &Tensor, dx: &Tensor) -> Result<Option<Tensor>> {
        let mask = self.mask();
        slice(dx, |dx| match mask {
            None => self.scatter(dx),
            Some(mask) => {
                let mut dx = dx.to_vec();
                mask.apply(&mut dx);
                self.scatter(&dx);
            }
        })?;
        Ok(None)
    }
}

impl Embed {
    fn scatter(&self, dx: &[f32]) {
        let pass = &*self.pass;
        let p = &pass.fused.parameters;
        let mut gradient = pass.gradient();
        if let Some(positions) = &p.positions {
            embedding::backward_positions(
                &mut gradient[positions.clone()],
                pass.width(),
                pass.length,
                dx,
            );
        }
        embedding::backward_tokens(
            &mut gradient[p.embedding.clone()],
            &pass.tokens,
            pass.width(),
            dx,
        );
    }
}

impl Pass {
    /// The embedding alone; the first token has position `start`.
    pub fn embed(&self, x: &mut [f32], start: usize) {
        let p = &self.fused.parameters;
        let positions = p
            .positions
            .as_ref()
            .map(|range| &self.params[range.clone()]);
        let table = &self.params[p.embedding.clone()];
        embedding::forward(
            x,
            &self.tokens,
            self.width(),
            table,
            positions,
            self.length,
            start,
        );
    }
}
