//! Programs that make and read many files: tar, git, cargo, npm, rsync.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::common::{run, run_text};
use crate::inputs::{Inputs, done, has};
use crate::{Row, Settle};

/// The rows, in the order of the table.
pub const ROWS: [Row; 6] = [
    Row { name: "untar 20,000 files", unit: None, input: |i| i.tar().map(|_| ()), run: untar },
    Row { name: "git clone, 5,000 files", unit: None, input: repository, run: git_clone },
    Row { name: "git status, 5,000 files", unit: None, input: repository, run: git_status },
    Row { name: "cargo build, 50 modules", unit: None, input: package, run: cargo_build },
    Row { name: "npm install", unit: None, input: npm_cache, run: npm_install },
    Row { name: "rsync -a, 5,000 files", unit: None, input: |i| slice(i).map(|_| ()), run: rsync },
];

const SLICE: usize = 5000;
const MODULES: usize = 50;

/// The seconds of one command that must succeed.
fn timed(command: &mut Command) -> f64 {
    let started = Instant::now();
    run(command);
    started.elapsed().as_secs_f64()
}

fn slice(inputs: &Inputs) -> Result<std::path::PathBuf, String> {
    has("rsync")?;
    inputs.files("slice", inputs.scaled(SLICE))
}

fn untar(inputs: &Inputs, dir: &Path, settle: Settle) -> f64 {
    let tar = inputs.tar().expect("made before");
    settle();
    timed(Command::new("tar").arg("-xf").arg(tar).arg("-C").arg(dir))
}

fn git() -> Command {
    let mut git = Command::new("git");
    git.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_SYSTEM", "/dev/null");
    git.args([
        "-c",
        "user.name=T",
        "-c",
        "user.email=t@localhost",
        "-c",
        "gc.auto=0",
        "-c",
        "core.hooksPath=/dev/null",
    ]);
    git
}

/// A bare repository of the slice in one pack.
fn repository(inputs: &Inputs) -> Result<(), String> {
    has("git")?;
    let files = inputs.files("git-tree", inputs.scaled(SLICE))?;
    let bare = |part: &Path| {
        let work = |args: &[&str]| done(git().arg("--git-dir").arg(part).arg("--work-tree").arg(&files).args(args));
        done(git().args(["init", "-q", "--bare"]).arg(part))?;
        work(&["add", "-A", "-f"])?;
        work(&["commit", "-q", "-m", "all"])?;
        work(&["repack", "-q", "-a", "-d"])
    };
    inputs.once("repository.git", bare).map(|_| ())
}

fn clone_command(inputs: &Inputs, dir: &Path) -> Command {
    let mut command = git();
    command
        .args(["clone", "-q", &format!("file://{}", inputs.path("repository.git").display())])
        .arg(dir.join("clone"));
    command
}

fn git_clone(inputs: &Inputs, dir: &Path, settle: Settle) -> f64 {
    settle();
    timed(&mut clone_command(inputs, dir))
}

/// The first one after a clone, which looks at every file.
fn git_status(inputs: &Inputs, dir: &Path, settle: Settle) -> f64 {
    run(&mut clone_command(inputs, dir));
    settle();
    let mut status = git();
    status.args(["status", "--porcelain"]).current_dir(dir.join("clone"));
    let started = Instant::now();
    let text = run_text(&mut status);
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(text, "", "a fresh clone is clean");
    seconds
}

/// A package without dependencies; its modules are real work for the compiler, but little.
fn package(inputs: &Inputs) -> Result<(), String> {
    let modules = inputs.scaled(MODULES);
    let write = |part: &Path| -> std::io::Result<()> {
        fs::create_dir_all(part.join("src"))?;
        fs::write(
            part.join("Cargo.toml"),
            "[package]\nname = \"modules\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n",
        )?;
        let mut main = String::new();
        for m in 0..modules {
            let _ = writeln!(main, "mod m{m};");
            let mut module = "use std::collections::BTreeMap;\n".to_owned();
            for f in 0..4 {
                let _ = writeln!(
                    module,
                    "pub fn f{f}(n: u64) -> String {{\n    let map: BTreeMap<u64, String> = (0..n).map(|i| (i * {m}, \
                     format!(\"{{i}} {f}\"))).collect();\n    map.values().cloned().collect::<Vec<_>>().join(\",\")\n}}"
                );
            }
            fs::write(part.join(format!("src/m{m}.rs")), module)?;
        }
        main.push_str("fn main() {\n");
        for m in 0..modules {
            (0..4).for_each(|f| _ = writeln!(main, "    println!(\"{{}}\", m{m}::f{f}(3));"));
        }
        main.push_str("}\n");
        fs::write(part.join("src/main.rs"), main)
    };
    inputs.once("package", |part| write(part).map_err(|e| e.to_string())).map(|_| ())
}

fn cargo_build(inputs: &Inputs, dir: &Path, settle: Settle) -> f64 {
    run(Command::new("cp").arg("-a").arg(inputs.path("package")).arg(dir));
    settle();
    // The cargo that runs this, not a wrapper of it.
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--offline"]).current_dir(dir.join("package"));
    timed(cargo.env("CARGO_TARGET_DIR", dir.join("target")).env_remove("RUSTFLAGS"))
}

const PACKAGES: &str = r#"{ "name": "bench", "version": "1.0.0", "private": true, "dependencies":
  { "express": "4.21.2", "lodash": "4.17.21", "eslint": "8.57.1", "rxjs": "7.8.1", "typescript": "5.4.5" } }"#;

fn npm(inputs: &Inputs, dir: &Path) -> Command {
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--update-notifier=false"]);
    // Without the addresses npm asks for each package again, which the cache cannot answer.
    npm.arg("--omit-lockfile-registry-resolved=false");
    npm.arg("--cache").arg(inputs.path("npm-cache")).current_dir(dir);
    npm
}

/// Five packages with what they need, fetched once.
fn npm_cache(inputs: &Inputs) -> Result<(), String> {
    has("npm")?;
    let fetch = |part: &Path| {
        fs::create_dir(part)
            .and_then(|()| fs::write(part.join("package.json"), PACKAGES))
            .map_err(|e| e.to_string())?;
        done(&mut npm(inputs, part)).map_err(|_| "the packages cannot be fetched".to_owned())
    };
    inputs.once("npm", fetch).map(|_| ())
}

fn npm_install(inputs: &Inputs, dir: &Path, settle: Settle) -> f64 {
    for name in ["package.json", "package-lock.json"] {
        fs::copy(inputs.path("npm").join(name), dir.join(name)).expect("copy");
    }
    settle();
    timed(npm(inputs, dir).arg("--offline"))
}

fn rsync(inputs: &Inputs, dir: &Path, settle: Settle) -> f64 {
    settle();
    timed(Command::new("rsync").arg("-a").arg(inputs.path("slice")).arg(dir))
}
