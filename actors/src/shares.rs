//! Equal pieces of work, layers or blocks of columns, for takers of different speed: an owner deals its model's layers to
//! workers, a worker its own to devices.

/// Deals out up to `count` pieces one by one, each to the taker that would be done first with one more beside the
/// `held` that it has already. This is the schedule of least makespan for equal pieces, and it needs no rounding.
///
/// `has_room` says whether a taker can be given one more than it was dealt so far; when nobody can, the rest is not
/// dealt. A speed that is not a positive number counts as the slowest. Returns how many pieces each taker gets.
pub(crate) fn deal(
    count: usize,
    speeds: &[f64],
    held: impl Fn(usize) -> usize,
    has_room: impl Fn(usize, &[usize]) -> bool,
) -> Vec<usize> {
    let mut dealt = vec![0; speeds.len()];
    let finish = |taker: usize, dealt: &[usize]| {
        let speed = if speeds[taker].is_finite() && speeds[taker] > 0.0 { speeds[taker] } else { f64::MIN_POSITIVE };
        (held(taker) + dealt[taker] + 1) as f64 / speed
    };
    for _ in 0..count {
        let next = (0..speeds.len())
            .filter(|&taker| has_room(taker, &dealt))
            .min_by(|&a, &b| finish(a, &dealt).total_cmp(&finish(b, &dealt)));
        match next {
            Some(taker) => dealt[taker] += 1,
            None => break,
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_taker_has_already_counts() {
        let none = |_: usize| 0;
        assert_eq!(deal(9, &[2.0, 1.0], none, |_, _| true), [6, 3]);
        assert_eq!(deal(9, &[2.0, 1.0], |taker| [6, 0][taker], |_, _| true), [4, 5]);
        assert_eq!(deal(9, &[2.0, 1.0], none, |taker, dealt| taker == 1 || dealt[0] < 2), [2, 7]);
        assert_eq!(deal(9, &[2.0, f64::NAN], none, |taker, dealt| dealt[taker] < 3), [3, 3]);
        assert!(deal(9, &[], none, |_, _| true).is_empty());
    }
}
