//! The POSIX matrix: a program of checks that prints a line for each thing that it saw. Run on the raw file system and
//! on the mount, it must print the same. `posix DIR [CHECK]`; as root, where it also acts as two ordinary users,
//! or as an ordinary user.

mod access;
mod content;
mod creation;
mod kit;
mod locks;
mod names;
mod times;
mod tree;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// A check: makes what it needs in a fresh directory, notes what it sees.
type Check = (&'static str, fn(&Path, &mut kit::Log));

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let root = Path::new(args.first().expect("a directory"));
    let all =
        [creation::CHECKS, access::CHECKS, content::CHECKS, names::CHECKS, tree::CHECKS, times::CHECKS, locks::CHECKS];
    rustix::process::umask(rustix::fs::Mode::empty());
    for (name, check) in all.concat() {
        if args.get(1).is_some_and(|only| only != name) {
            continue;
        }
        let dir = root.join(name);
        std::fs::create_dir(&dir).expect("a fresh directory");
        rustix::fs::chmod(&dir, rustix::fs::Mode::from_raw_mode(0o755)).expect("mode");
        let mut log = kit::Log::default();
        if rustix::process::geteuid().is_root() {
            check(&dir, &mut log);
        } else if catch_unwind(AssertUnwindSafe(|| check(&dir, &mut log))).is_err() {
            // What this user may not do ends the check, at the same step on both sides.
            log.note("ends here", ());
        }
        log.lines.iter().for_each(|l| println!("{name} {l}"));
    }
}
