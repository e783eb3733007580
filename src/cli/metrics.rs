//! `fsys metrics`: the metrics, over the control socket.

use std::path::PathBuf;
use std::time::Duration;

use super::Output;
use super::client::{Daemon, find, strange};
use crate::error::{Exit, Result};
use crate::mount::control::{Answer, Request};

const EXAMPLE: &str = "Examples:
  fsys metrics /mnt/fsys
  fsys metrics > /var/lib/prometheus/node-exporter/fsys.prom    # for the textfile collector

In the text format of Prometheus. With `-o metrics=127.0.0.1:9469` the daemon answers a scraper by itself.";

/// Print the metrics in the text format of Prometheus
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// The mount; not needed when there is one
    mount: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mount = find(args.mount.as_deref())?;
    match Daemon::of(&mount)?.ask(&Request::Metrics, Duration::ZERO)? {
        Answer::Metrics(text) => Ok(Output { text, exit: Exit::Ok }),
        other => Err(strange(&other)),
    }
}
