//! The metrics as Prometheus reads them (text format 0.0.4). Pure.
//!
//! A metric carries no path and no name of a file: who may scrape may not know them.

use std::fmt::Write;

use super::activity::Histograms;
use super::{Buckets, GAUGES, Status};

/// Bounds for times, in microseconds: a flush of a fast NVMe to a commit that programs give up on.
pub const TIME_BOUNDS_US: [u64; 18] = [
    50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000, 30_000_000,
];

/// Bounds for the number of operations in a batch.
pub const BATCH_BOUNDS: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024];

/// All metrics.
pub fn render(s: &Status, h: &Histograms) -> String {
    let mut text = Text::default();
    text.counters(s);
    text.state(s);
    text.config(s);
    text.family("fsys_flush_seconds", "histogram", "Time of one barrier: the flush that a batch of commits shares.");
    text.buckets("fsys_flush_seconds", "", &h.flush, 1e6);
    let name = "fsys_commit_seconds";
    text.family(name, "histogram", "Time of a save from submission to answer, by the durability of its policy.");
    for (durability, buckets) in &h.commit {
        text.buckets(name, &label("durability", durability), buckets, 1e6);
    }
    text.family("fsys_batch_operations", "histogram", "Operations that shared one run of the commit pipeline.");
    text.buckets("fsys_batch_operations", "", &h.batch, 1.0);
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn counters(&mut self, s: &Status) {
        for (name, help, value) in s.counters.named() {
            if GAUGES.contains(&name) {
                self.gauge(&format!("fsys_{name}"), help, value);
            } else {
                let name = format!("fsys_{name}_total");
                self.family(&name, "counter", help);
                self.sample(&name, "", value);
            }
        }
    }

    fn state(&mut self, s: &Status) {
        self.family("fsys_info", "gauge", "Always 1; version, mount point and backing file system as labels.");
        let pairs = [("version", &s.version), ("mountpoint", &s.mountpoint), ("filesystem", &s.filesystem)];
        self.sample("fsys_info", &pairs.map(|(k, v)| label(k, v)).join(","), 1);
        self.family("fsys_health", "gauge", "1 for the state that the mount is in: healthy, degraded or read-only.");
        for state in ["healthy", "degraded", "read-only"] {
            self.sample("fsys_health", &label("state", state), u8::from(s.health == state));
        }
        let age = seconds(s.oldest_uncommitted_ms, 1e3);
        self.gauge(
            "fsys_oldest_uncommitted_seconds",
            "Age of the oldest write that is not durable; 0 when all is.",
            age,
        );
        let help = "Versions that failed and are kept under .fsys/failed, as far as status remembers them.";
        self.gauge("fsys_failed_versions", help, s.failed.len());
        self.gauge("fsys_inodes", "Files and directories that the kernel knows.", s.inodes);
        self.gauge("fsys_open_handles", "Open descriptors.", s.handles);
        self.gauge("fsys_start_time_seconds", "When the daemon started, in seconds since 1970.", s.started_at);
    }

    fn config(&mut self, s: &Status) {
        let value =
            |key| s.settings.iter().find(|s| s.key == key).and_then(|s| s.value.parse::<u64>().ok()).unwrap_or(0);
        let interval = seconds(value("commit_interval_ms"), 1e3);
        self.gauge("fsys_commit_interval_seconds", "The bound commit_interval_ms.", interval);
        self.gauge("fsys_queue_limit", "The bound queue_max.", value("queue_max"));
        self.gauge("fsys_pending_limit", "The bound pending_max.", value("pending_max"));
        self.gauge("fsys_staging_limit_bytes", "The bound staging_max_bytes; 0: none.", value("staging_max_bytes"));
        let failed = u8::from(s.config.error.is_some());
        self.gauge("fsys_config_error", "1 when the configuration file was not valid when it was read again.", failed);
        let help = "When the configuration file was read last, in seconds since 1970.";
        self.gauge("fsys_config_read_time_seconds", help, s.config.read_at);
        self.gauge("fsys_runtime_changes", "Changes by fsys set that hold now.", s.config.changes.len());
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail, here and below.
        write!(self.0, "# HELP {name} {}\n# TYPE {name} {kind}\n", help.replace('\\', "\\\\")).unwrap_or_default();
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, "gauge", help);
        self.sample(name, "", value);
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        writeln!(self.0, "{name}{labels} {value}").unwrap_or_default();
    }

    fn buckets(&mut self, name: &str, labels: &str, b: &Buckets, unit: f64) {
        let comma = if labels.is_empty() { "" } else { "," };
        let bound = |le: &str| format!("{labels}{comma}le=\"{le}\"");
        for (le, count) in &b.upto {
            self.sample(&format!("{name}_bucket"), &bound(&seconds(*le, unit).to_string()), count);
        }
        self.sample(&format!("{name}_bucket"), &bound("+Inf"), b.count);
        self.sample(&format!("{name}_sum"), labels, seconds(b.sum, unit));
        self.sample(&format!("{name}_count"), labels, b.count);
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn seconds(n: u64, unit: f64) -> f64 {
    n as f64 / unit
}

fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Latency;

    fn histograms() -> Histograms {
        let l = Latency::default();
        [40, 1500, 99_000_000].iter().for_each(|us| l.record_value(*us));
        let commit = vec![("close".to_owned(), l.buckets(&TIME_BOUNDS_US))];
        Histograms { flush: l.buckets(&TIME_BOUNDS_US), commit, batch: l.buckets(&BATCH_BOUNDS) }
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let mut s = crate::mount::testing::status();
        s.mountpoint = "/a\"b\\c\n".into();
        s.counters.commits = 7;
        let text = render(&s, &histograms());
        for line in [
            "# TYPE fsys_commits_total counter",
            "fsys_commits_total 7",
            "# TYPE fsys_staged_bytes gauge",
            "fsys_health{state=\"healthy\"} 1",
            "fsys_health{state=\"read-only\"} 0",
            "fsys_flush_seconds_bucket{le=\"0.00005\"} 1",
            "fsys_flush_seconds_bucket{le=\"0.0025\"} 2",
            "fsys_commit_seconds_bucket{durability=\"close\",le=\"+Inf\"} 3",
            "fsys_commit_seconds_count{durability=\"close\"} 3",
            "fsys_flush_seconds_sum 99.00154",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(text.contains(r#"mountpoint="/a\"b\\c\n""#), "{text}");
        assert!(!text.contains("/data"), "no path of the backing directory");
    }

    fn families() -> Vec<(String, String, String)> {
        let text = render(&crate::mount::testing::status(), &histograms());
        let of = |head: &str| {
            let lines = text.lines().filter_map(|l| l.strip_prefix(head)?.split_once(' '));
            lines.map(|(name, rest)| (name.to_owned(), rest.to_owned())).collect::<Vec<_>>()
        };
        let (help, kinds) = (of("# HELP "), of("# TYPE "));
        assert_eq!(help.len(), kinds.len());
        help.into_iter().zip(kinds).map(|((name, help), (_, kind))| (name, kind, help)).collect()
    }

    fn contrib(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib").join(name)
    }

    /// The names of metrics in a text, without what Prometheus adds to those of histograms.
    fn named_in(text: &str) -> std::collections::BTreeSet<String> {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let bare =
            |w: &str| ["_bucket", "_sum", "_count"].iter().find_map(|s| w.strip_suffix(s)).unwrap_or(w).to_owned();
        words.filter(|w| w.starts_with("fsys_")).map(bare).collect()
    }

    /// `FSYS_BLESS=1 cargo test --lib metrics_md` writes the table.
    #[test]
    fn metrics_md_lists_every_metric() {
        let row = |(name, kind, help): &(String, String, String)| format!("| `{name}` | {kind} | {help} |\n");
        let table: String = families().iter().map(row).collect();
        let path = contrib("doc/METRICS.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (head, rest) = text.split_once("|---|---|---|\n").unwrap();
        let (old, tail) = rest.split_once("\n\n").unwrap_or((rest, ""));
        if std::env::var_os("FSYS_BLESS").is_some() {
            std::fs::write(&path, format!("{head}|---|---|---|\n{table}\n{tail}")).unwrap();
        } else {
            assert_eq!(format!("{old}\n"), table, "run it again with FSYS_BLESS=1, then look at the difference");
        }
    }

    #[test]
    fn rules_and_dashboard_name_what_is_exported() {
        let known: std::collections::BTreeSet<_> = families().into_iter().map(|f| f.0).collect();
        for file in ["prometheus/fsys.rules.yml", "grafana/fsys.json"] {
            let text = std::fs::read_to_string(contrib(file)).unwrap();
            let used = named_in(&text);
            assert!(used.len() > 5, "{file} was read: {used:?}");
            assert_eq!(used.difference(&known).collect::<Vec<_>>(), Vec::<&String>::new(), "{file}");
        }
        // The check can fail.
        assert!(
            !known.contains("fsys_bogus_total") && named_in("rate(fsys_bogus_total[5m])").contains("fsys_bogus_total")
        );
    }
}
