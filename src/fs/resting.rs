//! Nodes of files that nobody uses at the moment, packed: the kernel may know millions, and few of them are in use.

use std::ffi::OsStr;
use std::hash::{Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};

use hashbrown::Equivalent;
use serde::{Deserialize, Serialize};

use super::StaleCache;
use super::inode::{Kind, Node};
use crate::backend::FileId;
use crate::engine::dir::{Dir, Place};
use crate::engine::file::{Ctime, File, Resting};
use crate::sys::handle::FileHandle;

/// A node without locks and counters. What it says of its own policy is read again when it is used.
#[derive(Debug)]
pub(super) struct Packed {
    dir: Arc<Dir>,
    /// [`Parts`] in as few bytes as they take.
    parts: Box<[u8]>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Parts<'a> {
    tag: u64,
    /// Number of the inode, more than `tag`.
    ino: i64,
    lookups: u64,
    pages: i64,
    unsynced: Option<u64>,
    /// The real one, and nanoseconds from it to the one to show.
    ctime: Option<(i64, i64, i64)>,
    handle: (i32, &'a [u8]),
    name: &'a [u8],
}

const SECOND: i128 = 1_000_000_000;

fn shift(c: Ctime) -> Option<(i64, i64, i64)> {
    let ns = |(sec, nsec): (i64, i64)| i128::from(sec) * SECOND + i128::from(nsec);
    Some((c.real.0, c.real.1, (ns(c.shown) - ns(c.real)).try_into().ok()?))
}

fn unshift((sec, nsec, shift): (i64, i64, i64)) -> Ctime {
    let shown = i128::from(sec) * SECOND + i128::from(nsec) + i128::from(shift);
    Ctime { real: (sec, nsec), shown: (shown.div_euclid(SECOND) as i64, shown.rem_euclid(SECOND) as i64) }
}

/// They are found by number.
impl Equivalent<Packed> for u64 {
    fn equivalent(&self, p: &Packed) -> bool {
        *self == p.tag()
    }
}

impl PartialEq for Packed {
    fn eq(&self, other: &Self) -> bool {
        self.tag() == other.tag()
    }
}

impl Eq for Packed {}

impl Hash for Packed {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.tag().hash(state);
    }
}

impl Packed {
    /// The node of a file on the device `dev` that nobody uses; `None` when there is more to it. Who asks has the only
    /// reference to the node.
    pub fn of(node: &mut Node, dev: u64) -> Option<Self> {
        let lookups = *node.lookups.get_mut();
        let Kind::File(file) = &mut node.kind else { return None };
        // One that the kernel does not know goes when its last commit is done.
        let r = Arc::get_mut(file).filter(|_| lookups > 0)?.resting().filter(|r| r.id.dev == dev)?;
        let ctime = match r.ctime {
            // Centuries from the one to show it stays awake.
            Some(c) => Some(shift(c)?),
            None => None,
        };
        let parts = Parts {
            tag: node.id,
            ino: r.id.ino.wrapping_sub(node.id) as i64,
            lookups,
            pages: *node.pages.get_mut(),
            unsynced: r.unsynced,
            ctime,
            handle: r.handle.parts(),
            name: r.place.name.as_bytes(),
        };
        // A name has 255 bytes and a handle 128 at the most.
        let mut room = [0; 512];
        let parts: &[u8] = postcard::to_slice(&parts, &mut room).ok()?;
        Some(Self { parts: parts.into(), dir: r.place.dir })
    }

    fn parts(&self) -> Option<Parts<'_>> {
        postcard::from_bytes(&self.parts).ok()
    }

    /// Its number.
    pub fn tag(&self) -> u64 {
        postcard::take_from_bytes(&self.parts).map_or(0, |(tag, _)| tag)
    }

    /// Whether that is the number of its inode.
    pub fn is_usual(&self) -> bool {
        self.parts().is_some_and(|p| p.ino == 0)
    }

    /// All that the kernel may keep of it.
    pub fn stale(&self) -> StaleCache {
        let name = self.parts().map(|p| (self.dir.tag, OsStr::from_bytes(p.name).to_owned()));
        StaleCache { node: self.tag(), name }
    }

    /// The node again, on the device `dev`.
    pub fn unpack(&self, dev: u64) -> Option<Node> {
        let p = self.parts()?;
        let id = FileId { dev, ino: p.tag.wrapping_add_signed(p.ino) };
        let file = Resting {
            id,
            handle: FileHandle::from_parts(p.handle.0, p.handle.1),
            place: Place { name: OsStr::from_bytes(p.name).to_owned(), dir: self.dir.clone() },
            unsynced: p.unsynced,
            ctime: p.ctime.map(unshift),
        };
        let node = Node::new(p.tag, Kind::File(Arc::new(File::rested(p.tag, file))), id);
        Some(Node { lookups: AtomicU64::new(p.lookups), pages: AtomicI64::new(p.pages), ..node })
    }
}

#[cfg(test)]
mod tests {
    use super::super::ROOT;
    use super::super::inode::{AWAKE, Table};
    use super::*;
    use crate::backend::Anchor;
    use crate::engine::file::Version;
    use rustix::fs::Stat;

    const DEV: u64 = 7;

    fn anchor(ino: u64, generation: u8) -> Anchor {
        Anchor::Handle(FileHandle::from_parts(1, &[ino.to_le_bytes().as_slice(), &[generation]].concat()))
    }

    struct World {
        table: Table,
        dir: Arc<Dir>,
        st: Stat,
    }

    impl World {
        fn new() -> Self {
            let root = FileId { dev: DEV, ino: 2 };
            let table =
                Table::new(Dir::new(ROOT, root, anchor(2, 0), None), root, DEV, crossbeam_channel::unbounded().0);
            let node = table.get(ROOT).unwrap();
            let Kind::Dir(dir) = &node.kind else { panic!("the root is a directory") };
            let mut st = rustix::fs::fstat(tempfile::tempfile().unwrap()).unwrap();
            (st.st_dev, st.st_nlink) = (DEV, 1);
            Self { table, dir: dir.clone(), st }
        }

        /// A lookup that finds this inode under `f<ino>`.
        fn lookup(&self, ino: u64, generation: u8) -> Arc<Node> {
            let mut st = self.st;
            st.st_ino = ino;
            self.table.enter(anchor(ino, generation), &st, &self.dir, format!("f{ino}").as_ref())
        }

        fn many(&self) -> std::ops::Range<u64> {
            let inos = 1000..1000 + 3 * AWAKE as u64;
            inos.clone().for_each(|ino| drop(self.lookup(ino, 0)));
            inos
        }
    }

    #[test]
    fn what_is_packed_comes_out_again() {
        let w = World::new();
        let ctime = Some(Ctime { real: (1 << 33, 999_999_999), shown: (-5, 0) });
        let kinds: [(usize, usize, Option<u64>, Option<Ctime>); 3] =
            [(1, 8, None, None), (255, 128, Some(u64::MAX), ctime), (20, 12, Some(7), None)];
        for (name, handle, unsynced, ctime) in kinds {
            let resting = Resting {
                id: FileId { dev: DEV, ino: 1 << 40 },
                handle: FileHandle::from_parts(-1, &vec![255; handle]),
                place: Place { dir: w.dir.clone(), name: OsStr::from_bytes(&vec![0xfe; name]).to_owned() },
                unsynced,
                ctime,
            };
            let wanted = format!("{:?}", (resting.id, &resting.handle, &resting.place.name, unsynced, ctime));
            let file = Kind::File(Arc::new(File::rested(9, resting.clone())));
            let mut node = Node::new(9, file, resting.id);
            *node.lookups.get_mut() = u64::MAX;
            *node.pages.get_mut() = i64::MIN;
            let packed = Packed::of(&mut node, DEV).unwrap();
            assert_eq!(packed.stale(), StaleCache { node: 9, name: Some((ROOT, resting.place.name.clone())) });
            let mut again = packed.unpack(DEV).unwrap();
            assert_eq!((*again.lookups.get_mut(), *again.pages.get_mut(), again.id), (u64::MAX, i64::MIN, 9));
            let Kind::File(file) = &mut again.kind else { panic!("a file") };
            let r = Arc::get_mut(file).unwrap().resting().unwrap();
            assert_eq!(format!("{:?}", (r.id, &r.handle, &r.place.name, r.unsynced, r.ctime)), wanted);
            assert!(Packed::of(&mut again, DEV + 1).is_none(), "its device is not kept");
        }
    }

    #[test]
    fn files_that_nobody_uses_rest_and_are_the_same_afterwards() {
        let w = World::new();
        let held = w.lookup(10, 0);
        w.lookup(11, 0).file().unwrap().state.write().opens = 1;
        let open = Arc::as_ptr(w.table.get(11).unwrap().file().unwrap());
        let inos = w.many();
        assert!(w.table.awake() <= AWAKE + 2, "{} are awake", w.table.awake());
        assert_eq!(w.table.len(), inos.clone().count() + 3);
        assert!(Arc::ptr_eq(&w.table.get(10).unwrap(), &held), "somebody has it");
        assert_eq!(Arc::as_ptr(w.table.get(11).unwrap().file().unwrap()), open, "it is open");
        for ino in inos.clone() {
            let id = FileId { dev: DEV, ino };
            assert_eq!(w.table.number(id), Some(ino), "found without waking it");
            assert_eq!(w.lookup(ino, 0).id, ino);
            let node = w.table.find(id).unwrap();
            assert_eq!(node.file().unwrap().any_name().unwrap().name, format!("f{ino}").as_str());
            assert!(!Table::uncount(&node, 1) && Table::uncount(&node, 1), "two lookups");
            assert!(w.table.remove_if_forgotten(&node));
            assert!(w.table.get(ino).is_none() && w.table.number(id).is_none());
        }
        assert_eq!(w.table.len(), 3);
    }

    #[test]
    fn a_number_used_again_is_another_node_while_the_first_rests() {
        let w = World::new();
        w.many();
        let id = FileId { dev: DEV, ino: 1000 };
        let second = w.lookup(1000, 1);
        assert_ne!(second.id, 1000);
        let first = w.table.get(1000).unwrap();
        assert_eq!(first.file().unwrap().any_name().unwrap().name, "f1000");
        assert_eq!(w.table.find(id).unwrap().id, second.id);
    }

    /// A file that is made and removed again and again, under the number of the one before.
    #[test]
    fn numbers_that_are_used_again_leave_nothing_behind() {
        let w = World::new();
        w.many();
        let (held, before) = (w.lookup(5, 0), w.table.queued());
        for n in 0..10_000 {
            let node = w.lookup(6, n as u8);
            assert!(
                Table::uncount(&node, 1) && w.table.remove_if_forgotten(&node) && !w.table.remove_if_forgotten(&node)
            );
        }
        assert!(w.table.queued() <= before + 4, "{} after {before}", w.table.queued());
        drop(held);
    }

    #[test]
    fn what_more_is_known_of_keeps_a_file_awake() {
        type Change = fn(&mut crate::engine::file::State);
        let changes: [Change; 10] = [
            |st| st.opens = 1,
            |st| st.version = Some(Arc::new(Version::new(tempfile::tempfile().unwrap().into(), st.id.unwrap(), false))),
            |st| st.kernel = std::num::NonZeroI32::new(1),
            |st| *st.waiting.get_mut() = Some(Box::default()),
            |st| st.names.push(st.names[0].clone()),
            |st| st.owe(),
            |st| st.lost = Some(rustix::io::Errno::IO),
            |st| st.names.clear(),
            |st| st.pin = Some(tempfile::tempfile().unwrap().into()),
            |st| st.phase = crate::engine::state::Phase::Staged,
        ];
        let w = World::new();
        for (n, change) in changes.iter().enumerate() {
            let place = Place { dir: w.dir.clone(), name: "f".into() };
            let (id, handle) = (FileId { dev: DEV, ino: 5 }, FileHandle::from_parts(1, &[5]));
            let mut file = File::rested(5, Resting { id, handle, place, unsynced: None, ctime: None });
            assert!(file.resting().is_some());
            change(file.state.get_mut());
            assert!(file.resting().is_none(), "{n}");
        }
    }
}
