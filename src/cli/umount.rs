//! `fsys umount`: drain, unmount, wait until the daemon is gone.

use std::path::PathBuf;
use std::time::Duration;

use super::Output;
use super::client::{Daemon, find};
use super::drain::Bar;
use crate::error::{Error, Exit, Result};
use crate::mount::check::{ask, detach, final_path, is_dead};
use crate::mount::table::Mounted;

/// The daemon says how its drain goes on, then waits a little for open files and for its threads.
const TIME: Duration = Duration::from_secs(90);

const EXAMPLE: &str = "Examples:
  fsys umount /mnt/fsys
  fsys umount --lazy /mnt/fsys     # although programs use it: their open files go on for 10 s

When it returns 0, everything acknowledged is durable, the mount is gone, and the daemon
has ended. A dead mount, left by a killed daemon, is detached.";

/// Make everything durable, unmount, and wait until the daemon is gone
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Detach it although it is in use, or although not everything could be made durable
    #[arg(long)]
    lazy: bool,
    /// The mount point
    mount: PathBuf,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mount = find(Some(&args.mount))?;
    let full = final_path(&args.mount).unwrap_or_else(|_| args.mount.clone());
    if full != mount.mountpoint {
        return Err(failed(&mount, Exit::Usage, format!("{} lies inside it", full.display()), "name the mount point"));
    }
    let text = match Daemon::of(&mount) {
        Ok(daemon) => {
            let mut bar = Bar::default();
            let stopped = daemon.stop(args.lazy, TIME, |left| bar.tell(left));
            bar.clear();
            stopped?;
            format!("{}: everything acknowledged is durable, and it is unmounted", full.display())
        }
        Err(_) if ask(&full).is_err_and(|e| is_dead(&e)) => {
            detach(&full, Some(&mount))
                .map_err(|e| failed(&mount, Exit::System, e.to_string(), "unmount it as root"))?;
            format!(
                "{}: its daemon was gone; the dead mount is detached (`fsys recover BACKING` tidies)",
                full.display()
            )
        }
        Err(e) => return Err(e),
    };
    Ok(Output { text, exit: Exit::Ok })
}

fn failed(mount: &Mounted, exit: Exit, why: String, action: &str) -> Error {
    let what = format!("cannot unmount {}", mount.mountpoint.display());
    Error::new(exit, what, why, "nothing was changed", action)
}
