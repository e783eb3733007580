//! The configuration file: TOML to [`Config`].
//!
//! ```toml
//! durability = "close"          # policy outside all rules
//!
//! [limits]
//! commit_interval_ms = 2000
//!
//! [[rule]]                      # in order; the last match that sets a value wins
//! match = "*.db"
//! mode = "in-place"
//! ```

use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Config;
use super::keys::{LIMITS, POLICY, Refused, SERVICE, is_flag, is_number};
use super::policy::Rule;
use crate::error::{Error, Exit, Result};

/// Reads the file at `path` over what is in `config`.
pub fn load(path: &Path, config: &mut Config) -> Result<()> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::new(
            Exit::Usage,
            format!("cannot read the configuration file {}", path.display()),
            e,
            "nothing was mounted",
            "check the path and its permissions, or leave the option `config` out",
        )
    })?;
    parse(&text, &path.display().to_string(), config)
}

/// Reads `text` over what is in `config`; `name` stands for the file in messages and sources.
pub fn parse(text: &str, name: &str, config: &mut Config) -> Result<()> {
    let file = File { text, name };
    let table = DeTable::parse(text).map_err(|e| {
        let refused = Refused { why: e.message().to_owned(), action: "correct the TOML there".into() };
        file.error(e.span().unwrap_or_default(), refused)
    })?;
    for (key, value) in table.get_ref() {
        match key.get_ref().as_ref() {
            "limits" => file.limits(value, config)?,
            "rule" => file.rules(value, config)?,
            name if POLICY.contains(&name) || SERVICE.contains(&name) => file.set(key.span(), name, value, config)?,
            name => {
                let known = POLICY.into_iter().chain(SERVICE).chain(["limits", "rule"]);
                let mut refused = Refused::unknown("key", name, known);
                if LIMITS.contains(&name) {
                    refused.action = format!("put `{name}` under [limits]");
                }
                return Err(file.error(key.span(), refused));
            }
        }
    }
    Ok(())
}

struct File<'a> {
    text: &'a str,
    name: &'a str,
}

type Value<'a> = Spanned<DeValue<'a>>;

impl File<'_> {
    fn limits(&self, value: &Value, config: &mut Config) -> Result<()> {
        let table = self.table("limits", value)?;
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            if !LIMITS.contains(&name) {
                return Err(self.error(key.span(), Refused::unknown("key", name, LIMITS)));
            }
            self.set(key.span(), name, value, config)?;
        }
        Ok(())
    }

    fn rules(&self, value: &Value, config: &mut Config) -> Result<()> {
        let rules = value.get_ref().as_array().ok_or_else(|| self.wrong_type("rule", "[[rule]]", value))?;
        for rule in rules {
            config.policies.rules.push(self.rule(rule)?);
        }
        Ok(())
    }

    fn rule(&self, value: &Value) -> Result<Rule> {
        let table = self.table("rule", value)?;
        let Some(glob) = table.get("match") else {
            let why = "the rule has no `match`".to_owned();
            return Err(self.error(value.span(), Refused { why, action: "add match = \"GLOB\"".into() }));
        };
        let pattern = self.text("match", glob)?;
        let mut rule = Rule::new(&pattern, &self.source(value.span()))
            .map_err(|e| self.error(glob.span(), Refused { why: e.to_string(), action: "correct the glob".into() }))?;
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "match" => {}
                name if POLICY.contains(&name) => {
                    rule.set(name, &self.text(name, value)?).map_err(|r| self.error(value.span(), r))?;
                }
                name => {
                    let known = POLICY.into_iter().chain(["match"]);
                    return Err(self.error(key.span(), Refused::unknown("key", name, known)));
                }
            }
        }
        Ok(rule)
    }

    fn set(&self, at: Range<usize>, name: &str, value: &Value, config: &mut Config) -> Result<()> {
        let text = self.text(name, value)?;
        config.set(name, &text, &self.source(at)).map_err(|r| self.error(value.span(), r))
    }

    /// The value as the text that an option would have.
    fn text(&self, key: &str, value: &Value) -> Result<String> {
        let text = match value.get_ref() {
            DeValue::String(s) if !is_number(key) && !is_flag(key) => Some(s.clone().into_owned()),
            DeValue::Boolean(b) if is_flag(key) => Some(b.to_string()),
            DeValue::Integer(i) if is_number(key) => {
                i128::from_str_radix(i.as_str(), i.radix()).ok().map(|n| n.to_string())
            }
            _ => None,
        };
        let wanted = match key {
            key if is_number(key) => "a whole number",
            key if is_flag(key) => "true or false",
            _ => "a string",
        };
        text.ok_or_else(|| self.wrong_type(key, wanted, value))
    }

    fn table<'v, 't>(&self, key: &str, value: &'v Value<'t>) -> Result<&'v DeTable<'t>> {
        value.get_ref().as_table().ok_or_else(|| self.wrong_type(key, "a table", value))
    }

    fn wrong_type(&self, key: &str, wanted: &str, value: &Value) -> Error {
        let why = format!("`{key}` is of type {}", value.get_ref().type_str());
        self.error(value.span(), Refused { why, action: format!("give {wanted}") })
    }

    fn error(&self, at: Range<usize>, refused: Refused) -> Error {
        let (line, column) = self.place(at.start);
        Error::new(
            Exit::Usage,
            format!("{}:{line}:{column}: the configuration is not valid", self.name),
            refused.why,
            "nothing was mounted, nothing was changed",
            refused.action,
        )
    }

    fn source(&self, at: Range<usize>) -> String {
        format!("{}:{}", self.name, self.place(at.start).0)
    }

    /// Line and column, from 1, in characters.
    fn place(&self, offset: usize) -> (usize, usize) {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::policy::{Durability, WriteMode};

    fn read(text: &str) -> Result<Config> {
        let mut config = Config::default();
        parse(text, "/etc/x.toml", &mut config).map(|()| config)
    }

    #[test]
    fn values_rules_and_their_sources() {
        let text = "mode = \"replace\"\n\n[limits]\nwindow_us = 2_000\n\n[[rule]]\nmatch = \"*.db\"\nmode = \"in-place\"\n\
                    [[rule]]\nmatch = \"/tmp/**\"\ndurability = \"relaxed\"\nrestage_max_bytes = 0x10\n";
        let c = read(text).unwrap();
        assert_eq!(c.policies.base.mode, WriteMode::Replace);
        assert_eq!((c.source("mode"), c.source("window_us")), ("/etc/x.toml:1", "/etc/x.toml:4"));
        assert_eq!((c.limits.window_us, c.source("threads")), (2000, "built-in default"));
        let globs: Vec<_> = c.policies.rules.iter().map(|r| (r.glob.as_str(), r.source.as_str())).collect();
        assert_eq!(globs, [("*.db", "/etc/x.toml:6"), ("/tmp/**", "/etc/x.toml:9")]);
        let p = c.policies.resolve(Path::new("tmp/a.db"));
        assert_eq!((p.mode, p.durability, p.restage_max_bytes), (WriteMode::InPlace, Durability::Relaxed, 16));
    }

    #[test]
    fn errors_name_line_column_and_remedy() {
        for (text, place, why, action) in [
            ("mode = 3", ":1:8:", "`mode` is of type integer", "give a string"),
            ("transport = \"pigeon\"", ":1:13:", "`pigeon` is no value", "auto, fuser, io-uring"),
            ("\n  mood = \"auto\"", ":2:3:", "unknown key `mood`", "did you mean `mode`?"),
            ("xattr_policy = \"true\"", ":1:16:", "is of type string", "true or false"),
            ("metrics = \"9469\"", ":1:11:", "`9469` is no value", "127.0.0.1:9469"),
            ("threads = 2", ":1:1:", "unknown key `threads`", "put `threads` under [limits]"),
            ("[limits]\nthreads = \"2\"", ":2:11:", "is of type string", "give a whole number"),
            ("[limits]\nthreads = 0", ":2:11:", "`0` is no value", "1 to 256"),
            ("[limits]\nmode = \"auto\"", ":2:1:", "unknown key `mode`", "known: window_us"),
            ("mode = \"journaled\"", ":1:8:", "no value of `mode`", "journal"),
            ("[[rule]]\nmode = \"auto\"", ":1:1:", "no `match`", "match ="),
            ("[[rule]]\nmatch = \"a[\"", ":2:9:", "unclosed character class", "glob"),
            ("[[rule]]\nmatch = \"a\"\nthreads = 1", ":3:1:", "unknown key `threads`", "known:"),
            ("rule = 1", ":1:8:", "of type integer", "[[rule]]"),
            ("mode = ", ":1:", "", "TOML"),
        ] {
            let e = read(text).unwrap_err();
            assert!(e.what.starts_with(&format!("/etc/x.toml{place}")), "{text:?}: {e}");
            assert!(e.why.contains(why) && e.action.contains(action), "{text:?}: {e}");
            assert_eq!(e.exit, Exit::Usage);
        }
    }
}
