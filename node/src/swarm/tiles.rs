//! Tiles on a stream.

use std::time::Duration;

use futures::io::{AsyncRead, AsyncWrite};
use protocol::he::ProductTile;
use protocol::wire::TileShape;
use protocol::wire::messages::{ProductReply, TileHeader};

use super::io::{Counters, LinkError, read_planes, write_with_planes};

/// Reads the planes of a tile whose header has been accepted.
pub(super) async fn read_tile<R: AsyncRead + Unpin>(
    reader: &mut R,
    shape: TileShape,
    stall: Duration,
    counters: &Counters,
) -> Result<ProductTile, LinkError> {
    Ok(shape.tile(read_planes(reader, shape.planes, stall, counters).await?))
}

/// Writes a tile: header, planes.
pub(super) async fn write_tile<W: AsyncWrite + Unpin>(
    writer: &mut W,
    header: TileHeader,
    tile: &ProductTile,
    stall: Duration,
    counters: &Counters,
) -> Result<(), LinkError> {
    write_with_planes(writer, &ProductReply::Tile(header), Some(&tile.rows), stall, counters).await
}
