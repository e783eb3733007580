//! Logging to the journal of systemd: a real systemd-journald, in name spaces of its own, and what is said where there
//! is none. Needs root and /dev/fuse.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;

use common::mount::{fsys, fsys_mount};
use common::{Kind, LoopFs, can_mount, can_run, explain, run_text};
use serde_json::Value;

/// Starts a journal, and in it a mount on which one file is saved. $1: fsys-mount, $2: fsys, $3: options, $4: backing
/// directory, $5: mount point, $6: the file.
const SCRIPT: &str = r#"
set -eu
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/log/journal /run/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nAudit=no\nReadKMsg=no\n' > /run/systemd/journald.conf.d/test.conf
/lib/systemd/systemd-journald &
until test -S /run/systemd/journal/socket; do sleep 0.05; done
"$1" -o "$3" "$4" "$5" >&2
echo saved > "$5/$6"
"$2" umount "$5" >&2
journalctl --sync
SYSTEMD_COLORS=0 exec journalctl -o json --no-pager -q
"#;

/// What the journal has of a mount with these options.
fn records(options: &str, file: &str) -> Vec<Value> {
    let disk = LoopFs::slow(Kind::Ext4, 300, 20_000);
    let mnt = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "-p", "-f", "--kill-child", "--propagation", "private", "bash", "-c", SCRIPT, "journald"]);
    command.args([fsys_mount().get_program(), fsys().get_program()]).arg(options).arg(disk.subdir("data"));
    let text = run_text(command.arg(mnt.path()).arg(file));
    let record = |l: &str| serde_json::from_str::<Value>(l).unwrap_or_else(|e| panic!("{e}: {l}"));
    let all: Vec<_> = text.lines().map(record).collect();
    // Without one of the journal's own nothing would prove that it ran.
    assert!(all.iter().any(|r| r["SYSLOG_IDENTIFIER"] == "systemd-journald"), "{text}");
    all.into_iter().filter(|r| r["SYSLOG_IDENTIFIER"] == "fsys-mount").collect()
}

/// A field; one that a terminal must not be shown is a list of its bytes.
fn bytes(field: &Value) -> Vec<u8> {
    match field {
        Value::String(text) => text.clone().into_bytes(),
        Value::Array(list) => list.iter().map(|n| n.as_u64().unwrap() as u8).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn a_real_journal_gets_records_with_fields() {
    let test = "the journal of systemd";
    if !can_mount(test) || !can_run(test, "journalctl") {
        return;
    }
    let log = tempfile::NamedTempFile::new().unwrap();
    let text = format!("log_format=text,slow_commit_ms=5,log_file={}", log.path().display());
    let name = "two\nlines=\u{e9}\u{1b}[31m";
    assert_eq!(records(&text, name), Vec::<Value>::new(), "another format");
    let said = fs::read_to_string(log.path()).unwrap();
    let line = said.lines().find(|l| l.contains("slow commit")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains(" path=two\\nlines=\u{e9}\\u{1b}[31m step="), "a name forges no line: {said}");

    let all = records("log_format=journald,slow_commit_ms=5", name);
    let slow = all.iter().find(|r| bytes(&r["F_PATH"]) == name.as_bytes()).unwrap_or_else(|| panic!("{all:#?}"));
    let field = |key: &str| slow[key].as_str().unwrap_or_else(|| panic!("{key}: {slow:#}"));
    assert!(field("MESSAGE").starts_with("slow commit"), "{slow:#}");
    assert_eq!((field("PRIORITY"), field("_COMM")), ("4", "fsys-mount"), "a warning");
    assert!(field("F_DEVICE_MS").parse::<u64>().unwrap() >= 20, "{slow:#}");
    assert!(["parent sync", "data flush"].contains(&field("F_STEP")), "{slow:#}");
    assert!(all.iter().any(|r| r["PRIORITY"] == "6" || r["PRIORITY"] == "5"), "{all:#?}");
}

#[test]
fn without_a_journal_the_mount_says_so() {
    if !can_mount("no journal") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [data, mnt] = ["data", "mnt"].map(|n| dir.path().join(n));
    [&data, &mnt].into_iter().for_each(|d| fs::create_dir(d).unwrap());
    // A /run without one, whatever this machine has.
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", "mount -t tmpfs tmpfs /run && exec \"$@\"", "run"]);
    command.arg(fsys_mount().get_program()).args(["-f", "-o", "log_format=journald"]).args([&data, &mnt]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{}", explain(&command, &output));
    assert!(said.contains("journal of systemd") && said.contains("log_format=text"), "{said}");
}
