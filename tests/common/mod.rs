//! What the integration tests share: loop filesystems, the mount under test, the tools, the tree comparer.
//!
//! Settings from the environment: `FSYS_TEST_FS` (list of ext4,xfs,btrfs), `FSYS_TEST_FULL=1` (whole input
//! instead of the slice for CI), `FSYS_TEST_IMAGES` (directory of the images, default /dev/shm),
//! `FSYS_TEST_BIN` (directory with other binaries to test, such as installed ones), `FSYS_TEST_TRANSPORT` (fuser or
//! io-uring, for every mount; with io-uring the kernel's enable_uring must be Y).

#![allow(dead_code, unused_imports, reason = "each test binary uses its part of the helpers")]

pub mod loopfs;
pub mod mount;
pub mod tools;
pub mod tree;
pub mod user;
#[path = "../tools/version.rs"]
pub mod version;
pub mod world;

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

pub use loopfs::{Kind, LoopFs};
pub use mount::Mount;

/// True when the test can mount. If not: a panic on CI, and elsewhere a message that no capture hides.
pub fn can_mount(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    let fuse = Path::new("/dev/fuse").exists();
    if root && fuse {
        return true;
    }
    let why = if root { "/dev/fuse is missing" } else { "not root" };
    assert!(std::env::var_os("CI").is_none(), "{test}: {why}, and on CI nothing may be skipped");
    let line = "!".repeat(78);
    let _ = writeln!(std::io::stderr(), "\n{line}\n!! SKIPPED {test}: {why}. NOTHING WAS TESTED.\n{line}");
    false
}

/// True when the program that a test needs is there. If not: a panic on CI, and elsewhere a message.
pub fn can_run(test: &str, program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "{test}: no {program}, and on CI nothing may be skipped");
    say(&format!("!! SKIPPED {test}: {program} is not there (scripts/setup installs it). NOTHING WAS TESTED."));
    false
}

/// The filesystems to run on: `FSYS_TEST_FS`, or `default`.
pub fn kinds(default: &[Kind]) -> Vec<Kind> {
    match std::env::var("FSYS_TEST_FS") {
        Ok(list) => list.split([',', ' ']).filter(|s| !s.is_empty()).map(Kind::named).collect(),
        Err(_) => default.to_vec(),
    }
}

/// True when the whole input is asked for.
pub fn full() -> bool {
    std::env::var("FSYS_TEST_FULL").is_ok_and(|v| v == "1")
}

/// A number from the environment, or `default`.
pub fn env_number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// Says something that is shown whether the test passes or not: figures that a report quotes.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "  {text}");
}

/// `part` per `whole`.
#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
pub fn per(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

/// The value of a sample, by its name with labels.
pub fn sample(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().expect("a number")
}

/// Polls until `done` holds; false when it does not within `limit`.
pub fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command that must succeed; gives its output. A failure shows everything it printed.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{}", explain(command, &output));
    output
}

/// Like [`run`], and gives what the command wrote to its standard output.
pub fn run_text(command: &mut Command) -> String {
    String::from_utf8_lossy(&run(command).stdout).into_owned()
}

/// What a failed command said.
pub fn explain(command: &Command, output: &Output) -> String {
    let mut text = format!("{command:?}: {}\n", output.status);
    for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        let _ = writeln!(text, "--- {name}\n{}", String::from_utf8_lossy(bytes));
    }
    text
}

/// Runs a command with its output in `log`, never in a pipe: a daemon that it leaves behind would keep a pipe
/// open for ever. `None` when it did not end within `limit`; it is killed then.
pub fn run_logged(command: &mut Command, log: &Path, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let out = File::options().create(true).append(true).open(log)?;
    let mut child = command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).spawn()?;
    let mut status = None;
    let ended = wait_until(limit, || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    });
    if !ended {
        child.kill()?;
        child.wait()?;
    }
    Ok(status)
}

/// A fresh directory, for this test alone. Mount points are made in it, so it is only ever removed empty.
/// Its name carries the process, for [`sweep`].
pub fn fresh_dir(what: &str) -> PathBuf {
    let prefix = format!("{PREFIX}{}-{what}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir().expect("temp directory").keep()
}

const PREFIX: &str = "fsys-test-";

/// Takes away what a test process that was killed has left: mounts first, then directories and images.
pub fn sweep(images: &Path) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let left: Vec<PathBuf> = [std::env::temp_dir(), images.to_owned()]
            .iter()
            .filter_map(|dir| std::fs::read_dir(dir).ok())
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(of_the_dead))
            .collect();
        for path in left.iter().filter(|p| is_mounted(p)) {
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
        for path in &left {
            let _ = std::fs::remove_dir(path).or_else(|_| std::fs::remove_file(path));
        }
    });
}

/// Whether the name is one of ours and its process does not exist any more.
fn of_the_dead(name: &str) -> bool {
    let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    pid.and_then(|p| p.parse::<u32>().ok()).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// True when something is mounted at `path`, a dead FUSE mount included.
pub fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().any(|line| line.split(' ').nth(4).is_some_and(|p| Path::new(p) == path))
}

/// Programs 0 to `programs` append their number to a file `times` times each, side by side. Gives what it holds then.
pub fn appended(dir: &Path, name: &str, programs: usize, times: usize) -> String {
    let start = |i| {
        let script = format!("for n in $(seq {times}); do echo {i} >> {name}; done");
        Command::new("bash").args(["-ec", &script]).current_dir(dir).spawn().expect("bash")
    };
    let jobs: Vec<_> = (0..programs).map(start).collect();
    jobs.into_iter().for_each(|mut j| assert!(j.wait().expect("it ends").success()));
    std::fs::read_to_string(dir.join(name)).expect("what was appended")
}
