//! The instruction itself.

use super::{Operands, TILE, Target};

pub fn available() -> bool {
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    // Older compilers call this unsafe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 has the instruction; an unknown leaf gives zeros.
    let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0).edx };
    features & BF16 != 0 && features & TILES != 0 && permitted()
}

/// Asks the system for the tile registers' state, which is large and only saved for those who ask.
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: a system call that touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// The layout of `LDTILECFG`: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    column_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    column_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
///
/// As for [`super::panel`], for 32 rows and columns, on a processor that [`available`] has said yes to.
pub unsafe fn square(Operands { groups, a, b }: Operands, Target { c, step, add }: Target) {
    let tile = TILE * TILE;
    // SAFETY: the caller vouches for the memory. The tile registers are configured, used and released here.
    unsafe {
        let below = c.add(TILE * step);
        std::arch::asm!(
            "ldtilecfg [{config}]",
            "test {add:e}, {add:e}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {step}]",
            "tileloadd tmm1, [{c} + {step} + 64]",
            "tileloadd tmm2, [{below} + {step}]",
            "tileloadd tmm3, [{below} + {step} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a} + {a_step}]",
            "tileloadd tmm6, [{b} + {b_step}]",
            "tileloadd tmm7, [{b} + {b_step} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a2} + {a_step}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 1024",
            "add {a2}, 1024",
            "add {b}, 4096",
            "dec {groups}",
            "jnz 3b",
            "tilestored [{c} + {step}], tmm0",
            "tilestored [{c} + {step} + 64], tmm1",
            "tilestored [{below} + {step}], tmm2",
            "tilestored [{below} + {step} + 64], tmm3",
            "tilerelease",
            config = in(reg) &raw const CONFIG,
            add = in(reg) u32::from(add),
            c = in(reg) c,
            below = in(reg) below,
            step = in(reg) step * 4,
            a = inout(reg) a => _,
            a2 = inout(reg) a.add(groups * tile) => _,
            a_step = in(reg) 64usize,
            b = inout(reg) b => _,
            b_step = in(reg) 256usize,
            groups = inout(reg) groups => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
