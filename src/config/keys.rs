//! The values by name: one table for the file, the command line and what is shown.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Config;
use super::policy::{Durability, Method, Policies, Policy, Rule, WriteMode};

/// Names of the values of a policy.
pub const POLICY: [&str; 4] = ["mode", "durability", "method", "restage_max_bytes"];

/// Names of the limits, and of what can be switched off.
pub const LIMITS: [&str; 11] = [
    "window_us",
    "batch_max",
    "queue_max",
    "commit_interval_ms",
    "pending_max",
    "staging_max_bytes",
    "cache_ms",
    "threads",
    "slow_commit_ms",
    "passthrough",
    "watch_backing",
];

/// Those of them that are `auto` or `off`.
const SWITCHES: [&str; 2] = ["passthrough", "watch_backing"];

/// Names of the values that concern the daemon itself.
pub const SERVICE: [&str; 6] = ["log", "log_format", "xattr_policy", "metrics", "metrics_remote", "transport"];

/// Names of the values that take effect when mounting only; every other can change at run time.
pub const AT_MOUNT: [&str; 10] = [
    "batch_max",
    "queue_max",
    "cache_ms",
    "threads",
    "passthrough",
    "watch_backing",
    "log_format",
    "metrics",
    "metrics_remote",
    "transport",
];

/// All names.
pub fn all() -> impl Iterator<Item = &'static str> {
    POLICY.into_iter().chain(LIMITS).chain(SERVICE)
}

/// Where a value comes from that nobody set.
pub const BUILT_IN: &str = "built-in default";

/// Why a value was not taken, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub why: String,
    /// What to do.
    pub action: String,
}

impl Refused {
    fn new(why: String, action: impl Into<String>) -> Self {
        Self { why, action: action.into() }
    }

    /// `name` is none of `known`; names the nearest one that is.
    pub fn unknown<'a>(kind: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<_> = known.into_iter().collect();
        let best = known
            .iter()
            .map(|k| (strsim::jaro_winkler(name, k), *k))
            .filter(|(score, _)| *score > 0.8)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let action = match best {
            Some((_, near)) => format!("did you mean `{near}`?"),
            None => format!("known: {}", known.join(", ")),
        };
        Self::new(format!("unknown {kind} `{name}`"), action)
    }
}

/// One value of a policy.
enum Value {
    Mode(WriteMode),
    Durability(Durability),
    Method(Method),
    Restage(u64),
}

fn policy_value(key: &str, value: &str) -> Result<Value, Refused> {
    Ok(match key {
        "mode" => Value::Mode(word(key, value)?),
        "durability" => Value::Durability(word(key, value)?),
        "method" => Value::Method(word(key, value)?),
        "restage_max_bytes" => Value::Restage(number(key, value, 0..=u64::MAX)?),
        _ => return Err(Refused::unknown("key", key, POLICY)),
    })
}

fn word<T: ValueEnum>(key: &str, value: &str) -> Result<T, Refused> {
    T::from_str(value, false).map_err(|_| {
        let known: Vec<_> = T::value_variants().iter().map(name_of).collect();
        Refused::new(format!("`{value}` is no value of `{key}`"), format!("use one of: {}", known.join(", ")))
    })
}

fn number<T: TryFrom<u64>>(key: &str, value: &str, range: RangeInclusive<u64>) -> Result<T, Refused> {
    let refused = || {
        let (low, high) = range.clone().into_inner();
        Refused::new(
            format!("`{value}` is no value of `{key}`"),
            format!(
                "use a whole number, {}",
                if high == u64::MAX { format!("at least {low}") } else { format!("{low} to {high}") }
            ),
        )
    };
    let n = value.parse().ok().filter(|n| range.contains(n)).ok_or_else(refused)?;
    T::try_from(n).map_err(|_| refused())
}

/// `auto`: where it can be done.
fn switch(key: &str, value: &str) -> Result<bool, Refused> {
    match value {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err(Refused::new(format!("`{value}` is no value of `{key}`"), "use one of: auto, off")),
    }
}

/// The word that stands for a value in files and options.
pub fn name_of<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
}

fn flag(key: &str, value: &str) -> Result<bool, Refused> {
    value.parse().map_err(|_| Refused::new(format!("`{value}` is no value of `{key}`"), "use true or false"))
}

/// An address and a port; `off` for none.
fn address(key: &str, value: &str) -> Result<Option<SocketAddr>, Refused> {
    if value == "off" {
        return Ok(None);
    }
    let refused = |_| {
        let why = format!("`{value}` is no value of `{key}`");
        Refused::new(why, "use an address and a port, for example 127.0.0.1:9469, or off")
    };
    value.parse().map(Some).map_err(refused)
}

/// True for keys whose value is true or false.
pub fn is_flag(key: &str) -> bool {
    matches!(key, "xattr_policy" | "metrics_remote")
}

/// True for keys whose value is a number.
pub fn is_number(key: &str) -> bool {
    key == "restage_max_bytes" || (LIMITS.contains(&key) && !SWITCHES.contains(&key))
}

impl Policy {
    /// Sets a value by its name.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Refused> {
        match policy_value(key, value)? {
            Value::Mode(v) => self.mode = v,
            Value::Durability(v) => self.durability = v,
            Value::Method(v) => self.method = v,
            Value::Restage(v) => self.restage_max_bytes = v,
        }
        Ok(())
    }

    /// The values by name, in the order of [`POLICY`].
    pub fn values(&self) -> [(&'static str, String); 4] {
        [
            ("mode", name_of(&self.mode)),
            ("durability", name_of(&self.durability)),
            ("method", name_of(&self.method)),
            ("restage_max_bytes", self.restage_max_bytes.to_string()),
        ]
    }
}

impl Rule {
    /// Sets a value by its name.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Refused> {
        match policy_value(key, value)? {
            Value::Mode(v) => self.mode = Some(v),
            Value::Durability(v) => self.durability = Some(v),
            Value::Method(v) => self.method = Some(v),
            Value::Restage(v) => self.restage_max_bytes = Some(v),
        }
        Ok(())
    }

    /// The values that it sets, by name, in the order of [`POLICY`].
    pub fn values(&self) -> Vec<(&'static str, String)> {
        let all = [
            ("mode", self.mode.as_ref().map(name_of)),
            ("durability", self.durability.as_ref().map(name_of)),
            ("method", self.method.as_ref().map(name_of)),
            ("restage_max_bytes", self.restage_max_bytes.map(|n| n.to_string())),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

/// A value, by name, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Name.
    pub key: String,
    /// Value.
    pub value: String,
    /// Source: `built-in default`, `/etc/fsys.toml:3`, `command line`.
    pub source: String,
}

impl Policies {
    /// Whether the values go together: method `journal` is the flush of the log that write mode `journal` has, and no
    /// other mode has one. Where rules overlap so that both meet for a path all the same, it means `auto` there.
    pub fn check(&self) -> Result<(), Refused> {
        let base = self.base.mode == WriteMode::Journal;
        let fits = |mode: Option<WriteMode>, method: Method| {
            method != Method::Journal || mode.map_or(base, |m| m == WriteMode::Journal)
        };
        let refused = |who: String| {
            let action = "set mode = \"journal\" with it, or use method sync, data, direct or auto";
            Err(Refused::new(
                format!("{who} method `journal`, but not write mode `journal`, which it belongs to"),
                action,
            ))
        };
        if !fits(None, self.base.method) {
            return refused("the policy has".into());
        }
        match self.rules.iter().find(|r| !fits(r.mode, r.method.unwrap_or(self.base.method))) {
            Some(r) => refused(format!("the rule `{}` ({}) has", r.glob, r.source)),
            None => Ok(()),
        }
    }
}

impl Config {
    /// Sets a value that holds for the whole mount, or one of the base policy, by its name; `source` says who did.
    pub fn set(&mut self, key: &str, value: &str, source: &str) -> Result<(), Refused> {
        let Some(name) = all().find(|k| *k == key) else {
            return Err(Refused::unknown("key", key, all()));
        };
        if POLICY.contains(&name) {
            self.policies.base.set(key, value)?;
        } else if SERVICE.contains(&name) {
            self.set_service(key, value)?;
        } else {
            self.set_limit(key, value)?;
        }
        self.sources.insert(name, source.to_owned());
        Ok(())
    }

    fn set_limit(&mut self, key: &str, value: &str) -> Result<(), Refused> {
        const HOUR_MS: u64 = 3_600_000;
        let l = &mut self.limits;
        match key {
            "window_us" => l.window_us = number(key, value, 0..=1_000_000)?,
            "batch_max" => l.batch_max = number(key, value, 1..=65_536)?,
            "queue_max" => l.queue_max = number(key, value, 1..=1_048_576)?,
            "commit_interval_ms" => l.commit_interval_ms = number(key, value, 1..=HOUR_MS)?,
            "pending_max" => l.pending_max = number(key, value, 1..=1_048_576)?,
            "staging_max_bytes" => l.staging_max_bytes = number(key, value, 0..=u64::MAX)?,
            "cache_ms" => l.cache_ms = number(key, value, 0..=24 * HOUR_MS)?,
            "threads" => l.threads = number(key, value, 1..=256)?,
            "slow_commit_ms" => l.slow_commit_ms = number(key, value, 0..=HOUR_MS)?,
            "passthrough" => l.passthrough = switch(key, value)?,
            "watch_backing" => l.watch_backing = switch(key, value)?,
            _ => return Err(Refused::unknown("key", key, LIMITS)),
        }
        Ok(())
    }

    fn set_service(&mut self, key: &str, value: &str) -> Result<(), Refused> {
        let s = &mut self.service;
        match key {
            "log" => s.log = word(key, value)?,
            "log_format" => s.log_format = word(key, value)?,
            "xattr_policy" => s.xattr_policy = flag(key, value)?,
            "metrics" => s.metrics = address(key, value)?,
            "metrics_remote" => s.metrics_remote = flag(key, value)?,
            "transport" => s.transport = word(key, value)?,
            _ => return Err(Refused::unknown("key", key, SERVICE)),
        }
        Ok(())
    }

    /// What no single value can tell: metrics are for this machine unless it is said otherwise.
    pub fn check(&self) -> Result<(), Refused> {
        match self.service.metrics {
            Some(at) if !at.ip().is_loopback() && !self.service.metrics_remote => Err(Refused::new(
                format!("`metrics` is {at} ({}), which other machines reach", self.source("metrics")),
                "use 127.0.0.1, or set metrics_remote to true as well",
            )),
            _ => Ok(()),
        }
    }

    /// Where the value of `key` comes from.
    pub fn source(&self, key: &str) -> &str {
        self.sources.get(key).map_or(BUILT_IN, String::as_str)
    }

    /// Every value that holds for the whole mount and every one of the base policy, with its source.
    pub fn settings(&self) -> Vec<Setting> {
        let l = &self.limits;
        let limits = [
            l.window_us,
            l.batch_max as u64,
            l.queue_max as u64,
            l.commit_interval_ms,
            l.pending_max as u64,
            l.staging_max_bytes,
            l.cache_ms,
            l.threads as u64,
            l.slow_commit_ms,
        ];
        let switches = [l.passthrough, l.watch_backing].map(|on| if on { "auto" } else { "off" });
        let limits = limits.into_iter().map(|n| n.to_string()).chain(switches.map(str::to_owned));
        let s = &self.service;
        let service = [
            name_of(&s.log),
            name_of(&s.log_format),
            s.xattr_policy.to_string(),
            s.metrics.map_or_else(|| "off".to_owned(), |a| a.to_string()),
            s.metrics_remote.to_string(),
            name_of(&s.transport),
        ];
        let values = self.policies.base.values().into_iter().chain(LIMITS.into_iter().zip(limits));
        let all = values.chain(SERVICE.into_iter().zip(service));
        all.map(|(key, value)| Setting { key: key.to_owned(), value, source: self.source(key).to_owned() }).collect()
    }

    /// The policy of `path`, relative to the root of the mount, and for each value its name and where it comes
    /// from: a rule, the file's `own`, or the source of the base value.
    pub fn explain(&self, path: &Path, own: Option<&Rule>) -> (Policy, Vec<(String, String)>) {
        let (policy, from) = self.policies.explain(path, own);
        let source = |(key, rule): (&str, Option<&Rule>)| {
            let source = match rule {
                Some(r) if r.glob.is_empty() => r.source.clone(),
                Some(r) => format!("rule `{}` ({})", r.glob, r.source),
                None => self.source(key).to_owned(),
            };
            (key.to_owned(), source)
        };
        let rules = [from.mode, from.durability, from.method, from.restage_max_bytes];
        (policy, POLICY.into_iter().zip(rules).map(source).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_can_be_set_and_shown() {
        let mut c = Config::default();
        for key in all() {
            assert_eq!(c.source(key), BUILT_IN);
            let value = match key {
                key if is_number(key) => "7",
                key if is_flag(key) => "true",
                "durability" => "relaxed",
                "log" => "debug",
                "log_format" => "json",
                "metrics" => "[::1]:9469",
                _ => "auto",
            };
            c.set(key, value, "test").unwrap();
            let shown = c.settings().into_iter().find(|s| s.key == key).unwrap();
            assert_eq!((shown.value.as_str(), shown.source.as_str()), (value, "test"));
        }
        assert_eq!(c.settings().len(), all().count());
        assert!(AT_MOUNT.into_iter().all(|k| all().any(|known| known == k)));
    }

    #[test]
    fn metrics_are_for_this_machine_unless_said_otherwise() {
        let mut c = Config::default();
        for (address, ok) in [("127.0.0.1:1", true), ("[::1]:1", true), ("0.0.0.0:1", false), ("192.0.2.1:1", false)] {
            c.set("metrics", address, "test").unwrap();
            assert_eq!(c.check().is_ok(), ok, "{address}");
        }
        c.set("metrics_remote", "true", "test").unwrap();
        c.check().unwrap();
    }

    #[test]
    fn explains_where_each_value_comes_from() {
        let mut c = Config::default();
        c.set("durability", "always", "command line").unwrap();
        let mut rule = Rule::new("*.db", "/etc/x.toml:7").unwrap();
        rule.set("mode", "in-place").unwrap();
        c.policies.rules.push(rule);
        let (policy, origin) = c.explain(Path::new("a/b.db"), None);
        assert_eq!((policy.mode, policy.durability), (WriteMode::InPlace, Durability::Always));
        let sources: Vec<_> = origin.iter().map(|(_, source)| source.as_str()).collect();
        assert_eq!(sources, ["rule `*.db` (/etc/x.toml:7)", "command line", BUILT_IN, BUILT_IN]);
        assert_eq!(c.explain(Path::new("b"), None).1[0], ("mode".to_owned(), BUILT_IN.to_owned()));
    }

    #[test]
    fn method_journal_goes_with_its_mode_alone() {
        let with = |base: &[(&str, &str)], rule: &[(&str, &str)]| {
            let mut c = Config::default();
            base.iter().for_each(|(k, v)| c.set(k, v, "test").unwrap());
            let mut r = Rule::new("*.db", "/etc/x.toml:7").unwrap();
            rule.iter().for_each(|(k, v)| r.set(k, v).unwrap());
            c.policies.rules.push(r);
            c.policies.check().map_err(|r| r.why)
        };
        let (mode, method, other) = (("mode", "journal"), ("method", "journal"), ("mode", "replace"));
        for (base, rule) in
            [(&[][..], &[mode, method][..]), (&[mode, method], &[]), (&[mode], &[method]), (&[], &[mode])]
        {
            assert_eq!(with(base, rule), Ok(()), "{base:?} {rule:?}");
        }
        assert!(with(&[method], &[]).unwrap_err().starts_with("the policy has"));
        for (base, rule) in [(&[][..], &[method][..]), (&[mode], &[other, method]), (&[mode, method], &[other])] {
            assert!(with(base, rule).unwrap_err().contains("`*.db` (/etc/x.toml:7)"), "{base:?} {rule:?}");
        }
    }

    #[test]
    fn refuses_with_the_remedy() {
        let mut c = Config::default();
        let mut refused = |k: &str, v: &str| c.set(k, v, "test").unwrap_err();
        assert_eq!(refused("durabilty", "close").action, "did you mean `durability`?");
        assert!(refused("zzz", "1").action.starts_with("known: mode,"));
        assert!(refused("durability", "sometimes").action.contains("always, close, fsync, relaxed"));
        assert!(refused("batch_max", "0").action.contains("1 to 65536"));
        assert!(refused("window_us", "-1").why.contains("`-1`"));
        assert_eq!(refused("passthrough", "on").action, "use one of: auto, off");
        assert!(refused("log", "loud").action.contains("error, warn"));
        assert!(refused("xattr_policy", "yes").action.contains("true or false"));
        assert!(refused("metrics", "9469").action.contains("127.0.0.1:9469"));
        assert!(refused("mode", "journaled").action.contains("journal"));
        assert!(c.sources.is_empty() && c.limits == super::super::Limits::default());
    }
}
