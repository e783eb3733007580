//! Threads for what must not hold up the threads that serve the kernel: calls that waited for a commit, and calls that
//! wait for the device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use super::file::Parked;

/// The threads. Their queue has no bound of its own: every entry is a system call of a program that waits for it.
#[derive(Debug)]
pub struct Workers {
    name: &'static str,
    most: usize,
    tx: Mutex<Option<Sender<Parked>>>,
    rx: Receiver<Parked>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Threads that wait for work, less the work that waits for them.
    free: Arc<AtomicIsize>,
}

impl Workers {
    /// Starts `least` threads, at least one; up to `most` are started when all have something to do, and stay.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(name: &'static str, least: usize, most: usize) -> io::Result<Self> {
        let (tx, rx) = unbounded::<Parked>();
        let free = Arc::new(AtomicIsize::new(0));
        let workers = Self { name, most, tx: Mutex::new(Some(tx)), rx, threads: Mutex::default(), free };
        for _ in 0..least.max(1) {
            workers.grow()?;
        }
        Ok(workers)
    }

    fn grow(&self) -> io::Result<()> {
        let mut threads = self.threads.lock();
        if threads.len() >= self.most || self.tx.lock().is_none() {
            return Ok(());
        }
        let (rx, free) = (self.rx.clone(), self.free.clone());
        let body = move || {
            loop {
                free.fetch_add(1, Ordering::AcqRel);
                let Ok(work) = rx.recv() else { return };
                if let Err(fault) = crate::backend::contain(|| {
                    work();
                    Ok(())
                }) {
                    tracing::error!(%fault, "a waiting call failed; its program got EIO");
                }
            }
        };
        let name = format!("{}-{}", self.name, threads.len());
        threads.push(std::thread::Builder::new().name(name).spawn(body)?);
        Ok(())
    }

    /// Queues work. After [`Workers::stop`] it is dropped, which answers EIO; false then.
    pub fn run(&self, work: Parked) -> bool {
        let Some(tx) = self.tx.lock().clone() else { return false };
        // The receivers live until the sender is gone.
        drop(tx.send(work));
        // Without one more, those that there are do it a little later.
        if self.free.fetch_sub(1, Ordering::AcqRel) <= 0
            && let Err(e) = self.grow()
        {
            tracing::debug!(error = %e, "no further thread");
        }
        true
    }

    /// Runs what is queued and ends the threads.
    pub fn stop(&self) {
        self.tx.lock().take();
        let threads = std::mem::take(&mut *self.threads.lock());
        for t in threads {
            if t.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn there_are_as_many_threads_as_wait_at_once_and_no_more_than_allowed() {
        let workers = Workers::start("test", 1, 3).unwrap();
        let (began_tx, began) = channel();
        let (go, going) = crossbeam_channel::unbounded::<()>();
        for _ in 0..5 {
            let (began_tx, going) = (began_tx.clone(), going.clone());
            workers.run(Box::new(move || {
                began_tx.send(()).unwrap();
                going.recv().unwrap();
            }));
        }
        let soon = Duration::from_secs(20);
        (0..3).for_each(|_| began.recv_timeout(soon).unwrap());
        assert!(began.recv_timeout(Duration::from_millis(20)).is_err(), "three at once");
        (0..5).for_each(|_| go.send(()).unwrap());
        (0..2).for_each(|_| began.recv_timeout(soon).unwrap());
        workers.stop();
        assert!(workers.threads.lock().is_empty());
        workers.run(Box::new(|| unreachable!("it has ended")));
    }
}
