//! What a daemon keeps in memory for many files that the kernel knows.

use std::fmt::Display;
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

/// Creates `files` files and looks each up; gives why that ended early.
fn fill(dir: &Path, files: u32) -> Result<(), String> {
    let told = |n: u32, e: &dyn Display| format!("file {n}: {e}");
    let path = |n: u32| dir.join(format!("memory-{}", n / TOGETHER)).join(format!("a-file-with-an-ordinary-name-{n}"));
    for n in 0..files {
        let made = if n % TOGETHER == 0 { fs::create_dir(path(n).with_file_name("")) } else { Ok(()) };
        made.and_then(|()| fs::write(path(n), "x")).map_err(|e| told(n, &e))?;
    }
    (0..files).try_for_each(|n| fs::metadata(path(n)).map(drop).map_err(|e| told(n, &e)))
}

/// Prints what each daemon holds after it created and looked up `files` files. The daemons are fresh.
pub fn table(targets: &[Target], files: u32) {
    println!("memory of the daemon, {files} files created and looked up\n");
    println!(
        "| mount | MiB before | peak MiB | MiB after | bytes per file at the peak | ratio to {} | |",
        targets[0].name()
    );
    println!("|---|---|---|---|---|---|---|");
    let mut first: Option<f64> = None;
    for target in targets {
        let before = resident(target.pid());
        let ended = fill(target.path(), files);
        target.settle();
        let after = resident(target.pid());
        let peak = *first.get_or_insert(after.peak);
        println!(
            "| {} | {:.1} | {:.1} | {:.1} | {:.0} | {} | {} |",
            target.name(),
            before.now / 1024.0,
            after.peak / 1024.0,
            after.now / 1024.0,
            (after.peak - before.now) * 1024.0 / f64::from(files),
            if ended.is_ok() { format!("{:.2}", after.peak / peak) } else { String::new() },
            ended.err().map_or(String::new(), |why| format!("FAILED at {why}")),
        );
    }
}
