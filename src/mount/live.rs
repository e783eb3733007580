//! The configuration of a mount while it runs: its file read again, changes by `fsys set`.
//!
//! Invariants: a file or a change with an error changes nothing; what takes effect when mounting only keeps the value
//! that the mount was made with and is named; every change is logged.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::log;
use super::volume::Volume;
use crate::config::Config;
use crate::config::keys::{AT_MOUNT, Refused, Setting};
use crate::config::options::Options;
use crate::config::runtime::{Change, Changes};
use crate::error::{Error, Exit, Result};
use crate::telemetry::activity::Sample;
use crate::telemetry::{ConfigState, Status, prometheus};

/// What reading the file again brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// The file.
    pub file: String,
    /// The values that hold for the whole mount and are others now.
    pub changed: Vec<Setting>,
    /// Number of rules now.
    pub rules: usize,
    /// Values that take effect with the next mount.
    pub next_mount: Vec<Setting>,
}

/// The configuration of one mount.
pub struct Live {
    volume: Arc<dyn Volume>,
    options: Options,
    started: Instant,
    started_at: u64,
    state: Mutex<State>,
}

struct State {
    /// File and command line, as they were read last.
    loaded: Config,
    changes: Changes,
    read_at: u64,
    error: Option<String>,
    next_mount: Vec<Setting>,
}

impl Live {
    /// The configuration that `options` gave to `volume`.
    pub fn new(volume: Arc<dyn Volume>, options: Options, loaded: Config) -> Self {
        let changes = Changes::default();
        let state = State { loaded, changes, read_at: now(), error: None, next_mount: Vec::new() };
        Self { volume, options, started: Instant::now(), started_at: now(), state: Mutex::new(state) }
    }

    /// The mount.
    pub fn volume(&self) -> &Arc<dyn Volume> {
        &self.volume
    }

    /// The state of the mount and of its configuration.
    pub fn status(&self) -> Status {
        Status { config: self.state(), started_at: self.started_at, ..self.volume.status() }
    }

    /// The metrics, as Prometheus reads them.
    pub fn metrics(&self) -> String {
        prometheus::render(&self.status(), &self.volume.histograms())
    }

    /// Where the configuration wants them served.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.state.lock().loaded.service.metrics
    }

    /// What `fsys top` shows.
    pub fn sample(&self) -> Sample {
        let at_ms = self.started.elapsed().as_millis() as u64;
        let (histograms, activity) = (self.volume.histograms(), self.volume.activity());
        Sample { at_ms, status: self.status(), histograms, activity }
    }

    /// Where the configuration comes from, and what was changed since.
    pub fn state(&self) -> ConfigState {
        let state = self.state.lock();
        ConfigState {
            file: self.options.config_file.as_ref().map(|p| p.display().to_string()),
            read_at: state.read_at,
            error: state.error.clone(),
            next_mount: state.next_mount.clone(),
            changes: state.changes.list().to_vec(),
        }
    }

    /// Makes changes, all or none; `by` is who asked, for the log.
    ///
    /// # Errors
    /// No such key or value, or one that cannot change while mounted.
    pub fn set(&self, values: &[(String, String)], glob: Option<&str>, by: &str) -> Result<()> {
        let set = |changes: &mut Changes| {
            let mut all = values.iter().map(|(key, value)| (key, changes.set(Change::now(key, value, glob))));
            all.find_map(|(key, r)| r.err().map(|r| (key.clone(), r))).map_or(Ok(()), Err)
        };
        self.change(set)?;
        for (key, value) in values {
            tracing::info!(by, "{key} is set to {value}{}", paths(glob));
        }
        Ok(())
    }

    /// Makes those changes that differ from what the mount was made with; an equal one is no wish to change anything,
    /// since mount(8) gives all options of the fstab line.
    ///
    /// # Errors
    /// As [`Live::set`].
    pub fn remount(&self, values: &[(String, String)], by: &str) -> Result<()> {
        let made = self.state.lock().loaded.settings();
        let same = |key: &str, value: &str| made.iter().any(|s| s.key == key && s.value == value);
        let differ: Vec<_> = values.iter().filter(|(k, v)| !same(k, v)).cloned().collect();
        if differ.is_empty() { Ok(()) } else { self.set(&differ, None, by) }
    }

    /// Takes changes back, all or none; every change there is when `keys` is empty.
    ///
    /// # Errors
    /// One of them was not changed.
    pub fn unset(&self, keys: &[String], glob: Option<&str>, by: &str) -> Result<()> {
        let unset = |changes: &mut Changes| {
            if keys.is_empty() {
                changes.clear();
            }
            keys.iter().find_map(|k| changes.unset(k, glob).err().map(|r| (k.clone(), r))).map_or(Ok(()), Err)
        };
        self.change(unset)?;
        let what = if keys.is_empty() { "every value".to_owned() } else { keys.join(", ") };
        tracing::info!(by, "the runtime change of {what}{} is taken back", paths(glob));
        Ok(())
    }

    fn change(&self, f: impl FnOnce(&mut Changes) -> Result<(), (String, Refused)>) -> Result<()> {
        let mut state = self.state.lock();
        let mut changes = state.changes.clone();
        f(&mut changes)
            .and_then(|()| {
                let config = over(&state.loaded, &changes).map_err(|r| ("runtime change".to_owned(), r))?;
                self.apply(config);
                state.changes = changes;
                Ok(())
            })
            .map_err(|(key, r)| {
                let what = format!("`{key}` cannot be changed so");
                Error::new(Exit::Usage, what, r.why, "nothing was changed; the mount goes on as it was", r.action)
            })
    }

    /// Reads the configuration file again; `by` is who asked, for the log.
    ///
    /// # Errors
    /// There is none, or it is not valid: then nothing changes.
    pub fn reload(&self, by: &str) -> Result<Reloaded> {
        let result = self.read_again();
        match &result {
            Ok(r) => {
                let list =
                    |s: &[Setting]| s.iter().map(|s| format!("{}={}", s.key, s.value)).collect::<Vec<_>>().join(" ");
                tracing::info!(by, changed = list(&r.changed), rules = r.rules, "{} was read again", r.file);
                if !r.next_mount.is_empty() {
                    tracing::warn!("these values take effect with the next mount: {}", list(&r.next_mount));
                }
            }
            Err(e) => tracing::error!(by, "{e}"),
        }
        result
    }

    fn read_again(&self) -> Result<Reloaded> {
        let Some(file) = &self.options.config_file else { return Err(no_file()) };
        let mut state = self.state.lock();
        let read = self.options.config().and_then(|mut loaded| {
            let next_mount = keep_at_mount(&mut loaded, &state.loaded).map_err(not_kept)?;
            let config = over(&loaded, &state.changes).map_err(not_kept)?;
            Ok((loaded, config, next_mount))
        });
        let (loaded, config, next_mount) = match read {
            Ok(read) => read,
            Err(mut e) => {
                e.effect = "nothing was changed: the mount goes on with the configuration that it had".into();
                e.action += "; then `fsys reload`";
                state.error = Some(e.what.clone() + ": " + &e.why);
                return Err(e);
            }
        };
        let before = over(&state.loaded, &state.changes).map_err(not_kept)?.settings();
        let changed = config.settings().into_iter().zip(before).filter(|(new, old)| new.value != old.value);
        let changed = changed.map(|(new, _)| new).collect();
        let rules = config.policies.rules.len();
        self.apply(config);
        *state = State { loaded, changes: state.changes.clone(), read_at: now(), error: None, next_mount };
        let next_mount = state.next_mount.clone();
        Ok(Reloaded { file: file.display().to_string(), changed, rules, next_mount })
    }

    fn apply(&self, config: Config) {
        log::set_level(config.service.log);
        self.volume.configure(config);
    }
}

fn over(loaded: &Config, changes: &Changes) -> Result<Config, Refused> {
    let mut config = loaded.clone();
    changes.apply(&mut config)?;
    Ok(config)
}

/// Puts back what `new` cannot change while mounted; gives the values that `new` had.
fn keep_at_mount(new: &mut Config, old: &Config) -> Result<Vec<Setting>, Refused> {
    let mut differ = Vec::new();
    for (wanted, held) in new.settings().into_iter().zip(old.settings()) {
        if AT_MOUNT.contains(&wanted.key.as_str()) && wanted.value != held.value {
            new.set(&held.key, &held.value, &held.source)?;
            differ.push(wanted);
        }
    }
    Ok(differ)
}

fn paths(glob: Option<&str>) -> String {
    glob.map_or(String::new(), |g| format!(" for `{g}`"))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn not_kept(r: Refused) -> Error {
    Error::new(Exit::Internal, "the configuration cannot be changed", r.why, "nothing was changed", r.action)
}

fn no_file() -> Error {
    Error::new(
        Exit::Usage,
        "there is no configuration file to read again",
        "the mount was made without one",
        "nothing was changed",
        "mount with --config FILE, or change single values with `fsys set`",
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fake;
    use super::*;
    use crate::config::policy::Durability;

    fn live(text: &str) -> (tempfile::TempDir, Live) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fsys.toml");
        std::fs::write(&file, text).unwrap();
        let options = Options { config_file: Some(file), ..Options::default() };
        let config = options.config().unwrap();
        (dir, Live::new(Arc::new(Fake), options, config))
    }

    fn effective(live: &Live) -> Config {
        let state = live.state.lock();
        over(&state.loaded, &state.changes).unwrap()
    }

    #[test]
    fn a_file_with_an_error_changes_nothing_and_says_so() {
        let (dir, live) = live("durability = \"fsync\"\n");
        std::fs::write(dir.path().join("fsys.toml"), "durability = \"always\"\nmood = 1\n").unwrap();
        let e = live.reload("test").unwrap_err();
        assert!(e.what.contains("fsys.toml:2:1") && e.effect.contains("goes on") && e.action.contains("reload"), "{e}");
        assert_eq!(effective(&live).policies.base.durability, Durability::Fsync);
        assert!(live.status().config.error.unwrap().contains("fsys.toml:2:1"));
        std::fs::write(dir.path().join("fsys.toml"), "durability = \"always\"\n").unwrap();
        assert_eq!(live.reload("test").unwrap().changed[0].value, "always");
        assert_eq!(live.state().error, None);
    }

    #[test]
    fn what_needs_a_mount_is_named_and_kept() {
        let (dir, live) = live("[limits]\nthreads = 2\n");
        std::fs::write(dir.path().join("fsys.toml"), "[limits]\nthreads = 3\nwindow_us = 5\n").unwrap();
        let r = live.reload("test").unwrap();
        assert_eq!((r.next_mount[0].key.as_str(), r.next_mount[0].value.as_str()), ("threads", "3"));
        assert_eq!((r.changed.len(), r.changed[0].key.as_str()), (1, "window_us"));
        let now = effective(&live).limits;
        assert_eq!((now.threads, now.window_us), (2, 5));
        // Asked again, it is still to come.
        assert_eq!(live.reload("test").unwrap().next_mount, live.state().next_mount);
        assert_eq!(live.state().next_mount.len(), 1);
    }

    #[test]
    fn changes_are_all_or_none_and_survive_a_reload() {
        let (dir, live) = live("durability = \"fsync\"\n");
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let e = live.set(&[pair("durability", "always"), pair("window_us", "x")], None, "test").unwrap_err();
        assert!(e.what.contains("window_us") && live.state().changes.is_empty(), "{e}");
        live.set(&[pair("durability", "always"), pair("window_us", "9")], None, "test").unwrap();
        std::fs::write(dir.path().join("fsys.toml"), "durability = \"relaxed\"\n").unwrap();
        assert!(live.reload("test").unwrap().changed.is_empty(), "what is changed at run time stays");
        assert_eq!(effective(&live).policies.base.durability, Durability::Always);
        live.unset(&["durability".into()], None, "test").unwrap();
        assert_eq!(effective(&live).policies.base.durability, Durability::Relaxed);
        assert!(live.unset(&["durability".into()], None, "test").is_err());
        live.unset(&[], None, "test").unwrap();
        assert!(live.state().changes.is_empty());
    }

    #[test]
    fn a_remount_leaves_alone_what_is_as_it_was_mounted() {
        let (_dir, live) = live("durability = \"fsync\"\n[limits]\nthreads = 2\n");
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        live.set(&[pair("durability", "always")], None, "test").unwrap();
        live.remount(&[pair("durability", "fsync"), pair("threads", "2")], "test").unwrap();
        assert_eq!(
            effective(&live).policies.base.durability,
            Durability::Always,
            "changed at run time, as mounted in fstab"
        );
        live.remount(&[pair("durability", "relaxed")], "test").unwrap();
        assert_eq!(effective(&live).policies.base.durability, Durability::Relaxed);
        assert!(live.remount(&[pair("threads", "3")], "test").unwrap_err().why.contains("when mounting only"));
    }

    #[test]
    fn without_a_file_there_is_nothing_to_read() {
        let live = Live::new(Arc::new(Fake), Options::default(), Config::default());
        assert!(live.reload("test").unwrap_err().action.contains("fsys set"));
        assert_eq!(live.state().error, None);
    }
}
