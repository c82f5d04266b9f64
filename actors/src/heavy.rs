//! The bridge between actors, which must not block, and rayon, where heavy work goes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use tokio::sync::oneshot;

/// Values that an actor handles itself: at some nanoseconds for each it is done in less than the tenth of a millisecond that may go by until
/// another thread has taken work, done it, and woken whoever waits for it.
const FEW_VALUES: usize = 1 << 14;

/// The work panicked: a bug, reported to whoever waits instead of taking the process down.
#[derive(Debug, thiserror::Error)]
#[error("a computation panicked; this is a bug, please report it with the log")]
pub struct Panicked;

/// Runs `work` on the rayon pool and waits for its result without blocking the calling task.
///
/// # Errors
/// When `work` panics.
///
/// # Cancel safety
/// Dropping the future does not stop work that has begun; its result is dropped.
pub(crate) async fn on_rayon<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
    let (work, result) = answered(work);
    rayon::spawn(work);
    result.await.map_err(|_| Panicked)
}

/// Threads that give way to everybody else's: for work that others will want, or that fewer wait for. They are started when there is
/// some.
#[derive(Default)]
pub(crate) struct IdleThreads(OnceLock<Option<rayon::ThreadPool>>);

impl IdleThreads {
    /// [`on_rayon`], on these threads; there, where the system gives none.
    ///
    /// # Errors
    /// When `work` panics.
    ///
    /// # Cancel safety
    /// That of [`on_rayon`].
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Panicked> {
        let start = || {
            let threads = rayon::ThreadPoolBuilder::new().thread_name(|number| format!("idle {number}"));
            let threads = threads.start_handler(|_| give_way());
            threads.build().inspect_err(|error| tracing::warn!(%error, "no threads of low priority")).ok()
        };
        let (work, result) = answered(work);
        match self.0.get_or_init(start) {
            Some(threads) => threads.spawn(work),
            None => rayon::spawn(work),
        }
        result.await.map_err(|_| Panicked)
    }
}

/// Makes the calling thread one of low priority.
fn give_way() {
    /// As `nice` has it by default.
    #[cfg(target_os = "linux")]
    const NICE: libc::c_int = 10;
    // SAFETY: the call takes three integers and touches no memory of ours. On Linux it is about the calling thread where it is
    // given 0; elsewhere it would be about the process, so that it is not made.
    #[cfg(target_os = "linux")]
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        tracing::debug!("idle work is done at normal priority: the system does not lower it");
    }
}

/// Runs `work` where it is called, if it is on so few values that another thread would take longer to wake up, and else on the rayon pool.
///
/// # Errors
/// When `work` panics.
///
/// # Cancel safety
/// That of [`on_rayon`].
pub(crate) async fn by_size<T: Send + 'static>(
    values: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Panicked> {
    if values > FEW_VALUES {
        return on_rayon(work).await;
    }
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| Panicked)
}

/// Work that says what came of it, unless it panics.
fn answered<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> (impl FnOnce() + Send + 'static, oneshot::Receiver<T>) {
    let (sender, receiver) = oneshot::channel();
    let work = move || {
        if let Ok(result) = catch_unwind(AssertUnwindSafe(work)) {
            // The receiver is gone when nobody waits any more.
            let _ = sender.send(result);
        }
    };
    (work, receiver)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn returns_the_result_and_survives_a_panic() {
        assert_eq!(on_rayon(|| 6 * 7).await.ok(), Some(42));
        assert!(on_rayon(|| -> u8 { panic!("expected in this test") }).await.is_err());
        assert_eq!(on_rayon(|| "still alive").await.ok(), Some("still alive"));
        let idle = IdleThreads::default();
        let name = || std::thread::current().name().map(str::to_owned);
        assert!(idle.run(name).await.unwrap().is_some_and(|name| name.starts_with("idle ")));
        assert!(idle.run(|| -> u8 { panic!("expected in this test") }).await.is_err());
        assert_eq!(idle.run(|| "still alive").await.ok(), Some("still alive"));
        #[cfg(target_os = "linux")]
        {
            // SAFETY: it reads the calling thread's priority and touches no memory of ours.
            let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
            let [idle, usual] = [idle.run(nice).await.unwrap(), on_rayon(nice).await.unwrap()];
            assert!(idle > usual || usual >= 10, "{idle} and {usual}");
        }
        let here = std::thread::current().id();
        for (values, is_here) in [(1, true), (FEW_VALUES, true), (FEW_VALUES + 1, false)] {
            assert_eq!(by_size(values, move || std::thread::current().id() == here).await.ok(), Some(is_here));
            assert!(by_size(values, || -> u8 { panic!("expected in this test") }).await.is_err());
        }
    }
}
