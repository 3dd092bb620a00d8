//! Apache Parquet: row groups, in each a chunk of pages for each column, and behind everything a footer that says where
//! they are. Of the columns only those are read that are asked for.
//!
//! Rows are put together from values and their levels one by one, as Google's Dremel paper has it (Melnik et al., 2010).

mod decode;
mod footer;
mod page;
mod thrift;

use std::io::{Read, Seek, SeekFrom};

use self::decode::Value;
use self::footer::{Column, Footer, Leaf, Node, RowGroup, Shape};
use self::page::{Pages, Source};
use self::thrift::damaged;
use super::super::error::Problem;
use super::super::limits::{Limits, read_bytes};
use super::{Next, RowText, Rows, Wanted, find_column, no_name_twice, text_of};

/// What a file begins and ends with.
const MARK: &[u8; 4] = b"PAR1";
const ENCRYPTED_MARK: &[u8; 4] = b"PARE";

/// Bytes of a footer.
const MAX_FOOTER_BYTES: u64 = 64 << 20;

/// A file under way.
pub(in super::super) struct Parquet<'a, R> {
    source: Source<'a, R>,
    columns: Vec<Column>,
    /// The column of the text alone, or all that are read.
    nodes: Vec<Node>,
    is_text: bool,
    groups: std::vec::IntoIter<RowGroup>,
    /// Of the row group: one for each leaf, where it is read.
    pages: Vec<Option<Pages>>,
    rows: u64,
}

/// Reads the end of a file of `bytes` bytes.
///
/// # Errors
/// No Parquet, or no such column of text.
pub(in super::super) fn open<'a, R: Read + Seek>(
    mut input: R,
    bytes: u64,
    wanted: Wanted<'_>,
    limits: &'a Limits,
) -> Result<Parquet<'a, R>, Problem> {
    if bytes == 0 {
        return Err(Problem::Empty);
    }
    let footer = Footer::parse(&footer_bytes(&mut input, bytes)?)?;
    let names = footer.nodes.iter().map(|node| node.name.as_str());
    let (nodes, is_text) = match wanted {
        Wanted::Text(name) => {
            let node = &footer.nodes[find_column(name, names)?];
            let leaf = (node.shape == Shape::Leaf).then(|| footer.columns[node.leaves.start].leaf);
            match leaf {
                Some(Leaf::Text | Leaf::Bytes) => (vec![node.clone()], true),
                _ => return Err(Problem::NotAText(name.to_owned())),
            }
        }
        Wanted::Record => {
            no_name_twice(names)?;
            let read = footer
                .nodes
                .iter()
                .filter(|node| node.is_read(&footer.columns));
            (read.cloned().collect(), false)
        }
    };
    Ok(Parquet {
        source: Source::new(input, limits),
        columns: footer.columns,
        nodes,
        is_text,
        groups: footer.groups.into_iter(),
        pages: Vec::new(),
        rows: 0,
    })
}

fn footer_bytes(input: &mut (impl Read + Seek), bytes: u64) -> Result<Vec<u8>, Problem> {
    let no_parquet = || Problem::Unreadable("it does not end as Parquet does; is it torn?".into());
    let tail = bytes.checked_sub(8).ok_or_else(no_parquet)?;
    input.seek(SeekFrom::Start(tail))?;
    let end = read_bytes(input, 8)?;
    if end[4..] == *ENCRYPTED_MARK {
        return Err(Problem::Unreadable("it is encrypted".into()));
    }
    if end[4..] != *MARK {
        return Err(no_parquet());
    }
    let length = u32::from_le_bytes(end[..4].try_into().expect("4 bytes")).into();
    let begin = tail.checked_sub(length).ok_or_else(no_parquet)?;
    if length > MAX_FOOTER_BYTES {
        return Err(Problem::Unreadable(format!(
            "its footer has {length} bytes, and at most {MAX_FOOTER_BYTES} are read"
        )));
    }
    input.seek(SeekFrom::Start(begin))?;
    read_bytes(input, length)
}

impl<R: Read + Seek> Parquet<'_, R> {
    /// Goes to a row group that has rows; `false` behind the last one.
    fn fill(&mut self) -> bool {
        while self.rows == 0 {
            let Some(group) = self.groups.next() else {
                return false;
            };
            self.rows = group.rows;
            let is_wanted = |leaf: usize| {
                let mut nodes = self.nodes.iter();
                let beneath = nodes.any(|node| node.leaves.contains(&leaf));
                beneath && (self.is_text || self.columns[leaf].is_read())
            };
            let chunks = group.chunks.into_iter().enumerate();
            self.pages = chunks
                .map(|(leaf, chunk)| {
                    is_wanted(leaf).then(|| Pages::new(self.columns[leaf].clone(), chunk))
                })
                .collect();
            // Those of the group before are gone.
            self.source.held = 0;
        }
        true
    }

    fn text(&mut self, text: &mut RowText) -> Result<Next, Problem> {
        let Some(pages) = self.pages[self.nodes[0].leaves.start].as_mut() else {
            return Err(damaged("the schema"));
        };
        if pages.peek(&mut self.source)?.is_none() {
            return Err(damaged("a row group"));
        }
        match pages.take()? {
            Some(Value::Bytes(bytes)) => match text_of(bytes, &self.nodes[0].name) {
                Ok(found) => text.push(found).map(|()| Next::Row),
                Err(problem) => Ok(Next::Bad(problem)),
            },
            // Null is a row without text.
            _ => Ok(Next::Row),
        }
    }
}

impl<R: Read + Seek> Rows for Parquet<'_, R> {
    fn next(&mut self, text: &mut RowText) -> Result<Next, Problem> {
        if !self.fill() {
            return Ok(Next::End);
        }
        self.rows -= 1;
        if self.is_text {
            return self.text(text);
        }
        let mut writer = Writer {
            source: &mut self.source,
            pages: &mut self.pages,
            bad: None,
        };
        writer.fields(&self.nodes, text)?;
        Ok(match writer.bad {
            Some(problem) => Next::Bad(problem),
            None => Next::Row,
        })
    }
}

/// Puts one row together.
struct Writer<'a, 'b, R> {
    source: &'a mut Source<'b, R>,
    pages: &'a mut [Option<Pages>],
    /// What is wrong with the row, though the next one can be found.
    bad: Option<Problem>,
}

impl<R: Read + Seek> Writer<'_, '_, R> {
    /// Whether anything beneath is read.
    fn is_read(&self, node: &Node) -> bool {
        self.pages[node.leaves.clone()].iter().any(Option::is_some)
    }

    /// The levels of the next value beneath; its first leaf that is read speaks for the others.
    fn peek(&mut self, node: &Node) -> Result<page::Levels, Problem> {
        let mut pages = self.pages[node.leaves.clone()].iter_mut().flatten();
        let first = pages.next().ok_or_else(|| damaged("a row group"))?;
        let levels = first.peek(self.source)?;
        levels.ok_or_else(|| damaged("a row group"))
    }

    /// Passes over one place in each leaf beneath.
    fn pass(&mut self, node: &Node) -> Result<(), Problem> {
        for pages in self.pages[node.leaves.clone()].iter_mut().flatten() {
            if pages.peek(self.source)?.is_none() {
                return Err(damaged("a row group"));
            }
            pages.take()?;
        }
        Ok(())
    }

    fn fields(&mut self, nodes: &[Node], text: &mut RowText) -> Result<(), Problem> {
        text.push("{")?;
        let mut first = true;
        for node in nodes {
            if self.is_read(node) {
                text.push_key(first, &node.name)?;
                self.node(node, text)?;
                first = false;
            }
        }
        text.push("}")
    }

    fn node(&mut self, node: &Node, text: &mut RowText) -> Result<(), Problem> {
        if !self.is_read(node) {
            return text.push("null");
        }
        let levels = self.peek(node)?;
        if levels.definition < node.there {
            self.pass(node)?;
            return text.push("null");
        }
        match &node.shape {
            Shape::Leaf => self.leaf(node, text),
            Shape::Struct(nodes) => self.fields(nodes, text),
            Shape::List {
                filled,
                repeated,
                element,
            } => {
                text.push("[")?;
                if levels.definition < *filled {
                    self.pass(node)?;
                    return text.push("]");
                }
                loop {
                    self.node(element, text)?;
                    if !self.goes_on(node, *repeated)? {
                        return text.push("]");
                    }
                    text.push(",")?;
                }
            }
            Shape::Map {
                filled,
                repeated,
                key,
                value,
            } => {
                text.push("{")?;
                if levels.definition < *filled {
                    self.pass(node)?;
                    return text.push("}");
                }
                let mut first = true;
                let mut name = RowText::default();
                loop {
                    name.clear();
                    self.node(key, &mut name)?;
                    text.push_map_key(first, &name)?;
                    self.node(value, text)?;
                    if !self.goes_on(node, *repeated)? {
                        return text.push("}");
                    }
                    first = false;
                }
            }
        }
    }

    /// Whether the next value belongs to the same list.
    fn goes_on(&mut self, node: &Node, repeated: u32) -> Result<bool, Problem> {
        let mut pages = self.pages[node.leaves.clone()].iter_mut().flatten();
        let first = pages.next().ok_or_else(|| damaged("a row group"))?;
        let levels = first.peek(self.source)?;
        Ok(levels.is_some_and(|levels| levels.repetition >= repeated))
    }

    fn leaf(&mut self, node: &Node, text: &mut RowText) -> Result<(), Problem> {
        let Some(pages) = self.pages[node.leaves.start].as_mut() else {
            return text.push("null");
        };
        let leaf = pages.column().leaf;
        match (leaf, pages.take()?) {
            (_, None) => text.push("null"),
            (_, Some(Value::Bool(truth))) => text.push(if truth { "true" } else { "false" }),
            (Leaf::Int { signed: false }, Some(Value::Int32(number))) => {
                text.push(&(number as u32).to_string())
            }
            (Leaf::Int { signed: false }, Some(Value::Int64(number))) => {
                text.push(&(number as u64).to_string())
            }
            (_, Some(Value::Int32(number))) => text.push(&number.to_string()),
            (_, Some(Value::Int64(number))) => text.push(&number.to_string()),
            (_, Some(Value::Float(number))) => text.push_float(number),
            (_, Some(Value::Bytes(bytes))) => match text_of(bytes, &node.name) {
                Ok(found) => text.push_string(found),
                Err(problem) => {
                    self.bad = Some(problem);
                    text.push("null")
                }
            },
        }
    }
}
