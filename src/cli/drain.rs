//! `fsys drain`: wait until everything acknowledged is durable.

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
    match Daemon::of(&mount)?.ask(&Request::Drain { timeout_ms: args.timeout * 1000 }, time)? {
        Answer::Done => Output::new(args.json, &json!({ "drained": true, "mountpoint": mount.mountpoint }), || {
            format!("{}: everything acknowledged is durable", mount.mountpoint.display())
        }),
        other => Err(strange(&other)),
    }
}
