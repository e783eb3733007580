//! The journal after a crash: its records are written into their files, in order, and then it is empty.
//!
//! All of it can be killed at any point and run again: records stay until every file is flushed, and to write them once
//! more ends the same.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, fsync, ftruncate, openat};

use super::layout::Layout;
use super::log::{self, Found, Placed, apply, scan};
use super::recover::Update;
use crate::error::{Errno, Error, Exit, Result};
use crate::sys::handle::{FileHandle, open_handle};

/// Writes what the journal holds into the files; with `dry_run` only looks. Durable when it returns.
///
/// # Errors
/// The journal is damaged or of another version; a file cannot be written. The journal stays as it is.
pub(super) fn replay(layout: &Layout, dry_run: bool) -> Result<Vec<Update>> {
    let Some(log) = open(layout, dry_run).map_err(|e| failed(log::NAME, e))? else { return Ok(Vec::new()) };
    let records = match scan(log.as_fd()).map_err(|e| failed(log::NAME, e))? {
        Found::Records(records) => records,
        Found::Strange => return Err(strange()),
    };
    let mut files = HashMap::new();
    let mut updates = Vec::new();
    for placed in &records {
        let path = String::from_utf8_lossy(&placed.redo.path).into_owned();
        let one = || -> Result<bool, Errno> {
            let Some(file) = file_of(layout, placed, &mut files, dry_run)? else { return Ok(true) };
            if !dry_run {
                apply(log.as_fd(), placed, file.as_fd(), &Ok)?;
            }
            Ok(false)
        };
        let gone = { one }().map_err(|e| failed(&path, e))?;
        updates.push(Update { path, inode: placed.redo.ino, bytes: placed.redo.data_len(), gone });
    }
    if !dry_run && !records.is_empty() {
        let empty = || -> Result<(), Errno> {
            files.values().flatten().try_for_each(fsync)?;
            ftruncate(&log, 0)?;
            fsync(&log)
        };
        empty().map_err(|e| failed(log::NAME, e))?;
    }
    Ok(updates)
}

fn open(layout: &Layout, dry_run: bool) -> Result<Option<OwnedFd>, Errno> {
    let access = if dry_run { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match openat(layout.journal(), log::NAME, flags, Mode::empty()) {
        Ok(fd) if FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::RegularFile => Ok(Some(fd)),
        Ok(_) => Err(Errno::INVAL),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

type Files = HashMap<(i32, Vec<u8>), Option<OwnedFd>>;

/// The file of a record; `None` when it was removed since. A reused inode number has another generation, which the
/// handle tells.
fn file_of<'a>(layout: &Layout, p: &Placed, files: &'a mut Files, dry: bool) -> Result<Option<&'a OwnedFd>, Errno> {
    let slot = match files.entry((p.redo.handle_kind, p.redo.handle.clone())) {
        Entry::Occupied(e) => e.into_mut(),
        Entry::Vacant(e) => {
            let handle = FileHandle::from_parts(p.redo.handle_kind, &p.redo.handle);
            let flags = if dry { libc::O_PATH } else { libc::O_RDWR };
            e.insert(match open_handle(layout.root(), &handle, flags) {
                Ok(fd) if fstat(&fd)?.st_nlink > 0 => Some(fd),
                Ok(_) | Err(Errno::STALE | Errno::NOENT) => None,
                Err(e) => return Err(e),
            })
        }
    };
    Ok(slot.as_ref())
}

fn failed(what: &str, why: Errno) -> Error {
    Error::new(
        Exit::System,
        format!("cannot write the journal's updates into their files: {what}"),
        why,
        "updates that programs were told are safe are in .fsys/journal/log; until they are written, their files may be \
         there in part",
        "remove the cause (a read-only or full file system, chattr +i, no right to open files by handle), then run \
         `fsys recover BACKING` as root, or mount",
    )
}

fn strange() -> Error {
    Error::new(
        Exit::System,
        "cannot read the journal .fsys/journal/log",
        "it does not begin as this version begins one: it is damaged, or of another version",
        "updates that programs were told are safe may be in it; nothing was changed",
        "use the version of fsys-mount that made it; to give it up, move it away and mount again",
    )
}
