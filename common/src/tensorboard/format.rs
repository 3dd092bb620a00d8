//! The bytes of an event file.
//!
//! A file is a row of records, as TensorFlow's TFRecord has them: length (u64, little-endian), masked CRC-32C of these 8
//! bytes, content, masked CRC-32C of the content. A record's content is a protobuf message `Event`. Of `Event`, `Summary`
//! and what they hold, the messages below have the fields that are used here, with the numbers of TensorFlow's
//! `event.proto`, `summary.proto`, `tensor.proto` and `tensor_shape.proto`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use prost::{Message, Oneof};

/// What the first event of a file says. From version 2 on a reader forgets old points only where it is told to.
const FILE_VERSION: &str = "brain.Event:2";

/// Bytes of a record, at most; a length above it is damage. Texts are far below it.
const LARGEST: u64 = 64 << 20;

/// Files of one second, at most.
const FILES: u32 = 1000;

/// `SessionLog.START`: the process was begun anew, and points from its step on no longer count.
const START: i32 = 1;

/// `DT_STRING` of TensorFlow's data types.
const DT_STRING: i32 = 7;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
struct Dimension {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// Writes an event file.
#[derive(Debug)]
pub struct Writer {
    out: BufWriter<File>,
    path: PathBuf,
}

impl Writer {
    /// Begins a file in a directory, behind those that are there. Its name has the time, in seconds, and the host.
    pub fn create(directory: &Path, host: &str, time_ms: u64) -> io::Result<Self> {
        let host: String = host
            .chars()
            .map(|c| match c.is_ascii_alphanumeric() || "-_.".contains(c) {
                true => c,
                false => '_',
            })
            .collect();
        let seconds = time_ms / 1000;
        for number in 0..FILES {
            let path = directory.join(format!(
                "events.out.tfevents.{seconds:010}.{host}.{number:03}"
            ));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let out = BufWriter::new(file);
                    let mut writer = Self { out, path };
                    let version = What::FileVersion(FILE_VERSION.into());
                    writer.event(time_ms, 0, version)?;
                    return Ok(writer);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(ErrorKind::AlreadyExists.into())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Points of several curves at one step.
    pub fn scalars(&mut self, time_ms: u64, step: u64, points: &[(&str, f64)]) -> io::Result<()> {
        let value = |(tag, value): &(&str, f64)| Value {
            tag: (*tag).to_owned(),
            metadata: None,
            content: Some(Content::SimpleValue(*value as f32)),
        };
        let value = points.iter().map(value).collect();
        self.event(time_ms, step, What::Summary(Summary { value }))
    }

    /// A text at a step. TensorBoard reads it as Markdown.
    pub fn text(&mut self, time_ms: u64, step: u64, tag: &str, text: &str) -> io::Result<()> {
        let plugin_name = "text".to_owned();
        let value = Value {
            tag: tag.to_owned(),
            metadata: Some(Metadata {
                plugin_data: Some(PluginData { plugin_name }),
            }),
            content: Some(Content::Tensor(Tensor {
                dtype: DT_STRING,
                shape: Some(Shape {
                    dim: vec![Dimension { size: 1 }],
                }),
                string_val: vec![text.as_bytes().to_vec()],
            })),
        };
        let value = vec![value];
        self.event(time_ms, step, What::Summary(Summary { value }))
    }

    /// Points from `step` on that were written before no longer count.
    pub fn restart(&mut self, time_ms: u64, step: u64) -> io::Result<()> {
        self.event(
            time_ms,
            step,
            What::SessionLog(SessionLog { status: START }),
        )
    }

    /// Hands what was written to the operating system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn event(&mut self, time_ms: u64, step: u64, what: What) -> io::Result<()> {
        let event = Event {
            wall_time: time_ms as f64 / 1000.0,
            step: step as i64,
            what: Some(what),
        };
        self.out.write_all(&record(&event.encode_to_vec()))
    }
}

/// A record with its length and checksums.
fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(content.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(content);
    record.extend(masked_crc(content).to_le_bytes());
    record
}

/// CRC-32C (Castagnoli), rotated by 15 bits and with a constant added, so that a checksum of bytes that hold a checksum
/// does not become a special one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| CRC32C[(crc as u8 ^ byte) as usize] ^ (crc >> 8);
    !bytes.iter().fold(!0, step)
}

/// The remainder of each byte, for the polynomial 0x1EDC6F41 with its bits reversed.
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// What stands in an event file.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A point of a curve.
    Scalar {
        /// The curve.
        tag: String,
        /// The step.
        step: u64,
        /// When, in milliseconds since the epoch.
        time_ms: u64,
        /// The value.
        value: f32,
    },
    /// A text.
    Text {
        /// What it is about.
        tag: String,
        /// The step.
        step: u64,
        /// The text.
        text: String,
    },
    /// Points from a step on that stand before this no longer count.
    Restart {
        /// The step.
        step: u64,
    },
}

/// Reads a file up to its end, or up to a record that was cut off or damaged, as TensorBoard does.
pub fn read(path: &Path, mut take: impl FnMut(Item)) -> io::Result<()> {
    let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
    while let Some(content) = next_record(&mut file)? {
        let Ok(event) = Event::decode(content.as_slice()) else {
            return Ok(());
        };
        items(event).into_iter().for_each(&mut take);
    }
    Ok(())
}

/// The next record's content; `None` where there is none that is whole.
fn next_record(file: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut head = [0; 12];
    if !filled(file, &mut head)? {
        return Ok(None);
    }
    let (length, crc) = head.split_at(8);
    let length_is_right = masked_crc(length).to_le_bytes() == crc;
    let length = u64::from_le_bytes(length.try_into().expect("8 bytes"));
    if !length_is_right || length > LARGEST {
        return Ok(None);
    }
    let mut content = vec![0; length as usize];
    let mut crc = [0; 4];
    let whole = filled(file, &mut content)? && filled(file, &mut crc)?;
    Ok((whole && masked_crc(&content).to_le_bytes() == crc).then_some(content))
}

/// Reads exactly so many bytes; false at the end of the file.
fn filled(file: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn items(event: Event) -> Vec<Item> {
    let step = event.step as u64;
    let time_ms = (event.wall_time * 1000.0).round() as u64;
    match event.what {
        Some(What::Summary(summary)) => summary
            .value
            .into_iter()
            .filter_map(|value| item(value, step, time_ms))
            .collect(),
        Some(What::SessionLog(log)) if log.status == START => vec![Item::Restart { step }],
        _ => Vec::new(),
    }
}

fn item(value: Value, step: u64, time_ms: u64) -> Option<Item> {
    let tag = value.tag;
    Some(match value.content? {
        Content::SimpleValue(value) => Item::Scalar {
            tag,
            step,
            time_ms,
            value,
        },
        Content::Tensor(tensor) => Item::Text {
            tag,
            step,
            text: String::from_utf8_lossy(tensor.string_val.first()?).into_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From RFC 3720, B.4, and the check value of the CRC catalogue.
    #[test]
    fn the_checksum_is_crc_32c() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&rising), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// What TensorBoard 2.21 writes, in Python:
    ///
    /// ```python
    /// from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    /// from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    /// from tensorboard.compat.proto.tensor_pb2 import TensorProto
    /// from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    /// from tensorboard.summary.writer.record_writer import RecordWriter
    /// meta = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    /// shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    /// text = TensorProto(dtype=7, tensor_shape=shape, string_val=[b"once"])
    /// out = open("golden", "wb")
    /// records = RecordWriter(out)
    /// for event in [
    ///     Event(wall_time=1700000000.25, file_version="brain.Event:2"),
    ///     Event(wall_time=1700000001.5, step=7, summary=Summary(value=[
    ///         Summary.Value(tag="train/loss", simple_value=2.5),
    ///         Summary.Value(tag="train/mfu", simple_value=0.0)])),
    ///     Event(wall_time=1700000002.0, step=5, session_log=SessionLog(status=SessionLog.START)),
    ///     Event(wall_time=1700000003.0, step=5, summary=Summary(value=[
    ///         Summary.Value(tag="samples/0", metadata=meta, tensor=text)])),
    /// ]:
    ///     records.write(event.SerializeToString())
    /// out.close()
    /// print(open("golden", "rb").read().hex())
    /// ```
    const GOLDEN: &str = "\
         1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe93200000000000000\
         241956ec0900006040fc54d94110072a250a110a0a747261696e2f6c6f737315000020400a100a09747261696e2f6d66\
         7515000000001e3269630f000000000000006d532b090900008040fc54d94110053a0208019401ccfd34000000000000\
         005e33175c090000c040fc54d94110052a270a250a0973616d706c65732f30420e080712041202080142046f6e63654a\
         080a060a047465787478bfdba3";

    #[test]
    fn the_bytes_are_those_of_tensorboard() {
        let (_dir, path) = written(|writer| {
            let points = [("train/loss", 2.5), ("train/mfu", 0.0)];
            writer.scalars(1_700_000_001_500, 7, &points).unwrap();
            writer.restart(1_700_000_002_000, 5).unwrap();
            let text = writer.text(1_700_000_003_000, 5, "samples/0", "once");
            text.unwrap();
        });
        let bytes = std::fs::read(path).unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
    }

    fn written(write: impl FnOnce(&mut Writer)) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(dir.path(), "host", 1_700_000_000_250).unwrap();
        write(&mut writer);
        writer.flush().unwrap();
        let path = writer.path().to_owned();
        (dir, path)
    }

    #[test]
    fn what_is_written_is_read_again_up_to_where_it_was_cut_off() {
        let (_dir, path) = written(|writer| {
            let points = [("a/b", 1.5), ("c", f64::NAN)];
            writer.scalars(1_700_000_001_375, 7, &points).unwrap();
            writer.restart(1_700_000_002_000, 5).unwrap();
            writer.text(1_700_000_003_000, 5, "d", "täxt").unwrap();
        });
        let all = |path: &Path| {
            let mut items = Vec::new();
            read(path, |item| items.push(item)).unwrap();
            items
        };
        let items = all(&path);
        assert_eq!(items.len(), 4);
        assert_eq!(
            items[0],
            Item::Scalar {
                tag: "a/b".into(),
                step: 7,
                time_ms: 1_700_000_001_375,
                value: 1.5
            }
        );
        assert!(matches!(&items[1], Item::Scalar { value, .. } if value.is_nan()));
        assert_eq!(items[2], Item::Restart { step: 5 });
        assert_eq!(
            items[3],
            Item::Text {
                tag: "d".into(),
                step: 5,
                text: "täxt".into()
            }
        );
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let left = all(&path);
            assert!(left.len() < 4 && left.len() != 1, "{cut}: {left:?}");
        }
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(all(&path).len(), 3);
    }

    #[test]
    fn files_of_one_second_do_not_replace_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..3)
            .map(|_| {
                let writer = Writer::create(dir.path(), "a/b", 1_700_000_000_999).unwrap();
                let name = writer.path().file_name().unwrap();
                name.to_string_lossy().into_owned()
            })
            .collect();
        assert_eq!(names[0], "events.out.tfevents.1700000000.a_b.000");
        assert_eq!(names[2], "events.out.tfevents.1700000000.a_b.002");
    }
}
