//! What Prometheus makes of the metrics, the alerts and the dashboard: promtool reads them, and a real server scrapes a
//! mount. Needs root, /dev/fuse, prometheus and promtool (`scripts/setup`).

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::mount::fsys;
use common::{Mount, can_mount, can_run, run_text, sample, wait_until};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

fn promtool(args: &[&str], input: &str) -> Output {
    let mut command = Command::new("promtool");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// What it objected to.
fn complaint(output: &Output) -> Option<String> {
    let said = [&output.stdout, &output.stderr].map(|s| String::from_utf8_lossy(s).into_owned()).concat();
    (!output.status.success()).then_some(said)
}

/// An address on this machine that is free now.
fn address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib").join(name)
}

/// The expressions of the dashboard, with its variables filled in.
fn dashboard() -> Vec<String> {
    let json: Value = serde_json::from_slice(&fs::read(contrib("grafana/fsys.json")).unwrap()).unwrap();
    let targets = json["panels"].as_array().unwrap().iter().flat_map(|p| p["targets"].as_array().unwrap());
    let filled = |e: &str| e.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$instance", ".*");
    let exprs: Vec<_> = targets.map(|t| filled(t["expr"].as_str().unwrap())).collect();
    assert!(exprs.len() > 20 && !exprs.iter().any(|e| e.contains("$__")), "{exprs:?}");
    exprs
}

#[test]
fn metrics_over_socket_and_address_are_what_prometheus_reads() {
    if !can_mount("metrics") {
        return;
    }
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let mount = Mount::start(dir.path(), &format!("metrics={address}"));
    for i in 0..20 {
        fs::write(mount.path().join(format!("f{i}")), "x").unwrap();
    }
    let text = run_text(fsys().arg("metrics").arg(mount.path()));
    assert!(sample(&text, "fsys_commits_total") >= 20.0);
    assert!(sample(&text, "fsys_commit_seconds_count{durability=\"close\"}") >= 20.0);
    assert!(sample(&text, "fsys_flush_seconds_count") > 0.0);
    assert!(text.contains("fsys_health{state=\"healthy\"} 1\n"), "{text}");
    let [summed, counted] = ["fsys_batch_operations_sum", "fsys_batched_ops_total"].map(|name| sample(&text, name));
    assert!((summed - counted).abs() < 0.5, "each operation was in one batch: {summed}, {counted}");

    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200"), "{head}");
    let families = |t: &str| t.lines().filter(|l| l.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(families(&text), families(body));

    if can_run("metrics, by promtool", "promtool") {
        assert_eq!(complaint(&promtool(&["check", "metrics"], body)), None);
        assert!(complaint(&promtool(&["check", "metrics"], "fsys_x{ 1\n")).is_some(), "it can fail");
        let nameless = body.replace("# HELP fsys_commits_total", "# HELP fsys_other");
        assert!(complaint(&promtool(&["check", "metrics"], &nameless)).is_some(), "it looks at more than the form");
    }
}

/// The alerts do what they say, and the expressions of the dashboard are PromQL.
#[test]
fn rules_and_dashboard_are_what_prometheus_reads() {
    if !can_run("rules and dashboard", "promtool") {
        return;
    }
    let path = |name: &str| contrib(name).to_str().unwrap().to_owned();
    assert_eq!(complaint(&promtool(&["check", "rules", &path("prometheus/fsys.rules.yml")], "")), None);
    assert_eq!(complaint(&promtool(&["test", "rules", &path("prometheus/fsys.test.yml")], "")), None);

    let check = |exprs: &[String]| {
        let rule = |(i, e): (usize, &String)| serde_json::json!({ "record": format!("x:{i}"), "expr": e });
        let rules: Vec<_> = exprs.iter().enumerate().map(rule).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        // JSON is YAML.
        let text = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string();
        fs::write(file.path(), text).unwrap();
        complaint(&promtool(&["check", "rules", file.path().to_str().unwrap()], ""))
    };
    let mut exprs = dashboard();
    assert_eq!(check(&exprs), None);
    exprs.push("sum(rate(fsys_commits_total[5m])".into());
    assert!(check(&exprs).is_some(), "it can fail");
}

/// A Prometheus that scrapes one target, with the alert rules; it ends when dropped.
struct Server {
    child: Child,
    at: SocketAddr,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(target: SocketAddr) -> Self {
        let (dir, at) = (tempfile::tempdir().unwrap(), address());
        let config = serde_json::json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": [contrib("prometheus/fsys.rules.yml")],
            "scrape_configs": [{ "job_name": "fsys", "static_configs": [{ "targets": [target.to_string()] }] }],
        });
        fs::write(dir.path().join("prometheus.yml"), config.to_string()).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new("prometheus");
        command.arg("--config.file=prometheus.yml").arg("--storage.tsdb.path=data");
        command.arg(format!("--web.listen-address={at}")).current_dir(dir.path());
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Self { child, at, dir }
    }

    /// The samples that an expression gives now.
    fn ask(&self, expr: &str) -> Vec<String> {
        let output = promtool(&["query", "instant", &format!("http://{}", self.at), expr], "");
        String::from_utf8_lossy(&output.stdout).lines().filter(|l| l.contains("=>")).map(str::to_owned).collect()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every panel shows something of a mount that works, and an alert is quiet until it has a cause.
#[test]
fn a_real_prometheus_has_data_for_every_panel_and_fires_an_alert() {
    let test = "a real Prometheus";
    if !can_mount(test) || !can_run(test, "prometheus") || !can_run(test, "promtool") {
        return;
    }
    let (dir, target) = (tempfile::tempdir().unwrap(), address());
    let mount = Mount::start(dir.path(), &format!("metrics={target}"));
    let server = Server::start(target);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fs::write(mount.path().join("busy"), "x").unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        assert!(wait_until(LONG, || server.ask("up == 1").len() == 1), "{}", server.log());
        for expr in dashboard() {
            assert!(wait_until(LONG, || !server.ask(&expr).is_empty()), "no data for {expr}\n{}", server.log());
        }
        assert!(server.ask("fsys_bogus_total").is_empty(), "it can fail");
        let rate = server.ask("rate(fsys_commits_total[1m]) > 0");
        assert_eq!(rate.len(), 1, "{:?}", server.ask("fsys_commits_total"));
    });
    let firing = "ALERTS{alertname=\"FsysStagingFull\", alertstate=\"firing\"}";
    assert!(server.ask(firing).is_empty(), "{:?}", server.ask("ALERTS"));
    common::run(fsys().args(["set", "staging_max_bytes=4096"]).arg(mount.path()));
    assert!(fs::write(mount.path().join("large"), vec![1; 1 << 20]).is_err());
    assert!(wait_until(LONG, || server.ask(firing).len() == 1), "{:?}\n{}", server.ask("ALERTS"), server.log());
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
