//! The life cycle of a mount: check, detach what is dead, lock, recover, start, ready, wait, drain, unmount.
//!
//! Knows the file system only as [`Volume`] and [`Session`]. Invariants: recovery is complete before the mount
//! can be seen; ready is said only when the mount answers; whatever ends it, everything acknowledged is drained
//! first.

pub mod check;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod launch;
pub mod live;
pub mod log;
pub mod process;
pub mod scrape;
pub mod service;
pub mod table;
pub mod unmount;
pub mod volume;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::process::Resource;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::config::options::Options;
use crate::engine::layout::{Holder, Layout, LockNote};
use crate::engine::recover::recover;
use crate::error::{Errno, Error, Exit, Result};
use control::{Answer, Server, answer, not_drained};
use daemon::Starter;
use live::Live;
use service::{Beat, drain_at_end, notify};
use table::Mounted;
use volume::{Launch, Launcher, Session, Volume};

/// The mount must answer within this time after it was made.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// A drain before an unmount may take this long without progress.
const DRAIN_TIME: Duration = Duration::from_secs(60);
/// A daemon that is ending is waited for this long.
const ENDING_TIME: Duration = Duration::from_secs(10);
/// After a detach, programs may use their open files this long.
const GRACE_TIME: Duration = Duration::from_secs(10);

/// What to mount, and how.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The backing directory.
    pub backing: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// Options.
    pub options: Options,
    /// Do not go to the background.
    pub foreground: bool,
    /// Check everything, mount nothing (`mount --fake`).
    pub fake: bool,
    /// Mount in this name space (`mount -N`); paths are looked up there, but for the configuration file and the log.
    pub namespace: Option<PathBuf>,
}

/// Something that the life cycle waits for.
#[derive(Debug)]
pub enum Event {
    /// A signal came.
    Signal(i32),
    /// The session ended: someone unmounted, or the device failed.
    Ended(std::io::Result<()>),
    /// `fsys umount` asked for the end.
    Stop {
        /// Detach although it is in use.
        lazy: bool,
        /// Whom to answer.
        client: UnixStream,
    },
}

/// Mounts and, in the foreground or as the daemon, serves until the end.
///
/// # Errors
/// Why nothing was mounted.
pub fn run(mut request: Request, launcher: Launcher) -> Result<Exit> {
    if let Ok(cwd) = std::env::current_dir() {
        request.options.absolute(&cwd);
        request.mountpoint = cwd.join(&request.mountpoint);
    }
    let config = request.options.config()?;
    if request.fake {
        enter(request.namespace.as_deref())?;
        return check::place(&request.backing, &request.mountpoint).map(|_| Exit::Ok);
    }
    let log_file = log::path(&request.options, &request.mountpoint);
    let mut starter = match Starter::in_child()? {
        Some(child) => child,
        None if request.foreground => Starter::terminal(),
        None => return daemon::background(&log_file),
    };
    let background = starter.is_background();
    let to = if background { Some(log_file.as_path()) } else { request.options.log_file.as_deref() };
    let started = log::start(&config.service, to, background);
    let result = started.and_then(|()| serve(&request, config, launcher, &mut starter));
    match result {
        // The parent says it; here it belongs into the log.
        Err(e) if background => {
            tracing::error!("{e}");
            starter.failed(&e);
            Ok(e.exit)
        }
        result => result,
    }
}

/// Enters a mount name space. Only while there is one thread: each has its own.
fn enter(namespace: Option<&Path>) -> Result<()> {
    let Some(path) = namespace else { return Ok(()) };
    let enter = || {
        let file = std::fs::File::open(path)?;
        Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Mount))?)
    };
    enter().map_err(|e: std::io::Error| system(&format!("cannot enter the mount name space {}", path.display()), e))
}

fn serve(request: &Request, config: Config, launcher: Launcher, starter: &mut Starter) -> Result<Exit> {
    enter(request.namespace.as_deref())?;
    let place = check::place(&request.backing, &request.mountpoint)?;
    place.notes.iter().for_each(|n| starter.note(n));
    doctor::concerns(&place.backing).iter().for_each(|f| starter.note(&f.note()));
    let layout = lock(&place.backing)?;
    let note = layout.note().map_err(|e| system("cannot keep the lock", e))?;
    let report = recover(&layout, false)?;
    if !report.is_clean() {
        starter.note(&format!("recovery of {}: {report}", place.backing.display()));
    }
    let (events, inbox) = mpsc::channel();
    // Before any thread starts: each has the capabilities of the one that made it.
    prepare_process()?;
    watch_signals(events.clone())?;
    let (root, mountpoint) = (place.backing.as_path(), place.mountpoint.as_path());
    let launch = Launch { root, mountpoint, config: config.clone(), fuse: request.options.fuse.clone(), layout };
    let (volume, session) = launcher(launch)?;
    watch_session(session, events.clone())?;
    let live = Arc::new(Live::new(volume.clone(), request.options.clone(), config));
    let mut running = Running { mountpoint: place.mountpoint.clone(), device: String::new(), volume, live, inbox };
    running.come_up(&place, note.as_ref())?;
    let server = Server::start(&running.device, running.live.clone(), events)
        .map_err(|e| starter.note(&format!("`fsys` will not reach this mount: {e}")))
        .ok();
    if let Some(at) = running.live.metrics_address() {
        match scrape::start(at, running.live.clone()) {
            Ok(at) => tracing::info!("metrics at http://{at}/metrics"),
            Err(e) => starter.note(&format!("no metrics at {at}: {e}; `fsys metrics` has them, and the mount is well")),
        }
    }
    tracing::info!("{} is mounted on {}", place.backing.display(), place.mountpoint.display());
    let status = service::line(&running.live.status());
    notify(&[NotifyState::Ready, NotifyState::MainPid(std::process::id()), NotifyState::Status(&status)]);
    starter.ready();
    let beat = Beat::start(running.live.clone());
    if let Err(e) = &beat {
        tracing::error!("no watchdog and no status for the service manager: cannot start a thread: {e}");
    }
    let (exit, client) = running.until_end();
    drop(beat);
    // The last word is kept: `systemctl status` shows it for as long as the mount is down.
    notify(&[NotifyState::Status(&format!("ended {}", service::line(&running.live.status())))]);
    drop(server);
    if let Some(client) = client {
        let reply = if exit == Exit::Ok { Answer::Done } else { Answer::Error(ended_degraded()) };
        answer(&client, &reply);
    }
    Ok(exit)
}

/// Makes the process independent of who started it.
fn prepare_process() -> Result<()> {
    // A daemon must not keep a directory busy that it merely was started in.
    rustix::process::chdir("/").map_err(|e| system("cannot change to /", e))?;
    // Modes come from the callers, their umask already applied.
    rustix::process::umask(rustix::fs::Mode::empty());
    crate::sys::creds::keep_needed_capabilities().map_err(|e| system("cannot drop capabilities", e))?;
    let files = rustix::process::getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: files.maximum, maximum: files.maximum };
    rustix::process::setrlimit(Resource::Nofile, raised).map_err(|e| system("cannot raise the limit of open files", e))
}

fn watch_signals(events: Sender<Event>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|e| system("cannot watch for signals", e))?;
    spawn("signals", move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })
}

fn watch_session(session: Box<dyn Session>, events: Sender<Event>) -> Result<()> {
    spawn("session", move || {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| session.wait()));
        let ended = ended.unwrap_or_else(|_| Err(std::io::Error::other("it panicked")));
        // Fails only when the life cycle is over already.
        events.send(Event::Ended(ended)).unwrap_or_default();
    })
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map(|_| ()).map_err(|e| system("cannot start a thread", e))
}

/// Opens and locks `.fsys/`. A daemon whose mount is gone is ending; it is waited for, so that a mount right
/// after an umount(8) succeeds.
fn lock(backing: &Path) -> Result<Layout> {
    let busy = match Layout::open(backing) {
        Err(e) if e.exit == Exit::Busy => e,
        result => return result,
    };
    let holder = Layout::inspect(backing)?.and_then(|l| l.holder().cloned());
    match holder {
        Some(holder) if is_ending(&holder) => {
            if let Err(e) = process::wait_gone(holder.pid, ENDING_TIME) {
                tracing::warn!("the daemon that is ending (pid {}) is not gone: {e}", holder.pid);
            }
            Layout::open(backing)
        }
        Some(_) => Err(busy),
        None => Layout::open(backing),
    }
}

/// It mounted once, and nothing is mounted from it any more.
fn is_ending(holder: &Holder) -> bool {
    let mounts = table::read().unwrap_or_default();
    let its = |m: &Mounted| m.is_fsys() && m.device == holder.device && m.mountpoint == holder.mountpoint;
    !holder.device.is_empty() && !mounts.iter().any(its)
}

/// Waits until the mount is in the kernel's table and its root can be looked at.
fn answering(place: &check::Place) -> Result<Mounted> {
    let mountpoint = place.mountpoint.as_path();
    let (sender, answer) = mpsc::channel();
    let path = mountpoint.to_owned();
    // In a thread of its own: a mount that does not answer would hold this one for ever.
    spawn("probe", move || sender.send(check::ask(&path)).unwrap_or_default())?;
    let failed = |why: &dyn std::fmt::Display| {
        let what = format!("the mount on {} does not answer", mountpoint.display());
        Error::new(Exit::Mount, what, why, "it was taken away again; no file was touched", "see the log")
    };
    match answer.recv_timeout(ANSWER_TIME) {
        Ok(Ok(_)) => {}
        Ok(Err(e)) => return Err(failed(&e)),
        Err(_) => return Err(failed(&format!("no answer in {} s", ANSWER_TIME.as_secs()))),
    }
    let mounts = table::read().map_err(|e| failed(&e))?;
    let Some(mounted) = table::at(&mounts, mountpoint).filter(|m| m.is_fsys()) else {
        return Err(failed(&"it is not in the kernel's table of mounts"));
    };
    // Shared bind mounts can carry it there, where the daemon would wait for itself.
    if mounts.iter().any(|m| m.device == mounted.device && m.mountpoint.starts_with(&place.backing)) {
        return Err(failed(&"it also appeared inside the backing directory, by a shared bind mount"));
    }
    Ok(mounted.clone())
}

struct Running {
    mountpoint: PathBuf,
    device: String,
    volume: Arc<dyn Volume>,
    live: Arc<Live>,
    inbox: Receiver<Event>,
}

impl Running {
    /// Makes sure that the mount answers, or takes it away again.
    fn come_up(&mut self, place: &check::Place, note: Option<&LockNote>) -> Result<()> {
        match answering(place) {
            Ok(mounted) => self.device = mounted.device,
            Err(e) => {
                self.give_up();
                return Err(e);
            }
        }
        if let Some(Err(e)) = note.map(|n| n.write(Some((&self.device, &self.mountpoint)))) {
            tracing::warn!("cannot note the mount in the lock file: {e}");
        }
        Ok(())
    }

    /// Serves until a signal, an unmount or a request ends it; the client is the one that asked for it.
    fn until_end(&mut self) -> (Exit, Option<UnixStream>) {
        let (mut asked_by, mut broken) = (None, false);
        while let Ok(event) = self.inbox.recv() {
            match event {
                Event::Signal(SIGHUP) => self.hang_up(),
                Event::Signal(signal) => {
                    tracing::info!("signal {signal}: draining, then unmounting");
                    self.stop_by_signal();
                    break;
                }
                Event::Ended(result) => {
                    broken = result.is_err();
                    self.log_end(result);
                    break;
                }
                Event::Stop { lazy, client } => match self.stop_by_request(lazy, &client) {
                    Ok(()) => {
                        asked_by = Some(client);
                        break;
                    }
                    Err(e) => drop(answer(&client, &Answer::Error(e))),
                },
            }
        }
        notify(&[NotifyState::Stopping]);
        self.volume.shutdown();
        let status = self.volume.status();
        let exit = if status.health == "healthy" { Exit::Ok } else { Exit::Degraded };
        if exit == Exit::Degraded {
            tracing::error!("ended {}: {}", status.health, status.reason);
        }
        (if broken { Exit::Internal } else { exit }, asked_by)
    }

    /// SIGHUP: the log file may have been moved away, the configuration may have been edited.
    fn hang_up(&self) {
        log::reopen();
        if self.live.state().file.is_none() {
            tracing::info!("SIGHUP: the log file is opened again; there is no configuration file to read");
            return;
        }
        let now = NotifyState::monotonic_usec_now().ok();
        notify(&[NotifyState::Reloading].into_iter().chain(now).collect::<Vec<_>>());
        // Logged there, with what to do.
        drop(self.live.reload("SIGHUP"));
        notify(&[NotifyState::Ready]);
    }

    /// A session that broke leaves its mount behind, dead: it is taken away.
    fn log_end(&self, result: std::io::Result<()>) {
        match result.map_err(|e| (e, self.unmount(true))) {
            Ok(()) => tracing::info!("{} was unmounted", self.mountpoint.display()),
            Err((e, Ok(()))) => tracing::error!("the session broke: {e}; the mount is detached"),
            Err((e, Err(left))) => tracing::error!("the session broke: {e}; the mount is dead, detach it: {left}"),
        }
    }

    /// A signal cannot be refused: what is in use is detached.
    fn stop_by_signal(&self) {
        notify(&[NotifyState::Stopping]);
        if let Err(e) = drain_at_end(&self.live, DRAIN_TIME, &mut |_| {}) {
            tracing::error!("{}", not_drained(&e));
        }
        let mut result = self.unmount(false);
        if result.as_ref().is_err_and(|e| Errno::from_io_error(e) == Some(Errno::BUSY)) {
            tracing::warn!("{} is in use: detaching it", self.mountpoint.display());
            result = self.unmount(true);
        }
        match result {
            Ok(()) => self.wait_ended(),
            Err(e) => tracing::error!("cannot unmount {}: {e}", self.mountpoint.display()),
        }
    }

    fn stop_by_request(&self, lazy: bool, client: &UnixStream) -> Result<()> {
        // A client that is gone has still asked for the end.
        let drained = drain_at_end(&self.live, DRAIN_TIME, &mut |left| {
            answer(client, &Answer::Left(left));
        });
        match drained {
            Err(e) if !lazy => return Err(not_drained(&e)),
            Err(e) => tracing::error!("{}", not_drained(&e)),
            Ok(()) => {}
        }
        self.unmount(lazy).map_err(|e| {
            let busy = Errno::from_io_error(&e) == Some(Errno::BUSY);
            Error::new(
                if busy { Exit::Busy } else { Exit::System },
                format!("cannot unmount {}", self.mountpoint.display()),
                if busy { "programs use files or directories in it".into() } else { e.to_string() },
                "it stays mounted; everything acknowledged is durable",
                "end them (`fuser -vm` names them), or use `fsys umount --lazy`",
            )
        })?;
        self.wait_ended();
        Ok(())
    }

    /// Never takes away what someone else mounted over ours.
    fn unmount(&self, lazy: bool) -> std::io::Result<()> {
        let mounts = table::read()?;
        match table::at(&mounts, &self.mountpoint) {
            Some(top) if top.device == self.device => unmount::unmount(&self.mountpoint, lazy),
            Some(_) => Err(std::io::Error::other("another file system is mounted over it")),
            None => Ok(()),
        }
    }

    /// After a detach, the session lives on while files are open, or while another name space has the mount.
    fn wait_ended(&self) {
        let end = Instant::now() + GRACE_TIME;
        loop {
            match self.inbox.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Event::Ended(_)) => return,
                Ok(Event::Stop { client, .. }) => drop(answer(&client, &Answer::Done)),
                Ok(Event::Signal(SIGHUP)) => {}
                Ok(Event::Signal(_)) | Err(_) => {
                    tracing::warn!("files are still open; programs that use them will see ENOTCONN");
                    return;
                }
            }
        }
    }

    /// The mount does not answer: takes it away again.
    fn give_up(&mut self) {
        if let Err(e) = unmount::unmount(&self.mountpoint, true) {
            tracing::error!("cannot detach {}: {e}", self.mountpoint.display());
        }
        self.wait_ended();
        self.volume.shutdown();
    }
}

fn ended_degraded() -> Error {
    Error::new(
        Exit::Degraded,
        "unmounted, but some versions could not be committed",
        "see the daemon's log",
        "the version before stands; the failed ones are under .fsys/failed in the backing directory",
        "look at them (`fsys recover --dry-run BACKING` lists them), then copy or remove them",
    )
}

fn system(what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Exit::System, what, why, "nothing was mounted; no file was touched", "correct what the system names")
}

#[cfg(test)]
pub(crate) mod testing;
