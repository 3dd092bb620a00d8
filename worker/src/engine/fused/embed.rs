//! The embedding as a candle operation. It begins the chain, so its argument is a mere anchor without a gradient.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use cohort_common::tree::Node;
use rayon::prelude::*;

use super::{Pass, slice};
use crate::engine::ops::dropout::{Mask, Masks};
use crate::engine::ops::embedding;
use crate::engine::ops::gemm::{self, Matrix};
use crate::engine::ops::lanes::Lanes;

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
    /// Begins the rows of a pass that several lanes share, whose head has the gradient `dlogits`.
    pub fn begin(pass: &Pass, hidden: &[f32], dlogits: &[f32]) -> Self {
        let mut tokens = pass.tokens.clone();
        tokens.sort_unstable();
        tokens.dedup();
        let (width, vocab) = (pass.width(), pass.fused.model.vocab_size);
        let mut rows = vec![0.0; pass.lanes.count() * tokens.len() * width];
        let p = &pass.fused.parameters;
        if p.head == p.embedding {
            let mut columns = pass.fused.buffers.take(pass.rows() * tokens.len());
            columns
                .par_chunks_mut(tokens.len())
                .zip(dlogits.par_chunks(vocab))
                .for_each(|(columns, logits)| {
                    for (column, &token) in columns.iter_mut().zip(&tokens) {
                        *column = logits[token as usize];
                    }
                });
            let alone = Lanes::of(Node::leaf(0), pass.lanes.rows_per_lane());
            let each = pass
                .lanes
                .each()
                .zip(rows.chunks_exact_mut(tokens.len() * width));
            for ((range, _), rows) in each {
                let dy = Matrix::new(&columns, pass.rows(), tokens.len());
                let x = Matrix::new(hidden, pass.rows(), width);
                let (dy, x) = (
                    dy.rows_of(range.start, range.len()),
                    x.rows_of(range.start, range.len()),
                );
                gemm::gradient(rows, dy, x, &alone, true, pass.fused.precision);
            }
            pass.fused.buffers.give(columns);
        }
        Self { tokens, rows }
    }

    /// Adds the embedding's part of each lane, and writes the sums into the gradient of the table.
    fn finish(mut self, pass: &Pass, dtable: &mut [f32], dx: &[f32]) {
        let (width, size) = (pass.width(), self.tokens.len() * pass.width());
        let place = |token: u32| self.tokens.binary_search(&token).expect("the token occurs");
        let lanes = pass.lanes.each().zip(self.rows.chunks_exact_mut(size));
        for ((range, _), rows) in lanes {
            let places: Vec<u32> = pass.tokens[range.clone()]
                .iter()
                .map(|&t| place(t) as u32)
                .collect();
            let dx = &dx[range.start * width..range.end * width];
            embedding::backward_tokens(rows, &places, width, dx);
        }
        let mut sums = vec![0.0; size];
        let rows_per_lane = pass.lanes.rows_per_lane();
        pass.lanes.sum(&mut sums, true, |range, own| {
            own.copy_from_slice(&self.rows[range.start / rows_per_lane * size..][..size]);
        });
        for (&token, row) in self.tokens.iter().zip(sums.chunks_exact(width)) {
            dtable[token as usize * width..][..width].copy_from_slice(row);
        }
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
