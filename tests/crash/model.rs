//! What a directory may contain after a crash: the promise, as data.
//!
//! A [`History`] is what the workload did. Its lanes are sequences whose operations must take effect in order; between
//! lanes there is no order. After a crash the files of a lane must be as they were after one of its operations: not
//! before the last one that was acknowledged as durable, not after the last one that had begun.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::disk::Disk;

/// The extended attribute that workloads set and the checker reads.
pub const XATTR: &str = "user.tag";

/// What is at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Dir,
    File {
        content: Arc<[u8]>,
        meta: Meta,
    },
    /// Only in a model: a file that is being written in place, so that each byte is that of some version, or zero.
    Mixed {
        versions: Vec<Arc<[u8]>>,
        meta: Meta,
    },
}

impl Node {
    /// Whether `seen` on the disk is what this says.
    fn fits(&self, seen: &Self) -> bool {
        match (self, seen) {
            (Self::Mixed { versions, meta }, Self::File { content, meta: m }) => {
                let allowed = |(i, b): (usize, &u8)| *b == 0 || versions.iter().any(|v| v.get(i) == Some(b));
                let (min, max) = (versions.iter().map(|v| v.len()).min(), versions.iter().map(|v| v.len()).max());
                let fits = |len: usize| min.is_some_and(|n| n <= len) && max.is_some_and(|n| len <= n);
                meta == m && fits(content.len()) && content.iter().enumerate().all(allowed)
            }
            _ => self == seen,
        }
    }
}

/// Whether `seen` at a name is what is wanted there.
pub fn fits(want: Option<&Node>, seen: Option<&Node>) -> bool {
    match (want, seen) {
        (Some(want), Some(seen)) => want.fits(seen),
        (want, seen) => want.is_none() && seen.is_none(),
    }
}

/// The metadata that must survive with the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub tag: Option<Vec<u8>>,
}

impl Meta {
    pub fn plain() -> Self {
        Self { mode: 0o644, uid: 0, gid: 0, tag: None }
    }
}

/// Names, relative to the root, and what is there.
pub type Tree = BTreeMap<String, Node>;

/// One operation of a lane.
struct Step {
    label: String,
    after: Tree,
    begun: usize,
    answered: Option<usize>,
    durable: Option<usize>,
}

/// Operations that take effect in order, and the files that they are about.
pub struct Lane {
    name: String,
    /// Names that belong to this lane: these and what is below them. Empty: all.
    scope: Vec<String>,
    initial: Tree,
    steps: Vec<Step>,
}

impl Lane {
    pub fn new(name: &str, scope: Vec<String>, initial: Tree) -> Self {
        Self { name: name.into(), scope, initial, steps: Vec::new() }
    }

    /// The tree after all operations so far.
    pub fn now(&self) -> &Tree {
        self.steps.last().map_or(&self.initial, |s| &s.after)
    }

    /// An operation is about to start. Answers its number.
    pub fn begin(&mut self, disk: &Disk, label: String, effect: impl FnOnce(&mut Tree)) -> usize {
        let mut after = self.now().clone();
        effect(&mut after);
        self.steps.push(Step { label, after, begun: disk.mark(), answered: None, durable: None });
        self.steps.len() - 1
    }

    /// The program was told that this operation is on stable storage.
    pub fn durable(&mut self, disk: &Disk, step: usize) {
        let mark = disk.mark();
        self.steps[step].durable.get_or_insert(mark);
    }

    /// The program was told that this operation is done.
    pub fn answered(&mut self, disk: &Disk, step: usize) {
        let mark = disk.mark();
        self.steps[step].answered.get_or_insert(mark);
    }

    /// The program was told so about everything until now.
    pub fn all_durable(&mut self, disk: &Disk) {
        if let Some(last) = self.steps.len().checked_sub(1) {
            self.durable(disk, last);
        }
    }

    fn owns(&self, name: &str) -> bool {
        let below = |s: &String| name == s || name.strip_prefix(s.as_str()).is_some_and(|r| r.starts_with('/'));
        self.scope.is_empty() || self.scope.iter().any(below)
    }

    fn tree(&self, n: usize) -> &Tree {
        n.checked_sub(1).map_or(&self.initial, |i| &self.steps[i].after)
    }

    /// Whether `n` operations of this lane can be there when of `other`, in the same directory, there are only `m`: what
    /// was answered before the last of these began has to be there too.
    fn goes_with(&self, n: usize, other: &Self, m: usize) -> bool {
        let missing = other.steps.get(m).and_then(|s| s.answered);
        let last = n.checked_sub(1).map(|i| self.steps[i].begun);
        missing.zip(last).is_none_or(|(answered, begun)| answered > begun)
    }

    /// How many operations must be there, and how many may be, after a crash at `at`.
    fn bounds(&self, at: usize) -> (usize, usize) {
        let lo = self.steps.iter().rposition(|s| s.durable.is_some_and(|d| d < at)).map_or(0, |i| i + 1);
        let hi = self.steps.iter().rposition(|s| s.begun < at).map_or(0, |i| i + 1);
        (lo, hi)
    }

    /// After how many operations the lane may be, so that it looks like `seen` after a crash at `at`.
    fn feasible(&self, at: usize, seen: &Tree) -> Result<Vec<usize>, Violation> {
        let mine: Tree = seen.iter().filter(|(name, _)| self.owns(name)).map(|(k, v)| (k.clone(), v.clone())).collect();
        let (lo, hi) = self.bounds(at);
        let same = |want: &Tree| want.len() == mine.len() && want.iter().all(|(k, v)| fits(Some(v), mine.get(k)));
        let fitting: Vec<usize> = (lo..=hi).filter(|n| same(self.tree(*n))).collect();
        if fitting.is_empty() { Err(self.explain(lo, hi, &mine)) } else { Ok(fitting) }
    }

    fn explain(&self, lo: usize, hi: usize, seen: &Tree) -> Violation {
        let mut kind = Kind::Order;
        let mut text = format!("lane {}: operations {lo}..={hi} allowed, seen is none of these states.\n", self.name);
        let names: std::collections::BTreeSet<&String> =
            (lo..=hi).flat_map(|n| self.tree(n).keys()).chain(seen.keys()).collect();
        for name in names {
            let is = seen.get(name);
            let verdict = if (lo..=hi).any(|n| fits(self.tree(n).get(name), is)) {
                None
            } else if (0..lo).any(|n| fits(self.tree(n).get(name), is)) {
                Some(Kind::Lost)
            } else if let Some(Node::File { content, .. }) = is {
                let known = (0..=self.steps.len())
                    .any(|n| matches!(self.tree(n).get(name), Some(Node::File { content: c, .. }) if c == content));
                Some(if known { Kind::Metadata } else { Kind::Torn })
            } else {
                Some(Kind::Lost)
            };
            if let Some(found) = verdict {
                kind = kind.max(found);
            }
            let wanted = self.tree(lo).get(name);
            if !fits(wanted, is) {
                let word = verdict.map_or("allowed".into(), |v| format!("{v:?}"));
                let _ = writeln!(text, "  {name}: {word}; seen {}; acknowledged {}", show(is), show(wanted));
            }
        }
        for (i, s) in self.steps.iter().enumerate().take(hi).skip(lo.saturating_sub(1)) {
            let _ = writeln!(text, "  operation {}: {} (durable: {:?})", i + 1, s.label, s.durable);
        }
        Violation { kind, text }
    }
}

fn show(node: Option<&Node>) -> String {
    match node {
        None => "nothing".into(),
        Some(Node::Dir) => "a directory".into(),
        Some(Node::Mixed { versions, .. }) => format!("a mix of {} versions", versions.len()),
        Some(Node::File { content, meta }) => {
            let zeros = content.split(|b| *b == 0).count() - 1;
            let hash = content
                .iter()
                .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
            let tag = meta.tag.as_ref().map_or(0, Vec::len);
            format!(
                "{} bytes ({zeros} zero) #{:04x} {:o} {}:{} tag {tag}",
                content.len(),
                hash & 0xffff,
                meta.mode,
                meta.uid,
                meta.gid
            )
        }
    }
}

/// What is wrong with a crash state, from bad to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Every file is at a commit point, but not in a combination that ever was.
    Order,
    /// Content of a commit point with the metadata of none.
    Metadata,
    /// A name that nobody made.
    Leftover,
    /// Something acknowledged is not there.
    Lost,
    /// Content that no program committed.
    Torn,
    /// Our recovery would not come up, or what it left cannot be read.
    Dead,
    /// The filesystem itself would not come up.
    Unmountable,
}

/// A broken promise.
#[derive(Debug)]
pub struct Violation {
    pub kind: Kind,
    pub text: String,
}

impl Violation {
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

/// One operation that is in two lanes, as (lane, step): it is there in both or in neither.
pub type Joint = [(usize, usize); 2];

/// All lanes of one run.
#[derive(Default)]
pub struct History {
    pub lanes: Vec<Lane>,
    pub joints: Vec<Joint>,
    /// The first of these operations is there only if the second is.
    pub needs: Vec<Joint>,
    /// Lanes of several programs in one directory: what one was told is there before what another begins then.
    pub shared: Vec<Vec<usize>>,
    /// Names that are there and belong to no lane.
    pub fixed: Vec<String>,
    /// Names (and what is below them) that the checker does not look at.
    pub ignore: Vec<String>,
}

impl History {
    /// Number of operations, and of those acknowledged as durable.
    pub fn counts(&self) -> (usize, usize) {
        let steps = || self.lanes.iter().flat_map(|l| &l.steps);
        (steps().count(), steps().filter(|s| s.durable.is_some()).count())
    }

    /// Compares what is under `root` with what a crash at `at` may leave.
    pub fn check(&self, root: &Path, at: usize) -> Result<(), Violation> {
        let seen = read_tree(root, &self.ignore).map_err(|e| Violation::new(Kind::Torn, format!("reading: {e}")))?;
        let feasible = self.lanes.iter().map(|l| l.feasible(at, &seen)).collect::<Result<Vec<_>, _>>()?;
        if !self.joinable(&feasible, &mut Vec::new()) {
            let mut text = String::from("operations are there without others that they depend on\n");
            for [(a, i), (b, j)] in self.joints.iter().chain(&self.needs) {
                let (a, b) = (&self.lanes[*a], &self.lanes[*b]);
                let _ = writeln!(text, "  {} {}; {} {}", a.name, i + 1, b.name, j + 1);
            }
            let _ = writeln!(text, "  operations there, by lane: {feasible:?}");
            return Err(Violation::new(Kind::Order, text));
        }
        let stray = |name: &&String| !self.fixed.contains(name) && !self.lanes.iter().any(|l| l.owns(name));
        match seen.keys().find(stray) {
            Some(name) => Err(Violation::new(Kind::Leftover, format!("{name}: nobody made this"))),
            None => Ok(()),
        }
    }

    /// Whether one number of operations for every lane can be chosen so that joint operations agree.
    fn joinable(&self, feasible: &[Vec<usize>], chosen: &mut Vec<usize>) -> bool {
        let agree = |[(a, i), (b, j)]: &Joint| match (chosen.get(*a), chosen.get(*b)) {
            (Some(n), Some(m)) => (n > i) == (m > j),
            _ => true,
        };
        let needed = |[(a, i), (b, j)]: &Joint| match (chosen.get(*a), chosen.get(*b)) {
            (Some(n), Some(m)) => n <= i || m > j,
            _ => true,
        };
        let in_order = |(a, b): (usize, usize)| match (chosen.get(a), chosen.get(b)) {
            (Some(n), Some(m)) => self.lanes[a].goes_with(*n, &self.lanes[b], *m),
            _ => true,
        };
        let pairs = |group: &Vec<usize>| -> Vec<(usize, usize)> {
            group.iter().flat_map(|a| group.iter().filter(move |b| *b != a).map(move |b| (*a, *b))).collect()
        };
        let good = self.joints.iter().all(agree) && self.needs.iter().all(needed);
        if !good || !self.shared.iter().flat_map(pairs).all(in_order) {
            return false;
        }
        let Some(candidates) = feasible.get(chosen.len()) else { return true };
        candidates.iter().any(|n| {
            chosen.push(*n);
            let found = self.joinable(feasible, chosen);
            chosen.pop();
            found
        })
    }
}

/// Reads everything under `root`, without `ignore` and what the filesystem itself keeps there.
pub fn read_tree(root: &Path, ignore: &[String]) -> io::Result<Tree> {
    let mut tree = Tree::new();
    let mut todo = vec![String::new()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(root.join(&dir))? {
            let entry = entry?;
            let base = entry.file_name().into_string().unwrap();
            let name = if dir.is_empty() { base } else { format!("{dir}/{base}") };
            if name == "lost+found" || name == ".fsys" || ignore.contains(&name) {
                continue;
            }
            let node = read_node(&entry.path()).map_err(|e| io::Error::other(format!("{name}: {e}")))?;
            if node == Node::Dir {
                todo.push(name.clone());
            }
            tree.insert(name, node);
        }
    }
    Ok(tree)
}

fn read_node(path: &Path) -> io::Result<Node> {
    let meta = fs::symlink_metadata(path)?;
    if meta.is_dir() {
        return Ok(Node::Dir);
    }
    let mut tag = [0; 4096];
    let tag = match rustix::fs::lgetxattr(path, XATTR, &mut tag) {
        Ok(n) => Some(tag[..n].to_vec()),
        Err(e) if e == rustix::io::Errno::NODATA => None,
        Err(e) => return Err(e.into()),
    };
    let mode = meta.permissions().mode() & 0o7777;
    let meta = Meta { mode, uid: meta.uid(), gid: meta.gid(), tag };
    Ok(Node::File { content: fs::read(path)?.into(), meta })
}

#[test]
fn a_lane_takes_a_prefix_and_nothing_else() {
    let disk = Disk::new(vec![0; 4096]);
    let file = |n: u8| Node::File { content: vec![n; 3].into(), meta: Meta::plain() };
    let tree = |a: Option<u8>, b: Option<u8>| -> Tree {
        a.map(|n| ("a".into(), file(n))).into_iter().chain(b.map(|n| ("b".into(), file(n)))).collect()
    };
    let mut lane = Lane::new("all", vec![], Tree::new());
    let one = lane.begin(&disk, "a=1".into(), |t| drop(t.insert("a".into(), file(1)))); // mark 0
    lane.durable(&disk, one); // mark 1
    lane.begin(&disk, "b=1".into(), |t| drop(t.insert("b".into(), file(1)))); // mark 2
    lane.begin(&disk, "a=2".into(), |t| drop(t.insert("a".into(), file(2)))); // mark 3
    let kind = |at, t: Tree| lane.feasible(at, &t).map(drop).map_err(|v| v.kind);
    assert_eq!(kind(0, tree(None, None)), Ok(()));
    assert_eq!(kind(2, tree(None, None)), Err(Kind::Lost));
    assert_eq!(kind(2, tree(Some(1), None)), Ok(()));
    assert_eq!(kind(4, tree(Some(1), Some(1))), Ok(()));
    assert_eq!(kind(4, tree(Some(2), None)), Err(Kind::Order));
    assert_eq!(kind(4, tree(Some(3), Some(1))), Err(Kind::Torn));
}

#[test]
fn an_operation_on_two_lanes_is_there_in_both_or_in_neither() {
    let history = History { joints: vec![[(0, 1), (1, 0)]], ..History::default() };
    let joinable = |a: &[usize], b: &[usize]| history.joinable(&[a.to_vec(), b.to_vec()], &mut Vec::new());
    assert!(joinable(&[1], &[0]) && joinable(&[2], &[1]) && joinable(&[1, 2], &[1]));
    assert!(!joinable(&[2], &[0]) && !joinable(&[0, 1], &[1]));
}

#[test]
fn one_program_sees_the_order_of_another_in_its_directory() {
    let disk = Disk::new(vec![0; 4096]);
    let mut lanes = vec![Lane::new("a", vec![], Tree::new()), Lane::new("b", vec![], Tree::new())];
    let step = |lane: &mut Lane| lane.begin(&disk, String::new(), |_| ());
    let first = step(&mut lanes[0]);
    lanes[0].answered(&disk, first);
    step(&mut lanes[1]);
    step(&mut lanes[0]);
    let history = History { lanes, shared: vec![vec![0, 1]], needs: vec![[(0, 1), (1, 0)]], ..History::default() };
    let can = |a: usize, b: usize| history.joinable(&[vec![a], vec![b]], &mut Vec::new());
    assert!(can(0, 0) && can(1, 0) && can(1, 1) && can(2, 1));
    assert!(!can(0, 1), "begun after the other was answered");
    assert!(!can(2, 0), "needs the other");
}

#[test]
fn a_file_written_in_place_may_be_a_mix() {
    let plain = |c: &[u8]| Node::File { content: c.into(), meta: Meta::plain() };
    let mixed = Node::Mixed { versions: vec![[1, 1, 1].into(), [2, 2, 2, 2].into()], meta: Meta::plain() };
    for ok in [&[1, 1, 1][..], &[1, 2, 1, 2], &[2, 0, 1]] {
        assert!(mixed.fits(&plain(ok)), "{ok:?}");
    }
    assert!(!mixed.fits(&plain(&[1, 1, 1, 1])) && !mixed.fits(&plain(&[2; 5])) && !mixed.fits(&plain(&[1; 2])));
}
