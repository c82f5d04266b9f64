//! What a thread is at: marks that are set around the parts of an owner's work, so that its processor time can be told apart.
//!
//! A mark is a byte of the thread's own. Setting it and setting it back costs two stores, so that marks stand around
//! single columns, always; whoever wants to know looks at all of them many times a second beside what each thread has
//! used of a processor. Marks do not say what is computed, only which part of the program does.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A part of an owner's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Part {
    /// Its own arithmetic in f32: norms, attention, adapters, loss, a head that nobody serves.
    Own = 1,
    /// Public masks.
    Keystream,
    /// Transforms, forward and back, and the products between them.
    Transforms,
    /// What is left of encryption and decryption: rotation, encoding, errors, rounding, packing, and back.
    Arithmetic,
    /// Sketches and the checks by them.
    Sketch,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Own, Self::Keystream, Self::Transforms, Self::Arithmetic, Self::Sketch];

    /// Marks this thread to be at it, until what is returned is dropped.
    pub fn mark(self) -> Section {
        // A thread that is ending has no mark any more.
        let before = OWN.try_with(|mark| mark.at.swap(self as u8, Ordering::Relaxed)).unwrap_or(0);
        Section { before, _thread: PhantomData }
    }
}

/// The mark of a thread.
struct Mark {
    at: AtomicU8,
    /// What the system calls the thread; `None` where it does not tell.
    thread: Option<u32>,
}

static MARKS: Mutex<Vec<Weak<Mark>>> = Mutex::new(Vec::new());

thread_local! {
    static OWN: Arc<Mark> = register();
}

fn register() -> Arc<Mark> {
    // Linux: a link to PID/task/THREAD.
    let name = std::fs::read_link("/proc/thread-self").ok();
    let thread = name.and_then(|name| name.file_name()?.to_str()?.parse().ok());
    let mark = Arc::new(Mark { at: AtomicU8::new(0), thread });
    let mut marks = MARKS.lock().unwrap_or_else(PoisonError::into_inner);
    marks.retain(|mark| mark.strong_count() > 0);
    marks.push(Arc::downgrade(&mark));
    mark
}

/// While it lives, its thread is at a part of the work; then again at what it was at before.
#[must_use]
pub struct Section {
    before: u8,
    /// It is of the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Drop for Section {
    fn drop(&mut self) {
        let _ = OWN.try_with(|mark| mark.at.store(self.before, Ordering::Relaxed));
    }
}

/// The threads that were ever marked, by the system's numbers for them, and what each is at.
pub fn marks() -> Vec<(u32, Option<Part>)> {
    let marks = MARKS.lock().unwrap_or_else(PoisonError::into_inner);
    let read = |mark: Arc<Mark>| {
        let at = mark.at.load(Ordering::Relaxed);
        Some((mark.thread?, Part::ALL.into_iter().find(|&part| part as u8 == at)))
    };
    marks.iter().filter_map(Weak::upgrade).filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_within_another_gives_way_to_it_again() {
        let at = || OWN.with(|mark| mark.at.load(Ordering::Relaxed));
        let outer = Part::Arithmetic.mark();
        {
            let _inner = Part::Keystream.mark();
            assert_eq!(at(), Part::Keystream as u8);
        }
        assert_eq!(at(), Part::Arithmetic as u8);
        if cfg!(target_os = "linux") {
            let own = OWN.with(|mark| mark.thread);
            assert!(marks().iter().any(|&(thread, part)| Some(thread) == own && part == Some(Part::Arithmetic)));
        }
        drop(outer);
        assert_eq!(at(), 0);
    }

    #[test]
    fn threads_that_ended_are_forgotten() {
        for _ in 0..10 {
            std::thread::spawn(|| drop(Part::Own.mark())).join().unwrap_or(());
        }
        let _here = Part::Own.mark();
        assert!(marks().len() < 10 + 64);
        let alive = MARKS.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(alive.iter().filter(|mark| mark.strong_count() > 0).count() <= alive.len());
    }
}
