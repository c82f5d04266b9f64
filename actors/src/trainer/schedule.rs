//! The learning rate of every step.

use serde::{Deserialize, Serialize};

/// How the learning rate goes down once it is warm, as transformers names and defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It is the same from the first step on.
    Constant,
    /// It climbs, and then stays.
    ConstantWithWarmup,
    /// In a straight line to zero at the end of training.
    Linear,
    /// Along half a cosine to zero at the end of training.
    Cosine,
    /// Along half a cosine to zero, and again from its peak: the same number of steps each time.
    CosineWithRestarts,
}

/// What the schedule of a run depends on besides its kind.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Steps that climb.
    pub warmup: usize,
    /// All steps.
    pub steps: usize,
    /// Half cosines of a schedule that restarts.
    pub cycles: u32,
}

impl Schedule {
    /// The learning rate's factor, in `0 ..= 1`, for `step` (from 0) when the first ones climb in a straight line.
    ///
    /// The first step already learns (`1 / warmup`, where transformers has 0), and the last one still does.
    pub fn factor(self, step: usize, Timing { warmup, steps, cycles }: Timing) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let decaying = steps.saturating_sub(warmup).max(1) as f64;
        let done = ((step - warmup) as f64 / decaying).min(1.0);
        let half_cosine = |done: f64| 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        match self {
            Self::Constant | Self::ConstantWithWarmup => 1.0,
            Self::Linear => 1.0 - done,
            Self::Cosine => half_cosine(done),
            Self::CosineWithRestarts if done >= 1.0 => 0.0,
            Self::CosineWithRestarts => half_cosine((f64::from(cycles) * done).fract()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(warmup: usize, steps: usize) -> Timing {
        Timing { warmup, steps, cycles: 1 }
    }

    #[test]
    fn warms_up_in_a_line_and_decays_to_almost_nothing() {
        for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::CosineWithRestarts] {
            let factors: Vec<f64> = (0..100).map(|step| schedule.factor(step, timing(10, 100))).collect();
            assert_eq!(factors[0], 0.1);
            assert_eq!(factors[9], 1.0);
            assert_eq!(factors[10], 1.0);
            assert!(factors[10..].windows(2).all(|pair| pair[1] < pair[0]));
            assert!(factors[99] > 0.0 && factors[99] < 0.02);
            assert!((schedule.factor(55, timing(10, 100)) - 0.5).abs() < 1e-12);
        }
        assert_eq!(Schedule::Constant.factor(99, timing(0, 100)), 1.0);
        assert_eq!(
            [0, 1, 2, 99].map(|step| Schedule::ConstantWithWarmup.factor(step, timing(2, 100))),
            [0.5, 1.0, 1.0, 1.0]
        );
    }

    #[test]
    fn restarts_are_those_of_transformers() {
        // get_cosine_with_hard_restarts_schedule_with_warmup of transformers 5.24, 2 steps of warm-up, 10 in all, 2 cycles.
        let expected = [1.0, 0.853553, 0.5, 0.146447, 1.0, 0.853553, 0.5, 0.146447, 0.0];
        let timing = Timing { warmup: 2, steps: 10, cycles: 2 };
        for (step, expected) in (2..).zip(expected) {
            let factor = Schedule::CosineWithRestarts.factor(step, timing);
            assert!((factor - expected).abs() < 1e-6, "step {step}: {factor} for {expected}");
        }
    }

    #[test]
    fn no_step_count_divides_by_zero() {
        for (warmup, steps) in [(0, 0), (5, 5), (9, 3)] {
            for step in 0..10 {
                assert!((0.0..=1.0).contains(&Schedule::Cosine.factor(step, timing(warmup, steps))));
            }
        }
    }
}
