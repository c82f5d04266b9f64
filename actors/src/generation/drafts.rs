//! Guesses at the next tokens: what followed the same words earlier in the text.
//!
//! Texts repeat themselves: names, quotations, code. A guess costs a row in a pass that is made anyway, and each one that is
//! right saves a pass, with all of its round trips. Whether it is right is what the model itself says: what would have been
//! chosen without the guess is chosen with it.

/// The most and the fewest tokens that have to be the same before what followed them is taken for a guess.
const SAME: (usize, usize) = (4, 2);
/// Guesses that are tried first.
const FIRST: usize = 3;

/// Guesses for one text.
pub(super) struct Lookup {
    most: usize,
    /// How many are worth trying now.
    now: usize,
}

impl Lookup {
    /// At most so many guesses at a time.
    pub(super) fn new(most: usize) -> Self {
        Self { most, now: FIRST.min(most) }
    }

    /// Guesses for what follows a text, at most `room`.
    pub(super) fn guess<'a>(&self, text: &'a [u32], room: usize) -> &'a [u32] {
        let count = self.now.min(room);
        if count == 0 {
            return &[];
        }
        for same in (SAME.1..=SAME.0).rev() {
            let Some(start) = text.len().checked_sub(same) else { continue };
            let (earlier, end) = (&text[..text.len() - 1], &text[start..]);
            if let Some(at) = earlier.windows(same).rposition(|window| window == end) {
                let next = at + same;
                return &text[next..(next + count).min(text.len())];
            }
        }
        &[]
    }

    /// So many of some guesses were right.
    pub(super) fn learn(&mut self, guessed: usize, right: usize) {
        if guessed > 0 {
            self.now = if right == guessed { (2 * self.now).min(self.most) } else { (right + 1).min(self.most) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_same_words_last_is_guessed() {
        let lookup = Lookup::new(8);
        let text = [1, 2, 3, 4, 5, 2, 3, 9, 8, 7, 2, 3];
        assert_eq!(lookup.guess(&text, 8), [9, 8, 7], "after the last `2 3`");
        assert_eq!(lookup.guess(&text, 1), [9]);
        assert_eq!(lookup.guess(&text, 0), [0; 0]);
        // More that is the same says more.
        assert_eq!(lookup.guess(&[5, 2, 3, 6, 2, 3, 7, 5, 2, 3], 1), [6]);
        assert_eq!(lookup.guess(&[1, 2, 3], 8), [0; 0]);
        assert_eq!(lookup.guess(&[4, 4, 4], 8), [4], "of what there is");
        assert_eq!(lookup.guess(&[4], 8), [0; 0]);
        assert_eq!(Lookup::new(0).guess(&text, 8), [0; 0]);
    }

    #[test]
    fn more_is_guessed_where_guesses_are_right() {
        let mut lookup = Lookup::new(8);
        let text = [[7; 20]; 2].concat();
        lookup.learn(3, 3);
        assert_eq!(lookup.now, 6);
        lookup.learn(6, 6);
        assert_eq!(lookup.now, 8);
        lookup.learn(8, 1);
        assert_eq!(lookup.now, 2);
        lookup.learn(2, 0);
        assert_eq!(lookup.guess(&text, 8).len(), 1);
        lookup.learn(0, 0);
        assert_eq!(lookup.now, 1);
    }
}
