//! What a run minimises: the cross entropy of the targets, or how likely a preferred answer is beside one that is not.
//!
//! A preference is decided by two sequences of one micro-batch together: by what each of them costs in all. So their loss
//! needs the whole forward pass; its gradient is then that of the cross entropies, each sequence's times a weight that
//! follows from these costs. All costs here are in nats, of a sequence's targets together.

use serde::{Deserialize, Serialize};

/// How much a preference weighs where nothing is said: what TRL begins with.
const BETA: f64 = 0.1;

/// What a run minimises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The cross entropy of what is learnt.
    #[default]
    Sft,
    /// Direct preference optimisation (Rafailov et al., 2023), against a reference that does not learn.
    Dpo,
    /// Odds ratio preference optimisation (Hong et al., 2024), which needs no reference.
    Orpo,
}

impl Objective {
    /// Whether examples are pairs of a preferred answer and one that is not.
    pub fn of_pairs(self) -> bool {
        self != Self::Sft
    }
}

/// What DPO compares with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reference {
    /// The model with the adapters that the run begins with: the base model, unless it begins with those of an earlier run.
    #[default]
    Start,
    /// The model without adapters.
    Base,
}

/// How preferences become a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preference {
    kind: Kind,
    beta: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Dpo,
    Orpo,
}

/// What the two sequences of a pair cost, the preferred one first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Their cross entropies.
    pub policy: [f64; 2],
    /// The same by the reference; not looked at without one.
    pub reference: [f64; 2],
    /// Their targets.
    pub targets: [usize; 2],
}

/// What a pair adds to the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judged {
    /// The loss.
    pub loss: f64,
    /// Its derivative by each of [`Costs::policy`].
    pub weights: [f64; 2],
    /// What each sequence is rewarded with: β times how much likelier than by the reference it is, or, without one, times
    /// the mean logarithm of its targets' probabilities.
    pub rewards: [f64; 2],
}

impl Preference {
    /// Of an objective; `None` if that has no preferences.
    pub fn new(objective: Objective, beta: Option<f64>) -> Option<Self> {
        let kind = match objective {
            Objective::Sft => return None,
            Objective::Dpo => Kind::Dpo,
            Objective::Orpo => Kind::Orpo,
        };
        Some(Self { kind, beta: beta.unwrap_or(BETA) })
    }

    /// Whether costs by a reference are needed.
    pub fn needs_reference(self) -> bool {
        self.kind == Kind::Dpo
    }

    /// What a pair adds to the loss.
    pub fn judge(self, costs: &Costs) -> Judged {
        match self.kind {
            Kind::Dpo => self.dpo(costs),
            Kind::Orpo => self.orpo(costs),
        }
    }

    /// `−ln σ(β·((ln p_c − ln r_c) − (ln p_r − ln r_r)))`.
    fn dpo(self, costs: &Costs) -> Judged {
        let reward = |side: usize| self.beta * (costs.reference[side] - costs.policy[side]);
        let rewards = [reward(0), reward(1)];
        let margin = rewards[0] - rewards[1];
        let pull = self.beta * sigmoid(-margin);
        Judged { loss: softplus(-margin), weights: [pull, -pull], rewards }
    }

    /// `−m_c − β·ln σ(ln odds_c − ln odds_r)`, where `m` is the mean logarithm of a sequence's targets' probabilities and
    /// the odds are `exp(m) / (1 − exp(m))`.
    fn orpo(self, costs: &Costs) -> Judged {
        let mean = |side: usize| -costs.policy[side] / costs.targets[side].max(1) as f64;
        // Of a sequence that is certain the odds are infinite.
        let means = [mean(0), mean(1)].map(|mean| mean.min(-1e-9));
        let unlikely = means.map(|mean| -mean.exp_m1());
        let log_odds = |side: usize| means[side] - unlikely[side].ln();
        let ratio = log_odds(0) - log_odds(1);
        let pull = self.beta * sigmoid(-ratio);
        // The derivative of the logarithm of the odds by the mean is 1 / (1 − exp(m)), and the mean falls as the cost rises.
        let by_cost = |side: usize, by_mean: f64| -by_mean / costs.targets[side].max(1) as f64;
        let weights = [by_cost(0, -1.0 - pull / unlikely[0]), by_cost(1, pull / unlikely[1])];
        let loss = -means[0] + self.beta * softplus(-ratio);
        Judged { loss, weights, rewards: means.map(|mean| self.beta * mean) }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + eˣ)`, for any `x`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// What preferences came to, on average over pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreferenceReport {
    /// Reward of the preferred answer.
    pub rewards_chosen: f64,
    /// Reward of the other one.
    pub rewards_rejected: f64,
    /// Share of the pairs whose preferred answer is rewarded more.
    pub accuracy: f64,
}

impl PreferenceReport {
    /// By how much the preferred answer is rewarded more.
    pub fn margin(&self) -> f64 {
        self.rewards_chosen - self.rewards_rejected
    }
}

/// The same, being added up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PreferenceSum {
    rewards: [f64; 2],
    right: usize,
    pairs: usize,
}

impl PreferenceSum {
    /// Adds a pair.
    pub fn judged(&mut self, judged: &Judged) {
        (0..2).for_each(|side| self.rewards[side] += judged.rewards[side]);
        self.right += usize::from(judged.rewards[0] > judged.rewards[1]);
        self.pairs += 1;
    }

    /// Adds pairs that were added up elsewhere.
    pub fn add(&mut self, other: &Self) {
        (0..2).for_each(|side| self.rewards[side] += other.rewards[side]);
        self.right += other.right;
        self.pairs += other.pairs;
    }

    /// The average; `None` without any pair.
    pub fn report(&self) -> Option<PreferenceReport> {
        let pairs = self.pairs as f64;
        (self.pairs > 0).then(|| PreferenceReport {
            rewards_chosen: self.rewards[0] / pairs,
            rewards_rejected: self.rewards[1] / pairs,
            accuracy: self.right as f64 / pairs,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn costs(policy: [f64; 2]) -> Costs {
        Costs { policy, reference: [31.0, 27.5], targets: [12, 9] }
    }

    #[test]
    fn weights_are_the_derivatives_of_the_loss() {
        for objective in [Objective::Dpo, Objective::Orpo] {
            for beta in [0.05, 0.1, 2.0] {
                let preference = Preference::new(objective, Some(beta)).unwrap();
                for policy in [[30.0, 28.0], [2.0, 60.0], [45.0, 3.0], [0.01, 0.02], [400.0, 400.0]] {
                    let judged = preference.judge(&costs(policy));
                    for side in 0..2 {
                        let step = 1e-5 * policy[side].max(1.0);
                        let loss = |by: f64| {
                            let mut moved = policy;
                            moved[side] += by;
                            preference.judge(&costs(moved)).loss
                        };
                        let measured = (loss(step) - loss(-step)) / (2.0 * step);
                        let (found, size) = (judged.weights[side], measured.abs().max(1e-3));
                        assert!(
                            (found - measured).abs() < 1e-4 * size,
                            "{objective:?} {beta} {policy:?}: {found}, {measured}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn losses_are_what_the_papers_say() {
        // By the definitions, written out in Python.
        let dpo = Preference::new(Objective::Dpo, None).unwrap().judge(&costs([30.0, 28.0]));
        assert!((dpo.loss - 0.620957).abs() < 1e-6 && dpo.weights[0] > 0.0 && dpo.weights[1] < 0.0, "{dpo:?}");
        assert!((dpo.rewards[0] - 0.1).abs() < 1e-12 && (dpo.rewards[1] + 0.05).abs() < 1e-12);
        let same = Preference::new(Objective::Dpo, None).unwrap().judge(&costs([31.0, 27.5]));
        assert_eq!((same.loss, same.rewards), (2f64.ln(), [0.0; 2]));
        let orpo = Preference::new(Objective::Orpo, Some(0.1)).unwrap().judge(&costs([30.0, 28.0]));
        let (chosen, rejected): (f64, f64) = (-30.0 / 12.0, -28.0 / 9.0);
        let odds = |mean: f64| mean - (1.0 - mean.exp()).ln();
        let expected = 2.5 + 0.1 * (1.0 + (odds(rejected) - odds(chosen)).exp()).ln();
        assert!((orpo.loss - expected).abs() < 1e-12, "{orpo:?} for {expected}");
        assert_eq!(Preference::new(Objective::Sft, None), None);
    }

    #[test]
    fn no_cost_overflows() {
        for objective in [Objective::Dpo, Objective::Orpo] {
            let preference = Preference::new(objective, None).unwrap();
            for policy in [[0.0, 0.0], [1e6, 0.0], [0.0, 1e6], [1e6, 1e6]] {
                let Judged { loss, weights, rewards } = preference.judge(&costs(policy));
                let all = [loss, weights[0], weights[1], rewards[0], rewards[1]];
                assert!(all.iter().all(|value| value.is_finite()), "{objective:?} {policy:?}: {all:?}");
            }
        }
    }

    #[test]
    fn pairs_are_averaged_however_they_are_added_up() {
        let judged = |chosen: f64, rejected: f64| Judged { loss: 0.0, weights: [0.0; 2], rewards: [chosen, rejected] };
        let (mut one, mut other) = (PreferenceSum::default(), PreferenceSum::default());
        one.judged(&judged(1.0, 0.0));
        other.judged(&judged(2.0, 3.0));
        other.judged(&judged(3.0, 0.0));
        one.add(&other);
        let report = one.report().unwrap();
        assert_eq!((report.rewards_chosen, report.rewards_rejected, report.margin()), (2.0, 1.0, 1.0));
        assert!((report.accuracy - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(PreferenceSum::default().report(), None);
    }
}
