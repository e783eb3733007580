//! The log: where it goes, how it is written, how much of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use super::control;
use crate::config::keys::name_of;
use crate::config::options::Options;
use crate::config::service::{Level, Service};
use crate::error::{Error, Exit, Result};

/// There is one log in a process.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();
static FILE: OnceLock<LogFile> = OnceLock::new();

/// The file that a daemon logs to: `log_file=`, or one named after the mount point in the runtime directory.
pub fn path(options: &Options, mountpoint: &Path) -> PathBuf {
    let name = mountpoint.to_string_lossy().trim_matches('/').replace('/', "-");
    options.log_file.clone().unwrap_or_else(|| {
        let dir = control::socket_dirs(rustix::process::geteuid().as_raw()).remove(0);
        control::own_dir().unwrap_or(dir).join(format!("{name}.log"))
    })
}

/// Sets up the log: to the file at `to`, or to standard error. A daemon's standard error, where a panic speaks,
/// goes to the same file.
///
/// # Errors
/// The file cannot be opened.
pub fn start(service: &Service, to: Option<&Path>, background: bool) -> Result<()> {
    let writer = match to {
        Some(path) => {
            let file = LogFile::open(path, background).map_err(|e| unusable(path, &e))?;
            BoxMakeWriter::new(FILE.get_or_init(|| file).clone())
        }
        None => BoxMakeWriter::new(io::stderr),
    };
    let (filter, handle) = reload::Layer::new(filter(service.log));
    let log = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    log.with(lines).try_init().map_err(|e| failed(Exit::Internal, "cannot start the log", e, "report this"))?;
    // Fails only when a log was there before, and then `try_init` did.
    drop(FILTER.set(handle));
    Ok(())
}

/// Changes the least severe level that is logged.
pub fn set_level(level: Level) {
    if let Some(Err(e)) = FILTER.get().map(|f| f.reload(filter(level))) {
        tracing::error!("the log level cannot be changed: {e}");
    }
}

/// Opens the log file again, by its name: it may have been moved away (logrotate).
pub fn reopen() {
    if let Some(Err(e)) = FILE.get().map(LogFile::reopen) {
        tracing::error!("the log file cannot be opened again, the log goes on in the old one: {e}");
    }
}

fn filter(level: Level) -> EnvFilter {
    let name = name_of(&level);
    EnvFilter::new(match level {
        // Below debug, what the FUSE library has to say is not for the people who run this.
        Level::Debug | Level::Trace => name,
        _ => format!("{name},fuser=error"),
    })
}

/// A log file that can be opened again.
#[derive(Debug, Clone)]
struct LogFile {
    path: PathBuf,
    file: Arc<Mutex<File>>,
    /// Standard error goes there too.
    stderr: bool,
}

impl LogFile {
    fn open(path: &Path, stderr: bool) -> io::Result<Self> {
        let file = append_to(path, stderr)?;
        Ok(Self { path: path.to_owned(), file: Arc::new(Mutex::new(file)), stderr })
    }

    fn reopen(&self) -> io::Result<()> {
        *self.file.lock() = append_to(&self.path, self.stderr)?;
        Ok(())
    }
}

fn append_to(path: &Path, stderr: bool) -> io::Result<File> {
    let nofollow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    let mut open = OpenOptions::new();
    let file = open.create(true).append(true).mode(0o600).custom_flags(nofollow).open(path)?;
    if stderr {
        rustix::stdio::dup2_stderr(&file)?;
    }
    Ok(file)
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.file.lock().write(line)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for LogFile {
    type Writer = &'a LogFile;
    fn make_writer(&'a self) -> &'a LogFile {
        self
    }
}

fn unusable(path: &Path, e: &io::Error) -> Error {
    let what = format!("cannot write the log {}", path.display());
    failed(Exit::System, &what, e, "correct the path, or choose another with -o log_file=FILE")
}

fn failed(exit: Exit, what: &str, why: impl std::fmt::Display, action: &str) -> Error {
    Error::new(exit, what, why, "nothing is mounted; no file was touched", action)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_moved_away_is_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("log"), dir.path().join("log.1"));
        let log = LogFile::open(&path, false).unwrap();
        (&log).write_all(b"one\n").unwrap();
        std::fs::rename(&path, &old).unwrap();
        (&log).write_all(b"two\n").unwrap();
        log.reopen().unwrap();
        (&log).write_all(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(old).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "three\n");
    }
}
