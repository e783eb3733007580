//! P8. No input makes the daemon panic: everything that is parsed, with inputs of its own kind and with plain nonsense.
//! The same functions as in contrib/fuzz, which `scripts/fuzz` runs for as long as wanted.

#![allow(clippy::unwrap_used)]

#[path = "../contrib/fuzz/entries.rs"]
mod entries;

use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

type Entry = fn(&[u8]) -> bool;

const ENTRIES: [(&str, Entry); 7] = [
    ("config", entries::config),
    ("control", entries::control),
    ("format", entries::format),
    ("globs", entries::globs),
    ("lock", entries::lock),
    ("mountinfo", entries::mountinfo),
    ("options", entries::options),
];

/// The seeds of an input in contrib/fuzz/corpus.
fn seeds(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/fuzz/corpus").join(name);
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files.map(|p| fs::read(p).unwrap()).collect()
}

/// A seed with some of its bytes replaced, cut out, repeated; or any bytes.
fn inputs(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edit = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), vec(any::<u8>(), 0..4), 0_usize..4);
    let edited = (prop::sample::select(seeds), vec(edit, 0..6)).prop_map(|(mut data, edits)| {
        for (from, to, new, how) in edits {
            let (a, b) = (from.index(data.len() + 1), to.index(data.len() + 1));
            let (a, b) = (a.min(b), a.max(b));
            match how {
                0 => drop(data.splice(a..b, new)),
                1 => drop(data.splice(a..a, new)),
                2 => drop(data.drain(a..b)),
                _ => data.extend_from_within(a..b),
            }
        }
        data
    });
    prop_oneof![8 => edited, 1 => vec(any::<u8>(), 0..200)]
}

/// Runs an entry on many inputs; how many of them it took.
fn run(name: &str, entry: Entry) -> Result<usize, String> {
    let taken = Cell::new(0);
    let config = ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() };
    let found = TestRunner::new(config).run(&inputs(seeds(name)), |data| {
        let r = catch_unwind(AssertUnwindSafe(|| entry(&data)));
        taken.set(taken.get() + usize::from(*r.as_ref().unwrap_or(&false)));
        prop_assert!(r.is_ok(), "{}", data.escape_ascii());
        Ok(())
    });
    found.map(|()| taken.get()).map_err(|e| e.to_string())
}

#[test]
fn no_input_breaks_a_promise() {
    for (name, entry) in ENTRIES {
        assert!(seeds(name).iter().any(|s| entry(s)), "{name}: no seed is taken: only refusals would be tested");
        let taken = run(name, entry).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(taken > 0, "{name}: no input was taken");
    }
}

/// Control: a parser that panics on a byte that no seed has is found out.
#[test]
fn a_panic_is_found() {
    let found = run("lock", |data| {
        assert!(!data.contains(&0xff), "planted");
        entries::lock(data)
    });
    assert!(found.is_err());
}

/// Inputs that are large or deep on purpose are refused or taken, in one stack and without end of memory.
#[test]
fn depth_and_size_are_bounded() {
    let deep = |open: &str, close: &str| [open.repeat(200_000), close.repeat(200_000)].concat();
    for (entry, data) in [
        (entries::config as Entry, format!("durability = {}", deep("[", "]"))),
        (entries::config, format!("{} = 1", deep("a.", "a"))),
        (entries::config, format!("[[rule]]\nmatch = \"{}\"", deep("{", "}"))),
        (entries::control, deep("[", "]")),
        (entries::control, deep("{\"get\":", "}")),
        (entries::globs, deep("{a,", "}")),
        (entries::globs, ["{".repeat(100), "}".repeat(100)].concat()),
        (entries::globs, "{a,b}".repeat(100)),
        (entries::globs, format!("{}\n{}", "*a".repeat(1500), "a".repeat(4000))),
        (entries::globs, deep("[", "]")),
        (entries::options, deep("rule=", ":")),
        (entries::options, format!("rule={}:mode=auto", deep("{", "}"))),
        (entries::options, "\\".repeat(400_001)),
        (entries::lock, " ".repeat(400_000)),
        (entries::mountinfo, "\\040 ".repeat(100_000)),
    ] {
        entry(data.as_bytes());
    }
}
