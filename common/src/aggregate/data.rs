//! The ways in which a chunk of a node comes: what waits of it to be summed, and what is remembered of it, so that a
//! copy can be compared.

use bytes::Bytes;

use crate::floats::{bytes_of, floats_of, stamp};
use crate::ids::SessionId;
use crate::seal::checksum;
use crate::segment::Part;
use crate::spec::Payload;

/// What a chunk's bytes are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub payload: Payload,
    pub elements: usize,
}

impl Form {
    /// The f32 of what has travelled.
    fn floats(self, data: &[u8]) -> Vec<f32> {
        self.payload.from_wire(data, self.elements)
    }
}

/// One chunk of a node.
#[derive(Clone, Debug)]
pub enum Data {
    /// As it travels.
    Wire {
        /// As the run's payload says.
        data: Bytes,
        /// CRC-32 of `data`, which was compared.
        check: u32,
    },
    /// f32 where the worker left it. It stays as it is until the step is committed: until its last root is complete.
    Shared(Part),
    /// f32 in this process, computed by the owner itself: bytes that nobody can change while they are held. They are
    /// held until they are summed, or until the chunk's root is complete.
    Here(Bytes),
}

impl Data {
    /// Bytes of it, and those that a chunk of this form has.
    pub(super) fn sizes(&self, form: Form) -> (usize, usize) {
        let elements = form.elements;
        match self {
            Self::Wire { data, .. } => (data.len(), form.payload.bytes(elements)),
            Self::Shared(part) => (part.as_ref().len(), elements * 4),
            Self::Here(data) => (data.len(), elements * 4),
        }
    }

    /// CRC-32 of it as it travels.
    fn crc(&self, payload: Payload) -> u32 {
        match self {
            Self::Wire { check, .. } => *check,
            Self::Shared(part) => crc_of(part.as_ref(), payload),
            Self::Here(data) => crc_of(data, payload),
        }
    }

    /// The [`stamp`] of its f32.
    pub(super) fn stamp(&self, form: Form) -> u64 {
        match (self, form.payload) {
            (Self::Wire { data, .. }, Payload::F32) => stamp(data, 0),
            (Self::Wire { data, .. }, _) => stamp(bytes_of(&form.floats(data)), 0),
            (Self::Shared(part), _) => stamp(part.as_ref(), 0),
            (Self::Here(data), _) => stamp(data, 0),
        }
    }

    /// Whether it is these f32.
    fn is(&self, values: &[u8], payload: Payload) -> bool {
        match self {
            Self::Wire { check, .. } => crc_of(values, payload) == *check,
            Self::Shared(part) => part.as_ref() == values,
            Self::Here(data) => data == values,
        }
    }
}

/// CRC-32 of f32 as they would travel.
fn crc_of(values: &[u8], payload: Payload) -> u32 {
    match payload {
        Payload::F32 => checksum(values),
        payload => checksum(&payload.to_wire(&floats_of(values))),
    }
}

/// A summand.
#[derive(Debug)]
pub(super) enum Waiting {
    Wire(Bytes),
    Shared(Part),
    Here(Bytes),
    Sum(Vec<f32>),
}

impl Waiting {
    pub(super) fn new(data: Data, form: Form) -> Self {
        match (data, form.payload) {
            (Data::Wire { data, .. }, Payload::F32) => Self::Wire(data),
            (Data::Wire { data, .. }, _) => Self::Sum(form.floats(&data)),
            (Data::Shared(part), _) => Self::Shared(part),
            (Data::Here(data), _) => Self::Here(data),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Wire(data) | Self::Here(data) => data,
            Self::Shared(part) => part.as_ref(),
            Self::Sum(sum) => bytes_of(sum),
        }
    }

    /// Its f32, to be kept.
    pub(super) fn into_bytes(self) -> Bytes {
        match self {
            Self::Wire(data) | Self::Here(data) => data,
            Self::Shared(part) => Bytes::from_owner(part),
            Self::Sum(sum) => Bytes::from_owner(Floats(sum)),
        }
    }

    /// Whether its stamp is to be taken with the sum, since it did not travel and nothing else is known of it.
    pub(super) fn wants_stamp(&self) -> bool {
        matches!(self, Self::Shared(_) | Self::Here(_))
    }
}

/// f32 as bytes.
struct Floats(Vec<f32>);

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        bytes_of(&self.0)
    }
}

/// What is remembered of a push, so that a copy can be compared long after the first has been summed.
#[derive(Clone, Debug)]
pub(super) struct Stamp {
    pub check: Check,
    pub from: SessionId,
}

/// What a chunk is known by.
#[derive(Clone, Debug)]
pub(super) enum Check {
    /// CRC-32 of it as it travelled.
    Crc(u32),
    /// It lies in memory that is shared, and is not summed yet.
    Of(Part),
    /// It lies in this process, and is not summed yet.
    Here(Bytes),
    /// The [`stamp`] of what lay somewhere, taken with the sum.
    Stamp(u64),
}

impl Check {
    pub(super) fn new(data: &Data) -> Self {
        match data {
            Data::Wire { check, .. } => Self::Crc(*check),
            Data::Shared(part) => Self::Of(part.clone()),
            Data::Here(data) => Self::Here(data.clone()),
        }
    }

    /// Whether a copy is the same.
    pub(super) fn matches(&self, copy: &Data, form: Form) -> bool {
        match self {
            Self::Crc(first) => *first == copy.crc(form.payload),
            Self::Of(first) => copy.is(first.as_ref(), form.payload),
            Self::Here(first) => copy.is(first, form.payload),
            Self::Stamp(first) => *first == copy.stamp(form),
        }
    }

    /// Holds what lies in this process no longer: its stamp does as well.
    pub(super) fn let_go(&mut self) {
        if let Self::Here(data) = self {
            *self = Self::Stamp(stamp(data, 0));
        }
    }
}
