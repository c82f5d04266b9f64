//! What all engines of a GPU share: context, streams, kernels, and the buffers of the product that is being computed.

use std::num::NonZero;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use cudarc::driver::{CudaContext, CudaStream};
use cudarc::nvrtc::Ptx;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::buffers::{Growing, Pinned, Uploader};
use super::compile::Nvrtc;
use super::engine::Compute;
use super::fault::Fault;
use super::launch::Functions;
use super::memory::{Limits, SLOTS};
use crate::matmul::DeviceError;

/// Most threads that copy for a GPU: as many keep the bus busy.
const COPYING_THREADS: usize = 8;

/// A GPU that is ready to compute.
pub(crate) struct Base {
    pub(crate) name: String,
    pub(crate) context: Arc<CudaContext>,
    /// Kernels.
    pub(crate) compute: Arc<CudaStream>,
    /// Copies to the device.
    pub(crate) up: Arc<CudaStream>,
    /// Copies from the device.
    pub(crate) down: Arc<CudaStream>,
    pub(crate) functions: Functions,
    pub(crate) multiprocessors: usize,
    pub(crate) limits: Limits,
    /// Threads that copy to and from page-locked memory. Not those of the current pool: a thread that waits for work of its
    /// pool takes up other work meanwhile, which may ask for the same buffers.
    pub(crate) pool: Arc<ThreadPool>,
    workspace: Mutex<Workspace>,
}

/// Buffers of the product that is being computed.
pub(crate) struct Workspace {
    pub(crate) uploader: Uploader,
    pub(crate) rows: Growing,
    pub(crate) sums: Growing,
    pub(crate) outputs: [Output; SLOTS],
}

/// An output on the device, and where it goes in the computer's memory.
#[derive(Default)]
pub(crate) struct Output {
    pub(crate) device: Growing,
    pub(crate) host: Pinned,
}

impl Base {
    /// Opens a context and streams on a GPU and loads its kernels.
    pub(crate) fn open(
        name: String,
        number: usize,
        capability: (u32, u32),
        nvrtc: &Nvrtc,
        cache: Option<&Path>,
    ) -> Result<Self, Fault> {
        let image = nvrtc.image(capability, cache).map_err(|error| Fault::Failed(error.to_string()))?;
        if !image.log.is_empty() {
            tracing::warn!(device = %name, log = %image.log, "the kernels' compiler says something");
        }
        let context = CudaContext::new(number)?;
        // cudarc copies PTX and cubins alike to the driver, which tells them apart.
        let functions = Functions::load(&context.load_module(Ptx::from_binary(image.bytes))?, capability)?;
        let stream = || context.new_stream();
        let (compute, up, down) = (stream()?, stream()?, stream()?);
        let multiprocessors = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let limits = Limits::new(context.total_mem()? as u64);
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(COPYING_THREADS);
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|number| format!("copies {number}"));
        let pool = Arc::new(pool.build().map_err(|error| Fault::Failed(error.to_string()))?);
        let workspace = Workspace {
            uploader: Uploader::new(Arc::clone(&pool)),
            rows: Growing::default(),
            sums: Growing::default(),
            outputs: std::array::from_fn(|_| Output::default()),
        };
        Ok(Self {
            name,
            compute,
            up,
            down,
            functions,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            limits,
            pool,
            workspace: Mutex::new(workspace),
            context,
        })
    }

    /// The buffers, for one user at a time; the context is bound to the calling thread.
    pub(crate) fn workspace(&self) -> Result<MutexGuard<'_, Workspace>, Fault> {
        // A panic has left buffers with any bytes, as every product does.
        let workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        self.context.bind_to_thread()?;
        Ok(workspace)
    }

    /// Frees the buffers of products on the device.
    pub(crate) fn release(&self) -> Result<(), Fault> {
        let mut workspace = self.workspace()?;
        let Workspace { rows, sums, outputs, .. } = &mut *workspace;
        (*rows, *sums) = (Growing::default(), Growing::default());
        outputs.iter_mut().for_each(|output| output.device = Growing::default());
        self.context.synchronize()?;
        Ok(())
    }

    /// Waits for all that was begun; an error if any of it went wrong.
    pub(crate) fn synchronize(&self) -> Result<(), Fault> {
        self.context.synchronize()?;
        Ok(())
    }

    /// What engines compute with.
    pub(crate) fn compute(&self) -> Compute<'_> {
        Compute { stream: &self.compute, functions: &self.functions }
    }

    /// Free memory and all memory, bytes.
    pub(crate) fn memory(&self) -> Result<(u64, u64), Fault> {
        let (free, total) = self.context.mem_get_info()?;
        Ok((free as u64, total as u64))
    }

    /// A fault with the device's name.
    pub(crate) fn error(&self, fault: Fault) -> DeviceError {
        let device = self.name.clone();
        match fault {
            Fault::OutOfMemory { needed } => {
                let free = self.memory().map_or(0, |(free, _)| free);
                DeviceError::OutOfMemory { device, needed, free }
            }
            Fault::Failed(what) => DeviceError::Failed { device, what },
        }
    }
}

/// Does some work on a thread that is none of a rayon pool's, on which it may wait for buffers: the calling one, if it is
/// none. A thread of a pool that waits for another pool takes up its own pool's work meanwhile, which may want the buffers.
pub(crate) fn off_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if rayon::current_thread_index().is_none() {
        return work();
    }
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_waits_is_done_off_the_pool() {
        assert!(off_pool(|| rayon::current_thread_index().is_none()));
        let pool = ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        assert!(pool.install(|| off_pool(|| rayon::current_thread_index().is_none())));
    }
}
