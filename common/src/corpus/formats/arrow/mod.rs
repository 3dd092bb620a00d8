//! Apache Arrow's IPC format, as stream (what Hugging Face's `datasets` keeps) and as file (`.arrow`, Feather version 2):
//! messages of a header, a FlatBuffer, and a body with the buffers of a batch of rows.
//!
//! A file is a stream with a mark before it and a table of contents behind, of which the schema is taken and the rest is not
//! needed. One batch is in memory at a time, and all dictionaries.

mod batch;
mod flat;
mod schema;

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};

use bytes::Bytes;

use self::batch::{Batch, Column, Dictionaries, too_large, write_row};
use self::flat::{Table, torn};
use self::schema::Schema;
use super::super::error::Problem;
use super::super::limits::{Limits, MAX_LINE_BYTES, read_bytes, skip_bytes};
use super::{Next, RowText, Rows, Wanted, find_column, no_name_twice};

/// What stands before the messages of a file, with two bytes to fill up.
const FILE_MARK: &[u8; 6] = b"ARROW1";
const FEATHER_1_MARK: &[u8; 4] = b"FEA1";
const CONTINUATION: u32 = u32::MAX;

/// Bytes of an entry of the table of contents, which begins with the place of a message.
const BLOCK: usize = 24;

/// Bytes of a message without its body.
const MAX_MESSAGE_BYTES: u32 = 16 << 20;

/// Numbers of messages in `Message.fbs`.
const SCHEMA: u8 = 1;
const DICTIONARY: u8 = 2;
const BATCH: u8 = 3;

/// A file under way.
pub(in super::super) struct Arrow<'a, R> {
    input: R,
    limits: &'a Limits,
    schema: Schema,
    /// The column of the text; `None` is all of them.
    column: Option<usize>,
    dictionaries: Dictionaries,
    /// What each of them takes.
    dictionary_bytes: HashMap<i64, u64>,
    /// Of the batch: the wanted column, or all of them.
    columns: Vec<Column>,
    rows: usize,
    row: usize,
}

/// Reads what stands before the rows; `contents` is the table of contents, where there is one and `input` stands before the
/// first message behind the schema.
///
/// # Errors
/// No Arrow, or no such column of text.
pub(in super::super) fn open<'a, R: Read>(
    mut input: R,
    contents: Option<Vec<u8>>,
    wanted: Wanted<'_>,
    limits: &'a Limits,
) -> Result<Arrow<'a, R>, Problem> {
    let schema = match contents {
        Some(contents) => Schema::read(Table::root(&contents)?.table(1)?.ok_or_else(torn)?)?,
        None => first_message(&mut input)?,
    };
    let names = schema.fields.iter().map(|field| field.name.as_str());
    let column = match wanted {
        Wanted::Text(name) => {
            let column = find_column(name, names)?;
            if !schema.fields[column].is_text() {
                return Err(Problem::NotAText(name.to_owned()));
            }
            Some(column)
        }
        Wanted::Record => {
            no_name_twice(names)?;
            None
        }
    };
    Ok(Arrow {
        input,
        limits,
        schema,
        column,
        dictionaries: Dictionaries::new(),
        dictionary_bytes: HashMap::new(),
        columns: Vec::new(),
        rows: 0,
        row: 0,
    })
}

/// The table of contents of a file of `bytes` bytes, if it is one and no stream; `input` stands before its first message
/// behind the schema then, else where it stood.
///
/// What stands before that message is the schema once more, but not every writer (polars) gives it the form of a message.
///
/// # Errors
/// A file that begins as one and does not end so.
pub(in super::super) fn contents(
    input: &mut (impl Read + Seek),
    bytes: u64,
) -> Result<Option<Vec<u8>>, Problem> {
    let marks = FILE_MARK.len() as u64;
    let tail = marks + 4;
    let is_file = bytes > 8 + tail && read_bytes(input, marks)? == FILE_MARK;
    if !is_file {
        input.seek(SeekFrom::Start(0))?;
        return Ok(None);
    }
    let no_end = || Problem::Unreadable("it does not end as Arrow does; is it torn?".into());
    input.seek(SeekFrom::Start(bytes - tail))?;
    let end = read_bytes(input, tail)?;
    let length = u32::from_le_bytes(end[..4].try_into().expect("4 bytes"));
    let begin = (bytes - tail).checked_sub(length.into());
    let (Some(begin), true) = (begin, end[4..] == *FILE_MARK) else {
        return Err(no_end());
    };
    if length > MAX_MESSAGE_BYTES {
        return Err(Problem::TooLarge(MAX_MESSAGE_BYTES.into()));
    }
    input.seek(SeekFrom::Start(begin))?;
    let contents = read_bytes(input, length.into())?;
    let table = Table::root(&contents)?;
    let mut first = begin;
    for blocks in [table.vector(2, BLOCK)?, table.vector(3, BLOCK)?] {
        for block in 0..blocks.len() {
            let at = u64::try_from(blocks.long(BLOCK * block)?).map_err(|_| torn())?;
            first = first.min(at);
        }
    }
    input.seek(SeekFrom::Start(first))?;
    Ok(Some(contents))
}

/// The schema that a stream begins with, or a file behind its mark.
fn first_message(input: &mut impl Read) -> Result<Schema, Problem> {
    let Some(mut word) = word(input)? else {
        return Err(Problem::Empty);
    };
    if word == *FEATHER_1_MARK {
        return Err(Problem::Unreadable(
            "it is Feather of version 1; write it as version 2".into(),
        ));
    }
    if word == FILE_MARK[..4] {
        let rest = read_bytes(input, 8)?;
        if rest[..2] != FILE_MARK[4..] {
            return Err(torn());
        }
        word = rest[4..].try_into().expect("4 bytes");
    }
    let message = message_behind(input, word)?.ok_or(Problem::Empty)?;
    let table = Table::root(&message)?;
    if table.byte(1)? != SCHEMA {
        return Err(Problem::Unreadable(
            "it does not begin with a schema, so it is no Arrow".into(),
        ));
    }
    let schema = Schema::read(table.table(2)?.ok_or_else(torn)?)?;
    skip_bytes(input, body_of(table)?)?;
    Ok(schema)
}

/// The next message; `None` at the end.
fn message(input: &mut impl Read) -> Result<Option<Vec<u8>>, Problem> {
    match word(input)? {
        Some(word) => message_behind(input, word),
        None => Ok(None),
    }
}

/// The message that begins with `word`: its length, before which most have a mark.
fn message_behind(input: &mut impl Read, word: [u8; 4]) -> Result<Option<Vec<u8>>, Problem> {
    let mut length = u32::from_le_bytes(word);
    if length == CONTINUATION {
        let bytes = read_bytes(input, 4)?;
        length = u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
    }
    match length {
        0 => Ok(None),
        length if length > MAX_MESSAGE_BYTES => Err(Problem::Unreadable(format!(
            "it begins no message of Arrow where one should be, or one of {length} bytes"
        ))),
        length => read_bytes(input, length.into()).map(Some),
    }
}

/// The next four bytes; `None` at the end.
fn word(input: &mut impl Read) -> Result<Option<[u8; 4]>, Problem> {
    let mut bytes = Vec::new();
    input.take(4).read_to_end(&mut bytes)?;
    match bytes.len() {
        0 => Ok(None),
        _ => bytes.try_into().map(Some).map_err(|_| torn()),
    }
}

/// Bytes of the body behind a message.
fn body_of(message: Table<'_>) -> Result<u64, Problem> {
    u64::try_from(message.long(3)?).map_err(|_| torn())
}

impl<R: Read> Arrow<'_, R> {
    /// Reads on until there is a row; `false` at the end.
    fn fill(&mut self) -> Result<bool, Problem> {
        while self.row >= self.rows {
            // Those of the batch before are not needed any more.
            self.columns.clear();
            let Some(message) = message(&mut self.input)? else {
                return Ok(false);
            };
            let table = Table::root(&message)?;
            let length = body_of(table)?;
            match table.byte(1)? {
                kind @ (DICTIONARY | BATCH) => {
                    if length > MAX_LINE_BYTES {
                        return Err(too_large(length));
                    }
                    let body = Bytes::from(read_bytes(&mut self.input, length)?);
                    let header = table.table(2)?.ok_or_else(torn)?;
                    match kind {
                        DICTIONARY => self.take_dictionary(header, body)?,
                        _ => self.take_batch(header, body)?,
                    }
                }
                _ => skip_bytes(&mut self.input, length)?,
            }
        }
        Ok(true)
    }

    fn take_batch(&mut self, header: Table<'_>, body: Bytes) -> Result<(), Problem> {
        let mut batch = Batch::new(header, body, self.limits)?;
        for (number, field) in self.schema.fields.iter().enumerate() {
            let wanted = self.column.is_none_or(|column| column == number);
            let column = batch.column(field, wanted)?;
            if wanted {
                self.columns.push(column);
            }
        }
        self.rows = batch.rows()?;
        self.row = 0;
        match self.columns.iter().all(|column| column.len() >= self.rows) {
            true => Ok(()),
            false => Err(torn()),
        }
    }

    /// A dictionary replaces the one before it, unless it adds to it.
    fn take_dictionary(&mut self, header: Table<'_>, body: Bytes) -> Result<(), Problem> {
        let (id, adds) = (header.long(0)?, header.flag(2)?);
        let field = self.schema.dictionaries.get(&id).ok_or_else(torn)?;
        let mut bytes = body.len() as u64;
        let mut batch = Batch::new(header.table(1)?.ok_or_else(torn)?, body, self.limits)?;
        let values = batch.column(field, true)?;
        bytes += batch.unpacked();
        let pieces = self.dictionaries.entry(id).or_default();
        let before = self.dictionary_bytes.entry(id).or_default();
        if !adds {
            pieces.clear();
            *before = 0;
        }
        pieces.push(values);
        *before += bytes;
        let all = self.dictionary_bytes.values().sum();
        if all > MAX_LINE_BYTES {
            return Err(too_large(all));
        }
        Ok(())
    }
}

impl<R: Read> Rows for Arrow<'_, R> {
    fn next(&mut self, text: &mut RowText) -> Result<Next, Problem> {
        if !self.fill()? {
            return Ok(Next::End);
        }
        let row = self.row;
        self.row += 1;
        let written = match self.column {
            Some(_) => self.columns[0]
                .text(row, &self.dictionaries)
                .and_then(|found| text.push(found.unwrap_or_default())),
            None => write_row(&self.columns, row, &self.dictionaries, 0, text),
        };
        match written {
            Ok(()) => Ok(Next::Row),
            Err(problem @ Problem::CellNotUtf8(_)) => Ok(Next::Bad(problem)),
            Err(problem) => Err(problem),
        }
    }
}
