//! Everything that fsys-mount parses, one function for each input. A function panics when the program breaks a promise
//! about that input, and says whether the input was taken. The fuzz targets call them, and so does tests/parse.rs.

#![allow(dead_code, clippy::unwrap_used, reason = "each target uses one; a panic is the finding")]

use std::path::Path;

use fsys_mount::config::Config;
use fsys_mount::config::file;
use fsys_mount::config::options::{Options, Word, split};
use fsys_mount::config::policy::{Policies, Rule};
use fsys_mount::engine::layout::{Format, Holder};
use fsys_mount::engine::recover::is_stage_name;
use fsys_mount::mount::control::Request;
use fsys_mount::mount::table;

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}

/// The configuration file. What is taken can be shown; what is refused is refused with a place and a remedy.
pub fn config(data: &[u8]) -> bool {
    let Some(text) = text(data) else { return false };
    let mut config = Config::default();
    match file::parse(text, "fuzz.toml", &mut config) {
        Ok(()) => {
            assert!(config.settings().iter().all(|s| !s.key.is_empty() && !s.source.is_empty()));
            config.explain(Path::new("a/b.db"), None);
            true
        }
        Err(e) => {
            assert!(e.to_string().contains("fuzz.toml") && !e.action.is_empty(), "{e}");
            false
        }
    }
}

/// A glob and, after a newline, paths to match.
pub fn globs(data: &[u8]) -> bool {
    let Some(text) = text(data) else { return false };
    let mut lines = text.split('\n');
    let Ok(rule) = Rule::new(lines.next().unwrap_or_default(), "fuzz") else { return false };
    let policies = Policies { rules: vec![rule], ..Policies::default() };
    for path in lines {
        let path = Path::new(path.trim_start_matches('/'));
        assert_eq!(policies.resolve(path), policies.explain(path, None).0);
    }
    true
}

/// The list after `-o`. Its words, written as fstab(5) has them, are the same words again.
pub fn options(data: &[u8]) -> bool {
    let Some(text) = text(data) else { return false };
    let words = split(text);
    let escape = |s: &str| s.replace('\\', "\\\\").replace(',', "\\,");
    let written = |w: &Word| match &w.value {
        Some(value) => format!("{}={}", escape(&w.name), escape(value)),
        None => escape(&w.name),
    };
    let list: Vec<_> = words.iter().map(written).collect();
    assert_eq!(split(&list.join(",")), words);
    let strict = Options::understand(&words, false);
    let sloppy = Options::understand(&words, true);
    assert!(strict.is_err() || sloppy.is_ok(), "sloppy takes what strict takes");
    let Ok(mut options) = strict else { return false };
    options.absolute(Path::new("/"));
    // A file that it names is another input.
    options.config_file = None;
    options.config().expect("what was understood is a configuration");
    true
}

/// The file `.fsys/format`.
pub fn format(data: &[u8]) -> bool {
    let known = Format::parse(data);
    assert!(known != Format::Known || (1..data.len()).all(|n| Format::parse(&data[..n]) == Format::Begun));
    // Names beside it: only one form is ever removed.
    if let Some(name) = text(data).filter(|n| is_stage_name(n)) {
        assert!(name.len() == 22 && name.is_ascii() && !name.contains('/'));
    }
    known == Format::Known
}

/// The note in `.fsys/lock`. What was read and written again is the same.
pub fn lock(data: &[u8]) -> bool {
    let holder = Holder::parse(data);
    let again = Holder::parse(&holder.to_line());
    assert_eq!(again.pid, holder.pid);
    assert!(holder.device.is_empty() || again == holder);
    holder.pid != 0
}

/// A line on the control socket. A request that was taken, sent again, is the same request.
pub fn control(data: &[u8]) -> bool {
    match Request::parse(data) {
        Ok(request) => {
            let line = serde_json::to_vec(&request).unwrap();
            assert_eq!(Request::parse(&line).unwrap(), request);
            true
        }
        Err(e) => {
            assert!(!e.action.is_empty());
            false
        }
    }
}

/// The kernel's table of mounts, with its escapes.
pub fn mountinfo(data: &[u8]) -> bool {
    let mounts = table::parse(data);
    assert!(mounts.len() <= data.split(|b| *b == b'\n').count());
    for mount in &mounts {
        mount.is_fsys();
        assert!(table::at(&mounts, &mount.mountpoint).is_some_and(|top| top.mountpoint == mount.mountpoint));
        assert!(table::holding(&mounts, &mount.mountpoint.join("below")).is_some());
    }
    !mounts.is_empty()
}
