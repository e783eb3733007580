//! What may be there after a crash, for few steps: every set of them that is closed under what they depend on.
//!
//! A step depends on the earlier ones that concern the same file or directory. Writes in place are the exception: until
//! they are complete they are ordered with the content of their file alone, and each byte may be of any version.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::ace::{DIRS, FILES, Name, dir_of};
use crate::model::{Kind, Meta, Node, Tree, Violation, fits};

type Content = Arc<[u8]>;

/// A step, in the order in which a program made them.
#[derive(Debug, Clone)]
pub enum Act {
    /// A version is published under a name, whole.
    Commit {
        inode: usize,
        content: Content,
        at: Name,
    },
    /// A name appears, with nothing in it yet.
    Create {
        inode: usize,
        at: Name,
    },
    /// Writes in place begin: from here on the file may also be one of these, or a mix.
    Change {
        inode: usize,
        versions: Vec<Content>,
    },
    /// They are done.
    Complete {
        inode: usize,
        content: Content,
    },
    Rename {
        inode: usize,
        from: Name,
        to: Name,
        over: Option<usize>,
    },
    Link {
        inode: usize,
        to: Name,
    },
    Unlink {
        inode: usize,
        at: Name,
    },
    /// The subdirectory of a directory comes or goes.
    Sub {
        dir: usize,
        there: bool,
    },
}

impl Act {
    fn inodes(&self) -> Vec<usize> {
        match self {
            Self::Rename { inode, over, .. } => std::iter::once(*inode).chain(*over).collect(),
            Self::Sub { .. } => vec![],
            Self::Commit { inode, .. }
            | Self::Create { inode, .. }
            | Self::Change { inode, .. }
            | Self::Complete { inode, .. }
            | Self::Link { inode, .. }
            | Self::Unlink { inode, .. } => vec![*inode],
        }
    }

    fn dirs(&self) -> Vec<usize> {
        match self {
            Self::Commit { at, .. } | Self::Create { at, .. } | Self::Unlink { at, .. } => vec![dir_of(*at)],
            Self::Link { to, .. } => vec![dir_of(*to)],
            Self::Rename { from, to, .. } => vec![dir_of(*from), dir_of(*to)],
            Self::Sub { dir, .. } => vec![*dir],
            Self::Change { .. } | Self::Complete { .. } => vec![],
        }
    }

    fn is_in_place(&self) -> bool {
        matches!(self, Self::Change { .. } | Self::Complete { .. })
    }

    fn is_content(&self) -> bool {
        self.is_in_place() || matches!(self, Self::Commit { .. })
    }

    /// Whether this, which came later, cannot be there without `other`.
    fn needs(&self, other: &Self) -> bool {
        let share = |a: Vec<usize>, b: Vec<usize>| a.iter().any(|x| b.contains(x));
        let (file, dir) = (share(self.inodes(), other.inodes()), share(self.dirs(), other.dirs()));
        match (self, other) {
            // What was written in place before may be there in part when more is.
            (Self::Change { .. }, Self::Complete { .. }) => false,
            (Self::Change { .. }, _) => file && other.is_content(),
            (_, o) if o.is_in_place() => file && self.is_content(),
            _ => file || dir,
        }
    }
}

struct Step {
    act: Act,
    needs: u32,
    begun: usize,
    durable: Option<usize>,
}

/// The steps of one sequence.
pub struct Partial {
    names: [Option<usize>; FILES.len()],
    contents: Vec<Content>,
    steps: Vec<Step>,
}

/// Files as they are after some of the steps.
struct State {
    names: [Option<usize>; FILES.len()],
    subs: [bool; DIRS.len()],
    /// One version, or those of which it may be a mix.
    inodes: Vec<Vec<Content>>,
}

impl State {
    fn inode(&mut self, n: usize) -> &mut Vec<Content> {
        if self.inodes.len() <= n {
            self.inodes.resize(n + 1, vec![]);
        }
        &mut self.inodes[n]
    }

    fn apply(&mut self, act: &Act) {
        match act {
            Act::Commit { inode, content, at } => {
                *self.inode(*inode) = vec![content.clone()];
                self.names[*at] = Some(*inode);
            }
            Act::Create { inode, at } => {
                *self.inode(*inode) = vec![Content::default()];
                self.names[*at] = Some(*inode);
            }
            Act::Change { inode, versions } => self.inode(*inode).extend(versions.iter().cloned()),
            Act::Complete { inode, content } => *self.inode(*inode) = vec![content.clone()],
            Act::Rename { inode, from, to, .. } => {
                self.names[*from] = None;
                self.names[*to] = Some(*inode);
            }
            Act::Link { inode, to } => self.names[*to] = Some(*inode),
            Act::Unlink { at, .. } => self.names[*at] = None,
            Act::Sub { dir, there } => self.subs[*dir] = *there,
        }
    }

    fn tree(&self) -> Tree {
        let mut tree: Tree = DIRS.iter().map(|d| ((*d).to_owned(), Node::Dir)).collect();
        for (dir, _) in DIRS.iter().zip(self.subs).filter(|(_, there)| *there) {
            tree.insert(format!("{dir}/sub"), Node::Dir);
        }
        for (name, inode) in FILES.iter().zip(self.names) {
            let node = inode.map(|i| match &self.inodes[i][..] {
                [one] => Node::File { content: one.clone(), meta: Meta::plain() },
                all => Node::Mixed { versions: all.to_vec(), meta: Meta::plain() },
            });
            node.map(|node| tree.insert((*name).to_owned(), node));
        }
        tree
    }
}

impl Partial {
    /// With the files that are there before.
    pub fn new(names: [Option<usize>; FILES.len()], contents: Vec<Content>) -> Self {
        Self { names, contents, steps: vec![] }
    }

    /// A step is about to be made. Answers its number.
    pub fn begin(&mut self, act: Act, mark: usize) -> usize {
        let bits = self.steps.iter().enumerate().filter(|(_, s)| act.needs(&s.act)).map(|(i, s)| s.needs | 1 << i);
        let needs = bits.fold(0, |all, b| all | b);
        self.steps.push(Step { act, needs, begun: mark, durable: None });
        self.steps.len() - 1
    }

    /// The program was told that this step is on stable storage.
    pub fn durable(&mut self, step: usize, mark: usize) {
        self.steps[step].durable.get_or_insert(mark);
    }

    fn durable_where(&mut self, mark: usize, which: impl Fn(&Act) -> bool) {
        for step in self.steps.iter_mut().filter(|s| which(&s.act)) {
            step.durable.get_or_insert(mark);
        }
    }

    /// Everything about a file is.
    pub fn inode_durable(&mut self, inode: usize, mark: usize) {
        self.durable_where(mark, |act| act.inodes().contains(&inode));
    }

    /// All names of a directory are.
    pub fn dir_durable(&mut self, dir: usize, mark: usize) {
        self.durable_where(mark, |act| act.dirs().contains(&dir));
    }

    /// Everything is.
    pub fn all_durable(&mut self, mark: usize) {
        self.durable_where(mark, |_| true);
    }

    /// Whether `seen` is what a crash at `at` may leave.
    pub fn check(&self, at: usize, seen: &Tree) -> Result<(), Violation> {
        let bits = |which: &dyn Fn(&Step) -> bool| -> u32 {
            self.steps.iter().enumerate().filter(|(_, s)| which(s)).map(|(i, _)| 1 << i).sum()
        };
        let may = bits(&|s| s.begun < at);
        let told = bits(&|s| s.durable.is_some_and(|d| d < at));
        if self.feasible(told, may, seen) {
            return Ok(());
        }
        let kind = if !self.known(seen) {
            Kind::Torn
        } else if self.feasible(0, may, seen) {
            Kind::Lost
        } else {
            Kind::Order
        };
        Err(Violation::new(kind, self.explain(told, may, seen)))
    }

    fn feasible(&self, told: u32, may: u32, seen: &Tree) -> bool {
        (0..1_u32 << self.steps.len()).any(|set| {
            let closed = || {
                let inside = |i: usize| set >> i & 1 == 1;
                self.steps.iter().enumerate().all(|(i, s)| !inside(i) || set & s.needs == s.needs)
            };
            set & told == told && set & !may == 0 && closed() && self.looks_like(set, seen)
        })
    }

    fn looks_like(&self, set: u32, seen: &Tree) -> bool {
        let inodes = self.contents.iter().map(|c| vec![c.clone()]).collect();
        let mut state = State { names: self.names, subs: [false; 2], inodes };
        let there = self.steps.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1);
        there.for_each(|(_, s)| state.apply(&s.act));
        let want = state.tree();
        want.len() == seen.len() && want.iter().all(|(name, node)| fits(Some(node), seen.get(name)))
    }

    /// Whether each file has the content of some commit point, or may be a mix.
    fn known(&self, seen: &Tree) -> bool {
        let committed = self.steps.iter().filter_map(|s| match &s.act {
            Act::Commit { content, .. } | Act::Complete { content, .. } => Some(content),
            _ => None,
        });
        let all: Vec<&Content> = self.contents.iter().chain(committed).collect();
        let mixes = self.steps.iter().any(|s| s.act.is_in_place());
        seen.values().all(|node| match node {
            Node::File { content, .. } => mixes || all.contains(&content),
            _ => true,
        })
    }

    fn explain(&self, told: u32, may: u32, seen: &Tree) -> String {
        let mut text = String::new();
        for (i, s) in self.steps.iter().enumerate() {
            let word = match (told >> i & 1, may >> i & 1) {
                (1, _) => "acknowledged",
                (_, 1) => "begun",
                _ => "to come",
            };
            let _ = writeln!(text, "  {i}: {word}: {}; needs {:b}", brief(&s.act), s.needs);
        }
        for (name, node) in seen {
            let _ = writeln!(text, "  there: {name} {}", runs_of(node));
        }
        text
    }
}

fn brief(act: &Act) -> String {
    match act {
        Act::Commit { inode, content, at } => format!("#{inode} is {} as {}", runs(content), FILES[*at]),
        Act::Complete { inode, content } => format!("#{inode} is {} in place", runs(content)),
        Act::Change { inode, versions } => {
            let all: Vec<String> = versions.iter().map(|v| runs(v)).collect();
            format!("#{inode} begins to be one of {all:?}")
        }
        act => format!("{act:?}"),
    }
}

fn runs_of(node: &Node) -> String {
    match node {
        Node::File { content, .. } => runs(content),
        _ => "a directory".into(),
    }
}

/// A content in few words: runs of equal bytes.
fn runs(content: &[u8]) -> String {
    let runs = content.chunk_by(|a, b| a == b).take(8).map(|run| format!("{}x{}", run.len(), run[0]));
    format!("[{}]", runs.collect::<Vec<_>>().join(" "))
}

#[test]
fn a_set_of_steps_is_closed_and_holds_what_was_told() {
    let content = |n: u8| -> Content { [n; 3].into() };
    let mut order = Partial::new([Some(0), None, Some(1), None], vec![content(1), content(2)]);
    let save = order.begin(Act::Commit { inode: 0, content: content(3), at: 0 }, 0);
    order.begin(Act::Rename { inode: 0, from: 0, to: 1, over: None }, 1);
    order.begin(Act::Sub { dir: 1, there: true }, 2);
    order.durable(save, 3);
    let tree = |foo: Option<u8>, bar: Option<u8>, sub: bool| -> Tree {
        let file = |n: u8| Node::File { content: content(n), meta: Meta::plain() };
        let files = [("A/foo", foo), ("A/bar", bar), ("B/foo", Some(2))];
        let files = files.into_iter().filter_map(|(name, n)| Some((name.to_owned(), file(n?))));
        let dirs = [("A", true), ("B", true), ("B/sub", sub)].into_iter().filter(|d| d.1);
        files.chain(dirs.map(|d| (d.0.to_owned(), Node::Dir))).collect()
    };
    let kind = |at, tree: Tree| order.check(at, &tree).map_err(|v| v.kind);
    assert_eq!(kind(2, tree(Some(1), None, false)), Ok(()));
    assert_eq!(kind(2, tree(None, Some(3), false)), Ok(()));
    assert_eq!(kind(3, tree(Some(1), None, true)), Ok(()), "another directory");
    assert_eq!(kind(2, tree(None, Some(1), false)), Err(Kind::Order), "the rename without the save before it");
    assert_eq!(kind(9, tree(Some(1), None, false)), Err(Kind::Lost));
    assert_eq!(kind(9, tree(Some(3), None, true)), Ok(()));
    assert_eq!(kind(9, tree(Some(9), None, true)), Err(Kind::Torn));
    assert_eq!(kind(1, tree(None, Some(3), false)), Err(Kind::Order), "before it began");
}

#[test]
fn writes_in_place_are_a_mix_until_they_are_told() {
    let content = |n: &[u8]| -> Content { n.into() };
    let mut order = Partial::new([Some(0), None, None, None], vec![content(&[1, 1])]);
    order.begin(Act::Change { inode: 0, versions: vec![content(&[2, 2])] }, 0);
    let done = order.begin(Act::Complete { inode: 0, content: content(&[2, 2]) }, 0);
    order.begin(Act::Unlink { inode: 0, at: 0 }, 1);
    order.durable(done, 2);
    let tree = |foo: Option<&[u8]>| -> Tree {
        let file = |c: &[u8]| Node::File { content: content(c), meta: Meta::plain() };
        let dirs = DIRS.iter().map(|d| ((*d).to_owned(), Node::Dir));
        dirs.chain(foo.map(|c| ("A/foo".to_owned(), file(c)))).collect()
    };
    assert!(order.check(1, &tree(Some(&[1, 2]))).is_ok());
    assert!(order.check(1, &tree(None)).is_err());
    assert!(order.check(2, &tree(None)).is_ok(), "a name goes whether the content is complete or not");
    assert!(order.check(9, &tree(Some(&[1, 2]))).is_err());
    assert!(order.check(9, &tree(Some(&[2, 2]))).is_ok());
}
