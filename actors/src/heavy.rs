//! The bridge between actors, which must not block, and rayon, where heavy work goes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::sync::oneshot;

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
    let (sender, receiver) = oneshot::channel();
    rayon::spawn(move || {
        if let Ok(result) = catch_unwind(AssertUnwindSafe(work)) {
            // The receiver is gone when nobody waits any more.
            let _ = sender.send(result);
        }
    });
    receiver.await.map_err(|_| Panicked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn returns_the_result_and_survives_a_panic() {
        assert_eq!(on_rayon(|| 6 * 7).await.ok(), Some(42));
        assert!(on_rayon(|| -> u8 { panic!("expected in this test") }).await.is_err());
        assert_eq!(on_rayon(|| "still alive").await.ok(), Some("still alive"));
    }
}
