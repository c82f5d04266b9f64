//! The kernels as functions: their arguments in order, checked against the buffers that they are given.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg as _,
};
use protocol::he::{MaskDomain, MaskSeed};

use super::fault::Fault;
use super::geometry::{self, Launch};
use super::source::has_hopper_kernels;
use crate::matmul::MAX_LIMBS;

/// 64-byte blocks of a keystream.
const KEYSTREAM_BLOCKS: u64 = 1 << 32;

/// The rows of a product on the device, `[limb][row][pitch]`.
pub(crate) struct Operand<'a> {
    pub(crate) planes: &'a mut CudaSlice<u8>,
    pub(crate) limbs: usize,
    pub(crate) rows: usize,
    pub(crate) pitch: usize,
}

impl Operand<'_> {
    pub(crate) fn bytes(&self) -> usize {
        self.limbs * self.rows * self.pitch
    }
}

/// A matrix of one direction on the device: `[outer][pitch]` int8, filled up with rows of zeros, and the sum of each of
/// these rows.
pub(crate) struct Side {
    pub(crate) weights: CudaSlice<u8>,
    /// 32-bit integers.
    pub(crate) sums: CudaSlice<u8>,
    pub(crate) inner: usize,
    pub(crate) outer: usize,
}

impl Side {
    pub(crate) fn pitch(&self) -> usize {
        geometry::pitch(self.inner)
    }

    /// The weights from an output column on.
    pub(crate) fn weights_from(&self, column: usize) -> Result<CudaView<'_, u8>, Fault> {
        self.weights.try_slice(column * self.pitch()..).ok_or_else(|| Fault::text("there is no such column"))
    }

    fn sums_from(&self, column: usize) -> Result<CudaView<'_, u8>, Fault> {
        self.sums.try_slice(column * size_of::<i32>()..).ok_or_else(|| Fault::text("there is no such column"))
    }
}

/// Output columns that are computed at once.
#[derive(Clone)]
pub(crate) struct Job<'a> {
    pub(crate) side: &'a Side,
    /// Begin at a multiple of [`super::memory::WIDTH_STEP`].
    pub(crate) columns: Range<usize>,
    pub(crate) output_bits: u32,
}

impl Job<'_> {
    /// Bytes in which an output value has room.
    fn output_limbs(&self) -> usize {
        self.output_bits.div_ceil(8) as usize
    }
}

/// What a mask is expanded from, as the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MaskStream {
    key: [u32; 8],
    nonce: [u32; 3],
    first_feature: u32,
}

// SAFETY: the kernel's structure has the same twelve 32-bit words in the same order, and words of any value are valid.
unsafe impl DeviceRepr for MaskStream {}

impl MaskStream {
    /// The stream of some features; `None` past the end of the keystream.
    pub(crate) fn new(seed: &MaskSeed, domain: &MaskDomain, features: Range<usize>) -> Option<Self> {
        let blocks = (features.end as u64).checked_mul(domain.column_bytes() as u64 / 64)?;
        if blocks > KEYSTREAM_BLOCKS {
            return None;
        }
        let word = |bytes: &[u8], index: usize| {
            let bytes = bytes.iter().skip(4 * index).take(4);
            bytes.rev().fold(0, |word, &byte| (word << 8) | u32::from(byte))
        };
        let (seed, nonce) = (seed.to_bytes(), domain.nonce());
        Some(Self {
            key: std::array::from_fn(|index| word(&seed, index)),
            nonce: std::array::from_fn(|index| word(&nonce, index)),
            first_feature: u32::try_from(features.start).ok()?,
        })
    }
}

/// The kernels of a loaded module.
pub(crate) struct Functions {
    expand_masks: CudaFunction,
    product: [CudaFunction; MAX_LIMBS],
    hopper_product: Option<[CudaFunction; MAX_LIMBS]>,
    bias: CudaFunction,
    column_sums: CudaFunction,
    finish: [CudaFunction; MAX_LIMBS],
    register_loop: CudaFunction,
}

impl Functions {
    /// Looks the kernels up that a device of this compute capability has.
    pub(crate) fn load(module: &Arc<CudaModule>, capability: (u32, u32)) -> Result<Self, Fault> {
        let function = |name: &str| {
            let missing = |error| Fault::Failed(format!("the compiled kernels have no {name}: {error}"));
            module.load_function(name).map_err(missing)
        };
        let by_limbs = |name: &str| {
            let functions: Result<Vec<_>, _> =
                (1..=MAX_LIMBS).map(|limbs| function(&format!("{name}{limbs}"))).collect();
            functions?.try_into().map_err(|_| Fault::text("a kernel for each number of limbs"))
        };
        Ok(Self {
            expand_masks: function("velum_expand_masks")?,
            product: by_limbs("velum_product_l")?,
            // A compiler that is older than the device makes none.
            hopper_product: by_limbs("velum_hopper_product_l").ok().filter(|_| has_hopper_kernels(capability)),
            bias: function("velum_bias")?,
            column_sums: function("velum_column_sums")?,
            finish: by_limbs("velum_finish_l")?,
            register_loop: function("velum_register_loop")?,
        })
    }

    /// Expands masks into an operand.
    pub(crate) fn expand_masks(
        &self,
        stream: &CudaStream,
        masks: MaskStream,
        features: usize,
        operand: &mut Operand<'_>,
    ) -> Result<(), Fault> {
        let launch = geometry::expand_masks(features, operand.rows, operand.limbs);
        check(operand.bytes() <= operand.planes.len() && features <= operand.pitch)?;
        let [features, rows, limbs, pitch] = words([features, operand.rows, operand.limbs, operand.pitch])?;
        let mut call = stream.launch_builder(&self.expand_masks);
        call.arg(&mut *operand.planes).arg(&masks).arg(&features).arg(&rows).arg(&limbs).arg(&pitch);
        // SAFETY: the arguments are the kernel's (planes, stream, features, rows, limbs, pitch); it writes `features` bytes
        // of each of `limbs · rows` rows of `pitch` bytes, for which there is room.
        unsafe { start(&mut call, &self.expand_masks, launch) }
    }

    /// Whether the device has [`Self::hopper_product`].
    pub(crate) fn has_hopper(&self) -> bool {
        self.hopper_product.is_some()
    }

    /// Multiplies, recombines and rounds: `out` becomes `[output limb][row][column]`.
    pub(crate) fn product(
        &self,
        stream: &CudaStream,
        operand: &Operand<'_>,
        job: &Job<'_>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault> {
        let launch = geometry::product(operand.limbs, operand.rows, job.columns.len());
        fused(stream, (&self.product, launch), operand, job, out)
    }

    /// As [`Self::product`], by the instructions of compute capability 9.0.
    pub(crate) fn hopper_product(
        &self,
        stream: &CudaStream,
        operand: &Operand<'_>,
        job: &Job<'_>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault> {
        let functions = self.hopper_product.as_ref().ok_or_else(|| Fault::text("it is no GPU of Hopper"))?;
        let launch = geometry::hopper_product(operand.limbs, operand.rows, job.columns.len());
        fused(stream, (functions, launch), operand, job, out)
    }

    /// Turns bytes 0 to 255 into signed ones 128 less.
    pub(crate) fn bias(&self, stream: &CudaStream, operand: &mut Operand<'_>) -> Result<(), Fault> {
        let vectors = operand.bytes() as u64 / 16;
        let launch = geometry::bias(vectors);
        check(operand.bytes() <= operand.planes.len() && operand.pitch.is_multiple_of(16))?;
        let mut call = stream.launch_builder(&self.bias);
        call.arg(&mut *operand.planes).arg(&vectors);
        // SAFETY: the arguments are the kernel's (planes, vectors), and the buffer has so many 16-byte vectors.
        unsafe { start(&mut call, &self.bias, launch) }
    }

    /// Sums the weights of each column, padding included.
    pub(crate) fn column_sums(&self, stream: &CudaStream, side: &mut Side) -> Result<(), Fault> {
        let columns = geometry::padded_outer(side.outer);
        let launch = geometry::column_sums(columns);
        check(columns * side.pitch() <= side.weights.len() && columns * size_of::<i32>() <= side.sums.len())?;
        let [pitch, columns] = words([side.pitch(), columns])?;
        let mut call = stream.launch_builder(&self.column_sums);
        call.arg(&side.weights).arg(&pitch).arg(&columns).arg(&mut side.sums);
        // SAFETY: the arguments are the kernel's (weights, pitch, columns, sums); it reads `columns · pitch` bytes and
        // writes as many 32-bit integers as there are columns.
        unsafe { start(&mut call, &self.column_sums, launch) }
    }

    /// Recombines and rounds sums of biased bytes, `[limb][row][width]`: `out` becomes `[output limb][row][width]`.
    pub(crate) fn finish(
        &self,
        stream: &CudaStream,
        operand: &Operand<'_>,
        job: &Job<'_>,
        products: &CudaSlice<u8>,
        out: &mut CudaSlice<u8>,
    ) -> Result<(), Fault> {
        let Job { side, columns, output_bits } = job;
        let function = kernel_of(&self.finish, operand.limbs)?;
        let launch = geometry::finish(operand.rows, columns.len());
        let cells = operand.rows * columns.len();
        check(
            size_of::<i32>() * operand.limbs * cells <= products.len()
                && columns.end <= geometry::padded_outer(side.outer),
        )?;
        check(
            *output_bits >= 8 && *output_bits <= 8 * operand.limbs as u32 && job.output_limbs() * cells <= out.len(),
        )?;
        let sums = side.sums_from(columns.start)?;
        let [rows, width] = words([operand.rows, columns.len()])?;
        let mut call = stream.launch_builder(function);
        call.arg(products).arg(&sums).arg(&rows).arg(&width).arg(out).arg(output_bits);
        // SAFETY: the arguments are the kernel's (products, column_sums, row_count, columns, out, output_bits), and each
        // buffer has the elements that it reads and writes.
        unsafe { start(&mut call, function, launch) }
    }

    /// Multiplies registers by registers; gives the number of operations.
    pub(crate) fn register_loop(
        &self,
        stream: &CudaStream,
        multiprocessors: usize,
        passes: u32,
        out: &mut CudaSlice<u8>,
    ) -> Result<u64, Fault> {
        let (launch, operations) = geometry::register_loop(multiprocessors);
        check(size_of::<i32>() <= out.len())?;
        let mut call = stream.launch_builder(&self.register_loop);
        call.arg(out).arg(&passes);
        // SAFETY: the arguments are the kernel's (out, passes); all threads add to one 32-bit integer.
        unsafe { start(&mut call, &self.register_loop, launch) }?;
        Ok(operations * u64::from(passes))
    }
}

/// Starts one of the fused products, which have the same arguments.
fn fused(
    stream: &CudaStream,
    (functions, launch): (&[CudaFunction; MAX_LIMBS], Launch),
    operand: &Operand<'_>,
    job: &Job<'_>,
    out: &mut CudaSlice<u8>,
) -> Result<(), Fault> {
    let Job { side, columns, output_bits } = job;
    let function = kernel_of(functions, operand.limbs)?;
    check(operand.bytes() <= operand.planes.len() && operand.pitch == side.pitch() && columns.end <= side.outer)?;
    check(*output_bits >= 8 && *output_bits <= 8 * operand.limbs as u32)?;
    check(job.output_limbs() * operand.rows * columns.len() <= out.len())?;
    let most = geometry::MAX_OPERAND_BYTES;
    check(operand.bytes() as u64 <= most && (columns.len() * operand.pitch) as u64 <= most)?;
    let weights = side.weights_from(columns.start)?;
    let [rows, pitch, width] = words([operand.rows, operand.pitch, columns.len()])?;
    let mut call = stream.launch_builder(function);
    call.arg(&*operand.planes).arg(&rows).arg(&pitch).arg(&weights).arg(&width).arg(out).arg(output_bits);
    // SAFETY: the arguments are the kernel's (rows, row_count, pitch, weights, columns, out, output_bits). It reads `limbs ·
    // row_count` rows and `columns` rows of weights of `pitch` bytes, and writes `output limbs · row_count · columns` bytes:
    // each buffer was just found large enough.
    unsafe { start(&mut call, function, launch) }
}

/// Starts a kernel.
///
/// # Safety
/// The arguments must be the kernel's, in its order, and every buffer as large as it takes it to be.
unsafe fn start(call: &mut LaunchArgs<'_>, function: &CudaFunction, launch: Launch) -> Result<(), Fault> {
    if launch.is_empty() {
        return Ok(());
    }
    if !launch.is_within_limits() {
        return Err(Fault::text("a product too large for a launch"));
    }
    let Launch { grid, block, shared_bytes } = launch;
    if shared_bytes > geometry::DEFAULT_SHARED_BYTES {
        let bytes = i32::try_from(shared_bytes).map_err(|_| Fault::text("no block has so much shared memory"))?;
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)?;
    }
    let config = LaunchConfig { grid_dim: grid.into(), block_dim: block.into(), shared_mem_bytes: shared_bytes };
    // SAFETY: as the caller promises.
    unsafe { call.launch(config) }?;
    Ok(())
}

fn kernel_of(functions: &[CudaFunction; MAX_LIMBS], limbs: usize) -> Result<&CudaFunction, Fault> {
    limbs
        .checked_sub(1)
        .and_then(|index| functions.get(index))
        .ok_or_else(|| Fault::text("no kernel has so many limbs"))
}

/// Sizes as kernels take them.
fn words<const N: usize>(sizes: [usize; N]) -> Result<[u32; N], Fault> {
    let mut words = [0; N];
    for (word, size) in words.iter_mut().zip(sizes) {
        *word = u32::try_from(size).map_err(|_| Fault::text("a size that no kernel takes"))?;
    }
    Ok(words)
}

fn check(fits: bool) -> Result<(), Fault> {
    if fits { Ok(()) } else { Err(Fault::text("a kernel's buffers are too small; this is a bug")) }
}

#[cfg(test)]
mod tests {
    use protocol::he::ParameterSet;
    use protocol::ids::{Direction, Group, LinearId};

    use super::*;

    #[test]
    fn a_mask_stream_has_the_words_of_seed_and_nonce() {
        let seed = MaskSeed::from_bytes(std::array::from_fn(|i| i as u8));
        let linear = LinearId { layer: 0x0102, group: Group::GateUp };
        let domain = MaskDomain { set: ParameterSet::P32, product: linear.along(Direction::Backward) };
        let stream = MaskStream::new(&seed, &domain, 7..9).expect("within the keystream");
        assert_eq!(stream.key[0], 0x0302_0100);
        assert_eq!(stream.key[7], 0x1f1e_1d1c);
        assert_eq!(stream.nonce, [0x0002_0101, 0x0000_0102, 0]);
        assert_eq!(stream.first_feature, 7);
        assert_eq!(size_of::<MaskStream>(), 48);
    }

    #[test]
    fn a_keystream_has_an_end() {
        let seed = MaskSeed::from_bytes([0; 32]);
        let linear = LinearId { layer: 0, group: Group::Qkv };
        let domain = MaskDomain { set: ParameterSet::P24, product: linear.along(Direction::Forward) };
        let features = (1_usize << 38) / domain.column_bytes();
        assert!(MaskStream::new(&seed, &domain, 0..features).is_some());
        assert!(MaskStream::new(&seed, &domain, 0..features + 1).is_none());
        assert!(MaskStream::new(&seed, &domain, 0..usize::MAX).is_none());
    }
}
