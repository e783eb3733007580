//! Taking a mount away, as the transports make it.

pub use crate::transport::mounting::unmount;
