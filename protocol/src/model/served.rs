//! What is served of a model: its layers, and its head, if an owner wants that too.
//!
//! The head, `hidden × vocabulary`, is by far the largest matrix of a small model and wider than a product may be, so
//! it is cut along the vocabulary into slices about as large as a layer. Whoever deals with layers (who holds which, how
//! many fit) counts a slice as one more layer, after the last one: nothing else has to know of it. All slices are equally
//! wide; what goes beyond the vocabulary in the last one is zeros.

use std::ops::Range;

use super::config::LlamaConfig;
use crate::ids::{Group, LinearId, LinearShape};

/// Columns of a slice are a multiple of this: the rotation mixes as many features as the largest power of two that
/// divides a matrix' width, and gradients of logits are mostly concentrated in one of them.
const STEP: usize = 1024;
/// The same where the vocabulary is smaller than that.
const SMALL_STEP: usize = 64;
/// Most columns of a slice, before they are rounded up. An owner holds some sixteen bytes for each logit of a slice in flight:
/// a quarter of a gigabyte for a block of tokens; narrower slices would encrypt the same hidden states more often.
const MOST: usize = 16_384;

impl LlamaConfig {
    /// Columns of the slices that the head is cut into.
    pub(super) fn head_width(&self) -> usize {
        let step = if self.vocabulary < STEP { SMALL_STEP } else { STEP };
        let of_layer: usize = Group::ALL.into_iter().map(|group| self.shape(group)).map(|s| s.d_in * s.d_out).sum();
        let most = (of_layer / self.hidden_size.max(1)).clamp(step, MOST);
        let least_slices = self.vocabulary.div_ceil(most);
        let width = |slices: usize| self.vocabulary.div_ceil(slices).next_multiple_of(step);
        // Of some numbers of slices the one with the fewest zeros.
        let zeros = |width: usize| self.vocabulary.next_multiple_of(width) - self.vocabulary;
        let widths = (least_slices..least_slices + 4).map(width);
        widths.min_by_key(|&width| zeros(width)).unwrap_or(step)
    }

    /// Slices of the head.
    pub fn head_slices(&self) -> usize {
        self.vocabulary.div_ceil(self.head_width())
    }

    /// The part of the vocabulary that a slice of the head, counted from 0, has logits of.
    pub fn head_entries(&self, slice: usize) -> Range<usize> {
        let width = self.head_width();
        (slice * width).min(self.vocabulary)..((slice + 1) * width).min(self.vocabulary)
    }

    /// The matrix of a slice of the head, counted from 0.
    pub fn head_linear(&self, slice: usize) -> LinearId {
        // At most 1,024 layers and 2,048 slices.
        LinearId { layer: (self.layers + slice) as u16, group: Group::Head }
    }

    /// Layers that can be served: the transformer's, then the slices of the head.
    pub fn served_layers(&self) -> usize {
        self.layers + self.head_slices()
    }

    /// The matrices of a served layer: none, where there is no such layer.
    pub fn groups_of(&self, layer: u16) -> &'static [Group] {
        match usize::from(layer) {
            layer if layer < self.layers => &Group::ALL,
            layer if layer < self.served_layers() => &[Group::Head],
            _ => &[],
        }
    }

    /// Whether the model has such a matrix.
    pub fn has(&self, linear: LinearId) -> bool {
        self.groups_of(linear.layer).contains(&linear.group)
    }

    /// Some served layers in words: `layers 15 to 29 and slices 1 to 8 of the head`.
    pub fn in_words(&self, served: &Range<u16>) -> String {
        let (start, end) = (usize::from(served.start), usize::from(served.end));
        let run = |one: &str, many: &str, range: Range<usize>| match range.len() {
            0 => None,
            1 => Some(format!("{one} {}", range.start)),
            _ => Some(format!("{many} {} to {}", range.start, range.end - 1)),
        };
        let layers = run("layer", "layers", start.min(self.layers)..end.min(self.layers));
        // Slices are counted from 1, as people count.
        let slice = |layer: usize| layer.max(self.layers) - self.layers + 1;
        let slices = slice(start)..slice(end);
        let slices = if slices.len() == self.head_slices() {
            Some("the head".to_owned())
        } else {
            run("slice", "slices", slices).map(|slices| format!("{slices} of {} of the head", self.head_slices()))
        };
        match (layers, slices) {
            (Some(layers), Some(slices)) => format!("{layers} and {slices}"),
            (Some(part), None) | (None, Some(part)) => part,
            (None, None) => "no layers".to_owned(),
        }
    }

    /// Dimensions of a slice of the head.
    pub(super) fn head_shape(&self) -> LinearShape {
        LinearShape { d_in: self.hidden_size, d_out: self.head_width() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::super::config::MAX_FEATURES;
    use super::super::synthetic::SyntheticLlama;
    use super::*;

    fn config(hidden: usize, intermediate: usize, vocabulary: usize) -> LlamaConfig {
        let mut config = SyntheticLlama::tiny(1).config;
        (config.hidden_size, config.intermediate_size, config.vocabulary) = (hidden, intermediate, vocabulary);
        config
    }

    proptest! {
        #[test]
        fn slices_cover_the_vocabulary_once_and_are_narrow_enough(
            hidden in 8_usize..16_384,
            intermediate in 8_usize..60_000,
            vocabulary in 1_usize..(1 << 21),
        ) {
            let config = config(hidden, intermediate, vocabulary);
            let width = config.head_width();
            prop_assert!(width <= MAX_FEATURES && width.is_multiple_of(SMALL_STEP));
            let mut next = 0;
            for slice in 0..config.head_slices() {
                let entries = config.head_entries(slice);
                prop_assert_eq!(entries.start, next);
                prop_assert!(!entries.is_empty() && entries.len() <= width);
                next = entries.end;
                let linear = config.head_linear(slice);
                prop_assert!(config.has(linear));
                let other = LinearId { group: Group::O, ..linear };
                prop_assert!(!config.has(other));
            }
            prop_assert_eq!(next, vocabulary);
            prop_assert!(config.groups_of(config.served_layers() as u16).is_empty());
            let misplaced = LinearId { layer: 0, group: Group::Head };
            prop_assert!(!config.has(misplaced));
        }
    }

    #[test]
    fn a_slice_is_no_larger_than_a_layer() {
        let mut smollm = config(576, 1536, 49_152);
        (smollm.heads, smollm.kv_heads, smollm.head_dim, smollm.layers) = (9, 3, 64, 30);
        assert_eq!((smollm.head_slices(), smollm.head_width()), (8, 6144));
        let mut llama = config(2048, 8192, 128_256);
        (llama.heads, llama.kv_heads, llama.head_dim, llama.layers) = (32, 8, 64, 16);
        assert_eq!((llama.head_slices(), llama.head_width()), (9, 14_336));
    }

    #[test]
    fn served_layers_are_told_in_words() {
        let mut config = config(576, 1536, 49_152);
        (config.heads, config.kv_heads, config.head_dim, config.layers) = (9, 3, 64, 30);
        assert_eq!(config.in_words(&(0..15)), "layers 0 to 14");
        assert_eq!(config.in_words(&(29..38)), "layer 29 and the head");
        assert_eq!(config.in_words(&(20..33)), "layers 20 to 29 and slices 1 to 3 of 8 of the head");
        assert_eq!(config.in_words(&(33..38)), "slices 4 to 8 of 8 of the head");
        assert_eq!(config.in_words(&(37..38)), "slice 8 of 8 of the head");
        assert_eq!(config.in_words(&(0..0)), "no layers");
    }
}
