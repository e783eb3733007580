//! What a mount rests on, looked at: the host ([`host`]), the backing directory ([`backing`]), the mount point
//! ([`mountpoint`]).
//!
//! `fsys doctor` shows everything; a mount logs what is not in order before it serves. Looks only: nothing is
//! changed. Invariant: what is not in order says why, what it means for the data, and what to do.

mod backing;
mod device;
mod host;
mod mountpoint;

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::error::Error;

/// How good it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// In order, or a fact to know.
    Ok,
    /// It works; something is slower, or less, than it could be.
    Warning,
    /// It cannot be mounted, or a promise does not hold here.
    Failure,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "FAILURE",
        })
    }
}

/// What was found about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub check: &'static str,
    /// How good it is.
    pub level: Level,
    /// What is there.
    pub cause: String,
    /// What it means for the data, the speed, the mount; may be empty when it is in order.
    pub effect: String,
    /// What to do; empty when there is nothing to do.
    pub action: String,
}

impl Finding {
    fn ok(check: &'static str, cause: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, cause: cause.into(), effect: String::new(), action: String::new() }
    }

    fn warning(check: &'static str, cause: impl Into<String>, effect: &str, action: &str) -> Self {
        Self { check, level: Level::Warning, cause: cause.into(), effect: effect.into(), action: action.into() }
    }

    fn failure(check: &'static str, cause: impl Into<String>, effect: &str, action: &str) -> Self {
        Self { level: Level::Failure, ..Self::warning(check, cause, effect, action) }
    }

    /// What would end a mount.
    fn refused(check: &'static str, e: &Error) -> Self {
        Self::failure(check, format!("{}: {}", e.what, e.why), &e.effect, &e.action)
    }
}

impl Finding {
    /// For the log of a mount, in the form of an error.
    pub fn note(&self) -> String {
        format!("{}: {}: {}\n  effect: {}\n  action: {}", self.level, self.check, self.cause, self.effect, self.action)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {:<16} {}", self.level, self.check, self.cause)?;
        for (name, text) in [("effect", &self.effect), ("action", &self.action)] {
            if !text.is_empty() {
                write!(f, "\n{:25} {name}: {text}", "")?;
            }
        }
        Ok(())
    }
}

/// Everything, in the order in which a mount needs it.
pub fn examine(backing: Option<&Path>, mountpoint: Option<&Path>) -> Vec<Finding> {
    let mut found = host::examine();
    if let Some(dir) = backing {
        found.extend(backing::examine(dir));
    }
    if let Some(dir) = mountpoint {
        found.extend(mountpoint::examine(dir, backing));
    }
    found
}

/// What people should know about a backing directory that is about to be mounted: what is not in order.
pub fn concerns(backing: &Path) -> Vec<Finding> {
    let all = host::lasting().into_iter().chain(backing::lasting(backing));
    all.filter(|f| f.level > Level::Ok).collect()
}

/// A number that the kernel shows in a file.
fn number_in(path: &str) -> Option<u64> {
    text_in(path)?.parse().ok()
}

/// A word that the kernel shows in a file.
fn text_in(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}
