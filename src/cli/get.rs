//! `fsys get`: what holds for one path, and why.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    if let Some(u) = &r.uncommitted {
        let staged = if u.bytes > 0 { format!(", {} bytes staged", u.bytes) } else { String::new() };
        let (age, idle) = (seconds(u.age_ms), seconds(u.idle_ms));
        write!(text, "{staged}; not durable for {age}, last written {idle} ago, {} writer(s)", u.writers)
            .unwrap_or_default();
    }
    match r.committed_at {
        Some(at) => {
            write!(text, "\n  published {} ago, open {} time(s)", seconds(since(at)), r.opens).unwrap_or_default();
        }
        None if r.state == "committed" => {
            write!(text, "\n  not written since the mount, open {} time(s)", r.opens).unwrap_or_default();
        }
        None => {}
    }
    for (key, value) in r.policy.values() {
        // Writing to a String cannot fail.
        let source = r.origin.iter().find(|(name, _)| name == key).map_or("unknown", |(_, source)| source);
        write!(text, "\n  {key:<18} {value:<10} {source}").unwrap_or_default();
    }
    text
}

/// Milliseconds since a time in seconds since 1970.
fn since(at: i64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(Duration::from_secs(at.max(0) as u64)).as_millis() as u64
}

/// Milliseconds as seconds.
pub fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::policy::Policy;
    use crate::telemetry::Uncommitted;

    #[test]
    fn words_name_every_source() {
        let origin = vec![("mode".to_owned(), "/etc/fsys.toml:3".to_owned())];
        let uncommitted = Uncommitted {
            path: "a.db".into(),
            state: "staged".into(),
            bytes: 7,
            age_ms: 1040,
            idle_ms: 12,
            writers: 1,
        };
        let mut report = PathReport {
            path: "a.db".into(),
            policy: Policy::default(),
            origin,
            state: "staged".into(),
            size: 7,
            uncommitted: Some(uncommitted),
            committed_at: None,
            opens: 1,
        };
        let text = words(&report);
        let first =
            "a.db: staged, 7 bytes, 7 bytes staged; not durable for 1.040 s, last written 0.012 s ago, 1 writer(s)";
        assert_eq!(text.lines().next(), Some(first));
        assert!(text.lines().any(|l| l.contains("mode") && l.contains("auto") && l.ends_with("/etc/fsys.toml:3")));
        assert_eq!(text.lines().count(), 5);
        (report.uncommitted, report.committed_at) = (None, Some(i64::MAX));
        assert!(words(&report).contains("published 0.000 s ago, open 1 time(s)"), "{}", words(&report));
    }
}
