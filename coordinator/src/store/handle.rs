//! The store for many: requests queue up for the one thread that owns the database, and what has queued up while the
//! last transaction was flushed becomes the next one (group commit).
//!
//! An answer arrives when its transaction is durable. A request that fails takes nothing back but its own changes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};

use tokio::sync::{mpsc, oneshot};

use super::{Store, StoreError};

/// Requests that may wait; more make the sender wait.
const QUEUE: usize = 1024;

/// Requests in one transaction.
const GROUP: usize = 256;

/// Sends the answer, once it is known whether the transaction is durable.
type Reply = Box<dyn FnOnce(Result<(), &StoreError>) + Send>;

/// A request. Without a store, because no transaction could begin, it answers with the error at once.
type Job = Box<dyn FnOnce(Result<&Store, &StoreError>) -> Option<Reply> + Send>;

/// A way to the store that can be cloned and sent. The store closes when the last one is dropped.
#[derive(Clone, Debug)]
pub struct StoreHandle {
    jobs: mpsc::Sender<Job>,
}

/// The answer to come of a request that is queued. Dropping it does not take the request back.
#[derive(Debug)]
#[must_use = "the request may fail"]
pub struct Receipt<T>(oneshot::Receiver<Result<T, StoreError>>);

impl<T> Receipt<T> {
    /// Waits for the answer outside of an async context.
    pub fn wait(self) -> Result<T, StoreError> {
        self.0.blocking_recv().unwrap_or(Err(StoreError::Closed))
    }
}

impl<T> Future for Receipt<T> {
    type Output = Result<T, StoreError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = Pin::new(&mut self.0).poll(context);
        answer.map(|received| received.unwrap_or(Err(StoreError::Closed)))
    }
}

impl StoreHandle {
    /// Gives the store a thread of its own. Join it, after the last handle is dropped, to know that all is written.
    pub fn spawn(store: Store) -> (Self, JoinHandle<()>) {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let thread = thread::Builder::new()
            .name("store".into())
            .spawn(move || serve(&store, queue))
            .expect("a thread can be started");
        (Self { jobs }, thread)
    }

    /// Queues a request, and waits only while the queue is full. Requests of one sender are served in their order.
    pub async fn submit<T: Send + 'static>(
        &self,
        request: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<Receipt<T>, StoreError> {
        let (job, receipt) = job(request);
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        Ok(receipt)
    }

    /// Queues a request without waiting; [`StoreError::Busy`] if the queue is full.
    pub fn try_submit<T: Send + 'static>(
        &self,
        request: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<Receipt<T>, StoreError> {
        let (job, receipt) = job(request);
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => StoreError::Busy,
            mpsc::error::TrySendError::Closed(_) => StoreError::Closed,
        })?;
        Ok(receipt)
    }

    /// Queues a request and waits until it is durable.
    pub async fn call<T: Send + 'static>(
        &self,
        request: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.submit(request).await?.await
    }

    /// [`StoreHandle::call`] outside of an async context.
    pub fn call_blocking<T: Send + 'static>(
        &self,
        request: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, receipt) = job(request);
        self.jobs
            .blocking_send(job)
            .map_err(|_| StoreError::Closed)?;
        receipt.wait()
    }
}

fn job<T: Send + 'static>(
    request: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> (Job, Receipt<T>) {
    let (sender, receiver) = oneshot::channel();
    let not_durable = |error: &StoreError| StoreError::NotDurable(error.chain());
    let job: Job = Box::new(move |store| {
        let result = match store {
            Ok(store) => store.in_savepoint(request),
            Err(error) => {
                // Whoever asked may have gone; that is their right.
                let _ = sender.send(Err(not_durable(error)));
                return None;
            }
        };
        Some(Box::new(move |committed| {
            let answer = match committed {
                Ok(()) => result,
                Err(error) => result.and(Err(not_durable(error))),
            };
            let _ = sender.send(answer);
        }))
    });
    (job, Receipt(receiver))
}

/// The thread of the store: ends when all handles are dropped and the queue is empty.
fn serve(store: &Store, mut queue: mpsc::Receiver<Job>) {
    while let Some(first) = queue.blocking_recv() {
        if let Err(error) = store.execute_batch("BEGIN") {
            first(Err(&error));
            continue;
        }
        let mut replies = Vec::new();
        let mut next = Some(first);
        while let Some(job) = next {
            replies.extend(job(Ok(store)));
            // SQLite may give up a whole transaction on its own, on a full disk for example.
            let go_on = replies.len() < GROUP && !store.connection.is_autocommit();
            next = if go_on { queue.try_recv().ok() } else { None };
        }
        let committed = store.execute_batch("COMMIT");
        if let Err(error) = &committed {
            tracing::error!(error = error.chain(), "a transaction was not saved");
            if !store.connection.is_autocommit() {
                let _ = store.execute_batch("ROLLBACK");
            }
        }
        for reply in replies {
            reply(committed.as_ref().map(|_| ()));
        }
    }
}

impl Store {
    /// Runs `request` so that, if it fails, none of its changes stay.
    fn in_savepoint<T>(
        &self,
        request: impl FnOnce(&Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.execute_batch("SAVEPOINT request")?;
        let result = request(self);
        if result.is_err() && !self.connection.is_autocommit() {
            self.execute_batch("ROLLBACK TO request")?;
        }
        if !self.connection.is_autocommit() {
            self.execute_batch("RELEASE request")?;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{name, new_run, store_with_run};
    use super::super::{RunStatus, StepRow};
    use super::*;

    #[tokio::test]
    async fn requests_are_answered_in_order_when_durable() {
        let (dir, store) = store_with_run("tiny-1");
        let path = store.path().to_owned();
        let (handle, thread) = StoreHandle::spawn(store);
        let mut receipts = Vec::new();
        for step in 0..1000u64 {
            let row = StepRow {
                step,
                horizon: 1000,
                loss: 1.0,
                grad_norm: 1.0,
                learning_rate: 1.0,
                tokens: step,
                tokens_per_second: 1.0,
                epoch: 0.0,
                bits_per_byte: None,
                mfu: None,
                time_ms: step,
                skipped: false,
            };
            let record = move |store: &Store| store.record_step(&name("tiny-1"), &row);
            receipts.push(handle.submit(record).await.unwrap());
        }
        for receipt in receipts {
            receipt.await.unwrap();
        }
        let reader = Store::open_read_only(&path).unwrap();
        assert_eq!(
            reader.steps(&name("tiny-1"), None, 2000).unwrap().len(),
            1000
        );
        drop(handle);
        thread.join().unwrap();
        drop(dir);
    }

    #[tokio::test]
    async fn a_request_that_fails_takes_back_only_its_own_changes() {
        let (_dir, store) = store_with_run("tiny-1");
        let (handle, _thread) = StoreHandle::spawn(store);
        let gate = handle.submit(|_| {
            // Holds the thread, so that what follows falls into one transaction.
            thread::sleep(std::time::Duration::from_millis(30));
            Ok(())
        });
        let gate = gate.await.unwrap();
        let good = handle
            .try_submit(|s| s.create_run(&new_run("tiny-2"), 1))
            .unwrap();
        let bad = handle.try_submit(|s| {
            s.set_status(&name("tiny-1"), RunStatus::Running, None, 1)?;
            s.create_run(&new_run("tiny-2"), 1)
        });
        let after = handle
            .try_submit(|s| s.create_run(&new_run("tiny-3"), 1))
            .unwrap();
        gate.await.unwrap();
        good.await.unwrap();
        assert!(matches!(bad.unwrap().await, Err(StoreError::RunExists(_))));
        after.await.unwrap();
        let rows = handle.call(|s| s.runs()).await.unwrap();
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|r| r.status == RunStatus::Queued));
    }

    #[test]
    fn a_full_disk_is_reported_and_the_store_goes_on() {
        let (_dir, store) = store_with_run("tiny-1");
        let pages: i64 = store
            .query_one("PRAGMA page_count", [], |row| row.get(0))
            .unwrap();
        // As if the disk were full.
        let limit = format!("PRAGMA max_page_count = {}", pages + 1);
        let _: i64 = store.query_one(&limit, [], |row| row.get(0)).unwrap();
        let (handle, thread) = StoreHandle::spawn(store);
        let text = "x".repeat(100_000);
        let result = handle.call_blocking(move |s| s.record_event(None, 1, "large", &text));
        assert!(matches!(result, Err(StoreError::Full(_))), "{result:?}");
        handle
            .call_blocking(|s| s.record_event(None, 1, "small", "fits"))
            .unwrap();
        drop(handle);
        thread.join().unwrap();
    }

    #[test]
    fn a_closed_store_says_so() {
        let (_dir, store) = store_with_run("tiny-1");
        let (handle, thread) = StoreHandle::spawn(store);
        let panicked =
            handle.call_blocking(|_| -> Result<(), _> { panic!("a bug, on purpose, in a test") });
        assert!(matches!(panicked, Err(StoreError::Closed)));
        assert!(thread.join().is_err());
        assert!(matches!(
            handle.call_blocking(|s| s.runs()),
            Err(StoreError::Closed)
        ));
    }
}
