//! Files that are saved again and again, and the log that takes it.

use std::fs;

use crate::common::world::{What, World, recovered};
use crate::common::{self, Kind, LoopFs};
use crate::{LOG, dir, steps, together, with_files};
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
    rewrite(&w, &vec![8; 40 << 20]);
    // It is begun anew after the answer.
    w.drain().unwrap();
    assert_eq!(size(), 4096 + (32 << 20), "more than it ever keeps");
    rewrite(&w, b"and goes on");
    w.kill();
    recovered(dir.path());
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"and goes on");
}

/// P2. On a disk that is nearly full a save that fits is made, though a whole step of the log does not fit.
#[test]
fn no_space_for_a_step_of_the_log() {
    let fs = LoopFs::new(Kind::Ext4, 64);
    let root = fs.subdir("data");
    let w = with_files(&root, &["a"]);
    rewrite(&w, &[1; 4096]);
    let filler = fs::File::create(root.join("filler")).unwrap();
    let piece = 64 << 10;
    let fits = |n: &u64| rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), n * piece, piece).is_ok();
    let full = (0..1 << 20).take_while(fits).count() as u64;
    filler.set_len((full - 11) * piece).unwrap();
    for i in 0..160_u32 {
        rewrite(&w, &i.to_le_bytes().repeat(1024));
    }
    assert!(fs::metadata(root.join(LOG)).unwrap().len() > 1 << 20);
    assert_eq!(w.seen("a").unwrap(), 159_u32.to_le_bytes().repeat(1024));
    w.shutdown().unwrap();
}

/// P3. A commit that failed leaves nothing in the open inode: the version before is seen, what failed is kept, and the
/// next save is whole.
#[test]
fn a_save_that_failed_is_not_seen_by_the_next() {
    for failing in [Call::Write, Call::Allocate] {
        let dir = dir();
        let w = with_files(dir.path(), &["a"]);
        rewrite(&w, b"old");
        let fd = w.open_with("a", libc::O_WRONLY | libc::O_TRUNC).unwrap();
        w.write_all(fd, 0, b"failed").unwrap();
        w.seam.watch(&[(0, What::Fail(Errno::NOSPC))]);
        let error = if failing == Call::Write { w.write_all(fd, 6, b"more") } else { Err(Errno::NOSPC) };
        assert_eq!((error, w.close(fd)), (Err(Errno::NOSPC), Err(Errno::NOSPC)));
        assert_eq!(w.seam.hits().iter().map(|h| h.0).collect::<Vec<_>>(), [failing]);
        assert_eq!((w.seen("a").unwrap(), w.on_disk("a").unwrap()), (b"old".to_vec(), b"old".to_vec()));
        let fd = w.open_with("a", libc::O_WRONLY).unwrap();
        w.write_all(fd, 1, b"new").unwrap();
        w.close(fd).unwrap();
        assert_eq!((w.seen("a").unwrap(), w.on_disk("a").unwrap()), (b"onew".to_vec(), b"onew".to_vec()));
        let kept = w.internal("failed");
        let kept = fs::read(dir.path().join(".fsys/failed").join(&kept[0])).unwrap();
        assert_eq!(kept, b"failed");
        w.kill();
        recovered(dir.path());
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"onew");
    }
}

/// P3. The kernel tells an error of a write once: where the file was written from records, they stay.
#[test]
fn records_stay_when_a_flush_of_their_file_fails() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    rewrite(&w, b"one");
    rewrite(&w, b"two");
    w.chmod_name("a", 0o600).unwrap();
    let fd = w.open_with("a", libc::O_WRONLY | libc::O_TRUNC).unwrap();
    w.write_all(fd, 0, b"three").unwrap();
    w.seam.watch(&[(0, What::Fail(Errno::NOSPC))]);
    assert_eq!(w.close(fd), Err(Errno::NOSPC));
    assert_eq!(w.seam.hits(), [(Call::SyncFile, What::Fail(Errno::NOSPC))]);
    assert!(w.engine().read_only_reason().unwrap().contains("updates in the journal"));
    w.kill();
    assert_eq!(recovered(dir.path()).updates.len(), 2);
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"two");
}

/// P3. Nor is anything recorded of others that are told of the same failure.
#[test]
fn nothing_is_recorded_once_the_mount_is_read_only() {
    let dir = dir();
    let w = with_files(dir.path(), &["first", "a", "b"]);
    let open = |name| w.open_with(name, libc::O_RDWR).unwrap();
    let (first, a, b) = (open("first"), open("a"), open("b"));
    for fd in [first, a, b] {
        w.write_all(fd, 0, b"one").unwrap();
        w.fsync(fd).unwrap();
        w.write_all(fd, 0, b"two").unwrap();
    }
    w.chmod(a, 0o600).unwrap();
    w.seam.watch(&[]);
    w.fsync(first).unwrap();
    let own = w.seam.calls().len();
    w.write_all(first, 0, b"three").unwrap();
    // After the commit of the first come those of the others, together, and the flush of `a` before their records.
    w.seam.watch(&[(own, What::Fail(Errno::NOSPC))]);
    let told = together(&w, first, &[a, b]);
    assert_eq!(w.seam.hits(), [(Call::SyncFile, What::Fail(Errno::NOSPC))]);
    assert_eq!(told, [Err(Errno::NOSPC), Err(Errno::IO)]);
    w.kill();
    recovered(dir.path());
    for name in ["a", "b"] {
        assert!(fs::read(dir.path().join(name)).unwrap().starts_with(b"one"), "{name}: what failed came back");
    }
}

/// P2. What fsync of a file that is known to be durable has left to do: a rename, space that was allocated.
#[test]
fn a_known_file_is_not_all_that_an_fsync_is_for() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    rewrite(&w, b"one");
    rewrite(&w, b"two");
    w.rename("a", "b").unwrap();
    let fd = w.open_with("b", libc::O_RDWR).unwrap();
    w.seam.watch(&[]);
    w.fsync(fd).unwrap();
    assert_eq!(steps(&w), [Call::SyncDir]);
    w.seam.watch(&[]);
    w.fsync(fd).unwrap();
    assert!(steps(&w).is_empty(), "nothing is left");
    w.allocate(fd, 1 << 16).unwrap();
    w.seam.watch(&[]);
    w.fsync(fd).unwrap();
    assert_eq!(steps(&w), [Call::SyncFile, Call::Journal, Call::SyncFile, Call::Apply], "the inode has the space");
    w.release(fd);
    w.shutdown().unwrap();
}
