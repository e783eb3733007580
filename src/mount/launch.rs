//! Puts the parts together: backing directory, engine, operation core, transport.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{Config as FuseConfig, MountOption, SessionACL};

use rustix::fs::StatVfsMountFlags;

use super::volume::{Access, DrainError, FuseOptions, Launch, SUBTYPE, Session, Volume};
use crate::backend::Backing;
use crate::engine::Engine;
use crate::engine::layout::Layout;
use crate::error::{Errno, Error, Exit, Result};
use crate::fs::Fs;
use crate::telemetry::{PathReport, Status};
use crate::transport::fuser::Mounted;

/// How long the end of the mount waits for what is not durable yet.
const SHUTDOWN: Duration = Duration::from_secs(60);

struct FsVolume {
    fs: Arc<Fs>,
    root: PathBuf,
    mountpoint: PathBuf,
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
        let backing = Backing::open(root, staging, failed, None)?;

        Ok(Fs::new(Engine::start(backing, l.config.clone())?)?)
    };
    let fs = open().map_err(|e| {
        refused(
            "cannot use the backing directory",
            l.root,
            &e,
            "see that it is on a local file system (ext4, XFS, btrfs, tmpfs)",
        )
    })?;
    let watcher = fs.clone();
    let watch = std::thread::Builder::new().name("watch".into()).spawn(move || watcher.follow_changes());
    watch.map_err(|e| refused("cannot start a thread for", l.root, &e, "see the limits on threads (`ulimit -u`)"))?;
    let backing = rustix::fs::fstatvfs(fs.engine().backing.root()).map_or(StatVfsMountFlags::empty(), |s| s.f_flag);
    let config = fuse_config(&l.fuse, l.root, backing, l.config.limits.threads);
    let mounted = Mounted::start(fs.clone(), l.mountpoint, &config).map_err(|e| {
        fs.stop_watching();
        if let Err(left) = fs.engine().shutdown(Duration::ZERO) {
            tracing::debug!(left, "nothing was mounted, so nothing can be left");
        }
        refused(
            "cannot mount",
            l.mountpoint,
            &e,
            "run as root, or install fuse3 for fusermount3; see that /dev/fuse is there",
        )
    })?;
    let volume = FsVolume { fs, root: l.root.into(), mountpoint: l.mountpoint.into(), _layout: l.layout };
    Ok((Arc::new(volume), Box::new(FuseSession(mounted))))
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

/// What is not said is as on the backing mount: set-user-ID programs and device nodes work where they do there, and
/// nowhere else. (fusermount3 forbids both to ordinary users.)
fn fuse_config(o: &FuseOptions, root: &Path, backing: StatVfsMountFlags, threads: usize) -> FuseConfig {
    let as_root = rustix::process::geteuid().is_root();
    let as_backing = |v: Option<bool>, no: StatVfsMountFlags| v.or(as_root.then_some(!backing.contains(no)));
    let fsname = o.fsname.clone().unwrap_or_else(|| root.display().to_string());
    let mut options = vec![
        MountOption::FSName(fsname),
        MountOption::Subtype(SUBTYPE.into()),
        // fuser passes the subtype on to fusermount3 only; mounting by itself, it drops it.
        MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
        // The kernel checks permissions, with the caller's groups, before a request gets here.
        MountOption::DefaultPermissions,
    ];
    let choice = |v: Option<bool>, yes, no| v.map(|v| if v { yes } else { no });
    options.extend(choice(as_backing(o.dev, StatVfsMountFlags::NODEV), MountOption::Dev, MountOption::NoDev));
    options.extend(choice(as_backing(o.suid, StatVfsMountFlags::NOSUID), MountOption::Suid, MountOption::NoSuid));
    options.extend(choice(as_backing(o.exec, StatVfsMountFlags::NOEXEC), MountOption::Exec, MountOption::NoExec));
    options.extend(choice(o.atime, MountOption::Atime, MountOption::NoAtime));
    if o.read_only {
        options.push(MountOption::RO);
    }
    let mut config = FuseConfig::default();
    config.mount_options = options;
    config.acl = match o.access {
        Access::Everyone => SessionACL::All,
        Access::Root => SessionACL::RootAndOwner,
        Access::Unset if as_root => SessionACL::All,
        Access::Unset => SessionACL::Owner,
    };
    config.n_threads = Some(threads.max(1));
    config
}

impl Volume for FsVolume {
    fn status(&self) -> Status {
        self.fs.status(&self.root, &self.mountpoint)
    }

    fn report(&self, relative: &Path) -> Result<PathReport, Errno> {
        self.fs.report(relative)
    }

    fn drain(&self, timeout: Duration) -> Result<(), DrainError> {
        let failures = self.fs.engine().counters.values().commit_failures;
        let drained = self.fs.engine().drain(timeout);
        if let Some(why) = self.fs.engine().read_only_reason() {
            return Err(DrainError::Failed(format!("the mount is read-only: {why}")));
        }
        match (drained, self.fs.engine().counters.values().commit_failures - failures) {
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
