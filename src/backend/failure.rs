//! What failed of the writes to a file and was not made good.

use std::ops::Range;

use parking_lot::Mutex;
use rangemap::RangeSet;
use rustix::io::Errno;

/// The bytes of a file that are not what a program wrote.
#[derive(Debug, Default)]
pub struct Failures(Mutex<Option<Failure>>);

#[derive(Debug)]
struct Failure {
    bytes: RangeSet<u64>,
    /// Of the first.
    errno: Errno,
    /// Failed after the program was told that it was made.
    late: bool,
    /// The program knows.
    told: bool,
}

impl Failures {
    fn note(&self, bytes: Range<u64>, errno: Errno, late: bool) {
        if bytes.is_empty() {
            return;
        }
        let mut all = self.0.lock();
        let f = all.get_or_insert_with(|| Failure { bytes: RangeSet::new(), errno, late: false, told: true });
        f.bytes.insert(bytes);
        f.late |= late;
        f.told &= !late;
    }

    /// A write or truncation failed at `off`, and the program is told.
    pub fn add(&self, off: u64, errno: Errno) {
        self.note(off..off.saturating_add(1), errno, false);
    }

    /// A write of these bytes failed after the program was told that it was made.
    pub fn add_late(&self, bytes: Range<u64>, errno: Errno) {
        self.note(bytes, errno, true);
    }

    /// These bytes were written again, or cut off.
    pub fn heal(&self, bytes: Range<u64>) {
        let mut all = self.0.lock();
        if let Some(f) = all.as_mut().filter(|_| !bytes.is_empty()) {
            f.bytes.remove(bytes);
        }
        all.take_if(|f| f.bytes.is_empty());
    }

    /// The error that a save of the file ends with, if any.
    pub fn errno(&self) -> Option<Errno> {
        self.0.lock().as_ref().map(|f| f.errno)
    }

    /// The same, if what is there was said to be written.
    pub fn late(&self) -> Option<Errno> {
        self.0.lock().as_ref().filter(|f| f.late).map(|f| f.errno)
    }

    /// The error that the program does not know of yet, when it knows now.
    pub fn tell(&self) -> Option<Errno> {
        let mut all = self.0.lock();
        let failure = all.as_mut()?;
        (!std::mem::replace(&mut failure.told, true)).then_some(failure.errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_written_whole_again_is_good() {
        let f = Failures::default();
        f.add_late(0..100, Errno::IO);
        f.add_late(200..300, Errno::NOSPC);
        assert_eq!((f.late(), f.tell(), f.tell()), (Some(Errno::IO), Some(Errno::IO), None));
        f.heal(0..10);
        f.heal(150..300);
        assert_eq!(f.errno(), Some(Errno::IO), "10 to 100 are missing");
        f.heal(10..u64::MAX);
        assert_eq!((f.errno(), f.late(), f.tell()), (None, None, None));
    }

    #[test]
    fn a_program_that_knows_makes_it_good_from_where_it_failed() {
        let f = Failures::default();
        f.add(5, Errno::NOSPC);
        assert_eq!((f.errno(), f.late(), f.tell()), (Some(Errno::NOSPC), None, None));
        f.heal(6..10);
        assert_eq!(f.errno(), Some(Errno::NOSPC));
        f.heal(5..6);
        assert_eq!(f.errno(), None);
        f.add(5, Errno::NOSPC);
        f.add_late(7..9, Errno::IO);
        assert_eq!(f.tell(), Some(Errno::NOSPC), "the first");
        f.heal(0..0);
        f.heal(0..u64::MAX);
        assert_eq!(f.errno(), None);
    }
}
