//! What is measured against the raw file system: a mount of this project or one of a peer.

use std::path::Path;
use std::process::Command;

use super::Mounted;
use crate::common::{LoopFs, Mount, mount, run};

/// A mount and its name.
pub enum Target {
    /// fsys-mount with one list of options.
    Ours(String, Mount),
    /// Another file system.
    Peer(Mounted),
}

impl Target {
    /// What it is called in the tables.
    pub fn name(&self) -> &str {
        match self {
            Self::Ours(name, _) => name,
            Self::Peer(peer) => peer.name,
        }
    }

    /// Whether it is fsys-mount.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Ours(..))
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        match self {
            Self::Ours(_, mount) => mount.path(),
            Self::Peer(peer) => peer.path(),
        }
    }

    /// The process that serves it.
    pub fn pid(&self) -> i32 {
        match self {
            Self::Ours(_, mount) => mount.pid().as_raw_nonzero().get(),
            Self::Peer(peer) => peer.pid(),
        }
    }

    /// Nothing of what was done in it is left to do.
    pub fn settle(&self) {
        // Writes that the kernel gathers for a mount become the backing file system's first.
        let mut sync = Command::new("sync");
        sync.arg("-f").arg(self.path());
        match self {
            Self::Ours(..) => {
                run(&mut sync);
                run(mount::fsys().arg("drain").arg(self.path()));
            }
            // With gathered writes mergerfs answers ESTALE for files that are gone: there is nothing left to write.
            Self::Peer(_) => drop(sync.output()),
        }
    }
}

/// Named mounts of this project: `NAME:OPTIONS;NAME:OPTIONS`, each with a directory of its own.
///
/// # Errors
/// What is not understood.
pub fn named_mounts(list: &str) -> Result<Vec<(String, String)>, String> {
    list.split(';')
        .map(|one| {
            let (name, options) = one.split_once(':').ok_or_else(|| format!("{one}: want NAME:OPTIONS"))?;
            if name.is_empty() || name.contains(['/', ',']) {
                return Err(format!("{one}: a name without / and , comes first"));
            }
            Ok((name.to_owned(), options.to_owned()))
        })
        .collect()
}

/// Starts fsys-mount once for each list of options.
pub fn start_named(fs: &LoopFs, mounts: &[(String, String)]) -> Vec<Target> {
    let start = |(name, options): &(String, String)| {
        let mount = Mount::start(&fs.subdir(&format!("data-{name}")), options);
        println!("mount {name}: {options}");
        Target::Ours(name.clone(), mount)
    };
    mounts.iter().map(start).collect()
}

/// Median, smallest, largest.
pub fn middle(mut all: Vec<f64>) -> (f64, f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[0], all[all.len() - 1])
}
