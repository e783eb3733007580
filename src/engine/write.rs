//! Writes: to which descriptor of a version they go, what they take away, and what a failed one means for the version.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{self as rfs, Mode};
use rustix::io::Errno;

use super::Engine;
use super::file::{Handle, Version};
use super::io::{Access, CAPS};
use super::stage::without_privileges;
use super::state::Phase;
use crate::backend::contain;
use crate::backend::uring::writes::{ALIGN, is_aligned};
use crate::config::policy::{Durability, Method, Policy};
use crate::telemetry::Counters;

/// A new version of which more bytes than this are to be written to the device is large.
const LARGE_BYTES: u64 = 4 << 20;
/// Smallest piece of a large version, bytes, that is written to the device at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// How long a piece is to take, about: flushes of others wait for it.
const PIECE_TIME: std::ops::Range<Duration> = Duration::from_millis(5)..Duration::from_millis(20);

impl Engine {
    /// Whether a write through `h` may wait for the device.
    pub fn write_waits(&self, h: &Handle, off: u64, len: usize) -> bool {
        let to_device = h.policy.method == Method::Direct && len as u64 >= ALIGN;
        let has_room = || {
            let st = h.file.state.read();
            let direct = st.version.as_ref().and_then(|v| v.direct.as_ref());
            st.phase == Phase::Staged && is_awaited(h) && direct.is_some_and(|d| d.0.has_room(off, len))
        };
        to_device && !has_room() || self.backing.writes_wait()
    }

    /// Writes at an offset; may write less, as write(2) may.
    pub fn write(self: &Arc<Self>, h: &Handle, off: u64, data: &[u8], kill: bool) -> Access<usize> {
        self.change(h, true, |v, staged| {
            if let Some(e) = v.failed.tell() {
                // Of a write that was said to be made.
                return Err(e);
            }
            if staged {
                self.account_write(v, off, data.len() as u64).inspect_err(|e| v.failed.add(off, *e))?;
            }
            drop_privileges(v, kill)?;
            // A panic half way is a failed write too: what there is must not be published.
            let wrote = contain(|| self.put(h, v, off, data, staged)).map_err(|fault| {
                self.count_panic(&fault);
                fault.errno()
            });
            match &wrote {
                // Asked for what no file can hold: nothing was lost.
                Err(Errno::FBIG | Errno::INVAL) => {}
                Err(e) if staged => v.failed.add(off, *e),
                Ok(n) if staged => self.write_out_behind(h, v, off, *n),
                _ => {}
            }
            wrote
        })
    }

    fn put(&self, h: &Handle, v: &Version, off: u64, data: &[u8], staged: bool) -> Result<usize, Errno> {
        let wrote = |n: usize| {
            v.failed.heal(off..off.saturating_add(n as u64));
            n
        };
        if let Some(overlay) = v.overlaid() {
            return overlay.write(&self.backing, off, data).map(wrote);
        }
        if let Some(direct) = &v.direct {
            if is_aligned(off, data.len()) {
                // Where close waits for nothing, write is where a full disk is told of.
                let r = if staged && is_awaited(h) {
                    // It makes good what failed before it, and may have failed by now.
                    self.backing.write_behind(&direct.0, off, data)
                } else {
                    v.settle();
                    self.backing.write_direct(direct.0.fd(), off, data).map(wrote)
                };
                if r != Err(Errno::INVAL) {
                    Counters::add(&self.counters.direct_writes, 1);
                    return r;
                }
            }
            Counters::add(&self.counters.direct_fallbacks, 1);
        }
        self.backing.write(v.fd(), off, data).map(wrote)
    }

    /// A large new version goes to the device while its program writes it, if close will wait for all of it.
    pub(super) fn write_out_behind(self: &Arc<Self>, h: &Handle, v: &Arc<Version>, off: u64, n: usize) {
        let part = |at: u64| at / LARGE_BYTES;
        if is_awaited(h) && part(off) != part(off + n as u64) && is_written_out(v) {
            let (me, v) = (self.clone(), v.clone());
            self.writers.run(Box::new(move || {
                // Who is at it already goes on to the end.
                if let Some(mut at) = v.written_out.try_lock() {
                    me.write_pieces(&v, &mut at);
                }
            }));
        }
    }

    /// Runs `then` when of a large version little is left to be written to the device; at once when it is small.
    pub(super) fn when_written_out(self: &Arc<Self>, v: &Arc<Version>, then: impl FnOnce() + Send + 'static) {
        let left = |at: u64| v.accounted.load(Ordering::Relaxed).saturating_sub(at);
        if !is_written_out(v) || v.written_out.try_lock().is_some_and(|at| left(*at) <= LARGE_BYTES) {
            return then();
        }
        let (me, v) = (self.clone(), v.clone());
        self.writers.run(Box::new(move || {
            me.write_pieces(&v, &mut v.written_out.lock());
            then();
        }));
    }

    /// Piece by piece, so that flushes of others come in between.
    fn write_pieces(&self, v: &Version, at: &mut u64) {
        let mut piece = PIECE_BYTES;
        while *at + piece <= v.accounted.load(Ordering::Relaxed) {
            let began = Instant::now();
            if let Err(fault) = self.backing.write_piece(v.fd_unsettled(), *at, piece) {
                self.count_panic(&fault);
                // The kernel says so once, and not of which bytes.
                v.failed.add_late(0..u64::MAX, fault.errno());
                return;
            }
            *at += piece;
            let took = began.elapsed();
            if took < PIECE_TIME.start {
                piece *= 2;
            } else if took > PIECE_TIME.end {
                piece = PIECE_BYTES.max(piece / 2);
            }
        }
    }
}

/// Whether close waits until what was written through `h` is durable.
fn is_awaited(h: &Handle) -> bool {
    waits_at_close(h.policy)
}

/// Whether close waits for the device.
pub(super) fn waits_at_close(policy: Policy) -> bool {
    matches!(policy.durability, Durability::Close | Durability::Always)
}

/// Whether its content is in the page cache, and all of it to be written out before the commit.
fn is_written_out(v: &Version) -> bool {
    v.direct.is_none() && v.overlaid().is_none()
}

/// Takes set-user-ID, set-group-ID (when `kill`) and capabilities away, as the kernel does on a write: it leaves this
/// to us (`FUSE_HANDLE_KILLPRIV_V2`).
pub(super) fn drop_privileges(v: &Version, kill: bool) -> Result<(), Errno> {
    if v.caps.swap(false, Ordering::Relaxed) {
        match rfs::fremovexattr(v.fd_unsettled(), CAPS) {
            Ok(()) | Err(Errno::NODATA) => v.inode_changed(),
            Err(e) => return Err(e),
        }
    }
    if kill {
        let mode = rfs::fstat(v.fd_unsettled())?.st_mode;
        if without_privileges(mode) != mode {
            rfs::fchmod(v.fd_unsettled(), Mode::from_raw_mode(without_privileges(mode) & 0o7777))?;
            v.inode_changed();
        }
    }
    Ok(())
}
