//! FlatBuffers, as far as Arrow's messages need them: tables, vectors and strings in a buffer that nobody trusts. Each
//! access is checked against the end of the buffer, so no pass over it is needed before.

use super::super::super::error::Problem;

/// A table in a buffer.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A vector in a buffer.
#[derive(Clone, Copy)]
pub(super) struct Vector<'a> {
    bytes: &'a [u8],
    at: usize,
    len: usize,
}

/// Where a message does not hold together.
pub(super) fn torn() -> Problem {
    Problem::Unreadable("a message in it is damaged".into())
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Problem> {
    let end = at.checked_add(N).ok_or_else(torn)?;
    let found = bytes.get(at..end).ok_or_else(torn)?;
    Ok(found.try_into().expect("of that length"))
}

/// What an offset at `at` points to.
fn follow(bytes: &[u8], at: usize) -> Result<usize, Problem> {
    let offset = u32::from_le_bytes(array(bytes, at)?) as usize;
    at.checked_add(offset)
        .filter(|target| *target < bytes.len())
        .ok_or_else(torn)
}

impl<'a> Table<'a> {
    /// The table that a buffer is for.
    pub fn root(bytes: &'a [u8]) -> Result<Self, Problem> {
        let at = follow(bytes, 0)?;
        Ok(Self { bytes, at })
    }

    /// Where field number `field` lies, if it is there.
    fn field(&self, field: usize) -> Result<Option<usize>, Problem> {
        let back = i32::from_le_bytes(array(self.bytes, self.at)?);
        let vtable = usize::try_from(self.at as i64 - i64::from(back)).map_err(|_| torn())?;
        let size = u16::from_le_bytes(array(self.bytes, vtable)?) as usize;
        let entry = 4 + 2 * field;
        if entry + 2 > size {
            return Ok(None);
        }
        match u16::from_le_bytes(array(self.bytes, vtable + entry)?) {
            0 => Ok(None),
            offset => Ok(Some(self.at + offset as usize)),
        }
    }

    /// A number, of the bytes that `read` takes, or what it is when it is not there.
    fn number<const N: usize, T>(
        &self,
        field: usize,
        absent: T,
        read: fn([u8; N]) -> T,
    ) -> Result<T, Problem> {
        match self.field(field)? {
            Some(at) => Ok(read(array(self.bytes, at)?)),
            None => Ok(absent),
        }
    }

    pub fn byte(&self, field: usize) -> Result<u8, Problem> {
        self.number(field, 0, u8::from_le_bytes)
    }

    pub fn flag(&self, field: usize) -> Result<bool, Problem> {
        Ok(self.byte(field)? != 0)
    }

    pub fn short(&self, field: usize) -> Result<i16, Problem> {
        self.number(field, 0, i16::from_le_bytes)
    }

    pub fn int(&self, field: usize) -> Result<i32, Problem> {
        self.number(field, 0, i32::from_le_bytes)
    }

    pub fn long(&self, field: usize) -> Result<i64, Problem> {
        self.number(field, 0, i64::from_le_bytes)
    }

    /// A table that this one points to.
    pub fn table(&self, field: usize) -> Result<Option<Self>, Problem> {
        let Some(at) = self.field(field)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            bytes: self.bytes,
            at: follow(self.bytes, at)?,
        }))
    }

    /// A vector of elements of `size` bytes; empty where it is not there.
    pub fn vector(&self, field: usize, size: usize) -> Result<Vector<'a>, Problem> {
        let (at, len) = match self.field(field)? {
            Some(at) => {
                let at = follow(self.bytes, at)?;
                let len = u32::from_le_bytes(array(self.bytes, at)?) as usize;
                (at + 4, len)
            }
            None => (0, 0),
        };
        let room = (self.bytes.len() - at.min(self.bytes.len())) / size;
        match len <= room {
            true => Ok(Vector {
                bytes: self.bytes,
                at,
                len,
            }),
            false => Err(torn()),
        }
    }

    /// A text; empty where it is not there.
    pub fn text(&self, field: usize) -> Result<&'a str, Problem> {
        let vector = self.vector(field, 1)?;
        let bytes = &self.bytes[vector.at..vector.at + vector.len];
        std::str::from_utf8(bytes).map_err(|_| torn())
    }
}

impl<'a> Vector<'a> {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Element `index` of a vector of tables.
    pub fn table(&self, index: usize) -> Result<Table<'a>, Problem> {
        Ok(Table {
            bytes: self.bytes,
            at: follow(self.bytes, self.at + 4 * index)?,
        })
    }

    /// A number at byte `at` of the vector.
    pub fn long(&self, at: usize) -> Result<i64, Problem> {
        Ok(i64::from_le_bytes(array(self.bytes, self.at + at)?))
    }
}
