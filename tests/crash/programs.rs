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

    /// Options of the mount. Where closes do not wait, with a bound of uncommitted files that is reached by some runs and
    /// half reached by others, as by programs that save very much.
    pub fn options(self, rng: &mut Rng) -> String {
        let bound = if self.close_waits() { "" } else { ["", ",pending_max=2", ",pending_max=8"][rng.usize(..3)] };
        format!("durability={}{bound}", self.name())
    }

    pub fn close_waits(self) -> bool {
        matches!(self, Self::Always | Self::Close)
    }

    pub fn fsync_waits(self) -> bool {
        self != Self::Relaxed
    }

    pub fn names_wait(self) -> bool {
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

/// Which operations must take effect in the order in which they were acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// All in one directory.
    Directory,
    /// Those on one name.
    Name,
}

/// The write mode of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Auto,
    /// Every save of a program is atomic, a change of a part of a file too.
    Replace,
    /// None is: until it is acknowledged, a save may be there in part.
    InPlace,
    /// As [`Mode::Replace`], and files stay the same inodes.
    Journal,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Replace => "replace",
            Self::InPlace => "in-place",
            Self::Journal => "journal",
        }
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Programs {
    pub through: Through,
    pub level: Level,
    pub mode: Mode,
    pub count: usize,
    pub operations: usize,
    pub initial: Tree,
    /// What must keep its order.
    pub order: Order,
    /// Nothing was ever mounted there: `.fsys` is made in the run.
    pub first_mount: bool,
    /// All programs work in the same directories, each on names of its own.
    pub shared: bool,
    /// The level that the mount really has: a control.
    pub daemon_level: Level,
    /// System calls that the daemon does not make: a control.
    pub daemon_without: &'static [libc::c_long],
}

/// The directory of the files that are written in place.
const PLACE: &str = "place";
/// All that a program makes in its directories.
const ALL_NAMES: [&str; 5] = ["x", "y", "z", ".tmp", "sub"];
const TEMP: usize = 3;
const SUB: usize = 4;

impl Programs {
    pub fn new(through: Through, level: Level) -> Self {
        Self {
            through,
            level,
            mode: Mode::Auto,
            count: 3,
            operations: 12,
            initial: Tree::new(),
            order: Order::Directory,
            first_mount: false,
            shared: false,
            daemon_level: level,
            daemon_without: &[],
        }
    }

    fn dirs(&self, n: usize) -> [String; 2] {
        let who = if self.shared { String::new() } else { n.to_string() };
        [format!("p{who}a"), format!("p{who}b")]
    }

    /// The names of a program in its directories, as [`ALL_NAMES`].
    fn names(&self, n: usize) -> [String; 5] {
        ALL_NAMES.map(|name| if self.shared { format!("{name}{n}") } else { name.to_owned() })
    }

    /// The lanes of a program: that of the file in place comes first, then those of its directories.
    fn lanes(&self, n: usize) -> Vec<Lane> {
        let lane = |scope: Vec<String>| Lane::new(&scope.join(" "), scope.clone(), self.part(&scope));
        let in_dirs = self.dirs(n).into_iter().flat_map(|dir| {
            let names = || self.names(n).map(|name| format!("{dir}/{name}"));
            match self.order {
                Order::Directory if self.shared => vec![names().to_vec()],
                Order::Directory => vec![vec![dir]],
                Order::Name => names().map(|name| vec![name]).to_vec(),
            }
        });
        std::iter::once(vec![format!("{PLACE}/p{n}")]).chain(in_dirs).map(lane).collect()
    }

    fn part(&self, scope: &[String]) -> Tree {
        let below = |k: &str, s: &String| k == s || k.strip_prefix(s.as_str()).is_some_and(|r| r.starts_with('/'));
        let mine = |k: &&String| scope.iter().any(|s| below(k, s));
        self.initial.iter().filter(|(k, _)| mine(k)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

impl Workload for Programs {
    fn prepare(&mut self, rig: &Rig, root: &Path, rng: &mut Rng) {
        // The first mount of a directory, or a later one.
        if self.through == Through::Mount && !self.first_mount {
            Daemon::mount(root, &rig.dir("mnt"), "").unmount();
        }
        fs::create_dir(root.join(PLACE)).unwrap();
        for n in 0..self.count {
            for dir in self.dirs(n) {
                fs::create_dir_all(root.join(&dir)).unwrap();
                self.initial.insert(dir.clone(), Node::Dir);
                for name in &self.names(n)[..TEMP] {
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
        let daemon = (self.through == Through::Mount).then(|| {
            let options = format!("{},mode={}", self.daemon_level.options(rng), self.mode.name());
            Daemon::mount_without(root, &rig.dir("mnt"), &options, self.daemon_without)
        });
        let at: PathBuf = daemon.as_ref().map_or(root, Daemon::path).to_path_buf();
        let mut programs: Vec<Program> = (0..self.count)
            .map(|n| {
                let place = format!("{PLACE}/p{n}");
                let Node::File { content, .. } = &self.initial[&place] else { unreachable!() };
                Program {
                    at: at.clone(),
                    disk: disk.clone(),
                    level: self.level,
                    mode: self.mode,
                    dirs: self.dirs(n),
                    names: self.names(n),
                    lanes: self.lanes(n),
                    order: self.order,
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
        let dirs = (0..self.count).flat_map(|n| self.dirs(n));
        let fixed = dirs.chain([PLACE.into()]).collect();
        let mut history = History { fixed, ..History::default() };
        for program in programs {
            let base = history.lanes.len();
            history.lanes.extend(program.lanes);
            history.joints.extend(program.joints.into_iter().map(|j| j.map(|(lane, step)| (lane + base, step))));
        }
        if self.shared {
            let per_program = history.lanes.len() / self.count;
            let group = |d: usize| (0..self.count).map(|n| n * per_program + 1 + d).collect();
            history.shared = (0..2).map(group).collect();
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
    mode: Mode,
    dirs: [String; 2],
    /// As [`ALL_NAMES`].
    names: [String; 5],
    lanes: Vec<Lane>,
    order: Order,
    joints: Vec<Joint>,
    place: String,
    /// What the file in place may consist of: its content when it was last durable, and all since.
    versions: Vec<Arc<[u8]>>,
    rng: Rng,
}

const IN_PLACE: usize = 0;

impl Program {
    fn step(&mut self) {
        let d = self.rng.usize(..2);
        let name = self.any_name(d);
        let exists = self.now(&name).is_some();
        match self.rng.u8(..16) {
            0..=3 => self.save(&name),
            4 | 5 => self.save_and_fsync(&name),
            6 => self.save_with_a_dup(&name),
            7 | 8 => self.save_by_rename(d, &name),
            9 => self.empty(&name),
            10 if exists => self.unlink(&name),
            11 if exists => self.rename_away(&name),
            12 => self.directory(d),
            13 => self.fsync_dir(d),
            _ => self.write_in_place(),
        }
    }

    fn any_name(&mut self, d: usize) -> String {
        format!("{}/{}", self.dirs[d], self.names[self.rng.usize(..TEMP)])
    }

    /// The lane of a name.
    fn lane(&self, name: &str) -> usize {
        let (dir, base) = name.split_once('/').unwrap();
        let d = self.dirs.iter().position(|d| d == dir).unwrap();
        match self.order {
            Order::Directory => 1 + d,
            Order::Name => 1 + d * ALL_NAMES.len() + self.names.iter().position(|n| n == base).unwrap(),
        }
    }

    fn now(&self, name: &str) -> Option<&Node> {
        self.lanes[self.lane(name)].now().get(name)
    }

    fn content(&mut self) -> Arc<[u8]> {
        let max = if self.rng.u8(..6) == 0 { 200_000 } else { 20_000 };
        let mut content = vec![0; self.rng.usize(2..max)];
        self.rng.fill(&mut content);
        content.into_iter().map(|b: u8| b.max(1)).collect()
    }

    /// A file of this content under that name: what replaces another one keeps its metadata.
    fn node(&self, name: &str, content: &[u8]) -> Node {
        let meta = match self.now(name) {
            Some(Node::File { meta, .. } | Node::Mixed { meta, .. }) => meta.clone(),
            _ => Meta::plain(),
        };
        Node::File { content: content.into(), meta }
    }

    /// What that file may be while it is written in place: empty, and then each byte old or new.
    fn mixed(&self, name: &str, new: Node) -> Node {
        let Node::File { content, meta } = new else { return new };
        let mut versions = match self.now(name) {
            Some(Node::File { content, .. }) => vec![content.clone()],
            Some(Node::Mixed { versions, .. }) => versions.clone(),
            _ => vec![],
        };
        versions.extend([Arc::default(), content]);
        Node::Mixed { versions, meta }
    }

    fn begin(&mut self, name: &str, label: String, effect: impl FnOnce(&mut Tree)) -> (usize, usize) {
        let lane = self.lane(name);
        (lane, self.lanes[lane].begin(&self.disk, label, effect))
    }

    fn begin_save(&mut self, name: &str, content: &[u8], how: &str) -> (usize, usize) {
        let mut node = self.node(name, content);
        if self.mode == Mode::InPlace {
            node = self.mixed(name, node);
        }
        self.begin(name, format!("{how} {name}, {} bytes", content.len()), |t| drop(t.insert(name.into(), node)))
    }

    /// The save that began with `step` was answered.
    fn saved(&mut self, waits: bool, name: &str, content: &[u8], step: (usize, usize)) {
        let mut step = step;
        if waits && self.mode == Mode::InPlace {
            let node = self.node(name, content);
            step = self.begin(name, format!("{name} is complete"), |t| drop(t.insert(name.into(), node)));
        }
        self.durable_if(waits, step);
    }

    fn durable_if(&mut self, waits: bool, (lane, step): (usize, usize)) {
        self.lanes[lane].answered(&self.disk, step);
        if waits {
            self.lanes[lane].durable(&self.disk, step);
        }
    }

    fn create(&self, name: &str) -> File {
        File::create(self.at.join(name)).unwrap_or_else(|e| panic!("create {name}: {e}"))
    }

    /// Truncate, write, close.
    fn save(&mut self, name: &str) {
        let content = self.content();
        let step = self.begin_save(name, &content, "save");
        let mut file = self.create(name);
        content.chunks(content.len() / 3 + 1).for_each(|piece| file.write_all(piece).unwrap());
        close(file);
        self.saved(self.level.close_waits(), name, &content, step);
    }

    /// The same with an fsync in the middle or at the end: two commit points, or one.
    fn save_and_fsync(&mut self, name: &str) {
        let content = self.content();
        let half = if self.rng.bool() { content.len() } else { content.len() / 2 };
        let step = self.begin_save(name, &content[..half], "save with fsync");
        let mut file = self.create(name);
        file.write_all(&content[..half]).unwrap();
        file.sync_all().unwrap();
        self.saved(self.level.fsync_waits(), name, &content[..half], step);
        if half < content.len() {
            let step = self.begin_save(name, &content, "go on after fsync with");
            file.write_all(&content[half..]).unwrap();
            close(file);
            self.saved(self.level.close_waits(), name, &content, step);
        }
    }

    /// A copy of the descriptor is closed half way: what is there then is committed.
    fn save_with_a_dup(&mut self, name: &str) {
        let content = self.content();
        let half = content.len() / 2;
        let step = self.begin_save(name, &content[..half], "save and close a dup");
        let mut file = self.create(name);
        file.write_all(&content[..half]).unwrap();
        close(file.try_clone().unwrap());
        self.saved(self.level.close_waits(), name, &content[..half], step);
        let step = self.begin_save(name, &content, "go on after a dup's close with");
        file.write_all(&content[half..]).unwrap();
        close(file);
        self.saved(self.level.close_waits(), name, &content, step);
    }

    /// As editors do it, with or without the fsync.
    fn save_by_rename(&mut self, d: usize, name: &str) {
        let content = self.content();
        let temp = format!("{}/{}", self.dirs[d], self.names[TEMP]);
        let step = self.begin_save(&temp, &content, "write");
        let mut file = self.create(&temp);
        file.write_all(&content).unwrap();
        if self.rng.bool() {
            file.sync_all().unwrap();
            self.saved(self.level.fsync_waits(), &temp, &content, step);
        }
        close(file);
        self.saved(self.level.close_waits(), &temp, &content, step);
        self.rename(&temp, name);
    }

    /// A version that stays empty is committed after the last close, which does not wait for it.
    fn empty(&mut self, name: &str) {
        self.begin_save(name, &[], "empty");
        close(self.create(name));
    }

    fn unlink(&mut self, name: &str) {
        let step = self.begin(name, format!("unlink {name}"), |t| drop(t.remove(name)));
        fs::remove_file(self.at.join(name)).unwrap();
        self.durable_if(self.level.names_wait(), step);
    }

    fn rename_away(&mut self, from: &str) {
        let d = self.rng.usize(..2);
        let to = self.any_name(d);
        if from != to {
            self.rename(from, &to);
        }
    }

    fn rename(&mut self, from: &str, to: &str) {
        let node = self.now(from).unwrap().clone();
        let label = format!("rename {from} to {to}");
        let mut steps = vec![];
        if self.lane(from) == self.lane(to) {
            steps.push(self.begin(from, label, |t| {
                t.remove(from);
                t.insert(to.into(), node);
            }));
        } else {
            let joint: Joint = [
                self.begin(from, label.clone(), |t| drop(t.remove(from))),
                self.begin(to, label, |t| drop(t.insert(to.into(), node))),
            ];
            steps.extend(joint);
            self.joints.push(joint);
        }
        fs::rename(self.at.join(from), self.at.join(to)).unwrap();
        for step in steps {
            self.durable_if(self.level.names_wait(), step);
        }
    }

    fn directory(&mut self, d: usize) {
        let name = format!("{}/{}", self.dirs[d], self.names[SUB]);
        let path = self.at.join(&name);
        let step = if self.now(&name).is_some() {
            let step = self.begin(&name, format!("rmdir {name}"), |t| drop(t.remove(&name)));
            fs::remove_dir(path).unwrap();
            step
        } else {
            let step = self.begin(&name, format!("mkdir {name}"), |t| drop(t.insert(name.clone(), Node::Dir)));
            fs::create_dir(path).unwrap();
            step
        };
        self.durable_if(self.level.names_wait(), step);
    }

    /// Everything about the names in it is durable then.
    fn fsync_dir(&mut self, d: usize) {
        File::open(self.at.join(&self.dirs[d])).unwrap().sync_all().unwrap();
        if self.level.fsync_waits() {
            let lanes: Vec<usize> =
                self.names[..TEMP].iter().map(|n| self.lane(&format!("{}/{n}", self.dirs[d]))).collect();
            for lane in lanes {
                self.lanes[lane].all_durable(&self.disk);
            }
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
        let label = format!("write {} bytes at {from} of {name}", piece.len());
        if matches!(self.mode, Mode::Auto | Mode::InPlace) {
            let mixed = Node::Mixed { versions: self.versions.clone(), meta: Meta::plain() };
            self.lanes[IN_PLACE].begin(&self.disk, label.clone(), |t| drop(t.insert(name.clone(), mixed)));
        }
        let node = Node::File { content: new.into(), meta: Meta::plain() };
        let step = self.lanes[IN_PLACE].begin(&self.disk, label, |t| drop(t.insert(name.clone(), node)));
        let file = OpenOptions::new().write(true).open(self.at.join(&name)).unwrap();
        file.write_all_at(&piece, from as u64).unwrap();
        let mut durable = false;
        if self.rng.bool() {
            file.sync_data().unwrap();
            durable = self.level.fsync_waits();
        }
        self.durable_if(durable, (IN_PLACE, step));
        close(file);
        durable |= self.level.close_waits();
        self.durable_if(durable, (IN_PLACE, step));
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
