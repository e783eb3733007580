//! The policy that a file sets for itself, by the xattr `user.fsys.policy`, where the configuration allows it.
//!
//! The value has the form of the mount's options: `durability=relaxed,mode=in-place`. It is checked when it is set,
//! and read once for a node, not by every open.

use std::ffi::OsStr;
use std::sync::Arc;

use parking_lot::RwLock;
use rustix::io::Errno;

use super::{Fs, Kind, Node};
use crate::config::Config;
use crate::config::options::split;
use crate::config::policy::Rule;

/// The name of the xattr.
const NAME: &str = "user.fsys.policy";

/// Longest value, bytes; all four values fit in many times over.
const VALUE_MAX: usize = 1024;

/// The policy of one file's own: not read yet, or what it was then.
#[derive(Debug, Default)]
pub(super) struct OnceOwn(RwLock<Option<Option<Arc<Rule>>>>);

/// The rule that a value stands for.
fn parse(value: &[u8]) -> Result<Rule, String> {
    let text = std::str::from_utf8(value).map_err(|e| e.to_string())?;
    if text.len() > VALUE_MAX {
        return Err(format!("longer than {VALUE_MAX} bytes"));
    }
    let mut rule = Rule::everywhere(&format!("xattr {NAME}"));
    for word in split(text) {
        let value = word.value.ok_or_else(|| format!("`{}` has no value", word.name))?;
        rule.set(&word.name, &value).map_err(|r| format!("{}; {}", r.why, r.action))?;
    }
    Ok(rule)
}

impl Fs {
    /// What a file says of its own policy, where that counts.
    pub(super) fn own_policy(&self, config: &Config, node: &Node) -> Option<Arc<Rule>> {
        if !config.service.xattr_policy || !matches!(node.kind, Kind::File(_)) {
            return None;
        }
        if let Some(known) = &*node.own.0.read() {
            return known.clone();
        }
        // Read with the place locked: a change that comes meanwhile waits, and then makes it unknown again.
        let mut place = node.own.0.write();
        let own = match self.getxattr(node.id, NAME.as_ref()) {
            Ok(value) => parse(&value)
                .inspect_err(|why| tracing::warn!(node = node.id, "the xattr {NAME} of a file does not count: {why:?}"))
                .ok()
                .map(Arc::new),
            Err(Errno::NODATA | Errno::NOTSUP) => None,
            // Not known: the next open asks again.
            Err(e) => {
                tracing::warn!(node = node.id, "the xattr {NAME} of a file cannot be read: {e}");
                return None;
            }
        };
        *place = Some(own.clone());
        own
    }

    /// Refuses what sets no policy.
    ///
    /// # Errors
    /// `EINVAL`: the value is not valid, or this is no regular file.
    pub(super) fn check_own(&self, node: &Node, name: &OsStr, value: &[u8]) -> Result<(), Errno> {
        if name != NAME || !self.engine.config().service.xattr_policy {
            return Ok(());
        }
        node.file().map_err(|_| Errno::INVAL)?;
        parse(value).map(|_| ()).map_err(|why| {
            tracing::info!(node = node.id, "the xattr {NAME} was refused: {why:?}");
            Errno::INVAL
        })
    }

    /// The xattr `name` of the node changed.
    pub(super) fn own_changed(node: &Node, name: &OsStr) {
        if name == NAME {
            *node.own.0.write() = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::policy::{Durability, WriteMode};

    #[test]
    fn values_in_the_form_of_options() {
        let rule = parse(b"durability=relaxed,mode=in-place").unwrap();
        assert_eq!(
            (rule.durability, rule.mode, rule.method),
            (Some(Durability::Relaxed), Some(WriteMode::InPlace), None)
        );
        assert!(parse(b"").unwrap().mode.is_none());
        for nonsense in [&b"durability"[..], b"durability=often", b"threads=3", b"\xff", &[b'x'; 2000]] {
            assert!(parse(nonsense).is_err(), "{nonsense:?}");
        }
    }
}
