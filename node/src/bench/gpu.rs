//! `node bench gpu`: the products of a model's layer on a GPU, encrypted, beside cuBLASLt's plain ones of the same shapes,
//! in one run.
//!
//! Times are the device's own, operands and results in its memory; the time with all copies is told beside them. Targets
//! (issue of record): encrypted at most three times plain bf16, and at least 60 % of the speed of the int8 products that
//! it consists of: `L` for each row of body and mask.

use std::sync::Arc;
use std::time::Duration;

use actors::matmul::cuda::CudaDevice;
use actors::matmul::cuda::measure::Plain;
use actors::matmul::cuda::memory::Sizes;
use actors::matmul::exactness::bytes;
use actors::matmul::{Device as _, Multiplicand, ProductTask, task_seconds};
use anyhow::bail;
use protocol::he::{ParameterSet, Planes, Precision};
use protocol::ids::{Direction, LinearShape};
use protocol::model::synthetic::{KnownModel, SyntheticLlama};
use protocol::quant::{LinearMeta, PrecisionTarget, plan, serve};
use serde::Serialize;

use super::floor::{Floor, name, products};
use super::multiplier::{Device, open_gpu};

/// Time for each measurement.
const BUDGET: Duration = Duration::from_millis(60);
/// The targets.
const MOST_OF_BF16: f64 = 3.0;
const LEAST_OF_INT8: f64 = 0.6;

/// What is measured.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// The GPU.
    pub device: Device,
    /// Whose products.
    pub model: KnownModel,
    /// Rows of the bodies.
    pub tokens: Vec<usize>,
    /// Print JSON.
    pub json: bool,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
struct Figures {
    device: String,
    engine: String,
    /// Integer operations per second of the tensor cores on registers alone.
    peak_ops: f64,
    /// Multiply-accumulates per second that a worker offers, copies included.
    offered_macs_per_second: f64,
    model: &'static str,
    products: Vec<ProductFigures>,
}

/// A body by another engine.
#[derive(Clone, Debug, Serialize)]
struct EngineFigure {
    engine: &'static str,
    body_s: f64,
}

/// One product, one way, in seconds.
#[derive(Clone, Debug, Serialize)]
struct ProductFigures {
    product: String,
    inner: usize,
    outer: usize,
    tokens: usize,
    /// `set/body:output` bytes.
    precision: String,
    /// The body, on the device.
    body_s: f64,
    /// The body by the engines that do not serve.
    other_engines: Vec<EngineFigure>,
    /// The body, from the computer's memory to tiles there.
    body_with_copies_s: f64,
    /// Once a run: the masks, expanded and multiplied.
    masks_s: f64,
    /// The least that the body can take.
    floor_s: f64,
    /// cuBLASLt, plain, the same rows.
    bf16_s: Option<f64>,
    int8_s: Option<f64>,
    /// `body_s / bf16_s`; with the masks' time, as if they were multiplied in each call.
    over_bf16: Option<f64>,
    with_masks_over_bf16: Option<f64>,
    /// The time of as many int8 products of cuBLASLt over `body_s`; over body and masks, `L·(1 + n/tokens)` of them.
    of_int8: Option<f64>,
    with_masks_of_int8: Option<f64>,
}

/// Measures and prints. Blocks.
///
/// # Errors
/// When there is no such GPU, or it cannot be used.
pub fn run(options: &GpuOptions) -> anyhow::Result<()> {
    let Device::Cuda(number) = options.device else {
        bail!("a GPU is measured: give --device cuda:0, or --floor for the arithmetic alone");
    };
    let figures = measure(options, &open_gpu(number)?)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        figures.lines().iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

fn measure(options: &GpuOptions, gpu: &CudaDevice) -> anyhow::Result<Figures> {
    let config = options.model.config();
    let mut rows = Vec::new();
    for (group, direction) in products() {
        let shape = config.shape(group);
        let (matrix, meta) = serve(SyntheticLlama::tiny(1).tensor("weights", &[shape.d_in, shape.d_out]), shape)?;
        let product =
            Product { gpu, name: name(group, direction), shape, direction, values: &matrix.values, meta: &meta };
        rows.extend(product.measure(&options.tokens)?);
    }
    Ok(Figures {
        device: gpu.name(),
        engine: gpu.engine().to_owned(),
        peak_ops: gpu.peak_ops()?,
        offered_macs_per_second: gpu.measure_speed()?,
        model: options.model.name(),
        products: rows,
    })
}

/// A product to be measured.
struct Product<'a> {
    gpu: &'a CudaDevice,
    name: String,
    shape: LinearShape,
    direction: Direction,
    values: &'a [i8],
    meta: &'a LinearMeta,
}

impl Product<'_> {
    fn measure(&self, tokens: &[usize]) -> anyhow::Result<Vec<ProductFigures>> {
        let &Self { gpu, shape, direction, values, .. } = self;
        let (inner, outer) = shape.along(direction);
        let matrix = gpu.held(shape, values)?;
        let others: Vec<CudaDevice> = gpu.others().into_iter().filter_map(Result::ok).collect();
        let mut figures = Vec::new();
        for &tokens in tokens {
            let plain = |numbers| gpu.plain_seconds(numbers, (tokens, inner, outer), BUDGET);
            let (bf16_s, int8_s) = (plain(Plain::Bf16)?, plain(Plain::Int8)?);
            for precision in self.precisions() {
                let Precision { set, body_bits, mask_limbs, output_bits } = precision;
                let [limbs, output_limbs] = [body_bits, output_bits].map(|bits| usize::from(bits.div_ceil(8)));
                let sizes = Sizes { rows: tokens, inner, outer, limbs, output_limbs };
                let body_s = gpu.product_seconds(&matrix, direction, sizes, BUDGET)?;
                let other_engines = others.iter().map(|other| {
                    let body_s = other.product_seconds(&matrix, direction, sizes, BUDGET)?;
                    anyhow::Ok(EngineFigure { engine: other.engine(), body_s })
                });
                let other_engines = other_engines.collect::<anyhow::Result<_>>()?;
                let masks_s = gpu.mask_seconds(&matrix, direction, (set, mask_limbs.into()), BUDGET)?;
                let mut body = Planes::zeros_of_bits(body_bits.into(), tokens, inner);
                let count = body.bytes().len();
                body.bytes_mut().iter_mut().zip(bytes(count)).for_each(|(to, byte)| *to = byte);
                let rows = Multiplicand::Body(Arc::new(body));
                let task = ProductTask { direction, limbs, output_bits: output_bits.into(), rows };
                let int8_products = limbs as f64;
                let mask_products = (set.limbs() * set.mask_rows()) as f64 / tokens as f64;
                figures.push(ProductFigures {
                    product: self.name.clone(),
                    inner,
                    outer,
                    tokens,
                    precision: precision.to_string(),
                    body_s,
                    other_engines,
                    body_with_copies_s: task_seconds(&matrix, &task, BUDGET)?,
                    masks_s,
                    floor_s: Floor::of(sizes).seconds,
                    bf16_s,
                    int8_s,
                    over_bf16: bf16_s.map(|bf16| body_s / bf16),
                    with_masks_over_bf16: bf16_s.map(|bf16| (body_s + masks_s) / bf16),
                    of_int8: int8_s.map(|int8| int8 * int8_products / body_s),
                    with_masks_of_int8: int8_s.map(|int8| int8 * (int8_products + mask_products) / (body_s + masks_s)),
                });
            }
        }
        Ok(figures)
    }

    /// What the planner says, and P24 if it says something else.
    fn precisions(&self) -> Vec<Precision> {
        let planned = |set| plan(self.meta, self.direction, &PrecisionTarget { set, ..PrecisionTarget::default() });
        let mut precisions = vec![planned(Some(ParameterSet::P24)), planned(None)];
        precisions.dedup();
        precisions
    }
}

impl Figures {
    /// A table in Markdown.
    fn lines(&self) -> Vec<String> {
        let Self { device, engine, peak_ops, offered_macs_per_second, model, products } = self;
        let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
        let some_ms = |seconds: Option<f64>| seconds.map_or_else(|| "–".to_owned(), ms);
        let others = |figures: &[EngineFigure]| {
            let figures = figures.iter().map(|EngineFigure { engine, body_s }| format!("{engine} {}", ms(*body_s)));
            figures.collect::<Vec<_>>().join(", ")
        };
        let factor = |factor: Option<f64>, good: fn(f64) -> bool| match factor {
            Some(factor) if good(factor) => format!("{factor:.2}"),
            Some(factor) => format!("{factor:.2} (missed)"),
            None => "–".to_owned(),
        };
        let mut lines = vec![
            format!("{device}, engine {engine}; tensor cores on registers: {:.2} P int8 op/s; offered with copies: {:.1} T MAC/s", peak_ops / 1e15, offered_macs_per_second / 1e12),
            String::new(),
            format!("{model}, milliseconds on the device. Targets: over bf16 at most {MOST_OF_BF16}, of int8 at least {LEAST_OF_INT8}; in brackets with the masks, which are multiplied once a run."),
            String::new(),
            "| product | inner → outer | tokens | precision | body | other engines | with copies | masks, once | floor | bf16 | int8 | over bf16 | of int8 |".to_owned(),
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|".to_owned(),
        ];
        lines.extend(products.iter().map(|row| {
            format!(
                "| {} | {} → {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} [{}] | {} [{}] |",
                row.product,
                row.inner,
                row.outer,
                row.tokens,
                row.precision,
                ms(row.body_s),
                others(&row.other_engines),
                ms(row.body_with_copies_s),
                ms(row.masks_s),
                ms(row.floor_s),
                some_ms(row.bf16_s),
                some_ms(row.int8_s),
                factor(row.over_bf16, |factor| factor <= MOST_OF_BF16),
                factor(row.with_masks_over_bf16, |factor| factor <= MOST_OF_BF16),
                factor(row.of_int8, |factor| factor >= LEAST_OF_INT8),
                factor(row.with_masks_of_int8, |factor| factor >= LEAST_OF_INT8),
            )
        }));
        lines
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_a_gpu_is_measured() {
        let options = |device| GpuOptions { device, model: KnownModel::Tiny, tokens: vec![8], json: true };
        assert!(run(&options(Device::Cpu)).unwrap_err().to_string().contains("--floor"));
        assert!(format!("{:#}", run(&options(Device::Cuda(9_999))).unwrap_err()).contains("cuda:9999"));
    }

    #[test]
    fn a_missed_target_is_marked() {
        let row = ProductFigures {
            product: "o".to_owned(),
            inner: 1,
            outer: 2,
            tokens: 3,
            precision: "p24/22:10".to_owned(),
            body_s: 1e-3,
            other_engines: Vec::new(),
            body_with_copies_s: 2e-3,
            masks_s: 3e-3,
            floor_s: 1e-4,
            bf16_s: Some(5e-4),
            int8_s: None,
            over_bf16: Some(2.0),
            with_masks_over_bf16: Some(8.0),
            of_int8: None,
            with_masks_of_int8: None,
        };
        let figures = Figures {
            device: "cuda:0 (Test 9000)".to_owned(),
            engine: "fused".to_owned(),
            peak_ops: 1e15,
            offered_macs_per_second: 1e12,
            model: "tiny",
            products: vec![row],
        };
        let last = figures.lines().pop().unwrap();
        assert!(last.contains("| 1.000 |  | 2.000 |") && last.contains("2.00 [8.00 (missed)] | – [–] |"), "{last}");
    }
}
