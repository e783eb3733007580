//! Every crash state: what is on the disk after a power cut, explored on the block level.
//!
//! A workload runs on a device that records every write and every flush; then every disk that a crash could have left
//! is built, mounted and compared with what had been acknowledged. Needs root (mounts, loop devices); the module `rig`
//! says what it touches. The tests here are a slice; `scripts/crash` runs as much of it as you like.

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used, clippy::struct_excessive_bools)]

mod broken;
mod cases;
mod commands;
mod device;
mod disk;
mod explore;
mod fsys;
mod model;
mod programs;
mod raw;
mod rig;
mod stage;
mod states;
mod workload;

use std::fs::{self, File};
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cases::Case;
use disk::{Fault, Request};
use explore::Budget;
use rig::{Kind, Rig};

/// One test at a time: a child that one starts would inherit what another has open, for a moment, and keep its
/// filesystem busy, or close a descriptor that is being written through the mount.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn slice(kind: Kind, states: usize, wanted: impl Fn(&Case) -> bool) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let rig = Rig::new(kind);
    let budget = Budget { states, per_run: 12, seed: 1, stop_after: 3, keep: None };
    let failed: Vec<String> =
        cases::all(kind).into_iter().filter(wanted).filter(|c| !c.run(&rig, &budget)).map(|c| c.name).collect();
    assert!(failed.is_empty(), "{}: {failed:?}; see above", kind.name());
}

fn is_mount(case: &Case) -> bool {
    is_programs(case) || ["sqlite", "git", "replace", "in-place"].iter().any(|w| case.name.starts_with(w))
}

fn is_programs(case: &Case) -> bool {
    case.name.starts_with("programs") || case.name.starts_with("ordered")
}

/// Of the whole programs, which take long, those at the default level.
fn in_slice(case: &Case) -> bool {
    is_programs(case) || (is_mount(case) && case.name.ends_with("close"))
}

#[test]
fn the_protocol_survives_every_crash_on_ext4_and_the_controls_do_not() {
    slice(Kind::Ext4, 120, |c| !is_mount(c));
}

#[test]
fn the_protocol_survives_every_crash_on_xfs_and_the_controls_do_not() {
    slice(Kind::Xfs, 120, |c| !is_mount(c));
}

#[test]
fn the_protocol_survives_every_crash_on_btrfs_and_the_controls_do_not() {
    slice(Kind::Btrfs, 120, |c| !is_mount(c));
}

#[test]
fn programs_on_the_mount_keep_what_was_acknowledged_on_ext4() {
    slice(Kind::Ext4, 24, in_slice);
}

#[test]
fn programs_on_the_mount_keep_what_was_acknowledged_on_xfs() {
    slice(Kind::Xfs, 24, in_slice);
}

#[test]
fn programs_on_the_mount_keep_what_was_acknowledged_on_btrfs() {
    slice(Kind::Btrfs, 24, in_slice);
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

/// The campaign of `scripts/crash`, by environment.
#[test]
#[ignore = "as long as you like: run it by scripts/crash"]
fn campaign() {
    let text = |name: &str| std::env::var(format!("FSYS_CRASH_{name}")).unwrap_or_default();
    let number = |name: &str, default: u64| text(name).parse().unwrap_or(default);
    let keep = Some(text("KEEP")).filter(|k| !k.is_empty()).map(Into::into);
    if let Some(dir) = &keep {
        fs::create_dir_all::<&std::path::PathBuf>(dir).unwrap();
    }
    let budget = Budget {
        states: number("STATES", 1000) as usize,
        per_run: number("PER_RUN", 40) as usize,
        seed: number("SEED", 1),
        stop_after: number("STOP", 10) as usize,
        keep,
    };
    let wanted = |list: &str, name: &str| list.is_empty() || list.split(',').any(|w| name.contains(w.trim()));
    let (mkfs, options) = (text("MKFS"), text("OPTIONS"));
    let mut failed = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|k| wanted(&text("FS"), k.name())) {
        let rig = Rig::with(kind, &mkfs.split_whitespace().collect::<Vec<_>>(), &options);
        for case in cases::all(kind).into_iter().filter(|c| wanted(&text("CASE"), &c.name)) {
            if !case.run(&rig, &budget) {
                failed.push(format!("{} {}", kind.name(), case.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}
