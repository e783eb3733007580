//! The command lines, as far as nothing needs to be mounted.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use fsys_mount::engine::layout::Layout;

fn mount(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fsys-mount")).args(args).output().unwrap()
}

fn fsys(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fsys")).args(args).output().unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn wrong_usage_is_exit_1_and_says_what_to_do() {
    let cases: [(&[&str], &str); 6] = [
        (&["-o", "durabilty=close", "/a", "/b"], "did you mean `durability`?"),
        (&["-o", "method=journal", "/a", "/b"], "write mode `journal`"),
        (&["-o", "threads=0", "/a", "/b"], "1 to 256"),
        (&["--config", "/nonexistent.toml", "/a", "/b"], "cannot read the configuration file"),
        (&["/a"], "<MOUNTPOINT>"),
        (&["--bogus"], "--bogus"),
    ];
    for (args, expect) in cases {
        let output = mount(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", err(&output));
        assert!(err(&output).contains(expect), "{args:?}: {}", err(&output));
    }
    assert_eq!(fsys(&["frobnicate"]).status.code(), Some(1));
    assert_eq!(fsys(&["drain", "--timeout", "18446744073709551615"]).status.code(), Some(1));
}

#[test]
fn a_wrong_configuration_file_is_named_by_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fsys.toml");
    fs::write(&file, "[limits]\nwindow_ms = 3\n").unwrap();
    let output = mount(&["--config", text(&file), "/a", "/b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("fsys.toml:2:1:") && err(&output).contains("`window_us`"), "{}", err(&output));
}

#[test]
fn help_and_version_succeed() {
    for output in [mount(&["--help"]), mount(&["--version"]), fsys(&["--help"]), fsys(&["drain", "--help"])] {
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn background_and_foreground_give_the_same_true_error() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let log = format!("log_file={}", dir.path().join("log").display());
    for flags in [&["-f"][..], &["-o", &log]] {
        let args: Vec<_> = flags.iter().copied().chain([text(&missing), text(dir.path())]).collect();
        let output = mount(&args);
        assert_eq!(output.status.code(), Some(2), "{}", err(&output));
        let expect = if Path::new("/dev/fuse").exists() { "mkdir -p" } else { "/dev/fuse" };
        assert!(err(&output).contains(expect), "{}", err(&output));
    }
}

#[test]
fn an_error_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let (backing, there) = (dir.path().join("a"), dir.path().join("b"));
    fs::create_dir(&backing).unwrap();
    fs::create_dir(&there).unwrap();
    let output = mount(&["-o", "log_file=/nonexistent/log", text(&backing), text(&there)]);
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    assert_eq!(err(&output).matches("cannot write the log /nonexistent/log").count(), 1, "{}", err(&output));
}

#[test]
fn a_second_daemon_on_one_backing_directory_is_told_who_is_there() {
    if !Path::new("/dev/fuse").exists() {
        return;
    }
    let (backing, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let _first = Layout::open(backing.path()).unwrap();
    let log = format!("log_file={}", there.path().join("log").display());
    let output = mount(&["-o", &log, text(backing.path()), text(there.path())]);
    assert_eq!(output.status.code(), Some(16), "{}", err(&output));
    assert!(err(&output).contains(&format!("pid {}", std::process::id())), "{}", err(&output));
    assert_eq!(fsys(&["recover", text(backing.path())]).status.code(), Some(16));
    let look = fsys(&["recover", "--dry-run", text(backing.path())]);
    assert!(look.status.success() && out(&look).contains("a daemon works here"), "{}", out(&look));
}

#[test]
fn recover_looks_then_removes_and_makes_nothing() {
    let backing = tempfile::tempdir().unwrap();
    let none = fsys(&["recover", text(backing.path())]);
    assert!(none.status.success() && out(&none).contains("nothing to recover"));
    assert_eq!(fs::read_dir(backing.path()).unwrap().count(), 0, "recover must not create .fsys");

    drop(Layout::open(backing.path()).unwrap());
    let stage = backing.path().join(".fsys/staging/0123456789abcdef.stage");
    fs::write(&stage, "half").unwrap();
    let look = fsys(&["recover", "--dry-run", "--json", text(backing.path())]);
    let json: serde_json::Value = serde_json::from_slice(&look.stdout).unwrap();
    assert_eq!((json["removed"][0]["size"].as_u64(), json["dry_run"].as_bool()), (Some(4), Some(true)));
    assert!(stage.exists());
    let did = fsys(&["recover", text(backing.path())]);
    assert!(did.status.success() && out(&did).starts_with("removed 1 "), "{}", out(&did));
    assert!(!stage.exists());
}

#[test]
fn a_path_outside_is_refused_and_a_closed_pipe_is_no_failure() {
    let output = fsys(&["get", "/proc/version"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("not in an fsys mount"), "{}", err(&output));
    let backing = tempfile::tempdir().unwrap();
    let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(reader);
    let args = ["recover", text(backing.path())];
    let status = Command::new(env!("CARGO_BIN_EXE_fsys"))
        .args(args)
        .stdout(std::os::fd::OwnedFd::from(writer))
        .status()
        .unwrap();
    assert!(status.success());
}
