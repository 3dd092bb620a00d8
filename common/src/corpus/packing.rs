//! Unpacks: streams for whole files, blocks for the pages and buffers inside of Parquet and Arrow.
//!
//! Streams take bounded memory, whatever they say of themselves. A block says how large it will be; that is believed only
//! as far as its method can pack at all.

use std::io::{self, BufReader, Read};

use super::error::Problem;
use super::limits::MAX_LINE_BYTES;
use super::source::Compression;

const BUFFER: usize = 256 << 10;

/// What xz may take, in KiB: its strongest preset takes 65 MiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// What a file of that packing holds.
///
/// # Errors
/// A beginning that cannot be read.
pub(super) fn unpacked<'a>(
    compression: Compression,
    raw: impl Read + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    let buffered = BufReader::with_capacity(BUFFER, raw);
    Ok(match compression {
        Compression::None => Box::new(buffered),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(buffered)?),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(buffered)),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
            buffered,
            true,
            XZ_MEMORY_KIB,
        )),
    })
}

/// How a block inside of a file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
    /// Snappy, without a frame.
    Snappy,
    /// LZ4, without a frame.
    Lz4Raw,
    /// LZ4 in its frame.
    Lz4Frame,
}

/// Unpacks a block that says that it holds `declared` bytes.
///
/// # Errors
/// It holds another number of bytes, is torn, or says that it holds more than it can.
pub(super) fn unpack_block(codec: Codec, packed: &[u8], declared: u64) -> Result<Vec<u8>, Problem> {
    if declared > MAX_LINE_BYTES {
        return Err(Problem::TooLarge(MAX_LINE_BYTES));
    }
    let content = match codec {
        Codec::Gzip => at_most(flate2::bufread::MultiGzDecoder::new(packed), declared)?,
        Codec::Zstd => at_most(zstd::Decoder::with_buffer(packed)?, declared)?,
        Codec::Lz4Frame => at_most(lz4_flex::frame::FrameDecoder::new(packed), declared)?,
        // A copy of at most 64 bytes takes two bytes at least.
        Codec::Snappy => {
            let says = snap::raw::decompress_len(packed).map_err(torn)? as u64;
            believable(says.max(declared), packed, 32)?;
            snap::raw::Decoder::new()
                .decompress_vec(packed)
                .map_err(torn)?
        }
        // A byte adds at most 255 to the length of a copy.
        Codec::Lz4Raw => {
            believable(declared, packed, 256)?;
            lz4_flex::block::decompress(packed, declared as usize).map_err(torn)?
        }
    };
    match content.len() as u64 == declared {
        true => Ok(content),
        false => Err(Problem::Unreadable(format!(
            "a block of it holds {} bytes where it says {declared}",
            content.len()
        ))),
    }
}

/// Reads one byte more than there should be at most.
fn at_most(input: impl Read, declared: u64) -> Result<Vec<u8>, Problem> {
    let mut content = Vec::new();
    input.take(declared + 1).read_to_end(&mut content)?;
    Ok(content)
}

fn believable(declared: u64, packed: &[u8], ratio: u64) -> Result<(), Problem> {
    match declared <= (packed.len() as u64 + 1) * ratio {
        true => Ok(()),
        false => Err(Problem::Unreadable(format!(
            "a block of {} bytes says that it holds {declared}",
            packed.len()
        ))),
    }
}

fn torn(error: impl std::fmt::Display) -> Problem {
    Problem::Unreadable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const TEXT: &[u8] = b"the cat sat on the mat, the cat sat on the mat, the cat sat on the mat";

    fn packed(codec: Codec) -> Vec<u8> {
        match codec {
            Codec::Gzip => {
                let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                gz.write_all(TEXT).expect("write");
                gz.finish().expect("finish")
            }
            Codec::Zstd => zstd::encode_all(TEXT, 1).expect("zstd"),
            Codec::Snappy => snap::raw::Encoder::new()
                .compress_vec(TEXT)
                .expect("snappy"),
            Codec::Lz4Raw => lz4_flex::block::compress(TEXT),
            Codec::Lz4Frame => {
                let mut frame = lz4_flex::frame::FrameEncoder::new(Vec::new());
                frame.write_all(TEXT).expect("write");
                frame.finish().expect("finish")
            }
        }
    }

    #[test]
    fn blocks_hold_what_they_say_and_no_other_number_of_bytes() {
        let size = TEXT.len() as u64;
        for codec in [
            Codec::Gzip,
            Codec::Zstd,
            Codec::Snappy,
            Codec::Lz4Raw,
            Codec::Lz4Frame,
        ] {
            let packed = packed(codec);
            assert_eq!(unpack_block(codec, &packed, size), Ok(TEXT.to_vec()));
            for wrong in [0, size - 1, size + 1, 1 << 29, 1 << 40, u64::MAX] {
                assert!(unpack_block(codec, &packed, wrong).is_err(), "{codec:?}");
            }
            let torn = &packed[..packed.len() / 2];
            assert!(unpack_block(codec, torn, size).is_err(), "{codec:?}");
        }
    }
}
