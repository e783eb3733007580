//! Programs with a protocol of several directories: a mail spool and a package manager.
//!
//! Mail, as Maildir has it: a message is written under `tmp`, and linked or renamed to `new`; a reader moves it to
//! `cur`. A package, as dpkg does it: every file is unpacked beside the old one, synced, and renamed over it, with a
//! link to the old one as long as that may be needed; then the database says which version is there.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::IntoRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;

use crate::disk::Disk;
use crate::fsys::{Daemon, recover};
use crate::model::{History, Joint, Lane, Meta, Node, Tree, Violation};
use crate::programs::Level;
use crate::rig::Rig;
use crate::workload::Workload;

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Mail,
    Package,
}

impl What {
    fn dirs(self) -> [&'static str; 3] {
        match self {
            Self::Mail => ["tmp", "new", "cur"],
            Self::Package => ["bin", "lib", "db"],
        }
    }
}

/// See the module.
pub struct Delivery {
    what: What,
    level: Level,
    rounds: usize,
}

/// As many at once, each with directories of its own.
const AT_ONCE: usize = 3;
const PACKAGED: [&str; 4] = ["bin/one", "bin/two", "lib/three", "lib/four"];

impl Delivery {
    pub fn new(what: What, level: Level) -> Self {
        Self { what, level, rounds: if what == What::Mail { 8 } else { 3 } }
    }
}

impl Workload for Delivery {
    fn prepare(&mut self, rig: &Rig, root: &Path, _rng: &mut Rng) {
        Daemon::mount(root, &rig.dir("mnt"), "").unmount();
        for n in 0..AT_ONCE {
            self.what.dirs().iter().for_each(|d| fs::create_dir_all(root.join(format!("{n}/{d}"))).unwrap());
        }
    }

    fn run(&mut self, rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let daemon = Daemon::mount(root, &rig.dir("mnt"), &self.level.options(rng));
        let start = |n: usize| Program {
            at: daemon.path().to_path_buf(),
            disk: disk.clone(),
            level: self.level,
            lanes: self.what.dirs().map(|d| lane(&format!("{n}/{d}"))).into(),
            dirs: self.what.dirs().map(|d| format!("{n}/{d}")),
            joints: vec![],
            needs: vec![],
            rng: rng.fork(),
        };
        let mut programs: Vec<Program> = (0..AT_ONCE).map(start).collect();
        let (what, rounds) = (self.what, self.rounds);
        std::thread::scope(|scope| {
            for program in &mut programs {
                scope.spawn(move || {
                    (0..rounds).for_each(|n| match what {
                        What::Mail => program.deliver(n).unwrap(),
                        What::Package => program.install(n).unwrap(),
                    });
                });
            }
        });
        daemon.unmount();
        let mut history = History { fixed: (0..AT_ONCE).map(|n| n.to_string()).collect(), ..History::default() };
        for mut program in programs {
            program.lanes.iter_mut().for_each(|lane| lane.all_durable(disk));
            let base = history.lanes.len();
            let moved = |j: Joint| j.map(|(lane, step)| (lane + base, step));
            history.lanes.extend(program.lanes);
            history.joints.extend(program.joints.into_iter().map(moved));
            history.needs.extend(program.needs.into_iter().map(moved));
        }
        history
    }

    fn recover(&self, root: &Path) -> Result<(), Violation> {
        recover(root)
    }

    fn recovery_writes(&self) -> bool {
        true
    }
}

fn lane(dir: &str) -> Lane {
    Lane::new(dir, vec![dir.to_owned()], Tree::from([(dir.to_owned(), Node::Dir)]))
}

/// One program at work.
struct Program {
    at: PathBuf,
    disk: Disk,
    level: Level,
    dirs: [String; 3],
    /// One for each directory.
    lanes: Vec<Lane>,
    joints: Vec<Joint>,
    needs: Vec<Joint>,
    rng: Rng,
}

/// A lane, and an operation in it.
type Step = (usize, usize);

impl Program {
    fn path(&self, name: &str) -> PathBuf {
        let (dir, base) = name.split_once('/').unwrap();
        self.at.join(&self.dirs[self.dir(dir)]).join(base)
    }

    /// The lane of a directory, by its own name.
    fn dir(&self, dir: &str) -> usize {
        self.dirs.iter().position(|d| d.ends_with(dir)).unwrap()
    }

    /// Where a name is: its lane, and its full name there.
    fn place(&self, name: &str) -> (usize, String) {
        let (dir, base) = name.split_once('/').unwrap();
        let lane = self.dir(dir);
        (lane, format!("{}/{base}", self.dirs[lane]))
    }

    fn node(&self, name: &str) -> Option<Node> {
        let (lane, full) = self.place(name);
        self.lanes[lane].now().get(&full).cloned()
    }

    fn begin(&mut self, what: &str, name: &str, effect: impl FnOnce(&mut Tree, String)) -> Step {
        let (lane, full) = self.place(name);
        let label = format!("{what} {full}");
        (lane, self.lanes[lane].begin(&self.disk, label, |t| effect(t, full)))
    }

    fn durable_if(&mut self, waits: bool, (lane, step): Step) {
        if waits {
            self.lanes[lane].durable(&self.disk, step);
        }
    }

    /// Writes a new file; with or without an fsync before the close.
    fn save(&mut self, name: &str, sync: bool) -> io::Result<Step> {
        let content: Arc<[u8]> = (0..self.rng.usize(1..30_000)).map(|_| self.rng.u8(1..)).collect();
        let node = Node::File { content: content.clone(), meta: Meta::plain() };
        let step = self.begin("write", name, |t, full| drop(t.insert(full, node)));
        let mut file = File::create(self.path(name))?;
        content.chunks(8192).try_for_each(|piece| file.write_all(piece))?;
        if sync {
            file.sync_all()?;
            self.durable_if(self.level.fsync_waits(), step);
        }
        // SAFETY: the descriptor is this file's own and is not used again.
        if unsafe { libc::close(file.into_raw_fd()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.durable_if(self.level.close_waits(), step);
        Ok(step)
    }

    fn link(&mut self, from: &str, to: &str) -> io::Result<Step> {
        let node = self.node(from).unwrap();
        let step = self.begin("link", to, |t, full| drop(t.insert(full, node)));
        fs::hard_link(self.path(from), self.path(to))?;
        self.durable_if(self.level.names_wait(), step);
        Ok(step)
    }

    fn unlink(&mut self, name: &str) -> io::Result<Step> {
        let step = self.begin("unlink", name, |t, full| drop(t.remove(&full)));
        fs::remove_file(self.path(name))?;
        self.durable_if(self.level.names_wait(), step);
        Ok(step)
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let node = self.node(from).unwrap();
        let (source, from_full) = self.place(from);
        let steps = if source == self.place(to).0 {
            vec![self.begin("rename to", to, |t, full| {
                t.remove(&from_full);
                t.insert(full, node);
            })]
        } else {
            let away = self.begin("rename away", from, |t, full| drop(t.remove(&full)));
            let here = self.begin("rename to", to, |t, full| drop(t.insert(full, node)));
            self.joints.push([away, here]);
            vec![away, here]
        };
        fs::rename(self.path(from), self.path(to))?;
        steps.into_iter().for_each(|step| self.durable_if(self.level.names_wait(), step));
        Ok(())
    }

    fn sync(&mut self, dir: &str) -> io::Result<()> {
        let lane = self.dir(dir);
        File::open(self.at.join(&self.dirs[lane]))?.sync_all()?;
        if self.level.fsync_waits() {
            self.lanes[lane].all_durable(&self.disk);
        }
        Ok(())
    }

    /// One message, and sometimes a reader.
    fn deliver(&mut self, n: usize) -> io::Result<()> {
        let (temp, new) = (format!("tmp/{n}"), format!("new/{n}"));
        let sync = self.rng.u8(..3) > 0;
        let written = self.save(&temp, sync)?;
        if self.rng.bool() {
            let linked = self.link(&temp, &new)?;
            self.needs.push([linked, written]);
            let gone = self.unlink(&temp)?;
            // Else the message would be under neither name.
            self.needs.push([gone, linked]);
        } else {
            self.rename(&temp, &new)?;
        }
        if self.rng.u8(..3) > 0 {
            self.sync("new")?;
        }
        if self.rng.u8(..3) == 0 {
            self.rename(&new, &format!("cur/{n}:2,S"))?;
        }
        Ok(())
    }

    /// One version of a package.
    fn install(&mut self, n: usize) -> io::Result<()> {
        let sync = self.rng.u8(..3) > 0;
        for name in PACKAGED {
            self.save(&format!("{name}.dpkg-new"), sync)?;
        }
        for name in PACKAGED {
            let old = format!("{name}.dpkg-tmp");
            if n > 0 {
                self.link(name, &old)?;
            }
            self.rename(&format!("{name}.dpkg-new"), name)?;
            if n > 0 {
                self.unlink(&old)?;
            }
        }
        if self.rng.u8(..3) > 0 {
            self.sync("bin")?;
            self.sync("lib")?;
        }
        self.save("db/status-new", true)?;
        if n > 1 {
            self.unlink("db/status-old")?;
        }
        if n > 0 {
            self.link("db/status", "db/status-old")?;
        }
        self.rename("db/status-new", "db/status")?;
        self.sync("db")
    }
}
