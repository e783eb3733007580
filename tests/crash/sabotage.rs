//! Negative controls on the real programs, unchanged: a process that believes it makes certain system calls.
//!
//! A seccomp filter answers them with success and does not do them. io_uring, through which they could be made unseen,
//! is not there for such a process; programs fall back to system calls.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// What makes data get out of the page cache ahead of a barrier (ext4, XFS).
pub const DATA_FLUSH: &[libc::c_long] = &[libc::SYS_sync_file_range];
/// What makes anything durable.
pub const EVERY_SYNC: &[libc::c_long] = &[libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_syncfs];
/// With what recovery removes unfinished versions.
pub const CLEANUP: &[libc::c_long] = &[libc::SYS_unlinkat];

/// The command will believe that it makes these calls.
pub fn leave_out(command: &mut Command, calls: &[libc::c_long]) {
    if calls.is_empty() {
        return;
    }
    let program = filter(calls);
    // SAFETY: between fork and exec only this one system call is made; the program was built before.
    unsafe {
        command.pre_exec(move || install(&program));
    }
}

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Skips the next statement unless the accumulator is `k`.
const fn unless(k: u32) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: 1, k }
}

/// Answers each of `calls` with 0.
fn filter(calls: &[libc::c_long]) -> Vec<libc::sock_filter> {
    /// Offset of `nr` in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    let answer = |errno: i32| statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32);
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER)];
    program.extend([unless(libc::SYS_io_uring_setup as u32), answer(libc::ENOSYS)]);
    program.extend(calls.iter().flat_map(|call| [unless(*call as u32), answer(0)]));
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program
}

fn install(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the filter outlives the call, which copies it.
    let rc = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn a_call_that_is_left_out_answers_success_and_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f");
    std::fs::write(&file, "still here").unwrap();
    let mut command = Command::new("rm");
    leave_out(&mut command, CLEANUP);
    assert!(command.arg(&file).status().unwrap().success());
    assert!(file.exists());
}
