//! The steps of the rule with AVX2, for the rows of two tiles and the columns of a panel.

use super::group::{self, FLUSHING};
use super::{Operands, TILE, Target};
use crate::engine::ops::gemm::kernel::PANEL;

/// Rows of a group, one more than are used, and rows and columns of the innermost loop, whose sums stay in registers.
const ROWS: usize = (2 * TILE).next_multiple_of(BLOCK.0);
const BLOCK: (usize, usize) = (3, 16);
const PARTS: usize = PANEL / BLOCK.1;

type Group = group::Group<ROWS, { BLOCK.1 }, PARTS>;

// What `add` has as numbers: bytes of a row of sums, of the even terms of the left operand, of a part of the right one's,
// and of all of these.
const _: () = assert!(4 * PANEL == 256 && 4 * ROWS * TILE == 2112);
const _: () = assert!(4 * TILE * BLOCK.1 == 1024 && 4 * TILE * PANEL == 4096);

/// # Safety
///
/// As for [`super::panel`], on a processor with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn panel(operands: Operands, size: (usize, usize), target: Target) {
    // SAFETY: the caller's promise.
    unsafe { group::panel(operands, size, target, BLOCK.0, add) }
}

/// See [`group::Add`].
#[target_feature(enable = "avx2,fma")]
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
            // A block of rows. Registers 0 to 5 have its sums of the even terms, 6 to 11 those of the odd ones.
            "3:",
            "vxorps ymm0, ymm0, ymm0",
            "vxorps ymm1, ymm1, ymm1",
            "vxorps ymm2, ymm2, ymm2",
            "vxorps ymm3, ymm3, ymm3",
            "vxorps ymm4, ymm4, ymm4",
            "vxorps ymm5, ymm5, ymm5",
            "vxorps ymm6, ymm6, ymm6",
            "vxorps ymm7, ymm7, ymm7",
            "vxorps ymm8, ymm8, ymm8",
            "vxorps ymm9, ymm9, ymm9",
            "vxorps ymm10, ymm10, ymm10",
            "vxorps ymm11, ymm11, ymm11",
            "mov {term:e}, 16",
            // An even and an odd term.
            "4:",
            "vmovaps ymm12, ymmword ptr [{right}]",
            "vmovaps ymm13, ymmword ptr [{right} + 32]",
            "vbroadcastss ymm14, dword ptr [{l}]",
            "vfmadd231ps ymm0, ymm14, ymm12",
            "vfmadd231ps ymm1, ymm14, ymm13",
            "vbroadcastss ymm15, dword ptr [{l} + 64]",
            "vfmadd231ps ymm2, ymm15, ymm12",
            "vfmadd231ps ymm3, ymm15, ymm13",
            "vbroadcastss ymm14, dword ptr [{l} + 128]",
            "vfmadd231ps ymm4, ymm14, ymm12",
            "vfmadd231ps ymm5, ymm14, ymm13",
            "vmovaps ymm12, ymmword ptr [{right} + 4096]",
            "vmovaps ymm13, ymmword ptr [{right} + 4096 + 32]",
            "vbroadcastss ymm14, dword ptr [{l} + 2112]",
            "vfmadd231ps ymm6, ymm14, ymm12",
            "vfmadd231ps ymm7, ymm14, ymm13",
            "vbroadcastss ymm15, dword ptr [{l} + 2112 + 64]",
            "vfmadd231ps ymm8, ymm15, ymm12",
            "vfmadd231ps ymm9, ymm15, ymm13",
            "vbroadcastss ymm14, dword ptr [{l} + 2112 + 128]",
            "vfmadd231ps ymm10, ymm14, ymm12",
            "vfmadd231ps ymm11, ymm14, ymm13",
            "add {right}, 64",
            "add {l}, 4",
            "dec {term:e}",
            "jnz 4b",
            // Both, and then what there was.
            "vaddps ymm0, ymm0, ymm6",
            "vaddps ymm1, ymm1, ymm7",
            "vaddps ymm2, ymm2, ymm8",
            "vaddps ymm3, ymm3, ymm9",
            "vaddps ymm4, ymm4, ymm10",
            "vaddps ymm5, ymm5, ymm11",
            "vaddps ymm0, ymm0, ymmword ptr [{s}]",
            "vaddps ymm1, ymm1, ymmword ptr [{s} + 32]",
            "vaddps ymm2, ymm2, ymmword ptr [{s} + 256]",
            "vaddps ymm3, ymm3, ymmword ptr [{s} + 256 + 32]",
            "vaddps ymm4, ymm4, ymmword ptr [{s} + 512]",
            "vaddps ymm5, ymm5, ymmword ptr [{s} + 512 + 32]",
            "vmovaps ymmword ptr [{s}], ymm0",
            "vmovaps ymmword ptr [{s} + 32], ymm1",
            "vmovaps ymmword ptr [{s} + 256], ymm2",
            "vmovaps ymmword ptr [{s} + 256 + 32], ymm3",
            "vmovaps ymmword ptr [{s} + 512], ymm4",
            "vmovaps ymmword ptr [{s} + 512 + 32], ymm5",
            "sub {right}, 1024",
            "add {l}, 128",
            "add {s}, 768",
            "dec {row:e}",
            "jnz 3b",
            "add {right}, 1024",
            "add {sums}, 64",
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
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}
