//! What this node was configured to have and runs without: a key, an identity, a part of nix.conf.
//! One registry for all of it, which `/health`, the status page and `peerix doctor` read.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Faults under which the daemon runs nevertheless, by code. The codes are a fixed set, so the map
/// is bounded.
#[derive(Default)]
pub struct Degraded(Mutex<BTreeMap<&'static str, String>>);

impl Degraded {
    /// Records that something is wrong. Logs an error if that is new, and nothing if it was
    /// recorded before.
    pub fn record(&self, code: &'static str, text: String) {
        if self.lock().insert(code, text.clone()).as_ref() != Some(&text) {
            log::error!("{text}");
        }
    }

    /// Records that it is right. Logs that if it was wrong before.
    pub fn clear(&self, code: &'static str) {
        if let Some(text) = self.lock().remove(code) {
            log::info!("no longer so: {text}");
        }
    }

    /// Records the outcome of a try: [`Degraded::clear`] or [`Degraded::record`].
    pub fn note<T>(&self, code: &'static str, outcome: Result<T, String>) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.clear(code);
                Some(value)
            }
            Err(text) => {
                self.record(code, text);
                None
            }
        }
    }

    /// Code and text of each fault.
    pub fn all(&self) -> Vec<(&'static str, String)> {
        self.lock().iter().map(|(code, text)| (*code, text.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_stays_until_the_try_succeeds() {
        let degraded = Degraded::default();
        assert_eq!(degraded.note::<()>("key", Err("not there".into())), None);
        assert_eq!(degraded.note::<()>("key", Err("not text".into())), None);
        assert_eq!(degraded.all(), [("key", "not text".to_owned())]);
        assert_eq!(degraded.note("key", Ok(1)), Some(1));
        assert!(degraded.all().is_empty());
    }
}
