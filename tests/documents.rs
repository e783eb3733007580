//! The documents name tests, files and verbs: all of them exist.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<(PathBuf, String)> {
    let dir = root().join("contrib/doc");
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "md"));
    paths.push(root().join("README.md"));
    paths.sort();
    paths.into_iter().map(|p| (p.clone(), std::fs::read_to_string(p).unwrap())).collect()
}

/// Names of the tests, as `file::test`.
fn tests() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut of = |file: &str, path: &Path| {
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        for (i, line) in lines.iter().enumerate() {
            let name = line.strip_prefix("fn ").and_then(|l| l.split('(').next());
            let is_test = (i.saturating_sub(3)..i).any(|n| lines[n] == "#[test]");
            found.extend(name.filter(|_| is_test).map(|n| format!("{file}::{n}")));
        }
    };
    for entry in std::fs::read_dir(root().join("tests")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_file() && path.extension().is_some_and(|e| e == "rs") {
            of(&name, &path);
        } else if path.join("main.rs").is_file() {
            for part in std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()) {
                of(&name, &part);
            }
        }
    }
    found
}

/// What stands in back quotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// What is wrong with a contract: paragraphs in bold without a proof, and proofs that are not there.
fn faults(contract: &str, tests: &BTreeSet<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for paragraph in contract.split("\n\n").filter(|p| p.starts_with("**")) {
        let proofs = paragraph.rsplit_once('[').map_or("", |(_, list)| list);
        let named: Vec<_> = quoted(proofs).into_iter().filter(|q| q.contains("::")).collect();
        let title = paragraph.lines().next().unwrap_or_default();
        if named.is_empty() {
            wrong.push(format!("no test proves: {title}"));
        }
        wrong.extend(named.iter().filter(|n| !tests.contains(**n)).map(|n| format!("there is no test {n}: {title}")));
    }
    wrong
}

#[test]
fn every_paragraph_of_the_contract_has_tests_that_exist() {
    let contract = std::fs::read_to_string(root().join("contrib/doc/SEMANTICS.md")).unwrap();
    assert!(contract.matches("\n**").count() >= 15);
    let wrong = faults(&contract, &tests());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_check_of_the_contract_can_fail() {
    let tests = BTreeSet::from(["a::b".to_owned()]);
    let text = "# T\n\n**Good.** Yes. [`a::b`]\n\n**Bare.** It is.\n\n**Old.** It was. [`a::gone`]";
    assert_eq!(faults(text, &tests).len(), 2);
}

#[test]
fn links_lead_somewhere_and_verbs_exist() {
    let help = Command::new(env!("CARGO_BIN_EXE_fsys")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let mut wrong = Vec::new();
    for (path, text) in documents() {
        for link in text.split("](").skip(1).filter_map(|l| l.split(')').next()) {
            let target = link.split('#').next().unwrap();
            if !target.is_empty() && !target.contains("://") && !path.parent().unwrap().join(target).exists() {
                wrong.push(format!("{}: the link {link} leads nowhere", path.display()));
            }
        }
        let commands = text.lines().map(|l| l.trim_start_matches("    ")).chain(quoted(&text));
        for command in commands.filter_map(|c| c.strip_prefix("fsys ")) {
            let verb: String = command.chars().take_while(char::is_ascii_lowercase).collect();
            let known = help.contains(&format!("\n  {verb} ")) || ["generate", "mount"].contains(&verb.as_str());
            if !verb.is_empty() && !known {
                wrong.push(format!("{}: there is no `fsys {verb}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
