//! Several lanes in one pass: their rows lie one lane after the other, and whatever is a sum over rows is taken for each
//! lane as if it were alone, then added along the reduction tree.

use std::ops::Range;

use cohort_common::tree::Node;

use super::simd;

/// The lanes of a pass: those of one node of the reduction tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lanes {
    rows: usize,
    /// Per lane: how many sums are completed by it.
    merges: Vec<u32>,
    depth: usize,
}

impl Lanes {
    /// The lanes of `node`, with `rows` rows each.
    pub fn of(node: Node, rows: usize) -> Self {
        fn walk(node: Node, merges: &mut Vec<u32>) {
            match node.children() {
                None => merges.push(0),
                Some((left, right)) => {
                    walk(left, merges);
                    walk(right, merges);
                    *merges.last_mut().expect("a node has a lane") += 1;
                }
            }
        }
        let mut merges = Vec::with_capacity(node.size as usize);
        walk(node, &mut merges);
        let (mut height, mut depth) = (0, 0);
        for &count in &merges {
            height += 1;
            depth = depth.max(height);
            height -= count as usize;
        }
        Self {
            rows,
            merges,
            depth,
        }
    }

    /// Number of lanes.
    pub fn count(&self) -> usize {
        self.merges.len()
    }

    /// Rows of each lane.
    pub fn rows_per_lane(&self) -> usize {
        self.rows
    }

    /// Rows of all lanes.
    pub fn rows(&self) -> usize {
        self.rows * self.count()
    }

    /// The rows, if there is but one lane.
    pub fn alone(&self) -> Option<usize> {
        (self.count() == 1).then_some(self.rows)
    }

    /// Partial sums that are alive at a time, at most.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Each lane's rows, and how many times the two youngest sums are added after it.
    pub fn each(&self) -> impl Iterator<Item = (Range<usize>, u32)> {
        let lanes = self.merges.iter().enumerate();
        lanes.map(|(lane, &merges)| (lane * self.rows..(lane + 1) * self.rows, merges))
    }

    /// Sums along the tree what `compute` leaves for each lane, given its index and rows, in its part of `stack`; the sum is
    /// the first `size` elements. The stack holds [`Self::depth`] times as many.
    pub fn reduce(
        &self,
        stack: &mut [f32],
        size: usize,
        mut compute: impl FnMut(usize, Range<usize>, &mut [f32]),
    ) {
        let mut height = 0;
        for (lane, (rows, merges)) in self.each().enumerate() {
            compute(lane, rows, &mut stack[height * size..][..size]);
            height += 1;
            for _ in 0..merges {
                height -= 1;
                let (lower, upper) = stack.split_at_mut(height * size);
                simd::add(&mut lower[(height - 1) * size..], &upper[..size]);
            }
        }
        assert_eq!(height, 1, "the lanes are one node of the tree");
    }

    /// `out` = the sum along the tree of one vector per lane, which `fill` adds to. Without `fresh` it adds to `out`,
    /// and there is one lane.
    pub fn sum(
        &self,
        out: &mut [f32],
        fresh: bool,
        mut fill: impl FnMut(Range<usize>, &mut [f32]),
    ) {
        if let Some(rows) = self.alone() {
            if fresh {
                out.fill(0.0);
            }
            return fill(0..rows, out);
        }
        assert!(fresh, "only a single lane is added to what is there");
        let width = out.len();
        let mut stack = vec![0.0; width * self.depth];
        self.reduce(&mut stack, width, |_, rows, own| {
            own.fill(0.0);
            fill(rows, own);
        });
        out.copy_from_slice(&stack[..width]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_summed_along_the_tree() {
        for size in 1..=9 {
            let node = Node { first: 3, size };
            fn sum(node: Node) -> f32 {
                match node.children() {
                    None => 0.1 * (node.first - 2) as f32,
                    Some((left, right)) => sum(left) + sum(right),
                }
            }
            let lanes = Lanes::of(node, 4);
            let mut out = [f32::NAN];
            lanes.sum(&mut out, true, |rows, own| {
                own[0] += 0.1 * (rows.start / 4 + 1) as f32
            });
            assert_eq!(out[0].to_bits(), sum(node).to_bits(), "{size} lanes");
            assert!(lanes.depth() <= 1 + (size as usize).ilog2() as usize + 1);
        }
    }
}
