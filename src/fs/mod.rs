//! The operation core: one typed call per operation of the kernel's protocol, answered through a [`Reply`].
//!
//! Names no type of any transport. Plain operations on names and attributes go to `backend`; everything that
//! concerns content and staged versions goes to `engine`. A call that has to wait for a commit is parked there and
//! run again by a worker; no call blocks the thread that made it on a flush.

mod caching;
mod dir;
mod file;
mod inode;
mod ioctl;
mod meta;
mod names;
mod own;
mod reply;
mod resting;
mod status;
mod watch;
mod xattr;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::RwLock;
use rustix::fs::Stat;
use rustix::io::Errno;

pub use crate::sys::creds::Caller;
pub use caching::{IoMode, Opened, Passthrough};
pub use dir::DirEntry;
pub use inode::{Kind, Node};
pub use meta::{SetAttr, SetTime};
pub use reply::Reply;

use crate::backend::{Backing, FileId};
use crate::config::keys::BUILT_IN;
use crate::config::policy::Policy;
use crate::engine::dir::Dir;
use crate::engine::file::Handle;
use crate::engine::{Engine, layout};
use inode::{Stale, Table};

/// Number of the root.
pub const ROOT: u64 = 1;

/// Attributes for the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Attr {
    /// `st_ino` that programs see; does not change when the backing inode is replaced.
    pub ino: u64,
    /// The rest.
    pub stat: Stat,
    /// How long the kernel may keep them.
    pub ttl: Duration,
}

/// A name looked up.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Node number; 0, as in the protocol: there is nothing of that name, and the kernel may keep that.
    pub node: u64,
    /// Attributes; none that matter when there is nothing.
    pub attr: Attr,
    /// How long the kernel may keep the name.
    pub ttl: Duration,
}

/// Numbered descriptors.
#[derive(Debug)]
struct Handles<T> {
    map: RwLock<HashMap<u64, Arc<T>>>,
    next: AtomicU64,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { map: RwLock::default(), next: AtomicU64::new(1) }
    }
}

impl<T> Handles<T> {
    fn add(&self, h: T) -> u64 {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        self.map.write().insert(fh, Arc::new(h));
        fh
    }
    fn get(&self, fh: u64) -> Result<Arc<T>, Errno> {
        self.map.read().get(&fh).cloned().ok_or(Errno::BADF)
    }
    fn remove(&self, fh: u64) -> Option<Arc<T>> {
        self.map.write().remove(&fh)
    }
    fn len(&self) -> usize {
        self.map.read().len()
    }
}

/// The mounted file system.
pub struct Fs {
    engine: Arc<Engine>,
    table: Arc<Table>,
    /// `.fsys`.
    private: FileId,
    files: Handles<Handle>,
    dirs: Handles<dir::DirHandle>,
    /// How long the kernel may keep what nobody tells of, and what the watch tells of.
    ttl: Duration,
    watched_ttl: Duration,
    /// Fills the place of attributes that do not matter.
    blank: Stat,
    watch: watch::Watch,
    kernel: caching::Kernel,
    stale: Receiver<Stale>,
    stale_tx: Sender<Stale>,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("engine", &self.engine).finish_non_exhaustive()
    }
}

impl Fs {
    /// The file system over an engine.
    pub fn new(engine: Arc<Engine>) -> Result<Arc<Self>, Errno> {
        let backing = &engine.backing;
        let st = rustix::fs::fstat(backing.root())?;
        let id = FileId::of(&st);
        let private = FileId::of(&backing.stat_at(backing.root(), layout::NAME.as_ref())?);
        let root = Dir::new(ROOT, id, backing.anchor_of(backing.root(), id)?, None);
        let (stale_tx, stale) = unbounded();
        let table = Arc::new(Table::new(root, id, backing.dev(), stale_tx.clone()));
        engine.observe(table.clone());
        let config = engine.config();
        let ttl = Duration::from_millis(config.limits.cache_ms);
        // Who sets the time-out has set it.
        let watched_ttl = if config.source("cache_ms") == BUILT_IN { watch::TTL } else { ttl };
        let watch = watch::Watch::new(config.limits.watch_backing);
        Ok(Arc::new(Self {
            engine,
            table,
            private,
            files: Handles::default(),
            dirs: Handles::default(),
            ttl,
            watched_ttl,
            blank: st,
            watch,
            kernel: caching::Kernel::default(),
            stale,
            stale_tx,
        }))
    }

    /// How many files that nobody uses are kept ready, in hundreds of bytes each, and not packed; few in tests.
    pub fn keep_awake(&self, most: usize) {
        self.table.keep_awake(most);
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    fn backing(&self) -> &Backing {
        &self.engine.backing
    }

    fn node(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.table.get(id).ok_or(Errno::STALE)
    }

    fn dir(&self, id: u64) -> Result<Arc<Dir>, Errno> {
        match &self.node(id)?.kind {
            Kind::Dir(d) => Ok(d.clone()),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// The policy of a name.
    fn policy(&self, dir: &Arc<Dir>, name: &OsStr) -> Policy {
        let config = self.engine.config();
        if config.policies.is_uniform() {
            return config.policies.base;
        }
        let place = crate::engine::dir::Place { dir: dir.clone(), name: name.to_owned() };
        config.policies.resolve(&place.path())
    }

    /// The policy of a node, by the first name that is known.
    fn policy_of(&self, node: &Node) -> Policy {
        let config = self.engine.config();
        let own = self.own_policy(&config, node);
        if config.policies.is_uniform() && own.is_none() {
            return config.policies.base;
        }
        let place = match &node.kind {
            Kind::File(f) => f.any_name(),
            Kind::Dir(d) => d.place.lock().clone(),
            Kind::Other(_) => None,
        };
        let path = place.map(|p| p.path()).unwrap_or_default();
        config.policies.explain(&path, own.as_deref()).0
    }

    /// `.fsys` in the root exists for nobody.
    fn reserved(dir: &Dir, name: &OsStr) -> bool {
        dir.tag == ROOT && name == layout::NAME
    }

    /// No name that a program may use here: `.fsys`, or what is no single name. The kernel sends none of the latter, and no
    /// transport has to be trusted not to.
    fn forbidden(dir: &Dir, name: &OsStr) -> bool {
        let bytes = name.as_bytes();
        Self::reserved(dir, name) || matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/')
    }

    /// Serves the kernel's stale caches: calls `tell` for each until the file system is dropped or `tell` is false.
    /// Runs on a thread of its own, since a notification can wait for a call that the kernel has open.
    pub fn notify_stale(&self, tell: impl Fn(&StaleCache) -> bool) {
        for s in &self.stale {
            let more = match s {
                Stale::Cache(c) => tell(&c),
                Stale::All => self.table.numbers().into_iter().filter_map(|id| self.table.stale(id)).all(|c| tell(&c)),
                Stale::Reap(tag) => {
                    self.reap(tag);
                    true
                }
                Stale::Trim => {
                    crate::sys::release_memory();
                    true
                }
                Stale::Stop => false,
            };
            if !more {
                return;
            }
        }
    }

    /// Ends [`Fs::notify_stale`].
    pub fn stop_notifying(&self) {
        // The receiver lives as long as `self`.
        drop(self.stale_tx.send(Stale::Stop));
    }

    /// Drops a node that the kernel has forgotten, unless something of it is still to be committed.
    fn reap(&self, id: u64) {
        let Some(node) = self.table.get(id) else { return };
        let free = match &node.kind {
            Kind::File(f) => f.state.read().opens == 0 && Engine::is_settled(f),
            Kind::Dir(d) => d.staged.lock().is_empty() && d.lost.lock().is_none(),
            Kind::Other(_) => true,
        };
        if free && self.table.remove_if_forgotten(&node) {
            self.unwatch(&node);
        }
    }
}

/// What the kernel believes and is no more so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaleCache {
    /// Node whose content and attributes changed.
    pub node: u64,
    /// Name that is gone: directory node and name.
    pub name: Option<(u64, OsString)>,
}

/// A path from the root of the mount that has no `..`, no root and no prefix.
fn plain(path: &Path) -> bool {
    path.components().all(|c| matches!(c, std::path::Component::Normal(_)))
}
