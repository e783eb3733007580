//! No torn, empty, missing or lost file: while programs save naively, and while the daemon is killed.
//!
//! This is a slice of the counts that `scripts/torn` runs with the same code: `FSYS_TORN_SAVES`,
//! `FSYS_TORN_KILLS`, `FSYS_TORN_WRITERS`, `FSYS_TEST_FS`. Every check has its negative control here.

mod common;

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use common::tools::{Ended, Running, run_tool};
use common::{Kind, LoopFs, Mount, can_mount, env_number, kinds, say, wait_until};

/// These tests keep every core busy: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Where the savers note what was acknowledged: outside every filesystem under test.
fn ack_table() -> tempfile::NamedTempFile {
    tempfile::Builder::new()
        .prefix(&format!("fsys-test-{}-ack-", std::process::id()))
        .tempfile_in("/dev/shm")
        .expect("a file on tmpfs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn writers() -> u64 {
    env_number("FSYS_TORN_WRITERS", 64)
}

/// Two files a writer: it goes from one to the other, so both are read while the other is written.
fn files() -> u32 {
    (writers() * 2) as u32
}

/// The verdict over the backing directory at rest.
fn final_check(dir: &Path, ack: &Path) -> Ended {
    run_tool("watcher", dir, files(), &["--final", "--ack", text(ack)])
}

fn assert_clean(what: &str, kind: Kind, watch: &Ended) {
    assert_eq!(watch.code, 0, "{} {what}: {}\n{}", kind.name(), watch.summary, watch.complaint);
}

/// Contract P1, live: whoever reads the backing directory sees complete versions only, and P2: what `close()`
/// acknowledged is there from then on.
#[test]
fn naive_saves_are_never_seen_torn_in_the_backing_directory() {
    if !can_mount("naive_saves_are_never_seen_torn_in_the_backing_directory") {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let fs = LoopFs::new(kind, 2048);
        let backing = fs.subdir("data");
        let work = backing.join("work");
        std::fs::create_dir(&work).unwrap();
        let mut mount = Mount::start(&backing, "");
        let ack = ack_table();
        let watcher = Running::start("watcher", &work, files(), &["--ack", text(ack.path())]);
        let saves = env_number("FSYS_TORN_SAVES", 6000);
        let flushes = fs.flushes();
        let saver = run_tool(
            "saver",
            &mount.path().join("work"),
            files(),
            &["--writers", &writers().to_string(), "--saves", &saves.to_string(), "--ack", text(ack.path())],
        );
        let flushes = fs.flushes() - flushes;
        let watch = watcher.stop();
        assert_eq!(saver.code, 0, "{}: {}\n{}", kind.name(), saver.summary, saver.complaint);
        assert_eq!(saver.count("saves"), saves);
        assert_clean("live", kind, &watch);
        assert!(watch.count("versions") > u64::from(files()), "saw hardly anything: {}", watch.summary);
        assert_clean("after the last close", kind, &final_check(&work, ack.path()));
        mount.stop();
        assert_clean("after umount", kind, &final_check(&work, ack.path()));
        say(&format!(
            "{}: {saves} naive saves by {} programs, {} reads of the backing directory, 0 bad; {:.0} saves/s, \
             {:.3} flushes per save",
            kind.name(),
            writers(),
            watch.count("reads"),
            saver.figure("saves_per_s"),
            common::per(flushes, saves),
        ));
    }
}

/// Negative control: the same programs and the same checker on the raw filesystem.
#[test]
fn the_same_check_finds_torn_files_on_the_raw_filesystem() {
    if !can_mount("the_same_check_finds_torn_files_on_the_raw_filesystem") {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let fs = LoopFs::new(kind, 2048);
        let work = fs.subdir("work");
        let watcher = Running::start("watcher", &work, files(), &[]);
        let saves = env_number("FSYS_TORN_SAVES", 6000);
        let args = ["--writers", &writers().to_string(), "--saves", &saves.to_string()];
        let saver = run_tool("saver", &work, files(), &args);
        let watch = watcher.stop();
        assert_eq!(saver.code, 0, "{}: {}", kind.name(), saver.complaint);
        assert_eq!(watch.code, 1, "{}: the checker is blind: {}", kind.name(), watch.summary);
        assert!(watch.kind("torn") + watch.kind("empty") > 0, "{}", watch.summary);
        say(&format!(
            "{}, raw (negative control): {} torn and {} empty in {} reads",
            kind.name(),
            watch.kind("torn"),
            watch.kind("empty"),
            watch.count("reads"),
        ));
    }
}

/// Contract P1, P2, P7: SIGKILL at random moments, the same command again, and nothing torn or lost.
#[test]
fn kills_of_the_daemon_tear_and_lose_nothing() {
    if !can_mount("kills_of_the_daemon_tear_and_lose_nothing") {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let fs = LoopFs::new(kind, 2048);
        let backing = fs.subdir("data");
        let work = backing.join("work");
        std::fs::create_dir(&work).unwrap();
        let mut mount = Mount::start(&backing, "");
        let ack = ack_table();
        let watcher = Running::start("watcher", &work, files(), &["--ack", text(ack.path())]);
        // The directory is one that the bare mount point does not have: between two mounts a save must fail,
        // not land under the mount point.
        let mut saver = Running::start(
            "saver",
            &mount.path().join("work"),
            files(),
            &["--writers", &writers().to_string(), "--on-error", "retry", "--ack", text(ack.path())],
        );
        let kills = env_number("FSYS_TORN_KILLS", 8);
        let seed = env_number("FSYS_TORN_SEED", u64::from(std::process::id()));
        for round in 0..kills {
            let before = acknowledged(ack.path());
            let going = wait_until(Duration::from_secs(60), || acknowledged(ack.path()) > before || !saver.runs());
            assert!(going && saver.runs(), "no save gets through before kill {round}\n{}", mount.log());
            // The random moment itself: nothing waits for this time to pass.
            let moment = common::version::mix(seed << 16 ^ round) % 300;
            std::thread::sleep(Duration::from_millis(moment));
            mount.kill9();
            let check = final_check(&work, ack.path());
            assert_clean(&format!("after kill {round} (seed {seed})"), kind, &check);
            mount.restart();
        }
        let before = acknowledged(ack.path());
        let going = wait_until(Duration::from_secs(60), || acknowledged(ack.path()) > before || !saver.runs());
        assert!(going && saver.runs(), "no save gets through after the last kill\n{}", mount.log());
        let saver = saver.stop();
        let watch = watcher.stop();
        assert_eq!(saver.code, 0, "{}: {}\n{}", kind.name(), saver.summary, saver.complaint);
        assert!(saver.count("errors") > 0, "the kills hit no save: {}", saver.summary);
        assert_clean("live", kind, &watch);
        assert_clean("at the end", kind, &final_check(&work, ack.path()));
        mount.stop();
        assert_clean("after umount", kind, &final_check(&work, ack.path()));
        say(&format!(
            "{}: {kills} SIGKILLs of the daemon, {} acknowledged saves, {} failed, {} reads: 0 torn, 0 lost (seed {seed})",
            kind.name(),
            saver.count("saves"),
            saver.count("errors"),
            watch.count("reads"),
        ));
    }
}

/// The sum of all acknowledged sequence numbers.
fn acknowledged(table: &Path) -> u64 {
    let bytes = std::fs::read(table).expect("the table");
    bytes.chunks_exact(16).filter_map(|entry| entry[8..].try_into().ok()).map(u64::from_le_bytes).sum()
}
