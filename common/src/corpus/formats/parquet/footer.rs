//! The end of a Parquet file: the tree of its columns, and where each row group has them. **Pure.**
//!
//! Columns without text, numbers or truths (times, decimals, bytes) are known as [`Leaf::Other`], and are not read.

use super::super::super::error::Problem;
use super::super::MAX_DEPTH;
use super::thrift::{Cursor, Kind, Torn, damaged};

/// Nodes of a schema.
const MAX_ELEMENTS: usize = 10_000;

/// The physical type of a column, by the numbers of `parquet.thrift`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Physical {
    Boolean,
    Int32,
    Int64,
    Int96,
    Float,
    Double,
    ByteArray,
    /// Of that many bytes.
    Fixed(usize),
}

/// What the values of a column are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaf {
    Bool,
    Int {
        signed: bool,
    },
    Float,
    Text,
    /// Bytes of which nobody says that they are text.
    Bytes,
    Other,
}

/// How often a value is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repetition {
    Required,
    Optional,
    Repeated,
}

/// One node of the schema as it is written.
#[derive(Debug)]
struct Element {
    name: String,
    physical: Option<i64>,
    length: i64,
    repetition: Repetition,
    children: u64,
    converted: Option<i64>,
    /// The number of the logical type's field, and whether an integer has a sign.
    logical: Option<i64>,
    signed: bool,
}

/// A column of the leaves, in the order in which row groups have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub name: String,
    pub physical: Physical,
    pub leaf: Leaf,
    /// The definition level of a value that is there.
    pub max_definition: u32,
    /// How many lists lie around it.
    pub max_repetition: u32,
}

/// A node of the tree that rows are put together by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub name: String,
    /// From this definition level on it is not null.
    pub there: u32,
    /// The leaves beneath it.
    pub leaves: std::ops::Range<usize>,
    pub shape: Shape,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Leaf,
    Struct(Vec<Node>),
    /// From the definition level `filled` on it has elements; an element that is not the first has this repetition level.
    List {
        filled: u32,
        repeated: u32,
        element: Box<Node>,
    },
    Map {
        filled: u32,
        repeated: u32,
        key: Box<Node>,
        value: Box<Node>,
    },
}

impl Node {
    /// Whether a leaf is among it that is read.
    pub fn is_read(&self, columns: &[Column]) -> bool {
        let leaves = &columns[self.leaves.clone()];
        leaves.iter().any(|column| column.is_read())
    }
}

impl Column {
    /// Whether its values have a place in a JSON object.
    pub fn is_read(&self) -> bool {
        !matches!(self.leaf, Leaf::Other | Leaf::Bytes)
    }
}

/// Where a row group has a column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Chunk {
    pub codec: i64,
    pub begin: u64,
    pub bytes: u64,
}

/// Rows that lie together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct RowGroup {
    pub rows: u64,
    /// For each leaf.
    pub chunks: Vec<Chunk>,
}

/// What the end of a file says.
#[derive(Debug)]
pub(super) struct Footer {
    pub columns: Vec<Column>,
    /// The columns as people see them.
    pub nodes: Vec<Node>,
    pub groups: Vec<RowGroup>,
}

impl Footer {
    /// Understands it.
    ///
    /// # Errors
    /// Damage, and trees that are too deep.
    pub fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        let mut elements = Vec::new();
        let mut groups = Vec::new();
        Cursor::new(bytes).structure(&mut |cursor, number, kind| match (number, kind) {
            (2, Kind::List) => cursor.list(&mut |cursor, _| {
                elements.push(element(cursor)?);
                match elements.len() {
                    0..=MAX_ELEMENTS => Ok(()),
                    _ => Err(Torn::Wrong),
                }
            }),
            (4, Kind::List) => cursor.list(&mut |cursor, _| {
                groups.push(row_group(cursor)?);
                Ok(())
            }),
            _ => cursor.skip(kind),
        })?;
        let mut tree = Tree {
            elements: elements.into_iter(),
            columns: Vec::new(),
        };
        let root = tree.elements.next().ok_or_else(|| damaged("the schema"))?;
        let mut nodes = Vec::new();
        for _ in 0..root.children {
            nodes.push(tree.node(0, 0, 0)?);
        }
        let leaves = tree.columns.len();
        if tree.elements.next().is_some() || groups.iter().any(|g| g.chunks.len() != leaves) {
            return Err(damaged("the schema"));
        }
        Ok(Self {
            columns: tree.columns,
            nodes,
            groups,
        })
    }
}

fn text(cursor: &mut Cursor<'_>) -> Result<String, Torn> {
    let bytes = cursor.bytes()?;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

fn element(cursor: &mut Cursor<'_>) -> Result<Element, Torn> {
    let mut element = Element {
        name: String::new(),
        physical: None,
        length: 0,
        repetition: Repetition::Required,
        children: 0,
        converted: None,
        logical: None,
        signed: true,
    };
    cursor.structure(&mut |cursor, number, kind| {
        match (number, kind) {
            (1, Kind::Int) => element.physical = Some(cursor.int()?),
            (2, Kind::Int) => element.length = cursor.int()?,
            (3, Kind::Int) => {
                element.repetition = match cursor.int()? {
                    0 => Repetition::Required,
                    1 => Repetition::Optional,
                    2 => Repetition::Repeated,
                    _ => return Err(Torn::Wrong),
                }
            }
            (4, Kind::Bytes) => element.name = text(cursor)?,
            (5, Kind::Int) => element.children = cursor.size()?,
            (6, Kind::Int) => element.converted = Some(cursor.int()?),
            (10, Kind::Struct) => logical(cursor, &mut element)?,
            _ => cursor.skip(kind)?,
        }
        Ok(())
    })?;
    Ok(element)
}

/// A union of which one field is there; only that of integers has something in it that matters.
fn logical(cursor: &mut Cursor<'_>, element: &mut Element) -> Result<(), Torn> {
    cursor.structure(&mut |cursor, number, kind| {
        element.logical = Some(number);
        match (number, kind) {
            (INTEGER, Kind::Struct) => cursor.structure(&mut |cursor, number, kind| {
                if let (2, Kind::Flag(signed)) = (number, kind) {
                    element.signed = signed;
                }
                cursor.skip(kind)
            }),
            _ => cursor.skip(kind),
        }
    })
}

fn row_group(cursor: &mut Cursor<'_>) -> Result<RowGroup, Torn> {
    let mut group = RowGroup::default();
    cursor.structure(&mut |cursor, number, kind| match (number, kind) {
        (1, Kind::List) => cursor.list(&mut |cursor, _| {
            let mut chunk = None;
            cursor.structure(&mut |cursor, number, kind| match (number, kind) {
                (3, Kind::Struct) => {
                    chunk = Some(chunk_of(cursor)?);
                    Ok(())
                }
                _ => cursor.skip(kind),
            })?;
            group.chunks.push(chunk.ok_or(Torn::Wrong)?);
            Ok(())
        }),
        (3, Kind::Int) => {
            group.rows = cursor.size()?;
            Ok(())
        }
        _ => cursor.skip(kind),
    })?;
    Ok(group)
}

fn chunk_of(cursor: &mut Cursor<'_>) -> Result<Chunk, Torn> {
    let mut chunk = Chunk::default();
    let mut dictionary = None;
    cursor.structure(&mut |cursor, number, kind| {
        match (number, kind) {
            (4, Kind::Int) => chunk.codec = cursor.int()?,
            (7, Kind::Int) => chunk.bytes = cursor.size()?,
            (9, Kind::Int) => chunk.begin = cursor.size()?,
            (11, Kind::Int) => dictionary = Some(cursor.size()?),
            _ => cursor.skip(kind)?,
        }
        Ok(())
    })?;
    // Some writers say 0 where there is none.
    if let Some(begin) = dictionary.filter(|begin| *begin > 0) {
        chunk.begin = chunk.begin.min(begin);
    }
    Ok(chunk)
}

/// Numbers of logical types.
const STRING: i64 = 1;
const MAP: i64 = 2;
const LIST: i64 = 3;
const ENUM: i64 = 4;
const INTEGER: i64 = 10;
const JSON: i64 = 12;
const FLOAT16: i64 = 15;

impl Element {
    fn is_list(&self) -> bool {
        self.logical == Some(LIST) || (self.logical.is_none() && self.converted == Some(3))
    }

    fn is_map(&self) -> bool {
        self.logical == Some(MAP)
            || (self.logical.is_none() && matches!(self.converted, Some(1 | 2)))
    }

    fn physical(&self) -> Result<Physical, Problem> {
        Ok(match self.physical {
            Some(0) => Physical::Boolean,
            Some(1) => Physical::Int32,
            Some(2) => Physical::Int64,
            Some(3) => Physical::Int96,
            Some(4) => Physical::Float,
            Some(5) => Physical::Double,
            Some(6) => Physical::ByteArray,
            Some(7) => {
                Physical::Fixed(usize::try_from(self.length).map_err(|_| damaged("the schema"))?)
            }
            _ => return Err(damaged("the schema")),
        })
    }

    /// What the values are, by the logical type, and by the converted type of older files.
    fn leaf(&self, physical: Physical) -> Leaf {
        match (physical, self.logical, self.converted) {
            (Physical::Boolean, ..) => Leaf::Bool,
            (Physical::ByteArray, Some(STRING | ENUM | JSON), _) => Leaf::Text,
            (Physical::ByteArray, None, Some(0 | 4 | 19)) => Leaf::Text,
            (Physical::ByteArray, None, None) => Leaf::Bytes,
            (Physical::Int32 | Physical::Int64, Some(INTEGER), _) => Leaf::Int {
                signed: self.signed,
            },
            (Physical::Int32 | Physical::Int64, None, Some(11..=14)) => Leaf::Int { signed: false },
            (Physical::Int32 | Physical::Int64, None, None | Some(15..=18)) => {
                Leaf::Int { signed: true }
            }
            (Physical::Float | Physical::Double, ..) | (Physical::Fixed(2), Some(FLOAT16), _) => {
                Leaf::Float
            }
            _ => Leaf::Other,
        }
    }
}

/// Puts the tree together from its nodes in order.
struct Tree {
    elements: std::vec::IntoIter<Element>,
    columns: Vec<Column>,
}

impl Tree {
    /// The next node, below one of these levels.
    fn node(&mut self, depth: usize, definition: u32, repetition: u32) -> Result<Node, Problem> {
        let element = self.elements.next().ok_or_else(|| damaged("the schema"))?;
        if depth > MAX_DEPTH {
            return Err(Problem::Unreadable(format!(
                "its columns lie more than {MAX_DEPTH} deep"
            )));
        }
        let below = depth + 1;
        match element.repetition {
            Repetition::Required => self.inner(element, below, definition, repetition),
            Repetition::Optional => self.inner(element, below, definition + 1, repetition),
            // A list of old, without a group around it.
            Repetition::Repeated => {
                let begin = self.columns.len();
                let name = element.name.clone();
                let element = self.inner(element, below, definition + 1, repetition + 1)?;
                Ok(Node {
                    name,
                    there: definition,
                    leaves: begin..self.columns.len(),
                    shape: Shape::List {
                        filled: definition + 1,
                        repeated: repetition + 1,
                        element: Box::new(element),
                    },
                })
            }
        }
    }

    /// What an element is that is there at the level `definition`.
    fn inner(
        &mut self,
        element: Element,
        depth: usize,
        definition: u32,
        repetition: u32,
    ) -> Result<Node, Problem> {
        let begin = self.columns.len();
        let shape = match element.children {
            0 => {
                let physical = element.physical()?;
                self.columns.push(Column {
                    name: element.name.clone(),
                    physical,
                    leaf: element.leaf(physical),
                    max_definition: definition,
                    max_repetition: repetition,
                });
                Shape::Leaf
            }
            1 if element.is_list() => self.list(&element.name, depth, definition, repetition)?,
            1 if element.is_map() => self.map(depth, definition, repetition)?,
            children => {
                let mut nodes = Vec::new();
                for _ in 0..children {
                    nodes.push(self.node(depth, definition, repetition)?);
                }
                Shape::Struct(nodes)
            }
        };
        Ok(Node {
            name: element.name,
            there: definition,
            leaves: begin..self.columns.len(),
            shape,
        })
    }

    /// What is in a group that is a list: a repeated group around the element, or in older files the element itself.
    fn list(
        &mut self,
        name: &str,
        depth: usize,
        definition: u32,
        repetition: u32,
    ) -> Result<Shape, Problem> {
        let repeated = self.elements.next().ok_or_else(|| damaged("the schema"))?;
        if repeated.repetition != Repetition::Repeated || depth > MAX_DEPTH {
            return Err(damaged("a list of the schema"));
        }
        let (definition, repetition) = (definition + 1, repetition + 1);
        let is_element = repeated.children != 1
            || repeated.name == "array"
            || repeated.name == format!("{name}_tuple");
        let element = match is_element {
            true => self.inner(repeated, depth + 1, definition, repetition)?,
            false => self.node(depth + 1, definition, repetition)?,
        };
        Ok(Shape::List {
            filled: definition,
            repeated: repetition,
            element: Box::new(element),
        })
    }

    fn map(&mut self, depth: usize, definition: u32, repetition: u32) -> Result<Shape, Problem> {
        let entries = self.elements.next().ok_or_else(|| damaged("the schema"))?;
        if entries.repetition != Repetition::Repeated || entries.children != 2 || depth > MAX_DEPTH
        {
            return Err(damaged("a map of the schema"));
        }
        let (definition, repetition) = (definition + 1, repetition + 1);
        Ok(Shape::Map {
            filled: definition,
            repeated: repetition,
            key: Box::new(self.node(depth + 1, definition, repetition)?),
            value: Box::new(self.node(depth + 1, definition, repetition)?),
        })
    }
}
