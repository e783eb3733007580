//! What the rows work on, in memory and outside the file system under test. Each is made when a row first asks for it.

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::common::explain;

const MEMORY: &str = "/dev/shm";
const PREFIX: &str = "fsys-programs-";

/// The inputs; gone with this value.
pub struct Inputs {
    dir: TempDir,
    tree: Option<PathBuf>,
    scale: f64,
}

impl Inputs {
    /// None yet. `tree` is a tar file.
    pub fn new(tree: Option<PathBuf>, scale: f64) -> Inputs {
        sweep();
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(MEMORY).expect("a directory");
        // A server that is not root looks into it.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        Inputs { dir, tree, scale }
    }

    /// Where an input is, or is to be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// So much of `whole`, at least 1.
    #[allow(clippy::cast_precision_loss)] // counts
    pub fn scaled(&self, whole: usize) -> usize {
        ((whole as f64 * self.scale) as usize).max(1)
    }

    /// Makes an input with `make`, which is given where, unless it is there.
    pub fn once(&self, name: &str, make: impl FnOnce(&Path) -> Result<(), String>) -> Result<PathBuf, String> {
        let path = self.path(name);
        if !path.exists() {
            // Only what is whole has the name.
            let part = self.path(&format!("{name}.part"));
            make(&part)?;
            fs::rename(&part, &path).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(path)
    }

    /// The first 20,000 files of the source tree as a tar file.
    pub fn tar(&self) -> Result<PathBuf, String> {
        let files = self.files("untar", self.scaled(20_000))?;
        self.once("tree.tar", |part| done(Command::new("tar").arg("-cf").arg(part).arg("-C").arg(files).arg(".")))
    }

    /// The first `count` regular files of the source tree, unpacked.
    pub fn files(&self, name: &str, count: usize) -> Result<PathBuf, String> {
        let whole = self.tree.as_deref().ok_or("no source tree: --tree FILE, made by scripts/tree")?;
        self.once(name, |part| {
            let unpacked = unpack(whole, part, count).map_err(|e| format!("{}: {e}", whole.display()))?;
            if unpacked == count { Ok(()) } else { Err(format!("{} has only {unpacked} files", whole.display())) }
        })
    }
}

/// Takes away what a run that was killed has left.
fn sweep() {
    for entry in fs::read_dir(MEMORY).expect("list").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            fs::remove_dir_all(entry.path()).expect("remove");
        }
    }
}

fn unpack(tar: &Path, dir: &Path, count: usize) -> std::io::Result<usize> {
    fs::create_dir(dir)?;
    let mut unpacked = 0;
    for entry in tar::Archive::new(BufReader::new(File::open(tar)?)).entries()? {
        let mut entry = entry?;
        if unpacked < count && entry.header().entry_type().is_file() && entry.unpack_in(dir)? {
            unpacked += 1;
        }
    }
    Ok(unpacked)
}

/// Whether a program is there.
pub fn has(program: &str) -> Result<(), String> {
    let found = Command::new(program).arg("--version").output().is_ok();
    if found { Ok(()) } else { Err(format!("{program} is not installed")) }
}

/// Runs a command that prepares an input.
pub fn done(command: &mut Command) -> Result<(), String> {
    text(command).map(|_| ())
}

/// The same, and gives what it printed.
pub fn text(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !output.status.success() {
        return Err(explain(command, &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
