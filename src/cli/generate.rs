//! `fsys generate`: manual pages and completions, from the same definitions as the command lines. For packagers, and
//! for those who installed without a package.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::Shell;
use serde_json::json;

use super::Output;
use crate::error::{Error, Exit, Result};

const EXAMPLE: &str = "Examples:
  fsys generate man /usr/local/share/man/man8
  fsys generate completions ~/.local/share/bash-completion/completions";

/// Write manual pages or shell completions into a directory
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// What
    what: What,
    /// An existing directory
    directory: PathBuf,
    /// For programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// fsys.8 and a page for each verb, fsys-mount.8, mount.fsys.8
    Man,
    /// For bash, zsh and fish
    Completions,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let commands = [super::Tool::command(), super::mount::Args::command(), super::mount::HelperArgs::command()];
    let made = match args.what {
        What::Man => manual(&commands, &args.directory),
        What::Completions => completions(&commands, &args.directory),
    };
    let made = made.map_err(|e| {
        let what = format!("cannot write into {}", args.directory.display());
        Error::new(
            Exit::System,
            what,
            e,
            "the files may be incomplete",
            "name a directory that exists and may be written",
        )
    })?;
    Output::new(args.json, &json!({ "files": made }), || made.join("\n"))
}

fn manual(commands: &[Command], dir: &Path) -> io::Result<Vec<String>> {
    let mut made = Vec::new();
    for command in commands {
        let mut command = command.clone();
        // `fsys help` needs no page.
        command = command.disable_help_subcommand(true);
        command.build();
        pages(&command, dir, &mut made)?;
    }
    Ok(made)
}

/// A page for a command and one for each of its verbs: `fsys-config-check.8`.
fn pages(command: &Command, dir: &Path, made: &mut Vec<String>) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let page = format!("{name}.8");
    let man = clap_mangen::Man::new(command.clone()).section("8").title(name.to_uppercase());
    man.render(&mut File::create(dir.join(&page))?)?;
    made.push(page);
    command.get_subcommands().filter(|verb| !verb.is_hide_set()).try_for_each(|verb| pages(verb, dir, made))
}

fn completions(commands: &[Command], dir: &Path) -> io::Result<Vec<String>> {
    let mut made = Vec::new();
    // mount.fsys is called by mount(8), not by people.
    for command in commands.iter().filter(|c| c.get_name() != "mount.fsys") {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let name = command.get_name().to_owned();
            let path = clap_complete::generate_to(shell, &mut command.clone(), name, dir)?;
            made.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    Ok(made)
}
