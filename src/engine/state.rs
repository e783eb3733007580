//! The life of one regular file as a closed set of states. Pure; every transition is in one table.

use std::fmt;

/// Where a file stands between its committed version and the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The backing file is what programs see (it may have writes in place that no flush has covered yet).
    Clean,
    /// A staged version is what programs see; the backing name is absent or old.
    Staged,
    /// The staged version is with the dispatcher: nothing may change it until the answer.
    Committing,
    /// No name leads to the file any more; it lives as long as its descriptors.
    Orphan,
}

/// What happens to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A new version begins.
    Stage,
    /// The version goes to the dispatcher.
    Submit,
    /// The version was published and is durable.
    Published,
    /// The commit failed; an older version stands.
    FailedOld,
    /// The commit failed; the file had never been committed.
    FailedNew,
    /// The last name was removed or replaced by another file.
    Unlinked,
}

/// An event that the state has no answer to: a bug, reported as EIO, never ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Illegal(pub Phase, pub Event);

impl fmt::Display for Illegal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {:?} in state {:?}", self.1, self.0)
    }
}

impl Phase {
    /// The transition table.
    pub fn on(self, e: Event) -> Result<Self, Illegal> {
        match (self, e) {
            (Self::Clean, Event::Stage) => Ok(Self::Staged),
            (Self::Staged, Event::Submit) => Ok(Self::Committing),
            (Self::Committing, Event::Published | Event::FailedOld) => Ok(Self::Clean),
            (Self::Committing, Event::FailedNew) => Ok(Self::Orphan),
            (Self::Clean | Self::Staged | Self::Orphan, Event::Unlinked) => Ok(Self::Orphan),
            (s, e) => Err(Illegal(s, e)),
        }
    }

    /// The name that status shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Staged => "staged",
            Self::Committing => "committing",
            Self::Orphan => "orphan",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Event::*, Phase::*};

    #[test]
    fn every_pair() {
        let mut table = String::new();
        for s in [Clean, Staged, Committing, Orphan] {
            for e in [Stage, Submit, Published, FailedOld, FailedNew, Unlinked] {
                let next = s.on(e).map_or("-".into(), |n| format!("{n:?}"));
                table += &format!("{s:?}+{e:?}={next}\n");
            }
        }
        let want = "Clean+Stage=Staged\nClean+Submit=-\nClean+Published=-\nClean+FailedOld=-\nClean+FailedNew=-\n\
            Clean+Unlinked=Orphan\nStaged+Stage=-\nStaged+Submit=Committing\nStaged+Published=-\nStaged+FailedOld=-\n\
            Staged+FailedNew=-\nStaged+Unlinked=Orphan\nCommitting+Stage=-\nCommitting+Submit=-\n\
            Committing+Published=Clean\nCommitting+FailedOld=Clean\nCommitting+FailedNew=Orphan\n\
            Committing+Unlinked=-\nOrphan+Stage=-\nOrphan+Submit=-\nOrphan+Published=-\nOrphan+FailedOld=-\n\
            Orphan+FailedNew=-\nOrphan+Unlinked=Orphan\n";
        assert_eq!(table, want);
    }
}
