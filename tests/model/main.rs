//! The file system against a simple reference: random programs, with kill -9 and recovery as operations.
//!
//! The reference is POSIX in memory, and for each file the contents that a commit may have left: what the last answer
//! promised, and what was at a commit point since. After every operation programs must see what POSIX says (P1); after
//! every crash the backing directory must be at commit points and hold all that was answered (P1, P2, P4).

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod ops;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use common::world::{Fd, World, quiet_panics, still};
use fsys_mount::backend::probe::Strategy;
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::error::Errno;
use ops::{Op, level, mode, ops};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runner, FileFailurePersistence};

const NAMES: [&str; 3] = ["a", "b", "c"];
const SLOTS: usize = 3;

/// A file of the reference.
#[derive(Debug, Clone, Default)]
struct Inode {
    /// What programs see.
    live: Vec<u8>,
    /// What the last answer promised; `None` while it exists for programs only.
    committed: Option<Vec<u8>>,
    /// What a commit may have published since.
    maybe: Vec<Vec<u8>>,
    /// What programs see is a version of its own, which the backing directory does not have.
    staged: bool,
    /// Something changed since the last commit.
    changed: bool,
    /// The version was acknowledged and is to be committed before the next operation on names.
    owed: bool,
    /// A commit of this content runs, and nobody waits for it; whatever concerns the file next does.
    running: Option<Vec<u8>>,
}

impl Inode {
    fn commit(&mut self) {
        self.committed = Some(self.live.clone());
        self.maybe.clear();
        (self.staged, self.changed, self.owed, self.running) = (false, false, false, None);
    }

    /// A new version begins. What was acknowledged before it, in place, is no debt of this one.
    fn stage(&mut self) {
        if !self.staged {
            (self.staged, self.owed) = (true, false);
        }
    }

    /// The commit that ran has ended.
    fn settle(&mut self) {
        if let Some(content) = self.running.take() {
            self.committed = Some(content);
            (self.staged, self.changed, self.owed) = (false, false, false);
        }
    }

    /// Acknowledged, to be committed later.
    fn owe(&mut self) {
        self.owed |= self.staged;
    }

    /// An operation on names, a drain: what is owed is committed first.
    fn pay(&mut self) {
        self.settle();
        if self.owed {
            self.commit();
        }
    }

    fn may_commit(&mut self) {
        self.maybe.push(self.live.clone());
    }

    fn allows(&self, found: Option<&Vec<u8>>) -> bool {
        found == self.committed.as_ref() || found.is_some_and(|f| self.maybe.contains(f))
    }
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    fd: Fd,
    inode: usize,
    /// Wrote since its last close or fsync.
    dirty: bool,
    /// Writes go to a new version, not in place.
    replace: bool,
}

/// World and reference, side by side.
struct Both<'a> {
    root: &'a Path,
    level: Durability,
    mode: WriteMode,
    world: Option<World>,
    inodes: Vec<Inode>,
    names: BTreeMap<&'static str, usize>,
    slots: [Option<Slot>; SLOTS],
    stamp: u8,
    kills: usize,
}

type Checked = Result<(), TestCaseError>;

impl<'a> Both<'a> {
    fn new(root: &'a Path, level: Durability, mode: WriteMode) -> Self {
        let world = Some(World::open_as(root, still(level, mode), Some(Strategy::OneBarrier)));
        let (inodes, names, slots) = (vec![], BTreeMap::new(), [None; SLOTS]);
        Self { root, level, mode, world, inodes, names, slots, stamp: 0, kills: 0 }
    }

    fn w(&self) -> &World {
        self.world.as_ref().unwrap()
    }

    fn links(&self, inode: usize) -> usize {
        self.names.values().filter(|i| **i == inode).count()
    }

    fn writers(&self, inode: usize) -> usize {
        self.slots.iter().flatten().filter(|s| s.inode == inode).count()
    }

    fn commit_owed(&mut self) {
        self.inodes.iter_mut().for_each(Inode::pay);
    }

    /// The last descriptor that writes is closed: nobody waits for the commit of a version that stayed empty.
    fn last_close(&mut self, inode: usize) {
        let waits = matches!(self.level, Durability::Always | Durability::Close);
        let i = &mut self.inodes[inode];
        i.may_commit();
        if waits {
            i.running = Some(i.live.clone());
        } else {
            i.owe();
        }
    }

    /// A truncation to nothing starts a new version where it can.
    fn stages(&self, inode: usize) -> bool {
        match self.mode {
            WriteMode::InPlace => false,
            WriteMode::Journal => true,
            WriteMode::Auto | WriteMode::Replace => self.links(inode) == 1,
        }
    }

    fn run(&mut self, op: &Op) -> Checked {
        self.stamp = self.stamp % 250 + 1;
        match *op {
            Op::Open { slot, name, truncate } if self.slots[slot].is_none() => self.open(slot, NAMES[name], truncate),
            Op::Write { slot, at, len } => self.write(slot, Some(at), len),
            Op::Append { slot, len } => self.write(slot, None, len),
            Op::Truncate { slot, len } => self.truncate(slot, len),
            Op::TruncateName { name, len } => self.truncate_name(NAMES[name], len),
            Op::CloseCopy { slot } => self.close_copy(slot),
            Op::Close { slot } => self.close(slot),
            Op::Fsync { slot } => self.fsync(slot),
            Op::Rename { from, to } => self.rename(NAMES[from], NAMES[to]),
            Op::Unlink { name } => self.unlink(NAMES[name]),
            Op::Link { from, to } => self.link(NAMES[from], NAMES[to]),
            Op::SyncDir => {
                prop_assert_eq!(self.w().fsync_dir(), Ok(()));
                if self.level != Durability::Relaxed {
                    self.commit_owed();
                }
                Ok(())
            }
            Op::Drain => {
                prop_assert_eq!(self.w().drain(), Ok(()));
                self.commit_owed();
                for i in 0..self.inodes.len() {
                    if self.writers(i) == 0 {
                        self.inodes[i].commit();
                    }
                }
                Ok(())
            }
            Op::Kill => self.kill(),
            Op::Remount => self.remount(),
            Op::Open { .. } => Ok(()),
        }
    }

    fn open(&mut self, slot: usize, name: &'static str, truncate: bool) -> Checked {
        let mut replace = matches!(self.mode, WriteMode::Replace | WriteMode::Journal);
        let (fd, inode) = if let Some(&inode) = self.names.get(name) {
            let flags = libc::O_RDWR | if truncate { libc::O_TRUNC } else { 0 };
            let fd = self.w().open_with(name, flags);
            if truncate {
                replace |= self.cleared(inode);
            }
            (fd, inode)
        } else {
            let fd = self.w().create(name);
            let mut inode = Inode { staged: true, changed: true, ..Inode::default() };
            if self.mode == WriteMode::InPlace {
                inode.commit();
            } else {
                replace = true;
            }
            self.inodes.push(inode);
            self.names.insert(name, self.inodes.len() - 1);
            (fd, self.inodes.len() - 1)
        };
        prop_assert!(fd.is_ok(), "open {name}: {fd:?}");
        self.slots[slot] = Some(Slot { fd: fd.unwrap(), inode, dirty: false, replace });
        Ok(())
    }

    /// A version that was acknowledged is committed before it changes, with what was acknowledged before it.
    fn before_change(&mut self, inode: usize) {
        self.inodes[inode].settle();
        if self.inodes[inode].staged && self.inodes[inode].owed {
            self.commit_owed();
        }
    }

    /// The content is gone for programs; in place on the disk too. True when it is a version of its own.
    fn cleared(&mut self, inode: usize) -> bool {
        self.before_change(inode);
        let stages = self.stages(inode);
        let i = &mut self.inodes[inode];
        i.changed = true;
        i.live.clear();
        if stages {
            i.stage();
        } else {
            i.may_commit();
        }
        stages
    }

    /// A change through a descriptor is done.
    fn changed(&mut self, slot: usize) {
        let Some(s) = self.slots[slot] else { return };
        let stages = s.replace && self.stages(s.inode);
        let i = &mut self.inodes[s.inode];
        i.changed = true;
        if stages {
            i.stage();
        }
        let in_place = !i.staged;
        if in_place {
            i.may_commit();
        }
        let s = self.slots[slot].as_mut().unwrap();
        s.dirty = true;
        s.replace &= !in_place;
    }

    fn write(&mut self, slot: usize, at: Option<usize>, len: usize) -> Checked {
        let Some(s) = self.slots[slot] else { return Ok(()) };
        let at = at.unwrap_or(self.inodes[s.inode].live.len());
        let data = vec![self.stamp; len];
        prop_assert_eq!(self.w().write_all(s.fd, at as u64, &data), Ok(()));
        self.before_change(s.inode);
        let live = &mut self.inodes[s.inode].live;
        live.resize(live.len().max(at + len), 0);
        live[at..at + len].copy_from_slice(&data);
        self.changed(slot);
        Ok(())
    }

    fn truncate(&mut self, slot: usize, len: usize) -> Checked {
        let Some(s) = self.slots[slot] else { return Ok(()) };
        prop_assert_eq!(self.w().truncate(s.fd, len as u64), Ok(()));
        if len == 0 {
            let stages = self.cleared(s.inode);
            self.slots[slot].as_mut().unwrap().replace |= stages;
        } else {
            self.before_change(s.inode);
            self.inodes[s.inode].live.resize(len, 0);
            self.changed(slot);
        }
        Ok(())
    }

    fn truncate_name(&mut self, name: &'static str, len: usize) -> Checked {
        let done = self.w().truncate_name(name, len as u64);
        let Some(&inode) = self.names.get(name) else {
            prop_assert_eq!(done, Err(Errno::NOENT));
            return Ok(());
        };
        prop_assert_eq!(done, Ok(()));
        let journal = self.mode == WriteMode::Journal;
        if len == 0 {
            self.cleared(inode);
        } else {
            self.before_change(inode);
            let i = &mut self.inodes[inode];
            i.live.resize(len, 0);
            i.changed = true;
            if journal {
                i.stage();
            }
            if !i.staged {
                i.may_commit();
            }
        }
        let written = self.slots.iter().flatten().any(|s| s.inode == inode && s.dirty);
        if !(self.inodes[inode].staged && written) {
            self.inodes[inode].owe();
        }
        Ok(())
    }

    fn close_copy(&mut self, slot: usize) -> Checked {
        let Some(s) = self.slots[slot] else { return Ok(()) };
        prop_assert_eq!(self.w().flush(s.fd), Ok(()));
        if s.dirty {
            self.slots[slot].as_mut().unwrap().dirty = false;
            self.ended(s.inode, matches!(self.level, Durability::Always | Durability::Close));
        }
        Ok(())
    }

    /// A close or fsync was answered.
    fn ended(&mut self, inode: usize, waits: bool) {
        if self.links(inode) == 0 {
            // Nothing of it is ever on the disk again.
        } else if waits {
            // One that finds nothing to do is answered at once, and brings nothing that could overtake others.
            self.inodes[inode].settle();
            if self.inodes[inode].changed {
                self.commit_owed();
            }
            self.inodes[inode].commit();
        } else {
            self.inodes[inode].owe();
        }
    }

    fn close(&mut self, slot: usize) -> Checked {
        self.close_copy(slot)?;
        let Some(s) = self.slots[slot].take() else { return Ok(()) };
        self.w().release(s.fd);
        if self.writers(s.inode) == 0 {
            self.last_close(s.inode);
        }
        Ok(())
    }

    fn fsync(&mut self, slot: usize) -> Checked {
        let Some(s) = self.slots[slot] else { return Ok(()) };
        prop_assert_eq!(self.w().fsync(s.fd), Ok(()));
        self.slots[slot].as_mut().unwrap().dirty = false;
        self.ended(s.inode, self.level != Durability::Relaxed);
        Ok(())
    }

    fn rename(&mut self, from: &'static str, to: &'static str) -> Checked {
        let same = |a: &str, b: &str| self.names.contains_key(a) && self.names.get(a) == self.names.get(b);
        if from == to || same(from, to) {
            // The kernel answers this without asking.
            return Ok(());
        }
        let done = self.w().rename(from, to);
        self.commit_owed();
        let Some(&inode) = self.names.get(from) else {
            prop_assert_eq!(done, Err(Errno::NOENT));
            return Ok(());
        };
        prop_assert_eq!(done, Ok(()));
        self.inodes[inode].commit();
        self.names.remove(from);
        self.names.insert(to, inode);
        Ok(())
    }

    fn unlink(&mut self, name: &'static str) -> Checked {
        let done = self.w().unlink(name);
        self.commit_owed();
        let there = self.names.remove(name).is_some();
        prop_assert_eq!(done, if there { Ok(()) } else { Err(Errno::NOENT) });
        Ok(())
    }

    fn link(&mut self, from: &'static str, to: &'static str) -> Checked {
        if self.names.contains_key(to) {
            // The kernel answers this without asking.
            return Ok(());
        }
        let done = self.w().link(from, to);
        let Some(&inode) = self.names.get(from) else {
            prop_assert_eq!(done, Err(Errno::NOENT));
            return Ok(());
        };
        prop_assert_eq!(done, Ok(()));
        self.commit_owed();
        self.inodes[inode].commit();
        self.names.insert(to, inode);
        Ok(())
    }

    fn kill(&mut self) -> Checked {
        self.kills += 1;
        self.world.take().unwrap().kill();
        if self.mode == WriteMode::Journal {
            // Until then a file may be there in part.
            common::world::recovered(self.root);
        }
        self.look_at_disk("kill")
    }

    fn remount(&mut self) -> Checked {
        let w = self.world.take().unwrap();
        prop_assert_eq!(w.shutdown(), Ok(()));
        drop(w);
        for i in 0..self.inodes.len() {
            let written = self.slots.iter().flatten().any(|s| s.inode == i && s.dirty);
            // Emptied to be rewritten, which has not begun.
            let n = &self.inodes[i];
            let begun = n.staged && !n.owed && n.committed.is_some() && n.live.is_empty() && self.writers(i) > 0;
            if written || begun {
                self.inodes[i].pay();
            } else {
                self.inodes[i].commit();
            }
        }
        self.look_at_disk("unmount")
    }

    /// Compares the backing directory with what it may be, and goes on from what it is.
    fn look_at_disk(&mut self, after: &str) -> Checked {
        self.slots = [None; SLOTS];
        let mut by_ino = BTreeMap::new();
        let (mut inodes, mut names) = (vec![], BTreeMap::new());
        for name in NAMES {
            let found = fs::read(self.root.join(name)).ok();
            let good = match self.names.get(name) {
                Some(i) => self.inodes[*i].allows(found.as_ref()),
                None => found.is_none(),
            };
            let model = self.names.get(name).map(|i| &self.inodes[*i]);
            prop_assert!(good, "after {after}: {name} is {:?}, reference {}", show(found.as_deref()), tell(model));
            let Some(content) = found else { continue };
            let ino = fs::metadata(self.root.join(name)).unwrap().ino();
            let inode = *by_ino.entry(ino).or_insert_with(|| {
                let (live, committed) = (content.clone(), Some(content.clone()));
                inodes.push(Inode { live, committed, ..Inode::default() });
                inodes.len() - 1
            });
            names.insert(name, inode);
        }
        let others: BTreeSet<_> = fs::read_dir(self.root).unwrap().map(|e| e.unwrap().file_name()).collect();
        let known = NAMES.iter().copied().chain([".fsys"]);
        let strange: Vec<_> = others.iter().filter(|n| known.clone().all(|k| *n != k)).collect();
        prop_assert!(strange.is_empty(), "left in the user's tree: {strange:?}");
        (self.inodes, self.names) = (inodes, names);
        self.world = Some(World::open_as(self.root, still(self.level, self.mode), Some(Strategy::OneBarrier)));
        let staging = self.w().internal("staging");
        prop_assert!(staging.is_empty(), "recovery leaves {staging:?}");
        Ok(())
    }

    /// Programs see what POSIX says.
    fn look(&mut self) -> Checked {
        for name in NAMES {
            let seen = self.w().seen(name);
            match self.names.get(name) {
                Some(&i) => {
                    let want = self.inodes[i].live.clone();
                    let good = seen.as_ref() == Ok(&want);
                    prop_assert!(good, "{name} shows {:?}, not {:?}", seen.map(|s| show(Some(&s))), show(Some(&want)));
                    // The close after this look is the last one: a version that nobody writes is committed then.
                    if self.writers(i) == 0 {
                        self.last_close(i);
                    }
                }
                None => prop_assert_eq!(seen, Err(Errno::NOENT), "{}", name),
            }
        }
        for s in self.slots.iter().flatten() {
            let seen = self.w().read(s.fd);
            let want = &self.inodes[s.inode].live;
            let good = seen.as_ref() == Ok(want);
            prop_assert!(good, "a descriptor shows {:?}, not {:?}", seen.map(|s| show(Some(&s))), show(Some(want)));
        }
        Ok(())
    }
}

/// A content in few words: runs of equal bytes.
fn show(content: Option<&[u8]>) -> String {
    let Some(content) = content else { return "absent".into() };
    let runs = content.chunk_by(|a, b| a == b).map(|run| format!("{}x{}", run.len(), run[0]));
    format!("[{}]", runs.collect::<Vec<_>>().join(" "))
}

fn tell(inode: Option<&Inode>) -> String {
    inode.map_or("has no such name".into(), |i| {
        let maybe: Vec<_> = i.maybe.iter().map(|c| show(Some(c))).collect();
        format!("{} or {maybe:?}, programs saw {}", show(i.committed.as_deref()), show(Some(&i.live)))
    })
}

fn run(level: Durability, mode: WriteMode, ops: &[Op]) -> Checked {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut both = Both::new(dir.path(), level, mode);
    for op in ops {
        both.run(op)?;
        both.look()?;
    }
    both.remount()?;
    both.look()?;
    let w = both.world.take().unwrap();
    prop_assert_eq!(w.shutdown(), Ok(()));
    Ok(())
}

fn runner() -> Runner {
    Runner {
        cases: common::env_number("FSYS_MODEL_CASES", 400) as u32,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/model.regressions"))),
        max_shrink_iters: 2000,
        ..Runner::default()
    }
}

proptest! {
    #![proptest_config(runner())]

    /// P1, P2, P4, P5, P7 in one: see the module.
    #[test]
    fn it_is_what_the_reference_says(level in level(), mode in mode(), ops in prop::collection::vec(ops(), 1..40)) {
        quiet_panics();
        run(level, mode, &ops)?;
    }
}

/// The reference can tell: a prefix, a lost save and a stray file are found.
#[test]
fn the_reference_finds_what_is_wrong() {
    let save =
        [Op::Open { slot: 0, name: 0, truncate: true }, Op::Write { slot: 0, at: 0, len: 100 }, Op::Close { slot: 0 }];
    let damage: [fn(&Path); 4] = [
        |_| {},
        |root| fs::write(root.join("a"), vec![1; 50]).unwrap(),
        |root| fs::remove_file(root.join("a")).unwrap(),
        |root| fs::write(root.join("b"), "").unwrap(),
    ];
    for (n, damage) in damage.into_iter().enumerate() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut both = Both::new(dir.path(), Durability::Close, WriteMode::Auto);
        save.iter().for_each(|op| both.run(op).unwrap());
        both.world.take().unwrap().kill();
        damage(dir.path());
        assert_eq!(both.look_at_disk("damage").is_ok(), n == 0, "damage {n}");
        if let Some(w) = both.world.take() {
            w.shutdown().unwrap();
        }
    }
}

/// What the search found, for good.
#[test]
fn what_was_found_stays_mended() {
    let open = |slot, name, truncate| Op::Open { slot, name, truncate };
    let write = |slot| Op::Write { slot, at: 0, len: 1 };
    let close = |slot| Op::Close { slot };
    let save = |name| [open(0, name, true), write(0), close(0)];
    // A removed link, or a rename that failed, held the old inode: later opens showed it after the next save.
    let links = [&save(0)[..], &[Op::Link { from: 0, to: 1 }, Op::Unlink { name: 0 }], &save(1), &save(1)].concat();
    let failed = [&save(1)[..], &[Op::Rename { from: 0, to: 1 }], &save(1), &save(1)].concat();
    // A debt that was paid, or was one of changes in place, published the next version half-written.
    let paid =
        vec![open(0, 0, false), write(0), Op::Fsync { slot: 0 }, Op::SyncDir, Op::CloseCopy { slot: 0 }, write(0)];
    let in_place = [&save(0)[..], &[Op::TruncateName { name: 0, len: 1 }, open(0, 0, true), write(0)]].concat();
    for (n, ops) in [links, failed, paid, in_place].iter().enumerate() {
        for level in [Durability::Always, Durability::Close, Durability::Fsync, Durability::Relaxed] {
            let more = [&ops[..], &[open(1, 2, true), close(1), Op::Drain, Op::Kill]].concat();
            run(level, WriteMode::Auto, &more).unwrap_or_else(|e| panic!("{n} at {level:?}: {e}"));
        }
    }
}
