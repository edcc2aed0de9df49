//! Pseudo-random numbers for the simulation.

use std::time::Duration;

/// A generator of pseudo-random numbers (xorshift64*). The same seed gives the same numbers.
#[derive(Clone)]
pub struct SeededRandom(u64);

impl SeededRandom {
    pub fn new(seed: u64) -> Self {
        // A small seed would yield small numbers at first.
        let mut random =
            SeededRandom(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = if self.0 == 0 { 1 } else { self.0 };
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a number from 0 to `below - 1`; 0 if `below` is 0.
    pub fn below(&mut self, below: u64) -> u64 {
        (self.next() >> 11) % below.max(1)
    }

    /// Returns true with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        (self.next() >> 11) as f64 / ((1u64 << 53) as f64) < probability
    }

    pub fn between(&mut self, low: Duration, high: Duration) -> Duration {
        low + Duration::from_micros(self.below(high.saturating_sub(low).as_micros() as u64 + 1))
    }
}
