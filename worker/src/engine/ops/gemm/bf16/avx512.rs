//! The steps of the rule with AVX-512, for the rows of two tiles and the columns of a panel.

use std::arch::x86_64::*;

use super::{Operands, TILE, Target};
use crate::engine::ops::gemm::kernel::PANEL;

/// Rows at a time.
const ROWS: usize = 2 * TILE;

/// Rows and columns of the innermost loop, whose sums stay in registers.
const BLOCK: (usize, usize) = (4, 32);

/// What one group is computed with, and what has come of those before: memory that stays in the innermost cache. The operands are
/// bits of f32, the even terms first, and then the odd ones.
#[repr(C, align(64))]
struct Group {
    /// `[rows][columns]`.
    sums: [[f32; PANEL]; ROWS],
    /// `[2][rows][terms]`.
    left: [[[u32; TILE]; ROWS]; 2],
    /// `[2][halves of the panel][terms][columns]`.
    right: [[[[u32; BLOCK.1]; TILE]; PANEL / BLOCK.1]; 2],
}

// What `Group::add` has as numbers: bytes of a row of sums, of the even terms of the left operand, of a half of the right one's,
// and of all of these.
const _: () = assert!(4 * PANEL == 256 && 4 * ROWS * TILE == 2048);
const _: () = assert!(4 * TILE * BLOCK.1 == 2048 && 4 * TILE * PANEL == 4096);

/// What the processor's arithmetic is set to: it rounds to nearest, takes and gives zeros for what lies below the normal range,
/// and signals nothing.
static FLUSHING: u32 = 0x9FC0;

/// # Safety
///
/// As for [`super::panel`], on a processor with AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn panel(
    Operands { groups, a, b }: Operands,
    (rows, cols): (usize, usize),
    Target { c, step, add }: Target,
) {
    let mut own = Group {
        sums: [[0.0; PANEL]; ROWS],
        left: [[[0; TILE]; ROWS]; 2],
        right: [[[[0; BLOCK.1]; TILE]; PANEL / BLOCK.1]; 2],
    };
    let (blocks, halves) = (rows.div_ceil(BLOCK.0), cols.div_ceil(BLOCK.1));
    // SAFETY: the caller vouches for the memory of c and for whole tiles and rows of a panel.
    unsafe {
        for (row, sums) in own.sums[..rows].iter_mut().enumerate().filter(|_| add) {
            let from = c.add(row * step);
            sums.as_mut_ptr().copy_from_nonoverlapping(from, cols);
        }
        for group in 0..groups {
            let [even, odd] = &mut own.left;
            for (row, (even, odd)) in even.iter_mut().zip(odd).enumerate() {
                let tile = row / TILE * groups + group;
                split(a.add((tile * TILE + row % TILE) * TILE), even, odd);
            }
            let [even, odd] = &mut own.right;
            for (half, (even, odd)) in even[..halves].iter_mut().zip(odd).enumerate() {
                for (term, (even, odd)) in even.iter_mut().zip(odd).enumerate() {
                    let pairs = b.add((group * TILE + term) * PANEL + half * BLOCK.1);
                    split(pairs, even, odd);
                    split(pairs.add(TILE), &mut even[TILE..], &mut odd[TILE..]);
                }
            }
            own.add(blocks, halves);
        }
        for (row, sums) in own.sums[..rows].iter().enumerate() {
            let to = c.add(row * step);
            to.copy_from_nonoverlapping(sums.as_ptr(), cols);
        }
    }
}

/// Takes 16 pairs apart.
///
/// # Safety
///
/// They must be readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn split(pairs: *const f32, even: &mut [u32], odd: &mut [u32]) {
    let [even, odd] = [even, odd].map(|half| half[..TILE].as_mut_ptr().cast());
    // SAFETY: the caller's promise, and 16 places in each half.
    unsafe {
        let pairs = _mm512_loadu_si512(pairs.cast());
        let high = _mm512_set1_epi32(0xFFFF_0000u32.cast_signed());
        _mm512_storeu_si512(even, _mm512_slli_epi32::<16>(pairs));
        _mm512_storeu_si512(odd, _mm512_and_si512(pairs, high));
    }
}

impl Group {
    /// Adds the group to the sums of so many blocks of rows and halves of the columns, of which there is at least one.
    #[target_feature(enable = "avx512f")]
    fn add(&mut self, blocks: usize, halves: usize) {
        debug_assert!((1..=ROWS / BLOCK.0).contains(&blocks) && (1..=2).contains(&halves));
        let mut before = 0u32;
        // SAFETY: every address lies in this, as its sizes say. What is set for the processor's arithmetic is set back.
        unsafe {
            std::arch::asm!(
                "stmxcsr dword ptr [{before}]",
                "ldmxcsr dword ptr [{flushing}]",
                // A half of the columns.
                "2:",
                "mov {l}, {left}",
                "mov {s}, {sums}",
                "mov {row:e}, {blocks:e}",
                // A block of rows. Registers 0 to 7 have its sums of the even terms, 8 to 15 those of the odd ones.
                "3:",
                "vpxord zmm0, zmm0, zmm0",
                "vpxord zmm1, zmm1, zmm1",
                "vpxord zmm2, zmm2, zmm2",
                "vpxord zmm3, zmm3, zmm3",
                "vpxord zmm4, zmm4, zmm4",
                "vpxord zmm5, zmm5, zmm5",
                "vpxord zmm6, zmm6, zmm6",
                "vpxord zmm7, zmm7, zmm7",
                "vpxord zmm8, zmm8, zmm8",
                "vpxord zmm9, zmm9, zmm9",
                "vpxord zmm10, zmm10, zmm10",
                "vpxord zmm11, zmm11, zmm11",
                "vpxord zmm12, zmm12, zmm12",
                "vpxord zmm13, zmm13, zmm13",
                "vpxord zmm14, zmm14, zmm14",
                "vpxord zmm15, zmm15, zmm15",
                "mov {term:e}, 16",
                // An even and an odd term.
                "4:",
                "vmovaps zmm16, zmmword ptr [{right}]",
                "vmovaps zmm17, zmmword ptr [{right} + 64]",
                "vmovaps zmm18, zmmword ptr [{right} + 4096]",
                "vmovaps zmm19, zmmword ptr [{right} + 4096 + 64]",
                "vbroadcastss zmm20, dword ptr [{l}]",
                "vbroadcastss zmm21, dword ptr [{l} + 2048]",
                "vfmadd231ps zmm0, zmm20, zmm16",
                "vfmadd231ps zmm1, zmm20, zmm17",
                "vfmadd231ps zmm8, zmm21, zmm18",
                "vfmadd231ps zmm9, zmm21, zmm19",
                "vbroadcastss zmm22, dword ptr [{l} + 64]",
                "vbroadcastss zmm23, dword ptr [{l} + 2048 + 64]",
                "vfmadd231ps zmm2, zmm22, zmm16",
                "vfmadd231ps zmm3, zmm22, zmm17",
                "vfmadd231ps zmm10, zmm23, zmm18",
                "vfmadd231ps zmm11, zmm23, zmm19",
                "vbroadcastss zmm20, dword ptr [{l} + 128]",
                "vbroadcastss zmm21, dword ptr [{l} + 2048 + 128]",
                "vfmadd231ps zmm4, zmm20, zmm16",
                "vfmadd231ps zmm5, zmm20, zmm17",
                "vfmadd231ps zmm12, zmm21, zmm18",
                "vfmadd231ps zmm13, zmm21, zmm19",
                "vbroadcastss zmm22, dword ptr [{l} + 192]",
                "vbroadcastss zmm23, dword ptr [{l} + 2048 + 192]",
                "vfmadd231ps zmm6, zmm22, zmm16",
                "vfmadd231ps zmm7, zmm22, zmm17",
                "vfmadd231ps zmm14, zmm23, zmm18",
                "vfmadd231ps zmm15, zmm23, zmm19",
                "add {right}, 128",
                "add {l}, 4",
                "dec {term:e}",
                "jnz 4b",
                // Both, and then what there was.
                "vaddps zmm0, zmm0, zmm8",
                "vaddps zmm1, zmm1, zmm9",
                "vaddps zmm2, zmm2, zmm10",
                "vaddps zmm3, zmm3, zmm11",
                "vaddps zmm4, zmm4, zmm12",
                "vaddps zmm5, zmm5, zmm13",
                "vaddps zmm6, zmm6, zmm14",
                "vaddps zmm7, zmm7, zmm15",
                "vaddps zmm0, zmm0, zmmword ptr [{s}]",
                "vaddps zmm1, zmm1, zmmword ptr [{s} + 64]",
                "vaddps zmm2, zmm2, zmmword ptr [{s} + 256]",
                "vaddps zmm3, zmm3, zmmword ptr [{s} + 256 + 64]",
                "vaddps zmm4, zmm4, zmmword ptr [{s} + 512]",
                "vaddps zmm5, zmm5, zmmword ptr [{s} + 512 + 64]",
                "vaddps zmm6, zmm6, zmmword ptr [{s} + 768]",
                "vaddps zmm7, zmm7, zmmword ptr [{s} + 768 + 64]",
                "vmovaps zmmword ptr [{s}], zmm0",
                "vmovaps zmmword ptr [{s} + 64], zmm1",
                "vmovaps zmmword ptr [{s} + 256], zmm2",
                "vmovaps zmmword ptr [{s} + 256 + 64], zmm3",
                "vmovaps zmmword ptr [{s} + 512], zmm4",
                "vmovaps zmmword ptr [{s} + 512 + 64], zmm5",
                "vmovaps zmmword ptr [{s} + 768], zmm6",
                "vmovaps zmmword ptr [{s} + 768 + 64], zmm7",
                "sub {right}, 2048",
                "add {l}, 192",
                "add {s}, 1024",
                "dec {row:e}",
                "jnz 3b",
                "add {right}, 2048",
                "add {sums}, 128",
                "dec {halves:e}",
                "jnz 2b",
                "ldmxcsr dword ptr [{before}]",
                before = in(reg) &raw mut before,
                flushing = in(reg) &raw const FLUSHING,
                sums = inout(reg) self.sums.as_mut_ptr() => _,
                left = in(reg) self.left.as_ptr(),
                right = inout(reg) self.right.as_ptr() => _,
                blocks = in(reg) blocks,
                halves = inout(reg) halves => _,
                l = out(reg) _,
                s = out(reg) _,
                row = out(reg) _,
                term = out(reg) _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                options(nostack),
            );
        }
    }
}
