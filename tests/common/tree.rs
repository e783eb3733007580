//! Compares two directory trees in all that a program can see of them, except what must differ.
//!
//! Compared: the set of names, type, mode, owner, group, size, content, mtime, extended attributes (ACLs are
//! among them), symlink targets, device numbers, and which names are links to one inode. Not compared: inode
//! numbers, ctime, atime, the size of a directory.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr};

/// What to leave out of a comparison.
#[derive(Clone, Copy, Default)]
pub struct Skip<'a> {
    /// Times differ by nature: the two trees were made by two runs.
    pub mtime: bool,
    /// Top-level or nested entries with one of these names are not looked at, nor what is below them.
    pub names: &'a [&'a str],
}

/// Everything compared about one entry, as text that a difference can be shown with.
type Entry = BTreeMap<&'static str, String>;
type Listing = BTreeMap<PathBuf, Entry>;

/// Differences between two trees, at most `LIST` lines; empty when they are the same.
/// The number of entries compared comes with it: a comparison of nothing proves nothing.
pub fn differences(left: &Path, right: &Path, skip: Skip) -> (usize, Vec<String>) {
    const LIST: usize = 40;
    let (a, b) = (listing(left, skip), listing(right, skip));
    let mut found = Vec::new();
    for path in a.keys().chain(b.keys().filter(|p| !a.contains_key(*p))) {
        match (a.get(path), b.get(path)) {
            (Some(x), Some(y)) => {
                for key in x.keys().chain(y.keys().filter(|k| !x.contains_key(*k))) {
                    if x.get(key) != y.get(key) {
                        let none = "none".to_owned();
                        let (l, r) = (x.get(key).unwrap_or(&none), y.get(key).unwrap_or(&none));
                        found.push(format!("{}: {key}: {l} | {r}", path.display()));
                    }
                }
                if x.get("type") == y.get("type") && x.get("type").is_some_and(|t| t == "file") {
                    content_difference(&left.join(path), &right.join(path), path, &mut found);
                }
            }
            (x, _) => {
                let side = if x.is_some() { left } else { right };
                found.push(format!("{}: only in {}", path.display(), side.display()));
            }
        }
    }
    if found.len() > LIST {
        let more = found.len() - LIST;
        found.truncate(LIST);
        found.push(format!("and {more} more"));
    }
    (a.len(), found)
}

/// Panics with the list when the trees differ or are empty; gives the number of entries.
pub fn assert_same(what: &str, left: &Path, right: &Path, skip: Skip) -> usize {
    let (count, found) = differences(left, right, skip);
    assert!(found.is_empty(), "{what}: {} and {} differ:\n{}", left.display(), right.display(), found.join("\n"));
    assert!(count > 0, "{what}: {} is empty, this proves nothing", left.display());
    count
}

/// Every entry below `root`; hard links are found by inode and named by their first path.
fn listing(root: &Path, skip: Skip) -> Listing {
    let mut out = Listing::new();
    let mut first_names: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    let mut linked: Vec<((u64, u64), PathBuf)> = Vec::new();
    while let Some(dir) = pending.pop() {
        let full = root.join(&dir);
        for item in fs::read_dir(&full).unwrap_or_else(|e| panic!("{}: {e}", full.display())) {
            let name = item.expect("directory entry").file_name();
            if skip.names.iter().any(|n| name == *n) {
                continue;
            }
            let path = dir.join(&name);
            let full = root.join(&path);
            let meta = fs::symlink_metadata(&full).unwrap_or_else(|e| panic!("{}: {e}", full.display()));
            if meta.is_dir() {
                pending.push(path.clone());
            } else if meta.nlink() > 1 {
                let key = (meta.dev(), meta.ino());
                let first = first_names.entry(key).or_insert_with(|| path.clone());
                if path < *first {
                    first.clone_from(&path);
                }
                linked.push((key, path.clone()));
            }
            out.insert(path, describe(&full, &meta, skip));
        }
    }
    for (key, path) in linked {
        let first = first_names[&key].display().to_string();
        out.get_mut(&path).expect("listed above").insert("link to", first);
    }
    out
}

fn describe(path: &Path, meta: &Metadata, skip: Skip) -> Entry {
    let kind = meta.file_type();
    let mut entry = Entry::new();
    let name = match kind {
        k if k.is_file() => "file",
        k if k.is_dir() => "directory",
        k if k.is_symlink() => "symlink",
        k if k.is_fifo() => "fifo",
        k if k.is_socket() => "socket",
        k if k.is_char_device() => "char device",
        _ => "block device",
    };
    entry.insert("type", name.to_owned());
    entry.insert("mode", format!("{:04o}", meta.mode() & 0o7777));
    entry.insert("owner", format!("{}:{}", meta.uid(), meta.gid()));
    if !kind.is_dir() {
        entry.insert("links", meta.nlink().to_string());
        entry.insert("size", meta.size().to_string());
        entry.insert("device", meta.rdev().to_string());
    }
    if !skip.mtime {
        entry.insert("mtime", format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()));
    }
    if kind.is_symlink() {
        entry.insert("target", format!("{}", fs::read_link(path).expect("symlink").display()));
    }
    entry.insert("xattrs", xattrs(path));
    entry
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0u8; 64 << 10];
    let len = match llistxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => panic!("listxattr {}: {e}", path.display()),
    };
    let mut sorted: Vec<&[u8]> = names[..len].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    sorted.sort_unstable();
    let mut text = String::new();
    for name in sorted {
        let mut value = vec![0u8; 64 << 10];
        let shown = std::ffi::OsStr::from_bytes(name);
        let len = lgetxattr(path, shown, &mut value[..]).unwrap_or_else(|e| panic!("getxattr {}: {e}", path.display()));
        let _ = write!(text, "{}={} ", shown.display(), value[..len].escape_ascii());
    }
    text
}

fn content_difference(left: &Path, right: &Path, path: &Path, found: &mut Vec<String>) {
    let read = |p: &Path| -> io::Result<Vec<u8>> { fs::read(p) };
    match (read(left), read(right)) {
        (Ok(a), Ok(b)) if a == b => {}
        (Ok(a), Ok(b)) => {
            let at = a.iter().zip(&b).position(|(x, y)| x != y).unwrap_or(a.len().min(b.len()));
            found.push(format!("{}: content differs at byte {at} of {} | {}", path.display(), a.len(), b.len()));
        }
        (a, b) => found.push(format!("{}: cannot read: {:?} | {:?}", path.display(), a.err(), b.err())),
    }
}
