//! `fsys tune` and `fsys bench` on a real mount: what they write, what they leave behind (nothing). How good the
//! forecast is, `scripts/bench-tune` measures: that needs a quiet machine.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::mount::fsys;
use common::{Kind, LoopFs, Mount, can_mount, run_text};
use serde_json::Value;

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn tune_predicts_recommends_and_leaves_nothing() {
    if !can_mount("tune") {
        return;
    }
    let fs = LoopFs::slow(Kind::Ext4, 300, 1000);
    let data = fs.subdir("data");
    std::fs::write(data.join("mine"), "mine").unwrap();
    let (svg, config) = (fs.path().join("tune.svg"), fs.path().join("tuned.toml"));
    let mut command = fsys();
    command.args(["tune", "--json", "--writers", "1,4", "--svg"]).arg(&svg).arg("--write").arg(&config).arg(&data);
    let report: Value = serde_json::from_str(&run_text(&mut command)).unwrap();
    let lone = report["batch"][0][1].as_f64().unwrap();
    assert!(lone > 1000.0, "a commit waits for a flush of 1000 us: {lone}");
    let rate = |row: usize, kind: &str| report["rows"][row][kind]["per_s"].as_f64().unwrap();
    assert!(rate(0, "waiting") < 1000.0 && rate(0, "at_once") > rate(0, "waiting"), "{report:#}");
    assert!(rate(1, "waiting") > rate(0, "waiting"), "four writers share flushes: {report:#}");
    let windows = report["rows"][1]["windows"].as_array().unwrap();
    let of = |us: u64| windows.iter().find(|w| w[0] == us).unwrap()[1].as_f64().unwrap();
    let recommended = report["recommended"]["window_us"].as_u64().unwrap();
    assert!((of(recommended) / rate(1, "waiting") - 1.0).abs() < 0.01, "one forecast for one setting: {report:#}");
    assert!(std::fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    assert_eq!(names(&data), ["mine"]);

    // What it wrote, a mount takes; and it never writes over a file.
    let mount = Mount::start(&data, &format!("config={}", config.display()));
    let settings = mount.status()["settings"].to_string();
    assert!(settings.contains("tuned.toml"), "{settings}");
    let again = fsys().args(["tune", "--write"]).arg(&config).arg(&data).output().unwrap();
    assert_eq!(again.status.code(), Some(1), "{again:?}");
}

#[test]
fn bench_compares_and_leaves_nothing() {
    if !can_mount("bench") {
        return;
    }
    let fs = LoopFs::new(Kind::Ext4, 300);
    let mount = Mount::start(&fs.subdir("data"), "durability=fsync");
    let svg = fs.path().join("bench.svg");
    for (style, ways, durable) in [("rewrite", 3, false), ("create", 3, false), ("fsync", 3, true), ("rename", 2, true)]
    {
        let mut command = fsys();
        command.args(["bench", "--json", "--rounds", "1", "--time", "50", "--writers", "2", "--style", style]);
        let report: Value = serde_json::from_str(&run_text(command.arg("--svg").arg(&svg).arg(mount.path()))).unwrap();
        let all = report["ways"].as_array().unwrap();
        assert_eq!(all.len(), ways, "{report:#}");
        assert!(all.iter().all(|w| w["per_s"].as_f64().unwrap() > 0.0), "{report:#}");
        assert_eq!(all[0]["durable"], durable, "level fsync, {style}");
        assert!(report["verdict"].as_str().unwrap().contains("saving safely by hand"), "{report:#}");
    }
    assert!(std::fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    assert_eq!(names(mount.path()), [""; 0]);
    assert_eq!(names(mount.backing()), [".fsys"]);
}
