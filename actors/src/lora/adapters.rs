//! The trained parameters: one pair of tensors for each fused group that has an adapter.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use protocol::ids::{Group, LinearId};
use protocol::model::LlamaConfig;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::{LoraConfig, Projection};

/// Where one projection's adapter lies in its group's tensors and in the group's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which projection.
    pub projection: Projection,
    /// Its first output feature within the fused group.
    pub offset: usize,
    /// Its output features.
    pub d_out: usize,
    /// Output features of the slots before it: its part of `B` begins at `column · rank`.
    pub column: usize,
}

/// The adapters of one fused group.
pub struct GroupAdapter {
    /// Which projections, in the order of the group.
    pub slots: Arc<[Slot]>,
    /// Down projections, one below the other: `slots·rank × d_in`.
    pub a: Var,
    /// Up projections one after the other, each `d_out × rank` row-major, as one vector.
    pub b: Var,
}

/// The adapters of a model.
pub struct LoraAdapters {
    config: LoraConfig,
    groups: BTreeMap<LinearId, GroupAdapter>,
}

impl LoraAdapters {
    /// New adapters that change nothing yet: `A` uniform in `±1/√d_in` as PEFT draws it (Kaiming with `a = √5`), `B` zero.
    ///
    /// # Errors
    /// When the model has not the layers that are to be adapted, and when candle cannot make the tensors.
    pub fn new(model: &LlamaConfig, config: &LoraConfig, seed: u64) -> Result<Self> {
        let adapted = config.layers.of(model.layers).map_err(candle_core::Error::wrap)?;
        let modules = config.modules_of(model).map_err(candle_core::Error::wrap)?;
        let groups = model.linears().filter(|linear| adapted.contains(&linear.layer)).map(|linear| {
            let slots = slots(model, &modules, linear.group);
            if slots.is_empty() {
                return Ok(None);
            }
            let d_in = model.shape(linear.group).d_in;
            let bound = (d_in as f32).sqrt().recip();
            let mut a = Vec::with_capacity(slots.len() * config.rank * d_in);
            for slot in &slots {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(u64::from(linear.layer) << 8 | slot.projection as u64);
                a.extend((0..config.rank * d_in).map(|_| random.random_range(-bound..bound)));
            }
            let b: usize = slots.iter().map(|slot| slot.d_out * config.rank).sum();
            let adapter = GroupAdapter {
                a: Var::from_vec(a, (slots.len() * config.rank, d_in), &Device::Cpu)?,
                b: Var::from_vec(vec![0f32; b], b, &Device::Cpu)?,
                slots: slots.into(),
            };
            Ok(Some((linear, adapter)))
        });
        let groups = groups.filter_map(Result::transpose).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), groups })
    }

    /// What they look like.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The adapters of a fused group, if it has any.
    pub fn group(&self, linear: LinearId) -> Option<&GroupAdapter> {
        self.groups.get(&linear)
    }

    /// The adapted group that a forward pass meets first, if any is adapted.
    pub(crate) fn lowest(&self) -> Option<LinearId> {
        self.groups.keys().next().copied()
    }

    /// The layers that have adapters, in their order.
    pub(crate) fn layers(&self) -> Vec<u16> {
        let mut layers: Vec<u16> = self.groups.keys().map(|linear| linear.layer).collect();
        layers.dedup();
        layers
    }

    /// The projections that have adapters, those that the configuration names first, in its order.
    pub(crate) fn modules(&self) -> Vec<Projection> {
        let slots = self.groups.values().flat_map(|group| group.slots.iter());
        let mut modules: Vec<Projection> = slots.map(|slot| slot.projection).collect();
        modules.sort_unstable();
        modules.dedup();
        let named = &self.config.target_modules;
        modules.sort_by_key(|module| named.iter().position(|name| name == module).unwrap_or(named.len()));
        modules
    }

    /// Every adapted group in the order of [`Self::parameters`].
    pub(crate) fn groups(&self) -> impl Iterator<Item = (LinearId, &GroupAdapter)> {
        self.groups.iter().map(|(&linear, group)| (linear, group))
    }

    /// Every trained tensor, always in the same order.
    pub fn parameters(&self) -> Vec<Var> {
        self.groups.values().flat_map(|group| [group.a.clone(), group.b.clone()]).collect()
    }

    /// Number of trained values.
    pub fn values(&self) -> usize {
        self.groups.values().map(|group| group.a.elem_count() + group.b.elem_count()).sum()
    }

    /// Visits every projection's pair: layer, projection, `A` (`rank × d_in`) and `B` (`d_out × rank`).
    ///
    /// # Errors
    /// What `visit` returns, and when candle cannot read the tensors.
    pub fn for_each<E: From<candle_core::Error>>(
        &self,
        mut visit: impl FnMut(u16, Projection, &Tensor, &Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        for (linear, group) in &self.groups {
            for (index, slot) in group.slots.iter().enumerate() {
                let rank = self.config.rank;
                let a = group.a.narrow(0, index * rank, rank)?;
                let b = group.b.narrow(0, slot.column * rank, slot.d_out * rank)?.reshape((slot.d_out, rank))?;
                visit(linear.layer, slot.projection, &a.detach(), &b.detach())?;
            }
        }
        Ok(())
    }

    /// Replaces every projection's pair by what `read` returns for it, in the shapes of [`Self::for_each`].
    ///
    /// # Errors
    /// What `read` returns, and when a shape is another. Nothing is replaced then.
    pub fn replace<E: From<candle_core::Error>>(
        &self,
        mut read: impl FnMut(u16, Projection) -> std::result::Result<(Tensor, Tensor), E>,
    ) -> std::result::Result<(), E> {
        let mut replacements = Vec::with_capacity(self.groups.len());
        for (linear, group) in &self.groups {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for slot in group.slots.iter() {
                let (down, up) = read(linear.layer, slot.projection)?;
                a.push(down);
                b.push(up.flatten_all()?);
            }
            let (a, b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b, 0)?);
            if a.shape() != group.a.shape() || b.shape() != group.b.shape() {
                let why = format!("the adapter of {linear} is {:?} and {:?}", a.shape(), b.shape());
                return Err(candle_core::Error::Msg(why).bt().into());
            }
            replacements.push((group, a, b));
        }
        for (group, a, b) in replacements {
            group.a.set(&a)?;
            group.b.set(&b)?;
        }
        Ok(())
    }
}

/// The adapted projections of a group and where their outputs lie.
fn slots(model: &LlamaConfig, modules: &[Projection], group: Group) -> Vec<Slot> {
    let (mut offset, mut column) = (0, 0);
    let mut slots = Vec::new();
    for &projection in model.projections(group) {
        let d_out = projection.shape(model).d_out;
        if modules.contains(&projection) {
            slots.push(Slot { projection, offset, d_out, column });
            column += d_out;
        }
        offset += d_out;
    }
    slots
}
