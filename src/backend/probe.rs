//! What the backing file system guarantees, found out once at the mount.

use std::fmt;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self as rfs, Mode, OFlags};
use rustix::io::Errno;

/// Which barriers make a batch durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Write the data out and wait (no flush), publish, sync the parents: the journal commit that makes the names
    /// durable begins with a device flush and so covers the data that already left the page cache.
    OneBarrier,
    /// syncfs, publish, syncfs.
    Syncfs,
    /// fsync or fdatasync of every file in parallel, publish, sync the parents.
    EachFile,
}

/// Findings about the backing file system.
#[derive(Debug, Clone)]
pub struct Probe {
    /// `ext4`, `xfs`, `btrfs`, `tmpfs` or the type that mountinfo names.
    pub fs: String,
    /// Barriers for method `auto`.
    pub strategy: Strategy,
    /// Why this strategy.
    pub reason: String,
    /// Files can be cloned.
    pub reflink: bool,
    /// POSIX ACLs are stored.
    pub acl: bool,
    /// Options in force, separated by commas: those of mountinfo and, on ext4, those of `/proc/fs/ext4`.
    pub options: String,
    /// Name of the block device under `/sys/class/block`; `None` when there is none, or several.
    pub device: Option<String>,
}

impl Probe {
    /// Whether the file system has an option, alone or with a value.
    pub fn has(&self, option: &str) -> bool {
        has(&self.options, option)
    }
}

fn has(options: &str, option: &str) -> bool {
    options.split(',').any(|x| x == option || x.strip_prefix(option).is_some_and(|rest| rest.starts_with('=')))
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = match self.strategy {
            Strategy::OneBarrier => "one-barrier",
            Strategy::Syncfs => "syncfs",
            Strategy::EachFile => "each-file",
        };
        write!(f, "{s} ({})", self.reason)
    }
}

/// The line of /proc/self/mountinfo for a device: type, source and super options.
struct MountLine {
    fs: String,
    source: String,
    options: String,
}

impl Probe {
    /// Probes the file system of `root`; clones are tried with two unnamed files in `staging`.
    pub fn of(root: &OwnedFd, staging: &OwnedFd) -> Result<Self, Errno> {
        let dev = rfs::fstat(root)?.st_dev;
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let line = find_mount(&table, rfs::major(dev), rfs::minor(dev)).unwrap_or(MountLine {
            fs: magic_name(rfs::fstatfs(root)?.f_type as u64).to_owned(),
            source: String::new(),
            options: String::new(),
        });
        let (strategy, reason) = strategy(&line, dev);
        let acl = !has(&line.options, "noacl");
        // The device number of btrfs is no device's.
        let device = device_name(dev).or_else(|| device_name(rfs::stat(&line.source).ok()?.st_rdev));
        let more = device.as_deref().filter(|_| line.fs == "ext4").and_then(ext4_options);
        let options = more.map_or(line.options.clone(), |m| format!("{},{}", line.options, m.replace('\n', ",")));
        Ok(Self { strategy, reason, acl, reflink: can_clone(staging), fs: line.fs, options, device })
    }
}

fn find_mount(table: &str, major: u32, minor: u32) -> Option<MountLine> {
    let want = format!("{major}:{minor}");
    table.lines().find_map(|l| {
        let (left, right) = l.split_once(" - ")?;
        let mut right = right.split(' ');
        (left.split(' ').nth(2)? == want).then_some(())?;
        let mut word = || right.next().map(str::to_owned);
        Some(MountLine { fs: word()?, source: word()?, options: word()? })
    })
}

fn magic_name(magic: u64) -> &'static str {
    match magic {
        0xEF53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683E => "btrfs",
        0x0102_1994 => "tmpfs",
        _ => "unknown",
    }
}

/// The shortcut is taken only where its preconditions are seen to hold (explored on the block level: ext4
/// data=ordered and XFS sound; ext4 data=writeback and btrfs not).
fn strategy(m: &MountLine, dev: u64) -> (Strategy, String) {
    match m.fs.as_str() {
        "ext4" => match ext4_obstacle(dev) {
            None => (Strategy::OneBarrier, "ext4, data=ordered, barriers on, internal journal".into()),
            Some(why) => (Strategy::EachFile, format!("ext4, {why}")),
        },
        "xfs" if ["logdev", "rtdev", "nobarrier"].iter().any(|o| has(&m.options, o)) => {
            (Strategy::EachFile, "xfs with an external log, a realtime device or without barriers".into())
        }
        "xfs" => (Strategy::OneBarrier, "xfs, internal log".into()),
        "btrfs" => (Strategy::Syncfs, "btrfs: names and data become durable together only by a full commit".into()),
        other => (Strategy::EachFile, format!("{other}: nothing known about its order")),
    }
}

/// What forbids the one-barrier commit on this ext4, if anything. The options that hold are in
/// /proc/fs/ext4/DEV/options; an internal journal has an entry /proc/fs/jbd2/DEV-8 (8 is its inode).
fn ext4_obstacle(dev: u64) -> Option<&'static str> {
    let Some(name) = device_name(dev) else { return Some("its device is not known") };
    let Some(options) = ext4_options(&name) else {
        return Some("its options cannot be read");
    };
    let has = |o: &str| options.lines().any(|l| l == o);
    if !std::path::Path::new(&format!("/proc/fs/jbd2/{name}-8")).exists() {
        return Some("without an internal journal");
    }
    if !has("data=ordered") {
        return Some("not mounted data=ordered");
    }
    if has("nobarrier") || has("barrier=0") {
        return Some("barriers off");
    }
    if has("journal_async_commit") {
        return Some("asynchronous journal commits");
    }
    None
}

/// The name of a block device in sysfs and procfs (`cciss!c0d0` for a name with a slash).
fn device_name(dev: u64) -> Option<String> {
    let link = fs::read_link(format!("/sys/dev/block/{}:{}", rfs::major(dev), rfs::minor(dev))).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn ext4_options(device: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/fs/ext4/{device}/options")).ok()
}

fn can_clone(dir: &OwnedFd) -> bool {
    let make = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rfs::openat(dir.as_fd(), ".", flags, Mode::from_raw_mode(0o600))
    };
    let (Ok(a), Ok(b)) = (make(), make()) else { return false };
    rustix::io::pwrite(&a, &[0; 4096], 0).is_ok() && rfs::ioctl_ficlone(&b, &a).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let t = "29 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,discard\n\
                 31 29 7:3 / /mnt/x rw - xfs /dev/loop3 rw,logdev=/dev/sdb,noquota\n";
        let m = find_mount(t, 7, 3).unwrap();
        assert_eq!((m.fs.as_str(), m.options.as_str()), ("xfs", "rw,logdev=/dev/sdb,noquota"));
        assert_eq!(m.source, "/dev/loop3");
        assert_eq!(strategy(&m, 0).0, Strategy::EachFile);
        assert!(find_mount(t, 7, 4).is_none());
    }

    #[test]
    fn unknown_means_the_careful_way() {
        let m = MountLine { fs: "foofs".into(), source: String::new(), options: String::new() };
        assert_eq!(strategy(&m, 0).0, Strategy::EachFile);
        let ext4 = MountLine { fs: "ext4".into(), ..m };
        assert_eq!(strategy(&ext4, 0).0, Strategy::EachFile, "no such device: nothing is known");
    }
}
