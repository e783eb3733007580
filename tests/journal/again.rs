//! Files that are saved again and again, and the log that takes it.

use std::fs;

use crate::common::world::World;
use crate::common::{self, Kind, LoopFs};
use crate::{LOG, dir, steps, with_files};
use fsys_mount::backend::Call;
use fsys_mount::error::Errno;

/// P2. Saved by open, write and close again and again, a file is flushed once in a commit: what the log has of it need not
/// be flushed ahead of the next record. What else became of the inode in between has to be.
#[test]
fn a_file_that_is_saved_again_costs_one_flush() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let commit = [Call::Journal, Call::SyncFile, Call::Apply];
    let save = |flags| {
        let fd = w.open_with("a", libc::O_WRONLY | flags).unwrap();
        w.write_all(fd, 0, b"new").unwrap();
        w.seam.watch(&[]);
        w.close(fd).unwrap();
        steps(&w)
    };
    assert_ne!(save(libc::O_TRUNC), commit, "of the first nothing is known");
    assert_eq!(
        (save(libc::O_TRUNC), save(0), save(libc::O_TRUNC)),
        (commit.to_vec(), commit.to_vec(), commit.to_vec())
    );
    let read = w.open_with("a", libc::O_RDONLY).unwrap();
    w.release(read);
    assert_eq!(save(libc::O_TRUNC), commit, "a reader changes nothing");
    w.chmod_name("a", 0o600).unwrap();
    assert_eq!(save(libc::O_TRUNC), [Call::SyncFile, Call::Journal, Call::SyncFile, Call::Apply], "nobody has it open");
    assert_eq!(save(libc::O_TRUNC), commit);
    w.drain().unwrap();
    assert_ne!(save(libc::O_TRUNC), commit, "the log holds nothing of it any more");
    w.shutdown().unwrap();
}

fn rewrite(w: &World, content: &[u8]) {
    let fd = w.open_with("a", libc::O_WRONLY | libc::O_TRUNC).unwrap();
    w.write_all(fd, 0, content).unwrap();
    w.close(fd).unwrap();
}

/// An inode that takes appends only keeps that, also where the journal holds it open.
#[test]
fn appends_only() {
    let fs = LoopFs::new(Kind::Ext4, 64);
    let root = fs.subdir("data");
    let w = with_files(&root, &["a"]);
    rewrite(&w, b"one");
    let path = root.join("a");
    let chattr = |flag: &str| common::run(std::process::Command::new("chattr").arg(flag).arg(&path));
    chattr("+a");
    let refused = [libc::O_WRONLY, libc::O_WRONLY | libc::O_TRUNC].map(|flags| w.open_with("a", flags).err());
    chattr("-a");
    assert_eq!(refused, [Some(Errno::PERM); 2]);
    rewrite(&w, b"two");
    w.shutdown().unwrap();
}

/// The log grows by whole steps, so that most flushes find its space there, and gives back what one large update took.
#[test]
fn the_log_grows_in_steps() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let size = || fs::metadata(dir.path().join(LOG)).unwrap().len();
    let mut sizes = std::collections::BTreeSet::new();
    for i in 0..300_u32 {
        rewrite(&w, &i.to_le_bytes().repeat(1024));
        sizes.insert(size());
    }
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [1 << 20, 2 << 20, 3 << 20], "8 KiB each");
    rewrite(&w, &vec![7; 3 << 20]);
    assert!(size() > 5 << 20);
    w.shutdown().unwrap();
}
