//! Which disks a crash may leave behind. Pure: a record in, crash states out.
//!
//! The model of a device with a volatile cache: what a flush covered is there; of the writes since the last flush that
//! had arrived by the time of the crash, any subset is there, each whole or in part. That includes every reordering.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::ops::Range;

use fastrand::Rng;

use crate::disk::Event;

/// What is there of one volatile write: byte ranges relative to its start.
pub type Kept = Vec<Range<usize>>;

/// One crash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CrashState {
    /// The events before this position of the record happened.
    pub at: usize,
    /// Position after the last flush that happened: all writes before it are there.
    pub durable: usize,
    /// Of the writes in `durable..at`: position and what is there of it. Others are gone.
    pub kept: Vec<(usize, Kept)>,
}

/// How a device may tear a write.
#[derive(Debug, Clone)]
pub struct Tear {
    /// Sectors are whole or not there.
    pub unit: usize,
    /// These bytes of the device are whole or not there too: see [`crate::rig::Kind::tear`].
    pub whole: Range<u64>,
}

/// How the writes of a crash state are chosen.
#[derive(Debug, Clone, Copy)]
enum Choice {
    All,
    None,
    /// Each with this probability in percent.
    Some(u32),
    AllButOne,
    JustOne,
    /// The first n as the device got them.
    Prefix,
    /// The last n: what was sent first is what is lost.
    Suffix,
}

const CHOICES: [Choice; 9] = [
    Choice::All,
    Choice::None,
    Choice::Some(15),
    Choice::Some(50),
    Choice::Some(85),
    Choice::AllButOne,
    Choice::JustOne,
    Choice::Prefix,
    Choice::Suffix,
];

/// At most `count` different crash states of `record`, in order of their position.
pub fn choose(record: &[Event], count: usize, tear: &Tear, rng: &mut Rng) -> Vec<CrashState> {
    let flushes: Vec<usize> =
        record.iter().enumerate().filter(|(_, e)| matches!(e, Event::Flush)).map(|(i, _)| i + 1).collect();
    // Moments where much is decided: right after a mark (an answer was given), right before a flush.
    let marks: Vec<usize> =
        record.iter().enumerate().filter(|(_, e)| matches!(e, Event::Mark)).map(|(i, _)| i + 1).collect();
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for _ in 0..count * 3 {
        if out.len() == count {
            break;
        }
        let at = match rng.u8(..4) {
            0 if !marks.is_empty() => marks[rng.usize(..marks.len())],
            1 if !flushes.is_empty() => flushes[rng.usize(..flushes.len())] - 1,
            _ => rng.usize(..=record.len()),
        };
        let state = choose_at(record, &flushes, at, tear, rng);
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        if seen.insert(hasher.finish()) {
            out.push(state);
        }
    }
    out.sort_by_key(|s| s.at);
    out
}

fn choose_at(record: &[Event], flushes: &[usize], at: usize, tear: &Tear, rng: &mut Rng) -> CrashState {
    let durable = flushes[..flushes.partition_point(|&f| f <= at)].last().copied().unwrap_or(0);
    let writes: Vec<(usize, u64, usize)> = (durable..at)
        .filter_map(|i| match &record[i] {
            Event::Write { offset, data } => Some((i, *offset, data.len())),
            _ => None,
        })
        .collect();
    let n = writes.len();
    let choice = CHOICES[rng.usize(..CHOICES.len())];
    let pick = if n == 0 { 0 } else { rng.usize(..n) };
    let tears = rng.bool();
    let mut kept = Vec::new();
    for (nth, &(i, offset, len)) in writes.iter().enumerate() {
        let keep = match choice {
            Choice::All => true,
            Choice::None => false,
            Choice::Some(percent) => rng.u32(..100) < percent,
            Choice::AllButOne => nth != pick,
            Choice::JustOne => nth == pick,
            Choice::Prefix => nth <= pick,
            Choice::Suffix => nth >= pick,
        };
        // Torn: of the writes that arrived at all, and of the one that the choice is about.
        if tears && len > tear.unit && (nth == pick || (keep && rng.u8(..8) == 0)) {
            kept.push((i, torn(offset, len, tear, rng)));
        } else if keep {
            kept.push((i, std::iter::once(0..len).collect()));
        }
    }
    CrashState { at, durable, kept }
}

fn torn(offset: u64, len: usize, tear: &Tear, rng: &mut Rng) -> Kept {
    let unit = tear.unit;
    let units = len.div_ceil(unit);
    let cut = rng.usize(1..units);
    let choice = rng.u8(..3);
    let whole = rng.bool();
    (0..units)
        .filter(|&u| {
            let at = offset + (u * unit) as u64;
            if tear.whole.contains(&at) {
                return whole;
            }
            match choice {
                0 => u < cut,
                1 => u >= cut,
                _ => rng.bool(),
            }
        })
        .map(|u| u * unit..((u + 1) * unit).min(len))
        .collect()
}

#[test]
fn a_crash_state_keeps_what_was_flushed_and_nothing_from_the_future() {
    let write = |n: u8| Event::Write { offset: 0, data: vec![n; 4096].into() };
    let record = [write(1), Event::Flush, write(2), Event::Mark, write(3), Event::Flush, write(4)];
    let tear = Tear { unit: 512, whole: 0..1024 };
    let states = choose(&record, 400, &tear, &mut Rng::with_seed(1));
    assert!(states.len() > 50, "{}", states.len());
    for s in &states {
        let flushed = record[..s.at].iter().rposition(|e| matches!(e, Event::Flush)).map_or(0, |i| i + 1);
        assert_eq!(s.durable, flushed);
        assert!(s.kept.iter().all(|(i, _)| (s.durable..s.at).contains(i)));
        assert!(s.kept.iter().flat_map(|(_, k)| k).all(|r| r.end <= 4096 && r.start % 512 == 0));
    }
    assert!(states.iter().any(|s| s.at == 7 && s.kept.is_empty()), "the last write may be lost");
    assert!(states.iter().any(|s| s.kept.iter().any(|(_, k)| k.len() > 1)), "some write is torn");
    let there = |k: &Kept, at: usize| k.iter().any(|r| r.contains(&at));
    assert!(states.iter().flat_map(|s| &s.kept).all(|(_, k)| there(k, 0) == there(k, 512)), "but not there");
}
