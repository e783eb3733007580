//! Tests of the dispatcher alone: batches, window, back-pressure, the end. No file system.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::backend::{Anchor, FileId};

/// A ticket whose work is never looked at, and the slot for its answer.
fn ticket(answers: &Arc<Mutex<Vec<(usize, Outcome)>>>, n: usize) -> Ticket {
    let file = std::fs::File::open("/").unwrap();
    let anchor = Anchor::Fd(file.into());
    let dir = Arc::new(Dir::new(n as u64, FileId { dev: 0, ino: n as u64 }, anchor, None));
    let answers = answers.clone();
    let done = Done::new(move |r| answers.lock().push((n, r)));
    let work = Work::Unlink { place: Place { dir, name: "x".into() }, rmdir: false };
    Ticket { work, done, at: Instant::now() }
}

fn number(t: &Ticket) -> usize {
    match &t.work {
        Work::Unlink { place, .. } => place.dir.tag as usize,
        _ => unreachable!(),
    }
}

/// So long that a test which waits for it does not end.
const LONG: Duration = Duration::from_secs(600);

/// Fills a queue with `n` tickets, closes it, runs it; the numbers in each batch.
fn run_closed(n: usize, batch_max: usize) -> (Vec<Vec<usize>>, Vec<(usize, Outcome)>, Counters) {
    let answers = Arc::default();
    let (tx, rx) = queue(n);
    for i in 0..n {
        assert!(offer(&tx, ticket(&answers, i)).is_ok());
    }
    drop(tx);
    let counters = Counters::default();
    let mut batches = Vec::new();
    run(
        &rx,
        batch_max,
        || LONG,
        &counters,
        |b| {
            batches.push(b.iter().map(number).collect());
            b.into_iter().for_each(|t| t.done.answer(Ok(())));
        },
    );
    let answers = answers.lock().clone();
    (batches, answers, counters)
}

#[test]
fn a_full_queue_at_the_end_is_run_in_order_and_answered() {
    let (batches, answers, counters) = run_closed(250, 100);
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 50]);
    assert_eq!(batches.concat(), (0..250).collect::<Vec<_>>(), "order of submission");
    assert_eq!(answers.len(), 250);
    assert!(answers.iter().all(|a| a.1.is_ok()));
    let v = counters.values();
    assert_eq!((v.batches, v.batched_ops, v.batch_peak), (3, 250, 100));
}

#[test]
fn a_full_queue_gives_the_ticket_back() {
    let answers = Arc::default();
    let (tx, rx) = queue(2);
    assert!(offer(&tx, ticket(&answers, 0)).is_ok());
    assert!(offer(&tx, ticket(&answers, 1)).is_ok());
    let back = offer(&tx, ticket(&answers, 2)).unwrap_err();
    assert_eq!(number(&back), 2);
    drop(rx.recv().unwrap());
    assert!(offer(&tx, back).is_ok(), "there is a place again");
}

#[test]
fn a_lost_ticket_answers_that_the_mount_shuts_down() {
    let answers = Arc::default();
    let (tx, rx) = queue(8);
    assert!(offer(&tx, ticket(&answers, 0)).is_ok());
    drop(rx);
    assert!(offer(&tx, ticket(&answers, 1)).is_ok(), "a closed queue takes it, and answers");
    drop(tx);
    let got = answers.lock().clone();
    assert_eq!(got.len(), 2);
    assert!(got.iter().all(|(_, r)| matches!(r, Err(CommitError { source: Cause::Shutdown, .. }))));
}

#[test]
fn a_lone_commit_never_waits() {
    // One after the other, each submitted when the one before was answered. With a window of ten minutes the test
    // would not end if a single one waited for it.
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (tx, rx) = queue(8);
    let counters = Counters::default();
    let mut next = 1;
    assert!(offer(&tx, ticket(&answers, 0)).is_ok());
    let mut tx = Some(tx);
    run(
        &rx,
        100,
        || LONG,
        &counters,
        |b| {
            assert_eq!(b.len(), 1);
            b.into_iter().for_each(|t| t.done.answer(Ok(())));
            if next < 20 {
                assert!(offer(tx.as_ref().unwrap(), ticket(&answers, next)).is_ok());
                next += 1;
            } else {
                tx = None;
            }
        },
    );
    assert_eq!(answers.lock().len(), 20);
    assert_eq!(counters.values().windows, 0);
}

#[test]
fn after_a_shared_batch_the_window_waits_for_as_many_and_no_more() {
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (tx, rx) = queue(64);
    let counters = Counters::default();
    (0..4).for_each(|i| assert!(offer(&tx, ticket(&answers, i)).is_ok()));
    let sizes = AtomicUsize::new(0);
    std::thread::scope(|s| {
        let (wake, woken) = crossbeam_channel::bounded::<()>(1);
        let late = answers.clone();
        s.spawn(move || {
            // The first batch (4) was answered: one comes back at once, three later.
            woken.recv().unwrap();
            (4..8).for_each(|i| assert!(offer(&tx, ticket(&late, i)).is_ok()));
            woken.recv().unwrap();
        });
        run(
            &rx,
            100,
            || LONG,
            &counters,
            |b| {
                sizes.fetch_add(1, Ordering::Relaxed);
                assert_eq!(b.len(), 4, "not split, and not kept waiting for a fifth");
                b.into_iter().for_each(|t| t.done.answer(Ok(())));
                wake.send(()).unwrap();
            },
        );
    });
    assert_eq!(sizes.into_inner(), 2);
    assert_eq!(answers.lock().len(), 8);
}

#[test]
fn a_window_ends_when_nobody_comes_back() {
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (tx, rx) = queue(64);
    let counters = Counters::default();
    (0..4).for_each(|i| assert!(offer(&tx, ticket(&answers, i)).is_ok()));
    let mut tx = Some(tx);
    let mut sizes = Vec::new();
    run(
        &rx,
        9,
        || Duration::from_micros(50),
        &counters,
        |b| {
            sizes.push(b.len());
            b.into_iter().for_each(|t| t.done.answer(Ok(())));
            match sizes.len() {
                1 | 2 => assert!(offer(tx.as_ref().unwrap(), ticket(&answers, 9)).is_ok()),
                _ => tx = None,
            }
        },
    );
    assert_eq!(sizes, [4, 1, 1]);
    assert_eq!(counters.values().windows, 1, "after a lone batch no window opens");
}

#[test]
fn the_sync_of_a_directory_is_not_held_back() {
    // After a shared batch, with a window that would not end.
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (tx, rx) = queue(64);
    let counters = Counters::default();
    (0..4).for_each(|i| assert!(offer(&tx, ticket(&answers, i)).is_ok()));
    let mut tx = Some(tx);
    run(
        &rx,
        100,
        || LONG,
        &counters,
        |b| {
            for mut t in b {
                let place = match &t.work {
                    Work::Unlink { place, .. } if place.dir.tag == 0 => place.clone(),
                    _ => continue,
                };
                t.work = Work::SyncDir(place.dir);
                if let Some(tx) = tx.take() {
                    assert!(offer(&tx, t).is_ok());
                }
            }
        },
    );
    assert_eq!(answers.lock().len(), 4);
    assert_eq!(counters.values().windows, 0);
}
