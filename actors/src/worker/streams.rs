//! The answers of several devices as one.

use futures::{Stream, StreamExt as _, stream};
use protocol::he::ProductTile;
use protocol::wire::messages::Refusal;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::place::Place;
use crate::transport::TileStream;

/// Tiles of several streams as they come, each with the tag of its stream.
pub(super) fn merged<T: Copy + Unpin>(
    streams: impl Iterator<Item = (T, TileStream<Refusal>)>,
) -> impl Stream<Item = (T, Result<ProductTile, Refusal>)> + Unpin {
    stream::select_all(streams.map(|(tag, mut tiles)| {
        stream::poll_fn(move |context| tiles.poll_recv(context).map(|tile| tile.map(|tile| (tag, tile))))
    }))
}

/// Hands tiles on to the reader at the reader's pace, each moved to the first column of its part, and keeps the product's
/// place until the last one is taken. The first refusal of a part is the product's. Ends early where the reader is gone,
/// or the owner has lost its layers.
pub(super) async fn forward(
    parts: Vec<(usize, TileStream<Refusal>)>,
    reader: mpsc::Sender<Result<ProductTile, Refusal>>,
    place: Arc<Place>,
) {
    let mut tiles = merged(parts.into_iter());
    loop {
        let tile = tokio::select! {
            // Dropping `tiles` breaks all parts off.
            () = reader.closed() => break,
            () = place.lost() => break,
            tile = tiles.next() => tile,
        };
        let Some((first, tile)) = tile else { break };
        let last = tile.is_err();
        let moved = tile.map(|tile| ProductTile { first_column: first + tile.first_column, ..tile });
        let sent = tokio::select! {
            () = place.lost() => break,
            sent = reader.send(moved) => sent,
        };
        if sent.is_err() || last {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Weak;

    use protocol::he::Planes;

    use super::super::place::tests::place;
    use super::*;

    type Part = mpsc::Sender<Result<ProductTile, Refusal>>;

    /// Two parts, of which the second begins at column 10, with their reader and the product's place.
    async fn forwarded() -> ([Part; 2], TileStream<Refusal>, Weak<Place>) {
        let place = place().await;
        let held = Arc::downgrade(&place);
        let (first, a) = mpsc::channel(4);
        let (second, b) = mpsc::channel(4);
        let (reader, stream) = mpsc::channel(2);
        tokio::spawn(forward(vec![(0, a), (10, b)], reader, place));
        ([first, second], stream, held)
    }

    /// Waits until nobody holds a place.
    async fn free(place: Weak<Place>) {
        while place.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
    }

    fn tile(first_column: usize) -> Result<ProductTile, Refusal> {
        Ok(ProductTile { first_column, rows: Planes::zeros(1, 1, 2) })
    }

    #[tokio::test]
    async fn tiles_come_as_they_are_ready_each_at_its_column() {
        let ([first, second], mut stream, place) = forwarded().await;
        let mut columns = Vec::new();
        for (part, column) in [(&second, 4), (&first, 2), (&first, 0), (&second, 0)] {
            part.send(tile(column)).await.unwrap();
            columns.push(stream.recv().await.unwrap().unwrap().first_column);
        }
        assert_eq!(columns, [14, 2, 0, 10]);
        assert_eq!(place.strong_count(), 1);
        drop((first, second));
        assert_eq!(stream.recv().await, None);
        free(place).await;
    }

    #[tokio::test]
    async fn a_part_that_fails_ends_all_and_so_does_a_reader_that_is_gone() {
        let ([first, second], mut stream, place) = forwarded().await;
        second.send(Err(Refusal::Failed("broken".into()))).await.unwrap();
        assert_eq!(stream.recv().await, Some(Err(Refusal::Failed("broken".into()))));
        first.closed().await;
        free(place).await;

        let ([first, second], stream, place) = forwarded().await;
        drop(stream);
        first.closed().await;
        second.closed().await;
        free(place).await;
    }
}
