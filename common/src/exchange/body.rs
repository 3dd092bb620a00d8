//! Messages of the exchange as they travel: gRPC's frames on an HTTP body, as any gRPC peer reads and writes them. A codec of
//! tonic copies a message once on its way out and once on its way in, which for gradients is a third of all work. Here the
//! data of a chunk leaves from where it lies and is read where it arrived.
//!
//! What makes that possible is the order of the fields: the data goes last, so that a message is a short head and then the
//! data, each a frame of HTTP/2. A message that arrives cut in another way is put together, at the price of a copy.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use http::HeaderMap;
use http_body::{Body as _, Frame};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::{Code, Status};

use crate::wire::MAX_MESSAGE;

/// Bytes of what gRPC puts before a message: whether it is compressed (1), its length (4, big-endian).
const PREFIX: usize = 5;

/// More than the head of any chunk takes.
const HEAD: usize = 96;

/// Pieces that one message may come in, at most: each takes a little memory besides its bytes.
const PIECES: usize = 8192;

/// Numbers of fields in `exchange.proto`: a chunk's node, or its parameters, and the data of either.
const NODE: u32 = 1;
const PARAMS: u32 = 13;
const DATA: u32 = 5;

/// A message as bytes: all of it but the data of a node, and that.
fn encode(chunk: v1::Chunk) -> (Bytes, Option<Bytes>) {
    let mut head = BytesMut::with_capacity(HEAD);
    head.put_bytes(0, PREFIX);
    let node = match chunk.kind {
        Some(Kind::Node(node)) if !node.data.is_empty() => Ok((NODE, node)),
        Some(Kind::Params(node)) if !node.data.is_empty() => Ok((PARAMS, node)),
        kind => Err(kind),
    };
    let data = match node {
        Ok((field, mut node)) => {
            let data = std::mem::take(&mut node.data);
            let rest = v1::Chunk {
                kind: None,
                ..chunk
            };
            let of_data = key_len(DATA) + encoded_len_varint(data.len() as u64) + data.len();
            put(&mut head, &rest);
            encode_key(field, WireType::LengthDelimited, &mut head);
            encode_varint((node.encoded_len() + of_data) as u64, &mut head);
            put(&mut head, &node);
            encode_key(DATA, WireType::LengthDelimited, &mut head);
            encode_varint(data.len() as u64, &mut head);
            Some(data)
        }
        Err(kind) => {
            put(&mut head, &v1::Chunk { kind, ..chunk });
            None
        }
    };
    let bytes = head.len() - PREFIX + data.as_ref().map_or(0, Bytes::len);
    head[1..PREFIX].copy_from_slice(&(bytes as u32).to_be_bytes());
    (head.freeze(), data)
}

fn put(head: &mut BytesMut, message: &impl Message) {
    message.encode(head).expect("the buffer grows");
}

/// Which end of a call sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Whoever calls: its body just ends.
    Caller,
    /// Whoever answers: its body ends with a status.
    Callee,
}

/// Messages on their way out.
pub(super) struct Outgoing<S> {
    chunks: S,
    end: End,
    /// Follows the head that was sent.
    data: Option<Bytes>,
    over: bool,
}

impl<S> Outgoing<S>
where
    S: Stream<Item = Result<v1::Chunk, Status>> + Send + Unpin + 'static,
{
    /// A body of these messages. An error is the status of an answer, and ends it.
    pub fn body(chunks: S, end: End) -> Body {
        Body::new(Self {
            chunks,
            end,
            data: None,
            over: false,
        })
    }
}

impl<S> http_body::Body for Outgoing<S>
where
    S: Stream<Item = Result<v1::Chunk, Status>> + Unpin,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(data) = self.data.take() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if self.over {
            return Poll::Ready(None);
        }
        let status = match ready!(Pin::new(&mut self.chunks).poll_next(context)) {
            Some(Ok(chunk)) => {
                let (head, data) = encode(chunk);
                self.data = data;
                return Poll::Ready(Some(Ok(Frame::data(head))));
            }
            Some(Err(status)) => status,
            None => Status::new(Code::Ok, ""),
        };
        self.over = true;
        Poll::Ready(match self.end {
            End::Caller => None,
            End::Callee => {
                let mut trailers = HeaderMap::new();
                Some(
                    status
                        .add_header(&mut trailers)
                        .map(|()| Frame::trailers(trailers)),
                )
            }
        })
    }
}

/// Messages that come in.
#[derive(Debug)]
pub struct Incoming {
    body: Body,
    pieces: Pieces,
    over: bool,
}

impl Incoming {
    /// Those of a body.
    pub(super) fn new(body: Body) -> Self {
        Self {
            body,
            pieces: Pieces::default(),
            over: false,
        }
    }

    /// The next message; `None` after the last.
    ///
    /// # Errors
    /// The status that an answer ends with, a connection that broke, or bytes that are no message. Nothing follows it.
    pub async fn next(&mut self) -> Option<Result<v1::Chunk, Status>> {
        if self.over {
            return None;
        }
        let next = self.read().await.transpose();
        self.over = !matches!(next, Some(Ok(_)));
        next
    }

    async fn read(&mut self) -> Result<Option<v1::Chunk>, Status> {
        loop {
            if let Some(bytes) = self.pieces.message()? {
                let message = v1::Chunk::decode((&mut self.pieces).take(bytes));
                let unreadable = |error| Status::invalid_argument(format!("no message: {error}"));
                return message.map(Some).map_err(unreadable);
            }
            let frame = poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await;
            let frame = match frame {
                None => return self.end(),
                Some(frame) => frame?,
            };
            match frame.into_data() {
                Ok(data) => self.pieces.add(data)?,
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return match Status::from_header_map(&trailers) {
                        Some(status) if status.code() != Code::Ok => Err(status),
                        _ => self.end(),
                    };
                }
            }
        }
    }

    /// What an end means that nobody explains: that of the messages, if it is not within one.
    fn end(&self) -> Result<Option<v1::Chunk>, Status> {
        match self.pieces.len == 0 && self.pieces.message.is_none() {
            true => Ok(None),
            false => Err(Status::data_loss("the stream ended within a message")),
        }
    }
}

/// Bytes that have come, in the pieces in which they came.
#[derive(Debug, Default)]
struct Pieces {
    /// None is empty.
    pieces: VecDeque<Bytes>,
    /// Bytes of them all.
    len: usize,
    /// Bytes of the message that they begin with, if what is before it was read.
    message: Option<usize>,
}

impl Pieces {
    fn add(&mut self, piece: Bytes) -> Result<(), Status> {
        if piece.is_empty() {
            return Ok(());
        }
        if self.pieces.len() == PIECES {
            return Err(Status::resource_exhausted(format!(
                "a message in more than {PIECES} pieces"
            )));
        }
        self.len += piece.len();
        self.pieces.push_back(piece);
        Ok(())
    }

    /// Bytes of the next message, if it is here as a whole; it is to be taken then.
    fn message(&mut self) -> Result<Option<usize>, Status> {
        let bytes = match self.message {
            Some(bytes) => bytes,
            None if self.len < PREFIX => return Ok(None),
            None => {
                if self.get_u8() != 0 {
                    return Err(Status::unimplemented("this service takes no compression"));
                }
                let bytes = self.get_u32() as usize;
                if bytes > MAX_MESSAGE {
                    return Err(Status::resource_exhausted(format!(
                        "a message of {bytes} bytes; the limit is {MAX_MESSAGE}"
                    )));
                }
                *self.message.insert(bytes)
            }
        };
        if self.len < bytes {
            return Ok(None);
        }
        self.message = None;
        Ok(Some(bytes))
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut count: usize) {
        self.len -= count;
        while let Some(front) = self.pieces.front_mut().filter(|_| count > 0) {
            let here = front.len().min(count);
            front.advance(here);
            count -= here;
            if front.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    /// Without a copy where they lie in one piece.
    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        match self.pieces.front_mut() {
            Some(front) if front.len() >= count => {
                let bytes = front.slice(..count);
                self.advance(count);
                bytes
            }
            _ => {
                assert!(count <= self.len, "{count} of {} bytes", self.len);
                let mut bytes = BytesMut::with_capacity(count);
                bytes.put(self.take(count));
                bytes.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_stream::iter;

    use super::*;
    use crate::seal::{Sealer, checksum};

    fn chunk(data: &[u8]) -> v1::NodeChunk {
        let data = Bytes::copy_from_slice(data);
        v1::NodeChunk {
            step: 7,
            first: 2,
            size: 1,
            index: 300,
            check: checksum(&data),
            data,
        }
    }

    fn node(data: &[u8]) -> Kind {
        Kind::Node(chunk(data))
    }

    fn kinds(data: &[u8]) -> Vec<Kind> {
        let open = v1::Open {
            after: 3,
            segment: Some(v1::Segment {
                nonce: Bytes::from_static(b"0123456789abcdef"),
                ..v1::Segment::default()
            }),
        };
        vec![
            Kind::Open(open),
            node(data),
            Kind::Alive(v1::Empty {}),
            node(&[]),
            Kind::Credit(v1::Credit { step: 7, below: 32 }),
            Kind::Params(chunk(data)),
            Kind::Params(chunk(&[])),
            node(data),
        ]
    }

    fn sealed(data: &[u8]) -> Vec<v1::Chunk> {
        let mut sealer = Sealer::default();
        kinds(data).into_iter().map(|k| sealer.chunk(k)).collect()
    }

    async fn frames(mut body: Body) -> Vec<Frame<Bytes>> {
        let mut frames = Vec::new();
        while let Some(frame) = poll_fn(|c| Pin::new(&mut body).poll_frame(c)).await {
            frames.push(frame.unwrap());
        }
        frames
    }

    fn outgoing(chunks: Vec<Result<v1::Chunk, Status>>, end: End) -> Vec<Frame<Bytes>> {
        run(frames(Outgoing::body(iter(chunks), end)))
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(future)
    }

    struct Cut(VecDeque<Frame<Bytes>>);

    impl http_body::Body for Cut {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    fn incoming(frames: impl IntoIterator<Item = Frame<Bytes>>) -> Vec<Result<v1::Chunk, Status>> {
        let mut incoming = Incoming::new(Body::new(Cut(frames.into_iter().collect())));
        run(async {
            let mut all = Vec::new();
            while let Some(next) = incoming.next().await {
                all.push(next);
            }
            all
        })
    }

    fn joined(frames: Vec<Frame<Bytes>>) -> Vec<u8> {
        let data = frames
            .into_iter()
            .filter_map(|frame| frame.into_data().ok());
        data.flat_map(|bytes| bytes.to_vec()).collect()
    }

    #[test]
    fn any_grpc_peer_reads_what_is_written() {
        let chunks = sealed(&[1, 2, 3]);
        let bytes = joined(outgoing(
            chunks.iter().cloned().map(Ok).collect(),
            End::Caller,
        ));
        let mut rest = &bytes[..];
        for chunk in chunks {
            assert_eq!(rest.get_u8(), 0);
            let len = rest.get_u32() as usize;
            assert_eq!(v1::Chunk::decode(&rest[..len]).unwrap(), chunk);
            rest = &rest[len..];
        }
        assert!(rest.is_empty());
    }

    proptest! {
        #[test]
        fn what_any_grpc_peer_writes_is_read_however_it_is_cut(
            data in prop::collection::vec(any::<u8>(), 0..400),
            cuts in prop::collection::vec(1usize..300, 1..40),
        ) {
            let chunks = sealed(&data);
            let mut bytes = BytesMut::new();
            for chunk in &chunks {
                bytes.put_u8(0);
                bytes.put_u32(chunk.encoded_len() as u32);
                chunk.encode(&mut bytes).unwrap();
            }
            let mut bytes = bytes.freeze();
            let mut frames = Vec::new();
            for cut in cuts.iter().cycle() {
                if bytes.is_empty() {
                    break;
                }
                frames.push(Frame::data(bytes.split_to(bytes.len().min(*cut))));
            }
            let read: Result<Vec<_>, _> = incoming(frames).into_iter().collect();
            prop_assert_eq!(read.unwrap(), chunks);
        }
    }

    #[test]
    fn data_is_not_copied() {
        let chunk = Sealer::default().chunk(node(&[9; 5000]));
        let of = |chunk: &v1::Chunk| match &chunk.kind {
            Some(Kind::Node(node)) => node.data.as_ptr(),
            other => panic!("{other:?}"),
        };
        let lies = of(&chunk);
        let read = incoming(outgoing(vec![Ok(chunk)], End::Caller));
        assert_eq!(of(read[0].as_ref().unwrap()), lies);
    }

    #[test]
    fn an_answer_ends_with_its_status() {
        let chunk = Sealer::default().chunk(node(&[1]));
        let good = outgoing(vec![Ok(chunk.clone())], End::Callee);
        assert!(good.last().unwrap().is_trailers());
        assert_eq!(incoming(good).len(), 1);
        let bad = vec![Ok(chunk), Err(Status::data_loss("in the exchange, a gap"))];
        let read = incoming(outgoing(bad, End::Callee));
        assert_eq!(read.len(), 2);
        let status = read[1].as_ref().unwrap_err();
        assert_eq!(status.code(), Code::DataLoss);
        assert_eq!(status.message(), "in the exchange, a gap");
    }

    #[test]
    fn what_is_no_message_ends_the_stream() {
        let fails = |bytes: &[u8]| {
            let read = incoming([Frame::data(Bytes::copy_from_slice(bytes))]);
            assert_eq!(read.len(), 1);
            read[0].as_ref().unwrap_err().message().to_owned()
        };
        assert_eq!(fails(&[1, 0, 0, 0, 0]), "this service takes no compression");
        assert_eq!(
            fails(&[0, 0, 64, 0, 1]),
            "a message of 4194305 bytes; the limit is 4194304"
        );
        assert_eq!(
            fails(&[0, 0, 0, 0, 9, 1]),
            "the stream ended within a message"
        );
        assert_eq!(fails(&[0, 0]), "the stream ended within a message");
        assert_eq!(fails(&[0, 0, 0, 0, 9]), "the stream ended within a message");
        // So it does where somebody in between ends it in good order.
        let piece = Frame::data(Bytes::from_static(&[0, 0, 0, 0, 9, 1]));
        let read = incoming([piece, Frame::trailers(HeaderMap::new())]);
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].as_ref().unwrap_err().code(), Code::DataLoss);
        assert!(fails(&[0, 0, 0, 0, 1, 255]).starts_with("no message: "));
        let prefix = Frame::data(Bytes::from_static(&[0, 0, 64, 0, 0]));
        let crumbs = (0..=PIECES).map(|_| Frame::data(Bytes::from_static(&[0])));
        let read = incoming([prefix].into_iter().chain(crumbs));
        let message = read[0].as_ref().unwrap_err().message();
        assert_eq!(message, "a message in more than 8192 pieces");
    }
}
