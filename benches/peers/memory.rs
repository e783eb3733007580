//! What a daemon keeps in memory for many files that the kernel knows.

use std::fs;
use std::path::Path;

use super::target::Target;

/// Files in one directory.
const TOGETHER: u32 = 1000;

/// Memory of a process, KiB.
#[derive(Clone, Copy)]
struct Resident {
    /// The most so far.
    peak: f64,
    now: f64,
}

fn resident(pid: i32) -> Resident {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    let value = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_suffix(" kB"));
        line.and_then(|l| l.trim().parse().ok()).unwrap_or_else(|| panic!("no {key} in\n{text}"))
    };
    Resident { peak: value("VmHWM:"), now: value("VmRSS:") }
}

/// Creates `files` files and looks each up. Gives how many there are, and why that ended early.
fn fill(dir: &Path, files: u32) -> (u32, Option<std::io::Error>) {
    let path = |n: u32| dir.join(format!("memory-{}", n / TOGETHER)).join(format!("a-file-with-an-ordinary-name-{n}"));
    for n in 0..files {
        let made = if n % TOGETHER == 0 { fs::create_dir(path(n).with_file_name("")) } else { Ok(()) };
        if let Err(e) = made.and_then(|()| fs::write(path(n), "x")) {
            return (n, Some(e));
        }
    }
    (files, (0..files).find_map(|n| fs::metadata(path(n)).err()))
}

/// Prints what each daemon holds after it created and looked up `files` files. The daemons are fresh.
pub fn table(targets: &[Target], files: u32) {
    println!("memory of each daemon, {files} files created and looked up\n");
    println!("| mount | MiB before | peak MiB | MiB after | bytes per file at the peak | of {} | |", targets[0].name());
    println!("|---|---|---|---|---|---|---|");
    let mut first: Option<f64> = None;
    for target in targets {
        let before = resident(target.pid());
        let (reached, failed) = fill(target.path(), files);
        target.settle();
        let after = resident(target.pid());
        let each = (after.peak - before.now) * 1024.0 / f64::from(reached.max(1));
        let first = *first.get_or_insert(each);
        println!(
            "| {} | {:.1} | {:.1} | {:.1} | {each:.0} | {:.2} | {} |",
            target.name(),
            before.now / 1024.0,
            after.peak / 1024.0,
            after.now / 1024.0,
            each / first,
            failed.map_or(String::new(), |why| format!("FAILED after {reached} files: {why}")),
        );
    }
}
