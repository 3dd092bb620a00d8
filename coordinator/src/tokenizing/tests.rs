//! Batches with workers that come, go, hang and lie. A worker here is a task that speaks the protocol over a real stream.

use std::net::SocketAddr;

use cohort_common::corpus::char_tokenizer;
use cohort_proto::v1::tokenize_client::TokenizeClient;
use cohort_proto::v1::tokenize_server::TokenizeServer;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
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
}

impl TestCluster {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let tokenizing = Tokenizing::default();
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
        }
    }

    /// Connects a worker, and waits until it is counted. Gives the batches that it was sent.
    fn worker(&self, manner: Manner) -> JoinHandle<usize> {
        let before = self.tokenizing.workers();
        let url = format!("http://{}", self.address);
        let worker = self.runtime.spawn(async move { work(url, manner).await });
        let shared = &self.tokenizing.0;
        let state = shared.state.lock().unwrap();
        let fewer = |state: &mut State| {
            state.workers.values().filter(|seat| seat.takes > 0).count() <= before
        };
        let patience = Duration::from_secs(20);
        let waited = shared.changed.wait_timeout_while(state, patience, fewer);
        assert!(!waited.unwrap().1.timed_out(), "a worker did not come");
        worker
    }
}

async fn work(url: String, manner: Manner) -> usize {
    let mut client = TokenizeClient::connect(url).await.unwrap();
    let (out, said) = mpsc::channel(8);
    let say = async |kind| out.send(v1::FromTokenizer { kind: Some(kind) }).await;
    say(From::Takes(v1::Takes { batches: 2 })).await.unwrap();
    let stream = client.batches(ReceiverStream::new(said)).await;
    let mut incoming = stream.unwrap().into_inner();
    let mut json = Vec::new();
    let mut tokenizer = None;
    let mut batches = 0;
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
        batches += 1;
        assert_eq!(texts_check(&texts.texts), texts.check);
        let mut ids = encode_batch(tokenizer.as_ref().unwrap(), &texts.texts).unwrap();
        if manner == Manner::Lies {
            ids[0][0] ^= 1;
        }
        let check = tokens_check(ids.iter().map(Vec::as_slice));
        let answer = match manner {
            Manner::Leaves => break,
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
    }
    batches
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
    let cluster = TestCluster::start();
    let workers = [Manner::Works, Manner::Works].map(|manner| cluster.worker(manner));
    assert_eq!(
        unwrapped(encode_all(&cluster.tokenizing, 200)),
        expected(200)
    );
    drop(workers);
}

#[test]
fn what_a_worker_does_not_give_back_is_encoded_all_the_same() {
    for manner in [Manner::Leaves, Manner::Lies, Manner::Fails, Manner::Damages] {
        let cluster = TestCluster::start();
        let bad = cluster.worker(manner);
        let good = cluster.worker(Manner::Works);
        assert_eq!(
            unwrapped(encode_all(&cluster.tokenizing, 100)),
            expected(100)
        );
        let alone = TestCluster::start();
        drop(alone.worker(manner));
        assert_eq!(unwrapped(encode_all(&alone.tokenizing, 100)), expected(100));
        drop((bad, good));
    }
}

#[test]
fn nothing_is_encoded_that_nobody_waits_for() {
    let tokenizing = Tokenizing::default();
    drop(tokenizing.begin(&tokenizer(), texts(3)));
    assert!(tokenizing.lock().queue.is_empty());
}
