//! How many micro-batches are computed at once where the user has not said: so many that the owner has something to do while
//! the products of one are on their way. Gradients are added in the order of the data, so the results are the same
//! for any number.

use std::time::Duration;

/// However near the workers are: one is multiplied by them while another is encrypted or decrypted.
const NEAR: usize = 2;
/// At most, for each keeps its activations in the owner's memory.
const MOST: usize = 8;
/// What an owner is taken to compute for one product of a micro-batch of some hundred tokens, in encryption, decryption and
/// its own part of the layer: so long another micro-batch hides a round trip.
const OWN: Duration = Duration::from_millis(10);

/// Micro-batches at once for workers at this distance; `None` where products do not travel, or nothing is known.
pub(super) fn planned(round_trip: Option<Duration>) -> usize {
    let hidden = round_trip.unwrap_or_default().as_micros().div_ceil(OWN.as_micros());
    usize::try_from(hidden).unwrap_or(MOST).saturating_add(NEAR).min(MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_further_the_workers_the_more_is_under_way() {
        assert_eq!(planned(None), NEAR);
        let at = |micros| planned(Some(Duration::from_micros(micros)));
        assert_eq!([0, 100, 20_000, 20_001, 45_000].map(at), [2, 3, 4, 5, 7]);
        assert_eq!([100_000, u64::MAX].map(at), [MOST; 2]);
    }
}
