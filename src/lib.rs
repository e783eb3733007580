//! Makes the file saves of programs that nobody can change whole, durable and fast.
//!
//! A save through the mount is staged beside the old version, flushed together with the saves of everybody else, and
//! published by one atomic rename; `close` and `fsync` return when it is on stable storage.
//!
//! | module | what it is | may call |
//! |---|---|---|
//! | [`cli`] | the two command lines, one verb a file | everything below |
//! | [`mount`] | life cycle: checks, lock, recovery, session, drain; control socket | `transport`, `fs`, `engine` |
//! | [`transport`] | decodes the kernel's requests; the only place that names FUSE types | `fs` |
//! | [`fs`] | the operation core: nodes, names, descriptors, attributes | `engine`, `backend` |
//! | [`engine`] | the product: versions, dispatcher, replace pipeline, journal, recovery | `backend` |
//! | [`backend`] | the backing file system as typed calls, behind the seam for tests | `sys` |
//! | [`tuning`] | measures a directory and predicts what a mount of it gives | `engine`, `backend` |
//! | `sys` | system calls that libraries lack; `unsafe` lives here and in `backend::uring` | |
//! | [`config`] | policies by path, bounds; plain data, handed down | |
//! | [`error`], [`telemetry`] | leaves | |

pub mod backend;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod fs;
pub mod mount;
mod sys;
pub mod telemetry;
pub mod transport;
pub mod tuning;
