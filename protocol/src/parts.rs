//! What a thread is at: marks that are set around the parts of an owner's work, so that its processor time can be told apart.
//!
//! A mark is a byte of the thread's own. Setting it and setting it back costs two stores, so that marks stand around
//! single columns, always; whoever wants to know has the system interrupt whatever runs many times a second, and looks at the
//! mark of what was interrupted ([`here`]). Marks do not say what is computed, only which part of the program does.

use std::cell::Cell;
use std::marker::PhantomData;

/// A part of an owner's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Part {
    /// Its own arithmetic in f32: norms, attention, adapters, loss, a head that nobody serves.
    Own,
    /// Public masks.
    Keystream,
    /// Transforms, forward and back, and the products between them.
    Transforms,
    /// What is left of encryption and decryption: rotation, encoding, errors, rounding, packing, and back.
    Arithmetic,
    /// Sketches and the checks by them.
    Sketch,
    /// What a thread does that is at none of these now and was before: memory, waking, waiting.
    Other,
    /// What threads do that are never at any of these: sockets, their encryption, actors.
    Elsewhere,
}

impl Part {
    /// All of them, each at the place of its number.
    pub const ALL: [Self; 7] =
        [Self::Own, Self::Keystream, Self::Transforms, Self::Arithmetic, Self::Sketch, Self::Other, Self::Elsewhere];

    /// Marks this thread to be at it, until what is returned is dropped.
    pub fn mark(self) -> Section {
        let before = AT.replace(self);
        let before = if before == Self::Elsewhere { Self::Other } else { before };
        Section { before, _thread: PhantomData }
    }
}

thread_local! {
    // Of a type without a destructor, and known when it is compiled: reading it allocates nothing and calls nothing.
    static AT: Cell<Part> = const { Cell::new(Part::Elsewhere) };
}

/// While it lives, its thread is at a part of the work; then again at what it was at before.
#[must_use]
pub struct Section {
    before: Part,
    /// It is of the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Drop for Section {
    fn drop(&mut self) {
        AT.set(self.before);
    }
}

/// What this thread is at. A signal's handler may ask.
pub fn here() -> Part {
    AT.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_within_another_gives_way_to_it_again() {
        let seen = std::thread::spawn(|| {
            let before = here();
            let outer = Part::Arithmetic.mark();
            let inner = Part::Keystream.mark();
            let within = here();
            drop(inner);
            let again = here();
            drop(outer);
            [before, within, again, here()]
        });
        let expected = [Part::Elsewhere, Part::Keystream, Part::Arithmetic, Part::Other];
        assert_eq!(seen.join().ok(), Some(expected));
    }

    #[test]
    fn each_part_stands_at_the_place_of_its_number() {
        assert!(Part::ALL.iter().enumerate().all(|(place, &part)| part as usize == place));
    }
}
