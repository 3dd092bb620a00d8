//! Thrift's compact protocol, as far as Parquet's headers need it: a cursor that reads numbers, texts, lists and structures,
//! and passes over what nobody asks for. Nothing is reserved by a length that is only declared.

use super::super::super::error::Problem;

/// How deep structures may lie in each other.
const MAX_DEPTH: usize = 32;

/// What a field or an element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A truth that lies in the kind itself.
    Flag(bool),
    Byte,
    /// 16, 32 or 64 bits, all written alike.
    Int,
    Double,
    Bytes,
    List,
    Map,
    Struct,
}

/// Where in the bytes the reading stands.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// What does not hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Torn {
    /// More bytes are needed.
    Short,
    /// More bytes do not help.
    Wrong,
}

impl From<Torn> for Problem {
    fn from(_: Torn) -> Self {
        damaged("a header")
    }
}

/// What is said of a part of a file that is not as it should be.
pub(super) fn damaged(what: &str) -> Problem {
    Problem::Unreadable(format!("{what} in it is damaged"))
}

type Read<T> = Result<T, Torn>;

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes that were read.
    pub fn position(&self) -> usize {
        self.at
    }

    fn byte(&mut self) -> Read<u8> {
        let byte = *self.bytes.get(self.at).ok_or(Torn::Short)?;
        self.at += 1;
        Ok(byte)
    }

    fn varint(&mut self) -> Read<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Torn::Wrong)
    }

    /// A number of 16, 32 or 64 bits.
    pub fn int(&mut self) -> Read<i64> {
        let zigzag = self.varint()?;
        Ok((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
    }

    /// A number that cannot be negative.
    pub fn size(&mut self) -> Read<u64> {
        u64::try_from(self.int()?).map_err(|_| Torn::Wrong)
    }

    /// Bytes, perhaps of a text.
    pub fn bytes(&mut self) -> Read<&'a [u8]> {
        let length = usize::try_from(self.varint()?).map_err(|_| Torn::Wrong)?;
        let end = self.at.checked_add(length).ok_or(Torn::Wrong)?;
        let bytes = self.bytes.get(self.at..end).ok_or(Torn::Short)?;
        self.at = end;
        Ok(bytes)
    }

    fn kind(number: u8) -> Read<Kind> {
        Ok(match number {
            1 => Kind::Flag(true),
            2 => Kind::Flag(false),
            3 => Kind::Byte,
            4..=6 => Kind::Int,
            7 => Kind::Double,
            8 => Kind::Bytes,
            9 | 10 => Kind::List,
            11 => Kind::Map,
            12 => Kind::Struct,
            _ => return Err(Torn::Wrong),
        })
    }

    /// Reads a structure: `field` is told the number and the kind of each of its fields, and takes its value or passes over
    /// it.
    pub fn structure(
        &mut self,
        field: &mut dyn FnMut(&mut Self, i64, Kind) -> Read<()>,
    ) -> Read<()> {
        let mut number = 0i64;
        loop {
            let byte = self.byte()?;
            if byte == 0 {
                return Ok(());
            }
            number = match byte >> 4 {
                0 => self.int()?,
                delta => number.saturating_add(delta.into()),
            };
            field(self, number, Self::kind(byte & 0x0f)?)?;
        }
    }

    /// Reads a list: `element` is called for each of its elements.
    pub fn list(&mut self, element: &mut dyn FnMut(&mut Self, Kind) -> Read<()>) -> Read<()> {
        let byte = self.byte()?;
        let size = match byte >> 4 {
            15 => self.varint()?,
            size => size.into(),
        };
        let kind = Self::kind(byte & 0x0f)?;
        for _ in 0..size {
            // No element is smaller than a byte, so a length without elements ends here.
            element(self, kind)?;
        }
        Ok(())
    }

    /// Passes over a value.
    pub fn skip(&mut self, kind: Kind) -> Read<()> {
        self.skip_within(kind, 0, false)
    }

    fn skip_within(&mut self, kind: Kind, depth: usize, element: bool) -> Read<()> {
        if depth > MAX_DEPTH {
            return Err(Torn::Wrong);
        }
        match kind {
            // Of an element it is a byte of its own.
            Kind::Flag(_) if !element => Ok(()),
            Kind::Flag(_) | Kind::Byte => self.byte().map(|_| ()),
            Kind::Int => self.varint().map(|_| ()),
            Kind::Double => (0..8).try_for_each(|_| self.byte().map(|_| ())),
            Kind::Bytes => self.bytes().map(|_| ()),
            Kind::List => self.list(&mut |cursor, kind| cursor.skip_within(kind, depth + 1, true)),
            Kind::Map => {
                let size = self.varint()?;
                if size == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                let (key, value) = (Self::kind(kinds >> 4)?, Self::kind(kinds & 0x0f)?);
                for _ in 0..size {
                    self.skip_within(key, depth + 1, true)?;
                    self.skip_within(value, depth + 1, true)?;
                }
                Ok(())
            }
            Kind::Struct => {
                self.structure(&mut |cursor, _, kind| cursor.skip_within(kind, depth + 1, false))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_others_passed_over() {
        // Field 1: -3. Field 3: "ab". Field 20: a list of two empty structures. Field 21: true.
        let bytes = [0x15, 5, 0x28, 2, b'a', b'b', 0x09, 40, 0x2c, 0, 0, 0x11, 0];
        let mut cursor = Cursor::new(&bytes);
        let mut found = Vec::new();
        let read = cursor.structure(&mut |cursor, number, kind| {
            found.push((number, kind));
            match number {
                1 => assert_eq!(cursor.int(), Ok(-3)),
                _ => cursor.skip(kind)?,
            }
            Ok(())
        });
        assert_eq!((read, cursor.position()), (Ok(()), bytes.len()));
        let kinds = [Kind::Int, Kind::Bytes, Kind::List, Kind::Flag(true)];
        assert_eq!(
            found,
            [1, 3, 20, 21].into_iter().zip(kinds).collect::<Vec<_>>()
        );
    }

    #[test]
    fn lengths_that_are_only_declared_cost_nothing() {
        let skip = |bytes: &[u8], kind| Cursor::new(bytes).skip(kind);
        let long = [0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        assert_eq!(
            skip(&[&[0xf8][..], &long].concat(), Kind::List),
            Err(Torn::Short)
        );
        assert_eq!(skip(&long, Kind::Bytes), Err(Torn::Short));
        assert_eq!(
            skip(&[&long[..], &[0x11]].concat(), Kind::Map),
            Err(Torn::Short)
        );
        assert_eq!(skip(&[0x1c; 100], Kind::Struct), Err(Torn::Wrong));
        assert_eq!(skip(&[0x19; 100], Kind::List), Err(Torn::Wrong));
    }
}
