//! The machine: kernel, privileges, FUSE, limits.

use std::os::unix::fs::PermissionsExt;

use rustix::process::Resource;

use super::{Finding, number_in, text_in};
use crate::backend::uring::Flusher;
use crate::mount::check;
use crate::sys::creds;

/// The oldest kernel line that FUSE servers of this kind are known to run on.
const OLDEST: (u32, u32) = (5, 10);
/// Open files at the same time that a mount should be able to serve.
const FILES_MIN: u64 = 4096;
/// The kernel must not end a connection before a slow device has answered, in seconds.
const TIMEOUT_MIN_S: u64 = 120;

/// All about the machine.
pub fn examine() -> Vec<Finding> {
    let mut found = vec![kernel(), fuse_device(), privileges()];
    found.extend(lasting());
    found.extend([transport(), io_uring()]);
    found
}

/// What also matters once it is mounted.
pub fn lasting() -> Vec<Finding> {
    vec![open_files(), request_timeout()]
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let version = version_of(&release);
    if version < OLDEST {
        return Finding::warning(
            "kernel",
            format!("Linux {release}"),
            "older than any that this was tried on",
            "use Linux 5.10 or newer",
        );
    }
    let mut has = Vec::new();
    for (since, what) in [((6, 9), "passthrough"), ((6, 14), "FUSE over io_uring")] {
        if version >= since {
            has.push(what);
        }
    }
    let more = if has.is_empty() { String::new() } else { format!(", new enough for {}", has.join(" and ")) };
    Finding::ok("kernel", format!("Linux {release}{more}"))
}

/// Major and minor number; 0 for what is none.
fn version_of(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn fuse_device() -> Finding {
    match check::device() {
        Ok(()) => Finding::ok("/dev/fuse", "can be opened"),
        Err(e) => Finding::refused("/dev/fuse", &e),
    }
}

/// Root mounts by itself, with capabilities; others by fusermount3.
fn privileges() -> Finding {
    if !rustix::process::geteuid().is_root() {
        return fusermount();
    }
    let check = "capabilities";
    match creds::missing_capabilities() {
        Ok(missing) if missing.is_empty() => Finding::ok(check, "root, with all that a mount needs"),
        Ok(missing) if missing.contains(&"CAP_SYS_ADMIN") => Finding::failure(
            check,
            format!("root without {}", missing.join(", ")),
            "the kernel refuses to mount",
            "in a container, give it CAP_SYS_ADMIN (--cap-add SYS_ADMIN) and /dev/fuse",
        ),
        Ok(missing) => Finding::warning(
            check,
            format!("root without {}", missing.join(", ")),
            "other users' files cannot be created, owned or kept as they are: some calls fail with EPERM",
            "give the capabilities to the service or the container",
        ),
        Err(e) => Finding::warning(check, e.to_string(), "not known", "see that /proc is mounted"),
    }
}

fn fusermount() -> Finding {
    let check = "fusermount3";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("fusermount3")).find(|p| p.is_file());
    let Some(program) = found else {
        return Finding::failure(
            check,
            "not installed",
            "an ordinary user cannot mount",
            "install the package fuse3, or mount as root",
        );
    };
    let set_user_id = std::fs::metadata(&program).is_ok_and(|m| m.permissions().mode() & 0o4000 != 0);
    if !set_user_id {
        return Finding::failure(
            check,
            format!("{} is not set-user-ID root", program.display()),
            "an ordinary user cannot mount",
            "reinstall the package fuse3, or mount as root",
        );
    }
    let conf = text_in("/etc/fuse.conf").unwrap_or_default();
    let others = conf.lines().any(|l| l.trim() == "user_allow_other");
    let allowed =
        if others { "allow_other may be used" } else { "allow_other needs user_allow_other in /etc/fuse.conf" };
    Finding::ok(check, format!("{}; {allowed}", program.display()))
}

fn open_files() -> Finding {
    let check = "open files";
    match rustix::process::getrlimit(Resource::Nofile).maximum {
        Some(n) if n < FILES_MIN => Finding::warning(
            check,
            format!("at most {n} descriptors for the daemon"),
            "programs that have about as many files open together get EMFILE",
            "raise the limit (`ulimit -Hn`, LimitNOFILE= of the service) to at least 4096",
        ),
        Some(n) => Finding::ok(check, format!("up to {n} descriptors")),
        None => Finding::ok(check, "no limit of descriptors"),
    }
}

/// Linux 6.15 and later can end a FUSE connection when one request takes too long (Documentation/admin-guide/sysctl/fs.rst).
fn request_timeout() -> Finding {
    let check = "request time-out";
    let read = |name: &str| number_in(&format!("/proc/sys/fs/fuse/{name}")).filter(|n| *n > 0);
    match read("max_request_timeout").or(read("default_request_timeout")) {
        Some(s) if s < TIMEOUT_MIN_S => Finding::warning(
            check,
            format!("the kernel ends a FUSE mount when one request takes {s} s"),
            "a device that is slow for that long takes the mount away; what was acknowledged stands",
            "sysctl fs.fuse.max_request_timeout=0 fs.fuse.default_request_timeout=0",
        ),
        Some(s) => Finding::ok(check, format!("{s} s")),
        None => Finding::ok(check, "none"),
    }
}

fn transport() -> Finding {
    let check = "requests";
    match crate::transport::uring_available() {
        Ok(()) => Finding::ok(check, "through io_uring, unless transport=fuser is set"),
        Err(why) => Finding::ok(check, format!("by /dev/fuse, not io_uring: {why}")),
    }
}

fn io_uring() -> Finding {
    let check = "io_uring";
    if Flusher::new().has_ring() {
        return Finding::ok(check, "can be used: groups of flushes go through it");
    }
    let why = match number_in("/proc/sys/kernel/io_uring_disabled") {
        Some(n) if n > 0 => format!("switched off (kernel.io_uring_disabled={n})"),
        _ => "refused, by a container or a security module perhaps".to_owned(),
    };
    Finding::ok(check, format!("{why}: threads flush instead, with the same result"))
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version_of("6.18.5-arch1"), (6, 18));
        assert_eq!(version_of("5.4"), (5, 4));
        assert!(version_of("garbage") < OLDEST);
    }

    #[test]
    fn each_check_speaks_and_each_concern_has_a_remedy() {
        let found = examine();
        assert_eq!(found.len(), 7);
        for f in found {
            assert!(!f.cause.is_empty(), "{f}");
            assert!(f.level == Level::Ok || !(f.effect.is_empty() || f.action.is_empty()), "{f}");
        }
    }
}
