//! What `fsys status` and `fsys get` show.

use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Fs, Kind, Node, ROOT, plain};
use crate::telemetry::{PathReport, Status};

/// Files that the status names.
const SHOWN: usize = 20;

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
            // Filled in by whoever chose it.
            transport: String::new(),
            filesystem: probe.fs.clone(),
            flush_strategy: format!("{probe}, groups by {}", e.backing.parallel_by()),
            reflink: probe.reflink,
            policy: config.policies.base,
            rules: config.policies.rules.len(),
            settings: config.settings(),
            uncommitted: e.uncommitted(SHOWN),
            // The life cycle knows these.
            device: String::new(),
            config: crate::telemetry::ConfigState::default(),
            started_at: 0,
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
        let own = self.own_policy(&config, node);
        let (policy, origin) = config.explain(path, own.as_deref());
        let (state, uncommitted) = match &node.kind {
            Kind::File(f) => self.engine.describe(f),
            Kind::Dir(_) | Kind::Other(_) => ("not a file", None),
        };
        let (committed_at, opens) = node.file().map_or((None, 0), |f| {
            let st = f.state.read();
            (st.ctime.as_ref().map(|c| c.real.0), st.opens)
        });
        Ok(PathReport {
            path: path.display().to_string(),
            policy,
            origin,
            state: state.into(),
            size: self.attr_of(node)?.stat.st_size as u64,
            uncommitted,
            committed_at,
            opens,
        })
    }
}
