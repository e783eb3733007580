//! Tests of the dispatcher alone: batches, window, back-pressure, the end. No file system.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::backend::{Anchor, FileId};
use crate::engine::turns::{Turns, Waiting};

/// The dispatcher with nothing to do between batches.
fn run(
    queue: &Queue,
    rx: &Receiver<Ticket>,
    batch_max: usize,
    window: impl Fn() -> Duration,
    counters: &Counters,
    execute: impl FnMut(Vec<Ticket>),
) {
    super::run(queue, rx, batch_max, window, || None, counters, execute);
}

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
const LONG: Duration = Duration::from_secs(60);

/// Fills a queue with `n` tickets, closes it, runs it; the numbers in each batch.
fn run_closed(n: usize, batch_max: usize) -> (Vec<Vec<usize>>, Vec<(usize, Outcome)>, Counters) {
    let answers = Arc::default();
    let (q, rx) = queue(n);
    for i in 0..n {
        assert!(q.submit(ticket(&answers, i)));
    }
    q.close();
    let counters = Counters::default();
    let mut batches = Vec::new();
    run(
        &q,
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

/// What found the queue full has its place behind all before it, also while the dispatcher makes room: a later one
/// never overtakes it.
#[test]
fn a_full_queue_keeps_the_order() {
    let answers = Arc::default();
    let (q, rx) = queue(2);
    assert!(q.submit(ticket(&answers, 0)) && q.submit(ticket(&answers, 1)));
    assert!(!q.submit(ticket(&answers, 2)), "it waits");
    drop(rx.recv().unwrap());
    assert!(!q.submit(ticket(&answers, 3)), "a place is free, and not for this one");
    let counters = Counters::default();
    let mut order = Vec::new();
    std::thread::scope(|s| {
        s.spawn(|| {
            (4..2000).for_each(|i| {
                q.submit(ticket(&answers, i));
            });
            q.close();
        });
        run(
            &q,
            &rx,
            3,
            || LONG,
            &counters,
            |b| {
                order.extend(b.iter().map(number));
                b.into_iter().for_each(|t| t.done.answer(Ok(())));
            },
        );
    });
    assert_eq!(order, (1..2000).collect::<Vec<_>>());
    assert_eq!(answers.lock().len(), 2000, "and one that the test took, which answers when it is lost");
}

#[test]
fn a_lost_ticket_answers_that_the_mount_shuts_down() {
    let answers = Arc::default();
    let (q, rx) = queue(8);
    assert!(q.submit(ticket(&answers, 0)));
    drop(rx);
    assert!(q.submit(ticket(&answers, 1)), "a closed queue takes it, and answers");
    q.close();
    let got = answers.lock().clone();
    assert_eq!(got.len(), 2);
    assert!(got.iter().all(|(_, r)| matches!(r, Err(CommitError { source: Cause::Shutdown, .. }))));
}

#[test]
fn a_lone_commit_never_waits() {
    // One after the other, each submitted when the one before was answered. With a window of ten minutes the test
    // would not end if a single one waited for it.
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (q, rx) = queue(8);
    let counters = Counters::default();
    let mut next = 1;
    assert!(q.submit(ticket(&answers, 0)));
    run(
        &q,
        &rx,
        100,
        || LONG,
        &counters,
        |b| {
            assert_eq!(b.len(), 1);
            b.into_iter().for_each(|t| t.done.answer(Ok(())));
            if next < 20 {
                assert!(q.submit(ticket(&answers, next)));
                next += 1;
            } else {
                q.close();
            }
        },
    );
    assert_eq!(answers.lock().len(), 20);
    assert_eq!(counters.values().windows, 0);
}

#[test]
fn after_a_shared_batch_the_window_waits_for_as_many_and_no_more() {
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (q, rx) = queue(64);
    let counters = Counters::default();
    (0..4).for_each(|i| assert!(q.submit(ticket(&answers, i))));
    let sizes = AtomicUsize::new(0);
    std::thread::scope(|s| {
        let q = &q;
        let (wake, woken) = crossbeam_channel::bounded::<()>(1);
        let late = answers.clone();
        s.spawn(move || {
            // The first batch (4) was answered: one comes back at once, three later.
            woken.recv().unwrap();
            (4..8).for_each(|i| assert!(q.submit(ticket(&late, i))));
            woken.recv().unwrap();
            q.close();
        });
        run(
            q,
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
    let (q, rx) = queue(64);
    let counters = Counters::default();
    (0..4).for_each(|i| assert!(q.submit(ticket(&answers, i))));
    let mut sizes = Vec::new();
    run(
        &q,
        &rx,
        9,
        || Duration::from_micros(50),
        &counters,
        |b| {
            sizes.push(b.len());
            b.into_iter().for_each(|t| t.done.answer(Ok(())));
            match sizes.len() {
                1 | 2 => assert!(q.submit(ticket(&answers, 9))),
                _ => q.close(),
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
    let (q, rx) = queue(64);
    let counters = Counters::default();
    (0..4).for_each(|i| assert!(q.submit(ticket(&answers, i))));
    run(
        &q,
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
                assert!(q.submit(t));
                q.close();
            }
        },
    );
    assert_eq!(answers.lock().len(), 4);
    assert_eq!(counters.values().windows, 0);
}

#[test]
fn syncs_of_directories_end_a_window_and_do_not_change_the_next() {
    let answers: Arc<Mutex<Vec<_>>> = Arc::default();
    let (q, rx) = queue(64);
    let counters = Counters::default();
    let sync_dir = |n| {
        let mut t = ticket(&answers, n);
        let Work::Unlink { place, .. } = &t.work else { unreachable!() };
        t.work = Work::SyncDir(place.dir.clone());
        t
    };
    (0..4).for_each(|i| assert!(q.submit(ticket(&answers, i))));
    let mut sizes = Vec::new();
    std::thread::scope(|s| {
        let (q, counters, sync_dir) = (&q, &counters, &sync_dir);
        run(
            q,
            &rx,
            100,
            || LONG,
            counters,
            |b| {
                sizes.push(b.len());
                b.into_iter().for_each(|t| t.done.answer(Ok(())));
                match sizes.len() {
                    1 => assert!(q.submit(sync_dir(8))),
                    2 => {
                        assert!(q.submit(ticket(&answers, 9)));
                        s.spawn(move || {
                            // One of four is there: the others are waited for, in spite of the sync in between.
                            while counters.values().windows == 0 {
                                std::thread::yield_now();
                            }
                            assert!(q.submit(sync_dir(10)));
                        });
                    }
                    _ => q.close(),
                }
            },
        );
    });
    assert_eq!(sizes, [4, 1, 2]);
}

/// A window that ends only with the sync that it waits for, or when that is not due any more.
#[test]
fn a_commit_waits_for_the_sync_of_its_directory_that_is_due() {
    for comes in [true, false] {
        let answers: Arc<Mutex<Vec<_>>> = Arc::default();
        let (q, rx) = queue(64);
        let counters = Counters::default();
        let (mut commit, mut sync) = (ticket(&answers, 1), ticket(&answers, 2));
        let Work::Unlink { place, .. } = &commit.work else { unreachable!() };
        let (place, id) = (place.clone(), FileId { dev: 0, ino: 5 });
        let saved = || Waiting { tid: 7.try_into().unwrap(), done: Done::nobody(), outcome: Ok(()) };
        Turns::default().saved(&place.dir, saved(), LONG);
        place.dir.sync_came(7);
        Turns::default().saved(&place.dir, saved(), LONG);
        let fd = || std::os::fd::OwnedFd::from(std::fs::File::open("/").unwrap());
        let (file, version) = (File::committed(5, id, Anchor::Fd(fd())), Version::new(fd(), id, true));
        let (file, version, method) = (Arc::new(file), Arc::new(version), Method::Auto);
        commit.work = Work::Publish { file, version, place: place.clone(), replaces: false, method };
        commit.done = commit.done.by(6.try_into().ok());
        sync.work = Work::SyncDir(place.dir.clone());
        assert!(q.submit(commit));
        let (mut sizes, began) = (Vec::new(), Instant::now());
        std::thread::scope(|s| {
            let (q, counters) = (&q, &counters);
            s.spawn(move || {
                while counters.values().windows == 0 {
                    assert!(began.elapsed() < LONG / 2, "it does not wait");
                    std::thread::yield_now();
                }
                place.dir.sync_came(7);
                if comes {
                    assert!(q.submit(sync));
                } else {
                    sync.done.answer(Ok(()));
                }
            });
            run(
                q,
                &rx,
                100,
                || LONG,
                counters,
                |b| {
                    sizes.push(b.len());
                    b.into_iter().for_each(|t| t.done.answer(Ok(())));
                    q.close();
                },
            );
        });
        assert_eq!((sizes, answers.lock().len()), (vec![1 + usize::from(comes)], 2));
        assert!(began.elapsed() < LONG / 2, "nor longer than that");
    }
}
