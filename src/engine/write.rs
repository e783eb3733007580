//! Writes: to which descriptor of a version they go, what they take away, and what a failed one means for the version.

use std::sync::Arc;
use std::sync::atomic::Ordering;

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

impl Engine {
    /// Whether a write through `h` may wait for the device.
    pub fn write_waits(&self, h: &Handle, off: u64, len: usize) -> bool {
        let to_device = h.policy.method == Method::Direct && len as u64 >= ALIGN;
        let has_room = || {
            let Some(st) = h.file.state.try_read() else { return false };
            let direct = st.version.as_ref().and_then(|v| v.direct.as_ref());
            st.phase == Phase::Staged && is_awaited(h) && direct.is_some_and(|d| d.0.has_room(off, len))
        };
        to_device && !has_room() || self.backing.writes_wait()
    }

    /// Writes at an offset; may write less, as write(2) may.
    pub fn write(self: &Arc<Self>, h: &Handle, off: u64, data: &[u8], kill: bool) -> Access<usize> {
        self.change(h, true, |v, staged| {
            if let Some(e) = v.failed.tell() {
                // Of a write that was said to be made. This one is not.
                if staged {
                    v.failed.add(off, e);
                }
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
                Ok(n) if staged => self.note_staged_write(h, v, off, *n),
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

    /// A program wrote to a new version: a large one goes to the device meanwhile, if close waits for all of it.
    pub(super) fn note_staged_write(self: &Arc<Self>, h: &Handle, v: &Arc<Version>, off: u64, n: usize) {
        if is_awaited(h) && v.direct.is_none() && v.overlaid().is_none() && v.behind.note(off, n as u64) {
            self.write_behind(v);
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
