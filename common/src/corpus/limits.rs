//! Bounds on what one file may become: how much it unpacks to, and how much text a row of it has.
//!
//! Nobody knows how large a packed file is before it is unpacked, and what it says itself is not trusted. So whatever comes
//! out is counted, and the reading ends where a bound is met. Memory is no matter of these bounds: each format bounds its own.

use std::cell::Cell;
use std::io::{self, Read};

use super::error::Problem;

/// A line, a cell, a row or a page of more bytes is refused: it has to be held in memory as a whole.
pub(super) const MAX_LINE_BYTES: u64 = 1 << 30;

/// A sample of more bytes is refused: what it says is held as values, of which a number takes 16 times its size.
pub(super) const MAX_SAMPLE_BYTES: u64 = 64 << 20;

/// How many times its size a file may unpack to, once it is above [`ALWAYS`]. Text is packed 3 to 30 times smaller; what is
/// packed a thousand times smaller says the same again and again.
const MAX_RATIO: u64 = 1000;

/// Bytes that any file may unpack to.
const ALWAYS: u64 = 256 << 20;

/// What a document counts for besides its text, so that a small file is not a billion empty rows.
const PER_DOCUMENT: u64 = 16;

/// What one file may still become.
pub(super) struct Limits {
    left: Cell<u64>,
    problem: Problem,
}

impl Limits {
    /// For a file of `bytes` bytes, of which nobody wants more than `asked`.
    pub fn of(bytes: u64, asked: Option<u64>) -> Self {
        let by_ratio = bytes.saturating_mul(MAX_RATIO).saturating_add(ALWAYS);
        let (left, problem) = match asked {
            Some(asked) if asked <= by_ratio => (asked, Problem::TooLarge(asked)),
            _ => (by_ratio, Problem::Bomb(MAX_RATIO)),
        };
        Self {
            left: Cell::new(left),
            problem,
        }
    }

    /// Counts bytes that have come out.
    ///
    /// # Errors
    /// They are more than the file may become.
    pub fn take(&self, bytes: u64) -> Result<(), Problem> {
        match self.left.get().checked_sub(bytes) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => Err(self.problem.clone()),
        }
    }

    /// Counts a document.
    ///
    /// # Errors
    /// As of [`Self::take`].
    pub fn take_document(&self, bytes: usize) -> Result<(), Problem> {
        self.take(PER_DOCUMENT + bytes as u64)
    }
}

/// Counts what passes, and fails where it is too much.
pub(super) struct Limited<'a, R> {
    pub inner: R,
    pub limits: &'a Limits,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.limits.take(read as u64).map_err(io::Error::other)?;
        Ok(read)
    }
}

/// Bytes that a reader of tables keeps of each cell besides its text.
const PER_CELL: u64 = 8;

/// Fails once `left` bytes have passed, where each `separator` counts for a cell; whoever has it sets it anew for each row.
pub(super) struct PerRow<'a, R> {
    pub inner: R,
    pub separator: u8,
    pub left: &'a Cell<u64>,
}

impl<R: Read> Read for PerRow<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let too_large = || io::Error::other(Problem::TooLarge(MAX_LINE_BYTES));
        let separators = buffer[..read].iter().filter(|&&b| b == self.separator);
        let taken = read as u64 + PER_CELL * separators.count() as u64;
        let left = self.left.get().checked_sub(taken);
        self.left.set(left.ok_or_else(too_large)?);
        Ok(read)
    }
}

impl From<io::Error> for Problem {
    /// What is wrong, where it was one of ours that travelled as an I/O error.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::UnexpectedEof => Self::Unreadable("it ends too early".into()),
            _ => match error.downcast::<Self>() {
                Ok(problem) => problem,
                Err(error) => Self::Unreadable(error.to_string()),
            },
        }
    }
}

/// Reads exactly `bytes` bytes, and takes memory as they come.
///
/// # Errors
/// The end comes before.
pub(super) fn read_bytes(input: &mut impl Read, bytes: u64) -> Result<Vec<u8>, Problem> {
    let mut content = Vec::new();
    let read = input.take(bytes).read_to_end(&mut content)?;
    match read as u64 == bytes {
        true => Ok(content),
        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

/// Passes over exactly `bytes` bytes.
///
/// # Errors
/// The end comes before.
pub(super) fn skip_bytes(input: &mut impl Read, bytes: u64) -> Result<(), Problem> {
    let skipped = io::copy(&mut input.take(bytes), &mut io::sink())?;
    match skipped == bytes {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_and_what_no_text_does_are_bounds() {
        let limits = Limits::of(10, Some(100));
        assert!(limits.take(60).is_ok() && limits.take(40).is_ok());
        assert_eq!(limits.take(1), Err(Problem::TooLarge(100)));
        let limits = Limits::of(10, None);
        assert!(limits.take(ALWAYS + 10 * MAX_RATIO).is_ok());
        assert_eq!(limits.take(1), Err(Problem::Bomb(MAX_RATIO)));
    }

    #[test]
    fn a_problem_survives_as_an_error_of_a_reader() {
        let limits = Limits::of(3, Some(3));
        let mut limited = Limited {
            inner: &b"four"[..],
            limits: &limits,
        };
        let error = limited.read_to_end(&mut Vec::new()).expect_err("too much");
        assert_eq!(Problem::from(error), Problem::TooLarge(3));
    }

    #[test]
    fn cells_without_text_count_as_well() {
        let row = |left: u64| {
            let left = Cell::new(left);
            let mut row = PerRow {
                inner: &b"a,,,b"[..],
                separator: b',',
                left: &left,
            };
            row.read_to_end(&mut Vec::new())
        };
        let error = row(5 + 3 * PER_CELL - 1).expect_err("too much");
        assert_eq!(Problem::from(error), Problem::TooLarge(MAX_LINE_BYTES));
        assert_eq!(row(5 + 3 * PER_CELL).expect("enough"), 5);
    }

    #[test]
    fn what_is_declared_is_not_believed() {
        assert!(read_bytes(&mut &b"abc"[..], u64::MAX).is_err());
        assert_eq!(read_bytes(&mut &b"abc"[..], 2), Ok(b"ab".to_vec()));
    }
}
