//! The columns of one record batch, and the way from a row of them to text. Nothing of a batch is copied but what is
//! packed, and each access is checked: offsets come from the file.

use std::collections::HashMap;

use bytes::Bytes;

use super::super::super::error::Problem;
use super::super::super::limits::{Limits, MAX_LINE_BYTES};
use super::super::super::packing::{Codec, unpack_block};
use super::super::{MAX_DEPTH, RowText, text_of};
use super::flat::{Table, torn};
use super::schema::{Encoded, Field, Type};

/// A column of a batch.
#[derive(Debug)]
pub(super) struct Column {
    name: String,
    len: usize,
    /// Bytes are read where they are asked for as text, and have no place in a JSON object.
    is_bytes: bool,
    /// A bit for each row; `None` where none is null.
    valid: Option<Bytes>,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Null,
    Bool(Bytes),
    Int {
        bytes: Bytes,
        width: usize,
        signed: bool,
    },
    Float {
        bytes: Bytes,
        width: usize,
    },
    Text {
        offsets: Offsets,
        bytes: Bytes,
    },
    View {
        views: Bytes,
        buffers: Vec<Bytes>,
    },
    List {
        offsets: Offsets,
        child: Box<Column>,
    },
    FixedList {
        size: usize,
        child: Box<Column>,
    },
    Struct(Vec<Column>),
    /// A struct of keys and values for each entry.
    Map {
        offsets: Offsets,
        entries: Box<Column>,
    },
    Dictionary {
        numbers: Bytes,
        encoded: Encoded,
    },
    /// What has no place in a JSON object.
    LeftOut,
}

#[derive(Debug)]
struct Offsets {
    bytes: Bytes,
    large: bool,
}

/// The values of all dictionaries so far, each in the pieces that came.
pub(super) type Dictionaries = HashMap<i64, Vec<Column>>;

fn number<const N: usize>(bytes: &[u8], index: usize) -> Result<[u8; N], Problem> {
    let begin = index.checked_mul(N).ok_or_else(torn)?;
    let end = begin.checked_add(N).ok_or_else(torn)?;
    let found = bytes.get(begin..end).ok_or_else(torn)?;
    Ok(found.try_into().expect("of that length"))
}

fn int(bytes: &[u8], width: usize, signed: bool, index: usize) -> Result<i128, Problem> {
    Ok(match (width, signed) {
        (1, true) => i8::from_le_bytes(number(bytes, index)?).into(),
        (1, false) => u8::from_le_bytes(number(bytes, index)?).into(),
        (2, true) => i16::from_le_bytes(number(bytes, index)?).into(),
        (2, false) => u16::from_le_bytes(number(bytes, index)?).into(),
        (4, true) => i32::from_le_bytes(number(bytes, index)?).into(),
        (4, false) => u32::from_le_bytes(number(bytes, index)?).into(),
        (_, true) => i64::from_le_bytes(number(bytes, index)?).into(),
        (_, false) => u64::from_le_bytes(number(bytes, index)?).into(),
    })
}

fn float(bytes: &[u8], width: usize, index: usize) -> Result<f64, Problem> {
    Ok(match width {
        2 => half::f16::from_le_bytes(number(bytes, index)?).into(),
        4 => f32::from_le_bytes(number(bytes, index)?).into(),
        _ => f64::from_le_bytes(number(bytes, index)?),
    })
}

fn bit(bits: &[u8], index: usize) -> Result<bool, Problem> {
    let byte = bits.get(index / 8).ok_or_else(torn)?;
    Ok(byte >> (index % 8) & 1 == 1)
}

impl Offsets {
    /// Where row `index` begins and ends.
    fn range(&self, index: usize) -> Result<std::ops::Range<usize>, Problem> {
        let width = if self.large { 8 } else { 4 };
        let at = |index| {
            let offset = int(&self.bytes, width, true, index)?;
            usize::try_from(offset).map_err(|_| torn())
        };
        let (begin, end) = (at(index)?, at(index.checked_add(1).ok_or_else(torn)?)?);
        match begin <= end {
            true => Ok(begin..end),
            false => Err(torn()),
        }
    }
}

impl Column {
    /// Rows.
    pub fn len(&self) -> usize {
        self.len
    }

    fn is_left_out(&self) -> bool {
        self.is_bytes || matches!(self.data, Data::LeftOut)
    }

    fn is_null(&self, row: usize) -> Result<bool, Problem> {
        match &self.valid {
            Some(bits) => Ok(!bit(bits, row)?),
            None => Ok(matches!(self.data, Data::Null)),
        }
    }

    /// The text of a row; `None` is null.
    pub fn text<'a>(
        &'a self,
        row: usize,
        dictionaries: &'a Dictionaries,
    ) -> Result<Option<&'a str>, Problem> {
        if self.is_null(row)? {
            return Ok(None);
        }
        let bytes = match &self.data {
            Data::Text { offsets, bytes } => bytes.get(offsets.range(row)?).ok_or_else(torn)?,
            Data::View { views, buffers } => view(views, buffers, row)?,
            Data::Dictionary { numbers, encoded } => {
                let (values, row) = value_of(numbers, encoded, row, dictionaries)?;
                if matches!(values.data, Data::Dictionary { .. }) {
                    return Err(torn());
                }
                return values.text(row, dictionaries);
            }
            _ => return Err(torn()),
        };
        text_of(bytes, &self.name).map(Some)
    }

    /// Writes the value of a row as JSON.
    pub fn write(
        &self,
        row: usize,
        dictionaries: &Dictionaries,
        depth: usize,
        out: &mut RowText,
    ) -> Result<(), Problem> {
        if depth > 2 * MAX_DEPTH {
            return Err(torn());
        }
        if self.is_left_out() || self.is_null(row)? {
            return out.push("null");
        }
        let depth = depth + 1;
        match &self.data {
            Data::Null | Data::LeftOut => out.push("null"),
            Data::Bool(bits) => out.push(if bit(bits, row)? { "true" } else { "false" }),
            Data::Int {
                bytes,
                width,
                signed,
            } => out.push(&int(bytes, *width, *signed, row)?.to_string()),
            Data::Float { bytes, width } => out.push_float(float(bytes, *width, row)?),
            Data::Text { .. } | Data::View { .. } => match self.text(row, dictionaries)? {
                Some(text) => out.push_string(text),
                None => out.push("null"),
            },
            Data::List { offsets, child } => {
                child.write_list(offsets.range(row)?, dictionaries, depth, out)
            }
            Data::FixedList { size, child } => {
                let begin = row.checked_mul(*size).ok_or_else(torn)?;
                let end = begin.checked_add(*size).ok_or_else(torn)?;
                child.write_list(begin..end, dictionaries, depth, out)
            }
            Data::Struct(children) => write_row(children, row, dictionaries, depth, out),
            Data::Map { offsets, entries } => {
                entries.write_map(offsets.range(row)?, dictionaries, depth, out)
            }
            Data::Dictionary { numbers, encoded } => {
                let (values, row) = value_of(numbers, encoded, row, dictionaries)?;
                values.write(row, dictionaries, depth, out)
            }
        }
    }

    fn write_list(
        &self,
        rows: std::ops::Range<usize>,
        dictionaries: &Dictionaries,
        depth: usize,
        out: &mut RowText,
    ) -> Result<(), Problem> {
        out.push("[")?;
        for (index, row) in rows.enumerate() {
            if index > 0 {
                out.push(",")?;
            }
            self.write(row, dictionaries, depth, out)?;
        }
        out.push("]")
    }

    fn write_map(
        &self,
        rows: std::ops::Range<usize>,
        dictionaries: &Dictionaries,
        depth: usize,
        out: &mut RowText,
    ) -> Result<(), Problem> {
        let Data::Struct(children) = &self.data else {
            return Err(torn());
        };
        let [keys, values] = &children[..] else {
            return Err(torn());
        };
        out.push("{")?;
        let mut key = RowText::default();
        for (index, row) in rows.enumerate() {
            key.clear();
            match keys.is_bytes {
                // As a key they have a place in an object, if they are text.
                true => key.push_string(keys.text(row, dictionaries)?.unwrap_or_default())?,
                false => keys.write(row, dictionaries, depth, &mut key)?,
            }
            out.push_map_key(index == 0, &key)?;
            values.write(row, dictionaries, depth, out)?;
        }
        out.push("}")
    }
}

/// Writes one row of several columns as a JSON object; what has no place in one is left out.
pub(super) fn write_row(
    columns: &[Column],
    row: usize,
    dictionaries: &Dictionaries,
    depth: usize,
    out: &mut RowText,
) -> Result<(), Problem> {
    out.push("{")?;
    let mut first = true;
    for column in columns {
        if !column.is_left_out() {
            out.push_key(first, &column.name)?;
            column.write(row, dictionaries, depth, out)?;
            first = false;
        }
    }
    out.push("}")
}

/// The piece of a dictionary that the value of a row lies in, and where.
fn value_of<'a>(
    numbers: &[u8],
    encoded: &Encoded,
    row: usize,
    dictionaries: &'a Dictionaries,
) -> Result<(&'a Column, usize), Problem> {
    let number = int(numbers, encoded.width, encoded.signed, row)?;
    let mut number = usize::try_from(number).map_err(|_| torn())?;
    let pieces = dictionaries.get(&encoded.id).ok_or_else(|| {
        Problem::Unreadable("a dictionary of it comes behind the rows that refer to it".into())
    })?;
    for piece in pieces {
        if number < piece.len {
            return Ok((piece, number));
        }
        number -= piece.len;
    }
    Err(torn())
}

/// The bytes of a view: up to 12 in the view itself, others in a buffer.
fn view<'a>(views: &'a [u8], buffers: &'a [Bytes], row: usize) -> Result<&'a [u8], Problem> {
    let view: [u8; 16] = number(views, row)?;
    let part = |at: usize| u32::from_le_bytes(view[at..at + 4].try_into().expect("4")) as usize;
    let len = part(0);
    if len <= 12 {
        let begin = 16 * row + 4;
        return views.get(begin..begin + len).ok_or_else(torn);
    }
    let (buffer, begin) = (part(8), part(12));
    let bytes = buffers.get(buffer).ok_or_else(torn)?;
    bytes.get(begin..begin + len).ok_or_else(torn)
}

/// What a message of the kind `RecordBatch` says of its body, taken in the order in which columns take it.
pub(super) struct Batch<'a> {
    table: Table<'a>,
    body: Bytes,
    codec: Option<Codec>,
    node: usize,
    buffer: usize,
    variadic: usize,
    limits: &'a Limits,
    unpacked: u64,
}

impl<'a> Batch<'a> {
    /// Of that message, with that body.
    ///
    /// # Errors
    /// A way of packing that is not known.
    pub fn new(table: Table<'a>, body: Bytes, limits: &'a Limits) -> Result<Self, Problem> {
        let codec = match table.table(3)? {
            None => None,
            Some(packing) => match packing.byte(0)? {
                0 => Some(Codec::Lz4Frame),
                1 => Some(Codec::Zstd),
                _ => return Err(torn()),
            },
        };
        Ok(Self {
            table,
            body,
            codec,
            node: 0,
            buffer: 0,
            variadic: 0,
            limits,
            unpacked: 0,
        })
    }

    /// Rows.
    pub fn rows(&self) -> Result<usize, Problem> {
        usize::try_from(self.table.long(0)?).map_err(|_| torn())
    }

    /// Bytes that packed buffers took so far.
    pub fn unpacked(&self) -> u64 {
        self.unpacked
    }

    /// Takes the next buffer; empty where it is not `wanted`.
    fn buffer(&mut self, wanted: bool) -> Result<Bytes, Problem> {
        let buffers = self.table.vector(2, 16)?;
        if self.buffer >= buffers.len() {
            return Err(torn());
        }
        let at = 16 * self.buffer;
        self.buffer += 1;
        let (begin, len) = (buffers.long(at)?, buffers.long(at + 8)?);
        let begin = usize::try_from(begin).map_err(|_| torn())?;
        let len = usize::try_from(len).map_err(|_| torn())?;
        let end = begin.checked_add(len).ok_or_else(torn)?;
        if end > self.body.len() {
            return Err(torn());
        }
        if !wanted || len == 0 {
            return Ok(Bytes::new());
        }
        let bytes = self.body.slice(begin..end);
        match self.codec {
            Some(codec) => self.unpack(codec, &bytes),
            None => Ok(bytes),
        }
    }

    /// A packed buffer begins with the number of bytes that it holds; -1 means that it is not packed.
    fn unpack(&mut self, codec: Codec, bytes: &Bytes) -> Result<Bytes, Problem> {
        let declared = i64::from_le_bytes(number(bytes, 0)?);
        if declared == -1 {
            return Ok(bytes.slice(8..));
        }
        let declared = u64::try_from(declared).map_err(|_| torn())?;
        self.unpacked = self.unpacked.saturating_add(declared);
        if self.unpacked > MAX_LINE_BYTES {
            return Err(too_large(self.unpacked));
        }
        self.limits.take(declared)?;
        unpack_block(codec, &bytes[8..], declared).map(Bytes::from)
    }

    /// Takes what belongs to the column of `field`.
    pub fn column(&mut self, field: &Field, wanted: bool) -> Result<Column, Problem> {
        let nodes = self.table.vector(1, 16)?;
        if self.node >= nodes.len() {
            return Err(torn());
        }
        let len = usize::try_from(nodes.long(16 * self.node)?).map_err(|_| torn())?;
        let nulls = nodes.long(16 * self.node + 8)?;
        self.node += 1;
        let kind = field.kind;
        // Runs and unions keep no bits for what is null.
        let has_bits = match (kind, field.dictionary) {
            (_, Some(_)) => true,
            (Type::Null | Type::Other { buffers: 0 | 1 }, _) => false,
            _ => true,
        };
        let mut valid = None;
        if has_bits {
            let bits = self.buffer(wanted)?;
            valid = (nulls != 0 && !bits.is_empty()).then_some(bits);
        }
        let data = match field.dictionary {
            Some(encoded) => Data::Dictionary {
                numbers: self.buffer(wanted)?,
                encoded,
            },
            None => self.data(field, wanted)?,
        };
        Ok(Column {
            name: field.name.clone(),
            len,
            is_bytes: matches!(
                kind,
                Type::Text { utf8: false, .. } | Type::View { utf8: false }
            ),
            valid,
            data,
        })
    }

    /// What follows the bits for null.
    fn data(&mut self, field: &Field, wanted: bool) -> Result<Data, Problem> {
        Ok(match field.kind {
            Type::Null => Data::Null,
            Type::Bool => Data::Bool(self.buffer(wanted)?),
            Type::Int { width, signed } => Data::Int {
                bytes: self.buffer(wanted)?,
                width,
                signed,
            },
            Type::Float { width } => Data::Float {
                bytes: self.buffer(wanted)?,
                width,
            },
            Type::Text { large, .. } => Data::Text {
                offsets: self.offsets(large, wanted)?,
                bytes: self.buffer(wanted)?,
            },
            Type::View { .. } => self.views(wanted)?,
            Type::List { large } => Data::List {
                offsets: self.offsets(large, wanted)?,
                child: Box::new(self.column(&field.children[0], wanted)?),
            },
            Type::FixedList { size } => Data::FixedList {
                size,
                child: Box::new(self.column(&field.children[0], wanted)?),
            },
            Type::Struct => Data::Struct(self.children(field, wanted)?),
            Type::Map => Data::Map {
                offsets: self.offsets(false, wanted)?,
                entries: Box::new(self.column(&field.children[0], wanted)?),
            },
            Type::Other { buffers } => {
                let bits = usize::from(buffers > 1);
                for _ in bits..buffers {
                    self.buffer(false)?;
                }
                self.children(field, false)?;
                Data::LeftOut
            }
        })
    }

    fn children(&mut self, field: &Field, wanted: bool) -> Result<Vec<Column>, Problem> {
        let children = field.children.iter();
        children.map(|child| self.column(child, wanted)).collect()
    }

    fn offsets(&mut self, large: bool, wanted: bool) -> Result<Offsets, Problem> {
        Ok(Offsets {
            bytes: self.buffer(wanted)?,
            large,
        })
    }

    fn views(&mut self, wanted: bool) -> Result<Data, Problem> {
        let counts = self.table.vector(4, 8)?;
        if self.variadic >= counts.len() {
            return Err(torn());
        }
        let count = counts.long(8 * self.variadic)?;
        self.variadic += 1;
        let views = self.buffer(wanted)?;
        let mut buffers = Vec::new();
        for _ in 0..count.max(0) {
            buffers.push(self.buffer(wanted)?);
        }
        Ok(Data::View { views, buffers })
    }
}

/// A batch that does not fit into memory.
pub(super) fn too_large(bytes: u64) -> Problem {
    Problem::Unreadable(format!(
        "a batch of its rows takes {bytes} bytes, and at most {MAX_LINE_BYTES} are held in memory; write it in smaller batches"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, len: usize, data: Data) -> Column {
        Column {
            name: name.into(),
            len,
            is_bytes: false,
            valid: None,
            data,
        }
    }

    fn offsets(places: &[i32]) -> Offsets {
        let bytes: Vec<u8> = places.iter().flat_map(|at| at.to_le_bytes()).collect();
        Offsets {
            bytes: bytes.into(),
            large: false,
        }
    }

    #[test]
    fn keys_of_maps_need_not_be_text() {
        let numbers = Data::Int {
            bytes: Bytes::from_static(&[7, 255]),
            width: 1,
            signed: true,
        };
        let texts = || Data::Text {
            offsets: offsets(&[0, 1, 3]),
            bytes: Bytes::from_static(b"abc"),
        };
        let truths = || column("value", 2, Data::Bool(Bytes::from_static(&[1])));
        let mut bytes = column("key", 2, texts());
        bytes.is_bytes = true;
        for (keys, expected) in [
            (column("key", 2, numbers), r#"{"7":true,"-1":false}"#),
            (column("key", 2, texts()), r#"{"a":true,"bc":false}"#),
            (bytes, r#"{"a":true,"bc":false}"#),
        ] {
            let entries = column("entries", 2, Data::Struct(vec![keys, truths()]));
            let map = Data::Map {
                offsets: offsets(&[0, 2]),
                entries: Box::new(entries),
            };
            let mut text = RowText::default();
            let dictionaries = Dictionaries::new();
            let map = column("map", 1, map);
            map.write(0, &dictionaries, 0, &mut text).expect("a map");
            assert_eq!(text.as_str(), expected);
        }
    }
}
