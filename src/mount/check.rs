//! What must be true before anything is changed, and the paths in their final form.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::table::{self, Mounted};
use super::{control, unmount};
use crate::error::{Errno, Error, Exit, Result};

/// Both ends of a mount, canonical and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The backing directory.
    pub backing: PathBuf,
    /// The mount point.
    pub mountpoint: PathBuf,
    /// What people should know although it is no error.
    pub notes: Vec<String>,
}

/// Checks both directories and detaches a dead mount of ours that a kill left at the mount point.
///
/// # Errors
/// [`Exit::System`] with what to do; [`Exit::Busy`] when a living fsys mount is there already.
pub fn place(backing: &Path, mountpoint: &Path) -> Result<Place> {
    device()?;
    let backing = canonical("backing directory", backing)?;
    let mountpoint = final_path(mountpoint).map_err(|e| system("mount point", mountpoint, &e))?;
    let mut notes = Vec::new();
    detach_dead(&mountpoint, &mut notes)?;
    let meta = std::fs::metadata(&mountpoint).map_err(|e| system("mount point", &mountpoint, &e))?;
    for (what, path, is_dir) in
        [("backing directory", &backing, backing.is_dir()), ("mount point", &mountpoint, meta.is_dir())]
    {
        if !is_dir {
            return Err(system(what, path, &Errno::NOTDIR.into()));
        }
    }
    apart(&backing, &mountpoint)?;
    Ok(Place { backing, mountpoint, notes })
}

/// Whether this process may use FUSE at all.
///
/// # Errors
/// `/dev/fuse` cannot be opened.
pub fn device() -> Result<()> {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    open.map(|_| ()).map_err(|e| {
        let (why, action) = match Errno::from_io_error(&e) {
            Some(Errno::ACCESS) => (
                format!("{e}: this user may not open it"),
                "let everybody open it (`chmod 666 /dev/fuse`), or mount as root",
            ),
            _ => (
                e.to_string(),
                "load the kernel module (`modprobe fuse`); in a container, pass the device in (--device /dev/fuse)",
            ),
        };
        let what = "cannot mount: /dev/fuse cannot be opened";
        Error::new(Exit::System, what, why, "nothing was mounted, nothing was changed", action)
    })
}

/// The canonical path of a directory that is to be used.
///
/// # Errors
/// As realpath(3), with what to do.
pub fn canonical(what: &str, path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|e| system(what, path, &e))
}

/// The canonical path, also of the root of a dead mount: that cannot be looked at, but the directory that it
/// is in can.
///
/// # Errors
/// As realpath(3).
pub fn final_path(path: &Path) -> io::Result<PathBuf> {
    match (std::fs::canonicalize(path), path.parent(), path.file_name()) {
        (Err(e), Some(parent), Some(name)) if is_dead(&e) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(std::fs::canonicalize(parent)?.join(name))
        }
        (result, _, _) => result,
    }
}

/// The answers of a FUSE mount whose daemon is gone; ECANCELED while the kernel takes its io_uring apart.
pub fn is_dead(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED))
}

/// Asks the file system at `path`. By statfs(2), since attributes may come from the kernel's cache, for a while even
/// when the daemon is gone.
///
/// # Errors
/// As statfs(2); [`is_dead`] knows those of a dead mount.
pub fn ask(path: &Path) -> io::Result<()> {
    rustix::fs::statvfs(path).map(|_| ()).map_err(io::Error::from)
}

fn detach_dead(mountpoint: &Path, notes: &mut Vec<String>) -> Result<()> {
    loop {
        let mounts = table::read().map_err(|e| system("table of mounts", Path::new("/proc/self/mountinfo"), &e))?;
        let ours = table::at(&mounts, mountpoint).filter(|m| m.is_fsys());
        match ask(mountpoint) {
            Ok(_) if ours.is_some() => return Err(already(mountpoint)),
            Err(e) if is_dead(&e) && ours.is_some() => {
                detach(mountpoint, ours).map_err(|e| system("dead mount point", mountpoint, &e))?;
                notes.push(format!("detached the dead mount that an earlier daemon left at {}", mountpoint.display()));
            }
            // A dead mount of another program is not ours to take away.
            Err(e) => return Err(system("mount point", mountpoint, &e)),
            Ok(_) => return Ok(()),
        }
    }
}

/// Detaches a dead mount, and removes what its daemon left in the runtime directory.
///
/// # Errors
/// As umount2(2).
pub fn detach(mountpoint: &Path, dead: Option<&Mounted>) -> io::Result<()> {
    dead.into_iter().for_each(control::remove_left);
    unmount::unmount(mountpoint, true)
}

/// Neither directory may hold the other: inside the backing directory the daemon would meet its own mount and
/// wait for itself; around it, the mount would hide the backing directory. Compared by inode, so that bind
/// mounts do not deceive.
pub fn apart(backing: &Path, mountpoint: &Path) -> Result<()> {
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let within = |inner: &Path, outer: &Path| {
        let outer = id(outer);
        inner.ancestors().any(|above| id(above) == outer)
    };
    let why = match (within(mountpoint, backing), within(backing, mountpoint)) {
        (false, false) => return Ok(()),
        (true, true) => "both are the same directory",
        (true, false) => "the mount point lies inside the backing directory: the daemon would wait for itself",
        (false, true) => "the backing directory lies inside the mount point: the mount would hide it",
    };
    Err(Error::new(
        Exit::Usage,
        format!("cannot mount {} on {}", backing.display(), mountpoint.display()),
        why,
        "nothing was mounted, nothing was changed",
        "choose two directories of which neither holds the other, for example /data and /mnt/data",
    ))
}

/// A directory that cannot be used.
pub fn system(what: &str, path: &Path, e: &io::Error) -> Error {
    let action = match Errno::from_io_error(e) {
        Some(Errno::NOENT) => "create it (`mkdir -p`), or correct the path",
        Some(Errno::NOTDIR) => "name a directory",
        Some(Errno::ACCESS | Errno::PERM) => "mount as a user who may enter it",
        Some(Errno::NOTCONN | Errno::CONNABORTED) => "another program's dead mount is there: unmount it (`umount -l`)",
        _ => "correct what the system names, then mount again",
    };
    let what = format!("cannot use the {what} {}", path.display());
    Error::new(Exit::System, what, e, "nothing was mounted; no file was touched", action)
}

fn already(mountpoint: &Path) -> Error {
    Error::new(
        Exit::Busy,
        format!("cannot mount on {}", mountpoint.display()),
        "an fsys mount is there already and answers",
        "nothing was changed; the mount that is there goes on",
        format!("use it, or end it first: `fsys umount {}`", mountpoint.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_may_hold_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("a/b"));
        std::fs::create_dir_all(&b).unwrap();
        std::fs::create_dir(dir.path().join("ab")).unwrap();
        assert!(apart(&a, &a).unwrap_err().why.contains("same"));
        assert!(apart(&a, &b).unwrap_err().why.contains("wait for itself"));
        assert!(apart(&b, &a).unwrap_err().why.contains("hide"));
        apart(&a, &dir.path().join("ab")).unwrap();
    }

    #[test]
    fn tells_what_to_do_about_a_wrong_path() {
        if device().is_err() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let e = place(&dir.path().join("none"), dir.path()).unwrap_err();
        assert!(e.what.contains("backing directory") && e.action.contains("mkdir"), "{e}");
        let e = place(dir.path(), &file).unwrap_err();
        assert!(e.what.contains("mount point") && e.action.contains("directory"), "{e}");
        assert_eq!(place(&file, dir.path()).unwrap_err().exit, Exit::System);
    }
}
