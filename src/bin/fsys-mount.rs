//! `fsys-mount`: parse, run, exit code.

use fsys_mount::error::{Error, Exit};

fn main() -> std::process::ExitCode {
    fsys_mount::cli::mount::main(|_| {
        Err(Error::new(
            Exit::Internal,
            "cannot start the file system",
            "this build has none",
            "nothing is mounted; no file was touched",
            "build a later version",
        ))
    })
}
