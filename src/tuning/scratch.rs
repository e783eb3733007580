//! A directory for measurements: made in the directory that is measured, removed at the end.

use std::io;
use std::path::{Path, PathBuf};

/// Removed with all that is in it when dropped, after an interrupt by the next one there.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes `.PREFIX-PID` in `dir`; one that a killed process left is removed first.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn new(dir: &Path, prefix: &str) -> io::Result<Self> {
        let prefix = format!(".{prefix}-");
        for entry in std::fs::read_dir(dir)?.filter_map(Result::ok) {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|n| n.strip_prefix(&prefix)).and_then(|n| n.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        let path = dir.join(format!("{prefix}{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {e}; remove it by hand", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_stays_and_what_a_killed_one_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(".probe-4194305")).unwrap();
        std::fs::create_dir(dir.path().join(".probe-mine")).unwrap();
        let scratch = Scratch::new(dir.path(), "probe").unwrap();
        std::fs::write(scratch.path().join("file"), "x").unwrap();
        drop(scratch);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [".probe-mine"], "what has no pid in its name is somebody's");
    }
}
