//! Pairs of answers in a data set.

use super::super::{BatchSource as _, Batches, Dataset, Example, HeldOut};

fn example(token: u32, length: usize) -> Example {
    Example { tokens: vec![token; length], learnt: (0..length).map(|at| at > 0).collect() }
}

fn pairs(count: u32) -> Dataset {
    Dataset::from_pairs((0..count).map(|n| (example(n, 3), example(100 + n, 5))).collect(), 0)
}

#[test]
fn pairs_stay_together_and_know_their_number() {
    let data = pairs(10);
    assert_eq!((data.units(), data.len()), (10, 20));
    let (train, held_out) = data.split(HeldOut::Count(3), 1).unwrap();
    assert_eq!((train.units(), held_out.units()), (7, 3));
    let mut batches = Batches::new(&train, 2, 1, 5);
    let mut dealt = Vec::new();
    for _ in 0..7 {
        let batch = batches.next_batch().unwrap().unwrap();
        assert_eq!(batch.lengths, [3, 5, 3, 5]);
        for (&number, rows) in batch.numbers.iter().zip(batch.sequences().step_by(2)) {
            assert_eq!(train.examples().unwrap()[2 * number].tokens, batch.tokens[rows.clone()]);
            assert_eq!(batch.tokens[rows.end], 100 + batch.tokens[rows.start]);
            dealt.push(number);
        }
    }
    dealt[..7].sort_unstable();
    assert!(dealt[..7].iter().copied().eq(0..7), "every pair once a pass");
    let numbers: Vec<usize> = held_out.in_order(2, 1).flat_map(|batch| batch.unwrap().numbers).collect();
    assert_eq!(numbers, [0, 1, 2]);
}
