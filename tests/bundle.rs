//! `fsys bundle`: what is in the archive, and that no name and no content of a file is, unless asked for.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::mount::fsys;
use common::{Kind, LoopFs, Mount, can_mount, run, run_text};

const SECRET: &str = "salary-of-the-boss";

/// The whole text of a bundle.
fn bundle(mount: &Mount, dir: &Path, args: &[&str]) -> String {
    let file = dir.join("bundle.tar.gz");
    let _ = std::fs::remove_file(&file);
    run(fsys().arg("bundle").args(args).arg("--output").arg(&file).arg(mount.path()));
    let list = run_text(Command::new("tar").arg("-tzf").arg(&file));
    for name in ["versions.txt", "kernel.txt", "mounts.txt", "doctor.txt", "mount-0/status.json", "mount-0/log.txt"] {
        assert!(list.contains(name), "{name} is not in the bundle: {list}");
    }
    run_text(Command::new("tar").arg("-xzOf").arg(&file))
}

#[test]
fn no_name_and_no_content_leaves_the_machine() {
    if !can_mount("bundle") {
        return;
    }
    let fs = LoopFs::new(Kind::Ext4, 300);
    let config = fs.path().join("fsys.toml");
    std::fs::write(&config, "durability = \"close\"\n").unwrap();
    let mount = Mount::start(&fs.subdir("data"), &format!("config={}", config.display()));
    // A save that fails puts the name into the status and into the log: the disk is full at its commit.
    let path = mount.path().join(SECRET);
    std::fs::write(&path, "content-of-the-boss").unwrap();
    fs.fill();
    let failed = std::fs::write(&path, vec![b'y'; 4 << 20]);
    assert!(failed.is_err(), "the disk is full");

    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let text = bundle(&mount, dir.path(), &[]);
    assert!(text.contains(&mount.backing().display().to_string()) && text.contains("durability = \"close\""), "{text}");
    assert!(!text.contains(SECRET) && !text.contains("content-of-the-boss"), "{text}");
    let with = bundle(&mount, dir.path(), &["--names"]);
    assert!(with.contains(SECRET), "the control: with --names it is there\n{with}");
    assert!(!with.contains("content-of-the-boss"));
}
