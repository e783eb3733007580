//! The program under test, started as a user starts it: in the background, on a mount point of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::{fresh_dir, is_mounted, run_logged, wait_until};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// The directory of the binaries under test.
fn binary(name: &str) -> PathBuf {
    let dir = match std::env::var_os("FSYS_TEST_BIN") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_BIN_EXE_fsys-mount")).parent().expect("a directory").to_owned(),
    };
    dir.join(name)
}

/// A command that runs the daemon's binary, with the transport of `FSYS_TEST_TRANSPORT` unless the test says another.
pub fn fsys_mount() -> Command {
    let mut command = Command::new(binary("fsys-mount"));
    if let Some(transport) = transport() {
        command.arg("-o").arg(format!("transport={transport}"));
    }
    command
}

/// `FSYS_TEST_TRANSPORT`, when set.
pub fn transport() -> Option<String> {
    std::env::var("FSYS_TEST_TRANSPORT").ok().filter(|t| !t.is_empty())
}

/// A command that runs the tool for people.
pub fn fsys() -> Command {
    Command::new(binary("fsys"))
}

/// A running mount. Dropping it unmounts and ends the daemon, whatever state both are in.
pub struct Mount {
    backing: PathBuf,
    dir: PathBuf,
    options: Vec<String>,
    log: PathBuf,
    pid: Option<Pid>,
}

impl Mount {
    /// Mounts `backing`; `options` is a `-o` list and may be empty. Panics with the program's own words.
    pub fn start(backing: &Path, options: &str) -> Mount {
        let args = if options.is_empty() { vec![] } else { vec!["-o".to_owned(), options.to_owned()] };
        Self::start_with(backing, args)
    }

    /// Mounts `backing` with any arguments before the two directories.
    pub fn start_with(backing: &Path, args: Vec<String>) -> Mount {
        let dir = fresh_dir("mnt");
        let log = dir.with_extension("log");
        let mut mount = Mount { backing: backing.to_owned(), dir, options: args, log, pid: None };
        mount.restart();
        mount
    }

    /// Runs the same command again; on a dead mount point it must detach, recover and mount.
    pub fn restart(&mut self) {
        let mut command = fsys_mount();
        command.args(&self.options).arg(&self.backing).arg(&self.dir);
        let status = run_logged(&mut command, &self.log, START_LIMIT).expect("start fsys-mount");
        let status = status.unwrap_or_else(|| panic!("{command:?} did not return in time\n{}", self.log()));
        assert!(status.success(), "{command:?}: {status}\n{}", self.log());
        assert!(is_mounted(&self.dir), "exit 0, but nothing is mounted\n{}", self.log());
        self.pid = Some(self.ask_pid());
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The backing directory.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// The daemon's process id.
    pub fn pid(&self) -> Pid {
        self.pid.expect("the daemon runs")
    }

    /// What the program printed since the first start.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `fsys status --json` of this mount.
    pub fn status(&self) -> serde_json::Value {
        let output = fsys().args(["status", "--json"]).arg(&self.dir).output().expect("run fsys");
        let text = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        serde_json::from_str(&text).unwrap_or_else(|e| {
            panic!("fsys status --json: {e}: {}\n{text}\n{complaint}\n{}", output.status, self.log())
        })
    }

    /// A counter of the status.
    pub fn counter(&self, name: &str) -> u64 {
        self.status()["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
    }

    fn ask_pid(&self) -> Pid {
        let status = self.status();
        // With a mount point as argument the answer may be the mount itself or a list of one.
        let one = status.get("mounts").and_then(|m| m.get(0)).or_else(|| status.get(0)).unwrap_or(&status);
        let pid = one.get("pid").and_then(serde_json::Value::as_i64).and_then(|p| Pid::from_raw(p as i32));
        pid.unwrap_or_else(|| panic!("no pid in the status: {status}"))
    }

    /// Kills the daemon with SIGKILL and waits until it is gone. The mount point is dead then.
    pub fn kill9(&mut self) {
        let pid = self.pid.take().expect("the daemon runs");
        kill_process(pid, Signal::KILL).expect("kill the daemon");
        assert!(wait_until(STOP_LIMIT, || is_gone(pid)), "daemon {pid:?} survives SIGKILL");
    }

    /// Unmounts as a user does, and waits until the daemon has drained and ended.
    pub fn stop(&mut self) {
        let mut command = fsys();
        command.arg("umount").arg(&self.dir);
        let status = run_logged(&mut command, &self.log, STOP_LIMIT).expect("start fsys umount");
        assert!(status.is_some_and(|s| s.success()), "fsys umount: {status:?}\n{}", self.log());
        if let Some(pid) = self.pid.take() {
            assert!(wait_until(STOP_LIMIT, || is_gone(pid)), "daemon {pid:?} goes on after umount\n{}", self.log());
        }
        assert!(!is_mounted(&self.dir), "still mounted after fsys umount");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- fsys-mount printed:\n{}", self.log());
        }
        if is_mounted(&self.dir) && self.pid.is_some() {
            let mut command = fsys();
            let _ = run_logged(command.arg("umount").arg(&self.dir), &self.log, Duration::from_secs(20));
        }
        if let Some(pid) = self.pid.take()
            && !wait_until(Duration::from_secs(10), || is_gone(pid))
        {
            let _ = kill_process(pid, Signal::KILL);
            wait_until(Duration::from_secs(10), || is_gone(pid));
        }
        while is_mounted(&self.dir) {
            let done = Command::new("umount").arg("-l").arg(&self.dir).status();
            if !done.is_ok_and(|s| s.success()) {
                eprintln!("cannot unmount {}", self.dir.display());
                break;
            }
        }
        let _ = fs::remove_dir(&self.dir);
        let _ = fs::remove_file(&self.log);
    }
}

/// True when the process has ended; a zombie that nobody collects counts as ended, once none of its threads is left, which
/// may still hold its descriptors.
pub fn is_gone(pid: Pid) -> bool {
    let of = |what: &str| format!("/proc/{}/{what}", pid.as_raw_nonzero());
    let Ok(stat) = fs::read_to_string(of("stat")) else { return true };
    let zombie = stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']));
    zombie && fs::read_dir(of("task")).map_or(true, |threads| threads.count() <= 1)
}
