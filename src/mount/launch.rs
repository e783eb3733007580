//! Puts the parts together: backing directory, engine, operation core, transport.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::StatVfsMountFlags;

use super::table;
use super::volume::{Access, DrainError, FuseOptions, Launch, SUBTYPE, Session, Volume};
use crate::backend::Backing;
use crate::engine::Engine;
use crate::engine::layout::Layout;
use crate::error::{Errno, Error, Exit, Result};
use crate::fs::Fs;
use crate::telemetry::activity::{Activity, Histograms};
use crate::telemetry::{PathReport, Status};
use crate::transport::Mounted;
use crate::transport::mounting::{self, Options};
use crate::transport::session::Refusal;

/// How long the end of the mount waits for what is not durable yet.
const SHUTDOWN: Duration = Duration::from_secs(60);

/// How often a drain tells how much is left.
const TELL: Duration = Duration::from_millis(200);

struct FsVolume {
    fs: Arc<Fs>,
    root: PathBuf,
    mountpoint: PathBuf,
    /// What `fsys status` says of it.
    transport: String,
    /// Of the backing file system.
    device: String,
    /// Holds the lock of the backing directory.
    _layout: Layout,
}

/// Mounts the file system over the backing directory.
///
/// # Errors
/// The backing directory cannot be used, or the kernel refuses the mount.
pub fn launch(l: Launch) -> Result<(Arc<dyn Volume>, Box<dyn Session>)> {
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let open = || -> io::Result<Arc<Fs>> {
        let (root, staging, failed) = (own(l.layout.root())?, own(l.layout.staging())?, own(l.layout.failed())?);
        let backing = Backing::open(root, staging, failed, None)?.with_journal(own(l.layout.journal())?);
        if l.config.policies.use_journal() && backing.journal().is_none() {
            return Err(io::Error::other("write mode `journal` needs files by handle (CAP_DAC_READ_SEARCH)"));
        }
        Ok(Fs::new(Engine::start(backing, l.config.clone())?)?)
    };
    let fs = open().map_err(|e| {
        refused(
            "cannot use the backing directory",
            l.root,
            &e,
            "see that it is on a local file system (ext4, XFS, btrfs, tmpfs); write mode `journal` is for mounts by root",
        )
    })?;
    let watcher = fs.clone();
    let watch = std::thread::Builder::new().name("watch".into()).spawn(move || watcher.follow_changes());
    watch.map_err(|e| refused("cannot start a thread for", l.root, &e, "see the limits on threads (`ulimit -u`)"))?;
    let backing = rustix::fs::fstatvfs(fs.engine().backing.root()).map_or(StatVfsMountFlags::empty(), |s| s.f_flag);
    let (options, config) = (mount_options(&l.fuse, l.root, backing), &l.config);
    let started = Mounted::start(&fs, l.mountpoint, &options, config.service.transport, config.limits.threads);
    let (mounted, transport) = started.map_err(|refusal| {
        fs.stop_watching();
        if let Err(left) = fs.engine().shutdown(Duration::ZERO) {
            tracing::debug!(left, "nothing was mounted, so nothing can be left");
        }
        not_mounted(l.mountpoint, &refusal)
    })?;
    let (root, mountpoint) = (l.root.to_owned(), l.mountpoint.to_owned());
    let volume = FsVolume { fs, device: device_of(&root), root, mountpoint, transport, _layout: l.layout };
    Ok((Arc::new(volume), Box::new(FuseSession(mounted))))
}

/// The device below a directory: for people, so an empty text where it cannot be told.
fn device_of(path: &Path) -> String {
    let mounts = table::read().unwrap_or_default();
    table::holding(&mounts, path).map_or_else(String::new, |m| format!("{} ({})", m.source, m.device))
}

fn refused(what: &str, path: &Path, why: &dyn std::fmt::Display, action: &str) -> Error {
    Error::new(
        Exit::Mount,
        format!("{what} {}", path.display()),
        why,
        "nothing is mounted; no file was touched",
        action,
    )
}

fn not_mounted(mountpoint: &Path, refusal: &Refusal) -> Error {
    match refusal {
        Refusal::Failed(e) => refused(
            "cannot mount",
            mountpoint,
            e,
            "run as root, or install fuse3 for fusermount3; see that /dev/fuse is there",
        ),
        Refusal::Unsuitable(why) => refused(
            "cannot mount with transport=io-uring on",
            mountpoint,
            why,
            "enable what is missing, or use transport=auto, which takes io-uring where it can be had",
        ),
    }
}

/// What is not said is as on the backing mount: set-user-ID programs and device nodes work where they do there, and
/// nowhere else. (fusermount3 forbids both to ordinary users.)
fn mount_options(o: &FuseOptions, root: &Path, backing: StatVfsMountFlags) -> Options {
    let as_root = rustix::process::geteuid().is_root();
    let as_backing = |v: Option<bool>, no: StatVfsMountFlags| v.or(as_root.then_some(!backing.contains(no)));
    Options {
        fsname: o.fsname.clone().unwrap_or_else(|| root.display().to_string()),
        subtype: SUBTYPE,
        access: match o.access {
            Access::Everyone => mounting::Access::All,
            Access::Root => mounting::Access::RootAndOwner,
            Access::Unset if as_root => mounting::Access::All,
            Access::Unset => mounting::Access::Owner,
        },
        read_only: o.read_only == Some(true),
        dev: as_backing(o.dev, StatVfsMountFlags::NODEV),
        suid: as_backing(o.suid, StatVfsMountFlags::NOSUID),
        exec: as_backing(o.exec, StatVfsMountFlags::NOEXEC),
        atime: o.atime,
    }
}

impl Volume for FsVolume {
    fn status(&self) -> Status {
        let (device, transport) = (self.device.clone(), self.transport.clone());
        Status { transport, device, ..self.fs.status(&self.root, &self.mountpoint) }
    }

    fn histograms(&self) -> Histograms {
        self.fs.engine().histograms()
    }

    fn activity(&self) -> Activity {
        self.fs.engine().activity()
    }

    fn configure(&self, config: crate::config::Config) {
        self.fs.engine().configure(config);
    }

    fn report(&self, relative: &Path) -> Result<PathReport, Errno> {
        self.fs.report(relative)
    }

    fn drain(&self, timeout: Duration, left: &mut dyn FnMut(u64) -> bool) -> Result<(), DrainError> {
        let engine = self.fs.engine();
        let failures = engine.counters.values().commit_failures;
        let end = Instant::now() + timeout;
        let drained = loop {
            let rest = end.saturating_duration_since(Instant::now());
            match engine.drain(rest.min(TELL)) {
                Err(n) if rest > TELL && engine.writable().is_ok() && left(n) => {}
                ended => break ended,
            }
        };
        if let Some(why) = engine.read_only_reason() {
            return Err(DrainError::Failed(format!("the mount is read-only: {why}")));
        }
        match (drained, engine.counters.values().commit_failures - failures) {
            (Ok(()), 0) => Ok(()),
            (Ok(()), n) => Err(DrainError::Failed(format!("{n} commits failed; the versions before them stand"))),
            (Err(left), _) => Err(DrainError::TimedOut { left }),
        }
    }

    fn shutdown(&self) {
        self.fs.stop_watching();
        if let Err(left) = self.fs.engine().shutdown(SHUTDOWN) {
            tracing::error!(
                left,
                "ended with work that is not known to be durable: those files are old or new, none is torn"
            );
        }
    }
}

struct FuseSession(Mounted);

impl Session for FuseSession {
    fn wait(self: Box<Self>) -> io::Result<()> {
        self.0.wait()
    }
}
