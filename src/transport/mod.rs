//! Transports: how the kernel's requests come in and the answers go out.

pub mod fuser;
mod opened;
