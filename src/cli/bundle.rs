//! `fsys bundle`: an archive for whoever is to help, without the content of files and without their names.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use super::Output;
use super::client::{Daemon, find};
use crate::config::options::Options;
use crate::error::{Error, Exit, Result};
use crate::mount::control::{Answer, Request};
use crate::mount::doctor::{self, Finding};
use crate::mount::table::{self, Mounted};
use crate::telemetry::Status;

/// The end of a log that is taken, in bytes.
const LOG_MAX: u64 = 512 << 10;
/// Fields of the status and of the log that hold a name.
const NAMES: [&str; 4] = ["path", "name", "kept", "kept_as"];
/// Stands where a name was.
const LEFT_OUT: &str = "(name left out)";

const EXAMPLE: &str = "Examples:
  fsys bundle                              # all fsys mounts
  fsys bundle --output support.tar.gz /mnt/fsys

Takes doctor, status, configuration, the end of the log, versions, kernel, table of mounts. No content
of a file. No name of a file either, unless --names; the directories of the mounts are named. Look into
it before you send it: `tar -xzOf FILE | less`.";

/// Collect what a person who is to help has to know, in one archive
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// The archive; a new file in this directory when not given
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// With the names of files in status and log
    #[arg(long)]
    names: bool,
    /// For programs
    #[arg(long)]
    json: bool,
    /// One mount
    mount: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let all = table::read().unwrap_or_default();
    let mounts = match &args.mount {
        Some(path) => vec![find(Some(path))?],
        None => all.into_iter().filter(Mounted::is_fsys).collect(),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let path = args.output.clone().unwrap_or_else(|| format!("fsys-bundle-{now}.tar.gz").into());
    let written = write(&path, now, &mounts, args.names).map_err(|e| {
        Error::new(
            Exit::System,
            format!("cannot write {}", path.display()),
            e,
            "no mount was touched; the archive is not complete",
            "name a new file in a directory that you may write",
        )
    })?;
    Output::new(args.json, &json!({ "archive": path, "files": written, "names": args.names }), || {
        let names = if args.names { "WITH the names of files" } else { "without names of files" };
        format!(
            "{}: {} files, {names}, no content of files; look into it before you send it",
            path.display(),
            written.len()
        )
    })
}

fn write(path: &Path, now: u64, mounts: &[Mounted], names: bool) -> io::Result<Vec<String>> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut archive =
        Archive { tar: tar::Builder::new(GzEncoder::new(file, Compression::default())), now, files: vec![] };
    archive.add("versions.txt", &versions())?;
    archive.add("kernel.txt", &kernel())?;
    archive.add("mounts.txt", &read("/proc/self/mountinfo"))?;
    archive.add("doctor.txt", &lines(&doctor::examine(None, None)))?;
    for (i, mount) in mounts.iter().enumerate() {
        one_mount(&mut archive, &format!("mount-{i}"), mount, names)?;
    }
    archive.end()
}

fn one_mount(archive: &mut Archive, dir: &str, mount: &Mounted, names: bool) -> io::Result<()> {
    let mut put = |name: &str, text: &str| archive.add(&format!("{dir}/{name}"), text);
    let status = match ask(mount) {
        Ok(status) => status,
        Err(e) => {
            put("status-error.txt", &e.to_string())?;
            return put("log.txt", &log(None, mount, "", names));
        }
    };
    let backing = status.backing.clone();
    let found = doctor::examine(Some(Path::new(&backing)), Some(&mount.mountpoint));
    put("doctor.txt", &lines(&found))?;
    put("process.txt", &process(status.pid))?;
    put("log.txt", &log(Some(status.pid), mount, &backing, names))?;
    for (i, file) in config_files(&status).iter().enumerate() {
        put(&format!("config-{i}.toml"), &format!("# {}\n{}", file.display(), read(&file.to_string_lossy())))?;
    }
    let text = serde_json::to_value(&status).map(|v| if names { v } else { without_names(v) });
    put("status.json", &format!("{:#}", text.map_err(io::Error::other)?))
}

fn ask(mount: &Mounted) -> Result<Box<Status>> {
    match Daemon::of(mount)?.ask(&Request::Status, Duration::ZERO)? {
        Answer::Status(status) => Ok(status),
        other => Err(super::client::strange(&other)),
    }
}

/// Takes the value of each `path`, wherever it stands.
fn without_names(mut value: serde_json::Value) -> serde_json::Value {
    match &mut value {
        serde_json::Value::Object(map) => {
            for (key, v) in map.iter_mut() {
                *v = if NAMES.contains(&key.as_str()) { json!(LEFT_OUT) } else { without_names(v.take()) };
            }
        }
        serde_json::Value::Array(all) => all.iter_mut().for_each(|v| *v = without_names(v.take())),
        _ => {}
    }
    value
}

/// The files that settings come from: `/etc/x.toml:3`.
fn config_files(status: &Status) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    for setting in &status.settings {
        let file = setting.source.rsplit_once(':').map(|(file, _)| PathBuf::from(file)).filter(|f| f.is_file());
        files.extend(file.filter(|f| !files.contains(f)));
    }
    files
}

/// The end of the daemon's log: its standard error, a file of the usual name, or the journal.
fn log(pid: Option<u32>, mount: &Mounted, backing: &str, names: bool) -> String {
    let usual = crate::mount::log::path(&Options::default(), &mount.mountpoint);
    let own = pid.and_then(|pid| std::fs::read_link(format!("/proc/{pid}/fd/2")).ok()).filter(|p| p.is_file());
    let path = own.unwrap_or(usual);
    let text = match tail(&path) {
        Ok(text) => format!("{}\n{text}", path.display()),
        Err(e) => match pid.map(journal) {
            Some(text) if !text.is_empty() => text,
            _ => return format!("{}: {e}", path.display()),
        },
    };
    if names { text } else { text.lines().map(|l| line_without_names(l, backing, &mount.mountpoint)).collect() }
}

fn tail(path: &Path) -> io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(path)?;
    let from = file.metadata()?.len().saturating_sub(LOG_MAX);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(LOG_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn journal(pid: u32) -> String {
    output("journalctl", &[&format!("_PID={pid}"), "-n", "2000", "--no-pager", "-o", "short-iso"])
}

/// A line of the log, ended, without what may be a file's name: the value of `path`, and what follows one of the two
/// directories. A name may hold anything, a line feed too: what is no beginning of a line of a log goes.
fn line_without_names(line: &str, backing: &str, mountpoint: &Path) -> String {
    let known = line.starts_with("20") || line.starts_with('/') || line.starts_with('{');
    let part_of_error = ["  cause:", "  effect:", "  action:"].iter().any(|p| line.starts_with(p));
    if !known && !part_of_error {
        return "(line left out)\n".into();
    }
    let mut line = line.to_owned();
    for field in NAMES {
        for mark in [format!(" {field}="), format!("\"{field}\":")] {
            let Some(at) = line.find(&mark) else { continue };
            // After the last one: the name itself may hold the word. What follows `kept` is left out with it.
            let rest = line.rfind(" step=").or(line.rfind("\",\"")).filter(|end| *end > at && field != "kept");
            let rest = rest.map_or(String::new(), |end| line[end..].to_owned());
            line = format!("{}{mark}{LEFT_OUT}{rest}", &line[..at]);
        }
    }
    for dir in [backing, &mountpoint.to_string_lossy()] {
        let under = format!("{}/", dir.trim_end_matches('/'));
        if let Some(at) = line.find(&under).filter(|_| under.len() > 1) {
            line.truncate(at + under.len());
            line.push_str(LEFT_OUT);
        }
    }
    line.push('\n');
    line
}

fn versions() -> String {
    let me = std::env::current_exe().unwrap_or_default();
    let os = read("/etc/os-release");
    format!(
        "fsys {} ({})\nfusermount3: {}\n{os}",
        env!("CARGO_PKG_VERSION"),
        me.display(),
        output("fusermount3", &["--version"])
    )
}

fn kernel() -> String {
    let mut text = read("/proc/version");
    for dir in ["/proc/sys/fs/fuse", "/sys/module/fuse/parameters"] {
        for entry in std::fs::read_dir(dir).into_iter().flatten().filter_map(io::Result::ok) {
            let path = entry.path();
            text.push_str(&format!("{}: {}\n", path.display(), read(&path.to_string_lossy()).trim()));
        }
    }
    let words = ["fuse", "EXT4-fs", "XFS", "BTRFS", "I/O error", "blk_update"];
    let log = output("dmesg", &[]);
    log.lines().filter(|l| words.iter().any(|w| l.contains(w))).for_each(|l| text.push_str(&format!("{l}\n")));
    text
}

fn process(pid: u32) -> String {
    ["status", "limits", "io"].map(|f| format!("{f}\n{}", read(&format!("/proc/{pid}/{f}")))).join("\n")
}

fn lines(found: &[Finding]) -> String {
    found.iter().map(|f| format!("{f}\n")).collect()
}

/// A file, or why it cannot be read: that is worth knowing, too.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| format!("{path}: {e}\n"))
}

fn output(program: &str, args: &[&str]) -> String {
    match Command::new(program).args(args).output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(e) => format!("{program}: {e}\n"),
    }
}

struct Archive {
    tar: tar::Builder<GzEncoder<File>>,
    now: u64,
    files: Vec<String>,
}

impl Archive {
    fn add(&mut self, name: &str, text: &str) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.now);
        self.tar.append_data(&mut header, format!("fsys-bundle/{name}"), text.as_bytes())?;
        self.files.push(name.to_owned());
        Ok(())
    }

    fn end(self) -> io::Result<Vec<String>> {
        let mut file = self.tar.into_inner()?.finish()?;
        file.flush()?;
        Ok(self.files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_and_facts_stay() {
        let clean = |line: &str| line_without_names(line, "/data", Path::new("/mnt/f"));
        let failed = "2026-01-01T00:00:00Z ERROR fsys: commit failed: save again path=secret step=x/y step=publish cause=no space kept=17-secret";
        assert_eq!(
            clean(failed),
            "2026-01-01T00:00:00Z ERROR fsys: commit failed: save again path=(name left out) step=publish cause=no space kept=(name left out)\n"
        );
        assert_eq!(clean("secret tail of a name"), "(line left out)\n");
        assert_eq!(clean("2026 cannot open /data/secret: no"), "2026 cannot open /data/(name left out)\n");
        assert_eq!(clean("2026 /data is mounted on /mnt/f"), "2026 /data is mounted on /mnt/f\n");
        let json = clean(r#"{"message":"failed","path":"se\"cret","step":"publish"}"#);
        assert!(!json.contains("cret") && json.contains("publish"), "{json}");
        let value = without_names(json!({ "busiest": [{ "path": "secret", "saves": 3 }], "pid": 1 }));
        assert_eq!(value, json!({ "busiest": [{ "path": LEFT_OUT, "saves": 3 }], "pid": 1 }));
    }
}
