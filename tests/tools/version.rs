//! A file content that certifies itself: which file it belongs to, which save wrote it, and that it is whole.
//!
//! A version is a header line, numbered body lines and a trailer line with a checksum. Every full line carries
//! the file id and the save's sequence number, so a mix of two saves is seen and can be named. Everything
//! follows from (id, seq, len): the checker renders the version again and compares every byte.

use std::fmt;

/// Bytes of a full line, the newline included.
pub const LINE: usize = 64;
/// The smallest version: header, one line, trailer.
pub const MIN_LEN: usize = 3 * LINE;

/// What a version is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The file this content belongs to.
    pub id: u32,
    /// The number of the save, from 1.
    pub seq: u64,
    /// Length of the whole content in bytes, at least [`MIN_LEN`].
    pub len: usize,
}

/// Why a content is not one complete version of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Defect {
    /// No bytes at all.
    Empty,
    /// Not one version: a prefix, a mix, zeros, or another file's content. The text says where.
    Torn(String),
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Defect::Empty => write!(f, "empty"),
            Defect::Torn(why) => write!(f, "torn: {why}"),
        }
    }
}

/// The name of file `id` in the directory under test.
pub fn file_name(id: u32) -> String {
    format!("f{id:06}")
}

/// Splitmix64: enough randomness for sizes and filler, with no dependency and the same on every machine.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn checksum(data: &[u8]) -> u64 {
    data.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0u8; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(sum ^ u64::from_le_bytes(word))
    })
}

fn padded(text: &str) -> [u8; LINE] {
    let mut line = [b'.'; LINE];
    line[..text.len()].copy_from_slice(text.as_bytes());
    line[LINE - 1] = b'\n';
    line
}

fn header(v: Version) -> [u8; LINE] {
    padded(&format!("{:06} {:010} HEAD len={:010} ", v.id, v.seq, v.len))
}

impl Version {
    /// The bytes of this version.
    pub fn render(self) -> Vec<u8> {
        assert!(self.len >= MIN_LEN, "a version has at least {MIN_LEN} bytes");
        let mut out = Vec::with_capacity(self.len);
        out.extend_from_slice(&header(self));
        let mut line = padded(&format!("{:06} {:010} body ", self.id, self.seq));
        let mut number = 0u64;
        while out.len() < self.len - LINE {
            let seed = mix(u64::from(self.id) << 40 ^ self.seq << 16 ^ number);
            for (i, byte) in line[24..40].iter_mut().enumerate() {
                *byte = b"0123456789abcdef"[(seed >> (4 * i)) as usize & 15];
            }
            let room = self.len - LINE - out.len();
            out.extend_from_slice(&line[..room.min(LINE)]);
            number += 1;
        }
        let sum = checksum(&out);
        out.extend_from_slice(&padded(&format!("{:06} {:010} TAIL sum={sum:016x} ", self.id, self.seq)));
        out
    }

    /// Reads the header at the start of `data`; `None` when there is no valid one.
    fn from_header(data: &[u8]) -> Option<Version> {
        let line = std::str::from_utf8(data.get(..LINE)?).ok()?;
        let mut words = line.split(' ');
        let id = words.next()?.parse().ok()?;
        let seq = words.next()?.parse().ok()?;
        if words.next()? != "HEAD" {
            return None;
        }
        let len = words.next()?.strip_prefix("len=")?.parse().ok()?;
        (len >= MIN_LEN).then_some(Version { id, seq, len })
    }
}

/// Checks that `data` is exactly one complete version of file `id`; gives its sequence number.
pub fn check(id: u32, data: &[u8]) -> Result<u64, Defect> {
    let version = check_start(id, data)?;
    if data.len() > version.len {
        return Err(Defect::Torn(format!("save {} has {} bytes, found {}", version.seq, version.len, data.len())));
    }
    Ok(version.seq)
}

/// Checks a file that is only appended to: complete versions 1, 2, 3 ..., and perhaps a part of the next one,
/// since the unit of an append in place is the write, not the save. Gives the number of complete ones.
pub fn check_appended(id: u32, mut data: &[u8]) -> Result<u64, Defect> {
    let mut seq = 0;
    while !data.is_empty() {
        match check_start(id, data) {
            Ok(version) if version.seq == seq + 1 => {
                seq = version.seq;
                data = &data[version.len..];
            }
            Ok(version) => return Err(Defect::Torn(format!("record {} follows record {seq}", version.seq))),
            Err(_) if is_part_of_next(id, seq + 1, data) => break,
            Err(defect) => return Err(defect),
        }
    }
    Ok(seq)
}

fn is_part_of_next(id: u32, seq: u64, data: &[u8]) -> bool {
    match Version::from_header(data) {
        Some(v) => v.id == id && v.seq == seq && v.len > data.len() && v.render().starts_with(data),
        None => data.len() < LINE,
    }
}

fn check_start(id: u32, data: &[u8]) -> Result<Version, Defect> {
    if data.is_empty() {
        return Err(Defect::Empty);
    }
    let Some(version) = Version::from_header(data) else {
        return Err(Defect::Torn(format!("no header in {} bytes, first line: {}", data.len(), shown(data))));
    };
    if version.id != id {
        return Err(Defect::Torn(format!("content of file {} save {}", version.id, version.seq)));
    }
    if data.len() < version.len {
        return Err(Defect::Torn(format!("save {}: only {} of {} bytes", version.seq, data.len(), version.len)));
    }
    let expected = version.render();
    match expected.iter().zip(data).position(|(a, b)| a != b) {
        None => Ok(version),
        Some(at) => {
            let start = at / LINE * LINE;
            Err(Defect::Torn(format!(
                "save {} up to byte {at} of {}, then: {}",
                version.seq,
                version.len,
                shown(&data[start..])
            )))
        }
    }
}

fn shown(data: &[u8]) -> String {
    data[..data.len().min(40)].escape_ascii().to_string()
}
