//! An ordinary user, and a mount of their own by fusermount3.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::mount::{fsys, fsys_mount};
use super::{fresh_dir, is_mounted, run, run_logged};

/// An ordinary user that every system has: fusermount3 asks for the name.
pub const NOBODY: u32 = 65534;

/// Runs a command as an ordinary user.
pub fn as_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--"]).arg(program);
    command.env("HOME", "/nonexistent").env_remove("XDG_RUNTIME_DIR");
    command
}

/// A mount that an ordinary user made of a directory of their own; taken away when dropped.
pub struct UsersMount {
    dir: PathBuf,
}

impl UsersMount {
    /// Mounts `backing`, which belongs to the user.
    pub fn start(backing: &Path, options: &[&str]) -> Self {
        // As udev sets it up; without udev it is root's.
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        let dir = fresh_dir("user");
        std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
        let log = dir.with_extension("log");
        let mut command = as_user(Path::new(fsys_mount().get_program()));
        let status = run_logged(command.args(options).arg(backing).arg(&dir), &log, Duration::from_secs(60)).unwrap();
        assert!(status.is_some_and(|s| s.success()), "{}", fs::read_to_string(&log).unwrap());
        fs::remove_file(log).unwrap();
        Self { dir }
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Unmounts as that user.
    pub fn stop(&self) {
        run(as_user(Path::new(fsys().get_program())).arg("umount").arg(&self.dir));
        assert!(!is_mounted(&self.dir));
    }
}

impl Drop for UsersMount {
    fn drop(&mut self) {
        if is_mounted(&self.dir) {
            let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        }
        let _ = fs::remove_dir(&self.dir);
    }
}
