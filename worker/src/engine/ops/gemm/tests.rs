//! Products against their rule, bit by bit, and lanes together against lanes alone.

use super::*;
use crate::engine::ops::simd;
use crate::engine::ops::testing::{pool, random};
use cohort_common::tree::Node;

/// The rule of the module's head, word by word.
fn reference(
    out: &mut [f32],
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
    [m, n, k]: [usize; 3],
) {
    for i in 0..m {
        for j in 0..n {
            for block in (0..k).step_by(DEPTH) {
                let mut sum = 0.0f32;
                for p in block..(block + DEPTH).min(k) {
                    sum = simd::fma_as_the_kernels(a(i, p), b(p, j), sum);
                }
                out[i * n + j] += sum;
            }
        }
    }
}

#[test]
fn products_follow_the_rule_to_the_bit_in_every_orientation() {
    for [m, n, k] in [
        [7, 5, 11],
        [64, 130, 300],
        [200, 70, 513],
        [1, 200, 64],
        [33, 64, 2100],
        // Large: in two pieces, in blocks of rows, and with tasks that share columns.
        [400, 70, 1900],
    ] {
        let (a, b, before) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
        for (left, right) in [(false, false), (true, false), (false, true), (true, true)] {
            let at_a = |i: usize, p: usize| if left { a[p * m + i] } else { a[i * k + p] };
            let at_b = |p: usize, j: usize| if right { b[j * k + p] } else { b[p * n + j] };
            let x = if left {
                Matrix::new(&a, k, m).t()
            } else {
                Matrix::new(&a, m, k)
            };
            let y = if right {
                Matrix::new(&b, n, k).t()
            } else {
                Matrix::new(&b, k, n)
            };
            for add in [false, true] {
                let mut expected = if add {
                    before.clone()
                } else {
                    vec![0.0; m * n]
                };
                reference(&mut expected, at_a, at_b, [m, n, k]);
                for threads in [1, 3] {
                    let mut out = before.clone();
                    pool(threads).install(|| matmul(&mut out, x, y, add, Precision::F32));
                    assert!(
                        out == expected,
                        "{m} x {n} x {k}, {left} {right} {add}, {threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn bf16_products_round_their_operands_and_little_else() {
    for [m, n, k] in [[7, 5, 11], [40, 130, 300], [33, 64, 2100]] {
        // Powers of two and their small multiples are not rounded, so the products are nearly exact.
        let small = |len, seed| -> Vec<f32> {
            random(len, seed)
                .iter()
                .map(|x| (x * 16.0).round() / 16.0)
                .collect()
        };
        let (a, b) = (small(m * k, 1), small(k * n, 2));
        let (mut full, mut half) = (vec![1.0; m * n], vec![1.0; m * n]);
        for (out, precision) in [(&mut full, Precision::F32), (&mut half, Precision::Bf16)] {
            matmul(
                out,
                Matrix::new(&a, m, k),
                Matrix::new(&b, k, n),
                true,
                precision,
            );
        }
        for (full, half) in full.iter().zip(&half) {
            assert!((full - half).abs() < 1e-3, "{full} {half}");
        }
        for threads in [1, 3] {
            let mut again = vec![1.0; m * n];
            let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
            pool(threads).install(|| matmul(&mut again, a, b, true, Precision::Bf16));
            assert!(again == half, "{threads} threads");
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_company() {
    rows_in_company(Precision::F32);
    rows_in_company(Precision::Bf16);
}

fn rows_in_company(precision: Precision) {
    let (m, n, k) = (64, 100, 330);
    let (a, b) = (random(m * k, 1), random(k * n, 2));
    let mut whole = vec![0.0; m * n];
    let b = Matrix::new(&b, k, n);
    matmul(&mut whole, Matrix::new(&a, m, k), b, false, precision);
    for (first, count) in [(0, 1), (5, 3), (10, 37), (63, 1)] {
        let mut part = vec![0.0; count * n];
        let rows = Matrix::new(&a, m, k).rows_of(first, count);
        matmul(&mut part, rows, b, false, precision);
        assert!(
            part == whole[first * n..][..count * n],
            "{count} rows from {first}"
        );
    }
}

#[test]
fn gradients_of_lanes_together_equal_those_of_lanes_alone_added_along_the_tree() {
    lanes_together(Precision::F32);
    lanes_together(Precision::Bf16);
}

fn lanes_together(precision: Precision) {
    let (m, n) = (100, 130);
    for lanes in [1, 2, 3, 5, 8] {
        for rows in [1, 40, 257] {
            let all = rows * lanes as usize;
            let (x, dy) = (random(all * m, 1), random(all * n, 2));
            let lane = |lane: u32| {
                let (mut out, at) = (vec![f32::NAN; m * n], lane as usize * rows);
                let (x, dy) = (Matrix::new(&x, all, m), Matrix::new(&dy, all, n));
                let alone = Lanes::of(Node::leaf(0), rows);
                let (x, dy) = (x.rows_of(at, rows), dy.rows_of(at, rows));
                gradient(&mut out, x, dy, &alone, true, precision);
                out
            };
            fn sum(node: Node, lane: &impl Fn(u32) -> Vec<f32>) -> Vec<f32> {
                let Some((left, right)) = node.children() else {
                    return lane(node.first);
                };
                let (mut left, right) = (sum(left, lane), sum(right, lane));
                left.iter_mut().zip(right).for_each(|(a, b)| *a += b);
                left
            }
            let node = Node {
                first: 0,
                size: lanes,
            };
            let expected = sum(node, &lane);
            for threads in [1, 2] {
                let mut out = vec![f32::NAN; m * n];
                let (x, dy) = (Matrix::new(&x, all, m), Matrix::new(&dy, all, n));
                let lanes = Lanes::of(node, rows);
                pool(threads).install(|| gradient(&mut out, x, dy, &lanes, true, precision));
                assert!(
                    out == expected,
                    "{node} of {rows} rows, {threads} threads, {precision:?}"
                );
            }
        }
    }
}
