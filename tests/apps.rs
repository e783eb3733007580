//! Real programs do on the mount what they do on the filesystem below it.
//!
//! Each program runs twice, in a directory of the raw filesystem and through the mount. Both must print the
//! same and leave the same tree; and what was seen through the mount must be in the backing directory after
//! the unmount, with every attribute. `scripts/apps` runs the same tests on the whole input.

#![allow(clippy::unwrap_used, reason = "all of this is test code")]

mod common;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use common::tree::{Skip, Snapshot};
use common::{Kind, LoopFs, Mount, can_mount, full, kinds, run, run_text, say};

/// How the tree that a program leaves on the mount is held against the one it leaves on the raw filesystem.
#[derive(Clone, Copy, PartialEq)]
enum Compare {
    /// In everything.
    All,
    /// In everything but the times, which are those of the run.
    AllButTimes,
    /// Not at all: the bytes depend on the run. What the program prints is compared.
    Printed,
}

/// Runs `app` (which gets an empty directory and one for its notes, and gives what must be equal) on both.
fn on_both(name: &str, compare: Compare, app: impl Fn(&Path, &Path) -> String) {
    if !can_mount(name) {
        return;
    }
    for kind in kinds(&Kind::ALL) {
        let fs = LoopFs::new(kind, if full() { 12_000 } else { 1500 });
        let (raw, backing) = (fs.subdir("raw"), fs.subdir("data"));
        let mut mount = Mount::start(&backing, "");
        let what = format!("{name} on {}", kind.name());
        let expected = app(&raw, &fs.subdir("notes-raw"));
        let got = app(mount.path(), &fs.subdir("notes-mount"));
        assert_eq!(expected, got, "{what}: left: raw filesystem, right: mount");
        let seen = Snapshot::take(mount.path(), Skip { dir_mtime: true, ..Skip::default() });
        mount.stop();
        let skip = Skip { names: &[".fsys"], dir_mtime: true, ..Skip::default() };
        seen.assert_same(&Snapshot::take(&backing, skip), &format!("{what}, mount against backing directory"));
        if compare != Compare::Printed {
            let skip = Skip { mtime: compare == Compare::AllButTimes, names: &[".fsys", ".git"], ..Skip::default() };
            let expected = Snapshot::take(&raw, skip);
            expected.assert_same(&Snapshot::take(&backing, skip), &format!("{what}, raw against mount"));
        }
        say(&format!("{what}: same, {} entries", seen.count()));
    }
}

/// A command with a fixed locale and no configuration of the machine's user.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("LC_ALL", "C").env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_SYSTEM", "/dev/null");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "T").env(format!("GIT_{who}_EMAIL"), "t@localhost");
        command.env(format!("GIT_{who}_DATE"), "1700000000 +0000");
    }
    command.stdin(Stdio::null());
    command
}

/// The source tree that the programs work on, as a tar file: `FSYS_TEST_TARBALL`, or a slice made here from this
/// project and the crates it is built from.
fn tarball() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        if let Some(given) = std::env::var_os("FSYS_TEST_TARBALL") {
            return PathBuf::from(given);
        }
        assert!(!full(), "the whole input: set FSYS_TEST_TARBALL, as scripts/apps does");
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let tar = dir.join(format!("apps-input-{}.tar", std::process::id()));
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut pack = program("tar");
        pack.arg("-cf").arg(&tar).arg("-C").arg(root).args(["src", "tests", "scripts", "Cargo.toml"]);
        for name in ["libc", "serde", "clap", "memchr"] {
            let source = crate_source(name);
            pack.arg("-C").arg(source.parent().expect("registry")).arg(source.file_name().expect("crate"));
        }
        run(&mut pack);
        tar
    })
}

/// The unpacked source of a crate that this project depends on, from the local registry.
fn crate_source(name: &str) -> PathBuf {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home =
        home.or_else(|| std::env::var_os("HOME").map(|h| Path::new(&h).join(".cargo"))).expect("CARGO_HOME or HOME");
    let registries = fs::read_dir(home.join("registry/src")).expect("registry sources");
    let is_it = |dir: &PathBuf| {
        let rest = dir.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(name)?.strip_prefix('-'));
        rest.is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit())) && dir.join("Cargo.toml").exists()
    };
    registries
        .filter_map(|r| fs::read_dir(r.ok()?.path()).ok())
        .flatten()
        .filter_map(|e| Some(e.ok()?.path()))
        .find(is_it)
        .unwrap_or_else(|| panic!("no source of crate {name} in {}", home.display()))
}

fn unpack(dir: &Path) {
    run(program("tar").args(["--xattrs", "--acls", "--numeric-owner", "-xpf"]).arg(tarball()).arg("-C").arg(dir));
}

/// What source trees have little of: links, odd names, special modes and owners, sparse and empty files, xattrs, ACLs.
fn curiosities(dir: &Path) {
    let file = |name: &str, content: &[u8]| fs::write(dir.join(name), content).unwrap();
    fs::create_dir_all(dir.join("odd/empty")).unwrap();
    file("odd/empty-file", b"");
    file("odd/with space\nand newline", b"1");
    file("odd/\u{fc}nicode \u{1f4be}", b"2");
    file(&format!("odd/{}", "n".repeat(255)), b"3");
    for (i, mode) in [0o4755, 0o2711, 0o1777, 0o000, 0o444].into_iter().enumerate() {
        let name = format!("odd/mode-{mode:04o}");
        file(&name, b"m");
        chown(dir.join(&name), Some(1000 + i as u32), Some(2000)).unwrap();
        fs::set_permissions(dir.join(&name), fs::Permissions::from_mode(mode)).unwrap();
    }
    for i in 0..20 {
        let name = format!("odd/linked-{i}");
        file(&name, format!("content {i}").as_bytes());
        fs::hard_link(dir.join(&name), dir.join(format!("odd/empty/link-{i}"))).unwrap();
    }
    symlink("no/such/target", dir.join("odd/dangling")).unwrap();
    symlink("../odd", dir.join("odd/to-directory")).unwrap();
    let sparse = File::create(dir.join("odd/sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"far", 1 << 20).unwrap();
    drop(sparse);
    run(program("mkfifo").arg(dir.join("odd/fifo")));
    run(program("setfattr").args(["-n", "user.note", "-v", "kept"]).arg(dir.join("odd/linked-1")));
    run(program("setfacl").args(["-m", "u:1234:rw,g:4321:r"]).arg(dir.join("odd/linked-2")));
    run(program("setfacl").args(["-d", "-m", "u:1234:rwx"]).arg(dir.join("odd/empty")));
}

#[test]
fn tar_unpacks_a_source_tree() {
    on_both("tar", Compare::All, |dir, notes| {
        unpack(dir);
        let count = run_text(program("find").arg(dir).args(["-type", "f", "-printf", "x"])).len();
        assert!(count >= if full() { 20_000 } else { 200 }, "only {count} files");
        // What was unpacked can be packed again with nothing changed.
        let again = notes.join("again.tar");
        run(program("tar").arg("-cf").arg(&again).arg("-C").arg(dir).arg("."));
        let diff = program("tar").arg("-df").arg(&again).arg("-C").arg(dir).output().unwrap();
        fs::remove_file(again).unwrap();
        format!("{count} files, {}", common::explain(&program("tar -d"), &diff))
    });
}

#[test]
fn git_clones_commits_and_checks() {
    static SOURCE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let git = |dir: &Path, args: &[&str]| run_text(program("git").arg("-C").arg(dir).args(args));
    on_both("git", Compare::AllButTimes, |dir, _| {
        let source = SOURCE.get_or_init(|| {
            let source = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            unpack(source.path());
            git(source.path(), &["init", "-q", "-b", "main"]);
            git(source.path(), &["add", "-A", "-f"]);
            git(source.path(), &["commit", "-q", "-m", "first"]);
            source
        });
        run(program("git").args(["clone", "-q", "--no-local"]).arg(source.path()).arg(dir.join("repo")));
        let repo = dir.join("repo");
        let first = git(&repo, &["ls-files"]).lines().next().expect("a file").to_owned();
        let mut text = git(&repo, &["status", "--porcelain"]);
        fs::write(repo.join(&first), "changed\n").unwrap();
        fs::write(repo.join("new file"), "new\n").unwrap();
        git(&repo, &["add", "-A"]);
        git(&repo, &["commit", "-q", "-m", "second"]);
        text += &git(&repo, &["fsck", "--full", "--strict"]);
        git(&repo, &["checkout", "-q", "-b", "other", "HEAD~1"]);
        git(&repo, &["gc", "-q"]);
        git(&repo, &["checkout", "-q", "main"]);
        text += &git(&repo, &["fsck", "--full", "--strict"]);
        text += &git(&repo, &["status", "--porcelain"]);
        text + &git(&repo, &["log", "--format=%H %s"])
    });
}

#[test]
fn cargo_builds_a_real_crate() {
    on_both("cargo", Compare::Printed, |dir, _| {
        // The manifests are ours: those of the registry name dependencies that are not on this machine.
        for name in ["itoa", "memchr"] {
            let to = dir.join(name);
            run(program("cp").arg("-r").arg(crate_source(name)).arg(&to));
            let manifest = format!(
                "[package]\nname = \"{name}\"\nversion = \"9.9.9\"\nedition = \"2021\"\nautotests = false\nautobenches = false\n\
                 autoexamples = false\nbuild = false\n[features]\ndefault = [\"std\"]\nstd = [\"alloc\"]\nalloc = []\n"
            );
            fs::write(to.join("Cargo.toml"), manifest).unwrap();
        }
        fs::create_dir_all(dir.join("app/src")).unwrap();
        let manifest = "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\n\
                        itoa = { path = \"../itoa\" }\nmemchr = { path = \"../memchr\" }\n[workspace]\n";
        fs::write(dir.join("app/Cargo.toml"), manifest).unwrap();
        let main = |text: &str| {
            let code = "fn main() { println!(\"{} {:?} TEXT\", itoa::Buffer::new().format(42), memchr::memchr(b'c', b\"abc\")); }";
            fs::write(dir.join("app/src/main.rs"), code.replace("TEXT", text)).unwrap();
        };
        let cargo = |verb: &str| {
            let mut command = program(option_env!("CARGO").unwrap_or("cargo"));
            // What `cargo test` sets for us is not for the build inside.
            for (name, _) in std::env::vars_os() {
                let text = name.to_string_lossy();
                if text.starts_with("CARGO_") && text != "CARGO_HOME"
                    || text.starts_with("RUST") && text.ends_with("FLAGS")
                {
                    command.env_remove(&name);
                }
            }
            let output = run(command.args([verb, "--offline"]).current_dir(dir.join("app")));
            let built = String::from_utf8_lossy(&output.stderr).matches("Compiling").count();
            format!("{verb}: {built} compiled, printed {}", String::from_utf8_lossy(&output.stdout))
        };
        main("first");
        let mut text = cargo("run");
        assert!(text.contains("3 compiled") && text.contains("42 Some(2) first"), "{text}");
        text += &cargo("build");
        main("second");
        text += &cargo("run");
        text
    });
}

#[test]
fn rsync_copies_a_tree_with_everything() {
    on_both("rsync", Compare::All, |dir, notes| {
        let source = notes.join("source");
        fs::create_dir(&source).unwrap();
        unpack(&source);
        curiosities(&source);
        // Both runs must see the same times in what was made just now.
        run(program("find").arg(&source).args(["-exec", "touch", "-h", "-d", "2021-02-03 04:05:06.789", "{}", "+"]));
        let from = format!("{}/", source.display());
        let copy = |extra: &[&str]| {
            run_text(
                program("rsync").args(["-aHAX", "--numeric-ids", "--itemize-changes"]).args(extra).arg(&from).arg(dir),
            )
        };
        let first = copy(&[]);
        let mut text = format!("{} lines\n", first.lines().count());
        text += &copy(&[]);
        text += &copy(&["--checksum", "--dry-run"]);
        let changed = source.join("odd/linked-1");
        fs::write(&changed, "another content").unwrap();
        run(program("touch").args(["-d", "2022-02-03 04:05:06.789"]).arg(&changed));
        text += &copy(&["--inplace"]);
        text += &copy(&["--checksum", "--dry-run", "--delete"]);
        fs::remove_dir_all(&source).unwrap();
        text
    });
}

#[test]
fn sqlite_with_four_writers_keeps_its_integrity() {
    let each = if full() { 500 } else { 20 };
    on_both("sqlite3", Compare::Printed, |dir, _| {
        let mut text = String::new();
        for mode in ["delete", "truncate", "persist", "wal"] {
            let db = dir.join(format!("{mode}.db"));
            let ask = |sql: &str| run_text(program("sqlite3").arg("-batch").arg("-bail").arg(&db).arg(sql));
            text += &ask(&format!(
                "PRAGMA journal_mode={mode}; CREATE TABLE t(writer INTEGER, n INTEGER, blob BLOB, PRIMARY KEY(writer, n));"
            ));
            let mut writers = Vec::new();
            for writer in 0..4 {
                let mut sql = String::from(".timeout 120000\n.bail on\nPRAGMA synchronous=FULL;\n");
                for n in 0..each {
                    let _ = writeln!(
                        sql,
                        "BEGIN IMMEDIATE; INSERT INTO t VALUES({writer}, {n}, zeroblob({})); COMMIT;",
                        n * 37
                    );
                }
                let mut command = program("sqlite3");
                let mut child = command.arg("-batch").arg(&db).stdin(Stdio::piped()).spawn().unwrap();
                child.stdin.take().unwrap().write_all(sql.as_bytes()).unwrap();
                writers.push(child);
            }
            for mut writer in writers {
                assert!(writer.wait().unwrap().success(), "a writer failed");
            }
            text += &ask(
                "PRAGMA integrity_check; SELECT writer, count(*), sum(n), sum(length(blob)) FROM t GROUP BY writer;",
            );
        }
        assert_eq!(text.matches("ok\n").count(), 4, "{text}");
        assert_eq!(text.matches(&format!("3|{each}|")).count(), 4, "{text}");
        text
    });
}

/// Files of several owners, modes and kinds of links, for programs that edit.
fn texts(dir: &Path, count: u32) -> Vec<PathBuf> {
    (0..count)
        .map(|i| {
            let path = dir.join(format!("text-{i:03}"));
            fs::write(&path, format!("old line {i}\n").repeat(1 + i as usize * 13)).unwrap();
            chown(&path, Some(1000 + i % 3), Some(100)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode([0o644, 0o600, 0o755, 0o640][i as usize % 4]))
                .unwrap();
            if i % 5 == 0 {
                run(program("setfattr").args(["-n", "user.n", "-v", &i.to_string()]).arg(&path));
                run(program("setfacl").args(["-m", "u:1234:r"]).arg(&path));
            }
            match i % 6 {
                1 => fs::hard_link(&path, dir.join(format!("hard-{i:03}"))).unwrap(),
                2 => symlink(path.file_name().unwrap(), dir.join(format!("soft-{i:03}"))).unwrap(),
                _ => {}
            }
            path
        })
        .collect()
}

#[test]
fn sed_edits_in_place() {
    on_both("sed -i", Compare::AllButTimes, |dir, _| {
        let files = texts(dir, if full() { 600 } else { 60 });
        run(program("sed").args(["-i", "s/old/new/"]).args(&files));
        run(program("sed").args(["-i.bak", "s/line/LINE/"]).args(&files[..20]));
        run(program("sed").args(["-i", "--follow-symlinks", "1d"]).arg(dir.join("soft-002")));
        run_text(program("cat").args(&files))
    });
}

#[test]
fn vim_edits_with_each_way_of_writing() {
    on_both("vim", Compare::AllButTimes, |dir, _| {
        for (way, set) in [
            ("auto", "set backupcopy=auto"),
            ("yes", "set backupcopy=yes writebackup"),
            ("no", "set backupcopy=no backup"),
            ("fsync", "set backupcopy=yes fsync swapsync=fsync"),
            ("bare", "set nobackup nowritebackup"),
        ] {
            let sub = dir.join(way);
            fs::create_dir(&sub).unwrap();
            texts(&sub, 6);
            for name in ["text-000", "text-001", "soft-002", "text-003", "new"] {
                // `-n` is not given: the swap file is part of how vim works.
                let edit = "silent! %s/old/new/g|$put ='last line'|wq!";
                let mut vim = program("vim");
                vim.args(["-es", "-u", "NONE", "-i", "NONE", "-c", set, "-c", edit]).arg(name);
                let output = vim.current_dir(&sub).output().unwrap();
                let text = fs::read_to_string(sub.join(name)).unwrap_or_default();
                assert!(text.ends_with("last line\n"), "{way} {name}: {}", common::explain(&vim, &output));
            }
        }
        run_text(program("ls").arg("-R").arg(dir)).replace(dir.to_str().unwrap(), "")
    });
}

#[test]
fn shells_redirect_and_tail_follows() {
    on_both("shell", Compare::AllButTimes, |dir, notes| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/redirections.sh");
        let mut text = String::new();
        for shell in ["sh", "bash"] {
            let (dir, notes) = (dir.join(shell), notes.join(shell));
            fs::create_dir(&dir).unwrap();
            fs::create_dir(&notes).unwrap();
            text += &run_text(program(shell).arg(&script).env("NOTES", notes).current_dir(dir));
        }
        text
    });
}
