//! The seam between the life cycle and the file system: what is started, and how it is seen afterwards.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
pub use crate::config::options::{Access, FuseOptions};
use crate::engine::layout::Layout;
use crate::error::{Errno, Result};
use crate::telemetry::activity::{Activity, Histograms};
use crate::telemetry::{PathReport, Status};

/// Subtype of every mount, so that its type is shown as `fuse.fsys` and found again by that.
pub const SUBTYPE: &str = "fsys";

/// The mounted file system as the life cycle sees it.
pub trait Volume: Send + Sync {
    /// What `fsys status` shows; the mount point is filled in.
    fn status(&self) -> Status;

    /// How long things took, since the mount.
    fn histograms(&self) -> Histograms;

    /// The busiest and slowest of late.
    fn activity(&self) -> Activity;

    /// Takes a configuration; it holds for what is opened and committed from now on.
    fn configure(&self, config: Config);

    /// What `fsys get` shows of a path relative to the root of the mount; empty: the root.
    ///
    /// # Errors
    /// What a look-up of the path would answer.
    fn report(&self, relative: &Path) -> Result<PathReport, Errno>;

    /// Waits until everything that was acknowledged before the call is durable. Now and then `left` is told how much
    /// is not, and says whether to go on.
    ///
    /// # Errors
    /// The time is over, `left` did not want to go on, or something could not be made durable.
    fn drain(&self, timeout: Duration, left: &mut dyn FnMut(u64) -> bool) -> Result<(), DrainError>;

    /// After the session ended: drains and stops all threads.
    fn shutdown(&self);
}

/// Why a drain did not reach its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DrainError {
    /// The time is over and `left` versions are not yet durable.
    TimedOut {
        /// Versions that are not yet durable.
        left: u64,
    },
    /// Something could not be made durable, in words for people.
    Failed(String),
}

impl fmt::Display for DrainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut { left } => write!(f, "the time is over and {left} version(s) are not yet durable"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for DrainError {}

/// A running FUSE session.
pub trait Session: Send {
    /// Returns when the file system was unmounted.
    ///
    /// # Errors
    /// The session ended by a failure of the FUSE device.
    fn wait(self: Box<Self>) -> io::Result<()>;
}

/// Everything that is needed to start a volume; recovery is done and the lock is held.
pub struct Launch<'a> {
    /// The backing directory, canonical.
    pub root: &'a Path,
    /// The mount point, canonical.
    pub mountpoint: &'a Path,
    /// Policies and limits.
    pub config: Config,
    /// What the mount is told.
    pub fuse: FuseOptions,
    /// `.fsys/`, open and locked; lives as long as the volume.
    pub layout: Layout,
}

/// Mounts a volume and starts to serve it. The session must not depend on the calling thread.
pub type Launcher = fn(Launch) -> Result<(Arc<dyn Volume>, Box<dyn Session>)>;
