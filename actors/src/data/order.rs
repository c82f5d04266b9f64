//! The order in which a pass over the data takes their units, where some files are taken more often than others.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Numbers of streams of random numbers below this choose what of a file is taken once more; the first of all is that of the
/// split.
const EXTRA: u64 = u64::MAX - 1;

/// The units of one file, which are next to each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) units: usize,
    /// How often each is taken in a pass.
    pub(super) weight: f64,
}

impl Part {
    /// Units that a pass takes.
    pub(super) fn taken(&self) -> usize {
        self.whole() * self.units + self.extra()
    }

    /// How often every one of them is taken.
    fn whole(&self) -> usize {
        self.weight.floor() as usize
    }

    /// How many of them are taken once more.
    fn extra(&self) -> usize {
        let extra = (self.weight.fract() * self.units as f64).round() as usize;
        // However small the weight, a file is not left out.
        extra.max(usize::from(self.weight < 1.0 && self.units > 0))
    }
}

/// The order of a pass: every unit as often as the weight of its file says. Of a file whose weight has a fraction some are
/// taken once more, in each pass those that were not before, until all were.
pub(super) fn pass(parts: &[Part], seed: u64, epoch: u64) -> Vec<u32> {
    if parts.iter().all(|part| part.weight == 1.0) {
        return shuffled(parts.iter().map(|part| part.units).sum(), seed, epoch);
    }
    let (mut units, mut first) = (Vec::new(), 0);
    for (number, part) in parts.iter().enumerate() {
        let all = first..first + part.units as u32;
        first = all.end;
        (0..part.whole()).for_each(|_| units.extend(all.clone()));
        let extra = part.extra();
        if extra > 0 {
            let again = shuffled(part.units, seed, EXTRA - number as u64);
            let begin = (u128::from(epoch) * extra as u128 % part.units as u128) as usize;
            units.extend(again.iter().cycle().skip(begin).take(extra).map(|unit| all.start + unit));
        }
    }
    shuffled(units.len(), seed, epoch).into_iter().map(|place| units[place as usize]).collect()
}

/// The numbers below `count`, at most 2³², in random order (Fisher and Yates). Written out here, since a resumed run relies on
/// the order, and a library's shuffle may change with its version.
pub(super) fn shuffled(count: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let mut order: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        // The high half of a 64-by-64-bit product is a number below the bound; its bias is below 2^-32 for any data
        // set that fits a memory.
        let bound = last as u128 + 1;
        order.swap(last, ((u128::from(random.next_u64()) * bound) >> 64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(parts: &[Part], seed: u64, epochs: std::ops::Range<u64>) -> Vec<usize> {
        let mut counts = vec![0; parts.iter().map(|part| part.units).sum()];
        epochs.flat_map(|epoch| pass(parts, seed, epoch)).for_each(|unit| counts[unit as usize] += 1);
        counts
    }

    #[test]
    fn every_unit_is_taken_as_often_as_its_weight_says() {
        let parts = [Part { units: 10, weight: 2.5 }, Part { units: 6, weight: 1.0 }, Part { units: 8, weight: 0.25 }];
        let taken: usize = parts.iter().map(Part::taken).sum();
        assert_eq!((taken, pass(&parts, 5, 0).len()), (25 + 6 + 2, 33));
        let one = counts(&parts, 5, 3..4);
        assert!(one[..10].iter().all(|count| matches!(count, 2 | 3)) && one[10..16].iter().all(|&count| count == 1));
        // After as many passes as the fraction needs, all were taken alike.
        let four = counts(&parts, 5, 0..4);
        assert!(four[..10].iter().all(|&count| count == 10), "{four:?}");
        assert!(four[10..16].iter().all(|&count| count == 4) && four[16..].iter().all(|&count| count == 1), "{four:?}");
        assert_eq!(pass(&parts, 5, 2), pass(&parts, 5, 2));
        assert_ne!(pass(&parts, 5, 2), pass(&parts, 5, 3));
    }

    #[test]
    fn no_file_is_left_out() {
        let parts = [Part { units: 4, weight: 0.1 }, Part { units: 0, weight: 0.1 }];
        assert_eq!(parts.map(|part| part.taken()), [1, 0]);
        assert_eq!(counts(&parts, 5, 0..4), [1; 4]);
    }

    #[test]
    fn weights_of_one_change_nothing() {
        let one = |units| Part { units, weight: 1.0 };
        assert_eq!(pass(&[one(7), one(5)], 3, 2), shuffled(12, 3, 2));
    }
}
