//! Reads the documents of one source file as a stream of valid UTF-8: unpacks, checks, cuts lines, takes the text field.
//!
//! Memory is one buffer for text files and one line for `.jsonl`, whatever the size of the file. A byte order mark at the
//! start of a file is left out; nothing else is changed, line ends included.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use super::error::{BadInput, CorpusError, Problem};
use super::objective::SupervisedConfig;
use super::source::{Compression, SourceFile, SourceKind};

const BUFFER: usize = 256 << 10;
const BYTE_ORDER_MARK: char = '\u{feff}';

/// A `.jsonl` line longer than this is refused: it has to be held in memory as a whole.
pub const MAX_LINE_BYTES: u64 = 1 << 30;

/// How files are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// The field of a `.jsonl` line that holds the text.
    pub text_field: String,
    /// Bound on the unpacked bytes of one file: a guard against archives that unpack to more than anybody meant.
    pub max_file_bytes: Option<u64>,
    /// Take lines whole, as samples of this kind, and refuse what is none.
    pub supervised: Option<SupervisedConfig>,
}

/// What a file consists of. Each document is `Start`, any number of `Text`, `End`.
#[derive(Debug)]
pub enum Event<'a> {
    /// A document begins; in `.jsonl` at this line, counted from 1.
    Start(Option<u64>),
    /// More of its text, never empty.
    Text(&'a str),
    /// The document is complete.
    End,
    /// A line that cannot be used. The file goes on if the receiver does.
    Bad(BadInput),
}

/// Sends the documents of `file` to `sink`, in order. `on_read` hears how many bytes of the file were read, as they are.
///
/// # Errors
/// [`CorpusError::BadInput`] where the file as a whole cannot be used, perhaps after some of its text was sent; whatever
/// `sink` returns.
pub fn read_documents(
    file: &SourceFile,
    options: &ReadOptions,
    on_read: &dyn Fn(u64),
    sink: &mut dyn FnMut(Event<'_>) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let raw = File::open(&file.path).map_err(|error| unreadable(file, None, &error))?;
    let raw = Counted {
        inner: raw,
        on_read,
    };
    let limit = options.max_file_bytes.unwrap_or(u64::MAX);
    let read: Box<dyn Read + '_> = match file.compression {
        Compression::None => Box::new(raw),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(
            BufReader::with_capacity(BUFFER, raw),
        )),
        Compression::Zstd => {
            Box::new(zstd::Decoder::new(raw).map_err(|error| unreadable(file, None, &error))?)
        }
    };
    let left = Cell::new(limit);
    let input = BufReader::with_capacity(
        BUFFER,
        Limited {
            inner: read,
            left: &left,
        },
    );
    let result = match file.kind {
        SourceKind::Text if options.supervised.is_some() => Err(CorpusError::BadInput(bad(
            file,
            None,
            Problem::NotJsonLines,
        ))),
        SourceKind::Text => read_text(file, input, sink),
        SourceKind::Jsonl => read_lines(file, options, input, sink),
    };
    match result {
        Err(CorpusError::BadInput(bad)) if left.get() == 0 && bad.line.is_none() => {
            Err(CorpusError::BadInput(BadInput {
                problem: Problem::TooLarge(limit),
                ..bad
            }))
        }
        result => result,
    }
}

fn bad(file: &SourceFile, line: Option<u64>, problem: Problem) -> BadInput {
    BadInput {
        file: file.name.clone(),
        line,
        problem,
    }
}

fn unreadable(file: &SourceFile, line: Option<u64>, error: &io::Error) -> CorpusError {
    let problem = match error.kind() {
        io::ErrorKind::NotFound => Problem::Missing,
        _ => Problem::Unreadable(error.to_string()),
    };
    CorpusError::BadInput(bad(file, line, problem))
}

fn read_text(
    file: &SourceFile,
    mut input: impl Read,
    sink: &mut dyn FnMut(Event<'_>) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let mut buffer = vec![0u8; BUFFER];
    let mut held = 0; // bytes of an incomplete character at the front of the buffer
    let mut offset = 0u64; // of the buffer's front in the file
    let mut started = false;
    loop {
        let read = match input.read(&mut buffer[held..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(|error| unreadable(file, None, &error))?,
        };
        let bytes = &buffer[..held + read];
        if let Some(at) = bytes[held..].iter().position(|&b| b == 0) {
            let problem = Problem::Binary(offset + (held + at) as u64);
            return Err(CorpusError::BadInput(bad(file, None, problem)));
        }
        let valid = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) if error.error_len().is_none() && read > 0 => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("checked")
            }
            Err(error) => {
                let problem = Problem::NotUtf8(offset + error.valid_up_to() as u64);
                return Err(CorpusError::BadInput(bad(file, None, problem)));
            }
        };
        let taken = valid.len();
        let text = match offset {
            0 => valid.strip_prefix(BYTE_ORDER_MARK).unwrap_or(valid),
            _ => valid,
        };
        if !text.is_empty() {
            if !started {
                sink(Event::Start(None))?;
                started = true;
            }
            sink(Event::Text(text))?;
        }
        held = bytes.len() - taken;
        offset += taken as u64;
        buffer.copy_within(taken..taken + held, 0);
        if read == 0 {
            break;
        }
    }
    if !started {
        return Err(CorpusError::BadInput(bad(file, None, Problem::Empty)));
    }
    sink(Event::End)
}

fn read_lines(
    file: &SourceFile,
    options: &ReadOptions,
    mut input: impl BufRead,
    sink: &mut dyn FnMut(Event<'_>) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let mut line = Vec::new();
    let mut offset = 0u64;
    let mut any = false;
    for number in 1u64.. {
        line.clear();
        let read = (&mut input)
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut line)
            .map_err(|error| unreadable(file, None, &error))? as u64;
        if read == 0 {
            break;
        }
        if read > MAX_LINE_BYTES {
            let problem = Problem::TooLarge(MAX_LINE_BYTES);
            return Err(CorpusError::BadInput(bad(file, Some(number), problem)));
        }
        let content = match offset {
            0 => line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&line),
            _ => &line,
        };
        if !content.trim_ascii().is_empty() {
            any = true;
            match text_of_line(content, options, offset) {
                Ok(text) => {
                    sink(Event::Start(Some(number)))?;
                    sink(Event::Text(&text))?;
                    sink(Event::End)?;
                }
                Err(problem) => sink(Event::Bad(bad(file, Some(number), problem)))?,
            }
        }
        offset += read;
    }
    if !any {
        return Err(CorpusError::BadInput(bad(file, None, Problem::Empty)));
    }
    Ok(())
}

fn text_of_line(line: &[u8], options: &ReadOptions, offset: u64) -> Result<String, Problem> {
    if let Some(at) = line.iter().position(|&b| b == 0) {
        return Err(Problem::Binary(offset + at as u64));
    }
    let line =
        std::str::from_utf8(line).map_err(|e| Problem::NotUtf8(offset + e.valid_up_to() as u64))?;
    if let Some(supervised) = &options.supervised {
        let record = supervised.record(line);
        record.map_err(|error| Problem::Record(error.to_string()))?;
        return Ok(line.to_owned());
    }
    let field = &options.text_field;
    let mut object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(line).map_err(|error| Problem::BadJson(error.to_string()))?;
    match object.remove(field) {
        Some(serde_json::Value::String(text)) if text.is_empty() => Err(Problem::Empty),
        Some(serde_json::Value::String(text)) => match text.bytes().position(|b| b == 0) {
            Some(at) => Err(Problem::Binary(at as u64)),
            None => Ok(text),
        },
        Some(_) => Err(Problem::NotAString(field.clone())),
        None => Err(Problem::NoField {
            field: field.clone(),
            present: present_fields(&object),
        }),
    }
}

fn present_fields(object: &serde_json::Map<String, serde_json::Value>) -> String {
    const SHOWN: usize = 8;
    if object.is_empty() {
        return "none".to_string();
    }
    let mut names: Vec<String> = object
        .keys()
        .take(SHOWN)
        .map(|name| format!("`{name}`"))
        .collect();
    if object.len() > SHOWN {
        names.push(format!("and {} more", object.len() - SHOWN));
    }
    names.join(", ")
}

/// Tells how many bytes pass.
struct Counted<'a, R> {
    inner: R,
    on_read: &'a dyn Fn(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        (self.on_read)(read as u64);
        Ok(read)
    }
}

/// Fails once more than `left` bytes have passed, and leaves 0 there.
struct Limited<'a, R> {
    inner: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        match self.left.get().checked_sub(read as u64) {
            Some(left) => self.left.set(left),
            None => {
                self.left.set(0);
                return Err(io::Error::other("over the size limit"));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(
        name: &str,
        bytes: &[u8],
        limit: Option<u64>,
    ) -> Result<(Vec<String>, Vec<BadInput>), CorpusError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("content");
        std::fs::write(&path, bytes).expect("write");
        let options = ReadOptions {
            text_field: "text".to_string(),
            supervised: None,
            max_file_bytes: limit,
        };
        let (mut documents, mut skipped) = (Vec::new(), Vec::new());
        read_documents(
            &SourceFile::new(name, path),
            &options,
            &|_| (),
            &mut |event| {
                match event {
                    Event::Start(_) => documents.push(String::new()),
                    Event::Text(text) => documents.last_mut().expect("started").push_str(text),
                    Event::End => {}
                    Event::Bad(bad) => skipped.push(bad),
                }
                Ok(())
            },
        )?;
        Ok((documents, skipped))
    }

    fn problem(name: &str, bytes: &[u8]) -> String {
        match read(name, bytes, None).expect_err("bad input") {
            CorpusError::BadInput(bad) => bad.to_string(),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn text_arrives_whole_across_buffers_and_packings() {
        let text = format!("\u{feff}{}", "a€😀é".repeat(BUFFER / 4));
        let expected = vec![text.strip_prefix('\u{feff}').expect("mark").to_string()];
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(text.as_bytes()).expect("gzip");
        let zst = zstd::encode_all(text.as_bytes(), 1).expect("zstd");
        assert_eq!(
            read("a.txt", text.as_bytes(), None).expect("plain").0,
            expected
        );
        assert_eq!(
            read("a.txt.gz", &gz.finish().expect("gzip"), None)
                .expect("gz")
                .0,
            expected
        );
        assert_eq!(read("a.txt.zst", &zst, None).expect("zst").0, expected);
    }

    #[test]
    fn bad_files_are_named_with_the_place() {
        assert_eq!(problem("a.txt", b""), "`a.txt` is empty");
        assert_eq!(problem("a.txt", "\u{feff}".as_bytes()), "`a.txt` is empty");
        assert_eq!(
            problem("a.txt", b"ab\0c"),
            "`a.txt` is binary: it has a NUL byte at byte 2"
        );
        assert_eq!(
            problem("a.txt", b"ab\xffc"),
            "`a.txt` is not UTF-8: byte 2 begins no valid character"
        );
        assert_eq!(
            problem("a.txt", b"ab\xe2\x82"),
            "`a.txt` is not UTF-8: byte 2 begins no valid character"
        );
        assert_eq!(problem("a.jsonl", b"\n \n"), "`a.jsonl` is empty");
        assert!(problem("a.txt.gz", b"not gzip").starts_with("`a.txt.gz` cannot be read: "));
        assert!(problem("a.txt.zst", b"not zstd").starts_with("`a.txt.zst` cannot be read: "));
    }

    #[test]
    fn a_truncated_archive_is_not_taken_for_a_short_file() {
        let whole = zstd::encode_all("word ".repeat(100_000).as_bytes(), 1).expect("zstd");
        assert!(
            problem("a.zst", &whole[..whole.len() / 2]).starts_with("`a.zst` cannot be read: ")
        );
    }

    #[test]
    fn an_archive_that_unpacks_to_more_than_the_limit_is_refused() {
        let zst = zstd::encode_all(&vec![b'a'; 1 << 20][..], 1).expect("zstd");
        assert!(read("a.zst", &zst, Some(1 << 20)).is_ok());
        let error = read("a.zst", &zst, Some((1 << 20) - 1)).expect_err("too large");
        assert!(
            error
                .to_string()
                .contains("holds more than 1048575 bytes of text"),
            "{error}"
        );
    }

    #[test]
    fn lines_are_documents_and_bad_ones_are_numbered() {
        let lines = concat!(
            "{\"text\": \"one\\ntwo\", \"id\": 1}\r\n",
            "\n",
            "{\"text\": 5}\n",
            "{\"body\": \"x\", \"id\": 2}\n",
            "{\"text\": \"\"}\n",
            "[1]\n",
            "{\"text\": \"last\"}"
        );
        let (documents, skipped) = read("a.jsonl", lines.as_bytes(), None).expect("read");
        assert_eq!(documents, ["one\ntwo", "last"]);
        let messages: Vec<String> = skipped.iter().map(ToString::to_string).collect();
        assert_eq!(
            messages[0],
            "`a.jsonl` line 3 has a field `text` that is not a string"
        );
        assert_eq!(
            messages[1],
            "`a.jsonl` line 4 has no text field `text`; its fields are `body`, `id`"
        );
        assert_eq!(messages[2], "`a.jsonl` line 5 is empty");
        assert!(
            messages[3].starts_with("`a.jsonl` line 6 is not a JSON object: invalid type"),
            "{}",
            messages[3]
        );
    }
}
