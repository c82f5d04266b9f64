//! How fast workers are, and how long products usually take: from their products alone.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use protocol::ids::{Direction, Group, ProductId};

/// Products after which a worker's speed counts as measured: several of every matrix of a layer.
const MEASURED: usize = 16;
/// Products over which a speed is taken: so many that one slow one changes little, so few that a change shows.
const WINDOW: usize = 64;

/// Products of a kind after which it is known what is usual.
const USUAL: usize = 8;
/// How many times as long as usual a product may take before it is slow.
const SLOW: f64 = 4.0;
/// A product is not slow before that, however fast products usually are: a retransmission or a busy moment is no reason
/// to compute it twice.
const SLOW_FLOOR: Duration = Duration::from_secs(2);
/// When a product is slow before it is known what is usual: a product of the mask may come before it.
const SLOW_AT_FIRST: Duration = Duration::from_secs(20);

/// A product, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    /// Which.
    pub(crate) product: ProductId,
    /// Multiply-accumulates of values by weights.
    pub(crate) macs: f64,
    /// From the moment that it was sent to its decryption, or until nobody waited for it any more.
    pub(crate) seconds: f64,
}

impl Measured {
    /// Whether it can be calculated with.
    fn is_sound(&self) -> bool {
        self.macs.is_finite() && self.macs > 0.0 && self.seconds.is_finite() && self.seconds > 0.0
    }
}

/// The speed of one worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Speed {
    recent: VecDeque<(f64, f64)>,
}

impl Speed {
    pub(super) fn record(&mut self, measured: &Measured) {
        if measured.is_sound() {
            if self.recent.len() == WINDOW {
                self.recent.pop_front();
            }
            self.recent.push_back((measured.macs, measured.seconds));
        }
    }

    /// A product would have taken longer than this: that counts where it was expected sooner. A worker that another one
    /// outruns time and again would otherwise stay as fast as it once was, and be asked first for ever.
    pub(super) fn waited(&mut self, waited: &Measured) {
        if self.measured().is_some_and(|speed| waited.macs < speed * waited.seconds) {
            self.record(waited);
        }
    }

    /// Multiply-accumulates a second, if it was measured.
    pub(super) fn measured(&self) -> Option<f64> {
        let sum = |of: fn(&(f64, f64)) -> f64| self.recent.iter().map(of).sum::<f64>();
        (self.recent.len() >= MEASURED).then(|| sum(|&(macs, _)| macs) / sum(|&(_, seconds)| seconds))
    }
}

/// What products usually take, by the kind of matrix.
#[derive(Clone, Debug, Default)]
pub(super) struct Usual {
    /// Seconds for each multiply-accumulate.
    kinds: HashMap<(Group, Direction), VecDeque<f64>>,
}

impl Usual {
    pub(super) fn record(&mut self, measured: &Measured) {
        if measured.is_sound() {
            let recent = self.kinds.entry((measured.product.linear.group, measured.product.direction)).or_default();
            if recent.len() == WINDOW {
                recent.pop_front();
            }
            recent.push_back(measured.seconds / measured.macs);
        }
    }

    /// When a product of so many multiply-accumulates is slow.
    pub(super) fn slow_after(&self, product: ProductId, macs: f64) -> Duration {
        let recent = self.kinds.get(&(product.linear.group, product.direction));
        let Some(recent) = recent.filter(|recent| recent.len() >= USUAL) else { return SLOW_AT_FIRST };
        let mut sorted: Vec<f64> = recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let usual = Duration::try_from_secs_f64(SLOW * macs * sorted[sorted.len() / 2]).unwrap_or(SLOW_AT_FIRST);
        SLOW_FLOOR + usual
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::LinearId;

    use super::*;

    const PRODUCT: ProductId = LinearId { layer: 3, group: Group::O }.along(Direction::Forward);

    fn took(seconds: f64) -> Measured {
        Measured { product: PRODUCT, macs: 10.0, seconds }
    }

    #[test]
    fn a_speed_counts_after_some_products_and_follows_a_change() {
        let mut speed = Speed::default();
        for _ in 0..MEASURED {
            assert_eq!(speed.measured(), None);
            for unsound in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
                speed.record(&took(unsound));
            }
            speed.record(&took(2.0));
        }
        assert_eq!(speed.measured(), Some(5.0));
        (0..WINDOW).for_each(|_| speed.record(&took(5.0)));
        assert_eq!(speed.measured(), Some(2.0));
    }

    #[test]
    fn a_product_is_slow_after_several_times_the_median() {
        let mut usual = Usual::default();
        for seconds in [1.0, 1.0, 1.0, 1.0, 1.0, 100.0, 100.0] {
            usual.record(&took(seconds));
            assert_eq!(usual.slow_after(PRODUCT, 10.0), SLOW_AT_FIRST);
        }
        usual.record(&took(1.0));
        assert_eq!(usual.slow_after(PRODUCT, 10.0), Duration::from_secs(6));
        assert_eq!(usual.slow_after(PRODUCT, 100.0), Duration::from_secs(42));
        let other = LinearId { layer: 3, group: Group::Down }.along(Direction::Forward);
        assert_eq!(usual.slow_after(other, 10.0), SLOW_AT_FIRST);
    }
}
