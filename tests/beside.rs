//! One program makes the device work; others, whose calls need no device, do not wait for it.

#![allow(clippy::unwrap_used)] // helpers of tests: a failure there is a failure of the test

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::can_mount;
use common::loopfs::{Kind, LoopFs};
use common::mount::Mount;
use rustix::fs::{Advice, fadvise};

/// MiB a second.
const RATE: u64 = 2;
/// Seconds of work for the device.
const BUSY: usize = 4;
/// Looked up meanwhile, each by a request to the daemon: with every one behind a request to the device, minutes.
const LOOKUPS: usize = 200;

/// Runs `work`, which keeps the device busy, and looks up names; whether they were all answered before it ended.
fn others_go_on<T: Send>(root: &Path, work: impl FnOnce() -> T + Send) -> bool {
    std::thread::scope(|scope| {
        let busy = scope.spawn(work);
        // It is at it by now, and for seconds to come.
        std::thread::sleep(Duration::from_millis(500));
        for i in 0..LOOKUPS {
            assert!(fs::symlink_metadata(root.join(format!("absent-{i}"))).is_err());
        }
        !busy.is_finished()
    })
}

#[test]
fn a_program_that_reads_from_the_device_holds_up_nobody() {
    if !can_mount("a_program_that_reads_from_the_device_holds_up_nobody") {
        return;
    }
    let disk = LoopFs::rated(Kind::Ext4, 300, 0, RATE);
    let data = disk.subdir("data");
    let content: Vec<u8> = (0..BUSY * RATE as usize * (1 << 18)).flat_map(|i| (i as u32).to_ne_bytes()).collect();
    fs::write(data.join("large"), &content).unwrap();
    let raw = File::open(data.join("large")).unwrap();
    raw.sync_all().unwrap();
    fadvise(&raw, 0, None, Advice::DontNeed).unwrap();
    let mut mount = Mount::start(&data, "");
    let mut seen = Vec::new();
    let read = || seen = fs::read(mount.path().join("large")).unwrap();
    assert!(others_go_on(mount.path(), read), "{LOOKUPS} lookups took longer than {BUSY} s of reading");
    assert!(seen == content, "what came from the device is what is there");
    let waited = mount.counter("device_reads");
    assert!(waited > 0);
    // It is in the kernel's cache of the backing file now, and no device is waited for.
    let file = File::open(mount.path().join("large")).unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    let mut all = vec![0; content.len()];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(all == content);
    assert_eq!(mount.counter("device_reads"), waited);
    drop(file);
    mount.stop();
}

#[test]
fn a_program_that_writes_to_the_device_holds_up_nobody() {
    if !can_mount("a_program_that_writes_to_the_device_holds_up_nobody") {
        return;
    }
    let disk = LoopFs::rated(Kind::Ext4, 300, 0, RATE);
    let data = disk.subdir("data");
    let mut mount = Mount::start(&data, "method=direct");
    let (path, content) = (mount.path().join("large"), vec![7; BUSY * RATE as usize * (1 << 20)]);
    let write = || {
        let file = File::create(&path).unwrap();
        content.chunks(1 << 19).zip(0..).for_each(|(c, i)| file.write_all_at(c, i << 19).unwrap());
        // Its close is a flush, and comes after the look at the clock.
        file
    };
    assert!(others_go_on(mount.path(), write), "{LOOKUPS} lookups took longer than {BUSY} s of writing");
    assert!(mount.counter("device_writes") > 0 && mount.counter("direct_writes") > 0);
    assert!(fs::read(&path).unwrap() == content);
    mount.stop();
}

/// Programs that save by themselves in one directory take turns. Nobody is forgotten over it, whatever the others do: fsync
/// new files and never the directory, or sync the directory all the time.
#[test]
fn programs_that_take_turns_all_get_on() {
    if !can_mount("programs_that_take_turns_all_get_on") {
        return;
    }
    let disk = LoopFs::slow(Kind::Ext4, 300, 1000);
    let mut mount = Mount::start(&disk.subdir("data"), "");
    let (root, over) = (mount.path().to_path_buf(), AtomicBool::new(false));
    let write = |name: &str, text: String| {
        let mut file = File::create(root.join(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.sync_all().unwrap();
    };
    let sync_dir = || File::open(&root).unwrap().sync_all().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                sync_dir();
            }
        });
        let (write, root) = (&write, &root);
        let saves = (0..8).map(|who| {
            scope.spawn(move || {
                for n in 0..30 {
                    write(&format!("temp{who}"), format!("{who} {n}"));
                    fs::rename(root.join(format!("temp{who}")), root.join(format!("saved{who}"))).unwrap();
                    sync_dir();
                }
            })
        });
        let others =
            (0..3).map(|who| scope.spawn(move || (0..30).for_each(|n| write(&format!("new{who}-{n}"), n.to_string()))));
        let all: Vec<_> = saves.chain(others).collect();
        all.into_iter().for_each(|t| t.join().unwrap());
        over.store(true, Ordering::Release);
    });
    for who in 0..8 {
        assert_eq!(fs::read_to_string(root.join(format!("saved{who}"))).unwrap(), format!("{who} 29"));
    }
    for (who, n) in (0..3).flat_map(|who| (0..30).map(move |n| (who, n))) {
        assert_eq!(fs::read_to_string(root.join(format!("new{who}-{n}"))).unwrap(), n.to_string());
    }
    mount.stop();
}
