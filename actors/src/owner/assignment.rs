//! Which worker serves which layers: contiguous ranges in proportion to measured speed, within memory.
//!
//! Pure: everything that matters is an argument, so that a plan can be tested, repeated and explained.

use std::ops::Range;

use crate::shares::deal;

/// What a worker brings, as far as planning is concerned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Multiply-accumulates a second, all devices together.
    pub speed: f64,
    /// Layers that fit in its memory, as it says.
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
    let speeds: Vec<f64> = workers.iter().map(|worker| worker.speed).collect();
    let has_room = |worker: usize, dealt: &[usize]| dealt[worker] < usize::from(workers[worker].layers);
    let shares = deal(usize::from(layers), &speeds, |_| 0, has_room);
    let mut start = 0;
    Ok(shares
        .into_iter()
        .map(|share| {
            // A share of at most `layers`.
            let range = start..start + share as u16;
            start = range.end;
            range
        })
        .collect())
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
