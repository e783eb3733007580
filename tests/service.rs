//! The daemon as a service: a manager that speaks the notify protocol of systemd (sd_notify(3)), and mount(8).
//! Needs root and /dev/fuse.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::mount::{fsys, fsys_mount};
use common::{Kind, LoopFs, can_mount, is_mounted, run, wait_until};
use rustix::process::{Pid, Signal, kill_process};

const LONG: Duration = Duration::from_secs(300);

/// A service manager with one service.
struct Manager {
    /// Socket, mount point, log.
    dir: tempfile::TempDir,
    backing: PathBuf,
    socket: UnixDatagram,
    options: String,
    child: Option<Child>,
}

impl Manager {
    fn new(backing: &Path, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self { dir, backing: backing.to_owned(), socket, options: options.to_owned(), child: None }
    }

    fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Starts the service and waits until it is ready.
    fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = fsys_mount();
        command.args(["-f", "-o", &self.options]).arg(&self.backing).arg(self.mnt());
        command.env("NOTIFY_SOCKET", self.dir.path().join("notify")).env("WATCHDOG_USEC", "300000");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap();
        let pid = child.id();
        self.child = Some(child);
        let ready = self.until("READY=1");
        assert!(ready.contains(&format!("MAINPID={pid}")) && ready.contains("STATUS=healthy"), "{ready}");
        assert!(is_mounted(&self.mnt()), "ready, but not mounted");
    }

    /// The next message that has this word.
    fn until(&self, word: &str) -> String {
        self.next(|m| m.contains(word))
    }

    fn next(&self, wanted: impl Fn(&str) -> bool) -> String {
        let mut buffer = [0; 8192];
        let end = Instant::now() + LONG;
        loop {
            assert!(Instant::now() < end, "no such message\n{}", self.log());
            let n = self.socket.recv(&mut buffer).unwrap_or_else(|e| panic!("no such message: {e}\n{}", self.log()));
            let message = String::from_utf8_lossy(&buffer[..n]).into_owned();
            if wanted(&message) {
                return message;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if is_mounted(&self.mnt()) {
            let _ = Command::new("umount").arg("-l").arg(self.mnt()).status();
        }
    }
}

fn content(i: usize) -> String {
    format!("{i} {}\n", "x".repeat(i % 1000))
}

/// Every file that was acknowledged is whole in the backing directory.
fn assert_whole(backing: &Path, files: usize) {
    for i in 0..files {
        let text = fs::read_to_string(backing.join(format!("f{i}"))).unwrap_or_else(|e| panic!("f{i}: {e}"));
        assert_eq!(text, content(i), "f{i}");
    }
}

/// Start, ready, status, watchdog; a stop with thousands of commits pending; restart; a kill; restart.
#[test]
fn the_life_of_a_service_loses_nothing_that_was_acknowledged() {
    if !can_mount("service") {
        return;
    }
    let files = if common::full() { 10_000 } else { 3000 };
    let disk = LoopFs::slow(Kind::Ext4, 600, 10_000);
    let backing = disk.subdir("data");
    let mut m = Manager::new(&backing, "durability=relaxed,commit_interval_ms=3600000,pending_max=1000000");
    m.start();
    m.until("WATCHDOG=1");
    for i in 0..files {
        fs::write(m.mnt().join(format!("f{i}")), content(i)).unwrap();
    }
    let pending = m.until(&format!("{files} staged"));
    assert!(pending.contains("STATUS=healthy"), "{pending}");
    assert_eq!(fs::read_dir(&backing).unwrap().filter(|e| e.as_ref().unwrap().file_name() != ".fsys").count(), 0);

    m.signal(Signal::TERM);
    m.until("STOPPING=1");
    let asked = m.until("EXTEND_TIMEOUT_USEC=");
    assert!(asked.contains("STATUS=stopping: "), "{asked}");
    let last = m.until("STATUS=ended ");
    assert!(last.contains("ended healthy: ") && last.contains("nothing uncommitted"), "{last}");
    assert_eq!(m.wait().code(), Some(0), "{}", m.log());
    assert!(!is_mounted(&m.mnt()));
    assert_whole(&backing, files);

    // Restart, and a kill while durable saves go on: those whose close returned are there.
    "durability=close".clone_into(&mut m.options);
    m.start();
    let mnt = m.mnt();
    let saver = std::thread::spawn(move || {
        let save = |i: usize| fs::write(mnt.join(format!("f{i}")), content(i));
        let mut next = files;
        while save(next).is_ok() {
            next += 1;
        }
        next - files
    });
    assert!(wait_until(LONG, || backing.join(format!("f{}", files + 20)).exists()));
    m.signal(Signal::KILL);
    let saved = saver.join().unwrap();
    assert!(!m.wait().success() && saved >= 20);
    m.start();
    assert_whole(&backing, files + saved);
    m.signal(Signal::TERM);
    assert_eq!(m.wait().code(), Some(0));
}

/// The watchdog is fed by progress, not by a timer: while the device stands still and a commit waits, it is not.
#[test]
fn the_watchdog_starves_when_the_dispatcher_stands_still() {
    if !can_mount("watchdog") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    let mut m = Manager::new(&disk.subdir("data"), "durability=close");
    m.start();
    m.until("WATCHDOG=1");
    let mut file = fs::File::create(m.mnt().join("f")).unwrap();
    file.write_all(b"one").unwrap();
    // The commit waits for the device, and with it the dispatcher.
    let frozen = Frozen::of(disk.path());
    let saver = std::thread::spawn(move || file.sync_all());
    let starved = m.next(|m| m.contains("STATUS=") && !m.contains("WATCHDOG=1"));
    assert!(starved.contains("healthy"), "{starved}");
    drop(frozen);
    saver.join().unwrap().unwrap();
    m.until("WATCHDOG=1");
    m.signal(Signal::TERM);
    assert_eq!(m.wait().code(), Some(0));
    assert!(m.log().contains("has not begun a batch"), "{}", m.log());
}

/// A frozen file system; thawed when dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn of(path: &Path) -> Self {
        run(Command::new("fsfreeze").arg("-f").arg(path));
        Self(path.to_owned())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("-u").arg(&self.0));
    }
}

#[test]
fn a_reload_is_told_to_the_manager() {
    if !can_mount("reload as a service") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (data, file) = (dir.path().join("data"), dir.path().join("fsys.toml"));
    fs::create_dir(&data).unwrap();
    fs::write(&file, "").unwrap();
    let mut m = Manager::new(&data, &format!("config={}", file.display()));
    m.start();
    m.signal(Signal::HUP);
    assert!(m.until("RELOADING=1").contains("MONOTONIC_USEC="));
    m.until("READY=1");
}

/// What mount(8) calls, and what it makes of an fstab line.
struct Helper {
    dir: tempfile::TempDir,
}

impl Helper {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["data", "mnt"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, options: &str, args: &[&str]) -> Output {
        let list = format!("log_file={},{options}", self.path("log").display());
        let mut command = fsys_mount();
        command.arg0("/sbin/mount.fsys").arg(self.path("data")).arg(self.path("mnt")).args(args);
        command.args(["-o", &list]).output().unwrap()
    }

    fn ok(&self, options: &str, args: &[&str]) {
        let output = self.run(options, args);
        assert!(output.status.success(), "{options}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn get(&self, key: &str) -> String {
        let output = fsys().args(["status", "--json"]).arg(self.path("mnt")).output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let all = json["settings"].as_array().unwrap();
        all.iter().find(|s| s["key"] == key).unwrap()["value"].as_str().unwrap().to_owned()
    }

    fn flags(&self) -> String {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mnt = self.path("mnt").display().to_string();
        let line = table.lines().find(|l| l.split(' ').nth(4) == Some(&mnt)).unwrap();
        line.split(' ').nth(5).unwrap().to_owned()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        while is_mounted(&self.path("mnt")) {
            let stopped = fsys().args(["umount", "--lazy"]).arg(self.path("mnt")).status();
            if !stopped.is_ok_and(|s| s.success()) {
                let _ = Command::new("umount").arg("-l").arg(self.path("mnt")).status();
            }
        }
    }
}

#[test]
fn remount_changes_flags_and_values_but_not_what_is_as_mounted() {
    if !can_mount("remount") {
        return;
    }
    let h = Helper::new();
    let fstab = "rw,nofail,_netdev,x-systemd.requires=a.service,X-mount.mkdir,durability=fsync,threads=2";
    assert_eq!(h.run(&format!("remount,{fstab}"), &[]).status.code(), Some(2), "nothing is mounted there");
    h.ok(fstab, &[]);
    run(fsys().args(["set", "durability=always"]).arg(h.path("mnt")));
    h.ok(&format!("{fstab},remount,ro,nodev,window_us=77"), &[]);
    assert_eq!((h.get("durability"), h.get("window_us")), ("always".into(), "77".into()));
    assert!(h.flags().contains("ro,") && h.flags().contains("nodev"), "{}", h.flags());
    assert_eq!(fs::write(h.path("mnt/f"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    h.ok(&format!("{fstab},remount,rw"), &[]);
    fs::write(h.path("mnt/f"), "x").unwrap();
    assert!(h.flags().contains("nodev"), "what was not asked for stays: {}", h.flags());
    let refused = h.run("remount,threads=3,window_us=78", &[]);
    assert!(refused.status.code() == Some(1) && String::from_utf8_lossy(&refused.stderr).contains("mount again"));
    assert_eq!(h.get("window_us"), "77", "all or nothing");
    // mount(8) knows 32 for what cannot be mounted, and 16 for something else.
    assert_eq!(h.run(fstab, &[]).status.code(), Some(32));
}

#[test]
fn a_comma_in_a_value_comes_through_mount_8() {
    if !can_mount("commas") {
        return;
    }
    let h = Helper::new();
    h.ok(r"ro,fsname=a\,b,rule={x\,y}.db:durability=relaxed", &[]);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        table.lines().any(|l| l.contains(&format!(" {} ", h.path("mnt").display())) && l.contains(" a,b ")),
        "{table}"
    );
    assert!(h.flags().starts_with("ro"), "{}", h.flags());
}

#[test]
fn mounts_in_another_name_space() {
    if !can_mount("name space") {
        return;
    }
    let h = Helper::new();
    let mut inside = Command::new("unshare");
    inside.args(["-m", "--propagation", "private", "sleep", "3600"]);
    let mut inside = Sleeper(inside.spawn().unwrap());
    let pid = inside.0.id();
    let own = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
    assert!(wait_until(LONG, || own(&pid.to_string()) != own("self")));
    h.ok("", &["-N", &pid.to_string()]);
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let line = format!(" {} ", h.path("mnt").display());
    assert!(table.lines().any(|l| l.contains(&line) && l.contains("fuse.fsys")), "{table}");
    assert!(!is_mounted(&h.path("mnt")), "and not in this one");
    let mut umount = Command::new("nsenter");
    umount.args(["-t", &pid.to_string(), "-m"]).arg(fsys().get_program()).arg("umount").arg(h.path("mnt"));
    run(&mut umount);
    let missing = h.run("", &["-N", "/nonexistent"]);
    assert!(missing.status.code() == Some(2) && String::from_utf8_lossy(&missing.stderr).contains("name space"));
    inside.0.kill().unwrap();
}

struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The units name programs and options that are there.
#[test]
fn the_units_fit_the_program() {
    let unit = |name: &str| {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd").join(name)).unwrap()
    };
    let service = unit("fsys@.service");
    for line in ["Type=notify", "ExecStart=/usr/bin/fsys-mount -f ", "ExecReload=/usr/bin/fsys reload ", "WatchdogSec="]
    {
        assert!(service.lines().any(|l| l.starts_with(line)), "{line}");
    }
    for private in ["PrivateTmp=", "ProtectSystem=", "ProtectHome=", "PrivateMounts="] {
        assert!(!service.lines().any(|l| l.starts_with(private)), "{private} would hide the mount");
    }
    // Where systemd is installed, it reads them itself.
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd");
    for name in ["fsys@.service", "mnt-fsys.mount"] {
        let Ok(output) = Command::new("systemd-analyze").arg("verify").arg(units.join(name)).output() else {
            common::say("systemd-analyze is not there: the units were not read by systemd");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        // The programs need not be installed here, and systemd need not run.
        let about = |l: &&str| l.contains(name) && !l.contains("is not executable") && !l.contains("man ");
        let complaints: Vec<_> = said.lines().filter(about).collect();
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}
