//! What the sketched step gains over the provable one, and how often rows wrap at it.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::ids::{Direction, Group};
use protocol::model::Model;
use protocol::quant::Step;
use protocol::quant::encoding::message_room;
use protocol::sketch::COLUMNS;
use rayon::prelude::*;

use crate::products::Product;
use crate::record::Rows;

/// Bounds that are tried, in root mean squares of a row's outputs.
const BOUNDS: [f64; 8] = [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0];

/// What was seen of some products.
#[derive(Clone, Default)]
struct Seen {
    rows: usize,
    /// Sum of the bits by which the finer step is finer than the provable one.
    bits: [f64; BOUNDS.len()],
    /// Rows that wrap once, and more often.
    once: [usize; BOUNDS.len()],
    several: [usize; BOUNDS.len()],
    /// Largest output over the root mean square, and largest and smallest estimate over the truth.
    peak: f64,
    over: f64,
    under: f64,
}

impl Seen {
    fn none() -> Self {
        Self { under: f64::INFINITY, ..Self::default() }
    }

    fn with(mut self, other: &Self) -> Self {
        self.rows += other.rows;
        for bound in 0..BOUNDS.len() {
            self.bits[bound] += other.bits[bound];
            self.once[bound] += other.once[bound];
            self.several[bound] += other.several[bound];
        }
        self.peak = self.peak.max(other.peak);
        self.over = self.over.max(other.over);
        self.under = self.under.min(other.under);
        self
    }
}

pub(crate) fn measure(model: &Arc<Model>, rows: &Rows) -> anyhow::Result<()> {
    let mut seen: BTreeMap<(Direction, Group), Seen> = BTreeMap::new();
    let mut worst: BTreeMap<(Direction, Group), (f64, u16)> = BTreeMap::new();
    for linear in model.config().linears() {
        for product in Product::of(model, linear)? {
            let Some((rows, tokens)) = rows.get(&product.id) else { continue };
            let of_product = look(&product, rows, *tokens)?;
            let key = (product.id.direction, linear.group);
            let bits = of_product.bits[3] / of_product.rows.max(1) as f64;
            let least = worst.entry(key).or_insert((f64::INFINITY, 0));
            if bits < least.0 {
                *least = (bits, linear.layer);
            }
            let sum = seen.remove(&key).unwrap_or_else(Seen::none).with(&of_product);
            seen.insert(key, sum);
        }
    }
    println!("bits that the step is finer than the provable one, on average (the least at B = 8 and in which layer);");
    println!("largest output over rms; estimate over truth");
    let header: Vec<String> = BOUNDS.iter().map(|bound| format!("B={bound}")).collect();
    println!("{:22} {:>62}   peak   estimate", "", header.join("    "));
    for ((direction, group), of_group) in &seen {
        let bits = of_group.bits.map(|bits| format!("{:6.2}", bits / of_group.rows as f64)).join(" ");
        let (least, layer) = worst[&(*direction, *group)];
        println!(
            "{:22} {bits}   {:5.2}   {:.2} to {:.2}   least {least:.2} in layer {layer}",
            format!("{direction:?} {group:?}"),
            of_group.peak,
            of_group.under,
            of_group.over
        );
    }
    let all = seen.values().fold(Seen::none(), |sum, seen| sum.with(seen));
    println!("of {} rows", all.rows);
    for (bound, ((once, several), bits)) in BOUNDS.iter().zip(all.once.iter().zip(all.several).zip(all.bits)) {
        println!(
            "  B = {bound:4}: {:8.4} % wrap once, {:8.4} % more often; {:.2} bits finer on average",
            100.0 * *once as f64 / all.rows as f64,
            100.0 * several as f64 / all.rows as f64,
            bits / all.rows as f64
        );
    }
    Ok(())
}

fn look(product: &Product, rows: &[f32], tokens: usize) -> anyhow::Result<Seen> {
    let (inner, outer) = product.dimensions();
    let (prepared, _) = product.codec.prepare_expecting(rows, tokens, &product.checks.sketch, Step::Provable)?;
    let room =
        message_room(product.codec.precision(Step::Provable), inner, product.meta.max_norm(product.id.direction));
    let half = f64::from(product.precision.set.modulus_bits() - 1).exp2();
    let mut expected = vec![[0.0; COLUMNS]; tokens];
    product.checks.sketch.expect(&prepared.rows, &mut expected);
    // The matrix as it is multiplied, so that rows of it are added up.
    let values = &product.matrix.values;
    let d_out = product.matrix.shape.d_out;
    let weight = |i: usize, j: usize| match product.id.direction {
        Direction::Forward => values[i * d_out + j],
        Direction::Backward => values[j * d_out + i],
    };
    let matrix: Vec<f32> =
        (0..inner).flat_map(|i| (0..outer).map(move |j| (i, j))).map(|(i, j)| weight(i, j).into()).collect();
    let of_row = |((row, &step), expected): ((&[f32], &f64), &[f64; COLUMNS])| {
        if step == 0.0 {
            return Seen::none();
        }
        let mut outputs = vec![0.0_f32; outer];
        for (&x, weights) in row.iter().zip(matrix.chunks_exact(outer)) {
            outputs.iter_mut().zip(weights).for_each(|(y, &w)| *y += x * w);
        }
        let rms = (outputs.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>() / outer as f64).sqrt();
        let estimate = product.checks.sketch.output_rms(expected);
        let peak = outputs.iter().fold(0.0_f32, |top, y| top.max(y.abs()));
        let mut seen = Seen {
            rows: 1,
            peak: f64::from(peak) / rms,
            over: estimate / rms,
            under: estimate / rms,
            ..Seen::default()
        };
        for (at, bound) in BOUNDS.iter().enumerate() {
            let finer = step.max(room / (bound * estimate));
            seen.bits[at] = (finer / step).log2();
            match outputs.iter().filter(|&&y| f64::from(y).abs() * finer >= half).count() {
                0 => {}
                1 => seen.once[at] = 1,
                _ => seen.several[at] = 1,
            }
        }
        seen
    };
    let rows = prepared.rows.par_chunks_exact(inner).zip(prepared.steps.par_iter()).zip(&expected);
    Ok(rows.map(of_row).reduce(Seen::none, |a, b| a.with(&b)))
}
