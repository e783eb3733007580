//! The publish sequence by our own system calls, on the bare filesystem: is the protocol itself sound?
//!
//! One run is some batches of saves over a few files in a few directories. Every variant that leaves a step out is a
//! negative control: the same checker must find it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use fastrand::Rng;
use rustix::fs::{AtFlags, CWD, FallocateFlags};

use crate::disk::Disk;
use crate::model::{History, Joint, Lane, Node, Tree};
use crate::rig::Rig;
use crate::stage::{Stage, random_file, set_meta};
use crate::workload::Workload;

/// How the data of a batch is made to be there before its names are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataStep {
    /// `sync_file_range` of every stage, with waiting: out of the page cache, not yet through the device's.
    Range,
    /// `fsync` of every stage.
    Fsync,
    /// One `syncfs`.
    Syncfs,
    Nothing,
}

/// How the names of a batch are made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameStep {
    /// `fsync` of every distinct parent directory, at the same time.
    FsyncDirs,
    /// One `syncfs`.
    Syncfs,
    Nothing,
}

/// The sequence under test.
#[derive(Debug, Clone, Copy)]
pub struct Protocol {
    pub data: DataStep,
    pub names: NameStep,
    /// The program gets its answer before the names are durable.
    pub answer_early: bool,
    /// No stage at all: `O_TRUNC`, write, close, as most programs do.
    pub naive: bool,
    /// A stage under a name in the parent directory, as careful programs do, instead of an unnamed one.
    pub named_stage: bool,
}

impl Protocol {
    pub const fn new(data: DataStep, names: NameStep) -> Self {
        Self { data, names, answer_early: false, naive: false, named_stage: false }
    }
}

/// What the batches look like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub batch_max: usize,
    pub dirs: usize,
    pub files: usize,
    pub batches: usize,
    pub size_max: usize,
    /// Operations take effect in order only within a directory, not over all of them.
    pub order_per_dir: bool,
    /// Renames and unlinks between the saves of a batch.
    pub names_change: bool,
    /// A stranger writes and syncs a file of his own all the time, so that journal commits happen at any moment.
    pub stranger: bool,
    /// Stages are filled in all [`crate::stage::Style`]s.
    pub styles: bool,
    /// The filesystem is almost full.
    pub tight: bool,
}

impl Shape {
    pub const DEFAULT: Self = Self {
        batch_max: 8,
        dirs: 3,
        files: 6,
        batches: 5,
        size_max: 200 << 10,
        order_per_dir: false,
        names_change: false,
        stranger: false,
        styles: false,
        tight: false,
    };
}

/// See the module.
pub struct Raw {
    protocol: Protocol,
    shape: Shape,
    names: Vec<String>,
    initial: Tree,
}

const NOISE: &str = "stranger";

impl Raw {
    pub fn new(protocol: Protocol, shape: Shape) -> Self {
        let names = (0..shape.files).map(|i| format!("d{}/f{i}", i % shape.dirs)).collect();
        Self { protocol, shape, names, initial: Tree::new() }
    }
}

enum Op {
    Save { name: String, node: Node, stage: Option<Stage> },
    Unlink { name: String },
    Rename { from: String, to: String },
}

impl Workload for Raw {
    fn prepare(&mut self, _rig: &Rig, root: &Path, rng: &mut Rng) {
        fs::create_dir_all(root.join(".fsys/staging")).unwrap();
        fs::create_dir(root.join(NOISE)).unwrap();
        for i in 0..self.shape.dirs {
            fs::create_dir(root.join(format!("d{i}"))).unwrap();
            self.initial.insert(format!("d{i}"), Node::Dir);
        }
        if self.shape.tight {
            fill_up(&root.join(NOISE).join("filler"), 8 << 20);
        }
        // Half of the files exist already, so that a run creates and replaces.
        for name in &self.names {
            if rng.bool() {
                let node = random_file(self.shape.size_max, self.shape.styles, rng);
                write_file(&root.join(name), &node);
                self.initial.insert(name.clone(), node);
            }
        }
    }

    fn run(&mut self, _rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let mut history = History { lanes: self.lanes(), ignore: vec![NOISE.into()], ..History::default() };
        let stop = AtomicBool::new(false);
        let noise_rng = rng.fork();
        std::thread::scope(|scope| {
            if self.shape.stranger {
                scope.spawn(|| be_a_stranger(&root.join(NOISE), &stop, noise_rng));
            }
            for n in 0..self.shape.batches {
                self.batch(n, root, disk, &mut history, rng);
            }
            stop.store(true, Ordering::Relaxed);
        });
        history
    }
}

impl Raw {
    fn lanes(&self) -> Vec<Lane> {
        if !self.shape.order_per_dir {
            return vec![Lane::new("all", vec![], self.initial.clone())];
        }
        let part = |dir: &str| -> Tree {
            let below = format!("{dir}/");
            self.initial
                .iter()
                .filter(|(k, _)| *k == dir || k.starts_with(&below))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        (0..self.shape.dirs).map(|i| format!("d{i}")).map(|d| Lane::new(&d, vec![d.clone()], part(&d))).collect()
    }

    fn lane(&self, name: &str) -> usize {
        if self.shape.order_per_dir { name[1..name.find('/').unwrap()].parse().unwrap() } else { 0 }
    }

    fn batch(&self, n: usize, root: &Path, disk: &Disk, history: &mut History, rng: &mut Rng) {
        let size = rng.usize(1..=self.shape.batch_max);
        let mut ops: Vec<Op> = (0..size).map(|_| self.choose_op(root, rng)).collect();
        self.data_step(root, &ops);
        let mut steps = Vec::new();
        let mut parents = Vec::new();
        for (i, op) in ops.iter_mut().enumerate() {
            let done = self.publish(root, disk, history, op, &format!("{n}.{i}"));
            if !done.is_empty() {
                parents.extend(op.parents());
            }
            steps.extend(done);
        }
        let lanes = &mut history.lanes;
        if self.protocol.answer_early {
            acknowledge(disk, lanes, &steps);
        }
        match self.protocol.names {
            NameStep::FsyncDirs => fsync_dirs(root, &parents),
            NameStep::Syncfs => syncfs(root),
            NameStep::Nothing => {}
        }
        if !self.protocol.answer_early {
            acknowledge(disk, lanes, &steps);
        }
    }

    fn choose_op(&self, root: &Path, rng: &mut Rng) -> Op {
        let name = self.names[rng.usize(..self.names.len())].clone();
        let other = self.names[rng.usize(..self.names.len())].clone();
        let pick = if self.shape.names_change { rng.u8(..10) } else { 9 };
        if pick == 0 {
            return Op::Unlink { name };
        }
        if pick <= 2 && name != other {
            return Op::Rename { from: name, to: other };
        }
        let node = random_file(self.shape.size_max, self.shape.styles, rng);
        let stage = (!self.protocol.naive).then(|| self.stage(root, &name, &node, rng));
        Op::Save { name, node, stage }
    }

    fn stage(&self, root: &Path, name: &str, node: &Node, rng: &mut Rng) -> Stage {
        let path = root.join(name);
        let parent = path.parent().unwrap();
        let stage = if self.protocol.named_stage { Stage::named(parent, rng) } else { Stage::unnamed(parent) };
        stage.fill(node, self.shape.styles, &path, rng);
        stage
    }

    fn data_step(&self, root: &Path, ops: &[Op]) {
        let stages = ops.iter().filter_map(|op| match op {
            Op::Save { stage: Some(stage), .. } => Some(stage),
            _ => None,
        });
        match self.protocol.data {
            DataStep::Range => stages.for_each(Stage::sync_range),
            DataStep::Fsync => stages.for_each(|s| rustix::fs::fsync(&s.fd).unwrap()),
            DataStep::Syncfs => syncfs(root),
            DataStep::Nothing => {}
        }
    }

    /// Lets one operation take effect. Answers its lanes and numbers, or nothing if it did not apply.
    fn publish(&self, root: &Path, disk: &Disk, history: &mut History, op: &mut Op, id: &str) -> Vec<(usize, usize)> {
        let lanes = &mut history.lanes;
        match op {
            Op::Save { name, node, stage } => {
                let lane = self.lane(name);
                let exists = lanes[lane].now().contains_key(name);
                let label = format!("batch {id}: save {name}, {}", if exists { "replaced" } else { "created" });
                let step = lanes[lane].begin(disk, label, |t| drop(t.insert(name.clone(), node.clone())));
                let path = root.join(&*name);
                match stage.take() {
                    None => write_file(&path, node),
                    Some(Stage { path: Some(temp), .. }) => fs::rename(temp, path).unwrap(),
                    Some(Stage { fd, path: None }) => {
                        let target = if exists { root.join(format!(".fsys/staging/{id}")) } else { path.clone() };
                        let source = format!("/proc/self/fd/{}", fd.as_raw_fd());
                        rustix::fs::linkat(CWD, &source, CWD, &target, AtFlags::SYMLINK_FOLLOW).unwrap();
                        if exists {
                            fs::rename(target, path).unwrap();
                        }
                    }
                }
                vec![(lane, step)]
            }
            Op::Unlink { name } => {
                let lane = &mut lanes[self.lane(name)];
                if !lane.now().contains_key(name) {
                    return vec![];
                }
                let step = lane.begin(disk, format!("batch {id}: unlink {name}"), |t| drop(t.remove(&*name)));
                fs::remove_file(root.join(&*name)).unwrap();
                vec![(self.lane(name), step)]
            }
            Op::Rename { from, to } => {
                let (source, target) = (self.lane(from), self.lane(to));
                let Some(node) = lanes[source].now().get(from).cloned() else { return vec![] };
                let label = format!("batch {id}: rename {from} to {to}");
                let mut steps = vec![];
                if source == target {
                    let step = lanes[source].begin(disk, label, |t| {
                        t.remove(&*from);
                        t.insert(to.clone(), node);
                    });
                    steps.push((source, step));
                } else {
                    let joint: Joint = [
                        (source, lanes[source].begin(disk, label.clone(), |t| drop(t.remove(&*from)))),
                        (target, lanes[target].begin(disk, label, |t| drop(t.insert(to.clone(), node)))),
                    ];
                    steps.extend(joint);
                    history.joints.push(joint);
                }
                fs::rename(root.join(&*from), root.join(&*to)).unwrap();
                steps
            }
        }
    }
}

impl Op {
    fn parents(&self) -> Vec<String> {
        let parent = |name: &String| name[..name.find('/').unwrap()].to_string();
        match self {
            Self::Save { name, .. } | Self::Unlink { name } => vec![parent(name)],
            Self::Rename { from, to } => vec![parent(from), parent(to)],
        }
    }
}

fn acknowledge(disk: &Disk, lanes: &mut [Lane], steps: &[(usize, usize)]) {
    for (lane, step) in steps {
        lanes[*lane].durable(disk, *step);
    }
}

fn fsync_dirs(root: &Path, dirs: &[String]) {
    let distinct: BTreeSet<&String> = dirs.iter().collect();
    std::thread::scope(|scope| {
        for dir in distinct {
            scope.spawn(move || File::open(root.join(dir)).unwrap().sync_all().unwrap());
        }
    });
}

fn syncfs(root: &Path) {
    rustix::fs::syncfs(File::open(root).unwrap()).unwrap();
}

/// Until told to stop: writes and syncs a file of its own, and stages others that come to nothing.
fn be_a_stranger(dir: &Path, stop: &AtomicBool, mut rng: Rng) {
    let file = File::create(dir.join("own")).unwrap();
    while !stop.load(Ordering::Relaxed) {
        file.write_all_at(&vec![rng.u8(1..); rng.usize(1..20_000)], rng.u64(..100_000)).unwrap();
        file.sync_all().unwrap();
        let stage = Stage::unnamed(dir);
        stage.fill(&random_file(100_000, false, &mut rng), false, dir, &mut rng);
        stage.sync_range();
    }
}

/// As most programs do it: truncate, write, close.
fn write_file(path: &Path, node: &Node) {
    let Node::File { content, meta } = node else { unreachable!() };
    let mut file = File::create(path).unwrap();
    for piece in content.chunks(content.len() / 3 + 1) {
        file.write_all(piece).unwrap();
    }
    set_meta(file.as_fd(), meta);
}

/// Leaves little space, so that freed blocks are used again at once.
fn fill_up(path: &Path, leave: u64) {
    let file = File::create(path).unwrap();
    let stat = rustix::fs::fstatvfs(&file).unwrap();
    let len = (stat.f_bavail * stat.f_frsize).saturating_sub(leave);
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len.max(4096)).unwrap();
}
