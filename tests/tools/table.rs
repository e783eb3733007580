//! The table in which savers note what they began and what was acknowledged, one entry per file.
//!
//! It is a plain file outside the filesystem under test (tmpfs in the tests). A number is written with one
//! pwrite into the page cache, so it survives a SIGKILL of the saver or of the daemon. Each entry has one writer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const ENTRY: u64 = 16;

/// What is known of one file: no save newer than `begun` was started, every save up to `acked` returned 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Sequence number of the newest save that was started.
    pub begun: u64,
    /// Sequence number of the newest save whose last call returned 0.
    pub acked: u64,
}

/// The open table.
pub struct Table(File);

impl Table {
    /// Opens the table for `files` entries; makes it, or makes it longer, where needed.
    pub fn open(path: &Path, files: u32) -> io::Result<Table> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let len = u64::from(files) * ENTRY;
        if file.metadata()?.len() < len {
            file.set_len(len)?;
        }
        Ok(Table(file))
    }

    /// Opens an existing table for reading; gives the number of its entries too.
    pub fn open_existing(path: &Path) -> io::Result<(Table, u32)> {
        let file = File::open(path)?;
        let files = file.metadata()?.len() / ENTRY;
        Ok((Table(file), files as u32))
    }

    /// The entry of file `id`.
    pub fn get(&self, id: u32) -> io::Result<Entry> {
        // `acked` is read before `begun`: a save in between must not look as if it was never begun.
        let acked = self.number(id, 8)?;
        let begun = self.number(id, 0)?;
        Ok(Entry { begun, acked })
    }

    /// Notes that save `seq` of file `id` starts now.
    pub fn begin(&self, id: u32, seq: u64) -> io::Result<()> {
        self.0.write_all_at(&seq.to_le_bytes(), u64::from(id) * ENTRY)
    }

    /// Notes that save `seq` of file `id` was acknowledged.
    pub fn acknowledge(&self, id: u32, seq: u64) -> io::Result<()> {
        self.0.write_all_at(&seq.to_le_bytes(), u64::from(id) * ENTRY + 8)
    }

    fn number(&self, id: u32, field: u64) -> io::Result<u64> {
        let mut bytes = [0u8; 8];
        self.0.read_exact_at(&mut bytes, u64::from(id) * ENTRY + field)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
