//! The encodings of Parquet's pages: numbers in runs, deltas, dictionaries, and plain values. Each decoder gives one value
//! after the other and keeps nothing, so a page costs what its bytes cost.

use bytes::Bytes;

use super::super::super::error::Problem;
use super::footer::Physical;
use super::thrift::damaged;

fn torn() -> Problem {
    damaged("a page")
}

/// Numbers of a fixed width in bits, each as a run of equal ones or packed: levels, numbers of dictionary entries, truths.
#[derive(Debug)]
pub(super) struct Runs {
    bytes: Bytes,
    at: usize,
    width: u32,
    run: Run,
}

#[derive(Clone, Copy, Debug)]
enum Run {
    Equal {
        value: u32,
        left: u64,
    },
    /// The next value begins at that bit of the bytes.
    Packed {
        bit: usize,
        left: u64,
    },
}

impl Runs {
    pub fn new(bytes: Bytes, width: u32) -> Result<Self, Problem> {
        match width {
            0..=32 => Ok(Self {
                bytes,
                at: 0,
                width,
                run: Run::Equal { value: 0, left: 0 },
            }),
            _ => Err(torn()),
        }
    }

    pub fn next(&mut self) -> Result<u32, Problem> {
        loop {
            match &mut self.run {
                Run::Equal { value, left } if *left > 0 => {
                    *left -= 1;
                    return Ok(*value);
                }
                Run::Packed { bit, left } if *left > 0 => {
                    *left -= 1;
                    let begin = *bit;
                    *bit += self.width as usize;
                    return packed(&self.bytes, begin, self.width).map(|value| value as u32);
                }
                _ => self.start()?,
            }
        }
    }

    fn start(&mut self) -> Result<(), Problem> {
        let header = varint(&self.bytes, &mut self.at)?;
        let count = header >> 1;
        if header & 1 == 1 {
            // Groups of eight values; the last may be cut off behind the values that count.
            let bytes = usize::try_from(count).ok();
            let bytes = bytes.and_then(|groups| groups.checked_mul(self.width as usize));
            let end = bytes.and_then(|bytes| self.at.checked_add(bytes));
            let begin = self.at;
            self.at = end.ok_or_else(torn)?.min(self.bytes.len());
            self.run = Run::Packed {
                bit: 8 * begin,
                left: count.checked_mul(8).ok_or_else(torn)?,
            };
            return match count {
                0 => Err(torn()),
                _ => Ok(()),
            };
        }
        let size = self.width.div_ceil(8) as usize;
        let bytes = self.bytes.get(self.at..self.at + size).ok_or_else(torn)?;
        let mut value = [0; 4];
        value[..size].copy_from_slice(bytes);
        self.at += size;
        self.run = Run::Equal {
            value: u32::from_le_bytes(value),
            left: count,
        };
        match count {
            0 => Err(torn()),
            _ => Ok(()),
        }
    }
}

/// `width` bits from bit `begin` on, the lowest first.
fn packed(bytes: &[u8], begin: usize, width: u32) -> Result<u64, Problem> {
    let mut value = 0u64;
    let mut taken = 0;
    let mut bit = begin;
    while taken < width {
        let byte = *bytes.get(bit / 8).ok_or_else(torn)?;
        let offset = (bit % 8) as u32;
        let count = (8 - offset).min(width - taken);
        let mask = (1u64 << count) - 1;
        value |= (u64::from(byte >> offset) & mask) << taken;
        taken += count;
        bit += count as usize;
    }
    Ok(value)
}

fn varint(bytes: &[u8], at: &mut usize) -> Result<u64, Problem> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at).ok_or_else(torn)?;
        *at += 1;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(torn())
}

fn zigzag(bytes: &[u8], at: &mut usize) -> Result<i64, Problem> {
    let number = varint(bytes, at)?;
    Ok((number >> 1) as i64 ^ -((number & 1) as i64))
}

/// Whole numbers as differences, in blocks of small blocks that each have their own width (`DELTA_BINARY_PACKED`).
#[derive(Clone, Debug)]
pub(super) struct Deltas {
    bytes: Bytes,
    /// Where the small block ends that is being read.
    at: usize,
    small_blocks: usize,
    /// Values of a small block.
    values: usize,
    left: u64,
    first: bool,
    last: i64,
    smallest: i64,
    widths: Vec<u8>,
    /// Of the small block that is being read: its number, its width, where its next value begins, how many follow.
    block: usize,
    width: u32,
    bit: usize,
    block_left: usize,
}

/// Most small blocks of a block; writers have 4.
const MAX_SMALL_BLOCKS: u64 = 512;
/// Most values of a small block; writers have 32 or 64.
const MAX_VALUES: u64 = 1 << 16;

impl Deltas {
    /// For at most `limit` numbers.
    pub fn new(bytes: Bytes, limit: u64) -> Result<Self, Problem> {
        let mut at = 0;
        let block = varint(&bytes, &mut at)?;
        let small_blocks = varint(&bytes, &mut at)?;
        let left = varint(&bytes, &mut at)?;
        let last = zigzag(&bytes, &mut at)?;
        if !(1..=MAX_SMALL_BLOCKS).contains(&small_blocks) || left > limit {
            return Err(torn());
        }
        let values = block / small_blocks;
        if !(1..=MAX_VALUES).contains(&values) || values % 8 != 0 {
            return Err(torn());
        }
        Ok(Self {
            bytes,
            at,
            small_blocks: small_blocks as usize,
            values: values as usize,
            left,
            first: true,
            last,
            smallest: 0,
            widths: Vec::new(),
            block: 0,
            width: 0,
            bit: 0,
            block_left: 0,
        })
    }

    pub fn next(&mut self) -> Result<i64, Problem> {
        self.left = self.left.checked_sub(1).ok_or_else(torn)?;
        if std::mem::take(&mut self.first) {
            return Ok(self.last);
        }
        if self.block_left == 0 {
            self.start()?;
        }
        let delta = packed(&self.bytes, self.bit, self.width)?;
        self.bit += self.width as usize;
        self.block_left -= 1;
        let step = self.smallest.wrapping_add(delta as i64);
        self.last = self.last.wrapping_add(step);
        Ok(self.last)
    }

    /// Goes to the next small block.
    fn start(&mut self) -> Result<(), Problem> {
        self.block += 1;
        if self.block >= self.widths.len() {
            self.smallest = zigzag(&self.bytes, &mut self.at)?;
            let end = self.at + self.small_blocks;
            let widths = self.bytes.get(self.at..end).ok_or_else(torn)?;
            self.widths = widths.to_vec();
            self.at = end;
            self.block = 0;
        }
        self.width = self.widths[self.block].into();
        if self.width > 64 {
            return Err(torn());
        }
        self.bit = 8 * self.at;
        self.at += self.width as usize * self.values / 8;
        self.block_left = self.values;
        Ok(())
    }

    /// Where the bytes behind all numbers begin.
    fn end(mut self) -> Result<usize, Problem> {
        while self.left > 0 {
            self.next()?;
        }
        match self.at <= self.bytes.len() {
            true => Ok(self.at),
            false => Err(torn()),
        }
    }
}

/// A value of a page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Bool(bool),
    Int32(i32),
    Int64(i64),
    Float(f64),
    Bytes(&'a [u8]),
}

/// The values of a dictionary, with the places of those that differ in length.
#[derive(Debug)]
pub(super) struct Dictionary {
    bytes: Bytes,
    physical: Physical,
    /// Of byte arrays, where each begins and ends.
    places: Vec<(u32, u32)>,
    values: usize,
}

impl Dictionary {
    /// Of `values` plain values.
    pub fn new(bytes: Bytes, physical: Physical, values: u64) -> Result<Self, Problem> {
        let mut places = Vec::new();
        let mut at = 0;
        if physical == Physical::ByteArray {
            for _ in 0..values {
                let value = plain_bytes(&bytes, &mut at)?;
                places.push(((at - value.len()) as u32, at as u32));
            }
        }
        let values = usize::try_from(values).map_err(|_| torn())?;
        Ok(Self {
            bytes,
            physical,
            places,
            values,
        })
    }

    /// Bytes that a dictionary of so many bytes and values takes besides them.
    pub fn place_bytes(physical: Physical, bytes: u64, values: u64) -> u64 {
        match physical {
            // Each of them has its length before it.
            Physical::ByteArray => values.min(bytes / 4) * 8,
            _ => 0,
        }
    }

    fn get(&self, index: u32) -> Result<Value<'_>, Problem> {
        let index = index as usize;
        if index >= self.values {
            return Err(torn());
        }
        if let Some((begin, end)) = self.places.get(index) {
            return Ok(Value::Bytes(&self.bytes[*begin as usize..*end as usize]));
        }
        let size = size_of(self.physical)?;
        let begin = index.checked_mul(size).ok_or_else(torn)?;
        let bytes = begin
            .checked_add(size)
            .and_then(|end| self.bytes.get(begin..end));
        fixed(self.physical, bytes.ok_or_else(torn)?)
    }
}

/// Bytes of a value of a fixed size.
fn size_of(physical: Physical) -> Result<usize, Problem> {
    match physical {
        Physical::Int32 | Physical::Float => Ok(4),
        Physical::Int64 | Physical::Double => Ok(8),
        Physical::Int96 => Ok(12),
        Physical::Fixed(size) => Ok(size),
        Physical::Boolean | Physical::ByteArray => Err(torn()),
    }
}

fn fixed(physical: Physical, bytes: &[u8]) -> Result<Value<'_>, Problem> {
    Ok(match (physical, bytes) {
        (Physical::Int32, &[a, b, c, d]) => Value::Int32(i32::from_le_bytes([a, b, c, d])),
        (Physical::Float, &[a, b, c, d]) => Value::Float(f32::from_le_bytes([a, b, c, d]).into()),
        (Physical::Int64, bytes) => {
            Value::Int64(i64::from_le_bytes(bytes.try_into().map_err(|_| torn())?))
        }
        (Physical::Double, bytes) => {
            Value::Float(f64::from_le_bytes(bytes.try_into().map_err(|_| torn())?))
        }
        (Physical::Fixed(2), &[a, b]) => Value::Float(half::f16::from_le_bytes([a, b]).into()),
        _ => Value::Bytes(bytes),
    })
}

/// A byte array with its length before it.
fn plain_bytes<'a>(bytes: &'a [u8], at: &mut usize) -> Result<&'a [u8], Problem> {
    let length = bytes.get(*at..).and_then(|rest| rest.first_chunk::<4>());
    let length = u32::from_le_bytes(*length.ok_or_else(torn)?) as usize;
    let begin = *at + 4;
    let value = bytes.get(begin..begin + length).ok_or_else(torn)?;
    *at = begin + length;
    Ok(value)
}

/// The values of one page, in order.
#[derive(Debug)]
pub(super) enum Values {
    Plain {
        bytes: Bytes,
        physical: Physical,
        at: usize,
    },
    /// Numbers of entries of the chunk's dictionary.
    Dictionary(Runs),
    /// Truths in runs.
    Truths(Runs),
    Deltas(Deltas, Physical),
    /// All lengths, then all bytes.
    Lengths {
        lengths: Deltas,
        bytes: Bytes,
        at: usize,
    },
    /// How much of the value before is repeated, and what follows it.
    Prefixes {
        prefixes: Deltas,
        lengths: Deltas,
        bytes: Bytes,
        at: usize,
        last: Vec<u8>,
    },
    /// The first bytes of all values, then the second ones, and so on.
    Split {
        bytes: Bytes,
        physical: Physical,
        values: usize,
        next: usize,
        value: Vec<u8>,
    },
}

/// Numbers of encodings.
const PLAIN: i64 = 0;
const PLAIN_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const DELTA_BINARY_PACKED: i64 = 5;
const DELTA_LENGTH_BYTE_ARRAY: i64 = 6;
const DELTA_BYTE_ARRAY: i64 = 7;
const RLE_DICTIONARY: i64 = 8;
const BYTE_STREAM_SPLIT: i64 = 9;

impl Values {
    /// At most `limit` values of a page, in that encoding.
    pub fn new(
        encoding: i64,
        bytes: Bytes,
        physical: Physical,
        limit: u64,
    ) -> Result<Self, Problem> {
        Ok(match encoding {
            PLAIN => Self::Plain {
                bytes,
                physical,
                at: 0,
            },
            PLAIN_DICTIONARY | RLE_DICTIONARY => match bytes.first().copied() {
                Some(width) => Self::Dictionary(Runs::new(bytes.slice(1..), width.into())?),
                // No value is there at all.
                None => Self::Dictionary(Runs::new(bytes, 0)?),
            },
            RLE => Self::Truths(Runs::new(with_length(&bytes)?.0, 1)?),
            DELTA_BINARY_PACKED => Self::Deltas(Deltas::new(bytes, limit)?, physical),
            DELTA_LENGTH_BYTE_ARRAY => {
                let lengths = Deltas::new(bytes.clone(), limit)?;
                let begin = lengths.clone().end()?;
                Self::Lengths {
                    lengths,
                    bytes: bytes.slice(begin..),
                    at: 0,
                }
            }
            DELTA_BYTE_ARRAY => {
                let prefixes = Deltas::new(bytes.clone(), limit)?;
                let bytes = bytes.slice(prefixes.clone().end()?..);
                let lengths = Deltas::new(bytes.clone(), limit)?;
                let begin = lengths.clone().end()?;
                Self::Prefixes {
                    prefixes,
                    lengths,
                    bytes: bytes.slice(begin..),
                    at: 0,
                    last: Vec::new(),
                }
            }
            BYTE_STREAM_SPLIT => {
                let size = size_of(physical)?;
                Self::Split {
                    values: bytes.len() / size.max(1),
                    bytes,
                    physical,
                    next: 0,
                    value: vec![0; size.min(16)],
                }
            }
            other => {
                return Err(Problem::Unreadable(format!(
                    "a page of it has the encoding number {other}, which is not known"
                )));
            }
        })
    }

    /// The next value; `dictionary` is the chunk's.
    pub fn next<'a>(
        &'a mut self,
        dictionary: Option<&'a Dictionary>,
    ) -> Result<Value<'a>, Problem> {
        match self {
            Self::Plain {
                bytes,
                physical: Physical::Boolean,
                at,
            } => {
                *at += 1;
                Ok(Value::Bool(packed(bytes, *at - 1, 1)? == 1))
            }
            Self::Plain {
                bytes,
                physical: Physical::ByteArray,
                at,
            } => plain_bytes(bytes, at).map(Value::Bytes),
            Self::Plain {
                bytes,
                physical,
                at,
            } => {
                let begin = *at;
                *at = begin.checked_add(size_of(*physical)?).ok_or_else(torn)?;
                fixed(*physical, bytes.get(begin..*at).ok_or_else(torn)?)
            }
            Self::Dictionary(numbers) => dictionary.ok_or_else(torn)?.get(numbers.next()?),
            Self::Truths(runs) => Ok(Value::Bool(runs.next()? == 1)),
            Self::Deltas(deltas, physical) => {
                let number = deltas.next()?;
                Ok(match physical {
                    Physical::Int32 => Value::Int32(number as i32),
                    _ => Value::Int64(number),
                })
            }
            Self::Lengths { lengths, bytes, at } => {
                take(bytes, at, lengths.next()?).map(Value::Bytes)
            }
            Self::Prefixes {
                prefixes,
                lengths,
                bytes,
                at,
                last,
            } => {
                let prefix = usize::try_from(prefixes.next()?).map_err(|_| torn())?;
                if prefix > last.len() {
                    return Err(torn());
                }
                last.truncate(prefix);
                last.extend_from_slice(take(bytes, at, lengths.next()?)?);
                Ok(Value::Bytes(last))
            }
            Self::Split {
                bytes,
                physical,
                values,
                next,
                value,
            } => {
                for (part, byte) in value.iter_mut().enumerate() {
                    *byte = *bytes.get(part * *values + *next).ok_or_else(torn)?;
                }
                *next += 1;
                fixed(*physical, value)
            }
        }
    }
}

fn take<'a>(bytes: &'a [u8], at: &mut usize, length: i64) -> Result<&'a [u8], Problem> {
    let length = usize::try_from(length).map_err(|_| torn())?;
    let end = at.checked_add(length).ok_or_else(torn)?;
    let value = bytes.get(*at..end).ok_or_else(torn)?;
    *at = end;
    Ok(value)
}

/// What has its length in four bytes before it, and what follows.
pub(super) fn with_length(bytes: &Bytes) -> Result<(Bytes, Bytes), Problem> {
    let mut at = 0;
    let length = plain_bytes(bytes, &mut at)?.len();
    Ok((bytes.slice(4..4 + length), bytes.slice(4 + length..)))
}
