//! When a run is over before its last step, and which of its steps was the best: as its evaluations so far say, so that a
//! run that was interrupted decides the same.

use super::events::EvaluationReport;

/// The evaluation of the lowest loss, the first of them where several are as low.
pub(super) fn best(evaluations: &[EvaluationReport]) -> Option<&EvaluationReport> {
    evaluations.iter().filter(|evaluation| evaluation.loss.is_finite()).min_by(|a, b| a.loss.total_cmp(&b.loss))
}

/// Whether the last so many evaluations are none by more than `threshold` below the lowest before them.
pub(super) fn is_over(evaluations: &[EvaluationReport], patience: usize, threshold: f64) -> bool {
    let (mut lowest, mut in_vain) = (f64::INFINITY, 0);
    for evaluation in evaluations {
        // A loss that is not a number is below nothing.
        if evaluation.loss < lowest - threshold || (lowest.is_infinite() && evaluation.loss.is_finite()) {
            (lowest, in_vain) = (evaluation.loss, 0);
        } else {
            in_vain += 1;
        }
    }
    in_vain >= patience
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluations(losses: &[f64]) -> Vec<EvaluationReport> {
        let report = |(step, &loss)| EvaluationReport { step, loss, seconds: 0.0, preference: None };
        losses.iter().enumerate().map(report).collect()
    }

    #[test]
    fn the_first_of_the_lowest_is_the_best() {
        let best = |losses: &[f64]| best(&evaluations(losses)).map(|evaluation| evaluation.step);
        assert_eq!(best(&[]), None);
        assert_eq!(best(&[f64::NAN]), None);
        assert_eq!(best(&[3.0, 2.0, f64::NAN, 2.0, 2.5]), Some(1));
        assert_eq!(best(&[3.0, 4.0]), Some(0));
    }

    #[test]
    fn patience_is_lost_by_evaluations_that_are_no_better() {
        let over = |losses: &[f64], threshold| is_over(&evaluations(losses), 2, threshold);
        assert!(!over(&[3.0, 2.0, 2.1], 0.0));
        assert!(over(&[3.0, 2.0, 2.1, 2.0], 0.0));
        assert!(!over(&[3.0, 2.0, 2.1, 1.9, 2.0], 0.0));
        assert!(over(&[3.0, 2.95, 2.91], 0.1), "they are better by too little");
        assert!(!over(&[3.0, 2.95, 2.89], 0.1), "together they are better by enough");
        assert!(over(&[3.0, f64::NAN, f64::NAN], 0.0));
        assert!(!over(&[3.0], 0.0));
    }
}
