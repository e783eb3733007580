//! The fault campaign at the seam: along each path of the engine every backing call fails once, with each error, short
//! or with a panic. Contract P1, P3, P4 and P8 are looked at after each: every caller is answered, with the true
//! error; the old version stands or the new one is complete; nothing acknowledged is lost; nothing is left in staging;
//! the rest goes on, or the mount is read-only and says why.

// Helpers of tests: a panic is the report. The steps of a program have one signature.
#![allow(clippy::unwrap_used, clippy::ptr_arg)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::world::{Fd, What, World, quiet_panics, recovered, still};
use common::{Kind, LoopFs};
use fsys_mount::backend::Call;
use fsys_mount::backend::probe::Strategy;
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::error::Errno;

const OLD: &[u8] = b"the old version, all of it";
const NEW: &[u8] = b"and here the new one, complete";
const WITNESS: &str = "witness";

/// Names and contents; what is not in it does not exist.
type Tree = BTreeMap<&'static str, Vec<u8>>;
type Act = fn(&World, &mut Vec<Fd>) -> Result<(), Errno>;

/// One call of a program, and the commit points that it may bring the backing directory to; the last is there when it
/// is answered.
struct Step(Act, Vec<Tree>);

/// A way through the engine.
struct Route {
    name: &'static str,
    mode: WriteMode,
    before: Tree,
    steps: Vec<Step>,
    /// Written in place: until it is acknowledged, each byte is that of one or the other.
    mixed: Option<&'static str>,
}

fn tree<const N: usize>(files: [(&'static str, &[u8]); N]) -> Tree {
    files.into_iter().map(|(n, c)| (n, c.to_vec())).collect()
}

fn path(name: &'static str, before: Tree, steps: Vec<Step>) -> Route {
    Route { name, mode: WriteMode::Auto, before, steps, mixed: None }
}

fn create(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.create("a").map(|fd| fds.push(fd))
}

fn open(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.open_with("a", libc::O_RDWR).map(|fd| fds.push(fd))
}

fn rewrite(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.open_with("a", libc::O_RDWR | libc::O_TRUNC).map(|fd| fds.push(fd))
}

fn write(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.write_all(fds[0], 0, &NEW[..9])?;
    w.write_all(fds[0], 9, &NEW[9..])
}

fn append(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.write_all(fds[0], NEW.len() as u64, OLD)
}

fn fsync(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.fsync(fds[0])
}

fn close(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.close(fds.remove(0))
}

fn sync_names(w: &World, _: &mut Vec<Fd>) -> Result<(), Errno> {
    w.fsync_dir()
}

fn rename(w: &World, _: &mut Vec<Fd>) -> Result<(), Errno> {
    w.rename("a", "b")
}

fn link(w: &World, _: &mut Vec<Fd>) -> Result<(), Errno> {
    w.link("a", "b")
}

fn unlink(w: &World, _: &mut Vec<Fd>) -> Result<(), Errno> {
    w.unlink("a")
}

fn cut_to_three(w: &World, _: &mut Vec<Fd>) -> Result<(), Errno> {
    w.truncate_name("a", 3)
}

fn cut_to_nothing(w: &World, _: &mut Vec<Fd>) -> Result<(), Errno> {
    w.truncate_name("a", 0)
}

fn allocate(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    // Programs that reserve space go on without.
    w.allocate(fds[0], NEW.len() as u64).or(Ok(()))
}

fn open_source(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    w.open_with("b", libc::O_RDONLY).map(|fd| fds.push(fd))
}

fn copy(w: &World, fds: &mut Vec<Fd>) -> Result<(), Errno> {
    // A copy may be shorter; the program goes on, this one stops.
    if w.copy(fds[0], fds[1], 1000)? == OLD.len() { Ok(()) } else { Err(Errno::IO) }
}

fn joined() -> Vec<u8> {
    [NEW, OLD].concat()
}

fn over_the_start() -> Vec<u8> {
    let mut all = NEW.to_vec();
    all.extend_from_slice(OLD.get(NEW.len()..).unwrap_or_default());
    all
}

/// All of them.
fn paths() -> Vec<Route> {
    let none = Tree::new;
    let a = |content: &[u8]| tree([("a", content)]);
    let ab = |a: &[u8], b: &[u8]| tree([("a", a), ("b", b)]);
    let b = |content: &[u8]| tree([("b", content)]);
    let step = |act: Act| Step(act, vec![]);
    let to = |act: Act, after: Tree| Step(act, vec![after]);
    // First what was written is committed, then the name changes.
    let by = |act: Act, first: Tree, then: Tree| Step(act, vec![first, then]);
    let mixed = |p: Route| Route { mixed: Some("a"), ..p };
    let part = over_the_start();
    let journal = |p: Route| Route { mode: WriteMode::Journal, ..p };
    let more = [&part[..NEW.len()], OLD].concat();
    vec![
        journal(path("journal: a part of a file", a(OLD), vec![step(open), step(write), to(close, a(&part))])),
        journal(path("journal: rewrite", a(OLD), vec![step(rewrite), step(write), to(close, a(NEW))])),
        journal(path(
            "journal: go on after an fsync",
            a(OLD),
            vec![step(open), step(write), to(fsync, a(&part)), step(append), to(close, a(&more))],
        )),
        journal(path(
            "journal: create, then change",
            none(),
            vec![step(create), step(write), to(fsync, a(NEW)), step(append), to(close, a(&joined()))],
        )),
        journal(path(
            "journal: rename while open",
            a(OLD),
            vec![step(open), step(write), by(rename, a(&part), b(&part)), step(close)],
        )),
        journal(path(
            "journal: unlink while open",
            a(OLD),
            vec![step(open), step(write), by(unlink, a(&part), none()), step(close)],
        )),
        journal(path(
            "journal: two names",
            a(OLD),
            vec![to(link, ab(OLD, OLD)), step(open), step(write), to(fsync, ab(&part, &part)), step(close)],
        )),
        journal(path(
            "journal: truncate",
            a(OLD),
            vec![step(cut_to_three), step(open), to(fsync, a(&OLD[..3])), step(close)],
        )),
        journal(path("journal: truncate to nothing", a(OLD), vec![step(cut_to_nothing), to(sync_names, a(b""))])),
        path("create and save", none(), vec![step(create), step(write), to(close, a(NEW))]),
        path("create, allocate, save", none(), vec![step(create), step(allocate), step(write), to(close, a(NEW))]),
        path("rewrite", a(OLD), vec![step(rewrite), step(write), to(close, a(NEW))]),
        path("rewrite and fsync", a(OLD), vec![step(rewrite), step(write), to(fsync, a(NEW)), to(close, a(NEW))]),
        path("empty on purpose", a(OLD), vec![step(rewrite), step(close), to(sync_names, a(b""))]),
        path(
            "restage: go on after an fsync",
            none(),
            vec![step(create), step(write), to(fsync, a(NEW)), step(append), to(close, a(&joined()))],
        ),
        mixed(path("in place", a(OLD), vec![step(open), step(write), to(fsync, a(&part)), step(close)])),
        Route {
            mode: WriteMode::Replace,
            ..path("a part of a file, replaced", a(OLD), vec![step(open), step(write), to(close, a(&part))])
        },
        path("rename", ab(NEW, OLD), vec![to(rename, b(NEW)), step(sync_names)]),
        path(
            "save by rename",
            b(OLD),
            vec![step(create), step(write), to(close, ab(NEW, OLD)), to(rename, b(NEW)), step(sync_names)],
        ),
        path(
            "rename while open",
            b(OLD),
            vec![step(create), step(write), by(rename, ab(NEW, OLD), b(NEW)), step(close)],
        ),
        path("unlink", a(OLD), vec![to(unlink, none()), step(sync_names)]),
        path("unlink while open", a(OLD), vec![step(rewrite), step(write), by(unlink, a(NEW), none()), step(close)]),
        path("link", a(OLD), vec![to(link, ab(OLD, OLD)), step(sync_names)]),
        path(
            "link of what is being written",
            none(),
            vec![step(create), step(write), by(link, a(NEW), ab(NEW, NEW)), step(close)],
        ),
        mixed(path("truncate", a(OLD), vec![step(cut_to_three), step(open), to(fsync, a(&OLD[..3])), step(close)])),
        path("truncate to nothing", a(OLD), vec![step(cut_to_nothing), to(sync_names, a(b""))]),
        path(
            "copy",
            b(OLD),
            vec![step(open_source), step(create), step(copy), step(close), Step(close, vec![ab(OLD, OLD)])],
        ),
    ]
}

/// What came of one run.
struct Ran {
    /// Commit points that were acknowledged.
    acknowledged: usize,
    error: Option<Errno>,
}

/// A program that stops at the first error, and closes what it has open, as its end does.
fn run(w: &World, path: &Route) -> Ran {
    let mut fds = Vec::new();
    let mut ran = Ran { acknowledged: 0, error: None };
    for Step(act, trees) in &path.steps {
        match act(w, &mut fds) {
            Ok(()) => ran.acknowledged += trees.len(),
            Err(e) => {
                ran.error = Some(e);
                break;
            }
        }
    }
    for fd in fds {
        // It has its error already.
        let _ = w.close(fd);
    }
    ran
}

fn start(root: &Path, path: &Route, level: Durability) -> World {
    fs::create_dir(root).unwrap();
    for (name, content) in &path.before {
        fs::write(root.join(name), content).unwrap();
    }
    // Where nobody waits, versions are published early on file systems that keep the order.
    let early = matches!(level, Durability::Fsync | Durability::Relaxed).then_some(Strategy::OneBarrier);
    let w = World::open_as(root, still(level, path.mode), early);
    w.save(WITNESS, b"safe").unwrap();
    w
}

fn on_disk(root: &Path, name: &str) -> Option<Vec<u8>> {
    fs::read(root.join(name)).ok()
}

/// Whether the backing directory is at a commit point from the `from`th on.
fn check_tree(root: &Path, path: &Route, from: usize) -> Result<(), String> {
    let commits: Vec<&Tree> = std::iter::once(&path.before).chain(path.steps.iter().flat_map(|s| &s.1)).collect();
    let is = ["a", "b"].iter().filter_map(|n| Some((*n, on_disk(root, n)?))).collect::<Tree>();
    let exact = commits[from..].iter().any(|t| **t == is);
    let mixed = path.mixed.filter(|_| from == 0).is_some_and(|name| {
        let versions: Vec<_> = commits.iter().map(|t| &t[name]).collect();
        let at = |v: &Vec<u8>, i: usize| v.get(i).copied();
        is.get(name).is_some_and(|c| (0..c.len()).all(|i| versions.iter().any(|v| at(v, i) == at(c, i))))
    });
    let show = |t: &Tree| format!("{:?}", t.iter().map(|(n, c)| (n, String::from_utf8_lossy(c))).collect::<Vec<_>>());
    if exact || mixed {
        return Ok(());
    }
    Err(format!(
        "{from} commit points acknowledged, on disk {}, wanted {:?}",
        show(&is),
        commits.iter().map(|t| show(t)).collect::<Vec<_>>()
    ))
}

/// Runs a path with one fault, or one upon another, and looks at everything.
fn one(root: &Path, path: &Route, level: Durability, faults: &[(usize, What)]) -> Result<usize, String> {
    let w = start(root, path, level);
    w.seam.watch(faults);
    let ran = run(&w, path);
    let hits = w.seam.hits();
    w.seam.watch(&[]);
    let flush = |call| matches!(call, Call::SyncFile | Call::SyncFs | Call::SyncDir);
    let device = hits.iter().any(|(call, what)| flush(*call) && *what == What::Fail(Errno::IO));
    if let Some(e) = ran.error.filter(|e| hits.iter().all(|(_, what)| what.errno() != *e)) {
        return Err(format!("the program was told {e:?}"));
    }
    // What is safe in the journal and cannot be written into its file, or fails and cannot be taken back, stops the mount
    // too; it takes a second fault. Until the next recovery the file may then be there in part.
    let stopped = w.engine().read_only_reason();
    let journal = path.mode == WriteMode::Journal;
    let device = device || (journal && hits.len() > 1 && stopped.is_some());
    if stopped.is_none() || !journal {
        check_tree(root, path, ran.acknowledged)?;
    }
    match (stopped, device) {
        (None, false) => {
            w.drain().map_err(|n| format!("{n} files or directories do not drain"))?;
            check_tree(root, path, ran.acknowledged).map_err(|e| format!("after a drain: {e}"))?;
            for name in ["a", "b"] {
                if w.seen(name).ok() != w.on_disk(name) {
                    return Err(format!("{name}: programs see {:?}", w.seen(name)));
                }
            }
            w.save("after", NEW).map_err(|e| format!("a later save fails with {e:?}"))?;
        }
        (Some(_), true) => {
            if w.save("after", NEW) != Err(Errno::ROFS) {
                return Err("a save on a device that failed a flush is not refused".into());
            }
        }
        (None, true) => return Err("the device failed a flush, and the mount goes on".into()),
        (Some(why), false) => return Err(format!("read-only without a failed flush: {why}")),
    }
    if w.on_disk(WITNESS).as_deref() != Some(b"safe") || w.seen(WITNESS).as_deref() != Ok(b"safe") {
        return Err("a file that has nothing to do with it is gone".into());
    }
    let left = w.internal("staging");
    // A version that could not even be moved to `failed` stays for the next recovery.
    if !left.is_empty() && hits.iter().all(|(call, _)| *call != Call::Keep) {
        return Err(format!("left in staging: {left:?}"));
    }
    let drained = w.shutdown();
    if !device && drained.is_err() {
        return Err(format!("shutdown leaves {drained:?}"));
    }
    let c = w.engine().counters.values();
    if (c.staged_now, c.staged_bytes, c.in_flight) != (0, 0, 0) {
        return Err(format!("gauges after the end: {c:?}"));
    }
    drop(w);
    if journal {
        recovered(root);
    }
    check_tree(root, path, ran.acknowledged).map_err(|e| format!("after the end: {e}"))?;
    Ok(hits.len())
}

const FAULTS: [What; 6] = [
    What::Fail(Errno::IO),
    What::Fail(Errno::NOSPC),
    What::Fail(Errno::DQUOT),
    What::Fail(Errno::MFILE),
    What::Short,
    What::Panic,
];

/// The faults to meet, given the calls of a path: each call with each error, and with `twice` some or all of those with
/// a second fault on one of the next two calls.
fn faults(calls: &[Call], twice: bool) -> Vec<Vec<(usize, What)>> {
    let single = |(at, what): (usize, What)| (what != What::Short || calls[at] == Call::Write).then_some((at, what));
    let first: Vec<_> = (0..calls.len()).flat_map(|at| FAULTS.map(|what| (at, what))).filter_map(single).collect();
    let mut all: Vec<_> = first.iter().map(|f| vec![*f]).collect();
    if twice {
        let seconds = [What::Fail(Errno::IO), What::Fail(Errno::MFILE), What::Panic];
        let second = |f: (usize, What)| [1, 2].map(|d| seconds.map(|what| vec![f, (f.0 + d, what)]));
        let firsts = first.iter().filter(|f| common::full() || f.1 == What::Fail(Errno::NOSPC));
        all.extend(firsts.flat_map(|f| second(*f)).flatten());
    }
    all
}

/// Every path, every call on it, every fault; of those one in `stride`, unless the whole campaign is asked for.
fn campaign(on: &str, dir: &Path, twice: bool, stride: usize) {
    let stride = if common::full() { 1 } else { stride };
    quiet_panics();
    let (mut runs, mut injected, mut n) = (BTreeMap::<&str, usize>::new(), 0, 0);
    let mut bad = Vec::new();
    let levels = [Durability::Close, Durability::Always];
    for (level, path) in levels.into_iter().flat_map(|level| paths().into_iter().map(move |p| (level, p))) {
        let fresh = |n: usize| dir.join(format!("{n}"));
        let w = start(&fresh(n), &path, level);
        w.seam.watch(&[]);
        let ran = run(&w, &path);
        assert_eq!(ran.error, None, "{}: fails without a fault", path.name);
        check_tree(&fresh(n), &path, ran.acknowledged).unwrap();
        let calls = w.seam.calls();
        w.shutdown().unwrap();
        n += 1;
        for faults in faults(&calls, twice).into_iter().skip(n % stride).step_by(stride) {
            match one(&fresh(n), &path, level, &faults) {
                Ok(hits) => {
                    injected += hits;
                    *runs.entry(name(faults[0].1)).or_default() += 1;
                }
                Err(e) => bad.push(format!("{} at {level:?}: {calls:?}, {faults:?}: {e}", path.name)),
            }
            let _ = fs::remove_dir_all(fresh(n));
            n += 1;
        }
    }
    let all: usize = runs.values().sum();
    runs.iter().for_each(|(kind, n)| println!("injected: {kind} of a backing call: {n}"));
    println!("{on}: {injected} faults injected in {all} runs, by the first {runs:?}; {} violations", bad.len());
    assert!(bad.is_empty(), "{on}: {} violations\n{}", bad.len(), bad.join("\n"));
    assert!(injected >= all && all > 250, "the campaign reaches the calls");
}

fn name(what: What) -> &'static str {
    match what {
        What::Fail(Errno::IO) => "EIO",
        What::Fail(Errno::NOSPC) => "ENOSPC",
        What::Fail(Errno::DQUOT) => "EDQUOT",
        What::Fail(_) => "EMFILE",
        What::Short => "short write",
        What::Panic => "panic",
    }
}

#[test]
fn every_call_fails_once_on_tmpfs() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    campaign("tmpfs", dir.path(), true, 1);
}

#[test]
fn every_call_fails_once_on_disk_filesystems() {
    if !common::can_mount("faults") {
        return;
    }
    for kind in common::kinds(&Kind::ALL) {
        let disk = LoopFs::new(kind, 64);
        campaign(kind.name(), disk.path(), false, 4);
    }
}

/// The checker sees what it is there to see.
#[test]
fn the_checker_catches_a_prefix_and_a_lost_save() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let all = paths();
    let path = all.iter().find(|p| p.name == "rewrite").unwrap();
    let w = start(&dir.path().join("x"), path, Durability::Close);
    let root = &dir.path().join("x");
    assert!(check_tree(root, path, 0).is_ok());
    assert!(check_tree(root, path, 1).is_err(), "an acknowledged save that is not there");
    fs::write(dir.path().join("x/a"), &NEW[..9]).unwrap();
    assert!(check_tree(root, path, 0).is_err(), "a prefix");
    fs::remove_file(dir.path().join("x/a")).unwrap();
    assert!(check_tree(root, path, 0).is_err(), "neither old nor new");
    w.shutdown().unwrap();
}
