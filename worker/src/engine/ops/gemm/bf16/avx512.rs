//! The steps of the rule with AVX-512, for the rows of two tiles and the columns of a panel.

use super::group::{self, FLUSHING};
use super::{Operands, TILE, Target};
use crate::engine::ops::gemm::kernel::PANEL;

/// Rows of a group, and rows and columns of the innermost loop, whose sums stay in registers.
const ROWS: usize = 2 * TILE;
const BLOCK: (usize, usize) = (4, 32);
const PARTS: usize = PANEL / BLOCK.1;

type Group = group::Group<ROWS, { BLOCK.1 }, PARTS>;

// What `add` has as numbers: bytes of a row of sums, of the even terms of the left operand, of a part of the right one's,
// and of all of these.
const _: () = assert!(4 * PANEL == 256 && 4 * ROWS * TILE == 2048);
const _: () = assert!(4 * TILE * BLOCK.1 == 2048 && 4 * TILE * PANEL == 4096);

/// # Safety
///
/// As for [`super::panel`], on a processor with AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn panel(operands: Operands, size: (usize, usize), target: Target) {
    // SAFETY: the caller's promise.
    unsafe { group::panel(operands, size, target, BLOCK.0, add) }
}

/// See [`group::Add`].
#[target_feature(enable = "avx512f")]
fn add(group: &mut Group, blocks: usize, parts: usize) {
    debug_assert!((1..=ROWS / BLOCK.0).contains(&blocks) && (1..=PARTS).contains(&parts));
    let mut before = 0u32;
    // SAFETY: every address lies in the group, as its sizes say. What is set for the processor's arithmetic is set back.
    unsafe {
        std::arch::asm!(
            "stmxcsr dword ptr [{before}]",
            "ldmxcsr dword ptr [{flushing}]",
            // A part of the columns.
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
            "dec {parts:e}",
            "jnz 2b",
            "ldmxcsr dword ptr [{before}]",
            before = in(reg) &raw mut before,
            flushing = in(reg) &raw const FLUSHING,
            sums = inout(reg) group.sums.as_mut_ptr() => _,
            left = in(reg) group.left.as_ptr(),
            right = inout(reg) group.right.as_ptr() => _,
            blocks = in(reg) blocks,
            parts = inout(reg) parts => _,
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
