//! The two hostile processes of tests/attack.rs, as ordinary users.
//!
//! `attacker swap DIR UID` exchanges the directory `a/d` with the symlink `a/evil`, which leads out, and moves it to
//! `b/d` and back, as fast as it can and until it is killed. `attacker probe DIR UID SECONDS` meanwhile uses names
//! through `a/d` in every way that there is, and tells as JSON how often it got in and how often it read a secret.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{self as rfs, AtFlags, CWD, Mode, OFlags, RenameFlags};

/// What the files outside hold.
const SECRET: &str = "secret";

fn become_user(uid: u32) {
    // SAFETY: plain integers, no groups.
    let done = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(uid, uid, uid) == 0
            && libc::setresuid(uid, uid, uid) == 0
    };
    assert!(done, "cannot become user {uid}");
}

fn swap() -> ! {
    for n in 0_u64.. {
        let _ = rfs::renameat_with(CWD, "a/d", CWD, "a/evil", RenameFlags::EXCHANGE);
        if n % 16 == 0 {
            let _ = rfs::rename("a/d", "b/d");
            let _ = rfs::rename("b/d", "a/d");
        }
    }
    unreachable!("the end of counting");
}

fn holds_secret(fd: OwnedFd) -> bool {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).is_ok() && text.contains(SECRET)
}

#[derive(Default)]
struct Found {
    rounds: u64,
    inside: u64,
    secrets: u64,
}

impl Found {
    fn read(&mut self, dir: &OwnedFd, name: &str) {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if let Ok(fd) = rfs::openat(dir, name, flags, Mode::empty()) {
            self.secrets += u64::from(holds_secret(fd));
        }
    }

    /// By a descriptor of the directory, which leads nowhere else by itself, or from the working directory.
    fn use_names(&mut self, dir: &OwnedFd, prefix: &str) {
        let at = |name: &str| format!("{prefix}{name}");
        let new = OFlags::CREATE | OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC;
        if let Ok(fd) = rfs::openat(dir, at(&format!("f{}", self.rounds % 7)), new, 0o666.into()) {
            self.inside += u64::from(rustix::io::write(&fd, b"planted").is_ok());
        }
        self.read(dir, &at("canary"));
        self.read(dir, &at("sub/canary"));
        let _ = rfs::renameat(dir, at(&format!("f{}", self.rounds % 7)), dir, at("moved"));
        let _ = rfs::linkat(dir, at("moved"), dir, at("linked"), AtFlags::empty());
        let _ = rfs::unlinkat(dir, at("linked"), AtFlags::empty());
        let _ = rfs::mkdirat(dir, at("k"), 0o777.into());
        let _ = rfs::unlinkat(dir, at("k"), AtFlags::REMOVEDIR);
        let _ = rfs::symlinkat("canary", dir, at("s"));
        self.read(dir, &at("s"));
        let _ = rfs::unlinkat(dir, at("s"), AtFlags::empty());
        let _ = rfs::chmodat(dir, at("canary"), 0o777.into(), AtFlags::empty());
        if let Ok(fd) = rfs::openat(dir, at("canary"), OFlags::WRONLY | OFlags::TRUNC, Mode::empty()) {
            let _ = rustix::io::write(&fd, b"overwritten");
        }
        let _ = rfs::unlinkat(dir, at("canary"), AtFlags::empty());
        let _ = rfs::unlinkat(dir, at("sub/canary"), AtFlags::empty());
    }
}

fn probe(limit: Duration) {
    let (mut found, end) = (Found::default(), Instant::now() + limit);
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let here = rfs::open(".", flags, Mode::empty()).expect("the tree");
    while Instant::now() < end {
        if let Ok(dir) = rfs::open("a/d", flags | OFlags::NOFOLLOW, Mode::empty()) {
            found.use_names(&dir, "");
        }
        found.use_names(&here, "a/d/");
        found.rounds += 1;
    }
    let told = serde_json::json!({ "rounds": found.rounds, "inside": found.inside, "secrets": found.secrets });
    writeln!(std::io::stdout(), "{told}").expect("standard output");
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (what, dir, uid) = (args[0], Path::new(args[1]), args[2].parse().expect("a user"));
    std::env::set_current_dir(dir).expect("the tree");
    become_user(uid);
    match what {
        "swap" => swap(),
        "probe" => probe(Duration::from_secs(args[3].parse().expect("seconds"))),
        other => panic!("{other} is no attack"),
    }
}
