//! The backing directory: its file system, mount options, space, and what lies in `.fsys/`.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, StatVfsMountFlags, accessat, fstatvfs};

use super::{Finding, device};
use crate::backend::probe::{Probe, Strategy};
use crate::engine::layout::{self, Layout};
use crate::engine::recover::recover;
use crate::error::Errno;
use crate::mount::{check, table};

/// The promises were proven on these.
const PROVEN: [&str; 4] = ["ext4", "xfs", "btrfs", "tmpfs"];
/// Free space below which a warning comes: bytes, and a part of all.
const SPACE_MIN: (u64, u64) = (256 << 20, 50);

/// All about the backing directory.
pub fn examine(path: &Path) -> Vec<Finding> {
    let root = match check::canonical("backing directory", path) {
        Ok(root) => root,
        Err(e) => return vec![Finding::refused("backing", &e)],
    };
    let mut found = vec![directory(&root)];
    found.extend(lasting(&root));
    found.push(kept(&root));
    found
}

/// What also matters once it is mounted.
pub fn lasting(root: &Path) -> Vec<Finding> {
    let open = || -> rustix::io::Result<(OwnedFd, Probe)> {
        let fd = OwnedFd::from(File::open(root).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?);
        let probe = Probe::of(&fd, &fd)?;
        Ok((fd, probe))
    };
    let (fd, probe) = match open() {
        Ok(open) => open,
        Err(e) => return vec![Finding::refused("backing", &check::system("backing directory", root, &e.into()))],
    };
    let mut found = vec![file_system(root, &probe)];
    found.extend(options(&probe));
    found.extend(device::examine(&probe));
    found.push(features(&fd, &probe));
    found.push(space(&fd));
    found.extend(mounts(root));
    found
}

fn directory(root: &Path) -> Finding {
    let check = "backing";
    if !root.is_dir() {
        return Finding::refused(check, &check::system("backing directory", root, &Errno::NOTDIR.into()));
    }
    match accessat(CWD, root, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => Finding::ok(check, format!("{} can be read and written", root.display())),
        Err(Errno::ROFS) => Finding::warning(
            check,
            format!("{} is on a read-only file system", root.display()),
            "files can be read; every save is refused with EROFS",
            "mount the backing file system read-write, or mount this with -o ro",
        ),
        Err(e) => Finding::refused(check, &check::system("backing directory", root, &e.into())),
    }
}

fn file_system(root: &Path, probe: &Probe) -> Finding {
    let check = "file system";
    let what = format!("{}, flushed by {probe}", probe.fs);
    match probe.fs.as_str() {
        "tmpfs" => Finding::warning(
            check,
            what,
            "it is memory: nothing survives a restart of the machine, whatever is flushed",
            "keep there only what may be lost",
        ),
        fs if PROVEN.contains(&fs) => Finding::ok(check, what),
        _ => Finding::warning(
            check,
            format!("{} is on {what}", root.display()),
            "proven are ext4, XFS, btrfs and tmpfs; here a save is as whole and durable as fsync(2) and rename(2) are",
            "use one of those, a local one, for data that matters",
        ),
    }
}

/// Mount options that change what a save costs or what a crash leaves.
fn options(p: &Probe) -> Vec<Finding> {
    let check = "mount options";
    let mut found = Vec::new();
    if p.fs == "ext4" && p.strategy != Strategy::OneBarrier {
        let (effect, action) = if p.has("data") {
            (
                "the shared barrier is not sound there, so each file is flushed by itself: slower with many savers",
                "mount ext4 with its defaults (data=ordered, barriers, internal journal)",
            )
        } else {
            (
                "after a crash e2fsck has to repair it, and a rename may then be there in part",
                "give it a journal while it is unmounted: `tune2fs -j DEVICE`",
            )
        };
        found.push(Finding::warning(check, p.reason.clone(), effect, action));
    }
    if p.has("journal_async_commit") {
        found.push(Finding::warning(
            check,
            "journal_async_commit",
            "a power cut can make the journal end earlier than what was acknowledged",
            "mount without it",
        ));
    }
    if found.is_empty() {
        found.push(Finding::ok(check, "none that weakens a save"));
    }
    found
}

fn features(root: &OwnedFd, probe: &Probe) -> Finding {
    use rustix::fs::{Mode, OFlags, openat};
    let check = "features";
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Err(e @ (Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL)) =
        openat(root.as_fd(), ".", flags, Mode::from_raw_mode(0o600))
    {
        return Finding::failure(
            check,
            format!("no unnamed files (O_TMPFILE): {e}"),
            "no save can be staged: creating and rewriting files fails",
            "use ext4, XFS, btrfs or tmpfs",
        );
    }
    let clone = if probe.reflink {
        "clones (reflink): a writer that goes on after a commit costs no copy"
    } else {
        "no clones (reflink): a writer that goes on after a commit costs a copy up to restage_max_bytes"
    };
    let acl = if probe.acl { "ACLs" } else { "no ACLs" };
    Finding::ok(check, format!("unnamed files; {acl}; {clone}"))
}

fn space(root: &OwnedFd) -> Finding {
    let check = "space";
    let st = match fstatvfs(root) {
        Ok(st) => st,
        Err(e) => return Finding::warning(check, e.to_string(), "not known", "see the file system's own tools"),
    };
    let (free, all) = (st.f_bavail * st.f_frsize, st.f_blocks * st.f_frsize);
    let inodes = if st.f_files == 0 { String::new() } else { format!(", {} of {} inodes", st.f_favail, st.f_files) };
    let text = format!("{} of {} MiB free{inodes}", free >> 20, all >> 20);
    let few_inodes = st.f_files > 0 && st.f_favail < 1000;
    let read_only = st.f_flag.contains(StatVfsMountFlags::RDONLY);
    if !read_only && (few_inodes || free < SPACE_MIN.0.min(all / SPACE_MIN.1)) {
        return Finding::warning(
            check,
            text,
            "a rewrite needs room for old and new: saves will fail with ENOSPC, the old versions stand",
            "make room",
        );
    }
    Finding::ok(check, text)
}

/// Other mounts below, and an fsys mount around.
fn mounts(root: &Path) -> Vec<Finding> {
    let check = "nested mounts";
    let all = table::read().unwrap_or_default();
    let mut found = Vec::new();
    let below: Vec<_> = all.iter().filter(|m| m.mountpoint != root && m.mountpoint.starts_with(root)).collect();
    if let Some(first) = below.first() {
        found.push(Finding::warning(
            check,
            format!("{} mount(s) below, the first at {}", below.len(), first.mountpoint.display()),
            "a version cannot be renamed across file systems: files there are written in place",
            "mount each of them through an fsys mount of its own",
        ));
    }
    if table::holding(&all, root).is_some_and(table::Mounted::is_fsys) {
        found.push(Finding::failure(
            check,
            format!("{} lies in an fsys mount", root.display()),
            "each save is staged and flushed twice, and a mount over a FUSE mount is not proven",
            "name the directory behind that mount (`fsys status` shows it)",
        ));
    }
    if found.is_empty() {
        found.push(Finding::ok(check, "none"));
    }
    found
}

/// What an earlier mount left.
fn kept(root: &Path) -> Finding {
    let check = ".fsys";
    let looked =
        Layout::inspect(root).and_then(|l| l.map(|l| Ok((recover(&l, true)?, l.holder().cloned()))).transpose());
    match looked {
        Err(e) => Finding::refused(check, &e),
        Ok(None) => Finding::ok(check, "none yet: this directory was not mounted before"),
        Ok(Some((_, Some(holder)))) => {
            Finding::ok(check, format!("a daemon works here (pid {}, {})", holder.pid, holder.mountpoint.display()))
        }
        Ok(Some((report, None))) if !report.failed_versions.is_empty() => Finding::warning(
            check,
            format!(
                "{} version(s) whose commit failed are kept in {}/failed",
                report.failed_versions.len(),
                layout::NAME
            ),
            "the versions before them stand",
            "look at them, then copy or remove them",
        ),
        Ok(Some((report, None))) if !report.kept_unknown.is_empty() => Finding::warning(
            check,
            format!("not understood: {}", report.kept_unknown.join(", ")),
            "it is left alone",
            "remove it if you know what it is",
        ),
        Ok(Some((report, None))) => {
            Finding::ok(check, report.to_string().lines().next().unwrap_or_default().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn a_directory_is_looked_at_and_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let found = examine(dir.path());
        assert!(found.len() >= 6, "{found:#?}");
        assert!(found.iter().all(|f| f.level == Level::Ok || !(f.effect.is_empty() || f.action.is_empty())));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(examine(&dir.path().join("none"))[0].level, Level::Failure);
    }

    #[test]
    fn memory_is_not_durable_and_weak_options_are_told() {
        let probe = |fs: &str, options: &str, strategy| Probe {
            fs: fs.into(),
            strategy,
            reason: "ext4, not mounted data=ordered".into(),
            reflink: false,
            acl: true,
            options: options.into(),
            device: None,
        };
        let dir = Path::new("/x");
        assert_eq!(file_system(dir, &probe("tmpfs", "", Strategy::EachFile)).level, Level::Warning);
        assert_eq!(file_system(dir, &probe("nfs4", "", Strategy::EachFile)).level, Level::Warning);
        assert_eq!(file_system(dir, &probe("xfs", "", Strategy::OneBarrier)).level, Level::Ok);
        let weak = options(&probe("ext4", "rw,data=writeback", Strategy::EachFile));
        assert!(weak[0].level == Level::Warning && weak[0].action.contains("data=ordered"));
        assert!(options(&probe("ext4", "rw", Strategy::EachFile))[0].action.contains("tune2fs -j"));
        assert_eq!(options(&probe("ext4", "rw,data=ordered", Strategy::OneBarrier))[0].level, Level::Ok);
    }
}
