//! Registry of configured resources that the daemon runs without, such as a key, the identity or a
//! part of nix.conf. `/health`, the status page and `peerix doctor` read it.

use crate::lock::Mutex;
use std::collections::BTreeMap;

/// Current faults by code. The codes are a fixed set, so the map is bounded.
#[derive(Default)]
pub struct Degraded(Mutex<BTreeMap<&'static str, String>>);

impl Degraded {
    /// Records a fault. Logs an error if the text differs from the last one for `code`.
    pub fn record(&self, code: &'static str, text: String) {
        if self.0.lock().insert(code, text.clone()).as_ref() != Some(&text) {
            log::error!("{text}");
        }
    }

    /// Removes a fault. Logs that if there was one.
    pub fn clear(&self, code: &'static str) {
        let removed = self.0.lock().remove(code);
        if let Some(text) = removed {
            log::info!("no longer so: {text}");
        }
    }

    /// Records the result of a try: removes the fault and returns the value, or records the error
    /// and returns `None`.
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

    /// Code and text of each current fault, sorted by code.
    pub fn all(&self) -> Vec<(&'static str, String)> {
        self.0.lock().iter().map(|(code, text)| (*code, text.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_is_kept_until_a_try_succeeds() {
        let degraded = Degraded::default();
        assert_eq!(degraded.note::<()>("key", Err("not there".into())), None);
        assert_eq!(degraded.note::<()>("key", Err("not text".into())), None);
        assert_eq!(degraded.all(), [("key", "not text".to_owned())]);
        assert_eq!(degraded.note("key", Ok(1)), Some(1));
        assert!(degraded.all().is_empty());
    }
}
