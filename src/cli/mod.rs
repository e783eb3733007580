//! The command lines: `fsys-mount` in [`mount`], and the tool for people, `fsys`, one verb a file.
//!
//! A verb returns its `Output`; printing and exit codes are in one place, here.

mod bench;
mod bundle;
pub mod chart;
mod client;
mod config;
mod doctor;
mod drain;
mod generate;
mod get;
mod metrics;
pub mod mount;
mod progress;
mod recover;
mod reload;
mod remount;
mod set;
mod status;
mod top;
mod tune;
mod umount;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::error::{Error, Exit, Result};

/// The exit codes, for the help of both programs.
const EXIT_CODES: &str = "Exit codes:
   0  done
   1  wrong usage, an unknown option, an invalid configuration
   2  the system refused: no /dev/fuse, no permission, not a directory, no daemon
   4  an internal fault of this program
  16  in use: the backing directory by another daemon, the mount by programs
  32  mounting failed
  64  the mount answers, but not everything is durable: failed commits, or read-only";

/// `fsys`: see and control fsys mounts.
#[derive(Debug, Parser)]
#[command(name = "fsys", version, about = "See and control fsys mounts", after_help = EXIT_CODES)]
struct Tool {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Status(status::Args),
    Top(top::Args),
    Get(get::Args),
    Set(set::Args),
    Reload(reload::Args),
    Metrics(metrics::Args),
    Drain(drain::Args),
    Doctor(doctor::Args),
    Tune(tune::Args),
    Bench(bench::Args),
    Config(config::Args),
    Bundle(bundle::Args),
    #[command(hide = true)]
    Generate(generate::Args),
    Umount(umount::Args),
    Recover(recover::Args),
}

/// What a verb has to say, and how it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Output {
    text: String,
    exit: Exit,
}

impl Output {
    /// `text` for people, or `value` as JSON for programs.
    fn new(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<Self> {
        let text = if json { serde_json::to_string_pretty(value).map_err(not_shown)? } else { text() };
        Ok(Self { text, exit: Exit::Ok })
    }
}

fn not_shown(e: impl std::fmt::Display) -> Error {
    Error::new(Exit::Internal, "cannot show the answer", e, "nothing was changed", "report this")
}

/// The program `fsys`.
pub fn tool() -> ExitCode {
    let tool = match parse::<Tool>(std::env::args_os()) {
        Ok(tool) => tool,
        Err(code) => return code,
    };
    let output = match &tool.verb {
        Verb::Status(args) => status::run(args),
        Verb::Top(args) => top::run(args),
        Verb::Get(args) => get::run(args),
        Verb::Set(args) => set::run(args),
        Verb::Reload(args) => reload::run(args),
        Verb::Metrics(args) => metrics::run(args),
        Verb::Drain(args) => drain::run(args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::Tune(args) => tune::run(args),
        Verb::Bench(args) => bench::run(args),
        Verb::Config(args) => config::run(args),
        Verb::Bundle(args) => bundle::run(args),
        Verb::Generate(args) => generate::run(args),
        Verb::Umount(args) => umount::run(args),
        Verb::Recover(args) => recover::run(args),
    };
    finish("fsys", output)
}

/// Parses; help, version and errors are printed, and end the program with the code that is returned.
fn parse<T: Parser>(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<T, ExitCode> {
    T::try_parse_from(args).map_err(|e| {
        let exit = if e.use_stderr() { Exit::Usage } else { Exit::Ok };
        // A closed terminal must not turn the help into a failure.
        e.print().unwrap_or_default();
        exit.into()
    })
}

/// Prints what a command said and returns its exit code.
fn finish(program: &str, output: Result<Output>) -> ExitCode {
    match output {
        Ok(output) => {
            let text = visible(output.text.trim_end());
            let printed = if text.is_empty() { Ok(()) } else { writeln!(std::io::stdout().lock(), "{text}") };
            match printed {
                // The reader has seen enough (`fsys status | head -1`).
                Err(e) if e.kind() != ErrorKind::BrokenPipe => finish(program, Err(not_shown(e))),
                _ => output.exit.into(),
            }
        }
        Err(e) => {
            writeln!(std::io::stderr().lock(), "{program}: {}", visible(&e.to_string())).unwrap_or_default();
            e.exit.into()
        }
    }
}

/// Names of files may hold anything; what would move the cursor or the colours of a terminal is shown as `?`.
fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_name_says_nothing_to_the_terminal() {
        assert_eq!(visible("two\n\tlines \u{1b}[31m\u{7}\u{9b}2J\r\u{e9}"), "two\n\tlines ?[31m??2J?\u{e9}");
    }

    #[test]
    fn the_commands_are_consistent_and_have_examples() {
        let mut command = Tool::command();
        command.build();
        command.clone().debug_assert();
        for verb in command.get_subcommands().filter(|v| v.get_name() != "help") {
            let help = verb.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{help}");
            assert!(help.contains(&format!("fsys {}", verb.get_name())), "{help}");
        }
        assert!(command.render_long_help().to_string().contains("Exit codes:"));
    }
}
