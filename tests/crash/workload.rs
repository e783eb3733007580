//! What the explorer runs: something that changes files and says what it was told.

use std::path::Path;

use fastrand::Rng;

use crate::disk::Disk;
use crate::model::{History, Violation};
use crate::rig::Rig;

/// A workload for the explorer. A value is good for one run.
pub trait Workload {
    /// Makes the files that are there before the run, on the mounted filesystem. All of it is durable then.
    fn prepare(&mut self, rig: &Rig, root: &Path, rng: &mut Rng);

    /// Does its work under `root`, with a mark on `disk` for every start and every answer.
    fn run(&mut self, rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History;

    /// Called on the mounted crash state before the history is checked.
    fn recover(&self, _root: &Path) -> Result<(), Violation> {
        Ok(())
    }

    /// Whether the recovered crash state is one that a crash at `at` may leave.
    fn check(&self, root: &Path, history: &History, at: usize) -> Result<(), Violation> {
        history.check(root, at)
    }

    /// Whether a crash state must be mounted for writing.
    fn recovery_writes(&self) -> bool {
        false
    }
}
