//! `fsys doctor`: is everything there that a mount rests on.

use std::path::PathBuf;

use super::Output;
use crate::error::{Exit, Result};
use crate::mount::doctor::{Finding, Level, examine};

const EXAMPLE: &str = "Examples:
  fsys doctor                      # this machine
  fsys doctor /data /mnt/fsys      # and what is to be mounted
  fsys doctor --json /data | jq '.[] | select(.level != \"ok\")'

Looks only; nothing is changed. A mount looks at the same things and logs what is not in order.
Exit code 0: no failure, perhaps warnings; 2: a failure.";

/// Look at everything that a mount rests on: what is not in order, what it means, what to do
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// For programs
    #[arg(long)]
    json: bool,
    /// The backing directory
    backing: Option<PathBuf>,
    /// Where it is to be mounted
    mountpoint: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let found = examine(args.backing.as_deref(), args.mountpoint.as_deref());
    let mut output = Output::new(args.json, &found, || words(&found))?;
    if count(&found, Level::Failure) > 0 {
        output.exit = Exit::System;
    }
    Ok(output)
}

fn count(found: &[Finding], level: Level) -> usize {
    found.iter().filter(|f| f.level == level).count()
}

fn words(found: &[Finding]) -> String {
    let lines: Vec<_> = found.iter().map(Finding::to_string).collect();
    let (failures, warnings) = (count(found, Level::Failure), count(found, Level::Warning));
    let verdict = match (failures, warnings) {
        (0, 0) => "all in order".to_owned(),
        (0, w) => format!("it can be mounted; {w} warning(s)"),
        (f, w) => format!("NOT in order: {f} failure(s), {w} warning(s)"),
    };
    format!("{verdict}, {} things looked at\n{}", found.len(), lines.join("\n"))
}
