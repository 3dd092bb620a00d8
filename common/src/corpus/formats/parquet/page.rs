//! One column of one row group: pages one after the other, and from them levels and values one after the other. In memory
//! are one page and the dictionary, and of all columns together no more than [`MAX_HELD_BYTES`].

use std::io::{Read, Seek, SeekFrom};

use bytes::Bytes;

use super::super::super::error::Problem;
use super::super::super::limits::{Limits, MAX_LINE_BYTES, read_bytes};
use super::super::super::packing::{Codec, unpack_block};
use super::decode::{Dictionary, Runs, Value, Values, with_length};
use super::footer::{Chunk, Column};
use super::thrift::{Cursor, Kind, Torn, damaged};

/// Bytes of a page's header at first, and at most: there may be statistics in it.
const HEADER: u64 = 1 << 10;
const MAX_HEADER: u64 = 8 << 20;

/// Bytes of pages and dictionaries that are in memory at a time, of all columns that are read.
const MAX_HELD_BYTES: u64 = 2 << 30;

/// The levels of a value: whether it is there, and of which list it is a further element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Levels {
    pub repetition: u32,
    pub definition: u32,
}

/// A column of a row group under way.
#[derive(Debug)]
pub(super) struct Pages {
    column: Column,
    codec: i64,
    at: u64,
    end: u64,
    dictionary: Option<Dictionary>,
    page: Option<Page>,
    /// What both count for among the bytes that are held.
    dictionary_bytes: u64,
    page_bytes: u64,
    /// What was looked at and is not yet taken.
    ahead: Option<Levels>,
}

#[derive(Debug)]
struct Page {
    left: u64,
    repetitions: Option<Runs>,
    definitions: Option<Runs>,
    values: Values,
}

/// What a page says of itself.
#[derive(Debug, Default)]
struct Header {
    kind: i64,
    unpacked: u64,
    packed: u64,
    values: u64,
    encoding: i64,
    /// Of the second version: bytes of levels, which are never packed, and whether the values are.
    repetition_bytes: u64,
    definition_bytes: u64,
    is_plain: bool,
}

/// Kinds of pages.
const DATA: i64 = 0;
const DICTIONARY: i64 = 2;
const DATA_2: i64 = 3;

impl Header {
    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Torn> {
        let mut header = Self::default();
        cursor.structure(&mut |cursor, number, kind| {
            match (number, kind) {
                (1, Kind::Int) => header.kind = cursor.int()?,
                (2, Kind::Int) => header.unpacked = cursor.size()?,
                (3, Kind::Int) => header.packed = cursor.size()?,
                (5 | 7, Kind::Struct) => header.data(cursor)?,
                (8, Kind::Struct) => header.data_2(cursor)?,
                _ => cursor.skip(kind)?,
            }
            Ok(())
        })?;
        Ok(header)
    }

    /// Of a page of data, and of a dictionary.
    fn data(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Torn> {
        cursor.structure(&mut |cursor, number, kind| {
            match (number, kind) {
                (1, Kind::Int) => self.values = cursor.size()?,
                (2, Kind::Int) => self.encoding = cursor.int()?,
                _ => cursor.skip(kind)?,
            }
            Ok(())
        })
    }

    fn data_2(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Torn> {
        cursor.structure(&mut |cursor, number, kind| {
            match (number, kind) {
                (1, Kind::Int) => self.values = cursor.size()?,
                (4, Kind::Int) => self.encoding = cursor.int()?,
                (5, Kind::Int) => self.definition_bytes = cursor.size()?,
                (6, Kind::Int) => self.repetition_bytes = cursor.size()?,
                (7, Kind::Flag(packed)) => self.is_plain = !packed,
                _ => cursor.skip(kind)?,
            }
            Ok(())
        })
    }
}

/// A file and what may come out of it.
pub(super) struct Source<'a, R> {
    input: R,
    limits: &'a Limits,
    /// Bytes that the pages and dictionaries of the row group take.
    pub held: u64,
}

impl<'a, R> Source<'a, R> {
    /// Nothing of it is held.
    pub fn new(input: R, limits: &'a Limits) -> Self {
        Self {
            input,
            limits,
            held: 0,
        }
    }

    /// Counts what is about to be held in place of `before`.
    fn hold(&mut self, bytes: u64, before: &mut u64) -> Result<(), Problem> {
        self.held = self.held.saturating_sub(*before).saturating_add(bytes);
        *before = bytes;
        match self.held <= MAX_HELD_BYTES {
            true => Ok(()),
            false => Err(Problem::Unreadable(format!(
                "the pages of its columns take {} bytes, and at most {MAX_HELD_BYTES} are held in memory; write it with \
                 smaller pages",
                self.held
            ))),
        }
    }
}

impl Pages {
    /// At the start of a column.
    pub fn new(column: Column, chunk: Chunk) -> Self {
        Self {
            column,
            codec: chunk.codec,
            at: chunk.begin,
            end: chunk.begin.saturating_add(chunk.bytes),
            dictionary: None,
            page: None,
            dictionary_bytes: 0,
            page_bytes: 0,
            ahead: None,
        }
    }

    /// The column.
    pub fn column(&self) -> &Column {
        &self.column
    }

    /// The levels of the next value; `None` behind the last one.
    pub fn peek<R: Read + Seek>(
        &mut self,
        source: &mut Source<'_, R>,
    ) -> Result<Option<Levels>, Problem> {
        if self.ahead.is_some() {
            return Ok(self.ahead);
        }
        loop {
            if let Some(page) = &mut self.page
                && page.left > 0
            {
                page.left -= 1;
                let level = |runs: &mut Option<Runs>| runs.as_mut().map_or(Ok(0), Runs::next);
                self.ahead = Some(Levels {
                    repetition: level(&mut page.repetitions)?,
                    definition: level(&mut page.definitions)?,
                });
                return Ok(self.ahead);
            }
            if self.at >= self.end {
                return Ok(None);
            }
            self.next_page(source)?;
        }
    }

    /// Takes what was looked at; the value, if it is there.
    pub fn take(&mut self) -> Result<Option<Value<'_>>, Problem> {
        let levels = self.ahead.take().ok_or_else(|| damaged("a page"))?;
        if levels.definition < self.column.max_definition {
            return Ok(None);
        }
        let page = self.page.as_mut().ok_or_else(|| damaged("a page"))?;
        page.values.next(self.dictionary.as_ref()).map(Some)
    }

    fn next_page<R: Read + Seek>(&mut self, source: &mut Source<'_, R>) -> Result<(), Problem> {
        let header = self.header(source)?;
        if header.packed > self.end - self.at || header.packed > MAX_LINE_BYTES {
            return Err(damaged("the length of a page"));
        }
        // A value may take no byte at all, but it takes time.
        source.limits.take(header.values)?;
        // Packed and unpacked they are there at the same time.
        let bytes = match self.codec {
            0 => header.packed,
            _ => header.packed.saturating_add(header.unpacked),
        };
        match header.kind {
            DATA | DATA_2 => {
                self.page = None;
                source.hold(bytes, &mut self.page_bytes)?;
            }
            DICTIONARY => {
                self.dictionary = None;
                let places = Dictionary::place_bytes(self.column.physical, bytes, header.values);
                source.hold(bytes.saturating_add(places), &mut self.dictionary_bytes)?;
            }
            _ => {}
        }
        let packed = match header.kind {
            DATA | DATA_2 | DICTIONARY => {
                Bytes::from(read_bytes(&mut source.input, header.packed)?)
            }
            _ => Bytes::new(),
        };
        self.at += header.packed;
        match header.kind {
            DATA => {
                let bytes = self.unpack(&packed, header.unpacked, source.limits)?;
                self.page = Some(self.data(&header, bytes)?);
            }
            DATA_2 => self.page = Some(self.data_2(&header, packed, source.limits)?),
            DICTIONARY => {
                let bytes = self.unpack(&packed, header.unpacked, source.limits)?;
                let dictionary = Dictionary::new(bytes, self.column.physical, header.values)?;
                self.dictionary = Some(dictionary);
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads a header; the input stands behind it then.
    fn header<R: Read + Seek>(&mut self, source: &mut Source<'_, R>) -> Result<Header, Problem> {
        let mut size = HEADER;
        loop {
            let here = size.min(self.end - self.at);
            source.input.seek(SeekFrom::Start(self.at))?;
            let bytes = read_bytes(&mut source.input, here)?;
            let mut cursor = Cursor::new(&bytes);
            match Header::parse(&mut cursor) {
                Ok(header) => {
                    self.at += cursor.position() as u64;
                    source.input.seek(SeekFrom::Start(self.at))?;
                    return Ok(header);
                }
                Err(Torn::Short) if here == size && size < MAX_HEADER => size *= 4,
                Err(torn) => return Err(torn.into()),
            }
        }
    }

    fn unpack(&self, packed: &Bytes, unpacked: u64, limits: &Limits) -> Result<Bytes, Problem> {
        let codec = match self.codec {
            0 => {
                limits.take(packed.len() as u64)?;
                return Ok(packed.clone());
            }
            1 => Codec::Snappy,
            2 => Codec::Gzip,
            6 => Codec::Zstd,
            7 => Codec::Lz4Raw,
            3 => return Err(not_unpacked("LZO")),
            4 => return Err(not_unpacked("Brotli")),
            5 => return Err(not_unpacked("LZ4 with Hadoop's frame")),
            other => return Err(not_unpacked(&format!("codec number {other}"))),
        };
        limits.take(unpacked)?;
        unpack_block(codec, packed, unpacked).map(Bytes::from)
    }

    fn data(&self, header: &Header, mut bytes: Bytes) -> Result<Page, Problem> {
        let mut levels = |max: u32| -> Result<Option<Runs>, Problem> {
            if max == 0 {
                return Ok(None);
            }
            let (level, rest) = with_length(&bytes)?;
            bytes = rest;
            Runs::new(level, width(max)).map(Some)
        };
        let repetitions = levels(self.column.max_repetition)?;
        let definitions = levels(self.column.max_definition)?;
        self.page_of(header, repetitions, definitions, bytes)
    }

    fn data_2(&self, header: &Header, packed: Bytes, limits: &Limits) -> Result<Page, Problem> {
        let before = header
            .repetition_bytes
            .saturating_add(header.definition_bytes);
        let unpacked = header.unpacked.checked_sub(before);
        let unpacked = unpacked.ok_or_else(|| damaged("the length of a page"))?;
        if before > packed.len() as u64 {
            return Err(damaged("the length of a page"));
        }
        let (repetition, values) = (header.repetition_bytes as usize, before as usize);
        let levels = |max: u32, bytes| match max {
            0 => Ok(None),
            max => Runs::new(bytes, width(max)).map(Some),
        };
        let repetitions = levels(self.column.max_repetition, packed.slice(..repetition))?;
        let definitions = levels(self.column.max_definition, packed.slice(repetition..values))?;
        let bytes = packed.slice(values..);
        let bytes = match header.is_plain || (bytes.is_empty() && unpacked == 0) {
            true => {
                limits.take(bytes.len() as u64)?;
                bytes
            }
            false => self.unpack(&bytes, unpacked, limits)?,
        };
        self.page_of(header, repetitions, definitions, bytes)
    }

    fn page_of(
        &self,
        header: &Header,
        repetitions: Option<Runs>,
        definitions: Option<Runs>,
        bytes: Bytes,
    ) -> Result<Page, Problem> {
        // A page without any value may have no bytes at all, whatever its encoding.
        let encoding = if bytes.is_empty() { 0 } else { header.encoding };
        Ok(Page {
            left: header.values,
            repetitions,
            definitions,
            values: Values::new(encoding, bytes, self.column.physical, header.values)?,
        })
    }
}

/// Bits of a level that is at most `max`.
fn width(max: u32) -> u32 {
    u32::BITS - max.leading_zeros()
}

fn not_unpacked(codec: &str) -> Problem {
    Problem::Unreadable(format!(
        "its pages are packed with {codec}; write it anew with Zstandard, gzip, Snappy or LZ4_RAW"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_all_columns_count_together() {
        let limits = Limits::of(0, None);
        let mut source = Source::new((), &limits);
        let [mut one, mut two, mut three] = [0; 3];
        source.hold(MAX_HELD_BYTES / 2, &mut one).expect("room");
        source.hold(MAX_HELD_BYTES / 2, &mut two).expect("room");
        source.hold(MAX_HELD_BYTES / 2, &mut two).expect("in place");
        let error = source.hold(1, &mut three).expect_err("no room");
        assert!(error.to_string().contains("take 2147483649 bytes"));
        source.hold(9, &mut one).expect("room");
        assert_eq!(source.held, MAX_HELD_BYTES / 2 + 10);
    }
}
