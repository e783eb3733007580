//! Every crash state: what is on the disk after a power cut, explored on the block level.
//!
//! A workload runs on a device that records every write and every flush; then every disk that a crash could have left
//! is built, mounted and compared with what had been acknowledged. Needs root (mounts, loop devices); the module `rig`
//! says what it touches. The tests here are a slice; `scripts/crash` runs as much of it as you like.

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used, clippy::struct_excessive_bools)]

mod ace;
mod broken;
mod campaign;
mod cases;
mod commands;
mod delivery;
mod device;
mod disk;
mod duress;
mod explore;
mod fsys;
mod instant;
mod journal;
mod model;
mod order;
mod programs;
mod raw;
mod rig;
mod sabotage;
mod stage;
mod states;
mod workload;
#[path = "../common/world.rs"]
#[allow(dead_code, reason = "made for other tests too")]
mod world;

use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cases::{Case, Expect};
use disk::{Fault, Request};
use explore::Budget;
use programs::{Level, Mode};
use rig::{Kind, Rig};

/// One test at a time: a child that one starts would inherit what another has open, for a moment, and keep its
/// filesystem busy, or close a descriptor that is being written through the mount.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn slice(kind: Kind, states: usize, wanted: impl Fn(&Case) -> bool) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let rig = Rig::new(kind);
    let budget = |case: &Case| Budget {
        // Controls end at the first violation.
        states: if case.expect == Expect::Caught { 2000 } else { states },
        per_run: 12,
        seed: 1,
        stop_after: 3,
        keep: None,
    };
    let failed: Vec<String> =
        cases::all(kind).into_iter().filter(wanted).filter(|c| !c.run(&rig, &budget(c)).1).map(|c| c.name).collect();
    assert!(failed.is_empty(), "{}: {failed:?}; see above", kind.name());
}

/// What of the cases on a mount there is time for: all that programs do in mode `auto`, one of every other kind.
fn in_slice(case: &Case) -> bool {
    let heavy = ["sqlite", "git"].iter().any(|w| case.name.starts_with(w));
    let default = case.level == Level::Close.name();
    let other_mode = case.mode != Mode::Auto.name();
    case.is_mounted() && if heavy { default } else { default || !other_mode }
}

#[test]
fn the_protocol_survives_every_crash_on_ext4_and_the_controls_do_not() {
    slice(Kind::Ext4, 120, |c| !c.is_mounted());
}

#[test]
fn the_protocol_survives_every_crash_on_xfs_and_the_controls_do_not() {
    slice(Kind::Xfs, 120, |c| !c.is_mounted());
}

#[test]
fn the_protocol_survives_every_crash_on_btrfs_and_the_controls_do_not() {
    slice(Kind::Btrfs, 120, |c| !c.is_mounted());
}

#[test]
fn programs_on_the_mount_keep_what_was_acknowledged_on_ext4() {
    slice(Kind::Ext4, 48, in_slice);
}

#[test]
fn programs_on_the_mount_keep_what_was_acknowledged_on_xfs() {
    slice(Kind::Xfs, 48, in_slice);
}

#[test]
fn programs_on_the_mount_keep_what_was_acknowledged_on_btrfs() {
    slice(Kind::Btrfs, 48, in_slice);
}

/// The rig itself: a slow flush is slow, a failed one reaches the program, and the next device is whole again.
#[test]
fn the_device_delays_and_fails_flushes() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let rig = Rig::new(Kind::Ext4);
    let mounted = rig.mount(false).unwrap();
    let mut file = File::create(mounted.path().join("f")).unwrap();
    let delay = Duration::from_millis(50);
    rig.disk.set_flush_delay(delay);
    file.write_all(b"slow").unwrap();
    let start = Instant::now();
    file.sync_all().unwrap();
    assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
    rig.disk.set_flush_delay(Duration::ZERO);
    let always = Fault { on: Request::Flush, skip: 0, count: u64::MAX, one_in: 1, seed: 0, errno: libc::EIO };
    rig.disk.set_faults(vec![always]);
    file.write_all(b"broken").unwrap();
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    drop((file, mounted));
    rig.settle();
    rig.disk.reset();
    let mounted = rig.mount(false).unwrap();
    let mut file = File::create(mounted.path().join("f")).unwrap();
    file.write_all(b"whole").unwrap();
    file.sync_all().unwrap();
    assert!(rig.disk.flushes() > 1);
}
