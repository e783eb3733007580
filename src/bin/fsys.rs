//! `fsys`: the tool for people who run fsys mounts.

fn main() -> std::process::ExitCode {
    fsys_mount::cli::tool()
}
