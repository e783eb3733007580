//! `fsys drain`: wait until everything acknowledged is durable.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::Output;
use super::client::{Daemon, find, strange};
use crate::error::Result;
use crate::mount::control::{Answer, Request};

const EXAMPLE: &str = "Example:
  fsys drain --timeout 30 /mnt/fsys && echo 'safe to cut the power'

sync(1) and syncfs(2) do not reach a FUSE daemon; this does.
On a terminal it shows how much is left.
Exit code 64: the time is over, or something could not be made durable.";

/// Wait until everything that programs were told is saved is on stable storage
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Give up after this many seconds, at most a day
    #[arg(long, value_name = "SECS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=86_400))]
    timeout: u64,
    /// For programs
    #[arg(long)]
    json: bool,
    /// The mount; not needed when there is one
    mount: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mount = find(args.mount.as_deref())?;
    let time = Duration::from_secs(args.timeout);
    let mut bar = Bar::default();
    let request = Request::Drain { timeout_ms: args.timeout * 1000, progress: bar.shown };
    let answer = Daemon::of(&mount)?.ask_telling(&request, time, |left| bar.tell(left));
    bar.clear();
    match answer? {
        Answer::Done => Output::new(args.json, &json!({ "drained": true, "mountpoint": mount.mountpoint }), || {
            format!("{}: everything acknowledged is durable", mount.mountpoint.display())
        }),
        other => Err(strange(&other)),
    }
}

/// A line on standard error, if that is a terminal.
pub struct Bar {
    shown: bool,
    /// The most that was left.
    all: u64,
}

impl Default for Bar {
    fn default() -> Self {
        Self { shown: std::io::stderr().is_terminal(), all: 0 }
    }
}

impl Bar {
    /// So much is left.
    pub fn tell(&mut self, left: u64) {
        self.all = self.all.max(left);
        self.write(&bar(left, self.all));
    }

    /// Takes the line away.
    pub fn clear(&self) {
        if self.all > 0 {
            self.write("");
        }
    }

    fn write(&self, text: &str) {
        if self.shown {
            // A terminal that is gone must not turn a drain into a failure.
            write!(std::io::stderr().lock(), "\r\x1b[K{text}").unwrap_or_default();
        }
    }
}

fn bar(left: u64, all: u64) -> String {
    const WIDTH: u64 = 40;
    let done = (all - left.min(all)) * WIDTH / all.max(1);
    let (full, empty) = ("#".repeat(done as usize), ".".repeat((WIDTH - done) as usize));
    format!("draining [{full}{empty}] {left} of {all} left")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_grows_as_less_is_left() {
        assert_eq!(bar(8, 8), format!("draining [{}] 8 of 8 left", ".".repeat(40)));
        assert_eq!(bar(2, 8), format!("draining [{}{}] 2 of 8 left", "#".repeat(30), ".".repeat(10)));
        assert_eq!(bar(0, 0), format!("draining [{}] 0 of 0 left", ".".repeat(40)));
    }
}
