//! `node bench linear`: one encrypted product as an owner and a worker do it, on random rows and weights, without a
//! network.
//!
//! 1. quantise the weights as they are served, plan the precision;
//! 2. once, as at the beginning of a run: expand and multiply the masks, keep their product;
//! 3. as often as a second allows: rotate, encode and encrypt the rows, multiply the body, decrypt and un-rotate;
//! 4. multiply plain int8 rows on the same device, and look at what the rows became.

use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actors::matmul::exactness::bytes;
use actors::matmul::{HeldMatrix, Multiplicand, ProductTask, task_seconds, tile_columns};
use anyhow::Context as _;
use protocol::baseline::PaperScheme;
use protocol::baseline::Scheme as _;
use protocol::he::{
    MaskDomain, MaskProductBuilder, MaskSeed, ParameterSet, Plaintext, Planes, Precision, ProductTile, encrypt,
};
use protocol::ids::{Direction, Group, LinearId, LinearShape};
use protocol::model::synthetic::SyntheticLlama;
use protocol::quant::{LinearMeta, PrecisionTarget, ProductCodec, Step, plan, predicted_relative_error, serve};
use protocol::sketch::Checks;
use serde::Serialize;

use super::median;
use super::multiplier::{Device, Multiplier};

/// Time for the repetitions of each measurement.
const BUDGET: Duration = Duration::from_secs(1);
/// Fewest repetitions of a product that does not take many seconds.
const REPETITIONS: usize = 3;
/// Rows whose error is looked at: the exact product is computed for them alone.
const CHECKED_ROWS: usize = 16;
/// The product that is measured; any would do.
const WAY: Direction = Direction::Forward;
const LINEAR: LinearId = LinearId { layer: 0, group: Group::Qkv };
/// Masks are public, and the same in every run of the benchmark.
const SEED: MaskSeed = MaskSeed::from_bytes([7; 32]);

/// How a product is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameters {
    /// As the planner chooses.
    Auto,
    /// By this set; the planner chooses the bits.
    Set(ParameterSet),
    /// By the scheme of arXiv 2505.07329, which takes seconds for each token.
    Paper,
}

impl Parameters {
    /// Every name that [`FromStr`] takes.
    pub const NAMES: [&str; 5] = ["auto", "p24", "p32", "p48", "paper"];
}

/// A text that names no parameters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no parameters")]
pub struct UnknownParameters(String);

impl FromStr for Parameters {
    type Err = UnknownParameters;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "paper" => Ok(Self::Paper),
            _ => {
                let set = ParameterSet::ALL.into_iter().find(|set| set.name() == text);
                set.map(Self::Set).ok_or_else(|| UnknownParameters(text.to_owned()))
            }
        }
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct LinearOptions {
    /// Dimensions of the weights.
    pub shape: LinearShape,
    /// Rows of the product.
    pub tokens: usize,
    /// How it is encrypted.
    pub parameters: Parameters,
    /// Where it is computed.
    pub device: Device,
    /// Print JSON.
    pub json: bool,
}

/// What was measured. Seconds are medians.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinearFigures {
    device: String,
    /// The processor's kernel, or the GPU's engine.
    kernel: String,
    threads: usize,
    d_in: usize,
    d_out: usize,
    tokens: usize,
    /// `set/body:output` bits, or `paper`.
    precision: String,
    /// From f32 rows to planes.
    encrypt_s: f64,
    /// Both products of the worker together.
    multiply_s: f64,
    /// Once a run: expanding the masks and multiplying them.
    mask_multiply_s: f64,
    /// Once a run: what the owner makes of their product.
    mask_prepare_s: f64,
    /// Each call.
    body_multiply_s: f64,
    /// From tiles to f32 rows.
    decrypt_s: f64,
    /// The same kernel on as many rows of plain bytes.
    plain_int8_s: f64,
    /// The same kernel on plain rows, one for each byte of each row of mask and body.
    plain_int8_all_rows_s: f64,
    /// Integer operations per second of the first of these.
    plain_int8_ops: f64,
    /// Integer operations per second of the kernel's multiply instruction on registers alone.
    peak_ops: Option<f64>,
    bytes_up: usize,
    bytes_down: usize,
    /// Once a run.
    mask_bytes_down: usize,
    /// Against the product of the rows with the unquantised weights in f64; for `paper`, with the int8 weights.
    rel_error: f64,
    predicted_error: Option<f64>,
}

/// Measures and prints. Blocks.
///
/// # Errors
/// When there is no such device, or the sizes cannot be multiplied.
pub fn run(options: &LinearOptions) -> anyhow::Result<()> {
    let figures = measure(options, &Multiplier::open(options.device)?)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        figures.lines().iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// Measures a product on a device.
///
/// # Errors
/// When the sizes cannot be multiplied, or the device fails.
pub fn measure(options: &LinearOptions, multiplier: &Multiplier) -> anyhow::Result<LinearFigures> {
    let LinearOptions { shape, tokens, parameters, .. } = *options;
    let random = SyntheticLlama::tiny(1);
    let rows = random.tensor("rows", &[tokens, shape.d_in]);
    let weights = random.tensor("weights", &[shape.d_in, shape.d_out]);
    let sample = Sample::new(&rows, &weights, shape);
    let (matrix, meta) = serve(weights, shape)?;
    let held = multiplier.device.hold(shape, &matrix.values)?;
    let held = held.as_ref();
    let plain = Plain::measure(multiplier, held, tokens)?;
    let set = match parameters {
        Parameters::Paper => return measure_paper(options, multiplier, &rows, &matrix.values, &plain),
        Parameters::Auto => None,
        Parameters::Set(set) => Some(set),
    };
    let precision = plan(&meta, WAY, &PrecisionTarget { set, ..PrecisionTarget::default() });
    let [checks, _] = Checks::draw(&matrix.values, shape)?;
    let product = Encrypted { precision, weights: held, meta: &meta, checks: &checks, rows: &rows, tokens };
    let measured = product.measure()?;
    let set = precision.set;
    let all_rows = usize::from(precision.body_bits.div_ceil(8)) * tokens + set.limbs() * set.mask_rows();
    let error = sample.relative_error(&measured.out);
    Ok(LinearFigures {
        encrypt_s: measured.encrypt_s,
        multiply_s: measured.mask_multiply_s + measured.body_multiply_s,
        mask_multiply_s: measured.mask_multiply_s,
        mask_prepare_s: measured.mask_prepare_s,
        body_multiply_s: measured.body_multiply_s,
        decrypt_s: measured.decrypt_s,
        plain_int8_all_rows_s: Plain::measure(multiplier, held, all_rows)?.seconds,
        bytes_up: measured.bytes_up,
        bytes_down: measured.bytes_down,
        mask_bytes_down: measured.mask_bytes_down,
        predicted_error: Some(predicted_relative_error(precision, &meta, WAY, Step::Sketched)),
        ..LinearFigures::new(options, multiplier, precision.to_string(), &plain, error)
    })
}

/// The published scheme on the same rows, and on the int8 weights that are served.
fn measure_paper(
    options: &LinearOptions,
    multiplier: &Multiplier,
    rows: &[f32],
    weights: &[i8],
    plain: &Plain,
) -> anyhow::Result<LinearFigures> {
    let LinearOptions { shape, tokens, .. } = *options;
    let scheme = PaperScheme::new(weights, shape);
    let began = Instant::now();
    let (request, ticket) = scheme.encrypt(rows, tokens)?;
    let encrypted = began.elapsed();
    let answer = scheme.multiply(&request);
    let multiplied = began.elapsed();
    let out = scheme.decrypt(ticket, &answer)?;
    let decrypted = began.elapsed();
    let exact: Vec<f32> = weights.iter().map(|&weight| f32::from(weight)).collect();
    let error = Sample::new(rows, &exact, shape).relative_error(&out);
    let multiply_s = (multiplied - encrypted).as_secs_f64();
    Ok(LinearFigures {
        kernel: "tfhe".to_owned(),
        encrypt_s: encrypted.as_secs_f64(),
        multiply_s,
        body_multiply_s: multiply_s,
        decrypt_s: (decrypted - multiplied).as_secs_f64(),
        bytes_up: scheme.request_bytes(&request),
        bytes_down: scheme.answer_bytes(&answer),
        ..LinearFigures::new(options, multiplier, scheme.name(), plain, error)
    })
}

/// A product to be measured.
struct Encrypted<'a> {
    precision: Precision,
    weights: &'a dyn HeldMatrix,
    meta: &'a LinearMeta,
    checks: &'a Checks,
    rows: &'a [f32],
    tokens: usize,
}

/// Medians of its repetitions, and what came out of the last one.
struct Measured {
    mask_multiply_s: f64,
    mask_prepare_s: f64,
    encrypt_s: f64,
    body_multiply_s: f64,
    decrypt_s: f64,
    bytes_up: usize,
    bytes_down: usize,
    mask_bytes_down: usize,
    out: Vec<f32>,
}

impl Encrypted<'_> {
    fn measure(&self) -> anyhow::Result<Measured> {
        let Self { precision, weights, meta, rows, tokens, .. } = *self;
        let (inner, outer) = weights.shape().along(WAY);
        let domain = MaskDomain { set: precision.set, product: LINEAR.along(WAY) };
        let whole = Precision { mask_limbs: precision.set.limbs() as u8, ..precision };

        let (mut multiply, mut prepare, mut kept) = (Vec::new(), Vec::new(), None);
        repeat(|| {
            let began = Instant::now();
            let tiles = self.multiply_masks(domain)?;
            multiply.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            let mut masks = MaskProductBuilder::new(whole, outer)?;
            tiles.iter().try_for_each(|tile| masks.tile(tile))?;
            let verified = self.checks.masks.verify(masks.finish()?, &SEED, &domain, precision.mask_limbs)?;
            kept = Some((Arc::new(verified), bytes_of(&tiles)));
            prepare.push(began.elapsed().as_secs_f64());
            Ok(())
        })?;
        let (masks, mask_bytes_down) = kept.context("a product is measured at least once")?;

        let codec = ProductCodec::new(meta, WAY, precision)?;
        let (mut times, mut last) = ([const { Vec::new() }; 3], None);
        repeat(|| {
            let began = Instant::now();
            let (prepared, expected) = codec.prepare_expecting(rows, tokens, &self.checks.sketch, Step::Sketched)?;
            let plaintext = Plaintext { rows: &prepared.rows, tokens, features: inner, steps: &prepared.steps };
            let (body, ticket) = encrypt(&SEED, &domain, precision, plaintext)?;
            let encrypted = began.elapsed();
            let body = Arc::new(body);
            let tiles = self.multiply_body(&body)?;
            let multiplied = began.elapsed();
            let mut decryption = ticket.open(Arc::clone(&masks), precision, vec![0.0; tokens * outer])?;
            let down = bytes_of(&tiles);
            tiles.into_iter().try_for_each(|tile| decryption.tile(tile))?;
            let decode = codec.decoder(&prepared.scales);
            let verified = self.checks.sketch.verify(decryption.finish()?, &expected, decode)?.complete();
            let out = verified.ok().context("no row of these wraps more than once")?.into_values();
            let decrypted = began.elapsed();
            let seconds = [encrypted, multiplied - encrypted, decrypted - multiplied];
            times.iter_mut().zip(seconds).for_each(|(times, time)| times.push(time.as_secs_f64()));
            last = Some((out, body.bytes().len(), down));
            Ok(())
        })?;
        let (out, bytes_up, bytes_down) = last.context("a product is measured at least once")?;
        let [encrypt_s, body_multiply_s, decrypt_s] = times.map(|times| median(&times));
        Ok(Measured {
            mask_multiply_s: median(&multiply),
            mask_prepare_s: median(&prepare),
            encrypt_s,
            body_multiply_s,
            decrypt_s,
            bytes_up,
            bytes_down,
            mask_bytes_down,
            out,
        })
    }

    fn multiply_masks(&self, domain: MaskDomain) -> anyhow::Result<Vec<ProductTile>> {
        let set = self.precision.set;
        self.multiply(set.limbs(), set.modulus_bits(), Multiplicand::Masks { seed: SEED, domain, first_feature: 0 })
    }

    fn multiply_body(&self, body: &Arc<Planes>) -> anyhow::Result<Vec<ProductTile>> {
        self.multiply(body.limbs(), self.precision.output_bits.into(), Multiplicand::Body(Arc::clone(body)))
    }

    fn multiply(&self, limbs: usize, output_bits: u32, rows: Multiplicand) -> anyhow::Result<Vec<ProductTile>> {
        let (_, outer) = self.weights.shape().along(WAY);
        let tiles = Mutex::new(Vec::new());
        let task = ProductTask { direction: WAY, limbs, output_bits, rows };
        self.weights.multiply(&task, tile_columns(outer), &|tile| {
            tiles.lock().unwrap_or_else(PoisonError::into_inner).push(tile);
            ControlFlow::Continue(())
        })?;
        Ok(tiles.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Runs `once` to warm up and then as often as the budget allows, but at least some times; a run that by itself takes
/// the budget is not repeated.
fn repeat(mut once: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let began = Instant::now();
    once()?;
    if began.elapsed() > BUDGET * 2 {
        return Ok(());
    }
    let mut repetitions = 0;
    while repetitions < REPETITIONS || began.elapsed() < BUDGET {
        once()?;
        repetitions += 1;
    }
    Ok(())
}

fn bytes_of(tiles: &[ProductTile]) -> usize {
    tiles.iter().map(|tile| tile.rows.bytes().len()).sum()
}

/// The device on operands that nobody encrypted.
struct Plain {
    seconds: f64,
    ops: f64,
}

impl Plain {
    fn measure(multiplier: &Multiplier, weights: &dyn HeldMatrix, rows: usize) -> anyhow::Result<Self> {
        let (inner, outer) = weights.shape().along(WAY);
        let plain = Planes::from_bytes(1, rows, inner, bytes(rows * inner).collect());
        let plain = Multiplicand::Body(Arc::new(plain.context("one byte for each value")?));
        let task = ProductTask { direction: WAY, limbs: 1, output_bits: 8, rows: plain };
        let seconds = task_seconds(weights, &task, BUDGET)?;
        Ok(Self { seconds, ops: (rows * inner * outer * multiplier.operations) as f64 / seconds })
    }
}

/// Exact products of the first rows.
struct Sample {
    exact: Vec<f64>,
}

impl Sample {
    fn new(rows: &[f32], weights: &[f32], shape: LinearShape) -> Self {
        let mut exact = Vec::new();
        for row in rows.chunks_exact(shape.d_in).take(CHECKED_ROWS) {
            let mut sums = vec![0.0_f64; shape.d_out];
            for (&x, weights) in row.iter().zip(weights.chunks_exact(shape.d_out)) {
                sums.iter_mut().zip(weights).for_each(|(sum, &weight)| *sum += f64::from(x) * f64::from(weight));
            }
            exact.extend(sums);
        }
        Self { exact }
    }

    /// `‖out − exact‖ / ‖exact‖` over the sample.
    fn relative_error(&self, out: &[f32]) -> f64 {
        let pairs = self.exact.iter().zip(out);
        let (error, norm) = pairs.fold((0.0, 0.0), |(error, norm), (exact, &value)| {
            (error + (f64::from(value) - exact).powi(2), norm + exact.powi(2))
        });
        (error / norm).sqrt()
    }
}

impl LinearFigures {
    /// Figures of a product of which nothing but its setting, its error and the plain product is known.
    fn new(options: &LinearOptions, multiplier: &Multiplier, precision: String, plain: &Plain, rel_error: f64) -> Self {
        Self {
            device: multiplier.name.clone(),
            kernel: multiplier.kernel.clone(),
            threads: rayon::current_num_threads(),
            d_in: options.shape.d_in,
            d_out: options.shape.d_out,
            tokens: options.tokens,
            precision,
            encrypt_s: 0.0,
            multiply_s: 0.0,
            mask_multiply_s: 0.0,
            mask_prepare_s: 0.0,
            body_multiply_s: 0.0,
            decrypt_s: 0.0,
            plain_int8_s: plain.seconds,
            plain_int8_all_rows_s: plain.seconds,
            plain_int8_ops: plain.ops,
            peak_ops: multiplier.peak_ops,
            bytes_up: 0,
            bytes_down: 0,
            mask_bytes_down: 0,
            rel_error,
            predicted_error: None,
        }
    }

    fn lines(&self) -> Vec<String> {
        let Self { d_in, d_out, tokens, precision, device, kernel, threads, .. } = self;
        let ms = |seconds: f64| format!("{:.3} ms", 1e3 * seconds);
        let share = self.peak_ops.map_or_else(String::new, |peak| {
            format!(
                ", {:.0} % of the instruction's peak of {:.0} G op/s",
                100.0 * self.plain_int8_ops / peak,
                peak / 1e9
            )
        });
        let predicted = self.predicted_error.map_or_else(String::new, |e| format!(", predicted {:.2} %", 100.0 * e));
        vec![
            format!("{d_in} × {d_out}, {tokens} tokens, {precision}, {device}, {kernel}, {threads} threads"),
            format!("  encrypt           {}, {} bytes up", ms(self.encrypt_s), self.bytes_up),
            format!("  multiply          {}, {} bytes down", ms(self.body_multiply_s), self.bytes_down),
            format!("  decrypt           {}", ms(self.decrypt_s)),
            format!(
                "  masks, once       {} at the worker, {} at the owner, {} bytes down",
                ms(self.mask_multiply_s),
                ms(self.mask_prepare_s),
                self.mask_bytes_down
            ),
            format!("  plain int8        {}{share}", ms(self.plain_int8_s)),
            format!("  relative error    {:.2} %{predicted}", 100.0 * self.rel_error),
        ]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn options(parameters: Parameters) -> LinearOptions {
        let shape = LinearShape { d_in: 256, d_out: 96 };
        LinearOptions { shape, tokens: 40, parameters, device: Device::Cpu, json: true }
    }

    #[test]
    fn errors_are_as_predicted_and_bytes_as_planned() {
        for set in ParameterSet::ALL {
            let figures = measure(&options(Parameters::Set(set)), &Multiplier::cpu()).unwrap();
            let predicted = figures.predicted_error.unwrap();
            // Sixteen rows are few, and what the sketch tells of each is off by a factor of its own.
            let ratio = figures.rel_error / predicted;
            assert!((0.1..1.3).contains(&ratio), "{set}: {} {predicted}", figures.rel_error);
            let (up, down) = (8 * figures.bytes_up / (40 * 256), 8 * figures.bytes_down / (40 * 96));
            assert_eq!(
                figures.precision,
                format!("{set}/{up}:{down}"),
                "dimensions are whole groups of packed columns"
            );
            assert!(figures.mask_bytes_down.is_multiple_of(set.mask_rows() * 96));
            let seconds = [figures.encrypt_s, figures.body_multiply_s, figures.mask_multiply_s, figures.decrypt_s];
            assert!(seconds.iter().all(|&seconds| seconds > 0.0));
        }
    }

    #[test]
    fn names_are_read() {
        for name in Parameters::NAMES {
            assert!(name.parse::<Parameters>().is_ok(), "{name}");
        }
        assert!("p64".parse::<Parameters>().is_err());
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_that_names_it() {
        let gpu = LinearOptions { device: Device::Cuda(9_999), ..options(Parameters::Auto) };
        assert!(format!("{:#}", run(&gpu).unwrap_err()).contains("cuda:9999"));
    }
}
