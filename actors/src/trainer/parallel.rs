//! A few micro-batches at a time, each on a thread of its own, since base products block the thread that asks.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Runs `work` on `0 .. count`, at most `threads` at once; results are in order. After an error nothing new begins,
/// and the first one that happened is returned.
pub(super) fn in_flight<T: Send, E: Send + From<std::io::Error>>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let first_error = Mutex::new(None);
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    let run = || {
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(place) = results.get(index) else { break };
            match work(index) {
                Ok(result) => *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(result),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
    };
    thread::scope(|scope| {
        for n in 0..threads.min(count) {
            let thread = thread::Builder::new().name(format!("micro-batch-{n}"));
            if let Err(error) = thread.spawn_scoped(scope, run) {
                failed.store(true, Ordering::Relaxed);
                return Err(E::from(error));
            }
        }
        Ok(())
    })?;
    match first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(results
            .into_iter()
            .filter_map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Barrier;

    use super::*;

    #[test]
    fn as_many_at_once_as_asked_and_results_in_order() {
        // Three must be inside at the same time for any of them to leave.
        let barrier = Barrier::new(3);
        let work = |index| {
            barrier.wait();
            Ok::<_, std::io::Error>(index * 10)
        };
        assert_eq!(in_flight(6, 3, work).unwrap(), [0, 10, 20, 30, 40, 50]);
        assert!(in_flight(0, 3, |_| Ok::<_, std::io::Error>(())).unwrap().is_empty());
    }

    #[test]
    fn nothing_begins_after_an_error() {
        let begun = AtomicUsize::new(0);
        let result = in_flight(100, 1, |index| {
            begun.fetch_add(1, Ordering::Relaxed);
            if index == 2 { Err(std::io::Error::other("third")) } else { Ok(()) }
        });
        assert_eq!(result.unwrap_err().to_string(), "third");
        assert_eq!(begun.load(Ordering::Relaxed), 3);
    }
}
