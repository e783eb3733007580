//! Random changes of one file, with fsync and kill -9, against its content in memory.

use std::fs;

use fsys_mount::error::Errno;
use proptest::prelude::*;

use crate::common::world::{Fd, World, recovered};
use crate::{OLD, dir, open, with_files, world};

/// What a program does to one file.
#[derive(Debug, Clone)]
enum Op {
    Write(u64, usize),
    Truncate(u64),
    Punch(u64, u64),
    Zero(u64, u64, bool),
    Allocate(u64, u64),
    Copy(usize),
    Fsync,
    Kill,
}

fn ops() -> impl Strategy<Value = Op> {
    let at = || 0..40_000_u64;
    prop_oneof![
        5 => (at(), 1..9000_usize).prop_map(|(off, len)| Op::Write(off, len)),
        2 => at().prop_map(Op::Truncate),
        2 => (at(), 1..20_000_u64).prop_map(|(off, len)| Op::Punch(off, len)),
        1 => (at(), 1..20_000_u64, any::<bool>()).prop_map(|(off, len, keep)| Op::Zero(off, len, keep)),
        1 => (at(), 1..20_000_u64).prop_map(|(off, len)| Op::Allocate(off, len)),
        1 => (1..9000_usize).prop_map(Op::Copy),
        2 => Just(Op::Fsync),
        1 => Just(Op::Kill),
    ]
}

fn fill(content: &mut Vec<u8>, from: usize, to: usize, grows: bool, byte: u8) {
    if grows && content.len() < to {
        content.resize(to, 0);
    }
    let end = to.min(content.len());
    content[from.min(end)..end].fill(byte);
}

/// Holes and data as they are said to be agree with the content.
fn check_seeks(w: &World, fd: Fd, content: &[u8]) -> Result<(), TestCaseError> {
    let mut pos = 0;
    while pos < content.len() {
        let data = match w.fs.lseek(fd.fh, pos as i64, libc::SEEK_DATA) {
            Ok(n) => n as usize,
            Err(Errno::NXIO) => content.len(),
            Err(e) => panic!("SEEK_DATA: {e}"),
        };
        prop_assert!(content[pos..data.min(content.len())].iter().all(|b| *b == 0), "a hole from {pos} to {data}");
        if data >= content.len() {
            break;
        }
        pos = w.fs.lseek(fd.fh, data as i64, libc::SEEK_HOLE).unwrap() as usize;
        prop_assert!(pos > data && pos <= content.len(), "data from {data} to {pos}");
    }
    prop_assert_eq!(w.fs.lseek(fd.fh, content.len() as i64, libc::SEEK_HOLE), Err(Errno::NXIO));
    Ok(())
}

proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 150, failure_persistence: None, ..Default::default() })]

    /// P1, P5, P7. Whatever is done to a file, programs see what POSIX says, and the disk is at the last commit.
    #[test]
    fn any_change_of_a_file(ops in prop::collection::vec(ops(), 1..40)) {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        let dir = dir();
        let mut w = with_files(dir.path(), &["a"]);
        let mut fd = open(&w, "a");
        let (mut live, mut committed) = (OLD.to_vec(), OLD.to_vec());
        for (n, op) in ops.iter().enumerate() {
            let stamp = n as u8 + 1;
            match *op {
                Op::Write(off, len) => {
                    w.write_all(fd, off, &vec![stamp; len]).unwrap();
                    fill(&mut live, off as usize, off as usize + len, true, stamp);
                }
                Op::Truncate(len) => {
                    w.truncate(fd, len).unwrap();
                    live.resize(len as usize, 0);
                }
                Op::Punch(off, len) => {
                    w.fallocate(fd, off, len, libc::FALLOC_FL_PUNCH_HOLE | KEEP).unwrap();
                    fill(&mut live, off as usize, (off + len) as usize, false, 0);
                }
                Op::Zero(off, len, keep) => {
                    // tmpfs has it not for its own files.
                    w.fallocate(fd, off, len, libc::FALLOC_FL_ZERO_RANGE | if keep { KEEP } else { 0 }).ok();
                    if w.read(fd).unwrap() != live {
                        fill(&mut live, off as usize, (off + len) as usize, !keep, 0);
                    }
                }
                Op::Allocate(off, len) => {
                    w.fallocate(fd, off, len, 0).unwrap();
                    live.resize(live.len().max((off + len) as usize), 0);
                }
                Op::Copy(len) => {
                    // From its own start to its end, as one file is copied to another.
                    let n = w.copy_range(fd, 0, live.len() as u64, len.min(live.len())).unwrap();
                    live.extend_from_within(..n);
                }
                Op::Fsync => {
                    w.fsync(fd).unwrap();
                    committed.clone_from(&live);
                }
                Op::Kill => {
                    w.kill();
                    recovered(dir.path());
                    prop_assert_eq!(&fs::read(dir.path().join("a")).unwrap(), &committed);
                    w = world(dir.path());
                    fd = open(&w, "a");
                    live.clone_from(&committed);
                }
            }
            prop_assert!(w.read(fd).unwrap() == live, "after {op:?}");
            prop_assert_eq!(w.fs.getattr(fd.node).unwrap().stat.st_size, live.len() as i64);
            check_seeks(&w, fd, &live)?;
            prop_assert!(w.on_disk("a").unwrap() == committed, "the backing file after {op:?}");
        }
        w.close(fd).unwrap();
        prop_assert!(w.on_disk("a").unwrap() == live);
        w.shutdown().unwrap();
    }
}
