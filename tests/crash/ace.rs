//! All short sequences of file operations, in the manner of ACE (Mohan et al., "Finding Crash-Consistency Bugs with
//! Bounded Black-Box Crash Testing", OSDI 2018): two directories, two names in each, every operation on every name.
//!
//! The reference is a partial order. A step of a sequence depends on those before it that concern the same file, name
//! or directory; after a crash there may be any set of steps that is closed under this, holds all that was answered as
//! durable, and nothing that had not begun. The sets are few, so all are tried.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::IntoRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use fastrand::Rng;

use crate::disk::Disk;
use crate::fsys::{Daemon, recover};
use crate::model::{History, Kind, Violation, read_tree};
use crate::order::{Act, Partial};
use crate::programs::{Level, Mode};
use crate::rig::Rig;
use crate::workload::Workload;

/// A file by its number in [`FILES`]; a directory by its number in [`DIRS`].
pub type Name = usize;
pub const FILES: [&str; 4] = ["A/foo", "A/bar", "B/foo", "B/bar"];
pub const DIRS: [&str; 2] = ["A", "B"];

/// The directory of a name.
pub fn dir_of(name: Name) -> usize {
    name / 2
}

/// What a program does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Creates or rewrites: truncate, write, close.
    Save(Name),
    /// The same without the close.
    Hold(Name),
    Close(Name),
    /// Writes a piece in the middle, and closes.
    Overwrite(Name),
    Append(Name),
    /// truncate(2) to a part.
    Truncate(Name),
    Rename(Name, Name),
    Link(Name, Name),
    Unlink(Name),
    Mkdir(usize),
    Rmdir(usize),
    Fsync(Name),
    FsyncDir(usize),
}

/// All of them, whether they make sense or not.
fn all_ops() -> Vec<Op> {
    use Op::{Append, Close, Fsync, FsyncDir, Hold, Link, Mkdir, Overwrite, Rename, Rmdir, Save, Truncate, Unlink};
    let one: [fn(Name) -> Op; 8] = [Save, Hold, Close, Overwrite, Append, Truncate, Unlink, Fsync];
    let on_dir: [fn(usize) -> Op; 3] = [Mkdir, Rmdir, FsyncDir];
    let two: [fn(Name, Name) -> Op; 2] = [Rename, Link];
    let files = || 0..FILES.len();
    let pairs = || files().flat_map(move |a| files().filter(move |b| *b != a).map(move |b| (a, b)));
    let mut all: Vec<Op> = one.iter().flat_map(|op| files().map(op)).collect();
    all.extend(two.iter().flat_map(|op| pairs().map(|(a, b)| op(a, b))));
    all.extend(on_dir.iter().flat_map(|op| (0..DIRS.len()).map(op)));
    all
}

impl Op {
    /// The directory that it names first. The directories begin alike, so that a sequence that begins in the second
    /// says nothing new.
    fn first_dir(self) -> usize {
        match self {
            Self::Save(f)
            | Self::Hold(f)
            | Self::Close(f)
            | Self::Overwrite(f)
            | Self::Append(f)
            | Self::Truncate(f)
            | Self::Unlink(f)
            | Self::Fsync(f)
            | Self::Rename(f, _)
            | Self::Link(f, _) => dir_of(f),
            Self::Mkdir(d) | Self::Rmdir(d) | Self::FsyncDir(d) => d,
        }
    }
}

/// A file as programs see it.
#[derive(Debug, Clone, Default)]
struct Inode {
    content: Vec<u8>,
    /// A descriptor is open.
    held: bool,
    /// What was written through it is not committed.
    dirty: bool,
}

/// What programs see.
#[derive(Debug, Clone)]
struct View {
    names: [Option<usize>; FILES.len()],
    subs: [bool; DIRS.len()],
    inodes: Vec<Inode>,
}

impl View {
    /// `foo` is there in both directories.
    fn start() -> Self {
        let inode = |n: u8| Inode { content: vec![n; 5000], ..Inode::default() };
        Self { names: [Some(0), None, Some(1), None], subs: [false; 2], inodes: vec![inode(1), inode(2)] }
    }

    fn inode(&self, f: Name) -> Option<&Inode> {
        self.names[f].map(|i| &self.inodes[i])
    }

    fn links(&self, inode: usize) -> usize {
        self.names.iter().flatten().filter(|i| **i == inode).count()
    }

    /// Whether the operation succeeds, and does something.
    fn allows(&self, op: Op) -> bool {
        let held = |f| self.inode(f).is_some_and(|i| i.held);
        let there = |f: Name| self.names[f].is_some();
        match op {
            Op::Save(_) | Op::FsyncDir(_) => true,
            Op::Hold(f) => !held(f),
            Op::Close(f) => held(f),
            Op::Overwrite(f) | Op::Append(f) | Op::Truncate(f) => self.inode(f).is_some_and(|i| i.content.len() > 2000),
            Op::Unlink(f) | Op::Fsync(f) => there(f),
            Op::Rename(f, g) => there(f) && self.names[f] != self.names[g],
            Op::Link(f, g) => there(f) && !there(g),
            Op::Mkdir(d) => !self.subs[d],
            Op::Rmdir(d) => self.subs[d],
        }
    }

    fn apply(&mut self, op: Op, stamp: u8) {
        match op {
            Op::Save(f) | Op::Hold(f) => {
                let i = self.names[f].unwrap_or(self.inodes.len());
                if i == self.inodes.len() {
                    self.inodes.push(Inode::default());
                    self.names[f] = Some(i);
                }
                let inode = &mut self.inodes[i];
                inode.content = vec![stamp; 2500 + usize::from(stamp) * 13];
                if let Op::Hold(_) = op {
                    (inode.held, inode.dirty) = (true, true);
                }
            }
            Op::Close(f) => {
                let i = self.names[f].unwrap();
                (self.inodes[i].held, self.inodes[i].dirty) = (false, false);
            }
            Op::Overwrite(f) => self.inodes[self.names[f].unwrap()].content[700..1900].fill(stamp),
            Op::Append(f) => self.inodes[self.names[f].unwrap()].content.extend(vec![stamp; 3000]),
            Op::Truncate(f) => self.inodes[self.names[f].unwrap()].content.truncate(1100),
            Op::Rename(f, g) => self.names[g] = self.names[f].take(),
            Op::Link(f, g) => self.names[g] = self.names[f],
            Op::Unlink(f) => self.names[f] = None,
            Op::Mkdir(d) => self.subs[d] = true,
            Op::Rmdir(d) => self.subs[d] = false,
            Op::Fsync(_) | Op::FsyncDir(_) => {}
        }
    }
}

/// Longer ones that broke a promise once.
const FOUND: [[Op; 3]; 1] = [
    // The link commits what is open, in a directory that is not its own, and overtook the save there.
    [Op::Save(0), Op::Hold(1), Op::Link(1, 3)],
];

/// Every sequence of one and of two operations, and those that were found.
pub fn short_sequences() -> Vec<Vec<Op>> {
    let mut all: Vec<Vec<Op>> = FOUND.iter().map(|s| s.to_vec()).collect();
    for first in all_ops().into_iter().filter(|op| op.first_dir() == 0 && View::start().allows(*op)) {
        all.push(vec![first]);
        let mut view = View::start();
        view.apply(first, 3);
        all.extend(all_ops().into_iter().filter(|op| view.allows(*op)).map(|second| vec![first, second]));
    }
    all
}

fn random_sequence(len: usize, rng: &mut Rng) -> Vec<Op> {
    let (mut view, mut ops) = (View::start(), Vec::new());
    while ops.len() < len {
        let can: Vec<Op> = all_ops().into_iter().filter(|op| view.allows(*op)).collect();
        let op = can[rng.usize(..can.len())];
        view.apply(op, 3);
        ops.push(op);
    }
    ops
}

/// Sequences of one run: they share the mount, and with it flushes and journal commits.
const TOGETHER: usize = 16;

/// How many runs it takes until every short sequence was run.
pub fn runs() -> usize {
    short_sequences().len().div_ceil(TOGETHER)
}

/// See the module.
pub struct Ace {
    level: Level,
    mode: Mode,
    sequences: Vec<Vec<Op>>,
    done: Vec<Partial>,
}

impl Ace {
    /// The run `seed` of [`runs`], after which they begin again in another company.
    pub fn short(level: Level, mode: Mode, seed: u64) -> Self {
        let (round, n) = (seed / runs() as u64, (seed % runs() as u64) as usize);
        let mut all = short_sequences();
        Rng::with_seed(round).shuffle(&mut all);
        let sequences = all.chunks(TOGETHER).nth(n).unwrap().to_vec();
        Self { level, mode, sequences, done: vec![] }
    }

    /// Longer ones at random.
    pub fn longer(level: Level, mode: Mode, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let sequences = (0..TOGETHER).map(|_| random_sequence(3, &mut rng)).collect();
        Self { level, mode, sequences, done: vec![] }
    }
}

fn home(n: usize) -> String {
    format!("s{n}")
}

impl Workload for Ace {
    fn prepare(&mut self, rig: &Rig, root: &Path, _rng: &mut Rng) {
        Daemon::mount(root, &rig.dir("mnt"), "").unmount();
        for n in 0..self.sequences.len() {
            for dir in DIRS {
                fs::create_dir_all(root.join(home(n)).join(dir)).unwrap();
            }
            let view = View::start();
            for (file, inode) in FILES.iter().zip(view.names) {
                if let Some(i) = inode {
                    fs::write(root.join(home(n)).join(file), &view.inodes[i].content).unwrap();
                }
            }
        }
    }

    fn run(&mut self, rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let options = format!("{},mode={}", self.level.options(rng), self.mode.name());
        let daemon = Daemon::mount(root, &rig.dir("mnt"), &options);
        let mut runs: Vec<Run> = self
            .sequences
            .iter()
            .enumerate()
            .map(|(n, ops)| Run::new(daemon.path().join(home(n)), disk, self.level, self.mode, ops))
            .collect();
        std::thread::scope(|scope| {
            for part in runs.chunks_mut(TOGETHER / 2) {
                let mut rng = rng.fork();
                // A step of this one and a step of that one, as several programs do.
                scope.spawn(move || {
                    while part.iter().any(|r| !r.todo.is_empty()) {
                        let n = rng.usize(..part.len());
                        part[n].step();
                    }
                    part.iter_mut().for_each(Run::end);
                });
            }
        });
        daemon.unmount();
        self.done = runs
            .into_iter()
            .map(|mut run| {
                run.order.all_durable(disk.mark());
                run.order
            })
            .collect();
        History::default()
    }

    fn recover(&self, root: &Path) -> Result<(), Violation> {
        recover(root)
    }

    fn recovery_writes(&self) -> bool {
        true
    }

    fn check(&self, root: &Path, _history: &History, at: usize) -> Result<(), Violation> {
        let seen = read_tree(root, &[]).map_err(|e| Violation::new(Kind::Torn, format!("reading: {e}")))?;
        for (n, (ops, order)) in self.sequences.iter().zip(&self.done).enumerate() {
            let home = format!("{}/", home(n));
            let mine = seen.iter().filter_map(|(k, v)| Some((k.strip_prefix(&home)?.to_owned(), v.clone()))).collect();
            order.check(at, &mine).map_err(|v| {
                let text = format!("{ops:?} at level {}, mode {}\n{}", self.level.name(), self.mode.name(), v.text);
                Violation::new(v.kind, text)
            })?;
        }
        Ok(())
    }
}

/// One sequence at work.
struct Run {
    at: PathBuf,
    disk: Disk,
    level: Level,
    mode: Mode,
    todo: Vec<Op>,
    view: View,
    held: Vec<(usize, File)>,
    order: Partial,
    stamp: u8,
}

impl Run {
    fn new(at: PathBuf, disk: &Disk, level: Level, mode: Mode, ops: &[Op]) -> Self {
        let view = View::start();
        let contents = view.inodes.iter().map(|i| i.content.as_slice().into()).collect();
        let order = Partial::new(view.names, contents);
        let todo = ops.iter().rev().copied().collect();
        Self { at, disk: disk.clone(), level, mode, todo, view, held: vec![], order, stamp: 2 }
    }

    fn step(&mut self) {
        let Some(op) = self.todo.pop() else { return };
        self.stamp += 1;
        let label = format!("{op:?}");
        self.run(op).unwrap_or_else(|e| panic!("{label} in {}: {e}", self.at.display()));
    }

    fn end(&mut self) {
        for f in (0..FILES.len()).filter(|f| self.view.inode(*f).is_some_and(|i| i.held)).collect::<Vec<_>>() {
            if self.view.inode(f).is_some_and(|i| i.held) {
                self.run(Op::Close(f)).unwrap();
            }
        }
        self.held.clear();
    }

    fn path(&self, f: Name) -> PathBuf {
        self.at.join(FILES[f])
    }

    /// Whether changes of this file are made where it lies.
    fn in_place(&self, inode: usize, whole: bool) -> bool {
        match self.mode {
            Mode::InPlace => true,
            // In `auto` only a rewrite is a version of its own.
            Mode::Auto => self.view.links(inode) > 1 || !whole,
            Mode::Replace => self.view.links(inode) > 1,
            Mode::Journal => false,
        }
    }

    fn begin(&mut self, act: Act) -> usize {
        self.order.begin(act, self.disk.mark())
    }

    fn durable_if(&mut self, waits: bool, step: usize) {
        if waits {
            self.order.durable(step, self.disk.mark());
        }
    }

    /// What is there of the file becomes a commit point.
    fn commit(&mut self, f: Name) -> usize {
        let inode = self.view.names[f].unwrap();
        self.view.inodes[inode].dirty = false;
        let content = self.view.inodes[inode].content.as_slice().into();
        if self.in_place(inode, true) {
            self.begin(Act::Complete { inode, content })
        } else {
            self.begin(Act::Commit { inode, content, at: f })
        }
    }

    /// A commit point of what a descriptor that is still open has written, if that is not committed.
    fn commit_held(&mut self, f: Name) {
        if self.view.inode(f).is_some_and(|i| i.dirty) {
            self.commit(f);
        }
    }

    fn run(&mut self, op: Op) -> io::Result<()> {
        let before = self.view.clone();
        match op {
            Op::Save(f) | Op::Hold(f) => self.write_all(op, f, &before)?,
            Op::Close(f) => {
                let inode = self.view.names[f].unwrap();
                let step = self.view.inodes[inode].dirty.then(|| self.commit(f));
                self.view.apply(op, 0);
                let n = self.held.iter().position(|h| h.0 == inode).unwrap();
                close(self.held.remove(n).1)?;
                if let Some(step) = step {
                    self.durable_if(self.level.close_waits(), step);
                }
            }
            Op::Overwrite(f) | Op::Append(f) | Op::Truncate(f) => self.change(op, f)?,
            Op::Fsync(f) => {
                self.commit_held(f);
                let inode = self.view.names[f].unwrap();
                match self.held.iter().find(|h| h.0 == inode) {
                    Some((_, file)) => file.sync_all()?,
                    None => OpenOptions::new().write(true).open(self.path(f))?.sync_all()?,
                }
                if self.level.fsync_waits() {
                    self.order.inode_durable(inode, self.disk.mark());
                }
            }
            Op::FsyncDir(d) => {
                File::open(self.at.join(DIRS[d]))?.sync_all()?;
                if self.level.fsync_waits() {
                    self.order.dir_durable(d, self.disk.mark());
                }
            }
            _ => self.change_names(op)?,
        }
        Ok(())
    }

    /// Truncate and write, with or without the close.
    fn write_all(&mut self, op: Op, f: Name, before: &View) -> io::Result<()> {
        self.view.apply(op, self.stamp);
        let inode = self.view.names[f].unwrap();
        let content = self.view.inodes[inode].content.clone();
        let in_place = self.in_place(inode, true);
        if in_place {
            if before.names[f].is_none() {
                self.begin(Act::Create { inode, at: f });
            }
            self.begin(Act::Change { inode, versions: vec![[].into(), content.as_slice().into()] });
        }
        let hold = matches!(op, Op::Hold(_));
        let step = (!hold).then(|| self.commit(f));
        let file = File::create(self.path(f))?;
        let half = content.len() / 2;
        file.write_all_at(&content[..half], 0)?;
        file.write_all_at(&content[half..], half as u64)?;
        match step {
            None => self.held.push((inode, file)),
            Some(step) => {
                close(file)?;
                self.durable_if(self.level.close_waits(), step);
            }
        }
        Ok(())
    }

    /// A change of a part.
    fn change(&mut self, op: Op, f: Name) -> io::Result<()> {
        self.commit_held(f);
        self.view.apply(op, self.stamp);
        let inode = self.view.names[f].unwrap();
        let content = self.view.inodes[inode].content.clone();
        // By truncate(2) there is no descriptor whose close would end the new version.
        let step = if self.in_place(inode, false) || matches!(op, Op::Truncate(_)) {
            self.begin(Act::Change { inode, versions: vec![content.as_slice().into()] });
            self.begin(Act::Complete { inode, content: content.as_slice().into() })
        } else {
            self.commit(f)
        };
        if let Op::Truncate(_) = op {
            return truncate(&self.path(f), content.len() as u64);
        }
        let file = OpenOptions::new().write(true).open(self.path(f))?;
        match op {
            Op::Overwrite(_) => file.write_all_at(&content[700..1900], 700)?,
            _ => file.write_all_at(&content[content.len() - 3000..], content.len() as u64 - 3000)?,
        }
        close(file)?;
        self.durable_if(self.level.close_waits(), step);
        Ok(())
    }

    fn change_names(&mut self, op: Op) -> io::Result<()> {
        let names = self.view.names;
        if let Op::Rename(f, _) | Op::Link(f, _) = op {
            self.commit_held(f);
        }
        let act = match op {
            Op::Rename(from, to) => Act::Rename { inode: names[from].unwrap(), from, to, over: names[to] },
            Op::Link(from, to) => Act::Link { inode: names[from].unwrap(), to },
            Op::Unlink(at) => Act::Unlink { inode: names[at].unwrap(), at },
            Op::Mkdir(dir) => Act::Sub { dir, there: true },
            Op::Rmdir(dir) => Act::Sub { dir, there: false },
            _ => unreachable!("not an operation on names"),
        };
        let step = self.begin(act);
        self.view.apply(op, 0);
        match op {
            Op::Rename(f, g) => fs::rename(self.path(f), self.path(g))?,
            Op::Link(f, g) => fs::hard_link(self.path(f), self.path(g))?,
            Op::Unlink(f) => fs::remove_file(self.path(f))?,
            Op::Mkdir(d) => fs::create_dir(self.at.join(DIRS[d]).join("sub"))?,
            Op::Rmdir(d) => fs::remove_dir(self.at.join(DIRS[d]).join("sub"))?,
            _ => {}
        }
        self.durable_if(self.level.names_wait(), step);
        Ok(())
    }
}

/// Closes and looks at the answer, which `drop` does not.
fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor is this file's own and is not used again.
    if unsafe { libc::close(file.into_raw_fd()) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// truncate(2), for which the standard library has no function.
fn truncate(path: &Path, len: u64) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: a string that ends with a zero and lives through the call.
    if unsafe { libc::truncate(path.as_ptr(), len as libc::off_t) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn the_sequences_are_complete_and_make_sense() {
    let all = short_sequences();
    let of = |n: usize| all.iter().filter(|s| s.len() == n).count();
    println!("{} sequences of one operation, {} of two", of(1), of(2));
    for op in [Op::Save(1), Op::Rename(0, 2), Op::Link(0, 3), Op::Mkdir(0), Op::Fsync(0), Op::Truncate(0)] {
        assert!(all.contains(&vec![op]), "{op:?}");
    }
    assert!(all.contains(&vec![Op::Hold(0), Op::Close(0)]) && all.contains(&vec![Op::Mkdir(0), Op::Rmdir(0)]));
    assert!(!all.iter().any(|s| s[0] == Op::Close(0) || s[0] == Op::Unlink(1)));
    // Each once in every round of runs.
    let mut seen: Vec<_> = (0..runs()).flat_map(|n| Ace::short(Level::Close, Mode::Auto, n as u64).sequences).collect();
    assert_eq!(seen.len(), all.len());
    seen.dedup();
    assert!(all.iter().all(|s| seen.contains(s)));
}
