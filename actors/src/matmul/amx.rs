//! The register block for AMX: tiles of sixteen lines.
//!
//! Stable Rust has no AMX intrinsics, so the instructions stand in inline assembly. The kernel of the operating system
//! gives a process the tile registers when it asks for them ([`Amx::detect`]); a task loads their shapes when it begins
//! and releases them when it ends ([`Micro::task`]), so that a thread which does not multiply has no tile state to
//! save.
//!
//! Exactness was shown in an emulated processor: Bochs 3.0's `sapphire_rapids` under Linux 6.12, after correcting its
//! `tdpbusd`, which took the signed bytes for unsigned, and letting it report that tile data can be switched off.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

use super::digits::Quads;
use super::lines::Line;
use super::micro::{Loops, Micro, checked_lines};
use super::vnni::{Vnni, with_avx512};
use super::weights::PANEL;

/// Rows of a tile.
const TILE_ROWS: usize = 16;

/// Thirty-two limb rows by thirty-two columns: four accumulators of 16 × 16 sums, of the eight tiles. A step is
/// sixty-four inner elements of one limb, four `tdpbusd` of unsigned limbs and signed weights for four loads.
pub(crate) struct Amx {
    /// For products of few rows, of which a tile would hold little else than nothing.
    vectors: Option<Vnni>,
}

/// Digits of rows that vectors multiply faster than a tile, whose time is that of sixteen rows: those of one row of four bytes.
const FEW_LANES: usize = 4;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct TileShapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileShapes {
    /// Eight tiles of sixteen lines.
    const WHOLE: Self = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut tile = 0;
        while tile < 8 {
            row_bytes[tile] = size_of::<Line>() as u16;
            rows[tile] = TILE_ROWS as u8;
            tile += 1;
        }
        Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };
}

impl Amx {
    /// The kernel, if this CPU can run it and the operating system lets this process use its tiles.
    pub(crate) fn detect() -> Option<Self> {
        let has_vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        (has_vectors && has_tiles() && may_use_tiles()).then(|| Self { vectors: Vnni::detect() })
    }
}

/// Whether the CPU has AMX with byte products, and the operating system saves its state.
fn has_tiles() -> bool {
    /// XSAVE enabled by the operating system (leaf 1, ECX).
    const OSXSAVE: u32 = 1 << 27;
    /// AMX-TILE and AMX-INT8 (leaf 7, EDX).
    const TILES: u32 = 1 << 24 | 1 << 25;
    /// Tile shapes and tile data among the states that are saved.
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    /// # Safety
    /// The operating system has enabled XSAVE.
    #[target_feature(enable = "xsave")]
    unsafe fn saved_states() -> u64 {
        // SAFETY: the instruction exists where XSAVE is enabled, and register 0 always does.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: every 64-bit x86 has the instruction; leaves are read only up to the highest that it reports, and the
    // saved states only where XSAVE is enabled.
    unsafe {
        __cpuid(0).eax >= 7
            && __cpuid(1).ecx & OSXSAVE != 0
            && __cpuid_count(7, 0).edx & TILES == TILES
            && saved_states() & TILE_STATE == TILE_STATE
    }
}

/// Asks the operating system for the tiles, for all threads of the process.
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two integers and touches no memory of ours; kernels that do not know it return an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// The tile state of this thread, released when dropped, also by a panic.
struct Tiles(());

impl Tiles {
    /// # Safety
    /// The CPU has AMX and the process may use it.
    unsafe fn load() -> Self {
        // SAFETY: AMX is there, as the caller promised; the operand is a valid description of 64 bytes. The compiler
        // keeps nothing in tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &TileShapes::WHOLE, options(nostack, readonly, preserves_flags)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there, or there would be no value to drop; the compiler keeps nothing in tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

impl Micro for Amx {
    type Encoding = Quads;
    const LANES: usize = 2 * TILE_ROWS;
    const COLUMNS: usize = PANEL;
    // 32 KiB of weights; the rows pass through the other third of a 48 KiB cache.
    const INNER_BLOCKS: usize = 16;

    fn prepare<'a>(&self, packed: &'a [Line], _half: usize, _scratch: &'a mut Vec<Line>) -> &'a [Line] {
        packed
    }

    fn multiply(&self, digits: &[Line], weights: &[Line], rows: usize, sums: &mut [Line]) {
        let lines = checked_lines::<Self>(digits, weights, sums);
        let (digits, weights, sums) = (digits.as_ptr(), weights.as_ptr(), sums.as_mut_ptr());
        // SAFETY: `self` exists only where AMX may be used; `checked_lines` has seen that the slices hold `lines` times
        // 32 and 32 lines, and 64 lines of sums. Outside of a task, where no shapes are loaded, the first instruction
        // would end the process and touch nothing.
        unsafe {
            match (lines, rows > TILE_ROWS) {
                (0, _) => std::slice::from_raw_parts_mut(sums, 2 * Self::LANES).fill(Line::ZERO),
                (_, true) => multiply_two(digits, weights, lines, sums),
                (_, false) => multiply_one(digits, weights, lines, sums),
            }
        }
    }

    fn few_lanes(&self) -> usize {
        if self.vectors.is_some() { FEW_LANES } else { 0 }
    }

    fn multiply_few(&self, digits: &[&[Line]], packed: &[Line], _half: usize, rows: usize, sums: &mut [Line]) {
        let Some(vectors) = &self.vectors else { panic!("vectors are there where few lanes are said to be") };
        vectors.few(Self::LANES, digits, packed, rows, sums);
    }

    fn vectorised<W: Loops>(&self, loops: W) -> W::Output {
        // SAFETY: `self` exists only where AVX-512F and BW were detected.
        unsafe { with_avx512(loops) }
    }

    fn task<W: Loops>(&self, loops: W) -> W::Output {
        // SAFETY: `self` exists only where AMX may be used. No work of a task is handed to other threads or waits for
        // them, so no other task runs on this thread before the tiles are released.
        let _tiles = unsafe { Tiles::load() };
        self.vectorised(loops)
    }

    fn register_loop(&self, passes: u64) -> Option<u64> {
        // SAFETY: `self` exists only where AMX may be used; the caller is a task.
        unsafe { register_loop(passes) };
        // Eight instructions on 16 × 16 × 64 limbs.
        Some(2 * 8 * 16 * 16 * 64 * passes)
    }
}

/// Both tiles of rows times both halves of a panel. The weights are in the first-level cache, where they stay while
/// rows pass; the next lines of rows are fetched from the second-level cache while a step multiplies.
///
/// # Safety
/// In a task of [`Amx`]; `lines > 0`; `digits` and `weights` may be read for `32·lines` lines, `sums` written for 64.
unsafe fn multiply_two(digits: *const Line, weights: *const Line, lines: usize, sums: *mut Line) {
    // SAFETY: each pass reads two tiles of sixteen lines, 2 KiB, of both operands, and there are `lines` of them; a
    // prefetch may point anywhere. The sums are sixteen rows of two lines, twice. All tiles that are used are named.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{weights} + {line}]",
            "tileloadd tmm4, [{digits} + {line}]",
            "prefetcht0 [{digits} + 4096]",
            "prefetcht0 [{digits} + 4160]",
            "prefetcht0 [{digits} + 4224]",
            "prefetcht0 [{digits} + 4288]",
            "prefetcht0 [{digits} + 4352]",
            "prefetcht0 [{digits} + 4416]",
            "prefetcht0 [{digits} + 4480]",
            "prefetcht0 [{digits} + 4544]",
            "tdpbusd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{weights} + {line} + 1024]",
            "prefetcht0 [{digits} + 4608]",
            "prefetcht0 [{digits} + 4672]",
            "prefetcht0 [{digits} + 4736]",
            "prefetcht0 [{digits} + 4800]",
            "prefetcht0 [{digits} + 4864]",
            "prefetcht0 [{digits} + 4928]",
            "prefetcht0 [{digits} + 4992]",
            "prefetcht0 [{digits} + 5056]",
            "tdpbusd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{digits} + {line} + 1024]",
            "prefetcht0 [{digits} + 5120]",
            "prefetcht0 [{digits} + 5184]",
            "prefetcht0 [{digits} + 5248]",
            "prefetcht0 [{digits} + 5312]",
            "prefetcht0 [{digits} + 5376]",
            "prefetcht0 [{digits} + 5440]",
            "prefetcht0 [{digits} + 5504]",
            "prefetcht0 [{digits} + 5568]",
            "tdpbusd tmm2, tmm5, tmm6",
            "prefetcht0 [{digits} + 5632]",
            "prefetcht0 [{digits} + 5696]",
            "prefetcht0 [{digits} + 5760]",
            "prefetcht0 [{digits} + 5824]",
            "prefetcht0 [{digits} + 5888]",
            "prefetcht0 [{digits} + 5952]",
            "prefetcht0 [{digits} + 6016]",
            "prefetcht0 [{digits} + 6080]",
            "tdpbusd tmm3, tmm5, tmm7",
            "add {digits}, 2048",
            "add {weights}, 2048",
            "dec {lines}",
            "jnz 2b",
            "tilestored [{sums} + {pair}], tmm0",
            "tilestored [{sums} + {pair} + 64], tmm1",
            "tilestored [{sums} + {pair} + 2048], tmm2",
            "tilestored [{sums} + {pair} + 2112], tmm3",
            digits = inout(reg) digits => _,
            weights = inout(reg) weights => _,
            lines = inout(reg) lines => _,
            sums = in(reg) sums,
            line = in(reg) size_of::<Line>(),
            pair = in(reg) 2 * size_of::<Line>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// [`multiply_two`] where the panel has no more than sixteen rows: the second tile of rows is left out.
///
/// # Safety
/// As [`multiply_two`]'s.
unsafe fn multiply_one(digits: *const Line, weights: *const Line, lines: usize, sums: *mut Line) {
    // SAFETY: as in `multiply_two`, of which this reads and writes a part.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{digits} + {line}]",
            "tileloadd tmm6, [{weights} + {line}]",
            "tdpbusd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{weights} + {line} + 1024]",
            "tdpbusd tmm1, tmm4, tmm7",
            "add {digits}, 2048",
            "add {weights}, 2048",
            "dec {lines}",
            "jnz 2b",
            "tilestored [{sums} + {pair}], tmm0",
            "tilestored [{sums} + {pair} + 64], tmm1",
            digits = inout(reg) digits => _,
            weights = inout(reg) weights => _,
            lines = inout(reg) lines => _,
            sums = in(reg) sums,
            line = in(reg) size_of::<Line>(),
            pair = in(reg) 2 * size_of::<Line>(),
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// # Safety
/// In a task of [`Amx`].
unsafe fn register_loop(passes: u64) {
    // SAFETY: shapes are loaded; the loop touches nothing but registers that it names, and ends since its counter
    // begins above zero.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbusd tmm0, tmm4, tmm6", "tdpbusd tmm1, tmm4, tmm7",
            "tdpbusd tmm2, tmm5, tmm6", "tdpbusd tmm3, tmm5, tmm7",
            "tdpbusd tmm0, tmm4, tmm6", "tdpbusd tmm1, tmm4, tmm7",
            "tdpbusd tmm2, tmm5, tmm6", "tdpbusd tmm3, tmm5, tmm7",
            "dec {passes}",
            "jnz 2b",
            passes = inout(reg) passes.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nomem, nostack),
        );
    }
}
