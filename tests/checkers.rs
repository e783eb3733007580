//! The negative controls of the checkers: each defect that they exist for is planted, and must be found.

#![allow(clippy::unwrap_used, reason = "all of this is test code")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::tools::{Ended, run_tool};
use common::tree::{Skip, Snapshot, assert_same};
use common::version::{Defect, LINE, Version, check, check_appended, file_name};

const V1: Version = Version { id: 3, seq: 1, len: 5000 };
const V2: Version = Version { id: 3, seq: 2, len: 7000 };

fn is_torn(data: &[u8]) -> bool {
    matches!(check(3, data), Err(Defect::Torn(_)))
}

#[test]
fn a_whole_version_is_accepted_and_every_damage_is_found() {
    for len in [3 * LINE, 1000, 1024, 4096, 65_536, 65_537] {
        assert_eq!(check(3, &Version { id: 3, seq: 9, len }.render()), Ok(9), "{len}");
    }
    let (one, two) = (V1.render(), V2.render());
    assert_eq!(check(3, &[]), Err(Defect::Empty));
    for cut in [1, LINE - 1, LINE, 100, two.len() / 3, two.len() - 1] {
        assert!(is_torn(&two[..cut]), "prefix of {cut} bytes");
    }
    for cut in [LINE, 1000, 4096] {
        let mix = [&two[..cut], &one[cut..]].concat();
        assert!(is_torn(&mix), "new up to {cut}, then old");
        let mix = [&one[..cut], &two[cut..]].concat();
        assert!(is_torn(&mix), "old up to {cut}, then new");
    }
    let same_len = Version { len: V2.len, ..V1 }.render();
    assert!(is_torn(&[&two[..4096], &same_len[4096..]].concat()), "two saves of the same length");
    assert!(is_torn(&[two.clone(), one].concat()), "something after the end");
    assert!(is_torn(&vec![0; 5000]), "zeros");
    assert!(matches!(check(4, &two), Err(Defect::Torn(_))), "another file's content");
    for at in (0..two.len()).step_by(97) {
        let mut flipped = two.clone();
        flipped[at] ^= 1;
        assert!(is_torn(&flipped), "bit at byte {at}");
    }
}

#[test]
fn an_appended_file_may_end_in_a_part_and_in_nothing_else() {
    let (one, two) = (V1.render(), V2.render());
    let both = [one.clone(), two.clone()].concat();
    assert_eq!(check_appended(3, &both), Ok(2));
    assert_eq!(check_appended(3, &both[..both.len() - 10]), Ok(1));
    assert_eq!(check_appended(3, &[&one[..], b"garbage"].concat()[..]), Ok(1), "less than a header: cannot be told");
    assert!(check_appended(3, &[&one[..], &[0; 4096]].concat()).is_err(), "zeros at the end");
    assert!(check_appended(3, &[two, one].concat()).is_err(), "out of order");
}

/// A directory as two savers would leave it, with the table; `damage` spoils one thing.
fn watch(damage: impl FnOnce(&Path, &Path)) -> Ended {
    let dir = tempfile::tempdir().unwrap();
    let table = tempfile::NamedTempFile::new().unwrap();
    for id in 0..4u32 {
        fs::write(dir.path().join(file_name(id)), Version { id, seq: 5, len: 3000 }.render()).unwrap();
        let entry = [6u64.to_le_bytes(), 5u64.to_le_bytes()].concat();
        table.as_file().write_all_at(&entry, u64::from(id) * 16).unwrap();
    }
    damage(dir.path(), table.path());
    run_tool("watcher", dir.path(), 4, &["--final", "--ack", table.path().to_str().unwrap()])
}

#[test]
fn the_watcher_accepts_what_is_right_and_finds_each_kind_of_wrong() {
    let good = watch(|_, _| ());
    assert_eq!((good.code, good.count("bad"), good.count("reads")), (0, 0, 4), "{good:?}");
    let begun =
        watch(|dir, _| fs::write(dir.join(file_name(2)), Version { id: 2, seq: 6, len: 900 }.render()).unwrap());
    assert_eq!(begun.code, 0, "a save that was begun but not acknowledged may be there: {begun:?}");

    let file = |dir: &Path| dir.join(file_name(2));
    let content = |seq| Version { id: 2, seq, len: 3000 }.render();
    let expect = |kind: &str, ended: Ended| {
        assert_eq!((ended.code, ended.kind(kind), ended.count("bad")), (1, 1, 1), "{kind}: {ended:?}");
        assert!(kind == "stray" || ended.complaint.contains(&file_name(2)), "names no file: {ended:?}");
    };
    expect("missing", watch(|dir, _| fs::remove_file(file(dir)).unwrap()));
    expect("empty", watch(|dir, _| fs::write(file(dir), b"").unwrap()));
    expect("torn", watch(|dir, _| fs::write(file(dir), &content(5)[..1000]).unwrap()));
    expect("lost", watch(|dir, _| fs::write(file(dir), content(4)).unwrap()));
    expect("from nowhere", watch(|dir, _| fs::write(file(dir), content(7)).unwrap()));
    expect("stray", watch(|dir, _| fs::write(dir.join("f000002.old"), b"x").unwrap()));

    let nothing = tempfile::tempdir().unwrap();
    assert_eq!(run_tool("watcher", nothing.path(), 4, &["--final"]).code, 2, "an empty directory proves nothing");
}

/// One of everything that the comparer looks at.
fn sample(dir: &Path) {
    fs::create_dir_all(dir.join("sub/deeper")).unwrap();
    fs::write(dir.join("sub/file"), b"content").unwrap();
    fs::write(dir.join("sub/other"), b"content").unwrap();
    fs::hard_link(dir.join("sub/file"), dir.join("sub/deeper/link")).unwrap();
    symlink("sub/file", dir.join("symlink")).unwrap();
    rustix::fs::setxattr(dir.join("sub/other"), "user.note", b"one", rustix::fs::XattrFlags::empty()).unwrap();
    for path in ["sub/file", "sub/other", "sub/deeper", "sub"] {
        let file = File::open(dir.join(path)).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789)).unwrap();
    }
    let path = dir.join("symlink");
    common::run(Command::new("touch").args(["-h", "-d", "2020-01-01"]).arg(path));
}

fn differences(left: &Path, right: &Path) -> Vec<String> {
    Snapshot::take(left, Skip::default()).differences(&Snapshot::take(right, Skip::default()))
}

/// The kind of difference, and how to make one in a sample.
type Change<'a> = (&'a str, &'a dyn Fn(&Path));

#[test]
fn the_comparer_finds_each_kind_of_difference() {
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let retime = |path: &Path| File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    let keep_time = |path: &Path, change: &dyn Fn(&Path)| {
        let time = fs::metadata(path).unwrap().modified().unwrap();
        change(path);
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    };
    let changes: [Change; 9] = [
        ("content", &|d| keep_time(&d.join("sub/file"), &|p| fs::write(p, b"contend").unwrap())),
        ("size", &|d| keep_time(&d.join("sub/file"), &|p| fs::write(p, b"contents").unwrap())),
        ("mode", &|d| fs::set_permissions(d.join("sub/file"), fs::Permissions::from_mode(0o4755)).unwrap()),
        ("mtime", &|d| retime(&d.join("sub/file"))),
        ("xattrs", &|d| {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(d.join("sub/other"), "user.note", b"two", flags).unwrap();
        }),
        ("target", &|d| {
            fs::remove_file(d.join("symlink")).unwrap();
            symlink("sub/other", d.join("symlink")).unwrap();
        }),
        ("link to", &|d| {
            fs::remove_file(d.join("sub/deeper/link")).unwrap();
            fs::copy(d.join("sub/file"), d.join("sub/deeper/link")).unwrap();
        }),
        ("only in", &|d| fs::write(d.join("new"), b"").unwrap()),
        ("type", &|d| {
            fs::remove_file(d.join("symlink")).unwrap();
            fs::copy(d.join("sub/file"), d.join("symlink")).unwrap();
        }),
    ];
    for (what, change) in changes {
        let (left, right) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        sample(left.path());
        sample(right.path());
        assert_eq!(assert_same(what, left.path(), right.path(), Skip::default()), 6);
        change(right.path());
        let found = differences(left.path(), right.path());
        assert!(found.iter().any(|line| line.contains(what)), "{what} not found in {found:?}");
    }
}

#[test]
fn the_comparer_sees_owners() {
    if !common::can_mount("the_comparer_sees_owners") {
        return;
    }
    let (left, right) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    sample(left.path());
    sample(right.path());
    std::os::unix::fs::lchown(right.path().join("symlink"), Some(12), Some(34)).unwrap();
    let found = differences(left.path(), right.path());
    assert_eq!(found, ["symlink: owner: 0:0 | 12:34"]);
}

/// The flush counter counts: the proper save flushes, the naive one does not have to.
#[test]
fn the_loop_filesystem_counts_flushes_and_leaves_nothing() {
    if !common::can_mount("the_loop_filesystem_counts_flushes_and_leaves_nothing") {
        return;
    }
    for kind in common::Kind::ALL {
        let fs = common::LoopFs::new(kind, 512);
        let dir = fs.path().to_owned();
        let before = fs.flushes();
        let saver = run_tool("saver", &dir, 1, &["--saves", "20", "--style", "dance", "--size", "4096"]);
        assert_eq!(saver.code, 0, "{saver:?}");
        let flushes = fs.flushes() - before;
        assert!(flushes >= 20, "{}: {flushes} flushes for 20 durable saves", kind.name());
        drop(fs);
        assert!(!common::is_mounted(&dir) && !dir.exists());
    }
}

/// A panic in the middle of a test leaves no mount, no loop device, no image.
#[test]
fn a_panic_leaves_nothing_mounted() {
    if !common::can_mount("a_panic_leaves_nothing_mounted") {
        return;
    }
    let (send, receive) = std::sync::mpsc::channel();
    let outcome = std::thread::spawn(move || {
        let fs = common::LoopFs::new(common::Kind::Ext4, 300);
        send.send(fs.path().to_owned()).unwrap();
        panic!("planned: the test of the clean-up");
    })
    .join();
    assert!(outcome.is_err());
    let dir = receive.recv().unwrap();
    assert!(!common::is_mounted(&dir) && !dir.exists());
}
