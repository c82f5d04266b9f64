//! Logits of a few hidden states: the whole vocabulary's, since one of its entries is to be chosen.
//!
//! Whoever writes a text multiplies by the head once a token, so that an owner whose workers do not serve it holds it in
//! memory: as it is in the file where numbers are bf16, else in f32. Reading it is most of what a token costs, so that it is
//! read once for all rows. A row's logits do not depend on the rows beside it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{iter, thread};

use protocol::buffer::Buffer;
use protocol::model::Model;
use protocol::parts::Part;
use rayon::prelude::*;

use super::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use super::ops::FEW;
use super::products::whole_product;
use super::token_rows::Rows;
use super::vector::{dots_bf16, dots_f32, soft_cap};
use super::{Llama, LlamaError};
use crate::backend::BackendError;
use crate::lora::LoraAdapters;

/// Entries of the vocabulary of a task.
const TASK: usize = 1024;
/// Entries whose part of the head stays in the cache while it meets every row.
const BLOCK: usize = 32;
/// Slices of a served head that are in flight at once.
const IN_FLIGHT: usize = 8;

/// The head, for whoever writes texts.
pub struct Logits {
    held: Held,
    features: usize,
    vocabulary: usize,
    cap: Option<f32>,
}

enum Held {
    /// By workers.
    Served,
    Bf16(Vec<u16>),
    F32(Vec<f32>),
}

impl Logits {
    /// Reads the head, unless the model's backend serves it.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub fn new(llama: &Llama) -> Result<Self, LlamaError> {
        let config = llama.config();
        let held = if llama.backend.serves_head() { Held::Served } else { Held::read(&llama.model)? };
        let cap = config.traits.logit_cap.map(|cap| cap as f32);
        Ok(Self { held, features: config.hidden_size, vocabulary: config.vocabulary, cap })
    }

    /// Bytes of the head that are held in memory.
    pub fn bytes(&self) -> u64 {
        match &self.held {
            Held::Served => 0,
            Held::Bf16(values) => 2 * values.len() as u64,
            Held::F32(values) => 4 * values.len() as u64,
        }
    }

    /// From hidden states, `rows × hidden_size`, to logits, `rows × vocabulary`. `beside` are the adapters, each with the rows
    /// that it is beside.
    ///
    /// # Errors
    /// When the head is served and a product fails.
    pub fn of(
        &self,
        llama: &Llama,
        states: Buffer,
        beside: &[(Range<usize>, &LoraAdapters)],
    ) -> Result<Buffer, LlamaError> {
        let rows = states.len() / self.features;
        let mut logits = Buffer::scratch(rows * self.vocabulary);
        // Of a piece of a prompt none may be wanted.
        if rows == 0 {
            return Ok(logits);
        }
        let states = Arc::new(states);
        match &self.held {
            Held::Served => self.served(llama, &states, rows, &mut logits)?,
            held => self.local(held, &states, &mut logits),
        }
        for (rows, adapters) in beside {
            if let Some(trained) = Rows::of_head(adapters, llama.config())? {
                let of = |width: usize| rows.start * width..rows.end * width;
                let (states, logits) = (&states[of(self.features)], &mut logits[of(self.vocabulary)]);
                trained.replace_logits(states, 0..self.vocabulary, logits);
            }
        }
        if let Some(cap) = self.cap {
            logits.par_chunks_mut(self.vocabulary).for_each(|row| soft_cap(row, cap));
        }
        Ok(logits)
    }

    fn local(&self, held: &Held, states: &[f32], logits: &mut [f32]) {
        let mut tasks: Vec<Vec<&mut [f32]>> =
            iter::repeat_with(Vec::new).take(self.vocabulary.div_ceil(TASK)).collect();
        for row in logits.chunks_exact_mut(self.vocabulary) {
            tasks.iter_mut().zip(row.chunks_mut(TASK)).for_each(|(task, part)| task.push(part));
        }
        tasks.into_par_iter().with_max_len(1).enumerate().for_each(|(task, mut parts)| {
            let _part = Part::Own.mark();
            match parts.len() <= FEW {
                true => self.few(held, task * TASK, states, &mut parts),
                false => self.many(held, task * TASK, states, &mut parts),
            }
        });
    }

    /// Logits of the entries from `first` on, row by row.
    fn few(&self, held: &Held, first: usize, states: &[f32], parts: &mut [&mut [f32]]) {
        let entries = parts.first().map_or(0, |part| part.len());
        for begin in (0..entries).step_by(BLOCK) {
            let end = entries.min(begin + BLOCK);
            let of_block = (first + begin) * self.features..(first + end) * self.features;
            for (state, part) in states.chunks_exact(self.features).zip(parts.iter_mut()) {
                match held {
                    Held::Served => {}
                    Held::Bf16(head) => dots_bf16(state, &head[of_block.clone()], &mut part[begin..end]),
                    Held::F32(head) => dots_f32(state, &head[of_block.clone()], &mut part[begin..end]),
                }
            }
        }
    }

    /// The same by matrices.
    fn many(&self, held: &Held, first: usize, states: &[f32], parts: &mut [&mut [f32]]) {
        let (rows, entries) = (parts.len(), parts.first().map_or(0, |part| part.len()));
        let of_task = first * self.features..(first + entries) * self.features;
        let mut copied = Buffer::default();
        let head = match held {
            Held::Served => &[],
            Held::F32(head) => &head[of_task],
            Held::Bf16(head) => {
                copied = Buffer::scratch(of_task.len());
                let from = head[of_task].iter().map(|&bits| f32::from_bits(u32::from(bits) << 16));
                copied.iter_mut().zip(from).for_each(|(to, from)| *to = from);
                &copied[..]
            }
        };
        let mut out = Buffer::scratch(rows * entries);
        let states = Matrix::new(states, rows, self.features);
        let head = Matrix::new(head, entries, self.features).transposed();
        multiply(MatrixMut::new(&mut out, rows, entries), Before::Replaced, 1.0, states, head, Threads::One);
        drop(copied);
        parts.iter_mut().zip(out.chunks_exact(entries)).for_each(|(to, from)| to.copy_from_slice(from));
    }

    fn served(&self, llama: &Llama, states: &Arc<Buffer>, rows: usize, logits: &mut [f32]) -> Result<(), LlamaError> {
        let config = llama.config();
        let (slices, next) = (config.head_slices(), AtomicUsize::new(0));
        let ask = |slice: usize| {
            let linear = config.head_linear(slice);
            let out = whole_product(config, &*llama.backend, linear, states, rows)?;
            Ok((slice, out))
        };
        let work = || {
            let mine = iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&slice| slice < slices));
            // Where one fails, nobody begins another.
            mine.map(ask)
                .collect::<Result<Vec<_>, BackendError>>()
                .inspect_err(|_| next.store(slices, Ordering::Relaxed))
        };
        let found = thread::scope(|scope| {
            let threads: Vec<_> = (0..IN_FLIGHT.min(slices)).map(|_| scope.spawn(work)).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>, BackendError>>()
        })?;
        for (slice, out) in found.into_iter().flatten() {
            let entries = config.head_entries(slice);
            let width = out.len() / rows;
            for (to, from) in logits.chunks_exact_mut(self.vocabulary).zip(out.chunks_exact(width)) {
                to[entries.clone()].copy_from_slice(&from[..entries.len()]);
            }
        }
        Ok(())
    }
}

impl Held {
    /// The head in the smaller format if that changes nothing.
    fn read(model: &Model) -> Result<Self, LlamaError> {
        let (features, vocabulary) = (model.config().hidden_size, model.config().vocabulary);
        let mut narrow = Vec::with_capacity(vocabulary * features);
        let mut block = vec![0.0f32; TASK * features];
        for first in (0..vocabulary).step_by(TASK) {
            let block = &mut block[..TASK.min(vocabulary - first) * features];
            model.head_rows(first, block)?;
            if block.iter().any(|value| value.to_bits() & 0xffff != 0) {
                return Ok(Self::F32(model.head()?));
            }
            narrow.extend(block.iter().map(|value| (value.to_bits() >> 16) as u16));
        }
        Ok(Self::Bf16(narrow))
    }
}
