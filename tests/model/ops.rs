//! What programs and fate do in the model test, and how it is drawn.

use fsys_mount::config::policy::{Durability, WriteMode};
use proptest::prelude::*;

use super::{NAMES, SLOTS};

/// What a program, or fate, does.
#[derive(Debug, Clone)]
pub enum Op {
    /// Opens for reading and writing; makes the file if there is none.
    Open {
        slot: usize,
        name: usize,
        truncate: bool,
    },
    Write {
        slot: usize,
        at: usize,
        len: usize,
    },
    Append {
        slot: usize,
        len: usize,
    },
    Truncate {
        slot: usize,
        len: usize,
    },
    TruncateName {
        name: usize,
        len: usize,
    },
    /// Closes a copy of the descriptor.
    CloseCopy {
        slot: usize,
    },
    Close {
        slot: usize,
    },
    Fsync {
        slot: usize,
    },
    Rename {
        from: usize,
        to: usize,
    },
    Unlink {
        name: usize,
    },
    Link {
        from: usize,
        to: usize,
    },
    SyncDir,
    Drain,
    /// kill -9, recovery, a new mount.
    Kill,
    /// Unmount with descriptors open, and a new mount.
    Remount,
}

pub fn ops() -> impl Strategy<Value = Op> {
    let (slot, name) = (0..SLOTS, 0..NAMES.len());
    let len = prop_oneof![Just(0_usize), 1..5000_usize];
    prop_oneof![
        6 => (slot.clone(), name.clone(), any::<bool>())
            .prop_map(|(slot, name, truncate)| Op::Open { slot, name, truncate }),
        5 => (slot.clone(), 0..6000_usize, 1..5000_usize).prop_map(|(slot, at, len)| Op::Write { slot, at, len }),
        3 => (slot.clone(), 1..5000_usize).prop_map(|(slot, len)| Op::Append { slot, len }),
        1 => (slot.clone(), len.clone()).prop_map(|(slot, len)| Op::Truncate { slot, len }),
        1 => (name.clone(), len).prop_map(|(name, len)| Op::TruncateName { name, len }),
        1 => slot.clone().prop_map(|slot| Op::CloseCopy { slot }),
        5 => slot.clone().prop_map(|slot| Op::Close { slot }),
        2 => slot.prop_map(|slot| Op::Fsync { slot }),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Op::Rename { from, to }),
        1 => name.clone().prop_map(|name| Op::Unlink { name }),
        1 => (name.clone(), name).prop_map(|(from, to)| Op::Link { from, to }),
        1 => Just(Op::SyncDir),
        1 => Just(Op::Drain),
        2 => Just(Op::Kill),
        1 => Just(Op::Remount),
    ]
}

pub fn level() -> impl Strategy<Value = Durability> {
    prop_oneof![Just(Durability::Always), Just(Durability::Close), Just(Durability::Fsync), Just(Durability::Relaxed)]
}

pub fn mode() -> impl Strategy<Value = WriteMode> {
    prop_oneof![
        3 => Just(WriteMode::Auto),
        2 => Just(WriteMode::Replace),
        1 => Just(WriteMode::InPlace),
        3 => Just(WriteMode::Journal)
    ]
}
