//! How `fsys` talks to the daemon: a Unix socket, one JSON line each way.
//!
//! The socket is named by the device number of the mount, which every path in the mount leads to. It lies in a
//! directory that only its owner enters; the peer's credentials are checked besides. A client cannot wedge the
//! daemon: requests are bounded in size and time, connections in number.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::Event;
use super::live::{Live, Reloaded};
use super::table::Mounted;
use crate::error::{Error, Exit, Result};
use crate::telemetry::activity::Sample;
use crate::telemetry::{ConfigState, PathReport, Status};

/// Largest request, in bytes; a path has at most 4096.
const REQUEST_MAX: usize = 32 << 10;
/// A request must be complete after this time, and its answer be taken.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// Connections served at the same time.
const CONNECTIONS_MAX: usize = 16;
/// Longest time that a drain may be asked for.
const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);
/// After an accept(2) that failed, for want of descriptors perhaps, the next is tried after this time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// The status.
    Status,
    /// A path relative to the root of the mount, as bytes: names need not be UTF-8.
    Get {
        /// The path.
        path: Vec<u8>,
    },
    /// The metrics, as Prometheus reads them.
    Metrics,
    /// Everything that a live view shows.
    Sample,
    /// Change values, all or none.
    Set {
        /// Names and values.
        values: Vec<(String, String)>,
        /// For the paths that match.
        glob: Option<String>,
    },
    /// `mount -o remount`: change the values that differ from those that the mount was made with.
    Remount {
        /// Names and values, all that stand in fstab among them.
        values: Vec<(String, String)>,
    },
    /// Take changes back, all or none.
    Unset {
        /// Names of the values; empty: every change.
        keys: Vec<String>,
        /// That were made for these paths.
        glob: Option<String>,
    },
    /// The changes that hold.
    Changes,
    /// Read the configuration file again.
    Reload,
    /// Wait until everything acknowledged is durable.
    Drain {
        /// At most this long, in milliseconds.
        timeout_ms: u64,
        /// Tell meanwhile how much is left ([`Answer::Left`]).
        #[serde(default)]
        progress: bool,
    },
    /// Drain, unmount, end. The answer comes when that is done; the process ends right after it.
    Stop {
        /// Detach although it is in use.
        lazy: bool,
    },
}

impl Request {
    /// Reads one line.
    ///
    /// # Errors
    /// It is no request that this version knows.
    pub fn parse(line: &[u8]) -> Result<Self> {
        serde_json::from_slice(line).map_err(|e| refused(e, "use the `fsys` of the same version as the daemon"))
    }
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Get`].
    Path(Box<PathReport>),
    /// To [`Request::Metrics`].
    Metrics(String),
    /// To [`Request::Sample`].
    Sample(Box<Sample>),
    /// To [`Request::Set`], [`Request::Remount`], [`Request::Unset`], [`Request::Changes`].
    Config(Box<ConfigState>),
    /// To [`Request::Reload`].
    Reloaded(Reloaded),
    /// So much is left to do; another answer follows.
    Left(u64),
    /// It is done.
    Done,
    /// It failed.
    Error(Error),
}

/// Where the sockets of the mounts of `user` lie, most likely first.
pub fn socket_dirs(user: u32) -> Vec<PathBuf> {
    let mine = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| user == me()).map(PathBuf::from);
    let runtime = mine.unwrap_or_else(|| PathBuf::from(format!("/run/user/{user}")));
    if user == 0 {
        return vec!["/run/fsys-mount".into()];
    }
    vec![runtime.join("fsys-mount"), PathBuf::from(format!("/tmp/fsys-mount-{user}"))]
}

/// Removes the socket that the daemon of a dead `mount` left; call it while the mount still holds its number.
pub fn remove_left(mount: &Mounted) {
    for dir in socket_dirs(mount.user.unwrap_or(0)) {
        match std::fs::remove_file(dir.join(&mount.device)) {
            Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                tracing::warn!("cannot remove the socket of a dead mount in {}: {e}", dir.display());
            }
            _ => {}
        }
    }
}

/// The directory for this user's sockets and logs, made when missing.
///
/// # Errors
/// None can be made, or the one that is there may be entered by others.
pub fn own_dir() -> io::Result<PathBuf> {
    let mut last = io::Error::from(ErrorKind::NotFound);
    for dir in socket_dirs(me()) {
        match private_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) => last = io::Error::new(e.kind(), format!("{}: {e}", dir.display())),
        }
    }
    Err(last)
}

fn private_dir(dir: &Path) -> io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let meta = std::fs::symlink_metadata(dir)?;
    if !meta.is_dir() || meta.uid() != me() || meta.mode() & 0o077 != 0 {
        return Err(io::Error::new(ErrorKind::PermissionDenied, "not a private directory of this user (mode 0700)"));
    }
    Ok(())
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Serves until it is dropped; then the socket is removed.
///
/// The kernel gives a device number away again as soon as the mount is gone, before its daemon is. So the name
/// may be another daemon's by then: a socket is removed by its inode, under a lock on the directory.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    inode: u64,
}

impl Server {
    /// Binds the socket for the mount with this device number and serves it from a thread of its own.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(device: &str, live: Arc<Live>, events: Sender<Event>) -> io::Result<Self> {
        let dir = own_dir()?;
        let path = dir.join(device);
        let _lock = lock(&dir)?;
        // The device number is ours now, so a socket of that name belongs to a daemon that is gone or ending.
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let inode = std::fs::symlink_metadata(&path)?.ino();
        std::thread::Builder::new().name("control".into()).spawn(move || accept(&listener, &live, &events))?;
        Ok(Self { path, inode })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let remove = || -> io::Result<()> {
            let _lock = lock(self.path.parent().unwrap_or(Path::new("/")))?;
            match std::fs::symlink_metadata(&self.path) {
                Ok(meta) if meta.ino() == self.inode => std::fs::remove_file(&self.path),
                _ => Ok(()),
            }
        };
        if let Err(e) = remove() {
            tracing::warn!("cannot remove the control socket {}: {e}", self.path.display());
        }
    }
}

/// Held while a name in the directory is checked and changed.
fn lock(dir: &Path) -> io::Result<File> {
    let dir = File::open(dir)?;
    rustix::fs::flock(&dir, FlockOperation::LockExclusive)?;
    Ok(dir)
}

fn accept(listener: &UnixListener, live: &Arc<Live>, events: &Sender<Event>) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                tracing::warn!("control socket: {e}");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let Some(slot) = Slot::take(&open) else {
            answer(&stream, &Answer::Error(refused("too many requests at the same time", "try again")));
            continue;
        };
        let (live, events) = (live.clone(), events.clone());
        let serve = move || {
            let _slot = slot;
            serve(stream, &live, &events);
        };
        if let Err(e) = std::thread::Builder::new().name("control-client".into()).spawn(serve) {
            tracing::warn!("control socket: {e}");
        }
    }
}

/// One of [`CONNECTIONS_MAX`] places; given back when dropped, also by a panic.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Option<Self> {
        let slot = Self(open.clone());
        (open.fetch_add(1, Ordering::Relaxed) < CONNECTIONS_MAX).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(stream: UnixStream, live: &Live, events: &Sender<Event>) {
    let reply = match allowed(&stream).and_then(|by| Ok((by, request(&stream)?))) {
        Ok((_, Request::Stop { lazy })) => {
            if events.send(Event::Stop { lazy, client: stream }).is_err() {
                tracing::warn!("a stop came while the daemon was ending");
            }
            return;
        }
        Ok((by, request)) => handle(request, live, &by, &stream),
        Err(e) => Answer::Error(e),
    };
    answer(&stream, &reply);
}

/// Who asks, for the log, if that one may.
fn allowed(stream: &UnixStream) -> Result<String> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|e| refused(e, "try again"))?;
    let uid = peer.uid.as_raw();
    if uid != 0 && uid != me() {
        return Err(refused(format!("user {uid} may not control this mount"), "ask the user who mounted it, or root"));
    }
    Ok(format!("user {uid}, pid {}", peer.pid.as_raw_nonzero()))
}

fn request(stream: &UnixStream) -> Result<Request> {
    let line = read_line(stream).map_err(|e| refused(e, "send one JSON line"))?;
    Request::parse(&line)
}

fn read_line(mut stream: &UnixStream) -> io::Result<Vec<u8>> {
    let end = Instant::now() + REQUEST_TIME;
    let (mut line, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, "the request did not come in time"));
        }
        stream.set_read_timeout(Some(left))?;
        let n = stream.read(&mut part)?;
        line.extend_from_slice(&part[..n]);
        if n == 0 || line.ends_with(b"\n") {
            return Ok(line);
        }
        if line.len() > REQUEST_MAX {
            return Err(io::Error::new(ErrorKind::InvalidData, "the request is too large"));
        }
    }
}

fn handle(request: Request, live: &Live, by: &str, stream: &UnixStream) -> Answer {
    tracing::debug!(by, ?request, "asked over the control socket");
    let volume = live.volume();
    let config = |r: Result<()>| r.map_or_else(Answer::Error, |()| Answer::Config(Box::new(live.state())));
    match request {
        Request::Status => Answer::Status(Box::new(live.status())),
        Request::Metrics => Answer::Metrics(live.metrics()),
        Request::Sample => Answer::Sample(Box::new(live.sample())),
        Request::Set { values, glob } => config(live.set(&values, glob.as_deref(), by)),
        Request::Remount { values } => config(live.remount(&values, by)),
        Request::Unset { keys, glob } => config(live.unset(&keys, glob.as_deref(), by)),
        Request::Changes => config(Ok(())),
        Request::Reload => live.reload(by).map_or_else(Answer::Error, Answer::Reloaded),
        Request::Get { path } => {
            let path = PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(path));
            match volume.report(&path) {
                Ok(report) => Answer::Path(Box::new(report)),
                Err(e) => Answer::Error(Error::new(
                    Exit::System,
                    format!("cannot look at {}", path.display()),
                    e,
                    "nothing was changed",
                    "check the path",
                )),
            }
        }
        Request::Drain { timeout_ms, progress } => {
            let mut told = |left| !progress || answer(stream, &Answer::Left(left));
            match volume.drain(Duration::from_millis(timeout_ms).min(DRAIN_MAX), &mut told) {
                Ok(()) => Answer::Done,
                Err(e) => Answer::Error(not_drained(&e)),
            }
        }
        // Taken out before: it is the life cycle's to answer.
        Request::Stop { .. } => Answer::Error(refused("a stop cannot be answered here", "report this")),
    }
}

/// The error of a drain that did not reach its end.
pub fn not_drained(e: &super::volume::DrainError) -> Error {
    Error::new(
        Exit::Degraded,
        "not everything is durable",
        e,
        "the backing directory holds the last committed version of every file; newer ones are only in the mount",
        "see `fsys status` for the reason; then `fsys drain` again",
    )
}

/// Sends an answer; a client that is gone or does not read is given up after 5 s. False when it did not take it.
pub fn answer(mut stream: &UnixStream, reply: &Answer) -> bool {
    let mut send = || -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        stream.set_write_timeout(Some(REQUEST_TIME))?;
        stream.write_all(&line)
    };
    let sent = send();
    if let Err(e) = &sent {
        tracing::debug!("a control client did not take its answer: {e}");
    }
    sent.is_ok()
}

fn refused(why: impl std::fmt::Display, action: &str) -> Error {
    Error::new(Exit::System, "the daemon did not take the request", why, "nothing was changed", action)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::sync::mpsc;

    use super::super::testing::Fake;
    use super::*;
    use crate::config::Config;
    use crate::config::options::Options;

    fn server(name: &str) -> (Server, mpsc::Receiver<Event>, PathBuf) {
        let (sender, inbox) = mpsc::channel();
        let name = format!("test-{}-{name}", std::process::id());
        let live = Live::new(Arc::new(Fake), Options::default(), Config::default());
        let server = Server::start(&name, Arc::new(live), sender).unwrap();
        let path = server.path.clone();
        (server, inbox, path)
    }

    fn ask(path: &Path, bytes: &[u8]) -> Answer {
        let mut stream = UnixStream::connect(path).unwrap();
        match stream.write_all(bytes) {
            // Refused before it was read, with an answer.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            r => r.unwrap(),
        }
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn error(answer: Answer) -> Error {
        match answer {
            Answer::Error(e) => e,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_each_request() {
        let (server, inbox, path) = server("each");
        assert!(matches!(ask(&path, b"\"status\"\n"), Answer::Status(s) if s.health == "healthy"));
        assert!(matches!(ask(&path, b"{\"get\":{\"path\":[97,255]}}\n"), Answer::Path(p) if p.path == "a\u{fffd}"));
        assert!(error(ask(&path, b"{\"get\":{\"path\":[110,111]}}\n")).what.contains("no"));
        assert_eq!(ask(&path, b"{\"drain\":{\"timeout_ms\":1000}}\n"), Answer::Done);
        let late = error(ask(&path, b"{\"drain\":{\"timeout_ms\":1}}\n"));
        let told = ask(&path, b"{\"drain\":{\"timeout_ms\":1000,\"progress\":true}}\n");
        assert_eq!(told, Answer::Left(3));
        assert!(late.exit == Exit::Degraded && late.why.contains("3 version(s)"), "{late}");
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"{\"stop\":{\"lazy\":true}}\n").unwrap();
        assert!(matches!(inbox.recv().unwrap(), Event::Stop { lazy: true, .. }));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn survives_nonsense_and_silence() {
        let (_server, _inbox, path) = server("hostile");
        assert!(error(ask(&path, b"{\"explode\":1}\n")).action.contains("same version"));
        assert!(error(ask(&path, b"\xff\n")).what.contains("did not take"));
        // As much as is read before the refusal: what stays unread would reset the connection under the answer.
        assert!(error(ask(&path, &vec![b'x'; REQUEST_MAX + 1])).why.contains("too large"));
        let silent: Vec<_> = (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(error(ask(&path, b"\"status\"\n")).why.contains("too many"));
        drop(silent);
        // The places come free as the daemon notices; each try is answered.
        while !matches!(ask(&path, b"\"status\"\n"), Answer::Status(_)) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_socket_that_a_kill_left_is_replaced() {
        let (first, _a, path) = server("left");
        let (second, _b, same) = server("left");
        assert_eq!(path, same);
        // One that ends late does not take the name from the one that has it now.
        drop(first);
        assert!(matches!(ask(&path, b"\"status\"\n"), Answer::Status(_)));
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        std::fs::DirBuilder::new().mode(0o755).create(&open).unwrap();
        assert!(private_dir(&open).is_err());
        private_dir(&dir.path().join("new")).unwrap();
    }
}
