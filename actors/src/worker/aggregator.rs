//! The actor that adds partial products as ciphertexts.
//!
//! It is the half of the gradient aggregator that works on ciphertexts: where a matrix is cut by columns over several
//! devices, each of them has a summand of every input gradient, and nobody can decrypt any of it here. The other half
//! is the owner's ([`crate::trainer::GradientAggregator`]), which averages the decrypted gradients of adapters.
//!
//! The actor's thread only moves tiles; they are added on the rayon pool, one tile of a product at a time. A sum goes on
//! whether it is read or not, and then waits in a channel that has room for all of it: how many products may be unread
//! is the caller's to bound ([`super::service`]).

use actix::prelude::*;
use futures::StreamExt as _;
use protocol::he::ProductTile;
use protocol::wire::messages::Refusal;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::executor::Drain;
use super::streams::merged;
use super::sum::{CiphertextSum, SumShape};
use crate::heavy::on_rayon;
use crate::trace::WORK;
use crate::transport::TileStream;

/// Messages that may wait for the actor: each is answered in microseconds.
const MAILBOX: usize = 64;

/// See the module's documentation.
#[derive(Default)]
pub struct CiphertextAggregator {
    sums: TaskTracker,
}

impl Actor for CiphertextAggregator {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

impl Supervised for CiphertextAggregator {}

/// Adds partial products. The tiles of the sum come on the stream in any order; after a part's refusal, which is passed
/// on, nothing comes. Dropping the stream breaks all parts off.
#[derive(Message)]
#[rtype(result = "Result<TileStream<Refusal>, Refusal>")]
pub struct Combine {
    /// The tiles of each part, of full limbs.
    pub parts: Vec<TileStream<Refusal>>,
    /// What they add up to; as many parts as there are streams.
    pub shape: SumShape,
}

impl Handler<Combine> for CiphertextAggregator {
    type Result = Result<TileStream<Refusal>, Refusal>;

    fn handle(&mut self, Combine { parts, shape }: Combine, _context: &mut Self::Context) -> Self::Result {
        if self.sums.is_closed() {
            return Err(Refusal::Capacity("it is shutting down".into()));
        }
        // A tile has a column at least, and an error has a place, too. Places that are not taken cost nothing.
        let (tiles, stream) = mpsc::channel(shape.outer + 1);
        self.sums.spawn(combine(parts, shape, tiles));
        Ok(stream)
    }
}

async fn combine(parts: Vec<TileStream<Refusal>>, shape: SumShape, sink: mpsc::Sender<Result<ProductTile, Refusal>>) {
    let mut sum = CiphertextSum::new(shape);
    let mut tiles = merged(parts.into_iter().enumerate());
    loop {
        let next = tokio::select! {
            // Returning drops the parts, which breaks them off.
            () = sink.closed() => return,
            next = tiles.next() => next,
        };
        let added = match next {
            None => break,
            Some((_, Err(refusal))) => Err(refusal),
            Some((part, Ok(tile))) => add(sum, part, tile).await,
        };
        match added {
            Ok((so_far, complete)) => {
                sum = so_far;
                for tile in complete {
                    // The reader may be gone, here and below.
                    let _ = sink.send(Ok(tile)).await;
                }
            }
            Err(refusal) => {
                let _ = sink.send(Err(refusal)).await;
                return;
            }
        }
    }
    if !sum.is_complete() {
        let _ = sink.send(Err(Refusal::Failed("a device ended its part of a product early".into()))).await;
    }
}

/// Adds a tile on the rayon pool; gives back the sum, and its tiles that are complete now.
async fn add(
    mut sum: CiphertextSum,
    part: usize,
    tile: ProductTile,
) -> Result<(CiphertextSum, Vec<ProductTile>), Refusal> {
    let work = on_rayon(move || {
        let span = tracing::info_span!(target: WORK, "add parts", part, rows = tile.rows.rows(), columns = tile.rows.columns());
        let _span = span.entered();
        sum.add(part, tile).map(|complete| (sum, complete))
    });
    match work.await {
        Ok(added) => added.map_err(|error| Refusal::Failed(error.to_string())),
        Err(panicked) => Err(Refusal::Failed(panicked.to_string())),
    }
}

/// Adds no more, and answers when the sums under way are complete.
impl Handler<Drain> for CiphertextAggregator {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _message: Drain, _context: &mut Self::Context) -> Self::Result {
        self.sums.close();
        let sums = self.sums.clone();
        Box::pin(async move { sums.wait().await })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use protocol::he::Planes;

    use super::*;

    const SHAPE: SumShape = SumShape { parts: 2, limbs: 3, output_bits: 16, rows: 1, outer: 8, cell_columns: 4 };

    type Parts = [mpsc::Sender<Result<ProductTile, Refusal>>; 2];

    async fn sum() -> (Addr<CiphertextAggregator>, Parts, TileStream<Refusal>) {
        let aggregator = CiphertextAggregator::default().start();
        let (first, a) = mpsc::channel(4);
        let (second, b) = mpsc::channel(4);
        let stream = aggregator.send(Combine { parts: vec![a, b], shape: SHAPE }).await.unwrap().unwrap();
        (aggregator, [first, second], stream)
    }

    fn tile(first_column: usize, value: u64) -> Result<ProductTile, Refusal> {
        let mut rows = Planes::zeros(3, 1, 4);
        (0..4).for_each(|column| rows.set_value(0, column, value));
        Ok(ProductTile { first_column, rows })
    }

    #[actix::test]
    async fn a_drained_aggregator_finishes_what_it_began_and_takes_no_more() {
        let (aggregator, [first, second], mut stream) = sum().await;
        for (part, column, value) in
            [(&first, 0, 0xfff000), (&second, 4, 5), (&second, 0, 0x123456), (&first, 4, 0x0001fb)]
        {
            part.send(tile(column, value)).await.unwrap();
        }
        drop((first, second));
        aggregator.send(Drain).await.unwrap();
        let refused = aggregator.send(Combine { parts: Vec::new(), shape: SHAPE }).await.unwrap();
        assert!(matches!(refused, Err(Refusal::Capacity(_))));
        let mut sums = Vec::new();
        while let Some(tile) = stream.recv().await {
            let tile = tile.unwrap();
            sums.push((tile.first_column, tile.rows.value(0, 3)));
        }
        sums.sort_unstable();
        // 0xfff000 + 0x123456 = 0x1122456 mod 2^24, and 0x0001fb + 5 = 0x000200, both to the nearest 2^8.
        assert_eq!(sums, [(0, 0x1224), (4, 0x0002)]);
    }

    #[actix::test]
    async fn a_part_that_fails_fails_the_sum_and_stops_the_other() {
        let (_aggregator, [first, second], mut stream) = sum().await;
        first.send(tile(0, 1)).await.unwrap();
        second.send(Err(Refusal::Capacity("full".into()))).await.unwrap();
        assert_eq!(stream.recv().await, Some(Err(Refusal::Capacity("full".into()))));
        assert_eq!(stream.recv().await, None);
        first.closed().await;
    }

    #[actix::test]
    async fn parts_that_are_wrong_or_end_early_fail_the_sum() {
        let (_aggregator, [first, second], mut stream) = sum().await;
        first.send(tile(0, 1)).await.unwrap();
        drop((first, second));
        assert!(matches!(stream.recv().await, Some(Err(Refusal::Failed(why))) if why.contains("early")));
        let (_aggregator, [first, _second], mut stream) = sum().await;
        first.send(tile(6, 1)).await.unwrap();
        assert!(matches!(stream.recv().await, Some(Err(Refusal::Failed(why))) if why.contains("dimensions")));
        first.closed().await;
    }

    #[actix::test]
    async fn dropping_the_sum_stops_all_parts() {
        let (_aggregator, [first, second], stream) = sum().await;
        first.send(tile(0, 1)).await.unwrap();
        drop(stream);
        first.closed().await;
        second.closed().await;
    }
}
