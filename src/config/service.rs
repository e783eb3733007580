//! What concerns the daemon itself: its log, its metrics, whom it lets set a policy.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Least severe level that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Something failed.
    Error,
    /// Something that people should know.
    Warn,
    /// What happens to the mount.
    Info,
    /// For the people who work on this program.
    Debug,
    /// More of it.
    Trace,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
    /// Records with fields, to the journal of systemd.
    Journald,
}

/// How the kernel's requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Transport {
    /// Through io_uring where it can be had, else over /dev/fuse.
    #[default]
    Auto,
    /// Over /dev/fuse, with the library fuser.
    Fuser,
    /// Through io_uring, or not at all.
    IoUring,
}

/// The values by name are in [`super::keys`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Least severe level that is logged.
    pub log: Level,
    /// How.
    pub log_format: LogFormat,
    /// Whether the xattr `user.fsys.policy` of a file sets its policy.
    pub xattr_policy: bool,
    /// Where Prometheus may ask, besides the control socket.
    pub metrics: Option<SocketAddr>,
    /// Whether that may be an address which other machines reach.
    pub metrics_remote: bool,
    /// How the kernel's requests come.
    pub transport: Transport,
}

impl Default for Service {
    fn default() -> Self {
        Self {
            log: Level::Info,
            log_format: LogFormat::Text,
            xattr_policy: false,
            metrics: None,
            metrics_remote: false,
            transport: Transport::Auto,
        }
    }
}
