//! Starts the saver and the watcher (see `tests/tools/`) as processes of their own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The built tool. Plain `cargo test` builds examples; `cargo test --test NAME` does not.
pub fn tool(name: &str) -> PathBuf {
    let bin = Path::new(env!("CARGO_BIN_EXE_fsys-mount")).parent().expect("a directory");
    let path = bin.join("examples").join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --examples` in the same profile first", path.display());
    path
}

/// How a tool ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code, -1 after a signal.
    pub code: i32,
    /// The JSON object that it printed.
    pub summary: Value,
    /// What it complained of.
    pub complaint: String,
}

impl Ended {
    /// A number of the summary.
    pub fn count(&self, key: &str) -> u64 {
        self.summary.get(key).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }

    /// A fractional number of the summary.
    pub fn figure(&self, key: &str) -> f64 {
        self.summary.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }

    /// The number of findings of one kind in a watcher's summary.
    pub fn kind(&self, kind: &str) -> u64 {
        self.summary.get("kinds").and_then(|k| k.get(kind)).and_then(Value::as_u64).unwrap_or(0)
    }

    fn from(name: &str, output: &Output) -> Ended {
        let text = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        let summary = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}: {text}\n{complaint}"));
        Ended { code: output.status.code().unwrap_or(-1), summary, complaint }
    }
}

/// A tool at work; ended when dropped.
pub struct Running {
    name: &'static str,
    child: Option<Child>,
}

impl Running {
    /// Starts a tool. `dir` and `files` are what every tool needs.
    pub fn start(name: &'static str, dir: &Path, files: u32, args: &[&str]) -> Running {
        let mut command = Command::new(tool(name));
        command.arg("--dir").arg(dir).args(["--files", &files.to_string()]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { name, child: Some(command.spawn().expect("start a tool")) }
    }

    /// Asks it to end, and waits.
    pub fn stop(mut self) -> Ended {
        self.signal();
        self.collect()
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self) -> Ended {
        self.collect()
    }

    /// True while it runs.
    pub fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|c| c.try_wait().is_ok_and(|s| s.is_none()))
    }

    fn signal(&self) {
        let pid = self.child.as_ref().and_then(|c| Pid::from_raw(c.id() as i32));
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
    }

    fn collect(&mut self) -> Ended {
        let child = self.child.take().expect("still running");
        Ended::from(self.name, &child.wait_with_output().expect("wait for a tool"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The saver's writers end with their parent: their standard input closes.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs a tool to its end.
pub fn run_tool(name: &'static str, dir: &Path, files: u32, args: &[&str]) -> Ended {
    Running::start(name, dir, files, args).wait()
}
