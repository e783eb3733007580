//! The bench that everything stands on: a private mount namespace, a tmpfs, a device, a filesystem on it.
//!
//! Nothing here touches the root filesystem except for one empty directory. The namespace belongs to the test's thread
//! and its children: whatever happens to the test, its mounts and with them its loop device go away with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};

use crate::device::Device;
use crate::disk::Disk;
use crate::states::Tear;

/// A filesystem under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// Smallest image that mkfs makes without complaint, in MiB.
    fn size_mib(self) -> usize {
        match self {
            Self::Ext4 => 96,
            Self::Xfs => 304,
            Self::Btrfs => 256,
        }
    }

    /// Sectors tear, with one exception each: a superblock that is written in place under a checksum. Neither ext4
    /// (1 KiB) nor btrfs (4 KiB) mounts with a torn one, whatever runs on top of it.
    pub fn tear(self) -> Tear {
        let whole = match self {
            Self::Ext4 => 0..4096,
            Self::Xfs => 0..0,
            Self::Btrfs => 65_536..69_632,
        };
        Tear { unit: 512, whole }
    }

    fn mkfs(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &[
                "mkfs.ext4",
                "-qF",
                "-b4096",
                "-I256",
                "-Jsize=8",
                "-Elazy_itable_init=0,lazy_journal_init=0,nodiscard",
            ],
            Self::Xfs => &["mkfs.xfs", "-qfK"],
            Self::Btrfs => &["mkfs.btrfs", "-qfK"],
        }
    }
}

/// See the module. Dropped: everything unmounted, the device detached.
pub struct Rig {
    pub kind: Kind,
    pub disk: Disk,
    device: Device,
    root: TmpRoot,
    options: String,
}

impl Rig {
    /// Needs root. Works in a mount namespace of the calling thread.
    pub fn new(kind: Kind) -> Self {
        Self::with(kind, &[], "")
    }

    /// With more arguments for mkfs and more mount options.
    pub fn with(kind: Kind, mkfs: &[&str], options: &str) -> Self {
        let root = TmpRoot::new().unwrap();
        let image = make_image(kind, mkfs, &root.path().join("image"));
        let options = if options.is_empty() { "nodiscard".into() } else { format!("nodiscard,{options}") };
        let disk = Disk::new(image);
        let served = root.dir("served");
        root.dir("fs");
        root.dir("mnt");
        let device = Device::new(&disk, &served).unwrap();
        Self { kind, disk, device, root, options }
    }

    /// A directory of the rig's own tmpfs.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.root.dir(name)
    }

    /// The device's name, as in `/sys/block`.
    pub fn device(&self) -> String {
        self.device.path().file_name().unwrap().to_string_lossy().into_owned()
    }

    /// Mounts the disk as it is now; unmounted when the answer is dropped.
    pub fn mount(&self, read_only: bool) -> io::Result<Mounted> {
        self.device.invalidate()?;
        let at = self.root.path().join("fs");
        let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        let options = std::ffi::CString::new(self.options.as_str()).unwrap();
        mount(self.device.path(), &at, self.kind.name(), flags, options.as_c_str())?;
        Ok(Mounted { at })
    }

    /// Call after an unmount: no write of the old content may reach the next.
    pub fn settle(&self) {
        self.device.invalidate().unwrap();
    }
}

impl Drop for Rig {
    /// For the sum that `scripts/faults` makes.
    fn drop(&mut self) {
        for (what, n) in ["reads", "writes", "flushes"].iter().zip(self.disk.injected()).filter(|(_, n)| *n > 0) {
            println!("injected: {what} that the device failed: {n}");
        }
    }
}

/// A mounted filesystem.
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = unmount(&self.at, UnmountFlags::empty()) {
            let _ = unmount(&self.at, UnmountFlags::DETACH);
            // Whoever holds it would go on writing to the disk under the next state.
            assert!(std::thread::panicking(), "unmount {}: {e}", self.at.display());
        }
    }
}

struct TmpRoot {
    dir: tempfile::TempDir,
}

impl TmpRoot {
    fn new() -> io::Result<Self> {
        // SAFETY: a namespace of this thread's own; it shares no file descriptor table or memory.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
        let dir = tempfile::tempdir()?;
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None)?;
        Ok(Self { dir })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for TmpRoot {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

fn make_image(kind: Kind, extra: &[&str], path: &Path) -> Vec<u8> {
    let file = fs::File::create(path).unwrap();
    file.set_len((kind.size_mib() as u64) << 20).unwrap();
    let (program, args) = kind.mkfs().split_first().unwrap();
    let out =
        Command::new(program).args(args).args(extra).arg(path).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
    let image = fs::read(path).unwrap();
    fs::remove_file(path).unwrap();
    image
}
