//! Programs that save, as threads: each rewrites a few files of its own, in the way that is asked for.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Files of each writer, saved again and again.
const FILES: u64 = 4;

/// Makes the names of new files new in each run.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// How a program saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// open(O_TRUNC), write, close: what most programs do.
    Rewrite,
    /// The same with an fsync before the close.
    Fsync,
    /// A new file each time, and never again: what unpacking, builds and deliveries do.
    Create,
    /// A temporary file, fsync, rename over the old one, fsync of the directory: the proper sequence.
    Rename,
}

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Programs that save at the same time.
    pub writers: usize,
    /// Bytes of a save.
    pub size: usize,
    /// How they save.
    pub style: Style,
}

/// What a workload did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Saves.
    pub saves: u64,
    /// Saves in a second, of all writers together.
    pub per_s: f64,
    /// Median of the time of a save.
    pub p50_us: u64,
    /// 99 % of the saves took no longer.
    pub p99_us: u64,
}

/// Runs the workload in `dir` for `time`, or until each writer has done `most` saves. New files are removed afterwards.
///
/// # Errors
/// The first error that a writer met.
pub fn run(dir: &Path, shape: &Shape, time: Duration, most: u64) -> io::Result<Sample> {
    let content = vec![b'x'; shape.size];
    let number = RUNS.fetch_add(1, Ordering::Relaxed);
    let start = Barrier::new(shape.writers + 1);
    let (results, begun) = std::thread::scope(|s| {
        let writer = |w: usize| {
            let (content, start) = (&content, &start);
            move || {
                start.wait();
                write_until(dir, &format!("{number}-{w}"), shape.style, content, time, most)
            }
        };
        let running: Vec<_> = (0..shape.writers).map(|w| s.spawn(writer(w))).collect();
        start.wait();
        let begun = Instant::now();
        let joined =
            running.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(io::Error::other("a writer panicked"))));
        (joined.collect::<io::Result<Vec<_>>>(), begun)
    });
    let (mut all, mut took) = (histogram()?, Duration::ZERO);
    for (times, ended) in results? {
        all.add(times).map_err(io::Error::other)?;
        took = took.max(ended.saturating_duration_since(begun));
    }
    #[allow(clippy::cast_precision_loss)] // a rate for people
    let per_s = all.len() as f64 / took.as_secs_f64();
    let (p50_us, p99_us) = (all.value_at_quantile(0.5), all.value_at_quantile(0.99));
    Ok(Sample { saves: all.len(), per_s, p50_us, p99_us })
}

/// One writer: the times of its saves, and when it was done with them.
fn write_until(
    dir: &Path,
    who: &str,
    style: Style,
    content: &[u8],
    time: Duration,
    most: u64,
) -> io::Result<(Histogram<u64>, Instant)> {
    let mut times = histogram()?;
    let name = |n: u64| match style {
        Style::Create => format!("new-{who}-{n}"),
        // The same files in every run.
        _ => format!("{}-{}", who.rsplit('-').next().unwrap_or_default(), n % FILES),
    };
    let end = Instant::now() + time;
    let mut done = 0;
    while done < most {
        let begun = Instant::now();
        if begun >= end {
            break;
        }
        save(dir, &name(done), style, content)?;
        times.saturating_record((begun.elapsed().as_micros() as u64).max(1));
        done += 1;
    }
    let ended = Instant::now();
    if style == Style::Create {
        (0..done).try_for_each(|n| std::fs::remove_file(dir.join(name(n))))?;
    }
    Ok((times, ended))
}

fn histogram() -> io::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 3_600_000_000, 3).map_err(io::Error::other)
}

fn save(dir: &Path, name: &str, style: Style, content: &[u8]) -> io::Result<()> {
    let path = dir.join(name);
    let written = |path: &Path| -> io::Result<File> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
        file.write_all(content)?;
        Ok(file)
    };
    match style {
        Style::Rewrite | Style::Create => close(written(&path)?),
        Style::Fsync => {
            let file = written(&path)?;
            file.sync_all()?;
            close(file)
        }
        Style::Rename => {
            let temp = dir.join(format!("{name}.new"));
            let file = written(&temp)?;
            file.sync_all()?;
            close(file)?;
            std::fs::rename(&temp, &path)?;
            File::open(dir)?.sync_all()
        }
    }
}

/// close(2) with its error: dropping a `File` hides it, and here it is the answer.
fn close(file: File) -> io::Result<()> {
    crate::sys::close(file.into()).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_style_saves_whole_files_and_is_counted() {
        for style in [Style::Rewrite, Style::Fsync, Style::Create, Style::Rename] {
            let dir = tempfile::tempdir().unwrap();
            let shape = Shape { writers: 2, size: 100, style };
            let sample = run(dir.path(), &shape, Duration::from_millis(50), u64::MAX).unwrap();
            assert!(sample.saves >= 2 && sample.per_s > 0.0 && sample.p50_us <= sample.p99_us, "{sample:?}");
            let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
            assert!(names.len() >= 2 || style == Style::Create, "{names:?}");
            assert!(names.iter().all(|p| std::fs::metadata(p).unwrap().len() == 100), "{names:?}");
        }
        let gone =
            run(Path::new("/nonexistent"), &Shape { writers: 1, size: 1, style: Style::Rewrite }, Duration::ZERO, 9);
        assert_eq!(gone.unwrap().saves, 0);
        let time = Duration::from_millis(5);
        assert!(
            run(Path::new("/nonexistent"), &Shape { writers: 1, size: 1, style: Style::Rewrite }, time, 9).is_err()
        );
        let dir = tempfile::tempdir().unwrap();
        let few = Shape { writers: 3, size: 1, style: Style::Create };
        assert_eq!(run(dir.path(), &few, Duration::from_secs(60), 5).unwrap().saves, 15);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "new files are removed");
    }
}
