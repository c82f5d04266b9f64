//! The trained parameters: one pair of tensors for each fused group that has an adapter.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use protocol::ids::LinearId;
use protocol::model::{LlamaConfig, Norm};
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::config::Size;
use super::norms::{Depth, SavedNorm, SavedNorms};
use super::{Initialisation, LoraConfig, Projection, TokenRows};

/// Where one projection's adapter lies in its group's tensors and in the group's output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// Which projection.
    pub projection: Projection,
    /// Its first output feature within the fused group.
    pub offset: usize,
    /// Its output features.
    pub d_out: usize,
    /// Inner dimension of its adapter.
    pub rank: usize,
    /// Factor of its adapter's output.
    pub scaling: f32,
    /// The first of its rows of `A`, which are as many as the rank.
    pub row: usize,
    /// Where its part of `B` begins, which has `d_out·rank` values.
    pub up: usize,
}

/// The adapters of one fused group.
pub struct GroupAdapter {
    /// Which projections, in the order of the group.
    pub slots: Arc<[Slot]>,
    /// Down projections, one below the other: as many rows as the ranks together, `× d_in`.
    pub a: Var,
    /// Up projections one after the other, each `d_out × rank` row-major, as one vector.
    pub b: Var,
}

impl GroupAdapter {
    /// Whether another one has the same projections and ranks.
    fn alike(&self, other: &Self) -> bool {
        let place = |slot: &Slot| (slot.projection, slot.rank);
        self.slots.iter().map(place).eq(other.slots.iter().map(place))
    }
}

/// The adapters of a model.
pub struct LoraAdapters {
    config: LoraConfig,
    groups: BTreeMap<LinearId, GroupAdapter>,
    norms: SavedNorms,
    tokens: Option<TokenRows>,
    of_larger: bool,
}

/// How a parameter learns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learning {
    /// Its learning rate as a multiple of the run's.
    pub rate: f64,
    /// Whether weight decay takes from it.
    pub decays: bool,
}

impl LoraAdapters {
    /// New adapters that change nothing yet: `A` uniform in `±1/√d_in` as PEFT draws it (Kaiming with `a = √5`), or normal,
    /// `B` zero.
    ///
    /// # Errors
    /// When the model has not the layers that are to be adapted, and when candle cannot make the tensors.
    pub fn new(model: &LlamaConfig, config: &LoraConfig, seed: u64) -> Result<Self> {
        let sizes = config.sizes(model).map_err(candle_core::Error::wrap)?;
        let groups = model.linears().map(|linear| {
            let slots = slots(model, &sizes, linear);
            if slots.is_empty() {
                return Ok(None);
            }
            let d_in = model.shape(linear.group).d_in;
            let bound = (d_in as f32).sqrt().recip();
            let rows: usize = slots.iter().map(|slot| slot.rank).sum();
            let mut a = Vec::with_capacity(rows * d_in);
            for slot in &slots {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(u64::from(linear.layer) << 8 | slot.projection as u64);
                let mut draw = || match config.init_lora_weights {
                    Initialisation::Uniform => random.random_range(-bound..bound),
                    Initialisation::Gaussian => normal(&mut random) / slot.rank as f32,
                };
                a.extend((0..slot.rank * d_in).map(|_| draw()));
            }
            let b: usize = slots.iter().map(|slot| slot.d_out * slot.rank).sum();
            let adapter = GroupAdapter {
                a: Var::from_vec(a, (rows, d_in), &Device::Cpu)?,
                b: Var::from_vec(vec![0f32; b], b, &Device::Cpu)?,
                slots: slots.into(),
            };
            Ok(Some((linear, adapter)))
        });
        let groups = groups.filter_map(Result::transpose).collect::<Result<_>>()?;
        let norms = config.saved_norms(model).map_err(candle_core::Error::wrap)?;
        let norms = SavedNorms::new(norms, model)?;
        let tokens = config.tokens(model).map_err(candle_core::Error::wrap)?;
        let tokens = TokenRows::new(tokens, model)?;
        Ok(Self { config: config.clone(), groups, norms, tokens, of_larger: model.traits.of_larger })
    }

    /// What they look like.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Whether their model is the part of a larger one that reads text.
    pub(crate) fn of_larger(&self) -> bool {
        self.of_larger
    }

    /// The adapters of a fused group, if it has any.
    pub fn group(&self, linear: LinearId) -> Option<&GroupAdapter> {
        self.groups.get(&linear)
    }

    /// How far down something is trained, if anything is.
    pub(crate) fn depth(&self) -> Option<Depth> {
        let group = self.groups.keys().next().map(|&linear| Depth::of_group(linear));
        let norms = self.norms.iter().filter_map(|saved| Depth::of_norm(saved.norm));
        let tokens = self.tokens.as_ref().map(|_| Depth::EMBEDDINGS);
        group.into_iter().chain(norms).chain(tokens).reduce(Depth::lower)
    }

    /// The norms that are trained.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &SavedNorm> {
        self.norms.iter()
    }

    /// Replaces the factors of each trained norm by those that `read` returns for it and its module: first by those of the model.
    ///
    /// # Errors
    /// What `read` returns, and when they are of another number.
    pub fn set_norms<E: From<candle_core::Error>>(
        &self,
        read: impl FnMut(Norm, &str) -> std::result::Result<Vec<f32>, E>,
    ) -> std::result::Result<(), E> {
        self.norms.set(read)
    }

    /// The embeddings that are trained, if any are.
    pub(crate) fn token_rows(&self) -> Option<&TokenRows> {
        self.tokens.as_ref()
    }

    /// Replaces the trained embeddings by those that `read` returns for their tokens, `tokens × hidden_size`: first by those of
    /// the model.
    ///
    /// # Errors
    /// What `read` returns, and when they are of another number.
    pub fn set_tokens<E: From<candle_core::Error>>(
        &self,
        read: impl FnOnce(&[u32]) -> std::result::Result<Vec<f32>, E>,
    ) -> std::result::Result<(), E> {
        self.tokens.as_ref().map_or(Ok(()), |tokens| tokens.set(read))
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
        let groups = self.groups.values().flat_map(|group| [group.a.clone(), group.b.clone()]);
        let groups = groups.chain(self.norms.iter().map(|saved| saved.factors.clone()));
        groups.chain(self.tokens.iter().map(|tokens| tokens.rows.clone())).collect()
    }

    /// How each of [`Self::parameters`] learns. As with transformers' trainer, weight decay spares norms alone.
    pub fn learning(&self) -> Vec<Learning> {
        let rates = self.groups.values().flat_map(|_| [1.0, self.config.lora_plus_ratio]);
        let adapters = rates.map(|rate| Learning { rate, decays: true });
        let norms = self.norms.iter().map(|_| Learning { rate: 1.0, decays: false });
        adapters.chain(norms).chain(self.tokens.iter().map(|_| Learning { rate: 1.0, decays: true })).collect()
    }

    /// Number of trained values.
    pub fn values(&self) -> usize {
        self.parameters().iter().map(|var| var.elem_count()).sum()
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
            for slot in group.slots.iter() {
                let rank = slot.rank;
                let a = group.a.narrow(0, slot.row, rank)?;
                let b = group.b.narrow(0, slot.up, slot.d_out * rank)?.reshape((slot.d_out, rank))?;
                visit(linear.layer, slot.projection, &a.detach(), &b.detach())?;
            }
        }
        Ok(())
    }

    /// Names their values, whatever they are used for.
    ///
    /// # Errors
    /// When candle cannot read the tensors.
    pub fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new_derive_key("velum adapters 1");
        for var in self.parameters() {
            let values = var.flatten_all()?.to_vec1::<f32>()?;
            hasher.update(&(values.len() as u64).to_le_bytes());
            for value in values {
                hasher.update(&value.to_le_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Takes over the values of other adapters.
    ///
    /// # Errors
    /// When they are of other modules, ranks or tokens.
    pub fn set(&self, other: &Self) -> Result<()> {
        let pairs = || self.groups.iter().zip(&other.groups);
        let same = pairs().all(|((linear, group), (other, of_other))| linear == other && group.alike(of_other));
        let norms = self.norms.iter().map(|saved| saved.norm).eq(other.norms.iter().map(|saved| saved.norm));
        let tokens = |adapters: &Self| adapters.tokens.as_ref().map(|tokens| tokens.tokens.clone());
        if !(same && norms) || self.groups.len() != other.groups.len() || tokens(self) != tokens(other) {
            return Err(candle_core::Error::Msg("the adapters are of other modules, ranks or tokens".into()).bt());
        }
        for ((_, group), (_, other)) in pairs() {
            group.a.set(&other.a.copy()?)?;
            group.b.set(&other.b.copy()?)?;
        }
        for (saved, other) in self.norms.iter().zip(other.norms.iter()) {
            saved.factors.set(&other.factors.copy()?)?;
        }
        for (tokens, other) in self.tokens.iter().zip(&other.tokens) {
            tokens.rows.set(&other.rows.copy()?)?;
        }
        Ok(())
    }

    /// Replaces every projection's pair by what `read` returns for it, in the shapes of [`Self::for_each`].
    ///
    /// # Errors
    /// What `read` returns, and when a shape is another. Nothing is replaced then.
    pub fn replace<E: From<candle_core::Error>>(
        &self,
        mut read: impl FnMut(u16, &Slot) -> std::result::Result<(Tensor, Tensor), E>,
    ) -> std::result::Result<(), E> {
        let mut replacements = Vec::with_capacity(self.groups.len());
        for (linear, group) in &self.groups {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for slot in group.slots.iter() {
                let (down, up) = read(linear.layer, slot)?;
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
fn slots(model: &LlamaConfig, sizes: &BTreeMap<(u16, Projection), Size>, linear: LinearId) -> Vec<Slot> {
    let (mut offset, mut row, mut up) = (0, 0, 0);
    let mut slots = Vec::new();
    for &projection in model.projections(linear.group) {
        let d_out = projection.shape(model).d_out;
        if let Some(&Size { rank, scaling }) = sizes.get(&(linear.layer, projection)) {
            slots.push(Slot { projection, offset, d_out, rank, scaling, row, up });
            row += rank;
            up += d_out * rank;
        }
        offset += d_out;
    }
    slots
}

/// A normal number of mean 0 and variance 1 (Box and Muller).
fn normal(random: &mut ChaCha8Rng) -> f32 {
    // More than 0, so that its logarithm is finite.
    let (radius, angle) = (1.0 - random.random::<f64>(), random.random::<f64>());
    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::ids::Group;

    use super::*;
    use crate::testing::TinyModel;

    #[test]
    fn gaussian_adapters_spread_by_their_rank_and_change_nothing() {
        let tiny = TinyModel::new();
        let config = LoraConfig { rank: 4, init_lora_weights: Initialisation::Gaussian, ..LoraConfig::default() };
        let adapters = LoraAdapters::new(tiny.config(), &config, 1).unwrap();
        let (mut sum, mut count) = (0.0, 0.0);
        adapters
            .for_each(|_, _, a, b| {
                let values = a.flatten_all()?.to_vec1::<f32>()?;
                sum += values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                count += values.len() as f64;
                assert_eq!(b.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
                Ok::<_, candle_core::Error>(())
            })
            .unwrap();
        let deviation = (sum / count).sqrt();
        assert!((deviation * 4.0 - 1.0).abs() < 0.05, "{deviation}");
    }

    #[test]
    fn patterns_give_modules_their_own_rank_and_factor() {
        let tiny = TinyModel::new();
        let config: LoraConfig = serde_json::from_str(
            r#"{"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 9}, "alpha_pattern": {"layers.1.*": 27.0}}"#,
        )
        .unwrap();
        let adapters = LoraAdapters::new(tiny.config(), &config, 1).unwrap();
        assert_eq!(adapters.values(), config.values(tiny.config()).unwrap());
        let mut seen = Vec::new();
        adapters
            .for_each(|layer, projection, a, b| {
                assert_eq!(a.dim(0)?, b.dim(1)?);
                let group = Group::Qkv;
                let linear = LinearId { layer, group };
                let slot = adapters.group(linear).unwrap().slots.iter().find(|slot| slot.projection == projection);
                seen.push((layer, projection, a.dim(0)?, slot.map(|slot| slot.scaling)));
                Ok::<_, candle_core::Error>(())
            })
            .unwrap();
        assert_eq!(
            seen,
            [
                (0, Projection::Q, 4, Some(2.0)),
                (0, Projection::V, 2, Some(4.0)),
                (0, Projection::Down, 4, None),
                (1, Projection::Q, 4, Some(27.0 / 4.0)),
                (1, Projection::V, 2, Some(27.0 / 2.0)),
                (1, Projection::Down, 9, None),
            ]
        );
        let rs = LoraConfig { use_rslora: true, ..config.clone() };
        let size = rs.sizes(tiny.config()).unwrap()[&(1, Projection::Down)];
        assert_eq!(size, Size { rank: 9, scaling: 9.0 });
        let idle = LoraConfig { rank_pattern: [("k_proj".to_owned(), 3)].into_iter().collect(), ..config };
        let error = idle.values(tiny.config()).unwrap_err().to_string();
        assert!(error.contains("lora.rank_pattern has `k_proj`, which names no adapted projection"), "{error}");
    }
}
