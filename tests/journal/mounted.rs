//! Write mode `journal` with the kernel between: memory maps, links, and a daemon that is killed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use crate::common::{self, Kind, LoopFs, Mount};

/// P1, P2, P5, P6, P7. What a program writes through a shared map is committed by its msync, the file keeps its inode and
/// its links, and what was answered is there after a kill -9, which the next mount says.
#[test]
fn a_mapped_file_with_two_names_and_a_kill() {
    if !common::can_mount("a_mapped_file_with_two_names_and_a_kill") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 64);
    let a = disk.path().join("a");
    let mut want = vec![b'o'; 8192];
    fs::write(&a, &want).unwrap();
    fs::hard_link(&a, disk.path().join("b")).unwrap();
    let before = fs::metadata(&a).unwrap();
    let mut mount = Mount::start(disk.path(), "mode=journal,commit_interval_ms=3600000");
    let file = OpenOptions::new().read(true).write(true).open(mount.path().join("a")).unwrap();
    let (both, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a fresh map of the length of the file, used within it by this thread alone and unmapped below.
    unsafe {
        let map = mmap(std::ptr::null_mut(), want.len(), both, shared, &file, 0).unwrap();
        for (off, text) in [(100, b"map"), (8000, b"end")] {
            map.cast::<u8>().add(off).copy_from_nonoverlapping(text.as_ptr(), text.len());
            want[off..off + text.len()].copy_from_slice(text);
        }
        assert_eq!(fs::read(&a).unwrap(), [b'o'; 8192], "not before a commit point");
        msync(map, want.len(), MsyncFlags::SYNC).unwrap();
        munmap(map, want.len()).unwrap();
    }
    assert_eq!(fs::read(&a).unwrap(), want);
    file.write_all_at(b"more", 8192).unwrap();
    want.extend_from_slice(b"more");
    assert_eq!(fs::read(mount.path().join("b")).unwrap(), want, "under the other name, at once");
    file.sync_data().unwrap();
    file.write_all_at(b"never committed", 0).unwrap();
    mount.kill9();
    drop(file);
    mount.restart();
    assert!(mount.log().contains("update(s) from the journal into their files"), "{}", mount.log());
    let after = fs::metadata(&a).unwrap();
    assert_eq!((after.ino(), after.nlink(), after.mode()), (before.ino(), 2, before.mode()));
    assert_eq!(fs::read(mount.path().join("b")).unwrap(), want);
    mount.stop();
    fs::remove_dir_all(disk.path().join(".fsys")).unwrap();
    assert_eq!(fs::read(&a).unwrap(), want);
}
