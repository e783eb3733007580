//! The mistakes that people are most likely to make, each made with the real programs: the exit code, the first line,
//! and that cause, effect and action follow. `contrib/doc/TROUBLESHOOTING.md` has each of them.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::mount::{fsys, fsys_mount};
use common::{Kind, LoopFs, Mount, can_mount, fresh_dir, run, run_logged};

/// What a command said on standard error, and its exit code. Its output goes to a file: a daemon keeps a pipe open.
fn said(command: &mut Command) -> (Option<i32>, String) {
    let log = fresh_dir("said").with_extension("log");
    let status = run_logged(command, &log, Duration::from_secs(60)).unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    std::fs::remove_dir(log.with_extension("")).unwrap();
    (status.expect("it ends").code(), text)
}

/// The mistake must end with `code`, and say `what` in the form of an error.
fn mistake(command: &mut Command, code: i32, what: &str) {
    let (exit, text) = said(command);
    assert_eq!(exit, Some(code), "{command:?}\n{text}");
    assert!(text.contains(what), "{command:?} does not say {what:?}\n{text}");
    for part in ["cause:", "effect:", "action:"] {
        assert!(text.contains(part), "{command:?} has no {part}\n{text}");
    }
}

/// A place to mount, and its log away from the places of other tests.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        ["data", "mnt", "mnt2"].iter().for_each(|d| std::fs::create_dir(dir.path().join(d)).unwrap());
        std::fs::write(dir.path().join("file"), "").unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        World { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `fsys-mount -o OPTIONS BACKING MOUNTPOINT`.
    fn mount(&self, options: &str, backing: &str, mountpoint: &str) -> Command {
        let mut command = fsys_mount();
        let log =
            format!("log_file={}{}{options}", self.path("log").display(), if options.is_empty() { "" } else { "," });
        command.args(["-o", &log]).arg(self.path(backing)).arg(self.path(mountpoint));
        command
    }
}

#[test]
fn wrong_directories() {
    if !can_mount("mistakes") {
        return;
    }
    let w = World::new();
    mistake(&mut w.mount("", "missing", "mnt"), 2, "cannot use the backing directory");
    mistake(&mut w.mount("", "file", "mnt"), 2, "cannot use the backing directory");
    mistake(&mut w.mount("", "data", "missing"), 2, "cannot use the mount point");
    mistake(&mut w.mount("", "data", "file"), 2, "cannot use the mount point");
    mistake(&mut w.mount("", "data", "data"), 1, "both are the same directory");
    std::fs::create_dir(w.path("data/inner")).unwrap();
    mistake(&mut w.mount("", "data", "data/inner"), 1, "the daemon would wait for itself");
    mistake(&mut w.mount("", "data/inner", "data"), 1, "the mount would hide it");
    std::fs::write(w.path("data/.fsys"), "mine").unwrap();
    mistake(&mut w.mount("", "data", "mnt"), 2, "it is not a directory");
    std::fs::remove_file(w.path("data/.fsys")).unwrap();
    std::fs::create_dir(w.path("data/.fsys")).unwrap();
    std::fs::set_permissions(w.path("data/.fsys"), PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::write(w.path("data/.fsys/format"), "fsys-mount 99\n").unwrap();
    mistake(&mut w.mount("", "data", "mnt"), 2, "its format is `fsys-mount 99");
    mistake(fsys().args(["recover"]).arg(w.path("file")), 2, "cannot open the backing directory");
}

#[test]
fn wrong_options_and_files() {
    let w = World::new();
    mistake(&mut w.mount("durabilty=close", "data", "mnt"), 1, "did you mean `durability`?");
    mistake(&mut w.mount("durability=sometimes", "data", "mnt"), 1, "use one of: always, close, fsync, relaxed");
    mistake(&mut w.mount("threads", "data", "mnt"), 1, "needs a value");
    mistake(&mut w.mount("rule=a[:mode=auto", "data", "mnt"), 1, "unclosed character class");
    let config = w.path("x.toml");
    let with = format!("config={}", config.display());
    mistake(&mut w.mount(&with, "data", "mnt"), 1, "cannot read the configuration file");
    std::fs::write(&config, "[limits]\nwindow_ms = 3\n").unwrap();
    mistake(&mut w.mount(&with, "data", "mnt"), 1, "x.toml:2:1: the configuration is not valid");
    std::fs::write(&config, "[[rule]]\nmatch = \"a[\"\n").unwrap();
    mistake(&mut w.mount(&with, "data", "mnt"), 1, "x.toml:2:9: the configuration is not valid");
    let (exit, text) = said(fsys_mount().arg(w.path("data")));
    assert!(exit == Some(1) && text.contains("<MOUNTPOINT>") && text.contains("Usage:"), "{text}");
    if can_mount("mistakes") {
        mistake(
            fsys_mount().args(["-o", "log_file=/nonexistent/log"]).arg(w.path("data")).arg(w.path("mnt")),
            2,
            "cannot write the log",
        );
    }
}

#[test]
fn twice_and_in_use_and_dead() {
    if !can_mount("mistakes") {
        return;
    }
    let fs = LoopFs::new(Kind::Ext4, 300);
    let data = fs.subdir("data");
    let mut mount = Mount::start(&data, "");
    let w = World::new();
    let log = format!("log_file={}", w.path("log").display());
    let again = |at: &Path| {
        let mut command = fsys_mount();
        command.args(["-o", &log]).arg(&data).arg(at);
        command
    };
    mistake(&mut again(mount.path()), 16, "an fsys mount is there already and answers");
    mistake(&mut again(&w.path("mnt2")), 16, "another fsys-mount works on it (pid");
    mistake(fsys().args(["recover"]).arg(&data), 16, "another fsys-mount works on it");
    let held = std::fs::File::create(mount.path().join("held")).unwrap();
    mistake(fsys().arg("umount").arg(mount.path()), 16, "programs use files or directories in it");
    drop(held);
    std::fs::create_dir(mount.path().join("sub")).unwrap();
    mistake(fsys().arg("umount").arg(mount.path().join("sub")), 1, "lies inside it");
    mistake(fsys().args(["get"]).arg(mount.path().join("none")), 2, "cannot look at");
    mistake(fsys().args(["get", "/proc/version"]), 2, "is not in an fsys mount");

    mount.kill9();
    mistake(fsys().arg("status").arg(mount.path()), 2, "does not answer");
    // The same command again is the remedy that it names.
    mount.restart();
    assert!(mount.log().contains("detached the dead mount"), "{}", mount.log());
}

#[test]
fn no_mount_and_several() {
    if !can_mount("mistakes") {
        return;
    }
    // In a name space of its own: other tests have mounts, too.
    let inside = |script: &str| {
        let bin = fsys().get_program().to_owned();
        let clear = "for m in $(findmnt -rno TARGET -t fuse.fsys); do umount -l \"$m\"; done";
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &format!("{clear}; {script}")]).env("FSYS", bin);
        command
    };
    mistake(&mut inside("exec \"$FSYS\" status"), 2, "there is no fsys mount");
    let fs = LoopFs::new(Kind::Ext4, 300);
    let (_a, _b) = (Mount::start(&fs.subdir("a"), ""), Mount::start(&fs.subdir("b"), ""));
    mistake(fsys().arg("status"), 1, "there are several fsys mounts");
}

#[test]
fn no_device_and_no_permission() {
    if !can_mount("mistakes") {
        return;
    }
    let w = World::new();
    let command = w.mount("", "data", "mnt");
    let mut words: Vec<String> = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    // With a /dev of its own: without the device, with one that only root may open, with one for everybody.
    let in_dev = |fuse: &str| {
        let make = format!("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && {fuse} && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &make, "sh"]);
        command
    };
    mistake(in_dev("true").args(&words), 2, "/dev/fuse cannot be opened");

    // An ordinary user: the device, a directory that is not theirs, a machine without fusermount3.
    if !reachable(&words[0]) {
        common::say("no permission: the binaries lie where an ordinary user may not go; not tried");
        return;
    }
    let log = format!("log_file={}", w.path("mnt2/log").display());
    let user = |mode: u32, mountpoint: &str, path: &str| {
        let mut command = in_dev(&format!("mknod -m {mode} /dev/fuse c 10 229"));
        command.args(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", path]);
        command.arg(&words[0]).args(["-o", &log]).arg(w.path("data")).arg(w.path(mountpoint));
        command
    };
    let normal = "PATH=/usr/bin:/bin:/usr/sbin:/sbin";
    std::os::unix::fs::chown(w.path("mnt2"), Some(65534), Some(65534)).unwrap();
    mistake(&mut user(600, "mnt", normal), 2, "this user may not open it");
    std::fs::set_permissions(w.path("data"), PermissionsExt::from_mode(0o700)).unwrap();
    mistake(&mut user(666, "mnt", normal), 2, "Permission denied");
    std::os::unix::fs::chown(w.path("data"), Some(65534), Some(65534)).unwrap();
    mistake(&mut user(666, "mnt", normal), 32, "cannot mount");
    mistake(&mut user(666, "mnt", "PATH=/nonexistent"), 32, "cannot mount");
}

fn reachable(program: &str) -> bool {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program, "--version"]);
    command.output().is_ok_and(|o: Output| o.status.success())
}

#[test]
fn full_and_read_only() {
    if !can_mount("mistakes") {
        return;
    }
    let fs = LoopFs::new(Kind::Ext4, 300);
    let data = fs.subdir("data");
    let mount = Mount::start(&data, "");
    std::fs::write(mount.path().join("kept"), "old").unwrap();
    fs.fill();
    let e = std::fs::write(mount.path().join("kept"), vec![b'x'; 8 << 20]).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()), "the program is told");
    assert_eq!(std::fs::read(data.join("kept")).unwrap(), b"old", "the version before stands");
    drop(mount);
    std::fs::remove_file(fs.path().join("filler")).unwrap();

    let never = fs.subdir("never-mounted");
    run(Command::new("mount").args(["-o", "remount,ro"]).arg(fs.path()));
    let w = World::new();
    let log = format!("log_file={}", w.path("log").display());
    let mut command = fsys_mount();
    mistake(command.args(["-o", &log]).arg(&never).arg(w.path("mnt")), 2, "Read-only file system");
    run(Command::new("mount").args(["-o", "remount,rw"]).arg(fs.path()));
}
