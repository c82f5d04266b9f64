//! Tiles on a stream.

use std::time::Duration;

use futures::io::{AsyncRead, AsyncWrite};
use protocol::he::ProductTile;
use protocol::wire::TileShapes;
use protocol::wire::messages::{ProductReply, TileHeader};
use tokio::time::timeout;

use super::io::{Counters, LinkError, read_planes, write_message, write_planes};

/// Reads the planes of a tile whose header has been accepted.
pub(super) async fn read_tile<R: AsyncRead + Unpin>(
    reader: &mut R,
    shapes: TileShapes,
    stall: Duration,
    counters: &Counters,
) -> Result<ProductTile, LinkError> {
    let mask = read_planes(reader, shapes.mask, stall, counters).await?;
    let body = read_planes(reader, shapes.body, stall, counters).await?;
    Ok(shapes.tile(mask, body))
}

/// Writes a tile: header, mask, body.
pub(super) async fn write_tile<W: AsyncWrite + Unpin>(
    writer: &mut W,
    header: TileHeader,
    tile: &ProductTile,
    stall: Duration,
    counters: &Counters,
) -> Result<(), LinkError> {
    let announced = timeout(stall, write_message(writer, &ProductReply::Tile(header), counters)).await;
    announced.map_err(|_| LinkError::TimedOut("accepted", stall))??;
    write_planes(writer, &tile.mask, stall, counters).await?;
    write_planes(writer, &tile.body, stall, counters).await
}
