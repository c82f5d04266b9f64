//! Random histories against workers that are simulated: what holds after every event, and what holds when all is calm.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use proptest::prelude::*;
use protocol::ids::{Direction, Group, LinearId};

use super::*;

const LAYERS: u16 = 12;
const PEERS: usize = 5;

fn product(layer: u16) -> ProductId {
    LinearId { layer, group: Group::O }.along(Direction::Forward)
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What a worker is in truth.
#[derive(Clone, Debug)]
struct Truth {
    room: u16,
    answers: bool,
    /// Another owner has its place.
    full: bool,
    has: Range<u16>,
    loaded: usize,
    joined: bool,
    /// How fast its products are.
    speed: f64,
}

/// Workers, and what they were told and have not answered.
struct World {
    fleet: Fleet,
    now: Now,
    workers: Vec<Truth>,
    exchanges: Vec<VecDeque<Command>>,
    banned: Vec<PeerName>,
    /// Assignments and releases so far.
    moves: usize,
    said: Vec<String>,
    gave_up: Option<Now>,
}

#[derive(Clone, Debug)]
enum Op {
    Join(usize),
    /// It stops to answer; with its memory lost, or not.
    Stop(usize, bool),
    Start(usize),
    Full(usize, bool),
    /// The owner notices that the connection is gone.
    Lost(usize),
    Answer(usize),
    Load(usize, usize),
    /// A product of a layer, and how it fails, if its worker answers at all.
    Product(u16, Option<Failure>),
    Slow(usize),
    Wait(u64),
}

fn any_op() -> impl Strategy<Value = Op> {
    let peer = || 0..PEERS;
    let failure = prop::option::of(prop::sample::select(vec![
        Failure::Away,
        Failure::Busy,
        Failure::NotServing,
        Failure::Unable,
        Failure::Garbled,
        Failure::BodyRefuted,
        Failure::MaskRefuted,
    ]));
    prop_oneof![
        3 => peer().prop_map(Op::Join),
        2 => (peer(), any::<bool>()).prop_map(|(peer, forgets)| Op::Stop(peer, forgets)),
        2 => peer().prop_map(Op::Start),
        1 => (peer(), any::<bool>()).prop_map(|(peer, full)| Op::Full(peer, full)),
        1 => peer().prop_map(Op::Lost),
        8 => peer().prop_map(Op::Answer),
        5 => (peer(), 0_usize..8).prop_map(|(peer, count)| Op::Load(peer, count)),
        6 => (0..LAYERS, prop::option::weighted(0.2, failure)).prop_map(|(layer, failure)| {
            Op::Product(layer, failure.flatten())
        }),
        1 => peer().prop_map(Op::Slow),
        6 => (0_u64..40).prop_map(Op::Wait),
    ]
}

fn name(peer: usize) -> PeerName {
    PeerName::from(format!("peer {peer}").as_str())
}

impl World {
    fn new(rooms: &[u16], replicas: u16, patience: Duration) -> Self {
        let worker =
            |&room: &u16| Truth { room, answers: true, full: false, has: 0..0, loaded: 0, joined: false, speed: 1.0 };
        let settings = FleetSettings { replicas, patience, banned: Vec::new() };
        Self {
            fleet: Fleet::new(LAYERS, settings),
            now: Duration::ZERO,
            workers: rooms.iter().map(worker).collect(),
            exchanges: vec![VecDeque::new(); rooms.len()],
            banned: Vec::new(),
            moves: 0,
            said: Vec::new(),
            gave_up: None,
        }
    }

    /// A world in which these workers serve everything.
    fn calm(rooms: &[u16], replicas: u16, patience: Duration) -> Self {
        let mut world = Self::new(rooms, replicas, patience);
        (0..rooms.len()).for_each(|peer| world.join(peer));
        world.tell(Event::Begin);
        world.settle(100);
        assert!(world.fleet.serves_all(), "{:?}", world.fleet.records());
        world
    }

    fn number(&self, peer: &PeerName) -> usize {
        (0..self.workers.len()).find(|&number| name(number) == *peer).expect("a peer of this world")
    }

    /// Feeds an event, and checks what comes of it.
    fn tell(&mut self, event: Event) {
        let commands = self.fleet.on(event.clone(), self.now);
        assert!(commands.len() <= 4 + 2 * self.workers.len(), "{event:?}: {commands:?}");
        for command in commands {
            match &command {
                Command::Assign { peer, layers } => {
                    let number = self.number(peer);
                    assert!(!self.banned.contains(peer), "{peer} is banned");
                    assert!(!layers.is_empty() && layers.end <= LAYERS, "{layers:?}");
                    assert!(layers.len() <= usize::from(self.workers[number].room), "{peer} has no room: {layers:?}");
                    assert!(self.exchanges[number].is_empty(), "{peer} is asked two things at once");
                    self.moves += 1;
                    self.exchanges[number].push_back(command);
                }
                Command::Ask { peer, .. } => {
                    let number = self.number(peer);
                    assert!(!self.banned.contains(peer), "{peer} is banned");
                    assert!(self.exchanges[number].is_empty(), "{peer} is asked two things at once");
                    self.exchanges[number].push_back(command);
                }
                Command::Release { peer } => {
                    let number = self.number(peer);
                    self.moves += 1;
                    self.exchanges[number].push_back(command);
                }
                Command::Ban { peer, .. } => self.banned.push(peer.clone()),
                Command::Say(text) => self.said.push(text.clone()),
                Command::GiveUp(_) => {
                    assert_eq!(self.gave_up.replace(self.now), None, "it gives up once");
                    assert!(!self.fleet.serves_all());
                }
            }
        }
        if matches!(event, Event::Sent { .. } | Event::Done { .. }) {
            return;
        }
        for layer in 0..LAYERS {
            if let Some(peer) = self.fleet.route(product(layer), &[]) {
                assert!(!self.banned.contains(peer) && self.fleet.is_here(peer), "{peer} is routed to");
                assert_ne!(self.fleet.route(product(layer), std::slice::from_ref(peer)), Some(peer));
            }
        }
    }

    fn join(&mut self, peer: usize) {
        if !self.workers[peer].answers {
            return;
        }
        self.workers[peer].joined = true;
        let room = self.workers[peer].room - self.workers[peer].has.len() as u16;
        self.tell(Event::Offered { peer: name(peer), room, claimed: f64::NAN, device: "cpu".into() });
    }

    /// The oldest exchange with a worker ends.
    fn answer(&mut self, number: usize) {
        let Some(command) = self.exchanges[number].pop_front() else { return };
        let (peer, worker) = (name(number), &mut self.workers[number]);
        let silent = Event::Silent { peer: peer.clone(), why: "no answer".into() };
        let event = match command {
            Command::Release { .. } => {
                if worker.answers {
                    (worker.has, worker.loaded) = (0..0, 0);
                }
                Event::Released { peer }
            }
            _ if !worker.answers => silent,
            Command::Assign { layers, .. } if worker.full || layers.len() > usize::from(worker.room) => {
                Event::Refused { peer, why: "no capacity".into() }
            }
            Command::Assign { layers, .. } => {
                let common = layers.start.max(worker.has.start)..layers.end.min(worker.has.end);
                worker.loaded = worker.loaded.min(common.len());
                worker.has = layers;
                Event::Assigned { peer }
            }
            Command::Ask { offer, .. } => {
                let beside = offer.then(|| worker.room - worker.has.len() as u16);
                let (layers, loaded) = (worker.has.clone(), worker.loaded as u16);
                Event::Health { peer, health: Health { layers, loaded, failure: None, beside } }
            }
            other => panic!("{other:?} is no exchange"),
        };
        self.tell(event);
    }

    fn product(&mut self, layer: u16, failure: Option<Failure>) {
        let Some(peer) = self.fleet.route(product(layer), &[]).cloned() else { return };
        let worker = &self.workers[self.number(&peer)];
        let (answers, serves) = (worker.answers, worker.has.contains(&layer));
        let speed = worker.speed;
        self.tell(Event::Sent { peer: peer.clone() });
        let failure = match (answers, serves) {
            (false, _) => Some(Failure::Away),
            (true, false) => Some(Failure::NotServing),
            (true, true) => failure,
        };
        let why = "it failed".to_owned();
        self.tell(match failure {
            Some(failure) => Event::Failed { peer, layer, failure, why },
            None => Event::Done { peer, measured: Measured { product: product(layer), macs: speed, seconds: 1.0 } },
        });
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.tell(Event::Tick);
    }

    fn go(&mut self, op: Op) {
        match op {
            Op::Join(peer) => self.join(peer),
            Op::Stop(peer, forgets) => {
                self.workers[peer].answers = false;
                if forgets {
                    (self.workers[peer].has, self.workers[peer].loaded) = (0..0, 0);
                }
            }
            Op::Start(peer) => self.workers[peer].answers = true,
            Op::Full(peer, full) => self.workers[peer].full = full,
            Op::Lost(peer) => self.tell(Event::Lost { peer: name(peer), why: "closed".into() }),
            Op::Answer(peer) => self.answer(peer),
            Op::Load(peer, count) => {
                let worker = &mut self.workers[peer];
                worker.loaded = worker.has.len().min(worker.loaded + count);
            }
            Op::Product(layer, failure) => self.product(layer, failure),
            Op::Slow(peer) => self.tell(Event::Slow { peer: name(peer) }),
            Op::Wait(seconds) => self.wait(Duration::from_secs(seconds)),
        }
    }

    /// Workers answer and load; products are asked for; time goes on.
    fn settle(&mut self, rounds: usize) {
        self.settle_by(rounds, Duration::from_secs(1));
    }

    fn settle_by(&mut self, rounds: usize, step: Duration) {
        for _ in 0..rounds {
            for peer in 0..self.workers.len() {
                let worker = &mut self.workers[peer];
                if worker.answers {
                    worker.loaded = worker.has.len();
                }
                while !self.exchanges[peer].is_empty() {
                    self.answer(peer);
                }
            }
            (0..LAYERS).for_each(|layer| self.product(layer, None));
            self.wait(step);
        }
    }

    /// Who serves how many layers.
    fn shares(&self) -> BTreeMap<PeerName, usize> {
        self.fleet.records().into_iter().map(|record| (record.peer, record.assigned.len())).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happened_every_layer_is_served_when_all_is_calm(
        rooms in prop::collection::vec(1_u16..=LAYERS, PEERS),
        replicas in 1_u16..3,
        speeds in prop::collection::vec(0.1_f64..10.0, PEERS),
        before in 0_usize..8,
        ops in prop::collection::vec(any_op(), 0..120),
    ) {
        let mut world = World::new(&rooms, replicas, seconds(1_000_000_000));
        for (worker, speed) in world.workers.iter_mut().zip(speeds) {
            worker.speed = speed;
        }
        for (number, op) in ops.into_iter().enumerate() {
            if number == before {
                world.tell(Event::Begin);
            }
            world.go(op);
        }
        world.tell(Event::Begin);
        for worker in &mut world.workers {
            (worker.answers, worker.full) = (true, false);
        }
        world.settle_by(60, seconds(5));
        let usable = |(number, worker): &(usize, &Truth)| worker.joined && !world.banned.contains(&name(*number));
        let room: u32 = world.workers.iter().enumerate().filter(usable).map(|(_, worker)| u32::from(worker.room)).sum();
        if room >= u32::from(LAYERS) {
            prop_assert!(world.fleet.serves_all(), "{:?}\n{:?}", world.fleet.records(), world.said);
            for layer in 0..LAYERS {
                let peer = world.fleet.route(product(layer), &[]).unwrap();
                prop_assert!(world.workers[world.number(peer)].has.contains(&layer));
            }
            let moves = world.moves;
            world.settle_by(26, seconds(5));
            // Two plans for speed: the first may still move something.
            prop_assert!(world.moves - moves <= PEERS * 2, "{} moves while nothing happens", world.moves - moves);
        }
    }

    #[test]
    fn patience_ends_exactly_when_it_must(
        patience in 3_u64..1000,
        steps in prop::collection::vec(1_u64..50, 1..200),
        back in prop::option::of(0_u64..1500),
    ) {
        let mut world = World::calm(&[LAYERS], 1, seconds(patience));
        world.workers[0].answers = false;
        world.tell(Event::Lost { peer: name(0), why: "closed".into() });
        let since = world.now;
        let mut last = since;
        for step in steps {
            let late = world.now.saturating_sub(since) >= seconds(patience);
            prop_assert_eq!(world.gave_up.is_some(), late, "{:?} after {:?}", world.gave_up, world.now - since);
            if back.is_some_and(|back| world.now - since >= seconds(back)) && !late {
                world.workers[0].answers = true;
                for _ in 0..20 {
                    world.answer(0);
                    world.wait(Duration::ZERO);
                    if world.fleet.serves_all() {
                        world.settle(2);
                        prop_assert_eq!(world.gave_up, None);
                        return Ok(());
                    }
                }
            }
            last = world.now;
            world.answer(0);
            world.wait(seconds(step));
        }
        if let Some(at) = world.gave_up {
            prop_assert!(at - since >= seconds(patience) && (last - since < seconds(patience) || at <= last));
        }
    }
}

#[test]
fn a_lost_worker_is_waited_for_and_goes_on_where_it_was() {
    let mut world = World::calm(&[LAYERS], 1, seconds(600));
    let moves = world.moves;
    world.workers[0].answers = false;
    world.product(0, None);
    world.wait(seconds(1));
    world.answer(0);
    assert_eq!(world.fleet.route(product(0), &[]), None);
    assert!(world.said.iter().any(|said| said.contains("no worker is left: waiting up to 600s")), "{:?}", world.said);
    world.workers[0].answers = true;
    world.wait(seconds(30));
    world.answer(0);
    assert!(world.fleet.serves_all(), "what it still holds is used at once");
    assert_eq!(world.moves, moves, "nothing was loaded");
    // Killed and started again, it has nothing.
    (world.workers[0].has, world.workers[0].loaded) = (0..0, 0);
    world.tell(Event::Lost { peer: name(0), why: "closed".into() });
    world.settle(3);
    assert!(world.fleet.serves_all());
}

#[test]
fn the_layers_of_a_lost_worker_go_to_a_spare_at_once_and_come_back_only_if_needed() {
    let mut world = World::calm(&[6, 6, 6], 1, seconds(600));
    world.settle(70);
    assert_eq!(world.shares().values().sum::<usize>(), 12);
    let first = &world.fleet.records()[0];
    assert_eq!(first.assigned, 0..4);
    world.workers[0].answers = false;
    world.tell(Event::Lost { peer: name(0), why: "closed".into() });
    assert_eq!(world.fleet.route(product(0), &[]), None);
    assert!(world.fleet.route(product(11), &[]).is_some(), "others go on serving");
    world.settle(5);
    assert!(world.fleet.serves_all());
    world.workers[0].answers = true;
    world.settle(5);
    assert!(world.fleet.serves_all());
}

#[test]
fn a_layer_moves_before_it_is_given_up() {
    let mut world = World::calm(&[LAYERS, LAYERS], 1, seconds(600));
    (world.workers[0].speed, world.workers[1].speed) = (10.0, 1.0);
    for _ in 0..140 {
        world.settle(1);
        assert!(world.fleet.serves_all(), "{:?}", world.fleet.records());
    }
    assert!(world.shares()[&name(0)] >= 10, "the faster has more: {:?}", world.shares());
}

#[test]
fn the_second_lie_bans_and_a_false_product_of_a_mask_at_once() {
    for failure in [Failure::Garbled, Failure::BodyRefuted] {
        let mut world = World::calm(&[LAYERS, LAYERS], 2, seconds(600));
        let liar = world.fleet.route(product(3), &[]).cloned().unwrap();
        let lie = || Event::Failed { peer: liar.clone(), layer: 3, failure, why: "wrong".into() };
        world.tell(lie());
        assert!(world.banned.is_empty());
        world.settle(10);
        world.tell(lie());
        assert_eq!(world.banned, std::slice::from_ref(&liar));
        world.settle(3);
        assert!(world.fleet.serves_all());
        world.join(world.number(&liar));
        world.settle(3);
        assert_eq!(world.shares()[&liar], 0);
    }
    let mut world = World::calm(&[LAYERS, LAYERS], 1, seconds(600));
    let liar = world.fleet.route(product(3), &[]).cloned().unwrap();
    world.tell(Event::Failed { peer: liar.clone(), layer: 3, failure: Failure::MaskRefuted, why: "wrong".into() });
    assert_eq!(world.banned, [liar]);
}

#[test]
fn lies_far_apart_are_forgiven() {
    let mut world = World::calm(&[LAYERS], 1, seconds(600));
    let lie = || Event::Failed { peer: name(0), layer: 3, failure: Failure::Garbled, why: "wrong".into() };
    world.tell(lie());
    world.settle(30);
    world.tell(lie());
    assert!(world.banned.is_empty());
}

#[test]
fn products_that_fail_of_one_cause_count_once() {
    let mut world = World::calm(&[LAYERS], 1, seconds(600));
    for _ in 0..8 {
        world.tell(Event::Failed { peer: name(0), layer: 1, failure: Failure::Away, why: "cut".into() });
    }
    assert!(world.fleet.serves_all());
    for _ in 0..2 {
        world.wait(seconds(1));
        world.answer(0);
        world.tell(Event::Failed { peer: name(0), layer: 1, failure: Failure::Away, why: "cut".into() });
    }
    assert!(!world.fleet.serves_all(), "it answers, and no product comes back: it rests");
    world.settle(20);
    assert!(world.fleet.serves_all(), "and is tried again");
}

#[test]
fn a_worker_that_says_that_it_serves_and_does_not_rests() {
    let mut world = World::calm(&[LAYERS, LAYERS], 1, seconds(600));
    let liar = world.fleet.route(product(1), &[]).cloned().unwrap();
    for _ in 0..3 {
        assert_eq!(world.fleet.route(product(1), &[]), Some(&liar), "it says that it has loaded all");
        let (layer, failure) = (1, Failure::NotServing);
        world.tell(Event::Failed { peer: liar.clone(), layer, failure, why: "not mine".into() });
        world.wait(seconds(1));
        world.answer(world.number(&liar));
    }
    world.settle(2);
    assert_ne!(world.fleet.route(product(1), &[]), Some(&liar));
}

#[test]
fn a_worker_that_never_loads_is_given_up() {
    let mut world = World::new(&[LAYERS, LAYERS], 1, seconds(600));
    world.join(0);
    world.tell(Event::Begin);
    for _ in 0..130 {
        world.answer(0);
        world.wait(seconds(1));
    }
    assert!(world.said.iter().any(|said| said.contains("loads its layers, and does not")), "{:?}", world.said);
    world.join(1);
    world.settle(3);
    assert!(world.fleet.serves_all());
}

#[test]
fn a_newcomer_is_planned_in_where_that_helps_and_else_is_a_spare() {
    let mut world = World::new(&[LAYERS; PEERS], 1, seconds(600));
    world.join(0);
    world.tell(Event::Begin);
    world.settle(3);
    world.join(1);
    world.settle(3);
    assert!((4..=6).contains(&world.shares()[&name(1)]), "{:?}", world.shares());
    (2..PEERS).for_each(|peer| world.join(peer));
    world.settle(3);
    let moves = world.moves;
    world.settle(200);
    assert_eq!(world.moves, moves);
}

#[test]
fn a_worker_that_is_outrun_again_and_again_is_no_longer_asked_first() {
    let mut world = World::calm(&[LAYERS, LAYERS], 2, seconds(600));
    let took = |seconds| Measured { product: product(3), macs: 1.0, seconds };
    for _ in 0..100 {
        world.tell(Event::Done { peer: name(0), measured: took(0.5) });
        world.tell(Event::Done { peer: name(1), measured: took(1.0) });
    }
    for (waited, first) in [(0.1, 0), (10.0, 1)] {
        // Who was not waited for longer than a moment may be as fast as ever.
        (0..100).for_each(|_| world.tell(Event::Dropped { peer: name(0), waited: took(waited) }));
        assert_eq!(world.fleet.route(product(3), &[]), Some(&name(first)));
    }
}
