//! The kernel's table of mounts, `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::volume::SUBTYPE;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Device number, `MAJ:MIN`.
    pub device: String,
    /// The directory of the file system that is mounted here; `/` but for bind mounts.
    pub root: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// Type, `fuse.fsys` for ours.
    pub kind: String,
    /// What is mounted: a device, for most.
    pub source: String,
    /// The user who mounted it, for FUSE file systems.
    pub user: Option<u32>,
}

impl Mounted {
    /// True for a mount of this program.
    pub fn is_fsys(&self) -> bool {
        self.kind.strip_prefix("fuse.") == Some(SUBTYPE)
    }
}

/// All mounts that this process sees, in the order in which they were made.
///
/// # Errors
/// `/proc` is not there.
pub fn read() -> io::Result<Vec<Mounted>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mount that a look-up of exactly `path` ends in: the last one made there.
pub fn at<'a>(mounts: &'a [Mounted], path: &Path) -> Option<&'a Mounted> {
    mounts.iter().rev().find(|m| m.mountpoint == path)
}

/// The mount that holds `path`, which must be absolute and free of symbolic links.
pub fn holding<'a>(mounts: &'a [Mounted], path: &Path) -> Option<&'a Mounted> {
    path.ancestors().find_map(|above| at(mounts, above))
}

/// Reads the text of the table; lines that are none are left out.
pub fn parse(text: &[u8]) -> Vec<Mounted> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|b| *b == b' ');
    let device = fields.nth(2)?;
    let (root, mountpoint) = (fields.next()?, fields.next()?);
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    let (kind, source, options) = (rest.next()?, rest.next()?, rest.next().unwrap_or_default());
    let options = String::from_utf8_lossy(options);
    Some(Mounted {
        device: String::from_utf8_lossy(device).into_owned(),
        root: unescape(root),
        mountpoint: unescape(mountpoint),
        kind: String::from_utf8_lossy(kind).into_owned(),
        source: unescape(source).display().to_string(),
        user: options.split(',').find_map(|o| o.strip_prefix("user_id=")).and_then(|n| n.parse().ok()),
    })
}

/// Space, tab, newline, backslash and `#` are written as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = after.get(..3).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        40 22 0:51 / /mnt/a\\040b rw - fuse.fsys /data rw,user_id=1000,group_id=0\n\
        41 22 0:52 /sub /mnt/a\\040b rw,nosuid shared:2 master:3 - fuse.fsys /x rw,user_id=0\n\
        cut 22";

    #[test]
    fn reads_and_finds() {
        let mounts = parse(TEXT);
        assert_eq!(mounts.len(), 3);
        let top = at(&mounts, Path::new("/mnt/a b")).unwrap();
        assert_eq!((top.device.as_str(), top.user, top.root.as_path()), ("0:52", Some(0), Path::new("/sub")));
        assert_eq!(mounts[0].source, "/dev/sda1");
        assert!(top.is_fsys() && !mounts[0].is_fsys());
        assert_eq!(holding(&mounts, Path::new("/mnt/a b/c/d")), Some(top));
        assert_eq!(holding(&mounts, Path::new("/mnt/other")), Some(&mounts[0]));
        assert_eq!(at(&mounts, Path::new("/mnt")), None);
    }

    #[test]
    fn reads_the_real_one() {
        assert!(read().unwrap().iter().any(|m| m.mountpoint == Path::new("/")));
    }
}
