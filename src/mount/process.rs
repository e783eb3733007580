//! Waiting for the end of a process that is not a child.

use std::io::{self, ErrorKind};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::Errno;

/// A process, held so that its number cannot come to mean another one.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Holds the process with this id; `None` when there is none.
    ///
    /// # Errors
    /// The system refuses.
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self(fd))),
            Err(Errno::SRCH) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until it has ended and its files are closed.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`].
    pub fn wait(&self, time: Duration) -> io::Result<()> {
        let limit = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit))? {
            0 => Err(io::Error::new(ErrorKind::TimedOut, "it still runs")),
            _ => Ok(()),
        }
    }
}

/// Waits until the process with this id has ended.
///
/// # Errors
/// As [`Process::wait`].
pub fn wait_gone(pid: u32, time: Duration) -> io::Result<()> {
    Process::open(pid)?.map_or(Ok(()), |process| process.wait(time))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn waits_for_the_end_and_not_longer() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap().unwrap();
        assert_eq!(process.wait(Duration::from_millis(1)).unwrap_err().kind(), ErrorKind::TimedOut);
        child.kill().unwrap();
        process.wait(Duration::from_secs(60)).unwrap();
        child.wait().unwrap();
        wait_gone(child.id(), Duration::ZERO).unwrap();
    }
}
