//! Names: lookup, forget, creation, removal, rename, link.

use std::ffi::{OsStr, OsString};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::{self as rfs, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::inode::Table;
use super::{Attr, Caller, Entry, Fs, Kind, Node, Opened, Reply};
use crate::config::policy::{Durability, Policy, WriteMode};
use crate::engine::dir::{Dir, Place};
use crate::engine::dispatch::{Done, Work};
use crate::engine::file::File;
use crate::engine::io::Access;
use crate::engine::names::{Name, RenameAccess};

impl Fs {
    /// Finds a name; counts a lookup of the node.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Entry, Errno> {
        let dir = self.dir(parent)?;
        let before = self.watch.events();
        let mut entry = match self.find(&dir, name) {
            Ok(node) => self.entry(&dir, &node)?,
            Err(Errno::NOENT) => self.absent(&dir)?,
            Err(e) => return Err(e),
        };
        if self.watch.events() != before {
            // Told of a change while this looked: what was found may be from before it.
            entry.ttl = entry.ttl.min(self.ttl);
        }
        Ok(entry)
    }

    /// The kernel drops `n` lookups of a node.
    pub fn forget(&self, node: u64, n: u64) {
        if let Some(node) = self.table.get(node)
            && Table::uncount(&node, n)
        {
            self.reap(node.id);
        }
    }

    /// The node of a name, counted.
    pub(super) fn find(&self, dir: &Arc<Dir>, name: &OsStr) -> Result<Arc<Node>, Errno> {
        if Self::forbidden(dir, name) {
            return Err(Errno::NOENT);
        }
        self.watch_dir(dir);
        loop {
            let seen = dir.published.load(std::sync::atomic::Ordering::Acquire);
            if let Some(file) = dir.staged(name) {
                let version = file.state.read().version.as_ref().map(|v| v.id);
                let Some(id) = version else { continue };
                match self.table.enter_file(&file, id) {
                    Some(node) => return Ok(node),
                    // Published and forgotten since.
                    None => continue,
                }
            }
            let fd = self.engine.dir_fd(dir)?;
            let found = self.backing().lookup(&fd, name).and_then(|(fd, st)| {
                let id = crate::backend::FileId::of(&st);
                if id == self.private {
                    // Under another spelling (a case-folding directory) or by a bind mount.
                    return Err(Errno::NOENT);
                }
                let anchor = self.backing().anchor(fd, id)?;
                Ok(self.table.enter(anchor, &st, dir, name))
            });
            // A version was published since: what was found may be the inode that it replaced.
            if dir.published.load(std::sync::atomic::Ordering::Acquire) == seen {
                return found;
            }
            if let Ok(node) = found
                && Table::uncount(&node, 1)
            {
                self.reap(node.id);
            }
        }
    }

    /// The answer about a node that was counted for it; takes the count back on an error.
    pub(super) fn entry(&self, dir: &Dir, node: &Arc<Node>) -> Result<Entry, Errno> {
        match self.attr_of(node) {
            Ok(attr) => Ok(Entry { node: node.id, attr, ttl: self.name_ttl(dir) }),
            Err(e) => {
                if Table::uncount(node, 1) {
                    self.reap(node.id);
                }
                Err(e)
            }
        }
    }

    /// The regular file of a name, for operations that take the name away. Not counted. What else has the name is
    /// held, so that those who have it open can go on.
    fn file_at(&self, dir: &Arc<Dir>, name: &OsStr) -> Result<Option<Arc<File>>, Errno> {
        if let Some(f) = dir.staged(name) {
            return Ok(Some(f));
        }
        let st = match self.backing().stat_at(self.engine.dir_fd(dir)?, name) {
            Ok(st) => st,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e),
        };
        let Some(node) = self.table.find(crate::backend::FileId::of(&st)) else { return Ok(None) };
        Ok(match &node.kind {
            Kind::File(f) => Some(f.clone()),
            Kind::Other(o) => {
                o.hold(self.backing());
                None
            }
            Kind::Dir(_) => None,
        })
    }

    /// Runs `work` when the saves that were acknowledged in these directories are in their place: they come first. At once
    /// when there are none.
    pub(super) fn after_saves(&self, dirs: &[&Arc<Dir>], work: impl FnOnce() + Send + 'static) {
        let first = self.engine.acknowledged_in(dirs);
        if first.is_empty() {
            return work();
        }
        self.engine.settle_names(first, Box::new(work));
    }

    /// Answers an operation on names: at level `always` when the directories are durable, else at once.
    fn acknowledge<T: Send + 'static>(&self, policy: Policy, dirs: Vec<Arc<Dir>>, reply: Reply<T>, value: T) {
        if policy.durability != Durability::Always {
            return reply.send(Ok(value));
        }
        let (engine, mut dirs) = (self.engine.clone(), dirs);
        let Some(dir) = dirs.pop() else { return reply.send(Ok(value)) };
        let next = dirs.pop();
        let last = engine.clone();
        engine.send(
            Work::SyncDir(dir),
            Done::new(move |r| match (r, next) {
                (Err(e), _) => reply.send(Err(e.errno())),
                (Ok(()), None) => reply.send(Ok(value)),
                (Ok(()), Some(dir)) => {
                    last.send(
                        Work::SyncDir(dir),
                        Done::new(move |r| reply.send(r.map(|()| value).map_err(|e| e.errno()))),
                    );
                }
            }),
        );
    }

    fn new_name(&self, parent: u64, name: &OsStr) -> Result<Arc<Dir>, Errno> {
        let dir = self.dir(parent)?;
        self.engine.writable()?;
        if Self::forbidden(&dir, name) {
            return Err(Errno::PERM);
        }
        if dir.staged(name).is_some() { Err(Errno::EXIST) } else { Ok(dir) }
    }

    /// Makes something that is no regular file's content: `make` gets the directory descriptor, with the caller's
    /// identity in force.
    fn make(
        self: &Arc<Self>,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        reply: Reply<Entry>,
        make: impl FnOnce(&std::os::fd::OwnedFd, &OsStr) -> Result<(), Errno> + Send + 'static,
    ) {
        let dir = match self.new_name(parent, name) {
            Ok(d) => d,
            Err(e) => return reply.send(Err(e)),
        };
        let (me, name, at) = (self.clone(), name.to_owned(), dir.clone());
        let work = move || {
            let made = (|| {
                let fd = me.engine.dir_fd(&at)?;
                {
                    let _as = crate::sys::creds::As::caller(&caller, mode);
                    make(&fd, &name)?;
                }
                me.engine.names_changed(&at);
                me.entry(&at, &me.find(&at, &name)?)
            })();
            match made {
                Ok(e) => me.acknowledge(me.policy(&at, &name), vec![at], reply, e),
                Err(e) => reply.send(Err(e)),
            }
        };
        self.after_saves(&[&dir], work);
    }

    /// mkdir(2).
    pub fn mkdir(self: &Arc<Self>, caller: Caller, parent: u64, name: &OsStr, mode: u32, reply: Reply<Entry>) {
        self.make(caller, parent, name, mode, reply, move |fd, name| {
            rfs::mkdirat(fd, name, Mode::from_raw_mode(mode & 0o7777))
        });
    }

    /// mknod(2). A regular file made this way is empty on purpose and exists at once.
    pub fn mknod(
        self: &Arc<Self>,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        rdev: u64,
        reply: Reply<Entry>,
    ) {
        self.make(caller, parent, name, mode, reply, move |fd, name| {
            let kind = FileType::from_raw_mode(mode);
            rfs::mknodat(fd, name, kind, Mode::from_raw_mode(mode & 0o7777), rdev)
        });
    }

    /// symlink(2).
    pub fn symlink(self: &Arc<Self>, caller: Caller, parent: u64, name: &OsStr, target: &OsStr, reply: Reply<Entry>) {
        let target: OsString = target.to_owned();
        self.make(caller, parent, name, 0, reply, move |fd, name| rfs::symlinkat(&target, fd, name));
    }

    /// open(2) with `O_CREAT` of a name that the kernel believes to be free.
    pub fn create(
        self: &Arc<Self>,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        flags: i32,
        reply: Reply<(Entry, Opened)>,
    ) {
        let (me, name) = (self.clone(), name.to_owned());
        self.engine.after_backlog(move || match me.try_create(caller, parent, &name, mode, flags) {
            Ok(Some(made)) => reply.send(Ok(made)),
            Ok(None) if flags & libc::O_EXCL != 0 => reply.send(Err(Errno::EXIST)),
            // Made behind the mount since the kernel looked: it looks again (LOOKUP_REVAL), and checks permissions.
            Ok(None) => reply.send(Err(Errno::STALE)),
            Err(e) => reply.send(Err(e)),
        });
    }

    /// `None` when the name exists.
    fn try_create(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> Result<Option<(Entry, Opened)>, Errno> {
        let dir = match self.new_name(parent, name) {
            Err(Errno::EXIST) => return Ok(None),
            r => r?,
        };
        let dir_fd = self.engine.dir_fd(&dir)?;
        match self.backing().stat_at(&dir_fd, name) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Ok(None),
            Err(e) => return Err(e),
        }
        self.backing().admit()?;
        let policy = self.policy(&dir, name);
        let (node, handle) = if policy.mode == WriteMode::InPlace || dir.id.dev != self.backing().dev() {
            let how = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = {
                let _as = crate::sys::creds::As::caller(&caller, mode);
                rfs::openat(&dir_fd, name, how, Mode::from_raw_mode(mode & 0o7777))
            };
            match made {
                Err(Errno::EXIST) => return Ok(None),
                r => drop(r?),
            }
            self.engine.names_changed(&dir);
            let node = self.find(&dir, name)?;
            let register = |fd: BorrowedFd<'_>| self.register(fd);
            let opened = self.engine.open_served(node.file()?, flags & !libc::O_TRUNC, policy, false, Some(&register));
            match opened {
                Access::Done(h) => (node, h?),
                Access::Wait => return Err(Errno::IO),
            }
        } else {
            let made = self.engine.create(&dir, name, mode, &caller, flags, policy, |id| self.table.new_id(id));
            let handle = match made {
                Err(Errno::EXIST) => return Ok(None),
                r => r?,
            };
            let id = handle.file.state.read().open_version()?.id;
            (self.table.enter_file(&handle.file, id).ok_or(Errno::STALE)?, handle)
        };
        let entry = self.entry(&dir, &node)?;
        let opened = self.opened(&node, handle);
        Ok(Some((entry, opened)))
    }

    /// unlink(2).
    pub fn unlink(self: &Arc<Self>, parent: u64, name: &OsStr, reply: Reply<()>) {
        let dir = match self.dir(parent) {
            Ok(d) if !Self::forbidden(&d, name) => d,
            Ok(_) => return reply.send(Err(Errno::NOENT)),
            Err(e) => return reply.send(Err(e)),
        };
        let (me, name, at) = (self.clone(), name.to_owned(), dir.clone());
        self.after_saves(&[&dir], move || me.unlink_now(at, name, reply));
    }

    fn unlink_now(self: &Arc<Self>, dir: Arc<Dir>, name: OsString, reply: Reply<()>) {
        let file = match self.file_at(&dir, &name) {
            Ok(f) => f,
            Err(e) => return reply.send(Err(e)),
        };
        let policy = self.policy(&dir, &name);
        if policy.durability == Durability::Always && file.is_none() {
            // Nothing staged is concerned: removal and sync share a batch with others.
            if let Err(e) = self.engine.writable() {
                return reply.send(Err(e));
            }
            let work = Work::Unlink { place: Place { dir, name }, rmdir: false };
            return self.engine.send(work, Done::new(move |r| reply.send(r.map_err(|e| e.errno()))));
        }
        match self.engine.unlink(&Name { dir: &dir, name: &name, file: file.clone() }) {
            Access::Done(Ok(())) => self.acknowledge(policy, vec![dir], reply, ()),
            Access::Done(Err(e)) => reply.send(Err(e)),
            Access::Wait => {
                let me = self.clone();
                if let Some(f) = file {
                    self.engine.park(&f, Box::new(move || me.unlink_now(dir, name, reply)));
                }
            }
        }
    }

    /// rmdir(2).
    pub fn rmdir(self: &Arc<Self>, parent: u64, name: &OsStr, reply: Reply<()>) {
        let dir = match self.dir(parent) {
            Ok(d) if !Self::forbidden(&d, name) => d,
            Ok(_) => return reply.send(Err(Errno::NOENT)),
            Err(e) => return reply.send(Err(e)),
        };
        let (me, name, at) = (self.clone(), name.to_owned(), dir.clone());
        let work = move || {
            let done = (|| {
                let st = me.backing().stat_at(me.engine.dir_fd(&at)?, &name)?;
                let victim = me.table.find(crate::backend::FileId::of(&st));
                let victim = victim.and_then(|n| if let Kind::Dir(d) = &n.kind { Some(d.clone()) } else { None });
                me.engine.rmdir(&at, &name, victim.as_ref())
            })();
            match done {
                Ok(()) => me.acknowledge(me.policy(&at, &name), vec![at], reply, ()),
                Err(e) => reply.send(Err(e)),
            }
        };
        self.after_saves(&[&dir], work);
    }

    /// renameat2(2).
    pub fn rename(
        self: &Arc<Self>,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
        reply: Reply<()>,
    ) {
        let dirs = self.dir(parent).and_then(|a| Ok((a, self.dir(new_parent)?)));
        let (from, to) = match dirs {
            Ok((a, _)) if Self::forbidden(&a, name) => return reply.send(Err(Errno::NOENT)),
            Ok((_, b)) if Self::forbidden(&b, new_name) => return reply.send(Err(Errno::PERM)),
            Ok(d) => d,
            Err(e) => return reply.send(Err(e)),
        };
        let (me, a, b) = (self.clone(), from.clone(), to.clone());
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        let work = move || me.rename_now(a, name, b, new_name, flags, reply);
        self.after_saves(&[&from, &to], work);
    }

    fn rename_now(
        self: &Arc<Self>,
        from: Arc<Dir>,
        name: OsString,
        to: Arc<Dir>,
        new_name: OsString,
        flags: u32,
        reply: Reply<()>,
    ) {
        let files = self.file_at(&from, &name).and_then(|a| Ok((a, self.file_at(&to, &new_name)?)));
        let (a, b) = match files {
            Ok(f) => f,
            Err(e) => return reply.send(Err(e)),
        };
        let moved_dir = if a.is_none() { self.known_dir(&from, &name) } else { None };
        let other_dir = if b.is_none() { self.known_dir(&to, &new_name) } else { None };
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let mut over = None;
        if let Some(d) = other_dir.as_ref().filter(|_| !exchange) {
            if !d.staged.lock().is_empty() {
                // Not empty, though the backing directory may be.
                let replace = flags & libc::RENAME_NOREPLACE == 0;
                return reply.send(Err(if replace { Errno::NOTEMPTY } else { Errno::EXIST }));
            }
            over = self.engine.dir_fd(d).ok().map(|fd| (d.clone(), fd));
        }
        let src = Name { dir: &from, name: &name, file: a };
        let dst = Name { dir: &to, name: &new_name, file: b };
        match self.engine.rename(&src, &dst, flags) {
            RenameAccess::Done(Ok(())) => {
                if let Some((d, fd)) = over {
                    d.hold(fd);
                }
                if let Some(d) = moved_dir {
                    *d.place.lock() = Some(Place { dir: to.clone(), name: new_name.clone() });
                }
                if let Some(d) = other_dir.filter(|_| exchange) {
                    *d.place.lock() = Some(Place { dir: from.clone(), name });
                }
                let policy = self.policy(&to, &new_name);
                let dirs = if Arc::ptr_eq(&from, &to) { vec![to] } else { vec![from, to] };
                self.acknowledge(policy, dirs, reply, ());
            }
            RenameAccess::Done(Err(e)) => reply.send(Err(e)),
            wait => self.rename_later(wait, reply, move |me, reply| {
                me.rename_now(from, name, to, new_name, flags, reply);
            }),
        }
    }

    fn known_dir(&self, dir: &Arc<Dir>, name: &OsStr) -> Option<Arc<Dir>> {
        let st = self.backing().stat_at(self.engine.dir_fd(dir).ok()?, name).ok()?;
        let node = self.table.find(crate::backend::FileId::of(&st))?;
        if let Kind::Dir(d) = &node.kind { Some(d.clone()) } else { None }
    }

    /// Runs `again` when what a rename or link needs first has happened; a commit that fails is its error.
    fn rename_later<T: Send + 'static>(
        self: &Arc<Self>,
        wait: RenameAccess,
        reply: Reply<T>,
        again: impl FnOnce(&Arc<Self>, Reply<T>) + Send + 'static,
    ) {
        let me = self.clone();
        match wait {
            RenameAccess::Done(_) => {}
            RenameAccess::Wait(f) => self.engine.park(&f, Box::new(move || again(&me, reply))),
            RenameAccess::Commit(f) => self.engine.commit(
                &f,
                Done::new(move |r| match r {
                    Ok(()) => {
                        let engine = me.engine.clone();
                        engine.run_later(Box::new(move || again(&me, reply)));
                    }
                    Err(e) => reply.send(Err(e.errno())),
                }),
            ),
        }
    }

    /// link(2).
    pub fn link(self: &Arc<Self>, node: u64, parent: u64, name: &OsStr, reply: Reply<Entry>) {
        let found = self.new_name(parent, name).and_then(|d| Ok((d, self.node(node)?)));
        let (dir, node) = match found {
            Ok(f) => f,
            Err(e) => return reply.send(Err(e)),
        };
        let (me, name, at) = (self.clone(), name.to_owned(), dir.clone());
        self.after_saves(&[&dir], move || me.link_now(node, at, name, reply));
    }

    fn link_now(self: &Arc<Self>, node: Arc<Node>, dir: Arc<Dir>, name: OsString, reply: Reply<Entry>) {
        let linked = match &node.kind {
            Kind::File(f) => self.engine.link(f, &dir, &name),
            Kind::Dir(_) => RenameAccess::Done(Err(Errno::PERM)),
            Kind::Other(o) => RenameAccess::Done((|| {
                let fd = o.open(self.backing())?;
                let to = self.engine.dir_fd(&dir)?;
                self.backing().link(std::os::fd::AsFd::as_fd(&fd), &to, &name)?;
                self.engine.names_changed(&dir);
                Ok(())
            })()),
        };
        match linked {
            RenameAccess::Done(Ok(())) => {
                let entry = if self.table.count(&node) { self.entry(&dir, &node) } else { Err(Errno::STALE) };
                match entry {
                    Ok(e) => self.acknowledge(self.policy(&dir, &name), vec![dir], reply, e),
                    Err(e) => reply.send(Err(e)),
                }
            }
            RenameAccess::Done(Err(e)) => reply.send(Err(e)),
            wait => self.rename_later(wait, reply, move |me, reply| me.link_now(node, dir, name, reply)),
        }
    }

    /// Attributes of a node.
    pub(super) fn attr_of(&self, node: &Node) -> Result<Attr, Errno> {
        let stat = match &node.kind {
            Kind::File(f) => self.engine.stat(f)?,
            Kind::Dir(d) => {
                let mut st = d.stat(&*self.engine.dir_fd(d)?)?;
                if d.tag == super::ROOT && st.st_nlink > 2 {
                    // `.fsys` is not there; where a link is counted for each subdirectory, it is not one of them.
                    st.st_nlink -= 1;
                }
                st
            }
            Kind::Other(o) => rfs::fstat(o.open(self.backing())?)?,
        };
        let mut stat = stat;
        if stat.st_dev != self.backing().dev() {
            self.restrict(node, &mut stat)?;
        }
        Ok(Attr { ino: node.id, stat, ttl: self.attr_ttl(node, &stat) })
    }
}
