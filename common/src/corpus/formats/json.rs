//! Files named `.json`: an array of objects, or objects one after another, as many data sets have them. They are cut into
//! objects here, one in memory at a time; what an object says is read like a line of `.jsonl`.

use std::io::{BufRead, ErrorKind};

use super::super::error::Problem;
use super::super::limits::MAX_LINE_BYTES;

/// Where in the file the cutter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before everything.
    Start,
    /// In an array, before its first element or its end.
    ArrayStart,
    /// In an array, behind an element.
    Behind,
    /// In an array, behind a comma.
    Comma,
    /// Between objects without an array.
    Between,
    /// Behind the array.
    End,
}

/// A file that is cut into its objects.
pub(in super::super) struct Objects<R> {
    input: R,
    state: State,
    offset: u64,
}

impl<R: BufRead> Objects<R> {
    /// At the start of `input`.
    pub fn new(input: R) -> Self {
        Self {
            input,
            state: State::Start,
            offset: 0,
        }
    }

    /// Appends the bytes of the next object to `object`, and says at which byte of the file it begins; `None` at the end.
    ///
    /// # Errors
    /// What is no array of objects, and no objects one after another.
    pub fn next(&mut self, object: &mut Vec<u8>) -> Result<Option<u64>, Problem> {
        loop {
            let byte = self.peek()?;
            let next = match (self.state, byte) {
                (_, Some(b' ' | b'\t' | b'\r' | b'\n')) => self.state,
                (State::Start | State::Between | State::End, None) => return Ok(None),
                (_, None) => return Err(wrong("it ends within its array")),
                // A mark of the byte order, which is no JSON, but is met.
                (State::Start, Some(0xef | 0xbb | 0xbf)) => State::Start,
                (State::Start, Some(b'[')) => State::ArrayStart,
                (State::ArrayStart | State::Behind, Some(b']')) => State::End,
                (State::Behind, Some(b',')) => State::Comma,
                (State::ArrayStart | State::Comma, Some(b'{')) => {
                    self.state = State::Behind;
                    return self.object(object).map(Some);
                }
                (State::Start | State::Between, Some(b'{')) => {
                    self.state = State::Between;
                    return self.object(object).map(Some);
                }
                (State::End, Some(_)) => return Err(wrong("something follows its array")),
                (State::Behind, Some(_)) => {
                    return Err(wrong("there is no comma between two of its objects"));
                }
                _ => return Err(wrong("it is no array of JSON objects")),
            };
            self.state = next;
            self.input.consume(1);
            self.offset += 1;
        }
    }

    fn peek(&mut self) -> Result<Option<u8>, Problem> {
        Ok(self.fill()?.first().copied())
    }

    fn fill(&mut self) -> Result<&[u8], Problem> {
        loop {
            match self.input.fill_buf() {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        // What is buffered is there without another read.
        Ok(self.input.fill_buf()?)
    }

    /// Takes one object: braces and brackets count, but for those in strings.
    fn object(&mut self, object: &mut Vec<u8>) -> Result<u64, Problem> {
        let begin = self.offset;
        let (mut depth, mut string, mut escaped) = (0u64, false, false);
        loop {
            let buffer = self.fill()?;
            if buffer.is_empty() {
                return Err(wrong("it ends within an object"));
            }
            let mut taken = buffer.len();
            for (at, byte) in buffer.iter().enumerate() {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if string => escaped = true,
                    b'"' => string = !string,
                    b'{' | b'[' if !string => depth += 1,
                    b'}' | b']' if !string => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    taken = at + 1;
                    break;
                }
            }
            if (object.len() + taken) as u64 > MAX_LINE_BYTES {
                return Err(Problem::TooLarge(MAX_LINE_BYTES));
            }
            object.extend_from_slice(&buffer[..taken]);
            self.input.consume(taken);
            self.offset += taken as u64;
            if depth == 0 {
                return Ok(begin);
            }
        }
    }
}

fn wrong(what: &str) -> Problem {
    Problem::Unreadable(format!(
        "{what}; a file `.json` is an array of objects, or objects one after another"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    fn objects(text: &str) -> Result<Vec<String>, String> {
        // Buffers end everywhere.
        let mut objects = Objects::new(BufReader::with_capacity(2, text.as_bytes()));
        let mut found = Vec::new();
        loop {
            let mut object = Vec::new();
            match objects.next(&mut object) {
                Ok(Some(_)) => found.push(String::from_utf8(object).expect("text")),
                Ok(None) => return Ok(found),
                Err(problem) => return Err(problem.to_string()),
            }
        }
    }

    #[test]
    fn arrays_and_sequences_are_cut_into_objects() {
        let one = r#"{"a": "}\"{[", "b": [{}]}"#;
        let both = Ok(vec![one.to_owned(), "{}".to_owned()]);
        assert_eq!(objects(&format!(" [\n{one} ,\n{{}}]\n")), both);
        assert_eq!(objects(&format!("{one}\n{{}}\n")), both);
        assert_eq!(objects(&format!("\u{feff}[{one},{{}}]")), both);
        assert_eq!(objects("[]"), Ok(vec![]));
        assert_eq!(objects(""), Ok(vec![]));
    }

    #[test]
    fn what_is_something_else_is_refused() {
        for (text, said) in [
            ("[{}{}]", "there is no comma"),
            ("[{},]", "it is no array"),
            ("[1]", "it is no array"),
            ("\"text\"", "it is no array"),
            ("[{}", "it ends within its array"),
            ("[{\"a\": ", "it ends within an object"),
            ("[{}] {}", "something follows"),
        ] {
            let found = objects(text).expect_err(text);
            assert!(found.contains(said), "{text}: {found}");
        }
    }
}
