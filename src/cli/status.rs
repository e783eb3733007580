//! `fsys status`: is it well, and what does it do.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::Output;
use super::client::{Daemon, find, strange};
use super::get::seconds;
use crate::config::keys::BUILT_IN;
use crate::error::{Exit, Result};
use crate::mount::control::{Answer, Request};
use crate::telemetry::{ConfigState, Status, Uncommitted};

const EXAMPLE: &str = "Examples:
  fsys status
  fsys status --json /mnt/fsys | jq .health

Exit code 0: healthy; 64: degraded or read-only, the reason is in the first line.";

/// Show the health of a mount, in one line first, then what it does
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
    match Daemon::of(&mount)?.ask(&Request::Status, Duration::ZERO)? {
        Answer::Status(status) => {
            let mut output = Output::new(args.json, &status, || words(&status))?;
            if status.health != "healthy" {
                output.exit = Exit::Degraded;
            }
            Ok(output)
        }
        other => Err(strange(&other)),
    }
}

/// Uncommitted files that are named; `--json` has more.
const SHOWN: usize = 5;

fn words(s: &Status) -> String {
    let c = &s.counters;
    let reason = if s.reason.is_empty() { "every save is whole and as durable as its policy says" } else { &s.reason };
    let policy: Vec<_> = s.policy.values().iter().take(3).map(|(key, value)| format!("{key} {value}")).collect();
    let reflink = if s.reflink { "with reflink" } else { "no reflink" };
    let mut lines = vec![
        format!("{}: {reason}", s.health),
        row("mount", format!("{} on {}", s.backing, s.mountpoint)),
        row("backing", format!("{} on {}, {reflink}; flushed by {}", s.filesystem, s.device, s.flush_strategy)),
        row("daemon", format!("pid {}, version {}", s.pid, s.version)),
        row("transport", &s.transport),
        row("policy", format!("{}; {} rule(s)", policy.join(", "), s.rules)),
        row("set", set(s)),
        row("config", config(&s.config)),
        row("uncommitted", uncommitted(s)),
        row("commits", format!("{} done, {} under way, {} slow", c.commits, c.in_flight, c.slow_commits)),
        row(
            "journal",
            format!("{} committed, {} bytes, {} checkpoint(s)", c.journal_commits, c.journal_bytes, c.checkpoints),
        ),
        row("in place", format!("{} synced", c.in_place_syncs)),
        row("coalescing", coalescing(s)),
        row("commit", latency(&s.commit_latency)),
        row("flush", format!("{} calls; {}", c.flush_calls, latency(&s.flush_latency))),
        row("errors", errors(s)),
        row("fallbacks", format!("{} went on in place, {} O_DIRECT", c.in_place_fallbacks, c.direct_fallbacks)),
        row("passthrough", passthrough(s)),
        row("watch", watch(s)),
        row("open", format!("{} handle(s), {} inode(s) known", s.handles, s.inodes)),
    ];
    let shown = &s.uncommitted[..s.uncommitted.len().min(SHOWN)];
    lines.extend(shown.iter().map(|u| row("staged", staged(u))));
    for f in &s.failed {
        let kept = if f.kept_as.is_empty() { "not kept".into() } else { format!("kept as .fsys/failed/{}", f.kept_as) };
        lines.push(row("failed", format!("{}: {} at {}; {kept}", f.path, f.error, f.failed_at)));
    }
    lines.join("\n")
}

fn row(title: &str, text: impl std::fmt::Display) -> String {
    format!("  {title:<12} {text}")
}

fn passthrough(s: &Status) -> String {
    let (opens, fallbacks) = (s.counters.passthrough_opens, s.counters.passthrough_fallbacks);
    match s.no_passthrough.as_str() {
        "" => format!("{opens} open(s) of files in place, {fallbacks} fallback(s)"),
        why => format!("off: {why}"),
    }
}

fn watch(s: &Status) -> String {
    let c = &s.counters;
    match s.no_watch.as_str() {
        "" => format!(
            "{} change(s) by others, {} directories not watched, {} overflow(s)",
            c.outside_changes, c.unwatched_dirs, c.watch_overflows
        ),
        why => format!("off: {why}"),
    }
}

/// What is not a built-in default.
fn set(s: &Status) -> String {
    let own = s.settings.iter().filter(|s| s.source != BUILT_IN);
    let words: Vec<_> = own.map(|s| format!("{}={} ({})", s.key, s.value, s.source)).collect();
    if words.is_empty() { "all values are built-in defaults".into() } else { words.join(", ") }
}

fn config(c: &ConfigState) -> String {
    let mut text = c.file.clone().unwrap_or_else(|| "no file".into());
    if let Some(error) = &c.error {
        write!(text, ", not taken when it was read again: {error}; the one before holds").unwrap_or_default();
    }
    for s in &c.next_mount {
        write!(text, "; {}={} with the next mount", s.key, s.value).unwrap_or_default();
    }
    if !c.changes.is_empty() {
        write!(text, "; {} runtime change(s), `fsys set --list`", c.changes.len()).unwrap_or_default();
    }
    text
}

fn uncommitted(s: &Status) -> String {
    let c = &s.counters;
    if c.staged_now == 0 && s.oldest_uncommitted_ms == 0 {
        return "nothing".into();
    }
    let oldest = seconds(s.oldest_uncommitted_ms);
    format!("{} version(s) staged, {} bytes; the oldest change is {oldest} old", c.staged_now, c.staged_bytes)
}

fn staged(u: &Uncommitted) -> String {
    let path = if u.path.is_empty() { "(no name)" } else { &u.path };
    let (age, idle) = (seconds(u.age_ms), seconds(u.idle_ms));
    format!("{path}: {}, {} bytes, {age} old, last written {idle} ago, {} writer(s)", u.state, u.bytes, u.writers)
}

fn coalescing(s: &Status) -> String {
    let c = &s.counters;
    let (whole, part) = (s.ops_per_batch_x100 / 100, s.ops_per_batch_x100 % 100);
    format!("{whole}.{part:02} operations per batch, largest {}; {} windows", c.batch_peak, c.windows)
}

fn errors(s: &Status) -> String {
    let c = &s.counters;
    format!(
        "{} failed commits, {} panics, {} writes refused at staging_max_bytes, {} waits at queue_max",
        c.commit_failures, c.panics, c.staging_full, c.queue_full_waits
    )
}

fn latency(l: &crate::telemetry::LatencySummary) -> String {
    if l.count == 0 {
        return "not measured yet".into();
    }
    let ms = |us: u64| format!("{}.{:03} ms", us / 1000, us % 1000);
    format!("median {}, 99 % within {}, longest {}", ms(l.p50_us), ms(l.p99_us), ms(l.max_us))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::Setting;
    use crate::mount::testing::status;
    use crate::telemetry::FailedVersion;

    #[test]
    fn health_comes_first_and_failures_are_named() {
        let mut s = status();
        assert!(words(&s).starts_with("healthy: every save is whole"));
        let (key, value, source) = ("threads".into(), "4".into(), "/etc/x.toml:3".into());
        s.settings.push(Setting { key, value, source });
        assert!(words(&s).contains("threads=4 (/etc/x.toml:3)"));
        s.health = "degraded".into();
        s.reason = "1 version could not be committed".into();
        s.commit_latency.count = 1;
        s.commit_latency.p50_us = 1250;
        s.counters.staged_now = 2;
        s.failed.push(FailedVersion {
            path: "a/b".into(),
            kept_as: "0001".into(),
            failed_at: "flush".into(),
            error: "no space left".into(),
        });
        let text = words(&s);
        assert!(text.starts_with("degraded: 1 version could not be committed\n"), "{text}");
        assert!(text.contains("a/b: no space left at flush; kept as .fsys/failed/0001"), "{text}");
        assert!(text.contains("commit       median 1.250 ms") && text.contains("2 version(s)"), "{text}");
    }
}
