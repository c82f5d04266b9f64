//! Where a worker's layers lie: on which of its devices, whole or cut.
//!
//! Pure: speeds, memory and what is kept are arguments, so that a spread can be tested, repeated and explained.
//!
//! With [`Split::Layers`] a layer lies on one device, and devices get layers in proportion to their speed as far as their
//! memory goes: each device works for itself, and several of them are busy where an owner has several micro-batches in
//! flight. With [`Split::Columns`] every matrix is cut by its output columns, so that all devices work on every
//! product: a single product is done sooner, for the price of rows that go to all of them and, on the way back, of
//! partial products that have to be added.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use protocol::ids::{Group, LinearShape};
use serde::{Deserialize, Serialize};

use crate::shares::deal;

/// Parts begin at multiples of this many columns.
const COLUMN_STEP: usize = 64;
/// Columns that every device of a worker should have of a matrix that is cut: a part that is narrower than the tile of
/// a GPU's kernel takes as long as one that fills it.
const PART_COLUMNS: usize = 128;

/// How the matrices of a worker are spread over its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Each layer lies on one device.
    #[default]
    Layers,
    /// Each matrix is cut by columns over all devices.
    Columns,
}

impl Split {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Layers, Self::Columns];

    /// Its name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Columns => "columns",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no [`Split`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way to split: write layers or columns")]
pub struct ParseSplitError(String);

impl FromStr for Split {
    type Err = ParseSplitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|split| split.name() == text).ok_or_else(|| ParseSplitError(text.to_owned()))
    }
}

/// A device, as far as a spread is concerned.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its name, for refusals.
    pub name: String,
    /// Multiply-accumulates a second.
    pub speed: f64,
    /// Bytes for matrices in memory of its own; `None` where they lie in the worker's.
    pub own_memory: Option<u64>,
}

/// Where a layer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On one device, by its number.
    On(usize),
    /// On all of them, cut by columns.
    Across,
}

/// What one device has of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The device's number.
    pub device: usize,
    /// Columns of the matrix, `d_in × d_out`.
    pub columns: Range<usize>,
}

/// Layers that the devices have no memory for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fit} of these {layers} layers fit: a layer takes {}", .devices.join(", "))]
pub struct NoRoom {
    /// How many more layers there should be.
    layers: usize,
    /// How many there is memory for.
    fit: usize,
    /// Each device with what a layer takes of it and what it has.
    devices: Vec<String>,
}

/// See the module's documentation.
pub struct Spread {
    split: Split,
    sites: Vec<Site>,
    /// For all devices without memory of their own, bytes.
    shared_memory: u64,
    /// Parts of a layer's matrices, where it lies across the devices.
    cuts: Vec<(Group, Vec<Part>)>,
    /// Output columns of the matrices.
    widths: Vec<(Group, usize)>,
    /// Bytes that a layer takes of each device on which it lies, with this split; of a slice of the head, which counts as
    /// a layer, it is taken to be as much, unless it is more.
    need: Vec<u64>,
}

impl Spread {
    /// A spread of layers whose matrices have these shapes over `sites`, of which those without memory of their own
    /// share `shared_memory` bytes. `memory_for` says what a matrix takes of a device.
    pub fn new(
        split: Split,
        sites: Vec<Site>,
        shared_memory: u64,
        shape: impl Fn(Group) -> LinearShape,
        memory_for: impl Fn(usize, LinearShape) -> u64,
    ) -> Self {
        let speeds: Vec<f64> = sites.iter().map(|site| site.speed).collect();
        let widths: Vec<_> =
            Group::ALL.into_iter().chain([Group::Head]).map(|group| (group, shape(group).d_out)).collect();
        let cuts: Vec<_> = widths.iter().map(|&(group, d_out)| (group, cut(d_out, &speeds))).collect();
        // What a matrix takes of a device.
        let takes = |device: usize, (group, parts): &(Group, Vec<Part>)| match split {
            Split::Layers => memory_for(device, shape(*group)),
            Split::Columns => parts
                .iter()
                .find(|part| part.device == device)
                .map_or(0, |part| memory_for(device, LinearShape { d_out: part.columns.len(), ..shape(*group) })),
        };
        let need = |device: usize| {
            let (head, layer): (Vec<_>, Vec<_>) = cuts.iter().partition(|(group, _)| *group == Group::Head);
            let sum = |of: Vec<&(Group, Vec<Part>)>| {
                of.into_iter().map(|cut| takes(device, cut)).fold(0, u64::saturating_add)
            };
            sum(layer).max(sum(head))
        };
        let need = (0..sites.len()).map(need).collect();
        Self { split, sites, shared_memory, cuts, widths, need }
    }

    /// The parts of a matrix in a layer that lies there, in the order of their columns.
    pub fn parts(&self, place: Place, group: Group) -> Vec<Part> {
        match place {
            Place::On(device) => {
                let width = self.widths.iter().find(|(of, _)| *of == group).map_or(0, |&(_, width)| width);
                vec![Part { device, columns: 0..width }]
            }
            Place::Across => {
                self.cuts.iter().find(|(of, _)| *of == group).map_or_else(Vec::new, |(_, parts)| parts.clone())
            }
        }
    }

    /// Where `fresh` layers come to lie beside those that are kept where they are: on each device a run of them, in the
    /// order of the devices.
    ///
    /// # Errors
    /// When not all of them fit; names the devices, what a layer takes of each, and what is free.
    pub fn place(&self, kept: &BTreeMap<u16, Place>, fresh: &[u16]) -> Result<BTreeMap<u16, Place>, NoRoom> {
        let places = self.deal(kept.values().copied(), fresh.len());
        if places.len() < fresh.len() {
            let free = self.free(kept.values().copied());
            let device = |((site, need), free): ((&Site, &u64), u64)| {
                format!("{need} bytes of {}, which has {free} free", site.name)
            };
            let devices = self.sites.iter().zip(&self.need).zip(free).map(device).collect();
            return Err(NoRoom { layers: fresh.len(), fit: places.len(), devices });
        }
        Ok(fresh.iter().copied().zip(places).collect())
    }

    /// How many layers fit beside these, up to `most`.
    pub fn room(&self, kept: impl Iterator<Item = Place>, most: usize) -> usize {
        self.deal(kept, most).len()
    }

    /// Bytes that each device has free beside these layers. Devices without memory of their own share theirs.
    pub fn free(&self, kept: impl Iterator<Item = Place>) -> Vec<u64> {
        let used = self.used(kept);
        let shared = self.shared_memory.saturating_sub(self.shared(&used));
        let free = |(site, used): (&Site, u64)| site.own_memory.map_or(shared, |memory| memory.saturating_sub(used));
        self.sites.iter().zip(used).map(free).collect()
    }

    /// Places for up to `count` more layers.
    fn deal(&self, kept: impl Iterator<Item = Place>, count: usize) -> Vec<Place> {
        let kept: Vec<Place> = kept.collect();
        let used = self.used(kept.iter().copied());
        // What is used with `more(device)` further layers on each device.
        let with = |more: &dyn Fn(usize) -> usize| -> Vec<u64> {
            let with = |(device, used): (usize, &u64)| {
                used.saturating_add(self.need[device].saturating_mul(more(device) as u64))
            };
            used.iter().enumerate().map(with).collect()
        };
        match self.split {
            Split::Layers => {
                let speeds: Vec<f64> = self.sites.iter().map(|site| site.speed).collect();
                let held = |device| kept.iter().filter(|&&place| place == Place::On(device)).count();
                let has_room = |taker: usize, dealt: &[usize]| {
                    self.holds(&with(&|device| dealt[device] + usize::from(device == taker)))
                };
                let dealt = deal(count, &speeds, held, has_room);
                dealt.iter().enumerate().flat_map(|(device, &layers)| vec![Place::On(device); layers]).collect()
            }
            Split::Columns => {
                let fit = (1..=count).take_while(|&layers| self.holds(&with(&|_| layers))).count();
                vec![Place::Across; fit]
            }
        }
    }

    /// Bytes of each device that layers take.
    fn used(&self, places: impl Iterator<Item = Place>) -> Vec<u64> {
        let mut used = vec![0_u64; self.sites.len()];
        for place in places {
            for (device, (used, need)) in used.iter_mut().zip(&self.need).enumerate() {
                if matches!(place, Place::Across) || place == Place::On(device) {
                    *used = used.saturating_add(*need);
                }
            }
        }
        used
    }

    /// What of these bytes lies in the worker's memory.
    fn shared(&self, used: &[u64]) -> u64 {
        let shared = self.sites.iter().zip(used).filter(|(site, _)| site.own_memory.is_none());
        shared.fold(0, |sum, (_, used)| sum.saturating_add(*used))
    }

    /// Whether the devices have so much memory.
    fn holds(&self, used: &[u64]) -> bool {
        let own = |(site, used): (&Site, &u64)| site.own_memory.is_none_or(|memory| *used <= memory);
        self.sites.iter().zip(used).all(own) && self.shared(used) <= self.shared_memory
    }
}

/// The parts of a matrix of `d_out` columns over devices of these speeds, in proportion to them; a narrow one stays
/// whole, on the fastest.
fn cut(d_out: usize, speeds: &[f64]) -> Vec<Part> {
    let steps = d_out.div_ceil(COLUMN_STEP);
    let narrow = d_out < PART_COLUMNS * speeds.len();
    // Dealt as one piece, a matrix goes to whoever is done with it first.
    let (pieces, size) = if narrow { (1, steps) } else { (steps, 1) };
    let steps = deal(pieces, speeds, |_| 0, |_, _| true).into_iter().map(|pieces| pieces * size);
    let mut end = 0;
    let part = |(device, steps): (usize, usize)| {
        let start = end;
        end = d_out.min(start + steps * COLUMN_STEP);
        Part { device, columns: start..end }
    };
    steps.enumerate().map(part).filter(|part| !part.columns.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn shape(group: Group) -> LinearShape {
        let d_out = match group {
            Group::Qkv => 448,
            Group::O => 192,
            Group::GateUp => 1000,
            Group::Down => 320,
            Group::Head => 640,
        };
        LinearShape { d_in: 100, d_out }
    }

    fn bytes(shape: LinearShape) -> u64 {
        2 * shape.d_in as u64 * shape.d_out as u64
    }

    fn site((number, (speed, own_memory)): (usize, (f64, Option<u64>))) -> Site {
        Site { name: format!("device {number}"), speed, own_memory }
    }

    fn spread(split: Split, sites: &[(f64, Option<u64>)], shared: u64) -> Spread {
        let sites = sites.iter().copied().enumerate().map(site).collect();
        Spread::new(split, sites, shared, shape, |_, shape| bytes(shape))
    }

    fn layer() -> u64 {
        Group::ALL.into_iter().map(|group| bytes(shape(group))).sum()
    }

    #[test]
    fn layers_lie_in_proportion_to_speed_within_memory() {
        let none = BTreeMap::new();
        let layers: Vec<u16> = (4..16).collect();
        let two = spread(Split::Layers, &[(2.0, Some(100 * layer())), (1.0, Some(100 * layer()))], 0);
        let places = two.place(&none, &layers).unwrap();
        assert!(places.iter().all(|(&layer, &place)| place == Place::On(usize::from(layer >= 12))));
        let small = spread(Split::Layers, &[(2.0, Some(3 * layer() - 1)), (1.0, None)], 20 * layer());
        let places = small.place(&none, &layers).unwrap();
        assert!(places.iter().all(|(&layer, &place)| place == Place::On(usize::from(layer >= 6))));
        assert_eq!(small.room(places.values().copied(), 99), 10);
        assert_eq!(small.free(places.values().copied()), [layer() - 1, 10 * layer()]);
    }

    #[test]
    fn what_is_kept_stays_and_weighs() {
        let two = spread(Split::Layers, &[(1.0, None), (1.0, None)], 8 * layer());
        let kept = BTreeMap::from([(0, Place::On(0)), (1, Place::On(0))]);
        let places = two.place(&kept, &[2, 3, 4, 5]).unwrap();
        let on_first = places.values().filter(|&&place| place == Place::On(0)).count();
        assert_eq!((on_first, places.len()), (1, 4));
    }

    #[test]
    fn what_does_not_fit_is_said_with_devices_need_and_room() {
        let need = layer();
        let two = spread(Split::Layers, &[(2.0, Some(need)), (1.0, None)], 2 * need + 7);
        let error = two.place(&BTreeMap::from([(0, Place::On(1))]), &[1, 2, 3]).unwrap_err().to_string();
        let expected = format!(
            "2 of these 3 layers fit: a layer takes {need} bytes of device 0, which has {need} free, \
             {need} bytes of device 1, which has {} free",
            need + 7
        );
        assert_eq!(error, expected);
    }

    #[test]
    fn matrices_are_cut_by_speed_and_narrow_ones_are_not() {
        let parts = |d_out: usize, speeds: &[f64]| -> Vec<(usize, Range<usize>)> {
            cut(d_out, speeds).into_iter().map(|part| (part.device, part.columns)).collect()
        };
        assert_eq!(parts(1024, &[3.0, 1.0]), [(0, 0..768), (1, 768..1024)]);
        assert_eq!(parts(1000, &[1.0, 1.0]), [(0, 0..512), (1, 512..1000)]);
        assert_eq!(parts(255, &[1.0, 2.0]), [(1, 0..255)]);
        assert_eq!(parts(1024, &[1.0]), [(0, 0..1024)]);
        assert_eq!(parts(1024, &[1e9, 1.0]), [(0, 0..1024)], "a part of nothing is none");
    }

    fn sites() -> impl Strategy<Value = Vec<(f64, Option<u64>)>> {
        let speed = prop_oneof![4 => 0.1..1e3, 1 => prop::num::f64::ANY];
        let memory = prop::option::of(0..20 * layer());
        prop::collection::vec((speed, memory), 1..5)
    }

    proptest! {
        #[test]
        fn parts_cover_the_columns_once(d_out in 1_usize..5000, sites in sites()) {
            let speeds: Vec<f64> = sites.iter().map(|(speed, _)| *speed).collect();
            let (mut next, mut last) = (0, None);
            for part in cut(d_out, &speeds) {
                prop_assert_eq!(part.columns.start, next);
                prop_assert!(!part.columns.is_empty() && part.columns.start % COLUMN_STEP == 0);
                prop_assert!(last < Some(part.device), "one part a device, in their order");
                (next, last) = (part.columns.end, Some(part.device));
            }
            prop_assert_eq!(next, d_out);
        }

        #[test]
        fn places_are_within_memory_and_room_is_what_can_be_placed(
            sites in sites(),
            shared in 0..20 * layer(),
            kept in 0_u16..6,
            fresh in 1_u16..40,
            columns: bool,
        ) {
            let split = if columns { Split::Columns } else { Split::Layers };
            let spread = spread(split, &sites, shared);
            let kept: Vec<u16> = (0..kept).collect();
            let kept = spread.place(&BTreeMap::new(), &kept).unwrap_or_default();
            let room = spread.room(kept.values().copied(), 200);
            let layers: Vec<u16> = (100..100 + fresh).collect();
            match spread.place(&kept, &layers) {
                Err(_) => prop_assert!(room < layers.len()),
                Ok(places) => {
                    prop_assert!(room >= layers.len());
                    prop_assert!(places.keys().eq(&layers));
                    // Counted anew from the parts.
                    let mut used = vec![0; sites.len()];
                    for (&place, group) in places.values().chain(kept.values()).flat_map(|place| Group::ALL.map(|group| (place, group))) {
                        for part in spread.parts(place, group) {
                            used[part.device] += bytes(LinearShape { d_out: part.columns.len(), ..shape(group) });
                        }
                    }
                    let mut in_common = 0;
                    for (used, (_, own)) in used.iter().zip(&sites) {
                        match own {
                            Some(own) => prop_assert!(used <= own),
                            None => in_common += used,
                        }
                    }
                    prop_assert!(in_common <= shared);
                    let numbers = places.values().map(|place| match place { Place::On(device) => *device, Place::Across => 0 });
                    prop_assert!(numbers.is_sorted(), "a device's layers are a run");
                }
            }
        }
    }
}
