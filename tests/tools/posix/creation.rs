//! What a new file, directory or node gets: mode, owner, group, ACL; and where it may be made.

use std::path::Path;

use rustix::fs::{self as rfs, CWD, FileType, Mode, OFlags};

use super::kit::{ALL, ANN, BOB, Log, NEW, ROOT, TEAM, Who, content, dir, file, look, mode, open, run_as, shell, told};

pub const CHECKS: &[super::Check] = &[
    ("umasks", umasks),
    ("setgid_directory", setgid_directory),
    ("default_acl", default_acl),
    ("groups", groups),
    ("sticky", sticky),
    ("read_only_file", read_only_file),
    ("read_only_truncate", read_only_truncate),
    ("owners", owners),
];

fn make(d: &Path, who: Who, mask: u32, mode: u32) -> String {
    let name = |what: &str| d.join(format!("{}-{mask:o}-{mode:o}-{what}", who.name));
    run_as(who, || {
        rustix::process::umask(Mode::from_raw_mode(mask));
        let m = Mode::from_raw_mode(mode);
        let made = [
            told(open(&name("file"), NEW, mode).map(drop)),
            told(rfs::mkdir(name("dir"), m)),
            told(rfs::mknodat(CWD, name("fifo"), FileType::Fifo, m, 0)),
            told(rfs::mknodat(CWD, name("node"), FileType::RegularFile, m, 0)),
            told(rfs::symlink("target", name("link"))),
        ];
        let looks = ["file", "dir", "fifo", "node", "link"].map(|n| look(&name(n)));
        format!("{made:?} {looks:?}")
    })
}

fn umasks(d: &Path, log: &mut Log) {
    super::kit::own(d, (0, 0), 0o777);
    for who in ALL {
        for (mask, mode) in [(0, 0o666), (0o22, 0o777), (0o77, 0o6777), (0o177, 0o1644), (0o777, 0o7777), (0o2, 0o444)]
        {
            log.note(format!("{} {mask:o} {mode:o}", who.name), make(d, who, mask, mode));
        }
    }
}

fn setgid_directory(d: &Path, log: &mut Log) {
    for m in [0o2777, 0o3777] {
        let at = d.join(format!("{m:o}"));
        dir(&at, (0, TEAM), m);
        for who in ALL {
            for mode in [0o666, 0o2775, 0o2664, 0o6777] {
                log.note(format!("{m:o} {} {mode:o}", who.name), make(&at, who, 0o22, mode));
            }
        }
    }
}

fn default_acl(d: &Path, log: &mut Log) {
    dir(&d.join("a"), (0, TEAM), 0o2777);
    log.note("set", shell(d, "setfacl -d -m u:1002:rwx,g::r-x,g:1004:rw,m::rwx,o::--- a"));
    for who in ALL {
        for (mask, mode) in [(0o77, 0o666), (0, 0o777), (0o22, 0o640)] {
            log.note(format!("{} {mask:o} {mode:o}", who.name), make(&d.join("a"), who, mask, mode));
        }
    }
    log.note("all", shell(d, "getfacl -nR a"));
    // A rewrite keeps the file's own ACL, also none at all.
    log.note("rewrite", shell(d, "setfacl -b a/ann-77-666-file; echo x > a/ann-77-666-file; getfacl -n a/*-file"));
    log.note("chmod", shell(d, "chmod 604 a/root-0-777-file; getfacl -n a/root-0-777-file"));
}

fn groups(d: &Path, log: &mut Log) {
    dir(&d.join("team"), (0, TEAM), 0o770);
    dir(&d.join("own"), (1001, 1001), 0o700);
    dir(&d.join("drop"), (0, TEAM), 0o730);
    for who in ALL {
        for at in ["team", "own", "drop"] {
            log.note(format!("{} in {at}", who.name), make(&d.join(at), who, 0o22, 0o644));
            let listed = run_as(who, || told(std::fs::read_dir(d.join(at)).map(Iterator::count).map_err(as_errno)));
            log.note(format!("{} lists {at}", who.name), listed);
        }
    }
    file(&d.join("team/shared"), b"x", (0, TEAM), 0o660);
    for who in ALL {
        let r = run_as(who, || told(open(&d.join("team/shared"), OFlags::WRONLY | OFlags::TRUNC, 0).map(drop)));
        log.note(format!("{} truncates", who.name), r);
    }
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn as_errno(e: std::io::Error) -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&e).expect("a system error")
}

fn sticky(d: &Path, log: &mut Log) {
    let at = d.join("tmp");
    dir(&at, (0, 0), 0o1777);
    for name in ["a", "b", "c"] {
        file(&at.join(name), b"ann's", (1001, 1001), 0o666);
    }
    file(&at.join("bobs"), b"bob's", (1002, 1002), 0o666);
    log.note("bob unlinks", run_as(BOB, || told(rfs::unlink(at.join("a")))));
    log.note("bob renames", run_as(BOB, || told(rfs::rename(at.join("a"), at.join("z")))));
    log.note("bob renames over", run_as(BOB, || told(rfs::rename(at.join("bobs"), at.join("a")))));
    log.note("bob writes", run_as(BOB, || told(open(&at.join("b"), OFlags::WRONLY | OFlags::TRUNC, 0).map(drop))));
    log.note(
        "bob creates",
        run_as(BOB, || told(open(&at.join("c"), OFlags::WRONLY | OFlags::CREATE, 0o666).map(drop))),
    );
    log.note("bob links", run_as(BOB, || told(rfs::link(at.join("c"), at.join("l")))));
    log.note("ann unlinks", run_as(ANN, || told(rfs::unlink(at.join("a")))));
    log.note("root unlinks", run_as(ROOT, || told(rfs::unlink(at.join("b")))));
}

fn read_only_file(d: &Path, log: &mut Log) {
    super::kit::own(d, (0, 0), 0o777);
    for who in ALL {
        for mode in [0o444, 0o000, 0o200, 0o4555] {
            let path = d.join(format!("{}-{mode:o}", who.name));
            let r = run_as(who, || {
                let made = open(&path, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY, mode);
                let wrote = made.map(|fd| told(rustix::io::write(&fd, b"content")));
                let again = told(open(&path, OFlags::RDWR, 0).map(drop));
                let write_only = told(open(&path, OFlags::WRONLY, 0).and_then(|fd| rustix::io::write(&fd, b"C")));
                format!("{} {again} {write_only}", told(wrote))
            });
            log.note(format!("{} {mode:o}", who.name), r);
            log.note("then", (super::kit::mode(&path), content(&path)));
        }
    }
}

fn read_only_truncate(d: &Path, log: &mut Log) {
    file(&d.join("f"), b"content", (1001, 1001), 0o644);
    let fd = open(&d.join("f"), OFlags::RDONLY | OFlags::TRUNC, 0);
    log.note("root", told(fd.map(|fd| told(rustix::io::write(&fd, b"x")))));
    log.note("content", content(&d.join("f")));
    file(&d.join("g"), b"content", (1001, 1001), 0o444);
    let r = run_as(ANN, || told(open(&d.join("g"), OFlags::RDONLY | OFlags::TRUNC, 0).map(drop)));
    log.note("ann", r);
    log.note("content", content(&d.join("g")));
}

fn owners(d: &Path, log: &mut Log) {
    super::kit::own(d, (0, 0), 0o777);
    for who in ALL {
        let path = d.join(who.name);
        let r = run_as(who, || {
            let link = path.with_extension("link");
            drop(open(&path, NEW, 0o644));
            let linked = told(rfs::link(&path, &link));
            format!("{linked} {} {}", look(&path), look(&link))
        });
        log.note(who.name, r);
        // By another one's rewrite the owner stays.
        log.note("rewritten", (std::fs::write(&path, "x").is_ok(), look(&path), mode(&path)));
    }
    let null = d.join("null");
    let node = |who| {
        run_as(who, || told(rfs::mknodat(CWD, &null, FileType::CharacterDevice, 0o666.into(), rfs::makedev(1, 3))))
    };
    log.note("ann makes a device", node(ANN));
    log.note("root makes a device", node(ROOT));
    log.note("it is", (look(&null), super::kit::stat(&null).st_rdev));
    log.note("ann uses it", run_as(ANN, || told(std::fs::write(&null, "x").map_err(as_errno))));
}
