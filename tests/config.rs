//! The configuration files that are shipped, as a user checks them; and that they say what their comments say.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fsys_mount::config::policy::{Durability, Policy, WriteMode};
use fsys_mount::config::{Config, file};

fn fsys(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fsys")).args(args).output().unwrap()
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/examples")
}

fn policy(example: &str, path: &str) -> Policy {
    let mut config = Config::default();
    file::load(&examples().join(example), &mut config).unwrap();
    config.policies.resolve(Path::new(path))
}

#[test]
fn every_example_is_valid() {
    let files: Vec<_> = std::fs::read_dir(examples()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 6, "{files:?}");
    for file in files {
        let output = fsys(&["config", "check", "--json", file.to_str().unwrap()]);
        let answer: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
        assert!(output.status.success() && answer["valid"] == true, "{output:?}");
        assert_eq!(answer["idle_rules"].as_array().unwrap().len(), 0, "{answer}");
    }
}

/// `fsys config show > contrib/examples/fsys.toml` repairs it.
#[test]
fn the_documented_example_is_what_config_show_prints() {
    let output = fsys(&["config", "show"]);
    let file = std::fs::read_to_string(examples().join("fsys.toml")).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), file.trim_end());
}

#[test]
fn the_examples_say_what_their_comments_say() {
    let durability = |example, path| policy(example, path).durability;
    assert_eq!(durability("mail-spool.toml", "home/bob/Maildir/new/1.msg"), Durability::Always);
    assert_eq!(durability("mail-spool.toml", "bob/dovecot.index.cache"), Durability::Fsync);
    assert_eq!(policy("mail-spool.toml", "bob/in.mbox").mode, WriteMode::InPlace);
    assert_eq!(durability("package-cache.toml", "pool/a/a.deb"), Durability::Fsync);
    assert_eq!(durability("package-cache.toml", "dists/x/Packages.gz"), Durability::Close);
    for name in ["a.db", "x/y.sqlite3-wal", "z.db-journal", "pgdata/base/1/2"] {
        let p = policy("database.toml", name);
        assert_eq!((p.mode, p.durability), (WriteMode::InPlace, Durability::Fsync), "{name}");
    }
    assert_eq!(policy("database.toml", "dump.sql"), Policy::default());
    assert_eq!(durability("ci-cache.toml", "ws/target/x.o"), Durability::Relaxed);
    assert_eq!(durability("ci-cache.toml", "artifacts/app.tar"), Durability::Close);
    assert_eq!(durability("ci-cache.toml", "ws/.git/index"), Durability::Fsync);
    assert_eq!(durability("power-loss.toml", "state.json"), Durability::Always);
    assert_eq!(durability("power-loss.toml", "var/x.log"), Durability::Fsync);
}

#[test]
fn a_wrong_file_is_refused_by_line_and_a_missing_one_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    std::fs::write(&path, "durability = \"close\"\n[[rule]]\nmatch = \"*.db\"\nmode = \"inplace\"\n").unwrap();
    let path = path.to_str().unwrap();
    for verb in ["check", "show"] {
        let output = fsys(&["config", verb, path]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("x.toml:4:8:") && text.contains("in-place"), "{text}");
    }
    let missing = fsys(&["config", "check", "/nonexistent.toml"]);
    assert_eq!(missing.status.code(), Some(1));
    std::fs::write(path, "[[rule]]\nmatch = \"*\"\n").unwrap();
    let idle = fsys(&["config", "check", path]);
    assert!(String::from_utf8_lossy(&idle.stdout).contains("sets nothing"), "{idle:?}");
}
