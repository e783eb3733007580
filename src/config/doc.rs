//! The documented configuration file: every key with its meaning, as the example file and as `fsys config show`.

use std::fmt::Write;

use super::Config;
use super::keys::{BUILT_IN, LIMITS, POLICY, SERVICE, is_flag, is_number};

/// Keys and what they mean, in lines of a comment. A test sees that none is missing.
const MEANING: [(&str, &str); 21] = [
    (
        "mode",
        "How the content of a file is written.\n\
         auto      created and rewritten files are replaced atomically, writes into existing content go in place\n\
         replace   also writes into existing content are staged, and replace the file at the next commit point\n\
         in-place  nothing is staged; fsyncs are still shared. For databases, images of disks, logs\n\
         journal   through a redo log: a change of any part is atomic, inode and links stay. For mounts by root",
    ),
    (
        "durability",
        "Which calls wait until their work is on stable storage.\n\
         always    close after writes, fsync, and every rename, unlink, mkdir, ...\n\
         close     close after writes, and fsync\n\
         fsync     only fsync; what was closed is durable within commit_interval_ms\n\
         relaxed   none; all is durable within commit_interval_ms. Not for databases\n\
         In every level a file is whole after a crash: old or new, never in part.",
    ),
    (
        "method",
        "How data reaches stable storage.\n\
         auto      one barrier for a whole batch where the file system's order makes that sound, else a flush of each file\n\
         sync      fsync of each file        data   fdatasync of each file\n\
         direct    O_DIRECT writes where aligned, several at a time through io_uring, and fdatasync",
    ),
    (
        "restage_max_bytes",
        "A writer that goes on after a commit gets a new version: by a clone where the file system can, else by a copy of\n\
         at most so many bytes. A larger file is then written in place until it is closed.",
    ),
    (
        "window_us",
        "How long a batch waits for further saves once several come at the same time, at most. A lone save never waits.\n\
         `fsys tune` finds a good value for a device.",
    ),
    ("batch_max", "Saves in a batch, at most."),
    ("queue_max", "Saves that may be queued; beyond, programs wait."),
    (
        "commit_interval_ms",
        "Age of acknowledged work that is not yet durable, at most (levels fsync and relaxed, renames at level close).",
    ),
    (
        "pending_max",
        "Versions that may be closed and not yet committed (levels fsync and relaxed); beyond, the next close or creation waits.",
    ),
    (
        "staging_max_bytes",
        "Bytes that uncommitted versions may hold together; beyond, writes fail with ENOSPC. 0: no limit of its own.",
    ),
    ("cache_ms", "How long the kernel may keep names and attributes. 0 where others change the backing directory."),
    ("threads", "Threads that serve the kernel's requests. Not set: half of the processors, 1 to 8."),
    ("slow_commit_ms", "A commit that takes longer is logged, with path, step and the time of the device. 0: none is."),
    (
        "passthrough",
        "auto: the kernel serves files of mode in-place itself, where it can (Linux 6.9). off: it does not.",
    ),
    (
        "watch_backing",
        "auto: what others change in the backing directory is watched (fanotify), so the kernel may keep more and longer.\n\
         off: names and attributes are kept for cache_ms.",
    ),
    ("log", "Least severe level that is logged: error, warn, info, debug, trace."),
    ("log_format", "text, json (an object a line), or journald (records with fields)."),
    ("xattr_policy", "Whether a file may set its own policy: setfattr -n user.fsys.policy -v durability=always FILE"),
    ("metrics", "Where Prometheus may ask, for example \"127.0.0.1:9469\"; off: only `fsys metrics`."),
    ("metrics_remote", "Whether that may be an address which other machines reach."),
    (
        "transport",
        "How the kernel's requests come.\n\
         auto      through io_uring where it can be had, else over /dev/fuse\n\
         fuser     over /dev/fuse        io-uring  through io_uring, or the mount is refused",
    ),
];

const HEAD: &str = "\
# fsys-mount: configuration file (TOML), for `fsys-mount --config FILE` or the mount option `config=FILE`.
# `fsys config check FILE` checks it. What is commented out has the value that is shown.

# ---- policy of every path that no rule names ----
";

const RULES: &str = "
# ---- rules: in order; for each value the last rule that matches and sets it wins ----
# A glob without `/` matches the name of a file in any directory; `*` does not cross `/`, `**` does.
#
# [[rule]]
# match = \"*.log\"
# durability = \"fsync\"
#
# [[rule]]
# match = \"cache/**\"
# durability = \"relaxed\"
";

/// The documented file. Values that were set stand in it with their source, the others are commented out.
pub fn render(config: &Config) -> String {
    let mut text = HEAD.to_owned();
    let settings = config.settings();
    // TOML wants what belongs to no table first.
    for key in POLICY.into_iter().chain(SERVICE).chain(LIMITS) {
        let Some(setting) = settings.iter().find(|s| s.key == key) else { continue };
        if key == SERVICE[0] {
            text.push_str("\n# ---- the daemon itself ----\n");
        }
        if key == LIMITS[0] {
            text.push_str("\n# ---- bounds and times ----\n[limits]\n");
        }
        for line in meaning(key).lines() {
            // Writing to a String cannot fail.
            writeln!(text, "# {line}").unwrap_or_default();
        }
        let value = quoted(key, &setting.value);
        let line = match setting.source.as_str() {
            // The built-in number of threads differs from machine to machine.
            BUILT_IN if key == "threads" => "# threads = 1".to_owned(),
            BUILT_IN => format!("# {key} = {value}"),
            source => format!("{key} = {value}  # {source}"),
        };
        writeln!(text, "{line}").unwrap_or_default();
    }
    if config.policies.rules.is_empty() {
        text.push_str(RULES);
    }
    for rule in &config.policies.rules {
        writeln!(text, "\n[[rule]]  # {}\nmatch = {:?}", rule.source, rule.glob).unwrap_or_default();
        for (key, value) in rule.values() {
            writeln!(text, "{key} = {}", quoted(key, &value)).unwrap_or_default();
        }
    }
    text
}

/// A value as TOML has it.
fn quoted(key: &str, value: &str) -> String {
    if is_number(key) || is_flag(key) { value.to_owned() } else { format!("\"{value}\"") }
}

fn meaning(key: &str) -> &'static str {
    MEANING.iter().find(|(k, _)| *k == key).map_or("", |(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::super::{Config, file, keys};
    use super::*;

    #[test]
    fn every_key_is_explained_and_the_values_shown_are_valid() {
        let text = render(&Config::default());
        for key in keys::all() {
            assert!(meaning(key).len() > 20, "{key} has no meaning in MEANING");
            assert!(text.contains(&format!("\n# {key} = ")), "{key}: {text}");
        }
        assert_eq!(MEANING.len(), keys::all().count(), "a key is explained that there is not");
        // Uncommented, every value is what it was.
        let before_rules = text.split("# ---- rules").next().unwrap();
        let is_value = |line: &&str| keys::all().any(|k| line.starts_with(&format!("{k} = ")));
        let values: Vec<_> = before_rules.lines().map(|l| l.strip_prefix("# ").filter(is_value).unwrap_or(l)).collect();
        let mut config = Config::default();
        file::parse(&values.join("\n"), "shown", &mut config).unwrap();
        let plain = |c: &Config| -> Vec<(String, String)> {
            c.settings().into_iter().map(|s| (s.key, s.value)).filter(|s| s.0 != "threads").collect()
        };
        assert_eq!(plain(&config), plain(&Config::default()));
        assert_eq!(config.sources.len(), keys::all().count());
    }

    #[test]
    fn what_was_set_is_shown_and_read_back() {
        let text = "durability = \"fsync\"\nxattr_policy = true\n[limits]\nthreads = 3\n[[rule]]\nmatch = \"a\\\"b*\"\n\
                    mode = \"in-place\"\nrestage_max_bytes = 7\n";
        let mut config = Config::default();
        file::parse(text, "/etc/x.toml", &mut config).unwrap();
        let shown = render(&config);
        assert!(
            shown.contains("threads = 3  # /etc/x.toml:4") && shown.contains("[[rule]]  # /etc/x.toml:5"),
            "{shown}"
        );
        let mut again = Config::default();
        file::parse(&shown, "shown", &mut again).unwrap();
        assert_eq!((again.policies.base, again.limits), (config.policies.base, config.limits));
        assert_eq!(again.service, config.service);
        assert_eq!(again.policies.rules[0].glob, "a\"b*");
        assert_eq!(again.policies.rules[0].values(), config.policies.rules[0].values());
    }
}
