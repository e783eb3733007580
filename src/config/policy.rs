//! Which promise holds for which path. Pure: no I/O.
//!
//! A [`Policy`] is the resolved set of values for one path. [`Policies`] holds the ordered rules; for each
//! value the last rule that matches the path and sets it wins (contract, section 4).

use std::path::Path;

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};

/// How the content of a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WriteMode {
    /// `replace` for created and truncated files, `in-place` for writes into existing content.
    Auto,
    /// Staged, then one atomic replace.
    Replace,
    /// Written to the backing file itself.
    InPlace,
    /// Redo log first, then in place.
    Journal,
}

/// Which calls wait until their work is on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// close, fsync and every namespace operation wait.
    Always,
    /// close (after writes) and fsync wait.
    Close,
    /// Only fsync waits.
    Fsync,
    /// Nothing waits; all is durable within the commit interval.
    Relaxed,
}

/// How data reaches stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Chosen from a probe of the kernel, the file system and the device.
    Auto,
    /// fsync(2) of every file.
    Sync,
    /// fdatasync(2) of every file.
    Data,
    /// `O_DIRECT` writes where aligned, and fdatasync(2).
    Direct,
    /// The flush of the redo log; write mode `journal` has it whatever the method, and only that mode has it.
    Journal,
}

/// The values that hold for one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Policy {
    /// Write mode.
    pub mode: WriteMode,
    /// Durability level.
    pub durability: Durability,
    /// Flush method.
    pub method: Method,
    /// Largest committed file, in bytes, that is copied into a new staged version when a descriptor goes on
    /// writing after a commit and the file system cannot reflink.
    pub restage_max_bytes: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: WriteMode::Auto,
            durability: Durability::Close,
            method: Method::Auto,
            restage_max_bytes: 256 << 10,
        }
    }
}

/// One `[[rule]]`, or what else sets values of a policy: the values that it sets for the paths that match.
#[derive(Debug, Clone)]
pub struct Rule {
    /// The glob as it was typed; empty when it holds for every path.
    pub glob: String,
    /// Where the rule stands, for people: `/etc/fsys.toml:12`, `command line` or `runtime change`.
    pub source: String,
    /// Write mode, if set.
    pub mode: Option<WriteMode>,
    /// Durability, if set.
    pub durability: Option<Durability>,
    /// Method, if set.
    pub method: Option<Method>,
    /// `restage_max_bytes`, if set.
    pub restage_max_bytes: Option<u64>,
    /// `None`: every path.
    matcher: Option<GlobMatcher>,
}

/// Longest glob, in bytes: as long as a path can be (`PATH_MAX`).
const GLOB_MAX: usize = 4096;
/// Most opening braces: they nest, and the library follows them with its stack.
const BRACES_MAX: usize = 100;

/// Why a glob was not taken.
#[derive(Debug, thiserror::Error)]
pub enum BadGlob {
    /// More than anybody writes.
    #[error("the glob is longer than {GLOB_MAX} bytes or has more than {BRACES_MAX} braces")]
    Large,
    /// It is not written as one.
    #[error(transparent)]
    Syntax(#[from] globset::Error),
}

impl Rule {
    /// A rule that sets nothing yet. `*` does not cross `/`, `**` does; a glob without `/` matches the
    /// file name in any directory; `{a,b}` is either, and may be empty (`*.db{,-wal}`).
    ///
    /// # Errors
    /// The glob does not parse.
    pub fn new(glob: &str, source: &str) -> Result<Self, BadGlob> {
        if glob.len() > GLOB_MAX || glob.matches('{').count() > BRACES_MAX {
            return Err(BadGlob::Large);
        }
        let pattern = if glob.contains('/') { glob.trim_start_matches('/').to_owned() } else { format!("**/{glob}") };
        let matcher =
            GlobBuilder::new(&pattern).literal_separator(true).empty_alternates(true).build()?.compile_matcher();
        Ok(Self { glob: glob.to_owned(), matcher: Some(matcher), ..Self::everywhere(source) })
    }

    /// A rule for every path that sets nothing yet.
    pub fn everywhere(source: &str) -> Self {
        Self {
            glob: String::new(),
            source: source.to_owned(),
            mode: None,
            durability: None,
            method: None,
            restage_max_bytes: None,
            matcher: None,
        }
    }

    fn holds_for(&self, path: &Path) -> bool {
        self.matcher.as_ref().is_none_or(|m| m.is_match(path))
    }
}

/// Default policy and ordered rules.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    /// Holds where no rule sets a value.
    pub base: Policy,
    /// In order; the last match that sets a value wins.
    pub rules: Vec<Rule>,
    /// Runtime changes, in order; they win over all rules and over what a file says of itself.
    pub forced: Vec<Rule>,
}

/// A value of a policy and the rule that set it (`None`: the base).
#[derive(Debug, Clone, Copy, Default)]
pub struct Origin<'a> {
    /// Rule that set the mode.
    pub mode: Option<&'a Rule>,
    /// Rule that set the durability.
    pub durability: Option<&'a Rule>,
    /// Rule that set the method.
    pub method: Option<&'a Rule>,
    /// Rule that set `restage_max_bytes`.
    pub restage_max_bytes: Option<&'a Rule>,
}

impl Policies {
    /// True when every path has the base policy, so no path needs to be known.
    pub fn is_uniform(&self) -> bool {
        self.rules.is_empty() && self.forced.is_empty()
    }

    /// True when some path may have write mode `journal`.
    pub fn use_journal(&self) -> bool {
        let modes = self.rules.iter().filter_map(|r| r.mode);
        std::iter::once(self.base.mode).chain(modes).any(|m| m == WriteMode::Journal)
    }

    /// The policy of `path`, relative to the root of the mount, and where each value comes from; `own` is what the
    /// file says of itself.
    pub fn explain<'a>(&'a self, path: &Path, own: Option<&'a Rule>) -> (Policy, Origin<'a>) {
        let (mut p, mut o) = (self.base, Origin::default());
        for r in self.rules.iter().chain(own).chain(&self.forced).filter(|r| r.holds_for(path)) {
            if let Some(v) = r.mode {
                (p.mode, o.mode) = (v, Some(r));
            }
            if let Some(v) = r.durability {
                (p.durability, o.durability) = (v, Some(r));
            }
            if let Some(v) = r.method {
                (p.method, o.method) = (v, Some(r));
            }
            if let Some(v) = r.restage_max_bytes {
                (p.restage_max_bytes, o.restage_max_bytes) = (v, Some(r));
            }
        }
        (p, o)
    }

    /// The policy of `path`, relative to the root of the mount.
    pub fn resolve(&self, path: &Path) -> Policy {
        if self.is_uniform() { self.base } else { self.explain(path, None).0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_match_wins_value_by_value() {
        let mut a = Rule::new("*.db", "t").unwrap();
        a.mode = Some(WriteMode::InPlace);
        a.durability = Some(Durability::Always);
        let mut b = Rule::new("/cache/**", "t").unwrap();
        b.durability = Some(Durability::Relaxed);
        let mut p = Policies { rules: vec![a, b], ..Policies::default() };
        let (got, from) = p.explain(Path::new("cache/x/y.db"), None);
        assert_eq!((got.mode, got.durability), (WriteMode::InPlace, Durability::Relaxed));
        let globs = [from.mode, from.durability, from.method].map(|r| r.map(|r| r.glob.as_str()));
        assert_eq!(globs, [Some("*.db"), Some("/cache/**"), None]);
        assert_eq!(p.resolve(Path::new("y.db")).durability, Durability::Always);
        assert_eq!(p.resolve(Path::new("other/cache/z")), Policy::default());

        let mut own = Rule::everywhere("the file");
        own.durability = Some(Durability::Fsync);
        own.mode = Some(WriteMode::Replace);
        let mut forced = Rule::everywhere("runtime change");
        forced.mode = Some(WriteMode::Auto);
        p.forced.push(forced);
        let (got, from) = p.explain(Path::new("cache/x/y.db"), Some(&own));
        assert_eq!((got.mode, got.durability), (WriteMode::Auto, Durability::Fsync));
        let sources = [from.mode, from.durability].map(|r| r.map(|r| r.source.as_str()));
        assert_eq!(sources, [Some("runtime change"), Some("the file")]);
        assert_eq!(p.resolve(Path::new("")).mode, WriteMode::Auto);
    }

    #[test]
    fn star_stays_in_its_directory() {
        let mut r = Rule::new("mail/*/new", "t").unwrap();
        r.durability = Some(Durability::Always);
        let p = Policies { rules: vec![r], ..Policies::default() };
        assert_eq!(p.resolve(Path::new("mail/bob/new")).durability, Durability::Always);
        assert_eq!(p.resolve(Path::new("mail/bob/x/new")).durability, Durability::Close);
    }
}
