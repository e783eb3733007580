//! The journal of the engine, without a kernel between: so that a step of it can be left out, which the checker must
//! catch. Updates of a few files, each file a lane of its own.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use fsys_mount::backend::Call;
use fsys_mount::config::policy::{Durability, WriteMode};

use crate::disk::Disk;
use crate::fsys::recover;
use crate::model::{History, Lane, Meta, Node, Tree, Violation};
use crate::rig::Rig;
use crate::workload::Workload;
use crate::world::{World, still};

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    Nothing,
    /// The flush of the log: that of each file is left out with it.
    Flush,
    /// Recovery.
    Recovery,
    /// In recovery, the sums that tell a torn record from a whole one.
    Sums,
}

/// See the module.
pub struct Journal {
    without: Without,
    initial: Tree,
}

const FILES: [&str; 3] = ["a", "b", "c"];
const UPDATES: usize = 14;

impl Journal {
    pub fn new(without: Without) -> Self {
        Self { without, initial: Tree::new() }
    }
}

fn node(content: &[u8]) -> Node {
    Node::File { content: Arc::from(content), meta: Meta::plain() }
}

fn bytes(len: usize, rng: &mut Rng) -> Vec<u8> {
    (0..len).map(|_| rng.u8(1..)).collect()
}

impl Workload for Journal {
    fn prepare(&mut self, _rig: &Rig, root: &Path, rng: &mut Rng) {
        World::open(root, still(Durability::Close, WriteMode::Journal)).shutdown().unwrap();
        for name in FILES {
            let content = bytes(rng.usize(1..30_000), rng);
            fs::write(root.join(name), &content).unwrap();
            self.initial.insert(name.into(), node(&content));
        }
    }

    fn run(&mut self, _rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let w = World::open(root, still(Durability::Close, WriteMode::Journal));
        let own =
            |name: &str| self.initial.iter().filter(|(k, _)| *k == name).map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut lanes: Vec<Lane> = FILES.iter().map(|n| Lane::new(n, vec![(*n).into()], own(n))).collect();
        if self.without == Without::Flush {
            w.seam.leave_out(Call::SyncFile);
        }
        for _ in 0..UPDATES {
            let n = rng.usize(..FILES.len());
            let Some(Node::File { content, .. }) = lanes[n].now().get(FILES[n]).cloned() else { unreachable!() };
            let fd = w.open_with(FILES[n], libc::O_RDWR).unwrap();
            let mut new = content.to_vec();
            // Several pieces, so that a part of an update can be told from all of it.
            let mut pieces = vec![];
            for _ in 0..rng.usize(2..5) {
                let (off, piece) = (rng.usize(..=new.len()), bytes(rng.usize(1..12_000), rng));
                new.resize(new.len().max(off + piece.len()), 0);
                new[off..off + piece.len()].copy_from_slice(&piece);
                pieces.push((off, piece));
            }
            let cut = rng.bool().then(|| rng.usize(1..=new.len()));
            new.truncate(cut.unwrap_or(new.len()));
            let step =
                lanes[n].begin(disk, format!("update {}", FILES[n]), |t| drop(t.insert(FILES[n].into(), node(&new))));
            pieces.iter().for_each(|(off, piece)| w.write_all(fd, *off as u64, piece).unwrap());
            cut.into_iter().for_each(|len| w.truncate(fd, len as u64).unwrap());
            w.close(fd).unwrap();
            lanes[n].durable(disk, step);
            if rng.u8(..6) == 0 {
                w.drain().unwrap();
            }
        }
        w.shutdown().unwrap();
        History { lanes, ..History::default() }
    }

    fn recover(&self, root: &Path) -> Result<(), Violation> {
        match self.without {
            Without::Recovery => Ok(()),
            Without::Sums => {
                replay_anything(root);
                Ok(())
            }
            Without::Nothing | Without::Flush => recover(root),
        }
    }

    fn recovery_writes(&self) -> bool {
        true
    }
}

/// A recovery that believes every header, by the format as it is written down in `engine/record.rs`. All updates here
/// are of files that it finds by their inode number.
fn replay_anything(root: &Path) {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(log) = fs::read(root.join(".fsys/journal/log")) else { return };
    let number =
        |at: usize, len: usize| log.get(at..at + len).map(|b| b.iter().rev().fold(0, |n, b| n << 8 | *b as usize));
    let Some(salt) = number(8, 8) else { return };
    let mut at = 4096;
    while let (Some(true), Some(length)) = (number(at + 8, 8).map(|s| s == salt && salt != 0), number(at + 24, 8)) {
        let field = |off: usize, len: usize| number(at + off, len).unwrap_or(0);
        let (size, ino) = (field(32, 8), field(56, 8));
        let file = FILES.iter().map(|n| root.join(n)).find(|p| fs::metadata(p).is_ok_and(|m| m.ino() as usize == ino));
        let extents = at + 80 + field(68, 2) + field(70, 2);
        let mut data = extents + 24 * field(52, 4);
        if let Some(file) = file.and_then(|p| fs::OpenOptions::new().write(true).open(p).ok()) {
            for e in (0..field(52, 4)).map(|i| extents + 24 * i) {
                let [Some(off), Some(len), Some(kind)] = [0, 8, 16].map(|o| number(e + o, 8)) else { break };
                if kind == 1 {
                    let Some(bytes) = log.get(data..data + len) else { break };
                    file.write_all_at(bytes, off as u64).unwrap();
                    data += len;
                } else {
                    file.write_all_at(&vec![0; len], off as u64).unwrap();
                }
            }
            file.set_len(size as u64).unwrap();
        }
        at += length.max(4096);
    }
}
