//! Which worker is to serve which layers: as few layers moved as a balanced plan allows.
//!
//! A worker serves one contiguous range. With `replicas` copies of the model the layers are a line of that many models
//! in a row, and a plan cuts this line into ranges, in an order of the workers that follows what they hold today. In
//! three steps: (1) [`split_layers`] says how soon the slowest could be done with its share, if nobody held anything;
//! (2) nobody may take more than [`SLACK`] times of that; (3) of all cuts that respect it, the one that has the fewest
//! layers loaded anew is taken, and of several the most balanced. So a plan that is good enough stays as it is, and
//! small changes of speed move nothing.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::owner::assignment::{Capacity, NotEnoughMemory, split_layers};

/// How much later than in the best plan the slowest worker may be done, before layers are moved: loading one costs as
/// much as many of its products.
const SLACK: f64 = 1.4;

/// Most that a worker may be assigned before its speed was measured, as a multiple of an equal share.
const UNMEASURED_SHARE: f64 = 1.5;

/// Speeds further apart than this are treated as if they were not: beyond it, a worker gets one layer or none anyway.
const SPREAD: f64 = 256.0;

/// A worker, as far as a plan is concerned.
#[derive(Clone, Debug)]
pub(super) struct Planned<'a> {
    /// Layers that it has loaded.
    pub(super) held: &'a BTreeSet<u16>,
    /// Layers that it was told to load.
    pub(super) assigned: &'a Range<u16>,
    /// Layers that it can take.
    pub(super) room: u16,
    /// Its speed, if that was measured.
    pub(super) speed: Option<f64>,
    /// What it says of its speed: breaks ties, no more.
    pub(super) claimed: f64,
}

impl Planned<'_> {
    /// From the first to the last layer that it holds, or else is to hold.
    fn hull(&self) -> Range<u16> {
        match (self.held.first(), self.held.last()) {
            (Some(&first), Some(&last)) => first..last + 1,
            _ => self.assigned.clone(),
        }
    }

    /// What one more layer costs: nothing if it is there, less if its loading may have begun.
    fn cost(&self, layer: u16) -> f64 {
        match (self.held.contains(&layer), self.assigned.contains(&layer)) {
            (true, _) => 0.0,
            (false, true) => 1.0,
            (false, false) => 2.0,
        }
    }
}

/// A range for each worker, in the order given; empty for a spare. As many copies of `0..layers` as `replicas` says, or
/// as there is room for.
///
/// # Errors
/// When all workers together cannot hold the model once.
pub(super) fn plan(layers: u16, replicas: u16, workers: &[Planned<'_>]) -> Result<Vec<Range<u16>>, NotEnoughMemory> {
    let held: u32 = workers.iter().map(|worker| u32::from(worker.room.min(layers))).sum();
    if held < u32::from(layers) {
        return Err(NotEnoughMemory { held, layers });
    }
    let weights = weights(workers);
    let most = replicas.max(1).min(u16::try_from(workers.len()).unwrap_or(u16::MAX));
    for copies in (1..=most).rev() {
        let order = order(layers, copies, workers, &weights);
        for capped in [true, false] {
            let caps = caps(layers, copies, workers, &weights, capped);
            if let Some(ranges) = caps.and_then(|caps| cut(layers, copies, workers, &weights, &order, &caps)) {
                return Ok(ranges);
            }
        }
    }
    Err(NotEnoughMemory { held, layers })
}

/// Relative speeds: measured where they were, else the median of those. Claims change them by less than a thousandth.
fn weights(workers: &[Planned<'_>]) -> Vec<f64> {
    let usable = |speed: f64| (speed.is_finite() && speed > 0.0).then_some(speed);
    let mut measured: Vec<f64> = workers.iter().filter_map(|worker| worker.speed.and_then(usable)).collect();
    measured.sort_by(f64::total_cmp);
    let median = measured.get(measured.len() / 2).copied().unwrap_or(1.0);
    let claims: Vec<f64> = workers.iter().filter_map(|worker| usable(worker.claimed)).collect();
    // Summed as shares, so that no claim overflows.
    let mean: f64 = claims.iter().map(|claim| claim / claims.len() as f64).sum();
    let weight = |worker: &Planned<'_>| {
        let relative = worker.speed.and_then(usable).map_or(1.0, |speed| (speed / median).clamp(1.0 / SPREAD, SPREAD));
        let tie = usable(worker.claimed).map_or(0.0, |claim| 1.0 / (1.0 + mean / claim));
        relative * (1.0 + 1e-3 * tie)
    };
    workers.iter().map(weight).collect()
}

/// Layers that each worker may take at most, for a plan that is balanced; `None` if these do not suffice.
fn caps(layers: u16, copies: u16, workers: &[Planned<'_>], weights: &[f64], capped: bool) -> Option<Vec<u16>> {
    let line = layers.checked_mul(copies)?;
    let share = (UNMEASURED_SHARE * f64::from(line) / workers.len() as f64).ceil() as u16;
    let most = |worker: &Planned<'_>| {
        let room = worker.room.min(layers);
        if capped && worker.speed.is_none() { room.min(share) } else { room }
    };
    let capacities: Vec<Capacity> =
        workers.iter().zip(weights).map(|(worker, &speed)| Capacity { speed, layers: most(worker) }).collect();
    let best = split_layers(line, &capacities).ok()?;
    if !capped {
        return Some(capacities.iter().map(|capacity| capacity.layers).collect());
    }
    let last = best.iter().zip(weights).map(|(range, weight)| range.len() as f64 / weight).fold(0.0, f64::max);
    let cap = |(capacity, weight): (&Capacity, &f64)| capacity.layers.min((SLACK * last * weight).floor() as u16);
    Some(capacities.iter().zip(weights).map(cap).collect())
}

/// The order in which workers lie along the line: by what they hold today, newcomers where something is missing.
fn order(layers: u16, copies: u16, workers: &[Planned<'_>], weights: &[f64]) -> Vec<usize> {
    let mut placed: Vec<usize> = (0..workers.len()).filter(|&worker| !workers[worker].hull().is_empty()).collect();
    placed.sort_by_key(|&worker| {
        let hull = workers[worker].hull();
        u32::from(hull.start) + u32::from(hull.end)
    });
    let mut chains: Vec<Vec<(usize, Range<u16>)>> = vec![Vec::new(); usize::from(copies)];
    if placed.is_empty() {
        return (0..workers.len()).collect();
    }
    let end = |chain: &Vec<(usize, Range<u16>)>| chain.last().map_or(0, |(_, hull)| hull.end);
    for worker in placed {
        let hull = workers[worker].hull();
        let fitting = |&chain: &usize| end(&chains[chain]) <= hull.start;
        let fits = (0..chains.len()).filter(fitting).max_by_key(|&chain| (end(&chains[chain]), usize::MAX - chain));
        let emptiest = || (0..chains.len()).min_by_key(|&chain| end(&chains[chain])).unwrap_or(0);
        let chain = fits.unwrap_or_else(emptiest);
        chains[chain].push((worker, hull));
    }
    for worker in (0..workers.len()).filter(|&worker| workers[worker].hull().is_empty()) {
        let length = |chain: &[(usize, Range<u16>)]| chain.iter().map(|(_, hull)| hull.len()).sum::<usize>();
        let chain = (0..chains.len()).min_by_key(|&chain| length(&chains[chain])).unwrap_or(0);
        insert(&mut chains[chain], worker, layers, weights);
    }
    chains.into_iter().flatten().map(|(worker, _)| worker).collect()
}

/// Puts a newcomer where a chain of workers has its first gap, or beside the one that has most to do.
fn insert(chain: &mut Vec<(usize, Range<u16>)>, worker: usize, layers: u16, weights: &[f64]) {
    let mut covered = 0;
    for place in 0..chain.len() {
        let start = chain[place].1.start;
        if start > covered {
            return chain.insert(place, (worker, covered..start));
        }
        covered = covered.max(chain[place].1.end);
    }
    if covered < layers {
        return chain.push((worker, covered..layers));
    }
    let load = |(worker, hull): &(usize, Range<u16>)| hull.len() as f64 / weights[*worker];
    let busiest = (0..chain.len()).max_by(|&a, &b| load(&chain[a]).total_cmp(&load(&chain[b]))).unwrap_or(0);
    let at = chain[busiest].1.end;
    chain.insert(busiest + 1, (worker, at..at));
}

/// The cheapest cut of the line in this order of workers, if there is one within the caps.
fn cut(
    layers: u16,
    copies: u16,
    workers: &[Planned<'_>],
    weights: &[f64],
    order: &[usize],
    caps: &[u16],
) -> Option<Vec<Range<u16>>> {
    let (layers, line) = (usize::from(layers), usize::from(layers) * usize::from(copies));
    // So small that balance never outweighs a layer's loading.
    let slowest = weights.iter().copied().fold(f64::INFINITY, f64::min);
    let scale = 0.4 * slowest / (line * line) as f64;
    let mut best = vec![f64::INFINITY; line + 1];
    best[0] = 0.0;
    let mut taken: Vec<Vec<u16>> = Vec::with_capacity(order.len());
    for &worker in order {
        let mut loading = vec![0.0; line + 1];
        for at in 0..line {
            loading[at + 1] = loading[at] + workers[worker].cost((at % layers) as u16);
        }
        let mut next = best.clone();
        let mut chosen = vec![0; line + 1];
        for end in 1..=line {
            // A range does not reach over the end of a copy.
            let within = (end - 1) % layers + 1;
            for count in 1..=within.min(usize::from(caps[worker])) {
                let balance = scale * (count * count) as f64 / weights[worker];
                let cost = best[end - count] + loading[end] - loading[end - count] + balance;
                if cost < next[end] {
                    (next[end], chosen[end]) = (cost, count as u16);
                }
            }
        }
        best = next;
        taken.push(chosen);
    }
    if !best[line].is_finite() {
        return None;
    }
    let mut ranges = vec![0..0; workers.len()];
    let mut end = line;
    for (chosen, &worker) in taken.iter().zip(order).rev() {
        let count = usize::from(chosen[end]);
        if count > 0 {
            let first = (end - count) % layers;
            ranges[worker] = first as u16..(first + count) as u16;
        }
        end -= count;
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// Holds, is assigned, has room for, was measured at, claims.
    type Given = (Range<u16>, Range<u16>, u16, Option<f64>, f64);

    fn planned(layers: u16, replicas: u16, given: &[Given]) -> Result<Vec<Range<u16>>, NotEnoughMemory> {
        let held: Vec<BTreeSet<u16>> = given.iter().map(|given| given.0.clone().collect()).collect();
        let workers: Vec<_> = given
            .iter()
            .zip(&held)
            .map(|((_, assigned, room, speed, claimed), held)| Planned {
                held,
                assigned,
                room: *room,
                speed: *speed,
                claimed: *claimed,
            })
            .collect();
        plan(layers, replicas, &workers)
    }

    fn new(claimed: f64) -> Given {
        (0..0, 0..0, 100, None, claimed)
    }

    fn settled(layers: Range<u16>, speed: f64) -> Given {
        (layers.clone(), layers, 100, Some(speed), 1.0)
    }

    #[test]
    fn claims_break_ties_and_do_no_more() {
        assert_eq!(planned(3, 1, &[new(1.0), new(2.0)]).unwrap(), [0..1, 1..3]);
        for claim in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 1e300, f64::MAX, f64::MIN_POSITIVE, 0.0] {
            assert_eq!(planned(30, 1, &[new(1.0), new(claim), new(1.0)]).unwrap(), [0..10, 10..20, 20..30], "{claim}");
        }
    }

    #[test]
    fn measured_speed_sets_the_share_and_an_unmeasured_worker_has_a_capped_one() {
        let none = |speed| (0..0, 0..0, 100, Some(speed), 1.0);
        assert_eq!(planned(16, 1, &[none(3.0), none(1.0)]).unwrap(), [0..12, 12..16]);
        let slow = settled(0..30, 0.01);
        let ranges = planned(30, 1, &[slow.clone(), slow.clone(), slow, new(1e300)]).unwrap();
        assert!(ranges[3].len() <= 12, "1.5 times a quarter of 30: {ranges:?}");
    }

    #[test]
    fn what_is_balanced_enough_stays_and_what_is_not_moves() {
        let stays = [settled(0..9, 1.0), settled(9..16, 1.0)];
        assert_eq!(planned(16, 1, &stays).unwrap(), [0..9, 9..16]);
        let slows = [settled(0..8, 1.2), settled(8..16, 1.0)];
        assert_eq!(planned(16, 1, &slows).unwrap(), [0..8, 8..16]);
        let fails = [settled(0..8, 4.0), settled(8..16, 1.0)];
        let ranges = planned(16, 1, &fails).unwrap();
        assert!(ranges[0].len() >= 11 && ranges[0].start == 0 && ranges[1].end == 16, "{ranges:?}");
    }

    #[test]
    fn a_hole_goes_to_a_spare_and_else_to_a_neighbour() {
        let left = [settled(0..6, 1.0), settled(12..18, 1.0), new(1.0)];
        assert_eq!(planned(18, 1, &left).unwrap(), [0..6, 12..18, 6..12]);
        let ranges = planned(12, 1, &[settled(0..4, 1.0), settled(8..12, 1.0)]).unwrap();
        assert_eq!(ranges, [0..6, 6..12], "nothing that is held moves");
    }

    #[test]
    fn replicas_are_made_of_workers_that_are_left() {
        assert_eq!(planned(8, 2, &[new(1.0), new(1.0)]).unwrap(), [0..8, 0..8]);
        let ranges = planned(8, 2, &std::array::from_fn::<_, 4, _>(|_| new(1.0))).unwrap();
        assert_eq!(ranges, [0..4, 4..8, 0..4, 4..8]);
        assert_eq!(planned(8, 2, &[new(1.0)]).unwrap()[0], 0..8);
        let kept = [settled(0..8, 1.0), new(1.0)];
        assert_eq!(planned(8, 2, &kept).unwrap(), [0..8, 0..8]);
    }

    fn any_worker() -> impl Strategy<Value = Given> {
        let layers = || (0_u16..40, 0_u16..20).prop_map(|(start, count)| start..(start + count).min(40));
        let speed = prop::option::of(prop::num::f64::ANY);
        (layers(), layers(), 0_u16..50, speed, prop::num::f64::ANY)
    }

    proptest! {
        #[test]
        fn a_plan_covers_the_model_within_everybodys_room(
            replicas in 1_u16..4,
            workers in prop::collection::vec(any_worker(), 1..9),
        ) {
            let room: u32 = workers.iter().map(|worker| u32::from(worker.2.min(40))).sum();
            match planned(40, replicas, &workers) {
                Ok(ranges) => {
                    for (range, worker) in ranges.iter().zip(&workers) {
                        prop_assert!(range.len() <= usize::from(worker.2));
                    }
                    let copies = |layer| ranges.iter().filter(|range| range.contains(&layer)).count();
                    let first = copies(0);
                    prop_assert!((1..=usize::from(replicas)).contains(&first));
                    prop_assert!((0..40).all(|layer| copies(layer) == first));
                }
                Err(error) => {
                    prop_assert!(room < 40);
                    prop_assert_eq!(error.held, room);
                }
            }
        }

        #[test]
        fn a_plan_that_was_carried_out_is_planned_again(
            rooms in prop::collection::vec(1_u16..50, 1..9),
            replicas in 1_u16..4,
        ) {
            let mut ranges = vec![0..0; rooms.len()];
            for round in 0..4 {
                let workers = ranges.iter().zip(&rooms);
                let workers: Vec<Given> =
                    workers.map(|(range, &room)| (range.clone(), range.clone(), room, None, 1.0)).collect();
                let Ok(again) = planned(40, replicas, &workers) else { return Ok(()) };
                // Where rooms are so small that copies can hardly be cut, the second plan may find a better cut.
                let settled = round > if replicas == 1 { 0 } else { 2 };
                prop_assert!(!settled || again == ranges, "{:?} after {:?}", again, ranges);
                ranges = again;
            }
        }
    }
}
