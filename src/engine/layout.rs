//! `.fsys/` in the backing directory: made, checked and locked here (contract, section 5).
//!
//! Owns the descriptors of the backing directory, `.fsys/`, `staging/`, `failed/` and `journal/`, and the lock.
//! Everything is opened relative to the backing directory without following symbolic links. Invariants: while
//! a [`Layout`] with a lock lives, no other daemon works here; `.fsys/` belongs to this user, is on the same
//! file system as the backing directory and is in a format that this version knows.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags};
use rustix::fs::{fchmod, flock, fstat, fsync, mkdirat, openat, statat};

use crate::error::{Errno, Error, Exit, Result};

/// Name of the directory in the backing root; no program reaches it through the mount.
pub const NAME: &str = ".fsys";
/// Content of the file `format`.
const FORMAT: &str = "fsys-mount 1\n";
/// Everything that belongs into `.fsys/`.
pub(super) const ENTRIES: [&str; 5] = ["lock", "format", "staging", "failed", "journal"];

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const PRIVATE_DIR: Mode = Mode::RWXU;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// The open `.fsys/` of one backing directory.
#[derive(Debug)]
pub struct Layout {
    root: OwnedFd,
    dir: OwnedFd,
    staging: OwnedFd,
    failed: OwnedFd,
    journal: OwnedFd,
    lock: Option<File>,
    holder: Option<Holder>,
}

/// Who holds the lock, as written in the lock file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holder {
    /// Process id; 0 when it could not be read.
    pub pid: u32,
    /// Device number of its mount, `MAJ:MIN`; empty before it mounted.
    pub device: String,
    /// Where it mounted; empty before. With the device number, which is given away again, it names the mount.
    pub mountpoint: PathBuf,
}

impl Holder {
    /// Reads what [`LockNote::write`] wrote; what is no note says nothing.
    pub fn parse(text: &[u8]) -> Self {
        let mut words = text.strip_suffix(b"\n").unwrap_or(text).splitn(3, |b| *b == b' ');
        let mut word = || words.next().unwrap_or_default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (pid, device) = (text(word()).parse().unwrap_or(0), text(word()));
        Self { pid, device, mountpoint: PathBuf::from(OsStr::from_bytes(word())) }
    }

    /// The note as it is written.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = self.pid.to_string().into_bytes();
        if !self.device.is_empty() {
            line.extend_from_slice(format!(" {} ", self.device).as_bytes());
            line.extend_from_slice(self.mountpoint.as_os_str().as_bytes());
        }
        line.push(b'\n');
        line
    }
}

/// What the file `format` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// This version knows it.
    Known,
    /// Nothing yet, or a part: its creation was cut short.
    Begun,
    /// Another version's, or no format at all.
    Foreign,
}

impl Format {
    /// Reads the content of the file.
    pub fn parse(text: &[u8]) -> Self {
        match text {
            _ if text == FORMAT.as_bytes() => Self::Known,
            _ if FORMAT.as_bytes().starts_with(text) => Self::Begun,
            _ => Self::Foreign,
        }
    }
}

/// The lock file, to note in it which mount belongs to the lock. Holds the lock, too.
#[derive(Debug)]
pub struct LockNote(File);

impl LockNote {
    /// Notes this process, and its mount once there is one.
    ///
    /// # Errors
    /// The file cannot be written; the lock stands all the same.
    pub fn write(&self, mount: Option<(&str, &Path)>) -> std::io::Result<()> {
        let (device, mountpoint) = mount.unwrap_or(("", Path::new("")));
        let holder = Holder { pid: std::process::id(), device: device.into(), mountpoint: mountpoint.into() };
        let mut file = &self.0;
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&holder.to_line())
    }
}

impl Layout {
    /// Opens `.fsys/` under `root` for a daemon: creates durably what is missing and takes the lock.
    ///
    /// # Errors
    /// [`Exit::Busy`] when another daemon holds the lock (named by its pid); [`Exit::System`] when `.fsys` is
    /// not ours, is a newer format, or the system refuses.
    pub fn open(root: &Path) -> Result<Self> {
        let root_fd = open_root(root)?;
        create(root, &root_fd)?;
        let mut layout = Self::inspect(root)?.ok_or_else(|| refused(root, "it vanished while it was opened"))?;
        let failed = |e| system(root, "lock", e);
        let file = File::from(openat(&layout.dir, "lock", lock_flags(), PRIVATE_FILE).map_err(failed)?);
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(busy(root, &holder_in(&file))),
            Err(e) => return Err(failed(e)),
        }
        layout.holder = None;
        layout.lock = Some(file);
        let noted = layout.note().and_then(|note| note.map_or(Ok(()), |n| n.write(None)));
        noted.map_err(|e| system(root, "lock", errno(&e)))?;
        write_format(root, &layout.dir)?;
        Ok(layout)
    }

    /// Opens `.fsys/` under `root` to look at it: nothing is created, written or locked. `None`: there is none,
    /// or it was only begun. [`Layout::holder`] then says whether a daemon works here.
    pub fn inspect(root: &Path) -> Result<Option<Self>> {
        let root_fd = open_root(root)?;
        let dir = match openat(&root_fd, NAME, OFlags::RDONLY | DIRECTORY, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(refused(root, "it is not a directory")),
            Err(e) => return Err(system(root, "", e)),
        };
        check_ours(root, &root_fd, &dir)?;
        check_format(root, &dir)?;
        let open = |name: &str| match openat(&dir, name, OFlags::RDONLY | DIRECTORY, Mode::empty()) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(system(root, name, e)),
        };
        let (Some(staging), Some(failed), Some(journal)) = (open("staging")?, open("failed")?, open("journal")?) else {
            // A crash cut the very first mount short: nothing was ever staged here, the next mount makes the rest.
            return Ok(None);
        };
        let holder = holder(&dir);
        Ok(Some(Self { root: root_fd, dir, staging, failed, journal, lock: None, holder }))
    }

    /// The backing directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
    /// `.fsys/`.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
    /// `.fsys/staging/`: a version that is about to be renamed into its place.
    pub fn staging(&self) -> BorrowedFd<'_> {
        self.staging.as_fd()
    }
    /// `.fsys/failed/`: versions whose commit failed, for people.
    pub fn failed(&self) -> BorrowedFd<'_> {
        self.failed.as_fd()
    }
    /// `.fsys/journal/`.
    pub fn journal(&self) -> BorrowedFd<'_> {
        self.journal.as_fd()
    }
    /// True when this value holds the lock.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }
    /// Another handle of the lock; `None` when it is not held.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn note(&self) -> std::io::Result<Option<LockNote>> {
        self.lock.as_ref().map(|file| file.try_clone().map(LockNote)).transpose()
    }
    /// The daemon that worked here when [`Layout::inspect`] looked.
    pub fn holder(&self) -> Option<&Holder> {
        self.holder.as_ref()
    }
}

fn open_root(root: &Path) -> Result<OwnedFd> {
    openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        Error::new(
            Exit::System,
            format!("cannot open the backing directory {}", root.display()),
            e,
            "nothing was mounted, nothing was changed",
            "check that it is a directory and that this user may read it",
        )
    })
}

fn lock_flags() -> OFlags {
    OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK
}

/// Makes what is missing, each step durable before the next relies on it. `format` comes last and under the
/// lock ([`write_format`]): where it is complete, all is.
fn create(root: &Path, root_fd: &OwnedFd) -> Result<()> {
    let at = |name: &'static str| move |e| system(root, name, e);
    if make_dir(root_fd.as_fd(), NAME).map_err(at(""))? {
        fsync(root_fd).map_err(at(""))?;
    }
    let dir = match openat(root_fd, NAME, OFlags::RDONLY | DIRECTORY, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(refused(root, "it is not a directory")),
        Err(e) => return Err(system(root, "", e)),
    };
    check_ours(root, root_fd, &dir)?;
    check_format(root, &dir)?;
    let mut made = false;
    for name in ["staging", "failed", "journal"] {
        made |= make_dir(dir.as_fd(), name).map_err(at(name))?;
    }
    if made {
        fsync(&dir).map_err(at(""))?;
    }
    Ok(())
}

/// True when it was made now. The mode is set apart from the umask.
fn make_dir(parent: BorrowedFd<'_>, name: &str) -> Result<bool, Errno> {
    match mkdirat(parent, name, PRIVATE_DIR) {
        Ok(()) => {
            let dir = openat(parent, name, OFlags::RDONLY | DIRECTORY, Mode::empty())?;
            fchmod(&dir, PRIVATE_DIR)?;
            fsync(&dir)?;
            Ok(true)
        }
        Err(Errno::EXIST) => Ok(false),
        Err(e) => Err(e),
    }
}

fn check_ours(root: &Path, root_fd: &OwnedFd, dir: &OwnedFd) -> Result<()> {
    let stat = |fd: &OwnedFd| fstat(fd).map_err(|e| system(root, "", e));
    let (above, here) = (stat(root_fd)?, stat(dir)?);
    let me = rustix::process::geteuid().as_raw();
    if here.st_uid != me {
        return Err(refused(root, &format!("it belongs to user {}, this is user {me}", here.st_uid)));
    }
    if Mode::from_raw_mode(here.st_mode).intersects(Mode::RWXG | Mode::RWXO) {
        return Err(refused(root, "others than its owner may enter it, so it was not made by fsys-mount"));
    }
    if here.st_dev != above.st_dev {
        return Err(refused(root, "it is on another file system than the backing directory"));
    }
    Ok(())
}

/// Refuses a format that this version does not know. An empty or cut `format` is a creation that a crash
/// ended, which is ours only when nothing foreign lies beside it.
fn check_format(root: &Path, dir: &OwnedFd) -> Result<()> {
    let found = read_format(dir).map_err(|e| system(root, "format", e))?;
    match Format::parse(&found) {
        Format::Known => return Ok(()),
        Format::Begun => {}
        Format::Foreign => return Err(foreign_format(root, &found)),
    }
    let names = names(dir).map_err(|e| system(root, "", e))?;
    match names.iter().find(|n| !ENTRIES.contains(&n.as_str())) {
        Some(foreign) => Err(refused(root, &format!("it has no `format`, and holds `{foreign}`"))),
        None => Ok(()),
    }
}

fn foreign_format(root: &Path, found: &[u8]) -> Error {
    let found = String::from_utf8_lossy(found);
    let first = found.lines().next().unwrap_or_default();
    Error::new(
        Exit::System,
        format!("cannot use {}", root.join(NAME).display()),
        format!("its format is `{}`, this version knows `{}`", first.escape_default(), FORMAT.trim_end()),
        "nothing was mounted, nothing was changed",
        "use the version of fsys-mount that made it, or a newer one",
    )
}

/// The content, at most 64 bytes of it; empty when there is no such file.
fn read_format(dir: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match openat(dir, "format", flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(64).read_to_end(&mut bytes).map_err(|e| errno(&e))?;
    Ok(bytes)
}

fn write_format(root: &Path, dir: &OwnedFd) -> Result<()> {
    let write = || -> Result<(), Errno> {
        if Format::parse(&read_format(dir)?) == Format::Known {
            return Ok(());
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(dir, "format", flags, PRIVATE_FILE)?);
        file.write_all(FORMAT.as_bytes()).map_err(|e| errno(&e))?;
        fsync(&file)?;
        fsync(dir)
    };
    write().map_err(|e| system(root, "format", e))
}

/// Names in a directory, without `.` and `..`; bytes that are no UTF-8 are shown as `U+FFFD`.
pub(super) fn names(dir: impl AsFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Who holds the lock; `None` when nobody does, or there is no lock.
fn holder(dir: &OwnedFd) -> Option<Holder> {
    if FileType::from_raw_mode(statat(dir, "lock", AtFlags::SYMLINK_NOFOLLOW).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(openat(dir, "lock", flags, Mode::empty()).ok()?);
    // A shared lock that is let go at once: it fails exactly while a daemon holds the exclusive one.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => Some(holder_in(&file)),
        _ => None,
    }
}

fn holder_in(mut file: &File) -> Holder {
    let mut line = Vec::new();
    // What cannot be read is not known; the lock itself says that someone is there.
    file.rewind().and_then(|()| file.take(8192).read_to_end(&mut line)).unwrap_or_default();
    Holder::parse(&line)
}

fn errno(e: &std::io::Error) -> Errno {
    Errno::from_io_error(e).unwrap_or(Errno::IO)
}

fn busy(root: &Path, holder: &Holder) -> Error {
    let pid = holder.pid;
    let place = holder.mountpoint.display().to_string();
    let place = if place.is_empty() { place } else { format!(", mounted on {place}") };
    Error::new(
        Exit::Busy,
        format!("cannot use the backing directory {}", root.display()),
        format!("another fsys-mount works on it (pid {pid}{place})"),
        "nothing was changed; the mount that is there goes on",
        "use that mount (`fsys status`), or end it first (`fsys umount`)",
    )
}

fn refused(root: &Path, why: &str) -> Error {
    Error::new(
        Exit::System,
        format!("cannot use {}", root.join(NAME).display()),
        why,
        "nothing was mounted, nothing was changed",
        "move it out of the way if it is yours, or mount as its owner",
    )
}

fn system(root: &Path, name: &str, e: Errno) -> Error {
    Error::new(
        Exit::System,
        format!("cannot prepare {}", root.join(NAME).join(name).display()),
        e,
        "nothing was mounted; files outside .fsys were not touched",
        "check that this user may write there and that there is space",
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn root() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn creates_once_and_opens_again() {
        let dir = root();
        let inner = dir.path().join(NAME);
        assert!(Layout::inspect(dir.path()).unwrap().is_none());
        let first = Layout::open(dir.path()).unwrap();
        assert!(first.is_locked());
        assert_eq!(std::fs::metadata(&inner).unwrap().mode() & 0o7777, 0o700);
        let mut found = names(first.dir()).unwrap();
        found.sort();
        assert_eq!(found, ["failed", "format", "journal", "lock", "staging"]);
        drop(first);
        Layout::open(dir.path()).unwrap();
        // A creation that a crash cut: the next one completes it.
        std::fs::write(inner.join("format"), "fsys-m").unwrap();
        std::fs::remove_dir(inner.join("journal")).unwrap();
        assert!(Layout::inspect(dir.path()).unwrap().is_none(), "only begun");
        Layout::open(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(inner.join("format")).unwrap(), FORMAT);
        assert_eq!(names(std::fs::File::open(dir.path()).unwrap()).unwrap(), [NAME]);
    }

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let dir = root();
        let first = Layout::open(dir.path()).unwrap();
        let e = Layout::open(dir.path()).unwrap_err();
        assert_eq!(e.exit, Exit::Busy);
        assert!(e.why.contains(&format!("pid {}", std::process::id())), "{e}");
        assert_eq!(Layout::inspect(dir.path()).unwrap().unwrap().holder().unwrap().pid, std::process::id());
        let note = first.note().unwrap().unwrap();
        note.write(Some(("0:77", Path::new("/mnt/a b\nc")))).unwrap();
        drop(first);
        let holder = Layout::inspect(dir.path()).unwrap().unwrap().holder().cloned().unwrap();
        assert_eq!((holder.device.as_str(), holder.mountpoint.as_path()), ("0:77", Path::new("/mnt/a b\nc")));
        assert!(Layout::open(dir.path()).unwrap_err().why.contains("mounted on /mnt/a b"));
        drop(note);
        assert_eq!(Layout::inspect(dir.path()).unwrap().unwrap().holder(), None);
        Layout::open(dir.path()).unwrap();
    }

    #[test]
    fn a_newer_format_is_refused_and_left_alone() {
        let dir = root();
        drop(Layout::open(dir.path()).unwrap());
        for text in ["fsys-mount 2\n", "fsys-mount 1\nmore", "something else"] {
            std::fs::write(dir.path().join(".fsys/format"), text).unwrap();
            let e = Layout::open(dir.path()).unwrap_err();
            assert!(e.why.contains("this version knows `fsys-mount 1`"), "{e}");
            assert!(Layout::inspect(dir.path()).is_err());
            assert_eq!(std::fs::read_to_string(dir.path().join(".fsys/format")).unwrap(), text);
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_and_left_alone() {
        let (dir, elsewhere) = (root(), root());
        let name = dir.path().join(NAME);
        std::os::unix::fs::symlink(elsewhere.path(), &name).unwrap();
        assert!(Layout::open(dir.path()).unwrap_err().why.contains("not a directory"));
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
        std::fs::remove_file(&name).unwrap();

        std::fs::write(&name, "mine").unwrap();
        assert!(Layout::open(dir.path()).unwrap_err().why.contains("not a directory"));
        assert_eq!(std::fs::read_to_string(&name).unwrap(), "mine");
        std::fs::remove_file(&name).unwrap();

        std::fs::create_dir(&name).unwrap();
        std::fs::set_permissions(&name, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Layout::open(dir.path()).unwrap_err().why.contains("others than its owner"));
        std::fs::set_permissions(&name, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(name.join("diary"), "mine").unwrap();
        assert!(Layout::open(dir.path()).unwrap_err().why.contains("holds `diary`"));
        assert_eq!(std::fs::read_dir(&name).unwrap().count(), 1);
    }

    #[test]
    fn a_linked_part_is_refused() {
        let (dir, elsewhere) = (root(), root());
        drop(Layout::open(dir.path()).unwrap());
        let staging = dir.path().join(".fsys/staging");
        std::fs::remove_dir(&staging).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &staging).unwrap();
        assert!(Layout::open(dir.path()).unwrap_err().what.ends_with(".fsys/staging"));
    }
}
