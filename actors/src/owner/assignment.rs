//! Which worker serves which layers: contiguous ranges in proportion to measured speed, within memory.
//!
//! Pure: everything that matters is an argument, so that a plan can be tested, repeated and explained.

use std::ops::Range;

/// What a worker brings, as far as planning is concerned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Multiply-accumulates a second, all devices together.
    pub speed: f64,
    /// Layers that fit in its memory.
    pub layers: u16,
}

/// Why no plan exists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the workers found can hold {held} of the model's {layers} layers: add workers, or memory to these")]
pub struct NotEnoughMemory {
    /// Layers that all workers together can hold.
    pub held: u32,
    /// Layers of the model.
    pub layers: u16,
}

/// Splits layers `0..layers` into one contiguous range per worker, in the order given. A worker's share follows its
/// speed, capped by its memory; what is cut off goes to the others. A worker that gets nothing has an empty range.
///
/// # Errors
/// When all workers together cannot hold the model.
pub fn split_layers(layers: u16, workers: &[Capacity]) -> Result<Vec<Range<u16>>, NotEnoughMemory> {
    let held: u32 = workers.iter().map(|worker| u32::from(worker.layers)).sum();
    if held < u32::from(layers) {
        return Err(NotEnoughMemory { held, layers });
    }
    let shares = shares(layers, workers);
    let mut start = 0;
    Ok(shares
        .into_iter()
        .map(|share| {
            let range = start..start + share;
            start += share;
            range
        })
        .collect())
}

/// Hands out layers one by one, each to the worker that would finish its own first with one more. This is the
/// schedule of least makespan for equal layers, and it needs no rounding.
fn shares(layers: u16, workers: &[Capacity]) -> Vec<u16> {
    let mut shares = vec![0_u16; workers.len()];
    for _ in 0..layers {
        let next = workers
            .iter()
            .enumerate()
            .filter(|&(index, worker)| shares[index] < worker.layers)
            .min_by(|&(a, left), &(b, right)| {
                finish(shares[a] + 1, left.speed).total_cmp(&finish(shares[b] + 1, right.speed))
            })
            .map(|(index, _)| index);
        match next {
            Some(index) => shares[index] += 1,
            None => break,
        }
    }
    shares
}

/// When a worker would be done with so many layers; a speed that is not a positive number counts as the slowest.
fn finish(layers: u16, speed: f64) -> f64 {
    let speed = if speed.is_finite() && speed > 0.0 { speed } else { f64::MIN_POSITIVE };
    f64::from(layers) / speed
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_workers_share_evenly() {
        let workers = [Capacity { speed: 5.0, layers: 100 }; 3];
        assert_eq!(split_layers(30, &workers).unwrap(), vec![0..10, 10..20, 20..30]);
    }

    #[test]
    fn speed_sets_the_share_and_memory_caps_it() {
        let workers = [Capacity { speed: 30.0, layers: 4 }, Capacity { speed: 10.0, layers: 100 }];
        assert_eq!(split_layers(16, &workers).unwrap(), vec![0..4, 4..16]);
        let workers = [Capacity { speed: 30.0, layers: 100 }, Capacity { speed: 10.0, layers: 100 }];
        assert_eq!(split_layers(16, &workers).unwrap(), vec![0..12, 12..16]);
    }

    #[test]
    fn too_little_memory_says_how_much_there_is() {
        let workers = [Capacity { speed: 1.0, layers: 4 }, Capacity { speed: 1.0, layers: 3 }];
        assert_eq!(split_layers(8, &workers), Err(NotEnoughMemory { held: 7, layers: 8 }));
    }

    proptest! {
        #[test]
        fn ranges_cover_the_model_once(
            layers in 1_u16..200,
            workers in prop::collection::vec((prop::num::f64::ANY, 0_u16..300), 1..8),
        ) {
            let workers: Vec<_> = workers.into_iter().map(|(speed, layers)| Capacity { speed, layers }).collect();
            match split_layers(layers, &workers) {
                Ok(ranges) => {
                    prop_assert_eq!(ranges.len(), workers.len());
                    let mut next = 0;
                    for (range, worker) in ranges.iter().zip(&workers) {
                        prop_assert_eq!(range.start, next);
                        prop_assert!(range.len() <= usize::from(worker.layers));
                        next = range.end;
                    }
                    prop_assert_eq!(next, layers);
                }
                Err(error) => prop_assert!(error.held < u32::from(layers)),
            }
        }
    }
}
