//! What a device can do, and what a mount on it would give: for `fsys tune` and `fsys bench`.
//!
//! | file | what it is |
//! |---|---|
//! | [`scratch`] | a directory for measurements, removed at the end |
//! | [`measure`] | times of flushes and of whole batches, with the engine's own calls |
//! | [`load`] | programs that save, as threads |
//! | [`model`] | the dispatcher's rule played over measured times: saves per second, latency |
//!
//! Invariants: nothing outside the scratch directory is touched; no figure is built in, each was measured here.

pub mod load;
pub mod measure;
pub mod model;
pub mod scratch;
