//! File systems of others that serve a directory over another one, as this project does. `scripts/peers` gets them.
//!
//! Each runs with the options that make it fast by its own documentation and keep what programs may expect of a file
//! system; they are printed with the figures. It runs in the foreground as a child of the bench, which so knows its
//! process and ends it.

#![allow(dead_code, reason = "each bench uses its part")]

pub mod control;
pub mod memory;
pub mod target;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::{LoopFs, fresh_dir, is_mounted, wait_until};

/// Stand for the directory that is served and for the mount point.
const BACKING: &str = "{backing}";
const DIR: &str = "{dir}";

/// A file system of others.
pub struct Peer {
    /// Its name, and that of its program.
    pub name: &'static str,
    /// Its arguments.
    args: &'static [&'static str],
    /// Its arguments for a first run that prepares the backing directory; none: it needs none.
    init: &'static [&'static str],
    /// Why it may be missing.
    package: &'static str,
}

/// All that are known. Names and attributes may be kept for a minute where that can be said: nobody changes the directories
/// below.
pub const PEERS: [Peer; 5] = [
    // What it does by itself is its fastest: the kernel keeps names and attributes for a day, writes are gathered in the
    // page cache, data is spliced, and there are as many threads as there are requests.
    Peer { name: "passthrough_hp", args: &["--foreground", BACKING, DIR], init: &[], package: "source of fuse3" },
    // The same by options.
    Peer {
        name: "passthrough_ll",
        args: &["-f", "-o", "source={backing},cache=always,writeback,xattr,flock", DIR],
        init: &[],
        package: "only where passthrough_hp cannot be had",
    },
    // By itself it has one thread, and the page cache begins anew with every open.
    Peer {
        name: "bindfs",
        args: &["--multithreaded", "-f", "-o", "big_writes,auto_cache,attr_timeout=60,entry_timeout=60", BACKING, DIR],
        init: &[],
        package: "package bindfs",
    },
    // Its own advice for speed: the page cache stays as long as time and size do, writes are gathered in it, listings and
    // links are kept. By itself it leaves 4 GiB free. `security_capability=false`, which it also advises, would take file
    // capabilities away.
    Peer {
        name: "mergerfs",
        args: &[
            "-f",
            "-o",
            "minfreespace=0,cache.files=auto-full,cache.writeback=true,cache.readdir=true,cache.symlinks=true,\
             cache.attr=60,cache.entry=60",
            BACKING,
            DIR,
        ],
        init: &[],
        package: "package mergerfs",
    },
    // Cheap to open (scrypt), else as it is: names and contents encrypted, which is its purpose.
    Peer {
        name: "gocryptfs",
        args: &["-fg", "-q", "-extpass", "echo", "-extpass", "bench", BACKING, DIR],
        init: &["-init", "-q", "-scryptn", "10", "-extpass", "echo", "-extpass", "bench", BACKING],
        package: "package gocryptfs",
    },
];

impl Peer {
    /// Its program: compiled by `scripts/peers`, or in the search path.
    fn program(&self) -> Option<PathBuf> {
        let release = Path::new(env!("CARGO_BIN_EXE_fsys-mount")).parent()?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(release.parent()?.join("peers")).chain(std::env::split_paths(&path));
        dirs.map(|d| d.join(self.name)).find(|p| p.is_file())
    }

    /// Its name, version and arguments, for people.
    fn words(&self, program: &Path) -> String {
        // What is compiled from an example knows no version.
        let noted = fs::read_to_string(program.with_extension("version")).ok();
        let asked = || {
            let out = Command::new(program).arg("--version").output().ok()?;
            let text = if out.stdout.is_empty() { out.stderr } else { out.stdout };
            Some(String::from_utf8_lossy(&text).lines().find(|l| !l.is_empty())?.to_owned())
        };
        let version = noted.or_else(asked).unwrap_or_else(|| "version unknown".to_owned());
        format!("{} ({}): {}", self.name, version.trim(), self.args.join(" "))
    }

    /// Serves `backing`, a new directory.
    ///
    /// # Errors
    /// Why it cannot be had: what it said.
    pub fn start(&'static self, backing: &Path) -> Result<Mounted, String> {
        let program = self.program().ok_or_else(|| format!("not installed ({})", self.package))?;
        let dir = fresh_dir(self.name);
        let log = dir.with_extension("log");
        let told = |e: &dyn std::fmt::Display| format!("{}: {e}", program.display());
        let out = File::create(&log).map_err(|e| told(&e))?;
        let filled = |args: &[&str]| -> Vec<String> {
            let one = |a: &str| a.replace(BACKING, &backing.to_string_lossy()).replace(DIR, &dir.to_string_lossy());
            args.iter().map(|a| one(a)).collect()
        };
        let command = |args: &[&str]| -> std::io::Result<Child> {
            let mut command = Command::new(&program);
            command.args(filled(args)).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out.try_clone()?);
            command.spawn()
        };
        let said = || fs::read_to_string(&log).unwrap_or_default().trim().replace('\n', "; ");
        let ready =
            self.init.is_empty() || command(self.init).and_then(|mut c| c.wait()).map_err(|e| told(&e))?.success();
        if !ready {
            return Err(said());
        }
        let child = command(self.args).map_err(|e| told(&e))?;
        let mut mounted =
            Mounted { name: self.name, words: self.words(&program), child, dir: dir.clone(), log: log.clone() };
        // As long as it runs: a busy machine is no reason to go without it.
        let mut ended = false;
        wait_until(Duration::from_secs(120), || {
            ended = mounted.child.try_wait().is_ok_and(|s| s.is_some());
            ended || is_mounted(&dir)
        });
        if is_mounted(&dir) { Ok(mounted) } else { Err(format!("does not mount: {}", said())) }
    }
}

/// A peer that serves; unmounted and ended when dropped.
pub struct Mounted {
    /// Its name.
    pub name: &'static str,
    /// Its name, version and arguments.
    pub words: String,
    child: Child,
    dir: PathBuf,
    log: PathBuf,
}

impl Mounted {
    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        wait_until(Duration::from_secs(20), || {
            !is_mounted(&self.dir) || Command::new("umount").arg(&self.dir).output().is_ok_and(|o| o.status.success())
        });
        if is_mounted(&self.dir) {
            let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        }
        if !wait_until(Duration::from_secs(20), || self.child.try_wait().is_ok_and(|s| s.is_some())) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_dir(&self.dir);
        let _ = fs::remove_file(&self.log);
    }
}

/// Starts all peers that can be had, each over a directory of its own, and prints which and which not.
pub fn start_all(fs: &LoopFs) -> Vec<Mounted> {
    let mut all = Vec::new();
    for peer in &PEERS {
        match peer.start(&fs.subdir(&format!("peer-{}", peer.name))) {
            Ok(mounted) => {
                println!("peer {}", mounted.words);
                all.push(mounted);
            }
            Err(why) => println!("SKIPPED peer {}: {why}", peer.name),
        }
    }
    println!();
    all
}

/// Whether fsync of a directory makes the renames in it durable: what the proper sequence ends with. Seen by the device,
/// which must be flushed for each rename. A file system that does not know the call lets the kernel answer it with
/// success, and nothing happens.
pub fn syncs_directories(fs: &LoopFs, dir: &Path) -> std::io::Result<bool> {
    const RENAMES: u64 = 5;
    let (a, b) = (dir.join("probe-a"), dir.join("probe-b"));
    let mut file = File::create(&a)?;
    file.write_all(b"x")?;
    file.sync_all()?;
    let mut flushes = 0;
    for n in 0..RENAMES {
        let (from, to) = if n % 2 == 0 { (&a, &b) } else { (&b, &a) };
        // What went before is not what is counted.
        rustix::fs::syncfs(File::open(fs.path())?)?;
        let before = fs.flushes();
        fs::rename(from, to)?;
        File::open(dir)?.sync_all()?;
        flushes += u64::from(fs.flushes() > before);
    }
    fs::remove_file(&b)?;
    Ok(flushes == RENAMES)
}
