//! The option list of mount(8) and fstab(5): `-o name,name=value`.
//!
//! Two types: [`Word`] is what was typed, [`Options`] is what it means.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use super::keys::{self, Refused};
use super::policy::Rule;
use super::{Config, file};
use crate::error::{Error, Exit, Result};

/// Where a value comes from that was typed.
pub const COMMAND_LINE: &str = "command line";

/// Options for init systems and mount(8) itself, or that are always on; they change nothing here.
const IGNORED: [&str; 20] = [
    "auto",
    "noauto",
    "users",
    "nouser",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "defaults",
    "async",
    "default_permissions",
    "nodiratime",
    "diratime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
];
const FLAGS: [&str; 16] = [
    "remount",
    "ro",
    "rw",
    "allow_other",
    "allow_root",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "sync",
    "dirsync",
];
const VALUED: [&str; 4] = ["config", "log_file", "fsname", "rule"];

/// One option as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// Before the first `=`.
    pub name: String,
    /// After it.
    pub value: Option<String>,
}

/// Splits a list at its commas; `\,` is a comma and `\\` a backslash inside a value.
pub fn split(list: &str) -> Vec<Word> {
    let mut texts = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        let text = texts.len() - 1;
        match c {
            ',' => texts.push(String::new()),
            '\\' => texts[text].push(chars.next_if(|n| matches!(n, ',' | '\\')).unwrap_or('\\')),
            c => texts[text].push(c),
        }
    }
    let word = |text: String| match text.split_once('=') {
        Some((name, value)) => Word { name: name.to_owned(), value: Some(value.to_owned()) },
        None => Word { name: text, value: None },
    };
    texts.into_iter().filter(|t| !t.is_empty()).map(word).collect()
}

/// Who may enter the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Not typed: every user when root mounts (permissions are checked as on any file system), else the
    /// user who mounted.
    #[default]
    Unset,
    /// `allow_root`: the user who mounted, and root.
    Root,
    /// `allow_other`: every user.
    Everyone,
}

/// What the mount itself is told; plain data, free of any FUSE library. `None`: not typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FuseOptions {
    /// `ro`, `rw`.
    pub read_only: Option<bool>,
    /// `allow_other`, `allow_root`.
    pub access: Access,
    /// `fsname=`: the source that mount(8) shows; the backing directory when not typed.
    pub fsname: Option<String>,
    /// `dev`, `nodev`.
    pub dev: Option<bool>,
    /// `suid`, `nosuid`.
    pub suid: Option<bool>,
    /// `exec`, `noexec`.
    pub exec: Option<bool>,
    /// `atime`, `noatime` (`relatime` is the kernel's default).
    pub atime: Option<bool>,
}

/// What the options mean.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `config=`.
    pub config_file: Option<PathBuf>,
    /// Values by name, in order.
    pub settings: Vec<(String, String)>,
    /// `rule=`, in order; they follow the rules of the file.
    pub rules: Vec<Rule>,
    /// For the mount.
    pub fuse: FuseOptions,
    /// `log_file=`.
    pub log_file: Option<PathBuf>,
    /// `remount`: change a mount that is there.
    pub remount: bool,
    /// Options that nobody knows and that `sloppy` let pass.
    pub unknown: Vec<String>,
}

impl Options {
    /// The meaning of `words`; a later word wins. `sloppy` (`mount.fsys -s`) collects unknown options
    /// instead of refusing them.
    ///
    /// `sync` and `dirsync` mean `durability=always`: every call that changes something waits until it is
    /// durable. The kernel is not asked for its own `sync`, which would turn each write(2) into a commit.
    pub fn understand(words: &[Word], sloppy: bool) -> Result<Self> {
        let mut options = Self::default();
        for word in words {
            match options.take(word) {
                Ok(()) => {}
                Err(Problem::Unknown(_)) if sloppy => options.unknown.push(word.name.clone()),
                Err(Problem::Unknown(r) | Problem::Invalid(r)) => return Err(refused(&word.name, r)),
            }
        }
        Ok(options)
    }

    fn take(&mut self, word: &Word) -> Result<(), Problem> {
        let name = word.name.as_str();
        // mount(8) adds `user=NAME` when a user mounts.
        if name.starts_with("x-") || name.starts_with("X-") || matches!(name, "comment" | "user") {
            return Ok(());
        }
        match &word.value {
            None if IGNORED.contains(&name) => Ok(()),
            None if FLAGS.contains(&name) => {
                self.flag(name);
                Ok(())
            }
            Some(value) if VALUED.contains(&name) => self.valued(name, value),
            Some(value) if keys::all().any(|k| k == name) => {
                Config::default().set(name, value, COMMAND_LINE).map_err(Problem::Invalid)?;
                self.settings.push((name.to_owned(), value.clone()));
                Ok(())
            }
            value => Err(not_taken(name, value.is_some())),
        }
    }

    fn flag(&mut self, name: &str) {
        let fuse = &mut self.fuse;
        match name {
            "ro" | "rw" => fuse.read_only = Some(name == "ro"),
            "remount" => self.remount = true,
            "allow_other" => fuse.access = Access::Everyone,
            "allow_root" => fuse.access = Access::Root,
            "dev" | "nodev" => fuse.dev = Some(name == "dev"),
            "suid" | "nosuid" => fuse.suid = Some(name == "suid"),
            "exec" | "noexec" => fuse.exec = Some(name == "exec"),
            "atime" | "noatime" => fuse.atime = Some(name == "atime"),
            "sync" | "dirsync" => self.settings.push(("durability".into(), "always".into())),
            _ => {}
        }
    }

    fn valued(&mut self, name: &str, value: &str) -> Result<(), Problem> {
        match name {
            "config" => self.config_file = Some(value.into()),
            "log_file" => self.log_file = Some(value.into()),
            "fsname" => self.fuse.fsname = Some(value.to_owned()),
            _ => self.rules.push(rule(value).map_err(Problem::Invalid)?),
        }
        Ok(())
    }

    /// The configuration: built-in defaults, then the file, then what was typed.
    pub fn config(&self) -> Result<Config> {
        let mut config = Config::default();
        if let Some(path) = &self.config_file {
            file::load(path, &mut config)?;
        }
        for (key, value) in &self.settings {
            config.set(key, value, COMMAND_LINE).map_err(|r| refused(key, r))?;
        }
        config.policies.rules.extend(self.rules.iter().cloned());
        config.check().map_err(|r| refused("metrics", r))?;
        config.policies.check().map_err(|r| refused("method", r))?;
        Ok(config)
    }

    /// Makes the paths in the options absolute, so that they stay true when the working directory changes.
    pub fn absolute(&mut self, cwd: &Path) {
        for path in [&mut self.config_file, &mut self.log_file].into_iter().flatten() {
            *path = cwd.join(&path);
        }
    }
}

enum Problem {
    Unknown(Refused),
    Invalid(Refused),
}

/// `GLOB:key=value[:key=value]`; the glob is what stands before the first known `key=`.
fn rule(text: &str) -> Result<Rule, Refused> {
    let example = "write it as rule=GLOB:key=value, for example rule=*.db:mode=in-place";
    let starts = text.match_indices(':').map(|(i, _)| i).find(|i| {
        let after = &text[i + 1..];
        after.split_once('=').is_some_and(|(key, _)| !key.contains([':', '/', '*']))
    });
    let Some(at) = starts else {
        return Err(Refused { why: format!("`{text}` sets nothing"), action: example.into() });
    };
    let mut rule = Rule::new(&text[..at], COMMAND_LINE)
        .map_err(|e| Refused { why: e.to_string(), action: "correct the glob".into() })?;
    for part in text[at + 1..].split(':') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        rule.set(key, value)?;
    }
    Ok(rule)
}

/// A name that is not known in this form: with a value, or without one.
fn not_taken(name: &str, has_value: bool) -> Problem {
    let plain = || IGNORED.into_iter().chain(FLAGS);
    let valued = || VALUED.into_iter().chain(keys::all());
    let invalid = |why: &str, action: String| Problem::Invalid(Refused { why: format!("`{name}` {why}"), action });
    if has_value && plain().any(|k| k == name) {
        return invalid("takes no value", format!("write `{name}` alone"));
    }
    if !has_value && valued().any(|k| k == name) {
        return invalid("needs a value", format!("write `{name}=VALUE`"));
    }
    Problem::Unknown(Refused::unknown("option", name, plain().chain(valued())))
}

fn refused(name: &str, r: Refused) -> Error {
    let what = format!("the option `{name}` is not valid");
    Error::new(Exit::Usage, what, &r.why as &dyn Display, "nothing was mounted", r.action)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::policy::{Durability, Method, WriteMode};

    fn read(list: &str) -> Result<Options> {
        Options::understand(&split(list), false)
    }

    #[test]
    fn commas_can_be_escaped() {
        let words = split(r"ro,,fsname=a\,b\\c\d,x=");
        let plain: Vec<_> = words.iter().map(|w| (w.name.as_str(), w.value.as_deref())).collect();
        assert_eq!(plain, [("ro", None), ("fsname", Some(r"a,b\c\d")), ("x", Some(""))]);
    }

    #[test]
    fn fstab_words_and_flags() {
        let o =
            read("defaults,nofail,_netdev,noauto,users,user=bob,x-systemd.automount,ro,allow_other,nodev,suid,noatime")
                .unwrap();
        assert!(o.fuse.read_only == Some(true) && o.settings.is_empty() && !o.remount);
        assert_eq!((o.fuse.dev, o.fuse.suid, o.fuse.atime), (Some(false), Some(true), Some(false)));
        assert_eq!((o.fuse.access, o.fuse.exec), (Access::Everyone, None));
        assert_eq!(read("ro,rw").unwrap().fuse.read_only, Some(false));
        assert!(read("remount,X-mount.mkdir").unwrap().remount);
    }

    #[test]
    fn values_win_over_the_file_and_are_traced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(
            &path,
            "mode = \"replace\"\ndurability = \"fsync\"\n[[rule]]\nmatch = \"*\"\nmethod = \"sync\"\n",
        )
        .unwrap();
        let list = format!("durability=always,threads=4,config={},rule=*.db:mode=in-place:method=data", path.display());
        let c = read(&list).unwrap().config().unwrap();
        assert_eq!((c.policies.base.mode, c.policies.base.durability), (WriteMode::Replace, Durability::Always));
        assert_eq!((c.source("durability"), c.source("threads")), (COMMAND_LINE, COMMAND_LINE));
        assert_eq!(c.source("mode"), format!("{}:1", path.display()));
        let (p, from) = c.policies.explain(Path::new("x.db"), None);
        assert_eq!((p.method, p.mode), (Method::Data, WriteMode::InPlace));
        assert_eq!(from.method.map(|r| r.source.as_str()), Some(COMMAND_LINE));
        assert_eq!(c.policies.resolve(Path::new("x")).method, Method::Sync);
    }

    #[test]
    fn sync_means_always() {
        let c = read("sync").unwrap().config().unwrap();
        assert_eq!(c.policies.base.durability, Durability::Always);
        assert_eq!(read("async").unwrap().config().unwrap().policies.base.durability, Durability::Close);
    }

    #[test]
    fn a_glob_may_hold_colons_and_commas() {
        let o = read(r"rule=a:b/{x\,y}:durability=always").unwrap();
        assert_eq!(o.rules[0].glob, "a:b/{x,y}");
        assert_eq!(o.rules[0].durability, Some(Durability::Always));
    }

    #[test]
    fn refusals_name_the_remedy() {
        for (list, why, action) in [
            ("alow_other", "unknown option `alow_other`", "did you mean `allow_other`?"),
            ("window-us=3", "unknown option `window-us`", "did you mean `window_us`?"),
            ("mode=journaled", "no value of `mode`", "journal"),
            ("mode", "needs a value", "mode=VALUE"),
            ("ro=1", "takes no value", "`ro` alone"),
            ("threads=many", "`many` is no value", "whole number"),
            ("log=loud", "`loud` is no value", "error, warn"),
            ("metrics=localhost", "`localhost` is no value", "127.0.0.1:9469"),
            ("rule=*.db", "sets nothing", "rule=GLOB:key=value"),
            ("rule=*.db:mod=auto", "unknown key `mod`", "`mode`"),
            ("rule=a[:mode=auto", "unclosed character class", "glob"),
        ] {
            let e = read(list).unwrap_err();
            assert!(e.why.contains(why) && e.action.contains(action), "{list}: {e}");
        }
        let e = read("method=journal").unwrap().config().unwrap_err();
        assert!(e.what.contains("`method`") && e.why.contains("write mode `journal`"), "{e}");
        let o = Options::understand(&split("gizmo,mode=auto"), true).unwrap();
        assert_eq!(o.unknown, ["gizmo"]);
        assert!(Options::understand(&split("mode=what"), true).is_err());
    }
}
