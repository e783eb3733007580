//! The mount point: is it free, and apart from the backing directory.

use std::path::Path;

use super::Finding;
use crate::mount::check::{self, apart, ask, final_path, is_dead};
use crate::mount::table;

const CHECK: &str = "mount point";

/// All about the mount point.
pub fn examine(path: &Path, backing: Option<&Path>) -> Vec<Finding> {
    let full = match final_path(path) {
        Ok(full) => full,
        Err(e) => return vec![Finding::refused(CHECK, &check::system(CHECK, path, &e))],
    };
    let mut found = vec![state(&full)];
    if let Some(Err(e)) = backing.and_then(|b| std::fs::canonicalize(b).ok()).map(|b| apart(&b, &full)) {
        found.push(Finding::refused("two directories", &e));
    }
    found
}

fn state(full: &Path) -> Finding {
    let mounts = table::read().unwrap_or_default();
    let ours = table::at(&mounts, full).is_some_and(table::Mounted::is_fsys);
    match (ask(full), ours) {
        (Ok(()), true) => Finding::ok(CHECK, format!("an fsys mount is at {} and answers", full.display())),
        (Err(e), true) if is_dead(&e) => Finding::warning(
            CHECK,
            format!("a dead mount is at {}: its daemon is gone", full.display()),
            "programs there get ENOTCONN; every file in the backing directory is at one of its commit points",
            "mount again with the same command: that detaches it and recovers",
        ),
        (Err(e), _) => Finding::refused(CHECK, &check::system(CHECK, full, &e)),
        (Ok(()), false) => free(full),
    }
}

fn free(full: &Path) -> Finding {
    match std::fs::read_dir(full).map(|mut entries| entries.next().is_some()) {
        Ok(false) => Finding::ok(CHECK, format!("{} is there and empty", full.display())),
        Ok(true) => Finding::warning(
            CHECK,
            format!("{} is not empty", full.display()),
            "a mount hides what is in it",
            "move it away, or choose an empty directory",
        ),
        Err(e) => Finding::refused(CHECK, &check::system(CHECK, full, &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn missing_full_and_within() {
        let dir = tempfile::tempdir().unwrap();
        let level = |path: &Path, backing| examine(path, backing).iter().map(|f| f.level).max().unwrap();
        assert_eq!(level(dir.path(), None), Level::Ok);
        assert_eq!(level(&dir.path().join("none"), None), Level::Failure);
        std::fs::create_dir(dir.path().join("b")).unwrap();
        assert_eq!(level(dir.path(), None), Level::Warning);
        assert_eq!(level(&dir.path().join("b"), Some(dir.path())), Level::Failure);
    }
}
