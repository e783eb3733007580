//! `fsys-mount`, and its mount(8) form under the name `mount.fsys`: what was typed, as a [`mount::Request`].

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Parser};

use super::{EXIT_CODES, Output, finish, parse, remount};
use crate::config::options::{self, Options};
use crate::error::{Error, Exit, Result};
use crate::mount::volume::Launcher;
use crate::mount::{self, Request};

const EXAMPLES: &str = "Examples:
  fsys-mount /data /mnt/fsys
  fsys-mount -o durability=fsync,commit_interval_ms=2000 /data /mnt/fsys
  fsys-mount -f --config /etc/fsys.toml -o log=debug /data /mnt/fsys
  fsys-mount -o 'rule=*.db:mode=in-place' /data /mnt/fsys
  fstab:  /data  /mnt/fsys  fsys  durability=close,nofail  0 0

Options (-o), later ones win:
  mode=auto|replace|in-place|journal   how the content of a file is written
  durability=always|close|fsync|relaxed   which calls wait until their work is durable
  method=auto|sync|data|direct   how data reaches stable storage
  restage_max_bytes=N            largest committed file that is copied when its writer goes on
  rule=GLOB:KEY=VALUE[:...]      the four values above, for the paths that match
  window_us=N batch_max=N queue_max=N commit_interval_ms=N pending_max=N
  staging_max_bytes=N cache_ms=N threads=N slow_commit_ms=N    bounds and times
  passthrough=auto|off           the kernel serves files of mode in-place itself
  watch_backing=auto|off         changes by others in BACKING are told to the kernel, which keeps more
  transport=auto|fuser|io-uring  how the kernel's requests come: over /dev/fuse, or through io_uring
                                 (less work, needs /sys/module/fuse/parameters/enable_uring=Y); `fsys status` says which
  config=FILE  log=error|warn|info|debug|trace  log_format=text|json|journald  log_file=FILE  fsname=NAME
  xattr_policy=true|false        files may set their own policy by the xattr user.fsys.policy
  metrics=ADDRESS:PORT           answers Prometheus there; metrics_remote=true allows other than 127.0.0.1
  ro rw allow_other allow_root dev nodev suid nosuid exec noexec atime noatime
  sync                           the same as durability=always
  remount                        change a mount: its flags, and values that differ from those it was mounted with
A comma inside a value is written `\\,`. What mount(8) and init systems add (nofail, x-...) is accepted.";

const AFTER_HELP: &str = "Run `fsys-mount --help` for examples, the options and the exit codes.";

/// `fsys-mount`: whole, durable and fast saves for unmodified programs.
#[derive(Debug, Parser)]
#[command(
    name = "fsys-mount",
    version,
    about = "Mount BACKING on MOUNTPOINT: every save is whole or not there, durable, and fast",
    after_help = AFTER_HELP,
    after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}")
)]
pub(super) struct Args {
    /// Stay in the foreground, log to standard error
    #[arg(short = 'f', long)]
    foreground: bool,
    /// Options, separated by commas
    #[arg(short = 'o', value_name = "OPT,...", action = ArgAction::Append)]
    options: Vec<String>,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The directory whose files are served
    backing: PathBuf,
    /// Where they are served
    mountpoint: PathBuf,
}

/// The form in which mount(8) calls `mount.fsys` (mount(8), "External helpers").
#[derive(Debug, Parser)]
#[command(name = "mount.fsys", version, about = "The mount(8) form of fsys-mount", after_help = EXIT_CODES)]
#[allow(clippy::struct_excessive_bools)] // the flags that mount(8) defines
pub(super) struct HelperArgs {
    /// The backing directory
    spec: PathBuf,
    /// The mount point
    dir: PathBuf,
    /// Tolerate unknown options
    #[arg(short = 's')]
    sloppy: bool,
    /// Check everything, mount nothing
    #[arg(short = 'f')]
    fake: bool,
    /// Accepted: there is no mtab
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Say what was mounted
    #[arg(short = 'v')]
    verbose: bool,
    /// Mount in this name space: a file, or a process id
    #[arg(short = 'N', value_name = "NS")]
    namespace: Option<String>,
    /// Options, separated by commas
    #[arg(short = 'o', value_name = "OPT,...", action = ArgAction::Append)]
    options: Vec<String>,
    /// Accepted: the type is fsys
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
}

/// The program `fsys-mount`; `launcher` starts the file system.
pub fn main(launcher: Launcher) -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let helper = args.first().and_then(|name| Path::new(name).file_name()).is_some_and(is_helper);
    let request = if helper {
        parse::<HelperArgs>(args).map(|a| (a.verbose, a.request()))
    } else {
        parse::<Args>(args).map(|a| (false, a.request()))
    };
    let (verbose, request) = match request {
        Ok(request) => request,
        Err(code) => return code,
    };
    let output = request.and_then(|r| run(r, verbose, launcher));
    // mount(8) knows 16 as a failure of /etc/mtab.
    let as_mount_8 = |mut e: Error| {
        e.exit = if helper && e.exit == Exit::Busy { Exit::Mount } else { e.exit };
        e
    };
    finish("fsys-mount", output.map_err(as_mount_8))
}

/// The names under which mount(8) looks for a helper: that of the type in fstab, and that in the table of mounts.
fn is_helper(name: &std::ffi::OsStr) -> bool {
    name == "mount.fsys" || name == "mount.fuse.fsys"
}

fn run(request: Request, verbose: bool, launcher: Launcher) -> Result<Output> {
    for name in &request.options.unknown {
        eprintln!("fsys-mount: the unknown option `{name}` was ignored");
    }
    if request.options.remount {
        return remount::run(&request, verbose);
    }
    let done = format!("{} is mounted on {}", request.backing.display(), request.mountpoint.display());
    let tell = verbose && !request.fake && !request.foreground;
    let exit = mount::run(request, launcher)?;
    Ok(Output { text: if tell { done } else { String::new() }, exit })
}

impl Args {
    fn request(self) -> Result<Request> {
        let mut options = understand(&self.options, false)?;
        options.config_file = self.config.or(options.config_file);
        let Self { foreground, backing, mountpoint, .. } = self;
        Ok(Request { backing, mountpoint, options, foreground, fake: false, namespace: None })
    }
}

impl HelperArgs {
    fn request(self) -> Result<Request> {
        let options = understand(&self.options, self.sloppy)?;
        let namespace = self.namespace.map(|ns| match ns.parse::<u32>() {
            Ok(pid) => format!("/proc/{pid}/ns/mnt").into(),
            Err(_) => PathBuf::from(ns),
        });
        let Self { spec: backing, dir: mountpoint, fake, .. } = self;
        Ok(Request { backing, mountpoint, options, foreground: false, fake, namespace })
    }
}

fn understand(lists: &[String], sloppy: bool) -> Result<Options> {
    let words: Vec<_> = lists.iter().flat_map(|list| options::split(list)).collect();
    Options::understand(&words, sloppy)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_commands_are_consistent() {
        Args::command().debug_assert();
        HelperArgs::command().debug_assert();
        let help = Args::command().render_long_help().to_string();
        for key in crate::config::keys::all() {
            assert!(help.contains(key), "{key} is not in the help");
        }
        assert!(help.contains("Exit codes:") && help.contains("fstab:"));
    }

    #[test]
    fn the_form_of_mount_8() {
        let line = ["mount.fsys", "/data", "/mnt", "-sfnv", "-o", "rw,nofail,gizmo", "-t", "fsys"];
        let request = HelperArgs::try_parse_from(line).unwrap().request().unwrap();
        assert!(request.fake && request.options.unknown == ["gizmo"]);
        assert_eq!((request.backing.as_path(), request.mountpoint.as_path()), (Path::new("/data"), Path::new("/mnt")));
        let strict = HelperArgs::try_parse_from(["mount.fsys", "/data", "/mnt", "-o", "gizmo"]).unwrap();
        assert_eq!(strict.request().unwrap_err().exit, Exit::Usage);
        for (typed, meant) in [("7", "/proc/7/ns/mnt"), ("/run/ns", "/run/ns")] {
            let inside = HelperArgs::try_parse_from(["mount.fsys", "/data", "/mnt", "-N", typed]).unwrap();
            assert_eq!(inside.request().unwrap().namespace.as_deref(), Some(Path::new(meant)));
        }
    }

    #[test]
    fn several_lists_are_one_and_the_flag_names_the_file() {
        let line = ["fsys-mount", "-f", "-o", "ro,config=a", "-o", "threads=3", "--config", "b", "x", "y"];
        let request = Args::try_parse_from(line).unwrap().request().unwrap();
        assert!(request.foreground && request.options.fuse.read_only == Some(true));
        assert_eq!(request.options.config_file.as_deref(), Some(Path::new("b")));
        assert_eq!(request.options.settings, [("threads".to_owned(), "3".to_owned())]);
    }
}
