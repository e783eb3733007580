//! `fsys-mount`: parse, run, exit code.

fn main() -> std::process::ExitCode {
    fsys_mount::cli::mount::main(fsys_mount::mount::launch::launch)
}
