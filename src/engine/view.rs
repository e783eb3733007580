//! What is not durable yet, for people to see.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Engine;
use super::file::{File, State};
use super::state::Phase;
use crate::telemetry::Uncommitted;

impl Engine {
    /// Age of the oldest change that is not durable, in milliseconds.
    pub fn oldest_uncommitted_ms(&self) -> u64 {
        let now = self.now_ms();
        self.unsettled_files().iter().map(|f| age(&f.state.read(), now)).max().unwrap_or(0)
    }

    /// The files with changes that are not durable, at most `max`, the oldest changes first.
    pub fn uncommitted(&self, max: usize) -> Vec<Uncommitted> {
        let now = self.now_ms();
        let aged = |f: Arc<File>| {
            let age = age(&f.state.read(), now);
            (age, f)
        };
        let mut aged: Vec<_> = self.unsettled_files().into_iter().map(aged).filter(|f| f.0 > 0).collect();
        aged.sort_by_key(|f| std::cmp::Reverse(f.0));
        aged.iter().take(max).filter_map(|(age_ms, f)| self.look_at(f, *age_ms)).collect()
    }

    fn look_at(&self, file: &File, age_ms: u64) -> Option<Uncommitted> {
        let st = file.state.read();
        let version = st.version.as_ref()?;
        let idle_ms = self.now_ms().saturating_sub(version.last_write_ms.load(Ordering::Relaxed));
        Some(Uncommitted {
            path: st.names.first().map_or_else(String::new, |p| p.path().display().to_string()),
            state: state_name(&st).to_owned(),
            bytes: version.accounted.load(Ordering::Relaxed),
            age_ms,
            idle_ms,
            writers: st.writers,
        })
    }

    /// State, and what is not durable, of one file.
    pub fn describe(&self, file: &File) -> (&'static str, Option<Uncommitted>) {
        let (name, age) = {
            let st = file.state.read();
            (state_name(&st), age(&st, self.now_ms()))
        };
        (name, if age > 0 { self.look_at(file, age) } else { None })
    }
}

fn age(st: &State, now: u64) -> u64 {
    let since = st.version.as_ref().map_or(0, |v| v.dirty_ms.load(Ordering::Relaxed));
    // At least 1: there is something.
    if since == 0 { 0 } else { now.saturating_sub(since).max(1) }
}

fn state_name(st: &State) -> &'static str {
    let dirty = st.version.as_ref().is_some_and(|v| v.dirty_ms.load(Ordering::Relaxed) != 0);
    match st.phase {
        Phase::Clean if dirty => "written in place, not synced",
        Phase::Clean if st.id.is_some() => "committed",
        phase => phase.name(),
    }
}
