//! The name of a model: a hash of its weights and of all else that changes the matrices that workers serve.

use super::family::{Family, Rope};
use super::{Model, ModelError};
use crate::ids::ModelDigest;
use crate::quant::int8::QUANTISER_VERSION;
use crate::quant::rotation::ROTATION_KEY;

/// The way from stored weights to served integers; the quantiser's version and the rotation's key are hashed with it, so
/// that peers which disagree about a served byte never meet.
const SERVED_MATRICES: &str = "velum matrices: signed block-Hadamard both sides, int8 per output channel";

/// Hashes a model: BLAKE3 over length-prefixed fields, tensors in the order of their names.
pub(super) fn of(model: &Model) -> Result<ModelDigest, ModelError> {
    let mut hasher = blake3::Hasher::new_derive_key("velum model digest 1");
    field(&mut hasher, SERVED_MATRICES.as_bytes());
    number(&mut hasher, QUANTISER_VERSION as usize);
    field(&mut hasher, &ROTATION_KEY);
    field(&mut hasher, model.weights.format().as_bytes());
    let config = &model.config;
    for count in [
        config.hidden_size,
        config.intermediate_size,
        config.layers,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.vocabulary,
        usize::from(config.tie_word_embeddings),
    ] {
        number(&mut hasher, count);
    }
    for constant in [config.rms_norm_eps, config.rope.theta] {
        field(&mut hasher, &constant.to_bits().to_le_bytes());
    }
    scaling(&mut hasher, &config.rope);
    // What a plain Llama has not: so its name does not change when another family has something new.
    if config.family != Family::LLAMA {
        field(&mut hasher, config.family.model_type.as_bytes());
    }
    if config.rope.features != config.head_dim {
        numbers(&mut hasher, "rotary features", &[config.rope.features as f64]);
    }
    config.traits.in_numbers().iter().for_each(|(name, values)| numbers(&mut hasher, name, values));
    let mut expected = super::expected(config);
    expected.sort_unstable();
    for (name, shape) in expected {
        let stored = model.checked(&name, &shape)?;
        field(&mut hasher, name.as_bytes());
        field(&mut hasher, format!("{:?}", stored.format).as_bytes());
        number(&mut hasher, shape.len());
        shape.iter().for_each(|&side| number(&mut hasher, side));
        number(&mut hasher, stored.bytes.len());
        hasher.update_rayon(stored.bytes);
        if let Some(scales) = &stored.scales {
            hasher.update(bytemuck::cast_slice(&scales.values));
        }
        stored.check_floats()?;
        stored.release();
    }
    Ok(ModelDigest(*hasher.finalize().as_bytes()))
}

fn scaling(hasher: &mut blake3::Hasher, rope: &Rope) {
    let (kind, values) = rope.scaling_in_numbers();
    numbers(hasher, kind, &values);
}

fn numbers(hasher: &mut blake3::Hasher, name: &str, values: &[f64]) {
    field(hasher, name.as_bytes());
    number(hasher, values.len());
    values.iter().for_each(|value| field(hasher, &value.to_bits().to_le_bytes()));
}

fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    number(hasher, bytes.len());
    hasher.update(bytes);
}

fn number(hasher: &mut blake3::Hasher, value: usize) {
    hasher.update(&(value as u64).to_le_bytes());
}
