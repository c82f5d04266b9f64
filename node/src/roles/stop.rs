//! When a process is asked to stop.

use std::mem::MaybeUninit;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Ctrl-C, SIGTERM and the end of the terminal (SIGHUP), from the moment that this value exists: none is missed between two
/// waits.
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    /// `None` where whoever started the process has it outlive its terminal, as `nohup` does.
    hang_up: Option<Signal>,
}

impl StopSignals {
    /// Begins to listen.
    ///
    /// # Errors
    /// When the process cannot receive signals.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("signals cannot be received");
        let hang_up = if hang_up_is_ignored() { None } else { Some(listen(SignalKind::hangup())?) };
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())?, hang_up })
    }

    /// Waits for the next one.
    ///
    /// # Cancel safety
    /// A signal is never lost by dropping the future.
    pub(crate) async fn next(&mut self) {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => drop(signal.recv().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = hang_up => {}
        }
    }
}

/// Whether SIGHUP does nothing to this process.
fn hang_up_is_ignored() -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call only writes the present one, for which the pointer is valid.
    let status = unsafe { libc::sigaction(libc::SIGHUP, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: `sigaction` fills the structure when it returns 0.
    status == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
