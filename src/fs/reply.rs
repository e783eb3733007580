//! The answer to an operation, which may be given later and by another thread.

use rustix::io::Errno;

/// Answers exactly once: a reply that is dropped answers EIO, so no program waits for ever.
pub struct Reply<T>(Option<Box<dyn FnOnce(Result<T, Errno>) + Send>>);

impl<T> Reply<T> {
    /// Calls `f` with the result.
    pub fn new(f: impl FnOnce(Result<T, Errno>) + Send + 'static) -> Self {
        Self(Some(Box::new(f)))
    }

    /// Answers.
    pub fn send(mut self, r: Result<T, Errno>) {
        if let Some(f) = self.0.take() {
            f(r);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(f) = self.0.take() {
            f(Err(Errno::IO));
        }
    }
}
