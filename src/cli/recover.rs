//! `fsys recover`: what a mount would put right, without mounting.

use std::path::PathBuf;

use super::Output;
use crate::engine::layout::Layout;
use crate::engine::recover::{Report, recover};
use crate::error::Result;

const EXAMPLE: &str = "Examples:
  fsys recover --dry-run /data     # only look; works while a daemon runs, too
  fsys recover /data

A mount does this by itself before it says ready. What is not understood is never removed.";

/// Put a backing directory right after a crash, without mounting it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Change nothing, say what would be done
    #[arg(long)]
    dry_run: bool,
    /// For programs
    #[arg(long)]
    json: bool,
    /// The backing directory
    backing: PathBuf,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let report = match Layout::inspect(&args.backing)? {
        // Never mounted: there is nothing, and nothing is made.
        None => Report { dry_run: args.dry_run, ..Report::default() },
        Some(looked) if args.dry_run => recover(&looked, true)?,
        Some(_) => recover(&Layout::open(&args.backing)?, false)?,
    };
    Output::new(args.json, &report, || report.to_string())
}
