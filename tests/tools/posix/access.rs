//! Who may do what to what is there; what takes set-user-ID, set-group-ID and capabilities away; attributes.

use std::path::Path;

use rustix::fs::{self as rfs, Access, AtFlags, CWD, FallocateFlags, Gid, Mode, OFlags, Uid, XattrFlags};

use super::kit::{ALL, ANN, BOB, Log, ROOT, TEAM, Who, content, dir, file, look, mode, open, own, run_as, shell, told};

pub const CHECKS: &[super::Check] = &[
    ("access", access),
    ("privileges_dropped", privileges_dropped),
    ("capabilities_dropped", capabilities_dropped),
    ("chmod", chmod),
    ("chown", chown),
    ("acl_by_whom", acl_by_whom),
    ("execute", execute),
    ("set_user_id", set_user_id),
    ("attributes", attributes),
    ("attribute_limits", attribute_limits),
    ("inode_flags", inode_flags),
];

fn access(d: &Path, log: &mut Log) {
    for (m, owner) in
        [(0o640, (1001, TEAM)), (0o604, (1001, 1001)), (0o111, (0, 0)), (0o070, (1002, TEAM)), (0o000, (0, 0))]
    {
        let path = d.join(format!("{m:o}"));
        file(&path, b"#!/bin/sh\n", owner, m);
        for who in ALL {
            let r = run_as(who, || {
                let all = [Access::READ_OK, Access::WRITE_OK, Access::EXEC_OK];
                let asked = all.map(|a| told(rfs::accessat(CWD, &path, a, AtFlags::empty())));
                let opened = [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR].map(|o| told(open(&path, o, 0).map(drop)));
                format!("{asked:?} {opened:?}")
            });
            log.note(format!("{} {m:o}", who.name), r);
        }
    }
}

type Change = (&'static str, fn(&Path) -> String);

/// Everything that changes content.
const CHANGES: [Change; 7] = [
    ("write", |p| told(open(p, OFlags::WRONLY, 0).and_then(|fd| rustix::io::write(&fd, b"x")))),
    ("append", |p| told(open(p, OFlags::WRONLY | OFlags::APPEND, 0).and_then(|fd| rustix::io::write(&fd, b"x")))),
    ("truncate", |p| {
        // SAFETY: a C string.
        let rc = unsafe { libc::truncate(super::kit::cstring(p).as_ptr(), 3) };
        rc.to_string()
    }),
    ("ftruncate", |p| told(open(p, OFlags::WRONLY, 0).and_then(|fd| rfs::ftruncate(&fd, 2)))),
    ("open with O_TRUNC", |p| told(open(p, OFlags::WRONLY | OFlags::TRUNC, 0).map(drop))),
    ("fallocate", |p| {
        told(open(p, OFlags::WRONLY, 0).and_then(|fd| rfs::fallocate(&fd, FallocateFlags::empty(), 0, 8192)))
    }),
    ("copy_file_range", |p| {
        let copied =
            open(p, OFlags::RDWR, 0).and_then(|fd| rfs::copy_file_range(&fd, Some(&mut 0), &fd, Some(&mut 100), 4));
        told(copied)
    }),
];

fn privileges_dropped(d: &Path, log: &mut Log) {
    own(d, (0, 0), 0o777);
    for who in ALL {
        for (i, (what, change)) in CHANGES.iter().enumerate() {
            for (m, gid) in [(0o6777, 0), (0o2777, TEAM), (0o4666, 0), (0o1777, 0)] {
                let path = d.join(format!("{}-{i}-{m:o}", who.name));
                file(&path, b"content", (1001, gid), m);
                log.note(format!("{} {what} {m:o}", who.name), (run_as(who, || change(&path)), mode(&path)));
            }
        }
    }
}

fn capabilities_dropped(d: &Path, log: &mut Log) {
    let has = |p: &Path| told(rfs::getxattr(p, "security.capability", &mut [0_u8; 64][..]));
    for (i, (what, change)) in CHANGES.iter().enumerate() {
        let path = d.join(i.to_string());
        file(&path, b"content", (1001, 1001), 0o755);
        log.note("set", shell(d, &format!("setcap cap_net_raw+ep {i}")));
        log.note(format!("{what} before"), has(&path));
        log.note(*what, (change(&path), has(&path)));
    }
    let path = d.join("owned");
    file(&path, b"content", (1001, 1001), 0o755);
    log.note("set", shell(d, "setcap cap_net_raw+ep owned; chown 1002 owned"));
    log.note("chown", has(&path));
    file(&d.join("mode"), b"content", (1001, 1001), 0o755);
    log.note("set", shell(d, "setcap cap_net_raw+ep mode; chmod 700 mode; getcap mode"));
    log.note("ann sets", run_as(ANN, || shell(d, "setcap cap_net_raw+ep owned 2>&1 | sed 's/.*: //'")));
}

fn set_mode(path: &Path, m: u32) -> String {
    told(rfs::chmod(path, Mode::from_raw_mode(m)))
}

fn chmod(d: &Path, log: &mut Log) {
    for who in ALL {
        for (owner, gid) in [(1001, TEAM), (1002, TEAM), (1001, 1001), (1002, 1003)] {
            for (m, is_dir) in [(0o6755, false), (0o2755, true), (0o2644, false), (0o1777, true)] {
                let path = d.join(format!("{}-{owner}-{gid}-{m:o}", who.name));
                if path.exists() {
                    continue;
                }
                if is_dir {
                    dir(&path, (owner, gid), 0o700);
                } else {
                    file(&path, b"x", (owner, gid), 0o600);
                }
                let r = run_as(who, || set_mode(&path, m));
                log.note(format!("{} {owner}:{gid} {m:o}", who.name), (r, mode(&path)));
            }
        }
    }
}

fn chown(d: &Path, log: &mut Log) {
    let set = |p: &Path, uid: Option<u32>, gid: Option<u32>| {
        told(rfs::chown(p, uid.map(Uid::from_raw), gid.map(Gid::from_raw)))
    };
    for who in ALL {
        for m in [0o6755, 0o2644, 0o644, 0o2755] {
            for (uid, gid) in [
                (None, None),
                (Some(1001), None),
                (Some(1002), None),
                (None, Some(TEAM)),
                (None, Some(1004)),
                (Some(1002), Some(1002)),
                (Some(0), Some(0)),
            ] {
                for (owner, group) in [(1001, 1001), (1002, 1002), (1002, TEAM), (1001, TEAM)] {
                    let path = d.join("f");
                    file(&path, b"x", (owner, group), m);
                    let r = run_as(who, || set(&path, uid, gid));
                    log.note(format!("{} {m:o} {owner}:{group} to {uid:?}:{gid:?}", who.name), (r, look(&path)));
                    rfs::unlink(&path).expect("unlink");
                }
            }
        }
        let at = d.join(format!("{}-dir", who.name));
        dir(&at, (who.uid, who.gid), 0o2755);
        let r = run_as(who, || set(&at, None, Some(TEAM)));
        log.note(format!("{} directory", who.name), (r, look(&at)));
    }
}

fn acl_by_whom(d: &Path, log: &mut Log) {
    for who in ALL {
        for (owner, gid) in [(1001, TEAM), (1002, TEAM), (1002, 1002), (0, 0)] {
            let path = d.join("f");
            file(&path, b"x", (owner, gid), 0o2755);
            let set = |acl: &str| {
                run_as(who, || shell(d, &format!("setfacl {acl} f 2>&1 | sed 's/.*: //'; exit ${{PIPESTATUS[0]}}")))
            };
            let r = [set("-m u:1005:rwx"), mode(&path), set("-b"), mode(&path), shell(d, "getfacl -n f")];
            log.note(format!("{} {owner}:{gid}", who.name), r);
            rfs::unlink(&path).expect("unlink");
        }
    }
    file(&d.join("g"), b"x", (0, 0), 0o600);
    log.note("set", shell(d, "setfacl -m u:1001:rw,g:1003:r g; getfacl -n g"));
    for who in [ANN, BOB] {
        log.note(
            format!("{} opens", who.name),
            run_as(who, || [OFlags::RDONLY, OFlags::RDWR].map(|o| told(open(&d.join("g"), o, 0).map(drop))).join(" ")),
        );
    }
}

fn execute(d: &Path, log: &mut Log) {
    log.note("a program just saved", shell(d, "cp /bin/true t && ./t; echo $?"));
    log.note("a script just saved", shell(d, "printf '#!/bin/sh\\necho hi\\n' > s; chmod 755 s; ./s"));
    log.note("rewritten", shell(d, "printf '#!/bin/sh\\necho ho\\n' > s; ./s"));
    let busy = open(&d.join("t"), OFlags::WRONLY, 0).expect("open");
    log.note("while it is open for writing", shell(d, "./t 2>&1 | sed 's/.*: //'"));
    drop(busy);
    log.note("closed", shell(d, "./t; echo $?"));
    log.note(
        "write while it runs",
        shell(d, "cp /bin/sleep z; ./z 60 & until [[ $(readlink /proc/$!/exe) == */z ]] || ! kill -0 $! 2> /dev/null; do :; done; echo x > z; r=$?; kill %1; exit $r").replace("bash: line 1: ", ""),
    );
    file(&d.join("n"), b"#!/bin/sh\n", (0, 0), 0o644);
    log.note("without the bit", shell(d, "./n 2>&1 | sed 's/.*: //'"));
    file(&d.join("o"), b"#!/bin/sh\necho mine\n", (1001, 1001), 0o700);
    for who in ALL {
        log.note(format!("{} runs ann's", who.name), run_as(who, || shell(d, "./o 2>&1 | sed 's/.*: //'")));
    }
}

fn set_user_id(d: &Path, log: &mut Log) {
    log.note("copy", shell(d, "cp /usr/bin/id . && chown 1002:1003 id && chmod 6755 id"));
    log.note("ann runs bob's", run_as(ANN, || shell(d, "./id -u; ./id -ru; ./id -g; ./id -rg")));
    log.note("copy", shell(d, "cp /usr/bin/id cap && setcap cap_dac_override+ep cap && ls -l cap | cut -c1-10"));
    log.note("ann runs it", run_as(ANN, || shell(d, "./cap -u")));
}

fn attributes(d: &Path, log: &mut Log) {
    let set = |p: &Path, n: &str, v: &[u8]| told(rfs::setxattr(p, n, v, XattrFlags::empty()));
    let get = |p: &Path, n: &str| told(rfs::getxattr(p, n, &mut [0_u8; 64][..]));
    let list = |p: &Path| {
        let mut buf = [0_u8; 1024];
        told(rfs::listxattr(p, &mut buf[..]).map(|n| buf[..n].escape_ascii().to_string()))
    };
    file(&d.join("f"), b"x", (1001, 1001), 0o644);
    dir(&d.join("d"), (1001, 1001), 0o1777);
    rfs::mknodat(CWD, d.join("fifo"), rfs::FileType::Fifo, 0o666.into(), 0).expect("fifo");
    rfs::symlink("f", d.join("link")).expect("symlink");
    for who in [ROOT, ANN, BOB] {
        for name in ["user.a", "trusted.a", "security.a", "user.", "nonsense.a", "system.nonsense"] {
            for at in ["f", "d", "fifo"] {
                let path = d.join(at);
                let r =
                    run_as(who, || [set(&path, name, who.name.as_bytes()), get(&path, name), list(&path)].join(" "));
                log.note(format!("{} {name} on {at}", who.name), r);
            }
        }
    }
    let flags = |f| told(rfs::setxattr(d.join("f"), "user.new", b"v", f));
    log.note("replace", flags(XattrFlags::REPLACE));
    log.note("create", flags(XattrFlags::CREATE));
    log.note("create again", flags(XattrFlags::CREATE));
    log.note("small buffer", told(rfs::getxattr(d.join("f"), "user.a", &mut [0_u8; 1][..])));
    log.note("size only", told(rfs::getxattr(d.join("f"), "user.a", &mut [0_u8; 0][..])));
    log.note("remove", told(rfs::removexattr(d.join("f"), "user.a")));
    log.note("remove again", told(rfs::removexattr(d.join("f"), "user.a")));
    log.note("symlink", told(rfs::lsetxattr(d.join("link"), "trusted.l", b"v", XattrFlags::empty())));
    log.note("symlink's", told(rfs::lgetxattr(d.join("link"), "trusted.l", &mut [0_u8; 9][..])));
    log.note("kept by a rewrite", (std::fs::write(d.join("f"), "y").is_ok(), list(&d.join("f"))));
    let _open = open(&d.join("staged"), super::kit::NEW, 0o644);
    log.note("on a file being written", (set(&d.join("staged"), "user.s", b"v"), list(&d.join("staged"))));
}

fn attribute_limits(d: &Path, log: &mut Log) {
    file(&d.join("f"), b"x", (0, 0), 0o644);
    for len in [0, 1, 255, 1000, 3000, 5000, 60_000, 65_536, 65_537, 100_000] {
        let r = told(rfs::setxattr(d.join("f"), "user.v", &vec![7; len], XattrFlags::empty()));
        log.note(format!("value of {len}"), (r, told(rfs::getxattr(d.join("f"), "user.v", &mut [0_u8; 0][..]))));
    }
    for len in [1, 250, 251, 300] {
        let name = format!("user.{}", "n".repeat(len));
        log.note(format!("name of {len}"), told(rfs::setxattr(d.join("f"), name, b"v", XattrFlags::empty())));
    }
    log.note("content", content(&d.join("f")));
}

fn inode_flags(d: &Path, log: &mut Log) {
    let who: fn(Who, &Path) -> String = |w, p| {
        run_as(w, || {
            let write = told(open(p, OFlags::WRONLY, 0).and_then(|fd| rustix::io::write(&fd, b"w")));
            let append = told(open(p, OFlags::WRONLY | OFlags::APPEND, 0).and_then(|fd| rustix::io::write(&fd, b"a")));
            format!("{write} {append} {} {}", told(rfs::unlink(p)), set_mode(p, 0o666))
        })
    };
    for flag in ["i", "a", "d"] {
        let path = d.join(flag);
        file(&path, b"x", (0, 0), 0o666);
        log.note(format!("+{flag}"), shell(d, &format!("chattr +{flag} {flag}; lsattr {flag} | tr -d e-")));
        for w in [ANN, ROOT] {
            log.note(format!("{} +{flag}", w.name), (who(w, &path), content(&path)));
        }
        log.note("ann clears", run_as(ANN, || shell(d, &format!("chattr -{flag} {flag} 2>&1 | sed 's/.*: //'"))));
        log.note("root clears", shell(d, &format!("chattr -{flag} {flag} 2>&1 | sed 's/.*: //'")));
    }
}
