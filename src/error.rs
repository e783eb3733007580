//! The one error type that people read. A leaf: everything may use it, it uses nothing.
//!
//! Every message has the contract's form: what failed; why; what it means for the data; what to do.
//! Inside the file system operations a plain [`Errno`] travels instead, since that is what the caller's
//! system call returns.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use rustix::io::Errno;

/// Exit codes of `fsys-mount` and `fsys`; the mount(8) codes where that page defines one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Wrong usage, an unknown option, an invalid configuration (mount(8): incorrect invocation).
    Usage = 1,
    /// The system refused: no /dev/fuse, no permission, not a directory (mount(8): system error).
    System = 2,
    /// An internal fault of this program (mount(8): internal bug).
    Internal = 4,
    /// The backing directory is in use by another daemon.
    Busy = 16,
    /// Mounting failed (mount(8): mount failure).
    Mount = 32,
    /// The mount answers, but not everything is durable (a failed commit, a read-only mount).
    Degraded = 64,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error for people: `what` failed, `why`, its `effect` on the data, the `action` to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// What failed, with the path.
    pub what: String,
    /// Why, usually the system's own words.
    pub why: String,
    /// What it means for the data.
    pub effect: String,
    /// What to do about it.
    pub action: String,
    /// The exit code of a command that ends with this error.
    pub exit: Exit,
}

impl Error {
    /// All four parts at once.
    pub fn new(
        exit: Exit,
        what: impl Into<String>,
        why: impl fmt::Display,
        effect: impl Into<String>,
        action: impl Into<String>,
    ) -> Self {
        Self { what: what.into(), why: why.to_string(), effect: effect.into(), action: action.into(), exit }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  cause:  {}\n  effect: {}\n  action: {}", self.what, self.why, self.effect, self.action)
    }
}

impl std::error::Error for Error {}

/// Result with the error for people.
pub type Result<T, E = Error> = std::result::Result<T, E>;
