//! The table of nodes: what the kernel knows by number, and which backing inode each one is at the moment.
//!
//! A node's number, which programs also see as `st_ino`, is that of the backing inode where the node was first met,
//! unless another node has it: a file keeps its number when commits replace its backing inode, and the inode that
//! then gets the freed number is shown under another. A node holds no descriptor unless it is open; it finds its inode
//! by file handle. While a file has a staged version, two backing inodes are the same node.
//! Of a file that nobody has used for a while less is kept ([`Packed`]); whoever asks for its node makes it anew.
//! Lock order: state of a file, then the table.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::hash::RandomState;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Sender;
use hashbrown::HashSet;
use parking_lot::RwLock;
use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::own::OnceOwn;
use super::resting::Packed;
use super::{ROOT, StaleCache};
use crate::backend::{Anchor, Backing, FileId, file_type};
use crate::engine::dir::{Dir, Place};
use crate::engine::file::File;
use crate::engine::{Behind, Observer};

/// What a node is.
#[derive(Debug)]
pub enum Kind {
    /// A regular file.
    File(Arc<File>),
    /// A directory.
    Dir(Arc<Dir>),
    /// A symlink, fifo, socket or device.
    Other(Box<Other>),
}

/// What has no content of its own.
#[derive(Debug)]
pub struct Other {
    anchor: Anchor,
    /// Keeps it reachable after its last name went.
    pin: OnceLock<OwnedFd>,
}

impl Other {
    /// An `O_PATH` descriptor.
    pub fn open(&self, backing: &Backing) -> Result<OwnedFd, Errno> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        match self.pin.get() {
            Some(fd) => Ok(fd.try_clone().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?),
            None => backing.open_anchor(&self.anchor, flags),
        }
    }

    /// Called before a name of it goes.
    pub fn hold(&self, backing: &Backing) {
        if self.pin.get().is_none()
            && let Ok(fd) = self.open(backing)
        {
            // Another thread was first: the same inode.
            drop(self.pin.set(fd));
        }
    }
}

/// One node.
#[derive(Debug)]
pub struct Node {
    /// The kernel's number for it, and `st_ino`.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
    /// Which of all nodes: numbers are used again.
    pub(super) nth: u64,
    pub(super) lookups: AtomicU64,
    /// What the file says of its own policy, once that was read.
    pub(super) own: OnceOwn,
    /// Backing inode of what is never replaced; for files the state knows.
    pub(super) fixed: FileId,
    /// For files: the change time, in nanoseconds since 1970, at which the kernel's pages were the content; 0: not known.
    pub(super) pages: AtomicI64,
}

/// Work for the thread that talks to the kernel unasked.
#[derive(Debug)]
pub(super) enum Stale {
    Cache(StaleCache),
    /// All caches.
    All,
    Reap(u64),
    Trim,
    Stop,
}

#[derive(Debug, Default)]
struct Maps {
    nodes: HashMap<u64, Arc<Node>>,
    resting: HashSet<Packed, RandomState>,
    /// But for resting nodes with the number of their inode.
    by_inode: HashMap<FileId, u64>,
    /// Of the backing directory.
    dev: u64,
    /// Files in `nodes` ([`Node::nth`]), in the order in which they are looked at, and some that are gone.
    awake: VecDeque<(u64, u64)>,
    /// Nodes so far.
    made: u64,
    /// So many files stay as they are, used or not.
    most_awake: usize,
}

/// All nodes.
#[derive(Debug)]
pub struct Table {
    maps: RwLock<Maps>,
    next: AtomicU64,
    stale: Sender<Stale>,
}

/// [`Maps::most_awake`], if nobody says otherwise.
pub(super) const AWAKE: usize = 256;

/// Maps that have room for so many nodes, and hold an eighth of that, give the memory back.
const TRIM_MIN: usize = 1 << 14;

/// First of the numbers that no file system gives out: for inodes whose own number is taken.
const OWN: u64 = 1 << 62;

impl Table {
    pub(super) fn new(root: Dir, id: FileId, dev: u64, stale: Sender<Stale>) -> Self {
        let node = Node::new(ROOT, Kind::Dir(Arc::new(root)), id);
        let mut maps = Maps { dev, most_awake: AWAKE, ..Maps::default() };
        maps.add(node);
        Self { maps: RwLock::new(maps), next: AtomicU64::new(OWN), stale }
    }

    /// A number for a new node of a backing inode.
    pub fn new_id(&self, id: FileId) -> u64 {
        self.pick(&self.maps.read(), id)
    }

    fn pick(&self, maps: &Maps, id: FileId) -> u64 {
        let usual = id.dev == maps.dev && id.ino > ROOT && id.ino < OWN;
        if usual && !maps.nodes.contains_key(&id.ino) && !maps.resting.contains(&id.ino) {
            id.ino
        } else {
            self.next.fetch_add(1, Ordering::Relaxed)
        }
    }

    /// The node of a number.
    pub fn get(&self, id: u64) -> Option<Arc<Node>> {
        let maps = self.maps.read();
        match maps.nodes.get(&id) {
            None if maps.resting.contains(&id) => {}
            node => return node.cloned(),
        }
        drop(maps);
        self.maps.write().wake(id)
    }

    /// The number of the node of a backing inode.
    pub fn number(&self, id: FileId) -> Option<u64> {
        self.maps.read().number(id)
    }

    /// The node of a backing inode.
    pub fn find(&self, id: FileId) -> Option<Arc<Node>> {
        self.number(id).and_then(|n| self.get(n))
    }

    /// Nodes that the kernel knows.
    pub fn len(&self) -> usize {
        let maps = self.maps.read();
        maps.nodes.len() + maps.resting.len()
    }

    /// Counts a lookup of a node; false when it was dropped meanwhile.
    pub fn count(&self, node: &Node) -> bool {
        let maps = self.maps.read();
        let known = maps.has(node);
        if known {
            node.lookups.fetch_add(1, Ordering::AcqRel);
        }
        known
    }

    /// Takes `n` lookups back (0 only asks). True when none is left.
    pub fn uncount(node: &Node, n: u64) -> bool {
        let less = |v: u64| Some(v.saturating_sub(n));
        node.lookups.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok_and(|v| v <= n)
    }

    /// Drops a node if the kernel does not know it any more; true when it did.
    pub fn remove_if_forgotten(&self, node: &Node) -> bool {
        // Read before the table is locked: a file's state comes first in the lock order.
        let current = match &node.kind {
            Kind::File(f) => f.state.read().id,
            _ => Some(node.fixed),
        };
        let mut maps = self.maps.write();
        if node.lookups.load(Ordering::Acquire) > 0 || node.id == ROOT || !maps.has(node) {
            return false;
        }
        maps.nodes.remove(&node.id);
        for id in [Some(node.fixed), current].into_iter().flatten() {
            maps.drop_inode(id, node.id);
        }
        if maps.trim() {
            self.tell(Stale::Trim);
        }
        true
    }

    /// Keeps no more files as they are than this, from those on that come.
    pub(super) fn keep_awake(&self, most: usize) {
        self.maps.write().most_awake = most;
    }

    /// Files that are not packed.
    #[cfg(test)]
    pub(super) fn awake(&self) -> usize {
        self.maps.read().nodes.values().filter(|n| n.file().is_ok()).count()
    }

    /// Places in the line of those to be packed.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.maps.read().awake.len()
    }

    /// The numbers of all nodes.
    pub fn numbers(&self) -> Vec<u64> {
        let maps = self.maps.read();
        maps.nodes.keys().copied().chain(maps.resting.iter().map(Packed::tag)).collect()
    }

    /// All that the kernel may keep of a node, under the name that is known.
    pub fn stale(&self, id: u64) -> Option<StaleCache> {
        let maps = self.maps.read();
        let Some(node) = maps.nodes.get(&id).cloned() else { return maps.resting.get(&id).map(Packed::stale) };
        drop(maps);
        Some(node.stale())
    }

    /// The node of a file that the engine made or knows, counted; `None` when another file has its number by now.
    pub fn enter_file(&self, file: &Arc<File>, id: FileId) -> Option<Arc<Node>> {
        let mut maps = self.maps.write();
        let Some(n) = maps.wake(file.tag) else {
            return Some(maps.add(Node::new(file.tag, Kind::File(file.clone()), id)));
        };
        let same = matches!(&n.kind, Kind::File(f) if Arc::ptr_eq(f, file));
        same.then(|| {
            n.lookups.fetch_add(1, Ordering::AcqRel);
            n
        })
    }

    /// The node of a backing inode found under a name; counted.
    pub fn enter(&self, anchor: Anchor, st: &Stat, dir: &Arc<Dir>, name: &OsStr) -> Arc<Node> {
        let id = FileId::of(st);
        loop {
            let Some(node) = self.find(id).filter(|n| n.is(id, &anchor)) else { break };
            if self.count(&node) {
                node.learn_name(st, dir, name);
                return node;
            }
        }
        let mut maps = self.maps.write();
        // Two lookups of the same new inode at the same time: the first one's node is the one.
        if let Some(first) = maps.number(id).and_then(|n| maps.wake(n))
            && first.may_be(id, &anchor)
        {
            first.lookups.fetch_add(1, Ordering::AcqRel);
            return first;
        }
        let tag = self.pick(&maps, id);
        let kind = match file_type(st) {
            FileType::RegularFile => Kind::File(Arc::new(File::committed(tag, id, anchor))),
            FileType::Directory => {
                let place = Place { dir: dir.clone(), name: name.to_owned() };
                Kind::Dir(Arc::new(Dir::new(tag, id, anchor, Some(place))))
            }
            _ => Kind::Other(Box::new(Other { anchor, pin: OnceLock::new() })),
        };
        let node = Node::new(tag, kind, id);
        node.learn_name(st, dir, name);
        maps.add(node)
    }

    fn tell(&self, s: Stale) {
        // The receiver lives as long as the file system; after it nobody has caches.
        drop(self.stale.send(s));
    }

    fn reap_later(&self, maps: &Maps, tag: u64) {
        if maps.nodes.get(&tag).is_some_and(|n| n.lookups.load(Ordering::Acquire) == 0) {
            self.tell(Stale::Reap(tag));
        }
    }
}

impl Maps {
    /// Gives memory back that is not needed any more; whether there was any.
    fn trim(&mut self) -> bool {
        let room = self.nodes.capacity() + self.resting.capacity() + self.by_inode.capacity();
        let sparse = room >= TRIM_MIN && self.nodes.len() + self.resting.len() + self.by_inode.len() < room / 8;
        if sparse {
            self.nodes.shrink_to(self.nodes.len() * 2);
            self.resting.shrink_to(self.resting.len() * 2);
            self.by_inode.shrink_to(self.by_inode.len() * 2);
            self.awake.shrink_to(self.awake.len() * 2);
        }
        sparse
    }

    /// Whether the node is there: another may have its number by now.
    fn has(&self, node: &Node) -> bool {
        self.nodes.get(&node.id).is_some_and(|n| n.nth == node.nth)
    }

    /// A new node.
    fn add(&mut self, node: Node) -> Arc<Node> {
        self.by_inode.insert(node.fixed, node.id);
        self.keep(node)
    }

    fn keep(&mut self, node: Node) -> Arc<Node> {
        self.made += 1;
        let node = Arc::new(Node { nth: self.made, ..node });
        self.nodes.insert(node.id, node.clone());
        if matches!(node.kind, Kind::File(_)) {
            self.awake.push_back((node.id, node.nth));
            // Twice as many as come, since some are in use.
            self.rest_one();
            self.rest_one();
        }
        node
    }

    /// Packs the file that has been awake for longest, if there are many and nobody uses it. Whoever holds the table alone and
    /// finds no other reference to a node knows that there will be none.
    fn rest_one(&mut self) {
        if self.awake.len() <= self.most_awake {
            return;
        }
        let Some((tag, nth)) = self.awake.pop_front() else { return };
        let Some(node) = self.nodes.get_mut(&tag).filter(|n| n.nth == nth) else { return };
        let Some(packed) = Arc::get_mut(node).and_then(|n| Packed::of(n, self.dev)) else {
            return self.awake.push_back((tag, nth));
        };
        self.nodes.remove(&tag);
        if packed.is_usual() {
            self.drop_inode(FileId { dev: self.dev, ino: tag }, tag);
        }
        self.resting.insert(packed);
    }

    /// The node of a number, resting or not.
    fn wake(&mut self, tag: u64) -> Option<Arc<Node>> {
        if let Some(node) = self.nodes.get(&tag) {
            return Some(node.clone());
        }
        let node = self.resting.take(&tag)?.unpack(self.dev)?;
        // Unless its inode is gone, and another node has one of the same number.
        self.by_inode.entry(node.fixed).or_insert(tag);
        Some(self.keep(node))
    }

    /// The number of the node of a backing inode.
    fn number(&self, id: FileId) -> Option<u64> {
        let rests = || id.dev == self.dev && self.resting.get(&id.ino).is_some_and(Packed::is_usual);
        self.by_inode.get(&id).copied().or_else(|| rests().then_some(id.ino))
    }

    /// Forgets which node a backing inode is, if it still is that one.
    fn drop_inode(&mut self, id: FileId, node: u64) {
        if self.by_inode.get(&id) == Some(&node) {
            self.by_inode.remove(&id);
        }
    }
}

impl Node {
    /// Counted once.
    pub(super) fn new(id: u64, kind: Kind, fixed: FileId) -> Self {
        Self { id, kind, nth: 0, lookups: AtomicU64::new(1), own: OnceOwn::default(), fixed, pages: AtomicI64::new(0) }
    }

    /// Whether this node is that very inode and not one that had the same number before.
    fn is(&self, id: FileId, anchor: &Anchor) -> bool {
        match &self.kind {
            Kind::File(f) => {
                let st = f.state.read();
                // A staged inode is held open, so its number cannot have been reused.
                st.id != Some(id) || st.anchor.as_ref().is_none_or(|a| a.same(anchor))
            }
            Kind::Dir(d) => d.anchor.same(anchor),
            Kind::Other(o) => o.anchor.same(anchor),
        }
    }

    /// [`Node::is`] for a caller that holds the table: a state that is locked is taken to match, since the thread
    /// that holds it uses this very inode.
    fn may_be(&self, id: FileId, anchor: &Anchor) -> bool {
        match &self.kind {
            Kind::File(f) => f
                .state
                .try_read()
                .is_none_or(|st| st.id != Some(id) || st.anchor.as_ref().is_none_or(|a| a.same(anchor))),
            _ => self.is(id, anchor),
        }
    }

    fn learn_name(&self, st: &Stat, dir: &Arc<Dir>, name: &OsStr) {
        match &self.kind {
            Kind::File(f) => f.learn_name(dir, name, st.st_nlink == 1),
            Kind::Dir(d) => {
                let mut place = d.place.lock();
                if !place.as_ref().is_some_and(|p| p.is(dir, name)) {
                    *place = Some(Place { dir: dir.clone(), name: name.to_owned() });
                }
            }
            Kind::Other(_) => {}
        }
    }

    /// All that the kernel may keep of it under the name that is known.
    fn stale(&self) -> StaleCache {
        let place = match &self.kind {
            Kind::File(f) => f.any_name(),
            Kind::Dir(d) => d.place.lock().clone(),
            Kind::Other(_) => None,
        };
        StaleCache { node: self.id, name: place.map(|p| (p.dir.tag, p.name)) }
    }

    /// The regular file, if it is one.
    pub fn file(&self) -> Result<&Arc<File>, Errno> {
        match &self.kind {
            Kind::File(f) => Ok(f),
            Kind::Dir(_) => Err(Errno::ISDIR),
            Kind::Other(_) => Err(Errno::INVAL),
        }
    }
}

impl Observer for Table {
    fn staged(&self, file: &Arc<File>, id: FileId) {
        self.maps.write().by_inode.insert(id, file.tag);
    }

    fn published(&self, file: &Arc<File>, old: Option<FileId>, new: FileId) {
        let mut maps = self.maps.write();
        if let Some(old) = old {
            maps.drop_inode(old, file.tag);
        }
        maps.by_inode.insert(new, file.tag);
    }

    fn discarded(&self, file: &Arc<File>, id: FileId) {
        let mut maps = self.maps.write();
        maps.drop_inode(id, file.tag);
        self.reap_later(&maps, file.tag);
    }

    fn settled(&self, tag: u64) {
        self.reap_later(&self.maps.read(), tag);
    }

    fn behind(&self, what: Behind) {
        self.tell(Stale::Cache(StaleCache { node: what.tag, name: what.name }));
    }
}
