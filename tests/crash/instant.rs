//! The instant between the two steps of a replacement: the new version is linked in `.fsys/staging`, and not yet
//! renamed over the old one. A crash there is rare by nature; here the filesystem commits in every such instant, so that
//! every run leaves something for recovery to do.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use fsys_mount::backend::Call;
use fsys_mount::config::policy::{Durability, WriteMode};

use crate::disk::Disk;
use crate::fsys::{Daemon, recover_without};
use crate::model::{History, Lane, Meta, Node, Tree, Violation};
use crate::rig::Rig;
use crate::workload::Workload;
use crate::world::{World, still};

const NAMES: [&str; 3] = ["x", "y", "z"];
const SAVES: usize = 12;

/// See the module.
pub struct Instant {
    recovery_without: &'static [libc::c_long],
    initial: Tree,
}

impl Instant {
    /// With a recovery that does not make these system calls.
    pub fn new(recovery_without: &'static [libc::c_long]) -> Self {
        Self { recovery_without, initial: Tree::new() }
    }
}

fn random(rng: &mut Rng) -> Arc<[u8]> {
    (0..rng.usize(1..9000)).map(|_| rng.u8(1..)).collect()
}

impl Workload for Instant {
    fn prepare(&mut self, rig: &Rig, root: &Path, rng: &mut Rng) {
        Daemon::mount(root, &rig.dir("mnt"), "").unmount();
        for name in NAMES {
            let content = random(rng);
            fs::write(root.join(name), &content).unwrap();
            self.initial.insert(name.into(), Node::File { content, meta: Meta::plain() });
        }
    }

    fn run(&mut self, _rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let mut lane = Lane::new("all", vec![], self.initial.clone());
        let world = World::open(root, still(Durability::Close, WriteMode::Auto));
        let whole = File::open(root).unwrap();
        world.seam.hook(move |call| {
            if call == Call::Publish {
                rustix::fs::syncfs(&whole).unwrap();
            }
        });
        for _ in 0..SAVES {
            let (name, content) = (NAMES[rng.usize(..NAMES.len())], random(rng));
            let node = Node::File { content: content.clone(), meta: Meta::plain() };
            let step = lane.begin(disk, format!("save {name}"), |t| drop(t.insert(name.into(), node)));
            let fd = world.open_with(name, libc::O_RDWR | libc::O_TRUNC).unwrap();
            world.write_all(fd, 0, &content).unwrap();
            world.close(fd).unwrap();
            lane.durable(disk, step);
        }
        world.shutdown().unwrap();
        History { lanes: vec![lane], ..History::default() }
    }

    fn recover(&self, root: &Path) -> Result<(), Violation> {
        recover_without(root, self.recovery_without)
    }

    fn recovery_writes(&self) -> bool {
        true
    }
}
