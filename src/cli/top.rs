//! `fsys top`: what a mount does, live.

mod view;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossterm::event::{self, Event, KeyCode, KeyModifiers};
use crossterm::{cursor, execute, queue, style, terminal};

use super::Output;
use super::client::{Daemon, find, strange};
use crate::error::{Error, Exit, Result};
use crate::mount::control::{Answer, Request};
use crate::mount::table::Mounted;
use crate::telemetry::activity::Sample;
use view::View;

/// How long a signal or a key may wait.
const POLL: Duration = Duration::from_millis(100);

const EXAMPLE: &str = "Examples:
  fsys top
  fsys top --interval 0.5 /mnt/fsys
  fsys top --once                    # one look, without a terminal
  fsys top --json | jq .files        # the same for programs

Shows saves and flushes each second, how many saves share a flush, how long saves take and at which step, the queue,
and the busiest and slowest files with the process behind them. q quits.";

/// Show live what a mount does, and who makes it work
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Seconds between two looks, 0.1 to 3600
    #[arg(long, value_name = "SECS", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
    /// Look once, for one interval, and print it
    #[arg(long)]
    once: bool,
    /// For programs; looks once
    #[arg(long)]
    json: bool,
    /// The mount; not needed when there is one
    mount: Option<PathBuf>,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(secs) if (0.1..=3600.0).contains(&secs) => Ok(secs),
        _ => Err("0.1 to 3600".into()),
    }
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mount = find(args.mount.as_deref())?;
    let interval = Duration::from_secs_f64(args.interval);
    if args.once || args.json {
        let before = sample(&mount)?;
        std::thread::sleep(interval);
        let view = View::between(&before, &sample(&mount)?);
        return Output::new(args.json, &view, || view.lines(100, 60).join("\n"));
    }
    if !io::stdout().is_terminal() {
        let action = "use --once, or --json for programs";
        return Err(Error::new(Exit::Usage, "cannot show a live view", "no terminal", "nothing was changed", action));
    }
    watch(&mount, interval)?;
    Ok(Output { text: String::new(), exit: Exit::Ok })
}

fn sample(mount: &Mounted) -> Result<Sample> {
    match Daemon::of(mount)?.ask(&Request::Sample, Duration::ZERO)? {
        Answer::Sample(sample) => Ok(*sample),
        other => Err(strange(&other)),
    }
}

fn watch(mount: &Mounted, interval: Duration) -> Result<()> {
    let mut before = sample(mount)?;
    // A view of no time: something to see at once.
    let mut view = View::between(&before, &before);
    let screen = Screen::open().map_err(terminal_failed)?;
    loop {
        Screen::draw(&view).map_err(terminal_failed)?;
        if screen.wait(interval, &view).map_err(terminal_failed)? {
            return Ok(());
        }
        let now = sample(mount)?;
        view = View::between(&before, &now);
        before = now;
    }
}

fn terminal_failed(e: io::Error) -> Error {
    Error::new(Exit::System, "cannot use the terminal", e, "nothing was changed", "use `fsys top --once`")
}

/// The terminal, as it was again when this is dropped.
struct Screen {
    ended: Arc<AtomicBool>,
}

impl Screen {
    fn open() -> io::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
            signal_hook::flag::register(signal, ended.clone())?;
        }
        terminal::enable_raw_mode()?;
        let screen = Self { ended };
        execute!(io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }

    fn draw(view: &View) -> io::Result<()> {
        let (width, height) = terminal::size()?;
        let mut out = io::stdout().lock();
        queue!(out, terminal::BeginSynchronizedUpdate, cursor::MoveTo(0, 0))?;
        for (y, line) in view.lines(width.into(), height.into()).iter().enumerate() {
            queue!(out, cursor::MoveTo(0, y as u16), style::Print(line))?;
            queue!(out, terminal::Clear(terminal::ClearType::UntilNewLine))?;
        }
        queue!(out, terminal::Clear(terminal::ClearType::FromCursorDown), terminal::EndSynchronizedUpdate)?;
        out.flush()
    }

    /// Waits for the time of the next look; true when it is to end.
    fn wait(&self, interval: Duration, view: &View) -> io::Result<bool> {
        let next = Instant::now() + interval;
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if self.ended.load(Ordering::Relaxed) {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            if !event::poll(left.min(POLL))? {
                continue;
            }
            match event::read()? {
                Event::Key(key) if quits(key.code, key.modifiers) => return Ok(true),
                Event::Resize(..) => Self::draw(view)?,
                _ => {}
            }
        }
    }
}

fn quits(key: KeyCode, with: KeyModifiers) -> bool {
    let control = with.contains(KeyModifiers::CONTROL);
    matches!(key, KeyCode::Char('q') | KeyCode::Esc) || control && matches!(key, KeyCode::Char('c'))
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone; there is nobody to tell.
        drop(execute!(io::stdout(), cursor::Show, terminal::LeaveAlternateScreen));
        drop(terminal::disable_raw_mode());
    }
}
