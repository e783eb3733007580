//! `mount -o remount`: flags of the mount, and values that differ from what it was mounted with.

use std::path::Path;
use std::time::Duration;

use rustix::fs::StatVfsMountFlags;
use rustix::mount::MountFlags;

use super::Output;
use super::client::{Daemon, find, strange};
use crate::config::options::FuseOptions;
use crate::error::{Error, Exit, Result};
use crate::mount::Request;
use crate::mount::check::final_path;
use crate::mount::control::{Answer, Request as Ask};

/// Changes the mount at the request's mount point.
///
/// mount(8) gives all options of the fstab line, so a value that is as it was mounted is left alone, also where it was
/// changed at run time. Rules and files are not looked at: `fsys reload` and `fsys set --match` are for those.
pub fn run(request: &Request, verbose: bool) -> Result<Output> {
    let at = &request.mountpoint;
    let mount = find(Some(at))?;
    if final_path(at).is_ok_and(|full| full != mount.mountpoint) {
        return Err(failed(at, "nothing is mounted exactly there", "nothing was changed", "name the mount point"));
    }
    if !request.options.settings.is_empty() {
        let ask = Ask::Remount { values: request.options.settings.clone() };
        match Daemon::of(&mount)?.ask(&ask, Duration::ZERO)? {
            Answer::Config(_) => {}
            other => return Err(strange(&other)),
        }
    }
    set_flags(at, &request.options.fuse)?;
    let text = if verbose { format!("{} is remounted", at.display()) } else { String::new() };
    Ok(Output { text, exit: Exit::Ok })
}

fn set_flags(at: &Path, wanted: &FuseOptions) -> Result<()> {
    let refused = |e: rustix::io::Errno| {
        failed(
            at,
            e,
            "its flags are as they were; values of fsys were taken",
            "remount it as root (`mount -o remount`)",
        )
    };
    let now = rustix::fs::statvfs(at).map_err(refused)?.f_flag;
    let flags = flags(now, wanted);
    if flags == self::flags(now, &FuseOptions::default()) {
        return Ok(());
    }
    rustix::mount::mount_remount(at, flags, c"").map_err(refused)
}

/// The flags that hold, but for those that are asked for.
fn flags(now: StatVfsMountFlags, wanted: &FuseOptions) -> MountFlags {
    let on = |wanted: Option<bool>, flag| wanted.unwrap_or_else(|| now.contains(flag));
    let not = |wanted: Option<bool>| wanted.map(|w| !w);
    let all = [
        (MountFlags::RDONLY, on(wanted.read_only, StatVfsMountFlags::RDONLY)),
        (MountFlags::NODEV, on(not(wanted.dev), StatVfsMountFlags::NODEV)),
        (MountFlags::NOSUID, on(not(wanted.suid), StatVfsMountFlags::NOSUID)),
        (MountFlags::NOEXEC, on(not(wanted.exec), StatVfsMountFlags::NOEXEC)),
        (MountFlags::NOATIME, on(not(wanted.atime), StatVfsMountFlags::NOATIME)),
        (MountFlags::NODIRATIME, now.contains(StatVfsMountFlags::NODIRATIME)),
        (MountFlags::RELATIME, now.contains(StatVfsMountFlags::RELATIME)),
    ];
    all.into_iter().filter(|(_, on)| *on).map(|(flag, _)| flag).collect()
}

fn failed(at: &Path, why: impl std::fmt::Display, effect: &str, action: &str) -> Error {
    Error::new(Exit::Mount, format!("cannot remount {}", at.display()), why, effect, action)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_asked_for_stays() {
        let now = StatVfsMountFlags::NODEV | StatVfsMountFlags::RELATIME;
        let wanted =
            FuseOptions { read_only: Some(true), exec: Some(false), dev: Some(true), ..FuseOptions::default() };
        assert_eq!(flags(now, &wanted), MountFlags::RDONLY | MountFlags::NOEXEC | MountFlags::RELATIME);
        assert_eq!(flags(now, &FuseOptions::default()), MountFlags::NODEV | MountFlags::RELATIME);
    }
}
