//! Who may keep layers, and for how long: decisions alone, with the time as an argument.
//!
//! A worker serves some owners at a time. An owner that asks while all places are taken gets the place of one that let its
//! time lapse; nobody loses a place that nobody else wants. What an owner's time is depends on what it did last:
//!
//! | what happened last | its time |
//! |---|---|
//! | layers were assigned, and are being loaded | [`TenancyLimits::load`]: the worker's own doing |
//! | they are loaded | [`TenancyLimits::first_use`]: whoever takes a place means to use it |
//! | a product was asked for | [`TenancyLimits::lease`] |
//! | its last connection was closed | [`TenancyLimits::absence`] |
//!
//! Only a product, body and all, renews an owner's time. Asking how the worker does renews nothing, and neither does
//! asking for other layers, unless a product was asked for since the last time: else a place could be kept for ever by
//! words.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::transport::PeerName;

/// Owners at a time, and their times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenancyLimits {
    /// Owners at a time.
    pub owners: usize,
    /// For the next product after a product.
    pub lease: Duration,
    /// For the first product after the layers are loaded.
    pub first_use: Duration,
    /// For layers to load.
    pub load: Duration,
    /// For an owner that is not connected to come back.
    pub absence: Duration,
}

/// What an owner did last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Loading,
    Loaded,
    Used,
    Absent,
}

#[derive(Debug)]
struct Tenant {
    layers: Range<u16>,
    stage: Stage,
    since: Instant,
}

/// Nobody has to make place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Time until somebody will, unless it is renewed.
    pub wait: Duration,
}

/// The owners that have layers.
#[derive(Debug)]
pub struct Tenants {
    limits: TenancyLimits,
    tenants: BTreeMap<PeerName, Tenant>,
}

impl Tenants {
    /// Nobody yet.
    pub fn new(limits: TenancyLimits) -> Self {
        Self { limits, tenants: BTreeMap::new() }
    }

    /// Who has to go so that `owner` can have layers: those whose time lapsed first, and no more than needed.
    ///
    /// # Errors
    /// When all places are taken by others whose time has not lapsed.
    pub fn displaced_by(&self, owner: &PeerName, now: Instant) -> Result<BTreeSet<PeerName>, Full> {
        let others = self.tenants.iter().filter(|(name, _)| *name != owner);
        let mut left: Vec<(Duration, &PeerName)> =
            others.map(|(name, tenant)| (self.left(tenant, now), name)).collect();
        let surplus = (left.len() + 1).saturating_sub(self.limits.owners);
        left.sort_by_key(|&(left, name)| (left, self.tenants.get(name).map(|tenant| tenant.since)));
        match left.iter().take(surplus).find(|(left, _)| !left.is_zero()) {
            Some(&(wait, _)) => Err(Full { wait }),
            None => Ok(left.into_iter().take(surplus).map(|(_, name)| name.clone()).collect()),
        }
    }

    /// What is left of an owner's time.
    fn left(&self, tenant: &Tenant, now: Instant) -> Duration {
        let time = match tenant.stage {
            Stage::Loading => self.limits.load,
            Stage::Loaded => self.limits.first_use,
            Stage::Used => self.limits.lease,
            Stage::Absent => self.limits.absence,
        };
        time.saturating_sub(now.saturating_duration_since(tenant.since))
    }

    /// An owner has these layers instead of any that it had.
    pub fn assign(&mut self, owner: PeerName, layers: Range<u16>, now: Instant) {
        let fresh = Tenant { layers: layers.clone(), stage: Stage::Loading, since: now };
        let tenant = self.tenants.entry(owner).or_insert(fresh);
        tenant.layers = layers;
        if tenant.stage == Stage::Used {
            (tenant.stage, tenant.since) = (Stage::Loading, now);
        }
    }

    /// All layers of an owner are loaded.
    pub fn loaded(&mut self, owner: &PeerName, now: Instant) {
        if let Some(tenant) = self.tenants.get_mut(owner).filter(|tenant| tenant.stage == Stage::Loading) {
            (tenant.stage, tenant.since) = (Stage::Loaded, now);
        }
    }

    /// An owner asked for a product, and has sent what is multiplied. `false` if it has no layers any more.
    pub fn used(&mut self, owner: &PeerName, now: Instant) -> bool {
        let tenant = self.tenants.get_mut(owner);
        tenant.map(|tenant| (tenant.stage, tenant.since) = (Stage::Used, now)).is_some()
    }

    /// An owner's last connection was closed. Of a time that lapses sooner nothing is given back.
    pub fn absent(&mut self, owner: &PeerName, now: Instant) {
        let absence = self.limits.absence;
        let sooner = self.tenants.get(owner).is_some_and(|tenant| self.left(tenant, now) <= absence);
        if let Some(tenant) = self.tenants.get_mut(owner).filter(|_| !sooner) {
            (tenant.stage, tenant.since) = (Stage::Absent, now);
        }
    }

    /// An owner has no layers any more.
    pub fn remove(&mut self, owner: &PeerName) {
        self.tenants.remove(owner);
    }

    /// The layers of an owner.
    pub fn layers(&self, owner: &PeerName) -> Option<Range<u16>> {
        self.tenants.get(owner).map(|tenant| tenant.layers.clone())
    }

    /// All owners and their layers.
    pub fn iter(&self) -> impl Iterator<Item = (&PeerName, Range<u16>)> {
        self.tenants.iter().map(|(name, tenant)| (name, tenant.layers.clone()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const LIMITS: TenancyLimits = TenancyLimits {
        owners: 1,
        lease: Duration::from_secs(120),
        first_use: Duration::from_secs(60),
        load: Duration::from_secs(600),
        absence: Duration::from_secs(30),
    };

    fn name(name: &str) -> PeerName {
        PeerName::from(name)
    }

    /// Owner `a` with layers since `start`, and what is left of its time after some seconds.
    fn tenant() -> (Tenants, Instant, impl Fn(&Tenants, u64) -> Option<u64>) {
        let start = Instant::now();
        let mut tenants = Tenants::new(LIMITS);
        tenants.assign(name("a"), 0..4, start);
        let left = move |tenants: &Tenants, seconds| {
            let displaced = tenants.displaced_by(&name("b"), start + Duration::from_secs(seconds));
            displaced.err().map(|full| full.wait.as_secs())
        };
        (tenants, start, left)
    }

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn only_products_renew_a_place() {
        let (mut tenants, start, left) = tenant();
        assert_eq!(left(&tenants, 10), Some(590), "loading is the worker's own time");
        tenants.loaded(&name("a"), at(start, 20));
        assert_eq!(left(&tenants, 20), Some(60));
        assert_eq!((left(&tenants, 79), left(&tenants, 80)), (Some(1), None));
        assert!(tenants.used(&name("a"), at(start, 50)));
        assert_eq!((left(&tenants, 169), left(&tenants, 170)), (Some(1), None));
        assert!(!tenants.used(&name("b"), at(start, 50)), "it has no place");
    }

    #[test]
    fn a_place_is_not_kept_by_asking_for_other_layers() {
        let (mut tenants, start, left) = tenant();
        tenants.loaded(&name("a"), at(start, 1));
        for second in 2..100 {
            tenants.assign(name("a"), 0..(second % 4 + 1), at(start, second.into()));
            tenants.loaded(&name("a"), at(start, second.into()));
        }
        assert_eq!(left(&tenants, 61), None);
        tenants.used(&name("a"), at(start, 100));
        tenants.assign(name("a"), 2..4, at(start, 101));
        assert_eq!(left(&tenants, 101), Some(600), "a product pays for the time of loading anew");
        tenants.assign(name("a"), 0..1, at(start, 700));
        assert_eq!(left(&tenants, 701), None);
    }

    #[test]
    fn an_owner_that_is_gone_makes_place_sooner_and_takes_it_again() {
        let (mut tenants, start, left) = tenant();
        tenants.used(&name("a"), start);
        tenants.absent(&name("a"), at(start, 10));
        assert_eq!((left(&tenants, 10), left(&tenants, 40)), (Some(30), None));
        assert_eq!(tenants.displaced_by(&name("a"), at(start, 5)), Ok(BTreeSet::new()), "it never waits for itself");
        tenants.used(&name("a"), at(start, 39));
        assert_eq!(left(&tenants, 40), Some(119), "it is back");
        tenants.absent(&name("a"), at(start, 150));
        assert_eq!(left(&tenants, 159), None, "going away gives no time");
    }

    #[test]
    fn whose_time_lapsed_first_goes_first() {
        let start = Instant::now();
        let mut tenants = Tenants::new(TenancyLimits { owners: 2, ..LIMITS });
        for (owner, second) in [("a", 5), ("b", 0)] {
            tenants.assign(name(owner), 0..1, start);
            tenants.used(&name(owner), at(start, second));
        }
        assert_eq!(tenants.displaced_by(&name("c"), at(start, 119)), Err(Full { wait: Duration::from_secs(1) }));
        assert_eq!(tenants.displaced_by(&name("c"), at(start, 300)), Ok([name("b")].into()));
        assert_eq!(tenants.displaced_by(&name("a"), at(start, 300)), Ok([].into()));
        tenants.remove(&name("b"));
        assert_eq!(tenants.displaced_by(&name("c"), at(start, 6)), Ok([].into()));
        assert_eq!((tenants.layers(&name("a")), tenants.layers(&name("b"))), (Some(0..1), None));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Assign,
        Loaded,
        Used,
        Absent,
        Remove,
    }

    proptest! {
        #[test]
        fn whatever_happens_there_are_no_more_owners_than_places(
            owners in 1_usize..4,
            events in prop::collection::vec(
                (0_u64..90, 0_usize..5, prop_oneof![
                    3 => Just(Event::Assign),
                    1 => Just(Event::Loaded),
                    1 => Just(Event::Used),
                    1 => Just(Event::Absent),
                    1 => Just(Event::Remove),
                ]),
                0..200,
            ),
        ) {
            let mut now = Instant::now();
            let mut tenants = Tenants::new(TenancyLimits { owners, ..LIMITS });
            let mut last_product = BTreeMap::new();
            for (seconds, owner, event) in events {
                now += Duration::from_secs(seconds);
                let owner = name(&owner.to_string());
                match event {
                    Event::Assign => if let Ok(displaced) = tenants.displaced_by(&owner, now) {
                        for name in displaced {
                            // Nobody goes who asked for a product within its lease and is there.
                            let product = last_product.get(&name).copied();
                            prop_assert!(product.is_none_or(|product| now - product >= LIMITS.absence));
                            tenants.remove(&name);
                        }
                        tenants.assign(owner, 0..1, now);
                    },
                    Event::Loaded => tenants.loaded(&owner, now),
                    Event::Used => if tenants.used(&owner, now) {
                        last_product.insert(owner, now);
                    },
                    Event::Absent => tenants.absent(&owner, now),
                    Event::Remove => {
                        tenants.remove(&owner);
                        last_product.remove(&owner);
                    }
                }
                prop_assert!(tenants.iter().count() <= owners);
            }
        }
    }
}
