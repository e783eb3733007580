//! The program under test, as a program: mount, unmount, recover.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::model::{Kind, Violation};
use crate::sabotage::leave_out;

/// A mount over a backing directory. Dropped without [`Daemon::unmount`]: killed, as nothing else is left to do.
pub struct Daemon {
    pid: i32,
    process: OwnedFd,
    mountpoint: PathBuf,
    mounted: bool,
}

impl Daemon {
    pub fn mount(backing: &Path, mountpoint: &Path, options: &str) -> Self {
        Self::mount_with(backing, mountpoint, options, |_| ())
    }

    /// A daemon that believes that it makes these system calls.
    pub fn mount_without(backing: &Path, mountpoint: &Path, options: &str, calls: &[libc::c_long]) -> Self {
        Self::mount_with(backing, mountpoint, options, |command| leave_out(command, calls))
    }

    /// A daemon that is started in a special way.
    pub fn mount_with(backing: &Path, mountpoint: &Path, options: &str, set_up: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsys-mount"));
        set_up(&mut command);
        let out = command
            .args((!options.is_empty()).then_some(["-o", options]).into_iter().flatten())
            .arg(backing)
            .arg(mountpoint)
            .output()
            .unwrap();
        assert!(out.status.success(), "fsys-mount: {}", said(&out));
        let lock = fs::read_to_string(backing.join(".fsys/lock")).unwrap();
        let pid: i32 =
            lock.split_whitespace().next().unwrap().parse().unwrap_or_else(|e| panic!("pid in {lock:?}: {e}"));
        let process = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        Self { pid, process, mountpoint: mountpoint.into(), mounted: true }
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn raw_pid(&self) -> Pid {
        Pid::from_raw(self.pid).unwrap()
    }

    pub fn is_running(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0)
    }

    /// `fsys status` as a program reads it: health and reason.
    pub fn health(&self) -> (String, String) {
        let out = tool().args(["status", "--json"]).arg(&self.mountpoint).output().unwrap();
        let status: serde_json::Value =
            serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&out)));
        let text = |key: &str| status[key].as_str().unwrap().to_owned();
        (text("health"), text("reason"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.process, signal).unwrap();
    }

    /// Waits for the end of a daemon that was told to end by a signal.
    pub fn ended(mut self) {
        self.wait_gone();
        self.mounted = false;
    }

    /// A clean unmount: drained, and the daemon gone.
    pub fn unmount(mut self) {
        let out = tool().arg("umount").arg(&self.mountpoint).output().unwrap();
        assert!(out.status.success(), "fsys umount: {}", said(&out));
        self.mounted = false;
        self.wait_gone();
    }
}

impl Daemon {
    /// Until the process has ended and with it let go of the backing directory.
    fn wait_gone(&self) {
        let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "the daemon {} does not end", self.pid);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.mounted {
            let _ = pidfd_send_signal(&self.process, Signal::KILL);
            let _ = unmount(&self.mountpoint, UnmountFlags::FORCE | UnmountFlags::DETACH);
            self.wait_gone();
        }
    }
}

pub fn tool() -> Command {
    Command::new(Path::new(env!("CARGO_BIN_EXE_fsys-mount")).with_file_name("fsys"))
}

/// Whether `fsys-mount` knows this write mode. A backing directory that is not there ends it either way.
pub fn has_mode(mode: &str) -> bool {
    let args = ["-o", &format!("mode={mode}"), "/nonexistent", "/nonexistent"];
    let out = Command::new(env!("CARGO_BIN_EXE_fsys-mount")).args(args).output().unwrap();
    !String::from_utf8_lossy(&out.stderr).contains("`mode` is not valid")
}

pub fn said(out: &Output) -> String {
    format!("{} {}{}", out.status, String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Recovers a crashed backing directory. Recovery must succeed, leave nothing behind, and have nothing left to do.
pub fn recover(backing: &Path) -> Result<(), Violation> {
    recover_without(backing, &[])
}

/// The same by a recovery that believes that it makes these system calls.
pub fn recover_without(backing: &Path, calls: &[libc::c_long]) -> Result<(), Violation> {
    let run = || -> Result<(), Violation> {
        let mut command = tool();
        leave_out(&mut command, calls);
        let out = command.arg("recover").arg(backing).output().unwrap();
        if out.status.success() {
            Ok(())
        } else {
            Err(Violation::new(Kind::Dead, format!("fsys recover: {}", said(&out))))
        }
    };
    let look = || everything(backing).map_err(|e| Violation::new(Kind::Dead, format!("after recovery: {e}")));
    run()?;
    let once = look()?;
    if let Some(name) = once.keys().find(|n| n.starts_with(".fsys/staging/") || n.starts_with(".fsys/failed/")) {
        return Err(Violation::new(Kind::Leftover, format!("recovery leaves {name}")));
    }
    run()?;
    let twice = look()?;
    if once == twice {
        return Ok(());
    }
    let changed: Vec<_> = once.keys().chain(twice.keys()).filter(|name| once.get(*name) != twice.get(*name)).collect();
    Err(Violation::new(Kind::Leftover, format!("a second recovery changes {changed:?}")))
}

/// All names, with inode, size, owner and time of last change of content, `.fsys` included.
fn everything(root: &Path) -> io::Result<BTreeMap<String, [i64; 7]>> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let m = fs::symlink_metadata(&path)?;
            // A directory's times and size say nothing that the names in it do not; the lock names who took it.
            let content = if m.is_dir() || path.ends_with(".fsys/lock") {
                [0; 3]
            } else {
                [m.size() as i64, m.mtime(), m.mtime_nsec()]
            };
            let [size, s, ns] = content;
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            all.insert(name, [m.ino() as i64, m.mode().into(), m.uid().into(), m.gid().into(), size, s, ns]);
            if m.is_dir() {
                todo.push(path);
            }
        }
    }
    Ok(all)
}
