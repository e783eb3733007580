//! A mount on which the proper sequence succeeds and is not durable: overlayfs with its option `volatile`, which turns
//! every fsync off. What looks for durable saves must find it out.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{LoopFs, fresh_dir, run};

/// The mount; taken away when dropped.
pub struct Volatile {
    dir: PathBuf,
}

impl Volatile {
    /// Mounts one over new directories of `fs`.
    pub fn start(fs: &LoopFs) -> Self {
        let [lower, upper, work] = ["lower", "upper", "work"].map(|n| fs.subdir(&format!("control-{n}")));
        let options =
            format!("volatile,lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let dir = fresh_dir("control");
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&dir));
        Self { dir }
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Volatile {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.dir).status();
        let _ = std::fs::remove_dir(&self.dir);
    }
}
