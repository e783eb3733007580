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

/// A change through one name is a change under all, so it comes before what is done later beside any of them: also where
/// the other name was not looked up before.
#[test]
fn a_change_keeps_its_place_in_the_directories_of_all_links() {
    if !common::can_mount("a_change_keeps_its_place_in_the_directories_of_all_links") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 64);
    let (a, b) = (disk.subdir("a"), disk.subdir("b"));
    for level in ["fsync", "relaxed"] {
        for what in ["rename over a link", "unlink a link", "save and rename beside a link"] {
            fs::write(a.join("file"), "old").unwrap();
            fs::write(b.join("other"), "other").unwrap();
            let _ = fs::remove_file(b.join("link"));
            fs::hard_link(a.join("file"), b.join("link")).unwrap();
            let options = format!("mode=journal,durability={level},commit_interval_ms=3600000");
            let mut mount = Mount::start(disk.path(), &options);
            let at = |name: &str| mount.path().join(name);
            if what.starts_with("save") {
                // No operation on the link itself: its name has to be known, after the other.
                for name in ["a/file", "b/link"] {
                    fs::metadata(at(name)).unwrap();
                }
            }
            fs::write(at("a/file"), "new").unwrap();
            assert_eq!(fs::read_to_string(a.join("file")).unwrap(), "old", "control: not committed by itself");
            match what {
                "rename over a link" => fs::rename(at("b/other"), at("b/link")).unwrap(),
                "unlink a link" => fs::remove_file(at("b/link")).unwrap(),
                _ => {
                    fs::write(at("b/other"), "later").unwrap();
                    fs::rename(at("b/other"), at("b/third")).unwrap();
                }
            }
            assert_eq!(fs::read_to_string(a.join("file")).unwrap(), "new", "{what}, {level}");
            mount.stop();
        }
    }
}
