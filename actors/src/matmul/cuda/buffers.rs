//! Memory of the device that grows, page-locked memory of the computer, and the copies between them.
//!
//! All of it is kept from product to product: page-locking takes longer than a product. cudarc keeps two events with
//! each device buffer, its last reading and its last writing, and one with each page-locked buffer; whatever uses a
//! buffer on another stream waits for them. So copies and kernels on different streams need no other order than this
//! bookkeeping, which every function here keeps.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result::{memcpy_dtoh_async, memcpy_htod_async};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr as _, DevicePtrMut as _, DriverError, HostSlice as _, PinnedHostSlice,
};

use rayon::ThreadPool;

use super::fault::Fault;

/// Page-locked bytes of a slot of an [`Uploader`].
const UPLOAD_BYTES: usize = 8 << 20;
/// Its slots: while one is filled, another is copied.
const UPLOAD_SLOTS: usize = 3;

/// Device memory of which each byte has to be written before it is read.
pub(crate) fn allocate(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>, Fault> {
    // SAFETY: the memory is not initialised, but bytes of any value are bytes, and only kernels and copies read them.
    let allocate = || unsafe { stream.alloc::<u8>(bytes.max(1)) };
    let mut buffer = or_again(stream, allocate).map_err(|error| Fault::of_allocation(error, bytes))?;
    // Memory is there in the order of the stream. It counts as written now, so that other streams wait for that.
    let (_, written) = buffer.device_ptr_mut(stream);
    drop(written);
    Ok(buffer)
}

/// Device memory that is filled with zeros.
pub(crate) fn allocate_zeros(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>, Fault> {
    let allocate = || stream.alloc_zeros::<u8>(bytes.max(1));
    or_again(stream, allocate).map_err(|error| Fault::of_allocation(error, bytes))
}

/// Allocates; once more where there was no room, after the driver has taken back what was freed in any stream's order.
fn or_again<T>(stream: &CudaStream, allocate: impl Fn() -> Result<T, DriverError>) -> Result<T, DriverError> {
    match allocate() {
        Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
            stream.context().synchronize()?;
            allocate()
        }
        allocated => allocated,
    }
}

/// A device buffer that is as large as the largest that was asked for.
#[derive(Default)]
pub(crate) struct Growing(Option<CudaSlice<u8>>);

impl Growing {
    /// The buffer, with whatever is in it, of at least so many bytes.
    pub(crate) fn at_least(&mut self, stream: &Arc<CudaStream>, bytes: usize) -> Result<&mut CudaSlice<u8>, Fault> {
        if self.0.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
            // The old one goes first: there may be no room for both.
            self.0 = None;
            self.0 = Some(allocate(stream, bytes)?);
        }
        self.0.as_mut().ok_or_else(|| Fault::text("a buffer is gone"))
    }
}

/// A page-locked buffer of the computer's memory that is as large as the largest that was asked for.
#[derive(Default)]
pub(crate) struct Pinned(Option<PinnedHostSlice<u8>>);

impl Pinned {
    /// Makes it at least so large.
    pub(crate) fn reserve(&mut self, context: &Arc<CudaContext>, bytes: usize) -> Result<(), Fault> {
        if self.0.as_ref().is_none_or(|buffer| buffer.len() < bytes) {
            self.0 = None;
            // SAFETY: the memory is not initialised, but it is filled with zeros before anything reads it.
            let buffer = unsafe { context.alloc_pinned_with_flags::<u8>(bytes.max(1), 0) };
            let mut buffer = buffer.map_err(|error| {
                Fault::Failed(format!("{bytes} bytes of the computer's memory could not be page-locked: {error}"))
            })?;
            let start = buffer.as_mut_ptr()?;
            // SAFETY: the buffer is `len` bytes of memory that nothing else uses yet.
            unsafe { start.write_bytes(0, buffer.len()) };
            self.0 = Some(buffer);
        }
        Ok(())
    }

    fn buffer(&mut self, bytes: usize) -> Result<&mut PinnedHostSlice<u8>, Fault> {
        let buffer = self.0.as_mut().filter(|buffer| buffer.len() >= bytes);
        buffer.ok_or_else(|| Fault::text("a page-locked buffer is too small"))
    }

    /// The first bytes, when all copies from and to the buffer have ended.
    pub(crate) fn bytes(&mut self, bytes: usize) -> Result<&mut [u8], Fault> {
        Ok(&mut self.buffer(bytes)?.as_mut_slice()?[..bytes])
    }

    /// Begins to copy the first bytes to a place of a device buffer.
    fn upload(&mut self, bytes: usize, stream: &CudaStream, to: &mut CudaSlice<u8>, at: usize) -> Result<(), Fault> {
        let from = self.buffer(bytes)?;
        let end = at.checked_add(bytes).filter(|&end| end <= to.len());
        let end = end.ok_or_else(|| Fault::text("a device buffer is too small"))?;
        stream.context().bind_to_thread()?;
        let mut to = to.slice_mut(at..end);
        let (to, _written) = to.device_ptr_mut(stream);
        // SAFETY: the slice is used on this stream alone, before `_read` marks its use there.
        let (from, _read) = unsafe { from.stream_synced_slice(stream) };
        // SAFETY: `to` has room for the bytes and stream order makes it valid. Both buffers outlive the copy: their events
        // are recorded behind it when the guards are dropped, and freeing or touching them waits for these.
        unsafe { memcpy_htod_async(to, &from[..bytes], stream.cu_stream()) }?;
        Ok(())
    }

    /// Begins to copy the first bytes of a device buffer here.
    pub(crate) fn download(&mut self, bytes: usize, stream: &CudaStream, from: &CudaSlice<u8>) -> Result<(), Fault> {
        let to = self.buffer(bytes)?;
        if bytes > from.len() {
            return Err(Fault::text("a device buffer is too small"));
        }
        stream.context().bind_to_thread()?;
        let (from, _read) = from.device_ptr(stream);
        // SAFETY: the slice is used on this stream alone, before `_written` marks its use there.
        let (to, _written) = unsafe { to.stream_synced_mut_slice(stream) };
        // SAFETY: both have as many bytes, and stream order makes `from` valid. Both buffers outlive the copy, as above;
        // until it has ended, nothing reads `to`, since `bytes` waits for its event.
        unsafe { memcpy_dtoh_async(&mut to[..bytes], from, stream.cu_stream()) }?;
        Ok(())
    }
}

/// Copies rows to the device, filling one page-locked buffer while others are on their way.
pub(crate) struct Uploader {
    pool: Arc<ThreadPool>,
    slots: [Pinned; UPLOAD_SLOTS],
    next: usize,
}

impl Uploader {
    /// One whose buffers the threads of `pool` fill.
    pub(crate) fn new(pool: Arc<ThreadPool>) -> Self {
        Self { pool, slots: std::array::from_fn(|_| Pinned::default()), next: 0 }
    }

    /// Begins to fill the first `rows` rows of `row_bytes` bytes of a device buffer with what `fill` writes for a range
    /// of them. It is given what earlier uses left, and may leave what it does not need.
    pub(crate) fn copy(
        &mut self,
        stream: &Arc<CudaStream>,
        to: &mut CudaSlice<u8>,
        rows: usize,
        row_bytes: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<(), Fault> {
        for range in upload_parts(rows, row_bytes) {
            let slot = &mut self.slots[self.next];
            self.next = (self.next + 1) % UPLOAD_SLOTS;
            let bytes = range.len() * row_bytes;
            slot.reserve(stream.context(), UPLOAD_BYTES.max(bytes))?;
            let at = range.start * row_bytes;
            let buffer = slot.bytes(bytes)?;
            self.pool.install(|| fill(range, buffer));
            slot.upload(bytes, stream, to, at)?;
        }
        Ok(())
    }
}

/// The rows that go up at once.
fn upload_parts(rows: usize, row_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    super::memory::parts(rows, UPLOAD_BYTES / row_bytes.max(1))
}
