//! The locks of [`std::sync`] without poisoning. A panic ends one thread and not the daemon, and
//! shared data is changed in steps that leave it valid, so other threads use it as it is.

pub use std::sync::MutexGuard;
use std::sync::{self, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::Duration;

/// A [`std::sync::Mutex`] that ignores poisoning.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    /// Creates an unlocked mutex.
    pub const fn new(value: T) -> Self {
        Mutex(sync::Mutex::new(value))
    }

    /// Locks the mutex. Blocks while another thread holds it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the mutex, or returns `None` at once if another thread holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(locked) => Some(locked),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// A [`std::sync::RwLock`] that ignores poisoning.
#[derive(Debug, Default)]
pub struct RwLock<T>(sync::RwLock<T>);

impl<T> RwLock<T> {
    /// Creates an unlocked lock.
    pub const fn new(value: T) -> Self {
        RwLock(sync::RwLock::new(value))
    }

    /// Locks for reading. Blocks while a thread writes.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks for writing. Blocks while another thread reads or writes.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A [`std::sync::Condvar`] for [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(sync::Condvar);

impl Condvar {
    /// Blocks until a notification, for at most `time`. May return early without one.
    pub fn wait_timeout<'a, T>(
        &self,
        lock: MutexGuard<'a, T>,
        time: Duration,
    ) -> MutexGuard<'a, T> {
        self.0.wait_timeout(lock, time).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Blocks while `condition` is true, for at most `time`.
    pub fn wait_timeout_while<'a, T>(
        &self,
        lock: MutexGuard<'a, T>,
        time: Duration,
        condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        let waited = self.0.wait_timeout_while(lock, time, condition);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes one waiting thread.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiting threads.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_of_panicked_thread_is_used_as_it_is() {
        let (mutex, lock) = (Mutex::new(1), RwLock::new(2));
        let panics = || {
            let _held = (mutex.lock(), lock.write());
            panic!("on purpose");
        };
        assert!(std::thread::scope(|scope| scope.spawn(panics).join()).is_err());
        assert_eq!(*lock.read(), 2);
        *lock.write() += 1;
        let value = Condvar::default().wait_timeout_while(mutex.lock(), Duration::ZERO, |_| true);
        assert_eq!(*value, 1);
    }
}
