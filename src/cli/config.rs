//! `fsys config`: check a configuration file, show the documented one.

use std::path::PathBuf;

use serde_json::json;

use super::Output;
use crate::config::{Config, doc, file};
use crate::error::Result;

const EXAMPLE: &str = "Examples:
  fsys config check /etc/fsys/data.toml
  fsys config show > /etc/fsys/data.toml      # the documented defaults, to begin with
  fsys config show /etc/fsys/data.toml        # what holds with this file, and from which line

Exit code 1: the file is not valid; line, column and remedy are said.";

/// Check a configuration file, or show the documented defaults
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Check a file; nothing is mounted
    Check {
        /// For programs
        #[arg(long)]
        json: bool,
        /// The configuration file
        file: PathBuf,
    },
    /// Show every key with its meaning and value: the defaults, or what holds with a file
    Show {
        /// For programs
        #[arg(long)]
        json: bool,
        /// The configuration file
        file: Option<PathBuf>,
    },
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let mut config = Config::default();
    match &args.what {
        What::Check { json, file } => {
            file::load(file, &mut config)?;
            let rules = &config.policies.rules;
            let idle: Vec<_> = rules.iter().filter(|r| r.values().is_empty()).map(|r| r.source.clone()).collect();
            let answer =
                json!({ "valid": true, "values": config.sources.len(), "rules": rules.len(), "idle_rules": idle });
            Output::new(*json, &answer, || {
                let mut text =
                    format!("{}: valid; {} value(s), {} rule(s)", file.display(), config.sources.len(), rules.len());
                idle.iter().for_each(|source| text.push_str(&format!("\n{source}: this rule sets nothing")));
                text
            })
        }
        What::Show { json, file } => {
            if let Some(file) = file {
                file::load(file, &mut config)?;
            }
            let rules: Vec<_> = config.policies.rules.iter().map(|r| {
                json!({ "match": r.glob, "source": r.source, "values": r.values().into_iter().collect::<std::collections::BTreeMap<_, _>>() })
            }).collect();
            Output::new(*json, &json!({ "settings": config.settings(), "rules": rules }), || doc::render(&config))
        }
    }
}
