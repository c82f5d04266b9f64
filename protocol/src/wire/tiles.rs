//! The book that an owner keeps of one product's answer: which output columns have come, and how large the next
//! tile may be.

use super::messages::{ProductHeader, TileHeader};
use super::shape::{PlanesShape, ShapeError};
use crate::columns::{ColumnError, ColumnLedger};
use crate::he::{Planes, ProductTile};

/// Columns that a tile has at least, on average over an answer: a narrower one costs its receiver more in headers and in
/// beginning anew than in columns. Every device of a worker cuts its answers at multiples of this.
const TILE_COLUMNS: usize = 64;

/// Tiles that an answer may have beyond that, so that workers may cut theirs as they like where it costs nobody much.
const SPARE_TILES: usize = 16;

/// Why a tile is not part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TileError {
    /// It answers another call.
    #[error("a tile of call {theirs} in the answer to call {ours}")]
    OtherCall {
        /// The call that was asked.
        ours: u64,
        /// The call that the tile names.
        theirs: u64,
    },
    /// It has no column, or columns that the product does not have.
    #[error("{columns} columns from {first} of a product with {outer} columns")]
    OutOfRange {
        /// First column.
        first: u32,
        /// How many.
        columns: u32,
        /// Columns of the product.
        outer: usize,
    },
    /// A column came before.
    #[error("column {0} came twice")]
    Twice(usize),
    /// An answer in crumbs, each of which costs the receiver as much as a whole tile.
    #[error("more than {limit} tiles in an answer of {outer} columns")]
    TooMany {
        /// Tiles that this answer may have.
        limit: usize,
        /// Columns of the product.
        outer: usize,
    },
    /// It is larger than allowed.
    #[error("a tile too large: {0}")]
    TooLarge(#[from] ShapeError),
    /// Its planes do not have the shape that the product gives them (a sender's error).
    #[error("the planes of the tile at column {0} do not have the product's shape")]
    OtherShape(usize),
}

/// What follows a tile's header on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// First output column.
    pub first_column: usize,
    /// `rows × columns` values of the answer's bits.
    pub planes: PlanesShape,
}

impl TileShape {
    /// The tile whose planes have been read.
    pub fn tile(self, rows: Planes) -> ProductTile {
        ProductTile { first_column: self.first_column, rows }
    }
}

/// Which columns of an answer are still to come.
#[derive(Debug)]
pub struct TileLedger {
    call: u64,
    bits: u32,
    rows: usize,
    limit: usize,
    columns: ColumnLedger,
    /// Tiles that may still come.
    tiles: usize,
}

/// Tiles that an answer of so many columns may have.
fn most_tiles(outer: usize) -> usize {
    outer.div_ceil(TILE_COLUMNS) + SPARE_TILES
}

impl TileLedger {
    /// A ledger for the answer to `header`, of `outer` columns; no tile may exceed `limit` bytes.
    pub fn new(header: &ProductHeader, outer: usize, limit: usize) -> Self {
        Self {
            call: header.call,
            bits: header.answer_bits(),
            rows: header.rows(),
            limit,
            columns: ColumnLedger::new(outer),
            tiles: most_tiles(outer),
        }
    }

    /// Enters a tile and says what to read for it. After an error the ledger is as before.
    ///
    /// # Errors
    /// If the tile does not belong here.
    pub fn accept(&mut self, tile: &TileHeader) -> Result<TileShape, TileError> {
        if tile.call != self.call {
            return Err(TileError::OtherCall { ours: self.call, theirs: tile.call });
        }
        let outer = self.columns.outer();
        let out_of_range = TileError::OutOfRange { first: tile.first_column, columns: tile.columns, outer };
        let first = usize::try_from(tile.first_column).map_err(|_| out_of_range)?;
        let columns = usize::try_from(tile.columns).map_err(|_| out_of_range)?;
        let told = |error| match error {
            ColumnError::OutOfRange => out_of_range,
            ColumnError::Twice(column) => TileError::Twice(column),
        };
        self.columns.check(first, columns).map_err(told)?;
        if self.tiles == 0 {
            return Err(TileError::TooMany { limit: most_tiles(outer), outer });
        }
        let planes = PlanesShape::new(self.bits, self.rows, columns, self.limit)?;
        self.columns.enter(first, columns).map_err(told)?;
        self.tiles -= 1;
        Ok(TileShape { first_column: first, planes })
    }

    /// Enters a tile that is to be sent, and gives its header: a worker holds its own answers to the same rules.
    ///
    /// # Errors
    /// As [`Self::accept`], and if the planes are not those that the receiver will read.
    pub fn announce(&mut self, tile: &ProductTile) -> Result<TileHeader, TileError> {
        let other_shape = TileError::OtherShape(tile.first_column);
        let header = TileHeader {
            call: self.call,
            first_column: u32::try_from(tile.first_column).map_err(|_| other_shape)?,
            columns: u32::try_from(tile.rows.columns()).map_err(|_| other_shape)?,
        };
        let shape = self.accept(&header)?;
        if shape.planes.fits(&tile.rows) { Ok(header) } else { Err(other_shape) }
    }

    /// Columns still to come.
    pub fn left(&self) -> usize {
        self.columns.left()
    }
}
