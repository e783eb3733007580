//! P8. Two hostile users race the daemon with symlinks and renames, through the mount and behind it. Nothing outside
//! the backing directory is read or changed; a file system without the protection is led out by the same attack.
//! `FSYS_TEST_ATTACK_SECS` sets how long (600 with `FSYS_TEST_FULL=1`).

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::loopfs::{Kind, LoopFs, Served};
use common::mount::Mount;
use common::tools::tool;
use common::{can_mount, env_number, full, kinds, run_text, say, wait_until};
use serde_json::Value;

const SWAPPER: &str = "1001";
const PROBER: &str = "1002";

/// Ends a process that runs for ever.
struct Ended(Child);
impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory that only root enters, with files that only root reads.
fn forbidden(disk: &LoopFs) -> PathBuf {
    let outside = disk.subdir("outside");
    for dir in [outside.clone(), outside.join("sub")] {
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("canary"), "secret").unwrap();
        fs::set_permissions(dir.join("canary"), fs::Permissions::from_mode(0o600)).unwrap();
    }
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o700)).unwrap();
    outside
}

/// Everything that an intrusion changes there.
fn fingerprint(dir: &Path) -> Vec<String> {
    let mut lines = vec![line(dir)];
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            lines.extend(fingerprint(&path));
        } else {
            lines.push(format!("{} {:?}", line(&path), fs::read(&path).map(|d| d.escape_ascii().to_string())));
        }
    }
    lines.sort();
    lines
}

fn line(path: &Path) -> String {
    // What an intruder has just taken away.
    let Ok(m) = fs::symlink_metadata(path) else { return "gone".into() };
    format!("{} {:o} {} {} {}.{}", path.display(), m.mode(), m.nlink(), m.len(), m.ctime(), m.ctime_nsec())
}

/// Where the two work, and where each is welcome.
fn battlefield(backing: &Path, name: &str, outside: &Path) {
    let tree = backing.join(name);
    for dir in ["", "a", "b", "a/d", "a/d/sub"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
        fs::set_permissions(tree.join(dir), fs::Permissions::from_mode(0o777)).unwrap();
    }
    fs::set_permissions(backing, fs::Permissions::from_mode(0o755)).unwrap();
    symlink(outside, tree.join("a/evil")).unwrap();
}

/// One swaps at `by`, the other probes at `tree`.
fn attack(tree: &Path, by: &Path, seconds: u64) -> Value {
    let attacker = || {
        let mut command = Command::new(tool("attacker"));
        command.stdin(Stdio::null());
        command
    };
    let _swapper = Ended(attacker().arg("swap").arg(by).arg(SWAPPER).spawn().unwrap());
    let told = run_text(attacker().arg("probe").arg(tree).args([PROBER, &seconds.to_string()]));
    serde_json::from_str(&told).unwrap()
}

#[test]
fn a_race_of_symlinks_and_renames_leads_nowhere() {
    if !can_mount("a_race_of_symlinks_and_renames_leads_nowhere") {
        return;
    }
    let seconds = env_number("FSYS_TEST_ATTACK_SECS", if full() { 600 } else { 6 });
    let disk = LoopFs::new(kinds(&[Kind::Ext4])[0], 300);
    let outside = forbidden(&disk);
    let before = fingerprint(&outside);
    // Nobody waits for a flush, and the kernel asks for each name anew: more tries in the same time.
    let mut mount = Mount::start(&disk.subdir("data"), "durability=relaxed,cache_ms=0");
    for (name, by) in [("through", mount.path()), ("behind", mount.backing())] {
        battlefield(mount.backing(), name, &outside);
        let told = attack(&mount.path().join(name), &by.join(name), seconds.div_ceil(2));
        let changed = fingerprint(&outside).iter().filter(|l| !before.contains(l)).count();
        say(&format!("{} s, swapped {name} the mount: {told}, {changed} changes outside", seconds.div_ceil(2)));
        assert!(told["inside"].as_u64() > Some(10), "the attack did not run: {told}");
        assert_eq!(told["secrets"], 0, "{name}");
        assert_eq!(fingerprint(&outside), before, "{name}");
    }
    mount.stop();
}

/// Control: what the attack does to a version without the protection.
#[test]
fn the_attack_leads_an_unprotected_one_out() {
    if !can_mount("the_attack_leads_an_unprotected_one_out") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    let outside = forbidden(&disk);
    let before = fingerprint(&outside);
    let backing = disk.subdir("data");
    let naive = Served::start("naive", &[backing.as_os_str()]);
    for (name, by) in [("through", naive.dir()), ("behind", backing.as_path())] {
        battlefield(&backing, name, &outside);
        let mut told = Value::Null;
        // Until it succeeds, which takes a moment on an idle machine and longer on a busy one.
        let caught = wait_until(Duration::from_secs(120), || {
            told = attack(&naive.dir().join(name), &by.join(name), 1);
            told["secrets"].as_u64() > Some(0) || fingerprint(&outside) != before
        });
        let changed = fingerprint(&outside).iter().filter(|l| !before.contains(l)).count();
        say(&format!("without protection, swapped {name} the mount: {told}, {changed} changes outside"));
        assert!(caught, "swapped {name} the mount nobody was led out: the attack is none");
    }
}
