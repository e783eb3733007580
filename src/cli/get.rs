//! `fsys get`: what holds for one path, and why.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::Output;
use super::client::{Daemon, find_path, path_bytes, strange};
use crate::error::Result;
use crate::mount::control::{Answer, Request};
use crate::telemetry::PathReport;

const EXAMPLE: &str = "Example:
  fsys get /mnt/fsys/mail/inbox.db

Says the policy, which rule, file or option each value comes from, and whether the file is committed.";

/// Show the policy of a path, where each value comes from, and the state of the file
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// For programs
    #[arg(long)]
    json: bool,
    /// A path in a mount
    path: PathBuf,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let (mount, relative) = find_path(&args.path)?;
    match Daemon::of(&mount)?.ask(&Request::Get { path: path_bytes(&relative) }, Duration::ZERO)? {
        Answer::Path(report) => Output::new(args.json, &report, || words(&report)),
        other => Err(strange(&other)),
    }
}

fn words(r: &PathReport) -> String {
    let path = if r.path.is_empty() { "the root of the mount" } else { &r.path };
    let mut text = format!("{path}: {}, {} bytes", r.state, r.size);
    if r.uncommitted_ms > 0 {
        write!(text, ", uncommitted for {} ms", r.uncommitted_ms).unwrap_or_default();
    }
    for (key, value) in r.policy.values() {
        let source = r.origin.iter().find(|(name, _)| name == key).map_or("unknown", |(_, source)| source);
        // Writing to a String cannot fail.
        write!(text, "\n  {key:<18} {value:<10} {source}").unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::policy::Policy;

    #[test]
    fn words_name_every_source() {
        let origin = vec![("mode".to_owned(), "/etc/fsys.toml:3".to_owned())];
        let path = "a.db".to_owned();
        let report =
            PathReport { path, policy: Policy::default(), origin, state: "staged".into(), size: 7, uncommitted_ms: 40 };
        let text = words(&report);
        assert!(text.starts_with("a.db: staged, 7 bytes, uncommitted for 40 ms\n"), "{text}");
        assert!(text.lines().any(|l| l.contains("mode") && l.contains("auto") && l.ends_with("/etc/fsys.toml:3")));
        assert_eq!(text.lines().count(), 5);
    }
}
