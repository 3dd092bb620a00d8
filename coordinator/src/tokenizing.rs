//! Text to tokens, on the workers that have nothing to train. A batch that a worker does not give back goes to another, or
//! is encoded here, which is also what happens where there is no worker; so each batch counts once, and what a corpus
//! becomes does not depend on who was there.
//!
//! A worker is asked for nothing but tokens, and the longest text of the first batch that it encodes with a tokenizer is
//! encoded here, too: one that comes to another result is of another version, and is not asked again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use cohort_common::corpus::{BatchEncoder, PendingBatch, Tokenizer, Tokens, encode_batch};
use cohort_common::exchange::session_of;
use cohort_common::ids::SessionId;
use cohort_common::seal::{texts_check, tokens_check};
use cohort_common::wire::MAX_PIECE;
use cohort_proto::v1;
use cohort_proto::v1::from_tokenizer::Kind as From;
use cohort_proto::v1::to_tokenizer::Kind as To;
use cohort_proto::v1::tokenize_server::Tokenize;
use rayon::prelude::*;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::driver::Cluster;
use crate::status::invalid;

/// Text of a batch. With one token a byte, its tokens still fit into a message, unless a text that cannot be cut is among
/// them: a worker then says that it failed.
const BATCH_BYTES: usize = 512 << 10;

/// Longer texts, which come of tokenizers that cannot be cut, are encoded here.
const MAX_TEXT: usize = 1 << 20;

/// Batches that wait for each that a worker takes, so that none has to wait for text.
const AHEAD: usize = 2;

/// Batches that a worker is given at a time, at most.
const MAX_TAKES: u32 = 256;

/// Batches that are under way at a time, at most: some hundred megabytes.
const MAX_WIDTH: usize = 256;

/// How long a worker may take for a batch, and for taking a message.
const PATIENCE: Duration = Duration::from_secs(30);

/// Workers that may lose a batch before it is encoded here: it may be why they were lost.
const MOST_LOST: u32 = 2;

/// Messages that wait for one slow worker.
const OUTBOX: usize = 4;

const POISON: &str = "no thread panics while it holds this lock";

/// Serves [`Tokenize`].
pub struct TokenizeService {
    /// Who has a session, and what there is to do.
    pub cluster: Cluster,
}

#[tonic::async_trait]
impl Tokenize for TokenizeService {
    type BatchesStream = ReceiverStream<Result<v1::ToTokenizer, Status>>;

    async fn batches(
        &self,
        request: Request<Streaming<v1::FromTokenizer>>,
    ) -> Result<Response<Self::BatchesStream>, Status> {
        let session = session_of(&self.cluster, request.metadata())?;
        let tokenizing = self.cluster.tokenizing();
        let batches = tokenizing.serve(session, request.into_inner());
        Ok(Response::new(ReceiverStream::new(batches)))
    }
}

/// The batches of all corpora that are being prepared, and the workers that encode them. Clones share it.
#[derive(Clone, Debug)]
pub struct Tokenizing(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// A batch is encoded, or the workers have changed.
    changed: Condvar,
    patience: Duration,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Batches that nobody works on.
    queue: VecDeque<Arc<Batch>>,
    workers: BTreeMap<u64, Seat>,
}

/// A worker that is connected.
#[derive(Debug)]
struct Seat {
    /// Batches that it takes at a time.
    takes: usize,
    /// There may be something for it.
    wake: Arc<Notify>,
}

/// Texts, and what becomes of them.
#[derive(Debug)]
struct Batch {
    id: u64,
    tokenizer: Arc<Tokenizer>,
    texts: Vec<String>,
    tokens: Mutex<Option<Tokens>>,
    /// Workers that had it and did not give it back.
    lost: AtomicU32,
}

impl Batch {
    /// Settles it, unless somebody was faster.
    fn settle(&self, tokens: Tokens) {
        self.tokens.lock().expect(POISON).get_or_insert(tokens);
    }

    fn is_settled(&self) -> bool {
        self.tokens.lock().expect(POISON).is_some()
    }

    fn can_travel(&self) -> bool {
        let lost = self.lost.load(Ordering::Relaxed);
        lost < MOST_LOST && self.texts.iter().all(|text| text.len() <= MAX_TEXT)
    }
}

impl State {
    /// Batches that all workers take together.
    fn takes(&self) -> usize {
        self.workers.values().map(|seat| seat.takes).sum()
    }

    fn wake_all(&self) {
        self.workers
            .values()
            .for_each(|seat| seat.wake.notify_one());
    }

    /// Takes what is to be encoded here by the one who waits for `wanted` out of the queue, all of one tokenizer: everything,
    /// where there is no worker; that batch, if no worker takes it; what is too much for the workers, the last first.
    fn claim(&mut self, wanted: &Batch) -> Vec<Arc<Batch>> {
        let takes = self.takes();
        if takes > 0 && !wanted.can_travel() {
            let at = self.queue.iter().position(|batch| batch.id == wanted.id);
            return at
                .and_then(|at| self.queue.remove(at))
                .into_iter()
                .collect();
        }
        let most = match takes {
            0 => usize::MAX,
            _ => (self.queue.len().saturating_sub(takes)).min(rayon::current_num_threads()),
        };
        let mut claimed = Vec::new();
        for at in (0..self.queue.len()).rev() {
            if claimed.len() < most && Arc::ptr_eq(&self.queue[at].tokenizer, &wanted.tokenizer) {
                claimed.extend(self.queue.remove(at));
            }
        }
        claimed
    }
}

impl Default for Tokenizing {
    fn default() -> Self {
        Self::with_patience(PATIENCE)
    }
}

impl Tokenizing {
    fn with_patience(patience: Duration) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            patience,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect(POISON)
    }

    /// Wakes those who wait. What they look at was changed before; the lock is for those who have looked and are about to
    /// wait.
    fn tell(&self) {
        drop(self.lock());
        self.0.changed.notify_all();
    }

    /// Workers that take text now.
    pub fn workers(&self) -> usize {
        let state = self.lock();
        state.workers.values().filter(|seat| seat.takes > 0).count()
    }

    /// Serves a worker until its stream ends.
    pub fn serve(
        &self,
        session: SessionId,
        incoming: Streaming<v1::FromTokenizer>,
    ) -> mpsc::Receiver<Result<v1::ToTokenizer, Status>> {
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let wake = Arc::<Notify>::default();
        let number = {
            let mut state = self.lock();
            state.next += 1;
            let number = state.next;
            let seat = Seat {
                takes: 0,
                wake: wake.clone(),
            };
            state.workers.insert(number, seat);
            number
        };
        let mut worker = Worker {
            tokenizing: self.clone(),
            number,
            session,
            given: BTreeMap::new(),
            tokenizer: None,
            agrees: None,
            encoded: 0,
            out: out.clone(),
        };
        tokio::spawn(async move {
            let ended = worker.serve(incoming, &wake).await;
            // Its batches are free before anybody waits for a stream that takes nothing any more.
            drop(worker);
            if let Err(status) = ended {
                warn!(worker = %session, reason = status.message(), "it tokenizes no more");
                // Nobody reads it where the connection is gone.
                let _ = out.send(Err(status)).await;
            }
        });
        outgoing
    }
}

/// A worker's stream.
struct Worker {
    tokenizing: Tokenizing,
    number: u64,
    session: SessionId,
    /// What it works on, and until when.
    given: BTreeMap<u64, (Arc<Batch>, Instant)>,
    /// The tokenizer that it has.
    tokenizer: Option<Arc<Tokenizer>>,
    /// The one with which it was seen to encode as this process does.
    agrees: Option<Arc<Tokenizer>>,
    encoded: u64,
    out: mpsc::Sender<Result<v1::ToTokenizer, Status>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut state = self.tokenizing.lock();
        state.workers.remove(&self.number);
        for (batch, _) in std::mem::take(&mut self.given).into_values().rev() {
            batch.lost.fetch_add(1, Ordering::Relaxed);
            if !batch.is_settled() {
                state.queue.push_front(batch);
            }
        }
        state.wake_all();
        self.tokenizing.0.changed.notify_all();
        if self.encoded > 0 {
            info!(worker = %self.session, batches = self.encoded, "has tokenized");
        }
    }
}

impl Worker {
    async fn serve(
        &mut self,
        mut incoming: Streaming<v1::FromTokenizer>,
        wake: &Notify,
    ) -> Result<(), Status> {
        loop {
            self.give().await?;
            let late = self.given.values().map(|(_, until)| *until).min();
            let late = late.unwrap_or_else(|| Instant::now() + self.patience());
            // What has come is read before anybody is called late.
            tokio::select! {
                biased;
                message = incoming.next() => match message {
                    // The connection is gone; the session notices by itself.
                    None | Some(Err(_)) => return Ok(()),
                    Some(Ok(message)) => self.take(message).await?,
                },
                () = wake.notified() => {}
                () = sleep_until(late) => if !self.given.is_empty() {
                    return Err(self.late("gave back no tokens of a batch"));
                },
            }
        }
    }

    fn patience(&self) -> Duration {
        self.tokenizing.0.patience
    }

    fn late(&self, what: &str) -> Status {
        let seconds = self.patience().as_secs();
        Status::deadline_exceeded(format!("it {what} in {seconds} s"))
    }

    /// Gives it as much as it takes.
    async fn give(&mut self) -> Result<(), Status> {
        while let Some(batch) = self.next() {
            if !is(self.tokenizer.as_ref(), &batch.tokenizer) {
                self.send_tokenizer(&batch.tokenizer).await?;
                self.tokenizer = Some(batch.tokenizer.clone());
            }
            let texts = v1::TextBatch {
                id: batch.id,
                check: texts_check(&batch.texts),
                texts: batch.texts.clone(),
            };
            self.send(To::Texts(texts)).await?;
        }
        Ok(())
    }

    /// The next batch for it. It is noted before it is sent, so that it is not lost with the connection.
    fn next(&mut self) -> Option<Arc<Batch>> {
        let mut state = self.tokenizing.lock();
        let takes = state.workers.get(&self.number)?.takes;
        while self.given.len() < takes {
            let at = state.queue.iter().position(|batch| batch.can_travel())?;
            let batch = state.queue.remove(at)?;
            if batch.is_settled() {
                continue;
            }
            let until = Instant::now() + self.patience();
            self.given.insert(batch.id, (batch.clone(), until));
            return Some(batch);
        }
        None
    }

    async fn send_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), Status> {
        let mut pieces = tokenizer.to_json().as_bytes().chunks(MAX_PIECE).peekable();
        while let Some(piece) = pieces.next() {
            let last = pieces.peek().is_none();
            self.send(To::Tokenizer(v1::TokenizerPiece {
                json: piece.to_vec().into(),
                eos: last.then_some(tokenizer.eos()),
            }))
            .await?;
        }
        Ok(())
    }

    /// # Errors
    /// Of a worker that takes nothing. A connection that is gone is none here: it ends what comes in.
    async fn send(&self, kind: To) -> Result<(), Status> {
        let message = Ok(v1::ToTokenizer { kind: Some(kind) });
        match self.out.send_timeout(message, self.patience()).await {
            Err(SendTimeoutError::Timeout(_)) => Err(self.late("took no message")),
            Ok(()) | Err(SendTimeoutError::Closed(_)) => Ok(()),
        }
    }

    async fn take(&mut self, message: v1::FromTokenizer) -> Result<(), Status> {
        match message.kind {
            Some(From::Takes(takes)) => {
                let mut state = self.tokenizing.lock();
                if let Some(seat) = state.workers.get_mut(&self.number) {
                    seat.takes = takes.batches.min(MAX_TAKES) as usize;
                }
                self.tokenizing.0.changed.notify_all();
                Ok(())
            }
            Some(From::Tokens(tokens)) => self.settle(tokens).await,
            Some(From::Failed(id)) => {
                // It is encoded here, which finds the reason, if there is one.
                if let Some((batch, _)) = self.given.remove(&id) {
                    let tokenizer = batch.tokenizer.clone();
                    let encode = move || batch.settle(encode_batch(&tokenizer, &batch.texts));
                    let _ = tokio::task::spawn_blocking(encode).await;
                    self.tokenizing.tell();
                }
                Ok(())
            }
            None => Err(invalid("a message without content")),
        }
    }

    async fn settle(&mut self, tokens: v1::TokenBatch) -> Result<(), Status> {
        let Some((batch, _)) = self.given.get(&tokens.id).cloned() else {
            return Ok(());
        };
        let ids: Vec<Vec<u32>> = tokens.texts.into_iter().map(|text| text.ids).collect();
        if tokens_check(ids.iter().map(Vec::as_slice)) != tokens.check {
            return Err(Status::data_loss("tokens were changed on their way"));
        }
        let vocabulary = batch.tokenizer.vocab_size();
        let known = ids.iter().flatten().all(|id| *id < vocabulary);
        if !known || ids.len() != batch.texts.len() {
            let (came, texts) = (ids.len(), batch.texts.len());
            return Err(invalid(format!(
                "tokens of {came} texts for a batch of {texts}, or ids beyond the vocabulary of {vocabulary}; run the \
                 same version of cohort on both"
            )));
        }
        self.compare(&batch, &ids).await?;
        batch.settle(Ok(ids));
        self.given.remove(&tokens.id);
        self.encoded += 1;
        self.tokenizing.tell();
        Ok(())
    }

    /// Whether this worker encodes as this process does, by one text for each tokenizer.
    async fn compare(&mut self, batch: &Arc<Batch>, ids: &[Vec<u32>]) -> Result<(), Status> {
        if is(self.agrees.as_ref(), &batch.tokenizer) {
            return Ok(());
        }
        let numbered = batch.texts.iter().enumerate();
        let Some((longest, _)) = numbered.max_by_key(|(_, text)| text.len()) else {
            return Ok(());
        };
        let compared = batch.clone();
        let here = move || compared.tokenizer.encode(&compared.texts[longest]);
        let here = tokio::task::spawn_blocking(here).await;
        let here = here.map_err(|_| Status::internal("encoding failed here"))?;
        if here.ok().as_ref() != Some(&ids[longest]) {
            let what =
                "it encodes otherwise than the coordinator; run the same version of cohort on both";
            return Err(Status::failed_precondition(what));
        }
        self.agrees = Some(batch.tokenizer.clone());
        Ok(())
    }
}

/// Whether the `known` one is there and the same.
fn is(known: Option<&Arc<Tokenizer>>, wanted: &Arc<Tokenizer>) -> bool {
    known.is_some_and(|known| Arc::ptr_eq(known, wanted))
}

impl BatchEncoder for Tokenizing {
    fn batch_bytes(&self) -> usize {
        BATCH_BYTES
    }

    fn width(&self) -> usize {
        let here = 2 * rayon::current_num_threads();
        here.max(AHEAD * self.lock().takes()).min(MAX_WIDTH)
    }

    fn begin(&self, tokenizer: &Arc<Tokenizer>, texts: Vec<String>) -> Box<dyn PendingBatch + '_> {
        let mut state = self.lock();
        state.next += 1;
        let batch = Arc::new(Batch {
            id: state.next,
            tokenizer: tokenizer.clone(),
            // There may be none, where all tokens were kept.
            tokens: Mutex::new(texts.is_empty().then(|| Ok(Vec::new()))),
            texts,
            lost: AtomicU32::new(0),
        });
        if !batch.is_settled() {
            state.queue.push_back(batch.clone());
            state.wake_all();
        }
        Box::new(Waiting {
            tokenizing: self,
            batch,
        })
    }
}

/// Somebody who waits for a batch; if nobody does any more, as the preparation failed, it is not encoded again.
struct Waiting<'a> {
    tokenizing: &'a Tokenizing,
    batch: Arc<Batch>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Where a worker has it, it need not give it back.
        self.batch.settle(Ok(Vec::new()));
        let mut state = self.tokenizing.lock();
        state.queue.retain(|batch| batch.id != self.batch.id);
    }
}

impl PendingBatch for Waiting<'_> {
    fn wait(self: Box<Self>) -> Tokens {
        let mut state = self.tokenizing.lock();
        loop {
            if let Some(tokens) = self.batch.tokens.lock().expect(POISON).take() {
                return tokens;
            }
            let claimed = state.claim(&self.batch);
            if claimed.is_empty() {
                state = self.tokenizing.0.changed.wait(state).expect(POISON);
                continue;
            }
            drop(state);
            encode_here(&claimed);
            self.tokenizing.tell();
            state = self.tokenizing.lock();
        }
    }
}

/// Encodes batches of one tokenizer on all cores.
fn encode_here(batches: &[Arc<Batch>]) {
    batches
        .par_iter()
        .for_each(|batch| batch.settle(encode_batch(&batch.tokenizer, &batch.texts)));
}

#[cfg(test)]
mod tests;
