//! One product on a GPU, from the rows that came to the tiles that go.
//!
//! 1. The body is brought to whole bytes and goes up through page-locked buffers, row by row into rows of `pitch` bytes; masks are expanded on the device.
//! 2. The product is cut into pieces ([`super::memory`]), usually all rows and some tiles' columns.
//! 3. While a piece is computed, the one before it is copied back, and the processor puts tiles together from the one
//!    before that. The order of copies and kernels is that of the buffers' events ([`super::buffers`]).

use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};

use protocol::he::Planes;
use rayon::prelude::*;

use super::base::{Base, Output, Workspace};
use super::engine::Engine;
use super::fault::Fault;
use super::geometry::pitch;
use super::launch::{Job, MaskStream, Operand, Side};
use super::memory::{Piece, SLOTS, Sizes, parts};
use super::tiles::{Part, Tiles, tile_width};
use crate::matmul::{Multiplicand, ProductError, ProductTask, TileSink, are_possible};

/// Bytes of rows that a task copies into a page-locked buffer at least.
const TASK_BYTES: usize = 128 << 10;

/// Checks that the operands of a product fit each other.
pub(crate) fn sizes(task: &ProductTask, inner: usize, outer: usize) -> Result<Sizes, ProductError> {
    let &ProductTask { limbs, output_bits, ref rows, .. } = task;
    if !are_possible(limbs, output_bits) {
        return Err(ProductError::Bits { limbs, output_bits });
    }
    let rows = match rows {
        Multiplicand::Masks { domain, .. } => {
            let rows = domain.set.mask_rows();
            if domain.set.limbs() != limbs {
                let bytes = inner.saturating_mul(domain.column_bytes());
                return Err(ProductError::Masks { bytes, rows, limbs, inner });
            }
            rows
        }
        Multiplicand::Body(body) => {
            if body.limbs() != limbs || body.columns() != inner {
                let (body_bits, columns) = (body.bits(), body.columns());
                return Err(ProductError::Body { body_bits, columns, limbs, inner });
            }
            body.rows()
        }
    };
    Ok(Sizes { rows, inner, outer, limbs, output_limbs: output_bits.div_ceil(8) as usize })
}

/// A piece that is being computed or copied back.
struct Pending {
    slot: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    stride: usize,
    bytes: usize,
}

/// Multiplies, whatever the sizes, which [`sizes`] has checked.
pub(crate) fn multiply(
    base: &Base,
    engine: &dyn Engine,
    side: &Side,
    (task, sizes): (&ProductTask, Sizes),
    tile_columns: usize,
    sink: TileSink<'_>,
) -> Result<(), Fault> {
    let Sizes { rows, inner, outer, limbs, output_limbs } = sizes;
    let width = tile_width(outer, tile_columns);
    let mut tiles = Tiles::new(rows, outer, task.output_bits, width);
    if rows == 0 || inner == 0 || outer == 0 {
        let _ = tiles.zeros(sink);
        return Ok(());
    }
    let spread = match &task.rows {
        Multiplicand::Body(body) if !body.is_whole() => Some(base.pool.install(|| body.spread())),
        _ => None,
    };
    let may_be_cut = matches!(task.rows, Multiplicand::Body(_));
    let piece = Piece::of(sizes, width, engine.column_step(limbs), may_be_cut, base.limits);
    let buffers = piece.buffers(sizes);
    let mut workspace = base.workspace()?;
    let Workspace { uploader, rows: planes, sums, outputs } = &mut *workspace;
    let planes = planes.at_least(&base.compute, bytes(buffers.rows)?)?;
    let sums = sums.at_least(&base.compute, if engine.keeps_sums() { bytes(buffers.sums)? } else { 0 })?;
    let mut pending = VecDeque::with_capacity(SLOTS);
    let mut launches = 0;
    for rows in parts(rows, piece.rows) {
        let mut operand = Operand { planes: &mut *planes, limbs, rows: rows.len(), pitch: pitch(inner) };
        match &task.rows {
            Multiplicand::Body(body) => {
                let (body, row_bytes) = (spread.as_ref().unwrap_or(body), operand.pitch);
                uploader.copy(&base.up, operand.planes, limbs * rows.len(), row_bytes, |range, out| {
                    body_rows(body, &rows, range, out);
                })?;
            }
            Multiplicand::Masks { seed, domain, first_feature } => {
                let features = *first_feature..first_feature.saturating_add(inner);
                let stream = MaskStream::new(seed, domain, features);
                let stream = stream.ok_or_else(|| Fault::text("these masks lie past the end of their keystream"))?;
                base.functions.expand_masks(&base.compute, stream, inner, &mut operand)?;
            }
        }
        engine.prepare(base.compute(), &mut operand)?;
        for columns in parts(outer, piece.columns) {
            if pending.len() == SLOTS
                && let Some(oldest) = pending.pop_front()
                && give(base, outputs, &oldest, &mut tiles, sink)?.is_break()
            {
                return Ok(());
            }
            let slot = launches % SLOTS;
            launches += 1;
            let stride = engine.width(columns.len());
            let job = Job { side, columns: columns.clone(), output_bits: task.output_bits };
            let Output { device, host } = &mut outputs[slot];
            let bytes = output_limbs * rows.len() * stride;
            let out = device.at_least(&base.compute, bytes)?;
            host.reserve(&base.context, bytes)?;
            engine.product(base.compute(), &operand, &job, sums, out)?;
            host.download(bytes, &base.down, out)?;
            pending.push_back(Pending { slot, rows: rows.clone(), columns, stride, bytes });
        }
    }
    for oldest in pending {
        if give(base, outputs, &oldest, &mut tiles, sink)?.is_break() {
            return Ok(());
        }
    }
    Ok(())
}

/// Waits for a piece and gives the tiles away that it completes.
fn give(
    base: &Base,
    outputs: &mut [Output; SLOTS],
    piece: &Pending,
    tiles: &mut Tiles,
    sink: TileSink<'_>,
) -> Result<ControlFlow<()>, Fault> {
    let &Pending { slot, ref rows, ref columns, stride, bytes } = piece;
    let bytes = outputs[slot].host.bytes(bytes)?;
    let part = Part { rows: rows.clone(), columns: columns.clone(), stride, bytes };
    Ok(base.pool.install(|| tiles.write(&part, sink)))
}

/// Some rows of a body of whole bytes, counted through all limbs, each in `pitch` bytes, of which those behind it stay as they are.
fn body_rows(body: &Planes, rows: &Range<usize>, range: Range<usize>, out: &mut [u8]) {
    let inner = body.columns();
    let row_bytes = pitch(inner);
    out.par_chunks_exact_mut(row_bytes).zip(range).with_min_len(TASK_BYTES.div_ceil(row_bytes)).for_each(
        |(out, index)| {
            let (limb, row) = (index / rows.len(), rows.start + index % rows.len());
            out[..inner].copy_from_slice(&body.plane(limb)[row * inner..][..inner]);
        },
    );
}

fn bytes(count: u64) -> Result<usize, Fault> {
    usize::try_from(count).map_err(|_| Fault::text("a buffer larger than the address space"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use protocol::he::{MaskDomain, MaskSeed, ParameterSet};
    use protocol::ids::{Direction, Group, LinearId};

    use super::*;

    proptest! {
        #[test]
        fn rows_of_a_body_keep_their_order(
            limbs in 1usize..=6,
            tokens in 1usize..20,
            inner in 1usize..200,
            start in 0usize..20,
            count in 1usize..20,
            part in 1usize..30,
        ) {
            let bytes = (0..limbs * tokens * inner).map(|i| (i * 37 + i / 11) as u8).collect();
            let body = Planes::from_bytes(limbs, tokens, inner, bytes).expect("as many bytes");
            let rows = start.min(tokens - 1)..(start + count).min(tokens).max(start.min(tokens - 1) + 1);
            for range in parts(limbs * rows.len(), part) {
                let mut out = vec![0xee; range.len() * pitch(inner)];
                body_rows(&body, &rows, range.clone(), &mut out);
                for (index, out) in range.zip(out.chunks_exact(pitch(inner))) {
                    let (limb, row) = (index / rows.len(), rows.start + index % rows.len());
                    prop_assert_eq!(&out[..inner], &body.plane(limb)[row * inner..(row + 1) * inner]);
                }
            }
        }
    }

    #[test]
    fn operands_that_do_not_fit_are_refused_as_by_the_processor() {
        let task = |limbs, output_bits, rows| ProductTask { direction: Direction::Forward, limbs, output_bits, rows };
        let body = |limbs, columns| Multiplicand::Body(Arc::new(Planes::zeros(limbs, 2, columns)));
        let linear = LinearId { layer: 0, group: Group::O };
        let domain = MaskDomain { set: ParameterSet::P24, product: linear.along(Direction::Forward) };
        let masks = || Multiplicand::Masks { seed: MaskSeed::from_bytes([0; 32]), domain, first_feature: 0 };
        let fitting = Sizes { rows: 2, inner: 5, outer: 7, limbs: 3, output_limbs: 2 };
        assert_eq!(sizes(&task(3, 16, body(3, 5)), 5, 7), Ok(fitting));
        assert_eq!(sizes(&task(3, 24, masks()), 5, 7).map(|sizes| sizes.rows), Ok(1024));
        let packed = Multiplicand::Body(Arc::new(Planes::zeros_of_bits(22, 2, 5)));
        assert_eq!(sizes(&task(3, 10, packed), 5, 7), Ok(fitting), "they are brought to whole bytes");
        for (limbs, output_bits) in [(0, 0), (7, 8), (2, 24), (3, 0), (3, 6), (3, 11)] {
            let refused = sizes(&task(limbs, output_bits, body(limbs, 5)), 5, 7);
            assert_eq!(refused, Err(ProductError::Bits { limbs, output_bits }));
        }
        assert!(matches!(sizes(&task(3, 16, body(2, 5)), 5, 7), Err(ProductError::Body { .. })));
        assert!(matches!(sizes(&task(3, 16, body(3, 6)), 5, 7), Err(ProductError::Body { .. })));
        assert!(matches!(sizes(&task(4, 16, masks()), 5, 7), Err(ProductError::Masks { .. })));
    }
}
