//! Archives of the web with text in them, as Common Crawl's WET files: records of a few lines of header and a body (WARC
//! 1.0 and 1.1, ISO 28500). Only records of the type `conversion` are text; pages as they were served are not read.

use std::io::{BufRead, Read};

use super::super::error::Problem;
use super::super::limits::{MAX_LINE_BYTES, read_bytes, skip_bytes};
use super::{Next, RowText, Rows};

/// Bytes of a line of a header.
const MAX_HEADER_LINE: u64 = 64 << 10;
/// Lines of a header.
const MAX_HEADER_LINES: usize = 1000;

/// An archive under way.
pub(in super::super) struct Warc<R> {
    input: R,
    line: Vec<u8>,
    /// Records of any type so far.
    records: u64,
    /// Records of text so far.
    texts: u64,
}

/// What the header of a record says.
#[derive(Default)]
struct Header {
    is_text: bool,
    length: Option<u64>,
}

impl<R: BufRead> Warc<R> {
    /// At the start of `input`.
    pub fn new(input: R) -> Self {
        Self {
            input,
            line: Vec::new(),
            records: 0,
            texts: 0,
        }
    }

    /// Reads a line without its end; `false` at the end of the file.
    fn line(&mut self) -> Result<bool, Problem> {
        self.line.clear();
        let read = (&mut self.input)
            .take(MAX_HEADER_LINE)
            .read_until(b'\n', &mut self.line)?;
        if read as u64 == MAX_HEADER_LINE {
            return Err(self.wrong("has a header line without end"));
        }
        let end = self.line.trim_ascii_end().len();
        self.line.truncate(end);
        Ok(read > 0)
    }

    /// Reads the header of the next record.
    fn header(&mut self) -> Result<Option<Header>, Problem> {
        loop {
            if !self.line()? {
                return Ok(None);
            }
            if !self.line.is_empty() {
                break;
            }
        }
        self.records += 1;
        if !self.line.starts_with(b"WARC/") {
            return Err(self.wrong("does not begin with `WARC/`"));
        }
        let mut header = Header::default();
        for _ in 0..MAX_HEADER_LINES {
            if !self.line()? {
                return Err(self.wrong("ends within its header"));
            }
            if self.line.is_empty() {
                return Ok(Some(header));
            }
            let line = String::from_utf8_lossy(&self.line);
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "warc-type" => header.is_text = value.trim().eq_ignore_ascii_case("conversion"),
                "content-length" => header.length = value.trim().parse().ok(),
                _ => {}
            }
        }
        Err(self.wrong("has a header without end"))
    }

    fn wrong(&self, what: &str) -> Problem {
        Problem::Unreadable(format!("its record {} {what}", self.records))
    }
}

impl<R: BufRead> Rows for Warc<R> {
    fn next(&mut self, text: &mut RowText) -> Result<Next, Problem> {
        loop {
            let Some(header) = self.header()? else {
                return match self.texts {
                    0 => Err(Problem::Unreadable(
                        "none of its records is of the type `conversion`, which is text; take the text out of the pages \
                         first"
                            .into(),
                    )),
                    _ => Ok(Next::End),
                };
            };
            let Some(length) = header.length else {
                return Err(self.wrong("does not say how long it is"));
            };
            if !header.is_text {
                skip_bytes(&mut self.input, length)?;
                continue;
            }
            self.texts += 1;
            if length > MAX_LINE_BYTES {
                return Err(Problem::TooLarge(MAX_LINE_BYTES));
            }
            let body = read_bytes(&mut self.input, length)?;
            return match std::str::from_utf8(&body) {
                Ok(body) => text.push(body).map(|()| Next::Row),
                Err(error) => Ok(Next::Bad(Problem::NotUtf8(error.valid_up_to() as u64))),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::all;
    use super::*;

    fn record(kind: &str, body: &[u8]) -> Vec<u8> {
        let head = format!(
            "WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: text/plain\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body, b"\r\n\r\n"].concat()
    }

    #[test]
    fn conversions_are_texts_and_others_are_passed_over() {
        let archive = [
            record("warcinfo", b"Software: \xff\r\n"),
            record("conversion", "one\n\nWARC/1.0\n€".as_bytes()),
            record("response", b"HTTP/1.1 200 OK\r\n\r\n<p>"),
            record("conversion", b"\xff"),
            record("Conversion", b""),
            record("conversion", b"two"),
        ];
        let found = all(Warc::new(&archive.concat()[..]));
        let expected = [
            "one\n\nWARC/1.0\n€",
            "BAD is not UTF-8: byte 0 begins no valid character",
            "",
            "two",
        ];
        assert_eq!(found, (expected.map(String::from).to_vec(), None));
    }

    #[test]
    fn what_is_torn_or_no_archive_is_refused() {
        let said = |archive: &[u8]| all(Warc::new(archive)).1.expect("a problem");
        let whole = record("conversion", b"some text");
        assert_eq!(
            said(&whole[..whole.len() - 8]),
            "cannot be read: it ends too early"
        );
        assert!(said(b"<html>").contains("does not begin with `WARC/`"));
        assert!(said(b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nx").contains("how long"));
        assert!(said(&record("response", b"x")).contains("of the type `conversion`"));
        let endless = [b"WARC/1.0\r\n".to_vec(), vec![b'a'; 1 << 20]].concat();
        assert!(said(&endless).contains("header line without end"));
        let huge = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 9999999999\r\n\r\nx";
        assert!(said(huge).contains("holds more than"));
    }
}
