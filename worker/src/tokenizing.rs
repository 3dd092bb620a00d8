//! Text to tokens for the coordinator, while there is nothing to train. What is given back is checked and counted there; a
//! batch that is lost with this process is encoded elsewhere.

use std::sync::Arc;
use std::time::Duration;

use cohort_common::corpus::Tokenizer;
use cohort_common::net::Credentials;
use cohort_common::seal::{texts_check, tokens_check};
use cohort_common::wire::MAX_MESSAGE;
use cohort_proto::v1;
use cohort_proto::v1::from_tokenizer::Kind as From;
use cohort_proto::v1::to_tokenizer::Kind as To;
use cohort_proto::v1::tokenize_client::TokenizeClient;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tracing::{debug, warn};

/// Time until a stream that broke is opened again.
const PAUSE: Duration = Duration::from_secs(1);

/// Bytes of a `tokenizer.json`, at most.
const MAX_TOKENIZER: usize = 256 << 20;

/// Bytes of the tokens of a batch, at most. What is around them in a message is small.
const MAX_TOKENS: usize = MAX_MESSAGE - 64;

/// Batches that wait while as many as there are threads are encoded.
const AHEAD: u32 = 1;

/// Tokenizes with so many threads while `idle` says that there is nothing else to do. Ends when the coordinator wants none
/// of it; the caller ends it with the session.
pub async fn serve(
    channel: Channel,
    credentials: Credentials,
    threads: u32,
    mut idle: watch::Receiver<bool>,
) {
    let client = TokenizeClient::with_interceptor(channel, credentials)
        .max_decoding_message_size(MAX_MESSAGE);
    loop {
        let ended = stream(client.clone(), threads, &mut idle).await;
        let Err(status) = ended else { return };
        match status.code() {
            Code::Unimplemented => return,
            Code::FailedPrecondition => {
                return warn!(reason = status.message(), "this worker tokenizes nothing");
            }
            _ => debug!(reason = status.message(), "tokenizing broke"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One stream. Ends well only with the process.
async fn stream(
    mut client: TokenizeClient<InterceptedService<Channel, Credentials>>,
    threads: u32,
    idle: &mut watch::Receiver<bool>,
) -> Result<(), Status> {
    let most = threads + AHEAD;
    let (out, outgoing) = mpsc::channel(most as usize + 1);
    let takes = |idle: bool| {
        let batches = if idle { most } else { 0 };
        From::Takes(v1::Takes { batches })
    };
    let now = takes(*idle.borrow_and_update());
    send(&out, now).await;
    let opened = client.batches(ReceiverStream::new(outgoing)).await?;
    let mut incoming = opened.into_inner();
    let mut tokenizer = None;
    loop {
        tokio::select! {
            changed = idle.changed() => match changed {
                Ok(()) => {
                    let now = takes(*idle.borrow_and_update());
                    send(&out, now).await;
                }
                Err(_) => return Ok(()),
            },
            next = next(&mut incoming, &mut tokenizer) => {
                let (tokenizer, texts) = next?;
                let out = out.clone();
                // As many at a time as it was asked for, at most.
                drop(tokio::task::spawn_blocking(move || {
                    let answer = encode(&tokenizer, texts);
                    // A stream that is gone needs none.
                    let _ = out.blocking_send(v1::FromTokenizer { kind: Some(answer) });
                }));
            }
        }
    }
}

async fn send(out: &mpsc::Sender<v1::FromTokenizer>, kind: From) {
    // A stream that is gone is noticed where it comes in.
    let _ = out.send(v1::FromTokenizer { kind: Some(kind) }).await;
}

/// A tokenizer on its way, and the newest that has come.
#[derive(Default)]
struct Received {
    json: Vec<u8>,
    whole: Option<Arc<Tokenizer>>,
}

/// The next texts, and what encodes them.
async fn next(
    incoming: &mut Streaming<v1::ToTokenizer>,
    tokenizer: &mut Option<Received>,
) -> Result<(Arc<Tokenizer>, v1::TextBatch), Status> {
    loop {
        let message = incoming.next().await;
        let message = message.ok_or_else(|| Status::unavailable("the coordinator closed it"))??;
        let received = tokenizer.get_or_insert_default();
        match message.kind {
            Some(To::Tokenizer(piece)) => received.add(piece)?,
            Some(To::Texts(texts)) => {
                if texts_check(&texts.texts) != texts.check {
                    return Err(Status::data_loss("texts were changed on their way"));
                }
                let whole = received.whole.clone();
                let whole = whole.ok_or_else(|| Status::internal("texts before a tokenizer"))?;
                return Ok((whole, texts));
            }
            None => return Err(Status::internal("a message without content")),
        }
    }
}

impl Received {
    fn add(&mut self, piece: v1::TokenizerPiece) -> Result<(), Status> {
        if self.json.len() + piece.json.len() > MAX_TOKENIZER {
            return Err(Status::resource_exhausted("a tokenizer of too many bytes"));
        }
        self.json.extend_from_slice(&piece.json);
        if let Some(eos) = piece.eos {
            let json = std::mem::take(&mut self.json);
            let whole = Tokenizer::from_json_with_eos_id(&json, eos);
            let unusable = |error| Status::failed_precondition(format!("a tokenizer: {error}"));
            self.whole = Some(Arc::new(whole.map_err(unusable)?));
        }
        Ok(())
    }
}

fn encode(tokenizer: &Tokenizer, batch: v1::TextBatch) -> From {
    let texts = batch.texts.iter().map(|text| tokenizer.encode(text));
    let Ok(ids) = texts.collect::<Result<Vec<_>, _>>() else {
        return From::Failed(batch.id);
    };
    let tokens = v1::TokenBatch {
        id: batch.id,
        check: tokens_check(ids.iter().map(Vec::as_slice)),
        texts: ids.into_iter().map(|ids| v1::TextTokens { ids }).collect(),
    };
    // A long text that could not be cut becomes more than goes into a message.
    match tokens.encoded_len() > MAX_TOKENS {
        true => From::Failed(batch.id),
        false => From::Tokens(tokens),
    }
}
