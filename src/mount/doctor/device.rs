//! The device under the backing file system: what it does with a flush.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{Finding, number_in, text_in};
use crate::backend::probe::Probe;

/// Offset of `s_feature_compat` in an ext4 super block, which begins at byte 1024 (fs/ext4/ext4.h).
const FEATURE_COMPAT: u64 = 1024 + 0x5c;
/// `EXT4_FEATURE_COMPAT_FAST_COMMIT`.
const FAST_COMMIT: u32 = 0x0400;

/// All about the device; nothing where there is none.
pub fn examine(probe: &Probe) -> Vec<Finding> {
    let Some(name) = probe.device.as_deref() else { return Vec::new() };
    let mut found = vec![write_cache(name, barriers_off(probe))];
    if probe.fs == "ext4" {
        found.extend(fast_commit(name));
        found.extend(recorded_errors(name));
    }
    found
}

/// Whether the file system was told not to flush.
fn barriers_off(probe: &Probe) -> bool {
    probe.has("nobarrier") || probe.options.split(',').any(|o| o == "barrier=0")
}

fn write_cache(name: &str, barriers_off: bool) -> Finding {
    let check = "write cache";
    // A partition has no queue of its own.
    let queue = |file: &str| {
        text_in(&format!("/sys/class/block/{name}/queue/{file}"))
            .or_else(|| text_in(&format!("/sys/class/block/{name}/../queue/{file}")))
    };
    let kind = match text_in(&format!("/sys/class/block/{name}/loop/backing_file")) {
        Some(file) => format!("{name}, a loop device over {file}"),
        None if queue("rotational").as_deref() == Some("1") => format!("{name}, a rotating disk"),
        None => name.to_owned(),
    };
    let disk_says = disk_cache(name);
    match (queue("write_cache").as_deref(), barriers_off) {
        (Some("write back"), true) => Finding::failure(
            check,
            format!("{kind} has a volatile cache, and the file system is mounted without barriers"),
            "a power cut takes or tears what was acknowledged: no promise holds",
            "mount the backing file system with barriers (`-o barrier`), then mount this again",
        ),
        (Some("write through"), _) if disk_says.as_deref().is_some_and(|d| d.starts_with("write back")) => {
            Finding::failure(
                check,
                format!("{kind} has a volatile cache, and the kernel was told that it has none"),
                "no flush reaches the disk: a power cut takes or tears what was acknowledged",
                "echo 'write back' into the queue/write_cache of the disk in /sys/block, or switch its cache off",
            )
        }
        (Some("write back"), false) => Finding::ok(check, format!("{kind}: volatile, and flushed by each commit")),
        (Some(says), _) => Finding::ok(check, format!("{kind}: {says}, flushes cost nothing there")),
        (None, true) => Finding::warning(
            check,
            format!("{kind}: not known, and the file system is mounted without barriers"),
            "if the device has a volatile cache, a power cut takes or tears what was acknowledged",
            "mount the backing file system with barriers",
        ),
        (None, false) => Finding::ok(check, format!("{kind}: not known; every commit flushes")),
    }
}

/// What a SCSI or ATA disk itself says of its cache.
fn disk_cache(name: &str) -> Option<String> {
    let dir = ["device/scsi_disk", "../device/scsi_disk"].map(|d| format!("/sys/class/block/{name}/{d}"));
    let entry = dir.iter().find_map(|d| std::fs::read_dir(d).ok()?.next()?.ok())?;
    text_in(&entry.path().join("cache_type").to_string_lossy())
}

/// Read from the super block, which only root may: no option and no file in `/proc` tells it.
fn fast_commit(name: &str) -> Option<Finding> {
    let mut bytes = [0; 4];
    File::open(format!("/dev/{}", name.replace('!', "/"))).ok()?.read_exact_at(&mut bytes, FEATURE_COMPAT).ok()?;
    (u32::from_le_bytes(bytes) & FAST_COMMIT != 0).then(|| {
        Finding::warning(
            "fast_commit",
            format!("ext4 on {name} has the feature fast_commit"),
            "after a power cut that tears a write, such a file system may not mount at all: 24 of 400 crash states, \
             with or without this program",
            "switch it off while it is unmounted: `tune2fs -O ^fast_commit DEVICE`",
        )
    })
}

fn recorded_errors(name: &str) -> Option<Finding> {
    let n = number_in(&format!("/sys/fs/ext4/{name}/errors_count")).filter(|n| *n > 0)?;
    Some(Finding::warning(
        "ext4 errors",
        format!("ext4 on {name} has recorded {n} error(s)"),
        "its metadata may be damaged; saves there can fail or be lost",
        "unmount it and run `e2fsck -f`",
    ))
}
