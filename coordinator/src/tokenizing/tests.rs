//! Batches with workers that come, go, hang and lie. A worker here is a task that speaks the protocol over a real stream.

use std::net::SocketAddr;

use cohort_common::corpus::char_tokenizer;
use cohort_proto::v1::tokenize_client::TokenizeClient;
use cohort_proto::v1::tokenize_server::TokenizeServer;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;

use super::*;

fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(char_tokenizer('a'..='z'))
}

fn texts(number: usize) -> Vec<String> {
    let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
    (0..3)
        .map(|i| letter(number + i).to_string().repeat(number + 1))
        .collect()
}

/// Encodes batches as a preparation does: some ahead, in order.
fn encode_all(batches: &dyn BatchEncoder, count: usize) -> Vec<Tokens> {
    let tokenizer = tokenizer();
    let mut under_way = VecDeque::new();
    let mut done = Vec::new();
    for number in 0..count {
        under_way.push_back(batches.begin(&tokenizer, texts(number)));
        while under_way.len() > batches.width() {
            done.extend(under_way.pop_front().map(PendingBatch::wait));
        }
    }
    done.extend(under_way.into_iter().map(PendingBatch::wait));
    done
}

fn expected(count: usize) -> Vec<Vec<Vec<u32>>> {
    let tokenizer = tokenizer();
    let batch = |number| encode_batch(&tokenizer, &texts(number)).unwrap();
    (0..count).map(batch).collect()
}

fn unwrapped(done: Vec<Tokens>) -> Vec<Vec<Vec<u32>>> {
    done.into_iter().map(Result::unwrap).collect()
}

/// How a worker behaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Works,
    /// Takes one batch and leaves.
    Leaves,
    /// Changes what it gives back.
    Lies,
    /// Says that it cannot.
    Fails,
    /// Changes a bit after the checksum was made.
    Damages,
    /// Takes what it is given and says nothing.
    Hangs,
}

/// A service without a cluster around it.
struct Only(Tokenizing);

#[tonic::async_trait]
impl Tokenize for Only {
    type BatchesStream = ReceiverStream<Result<v1::ToTokenizer, Status>>;

    async fn batches(
        &self,
        request: Request<Streaming<v1::FromTokenizer>>,
    ) -> Result<Response<Self::BatchesStream>, Status> {
        let batches = self.0.serve(SessionId(1), request.into_inner());
        Ok(Response::new(ReceiverStream::new(batches)))
    }
}

struct TestCluster {
    runtime: Runtime,
    tokenizing: Tokenizing,
    address: SocketAddr,
    /// Batches that each worker has answered.
    answered: Vec<Arc<AtomicU32>>,
}

impl TestCluster {
    fn start() -> Self {
        Self::with(Tokenizing::default())
    }

    fn with(tokenizing: Tokenizing) -> Self {
        let runtime = Runtime::new().unwrap();
        let service = TokenizeServer::new(Only(tokenizing.clone()));
        let address = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let incoming = TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(service);
            tokio::spawn(server.serve_with_incoming(incoming));
            address
        });
        Self {
            runtime,
            tokenizing,
            address,
            answered: Vec::new(),
        }
    }

    /// Connects a worker, and waits until it is counted.
    fn worker(&mut self, manner: Manner) {
        let answered = Arc::<AtomicU32>::default();
        self.answered.push(answered.clone());
        let before = self.tokenizing.workers();
        let url = format!("http://{}", self.address);
        self.runtime.spawn(work(url, manner, answered));
        let shared = &self.tokenizing.0;
        let state = shared.state.lock().unwrap();
        let fewer = |state: &mut State| {
            state.workers.values().filter(|seat| seat.takes > 0).count() <= before
        };
        let patience = Duration::from_secs(20);
        let waited = shared.changed.wait_timeout_while(state, patience, fewer);
        assert!(!waited.unwrap().1.timed_out(), "a worker did not come");
    }

    /// Waits until no worker is there.
    fn left(&self) {
        let shared = &self.tokenizing.0;
        let state = shared.state.lock().unwrap();
        let patience = Duration::from_secs(20);
        let there = |state: &mut State| !state.workers.is_empty();
        let waited = shared.changed.wait_timeout_while(state, patience, there);
        assert!(!waited.unwrap().1.timed_out(), "a worker did not leave");
    }

    fn answered(&self) -> Vec<u32> {
        let all = self.answered.iter();
        all.map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

async fn work(url: String, manner: Manner, answered: Arc<AtomicU32>) {
    let mut client = TokenizeClient::connect(url).await.unwrap();
    let (out, said) = mpsc::channel(8);
    let say = async |kind| out.send(v1::FromTokenizer { kind: Some(kind) }).await;
    say(From::Takes(v1::Takes { batches: 2 })).await.unwrap();
    let stream = client.batches(ReceiverStream::new(said)).await;
    let mut incoming = stream.unwrap().into_inner();
    let mut json = Vec::new();
    let mut tokenizer = None;
    while let Some(Ok(message)) = incoming.next().await {
        let texts = match message.kind.unwrap() {
            To::Tokenizer(piece) => {
                json.extend_from_slice(&piece.json);
                if let Some(eos) = piece.eos {
                    tokenizer = Some(Tokenizer::from_json_with_eos_id(&json, eos).unwrap());
                }
                continue;
            }
            To::Texts(texts) => texts,
        };
        assert_eq!(texts_check(&texts.texts), texts.check);
        let mut ids = encode_batch(tokenizer.as_ref().unwrap(), &texts.texts).unwrap();
        if manner == Manner::Lies {
            ids.iter_mut().flatten().for_each(|id| *id ^= 1);
        }
        let check = tokens_check(ids.iter().map(Vec::as_slice));
        let answer = match manner {
            Manner::Leaves => break,
            Manner::Hangs => continue,
            Manner::Fails => From::Failed(texts.id),
            _ => From::Tokens(v1::TokenBatch {
                id: texts.id,
                texts: ids.into_iter().map(|ids| v1::TextTokens { ids }).collect(),
                check: check ^ u32::from(manner == Manner::Damages),
            }),
        };
        if say(answer).await.is_err() {
            break;
        }
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn without_workers_all_is_encoded_here() {
    let tokenizing = Tokenizing::default();
    assert_eq!(unwrapped(encode_all(&tokenizing, 40)), expected(40));
    assert!(tokenizing.lock().queue.is_empty());
}

#[test]
fn what_cannot_be_encoded_is_said() {
    let tokenizing = Tokenizing::default();
    let texts = ["abc", "aBc"].map(String::from).to_vec();
    let (number, error) = tokenizing.begin(&tokenizer(), texts).wait().unwrap_err();
    assert_eq!(number, 1);
    assert!(error.to_string().contains('B'), "{error}");
}

#[test]
fn workers_encode_everything_and_in_order() {
    let mut cluster = TestCluster::start();
    cluster.worker(Manner::Works);
    cluster.worker(Manner::Works);
    assert_eq!(
        unwrapped(encode_all(&cluster.tokenizing, 200)),
        expected(200)
    );
    let answered = cluster.answered();
    assert!(answered.iter().all(|count| *count > 0), "{answered:?}");
}

#[test]
fn what_a_worker_does_not_give_back_is_encoded_all_the_same() {
    for manner in [
        Manner::Leaves,
        Manner::Lies,
        Manner::Fails,
        Manner::Damages,
        Manner::Hangs,
    ] {
        let hasty = || TestCluster::with(Tokenizing::with_patience(Duration::from_millis(200)));
        let mut cluster = hasty();
        cluster.worker(manner);
        cluster.worker(Manner::Works);
        assert_eq!(
            unwrapped(encode_all(&cluster.tokenizing, 100)),
            expected(100)
        );
        let mut alone = hasty();
        alone.worker(manner);
        assert_eq!(unwrapped(encode_all(&alone.tokenizing, 100)), expected(100));
    }
}

#[test]
fn each_tokenizer_is_compared_though_another_was_sent_since() {
    let mut cluster = TestCluster::start();
    let tokenizers = [tokenizer(), Arc::new(char_tokenizer('a'..='y'))];
    let tokenizing = cluster.tokenizing.clone();
    let begin = |tokenizer| tokenizing.begin(tokenizer, texts(4));
    let under_way: Vec<_> = tokenizers.iter().map(begin).collect();
    let wanted = tokenizers
        .each_ref()
        .map(|t| encode_batch(t, &texts(4)).unwrap());
    cluster.worker(Manner::Lies);
    let done: Vec<_> = under_way.into_iter().map(PendingBatch::wait).collect();
    assert_eq!(unwrapped(done), wanted);
}

#[test]
fn a_batch_that_two_workers_lose_is_encoded_here() {
    let mut cluster = TestCluster::start();
    let tokenizing = cluster.tokenizing.clone();
    let waiting = tokenizing.begin(&tokenizer(), texts(3));
    for _ in 0..2 {
        cluster.worker(Manner::Leaves);
        cluster.left();
    }
    // One more would keep it.
    cluster.worker(Manner::Hangs);
    assert_eq!(waiting.wait().unwrap(), expected(4)[3]);
}

#[test]
fn what_nobody_waits_for_does_not_come_back_from_a_worker_that_leaves() {
    let mut cluster = TestCluster::start();
    cluster.worker(Manner::Hangs);
    let waiting = cluster.tokenizing.begin(&tokenizer(), texts(3));
    let shared = &cluster.tokenizing.0;
    let given = || shared.state.lock().unwrap().queue.is_empty();
    while !given() {
        std::thread::yield_now();
    }
    drop(waiting);
    cluster.runtime.shutdown_background();
    let state = shared.state.lock().unwrap();
    let there = |state: &mut State| !state.workers.is_empty();
    let patience = Duration::from_secs(20);
    let (state, waited) = shared
        .changed
        .wait_timeout_while(state, patience, there)
        .unwrap();
    assert!(!waited.timed_out() && state.queue.is_empty());
}

#[test]
fn nothing_is_encoded_that_nobody_waits_for() {
    let tokenizing = Tokenizing::default();
    drop(tokenizing.begin(&tokenizer(), texts(3)));
    assert!(tokenizing.lock().queue.is_empty());
}
