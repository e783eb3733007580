//! Makes the file saves of programs that nobody can change whole, durable and fast.

pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod mount;
pub mod telemetry;
