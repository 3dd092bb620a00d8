//! What somebody may do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A role in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees everything and changes nothing.
    Viewer,
    /// Also prepares, trains, pauses and deletes.
    Operator,
    /// Computes for the cluster: gets text and weights, gives gradients. Sees and changes no runs.
    Worker,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Worker];

    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Worker => "worker",
        }
    }

    /// Its name with an article.
    pub fn phrase(self) -> &'static str {
        match self {
            Self::Viewer => "a viewer",
            Self::Operator => "an operator",
            Self::Worker => "a worker",
        }
    }

    /// Whether who has this role may do what `needed` may.
    pub fn may(self, needed: Self) -> bool {
        self == needed || (self == Self::Operator && needed == Self::Viewer)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.word() == text);
        found.ok_or_else(|| "expected `viewer`, `operator` or `worker`".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_sees_what_a_viewer_sees_and_a_worker_does_neither() {
        let may = |role: Role| Role::ALL.map(|needed| role.may(needed));
        assert_eq!(may(Role::Viewer), [true, false, false]);
        assert_eq!(may(Role::Operator), [true, true, false]);
        assert_eq!(may(Role::Worker), [false, false, true]);
    }
}
