//! `fsys reload`: read the configuration file again.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::Output;
use super::client::{Daemon, find, strange};
use crate::error::Result;
use crate::mount::control::{Answer, Request};
use crate::mount::live::Reloaded;

const EXAMPLE: &str = "Example:
  fsys reload /mnt/fsys        # the same as SIGHUP to the daemon, which also opens its log file again

A file with an error changes nothing: the exit code is 1 then, and `fsys status` and the log say so as well.
What takes effect when mounting only is named.";

/// Read the configuration file of a mount again
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// For programs
    #[arg(long)]
    json: bool,
    /// The mount; not needed when there is one
    mount: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mount = find(args.mount.as_deref())?;
    match Daemon::of(&mount)?.ask(&Request::Reload, Duration::ZERO)? {
        Answer::Reloaded(r) => Output::new(args.json, &r, || words(&r)),
        other => Err(strange(&other)),
    }
}

fn words(r: &Reloaded) -> String {
    let mut text = format!("{}: read again, {} rule(s)", r.file, r.rules);
    for s in &r.changed {
        write!(text, "\n  {}={} from now on ({})", s.key, s.value, s.source).unwrap_or_default();
    }
    for s in &r.next_mount {
        write!(text, "\n  {}={} with the next mount ({})", s.key, s.value, s.source).unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::Setting;

    #[test]
    fn names_what_needs_a_mount() {
        let setting = |key: &str| Setting { key: key.into(), value: "3".into(), source: "/etc/x.toml:2".into() };
        let (changed, next_mount) = (vec![setting("window_us")], vec![setting("threads")]);
        let text = words(&Reloaded { file: "/etc/x.toml".into(), changed, rules: 2, next_mount });
        assert!(text.contains("window_us=3 from now on") && text.contains("threads=3 with the next mount"), "{text}");
    }
}
