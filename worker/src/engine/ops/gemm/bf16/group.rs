//! The steps of the rule, a group at a time: what the instruction sets have in common.

use super::{Operands, TILE, Target};
use crate::engine::ops::gemm::kernel::PANEL;

/// Rows of a product at a time.
const TAKEN: usize = 2 * TILE;

/// What the processor's arithmetic is set to: it rounds to nearest, takes and gives zeros for what lies below the normal range,
/// and signals nothing.
pub static FLUSHING: u32 = 0x9FC0;

/// What one group is computed with, and what has come of those before: memory that stays in the innermost cache. The operands are
/// bits of f32, the even terms first, and then the odd ones. `ROWS` are whole blocks of the innermost loop, the last filled up
/// with zeros; its columns are those of one of the `PARTS` of a panel.
#[repr(C, align(64))]
pub struct Group<const ROWS: usize, const COLS: usize, const PARTS: usize> {
    /// `[rows][columns]`.
    pub sums: [[f32; PANEL]; ROWS],
    /// `[2][rows][terms]`.
    pub left: [[[u32; TILE]; ROWS]; 2],
    /// `[2][parts of the panel][terms][columns]`.
    pub right: [[[[u32; COLS]; TILE]; PARTS]; 2],
}

/// Adds a group to the sums, for so many blocks of rows and parts of a panel, of which there is at least one.
pub type Add<const ROWS: usize, const COLS: usize, const PARTS: usize> =
    unsafe fn(&mut Group<ROWS, COLS, PARTS>, blocks: usize, parts: usize);

/// [`super::panel`] in blocks of `block` rows.
///
/// # Safety
///
/// As for [`super::panel`], on a processor that has what `add` needs.
#[inline(always)]
pub unsafe fn panel<const ROWS: usize, const COLS: usize, const PARTS: usize>(
    Operands { groups, a, b }: Operands,
    (rows, cols): (usize, usize),
    Target { c, step, add }: Target,
    block: usize,
    add_group: Add<ROWS, COLS, PARTS>,
) {
    const { assert!(ROWS >= TAKEN && COLS * PARTS == PANEL) };
    let mut own = Group {
        sums: [[0.0; PANEL]; ROWS],
        left: [[[0; TILE]; ROWS]; 2],
        right: [[[[0; COLS]; TILE]; PARTS]; 2],
    };
    let (blocks, parts) = (rows.div_ceil(block), cols.div_ceil(COLS));
    // SAFETY: the caller vouches for the memory of c and for whole tiles and rows of a panel.
    unsafe {
        for (row, sums) in own.sums[..rows].iter_mut().enumerate().filter(|_| add) {
            let from = c.add(row * step);
            sums.as_mut_ptr().copy_from_nonoverlapping(from, cols);
        }
        for group in 0..groups {
            let [even, odd] = &mut own.left;
            for (row, (even, odd)) in even[..TAKEN].iter_mut().zip(odd).enumerate() {
                let tile = row / TILE * groups + group;
                split(a.add((tile * TILE + row % TILE) * TILE), even, odd);
            }
            let [even, odd] = &mut own.right;
            for (part, (even, odd)) in even[..parts].iter_mut().zip(odd).enumerate() {
                for (term, (even, odd)) in even.iter_mut().zip(odd).enumerate() {
                    let pairs = b.add((group * TILE + term) * PANEL + part * COLS);
                    split(pairs, even, odd);
                }
            }
            add_group(&mut own, blocks, parts);
        }
        for (row, sums) in own.sums[..rows].iter().enumerate() {
            let to = c.add(row * step);
            to.copy_from_nonoverlapping(sums.as_ptr(), cols);
        }
    }
}

/// Takes pairs apart.
///
/// # Safety
///
/// They must be readable.
#[inline(always)]
unsafe fn split<const N: usize>(pairs: *const f32, even: &mut [u32; N], odd: &mut [u32; N]) {
    // SAFETY: the caller's promise.
    let pairs = unsafe { pairs.cast::<[u32; N]>().read_unaligned() };
    for (i, pair) in pairs.into_iter().enumerate() {
        even[i] = pair << 16;
        odd[i] = pair & 0xFFFF_0000;
    }
}
