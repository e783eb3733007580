//! Names: rename of everything over everything, links, long and strange names, paths.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self as rfs, AtFlags, CWD, OFlags, RenameFlags};

use super::kit::{ANN, BOB, Log, NEW, content, dir, file, look, open, run_as, shell, stat, told};

pub const CHECKS: &[super::Check] = &[
    ("renames", renames),
    ("rename_rights", rename_rights),
    ("removals", removals),
    ("links", links),
    ("strange_names", strange_names),
    ("paths", paths),
    ("numbers", numbers),
    ("nodes", nodes),
];

const KINDS: [&str; 8] = ["none", "file", "staged", "empty", "full", "link", "fifo", "opened"];

/// Makes one of each kind; a descriptor for those that are being written.
fn one(path: &Path, kind: &str, content: &[u8]) -> Option<std::os::fd::OwnedFd> {
    match kind {
        "file" => file(path, content, (0, 0), 0o644),
        "staged" => {
            let fd = open(path, NEW, 0o644).expect("create");
            rustix::io::write(&fd, content).expect("write");
            return Some(fd);
        }
        "opened" => {
            file(path, content, (0, 0), 0o644);
            let fd = open(path, OFlags::RDWR | OFlags::TRUNC, 0).expect("open");
            rustix::io::write(&fd, content).expect("write");
            return Some(fd);
        }
        "empty" => dir(path, (0, 0), 0o755),
        "full" => {
            dir(path, (0, 0), 0o755);
            // A child that is being written, too.
            return one(&path.join("child"), "staged", b"child");
        }
        "link" => rfs::symlink("nowhere", path).expect("symlink"),
        "fifo" => rfs::mknodat(CWD, path, rfs::FileType::Fifo, 0o644.into(), 0).expect("fifo"),
        _ => {}
    }
    None
}

fn renames(d: &Path, log: &mut Log) {
    let flags = [
        ("", RenameFlags::empty()),
        ("noreplace", RenameFlags::NOREPLACE),
        ("exchange", RenameFlags::EXCHANGE),
        ("whiteout", RenameFlags::WHITEOUT),
        ("both", RenameFlags::EXCHANGE | RenameFlags::NOREPLACE),
    ];
    for (n, (word, flag)) in flags.into_iter().enumerate() {
        for a in KINDS {
            for b in KINDS {
                let at = d.join(format!("{n}-{a}-{b}"));
                dir(&at, (0, 0), 0o755);
                let (from, to) = (at.join("a"), at.join("b"));
                let held = (one(&from, a, b"from"), one(&to, b, b"to"));
                let r = told(rfs::renameat_with(CWD, &from, CWD, &to, flag));
                let now = [look(&from), look(&to)];
                for fd in [held.0, held.1].into_iter().flatten() {
                    rustix::io::write(&fd, b"!").expect("write");
                }
                log.note(format!("{word} {a} over {b}"), (r, now, shell(&at, "ls -RF .")));
                log.note("content", [content_of(&from), content_of(&to)]);
            }
        }
    }
    log.note("into itself", {
        dir(&d.join("p"), (0, 0), 0o755);
        told(rfs::rename(d.join("p"), d.join("p/q")))
    });
    log.note("onto itself", (told(rfs::rename(d.join("p"), d.join("p"))), d.join("p").is_dir()));
}

fn content_of(path: &Path) -> String {
    match rfs::lstat(path).map(|s| s.st_mode & libc::S_IFMT) {
        Ok(libc::S_IFREG) => content(path),
        Ok(libc::S_IFDIR) => {
            let mut all: Vec<PathBuf> =
                std::fs::read_dir(path).expect("list").map(|e| e.expect("entry").path()).collect();
            all.sort();
            all.iter().map(|p| content(p)).collect()
        }
        _ => String::new(),
    }
}

fn rename_rights(d: &Path, log: &mut Log) {
    for (name, owner, mode) in [("anns", 1001, 0o755), ("bobs", 1002, 0o755), ("all", 0, 0o777), ("tmp", 0, 0o1777)] {
        dir(&d.join(name), (owner, owner), mode);
        for f in ["x", "y"] {
            file(&d.join(name).join(f), f.as_bytes(), (1001, 1001), 0o644);
        }
        dir(&d.join(name).join("d"), (1002, 1002), 0o755);
    }
    let places = ["anns", "bobs", "all", "tmp"];
    for who in [ANN, BOB] {
        for from in places {
            for to in places {
                let mv = |a: &str, b: &str| run_as(who, || told(rfs::rename(d.join(from).join(a), d.join(to).join(b))));
                let r = mv("x", "moved");
                let back = rfs::rename(d.join(to).join("moved"), d.join(from).join("x"));
                log.note(format!("{} {from} to {to}", who.name), (r, told(back)));
                let r = mv("d", "moved");
                let back = rfs::rename(d.join(to).join("moved"), d.join(from).join("d"));
                log.note("a directory", (r, told(back)));
            }
        }
    }
}

fn removals(d: &Path, log: &mut Log) {
    for kind in KINDS {
        let (a, b) = (d.join(format!("{kind}-a")), d.join(format!("{kind}-b")));
        let _held = (one(&a, kind, b"x"), one(&b, kind, b"x"));
        log.note(format!("{kind} unlink"), (told(rfs::unlink(&a)), look(&a)));
        log.note(format!("{kind} rmdir"), (told(rfs::rmdir(&b)), look(&b)));
        log.note(format!("{kind} mkdir"), told(rfs::mkdir(&b, 0o755.into())));
    }
    dir(&d.join("p"), (0, 0), 0o755);
    log.note("rmdir .", told(rfs::rmdir(d.join("p/."))));
    log.note("rmdir ..", told(rfs::rmdir(d.join("p/.."))));
    log.note(
        "slashes",
        (
            told(rfs::mkdir(d.join("s/"), 0o755.into())),
            told(rfs::unlink(d.join("file-b/"))),
            told(rfs::rmdir(d.join("s//"))),
        ),
    );
}

fn links(d: &Path, log: &mut Log) {
    let all =
        |log: &mut Log, what: &str| log.note(what, ["f", "l", "m"].map(|n| (look(&d.join(n)), content(&d.join(n)))));
    file(&d.join("f"), b"one", (0, 0), 0o644);
    log.note("link", told(rfs::link(d.join("f"), d.join("l"))));
    all(log, "two names");
    log.note("again", told(rfs::link(d.join("f"), d.join("l"))));
    std::fs::write(d.join("l"), "two").expect("write");
    all(log, "rewritten");
    log.note("shell appends", shell(d, "echo three >> f"));
    all(log, "appended");
    log.note("rename over the other name", told(rfs::rename(d.join("f"), d.join("l"))));
    all(log, "both stay");
    log.note("third", told(rfs::link(d.join("l"), d.join("m"))));
    let fd = open(&d.join("m"), OFlags::RDWR | OFlags::TRUNC, 0).expect("open");
    rustix::io::write(&fd, b"open").expect("write");
    rfs::unlink(d.join("f")).expect("unlink");
    all(log, "while open");
    drop(fd);
    all(log, "closed");
    let fd = open(&d.join("staged"), NEW, 0o644).expect("create");
    rustix::io::write(&fd, b"s").expect("write");
    log.note("of a file being written", (told(rfs::link(d.join("staged"), d.join("k"))), look(&d.join("k"))));
    rustix::io::write(&fd, b"t").expect("write");
    drop(fd);
    log.note("both", (content(&d.join("staged")), content(&d.join("k"))));
    log.note("directory", told(rfs::link(d, d.join("n"))));
    rfs::symlink("f", d.join("sym")).expect("symlink");
    log.note("symlink", (told(rfs::link(d.join("sym"), d.join("sym2"))), look(&d.join("sym2"))));
    log.note("followed", told(rfs::linkat(CWD, d.join("sym"), CWD, d.join("sym3"), AtFlags::SYMLINK_FOLLOW)));
    log.note("ann links root's", run_as(ANN, || told(rfs::link(d.join("l"), d.join("x")))));
}

fn strange_names(d: &Path, log: &mut Log) {
    let long = |n| "x".repeat(n).into_bytes();
    let names: [Vec<u8>; 11] = [
        long(254),
        long(255),
        long(256),
        long(4000),
        b"\xff\xfe\x80".to_vec(),
        b"new\nline".to_vec(),
        b" ".to_vec(),
        b"...".to_vec(),
        b"\\".to_vec(),
        b"\x01\x7f".to_vec(),
        "\u{e9}\u{1f600}".as_bytes().to_vec(),
    ];
    for (i, name) in names.iter().enumerate() {
        let path = d.join(OsStr::from_bytes(name));
        let r = [
            told(open(&path, NEW, 0o644).map(drop)),
            told(rfs::rename(&path, d.join("r")).and_then(|()| rfs::rename(d.join("r"), &path))),
            told(rfs::link(&path, d.join("l")).and_then(|()| rfs::unlink(d.join("l")))),
            told(rfs::stat(&path).map(drop)),
        ];
        log.note(format!("name {i}"), r);
    }
    let mut all: Vec<_> = std::fs::read_dir(d).expect("list").map(|e| e.expect("entry").file_name()).collect();
    all.sort();
    log.note("listed", all.iter().map(|n| n.as_bytes().escape_ascii().to_string()).collect::<Vec<_>>());
    log.note("symlink to a long path", (told(rfs::symlink("y/".repeat(2000), d.join("s"))), stat_size(&d.join("s"))));
    log.note("to one too long", told(rfs::symlink("y/".repeat(2048), d.join("t"))));
    log.note("strange target", {
        rfs::symlink(OsStr::from_bytes(b"\xff/../.fsys"), d.join("u")).expect("symlink");
        told(rfs::readlink(d.join("u"), Vec::new()))
    });
}

fn stat_size(path: &Path) -> String {
    told(rfs::lstat(path).map(|s| s.st_size))
}

fn paths(d: &Path, log: &mut Log) {
    let mut at = rfs::openat(CWD, d, OFlags::PATH | OFlags::DIRECTORY, 0.into()).expect("open");
    for _ in 0..300 {
        rfs::mkdirat(&at, "deeper", 0o755.into()).expect("mkdir");
        at = rfs::openat(&at, "deeper", OFlags::PATH | OFlags::DIRECTORY, 0.into()).expect("open");
    }
    let fd = rfs::openat(&at, "bottom", NEW, 0o644.into());
    log.note("bottom", told(fd.and_then(|fd| rustix::io::write(&fd, b"x"))));
    log.note("depth", shell(d, "find . | wc -l; find . -name bottom | wc -c"));
    log.note("moved", shell(d, "mv deeper top; find top -name bottom | wc -c; rm -r top; ls"));
    rfs::symlink("b", d.join("a")).expect("symlink");
    rfs::symlink("a", d.join("b")).expect("symlink");
    rfs::symlink("self", d.join("self")).expect("symlink");
    for name in ["a", "self", "a/x"] {
        log.note(
            format!("loop {name}"),
            (
                told(rfs::stat(d.join(name)).map(drop)),
                told(open(&d.join(name), OFlags::RDWR | OFlags::CREATE, 0o644).map(drop)),
            ),
        );
    }
    let mut last = "f".to_owned();
    file(&d.join("f"), b"end", (0, 0), 0o644);
    for i in 0..42 {
        rfs::symlink(&last, d.join(format!("l{i}"))).expect("symlink");
        last = format!("l{i}");
    }
    log.note("40 links", (content(&d.join("l39")), content(&d.join("l40"))));
    log.note("through a file", told(rfs::stat(d.join("f/x")).map(drop)));
    log.note("path too long", told(rfs::stat(d.join("y/".repeat(2100))).map(drop)));
    log.note("empty", told(rfs::stat("").map(drop)));
}

fn numbers(d: &Path, log: &mut Log) {
    let path = d.join("f");
    std::fs::write(&path, "1").expect("write");
    let first = stat(&path).st_ino;
    let same = |log: &mut Log, what: &str, p: &Path| log.note(what, (stat(p).st_ino == first, stat(p).st_nlink));
    std::fs::write(&path, "2").expect("write");
    same(log, "rewritten", &path);
    let fd = open(&path, OFlags::WRONLY | OFlags::TRUNC, 0).expect("open");
    same(log, "being rewritten", &path);
    rustix::io::write(&fd, b"3").expect("write");
    rfs::fsync(&fd).expect("sync");
    same(log, "synced", &path);
    rustix::io::write(&fd, b"4").expect("write");
    drop(fd);
    rfs::rename(&path, d.join("g")).expect("rename");
    same(log, "renamed", &d.join("g"));
    rfs::link(d.join("g"), d.join("h")).expect("link");
    same(log, "linked", &d.join("h"));
    let listed = std::fs::read_dir(d).expect("list").all(|e| {
        use std::os::unix::fs::DirEntryExt;
        e.expect("entry").ino() == first
    });
    log.note("listed", listed);
    log.note("sed -i, which renames", shell(d, "sed -i s/4/5/ h; cat g h; stat -c %h g h"));
    log.note("directory", shell(d, "mkdir k k/a k/b; rmdir k/a; mv k/b c; ls"));
}

fn nodes(d: &Path, log: &mut Log) {
    let py = "import os,socket,stat,sys\n\
        s=socket.socket(socket.AF_UNIX); s.bind('sock'); s.listen(); c=socket.socket(socket.AF_UNIX); c.connect('sock')\n\
        a,_=s.accept(); c.send(b'hi'); print(a.recv(9), oct(os.stat('sock').st_mode))\n\
        os.rename('sock','sock2'); e=socket.socket(socket.AF_UNIX); e.connect('sock2'); print('connected')\n\
        os.mkfifo('p'); pid=os.fork()\n\
        if not pid: open('p','wb').write(b'through'); os._exit(0)\n\
        print(open('p','rb').read()); os.waitpid(pid,0)\n\
        for kind,n in ((stat.S_IFCHR,os.makedev(1,3)),(stat.S_IFBLK,os.makedev(259,70000)),(stat.S_IFCHR,os.makedev(4095,1048575))):\n\
        \x20 os.mknod('n',0o600|kind,n); print(os.stat('n').st_rdev==n, oct(os.stat('n').st_mode)); os.unlink('n')\n\
        os.mknod('zero',0o600|stat.S_IFCHR,os.makedev(1,5)); print(open('zero','rb').read(3))\n";
    std::fs::write(d.join("t.py"), py).expect("write");
    log.note("python", shell(d, "python3 t.py"));
}
