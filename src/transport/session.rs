//! A mount whose requests come through io_uring: rings, device and notifier as one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::device::Device;
use super::dispatch::Guard;
use super::mounting::{self, Options};
use super::uring::{self, Rings, Serving};
use super::{abi, opened, wanted};
use crate::fs::Fs;

/// Why there is no mount.
#[derive(Debug)]
pub enum Refusal {
    /// io_uring cannot be used; nothing is mounted.
    Unsuitable(uring::Reason),
    /// The mount itself fails, with any transport.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(e: io::Error) -> Self {
        Self::Failed(e)
    }
}

/// A mounted session.
pub struct Mounted {
    rings: Rings,
    ended: Receiver<io::Result<()>>,
    notifier: JoinHandle<()>,
    fs: Arc<Fs>,
}

impl Mounted {
    /// Mounts and starts to serve; also gives what `fsys status` says of the rings.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn start(fs: Arc<Fs>, mountpoint: &Path, options: &Options) -> Result<(Self, String), Refusal> {
        uring::available().map_err(Refusal::Unsuitable)?;
        let rings = Rings::prepare().map_err(Refusal::Unsuitable)?;
        let fd = mounting::mount(mountpoint, options)?;
        let served = serve(fs, fd, options, rings);
        if served.is_err() {
            // Dead by now, since its device is closed.
            mounting::unmount(mountpoint, true).map_err(Refusal::Failed)?;
        }
        served
    }

    /// Returns when the file system was unmounted.
    ///
    /// # Errors
    /// The session ended by a failure of the device or of a ring.
    pub fn wait(self) -> io::Result<()> {
        let ended = self.ended.recv().unwrap_or_else(|_| Err(io::Error::other("the device's thread ended")));
        self.rings.stop();
        self.fs.end_passthrough("the session ended");
        self.fs.stop_notifying();
        if self.notifier.join().is_err() {
            tracing::error!("the notifier thread panicked");
        }
        ended
    }
}

fn serve(fs: Arc<Fs>, fd: OwnedFd, options: &Options, rings: Rings) -> Result<(Mounted, String), Refusal> {
    let device = Arc::new(Device::new(fd));
    if device.init(wanted() | abi::OVER_IO_URING)? & abi::OVER_IO_URING == 0 {
        return Err(Refusal::Unsuitable("the kernel does not offer io_uring for FUSE".into()));
    }
    let guard = Guard { access: options.access, owner: rustix::process::geteuid().as_raw() };
    let (end, ended) = channel();
    let serving = Serving { fs: fs.clone(), guard, device: device.clone() };
    if let Err(why) = rings.start(&serving, &end) {
        rings.stop();
        return Err(Refusal::Unsuitable(why));
    }
    watch_device(serving, end)?;
    fs.begin_passthrough(Box::new(opened::Device(device.as_fd().try_clone_to_owned()?)));
    let me = fs.clone();
    let tell = move || me.notify_stale(|s| device.tell(s));
    let notifier = std::thread::Builder::new().name("notifier".into()).spawn(tell)?;
    let description = rings.description.clone();
    Ok((Mounted { rings, ended, notifier, fs }, description))
}

fn watch_device(s: Serving, end: Sender<io::Result<()>>) -> io::Result<()> {
    let body = move || {
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| s.device.run(&s.fs, s.guard)));
        // Nobody listens any more when a ring ended the session.
        end.send(run.unwrap_or_else(|_| Err(io::Error::other("the device's thread panicked")))).unwrap_or_default();
    };
    std::thread::Builder::new().name("device".into()).spawn(body).map(|_| ())
}
