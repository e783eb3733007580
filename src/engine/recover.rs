//! What a mount puts right after a crash, before it says ready (contract, P7).
//!
//! A staged version is an unnamed inode (`O_TMPFILE`), which the kernel discards by itself when the daemon or
//! the machine dies. Only in the instant before its rename is it linked as `.fsys/staging/<16 hex>.stage`; it
//! was not acknowledged then, and the old version stands in its place. So recovery removes exactly the
//! regular files of that name form, and nothing else. Each removal is complete in itself: it can be killed at
//! any point and run again. The updates in the journal are written into their files ([`replay`]).

use std::fmt;

use rustix::fs::{AtFlags, FileType, fsync, statat, unlinkat};
use serde::Serialize;

use super::layout::{self, Layout};
use super::replay;
use crate::error::{Errno, Error, Exit, Result};

/// A version that was about to be renamed when the daemon died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// Name under `.fsys/staging/`.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
}

/// An update that a program may have been told of, in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Update {
    /// Path from the root of the mount when it was written.
    pub path: String,
    /// Inode number.
    pub inode: u64,
    /// Bytes of data.
    pub bytes: u64,
    /// The file was removed since: nothing to do.
    pub gone: bool,
}

/// What recovery did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// True when nothing was changed, only looked at.
    pub dry_run: bool,
    /// Versions that were never acknowledged: removed, or to be removed.
    pub removed: Vec<Leftover>,
    /// Updates in the journal, in order: written into their files, or to be written.
    pub updates: Vec<Update>,
    /// Names under `.fsys/` that this version does not understand; never touched.
    pub kept_unknown: Vec<String>,
    /// Names under `.fsys/failed/`: versions whose commit failed, for a person to look at; never touched.
    pub failed_versions: Vec<String>,
    /// The pid of a daemon that works here now: what is listed may be its work in progress.
    pub daemon: Option<u32>,
}

impl Report {
    /// True when there was nothing to do and there is nothing to say.
    pub fn is_clean(&self) -> bool {
        let done = self.removed.is_empty() && self.updates.is_empty();
        done && self.kept_unknown.is_empty() && self.failed_versions.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(pid) = self.daemon {
            writeln!(f, "a daemon works here (pid {pid}); what follows may be its work in progress")?;
        }
        let bytes: u64 = self.removed.iter().map(|l| l.size).sum();
        match (self.removed.len(), self.dry_run) {
            (0, _) if !self.updates.is_empty() => write!(f, "no unfinished version to remove")?,
            (0, _) => write!(f, "nothing to recover: every file is at one of its commit points")?,
            (n, true) => write!(f, "would remove {n} unfinished version(s), {bytes} bytes, never acknowledged")?,
            (n, false) => write!(f, "removed {n} unfinished version(s), {bytes} bytes, never acknowledged")?,
        }
        for l in &self.removed {
            write!(f, "\n  .fsys/staging/{} ({} bytes)", l.name, l.size)?;
        }
        self.updates_in_words(f)?;
        list(f, "kept, not understood", "", &self.kept_unknown)?;
        list(f, "failed versions, kept for you to look at", "failed/", &self.failed_versions)
    }
}

impl Report {
    fn updates_in_words(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, bytes) = (self.updates.len(), self.updates.iter().map(|u| u.bytes).sum::<u64>());
        match (n, self.dry_run) {
            (0, _) => return Ok(()),
            (_, true) => write!(f, "\nwould write {n} update(s) from the journal into their files, {bytes} bytes")?,
            (_, false) => write!(f, "\nwrote {n} update(s) from the journal into their files, {bytes} bytes")?,
        }
        for u in &self.updates {
            let gone = if u.gone { ", removed since" } else { "" };
            write!(f, "\n  {} (inode {}, {} bytes{gone})", u.path, u.inode, u.bytes)?;
        }
        Ok(())
    }
}

fn list(f: &mut fmt::Formatter<'_>, title: &str, under: &str, names: &[String]) -> fmt::Result {
    if !names.is_empty() {
        write!(f, "\n{title}: {}", names.len())?;
    }
    names.iter().try_for_each(|n| write!(f, "\n  .fsys/{under}{n}"))
}

/// Puts `.fsys/` right; with `dry_run` only looks. Removals are durable when it returns.
///
/// # Errors
/// Without `dry_run`, a layout that was opened without its lock; a system call that failed, after which
/// running it again goes on where it stopped.
pub fn recover(layout: &Layout, dry_run: bool) -> Result<Report> {
    if !dry_run && !layout.is_locked() {
        return Err(failed("the lock is not held"));
    }
    let mut report = Report { dry_run, daemon: layout.holder().map(|h| h.pid), ..Report::default() };
    scan(layout, &mut report).map_err(failed)?;
    report.updates = replay::replay(layout, dry_run)?;
    if !dry_run && !report.removed.is_empty() {
        let staging = layout.staging();
        let remove = |l: &Leftover| unlinkat(staging, l.name.as_str(), AtFlags::empty());
        report.removed.iter().try_for_each(remove).and_then(|()| fsync(staging)).map_err(failed)?;
    }
    Ok(report)
}

fn scan(layout: &Layout, report: &mut Report) -> Result<(), Errno> {
    for name in layout::names(layout.staging())? {
        match leftover(layout, &name)? {
            Some(found) => report.removed.push(found),
            None => report.kept_unknown.push(format!("staging/{name}")),
        }
    }
    report.failed_versions = layout::names(layout.failed())?;
    let journal = layout::names(layout.journal())?.into_iter().filter(|n| n != super::log::NAME);
    report.kept_unknown.extend(journal.map(|n| format!("journal/{n}")));
    let strange = layout::names(layout.dir())?.into_iter().filter(|n| !layout::ENTRIES.contains(&n.as_str()));
    report.kept_unknown.extend(strange);
    Ok(())
}

/// Whether a name under `.fsys/staging/` is that of a staged version.
pub fn is_stage_name(name: &str) -> bool {
    let hex = |s: &str| s.len() == 16 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    name.strip_suffix(".stage").is_some_and(hex)
}

/// `None` for what is not exactly a staged version.
fn leftover(layout: &Layout, name: &str) -> Result<Option<Leftover>, Errno> {
    if !is_stage_name(name) {
        return Ok(None);
    }
    let stat = statat(layout.staging(), name, AtFlags::SYMLINK_NOFOLLOW)?;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    Ok(regular.then(|| Leftover { name: name.to_owned(), size: stat.st_size as u64 }))
}

fn failed(why: impl fmt::Display) -> Error {
    Error::new(
        Exit::System,
        "recovery did not complete",
        why,
        "no file of yours was touched; unfinished versions may remain under .fsys/staging",
        "remove the cause, then run it again: `fsys recover BACKING`, or mount",
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const STAGE: &str = "00000000000000af.stage";

    fn crashed() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        drop(Layout::open(dir.path()).unwrap());
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(".fsys").join(name), text).unwrap();
        put(&format!("staging/{STAGE}"), "half");
        put("staging/00000000000000AF.stage", "upper");
        put("staging/0af.stage", "short");
        put("staging/note.txt", "mine");
        put("failed/a.txt", "failed");
        put("odd", "odd");
        std::fs::create_dir(dir.path().join(".fsys/staging/0000000000000001.stage")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join(".fsys/staging/0000000000000002.stage")).unwrap();
        dir
    }

    fn staged(root: &Path) -> Vec<String> {
        layout::names(std::fs::File::open(root.join(".fsys/staging")).unwrap()).unwrap()
    }

    #[test]
    fn removes_what_it_understands_and_nothing_else() {
        let dir = crashed();
        let before = staged(dir.path());
        let look = recover(&Layout::inspect(dir.path()).unwrap().unwrap(), true).unwrap();
        assert_eq!(staged(dir.path()), before);

        let layout = Layout::open(dir.path()).unwrap();
        let did = recover(&layout, false).unwrap();
        assert_eq!(did.removed, [Leftover { name: STAGE.into(), size: 4 }]);
        assert_eq!(did, Report { dry_run: false, ..look });
        let expect: Vec<_> = before.iter().filter(|n| *n != STAGE).cloned().collect();
        assert_eq!(staged(dir.path()), expect);
        let kept: Vec<_> = expect.iter().map(|n| format!("staging/{n}")).chain(["odd".into()]).collect();
        assert_eq!((did.kept_unknown, did.failed_versions), (kept, vec!["a.txt".to_owned()]));
        assert!(recover(&layout, false).unwrap().removed.is_empty());
    }

    #[test]
    fn the_report_says_it_in_words() {
        let dir = crashed();
        let layout = Layout::open(dir.path()).unwrap();
        let look = recover(&layout, true).unwrap().to_string();
        assert!(look.starts_with("would remove 1 unfinished version(s), 4 bytes"), "{look}");
        assert!(look.contains(".fsys/staging/note.txt") && look.contains(".fsys/failed/a.txt"), "{look}");
        assert!(recover(&layout, false).unwrap().to_string().starts_with("removed 1"));
        assert!(recover(&layout, false).unwrap().to_string().starts_with("nothing to recover"));
    }

    #[test]
    fn never_removes_without_the_lock() {
        let dir = crashed();
        let daemon = Layout::open(dir.path()).unwrap();
        let looked = Layout::inspect(dir.path()).unwrap().unwrap();
        assert!(recover(&looked, false).is_err());
        assert_eq!(recover(&looked, true).unwrap().daemon, Some(std::process::id()));
        drop(daemon);
    }
}
