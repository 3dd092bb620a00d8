//! Reads the documents of one source file as a stream of valid UTF-8: unpacks, checks, cuts lines, takes the text field.
//!
//! Memory is one buffer for text files, one line for `.jsonl`, one row or what a table packs together for `formats/`,
//! whatever the size of the file. A byte order mark at the start of a file is left out; nothing else is changed, line ends
//! included.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek, SeekFrom};

use super::error::{BadInput, CorpusError, Place, Problem};
use super::field::field_of;
use super::formats::{self, Next, RowText, Rows, Wanted};
use super::limits::{Limited, Limits, MAX_LINE_BYTES, MAX_SAMPLE_BYTES};
use super::objective::SupervisedConfig;
use super::packing::unpacked;
use super::source::{Compression, SourceFile, SourceKind};

const BUFFER: usize = 256 << 10;
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Takes what a file consists of.
type Sink<'a> = dyn FnMut(Event<'_>) -> Result<(), CorpusError> + 'a;

/// How files are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// The column of a table, or the field of a JSON object, that holds the text.
    pub text_field: String,
    /// Bound on the unpacked bytes of one file: a guard against files that unpack to more than anybody meant. Without it
    /// there is still a bound on how many times its size a file may unpack to.
    pub max_file_bytes: Option<u64>,
    /// Take lines whole, as samples of this kind, and refuse what is none.
    pub supervised: Option<SupervisedConfig>,
}

/// What a file consists of. Each document is `Start`, any number of `Text`, `End`.
#[derive(Debug)]
pub enum Event<'a> {
    /// A document begins, at this place of its file.
    Start(Option<Place>),
    /// More of its text, never empty.
    Text(&'a str),
    /// The document is complete.
    End,
    /// A line or row that cannot be used. The file goes on if the receiver does.
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
    sink: &mut Sink<'_>,
) -> Result<(), CorpusError> {
    let opened = File::open(&file.path).and_then(|raw| Ok((raw.metadata()?.len(), raw)));
    let (bytes, raw) = opened.map_err(|error| bad(file, None, error.into()))?;
    read_from(file, raw, bytes, options, on_read, sink)
}

/// The same, for a file whose content is in memory.
///
/// # Errors
/// As of [`read_documents`].
pub fn read_content(
    file: &SourceFile,
    content: &[u8],
    options: &ReadOptions,
    sink: &mut Sink<'_>,
) -> Result<(), CorpusError> {
    let bytes = content.len() as u64;
    read_from(file, Cursor::new(content), bytes, options, &|_| (), sink)
}

fn read_from(
    file: &SourceFile,
    raw: impl Read + Seek,
    bytes: u64,
    options: &ReadOptions,
    on_read: &dyn Fn(u64),
    sink: &mut Sink<'_>,
) -> Result<(), CorpusError> {
    let mut raw = Counted {
        inner: raw,
        on_read,
        left: bytes,
    };
    let of_file = |problem| bad(file, None, problem);
    let supervised = options.supervised.is_some();
    let limits = Limits::of(bytes, options.max_file_bytes);
    let wanted = match supervised {
        true => Wanted::Record,
        false => Wanted::Text(&options.text_field),
    };
    let documents = &mut Documents {
        file,
        options,
        limits: Limits::of(bytes, options.max_file_bytes),
        sink,
    };
    match file.kind {
        SourceKind::Archive => return Err(of_file(Problem::Archive)),
        SourceKind::Text | SourceKind::Warc if supervised => {
            return Err(of_file(Problem::NoRecords));
        }
        // Its end has to be read first, and what it has inside is packed already.
        SourceKind::Parquet if file.compression != Compression::None => {
            return Err(of_file(Problem::Unreadable(
                "a file of the kind `.parquet` is packed inside; unpack what was packed around it"
                    .into(),
            )));
        }
        SourceKind::Parquet => {
            let rows = formats::parquet::open(raw, bytes, wanted, &limits).map_err(of_file)?;
            return documents.rows(rows);
        }
        _ => {}
    }
    let contents = match (file.kind, file.compression) {
        (SourceKind::Arrow, Compression::None) => {
            formats::arrow::contents(&mut raw, bytes).map_err(of_file)?
        }
        _ => None,
    };
    let input = unpacked(file.compression, raw).map_err(|error| of_file(error.into()))?;
    let limited = Limited {
        inner: input,
        limits: &limits,
    };
    let input = BufReader::with_capacity(BUFFER, limited);
    let left = Cell::new(0);
    match file.kind {
        SourceKind::Jsonl => documents.lines(input),
        SourceKind::Json => documents.objects(formats::json::Objects::new(input)),
        SourceKind::Csv => {
            documents.rows(formats::csv::open(input, b',', wanted, &left).map_err(of_file)?)
        }
        SourceKind::Tsv => {
            documents.rows(formats::csv::open(input, b'\t', wanted, &left).map_err(of_file)?)
        }
        SourceKind::Arrow => {
            documents.rows(formats::arrow::open(input, contents, wanted, &limits).map_err(of_file)?)
        }
        SourceKind::Warc => documents.rows(formats::warc::Warc::new(input)),
        SourceKind::Text | SourceKind::Parquet | SourceKind::Archive => {
            read_text(file, input, documents.sink)
        }
    }
}

fn bad(file: &SourceFile, place: Option<Place>, problem: Problem) -> CorpusError {
    CorpusError::BadInput(BadInput {
        file: file.name.clone(),
        place,
        problem,
    })
}

fn read_text(
    file: &SourceFile,
    mut input: impl Read,
    sink: &mut Sink<'_>,
) -> Result<(), CorpusError> {
    let mut buffer = vec![0u8; BUFFER];
    let mut held = 0; // bytes of an incomplete character at the front of the buffer
    let mut offset = 0u64; // of the buffer's front in the file
    let mut started = false;
    loop {
        let read = match input.read(&mut buffer[held..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(|error| bad(file, None, error.into()))?,
        };
        let bytes = &buffer[..held + read];
        if let Some(at) = bytes[held..].iter().position(|&b| b == 0) {
            let problem = Problem::Binary(offset + (held + at) as u64);
            return Err(bad(file, None, problem));
        }
        let valid = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) if error.error_len().is_none() && read > 0 => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("checked")
            }
            Err(error) => {
                let problem = Problem::NotUtf8(offset + error.valid_up_to() as u64);
                return Err(bad(file, None, problem));
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
        return Err(bad(file, None, Problem::Empty));
    }
    sink(Event::End)
}

/// The documents of one file, on their way to whoever takes them.
struct Documents<'a, 'b> {
    file: &'a SourceFile,
    options: &'a ReadOptions,
    /// For the texts of rows, which may be larger than what was unpacked.
    limits: Limits,
    sink: &'a mut Sink<'b>,
}

impl Documents<'_, '_> {
    /// Sends one document, or says why it is none.
    fn send(&mut self, place: Place, text: Result<&str, Problem>) -> Result<(), CorpusError> {
        match text {
            Ok(text) => {
                (self.sink)(Event::Start(Some(place)))?;
                (self.sink)(Event::Text(text))?;
                (self.sink)(Event::End)
            }
            Err(problem) => {
                let CorpusError::BadInput(bad) = bad(self.file, Some(place), problem) else {
                    unreachable!("made as such");
                };
                (self.sink)(Event::Bad(bad))
            }
        }
    }

    fn lines(&mut self, mut input: impl BufRead) -> Result<(), CorpusError> {
        let mut line = Vec::new();
        let mut offset = 0u64;
        let mut any = false;
        for number in 1u64.. {
            line.clear();
            let read = (&mut input)
                .take(MAX_LINE_BYTES + 1)
                .read_until(b'\n', &mut line)
                .map_err(|error| bad(self.file, None, error.into()))? as u64;
            if read == 0 {
                break;
            }
            let place = Place::Line(number);
            if read > MAX_LINE_BYTES {
                let problem = Problem::TooLarge(MAX_LINE_BYTES);
                return Err(bad(self.file, Some(place), problem));
            }
            let content = match offset {
                0 => line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&line),
                _ => &line,
            };
            if !content.trim_ascii().is_empty() {
                any = true;
                let text = text_of_line(content, self.options, offset);
                self.send(place, text.as_deref().map_err(Clone::clone))?;
            }
            offset += read;
        }
        self.not_empty(any)
    }

    fn objects(
        &mut self,
        mut objects: formats::json::Objects<impl BufRead>,
    ) -> Result<(), CorpusError> {
        let mut object = Vec::new();
        for number in 1u64.. {
            object.clear();
            let place = Place::Row(number);
            let found = objects.next(&mut object);
            match found.map_err(|problem| bad(self.file, Some(place), problem))? {
                Some(offset) => {
                    let text = text_of_line(&object, self.options, offset);
                    self.send(place, text.as_deref().map_err(Clone::clone))?;
                }
                None => return self.not_empty(number > 1),
            }
        }
        Ok(())
    }

    fn rows(&mut self, mut rows: impl Rows) -> Result<(), CorpusError> {
        let mut text = RowText::default();
        for number in 1u64.. {
            let place = match self.file.kind {
                SourceKind::Warc => Place::Record(number),
                _ => Place::Row(number),
            };
            text.clear();
            let next = rows.next(&mut text).and_then(|next| {
                self.limits.take_document(text.as_str().len())?;
                Ok(next)
            });
            match next.map_err(|problem| bad(self.file, Some(place), problem))? {
                Next::Row => {
                    let checked = check_row(text.as_str(), self.options);
                    self.send(place, checked.map(|()| text.as_str()))?;
                }
                Next::Bad(problem) => self.send(place, Err(problem))?,
                Next::End => return self.not_empty(number > 1),
            }
        }
        Ok(())
    }

    fn not_empty(&self, any: bool) -> Result<(), CorpusError> {
        match any {
            true => Ok(()),
            false => Err(bad(self.file, None, Problem::Empty)),
        }
    }
}

/// What is asked of any text, and of a row that should be a sample.
fn check_row(text: &str, options: &ReadOptions) -> Result<(), Problem> {
    if text.is_empty() {
        return Err(Problem::Empty);
    }
    if let Some(at) = text.bytes().position(|b| b == 0) {
        return Err(Problem::Binary(at as u64));
    }
    match &options.supervised {
        Some(supervised) => check_sample(text, supervised),
        None => Ok(()),
    }
}

fn check_sample(line: &str, supervised: &SupervisedConfig) -> Result<(), Problem> {
    if line.len() as u64 > MAX_SAMPLE_BYTES {
        return Err(Problem::TooLarge(MAX_SAMPLE_BYTES));
    }
    match supervised.record(line) {
        Ok(_) => Ok(()),
        Err(error) => Err(Problem::Record(error.to_string())),
    }
}

fn text_of_line(line: &[u8], options: &ReadOptions, offset: u64) -> Result<String, Problem> {
    if let Some(at) = line.iter().position(|&b| b == 0) {
        return Err(Problem::Binary(offset + at as u64));
    }
    let line =
        std::str::from_utf8(line).map_err(|e| Problem::NotUtf8(offset + e.valid_up_to() as u64))?;
    if let Some(supervised) = &options.supervised {
        check_sample(line, supervised)?;
        return Ok(line.to_owned());
    }
    let text = field_of(line, &options.text_field)?;
    match text.bytes().position(|b| b == 0) {
        _ if text.is_empty() => Err(Problem::Empty),
        Some(at) => Err(Problem::Binary(at as u64)),
        None => Ok(text),
    }
}

/// Tells how many bytes pass, once each; those that are passed over count at the end.
struct Counted<'a, R> {
    inner: R,
    on_read: &'a dyn Fn(u64),
    left: u64,
}

impl<R> Counted<'_, R> {
    fn count(&mut self, read: u64) {
        let new = read.min(self.left);
        self.left -= new;
        (self.on_read)(new);
    }
}

impl<R> Drop for Counted<'_, R> {
    fn drop(&mut self) {
        self.count(self.left);
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count(read as u64);
        Ok(read)
    }
}

impl<R: Seek> Seek for Counted<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::super::objective::Objective;
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
    fn samples_of_any_format_are_bounded() {
        let supervised = SupervisedConfig::new(Objective::Sft, 16);
        let options = ReadOptions {
            text_field: "text".into(),
            max_file_bytes: None,
            supervised: Some(supervised),
        };
        let long = " ".repeat(MAX_SAMPLE_BYTES as usize + 1);
        let too_large = Problem::TooLarge(MAX_SAMPLE_BYTES);
        assert_eq!(check_row(&long, &options), Err(too_large.clone()));
        let line = text_of_line(long.as_bytes(), &options, 0);
        assert_eq!(line, Err(too_large));
        let short = r#"{"prompt": "a", "response": "b"}"#;
        assert_eq!(check_row(short, &options), Ok(()));
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
