//! What `fsys status` and `fsys get` show.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::{Fs, Kind, Node, ROOT, plain};
use crate::telemetry::{PathReport, Status};

impl Fs {
    /// The state of the mount; `backing` and `mountpoint` as people know them.
    pub fn status(&self, backing: &Path, mountpoint: &Path) -> Status {
        let e = &self.engine;
        let config = e.config();
        let probe = e.backing.probe();
        let counters = e.counters.values();
        let failed = e.failed_versions();
        let read_only = e.read_only_reason();
        let (health, reason) = match (&read_only, counters.commit_failures) {
            (Some(why), _) => {
                ("read-only", format!("{why}: nothing more is written; what was acknowledged before stands"))
            }
            (None, _) if e.backing.refuses() => (
                "read-only",
                "the backing file system is read-only: saves are refused, what was saved before stands; see the \
                 kernel's log, repair it, then mount it and this again"
                    .into(),
            ),
            (None, 0) => ("healthy", String::new()),
            (None, n) => ("degraded", format!("{n} commits failed; the versions before them stand")),
        };
        let (inodes, handles) = self.counts();
        Status {
            health: health.into(),
            reason,
            backing: backing.display().to_string(),
            mountpoint: mountpoint.display().to_string(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            filesystem: probe.fs.clone(),
            flush_strategy: format!("{probe}, groups by {}", e.backing.parallel_by()),
            reflink: probe.reflink,
            policy: config.policies.base,
            rules: config.policies.rules.len(),
            settings: config.settings(),
            oldest_uncommitted_ms: e.oldest_uncommitted_ms(),
            ops_per_batch_x100: counters.batched_ops * 100 / counters.batches.max(1),
            commit_latency: e.commit_latency.summary(),
            flush_latency: e.flush_latency.summary(),
            no_passthrough: self.why_no_passthrough(),
            no_watch: self.why_no_watch(),
            counters,
            failed,
            inodes,
            handles,
        }
    }

    /// Policy and state of a path, relative to the root of the mount.
    pub fn report(&self, path: &Path) -> Result<PathReport, Errno> {
        if !plain(path) {
            return Err(Errno::INVAL);
        }
        let node = self.walk(path)?;
        let report = self.report_node(path, &node);
        self.forget(node.id, 1);
        report
    }

    /// The node of a path, counted.
    fn walk(&self, path: &Path) -> Result<Arc<Node>, Errno> {
        let mut node = self.node(ROOT)?;
        self.table.count(&node);
        for part in path.components() {
            let next = match &node.kind {
                Kind::Dir(d) => self.find(d, part.as_os_str()),
                _ => Err(Errno::NOTDIR),
            };
            self.forget(node.id, 1);
            node = next?;
        }
        Ok(node)
    }

    fn report_node(&self, path: &Path, node: &Node) -> Result<PathReport, Errno> {
        let config = self.engine.config();
        let (policy, from) = config.policies.explain(path);
        let default = |key: &str| config.sources.get(key).cloned().unwrap_or_else(|| "built-in default".into());
        let source = |rule: Option<usize>, key: &str| {
            let told = rule.and_then(|i| config.policies.rules.get(i));
            told.map_or_else(|| default(key), |r| format!("rule {:?} ({})", r.glob, r.source))
        };
        let origin = [
            ("mode", from.mode),
            ("durability", from.durability),
            ("method", from.method),
            ("restage_max_bytes", from.restage_max_bytes),
        ];
        let (state, uncommitted_ms) = match &node.kind {
            Kind::File(f) => {
                let st = f.state.read();
                let since = st.version.as_ref().map_or(0, |v| v.dirty_ms.load(Ordering::Relaxed));
                let age = if since == 0 { 0 } else { self.engine.now_ms().saturating_sub(since) };
                (st.phase.name(), age)
            }
            Kind::Dir(_) | Kind::Other(_) => ("not a file", 0),
        };
        Ok(PathReport {
            path: path.display().to_string(),
            policy,
            origin: origin.iter().map(|(k, rule)| ((*k).to_owned(), source(*rule, k))).collect(),
            state: state.into(),
            size: self.attr_of(node)?.stat.st_size as u64,
            uncommitted_ms,
        })
    }
}
