//! The log: where it goes, how it is written, how much of it.
//!
//! A message that comes again and again, word for word, is written a few times a minute; the others are counted, and
//! the count is written ([`tell_repeats`]). Messages that differ, in a path for instance, are never left out.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::Event;
use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use super::control;
use crate::config::keys::name_of;
use crate::config::options::Options;
use crate::config::service::{Level, LogFormat, Service};
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
    let log = tracing_subscriber::registry().with(filter).with(Limit);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    let started = match service.log_format {
        LogFormat::Text => log.with(lines.fmt_fields(Plain)).try_init(),
        LogFormat::Json => log.with(lines.json().flatten_event(true)).try_init(),
        LogFormat::Journald => log.with(journal()?).try_init(),
    };
    started.map_err(|e| failed(Exit::Internal, "cannot start the log", e, "report this"))?;
    // Fails only when a log was there before, and then `try_init` did.
    drop(FILTER.set(handle));
    Ok(())
}

fn journal() -> Result<tracing_journald::Layer> {
    let unusable = |e| {
        let action = "choose another with -o log_format=text";
        failed(Exit::System, "cannot reach the journal of systemd", e, action)
    };
    Ok(tracing_journald::layer().map_err(unusable)?.with_syslog_identifier("fsys-mount".into()))
}

/// Writes how often the messages came that were left out; call it now and then.
pub fn tell_repeats() {
    // The lock is not held while they are written.
    for (n, text) in REPEATS.take(Instant::now()) {
        tracing::warn!(repeats = n, "came again and was left out: {text}");
    }
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

/// So many times a message is written in [`REPEAT_TIME`].
const REPEATS_SHOWN: u32 = 5;
const REPEAT_TIME: Duration = Duration::from_secs(60);
/// Messages that are told apart; when there are more, all are written.
const MESSAGES_MAX: usize = 1024;

static REPEATS: LazyLock<Repeats> = LazyLock::new(Repeats::default);

/// Which messages came, in a time.
#[derive(Debug, Default)]
struct Repeats(Mutex<HashMap<u64, Message>>);

#[derive(Debug)]
struct Message {
    since: Instant,
    shown: u32,
    left_out: u64,
    text: String,
}

impl Repeats {
    /// Whether a message is to be written.
    fn pass(&self, text: impl FnOnce() -> String, hash: u64, now: Instant) -> bool {
        let mut messages = self.0.lock();
        if let Some(m) = messages.get_mut(&hash) {
            if now.saturating_duration_since(m.since) >= REPEAT_TIME && m.left_out == 0 {
                (m.since, m.shown) = (now, 0);
            }
            if m.shown == REPEATS_SHOWN {
                m.left_out += 1;
                return false;
            }
            m.shown += 1;
        } else if messages.len() < MESSAGES_MAX {
            messages.insert(hash, Message { since: now, shown: 1, left_out: 0, text: text() });
        }
        true
    }

    /// Forgets the messages whose time is over; gives those that were left out, and how often.
    fn take(&self, now: Instant) -> Vec<(u64, String)> {
        let mut messages = self.0.lock();
        let over = |m: &Message| now.saturating_duration_since(m.since) >= REPEAT_TIME;
        let old: Vec<u64> = messages.iter().filter(|(_, m)| over(m)).map(|(hash, _)| *hash).collect();
        let old = old.into_iter().filter_map(|hash| messages.remove(&hash)).filter(|m| m.left_out > 0);
        old.map(|m| (m.left_out, m.text)).collect()
    }
}

/// [`REPEATS`] as a layer.
struct Limit;

impl<S: tracing::Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let mut words = Words::default();
        event.record(&mut words);
        let mut hash = DefaultHasher::new();
        (event.metadata().callsite(), &words.0).hash(&mut hash);
        REPEATS.pass(|| words.0, hash.finish(), Instant::now())
    }
}

/// A message with its fields. Names of files are in them: a line break in one begins no line that looks like another
/// message, and an escape sequence says nothing to a terminal.
#[derive(Default)]
struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let space = if self.0.is_empty() { "" } else { " " };
        let value = format!("{value:?}");
        let word = match field.name() {
            // What the library `log` adds about where it was said.
            name if name.starts_with("log.") => return,
            // The lines of a cause, an effect, an action are indented.
            "message" => {
                let lines: Vec<_> = value.split('\n').map(visible).collect();
                format!("{space}{}", lines.join("\n  ").replace("\n    ", "\n  "))
            }
            name => format!("{space}{name}={}", visible(&value)),
        };
        self.0.push_str(&word);
    }
}

fn visible(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

/// [`Words`] as the text of a line.
struct Plain;

impl<'w> FormatFields<'w> for Plain {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> std::fmt::Result {
        let mut words = Words::default();
        fields.record(&mut words);
        writer.write_str(&words.0)
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
    fn a_message_that_comes_again_and_again_is_counted() {
        let (r, start) = (Repeats::default(), Instant::now());
        let say = |hash: u64, at: Instant| r.pass(|| format!("message {hash}"), hash, at);
        let passed = (0..100).filter(|_| say(1, start)).count();
        assert_eq!(passed, REPEATS_SHOWN as usize);
        assert!(say(2, start), "another one is not left out");
        assert!(r.take(start).is_empty(), "its time is not over");
        assert_eq!(r.take(start + REPEAT_TIME), [(100 - u64::from(REPEATS_SHOWN), "message 1".to_owned())]);
        assert!(say(1, start + REPEAT_TIME), "a new time begins");
        // A bound, at which all are written.
        (0..2 * MESSAGES_MAX as u64).for_each(|n| assert!(say(10 + n, start)));
        assert!(r.0.lock().len() <= MESSAGES_MAX);
        assert!((0..100).all(|_| say(u64::MAX, start)));
    }

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
