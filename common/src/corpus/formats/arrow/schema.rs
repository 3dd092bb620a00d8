//! What the columns of an Arrow file are: names, types, and which of them are encoded by a dictionary.

use std::collections::HashMap;

use super::super::super::error::Problem;
use super::super::MAX_DEPTH;
use super::flat::{Table, torn};

/// Fields of a schema, those within fields included.
const MAX_FIELDS: usize = 10_000;

/// The type of a column, as far as it decides what lies where. What holds neither text nor numbers is known by its
/// buffers alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Null,
    Bool,
    Int {
        width: usize,
        signed: bool,
    },
    Float {
        width: usize,
    },
    /// UTF-8, or bytes that may be.
    Text {
        large: bool,
        utf8: bool,
    },
    /// The same as views.
    View {
        utf8: bool,
    },
    List {
        large: bool,
    },
    FixedList {
        size: usize,
    },
    Struct,
    Map,
    /// That many buffers, and whatever children.
    Other {
        buffers: usize,
    },
}

/// Which dictionary a column refers to, and with what numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Encoded {
    pub id: i64,
    pub width: usize,
    pub signed: bool,
}

/// A column, or what a column is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub name: String,
    /// Of the values, where they are in a dictionary.
    pub kind: Type,
    pub children: Vec<Field>,
    pub dictionary: Option<Encoded>,
}

impl Field {
    /// Whether it holds text.
    pub fn is_text(&self) -> bool {
        matches!(self.kind, Type::Text { .. } | Type::View { .. })
    }
}

/// The columns of a file.
#[derive(Debug)]
pub(super) struct Schema {
    pub fields: Vec<Field>,
    /// For each dictionary, what its values are.
    pub dictionaries: HashMap<i64, Field>,
}

impl Schema {
    /// Reads a message of the kind `Schema`.
    ///
    /// # Errors
    /// Damage, the wrong byte order, more fields than anybody has.
    pub fn read(table: Table<'_>) -> Result<Self, Problem> {
        if table.short(0)? != 0 {
            return Err(Problem::Unreadable(
                "its numbers are big-endian; write it anew on an ordinary machine".into(),
            ));
        }
        let mut schema = Self {
            fields: Vec::new(),
            dictionaries: HashMap::new(),
        };
        let mut count = 0;
        schema.fields = schema.fields_of(table, 1, 0, &mut count)?;
        Ok(schema)
    }

    fn fields_of(
        &mut self,
        table: Table<'_>,
        number: usize,
        depth: usize,
        count: &mut usize,
    ) -> Result<Vec<Field>, Problem> {
        let vector = table.vector(number, 4)?;
        let mut fields = Vec::new();
        for index in 0..vector.len() {
            *count += 1;
            if depth > MAX_DEPTH || *count > MAX_FIELDS {
                return Err(Problem::Unreadable(format!(
                    "it has more than {MAX_FIELDS} columns, or they lie more than {MAX_DEPTH} deep"
                )));
            }
            fields.push(self.field(vector.table(index)?, depth, count)?);
        }
        Ok(fields)
    }

    fn field(
        &mut self,
        table: Table<'_>,
        depth: usize,
        count: &mut usize,
    ) -> Result<Field, Problem> {
        let mut field = Field {
            name: table.text(0)?.to_owned(),
            kind: type_of(table.byte(2)?, table.table(3)?)?,
            children: self.fields_of(table, 5, depth + 1, count)?,
            dictionary: None,
        };
        let children = match field.kind {
            Type::List { .. } | Type::FixedList { .. } | Type::Map => Some(1),
            Type::Struct | Type::Other { .. } => None,
            _ => Some(0),
        };
        if children.is_some_and(|children| children != field.children.len()) {
            return Err(torn());
        }
        if field.kind == Type::Map && field.children[0].children.len() != 2 {
            return Err(torn());
        }
        if let Some(encoding) = table.table(4)? {
            let (width, signed) = match encoding.table(1)? {
                Some(int) => int_of(int)?,
                None => (4, true),
            };
            let id = encoding.long(0)?;
            self.dictionaries.insert(id, field.clone());
            field.dictionary = Some(Encoded { id, width, signed });
        }
        Ok(field)
    }
}

fn int_of(table: Table<'_>) -> Result<(usize, bool), Problem> {
    let width = match table.int(0)? {
        8 => 1,
        16 => 2,
        32 => 4,
        64 => 8,
        _ => return Err(torn()),
    };
    Ok((width, table.flag(1)?))
}

/// By the numbers of `Schema.fbs`.
fn type_of(number: u8, table: Option<Table<'_>>) -> Result<Type, Problem> {
    let table = || table.ok_or_else(torn);
    let text = |large, utf8| Type::Text { large, utf8 };
    Ok(match number {
        1 => Type::Null,
        2 => {
            let (width, signed) = int_of(table()?)?;
            Type::Int { width, signed }
        }
        3 => match table()?.short(0)? {
            0 => Type::Float { width: 2 },
            1 => Type::Float { width: 4 },
            2 => Type::Float { width: 8 },
            _ => return Err(torn()),
        },
        4 => text(false, false),
        5 => text(false, true),
        6 => Type::Bool,
        // Decimals, dates, times, intervals, bytes of a fixed number, durations.
        7..=11 | 15 | 18 => Type::Other { buffers: 2 },
        12 => Type::List { large: false },
        13 => Type::Struct,
        // A union has the types of its values, and a dense one their offsets.
        14 => Type::Other {
            buffers: 1 + table()?.short(0)?.clamp(0, 1) as usize,
        },
        16 => Type::FixedList {
            size: usize::try_from(table()?.int(0)?).map_err(|_| torn())?,
        },
        17 => Type::Map,
        19 => text(true, false),
        20 => text(true, true),
        21 => Type::List { large: true },
        // Runs are in children alone.
        22 => Type::Other { buffers: 0 },
        23 => Type::View { utf8: false },
        24 => Type::View { utf8: true },
        // Views of lists: validity, offsets, sizes.
        25 | 26 => Type::Other { buffers: 3 },
        other => {
            return Err(Problem::Unreadable(format!(
                "it has a column of type number {other}, which is not known"
            )));
        }
    })
}
