//! Zstandard: a file is one frame after the other.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::StreamingDecoder;

/// Reads what the frames of a file hold.
pub(super) struct Frames<R: Read> {
    under_way: Option<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>,
    /// What is to be read, between frames.
    rest: Option<R>,
}

impl<R: BufRead> Frames<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { under_way: None, rest: Some(reader) }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.under_way {
                let read = frame.read(out)?;
                if read > 0 || out.is_empty() {
                    return Ok(read);
                }
                self.rest = self.under_way.take().map(StreamingDecoder::into_inner);
            }
            let Some(mut rest) = self.rest.take() else { return Ok(0) };
            if rest.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.under_way = Some(StreamingDecoder::new(rest).map_err(io::Error::other)?);
        }
    }
}
