//! Changes at run time, by `fsys set`: they win over every other source, and end with the mount. Pure.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Config;
use super::keys::{AT_MOUNT, POLICY, Refused, all};
use super::policy::Rule;

/// Where a value comes from that was set at run time.
pub const RUNTIME: &str = "runtime change";

/// Changes that are kept at the same time.
const CHANGES_MAX: usize = 256;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Name of the value.
    pub key: String,
    /// The value.
    pub value: String,
    /// The paths that it holds for; `None`: all, and the whole mount for what is no policy.
    #[serde(rename = "match")]
    pub glob: Option<String>,
    /// When it was made, in seconds since 1970.
    pub at: u64,
}

impl Change {
    /// A change that is made now.
    pub fn now(key: &str, value: &str, glob: Option<&str>) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self { key: key.to_owned(), value: value.to_owned(), glob: glob.map(str::to_owned), at }
    }

    fn is_about(&self, key: &str, glob: Option<&str>) -> bool {
        self.key == key && self.glob.as_deref() == glob
    }
}

/// All changes, in the order in which they were made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes(Vec<Change>);

impl Changes {
    /// The changes, oldest first.
    pub fn list(&self) -> &[Change] {
        &self.0
    }

    /// Makes a change; one of the same value for the same paths is forgotten.
    ///
    /// # Errors
    /// No such key or value, or one that cannot change while mounted.
    pub fn set(&mut self, change: Change) -> Result<(), Refused> {
        check(&change)?;
        self.0.retain(|c| !c.is_about(&change.key, change.glob.as_deref()));
        if self.0.len() >= CHANGES_MAX {
            let why = format!("there are {CHANGES_MAX} runtime changes already");
            return Err(Refused { why, action: "take some back (`fsys set --unset`), or use the file".into() });
        }
        self.0.push(change);
        Ok(())
    }

    /// Takes a change back.
    ///
    /// # Errors
    /// There is none of that value for these paths.
    pub fn unset(&mut self, key: &str, glob: Option<&str>) -> Result<(), Refused> {
        let before = self.0.len();
        self.0.retain(|c| !c.is_about(key, glob));
        if self.0.len() < before {
            return Ok(());
        }
        let of = glob.map_or(String::new(), |g| format!(" for `{g}`"));
        let why = format!("`{key}` has no runtime change{of}");
        Err(Refused { why, action: "`fsys set --list` shows the changes".into() })
    }

    /// Forgets all changes.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Lays the changes over `config`.
    ///
    /// # Errors
    /// As [`Changes::set`]; never for changes that were taken by it.
    pub fn apply(&self, config: &mut Config) -> Result<(), Refused> {
        for c in &self.0 {
            if c.glob.is_none() {
                config.set(&c.key, &c.value, RUNTIME)?;
            }
            if POLICY.contains(&c.key.as_str()) {
                config.policies.forced.push(rule(c)?);
            }
        }
        Ok(())
    }
}

fn check(c: &Change) -> Result<(), Refused> {
    let key = c.key.as_str();
    if AT_MOUNT.contains(&key) {
        let why = format!("`{key}` takes effect when mounting only");
        return Err(Refused { why, action: "set it in the configuration file or with -o, then mount again".into() });
    }
    if c.glob.is_some() && !POLICY.contains(&key) && all().any(|k| k == key) {
        let why = format!("`{key}` holds for the whole mount, not for some paths");
        return Err(Refused { why, action: "leave --match out".into() });
    }
    if c.glob.is_some() { rule(c).map(|_| ()) } else { Config::default().set(key, &c.value, RUNTIME) }
}

fn rule(c: &Change) -> Result<Rule, Refused> {
    let mut rule = match &c.glob {
        Some(glob) => {
            Rule::new(glob, RUNTIME).map_err(|e| Refused { why: e.to_string(), action: "correct the glob".into() })?
        }
        None => Rule::everywhere(RUNTIME),
    };
    rule.set(&c.key, &c.value)?;
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::policy::Durability;

    fn made(changes: &[(&str, &str, Option<&str>)]) -> Changes {
        let mut all = Changes::default();
        changes.iter().for_each(|(k, v, g)| all.set(Change::now(k, v, *g)).unwrap());
        all
    }

    fn durability(changes: &Changes, path: &str) -> Durability {
        let mut config = Config::default();
        let mut rule = Rule::new("*.db", "file").unwrap();
        rule.set("durability", "fsync").unwrap();
        config.policies.rules.push(rule);
        changes.apply(&mut config).unwrap();
        config.policies.resolve(Path::new(path)).durability
    }

    #[test]
    fn wins_over_rules_and_the_later_change_wins() {
        let mut c = made(&[("durability", "always", None), ("durability", "relaxed", Some("tmp/**"))]);
        assert_eq!(durability(&c, "a.db"), Durability::Always);
        assert_eq!(durability(&c, "tmp/a.db"), Durability::Relaxed);
        c.set(Change::now("durability", "close", None)).unwrap();
        assert_eq!(durability(&c, "tmp/a.db"), Durability::Close);
        assert_eq!(c.list().len(), 2, "the second change of the same value replaces the first");
    }

    #[test]
    fn taking_back_restores_what_was() {
        let mut c = made(&[("durability", "always", None), ("window_us", "77", None)]);
        let mut config = Config::default();
        c.apply(&mut config).unwrap();
        assert_eq!((config.limits.window_us, config.source("window_us")), (77, RUNTIME));
        c.unset("durability", None).unwrap();
        assert_eq!(durability(&c, "a.db"), Durability::Fsync);
        assert!(c.unset("durability", None).unwrap_err().why.contains("no runtime change"));
        assert!(c.unset("window_us", Some("*")).unwrap_err().why.contains("for `*`"));
        c.clear();
        assert_eq!(c, Changes::default());
    }

    #[test]
    fn refuses_what_cannot_be() {
        let mut c = Changes::default();
        let mut why = |k: &str, v: &str, g| c.set(Change::now(k, v, g)).unwrap_err();
        assert!(why("threads", "3", None).why.contains("when mounting only"));
        assert!(why("window_us", "3", Some("*")).action.contains("--match"));
        assert!(why("durability", "often", Some("*")).action.contains("always, close"));
        assert!(why("durability", "close", Some("a[")).why.contains("unclosed"));
        assert_eq!(why("durabilty", "close", Some("a")).action, "did you mean `durability`?");
        assert_eq!(why("durabilty", "close", None).action, "did you mean `durability`?");
        for i in 0..CHANGES_MAX {
            c.set(Change::now("mode", "auto", Some(&format!("{i}")))).unwrap();
        }
        assert!(c.set(Change::now("mode", "auto", None)).unwrap_err().why.contains("already"));
    }
}
