//! The bridge between actors, which must not block, and rayon, where heavy work goes.

use std::panic::{AssertUnwindSafe, catch_unwind};

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

/// [`on_rayon`], on a pool of its own.
///
/// # Errors
/// When `work` panics.
///
/// # Cancel safety
/// That of [`on_rayon`].
pub(crate) async fn on_pool<T: Send + 'static>(
    pool: &rayon::ThreadPool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Panicked> {
    let (work, result) = answered(work);
    pool.spawn(work);
    result.await.map_err(|_| Panicked)
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
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).thread_name(|_| "apart".into()).build().unwrap();
        let name = || std::thread::current().name().map(str::to_owned);
        assert_eq!(on_pool(&pool, name).await.ok(), Some(Some("apart".to_owned())));
        assert!(on_pool(&pool, || -> u8 { panic!("expected in this test") }).await.is_err());
        let here = std::thread::current().id();
        for (values, is_here) in [(1, true), (FEW_VALUES, true), (FEW_VALUES + 1, false)] {
            assert_eq!(by_size(values, move || std::thread::current().id() == here).await.ok(), Some(is_here));
            assert!(by_size(values, || -> u8 { panic!("expected in this test") }).await.is_err());
        }
    }
}
