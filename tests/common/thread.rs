//! Helper threads of a test. Their names begin with the test's name, so a panic message names the
//! test.

use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// The name of the running test, also in one of its helper threads.
pub fn test_name() -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("unnamed");
    name.split_once(" (").map_or(name, |(test, _)| test).to_owned()
}

fn builder(name: &str) -> Builder {
    Builder::new().name(format!("{} ({name})", test_name()))
}

/// Starts a helper thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    builder(name).spawn(work).expect("a thread")
}

/// Starts a helper thread that ends with `scope`.
pub fn spawn_in<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, T> {
    builder(name).spawn_scoped(scope, work).expect("a thread")
}
