//! Messages that arrive once, in order and unchanged, or not at all: each is numbered and carries a checksum. Below TCP
//! there is one of 16 bits, and none in a proxy that rewrites streams.

use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use crc32fast::Hasher;
use prost::Message;
use thiserror::Error;

use crate::cluster::sequence::{Gap, Incoming, Outgoing};

/// Why a stream cannot go on.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SealError {
    /// A message is missing.
    #[error("{0}")]
    Gap(Gap),
    /// A message was changed on its way.
    #[error(
        "message {number} was changed on its way: its checksum is {found:08x}, not {expected:08x}"
    )]
    Damaged {
        /// Its number.
        number: u64,
        /// What its content gives.
        found: u32,
        /// What it carries.
        expected: u32,
    },
    /// A message cannot be read.
    #[error("message {number} cannot be read: {reason}")]
    Unreadable {
        /// Its number.
        number: u64,
        /// Why.
        reason: String,
    },
}

fn compare(number: u64, found: u32, expected: u32) -> Result<(), SealError> {
    match found == expected {
        true => Ok(()),
        false => Err(SealError::Damaged {
            number,
            found,
            expected,
        }),
    }
}

/// The sending end of a session.
#[derive(Debug, Default)]
pub struct Sealer(Outgoing);

impl Sealer {
    /// Puts the next message into its frame.
    pub fn frame(&mut self, message: &impl Message) -> v1::Frame {
        self.body(message.encode_to_vec().into())
    }

    /// Puts the next message, which is encoded, into its frame.
    pub fn body(&mut self, body: bytes::Bytes) -> v1::Frame {
        let number = self.0.number();
        v1::Frame {
            number,
            check: frame_check(number, &body),
            body,
        }
    }

    /// Completes the next message of an exchange.
    pub fn chunk(&mut self, kind: Kind) -> v1::Chunk {
        let number = self.0.number();
        v1::Chunk {
            number,
            check: chunk_check(number, &kind),
            kind: Some(kind),
        }
    }
}

/// The receiving end of a session.
#[derive(Debug, Default)]
pub struct Opener(Incoming);

impl Opener {
    /// The message of a frame; `None` for a copy.
    pub fn frame<M: Message + Default>(
        &mut self,
        frame: v1::Frame,
    ) -> Result<Option<M>, SealError> {
        let number = frame.number;
        compare(number, frame_check(number, &frame.body), frame.check)?;
        if !self.0.accept(number).map_err(SealError::Gap)? {
            return Ok(None);
        }
        let message = M::decode(frame.body).map_err(|error| SealError::Unreadable {
            number,
            reason: error.to_string(),
        })?;
        Ok(Some(message))
    }

    /// The content of a message of an exchange; `None` for a copy.
    pub fn chunk(&mut self, chunk: v1::Chunk) -> Result<Option<Kind>, SealError> {
        let number = chunk.number;
        let kind = chunk.kind.ok_or_else(|| SealError::Unreadable {
            number,
            reason: "it is empty".into(),
        })?;
        compare(number, chunk_check(number, &kind), chunk.check)?;
        if let Kind::Node(node) | Kind::Params(node) = &kind {
            compare(number, checksum(&node.data), node.check)?;
        }
        let new = self.0.accept(number).map_err(SealError::Gap)?;
        Ok(new.then_some(kind))
    }
}

/// CRC-32 of a chunk's data.
pub fn checksum(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}

/// CRC-32 of texts, each followed by its length in bytes.
pub fn texts_check(texts: &[String]) -> u32 {
    let mut hasher = Hasher::new();
    for text in texts {
        hasher.update(text.as_bytes());
        hasher.update(&(text.len() as u32).to_le_bytes());
    }
    hasher.finalize()
}

/// CRC-32 of the tokens of texts, those of each followed by their number.
pub fn tokens_check<'a>(texts: impl IntoIterator<Item = &'a [u32]>) -> u32 {
    let mut hasher = Hasher::new();
    for ids in texts {
        for part in ids.chunks(1024) {
            let bytes: Vec<u8> = part.iter().flat_map(|id| id.to_le_bytes()).collect();
            hasher.update(&bytes);
        }
        hasher.update(&(ids.len() as u32).to_le_bytes());
    }
    hasher.finalize()
}

fn frame_check(number: u64, body: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// The data of a chunk goes in by its own checksum, so that one that is sent to many is read once.
fn chunk_check(number: u64, kind: &Kind) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&number.to_le_bytes());
    match kind {
        Kind::Node(node) => hash_node(&mut hasher, node),
        Kind::Params(node) => {
            hash_node(&mut hasher, node);
            hasher.update(b"p");
        }
        Kind::Credit(credit) => {
            hasher.update(&credit.step.to_le_bytes());
            hasher.update(&credit.below.to_le_bytes());
        }
        Kind::Open(open) => {
            hasher.update(&open.after.to_le_bytes());
            hash_segment(&mut hasher, open.segment.as_ref());
        }
        Kind::SharedNode(node) => {
            hasher.update(&node.step.to_le_bytes());
            for field in [node.first, node.size, node.index, node.below] {
                hasher.update(&field.to_le_bytes());
            }
            hasher.update(&node.offset.to_le_bytes());
        }
        Kind::SharedRoot(root) => {
            hasher.update(&root.step.to_le_bytes());
            hash_segment(&mut hasher, root.segment.as_ref());
        }
        Kind::Probe(probe) => {
            hasher.update(&probe.number.to_le_bytes());
            hasher.update(&probe.padding);
        }
        Kind::Echo(echo) => {
            hasher.update(b"e");
            hasher.update(&echo.number.to_le_bytes());
        }
        Kind::Done(done) => hasher.update(&done.through.to_le_bytes()),
        // Messages without a field differ by a byte, so that one cannot become the other unnoticed.
        Kind::Alive(v1::Empty {}) => {}
        Kind::Shares(v1::Empty {}) => hasher.update(b"s"),
    }
    hasher.finalize()
}

fn hash_node(hasher: &mut Hasher, node: &v1::NodeChunk) {
    hasher.update(&node.step.to_le_bytes());
    for field in [node.first, node.size, node.index, node.check] {
        hasher.update(&field.to_le_bytes());
    }
}

fn hash_segment(hasher: &mut Hasher, segment: Option<&v1::Segment>) {
    let Some(segment) = segment else { return };
    hasher.update(&segment.pid.to_le_bytes());
    hasher.update(&segment.fd.to_le_bytes());
    hasher.update(&segment.nonce);
    hasher.update(&segment.bytes.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(data: Vec<u8>) -> Kind {
        let data: bytes::Bytes = data.into();
        Kind::Node(v1::NodeChunk {
            step: 7,
            first: 2,
            size: 1,
            index: 3,
            check: checksum(&data),
            data,
        })
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(
            data in prop::collection::vec(any::<u8>(), 1..200),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let sealed = Sealer::default().chunk(node(data));
            let mut bytes = sealed.encode_to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(changed) = v1::Chunk::decode(bytes.as_slice())
                && let Ok(Some(kind)) = Opener::default().chunk(changed)
            {
                // Only what does not matter can have changed, such as a longer way to write a number.
                prop_assert_eq!(Some(kind), sealed.kind);
            }
        }
    }

    #[test]
    fn messages_come_back_once_and_in_order() {
        let (mut sealer, mut opener) = (Sealer::default(), Opener::default());
        let mut frame = |name: &str| sealer.frame(&v1::Name { name: name.into() });
        let (first, second, third) = (frame("a"), frame("b"), frame("c"));
        let name = |found: Option<v1::Name>| found.map(|n| n.name);
        let opened = opener.frame(first.clone()).unwrap();
        assert_eq!(name(opened).as_deref(), Some("a"));
        assert_eq!(opener.frame::<v1::Name>(first).unwrap(), None);
        let error = opener.frame::<v1::Name>(third).unwrap_err().to_string();
        assert_eq!(error, "message 2 did not arrive, but message 3 did");
        let mut damaged = second;
        damaged.body = b"\n\x01x".to_vec().into();
        let error = opener.frame::<v1::Name>(damaged).unwrap_err();
        assert!(
            matches!(error, SealError::Damaged { number: 2, .. }),
            "{error}"
        );
    }
}
