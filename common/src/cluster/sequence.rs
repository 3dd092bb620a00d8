//! Numbered messages. A connection that delivers everything once and in order needs no numbers; a proxy, a broken
//! network card or a bug between two ends may not. Each end numbers what it sends: a copy is dropped, and a gap ends the
//! session, so that nothing is ever built on a message that did not arrive. **Pure.**

use std::fmt;

/// Numbers the messages that go out.
#[derive(Clone, Debug, Default)]
pub struct Outgoing(u64);

impl Outgoing {
    /// The number of the next message, from 1.
    pub fn number(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}

/// Checks the numbers of the messages that come in.
#[derive(Clone, Debug, Default)]
pub struct Incoming(u64);

/// A message is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The number that was due.
    pub expected: u64,
    /// The number that came.
    pub found: u64,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { expected, found } = self;
        write!(
            f,
            "message {expected} did not arrive, but message {found} did"
        )
    }
}

impl Incoming {
    /// Whether the message with this number is new; a copy is not. After a gap nothing more may be taken in.
    pub fn accept(&mut self, number: u64) -> Result<bool, Gap> {
        let expected = self.0 + 1;
        match number {
            found if found > expected => Err(Gap { expected, found }),
            found if found < expected => Ok(false),
            _ => {
                self.0 = number;
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_dropped_and_gaps_are_named() {
        let mut outgoing = Outgoing::default();
        let mut incoming = Incoming::default();
        let numbers: Vec<u64> = (0..3).map(|_| outgoing.number()).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert_eq!(incoming.accept(1), Ok(true));
        assert_eq!(incoming.accept(1), Ok(false));
        assert_eq!(incoming.accept(2), Ok(true));
        let gap = Gap {
            expected: 3,
            found: 4,
        };
        assert_eq!(incoming.accept(4), Err(gap));
        assert_eq!(
            gap.to_string(),
            "message 3 did not arrive, but message 4 did"
        );
    }
}
