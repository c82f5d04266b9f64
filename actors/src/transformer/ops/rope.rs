//! Rotary positions (Su et al., 2021) in Hugging Face's layout: feature `i` of a head turns with `i + head_dim/2`.

use crate::transformer::vector::vectorised;

/// Cosine and sine of every position and frequency.
pub(crate) struct RopeTable {
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RopeTable {
    /// For positions `0 .. length`, from the `head_dim / 2` frequencies in radians a position.
    pub(crate) fn new(frequencies: &[f32], length: usize) -> Self {
        let angles = (0..length).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let (sines, cosines) = angles.map(f32::sin_cos).unzip();
        Self { half: frequencies.len(), cosines, sines }
    }

    /// Turns one head's features at a position.
    pub(crate) fn turn(&self, position: usize, head: &mut [f32]) {
        self.rotate(position, head, 1.0);
    }

    /// Turns them back; also what the gradient goes through.
    pub(crate) fn turn_back(&self, position: usize, head: &mut [f32]) {
        self.rotate(position, head, -1.0);
    }

    fn rotate(&self, position: usize, head: &mut [f32], sign: f32) {
        let row = position * self.half..(position + 1) * self.half;
        let (low, high) = head.split_at_mut(self.half);
        rotate(low, high, &self.cosines[row.clone()], &self.sines[row], sign);
    }
}

vectorised! {
    fn rotate(low: &mut [f32], high: &mut [f32], cosines: &[f32], sines: &[f32], sign: f32) {
        for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cosines.iter().zip(sines)) {
            let sin = sin * sign;
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}
