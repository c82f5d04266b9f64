//! Why a product or an assignment failed, and whose doing it is.

use actix::MailboxError;
use protocol::he::DecryptError;
use protocol::ids::LinearId;
use protocol::wire::messages::Refusal;

use crate::owner::assignment::NotEnoughMemory;
use crate::owner::fleet::Failure;
use crate::owner::keys::KeyError;
use crate::owner::masks::MaskError;
use crate::transport::{PeerName, TransportError};

/// Why a product or an assignment failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// The model has no such layer.
    #[error("no worker serves {0}: the model has no such layer")]
    NoRoute(LinearId),
    /// No layers were assigned yet, or all were released.
    #[error("no layers are assigned to workers: the run has not begun, or has ended")]
    NotBegun,
    /// Nobody serves what is needed, and the patience is over.
    #[error("the run cannot go on without more workers: {0}")]
    LostWorkers(String),
    /// The workers found are too small.
    #[error(transparent)]
    Memory(#[from] NotEnoughMemory),
    /// A worker failed, and went on failing.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The product of a mask could not be had.
    #[error(transparent)]
    Masks(#[from] MaskError),
    /// Encryption or decryption failed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The key manager is gone.
    #[error("the key manager is gone ({0})")]
    Mailbox(#[from] MailboxError),
    /// A bug.
    #[error("sealing a product ended early; this is a bug")]
    Sealing,
}

/// Whose doing a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The owner's own: it would fail in the same way at every worker.
    Own,
    /// The worker does not take this product, and never will; another one may.
    Refuses,
    /// The worker's.
    Worker(Failure),
}

/// Judges a failed product.
pub(super) fn verdict(error: &ScheduleError) -> Verdict {
    match error {
        ScheduleError::Transport(error)
        | ScheduleError::Masks(MaskError::Transport(error))
        | ScheduleError::Key(KeyError::Transport(error)) => of_transport(error),
        // A mistake of the owner's, not the worker's.
        ScheduleError::Key(KeyError::Decrypt(DecryptError::OtherRows)) => Verdict::Own,
        ScheduleError::Key(KeyError::Decrypt(_)) | ScheduleError::Masks(MaskError::Answer(_)) => {
            Verdict::Worker(Failure::Garbled)
        }
        ScheduleError::Key(KeyError::Refuted(_)) => Verdict::Worker(Failure::BodyRefuted),
        ScheduleError::Masks(MaskError::Refuted(_)) => Verdict::Worker(Failure::MaskRefuted),
        _ => Verdict::Own,
    }
}

fn of_transport(error: &TransportError) -> Verdict {
    match error {
        TransportError::Invalid { .. } => Verdict::Own,
        TransportError::Unreachable { .. } => Verdict::Worker(Failure::Away),
        TransportError::Protocol { .. } => Verdict::Worker(Failure::Garbled),
        TransportError::Refused { refusal, .. } => match refusal {
            Refusal::Busy(_) => Verdict::Worker(Failure::Busy),
            Refusal::Layers(_) => Verdict::Worker(Failure::NotServing),
            Refusal::Capacity(_) | Refusal::Failed(_) => Verdict::Worker(Failure::Unable),
            Refusal::Version(_) | Refusal::Model(_) | Refusal::Malformed(_) => Verdict::Refuses,
        },
    }
}

/// A worker that does not answer any more.
pub(super) fn gone(peer: &PeerName) -> ScheduleError {
    TransportError::Unreachable { peer: peer.clone(), what: "it does not answer any more".into() }.into()
}

#[cfg(test)]
mod tests {
    use protocol::sketch::{ForgedMasks, Refuted};

    use super::*;

    #[test]
    fn every_failure_is_somebodys() {
        let peer = || PeerName::from("somebody");
        let refused = |refusal| TransportError::Refused { peer: peer(), refusal };
        let what = String::new;
        let garbled = Verdict::Worker(Failure::Garbled);
        let of_transport = [
            (TransportError::Unreachable { peer: peer(), what: what() }, Verdict::Worker(Failure::Away)),
            (TransportError::Protocol { peer: peer(), what: what() }, garbled),
            (TransportError::Invalid { what: what() }, Verdict::Own),
            (refused(Refusal::Busy(what())), Verdict::Worker(Failure::Busy)),
            (refused(Refusal::Layers(what())), Verdict::Worker(Failure::NotServing)),
            (refused(Refusal::Failed(what())), Verdict::Worker(Failure::Unable)),
            (refused(Refusal::Capacity(what())), Verdict::Worker(Failure::Unable)),
            (refused(Refusal::Malformed(what())), Verdict::Refuses),
            (refused(Refusal::Version(9)), Verdict::Refuses),
        ];
        for (error, expected) in of_transport {
            assert_eq!(verdict(&error.clone().into()), expected, "{error}");
            assert_eq!(verdict(&MaskError::from(error.clone()).into()), expected, "{error}");
            assert_eq!(verdict(&KeyError::from(error.clone()).into()), expected, "{error}");
        }
        assert_eq!(verdict(&KeyError::from(DecryptError::Repeated(3)).into()), garbled);
        assert_eq!(verdict(&MaskError::from(DecryptError::Repeated(3)).into()), garbled);
        let refuted = KeyError::from(Refuted::Row { row: 1, rows: 2 });
        assert_eq!(verdict(&refuted.into()), Verdict::Worker(Failure::BodyRefuted));
        assert_eq!(verdict(&MaskError::from(ForgedMasks).into()), Verdict::Worker(Failure::MaskRefuted));
        assert_eq!(verdict(&KeyError::TooManyTickets.into()), Verdict::Own);
        assert_eq!(verdict(&KeyError::from(DecryptError::OtherRows).into()), Verdict::Own);
        assert_eq!(verdict(&ScheduleError::NotBegun), Verdict::Own);
    }
}
