//! A real filesystem of its own for each test, on a loop device over a sparse image in memory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::tools::tool;
use super::{fresh_dir, is_mounted, run, run_text, sweep, wait_until};

/// The filesystems that the tests know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Ext4, Kind::Xfs, Kind::Btrfs];

    /// The kind with this name.
    pub fn named(name: &str) -> Kind {
        match name {
            "ext4" => Kind::Ext4,
            "xfs" => Kind::Xfs,
            "btrfs" => Kind::Btrfs,
            other => panic!("unknown filesystem {other}: ext4, xfs or btrfs"),
        }
    }

    /// Its name, as mkfs and mount know it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
        }
    }

    fn mkfs(self) -> Command {
        let mut command = Command::new(format!("mkfs.{}", self.name()));
        match self {
            Kind::Ext4 => command.args(["-q", "-F"]),
            Kind::Xfs => command.args(["-q", "-f"]),
            Kind::Btrfs => command.args(["-q"]),
        };
        command
    }
}

/// A mounted filesystem; unmounted, detached and deleted when dropped, in a panic too.
pub struct LoopFs {
    kind: Kind,
    image: PathBuf,
    dir: PathBuf,
    device: String,
    slow: Option<Served>,
}

/// A tool that serves a file system of its own on a directory; taken away when dropped.
#[derive(Debug)]
pub struct Served {
    server: Child,
    dir: PathBuf,
}

impl Served {
    /// Starts tool `name` with its arguments, the last of which is made here: the directory. Returns when it serves.
    pub fn start(name: &str, args: &[&OsStr]) -> Served {
        let dir = fresh_dir(name);
        let mut command = Command::new(tool(name));
        let mut server = command.args(args).arg(&dir).stdout(Stdio::piped()).spawn().expect("the tool starts");
        let mut line = String::new();
        BufReader::new(server.stdout.take().expect("a pipe")).read_line(&mut line).expect("an answer");
        assert_eq!(line, "ready\n", "{name} {args:?} does not serve");
        Served { server, dir }
    }

    /// Where it serves.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // A loop device lets go of a file a moment after its filesystem is unmounted.
        wait_until(Duration::from_secs(10), || {
            Command::new("umount").arg(&self.dir).output().is_ok_and(|o| o.status.success())
        });
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = Command::new("umount").arg("-l").arg(&self.dir).output();
        let _ = fs::remove_dir(&self.dir);
    }
}

impl LoopFs {
    /// Makes a filesystem of `size_mb` (sparse; XFS needs 300) and mounts it.
    pub fn new(kind: Kind, size_mb: u64) -> LoopFs {
        Self::with_options(kind, size_mb, &[])
    }

    /// The same on a device whose flushes take `flush_us` microseconds.
    pub fn slow(kind: Kind, size_mb: u64, flush_us: u64) -> LoopFs {
        Self::make(kind, size_mb, &[], &[], Some((flush_us, None)))
    }

    /// The same on a device that reads or writes `rate` MiB a second, too, one request after the other.
    pub fn rated(kind: Kind, size_mb: u64, flush_us: u64, rate: u64) -> LoopFs {
        Self::make(kind, size_mb, &[], &[], Some((flush_us, Some(rate))))
    }

    /// The same with mount options, too.
    pub fn slow_with(kind: Kind, size_mb: u64, flush_us: u64, options: &[&str]) -> LoopFs {
        Self::make(kind, size_mb, &[], options, Some((flush_us, None)))
    }

    /// The same with mount options.
    pub fn with_options(kind: Kind, size_mb: u64, options: &[&str]) -> LoopFs {
        Self::make(kind, size_mb, &[], options, None)
    }

    /// The same with arguments for mkfs and mount options.
    pub fn with_mkfs(kind: Kind, size_mb: u64, mkfs: &[&str], options: &[&str]) -> LoopFs {
        Self::make(kind, size_mb, mkfs, options, None)
    }

    fn make(kind: Kind, size_mb: u64, mkfs: &[&str], options: &[&str], slow: Option<(u64, Option<u64>)>) -> LoopFs {
        let images = std::env::var_os("FSYS_TEST_IMAGES").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
        sweep(&images);
        let dir = fresh_dir(kind.name());
        let unique = dir.file_name().expect("a name").to_string_lossy().into_owned();
        let image = images.join(format!("{unique}.img"));
        // From here on Drop cleans up whatever exists already.
        let mut fs = LoopFs { kind, image, dir, device: String::new(), slow: None };
        let file = File::create(&fs.image).expect("image");
        file.set_len(size_mb.max(300) << 20).expect("size of the image");
        run(kind.mkfs().args(mkfs).arg(&fs.image));
        fs.slow = slow.map(|(flush_us, rate)| {
            let rate = rate.map(|r| format!("--rate={r}"));
            let mut args = vec![format!("--flush-us={flush_us}")];
            args.extend(rate);
            let args: Vec<_> = args.iter().map(OsStr::new).collect();
            let last = [OsStr::new("--image"), fs.image.as_os_str(), OsStr::new("--dir")];
            Served::start("slowdisk", &[&args[..], &last].concat())
        });
        let file = fs.slow.as_ref().map_or_else(|| fs.image.clone(), |s| s.dir.join("disk"));
        let mut list = vec!["loop"];
        list.extend(options);
        // `-o loop` gives a device that frees itself with the last user, so a crash of the test leaves none.
        // Another process may take the free device first; then mount(8) fails and the next try finds another.
        let mounted = wait_until(Duration::from_secs(20), || {
            let mut mount = Command::new("mount");
            mount.args(["-t", kind.name(), "-o", &list.join(",")]).args([&file, &fs.dir]);
            mount.output().is_ok_and(|o| o.status.success())
        });
        assert!(mounted, "cannot mount {} on {}", fs.image.display(), fs.dir.display());
        let source = run_text(Command::new("findmnt").args(["-n", "-o", "SOURCE", "--mountpoint"]).arg(&fs.dir));
        source.trim().trim_start_matches("/dev/").clone_into(&mut fs.device);
        fs
    }

    /// What filesystem it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its root directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A new directory in it.
    pub fn subdir(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::create_dir(&path).expect("subdirectory");
        path
    }

    /// Fills it to the last block with a file named `filler`.
    pub fn fill(&self) {
        let mut filler = File::create(self.dir.join("filler")).expect("filler");
        for piece in [1 << 20, 4096] {
            let bytes = vec![1; piece];
            while filler.write_all(&bytes).is_ok() {}
        }
        filler.sync_all().expect("what was written is there");
    }

    /// Device flushes so far, as the block layer counts them (16th column of the device's stat file).
    pub fn flushes(&self) -> u64 {
        let path = format!("/sys/block/{}/stat", self.device);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        text.split_whitespace().nth(15).and_then(|n| n.parse().ok()).expect("a flush column")
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        if is_mounted(&self.dir) {
            // A process that was just killed may hold it for another moment.
            let gone = wait_until(Duration::from_secs(10), || {
                Command::new("umount").arg(&self.dir).output().is_ok_and(|o| o.status.success())
            });
            if !gone {
                eprintln!("{} is busy: lazy unmount", self.dir.display());
                let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
            }
        }
        let _ = fs::remove_dir(&self.dir);
        self.slow = None;
        let _ = fs::remove_file(&self.image);
    }
}
