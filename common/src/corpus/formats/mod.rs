//! Files of rows: tables (`csv`, `parquet`, `arrow`), JSON objects (`json`), records of the web (`warc`).
//!
//! All of them are read alike: [`Rows`] gives one row after the other, either the text of one column or the whole row as
//! one JSON object, which is then read like a line of `.jsonl`. What is wrong with one row is the row's, and reading goes
//! on; what is wrong with the file ends it.
//!
//! Parquet and Arrow are read by hand: the crates for them hold whole row groups, take memory as files declare it and end the
//! process where there is none, and building them takes longer than building everything else here. Only what text and samples need is read.

pub(super) mod arrow;
pub(super) mod csv;
#[cfg(test)]
mod golden;
pub(super) mod json;
pub(super) mod parquet;
pub(super) mod warc;

use super::error::Problem;
use super::limits::MAX_LINE_BYTES;
use super::pieces::char_boundary_from;

/// How deep lists and structs may lie in each other.
const MAX_DEPTH: usize = 32;

/// Columns that an error lists.
pub(super) const LISTED: usize = 8;

/// What is asked of each row.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted<'a> {
    /// The text in this column.
    Text(&'a str),
    /// All columns, as a JSON object.
    Record,
}

/// What the next row is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is in the text.
    Row,
    /// It cannot be used.
    Bad(Problem),
    /// There is none.
    End,
}

/// A file of rows.
pub(super) trait Rows {
    /// Writes the next row into `text`, which is empty.
    ///
    /// # Errors
    /// What makes it impossible to read on.
    fn next(&mut self, text: &mut RowText) -> Result<Next, Problem>;
}

/// The text of one row, which is bounded.
#[derive(Debug, Default)]
pub(super) struct RowText(String);

impl RowText {
    /// Forgets the row.
    pub fn clear(&mut self) {
        // One row that is larger than all others need not be paid for until the end.
        const KEPT: usize = 1 << 20;
        self.0.clear();
        self.0.shrink_to(KEPT);
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Adds text.
    ///
    /// # Errors
    /// The row is too large.
    pub fn push(&mut self, text: &str) -> Result<(), Problem> {
        if (self.0.len() + text.len()) as u64 > MAX_LINE_BYTES {
            return Err(Problem::TooLarge(MAX_LINE_BYTES));
        }
        self.0.push_str(text);
        Ok(())
    }

    /// Adds text as a JSON string.
    ///
    /// # Errors
    /// As of [`Self::push`].
    pub fn push_string(&mut self, text: &str) -> Result<(), Problem> {
        // In parts: a character may take six bytes in JSON.
        const PART: usize = 64 << 10;
        self.push("\"")?;
        let mut rest = text;
        while !rest.is_empty() {
            let (part, later) = rest.split_at(char_boundary_from(rest, PART));
            let quoted = serde_json::to_string(part).expect("a string is JSON");
            self.push(&quoted[1..quoted.len() - 1])?;
            rest = later;
        }
        self.push("\"")
    }

    /// Adds a key of a JSON object, before it a comma unless it is the `first`.
    ///
    /// # Errors
    /// As of [`Self::push`].
    pub fn push_key(&mut self, first: bool, key: &str) -> Result<(), Problem> {
        if !first {
            self.push(",")?;
        }
        self.push_string(key)?;
        self.push(":")
    }

    /// Adds a key of a map, given as JSON, before it a comma unless it is the `first`. What is no text there becomes one.
    ///
    /// # Errors
    /// As of [`Self::push`].
    pub fn push_map_key(&mut self, first: bool, key: &Self) -> Result<(), Problem> {
        if !key.0.starts_with('"') {
            return self.push_key(first, &key.0);
        }
        if !first {
            self.push(",")?;
        }
        self.push(&key.0)?;
        self.push(":")
    }

    /// Adds a floating point number; what is none in JSON is null.
    ///
    /// # Errors
    /// As of [`Self::push`].
    pub fn push_float(&mut self, number: f64) -> Result<(), Problem> {
        match serde_json::Number::from_f64(number) {
            Some(number) => self.push(&number.to_string()),
            None => self.push("null"),
        }
    }
}

/// Names for an error, a few of them.
fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let all = names.len();
    first_of(names, all)
}

/// The same, of `all` names of which the first [`LISTED`] are known.
pub(super) fn first_of<'a>(names: impl Iterator<Item = &'a str>, all: usize) -> String {
    if all == 0 {
        return "none".to_string();
    }
    let mut shown: Vec<String> = names.take(LISTED).map(|name| format!("`{name}`")).collect();
    if all > LISTED {
        shown.push(format!("and {} more", all - LISTED));
    }
    shown.join(", ")
}

/// Where `column` stands among `names`.
///
/// # Errors
/// It is not there, or twice.
fn find_column<'a>(
    column: &str,
    names: impl ExactSizeIterator<Item = &'a str> + Clone,
) -> Result<usize, Problem> {
    let mut found = names
        .clone()
        .enumerate()
        .filter(|(_, name)| *name == column);
    match (found.next(), found.next()) {
        (Some((at, _)), None) => Ok(at),
        (Some(_), Some(_)) => Err(twice(column)),
        (None, _) => Err(Problem::NoColumn {
            column: column.to_owned(),
            present: listed(names),
        }),
    }
}

/// The first name that occurs twice would make an object of two meanings.
fn no_name_twice<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Problem> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(twice(name));
        }
    }
    Ok(())
}

fn twice(column: &str) -> Problem {
    Problem::Unreadable(format!("it has two columns `{column}`"))
}

fn text_of<'a>(bytes: &'a [u8], column: &str) -> Result<&'a str, Problem> {
    std::str::from_utf8(bytes).map_err(|_| Problem::CellNotUtf8(column.to_owned()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// All rows, what is wrong with some in its words, and what ends the reading.
    pub fn all(mut rows: impl Rows) -> (Vec<String>, Option<String>) {
        let mut found = Vec::new();
        let mut text = RowText::default();
        loop {
            text.clear();
            match rows.next(&mut text) {
                Ok(Next::Row) => found.push(text.as_str().to_owned()),
                Ok(Next::Bad(problem)) => found.push(format!("BAD {problem}")),
                Ok(Next::End) => return (found, None),
                Err(problem) => return (found, Some(problem.to_string())),
            }
        }
    }

    #[test]
    fn rows_become_json() {
        let mut text = RowText::default();
        text.push_key(true, "a\"b").expect("room");
        text.push_float(f64::NAN).expect("room");
        text.push_key(false, "c").expect("room");
        text.push_float(1.0).expect("room");
        assert_eq!(text.as_str(), r#""a\"b":null,"c":1.0"#);
        let long = "ä\"\n€".repeat(30_000);
        text.clear();
        text.push_string(&long).expect("room");
        assert_eq!(text.as_str(), serde_json::to_string(&long).expect("JSON"));
    }

    #[test]
    fn keys_of_maps_become_text() {
        let mut text = RowText::default();
        for (number, key) in [r#""a\"b""#, "7", "[\"c\"]", "null"]
            .into_iter()
            .enumerate()
        {
            let key = RowText(key.into());
            text.push_map_key(number == 0, &key).expect("room");
        }
        assert_eq!(text.as_str(), r#""a\"b":,"7":,"[\"c\"]":,"null":"#);
    }

    #[test]
    fn columns_that_are_missing_or_there_twice_are_named() {
        let names = ["a", "b", "a"];
        let find = |column| find_column(column, names.iter().copied());
        assert_eq!(find("b"), Ok(1));
        assert_eq!(
            find("text").expect_err("missing").to_string(),
            "has no column `text`; its columns are `a`, `b`, `a`"
        );
        assert!(find("a").is_err() && no_name_twice(names.into_iter()).is_err());
    }
}
