//! Tables of cells that are parted by commas or tabs (RFC 4180, as Python's `csv` and pandas write them): the first row
//! names the columns, cells with separators or line ends in them stand in double quotes. All cells are text.

use std::cell::Cell;
use std::io::Read;

use super::super::error::Problem;
use super::super::limits::{MAX_LINE_BYTES, PerRow};
use super::{Next, RowText, Rows, Wanted, find_column, no_name_twice, text_of};

/// Bytes of the head of a table, whose names are kept.
const MAX_HEAD_BYTES: u64 = 16 << 20;

/// A table under way.
pub(in super::super) struct Csv<'a, R> {
    reader: csv::Reader<PerRow<'a, R>>,
    left: &'a Cell<u64>,
    record: csv::ByteRecord,
    columns: Vec<String>,
    /// The column of the text; `None` is all of them.
    column: Option<usize>,
}

/// Reads the head of a table.
///
/// # Errors
/// No head, or one without the wanted column.
pub(in super::super) fn open<'a, R: Read>(
    input: R,
    separator: u8,
    wanted: Wanted<'_>,
    left: &'a Cell<u64>,
) -> Result<Csv<'a, R>, Problem> {
    left.set(MAX_HEAD_BYTES);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(separator)
        .has_headers(false)
        .flexible(true)
        .from_reader(PerRow {
            inner: input,
            separator,
            left,
        });
    let mut record = csv::ByteRecord::new();
    let read = reader.read_byte_record(&mut record);
    let of_head = |error| match problem(error) {
        Problem::TooLarge(MAX_LINE_BYTES) => Problem::TooLarge(MAX_HEAD_BYTES),
        other => other,
    };
    if !read.map_err(of_head)? {
        return Err(Problem::Empty);
    }
    let mut columns = Vec::with_capacity(record.len());
    for (number, name) in record.iter().enumerate() {
        let name = text_of(name, &format!("number {}", number + 1))?;
        columns.push(name.trim_start_matches('\u{feff}').to_owned());
    }
    let names = columns.iter().map(String::as_str);
    let column = match wanted {
        Wanted::Text(column) => Some(find_column(column, names)?),
        Wanted::Record => {
            no_name_twice(names)?;
            None
        }
    };
    Ok(Csv {
        reader,
        left,
        record,
        columns,
        column,
    })
}

fn problem(error: csv::Error) -> Problem {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error.into(),
        other => Problem::Unreadable(format!("{other:?}")),
    }
}

impl<R: Read> Rows for Csv<'_, R> {
    fn next(&mut self, text: &mut RowText) -> Result<Next, Problem> {
        self.left.set(MAX_LINE_BYTES);
        if !self
            .reader
            .read_byte_record(&mut self.record)
            .map_err(problem)?
        {
            return Ok(Next::End);
        }
        if self.record.len() != self.columns.len() {
            return Ok(Next::Bad(Problem::Cells {
                found: self.record.len(),
                expected: self.columns.len(),
            }));
        }
        let cell = |number: usize| text_of(&self.record[number], &self.columns[number]);
        if let Some(number) = self.column {
            return match cell(number) {
                Ok(found) => text.push(found).map(|()| Next::Row),
                Err(bad) => Ok(Next::Bad(bad)),
            };
        }
        text.push("{")?;
        for (number, name) in self.columns.iter().enumerate() {
            text.push_key(number == 0, name)?;
            match cell(number) {
                Ok(found) => text.push_string(found)?,
                Err(bad) => return Ok(Next::Bad(bad)),
            }
        }
        text.push("}")?;
        Ok(Next::Row)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::all;
    use super::*;

    fn rows(table: &[u8], separator: u8, wanted: Wanted<'_>) -> (Vec<String>, Option<String>) {
        let left = Cell::new(0);
        match open(table, separator, wanted, &left) {
            Ok(rows) => all(rows),
            Err(problem) => (Vec::new(), Some(problem.to_string())),
        }
    }

    #[test]
    fn cells_may_hold_separators_quotes_and_lines() {
        let table = "\u{feff}text,id\r\n\"a, \"\"b\"\"\nc\",1\r\n\nd,2";
        let found = rows(table.as_bytes(), b',', Wanted::Text("text"));
        assert_eq!(found, (vec!["a, \"b\"\nc".into(), "d".into()], None));
        let found = rows(table.as_bytes(), b',', Wanted::Record);
        assert_eq!(found.0[1], r#"{"text":"d","id":"2"}"#);
        let found = rows(b"id\ttext\n1\ta, b\n", b'\t', Wanted::Text("text"));
        assert_eq!(found, (vec!["a, b".into()], None));
    }

    #[test]
    fn bad_rows_are_left_behind_and_bad_heads_are_not() {
        let table = b"text,id\na\nb,1,2\nc\xff,1\nd,4\n";
        let (found, end) = rows(table, b',', Wanted::Text("text"));
        assert_eq!(
            found,
            [
                "BAD has 1 cells, and the head of the table names 2 columns",
                "BAD has 3 cells, and the head of the table names 2 columns",
                "BAD is not UTF-8 in column `text`",
                "d",
            ]
        );
        assert_eq!(end, None);
        let said = |table: &[u8], wanted| rows(table, b',', wanted).1.expect("a problem");
        assert_eq!(
            said(b"a,b\n1,2\n", Wanted::Text("text")),
            "has no column `text`; its columns are `a`, `b`"
        );
        assert_eq!(said(b"", Wanted::Record), "is empty");
        assert_eq!(
            said(&vec![b','; 2 << 20], Wanted::Record),
            "holds more than 16777216 bytes of text, the limit"
        );
        assert_eq!(
            said(b"a,a\n", Wanted::Record),
            "cannot be read: it has two columns `a`"
        );
    }
}
