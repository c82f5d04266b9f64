//! A base-model product, asked of the backend each way, with or without the adapters beside it.
//!
//! The adapters of a fused group are part of the same operation: they read the input and write into their slices
//! of the output where both already are, instead of through a dozen tensors a projection.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Error, Layout, Result, Shape, Tensor};
use protocol::model::{Direction, LinearId, LinearShape};

use super::storage::{tensor, values, with_values};
use crate::backend::LinearBackend;
use crate::buffer::Buffer;
use crate::llama::gemm::{Before, Matrix, MatrixMut, Threads, multiply};
use crate::lora::{Dropout, Slot};

/// `tokens × d_in` to `tokens × d_out` by one served matrix, whose weights are not here.
#[derive(Clone)]
pub(crate) struct BaseProduct {
    /// Who computes it.
    pub(crate) backend: Arc<dyn LinearBackend>,
    /// Which matrix.
    pub(crate) linear: LinearId,
    /// Its dimensions.
    pub(crate) shape: LinearShape,
}

impl BaseProduct {
    fn apply(&self, direction: Direction, rows: &[f32]) -> Result<Vec<f32>> {
        let (inner, outer) = self.shape.along(direction);
        let tokens = rows.len() / inner;
        let out = self
            .backend
            .apply(self.linear, direction, Arc::new(Buffer::copy_of(rows)), tokens)
            .map_err(Error::wrap)?
            .to_vec();
        if out.len() != tokens * outer {
            let why = format!("{}: the backend returned {} values for {tokens} × {outer}", self.linear, out.len());
            return Err(Error::Msg(why).bt());
        }
        Ok(out)
    }
}

impl CustomOp1 for BaseProduct {
    fn name(&self) -> &'static str {
        "base-product"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, _) = layout.shape().dims2()?;
        let out = self.apply(Direction::Forward, values(storage, layout)?)?;
        Ok((CpuStorage::F32(out), (tokens, self.shape.d_out).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values(dy, |dy| self.apply(Direction::Backward, dy))?;
        Ok(Some(tensor(dx, x.shape())?))
    }
}

/// What of a group's adapters is not a tensor.
pub(crate) struct Adapter {
    /// Where each projection's output lies, in the order of the parameters' rows.
    pub(crate) slots: Arc<[Slot]>,
    /// Rank of every one.
    pub(crate) rank: usize,
    /// Factor of their outputs.
    pub(crate) scaling: f32,
    /// For each slot what drops features of its input; `None` outside training or at a rate of zero.
    pub(crate) dropout: Option<Vec<Dropout>>,
}

/// A base product plus the group's adapters. Arguments: `x` (`tokens × d_in`); `A`, the slots' down projections one
/// below the other (`slots·rank × d_in`); `B`, the slots' up projections (`d_out × rank` each) as one vector.
pub(crate) struct AdaptedProduct {
    /// The product without adapters.
    pub(crate) base: BaseProduct,
    /// The adapters.
    pub(crate) adapter: Adapter,
    /// Whether anything below the input is trained; otherwise its gradient is never asked of the backend.
    pub(crate) input_gradient: bool,
}

/// Gradients of the three arguments.
struct Gradients {
    x: Option<Vec<f32>>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl AdaptedProduct {
    /// Visits every slot with the input that its adapter sees, the factors that made it (if any were dropped), its
    /// rows of `A` and its part of `B`.
    fn for_each_slot(&self, x: &[f32], mut work: impl FnMut(usize, &Slot, &[f32], Option<&[f32]>)) {
        for (index, slot) in self.adapter.slots.iter().enumerate() {
            match &self.adapter.dropout {
                None => work(index, slot, x, None),
                Some(dropout) => {
                    let factors = dropout[index].factors(x.len() / self.base.shape.d_in, self.base.shape.d_in);
                    let dropped: Vec<f32> = x.iter().zip(&factors).map(|(x, f)| x * f).collect();
                    work(index, slot, &dropped, Some(&factors));
                }
            }
        }
    }

    fn forward(&self, x: &[f32], a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
        let mut y = self.base.apply(Direction::Forward, x)?;
        let LinearShape { d_in, d_out } = self.base.shape;
        let (tokens, rank) = (x.len() / d_in, self.adapter.rank);
        let mut low = vec![0.0; tokens * rank];
        self.for_each_slot(x, |index, slot, x, _| {
            let a = Matrix::new(&a[index * rank * d_in..], rank, d_in);
            let b = Matrix::new(&b[slot.column * rank..], slot.d_out, rank);
            let x = Matrix::new(x, tokens, d_in);
            multiply(MatrixMut::new(&mut low, tokens, rank), Before::Replaced, 1.0, x, a.transposed(), Threads::All);
            let out = MatrixMut::strided(&mut y[slot.offset..], tokens, slot.d_out, d_out);
            let low = Matrix::new(&low, tokens, rank);
            multiply(out, Before::Kept, self.adapter.scaling, low, b.transposed(), Threads::All);
        });
        Ok(y)
    }

    fn backward(&self, x: &[f32], a: &[f32], b: &[f32], dy: &[f32]) -> Result<Gradients> {
        let mut dx = if self.input_gradient { Some(self.base.apply(Direction::Backward, dy)?) } else { None };
        let LinearShape { d_in, d_out } = self.base.shape;
        let (tokens, rank, scaling) = (x.len() / d_in, self.adapter.rank, self.adapter.scaling);
        let (mut da, mut db) = (vec![0.0; a.len()], vec![0.0; b.len()]);
        let (mut low, mut dlow) = (vec![0.0; tokens * rank], vec![0.0; tokens * rank]);
        self.for_each_slot(x, |index, slot, x, factors| {
            let rows = index * rank * d_in..(index + 1) * rank * d_in;
            let a = Matrix::new(&a[rows.clone()], rank, d_in);
            let b = Matrix::new(&b[slot.column * rank..], slot.d_out, rank);
            let x = Matrix::new(x, tokens, d_in);
            let dy = Matrix::strided(&dy[slot.offset..], tokens, slot.d_out, d_out);
            multiply(MatrixMut::new(&mut low, tokens, rank), Before::Replaced, 1.0, x, a.transposed(), Threads::All);
            multiply(MatrixMut::new(&mut dlow, tokens, rank), Before::Replaced, scaling, dy, b, Threads::All);
            let (low, dlow) = (Matrix::new(&low, tokens, rank), Matrix::new(&dlow, tokens, rank));
            let out = MatrixMut::new(&mut db[slot.column * rank..], slot.d_out, rank);
            multiply(out, Before::Replaced, scaling, dy.transposed(), low, Threads::All);
            let out = MatrixMut::new(&mut da[rows], rank, d_in);
            multiply(out, Before::Replaced, 1.0, dlow.transposed(), x, Threads::All);
            match (&mut dx, factors) {
                (None, _) => {}
                (Some(dx), None) => {
                    multiply(MatrixMut::new(dx, tokens, d_in), Before::Kept, 1.0, dlow, a, Threads::All);
                }
                (Some(dx), Some(factors)) => {
                    let mut part = vec![0.0; dx.len()];
                    multiply(MatrixMut::new(&mut part, tokens, d_in), Before::Replaced, 1.0, dlow, a, Threads::All);
                    dx.iter_mut().zip(part).zip(factors).for_each(|((dx, part), factor)| *dx += part * factor);
                }
            }
        });
        Ok(Gradients { x: dx, a: da, b: db })
    }
}

impl CustomOp3 for AdaptedProduct {
    fn name(&self) -> &'static str {
        "adapted-product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, _) = x_layout.shape().dims2()?;
        let y = self.forward(values(x, x_layout)?, values(a, a_layout)?, values(b, b_layout)?)?;
        Ok((CpuStorage::F32(y), (tokens, self.base.shape.d_out).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradients = with_values(x, |x| {
            with_values(a, |a| with_values(b, |b| with_values(dy, |dy| self.backward(x, a, b, dy))))
        })?;
        let dx = gradients.x.map(|dx| tensor(dx, x.shape())).transpose()?;
        Ok((dx, Some(tensor(gradients.a, a.shape())?), Some(tensor(gradients.b, b.shape())?)))
    }
}
