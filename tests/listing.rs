//! P5. A large directory is listed whole while it changes: each name that is there all the time comes exactly once.
//! `FSYS_TEST_ENTRIES` sets how many names (a million with `FSYS_TEST_FULL=1`); the time of it is told.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use common::loopfs::{Kind, LoopFs};
use common::mount::Mount;
use common::{can_mount, env_number, full, kinds, say};

/// How often each of the names `name-0` to `name-(n-1)` came.
fn list(dir: &Path, n: u64) -> Vec<u8> {
    let mut seen = vec![0_u8; n as usize];
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name();
        let number = name.to_str().and_then(|t| t.strip_prefix("name-")).and_then(|t| t.parse::<usize>().ok());
        if let Some(times) = number.and_then(|i| seen.get_mut(i)) {
            *times += 1;
        }
    }
    seen
}

/// Names that come and go, some of them only staged, until it is told to stop; how many changes.
fn churn(dir: &Path, stop: &AtomicBool, changes: &AtomicU64) {
    // Open, so only staged: it is in the list that the daemon keeps.
    let mut _held = None;
    for i in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (a, b) = (dir.join(format!("new-{i}")), dir.join(format!("moved-{i}")));
        fs::write(&a, "x").unwrap();
        fs::rename(&a, &b).unwrap();
        _held = Some(File::create(dir.join(format!("staged-{}", i % 100))).unwrap());
        fs::remove_file(&b).unwrap();
        changes.fetch_add(3, Ordering::Relaxed);
    }
}

#[test]
fn a_directory_that_changes_is_listed_whole() {
    if !can_mount("a_directory_that_changes_is_listed_whole") {
        return;
    }
    let most = env_number("FSYS_TEST_ENTRIES", if full() { 1_000_000 } else { 20_000 });
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let disk = LoopFs::new(kind, 300 + most / if kind == Kind::Ext4 { 50 } else { 500 });
        let backing = disk.subdir("data");
        let mut mount = Mount::start(&backing, "durability=relaxed");
        for n in [most / 10, most] {
            let dir = backing.join(n.to_string());
            fs::create_dir(&dir).unwrap();
            (0..n).for_each(|i| drop(File::create(dir.join(format!("name-{i}"))).unwrap()));
            let through = mount.path().join(n.to_string());
            let start = Instant::now();
            let quiet = list(&through, n);
            let took = start.elapsed();
            let (stop, changes) = (AtomicBool::new(false), AtomicU64::new(0));
            let start = Instant::now();
            let busy = std::thread::scope(|s| {
                s.spawn(|| churn(&through, &stop, &changes));
                let seen = list(&through, n);
                stop.store(true, Ordering::Relaxed);
                seen
            });
            let changes = changes.into_inner();
            say(&format!(
                "{} {n} entries: {took:?} alone, {:?} with {changes} changes meanwhile",
                kind.name(),
                start.elapsed()
            ));
            for (what, seen) in [("alone", quiet), ("changing", busy)] {
                let wrong: Vec<_> = seen.iter().enumerate().filter(|(_, times)| **times != 1).take(5).collect();
                assert!(wrong.is_empty(), "{} {n} {what}: name and how often: {wrong:?}", kind.name());
            }
            assert!(n < 10_000 || changes > 0, "nothing changed while it was listed");
        }
        mount.stop();
    }
}

/// Control: a name that is missing is told from one that came.
#[test]
fn a_missing_name_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    for i in [0, 2] {
        File::create(dir.path().join(format!("name-{i}"))).unwrap();
    }
    assert_eq!(list(dir.path(), 3), [1, 0, 1]);
}
