//! Makes mounts, for every transport the same way, and takes them away: by mount(2) and umount2(2), or through
//! fusermount3 where only that may.

use std::ffi::{CString, OsStr};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// What the kernel is told about a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The source that is shown.
    pub fsname: String,
    /// The type is shown as `fuse.` and this.
    pub subtype: &'static str,
    /// Who may enter.
    pub access: Access,
    /// `ro`.
    pub read_only: bool,
    /// `dev` or `nodev`; unset is `nodev`.
    pub dev: Option<bool>,
    /// `suid` or `nosuid`; unset is `nosuid`.
    pub suid: Option<bool>,
    /// `exec` or `noexec`.
    pub exec: Option<bool>,
    /// `atime` or `noatime`.
    pub atime: Option<bool>,
}

/// Who may enter a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody; the kernel checks permissions.
    All,
    /// Root and the user who mounts. The kernel knows everybody or the owner, so requests of others are refused.
    RootAndOwner,
    /// The user who mounts.
    Owner,
}

impl Options {
    /// The words of `-o`, without those that mount(2) takes as flags.
    fn words(&self) -> Vec<String> {
        // The kernel checks permissions, with the caller's groups, before a request gets here.
        let mut words = vec![format!("subtype={}", self.subtype), "default_permissions".to_owned()];
        if self.access != Access::Owner {
            words.push("allow_other".to_owned());
        }
        words
    }

    fn flags(&self) -> MountFlags {
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::RDONLY, self.read_only);
        flags.set(MountFlags::NODEV, self.dev != Some(true));
        flags.set(MountFlags::NOSUID, self.suid != Some(true));
        flags.set(MountFlags::NOEXEC, self.exec == Some(false));
        flags.set(MountFlags::NOATIME, self.atime == Some(false));
        flags
    }

    /// The list for fusermount3, in which a comma in the source is escaped.
    fn list(&self) -> String {
        let mut words = vec![format!("fsname={}", self.fsname.replace('\\', "\\\\").replace(',', "\\,"))];
        words.extend(self.words());
        let named = [("dev", self.dev), ("suid", self.suid), ("exec", self.exec), ("atime", self.atime)];
        let named =
            named.into_iter().filter_map(|(name, v)| v.map(|yes| format!("{}{name}", if yes { "" } else { "no" })));
        words.extend(named);
        words.extend(self.read_only.then(|| "ro".to_owned()));
        words.join(",")
    }
}

/// Mounts, and gives the descriptor that the kernel's requests come from.
///
/// # Errors
/// What mount(2) or fusermount3 says.
pub fn mount(mountpoint: &Path, options: &Options) -> io::Result<OwnedFd> {
    match mount_direct(mountpoint, options) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => mount_helped(mountpoint, options),
        done => done,
    }
}

fn mount_direct(mountpoint: &Path, options: &Options) -> io::Result<OwnedFd> {
    let device = std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")?;
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mode = std::fs::metadata(mountpoint)?.mode();
    let fd = device.as_raw_fd();
    let own = format!("fd={fd},rootmode={mode:o},user_id={user},group_id={group},");
    let data = CString::new(own + &options.words().join(","))?;
    rustix::mount::mount(options.fsname.as_str(), mountpoint, "fuse", options.flags(), data.as_c_str())?;
    Ok(device.into())
}

/// fusermount3 mounts and sends the descriptor through a socket, which it finds as its standard input.
fn mount_helped(mountpoint: &Path, options: &Options) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(options.list())
        .args([OsStr::new("--"), mountpoint.as_os_str()])
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("fusermount3: {e}")))?;
    let device = receive(&ours);
    let output = child.wait_with_output()?;
    match device {
        Ok(Some(fd)) => Ok(fd),
        _ if !output.status.success() => {
            Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
        Ok(None) => Err(io::Error::other("fusermount3 sent no descriptor")),
        Err(e) => Err(e),
    }
}

fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let (mut byte, mut space) = ([0; 1], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut byte)];
    rustix::io::retry_on_intr(|| recvmsg(socket.as_fd(), &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC))?;
    Ok(ancillary.drain().find_map(|m| match m {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

/// Unmounts `mountpoint`; `lazy` detaches it now and lets open files go on until they are closed.
///
/// # Errors
/// `EBUSY` when it is in use and not `lazy`; `EINVAL` when nothing is mounted there; what the system says.
pub fn unmount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let detach = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(mountpoint, detach | UnmountFlags::NOFOLLOW) {
        Err(Errno::PERM) => fusermount(mountpoint, lazy),
        r => Ok(r?),
    }
}

fn fusermount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let output = Command::new("fusermount3")
        .args(if lazy { &["-u", "-z", "--"][..] } else { &["-u", "--"][..] })
        .arg(mountpoint)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") { Err(Errno::BUSY.into()) } else { Err(io::Error::other(said.trim().to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Options {
        Options {
            fsname: "/a,b".into(),
            subtype: "fsys",
            access: Access::All,
            read_only: false,
            dev: None,
            suid: Some(true),
            exec: Some(false),
            atime: None,
        }
    }

    #[test]
    fn both_ways_say_the_same() {
        let o = plain();
        assert_eq!(o.list(), "fsname=/a\\,b,subtype=fsys,default_permissions,allow_other,suid,noexec");
        assert_eq!(o.flags(), MountFlags::NODEV | MountFlags::NOEXEC);
        let o = Options { access: Access::Owner, read_only: true, suid: None, atime: Some(false), ..plain() };
        assert_eq!(o.list(), "fsname=/a\\,b,subtype=fsys,default_permissions,noexec,noatime,ro");
        assert!(o.flags().contains(MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::NOSUID));
    }

    #[test]
    fn a_descriptor_comes_through_the_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(receive(&ours).unwrap().is_none(), "the end of the other side is no descriptor");
    }
}
