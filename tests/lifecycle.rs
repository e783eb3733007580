//! The life of a mount, from the command line to the last answer. Needs /dev/fuse and the right to mount.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use fsys_mount::engine::layout::Layout;
use fsys_mount::mount::process::{Process, wait_gone};
use fsys_mount::mount::{table, unmount};
use rustix::process::{Pid, Signal, kill_process};

const LONG: Duration = Duration::from_secs(60);

/// A backing directory and a mount point; whatever is left is taken away at the end.
struct Place {
    _dir: tempfile::TempDir,
    backing: PathBuf,
    mnt: PathBuf,
}

impl Place {
    /// `None` where nothing can be mounted; the test then says so and passes.
    fn new() -> Option<Self> {
        if fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_err() {
            eprintln!("SKIPPED: /dev/fuse cannot be opened");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (backing, mnt) = (root.join("data"), root.join("mnt"));
        fs::create_dir(&backing).unwrap();
        fs::create_dir(&mnt).unwrap();
        Some(Self { _dir: dir, backing, mnt })
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsys-mount"));
        command.args(flags).arg("-o").arg(self.log()).arg(&self.backing).arg(&self.mnt);
        command
    }

    /// The log goes where the rest goes at the end of the test; the transport is that of the run.
    fn log(&self) -> String {
        let transport = std::env::var("FSYS_TEST_TRANSPORT").unwrap_or_else(|_| "auto".into());
        format!("log_file={},transport={transport}", self.mnt.with_extension("log").display())
    }

    fn mount(&self) -> Output {
        self.command(&[]).output().unwrap()
    }

    fn mount_ok(&self) {
        let output = self.mount();
        assert!(output.status.success(), "{}", err(&output));
        assert!(self.is_mounted());
    }

    fn umount(&self, flags: &[&str]) -> Output {
        fsys(&[&["umount"], flags, &[self.mnt.to_str().unwrap()]].concat())
    }

    fn is_mounted(&self) -> bool {
        table::at(&table::read().unwrap(), &self.mnt).is_some()
    }

    fn daemon(&self) -> u32 {
        Layout::inspect(&self.backing).unwrap().unwrap().holder().unwrap().pid
    }

    fn signal(&self, signal: Signal) -> Process {
        let pid = self.daemon();
        let process = Process::open(pid).unwrap().unwrap();
        kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
        process
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while self.is_mounted() {
            let holder = Layout::inspect(&self.backing).ok().flatten().and_then(|l| l.holder().cloned());
            unmount::unmount(&self.mnt, true).unwrap();
            if let Some(holder) = holder {
                wait_gone(holder.pid, LONG).unwrap();
            }
        }
    }
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

/// Contract 6: exit 0 means mounted. P8: one mount per backing directory at a time.
#[test]
fn mount_ask_and_unmount() {
    let Some(p) = Place::new() else { return };
    p.mount_ok();
    let status = fsys(&["status", text(&p.mnt)]);
    assert!(status.status.success() && out(&status).starts_with("healthy: "), "{}{}", out(&status), err(&status));
    let json = fsys(&["status", "--json", text(&p.mnt)]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((json["pid"].as_u64(), json["backing"].as_str()), (Some(p.daemon().into()), p.backing.to_str()));
    let get = fsys(&["get", text(&p.mnt)]);
    assert!(get.status.success() && out(&get).contains("durability"), "{}", err(&get));
    assert!(fsys(&["drain", text(&p.mnt)]).status.success());

    let again = p.mount();
    assert!(again.status.code() == Some(16) && err(&again).contains("there already"), "{}", err(&again));
    let elsewhere = tempfile::tempdir().unwrap();
    let second = {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsys-mount"));
        command.args(["-o", &p.log()]).arg(&p.backing).arg(elsewhere.path()).output().unwrap()
    };
    assert_eq!(second.status.code(), Some(16), "{}", err(&second));
    assert!(err(&second).contains(&format!("pid {}", p.daemon())), "{}", err(&second));

    let daemon = p.daemon();
    assert!(p.umount(&[]).status.success());
    assert!(!p.is_mounted());
    // The daemon was waited for: nothing holds the lock any more.
    drop(Layout::open(&p.backing).unwrap());
    wait_gone(daemon, Duration::ZERO).unwrap();
    assert_eq!(p.umount(&[]).status.code(), Some(2));
}

/// What is in use stays mounted unless it is asked for with --lazy.
#[test]
fn a_mount_in_use_is_not_taken_away_but_by_lazy() {
    let Some(p) = Place::new() else { return };
    p.mount_ok();
    let open = fs::File::open(&p.mnt).unwrap();
    let busy = p.umount(&[]);
    assert_eq!(busy.status.code(), Some(16), "{}", err(&busy));
    assert!(p.is_mounted() && fsys(&["status", text(&p.mnt)]).status.success());
    std::thread::scope(|s| {
        let lazy = s.spawn(|| p.umount(&["--lazy"]));
        while p.is_mounted() {
            std::thread::yield_now();
        }
        drop(open);
        let lazy = lazy.join().unwrap();
        assert!(lazy.status.success(), "{}", err(&lazy));
    });
}

/// P7: a mount after a kill puts things right before it says ready, and says what it did.
#[test]
fn a_killed_daemon_is_recovered_by_mounting_again() {
    let Some(p) = Place::new() else { return };
    p.mount_ok();
    p.signal(Signal::KILL).wait(LONG).unwrap();
    // Not stat: the kernel may still know the attributes.
    let code = fs::read_dir(&p.mnt).unwrap_err().raw_os_error();
    assert!(matches!(code, Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED)), "{code:?}");
    let status = fsys(&["status", text(&p.mnt)]);
    assert!(status.status.code() == Some(2) && err(&status).contains("mount again"), "{}", err(&status));
    let stage = p.backing.join(".fsys/staging/00000000000000ff.stage");
    fs::write(&stage, "half").unwrap();

    let again = p.mount();
    assert!(again.status.success(), "{}", err(&again));
    assert!(err(&again).contains("detached the dead mount") && err(&again).contains("removed 1 "), "{}", err(&again));
    assert!(!stage.exists() && fs::metadata(&p.mnt).is_ok());

    p.signal(Signal::KILL).wait(LONG).unwrap();
    let gone = p.umount(&[]);
    assert!(gone.status.success() && out(&gone).contains("daemon was gone"), "{}", err(&gone));
    assert!(!p.is_mounted());
}

#[test]
fn sigterm_and_sigint_end_a_foreground_mount_with_success() {
    for signal in [Signal::TERM, Signal::INT] {
        let Some(p) = Place::new() else { return };
        let mut child = p.command(&["-f", "-o", "log=error"]).spawn().unwrap();
        while !fsys(&["status", text(&p.mnt)]).status.success() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was mounted");
        }
        assert_eq!(p.daemon(), child.id());
        drop(p.signal(Signal::HUP));
        assert!(fsys(&["status", text(&p.mnt)]).status.success(), "SIGHUP must not end it");
        drop(p.signal(signal));
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(!p.is_mounted());
    }
}

#[test]
fn sigterm_detaches_what_is_in_use() {
    let Some(p) = Place::new() else { return };
    p.mount_ok();
    let open = fs::File::open(&p.mnt).unwrap();
    let daemon = p.signal(Signal::TERM);
    while p.is_mounted() {
        std::thread::yield_now();
    }
    drop(open);
    daemon.wait(LONG).unwrap();
}

/// umount(8) is as good as `fsys umount`, and may be followed by a mount at once.
#[test]
fn umount_and_mount_again_at_once() {
    let Some(p) = Place::new() else { return };
    for _ in 0..20 {
        p.mount_ok();
        unmount::unmount(&p.mnt, false).unwrap();
    }
    p.mount_ok();
    assert!(p.umount(&[]).status.success());
}

#[test]
fn the_form_of_mount_8_mounts() {
    let Some(p) = Place::new() else { return };
    let helper = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsys-mount"));
        command.arg0("/sbin/mount.fsys").arg(&p.backing).arg(&p.mnt).args(["-o", &p.log()]).args(args).output().unwrap()
    };
    let fake = helper(&["-f", "-o", "rw"]);
    assert!(fake.status.success() && !p.is_mounted(), "{}", err(&fake));
    let real = helper(&["-v", "-o", "rw,nofail,_netdev,x-systemd.automount"]);
    assert!(real.status.success() && out(&real).contains("is mounted on"), "{}", err(&real));
    assert!(p.is_mounted() && p.umount(&[]).status.success());
    assert_eq!(helper(&["-o", "gizmo"]).status.code(), Some(1));
}

/// `auto` takes io_uring where the kernel allows it and says why where not; by name it is that or nothing.
#[test]
fn the_transport_is_what_was_asked_for() {
    let Some(p) = Place::new() else { return };
    let allowed = fs::read_to_string("/sys/module/fuse/parameters/enable_uring").is_ok_and(|s| s.trim() == "Y");
    let transport = |name: &str| {
        // Behind the run's own, so that it wins.
        let mounted = p.command(&[]).args(["-o", &format!("transport={name}")]).output().unwrap();
        if !mounted.status.success() {
            return Err((mounted.status.code(), err(&mounted)));
        }
        let json = fsys(&["status", "--json", text(&p.mnt)]);
        let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert!(p.umount(&[]).status.success());
        Ok(json["transport"].as_str().unwrap().to_owned())
    };
    let fuser = transport("fuser").unwrap();
    assert!(fuser.starts_with("fuser, ") && !fuser.contains("io-uring"), "{fuser}");
    let auto = transport("auto").unwrap();
    if allowed {
        assert!(auto.starts_with("io-uring, ") && transport("io-uring").unwrap() == auto, "{auto}");
        return;
    }
    assert!(auto.starts_with("fuser, ") && auto.contains("; no io-uring: "), "{auto}");
    let (code, said) = transport("io-uring").unwrap_err();
    assert!(code == Some(32) && said.contains("transport=auto"), "{code:?} {said}");
    assert!(!p.is_mounted(), "refused, so nothing is left");
}
