//! Going to the background, without fork in a threaded program: the parent starts this executable again and
//! waits on a pipe, the child's standard output, for what becomes of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Exit, Result};

/// Marks the environment of the child.
const CHILD: &str = "FSYS_MOUNT_IN_BACKGROUND";

/// What the child says, one JSON line each.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    /// For people; not a failure.
    Note(String),
    /// The mount answers.
    Ready,
    /// It will not be mounted.
    Failed(Error),
}

/// Who is told about the start: the waiting parent, or the terminal.
#[derive(Debug)]
pub struct Starter(Option<File>);

impl Starter {
    /// In the foreground: notes go to the log on standard error.
    pub fn terminal() -> Self {
        Self(None)
    }

    /// In the child of [`background`]: leaves the session of the terminal and takes the pipe. `None` elsewhere.
    ///
    /// # Errors
    /// The system refuses.
    pub fn in_child() -> Result<Option<Self>> {
        if std::env::var_os(CHILD).is_none() {
            return Ok(None);
        }
        let take = || -> rustix::io::Result<File> {
            // What else the starter had open is none of the daemon's: it would keep files, pipes and locks busy.
            crate::sys::close_from(3)?;
            let pipe = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
            let null = rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty())?;
            rustix::stdio::dup2_stdout(&null)?;
            rustix::process::setsid()?;
            rustix::thread::set_name(c"fsys-mount")?;
            Ok(File::from(pipe))
        };
        take().map(|pipe| Some(Self(Some(pipe)))).map_err(|e| failed("cannot go to the background", e))
    }

    /// True when a parent waits.
    pub fn is_background(&self) -> bool {
        self.0.is_some()
    }

    /// Something that people should know.
    pub fn note(&mut self, text: &str) {
        tracing::warn!("{text}");
        self.say(&Said::Note(text.to_owned()));
    }

    /// The mount answers: the parent ends with success.
    pub fn ready(&mut self) {
        self.say(&Said::Ready);
        self.0 = None;
    }

    /// It will not be mounted: the parent ends with this error.
    pub fn failed(&mut self, e: &Error) {
        self.say(&Said::Failed(e.clone()));
        self.0 = None;
    }

    fn say(&mut self, said: &Said) {
        let Some(pipe) = &mut self.0 else { return };
        let sent = serde_json::to_string(said).map_err(Into::into).and_then(|line| writeln!(pipe, "{line}"));
        if let Err(e) = sent {
            tracing::warn!("the process that started this one is gone: {e}");
            self.0 = None;
        }
    }
}

/// Starts this program again as a daemon and waits until the mount answers; `log` is named when it dies.
///
/// # Errors
/// The child's own error.
pub fn background(log: &Path) -> Result<Exit> {
    let start = |e| failed("cannot start the daemon", e);
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| start(e.into()))?;
    let mut args = std::env::args_os();
    let mut child = Command::new("/proc/self/exe")
        .arg0(args.next().unwrap_or_else(|| "fsys-mount".into()))
        .args(args)
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(writer)
        .spawn()
        .map_err(start)?;
    for line in BufReader::new(File::from(reader)).lines().map_while(std::io::Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Said::Note(text)) => eprintln!("fsys-mount: {text}"),
            Ok(Said::Ready) => return Ok(Exit::Ok),
            Ok(Said::Failed(e)) => return Err(e),
            Err(e) => return Err(failed("the daemon's report cannot be read", e)),
        }
    }
    let why = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
    let mut e = failed("the daemon ended before the mount answered", why);
    e.action = format!("see its log, {}; then mount again", log.display());
    Err(e)
}

fn failed(what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Exit::Internal, what, why, "nothing is mounted; no file was touched", "run it with -f to see more")
}
