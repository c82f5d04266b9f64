//! Lines for people, which nobody has to read: a pipe that was closed (`| head`) or a terminal that is gone neither
//! panics, as `println!` would, nor ends a run. What could not be written is lost.

use std::fmt::Display;
use std::io::{self, Write};

/// A line on standard output.
pub fn print(line: impl Display) {
    // See the module's documentation.
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// A line on standard error.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Writes what can be written, and says of the rest that it was.
#[derive(Debug)]
pub(crate) struct Unread<W>(pub(crate) W);

impl<W: Write> Write for Unread<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pipe_that_was_closed_takes_every_line() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        assert!((&writer).write_all(b"line").is_err(), "nobody reads it");
        let mut unread = Unread(writer);
        unread.write_all(b"line").and_then(|()| unread.flush()).unwrap();
    }
}
