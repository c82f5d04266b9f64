//! The learning rate of every step.

use serde::{Deserialize, Serialize};

/// How the learning rate goes down once it is warm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// In a straight line to zero at the end of training.
    Linear,
    /// Along half a cosine to zero at the end of training.
    Cosine,
}

impl Schedule {
    /// The learning rate's factor, in `0 ..= 1`, for `step` (from 0) of `steps` when the first `warmup` climb in a
    /// straight line.
    ///
    /// The first step already learns (`1 / warmup`), and the last one still does.
    pub fn factor(self, step: usize, warmup: usize, steps: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let decaying = steps.saturating_sub(warmup).max(1) as f64;
        let done = ((step - warmup) as f64 / decaying).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - done,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_in_a_line_and_decays_to_almost_nothing() {
        for schedule in [Schedule::Linear, Schedule::Cosine] {
            let factors: Vec<f64> = (0..100).map(|step| schedule.factor(step, 10, 100)).collect();
            assert_eq!(factors[0], 0.1);
            assert_eq!(factors[9], 1.0);
            assert_eq!(factors[10], 1.0);
            assert!(factors[10..].windows(2).all(|pair| pair[1] < pair[0]));
            assert!(factors[99] > 0.0 && factors[99] < 0.02);
            assert!((schedule.factor(55, 10, 100) - 0.5).abs() < 1e-12);
        }
        assert_eq!(Schedule::Constant.factor(99, 0, 100), 1.0);
    }

    #[test]
    fn no_step_count_divides_by_zero() {
        for (warmup, steps) in [(0, 0), (5, 5), (9, 3)] {
            for step in 0..10 {
                assert!((0.0..=1.0).contains(&Schedule::Cosine.factor(step, warmup, steps)));
            }
        }
    }
}
