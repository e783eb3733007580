//! P5. `O_DIRECT` and the page cache on one file, at random, in every write mode and durability; the whole of it is
//! run by scripts/posix.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::loopfs::{Kind, LoopFs};
use common::mount::Mount;
use common::tools::tool;
use common::{can_mount, env_number};

fn exercise(file: &Path, ops: u64, seed: u64, lie_after: Option<u64>) -> Output {
    let mut command = Command::new(tool("direct"));
    command.arg("--file").arg(file).args(["--ops", &ops.to_string(), "--seed", &seed.to_string()]);
    if let Some(n) = lie_after {
        command.args(["--lie-after", &n.to_string()]);
    }
    command.output().unwrap()
}

#[test]
fn direct_and_buffered_content_is_one() {
    if !can_mount("direct_and_buffered_content_is_one") {
        return;
    }
    let ops = env_number("FSYS_TEST_DIRECT_OPS", 400);
    for (seed, options) in (1..).zip([
        "mode=auto,durability=close",
        "mode=replace,durability=fsync",
        "mode=in-place,durability=always",
        "mode=replace,durability=relaxed,restage_max_bytes=0",
        "mode=replace,method=direct",
    ]) {
        let disk = LoopFs::new(Kind::Ext4, 300);
        let mut mount = Mount::start(&disk.subdir("data"), options);
        let out = exercise(&mount.path().join("f"), ops, seed, None);
        assert!(out.status.success(), "{options}: {out:?}");
        mount.stop();
    }
}

/// Control: a byte that differs is found.
#[test]
fn a_difference_is_found() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    assert!(exercise(&dir.path().join("f"), 400, 1, None).status.success());
    let out = exercise(&dir.path().join("f"), 400, 1, Some(200));
    let told: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(out.status.code() == Some(1) && told["operation"].as_u64() >= Some(200), "{out:?}");
}
