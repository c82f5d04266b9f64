//! The least time that a product can take on a GPU, by arithmetic: its operations at the rate of the tensor cores, and
//! the bytes that have to come from memory and go there, each once. No GPU is asked.

use actors::matmul::cuda::memory::Sizes;
use protocol::he::ParameterSet;
use protocol::ids::{Direction, Group};
use protocol::model::synthetic::KnownModel;
use serde::Serialize;

/// Int8 operations a second that a dense product reaches on an H100; its data sheet has a third more.
pub const OPERATIONS_PER_SECOND: f64 = 1.5e15;
/// Bytes a second of its memory.
pub const BYTES_PER_SECOND: f64 = 3e12;

/// Bytes of a body's value, and of an output's, that are planned most often.
const BODY: (usize, usize) = (3, 2);
/// Parameter sets, and the bytes of a mask product's value.
const MASKS: [(ParameterSet, usize); 2] = [(ParameterSet::P24, 3), (ParameterSet::P32, 3)];

/// The floor of a product.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// Integer operations.
    pub operations: f64,
    /// Bytes of rows, weights and output.
    pub bytes: f64,
    /// Whichever takes longer.
    pub seconds: f64,
}

impl Floor {
    /// Of a product of these sizes.
    pub fn of(sizes: Sizes) -> Self {
        let Sizes { rows, inner, outer, limbs, output_limbs } = sizes;
        let [rows, inner, outer, limbs, output_limbs] =
            [rows, inner, outer, limbs, output_limbs].map(|size| size as f64);
        let operations = 2.0 * limbs * rows * inner * outer;
        let bytes = limbs * rows * inner + inner * outer + output_limbs * rows * outer;
        Self { operations, bytes, seconds: (operations / OPERATIONS_PER_SECOND).max(bytes / BYTES_PER_SECOND) }
    }
}

/// A product's name in a table.
pub fn name(group: Group, direction: Direction) -> String {
    let group = match group {
        Group::Qkv => "qkv",
        Group::O => "o",
        Group::GateUp => "gate_up",
        Group::Down => "down",
        Group::Head => "head",
    };
    match direction {
        Direction::Forward => group.to_owned(),
        Direction::Backward => format!("{group}, backward"),
    }
}

/// The products of a layer, both ways.
pub fn products() -> impl Iterator<Item = (Group, Direction)> {
    Group::ALL.into_iter().flat_map(|group| [(group, Direction::Forward), (group, Direction::Backward)])
}

/// The floor of a product of a model, as it is printed.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct FloorRow {
    product: String,
    inner: usize,
    outer: usize,
    /// Tokens of a body, or the set of a mask.
    rows: String,
    limbs: usize,
    output_limbs: usize,
    #[serde(flatten)]
    floor: Floor,
}

fn rows(model: KnownModel, tokens: &[usize]) -> Vec<FloorRow> {
    let bodies = tokens.iter().map(|&tokens| (format!("{tokens} tokens"), tokens, BODY));
    let masks = MASKS.map(|(set, output)| (format!("{set} masks"), set.mask_rows(), (set.limbs(), output)));
    let operands: Vec<_> = bodies.chain(masks).collect();
    let row = |(group, direction)| {
        let (inner, outer) = model.config().shape(group).along(direction);
        let of = move |(rows, count, (limbs, output_limbs)): &(String, usize, (usize, usize))| {
            let (limbs, output_limbs) = (*limbs, *output_limbs);
            let sizes = Sizes { rows: *count, inner, outer, limbs, output_limbs };
            let product = name(group, direction);
            FloorRow { product, inner, outer, rows: rows.clone(), limbs, output_limbs, floor: Floor::of(sizes) }
        };
        operands.iter().map(of).collect::<Vec<_>>()
    };
    products().flat_map(row).collect()
}

/// Prints the floor of each product of a layer: a table, or JSON.
///
/// # Errors
/// When the figures cannot be put into JSON.
pub fn run(model: KnownModel, tokens: &[usize], json: bool) -> anyhow::Result<()> {
    let rows = rows(model, tokens);
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let (operations, bytes) = (OPERATIONS_PER_SECOND / 1e15, BYTES_PER_SECOND / 1e12);
    println!("{}: the floor at {operations} P int8 op/s and {bytes} TB/s\n", model.name());
    println!("| product | inner → outer | rows | bytes in:out | G op | MB | ms |");
    println!("|---|---|---|---|---|---|---|");
    for FloorRow { product, inner, outer, rows, limbs, output_limbs, floor } in rows {
        let Floor { operations, bytes, seconds } = floor;
        let (operations, bytes, ms) = (operations / 1e9, bytes / 1e6, 1e3 * seconds);
        println!(
            "| {product} | {inner} → {outer} | {rows} | {limbs}:{output_limbs} | {operations:.1} | {bytes:.1} | {ms:.4} |"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_what_the_hand_calculates() {
        let sizes = Sizes { rows: 2048, inner: 2048, outer: 16384, limbs: 3, output_limbs: 2 };
        let floor = Floor::of(sizes);
        assert_eq!(floor.operations, 412_316_860_416.0);
        assert_eq!(floor.bytes, 12_582_912.0 + 33_554_432.0 + 67_108_864.0);
        assert!((floor.seconds - 0.000_274_877_9).abs() < 1e-9, "{}", floor.seconds);
        // One row: the weights have to come from memory.
        let row = Floor::of(Sizes { rows: 1, ..sizes });
        assert!((row.seconds - row.bytes / 3e12).abs() < 1e-15 && row.seconds > 1e-5);
    }

    #[test]
    fn a_layer_has_eight_products() {
        let rows = rows(KnownModel::Llama32_1b, &[2048, 4096]);
        assert_eq!(rows.len(), 8 * 4);
        assert_eq!((rows[0].product.as_str(), rows[0].inner, rows[0].outer), ("qkv", 2048, 3072));
        let last = &rows[31];
        assert_eq!((last.product.as_str(), last.inner, last.outer), ("down, backward", 2048, 8192));
        assert_eq!((last.rows.as_str(), last.limbs), ("p32 masks", 4));
    }
}
