//! The embedding as a candle operation. It begins the chain, so its argument is a mere anchor without a gradient.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use rayon::prelude::*;

use super::{Pass, slice};
use crate::engine::ops::dropout::{Mask, Masks};
use crate::engine::ops::embedding;
use crate::engine::ops::gemm::{Kept, Shared};

/// Place of the embedding's dropout; the blocks' places follow.
const PLACE: usize = 0;

/// Elements that one thread clears at a time.
const PART: usize = 64 << 10;

/// `x = dropout(E[tokens] (+ P[positions]))`, `[rows, hidden]`.
pub struct Embed {
    pass: Arc<Pass>,
}

impl Embed {
    pub fn new(pass: Arc<Pass>) -> Self {
        Self { pass }
    }

    /// Drops elements of all rows.
    fn drop(&self, rows: &mut [f32], lanes: &[Mask]) {
        let (samples, first) = (self.pass.samples_per_lane(), 0);
        let masks = Masks {
            lanes,
            samples,
            first,
        };
        masks.apply(rows, self.pass.length * self.pass.width());
    }
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, _anchor: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let pass = &*self.pass;
        let (rows, width) = (pass.rows(), pass.width());
        let mut x = pass.fused.buffers.take(rows * width);
        pass.embed(&mut x, 0);
        if let Some(masks) = pass.masks(PLACE) {
            self.drop(&mut x, &masks);
        }
        Ok((CpuStorage::F32(x), Shape::from((rows, width))))
    }

    fn bwd(&self, _anchor: &Tensor, _x: &Tensor, dx: &Tensor) -> Result<Option<Tensor>> {
        let masks = self.pass.masks(PLACE);
        slice(dx, |dx| match masks {
            None => self.pass.scatter(dx),
            Some(masks) => {
                let mut dx = dx.to_vec();
                self.drop(&mut dx, &masks);
                self.pass.scatter(&dx);
            }
        })?;
        Ok(None)
    }
}

/// The rows of the embedding's gradient whose tokens occur, for each lane. Their sums along the tree must wait for the
/// embedding's part; where the head is tied to it, they begin with the head's.
pub struct TokenRows {
    /// The tokens that occur, ascending.
    tokens: Vec<u32>,
    /// `[lanes, tokens, hidden]`.
    rows: Vec<f32>,
}

impl TokenRows {
    /// Begins the rows of a pass that several lanes share: with zeros, or with whatever the buffer has where they are to be
    /// those of a tied head.
    pub fn begin(pass: &Pass) -> Self {
        let mut tokens = pass.tokens.clone();
        tokens.sort_unstable();
        tokens.dedup();
        let len = pass.lanes.count() * tokens.len() * pass.width();
        let mut rows = pass.fused.buffers.take(len);
        let p = &pass.fused.parameters;
        if p.head != p.embedding {
            rows.par_chunks_mut(PART).for_each(|part| part.fill(0.0));
        }
        Self { tokens, rows }
    }

    /// What the gradient of a tied head has to fill.
    pub fn kept(&mut self) -> Kept<'_> {
        Kept {
            rows: &self.tokens,
            parts: &mut self.rows,
        }
    }

    /// Adds the embedding's part of each lane, and writes the sums into the gradient of the table.
    fn finish(mut self, pass: &Pass, dtable: &mut [f32], dx: &[f32]) {
        let (width, size) = (pass.width(), self.tokens.len() * pass.width());
        let place = |token: u32| self.tokens.binary_search(&token).expect("the token occurs");
        let lane = pass.lanes.rows_per_lane();
        self.rows
            .par_chunks_mut(size)
            .zip(
                pass.tokens
                    .par_chunks(lane)
                    .zip(dx.par_chunks(lane * width)),
            )
            .for_each(|(rows, (tokens, dx))| {
                let places: Vec<u32> = tokens.iter().map(|&t| place(t) as u32).collect();
                embedding::backward_tokens(rows, &places, width, dx);
            });
        let (rows, table) = (&self.rows, Shared::new(dtable));
        let tokens = self.tokens.par_iter().enumerate();
        tokens.for_each_init(Vec::new, |stack, (index, &token)| {
            stack.resize(pass.lanes.depth() * width, 0.0);
            pass.lanes.reduce(stack, width, |lane, _, own| {
                own.copy_from_slice(&rows[lane * size + index * width..][..width]);
            });
            let to = table.at(token as usize * width);
            // SAFETY: a row of the table, which belongs to this token alone.
            unsafe { to.copy_from_nonoverlapping(stack.as_ptr(), width) };
        });
        pass.fused.buffers.give(self.rows);
    }
}

impl Pass {
    /// The gradients of the embeddings. The head's has been taken.
    fn scatter(&self, dx: &[f32]) {
        let (p, width) = (&self.fused.parameters, self.width());
        if !self.trains(&p.embedding) {
            return;
        }
        let mut gradient = self.gradient();
        if let Some(positions) = &p.positions {
            self.lanes
                .sum(&mut gradient[positions.clone()], self.fresh, |rows, own| {
                    let dx = &dx[rows.start * width..rows.end * width];
                    let starts = self.starts_of(rows);
                    embedding::backward_positions(own, width, self.length, starts, dx);
                });
        }
        let dtable = &mut gradient[p.embedding.clone()];
        if self.fresh && p.head != p.embedding {
            dtable.fill(0.0);
        }
        let rows = self
            .rows_of_tokens
            .lock()
            .expect("no panic while saving")
            .take();
        match rows {
            Some(rows) => rows.finish(self, dtable, dx),
            None => embedding::backward_tokens(dtable, &self.tokens, width, dx),
        }
    }

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
            (start, &self.starts),
        );
    }
}
