//! Finds a mount and talks to its daemon.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Errno, Error, Exit, Result};
use crate::mount::check::final_path;
use crate::mount::control::{Answer, Request, socket_dirs};
use crate::mount::process::Process;
use crate::mount::table::{self, Mounted};

/// Every answer but that of a drain comes within this time.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// The fsys mount at or above `path`; without a path, the only one there is.
pub fn find(path: Option<&Path>) -> Result<Mounted> {
    let mounts = mounts()?;
    let Some(path) = path else { return only(&mounts) };
    let full = final_path(path).map_err(|e| no_mount(&format!("cannot look at {}", path.display()), e))?;
    match table::holding(&mounts, &full) {
        Some(mount) if mount.is_fsys() => Ok(mount.clone()),
        _ => Err(no_mount(&format!("{} is not in an fsys mount", full.display()), "another file system is there")),
    }
}

/// The fsys mount that holds `path`, and the path relative to the root of its file system. The last part may be
/// missing or a symbolic link: it is not followed.
pub fn find_path(path: &Path) -> Result<(Mounted, PathBuf)> {
    let failed = |e| no_mount(&format!("cannot look at {}", path.display()), e);
    let full = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            std::fs::canonicalize(parent).map_err(failed)?.join(name)
        }
        _ => std::fs::canonicalize(path).map_err(failed)?,
    };
    let mount = find(Some(if full.exists() { &full } else { full.parent().unwrap_or(&full) }))?;
    let inside = full.strip_prefix(&mount.mountpoint).map_err(|e| no_mount("the path leads out of the mount", e))?;
    let relative = mount.root.strip_prefix("/").unwrap_or(&mount.root).join(inside);
    Ok((mount, relative))
}

fn mounts() -> Result<Vec<Mounted>> {
    table::read().map_err(|e| no_mount("cannot read /proc/self/mountinfo", e))
}

fn only(mounts: &[Mounted]) -> Result<Mounted> {
    let mut found: Vec<&Mounted> = Vec::new();
    for mount in mounts.iter().filter(|m| m.is_fsys()) {
        if !found.iter().any(|f| f.device == mount.device) {
            found.push(mount);
        }
    }
    match found[..] {
        [mount] => Ok(mount.clone()),
        [] => Err(no_mount("there is no fsys mount", "none is in the kernel's table of mounts")),
        _ => {
            let names: Vec<_> = found.iter().map(|m| m.mountpoint.display().to_string()).collect();
            let mut e = no_mount("there are several fsys mounts", names.join(", "));
            (e.exit, e.action) = (Exit::Usage, "name one of them".into());
            Err(e)
        }
    }
}

fn no_mount(what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(
        Exit::System,
        what,
        why,
        "nothing was changed",
        "`findmnt -t fuse.fsys` lists the mounts; `fsys-mount BACKING MOUNTPOINT` makes one",
    )
}

/// A connection to the daemon of one mount.
#[derive(Debug)]
pub struct Daemon {
    stream: UnixStream,
    mountpoint: PathBuf,
    pid: u32,
}

impl Daemon {
    /// Connects to the daemon of `mount`.
    ///
    /// # Errors
    /// It is gone, or this user may not.
    pub fn of(mount: &Mounted) -> Result<Self> {
        let user = mount.user.unwrap_or(0);
        let mut last = io::Error::from(ErrorKind::NotFound);
        for dir in socket_dirs(user) {
            match connect(&dir.join(&mount.device), user) {
                Ok((stream, pid)) => return Ok(Self { stream, mountpoint: mount.mountpoint.clone(), pid }),
                Err(e) if last.kind() == ErrorKind::NotFound => last = e,
                Err(_) => {}
            }
        }
        Err(unreachable(&mount.mountpoint, user, &last))
    }

    /// Asks, and waits `time` and 10 s more for the answer; an error that the daemon answers is
    /// returned as one.
    pub fn ask(&self, request: &Request, time: Duration) -> Result<Answer> {
        self.ask_telling(request, time, |_| {})
    }

    /// [`Daemon::ask`], and `progress` is told how much is left whenever the daemon says so.
    pub fn ask_telling(&self, request: &Request, time: Duration, mut progress: impl FnMut(u64)) -> Result<Answer> {
        let mut exchange = || -> io::Result<Answer> {
            let mut line = serde_json::to_vec(request)?;
            line.push(b'\n');
            self.stream.set_read_timeout(Some(time.saturating_add(ANSWER_TIME)))?;
            match (&self.stream).write_all(&line) {
                // A daemon with too many clients has answered already, and closed.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
                r => r?,
            }
            let mut reader = BufReader::new(&self.stream);
            loop {
                let mut answer = Vec::new();
                reader.read_until(b'\n', &mut answer)?;
                if answer.is_empty() {
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, "the daemon ended without an answer"));
                }
                match serde_json::from_slice(&answer)? {
                    Answer::Left(left) => progress(left),
                    answer => return Ok(answer),
                }
            }
        };
        match exchange() {
            Ok(Answer::Error(e)) => Err(e),
            Ok(answer) => Ok(answer),
            Err(e) => Err(Error::new(
                Exit::System,
                format!("no answer from the daemon of {} (pid {})", self.mountpoint.display(), self.pid),
                e,
                "the request may or may not have been carried out",
                "see the daemon's log; if it is gone, mount again: that recovers",
            )),
        }
    }

    /// Asks for the end, and waits until the process is gone; `progress` is told how much is left to drain. `time` is for
    /// what comes after the drain.
    pub fn stop(self, lazy: bool, time: Duration, progress: impl FnMut(u64)) -> Result<()> {
        // Taken before it is asked: the pid cannot be another process's then.
        let process = Process::open(self.pid).map_err(|e| not_gone(self.pid, e))?;
        let answer = self.ask_telling(&Request::Stop { lazy }, time, progress);
        if answer.as_ref().is_ok_and(|a| *a == Answer::Done) || answer.as_ref().is_err_and(ended_degraded) {
            process.map_or(Ok(()), |p| p.wait(time)).map_err(|e| not_gone(self.pid, e))?;
        }
        answer.map(|_| ())
    }
}

/// The daemon ends, and says that not all could be committed.
fn ended_degraded(e: &Error) -> bool {
    e.exit == Exit::Degraded && e.what.starts_with("unmounted")
}

/// Only a daemon of the user who mounted is the daemon of the mount.
fn connect(path: &Path, user: u32) -> io::Result<(UnixStream, u32)> {
    let stream = UnixStream::connect(path)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    if peer.uid.as_raw() != user {
        return Err(io::Error::new(ErrorKind::PermissionDenied, "another user's process listens there"));
    }
    Ok((stream, peer.pid.as_raw_nonzero().get().unsigned_abs()))
}

fn unreachable(mountpoint: &Path, user: u32, e: &io::Error) -> Error {
    let action = match Errno::from_io_error(e) {
        Some(Errno::ACCESS | Errno::PERM) => format!("ask as the user who mounted it (uid {user}), or as root"),
        _ => "mount again: `fsys-mount BACKING MOUNTPOINT` detaches a dead mount and recovers".into(),
    };
    Error::new(
        Exit::System,
        format!("the daemon of {} does not answer", mountpoint.display()),
        e,
        "every file in the backing directory is at one of its commit points",
        action,
    )
}

fn not_gone(pid: u32, why: impl std::fmt::Display) -> Error {
    Error::new(
        Exit::System,
        format!("the daemon (pid {pid}) did not end"),
        why,
        "the mount is gone and everything acknowledged is durable",
        "wait for it, or see its log",
    )
}

/// A path as a [`Request`] carries it.
pub fn path_bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// The daemon answered something else than what was asked for.
pub fn strange(answer: &Answer) -> Error {
    Error::new(
        Exit::Internal,
        "the daemon's answer is not what was asked for",
        format!("{answer:?}"),
        "nothing was changed",
        "use the `fsys` of the same version as the daemon",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted(device: &str, at: &str) -> Mounted {
        Mounted {
            device: device.into(),
            root: "/".into(),
            mountpoint: at.into(),
            kind: "fuse.fsys".into(),
            source: "/data".into(),
            user: Some(0),
        }
    }

    #[test]
    fn without_a_path_there_must_be_one_mount() {
        assert!(only(&[]).unwrap_err().what.contains("no fsys mount"));
        let (a, bind, b) = (mounted("0:1", "/a"), mounted("0:1", "/bind"), mounted("0:2", "/b"));
        assert_eq!(only(&[a.clone(), bind]).unwrap(), a);
        let e = only(&[a, b]).unwrap_err();
        assert!(e.exit == Exit::Usage && e.why == "/a, /b", "{e}");
    }

    #[test]
    fn a_path_elsewhere_is_no_mount() {
        assert!(find(Some(Path::new("/proc"))).unwrap_err().what.contains("/proc is not in an fsys mount"));
    }

    #[test]
    fn a_dead_daemon_is_said_to_be_dead() {
        let e = Daemon::of(&mounted("0:999999", "/mnt/dead")).unwrap_err();
        assert!(e.what.contains("/mnt/dead") && e.action.contains("mount again"), "{e}");
    }
}
