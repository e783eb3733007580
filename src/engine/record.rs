//! The journal's format, byte by byte. Pure: bytes in, bytes out.
//!
//! The journal is the file `.fsys/journal/log`. Numbers are little-endian; positions and lengths count bytes.
//!
//! Its head, in the first block of 4096 bytes; the rest of that block is zero:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `fsysLOG1` |
//! | 8 | 8 | salt: random, drawn anew whenever the log begins from its start again |
//! | 16 | 4 | crc32c of bytes 0 to 16 |
//!
//! Records follow, the first at 4096, each on a block boundary, each a whole number of blocks long:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `REDO` |
//! | 4 | 4 | crc32c of bytes 8 to 80 |
//! | 8 | 8 | salt of the head: so neither an older record nor a program's own data is taken for one |
//! | 16 | 8 | number of the record, from 0 |
//! | 24 | 8 | length of the record |
//! | 32 | 8 | the file's size afterwards |
//! | 40 | 8 | modification time, seconds since 1970 (signed) |
//! | 48 | 4 | and nanoseconds |
//! | 52 | 4 | number of extents |
//! | 56 | 8 | inode number, for people |
//! | 64 | 4 | type of the file handle (signed) |
//! | 68 | 2 | length of the handle |
//! | 70 | 2 | length of the path |
//! | 72 | 4 | crc32c of bytes 80 to the end |
//! | 76 | 4 | zero |
//! | 80 | | the handle, which names the inode and its generation; the path, for people; the extents, 24 bytes each: offset, length, kind (1: data, 2: zeros); the data of the data extents, in their order; zeros |
//!
//! A record counts when both sums are right and all records before it count. Applied, it writes its extents and sets size
//! and time. Extents cover every byte that changes, up to the new size, so the result does not depend on what the file
//! held there, and to apply the records once more, from the first, ends the same.

use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Records begin at multiples of this, bytes: no later write touches the sector of an earlier record.
pub const BLOCK: u64 = 4096;
const HEAD: [u8; 8] = *b"fsysLOG1";
const REDO: [u8; 4] = *b"REDO";
/// Longest path that a record names.
const PATH_MAX: usize = 4096;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    salt: U64,
    sum: U32,
}

/// The head of a log.
pub fn head(salt: u64) -> Vec<u8> {
    let mut raw = RawHead { magic: HEAD, salt: U64::new(salt), sum: U32::ZERO };
    raw.sum = U32::new(crc32c::crc32c(&raw.as_bytes()[..16]));
    let mut block = raw.as_bytes().to_vec();
    block.resize(BLOCK as usize, 0);
    block
}

/// The salt that a head names; `None` when it is no head of ours.
pub fn salt_of(block: &[u8]) -> Option<u64> {
    let (raw, _) = RawHead::ref_from_prefix(block).ok()?;
    (raw.magic == HEAD && raw.sum.get() == crc32c::crc32c(&raw.as_bytes()[..16])).then(|| raw.salt.get())
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    sum: U32,
    salt: U64,
    number: U64,
    length: U64,
    size: U64,
    mtime_s: I64,
    mtime_ns: U32,
    extents: U32,
    ino: U64,
    handle_kind: I32,
    handle_len: U16,
    path_len: U16,
    body_sum: U32,
    zero: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawExtent {
    off: U64,
    len: U64,
    kind: U64,
}

/// Length of a record's header.
pub const HEADER: usize = size_of::<RawHeader>();

/// What a range of a file becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes that the record holds.
    Data,
    /// Zeros, without space where the file system can.
    Zero,
}

/// A range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset, bytes.
    pub off: u64,
    /// Length, bytes, not 0.
    pub len: u64,
    /// What it becomes.
    pub kind: Kind,
}

/// One update of one file, without its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redo {
    /// Type of the file handle.
    pub handle_kind: i32,
    /// The file handle.
    pub handle: Vec<u8>,
    /// Inode number.
    pub ino: u64,
    /// Path from the root of the mount when it was written; only for people.
    pub path: Vec<u8>,
    /// Size afterwards, bytes.
    pub size: u64,
    /// Modification time: seconds since 1970, nanoseconds.
    pub mtime: (i64, u32),
    /// In order, not overlapping.
    pub extents: Vec<Extent>,
}

impl Redo {
    /// What stands between the header and the data.
    pub fn table(&self) -> Vec<u8> {
        let mut table = [&self.handle[..], &self.path[..self.path_len()]].concat();
        for e in &self.extents {
            let kind = U64::new(if e.kind == Kind::Data { 1 } else { 2 });
            table.extend_from_slice(RawExtent { off: U64::new(e.off), len: U64::new(e.len), kind }.as_bytes());
        }
        table
    }

    fn path_len(&self) -> usize {
        self.path.len().min(PATH_MAX)
    }

    /// The extents whose data the record holds.
    pub fn data(&self) -> impl Iterator<Item = &Extent> {
        self.extents.iter().filter(|e| e.kind == Kind::Data)
    }

    /// Bytes of data.
    pub fn data_len(&self) -> u64 {
        self.data().map(|e| e.len).sum()
    }

    /// Length of the whole record.
    pub fn length(&self) -> u64 {
        let table = self.handle.len() + self.path_len() + self.extents.len() * size_of::<RawExtent>();
        (HEADER as u64 + table as u64 + self.data_len()).next_multiple_of(BLOCK)
    }

    /// The header, given the sum of all that follows it.
    pub fn header(&self, salt: u64, number: u64, body_sum: u32) -> Vec<u8> {
        let mut raw = RawHeader {
            magic: REDO,
            sum: U32::ZERO,
            salt: U64::new(salt),
            number: U64::new(number),
            length: U64::new(self.length()),
            size: U64::new(self.size),
            mtime_s: I64::new(self.mtime.0),
            mtime_ns: U32::new(self.mtime.1),
            extents: U32::new(self.extents.len() as u32),
            ino: U64::new(self.ino),
            handle_kind: I32::new(self.handle_kind),
            handle_len: U16::new(self.handle.len() as u16),
            path_len: U16::new(self.path_len() as u16),
            body_sum: U32::new(body_sum),
            zero: U32::ZERO,
        };
        raw.sum = U32::new(crc32c::crc32c(&raw.as_bytes()[8..]));
        raw.as_bytes().to_vec()
    }
}

/// A header whose own sum is right.
pub struct Header(RawHeader);

impl Header {
    /// Reads the header of record `number`; `None` when there is none, or one of an earlier life of the log.
    pub fn parse(bytes: &[u8], salt: u64, number: u64) -> Option<Self> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
        let ours = raw.magic == REDO && raw.sum.get() == crc32c::crc32c(&raw.as_bytes()[8..]);
        let here = raw.salt.get() == salt && raw.number.get() == number;
        let length = raw.length.get();
        let header = Self(raw);
        let holds = length.is_multiple_of(BLOCK) && HEADER as u64 + header.table_len() as u64 <= length;
        (ours && here && holds).then_some(header)
    }

    /// Length of the record.
    pub fn length(&self) -> u64 {
        self.0.length.get()
    }

    /// Sum of all that follows the header.
    pub fn body_sum(&self) -> u32 {
        self.0.body_sum.get()
    }

    /// Length of what stands between the header and the data.
    pub fn table_len(&self) -> usize {
        let extents = self.0.extents.get() as usize * size_of::<RawExtent>();
        usize::from(self.0.handle_len.get()) + usize::from(self.0.path_len.get()) + extents
    }

    /// What the record says, given the table; `None` when it does not fit together.
    pub fn redo(&self, table: &[u8]) -> Option<Redo> {
        let (handle, rest) = table.split_at_checked(self.0.handle_len.get().into())?;
        let (path, rest) = rest.split_at_checked(self.0.path_len.get().into())?;
        let extents = <[RawExtent]>::ref_from_bytes(rest).ok()?;
        let redo = Redo {
            handle_kind: self.0.handle_kind.get(),
            handle: handle.to_vec(),
            ino: self.0.ino.get(),
            path: path.to_vec(),
            size: self.0.size.get(),
            mtime: (self.0.mtime_s.get(), self.0.mtime_ns.get()),
            extents: extents.iter().map(extent).collect::<Option<_>>()?,
        };
        let ends = redo.extents.iter().map(|e| e.off.checked_add(e.len)).collect::<Option<Vec<_>>>()?;
        let ordered = redo.extents.iter().skip(1).zip(&ends).all(|(next, end)| next.off >= *end);
        (ordered && ends.last().is_none_or(|end| *end <= redo.size) && redo.length() == self.length()).then_some(redo)
    }
}

fn extent(raw: &RawExtent) -> Option<Extent> {
    let kind = match raw.kind.get() {
        1 => Kind::Data,
        2 => Kind::Zero,
        _ => return None,
    };
    (raw.len.get() > 0).then(|| Extent { off: raw.off.get(), len: raw.len.get(), kind })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The whole record, as the log writes it.
    fn encode(redo: &Redo, data: &[u8], salt: u64, number: u64) -> Vec<u8> {
        let mut body = [redo.table(), data.to_vec()].concat();
        body.resize(redo.length() as usize - HEADER, 0);
        [redo.header(salt, number, crc32c::crc32c(&body)), body].concat()
    }

    fn decode(bytes: &[u8], salt: u64, number: u64) -> Option<(Redo, Vec<u8>)> {
        let header = Header::parse(bytes, salt, number)?;
        let body = bytes.get(HEADER..header.length() as usize)?;
        let redo = header.redo(body.get(..header.table_len())?)?;
        let data = body[header.table_len()..][..redo.data_len() as usize].to_vec();
        (crc32c::crc32c(body) == header.body_sum()).then_some((redo, data))
    }

    fn example() -> (Redo, Vec<u8>) {
        let extents = vec![
            Extent { off: 3, len: 5, kind: Kind::Data },
            Extent { off: 8, len: 4096, kind: Kind::Zero },
            Extent { off: 9000, len: 2, kind: Kind::Data },
        ];
        let redo = Redo {
            handle_kind: 1,
            handle: vec![1, 2, 3, 4, 5, 6, 7, 8],
            ino: 77,
            path: b"a/b".to_vec(),
            size: 9002,
            mtime: (-5, 999_999_999),
            extents,
        };
        (redo, b"helloxy".to_vec())
    }

    fn redos() -> impl Strategy<Value = (Redo, Vec<u8>)> {
        let extents = prop::collection::vec((0..5000_u64, 1..300_u64, any::<bool>()), 0..20);
        let names =
            (any::<i32>(), prop::collection::vec(any::<u8>(), 0..128), prop::collection::vec(any::<u8>(), 0..200));
        (extents, names, any::<(u64, u64, i64, u32)>()).prop_map(|(gaps, (handle_kind, handle, path), numbers)| {
            let mut at = 0;
            let mut extents = Vec::new();
            for (gap, len, data) in gaps {
                extents.push(Extent { off: at + gap, len, kind: if data { Kind::Data } else { Kind::Zero } });
                at += gap + len;
            }
            let (ino, more, seconds, nanos) = numbers;
            let size = at + more % 1000;
            let redo = Redo { handle_kind, handle, ino, path, size, mtime: (seconds, nanos), extents };
            let data = (0..redo.data_len()).map(|i| (i % 251) as u8).collect();
            (redo, data)
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read((redo, data) in redos(), salt: u64, number: u64) {
            let bytes = encode(&redo, &data, salt, number);
            prop_assert_eq!(bytes.len() as u64 % BLOCK, 0);
            prop_assert_eq!(decode(&bytes, salt, number), Some((redo, data)));
            prop_assert!(decode(&bytes, salt ^ 1, number).is_none(), "of an earlier life");
            prop_assert!(decode(&bytes, salt, number.wrapping_add(1)).is_none(), "out of order");
        }

        #[test]
        fn noise_is_no_record_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000), salt: u64) {
            prop_assert!(decode(&bytes, salt, 0).is_none());
            prop_assert!(salt_of(&bytes).is_none());
        }

        /// Sums can be made right on purpose; what then does not fit together is refused all the same.
        #[test]
        fn a_forged_header_does_no_harm(mut bytes in prop::collection::vec(any::<u8>(), HEADER..9000), salt: u64) {
            bytes[..4].copy_from_slice(&REDO);
            bytes[8..16].copy_from_slice(&salt.to_le_bytes());
            bytes[16..24].fill(0);
            bytes[24..32].copy_from_slice(&8192_u64.to_le_bytes());
            let sum = crc32c::crc32c(&bytes[8..HEADER]);
            bytes[4..8].copy_from_slice(&sum.to_le_bytes());
            prop_assert!(decode(&bytes, salt, 0).is_none());
        }
    }

    /// A torn record is none: whatever bit is wrong, wherever it ends.
    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let (redo, data) = example();
        let bytes = encode(&redo, &data, 9, 4);
        assert_eq!(decode(&bytes, 9, 4), Some((redo, data)));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad, 9, 4), None, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len], 9, 4), None, "cut to {len}");
            let mut zeroed = bytes.clone();
            zeroed[len..].fill(0);
            assert_eq!(decode(&zeroed, 9, 4).is_some(), zeroed == bytes, "zeros from {len}");
        }
    }

    #[test]
    fn every_flipped_bit_of_the_head_is_found() {
        let block = head(0x1234_5678_9abc_def0);
        assert_eq!((block.len() as u64, salt_of(&block)), (BLOCK, Some(0x1234_5678_9abc_def0)));
        for bit in 0..size_of::<RawHead>() * 8 {
            let mut bad = block.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(salt_of(&bad), None, "bit {bit}");
        }
    }

    /// The tables above, as numbers.
    #[test]
    fn the_layout_is_the_one_that_is_written_down() {
        let (redo, data) = example();
        let bytes = encode(&redo, &data, 0x0102_0304_0506_0708, 4);
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((HEADER, bytes.len()), (80, 4096));
        assert_eq!((&bytes[..4], u64_at(8), u64_at(16), u64_at(24)), (&b"REDO"[..], 0x0102_0304_0506_0708, 4, 4096));
        assert_eq!((u64_at(32), u64_at(40) as i64, u64_at(56)), (9002, -5, 77));
        assert_eq!((&bytes[80..88], &bytes[88..91]), (&[1, 2, 3, 4, 5, 6, 7, 8][..], &b"a/b"[..]));
        assert_eq!((u64_at(91), u64_at(99), u64_at(107)), (3, 5, 1));
        assert_eq!(&bytes[91 + 72..][..7], b"helloxy");
    }
}
