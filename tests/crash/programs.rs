//! Programs that nobody changed, on the mount: what `fsys-mount` promises to them, looked at from below.
//!
//! Several programs at once, each with two directories of its own and one file that it writes in place. What must be
//! there after a crash follows from the contract's table of durability levels. The same programs on the bare
//! filesystem are a negative control.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd as _, IntoRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;

use crate::disk::Disk;
use crate::fsys::{Daemon, recover};
use crate::model::{History, Joint, Lane, Meta, Node, Tree, Violation};
use crate::rig::Rig;
use crate::stage::{random_file, set_meta};
use crate::workload::Workload;

/// When a program may rely on what it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Always,
    Close,
    Fsync,
    Relaxed,
}

impl Level {
    pub const ALL: [Self; 4] = [Self::Always, Self::Close, Self::Fsync, Self::Relaxed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Close => "close",
            Self::Fsync => "fsync",
            Self::Relaxed => "relaxed",
        }
    }

    fn close_waits(self) -> bool {
        matches!(self, Self::Always | Self::Close)
    }

    fn fsync_waits(self) -> bool {
        self != Self::Relaxed
    }

    fn names_wait(self) -> bool {
        self == Self::Always
    }
}

/// Where the programs work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// `fsys-mount` over the recorded filesystem.
    Mount,
    /// The recorded filesystem itself: the negative control.
    Raw,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Programs {
    pub through: Through,
    pub level: Level,
    pub count: usize,
    pub operations: usize,
    pub initial: Tree,
}

/// The directory of the files that are written in place.
const PLACE: &str = "place";
const NAMES: [&str; 3] = ["x", "y", "z"];

impl Programs {
    pub fn new(through: Through, level: Level) -> Self {
        Self { through, level, count: 3, operations: 12, initial: Tree::new() }
    }

    fn dirs(n: usize) -> [String; 2] {
        [format!("p{n}a"), format!("p{n}b")]
    }

    fn part(&self, name: &str) -> Tree {
        let below = format!("{name}/");
        let mine = |k: &&String| *k == name || k.starts_with(&below);
        self.initial.iter().filter(|(k, _)| mine(k)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

impl Workload for Programs {
    fn prepare(&mut self, root: &Path, rng: &mut Rng) {
        fs::create_dir(root.join(PLACE)).unwrap();
        for n in 0..self.count {
            for dir in Self::dirs(n) {
                fs::create_dir(root.join(&dir)).unwrap();
                self.initial.insert(dir.clone(), Node::Dir);
                for name in NAMES {
                    if rng.bool() {
                        self.make(root, format!("{dir}/{name}"), random_file(40_000, false, rng));
                    }
                }
            }
            let content: Arc<[u8]> = (0..rng.usize(1..30_000)).map(|_| rng.u8(1..)).collect();
            self.make(root, format!("{PLACE}/p{n}"), Node::File { content, meta: Meta::plain() });
        }
    }

    fn run(&mut self, rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let daemon = (self.through == Through::Mount)
            .then(|| Daemon::mount(root, &rig.dir("mnt"), &format!("durability={}", self.level.name())));
        let at: PathBuf = daemon.as_ref().map_or(root, Daemon::path).to_path_buf();
        let mut programs: Vec<Program> = (0..self.count)
            .map(|n| {
                let lane = |name: &String| Lane::new(name, vec![name.clone()], self.part(name));
                let place = format!("{PLACE}/p{n}");
                let Node::File { content, .. } = &self.initial[&place] else { unreachable!() };
                Program {
                    at: at.clone(),
                    disk: disk.clone(),
                    level: self.level,
                    dirs: Self::dirs(n),
                    lanes: [lane(&Self::dirs(n)[0]), lane(&Self::dirs(n)[1]), lane(&place)],
                    joints: vec![],
                    versions: vec![content.clone()],
                    place,
                    rng: rng.fork(),
                }
            })
            .collect();
        let operations = self.operations;
        std::thread::scope(|scope| {
            for program in &mut programs {
                scope.spawn(move || (0..operations).for_each(|_| program.step()));
            }
        });
        if let Some(daemon) = daemon {
            // A clean unmount is a commit point of everything.
            daemon.unmount();
            for program in &mut programs {
                program.lanes.iter_mut().for_each(|lane| lane.all_durable(disk));
            }
        }
        let mut history = History { fixed: vec![PLACE.into()], ..History::default() };
        for program in programs {
            let base = history.lanes.len();
            history.lanes.extend(program.lanes);
            history.joints.extend(program.joints.into_iter().map(|j| j.map(|(lane, step)| (lane + base, step))));
        }
        history
    }

    fn recover(&self, root: &Path) -> Result<(), Violation> {
        if self.through == Through::Mount { recover(root) } else { Ok(()) }
    }

    fn recovery_writes(&self) -> bool {
        self.through == Through::Mount
    }
}

impl Programs {
    fn make(&mut self, root: &Path, name: String, node: Node) {
        let Node::File { content, meta } = &node else { unreachable!() };
        let file = File::create(root.join(&name)).unwrap();
        file.write_all_at(content, 0).unwrap();
        set_meta(file.as_fd(), meta);
        self.initial.insert(name, node);
    }
}

/// One program at work.
struct Program {
    at: PathBuf,
    disk: Disk,
    level: Level,
    dirs: [String; 2],
    /// The two directories, and the file that is written in place.
    lanes: [Lane; 3],
    joints: Vec<Joint>,
    place: String,
    /// What the file in place may consist of: its content when it was last durable, and all since.
    versions: Vec<Arc<[u8]>>,
    rng: Rng,
}

const IN_PLACE: usize = 2;

impl Program {
    fn step(&mut self) {
        let d = self.rng.usize(..2);
        let name = format!("{}/{}", self.dirs[d], NAMES[self.rng.usize(..3)]);
        let exists = self.lanes[d].now().contains_key(&name);
        match self.rng.u8(..16) {
            0..=3 => self.save(d, &name),
            4 | 5 => self.save_and_fsync(d, &name),
            6 => self.save_with_a_dup(d, &name),
            7 | 8 => self.save_by_rename(d, &name),
            9 => self.empty(d, &name),
            10 if exists => self.unlink(d, &name),
            11 if exists => self.rename(d, &name),
            12 => self.directory(d),
            13 => self.fsync_dir(d),
            _ => self.write_in_place(),
        }
    }

    fn content(&mut self) -> Arc<[u8]> {
        let max = if self.rng.u8(..6) == 0 { 200_000 } else { 20_000 };
        let mut content = vec![0; self.rng.usize(2..max)];
        self.rng.fill(&mut content);
        content.into_iter().map(|b: u8| b.max(1)).collect()
    }

    /// A file of this content under that name: what replaces another one keeps its metadata.
    fn node(&self, d: usize, name: &str, content: &[u8]) -> Node {
        let meta = match self.lanes[d].now().get(name) {
            Some(Node::File { meta, .. }) => meta.clone(),
            _ => Meta::plain(),
        };
        Node::File { content: content.into(), meta }
    }

    fn begin_save(&mut self, d: usize, name: &str, content: &[u8], how: &str) -> usize {
        let node = self.node(d, name, content);
        let label = format!("{how} {name}, {} bytes", content.len());
        self.lanes[d].begin(&self.disk, label, |t| drop(t.insert(name.into(), node)))
    }

    fn durable_if(&mut self, waits: bool, d: usize, step: usize) {
        if waits {
            self.lanes[d].durable(&self.disk, step);
        }
    }

    fn create(&self, name: &str) -> File {
        File::create(self.at.join(name)).unwrap_or_else(|e| panic!("create {name}: {e}"))
    }

    /// Truncate, write, close.
    fn save(&mut self, d: usize, name: &str) {
        let content = self.content();
        let step = self.begin_save(d, name, &content, "save");
        let mut file = self.create(name);
        content.chunks(content.len() / 3 + 1).for_each(|piece| file.write_all(piece).unwrap());
        close(file);
        self.durable_if(self.level.close_waits(), d, step);
    }

    /// The same with an fsync in the middle or at the end: two commit points, or one.
    fn save_and_fsync(&mut self, d: usize, name: &str) {
        let content = self.content();
        let half = if self.rng.bool() { content.len() } else { content.len() / 2 };
        let step = self.begin_save(d, name, &content[..half], "save with fsync");
        let mut file = self.create(name);
        file.write_all(&content[..half]).unwrap();
        file.sync_all().unwrap();
        self.durable_if(self.level.fsync_waits(), d, step);
        if half < content.len() {
            let step = self.begin_save(d, name, &content, "go on after fsync with");
            file.write_all(&content[half..]).unwrap();
            close(file);
            self.durable_if(self.level.close_waits(), d, step);
        }
    }

    /// A copy of the descriptor is closed half way: what is there then is committed.
    fn save_with_a_dup(&mut self, d: usize, name: &str) {
        let content = self.content();
        let half = content.len() / 2;
        let step = self.begin_save(d, name, &content[..half], "save and close a dup");
        let mut file = self.create(name);
        file.write_all(&content[..half]).unwrap();
        close(file.try_clone().unwrap());
        self.durable_if(self.level.close_waits(), d, step);
        let step = self.begin_save(d, name, &content, "go on after a dup's close with");
        file.write_all(&content[half..]).unwrap();
        close(file);
        self.durable_if(self.level.close_waits(), d, step);
    }

    /// As editors do it, with or without the fsync.
    fn save_by_rename(&mut self, d: usize, name: &str) {
        let content = self.content();
        let temp = format!("{}/.tmp", self.dirs[d]);
        let step = self.begin_save(d, &temp, &content, "write");
        let mut file = self.create(&temp);
        file.write_all(&content).unwrap();
        if self.rng.bool() {
            file.sync_all().unwrap();
            self.durable_if(self.level.fsync_waits(), d, step);
        }
        close(file);
        self.durable_if(self.level.close_waits(), d, step);
        self.rename_within(d, &temp, name);
    }

    fn empty(&mut self, d: usize, name: &str) {
        let step = self.begin_save(d, name, &[], "empty");
        close(self.create(name));
        self.durable_if(self.level.close_waits(), d, step);
    }

    fn unlink(&mut self, d: usize, name: &str) {
        let step = self.lanes[d].begin(&self.disk, format!("unlink {name}"), |t| drop(t.remove(name)));
        fs::remove_file(self.at.join(name)).unwrap();
        self.durable_if(self.level.names_wait(), d, step);
    }

    fn rename_within(&mut self, d: usize, from: &str, to: &str) {
        let step = self.lanes[d].begin(&self.disk, format!("rename {from} to {to}"), |t| {
            let node = t.remove(from).unwrap();
            t.insert(to.into(), node);
        });
        fs::rename(self.at.join(from), self.at.join(to)).unwrap();
        self.durable_if(self.level.names_wait(), d, step);
    }

    fn rename(&mut self, d: usize, from: &str) {
        let e = self.rng.usize(..2);
        let to = format!("{}/{}", self.dirs[e], NAMES[self.rng.usize(..3)]);
        if from == to {
            return;
        }
        if d == e {
            return self.rename_within(d, from, &to);
        }
        let node = self.lanes[d].now()[from].clone();
        let label = format!("rename {from} to {to}");
        let gone = self.lanes[d].begin(&self.disk, label.clone(), |t| drop(t.remove(from)));
        let there = self.lanes[e].begin(&self.disk, label, |t| drop(t.insert(to.clone(), node)));
        self.joints.push([(d, gone), (e, there)]);
        fs::rename(self.at.join(from), self.at.join(&to)).unwrap();
        self.durable_if(self.level.names_wait(), d, gone);
        self.durable_if(self.level.names_wait(), e, there);
    }

    fn directory(&mut self, d: usize) {
        let name = format!("{}/sub", self.dirs[d]);
        let step = if self.lanes[d].now().contains_key(&name) {
            let step = self.lanes[d].begin(&self.disk, format!("rmdir {name}"), |t| drop(t.remove(&name)));
            fs::remove_dir(self.at.join(&name)).unwrap();
            step
        } else {
            let step =
                self.lanes[d].begin(&self.disk, format!("mkdir {name}"), |t| drop(t.insert(name.clone(), Node::Dir)));
            fs::create_dir(self.at.join(&name)).unwrap();
            step
        };
        self.durable_if(self.level.names_wait(), d, step);
    }

    fn fsync_dir(&mut self, d: usize) {
        File::open(self.at.join(&self.dirs[d])).unwrap().sync_all().unwrap();
        if self.level.fsync_waits() {
            self.lanes[d].all_durable(&self.disk);
        }
    }

    /// An update of a file that stays the same file: a mix until it is acknowledged, exact then.
    fn write_in_place(&mut self) {
        let old = self.versions.last().unwrap().clone();
        let from = self.rng.usize(..=old.len());
        let piece: Vec<u8> = (0..self.rng.usize(1..8000)).map(|_| self.rng.u8(1..)).collect();
        let mut new = old.to_vec();
        new.resize(old.len().max(from + piece.len()), 0);
        new[from..from + piece.len()].copy_from_slice(&piece);
        self.versions.push(new.clone().into());
        let name = self.place.clone();
        let mixed = Node::Mixed { versions: self.versions.clone(), meta: Meta::plain() };
        let label = format!("write {} bytes at {from} of {name}", piece.len());
        self.lanes[IN_PLACE].begin(&self.disk, label.clone(), |t| drop(t.insert(name.clone(), mixed)));
        let node = Node::File { content: new.into(), meta: Meta::plain() };
        let step = self.lanes[IN_PLACE].begin(&self.disk, label, |t| drop(t.insert(name.clone(), node)));
        let file = OpenOptions::new().write(true).open(self.at.join(&name)).unwrap();
        file.write_all_at(&piece, from as u64).unwrap();
        let mut durable = false;
        if self.rng.bool() {
            file.sync_data().unwrap();
            durable = self.level.fsync_waits();
        }
        self.durable_if(durable, IN_PLACE, step);
        close(file);
        durable |= self.level.close_waits();
        self.durable_if(durable, IN_PLACE, step);
        if durable {
            self.versions.drain(..self.versions.len() - 1);
        }
    }
}

/// Closes and looks at the answer, which `drop` does not.
fn close(file: File) {
    // SAFETY: the descriptor is this file's own and is not used again.
    let rc = unsafe { libc::close(file.into_raw_fd()) };
    assert_eq!(rc, 0, "close: {}", std::io::Error::last_os_error());
}
