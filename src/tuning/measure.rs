//! Times of flushes on a directory, taken with the calls that the engine makes.

use std::ffi::OsString;
use std::fs::{File, create_dir};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::backend::probe::{Probe, Strategy};
use crate::backend::uring::{Flusher, SyncJob};
use crate::backend::{Backing, Fault};
use crate::config::policy::Method;

/// Batch sizes that are measured; between them a line is drawn.
pub const SIZES: [usize; 5] = [1, 4, 16, 64, 128];
/// Each figure is the mean of at least so many runs, the slowest tenth left out ...
const RUNS_MIN: usize = 10;
/// ... and of as many as fit in this time.
const RUNS_TIME: Duration = Duration::from_millis(250);

/// The time of a group of operations.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Timing {
    /// What was done.
    pub what: String,
    /// Files in the group.
    pub files: usize,
    /// Mean, microseconds.
    pub us: f64,
    /// The slowest run, microseconds.
    pub max_us: f64,
}

/// The cost of a batch by its size: a line between measured points.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BatchCost(pub Vec<(usize, f64)>);

impl BatchCost {
    /// Microseconds that a batch of `n` takes.
    #[allow(clippy::cast_precision_loss)] // sizes of batches
    pub fn us(&self, n: usize) -> f64 {
        let points = &self.0;
        let at = points.iter().position(|p| p.0 >= n).unwrap_or(points.len() - 1).max(1).min(points.len() - 1);
        let ((x0, y0), (x1, y1)) = (points[at - 1], points[at]);
        let slope = (y1 - y0) / (x1 - x0) as f64;
        (y0 + slope * (n as f64 - x0 as f64)).max(y0.min(y1) / 2.0)
    }
}

/// A scratch directory in which batches are committed as the engine commits them.
pub struct Bed {
    backing: Backing,
    dir: OwnedFd,
    size: usize,
}

impl Bed {
    /// In `dir`, which is empty; saves have `size` bytes.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(dir: &Path, size: usize) -> io::Result<Self> {
        let make = |name: &str| -> io::Result<OwnedFd> {
            create_dir(dir.join(name))?;
            File::open(dir.join(name)).map(OwnedFd::from)
        };
        let (staging, failed, files) = (make("staging")?, make("failed")?, make("files")?);
        let backing = Backing::open(File::open(dir)?.into(), staging, failed, None)?;
        Ok(Self { backing, dir: files, size })
    }

    /// What is known about the file system.
    pub fn probe(&self) -> &Probe {
        self.backing.probe()
    }

    /// Stages `n` versions, as programs do before the commit. `direct` writes past the page cache.
    fn stage(&self, n: usize, direct: bool) -> io::Result<Vec<OwnedFd>> {
        // O_DIRECT wants whole sectors.
        let content = vec![b'x'; if direct { self.size.next_multiple_of(4096) } else { self.size }];
        let one = |_| -> io::Result<OwnedFd> {
            let fd = self.backing.open_stage(&self.dir, 0o600)?;
            if direct {
                let fd = self.backing.reopen(fd.as_fd(), (OFlags::RDWR | OFlags::DIRECT).bits() as i32)?;
                self.backing.write_direct(&fd, 0, &content)?;
                return Ok(fd);
            }
            self.backing.write(&fd, 0, &content)?;
            Ok(fd)
        };
        (0..n).map(one).collect()
    }

    /// Commits staged versions by the barriers of `method`, and publishes each over the same names as ever.
    fn commit(&self, stages: &[OwnedFd], method: Method) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = stages.iter().map(AsFd::as_fd).collect();
        let each = |data_only| {
            let jobs: Vec<_> = fds.iter().map(|fd| SyncJob { fd: *fd, data_only }).collect();
            all(self.backing.sync_files(&jobs))
        };
        let whole = method == Method::Auto && self.probe().strategy == Strategy::Syncfs;
        match (method, self.probe().strategy) {
            (Method::Auto, Strategy::OneBarrier) => all(self.backing.write_out(&fds))?,
            (Method::Auto, Strategy::Syncfs) => self.backing.syncfs().map_err(fault)?,
            (Method::Sync, _) => each(false)?,
            _ => each(true)?,
        }
        for (i, fd) in fds.iter().enumerate() {
            let name = OsString::from(format!("file-{i}"));
            self.backing.replace(*fd, &self.backing.temp_name(), &self.dir, &name)?;
        }
        if whole {
            return self.backing.syncfs().map_err(fault);
        }
        all(self.backing.sync_both(&[self.dir.as_fd()], &[]).0)
    }

    /// The cost of whole batches by size.
    ///
    /// # Errors
    /// A call failed; no figure is guessed then.
    pub fn batches(&self, method: Method, sizes: &[usize]) -> io::Result<BatchCost> {
        let cost = |n: &usize| {
            let (us, _) = repeat(|| {
                let stages = self.stage(*n, method == Method::Direct)?;
                timed(|| self.commit(&stages, method))
            })?;
            Ok((*n, us))
        };
        sizes.iter().map(cost).collect::<io::Result<_>>().map(BatchCost)
    }

    /// The ways to flush `n` files, side by side.
    ///
    /// # Errors
    /// A call failed; a way that this file system does not have is left out.
    pub fn flushes(&self, n: usize) -> io::Result<Vec<Timing>> {
        let ring = Flusher::new();
        let ways: [(&str, Flush); 6] = [
            ("fsync, one after another", Flush::InTurn),
            ("fsync side by side, threads", Flush::Group(Flusher::threads_only())),
            ("fsync side by side, io_uring", Flush::Group(ring)),
            ("O_DIRECT, then fdatasync side by side", Flush::Direct(Flusher::new())),
            ("syncfs", Flush::Whole),
            ("sync_file_range, then one directory sync", Flush::WriteOut),
        ];
        let mut found = Vec::new();
        for (what, way) in ways {
            if what.ends_with("io_uring") && matches!(&way, Flush::Group(f) if !f.has_ring()) {
                continue;
            }
            let direct = matches!(way, Flush::Direct(_));
            let timing = repeat(|| {
                let stages = self.stage(n, direct)?;
                // Something for the directory to sync, as a publication would leave it.
                self.backing.replace(stages[0].as_fd(), &self.backing.temp_name(), &self.dir, "group".as_ref())?;
                timed(|| self.flush(&stages, &way))
            });
            match timing {
                Ok((us, max_us)) => found.push(Timing { what: what.into(), files: n, us, max_us }),
                // Some file systems have no O_DIRECT.
                Err(e) if direct && e.kind() == io::ErrorKind::InvalidInput => {}
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }

    fn flush(&self, stages: &[OwnedFd], way: &Flush) -> io::Result<()> {
        let jobs = |data_only| stages.iter().map(move |fd| SyncJob { fd: fd.as_fd(), data_only }).collect::<Vec<_>>();
        match way {
            Flush::InTurn => stages.iter().try_for_each(|fd| Ok(rustix::fs::fsync(fd)?)),
            Flush::Group(flusher) => flusher.sync_all(&jobs(false)).into_iter().try_for_each(|r| Ok(r?)),
            Flush::Direct(flusher) => flusher.sync_all(&jobs(true)).into_iter().try_for_each(|r| Ok(r?)),
            Flush::Whole => self.backing.syncfs().map_err(fault),
            Flush::WriteOut => {
                let fds: Vec<_> = stages.iter().map(AsFd::as_fd).collect();
                all(self.backing.write_out(&fds))?;
                Ok(rustix::fs::fsync(&self.dir)?)
            }
        }
    }
}

enum Flush {
    InTurn,
    Group(Flusher),
    Direct(Flusher),
    Whole,
    WriteOut,
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn fault(f: Fault) -> io::Error {
    f.errno().into()
}

fn all(results: Vec<Result<(), Fault>>) -> io::Result<()> {
    results.into_iter().try_for_each(|r| r.map_err(fault))
}

fn timed(run: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let begun = Instant::now();
    run()?;
    Ok(begun.elapsed())
}

/// Mean without the slowest tenth, and the slowest, in microseconds. A first run is thrown away: it makes the names.
fn repeat(mut run: impl FnMut() -> io::Result<Duration>) -> io::Result<(f64, f64)> {
    run()?;
    let (begun, mut times) = (Instant::now(), Vec::new());
    while times.len() < RUNS_MIN || begun.elapsed() < RUNS_TIME {
        times.push(run()?.as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    let kept = &times[..times.len() - times.len() / 10];
    #[allow(clippy::cast_precision_loss)] // a number of runs
    let mean = kept.iter().sum::<f64>() / kept.len() as f64;
    Ok((mean, times[times.len() - 1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_between_points() {
        let cost = BatchCost(vec![(1, 100.0), (4, 130.0), (16, 250.0)]);
        for (n, us) in [(1, 100.0), (2, 110.0), (4, 130.0), (10, 190.0), (16, 250.0), (26, 350.0)] {
            assert!((cost.us(n) - us).abs() < 1e-6, "{n}: {}", cost.us(n));
        }
    }

    #[test]
    fn every_way_is_timed_and_errors_are_no_figures() {
        let dir = tempfile::tempdir().unwrap();
        let bed = Bed::new(dir.path(), 4096).unwrap();
        let ways = bed.flushes(2).unwrap();
        assert!(ways.len() >= 4 && ways.iter().all(|t| t.us > 0.0 && t.us <= t.max_us), "{ways:?}");
        for method in [Method::Auto, Method::Sync, Method::Data] {
            assert!(bed.batches(method, &[1, 2]).unwrap().us(1) > 0.0);
        }
        assert_eq!(std::fs::read_dir(dir.path().join("staging")).unwrap().count(), 0, "each stage was published");
        assert!(repeat(|| Err(io::Error::other("broken"))).is_err());
    }
}
