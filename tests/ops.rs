//! What an operations team does with a running mount: look, change, reload. Needs root and /dev/fuse.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use common::mount::fsys;
use common::{Mount, can_mount, wait_until};
use rustix::fs::{XattrFlags, getxattr, removexattr, setxattr};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

/// A mount with a configuration file and a log of its own.
struct Site {
    dir: tempfile::TempDir,
    mount: Mount,
}

impl Site {
    fn new(config: &str, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (backing, file) = (dir.path().join("data"), dir.path().join("fsys.toml"));
        fs::create_dir(&backing).unwrap();
        fs::write(&file, config).unwrap();
        let log = dir.path().join("fsys.log");
        let mut args = vec!["--config".to_owned(), file.display().to_string()];
        args.extend(["-o".to_owned(), format!("log_file={}{options}", log.display())]);
        Self { mount: Mount::start_with(&backing, args), dir }
    }

    fn config(&self, text: &str) {
        fs::write(self.dir.path().join("fsys.toml"), text).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("fsys.log")).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }

    /// `fsys VERB ARGS... MOUNT`
    fn fsys(&self, args: &[&str]) -> Output {
        fsys().args(args).arg(self.mount.path()).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.fsys(args);
        assert!(output.status.success(), "{args:?}: {}{}", err(&output), self.log());
        out(&output)
    }

    /// The value of `key` for a path, and where it comes from.
    fn get(&self, name: &str, key: &str) -> (String, String) {
        let output = fsys().args(["get", "--json"]).arg(self.path(name)).output().unwrap();
        let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", err(&output)));
        let source = json["origin"].as_array().unwrap().iter().find(|o| o[0] == key).unwrap()[1].as_str().unwrap();
        (json["policy"][key].as_str().unwrap().to_owned(), source.to_owned())
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn pair(value: &str, source: &str) -> (String, String) {
    (value.to_owned(), source.to_owned())
}

#[test]
fn a_runtime_change_wins_is_logged_and_can_be_taken_back() {
    if !can_mount("runtime changes") {
        return;
    }
    let s = Site::new("[[rule]]\nmatch = \"*.db\"\ndurability = \"fsync\"\n", "");
    fs::write(s.path("a.db"), "x").unwrap();
    let rule = s.get("a.db", "durability");
    assert!(rule.0 == "fsync" && rule.1.starts_with("rule `*.db`"), "{rule:?}");

    s.ok(&["set", "durability=always"]);
    assert_eq!(s.get("a.db", "durability"), pair("always", "runtime change"));
    s.ok(&["set", "durability=relaxed", "--match", "*.db"]);
    assert_eq!(s.get("a.db", "durability"), pair("relaxed", "rule `*.db` (runtime change)"));
    let list = s.ok(&["set", "--list"]);
    assert!(
        list.contains("durability=always  everywhere") && list.contains("durability=relaxed  for `*.db`"),
        "{list}"
    );
    assert_eq!(s.mount.status()["config"]["changes"].as_array().unwrap().len(), 2);
    assert!(s.log().contains("durability is set to relaxed for `*.db`") && s.log().contains("user 0"), "{}", s.log());

    s.ok(&["set", "--unset", "durability", "--match", "*.db"]);
    assert_eq!(s.get("a.db", "durability").0, "always");
    s.ok(&["set", "--unset", "--all"]);
    assert_eq!(s.get("a.db", "durability"), rule);
}

/// A change is not only shown: what it says happens.
#[test]
fn a_runtime_change_takes_effect() {
    if !can_mount("effect of runtime changes") {
        return;
    }
    let s = Site::new("", ",commit_interval_ms=3600000");
    let backing = |name: &str| s.mount.backing().join(name);
    fs::write(s.path("waits"), "x").unwrap();
    assert_eq!(fs::read_to_string(backing("waits")).unwrap(), "x", "the close waited for its commit");
    s.ok(&["set", "durability=relaxed"]);
    fs::write(s.path("later"), "x").unwrap();
    assert!(!backing("later").exists(), "the close did not wait, and the interval is an hour");
    // The ticker takes the new interval without a restart.
    s.ok(&["set", "commit_interval_ms=10"]);
    assert!(wait_until(LONG, || backing("later").exists()), "the shorter interval never came to count");
    s.ok(&["set", "mode=in-place"]);
    fs::write(s.path("direct"), "x").unwrap();
    assert!(backing("direct").exists());

    assert!(!s.log().contains("DEBUG"));
    s.ok(&["set", "log=debug"]);
    let asked = || s.mount.status()["config"]["changes"].as_array().unwrap().len() == 4;
    assert!(asked() && s.log().contains("DEBUG"), "{}", s.log());
    s.ok(&["set", "staging_max_bytes=4096", "mode=replace", "durability=close"]);
    assert!(fs::write(s.path("large"), vec![1; 1 << 20]).is_err(), "the bound on staged bytes holds from now on");
}

#[test]
fn what_cannot_be_changed_is_refused_whole_and_says_what_to_do() {
    if !can_mount("refused runtime changes") {
        return;
    }
    let s = Site::new("", "");
    for (args, why) in [
        (&["set", "threads=3"][..], "mount again"),
        (&["set", "durability=relaxed", "window_us=x"], "`window_us` cannot be changed so"),
        (&["set", "durabilty=close"], "did you mean `durability`?"),
        (&["set", "window_us=3", "--match", "*"], "leave --match out"),
        (&["set", "--unset", "mode"], "no runtime change"),
        (&["set", "--unset"], "--all"),
        (&["set"], "no value"),
    ] {
        let output = s.fsys(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", err(&output));
        let text = err(&output);
        assert!(text.contains(why) && text.contains("effect: nothing was changed"), "{args:?}: {text}");
    }
    assert_eq!(s.ok(&["set", "--list"]).trim(), "no runtime changes");
    // Only the owner: the socket lies in a directory that nobody else enters, and the daemon asks who is there.
    let stranger = fsys().args(["set", "durability=relaxed"]).arg(s.mount.path()).current_dir("/").output_as(65534);
    assert_eq!(stranger.status.code(), Some(2), "{}", err(&stranger));
    assert!(err(&stranger).contains("as root"), "{}", err(&stranger));
}

/// Runs a command as another user.
trait As {
    fn output_as(&mut self, uid: u32) -> Output;
}

impl As for std::process::Command {
    fn output_as(&mut self, uid: u32) -> Output {
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::process::CommandExt;
        // The build directory may be closed to others.
        let copy = tempfile::Builder::new().prefix("fsys-").tempfile().unwrap().into_temp_path();
        fs::copy(self.get_program(), &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
        let args: Vec<_> = self.get_args().map(ToOwned::to_owned).collect();
        std::process::Command::new(&copy).args(args).current_dir("/").uid(uid).gid(uid).output().unwrap()
    }
}

#[test]
fn the_file_is_read_again_by_reload_and_by_sighup() {
    if !can_mount("reload") {
        return;
    }
    let s = Site::new("durability = \"fsync\"\n", "");
    fs::write(s.path("f"), "x").unwrap();
    s.config("durability = \"always\"\n[limits]\nqueue_max = 7\nwindow_us = 5\n[[rule]]\nmatch = \"*.x\"\n");
    let text = s.ok(&["reload"]);
    for part in ["1 rule(s)", "durability=always from now on", "window_us=5", "queue_max=7 with the next mount"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(s.get("f", "durability").1.ends_with("fsys.toml:1"));
    assert!(s.ok(&["status"]).contains("queue_max=7"));

    // A file with an error changes nothing and says so, here, in the log and in the status.
    s.config("durability = \"relaxed\"\ndurabilty = \"x\"\n");
    let failed = s.fsys(&["reload"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(err(&failed).contains("fsys.toml:2:1") && err(&failed).contains("goes on"), "{}", err(&failed));
    assert_eq!(s.get("f", "durability").0, "always");
    let status = s.ok(&["status"]);
    assert!(status.starts_with("healthy") && status.contains("fsys.toml:2:1"), "{status}");
    assert!(s.log().contains("fsys.toml:2:1"));

    // SIGHUP, with the log moved away as logrotate does.
    let moved = s.dir.path().join("fsys.log.1");
    fs::rename(s.dir.path().join("fsys.log"), &moved).unwrap();
    s.config("durability = \"relaxed\"\n");
    kill_process(s.mount.pid(), Signal::HUP).unwrap();
    assert!(wait_until(LONG, || s.get("f", "durability").0 == "relaxed"), "SIGHUP did not reload");
    assert!(wait_until(LONG, || s.dir.path().join("fsys.log").exists() && s.log().contains("SIGHUP")));
    assert!(!s.ok(&["status"]).contains("fsys.toml:2:1"), "the error is gone with its cause");
}

#[test]
fn without_a_file_reload_says_so() {
    if !can_mount("reload without a file") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::start(dir.path(), "");
    let output = fsys().arg("reload").arg(mount.path()).output().unwrap();
    assert!(output.status.code() == Some(1) && err(&output).contains("fsys set"), "{}", err(&output));
}

const POLICY: &str = "user.fsys.policy";

fn set_policy(path: &Path, value: &str) -> rustix::io::Result<()> {
    setxattr(path, POLICY, value.as_bytes(), XattrFlags::empty())
}

#[test]
fn a_file_sets_its_own_policy_where_that_is_allowed() {
    if !can_mount("policy by xattr") {
        return;
    }
    let s = Site::new(
        "xattr_policy = true\n[[rule]]\nmatch = \"*\"\ndurability = \"always\"\n",
        ",commit_interval_ms=3600000",
    );
    let file = s.path("f");
    fs::write(&file, "one").unwrap();
    for nonsense in ["durability=sometimes", "durability", "threads=3", "mode=auto;durability=close", "\u{1}"] {
        assert_eq!(set_policy(&file, nonsense), Err(rustix::io::Errno::INVAL), "{nonsense}");
    }
    assert_eq!(set_policy(s.mount.path(), "durability=relaxed"), Err(rustix::io::Errno::INVAL), "a directory has none");
    assert_eq!(s.get("f", "durability").0, "always");
    set_policy(&file, "durability=relaxed,mode=replace").unwrap();
    assert_eq!(s.get("f", "durability"), pair("relaxed", "xattr user.fsys.policy"));
    // It holds: the close does not wait any more, and the interval is an hour.
    fs::write(&file, "two").unwrap();
    assert_eq!(fs::read_to_string(s.mount.backing().join("f")).unwrap(), "one");
    s.ok(&["drain"]);
    assert_eq!(fs::read_to_string(s.mount.backing().join("f")).unwrap(), "two");
    // It survives the replace, as every xattr does; a runtime change wins over it.
    assert_eq!(s.get("f", "durability").0, "relaxed");
    s.ok(&["set", "durability=close"]);
    assert_eq!(s.get("f", "durability"), pair("close", "runtime change"));
    assert_eq!(s.get("f", "mode"), pair("replace", "xattr user.fsys.policy"));
    s.ok(&["set", "--unset", "--all"]);
    removexattr(&file, POLICY).unwrap();
    assert_eq!(s.get("f", "durability").0, "always");
}

/// Off, it is an xattr as any other, and none is believed that came in by another way.
#[test]
fn a_policy_by_xattr_counts_only_where_it_is_allowed() {
    if !can_mount("policy by xattr, off") {
        return;
    }
    let s = Site::new("", "");
    let file = s.path("f");
    fs::write(&file, "x").unwrap();
    set_policy(&file, "nonsense").unwrap();
    let mut value = [0; 64];
    let n = getxattr(&file, POLICY, &mut value[..]).unwrap();
    assert_eq!(&value[..n], b"nonsense");
    assert_eq!(s.get("f", "durability"), pair("close", "built-in default"));
    s.ok(&["set", "xattr_policy=true"]);
    assert_eq!(s.get("f", "durability"), pair("close", "built-in default"), "what is not valid does not count");
    assert!(s.log().contains("does not count"), "{}", s.log());
    setxattr(s.mount.backing().join("f"), "user.other", b"1", XattrFlags::empty()).unwrap();
    set_policy(&file, "durability=fsync").unwrap();
    assert_eq!(s.get("f", "durability").0, "fsync");
    s.ok(&["set", "--unset", "xattr_policy"]);
    assert_eq!(s.get("f", "durability").0, "close");
}

#[test]
fn metrics_are_not_served_to_other_machines_by_accident() {
    if !can_mount("metrics address") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (data, mnt) = (dir.path().join("data"), dir.path().join("mnt"));
    fs::create_dir(&data).unwrap();
    fs::create_dir(&mnt).unwrap();
    let mut command = common::mount::fsys_mount();
    let output = command.args(["-o", "metrics=0.0.0.0:9469"]).args([&data, &mnt]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("other machines") && err(&output).contains("metrics_remote"), "{}", err(&output));
    // A port that is taken is no reason not to mount.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let s = Site::new("", &format!(",metrics={}", taken.local_addr().unwrap()));
    assert!(s.mount.log().contains("no metrics at"), "{}", s.mount.log());
}

#[test]
fn status_and_get_say_what_is_not_durable_and_drain_makes_it() {
    if !can_mount("status, get and drain") {
        return;
    }
    let s = Site::new("", ",durability=relaxed,commit_interval_ms=3600000");
    let get = |name: &str| out(&fsys().arg("get").arg(s.path(name)).output().unwrap());
    assert!(s.ok(&["status"]).contains("uncommitted  nothing"));
    fs::write(s.path("late"), "12345").unwrap();
    let status = s.ok(&["status"]);
    assert!(status.starts_with("healthy: ") && status.contains("1 version(s) staged, 5 bytes"), "{status}");
    let row = status.lines().find(|l| l.contains("late: staged, 5 bytes")).unwrap_or_else(|| panic!("{status}"));
    assert!(row.contains("0 writer(s)"), "{row}");
    assert!(get("late").starts_with("late: staged, 5 bytes, 5 bytes staged; not durable for"), "{}", get("late"));
    for part in ["backing", "flush", "errors       0 failed commits", "fallbacks", "coalescing"] {
        assert!(status.contains(part), "{part}: {status}");
    }
    let json = s.mount.status();
    let number =
        format!("({}:{})", rustix::fs::major(dev(s.mount.backing())), rustix::fs::minor(dev(s.mount.backing())));
    assert!(json["device"].as_str().unwrap().ends_with(&number), "{} {number}", json["device"]);
    assert_eq!(json["uncommitted"][0]["path"], "late");

    let drained = s.ok(&["drain"]);
    assert!(drained.contains("everything acknowledged is durable") && !drained.contains('\r'), "{drained}");
    assert!(s.mount.backing().join("late").exists());
    let text = get("late");
    assert!(text.starts_with("late: committed, 5 bytes") && text.contains("published "), "{text}");
    fs::write(s.mount.backing().join("old"), "x").unwrap();
    assert!(get("old").contains("not written since the mount"), "{}", get("old"));

    // A writer in the middle of a save is not waited for: nothing was acknowledged to it.
    let mut open = fs::File::create(s.path("open")).unwrap();
    open.write_all(b"half").unwrap();
    assert!(get("open").contains("1 writer(s)"), "{}", get("open"));
    s.ok(&["drain"]);
    assert!(!s.mount.backing().join("open").exists());
}

fn dev(path: &Path) -> u64 {
    rustix::fs::stat(path).unwrap().st_dev
}

#[test]
fn a_json_log_is_json_and_a_slow_commit_names_path_step_and_device_time() {
    if !can_mount("JSON log and slow commits") {
        return;
    }
    let disk = common::LoopFs::slow(common::Kind::Ext4, 300, 50_000);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let options = format!("log_format=json,slow_commit_ms=20,log_file={}", log.display());
    let mut mount = Mount::start(&disk.subdir("data"), &options);
    fs::write(mount.path().join("slow"), "x").unwrap();
    let lines = || -> Vec<Value> {
        let text = fs::read_to_string(&log).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
    };
    let all = lines();
    let slow = all.iter().find(|l| l["path"] == "slow").unwrap_or_else(|| panic!("{all:#?}"));
    assert_eq!(slow["level"], "WARN");
    let number = |key: &str| slow[key].as_u64().unwrap_or_else(|| panic!("{key}: {slow}"));
    assert!(number("device_ms") >= 50 && number("total_ms") >= number("device_ms"), "{slow}");
    assert!(["parent sync", "data flush"].contains(&slow["step"].as_str().unwrap()), "{slow}");
    assert_eq!(number("pid"), u64::from(std::process::id()));
    assert!(
        common::sample(&common::run_text(fsys().arg("metrics").arg(mount.path())), "fsys_slow_commits_total") >= 1.0
    );
    // The limit can change, and off is off.
    common::run(fsys().args(["set", "slow_commit_ms=0"]).arg(mount.path()));
    fs::write(mount.path().join("quiet"), "x").unwrap();
    assert!(!lines().iter().any(|l| l["path"] == "quiet"));
    mount.stop();
}

#[test]
fn top_shows_rates_files_and_the_processes_behind_them() {
    if !can_mount("top") {
        return;
    }
    let s = Site::new("", "");
    let (dir, stop) = (s.mount.path().to_owned(), std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            for i in 0_u64.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                fs::write(dir.join("busy"), "x").unwrap();
                fs::write(dir.join(format!("rare{i}")), "x").unwrap();
            }
        });
        let json = s.ok(&["top", "--json", "--interval", "1"]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert!(json["commits_per_s"].as_f64().unwrap() > 0.0, "{json}");
        assert_eq!(json["files"][0]["path"], "busy");
        let process = &json["processes"][0]["process"];
        assert_eq!(process["pid"].as_u64(), Some(u64::from(std::process::id())), "{process}");
        let comm = fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(process["command"].as_str(), Some(comm.trim()));
        let counted: u64 = json["commit"]["buckets"].as_array().unwrap().iter().map(|b| b[1].as_u64().unwrap()).sum();
        assert!(counted > 0 && json["slow"][0]["took_us"].as_u64() > Some(0), "{json}");
        let once = s.ok(&["top", "--once"]);
        assert!(once.contains("busiest files") && once.contains("busy"), "{once}");
        assert_eq!(s.fsys(&["top"]).status.code(), Some(1), "no terminal");

        // On a terminal, as script(1) gives one: it draws, q ends it, and the screen is as it was.
        let typed = dir.parent().unwrap().join(format!("typescript-{}", std::process::id()));
        let line =
            format!("stty cols 100 rows 40; {} top --interval 0.2 {}", fsys().get_program().display(), dir.display());
        let mut script = std::process::Command::new("script");
        script.args(["-q", "-e", "-f", "-c", &line]).arg(&typed);
        let mut child = script.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let screen = || String::from_utf8_lossy(&fs::read(&typed).unwrap_or_default()).into_owned();
        assert!(wait_until(LONG, || screen().contains("busiest processes")), "{}", screen());
        child.stdin.take().unwrap().write_all(b"q").unwrap();
        assert!(child.wait().unwrap().success(), "{}", screen());
        assert!(screen().contains("\u{1b}[?1049h") && screen().contains("\u{1b}[?1049l"), "the alternate screen");
        fs::remove_file(&typed).unwrap();
    });
}

struct StopAtEnd<'a>(&'a std::sync::atomic::AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn drain_shows_on_a_terminal_how_much_is_left() {
    if !can_mount("drain on a terminal") {
        return;
    }
    // A flush takes longer than the time between two looks.
    let disk = common::LoopFs::slow(common::Kind::Ext4, 300, 500_000);
    let mount = Mount::start(&disk.subdir("data"), "durability=relaxed,commit_interval_ms=3600000");
    (0..20).for_each(|i| fs::write(mount.path().join(format!("f{i}")), "x").unwrap());
    let line = format!("{} drain {}", fsys().get_program().display(), mount.path().display());
    let text = common::run_text(std::process::Command::new("script").args(["-q", "-e", "-c", &line, "/dev/null"]));
    assert!(text.contains("draining [") && text.contains("left") && text.contains("is durable"), "{text}");
    assert!(mount.backing().join("f19").exists());
}
