//! The product: knows files and versions, not FUSE.

pub mod layout;
pub mod recover;
