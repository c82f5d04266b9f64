//! AdamW (Loshchilov and Hutter, 2019) with a state that can be kept.
//!
//! candle's keeps its moments to itself, and a run that is to be resumed where it stopped must write them down.

use crate::lora::Learning;

/// The moments of one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Decaying mean of the gradients.
    pub first: Vec<f32>,
    /// Decaying mean of their squares.
    pub second: Vec<f32>,
}

/// What does not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Addend to the root of the second moment.
    pub epsilon: f64,
    /// Share of a parameter that a step takes away, times the learning rate.
    pub weight_decay: f64,
}

/// The optimiser.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    moments: Vec<Moments>,
}

impl AdamW {
    /// For parameters of these sizes.
    pub fn new(config: AdamWConfig, sizes: impl IntoIterator<Item = usize>) -> Self {
        let zero = |size| Moments { first: vec![0.0; size], second: vec![0.0; size] };
        Self { config, steps: 0, moments: sizes.into_iter().map(zero).collect() }
    }

    /// Steps taken and the moments of every parameter.
    pub fn state(&self) -> (u64, &[Moments]) {
        (self.steps, &self.moments)
    }

    /// Goes on from an earlier state of parameters of the same sizes.
    pub(super) fn restore(&mut self, steps: u64, moments: Vec<Moments>) {
        (self.steps, self.moments) = (steps, moments);
    }

    /// Begins a step; every parameter is then updated once by [`Self::update`].
    pub(super) fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Moves one parameter against its gradient times `gradient_scale`, at this learning rate.
    pub(super) fn update(
        &mut self,
        index: usize,
        parameter: &mut [f32],
        gradient: &[f32],
        Learning { rate, decays }: Learning,
        gradient_scale: f64,
    ) {
        let Moments { first, second } = &mut self.moments[index];
        let (beta1, beta2) = self.config.betas;
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        // Both corrections for moments that began at zero, and the learning rate, in one factor and one divisor.
        let rate_corrected = (rate / (1.0 - beta1.powi(steps))) as f32;
        let root_correction = (1.0 - beta2.powi(steps)).sqrt().recip() as f32;
        let kept = if decays { (1.0 - rate * self.config.weight_decay) as f32 } else { 1.0 };
        let (epsilon, gradient_scale) = (self.config.epsilon as f32, gradient_scale as f32);
        let (beta1, beta2, rest1, rest2) = (beta1 as f32, beta2 as f32, (1.0 - beta1) as f32, (1.0 - beta2) as f32);
        for (((x, g), m), v) in parameter.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * gradient_scale;
            *m = *m * beta1 + g * rest1;
            *v = *v * beta2 + g * g * rest2;
            *x = *x * kept - rate_corrected * *m / (v.sqrt() * root_correction + epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::{Device, Tensor, Var};
    use candle_nn::{Optimizer, ParamsAdamW};

    use super::*;

    #[test]
    fn follows_candles() {
        let start = [0.5f32, -1.0, 2.0, 0.0];
        let var = Var::new(&start, &Device::Cpu).unwrap();
        let params = ParamsAdamW { lr: 0.01, beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };
        let mut reference = candle_nn::AdamW::new(vec![var.clone()], params).unwrap();
        let config = AdamWConfig { betas: (0.8, 0.95), epsilon: 1e-6, weight_decay: 0.1 };
        let mut ours = AdamW::new(config, [4]);
        let mut x = start;
        for step in 0..20 {
            let rate = 0.01 * f64::from(1 + step % 3);
            let gradient: Vec<f32> = (0..4).map(|i| ((step * 5 + i * 3) % 7) as f32 - 3.0).collect();
            reference.set_learning_rate(rate);
            let as_loss = (var.as_tensor() * Tensor::new(gradient.as_slice(), &Device::Cpu).unwrap()).unwrap();
            reference.backward_step(&as_loss.sum_all().unwrap()).unwrap();
            ours.begin_step();
            let halved: Vec<f32> = gradient.iter().map(|g| g / 2.0).collect();
            ours.update(0, &mut x, &halved, Learning { rate, decays: true }, 2.0);
            let expected = var.to_vec1::<f32>().unwrap();
            assert!(x.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "step {step}: {x:?} for {expected:?}");
        }
        assert!(x.iter().zip(start).any(|(a, b)| (a - b).abs() > 0.1), "nothing moved");
        assert_eq!(ours.state().0, 20);
    }
}
