//! Compares two directory trees in all that a program can see of them, except what must differ.
//!
//! Compared: the set of names, type, mode, owner, group, size, content, mtime, extended attributes (ACLs are
//! among them), symlink targets, device numbers, and which names are links to one inode. Not compared: inode
//! numbers, ctime, atime, the size of a directory.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, Metadata};
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr};

/// What to leave out of a comparison.
#[derive(Clone, Copy, Default)]
pub struct Skip<'a> {
    /// Times differ by nature: the two trees were made by two runs.
    pub mtime: bool,
    /// A publication moves the time of the directory below; programs see the one of their own create.
    pub dir_mtime: bool,
    /// Top-level or nested entries with one of these names are not looked at, nor what is below them.
    pub names: &'a [&'a str],
}

/// Everything compared about one entry, as text that a difference can be shown with.
type Entry = BTreeMap<&'static str, String>;

/// What a tree looked like at one moment; it can be compared after the tree is gone.
pub struct Snapshot {
    root: PathBuf,
    entries: BTreeMap<PathBuf, Entry>,
}

impl Snapshot {
    /// Looks at everything below `root`, the content included.
    pub fn take(root: &Path, skip: Skip) -> Snapshot {
        Snapshot { root: root.to_owned(), entries: listing(root, skip) }
    }

    /// Number of entries: a comparison of nothing proves nothing.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Differences to `other`, at most `LIST` lines; empty when both are the same.
    pub fn differences(&self, other: &Snapshot) -> Vec<String> {
        const LIST: usize = 40;
        let (a, b) = (&self.entries, &other.entries);
        let mut found = Vec::new();
        for path in a.keys().chain(b.keys().filter(|p| !a.contains_key(*p))) {
            match (a.get(path), b.get(path)) {
                (Some(x), Some(y)) => found.extend(entry_differences(path, x, y)),
                (Some(_), None) => found.push(format!("{}: only in {}", path.display(), self.root.display())),
                _ => found.push(format!("{}: only in {}", path.display(), other.root.display())),
            }
        }
        if found.len() > LIST {
            let more = found.len() - LIST;
            found.truncate(LIST);
            found.push(format!("and {more} more"));
        }
        found
    }

    /// Panics with the list when the two differ or are empty.
    pub fn assert_same(&self, other: &Snapshot, what: &str) {
        let found = self.differences(other);
        let (left, right) = (self.root.display(), other.root.display());
        assert!(found.is_empty(), "{what}: {left} and {right} differ:\n{}", found.join("\n"));
        assert!(self.count() > 0, "{what}: {left} is empty, this proves nothing");
    }
}

/// Both trees at once: panics when they differ or are empty; gives the number of entries.
pub fn assert_same(what: &str, left: &Path, right: &Path, skip: Skip) -> usize {
    let (left, right) = (Snapshot::take(left, skip), Snapshot::take(right, skip));
    left.assert_same(&right, what);
    left.count()
}

fn entry_differences(path: &Path, x: &Entry, y: &Entry) -> Vec<String> {
    let none = "none".to_owned();
    let keys = x.keys().chain(y.keys().filter(|k| !x.contains_key(*k)));
    keys.filter(|key| x.get(*key) != y.get(*key))
        .map(|key| {
            let (l, r) = (x.get(key).unwrap_or(&none), y.get(key).unwrap_or(&none));
            format!("{}: {key}: {l} | {r}", path.display())
        })
        .collect()
}

/// Every entry below `root`; hard links are found by inode and named by their first path.
fn listing(root: &Path, skip: Skip) -> BTreeMap<PathBuf, Entry> {
    let mut out = BTreeMap::new();
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
    if !(skip.mtime || skip.dir_mtime && kind.is_dir()) {
        entry.insert("mtime", format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()));
    }
    if kind.is_file() {
        entry.insert("content", content(path));
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
        let _ = write!(text, "{}={} ", shown.to_string_lossy(), value[..len].escape_ascii());
    }
    text
}

/// A fingerprint of the content, with enough of its start to tell what it is.
fn content(path: &Path) -> String {
    match fs::read(path) {
        Ok(data) => {
            let mut hasher = DefaultHasher::new();
            hasher.write(&data);
            format!("{:016x} {}", hasher.finish(), data[..data.len().min(24)].escape_ascii())
        }
        Err(e) => format!("cannot read: {e}"),
    }
}
