//! The account of a model that is too large to be run here, from one layer of it.
//!
//! Two models of its width with random weights are measured, of one layer and of two: the difference is what a layer
//! costs, and what the first costs beyond that is the head, the loss and the optimiser. Everything in the account but memory
//! for the products of masks grows with the layers by as much.

use std::path::Path;

use anyhow::{Context as _, ensure};
use protocol::model::synthetic::{KnownModel, StoredAs, SyntheticLlama};

use super::account::Account;
use crate::disk;

/// Layers of the two models that are measured.
pub(super) const MEASURED: [usize; 2] = [1, 2];

/// Writes a model of a published configuration with random weights and so many layers. Blocks.
///
/// # Errors
/// When the disk is too small, or the folder cannot be written.
pub(super) fn write(shape: KnownModel, layers: usize, folder: &Path) -> anyhow::Result<()> {
    let mut llama = SyntheticLlama::known(shape, 0);
    llama.config.layers = layers;
    let free = disk::free_bytes(folder).with_context(|| format!("the disk of {}", folder.display()))?;
    let needed = llama.weight_bytes(StoredAs::Bf16);
    ensure!(free > needed, "{} has {free} bytes free, and the model takes {needed}", folder.display());
    Ok(llama.write_folder(folder.join("model"), StoredAs::Bf16)?)
}

/// The account of so many layers, from those of one and of two. `mask_memory` bytes of the products of masks lie in
/// memory, and none of them did where it was measured.
pub(super) fn project(shape: KnownModel, one: &Account, two: &Account, mask_memory: u64) -> Account {
    let layers = shape.config().layers;
    let more = (layers - MEASURED[0]) as f64;
    let grown = |of: fn(&Account) -> f64| of(one) + more * (of(two) - of(one));
    let outside = |of: fn(&Account) -> f64| of(one) - (of(two) - of(one));
    let bytes = |of: fn(&Account) -> f64| grown(of).max(0.0) as u64;
    let (owner, plain) = (grown(|a| a.owner_cpu_seconds), grown(|a| a.plain_cpu_seconds));
    let of_workers = one.worker_cpu_seconds.zip(two.worker_cpu_seconds);
    Account {
        model: format!("{shape}, projected from {} and {} of its {layers} layers", MEASURED[0], MEASURED[1]),
        tokens_per_step: one.tokens_per_step,
        transport: one.transport,
        account: owner / plain,
        owner_cpu_seconds: owner,
        plain_cpu_seconds: plain,
        owner_parts: one
            .owner_parts
            .zip(two.owner_parts)
            .map(|(one, two)| one.with(&two, |one, two| one + more * (two - one))),
        worker_cpu_seconds: of_workers.map(|(one, two)| one + more * (two - one)),
        bytes_up_per_token: grown(|a| a.bytes_up_per_token),
        bytes_down_per_token: grown(|a| a.bytes_down_per_token),
        owner_peak_rss_bytes: bytes(|a| a.owner_peak_rss_bytes as f64)
            + mask_memory.min(bytes(|a| a.once_bytes_down as f64)),
        plain_peak_rss_bytes: bytes(|a| a.plain_peak_rss_bytes as f64),
        wall_seconds: grown(|a| a.wall_seconds),
        plain_wall_seconds: grown(|a| a.plain_wall_seconds),
        once_owner_cpu_seconds: grown(|a| a.once_owner_cpu_seconds),
        once_bytes_down: bytes(|a| a.once_bytes_down as f64),
        outside_layers: Some([outside(|a| a.owner_cpu_seconds), outside(|a| a.plain_cpu_seconds)]),
        link: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Transport;
    use crate::report::Parts;

    fn account(layers: f64) -> Account {
        Account {
            model: String::new(),
            tokens_per_step: 1024,
            transport: Transport::default(),
            account: 0.0,
            owner_cpu_seconds: 3.0 + layers,
            plain_cpu_seconds: 5.0 + 10.0 * layers,
            owner_parts: Some(Parts { sketch: layers, ..Parts::default() }),
            worker_cpu_seconds: Some(layers),
            bytes_up_per_token: 100.0 + 10.0 * layers,
            bytes_down_per_token: 10.0 * layers,
            owner_peak_rss_bytes: 1000 + 100 * layers as u64,
            plain_peak_rss_bytes: 1000 * layers as u64,
            wall_seconds: layers,
            plain_wall_seconds: layers,
            once_owner_cpu_seconds: layers,
            once_bytes_down: 50 * layers as u64,
            outside_layers: None,
            link: None,
        }
    }

    #[test]
    fn what_a_layer_adds_is_added_for_each() {
        let projected = project(KnownModel::Llama31_8b, &account(1.0), &account(2.0), 500);
        assert_eq!((projected.owner_cpu_seconds, projected.plain_cpu_seconds), (35.0, 325.0));
        assert_eq!(projected.account, 35.0 / 325.0);
        assert_eq!(projected.outside_layers, Some([3.0, 5.0]));
        assert_eq!(projected.owner_parts, Some(Parts { sketch: 32.0, ..Parts::default() }));
        assert_eq!((projected.bytes_up_per_token, projected.once_bytes_down), (420.0, 1600));
        assert_eq!(projected.owner_peak_rss_bytes, 1000 + 3200 + 500);
        assert!(projected.model.contains("32 layers"));
    }
}
