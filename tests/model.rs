//! The file system against a simple reference: random programs, with kill -9 and recovery as operations.
//!
//! The reference is POSIX in memory, and for each file the contents that a commit may have left: what the last answer
//! promised, and what was at a commit point since. After every operation programs must see what POSIX says (P1); after
//! every crash the backing directory must be at commit points and hold all that was answered (P1, P2, P4).

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use common::world::{Fd, World, quiet_panics, still};
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::error::Errno;
use proptest::prelude::*;
use proptest::test_runner::{Config as Runner, FileFailurePersistence};

const NAMES: [&str; 3] = ["a", "b", "c"];
const SLOTS: usize = 3;

/// What a program, or fate, does.
#[derive(Debug, Clone)]
enum Op {
    /// Opens for reading and writing; makes the file if there is none.
    Open {
        slot: usize,
        name: usize,
        truncate: bool,
    },
    Write {
        slot: usize,
        at: usize,
        len: usize,
    },
    Append {
        slot: usize,
        len: usize,
    },
    Truncate {
        slot: usize,
        len: usize,
    },
    TruncateName {
        name: usize,
        len: usize,
    },
    /// Closes a copy of the descriptor.
    CloseCopy {
        slot: usize,
    },
    Close {
        slot: usize,
    },
    Fsync {
        slot: usize,
    },
    Rename {
        from: usize,
        to: usize,
    },
    Unlink {
        name: usize,
    },
    Link {
        from: usize,
        to: usize,
    },
    SyncDir,
    Drain,
    /// kill -9, recovery, a new mount.
    Kill,
    /// Unmount with descriptors open, and a new mount.
    Remount,
}

fn ops() -> impl Strategy<Value = Op> {
    let (slot, name) = (0..SLOTS, 0..NAMES.len());
    let len = prop_oneof![Just(0_usize), 1..5000_usize];
    prop_oneof![
        6 => (slot.clone(), name.clone(), any::<bool>())
            .prop_map(|(slot, name, truncate)| Op::Open { slot, name, truncate }),
        5 => (slot.clone(), 0..6000_usize, 1..5000_usize).prop_map(|(slot, at, len)| Op::Write { slot, at, len }),
        3 => (slot.clone(), 1..5000_usize).prop_map(|(slot, len)| Op::Append { slot, len }),
        1 => (slot.clone(), len.clone()).prop_map(|(slot, len)| Op::Truncate { slot, len }),
        1 => (name.clone(), len).prop_map(|(name, len)| Op::TruncateName { name, len }),
        1 => slot.clone().prop_map(|slot| Op::CloseCopy { slot }),
        5 => slot.clone().prop_map(|slot| Op::Close { slot }),
        2 => slot.prop_map(|slot| Op::Fsync { slot }),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Op::Rename { from, to }),
        1 => name.clone().prop_map(|name| Op::Unlink { name }),
        1 => (name.clone(), name).prop_map(|(from, to)| Op::Link { from, to }),
        1 => Just(Op::SyncDir),
        1 => Just(Op::Drain),
        2 => Just(Op::Kill),
        1 => Just(Op::Remount),
    ]
}

fn level() -> impl Strategy<Value = Durability> {
    prop_oneof![Just(Durability::Always), Just(Durability::Close), Just(Durability::Fsync), Just(Durability::Relaxed)]
}

fn mode() -> impl Strategy<Value = WriteMode> {
    prop_oneof![3 => Just(WriteMode::Auto), 2 => Just(WriteMode::Replace), 1 => Just(WriteMode::InPlace)]
}

/// A file of the reference.
#[derive(Debug, Clone, Default)]
struct Inode {
    /// What programs see.
    live: Vec<u8>,
    /// What the last answer promised; `None` while it exists for programs only.
    committed: Option<Vec<u8>>,
    /// What a commit may have published since.
    maybe: Vec<Vec<u8>>,
    /// A change was acknowledged and is to be committed before the next operation on names.
    owed: bool,
}

impl Inode {
    fn commit(&mut self) {
        self.committed = Some(self.live.clone());
        self.maybe.clear();
        self.owed = false;
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
        let world = Some(World::open(root, still(level, mode)));
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
        self.inodes.iter_mut().filter(|i| i.owed).for_each(Inode::commit);
    }

    /// A truncation to nothing starts a new version where it can.
    fn stages(&self, inode: usize) -> bool {
        self.mode != WriteMode::InPlace && self.links(inode) == 1
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
                self.commit_owed();
                Ok(())
            }
            Op::Drain => {
                prop_assert_eq!(self.w().drain(), Ok(()));
                for i in 0..self.inodes.len() {
                    if self.inodes[i].owed || self.writers(i) == 0 {
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
        let mut replace = self.mode == WriteMode::Replace;
        let (fd, inode) = if let Some(&inode) = self.names.get(name) {
            let flags = libc::O_RDWR | if truncate { libc::O_TRUNC } else { 0 };
            let fd = self.w().open_with(name, flags);
            if truncate {
                replace |= self.stages(inode);
                self.cleared(inode);
            }
            (fd, inode)
        } else {
            let fd = self.w().create(name);
            let mut inode = Inode::default();
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

    /// The content is gone for programs, and in place on the disk too.
    fn cleared(&mut self, inode: usize) {
        let stages = self.stages(inode);
        let i = &mut self.inodes[inode];
        i.live.clear();
        if !stages {
            i.may_commit();
        }
    }

    /// A change through a descriptor is done.
    fn changed(&mut self, slot: usize) {
        let Some(s) = self.slots[slot] else { return };
        let in_place = !s.replace || self.links(s.inode) != 1 || self.mode == WriteMode::InPlace;
        let s = self.slots[slot].as_mut().unwrap();
        s.dirty = true;
        if in_place {
            s.replace = false;
            self.inodes[s.inode].may_commit();
        }
    }

    fn write(&mut self, slot: usize, at: Option<usize>, len: usize) -> Checked {
        let Some(s) = self.slots[slot] else { return Ok(()) };
        let at = at.unwrap_or(self.inodes[s.inode].live.len());
        let data = vec![self.stamp; len];
        prop_assert_eq!(self.w().write_all(s.fd, at as u64, &data), Ok(()));
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
            let stages = self.stages(s.inode);
            self.cleared(s.inode);
            self.slots[slot].as_mut().unwrap().replace |= stages;
        } else {
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
        if len == 0 {
            self.cleared(inode);
        } else {
            self.inodes[inode].live.resize(len, 0);
            self.inodes[inode].may_commit();
        }
        self.inodes[inode].owed = true;
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
        if waits {
            self.commit_owed();
            self.inodes[inode].commit();
        } else {
            self.inodes[inode].owed = true;
        }
    }

    fn close(&mut self, slot: usize) -> Checked {
        self.close_copy(slot)?;
        let Some(s) = self.slots[slot].take() else { return Ok(()) };
        self.w().release(s.fd);
        if self.writers(s.inode) == 0 {
            // A version that stayed empty: nobody waits for its commit.
            self.inodes[s.inode].may_commit();
            self.inodes[s.inode].owed = true;
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
        let done = self.w().rename(from, to);
        self.commit_owed();
        let Some(&inode) = self.names.get(from) else {
            prop_assert_eq!(done, Err(Errno::NOENT));
            return Ok(());
        };
        prop_assert_eq!(done, Ok(()));
        self.inodes[inode].commit();
        if self.names.get(to) != Some(&inode) {
            self.names.remove(from);
            self.names.insert(to, inode);
        }
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
        let done = self.w().link(from, to);
        let Some(&inode) = self.names.get(from) else {
            prop_assert_eq!(done, Err(Errno::NOENT));
            return Ok(());
        };
        if self.names.contains_key(to) {
            prop_assert_eq!(done, Err(Errno::EXIST));
            // Perhaps what comes before a link was done when the name was seen to be taken.
            for (n, i) in self.inodes.iter_mut().enumerate() {
                if i.owed || n == inode {
                    i.may_commit();
                }
            }
            return Ok(());
        }
        prop_assert_eq!(done, Ok(()));
        self.commit_owed();
        self.inodes[inode].commit();
        self.names.insert(to, inode);
        Ok(())
    }

    fn kill(&mut self) -> Checked {
        self.kills += 1;
        self.world.take().unwrap().kill();
        self.look_at_disk("kill")
    }

    fn remount(&mut self) -> Checked {
        let w = self.world.take().unwrap();
        prop_assert_eq!(w.shutdown(), Ok(()));
        drop(w);
        for i in 0..self.inodes.len() {
            let unfinished = self.slots.iter().flatten().any(|s| s.inode == i && s.dirty);
            if !unfinished {
                self.inodes[i].commit();
            } else if self.inodes[i].owed {
                self.inodes[i].may_commit();
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
        self.world = Some(World::open(self.root, still(self.level, self.mode)));
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
                    let want = &self.inodes[i].live;
                    let good = seen.as_ref() == Ok(want);
                    prop_assert!(good, "{name} shows {:?}, not {:?}", seen.map(|s| show(Some(&s))), show(Some(want)));
                    // The close after this look is the last one: a version that nobody writes is committed then.
                    if self.writers(i) == 0 {
                        self.inodes[i].may_commit();
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
