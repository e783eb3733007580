//! How far a long measurement is, on standard error; and an interrupt that lets it clean up.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Exit, Result};

/// Steps that are done one after the other.
#[derive(Debug)]
pub struct Progress {
    done: usize,
    total: usize,
    terminal: bool,
    stop: Arc<AtomicBool>,
}

impl Progress {
    /// For `total` steps. From here on an interrupt ends the program at the next step, cleaned up.
    pub fn new(total: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            if let Err(e) = signal_hook::flag::register(signal, stop.clone()) {
                tracing::warn!("signal {signal} will end this at once, and nothing is tidied: {e}");
            }
        }
        Self { done: 0, total, terminal: std::io::stderr().is_terminal(), stop }
    }

    /// The next step begins.
    ///
    /// # Errors
    /// An interrupt came.
    pub fn step(&mut self, what: &str) -> Result<()> {
        self.done += 1;
        let (start, end) = if self.terminal { ("\r\x1b[K", "") } else { ("", "\n") };
        let line = format!("{start}[{}/{}] {what}{end}", self.done, self.total);
        // A closed terminal does not end a measurement.
        std::io::stderr().write_all(line.as_bytes()).unwrap_or_default();
        if self.stop.load(Ordering::Relaxed) {
            let what = "interrupted";
            return Err(Error::new(
                Exit::Usage,
                what,
                "a signal came",
                "what was made for it is removed",
                "run it again",
            ));
        }
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            std::io::stderr().write_all(b"\r\x1b[K").unwrap_or_default();
        }
    }
}
