//! A guard that runs a function at the end of a scope, also when the scope unwinds from a panic.

/// Calls a function when it is dropped, once.
pub struct Deferred<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Deferred<F> {
    /// Creates a guard that calls `f` when it is dropped.
    pub fn new(f: F) -> Self {
        Deferred(Some(f))
    }
}

impl<F: FnOnce()> Drop for Deferred<F> {
    fn drop(&mut self) {
        if let Some(f) = self.0.take() {
            f();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn deferred_dropped_by_panic_calls_function_once() {
        let calls = Cell::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            let _end = Deferred::new(|| calls.set(calls.get() + 1));
            assert_eq!(calls.get(), 0);
            panic!("on purpose");
        }));
        assert!(result.is_err());
        assert_eq!(calls.get(), 1);
    }
}
