use super::params::send_params;
use super::roots::{Way, send_roots};
use super::*;
use crate::aggregate::{ChunkDigest, add_all, encode};
use crate::layout::{CHUNK_LEN, chunk_range};
use crate::seal::{Opener, Sealer, checksum};
use crate::spec::Payload;
use crate::wire::SESSION_KEY;
use cohort_proto::v1::chunk::Kind;

const SHAPE: Shape = Shape {
    lanes: 2,
    // The last chunk is short.
    len: 49 * CHUNK_LEN + 3,
    payload: Payload::F32,
    seed: 1,
};

const STEP: Step = 7;

fn run() -> RunId {
    RunId::new("run")
}

fn opened(slice: Range<usize>) -> Arc<Exchange> {
    let exchange = Arc::new(Exchange::new(false));
    exchange.open(&run(), STEP, SHAPE, slice);
    exchange
}

fn gradient(lane: u32) -> Vec<f32> {
    let value = |i: usize| ((i * 31 + lane as usize * 977) % 1009) as f32 * 0.123 - 61.7;
    (0..SHAPE.len).map(value).collect()
}

/// Adds one chunk of a lane that the owner has computed.
fn offer(exchange: &Exchange, lane: u32, gradient: &[f32], index: usize) -> Vec<Told> {
    let data = encode(&gradient[chunk_range(index, SHAPE.len)]);
    let session = SessionId(u64::from(lane));
    let offered = exchange.offer_here(&run(), STEP, Node::leaf(lane), index, data, session);
    offered.unwrap().expect("the step is held")
}

#[test]
fn an_owner_adds_its_own_and_follows_the_roots() {
    let exchange = Arc::new(Exchange::new(false));
    let taken = Arc::new(Mutex::new(Vec::new()));
    let take = {
        let taken = taken.clone();
        move |step, index, root: &[f32]| taken.lock().unwrap().push((step, index, encode(root)))
    };
    exchange.give_roots_to(take);
    exchange.open(&run(), STEP, SHAPE, 47..50);
    let leading = exchange.get(&run(), STEP).unwrap().leading.subscribe();
    let mut sum = gradient(0);
    for index in 47..50 {
        let told = offer(&exchange, 0, &sum, index);
        assert_eq!(told.len(), usize::from(index == 49), "{told:?}");
    }
    let other = gradient(1);
    // In another order than that of the chunks.
    for (index, expected) in [(48, 47), (47, 49)] {
        assert_eq!(offer(&exchange, 1, &other, index), []);
        assert_eq!(*leading.borrow(), expected);
    }
    let told = offer(&exchange, 1, &other, 49);
    add_all(&mut sum, &other);
    let digest = |index| ChunkDigest::of(&sum[chunk_range(index, SHAPE.len)]);
    let (run, step) = (run(), STEP);
    let expected = [
        Told::Delivered {
            run: run.clone(),
            step,
            lanes: vec![1],
        },
        Told::Complete {
            run: run.clone(),
            step,
            digests: (47..50).map(digest).collect(),
        },
    ];
    assert_eq!(told, expected);
    assert_eq!(*leading.borrow(), 50);
    let held = exchange.get(&run, step).unwrap();
    let summed = |index| encode(&sum[chunk_range(index, SHAPE.len)]);
    for index in 47..50 {
        let root = held.sums.root(index).unwrap();
        assert_eq!(root.data, summed(index));
        assert_eq!(root.check, checksum(&root.data));
    }
    assert!(held.sums.root(46).is_none());
    let expected = [48, 47, 49].map(|index| (step, index, summed(index)));
    assert_eq!(*taken.lock().unwrap(), expected);
    drop(held);
    // A copy that differs is told; what is released is not held.
    let told = offer(&exchange, 0, &other, 48);
    assert!(matches!(told[..], [Told::Mismatch { step: STEP, .. }]));
    exchange.release(&run, step);
    let late = exchange.offer_here(&run, step, Node::leaf(0), 48, Bytes::new(), SessionId(0));
    assert_eq!(late, Ok(None));
    assert!(exchange.get(&run, step).is_none());
    assert!(leading.has_changed().is_err());
}

/// What a worker is sent of a slice: credits within it, and its chunks.
#[tokio::test]
async fn credits_and_roots_are_those_of_the_slice() {
    let slice = 10..44;
    let exchange = opened(slice.clone());
    let (out, mut sent) = mpsc::channel(OUTBOX);
    let way = Way::new(SessionId(9), None, Sealer::default(), out);
    let sending = send_roots(exchange.clone(), run(), STEP - 1, way);
    let sending = tokio::spawn(sending);
    let mut opener = Opener::default();
    let mut next = async || {
        let chunk = sent.recv().await.unwrap().unwrap();
        opener.chunk(chunk).unwrap().unwrap()
    };
    let credit = |below| Kind::Credit(v1::Credit { step: STEP, below });
    assert_eq!(next().await, credit(10 + WINDOW as u32));
    let gradients = [gradient(0), gradient(1)];
    let mut granted = Vec::new();
    for index in slice {
        for lane in [0, 1] {
            offer(&exchange, lane, &gradients[lane as usize], index);
        }
        let chunk = loop {
            match next().await {
                Kind::Credit(credit) => granted.push(credit.below),
                Kind::Node(chunk) => break chunk,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((chunk.step, chunk.first, chunk.size), (STEP, 0, 2));
        assert_eq!(chunk.index as usize, index);
        assert_eq!(chunk.check, checksum(&chunk.data));
    }
    // Up to the end of the slice, and no further.
    assert_eq!(granted, [43, 44]);
    drop(sent);
    sending.await.unwrap();
}

/// A worker that gathers: its own roots go to both sites and those of others to its own, each as they come; what it has summed
/// goes on, and is waited for.
#[tokio::test]
async fn who_gathers_passes_sums_on_and_hands_roots_on() {
    let exchange = Arc::new(Exchange::new(false));
    let duty = Duty {
        chunks: 46..50,
        owned: 48..49,
        passes: vec![Node::leaf(0)],
    };
    let far = BTreeMap::from([(SessionId(8), 48..49), (SessionId(9), 48..48)]);
    let passed = Arc::new(Mutex::new(Vec::new()));
    let pass = {
        let passed = passed.clone();
        move |one: Passed| passed.lock().unwrap().push((one.node, one.index))
    };
    exchange.open_gathering(&run(), STEP, SHAPE, duty, far, pass);
    let held = exchange.get(&run(), STEP).unwrap();
    let leading = held.leading.subscribe();
    let (own, other) = (gradient(0), gradient(1));
    for index in 46..50 {
        offer(&exchange, 0, &own, index);
    }
    let gathered = [46, 47, 49].map(|index| (Node::leaf(0), index));
    assert_eq!(*passed.lock().unwrap(), gathered);
    assert_eq!(*leading.borrow(), 46);
    let told = offer(&exchange, 1, &other, 48);
    assert!(matches!(
        told[..],
        [Told::Delivered { .. }, Told::Complete { .. }]
    ));
    exchange.passed_on(&run(), STEP, 46);
    assert_eq!(*leading.borrow(), 47);
    let relayed = |index: usize| {
        let data = encode(&other[chunk_range(index, SHAPE.len)]);
        let check = checksum(&data);
        RootChunk { data, check }
    };
    // The second is its own, and what it is told of that is not believed.
    for index in [47, 48, 49] {
        exchange.relay(&run(), STEP, index, relayed(index));
    }
    assert!(held.sums.root(49).is_none());
    let mut sum = own.clone();
    add_all(&mut sum, &other);
    let indices = |sent: &[(Kind, u32)]| sent.iter().map(|(_, i)| *i).collect::<Vec<_>>();
    let near = sent_to(5, &exchange).await;
    assert_eq!(indices(&near), [48, 49]);
    let Kind::Node(chunk) = &near[0].0 else {
        panic!("{near:?}");
    };
    assert_eq!(chunk.data, encode(&sum[chunk_range(48, SHAPE.len)]));
    exchange.relay(&run(), STEP, 46, relayed(46));
    assert_eq!(indices(&sent_to(5, &exchange).await), [46, 47, 48, 49]);
    assert_eq!(indices(&sent_to(8, &exchange).await), [48]);
    assert_eq!(sent_to(9, &exchange).await, []);
}

/// What a worker is sent by an owner that updates its slice by itself: roots, or parameters. The last is nothing.
async fn sent_to(worker: u64, exchange: &Arc<Exchange>) -> Vec<(Kind, u32)> {
    let (out, mut sent) = mpsc::channel(1 << 10);
    let way = Way::new(SessionId(worker), None, Sealer::default(), out);
    let params = send_params(exchange.clone(), SessionId(worker), STEP - 1, way.clone());
    let roots = send_roots(exchange.clone(), run(), STEP - 1, way);
    tokio::select! {
        _ = async { tokio::join!(params, roots) } => {}
        // Both wait for more now.
        () = tokio::task::yield_now() => {}
    }
    let mut opener = Opener::default();
    let mut found = Vec::new();
    while let Ok(chunk) = sent.try_recv() {
        match opener.chunk(chunk.unwrap()).unwrap().unwrap() {
            kind @ (Kind::Node(_) | Kind::Params(_)) => {
                let (Kind::Node(chunk) | Kind::Params(chunk)) = &kind else {
                    unreachable!("just looked");
                };
                let index = chunk.index;
                found.push((kind, index));
            }
            Kind::Credit(_) | Kind::Alive(_) => {}
            other => panic!("{other:?}"),
        }
    }
    found
}

#[tokio::test]
async fn where_moments_are_divided_roots_go_to_the_second_holder_and_parameters_to_the_others() {
    let exchange = Arc::new(Exchange::divided(Some(SessionId(5))));
    exchange.open(&run(), STEP, SHAPE, 47..50);
    let gradients = [gradient(0), gradient(1)];
    for (index, lane) in (47..50).flat_map(|index| [(index, 0), (index, 1)]) {
        offer(&exchange, lane, &gradients[lane as usize], index);
    }
    let params = gradient(2);
    let slice = 47 * CHUNK_LEN..SHAPE.len;
    // Of the step before, which nobody needs any more.
    exchange.publish(STEP - 1, 0, &params[..CHUNK_LEN], None);
    exchange.publish(STEP, 47, &params[slice], Some(SessionId(5)));
    let second = sent_to(5, &exchange).await;
    let roots = second.iter().all(|(kind, _)| matches!(kind, Kind::Node(_)));
    assert!(roots && second.iter().map(|(_, index)| *index).eq(47..50));
    let other = sent_to(6, &exchange).await;
    assert_eq!(other.len(), 3);
    for (kind, index) in other {
        let Kind::Params(chunk) = kind else {
            panic!("{kind:?}");
        };
        assert_eq!(chunk.step, STEP);
        let elements = chunk_range(index as usize, SHAPE.len);
        assert_eq!(chunk.data, encode(&params[elements]));
    }
}

/// A process whose sessions are all open, and what it was told.
#[derive(Default)]
struct Listener(Mutex<Vec<Told>>);

#[tonic::async_trait]
impl Host for Listener {
    fn is_open(&self, _: SessionId) -> bool {
        true
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    async fn tell(&self, told: Told) {
        self.0.lock().unwrap().push(told);
    }
}

/// What a worker that sends these bytes is answered, and what its owner is told.
async fn pushed(bytes: &str) -> (Option<Status>, Vec<Told>) {
    let host = Arc::new(Listener::default());
    let service = ExchangeService {
        exchange: opened(0..50),
        host: host.clone(),
    };
    let mut metadata = MetadataMap::new();
    metadata.insert(SESSION_KEY, "5".parse().unwrap());
    metadata.insert(RUN_KEY, "run".parse().unwrap());
    let incoming = Incoming::new(tonic::body::Body::new(bytes.to_owned()));
    let mut answer = service.push_pull(&metadata, incoming).await.unwrap();
    let status = answer.recv().await.map(|last| last.unwrap_err());
    (status, std::mem::take(&mut *host.0.lock().unwrap()))
}

#[tokio::test]
async fn what_is_no_message_ends_the_session() {
    for (bytes, what) in [
        ("\x01\0\0\0\0", "this service takes no compression"),
        (
            "\0\0\x40\0\x01",
            "a message of 4194305 bytes; the limit is 4194304",
        ),
        ("\0\0\0\0\x09x", "the stream ended within a message"),
    ] {
        let (status, told) = pushed(bytes).await;
        let status = status.expect("a reason");
        assert_eq!(status.code(), tonic::Code::DataLoss);
        assert_eq!(status.message(), format!("in the exchange, {what}"));
        let broken = Told::Broken {
            session: SessionId(5),
            what: what.into(),
        };
        assert_eq!(told, [broken]);
    }
    // A worker that goes between two messages is no reason.
    let (status, told) = pushed("").await;
    assert!(status.is_none() && told.is_empty(), "{status:?} {told:?}");
}

#[test]
#[should_panic(expected = "0..3 of 0..50: who shares owns all")]
fn who_shares_memory_owns_the_whole_gradient() {
    Exchange::default().open(&run(), STEP, SHAPE, 0..3);
}
