//! Transports: how the kernel's requests come in and the answers go out.
//!
//! Both make the mount the same way ([`mounting`]) and ask the kernel for the same capabilities. [`fuser`] reads
//! requests from /dev/fuse with the library of that name. The other takes them from io_uring: `abi` has the messages,
//! `dispatch` turns them into calls and answers, `device` and `uring` are the two ways they travel, `session` is the
//! whole.

mod abi;
mod contained;
mod device;
mod dispatch;
pub mod fuser;
pub mod mounting;
mod opened;
pub mod session;
mod uring;

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::config::service::Transport;
use crate::fs::Fs;
use mounting::Options;
use session::Refusal;
pub use uring::available as uring_available;

/// A mounted session over either transport.
pub enum Mounted {
    /// Over /dev/fuse.
    Fuser(fuser::Mounted),
    /// Over io_uring.
    Uring(session::Mounted),
}

impl Mounted {
    /// Mounts and starts to serve; also gives what `fsys status` says of the transport. `auto` takes io_uring where it
    /// can be had. `threads` is the number that serve /dev/fuse; a ring has one for each processor.
    ///
    /// # Errors
    /// [`Refusal::Unsuitable`] only when io_uring was asked for by name.
    pub fn start(
        fs: &Arc<Fs>,
        mountpoint: &Path,
        options: &Options,
        transport: Transport,
        threads: usize,
    ) -> Result<(Self, String), Refusal> {
        let why = match transport {
            Transport::Fuser => String::new(),
            Transport::Auto | Transport::IoUring => match session::Mounted::start(fs.clone(), mountpoint, options) {
                Ok((mounted, description)) => return Ok((Self::Uring(mounted), format!("io-uring, {description}"))),
                Err(Refusal::Unsuitable(why)) if transport == Transport::Auto => format!("; no io-uring: {why}"),
                Err(e) => return Err(e),
            },
        };
        if !why.is_empty() {
            tracing::info!("transport fuser{why}");
        }
        let mounted = fuser::Mounted::start(fs.clone(), mountpoint, options, threads)?;
        Ok((Self::Fuser(mounted), format!("fuser, {threads} thread(s){why}")))
    }

    /// Returns when the file system was unmounted.
    ///
    /// # Errors
    /// The session ended by a failure of the device.
    pub fn wait(self) -> io::Result<()> {
        match self {
            Self::Fuser(m) => m.wait(),
            Self::Uring(m) => m.wait(),
        }
    }
}

/// What is asked of the kernel, where it offers it; one list for both transports.
fn wanted() -> u64 {
    fuser::WANTED.iter().fold(0, |all, flag| all | flag.bits())
}

/// Room for the largest request: data, and whatever comes before it.
fn buffer_size() -> usize {
    device::MAX_WRITE as usize + rustix::param::page_size()
}
