//! A few threads for what must not hold up the threads that serve the kernel: calls that waited for a commit.

use std::io;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};
use parking_lot::Mutex;

use super::file::Parked;

/// The threads. Their queue has no bound of its own: every entry is a system call of a program that waits for it.
#[derive(Debug)]
pub struct Workers {
    tx: Mutex<Option<Sender<Parked>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Workers {
    /// Starts `n` threads.
    pub fn start(n: usize) -> io::Result<Self> {
        let (tx, rx) = unbounded::<Parked>();
        let spawn = |i| {
            let rx = rx.clone();
            std::thread::Builder::new().name(format!("worker-{i}")).spawn(move || {
                for work in rx {
                    if let Err(fault) = crate::backend::contain(|| {
                        work();
                        Ok(())
                    }) {
                        tracing::error!(%fault, "a waiting call failed; its program got EIO");
                    }
                }
            })
        };
        let threads = (0..n).map(spawn).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { tx: Mutex::new(Some(tx)), threads: Mutex::new(threads) })
    }

    /// Queues work. After [`Workers::stop`] it is dropped, which answers EIO.
    pub fn run(&self, work: Parked) {
        if let Some(tx) = &*self.tx.lock() {
            // The receivers live until the sender is gone.
            drop(tx.send(work));
        }
    }

    /// Runs what is queued and ends the threads.
    pub fn stop(&self) {
        self.tx.lock().take();
        for t in self.threads.lock().drain(..) {
            if t.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}
