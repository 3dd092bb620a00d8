//! Which version of the protocol both ends of a connection speak, and what follows.
//!
//! Every call carries the caller's version as metadata, beside its token; the coordinator looks at it before anything else,
//! whichever side is the newer one. A version is two numbers:
//!
//! - The **major** number changes when an older end would misunderstand a newer one. Ends of different majors do not work
//!   together, and the one that is refused is told which side to upgrade.
//! - The **minor** number changes when something was added that an older end can do without: a field that it does not
//!   know, which Protocol Buffers and JSON pass over, or a call that it does not have, which is answered as such. Ends of
//!   one major work together.
//!
//! Nothing here says whether workers compute the same bits: that is what their fingerprint is for.

use std::fmt;

/// The version that this build speaks.
pub const PROTOCOL: Protocol = Protocol {
    major: 10,
    minor: 0,
};

/// Metadata key of the caller's version.
pub const PROTOCOL_KEY: &str = "cohort-protocol";

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Protocol {
    /// What an older end would misunderstand.
    pub major: u32,
    /// What an older end can do without.
    pub minor: u32,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Protocol {
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        let number = |text: &str| {
            let digits = text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().ok()).flatten()
        };
        Some(Self {
            major: number(major)?,
            minor: number(minor)?,
        })
    }
}

/// What an end says of itself: the protocol, and the version of its build, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Speaker {
    /// What it speaks.
    pub protocol: Protocol,
    /// The version of its build, such as `0.1.0`.
    pub build: String,
}

impl Speaker {
    /// This build.
    pub fn here() -> Self {
        Self {
            protocol: PROTOCOL,
            build: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// As calls carry it: `8.0 0.1.0`.
    pub fn header(&self) -> String {
        format!("{} {}", self.protocol, self.build)
    }

    fn parse(text: &str) -> Option<Self> {
        let (protocol, build) = text.split_once(' ').unwrap_or((text, "unknown"));
        Some(Self {
            protocol: Protocol::parse(protocol)?,
            build: build.into(),
        })
    }
}

/// Why a coordinator does not talk to a caller; the sentence is for the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Another major version.
    #[error(
        "this cohort {} speaks protocol {}, the coordinator's cohort {} speaks {}; protocols of different first numbers do \
         not mix: upgrade cohort {}",
        .caller.build,
        .caller.protocol,
        .coordinator.build,
        .coordinator.protocol,
        if .caller.protocol < .coordinator.protocol { "on this machine" } else { "on the coordinator's machine" }
    )]
    Major {
        /// Who calls.
        caller: Speaker,
        /// Who was called.
        coordinator: Speaker,
    },
    /// A worker of a time when calls did not carry a version.
    #[error(
        "this worker does not say which protocol it speaks, so it is older than 7.0; the coordinator's cohort {} speaks {}: \
         upgrade cohort on this machine",
        .0.build,
        .0.protocol
    )]
    Silent(Speaker),
    /// What the call carries is no version.
    #[error(
        "`{0}` is no version of the protocol; expected something like `8.0 0.1.0` in `cohort-protocol`"
    )]
    Malformed(String),
}

/// Whether `coordinator` talks to a caller that says this of itself. Who says nothing is taken for a tool of somebody's own.
pub fn admit(caller: Option<&str>, coordinator: &Speaker) -> Result<Option<Speaker>, Mismatch> {
    let Some(text) = caller else {
        return Ok(None);
    };
    let malformed = || Mismatch::Malformed(text.chars().take(64).collect());
    let caller = Speaker::parse(text).ok_or_else(malformed)?;
    match caller.protocol.major == coordinator.protocol.major {
        true => Ok(Some(caller)),
        false => Err(Mismatch::Major {
            caller,
            coordinator: coordinator.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinator() -> Speaker {
        Speaker {
            protocol: Protocol { major: 7, minor: 2 },
            build: "0.3.0".into(),
        }
    }

    #[test]
    fn what_is_carried_is_read() {
        let here = Speaker::here();
        assert_eq!(admit(Some(&here.header()), &here), Ok(Some(here.clone())));
    }

    #[test]
    fn a_minor_version_more_or_less_is_no_matter() {
        for text in ["7.0 0.1.0", "7.2 0.3.0", "7.3 0.4.0-beta.1", "7.10"] {
            assert!(admit(Some(text), &coordinator()).is_ok(), "{text}");
        }
        // A tool that is nobody's client.
        assert_eq!(admit(None, &coordinator()), Ok(None));
    }

    #[test]
    fn another_major_version_is_told_which_side_is_old() {
        let said = |text: &str| admit(Some(text), &coordinator()).unwrap_err().to_string();
        assert_eq!(
            said("6.9 0.2.0"),
            "this cohort 0.2.0 speaks protocol 6.9, the coordinator's cohort 0.3.0 speaks 7.2; protocols of different \
             first numbers do not mix: upgrade cohort on this machine"
        );
        assert_eq!(
            said("8.0 1.0.0"),
            "this cohort 1.0.0 speaks protocol 8.0, the coordinator's cohort 0.3.0 speaks 7.2; protocols of different \
             first numbers do not mix: upgrade cohort on the coordinator's machine"
        );
    }

    #[test]
    fn nonsense_is_no_version() {
        let long = "7".repeat(1000);
        for text in [
            "", "7", "7.", ".1", "+7.0", "7.-1", "7.0.1", " 7.0", "x.y", &long,
        ] {
            let refused = admit(Some(text), &coordinator());
            assert!(matches!(refused, Err(Mismatch::Malformed(_))), "{text}");
            assert!(refused.unwrap_err().to_string().len() < 200);
        }
    }
}
