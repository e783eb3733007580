//! P8. No path, symlink, race or crafted name leads out of the backing directory or into `.fsys/`; the daemon holds
//! nothing that it does not need.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output};

use common::can_mount;
use common::loopfs::{Kind, LoopFs};
use common::mount::{Mount, fsys};
use common::world::{World, still};
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::error::Errno;
use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};

fn errno<T>(r: std::io::Result<T>) -> Option<i32> {
    r.err().and_then(|e| e.raw_os_error())
}

fn set_up(test: &str) -> Option<(LoopFs, Mount)> {
    can_mount(test).then(|| {
        let disk = LoopFs::new(Kind::Ext4, 300);
        let mount = Mount::start(&disk.subdir("data"), "");
        (disk, mount)
    })
}

/// `.fsys` by name, by rename, link and exchange, by listing, by handle, by another spelling and by a symlink.
#[test]
fn the_hidden_directory_is_reached_by_nothing() {
    let Some((_disk, mut mount)) = set_up("the_hidden_directory_is_reached_by_nothing") else { return };
    let at = |name: &str| mount.path().join(name);
    fs::write(at("f"), "x").unwrap();
    fs::create_dir(at("d")).unwrap();
    let hidden = at(".fsys");
    for path in [".fsys", ".fsys/", "./.fsys", "d/../.fsys", ".fsys/lock", ".fsys/staging", ".fsys/../.fsys/failed"] {
        assert_eq!(errno(fs::symlink_metadata(at(path))), Some(libc::ENOENT), "{path}");
        assert!(File::open(at(path)).is_err() && File::create(at(path)).is_err(), "{path}");
    }
    for flags in [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE, RenameFlags::WHITEOUT] {
        for other in ["f", "d", "none"] {
            assert!(renameat_with(CWD, &hidden, CWD, at(other), flags).is_err(), "{flags:?} to {other}");
            assert!(renameat_with(CWD, at(other), CWD, &hidden, flags).is_err(), "{flags:?} from {other}");
        }
    }
    assert!(fs::hard_link(at("f"), &hidden).is_err() && fs::hard_link(&hidden, at("g")).is_err());
    assert!(fs::create_dir(&hidden).is_err() && symlink("f", &hidden).is_err());
    assert!(fs::remove_dir(&hidden).is_err() && fs::remove_file(&hidden).is_err());
    symlink(".fsys", at("link")).unwrap();
    assert_eq!(errno(fs::read_dir(at("link"))), Some(libc::ENOENT));
    let listed = || fs::read_dir(mount.path()).unwrap().map(|e| e.unwrap());
    let inside = fs::metadata(mount.backing().join(".fsys")).unwrap().ino();
    assert!(listed().all(|e| e.file_name() != ".fsys" && e.metadata().unwrap().ino() != inside));
    // The number of the inode as a handle of the mount: 12 bytes, node and generation (fs/fuse/inode.c).
    for number in [inside, inside + 1, inside + 2, 1 << 62] {
        assert!(open_by_handle(mount.path(), number).is_err(), "handle of inode {number}");
    }
    // A bind mount that shows it under another name in the tree.
    fs::create_dir(mount.backing().join("other")).unwrap();
    let bind = Command::new("mount")
        .arg("--bind")
        .args([mount.backing().join(".fsys"), mount.backing().join("other")])
        .status();
    let seen = fs::read_dir(at("other"));
    if bind.unwrap().success() {
        Command::new("umount").arg(mount.backing().join("other")).status().unwrap();
        assert!(errno(seen) == Some(libc::ENOENT), "a bind mount leads into .fsys");
    }
    mount.stop();
}

fn open_by_handle(mount: &Path, node: u64) -> std::io::Result<()> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        words: [u32; 3],
    }
    let mut handle = Handle { bytes: 12, kind: 0x81, words: [(node >> 32) as u32, node as u32, 0] };
    let dir = File::open(mount)?;
    // SAFETY: a `struct file_handle` with 12 bytes of content, and a descriptor that lives through the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, dir.as_raw_fd(), &raw mut handle, libc::O_PATH) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the call just made it.
    unsafe { libc::close(fd as i32) };
    Ok(())
}

/// Ends a process that runs for ever.
struct Ended(Child);
impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Names that no kernel sends: the operation core takes a single name and nothing else, whoever asks.
#[test]
fn what_is_no_single_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("outside"), "secret").unwrap();
    let root = dir.path().join("data");
    fs::create_dir_all(root.join("d")).unwrap();
    let world = World::open(&root, still(Durability::Close, WriteMode::Auto));
    world.save("f", b"x").unwrap();
    for name in ["..", ".", "", "../outside", "/", "d/../..", "d/", ".fsys/lock", "./.fsys", "/etc/passwd", "d/new"] {
        // What is not there has no node.
        let refused = world.open_with(name, libc::O_RDONLY).unwrap_err();
        assert!([Errno::NOENT, Errno::STALE].contains(&refused), "lookup {name:?}: {refused}");
        assert!(world.create(name).is_err(), "create {name:?}");
        assert!(world.rename("f", name).is_err() && world.rename(name, "g").is_err(), "rename {name:?}");
        assert!(world.link("f", name).is_err() && world.unlink(name).is_err(), "link {name:?}");
    }
    assert_eq!(world.seen("f").unwrap(), b"x");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "something was made outside");
    assert_eq!(fs::read_dir(root.join("d")).unwrap().count(), 0);
    world.shutdown().unwrap();
}

/// The backing directory is the inode that was mounted, whatever its name leads to by now.
#[test]
fn a_root_that_was_renamed_is_still_the_root() {
    let Some((disk, mut mount)) = set_up("a_root_that_was_renamed_is_still_the_root") else { return };
    let outside = disk.subdir("outside");
    let moved = disk.path().join("moved");
    fs::write(mount.path().join("f"), "old").unwrap();
    fs::rename(mount.backing(), &moved).unwrap();
    symlink(&outside, mount.backing()).unwrap();
    fs::write(mount.path().join("f"), "new").unwrap();
    fs::create_dir(mount.path().join("d")).unwrap();
    assert_eq!(fs::read_to_string(moved.join("f")).unwrap(), "new");
    assert!(moved.join("d").is_dir());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    mount.stop();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nor at the end");
}

/// Hard links lead across no file system boundary, by no way; one that someone made behind the mount is that file.
#[test]
fn hard_links_cross_no_boundary() {
    let Some((disk, mut mount)) = set_up("hard_links_cross_no_boundary") else { return };
    let (out, at) = (disk.path().join("file"), |name: &str| mount.path().join(name));
    fs::write(&out, "outside").unwrap();
    fs::write(at("f"), "inside").unwrap();
    let crossing = Some(libc::EXDEV);
    assert_eq!(errno(fs::hard_link(&out, at("in"))), crossing);
    assert_eq!(errno(fs::hard_link(at("f"), disk.path().join("g"))), crossing);
    assert_eq!(errno(fs::rename(&out, at("in"))), crossing);
    assert_eq!(errno(fs::rename(at("f"), disk.path().join("g"))), crossing);
    // By descriptor, as linkat(2) takes one.
    let open = File::open(&out).unwrap();
    let by_fd = format!("/proc/self/fd/{}", open.as_raw_fd());
    assert_eq!(errno(linkat(CWD, by_fd, CWD, at("in"), AtFlags::SYMLINK_FOLLOW).map_err(Into::into)), crossing);
    // Who may link it into the tree may have it written there; it stays one file.
    fs::hard_link(&out, mount.backing().join("linked")).unwrap();
    fs::write(at("linked"), "by the mount").unwrap();
    assert_eq!(fs::read_to_string(&out).unwrap(), "by the mount");
    assert_eq!(fs::metadata(&out).unwrap().nlink(), 2);
    mount.stop();
}

fn as_user(uid: &str, command: &Command) -> Output {
    let mut user = Command::new("setpriv");
    user.args(["--reuid", uid, "--regid", uid, "--clear-groups"]).arg(command.get_program()).args(command.get_args());
    user.output().unwrap()
}

/// The control socket takes requests of the user who mounted and of root: the directory keeps others out, and so does
/// the daemon where somebody made a way around it.
#[test]
fn the_control_socket_is_its_owners() {
    let Some((_disk, mut mount)) = set_up("the_control_socket_is_its_owners") else { return };
    let mut status = fsys();
    status.args(["status", "--json"]).arg(mount.path());
    let told = as_user("1001", &status);
    let said = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.status.success() && said.contains("uid 0") && said.contains("Permission denied"), "{said}");
    // A hard link of the socket, in a directory that all may enter.
    let device = fs::metadata(mount.path()).unwrap().dev();
    let name = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let way = tempfile::Builder::new().prefix("fsys-test-").tempdir_in("/run").unwrap();
    fs::set_permissions(way.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = way.path().join("socket");
    fs::hard_link(Path::new("/run/fsys-mount").join(name), &socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    let mut ask = Command::new("/usr/bin/perl");
    // Who is refused is so before a word was said.
    let script = "my $s=IO::Socket::UNIX->new(Peer=>$ARGV[0]) or die; print $s \"$ARGV[1]\\n\" if $ARGV[1]; print <$s>";
    ask.args(["-MIO::Socket::UNIX", "-e", script]).arg(&socket);
    let told = as_user("1001", &ask);
    let refused = String::from_utf8_lossy(&told.stdout);
    assert!(refused.contains("user 1001 may not control this mount"), "{told:?}");
    // Control: the same way is open to root.
    let told = as_user("0", ask.arg("\"status\""));
    assert!(String::from_utf8_lossy(&told.stdout).contains("healthy"), "{told:?}");
    mount.stop();
}

/// A file that appears behind the mount just when somebody creates that name is opened only by those who may.
#[test]
fn a_create_does_not_open_what_is_forbidden() {
    let Some((_disk, mut mount)) = set_up("a_create_does_not_open_what_is_forbidden") else { return };
    fs::set_permissions(mount.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let backing = mount.backing().to_owned();
    // Without a right to read the file, an ordinary user opens with O_CREAT as fast as they can.
    let script = "import os\nos.setgroups([]); os.setgid(1001); os.setuid(1001)\nn=0\n\
        while n<300:\n\x20try:\n\x20\x20f=os.open('s%d'%n,os.O_RDWR|os.O_CREAT,0o644)\n\
        \x20\x20if os.read(f,6)==b'secret': raise SystemExit(3)\n\x20\x20os.close(f)\n\x20except PermissionError: n+=1; continue\n\
        \x20except FileExistsError: pass\n\x20try: os.unlink('s%d'%n)\n\x20except OSError: pass\n";
    let mut job = Ended(Command::new("python3").args(["-c", script]).current_dir(mount.path()).spawn().unwrap());
    let mut made = 0;
    let status = loop {
        if let Some(status) = job.0.try_wait().unwrap() {
            break status;
        }
        for _ in 0..10 {
            let hidden = backing.join("hidden");
            fs::write(&hidden, "secret").unwrap();
            fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600)).unwrap();
            // Nothing is overwritten: where the other has the name, the next one is tried.
            for n in 0..300 {
                if renameat_with(CWD, &hidden, CWD, backing.join(format!("s{n}")), RenameFlags::NOREPLACE).is_ok() {
                    made += 1;
                    break;
                }
            }
        }
    };
    assert!(status.success(), "{status}: a forbidden file was read after {made}");
    assert!(made >= 300);
    mount.stop();
}

/// The capabilities of `NEEDED` in src/sys/creds.rs and of contrib/doc/SECURITY.md, as the kernel numbers them.
const NEEDED: u64 = 0x2_8820_02df;

fn capabilities(status: &str, set: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(set)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

/// The daemon has no descriptor of who started it, and only the capabilities that src/sys/creds.rs lists.
#[test]
fn the_daemon_holds_only_what_it_needs() {
    if !can_mount("the_daemon_holds_only_what_it_needs") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    let mark = disk.path().join("opened by the starter");
    let file = File::create(&mark).unwrap();
    // Without close-on-exec, as a careless script leaves its descriptors.
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let mut mount = Mount::start(&disk.subdir("data"), "");
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC).unwrap();
    let proc = format!("/proc/{}", mount.pid().as_raw_nonzero());
    let open: Vec<_> =
        fs::read_dir(format!("{proc}/fd")).unwrap().filter_map(|e| fs::read_link(e.unwrap().path()).ok()).collect();
    assert!(open.iter().all(|p| *p != mark), "{open:?}");
    assert!(open.iter().any(|p| p == Path::new("/dev/fuse")), "control: descriptors are seen: {open:?}");
    // What this test does not have, the daemon cannot keep.
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let starter = capabilities(&own, "CapPrm");
    assert_ne!(starter & !NEEDED, 0, "control: there is something to give up");
    for thread in fs::read_dir(format!("{proc}/task")).unwrap() {
        let mut status = String::new();
        File::open(thread.unwrap().path().join("status")).unwrap().read_to_string(&mut status).unwrap();
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            let has = capabilities(&status, set);
            assert_eq!(has, NEEDED & starter, "{set} {has:#x}");
        }
    }
    mount.stop();
}
