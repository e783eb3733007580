//! What a package holds beside the programs: generated from the command lines, so it cannot lag behind; and every
//! file that the package names exists.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn fsys(args: &[&str]) -> String {
    output(Command::new(env!("CARGO_BIN_EXE_fsys")).args(args))
}

fn verbs(help: &str) -> Vec<String> {
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names = list.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    names.filter_map(|l| l.split_whitespace().next()).filter(|n| *n != "help").map(str::to_owned).collect()
}

fn long_options(help: &str) -> BTreeSet<String> {
    let words = help.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
    words.filter(|w| w.starts_with("--") && w.len() > 3).map(str::to_owned).collect()
}

#[test]
fn every_verb_has_its_page_and_completions_with_all_options() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    let pages = fsys(&["generate", "man", at]);
    let completions = fsys(&["generate", "completions", at]);
    for name in ["fsys.8", "fsys-mount.8", "mount.fsys.8"] {
        assert!(pages.lines().any(|l| l == name), "{name}: {pages}");
    }
    for name in ["fsys.bash", "_fsys", "fsys.fish", "fsys-mount.bash", "_fsys-mount", "fsys-mount.fish"] {
        assert!(completions.lines().any(|l| l == name), "{name}: {completions}");
    }
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let verbs = verbs(&fsys(&["--help"]));
    assert!(verbs.len() >= 12, "{verbs:?}");
    for verb in &verbs {
        let page = read(&format!("fsys-{verb}.8")).replace("\\-", "-");
        let options = long_options(&fsys(&[verb, "--help"]).split("Example").next().unwrap().replace("--version", ""));
        for option in &options {
            assert!(page.contains(option), "fsys-{verb}.8 has no {option}");
            assert!(read("fsys.bash").contains(option) && read("fsys.fish").contains(&option[2..]), "{verb} {option}");
        }
        assert!(read("_fsys").contains(&format!("({verb})")), "{verb}");
        assert!(page.contains("Example"), "fsys-{verb}.8 has no example");
    }
    let mount = read("fsys-mount.8");
    for word in ["durability=", "Exit codes:", "fstab:"] {
        assert!(mount.replace("\\-", "-").contains(word), "fsys-mount.8 has no {word}");
    }
    output(Command::new("bash").arg("-n").arg(dir.path().join("fsys.bash")));
    // Where man is, each page must be without a warning.
    if Command::new("man").arg("--version").output().is_ok_and(|o| o.status.success()) {
        for page in pages.lines() {
            let shown = Command::new("man").args(["--warnings", "-l"]).arg(dir.path().join(page)).output().unwrap();
            assert!(
                shown.status.success() && shown.stderr.is_empty(),
                "{page}: {}",
                String::from_utf8_lossy(&shown.stderr)
            );
        }
    }
}

#[test]
fn what_the_package_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let cargo: toml::Table = text.parse().unwrap();
    let deb = &cargo["package"]["metadata"]["deb"];
    let assets = deb["assets"].as_array().unwrap();
    assert!(assets.len() > 10);
    for asset in assets {
        let source = asset[0].as_str().unwrap();
        if source.starts_with("target/") {
            continue;
        }
        let path = root.join(source);
        let dir = path.parent().unwrap();
        let found =
            if source.contains('*') { std::fs::read_dir(dir).is_ok_and(|d| d.count() > 0) } else { path.is_file() };
        assert!(found, "{source} is not there");
    }
    for script in ["postinst", "prerm", "postrm"] {
        output(Command::new("sh").arg("-n").arg(root.join("contrib/deb").join(script)));
    }
    assert!(root.join(deb["license-file"][0].as_str().unwrap()).is_file());
}
