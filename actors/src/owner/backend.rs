//! The trainer's door to encrypted products.

use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use protocol::buffer::Buffer;
use protocol::he::ParameterSet;
use protocol::ids::ProductId;

use super::convoy::{Convoy, ROOM, Seat};
use super::keys::KeyError;
use super::masks::MaskError;
use super::scheduler::{Apply, ExpectFewRows, LayerScheduler, ScheduleError};
use crate::backend::{BackendError, BackendFailure, LinearBackend, Product};
use crate::transport::{Traffic, Transport, TransportError};

/// Computes products by asking the layer scheduler and waiting for its answer.
pub struct EncryptedBackend {
    scheduler: Addr<LayerScheduler>,
    transport: Arc<dyn Transport>,
    head: bool,
    /// Where several micro-batches go side by side: the place of the one that this door is for.
    seat: Option<Seat>,
}

impl EncryptedBackend {
    /// A backend over a scheduler whose layers are assigned, the slices of the head among them or not; `transport` is asked
    /// only for its traffic and its distance.
    pub fn new(scheduler: Addr<LayerScheduler>, transport: Arc<dyn Transport>, head: bool) -> Self {
        Self { scheduler, transport, head, seat: None }
    }
}

impl LinearBackend for EncryptedBackend {
    fn apply(&self, product: ProductId, rows: Arc<Buffer>, tokens: usize) -> Result<Product, BackendError> {
        let request = Apply { product, rows, tokens, seat: self.seat.clone() };
        let answer = futures::executor::block_on(self.scheduler.send(request));
        let why = match answer {
            Ok(Ok(verified)) => return Ok(verified.into()),
            Ok(Err(error)) => failure(&error),
            Err(error) => BackendFailure::Internal(format!("the layer scheduler is gone ({error})")),
        };
        Err(BackendError { product, why })
    }

    fn expect_few_rows(&self) {
        if futures::executor::block_on(self.scheduler.send(ExpectFewRows)).is_err() {
            tracing::debug!("the layer scheduler is gone: no pads are made");
        }
    }

    fn side_by_side(&self, rows: &[usize]) -> Option<Vec<Arc<dyn LinearBackend>>> {
        let seats = seats(rows);
        if seats.iter().all(Option::is_none) {
            return None;
        }
        let door = |seat| {
            let (scheduler, transport) = (self.scheduler.clone(), Arc::clone(&self.transport));
            Arc::new(Self { scheduler, transport, head: self.head, seat }) as Arc<dyn LinearBackend>
        };
        Some(seats.into_iter().map(door).collect())
    }

    fn asks_workers(&self) -> bool {
        true
    }

    fn serves_head(&self) -> bool {
        self.head
    }

    fn traffic(&self) -> Traffic {
        self.transport.traffic()
    }

    fn round_trip(&self) -> Option<Duration> {
        self.transport.round_trip()
    }
}

/// Convoys of neighbours that fill no more than a block together, if only of one; none for a micro-batch that needs more than a block.
fn seats(rows: &[usize]) -> Vec<Option<Seat>> {
    let block = ParameterSet::P24.polynomial_size();
    let mut seats = Vec::with_capacity(rows.len());
    while let Some(&first) = rows.get(seats.len()) {
        let mut members = vec![first];
        while let Some(&next) = rows.get(seats.len() + members.len())
            && members.iter().sum::<usize>().saturating_add(next) <= block
        {
            members.push(next);
        }
        match members[..] {
            [alone] if alone > block => seats.push(None),
            _ => seats.extend(Convoy::seats(members, ROOM).into_iter().map(Some)),
        }
    }
    seats
}

/// What a failed product means for the run.
fn failure(error: &ScheduleError) -> BackendFailure {
    let why = error.to_string();
    match error {
        ScheduleError::LostWorkers(_) => BackendFailure::LostWorkers(why),
        ScheduleError::Key(KeyError::Encode(_)) => BackendFailure::Rows(why),
        ScheduleError::Transport(TransportError::Refused { .. })
        | ScheduleError::Masks(MaskError::Transport(TransportError::Refused { .. }))
        | ScheduleError::Key(KeyError::Transport(TransportError::Refused { .. })) => BackendFailure::Refused(why),
        _ => BackendFailure::Internal(why),
    }
}
