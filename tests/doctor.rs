//! `fsys doctor` on real file systems: what it must find, and a sound one where it must find nothing. And the same
//! words in the log of a mount.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::mount::{fsys, fsys_mount};
use common::{Kind, LoopFs, Mount, can_mount, fresh_dir, run, run_logged};
use serde_json::Value;

fn findings(args: &[&Path]) -> Vec<Value> {
    let output = fsys().args(["doctor", "--json"]).args(args).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// Level and cause of everything that is not in order about `dir`; the host's own findings left out.
fn concerns(dir: &Path) -> Vec<(String, String, String)> {
    let host: Vec<_> = findings(&[]);
    let word = |f: &Value, key: &str| f[key].as_str().unwrap().to_owned();
    let all = findings(&[dir]).into_iter().filter(|f| f["level"] != "ok" && !host.contains(f));
    all.map(|f| (word(&f, "level"), word(&f, "check"), word(&f, "cause"))).collect()
}

fn has(found: &[(String, String, String)], level: &str, check: &str, cause: &str) -> bool {
    found.iter().any(|f| f.0 == level && f.1 == check && f.2.contains(cause))
}

#[test]
fn sound_file_systems_give_no_concern() {
    if !can_mount("doctor") {
        return;
    }
    for kind in Kind::ALL {
        let fs = LoopFs::new(kind, 1024);
        assert_eq!(concerns(&fs.subdir("data")), [], "{}", kind.name());
    }
}

#[test]
fn weak_options_are_named() {
    if !can_mount("doctor") {
        return;
    }
    let cases: [(&[&str], &[&str], &str, &str, &str); 4] = [
        (&["-O", "fast_commit"], &[], "warning", "fast_commit", "fast_commit"),
        (&[], &["data=writeback"], "warning", "mount options", "not mounted data=ordered"),
        (&[], &["nobarrier"], "failure", "write cache", "without barriers"),
        (&["-O", "^has_journal"], &[], "warning", "mount options", "without an internal journal"),
    ];
    for (mkfs, options, level, check, cause) in cases {
        let fs = LoopFs::with_mkfs(Kind::Ext4, 300, mkfs, options);
        let found = concerns(fs.path());
        assert!(has(&found, level, check, cause), "{mkfs:?} {options:?}: {found:?}");
    }
}

#[test]
fn space_nested_mounts_and_the_dead_are_named() {
    if !can_mount("doctor") {
        return;
    }
    let fs = LoopFs::new(Kind::Ext4, 300);
    let data = fs.subdir("data");
    let below = data.join("below");
    std::fs::create_dir(&below).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&below));
    let found = concerns(&data);
    run(Command::new("umount").arg(&below));
    assert!(has(&found, "warning", "nested mounts", "below"), "{found:?}");

    let free = rustix::fs::statvfs(fs.path()).unwrap();
    let filler = std::fs::File::create(fs.path().join("filler")).unwrap();
    let len = (free.f_bavail * free.f_frsize).saturating_sub(1 << 20);
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, len).unwrap();
    let found = concerns(&data);
    assert!(has(&found, "warning", "space", "MiB free"), "{found:?}");
    std::fs::remove_file(fs.path().join("filler")).unwrap();

    let mut mount = Mount::start(&data, "");
    let alive = findings(&[&data, mount.path()]);
    assert!(alive.iter().all(|f| f["level"] != "failure"), "{alive:#?}");
    assert!(alive.iter().any(|f| f["cause"].as_str().unwrap().contains("answers")), "{alive:#?}");
    let inside = concerns(mount.path());
    assert!(has(&inside, "failure", "nested mounts", "lies in an fsys mount"), "{inside:?}");
    mount.kill9();
    let dead = findings(&[&data, mount.path()]);
    let dead = dead.iter().find(|f| f["check"] == "mount point").unwrap();
    assert!(dead["level"] == "warning" && dead["cause"].as_str().unwrap().contains("dead"), "{dead}");
}

#[test]
fn a_failure_is_exit_2_and_a_mount_says_the_same() {
    assert_eq!(fsys().args(["doctor", "/nonexistent"]).output().unwrap().status.code(), Some(2));
    if !can_mount("doctor") {
        return;
    }
    let fs = LoopFs::with_options(Kind::Ext4, 300, &["data=writeback"]);
    assert_eq!(fsys().arg("doctor").arg(fs.path()).output().unwrap().status.code(), Some(0), "a warning is no failure");
    let data = fs.subdir("data");
    let at = fresh_dir("doctor");
    let log = at.with_extension("log");
    let limit = std::time::Duration::from_secs(60);
    let status = run_logged(fsys_mount().args([&data, &at]), &log, limit).unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    run(fsys().arg("umount").arg(&at));
    std::fs::remove_dir(&at).unwrap();
    std::fs::remove_file(&log).unwrap();
    assert!(status.is_some_and(|s| s.success()), "{text}");
    assert!(text.contains("warning: mount options: ext4, not mounted data=ordered"), "{text}");
    assert!(text.contains("action:"), "{text}");
}
