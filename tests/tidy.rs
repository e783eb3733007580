//! The shape of the source as a test: sizes, layers, where `unsafe` and FUSE types may stand.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, in lines.
const LONGEST: usize = 600;

/// A folder, and what no file in it may name. Data flows downward: nothing knows what is above it.
const LAYERS: [(&str, &[&str]); 6] = [
    ("src/engine/", &["crate::fs", "crate::transport", "crate::mount", "crate::cli", "fuser"]),
    ("src/backend/", &["crate::engine", "crate::fs", "crate::transport", "crate::mount", "crate::cli", "fuser"]),
    ("src/sys/", &["crate::backend", "crate::engine", "crate::fs", "crate::mount", "crate::cli", "fuser"]),
    ("src/fs/", &["crate::transport", "crate::mount", "crate::cli", "fuser"]),
    ("src/config/", &["crate::engine", "crate::fs", "crate::mount", "crate::backend", "fuser"]),
    ("src/cli/", &["fuser"]),
];

fn sources(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder of the source") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|e| e == "rs") {
            all.push(path);
        }
    }
}

/// What is wrong with one file.
fn faults(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > LONGEST {
        found.push(format!("{name}: {lines} lines"));
    }
    // Prose may name anything.
    let code: Vec<&str> = text.lines().map(|l| l.split("//").next().unwrap_or_default()).collect();
    // `fuser` alone is a word of the configuration, too.
    let has = |word: &str| {
        code.iter().any(|l| {
            l.split(|c: char| !(c.is_alphanumeric() || "_:".contains(c)))
                .any(|w| (w == word && word != "fuser") || w.starts_with(&format!("{word}::")))
        })
    };
    for (folder, forbidden) in LAYERS {
        if name.starts_with(folder) {
            found.extend(forbidden.iter().filter(|w| has(w)).map(|w| format!("{name}: names {w}")));
        }
    }
    // In `opened`: fuser takes a number from elsewhere only by an unsafe call.
    let unsafe_allowed = name.starts_with("src/sys/")
        || name.starts_with("src/backend/uring/")
        || ["src/backend/uring.rs", "src/transport/uring.rs", "src/transport/opened.rs"].contains(&name);
    if name.starts_with("src/") && !unsafe_allowed && has("unsafe") {
        found.push(format!("{name}: unsafe"));
    }
    if ["todo!(", "unimplemented!(", "dbg!("].iter().any(|w| code.iter().any(|l| l.contains(w)))
        && name.starts_with("src/")
    {
        found.push(format!("{name}: unfinished"));
    }
    found
}

#[test]
fn the_source_keeps_its_shape() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = Vec::new();
    ["src", "tests", "benches"].iter().for_each(|d| sources(&root.join(d), &mut all));
    assert!(all.len() > 50, "the source was found: {}", all.len());
    let found: Vec<String> = all
        .iter()
        .flat_map(|p| {
            let name = p.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
            faults(&name, &fs::read_to_string(p).expect("a text"))
        })
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_checker_can_fail() {
    assert_eq!(faults("src/engine/x.rs", "use crate::fs::Fs;"), ["src/engine/x.rs: names crate::fs"]);
    assert_eq!(faults("src/fs/x.rs", "use fuser::Request;"), ["src/fs/x.rs: names fuser"]);
    assert_eq!(faults("src/fs/x.rs", "unsafe { f() }"), ["src/fs/x.rs: unsafe"]);
    assert_eq!(faults("src/cli/x.rs", &"\n".repeat(601)), ["src/cli/x.rs: 601 lines"]);
    assert_eq!(faults("src/engine/x.rs", "todo!()"), ["src/engine/x.rs: unfinished"]);
    assert!(faults("src/engine/x.rs", "// like fuser, but not unsafe\nuse crate::backend::Backing;").is_empty());
    assert!(faults("src/sys/x.rs", "unsafe { f() }").is_empty());
}
