//! `fsys set`: change values while mounted, take changes back, see them.

use std::path::PathBuf;
use std::time::Duration;

use super::Output;
use super::client::{Daemon, find, strange};
use crate::error::{Error, Exit, Result};
use crate::mount::control::{Answer, Request};
use crate::telemetry::ConfigState;

const EXAMPLE: &str = "Examples:
  fsys set durability=always                          # every path, at once
  fsys set durability=relaxed --match 'cache/**'      # the paths that match
  fsys set commit_interval_ms=1000 log=debug /mnt/fsys
  fsys set --list
  fsys set --unset durability                         # as it was before
  fsys set --unset --all

A change wins over the configuration file, the command line and a file's own policy, holds for files that are opened
from then on, is logged, and ends with the mount. To keep it, write it into the configuration file (`fsys reload`).";

/// Change values while mounted; see the changes, take them back
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
#[allow(clippy::struct_excessive_bools)] // flags that are typed
pub struct Args {
    /// Only for the paths that match (values of a policy)
    #[arg(long = "match", value_name = "GLOB")]
    glob: Option<String>,
    /// Take changes back
    #[arg(long, conflicts_with = "list")]
    unset: bool,
    /// With --unset: all of them
    #[arg(long, requires = "unset", conflicts_with = "glob")]
    all: bool,
    /// Show the changes
    #[arg(long, conflicts_with = "glob")]
    list: bool,
    /// For programs
    #[arg(long)]
    json: bool,
    /// Values, with --unset their names; last, and not needed when there is one, the mount
    #[arg(value_name = "KEY=VALUE|MOUNT")]
    words: Vec<String>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mut words: Vec<&str> = args.words.iter().map(String::as_str).collect();
    let mount = if words.last().is_some_and(|w| is_path(w)) { words.pop().map(PathBuf::from) } else { None };
    let request = request(args, &words)?;
    let mount = find(mount.as_deref())?;
    match Daemon::of(&mount)?.ask(&request, Duration::ZERO)? {
        Answer::Config(state) => Output::new(args.json, &state, || table(&state)),
        other => Err(strange(&other)),
    }
}

/// A glob in a value can hold a slash, a name of a value cannot.
fn is_path(word: &str) -> bool {
    !word.contains('=') && (word.contains('/') || matches!(word, "." | ".."))
        || word.starts_with('/')
        || word.starts_with("./")
}

fn request(args: &Args, words: &[&str]) -> Result<Request> {
    let glob = args.glob.clone();
    if args.list {
        return if words.is_empty() { Ok(Request::Changes) } else { Err(usage("--list takes no values")) };
    }
    if args.unset {
        return match (words.is_empty(), args.all) {
            (false, false) => Ok(Request::Unset { keys: words.iter().map(|w| (*w).to_owned()).collect(), glob }),
            (true, true) => Ok(Request::Unset { keys: Vec::new(), glob }),
            (true, false) => Err(usage("--unset needs the names of values, or --all")),
            (false, true) => Err(usage("--all takes no names")),
        };
    }
    if words.is_empty() {
        return Err(usage("no value was given"));
    }
    let pair = |w: &&str| {
        let pair = w.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        pair.ok_or_else(|| usage(&format!("`{w}` is no KEY=VALUE")))
    };
    Ok(Request::Set { values: words.iter().map(pair).collect::<Result<_>>()?, glob })
}

fn usage(why: &str) -> Error {
    let action = "see `fsys set --help` for examples";
    Error::new(Exit::Usage, "cannot change anything", why, "nothing was changed", action)
}

fn table(state: &ConfigState) -> String {
    if state.changes.is_empty() {
        return "no runtime changes".into();
    }
    let line = |c: &crate::config::runtime::Change| {
        let paths = c.glob.as_ref().map_or_else(|| "everywhere".to_owned(), |g| format!("for `{g}`"));
        format!("{}={}  {paths}", c.key, c.value)
    };
    let lines: Vec<_> = state.changes.iter().map(line).collect();
    format!("runtime changes, later ones win:\n  {}", lines.join("\n  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Args {
        let words = words.iter().map(|w| (*w).to_owned()).collect();
        Args { glob: None, unset: false, all: false, list: false, json: false, words }
    }

    #[test]
    fn a_mount_is_told_from_a_value() {
        for path in ["/mnt", "./x=y", ".", "a/b", "/mnt/a=b"] {
            assert!(is_path(path), "{path}");
        }
        for value in ["durability=always", "log=debug", "durability", "metrics=[::1]:1/2"] {
            assert!(!is_path(value), "{value}");
        }
    }

    #[test]
    fn what_was_typed_becomes_a_request() {
        let set = request(&args(&["a=b=c"]), &["a=b=c"]).unwrap();
        assert_eq!(set, Request::Set { values: vec![("a".into(), "b=c".into())], glob: None });
        let unset = |all, words: &[&str]| request(&Args { unset: true, all, ..args(words) }, words);
        assert_eq!(unset(true, &[]).unwrap(), Request::Unset { keys: vec![], glob: None });
        assert_eq!(unset(false, &["mode"]).unwrap(), Request::Unset { keys: vec!["mode".into()], glob: None });
        assert!(unset(false, &[]).unwrap_err().why.contains("--all"));
        assert!(request(&args(&[]), &[]).is_err() && request(&args(&["mode"]), &["mode"]).is_err());
    }
}
