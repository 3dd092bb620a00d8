//! A connection to a coordinator, with a typed method for each call. Bulk data has a connection of its own, so that it
//! never holds up control.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use cohort_common::api::{
    AuditReport, ClusterInfo, ClusterView, CorpusHead, CorpusInfo, CountedCorpus, HeadRequest,
    History, HistoryRequest, MetricsRequest, NumberedEvent, PrepareCorpus, PrepareEvent, Removed,
    Resolved, RunInfo, RunView, StepMetrics, Submit, Submitted,
};
use cohort_common::net::{self, ConnectError, Credentials, Found, Places, Token};
use cohort_common::security::Whom;
use cohort_common::wire::{self, MAX_MESSAGE};
use cohort_proto::v1;
use cohort_proto::v1::client_client::ClientClient;
use cohort_proto::v1::data_client::DataClient;
use serde::de::DeserializeOwned;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::failure::hinted;

type Service = InterceptedService<Channel, Credentials>;

/// A coordinator that answers.
#[derive(Clone)]
pub struct Client {
    url: String,
    credentials: Credentials,
    control: ClientClient<Service>,
    same_home: bool,
    standing_by: Vec<(String, String)>,
}

/// How long a command waits for a coordinator that leads, where some stand by: a lease lasts 10 s if nothing is said.
const TAKEOVER: Duration = Duration::from_secs(30);

/// How often it looks.
const LOOK: Duration = Duration::from_millis(250);

/// The coordinator that leads. Where all that answer stand by, one of them soon does.
async fn leader(places: &Places, credentials: &Credentials) -> Result<Found, ConnectError> {
    let until = Instant::now() + TAKEOVER;
    let mut told = false;
    loop {
        match places.leader(credentials).await {
            Err(ConnectError::NobodyLeads(_)) if Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    eprintln!("no coordinator leads now; waiting for one to take over");
                }
                sleep(LOOK).await;
            }
            found => return found,
        }
    }
}

/// Files that a checkpoint consists of, on the coordinator's side.
pub type Files = Vec<v1::FileInfo>;

impl Client {
    /// Connects to the one of these coordinators that leads. `here` is where the one listens that works on this machine, on the
    /// client's own home directory.
    pub async fn connect(
        places: &Places,
        token: Option<Token>,
        here: Option<&str>,
    ) -> Result<Self> {
        let trust = token.as_ref().and_then(Token::trust);
        let credentials = Credentials {
            token,
            trust,
            ..Credentials::default()
        };
        let found = leader(places, &credentials).await?;
        let control = ClientClient::with_interceptor(found.channel, credentials.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        Ok(Self {
            same_home: here == Some(found.url.as_str()),
            url: found.url,
            standing_by: found.standing_by,
            credentials,
            control,
        })
    }

    /// Where the coordinator listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What its calls carry.
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Coordinators that answered before it, and stand by, with what they say of themselves.
    pub fn standing_by(&self) -> &[(String, String)] {
        &self.standing_by
    }

    /// Whether the coordinator reads this machine's files.
    pub fn same_home(&self) -> bool {
        self.same_home
    }

    /// The coordinator and its workers.
    pub async fn cluster(&mut self) -> Result<ClusterInfo> {
        let reply = self.control.cluster(v1::Empty {}).await;
        self.take(reply)
    }

    /// What a person sees of the cluster.
    pub async fn view_cluster(&mut self) -> Result<ClusterView> {
        let reply = self.control.view_cluster(v1::Empty {}).await;
        self.take(reply)
    }

    /// What a person sees of a run.
    pub async fn view_run(&mut self, run: &str) -> Result<RunView> {
        let reply = self.control.view_run(named(run)).await;
        self.take(reply)
    }

    /// The steps of a run, put together to some points.
    pub async fn history(&mut self, request: &HistoryRequest) -> Result<History> {
        let reply = self.control.history(wire::json(request)).await;
        self.take(reply)
    }

    /// The steps of a run, each as it is kept.
    pub async fn metrics(&mut self, request: &MetricsRequest) -> Result<Events> {
        let reply = self.control.metrics(wire::json(request)).await;
        self.stream(reply)
    }

    /// Starts a preparation; its events follow.
    pub async fn prepare_corpus(&mut self, request: &PrepareCorpus) -> Result<Events> {
        let reply = self.control.prepare_corpus(wire::json(request)).await;
        self.stream(reply)
    }

    /// All corpora.
    pub async fn corpora(&mut self) -> Result<Vec<CorpusInfo>> {
        let reply = self.control.list_corpora(v1::Empty {}).await;
        self.take(reply)
    }

    /// One corpus.
    pub async fn corpus(&mut self, name: &str) -> Result<CorpusInfo> {
        let reply = self.control.show_corpus(named(name)).await;
        self.take(reply)
    }

    /// The first documents of a corpus.
    pub async fn head_corpus(&mut self, request: &HeadRequest) -> Result<CorpusHead> {
        let reply = self.control.head_corpus(wire::json(request)).await;
        self.take(reply)
    }

    /// What is in a corpus, counted.
    pub async fn count_corpus(&mut self, name: &str) -> Result<CountedCorpus> {
        let reply = self.control.count_corpus(named(name)).await;
        self.take(reply)
    }

    /// Deletes a corpus.
    pub async fn remove_corpus(&mut self, name: &str) -> Result<Removed> {
        let reply = self.control.remove_corpus(named(name)).await;
        self.take(reply)
    }

    /// Queues a run.
    pub async fn submit(&mut self, submit: &Submit) -> Result<Submitted> {
        let reply = self.control.submit(wire::json(submit)).await;
        self.take(reply)
    }

    /// All runs.
    pub async fn runs(&mut self) -> Result<Vec<RunInfo>> {
        let reply = self.control.list_runs(v1::Empty {}).await;
        self.take(reply)
    }

    /// One run.
    pub async fn run(&mut self, run: &str) -> Result<RunInfo> {
        let reply = self.control.get_run(named(run)).await;
        self.take(reply)
    }

    /// The events of a run after one of them.
    pub async fn follow(&mut self, run: &str, after: u64) -> Result<Events> {
        let run = run.to_owned();
        let reply = self.control.follow(v1::FollowRequest { run, after }).await;
        self.stream(reply)
    }

    /// Ends a run for good.
    pub async fn cancel(&mut self, run: &str) -> Result<RunInfo> {
        let reply = self.control.cancel(named(run)).await;
        self.take(reply)
    }

    /// Checkpoints a run and stops it.
    pub async fn stop(&mut self, run: &str) -> Result<RunInfo> {
        let reply = self.control.stop(named(run)).await;
        self.take(reply)
    }

    /// Deletes a run, or says what that would delete.
    pub async fn remove_run(&mut self, run: &str, dry_run: bool) -> Result<Removed> {
        let run = run.to_owned();
        let reply = self
            .control
            .remove_run(v1::RemoveRequest { run, dry_run })
            .await;
        self.take(reply)
    }

    /// Finds a checkpoint.
    pub async fn resolve(&mut self, reference: &str) -> Result<Resolved> {
        let reply = self.control.resolve(named(reference)).await;
        self.take(reply)
    }

    /// The ledger of a run.
    pub async fn ledger(&mut self, run: &str) -> Result<Events> {
        let reply = self.control.ledger(named(run)).await;
        self.stream(reply)
    }

    /// Checks a run's ledger and checkpoints in full.
    pub async fn verify(&mut self, run: &str) -> Result<AuditReport> {
        let reply = self.control.verify(named(run)).await;
        self.take(reply)
    }

    /// Checkpoints a run and lets it rest until it is resumed.
    pub async fn pause(&mut self, run: &str) -> Result<RunInfo> {
        let reply = self.control.pause(named(run)).await;
        self.take(reply)
    }

    /// Checkpoints a run that goes on; answers once the checkpoint counts.
    pub async fn checkpoint(&mut self, run: &str) -> Result<RunInfo> {
        let reply = self.control.checkpoint(named(run)).await;
        self.take(reply)
    }

    /// Goes on with a run that rests.
    pub async fn resume(&mut self, run: &str) -> Result<RunInfo> {
        let reply = self.control.resume(named(run)).await;
        self.take(reply)
    }

    /// A connection for bulk data.
    pub async fn data(&self) -> Result<Data> {
        let channel = connect(&self.url, &self.credentials).await?;
        let data = DataClient::with_interceptor(channel, self.credentials.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        Ok(Data {
            url: self.url.clone(),
            data,
        })
    }

    fn take<T: DeserializeOwned>(
        &self,
        reply: Result<tonic::Response<v1::Json>, Status>,
    ) -> Result<T> {
        let reply = reply.map_err(|status| refused(&self.url, &status))?;
        understood(&reply.into_inner())
    }

    fn stream(
        &self,
        reply: Result<tonic::Response<Streaming<v1::Json>>, Status>,
    ) -> Result<Events> {
        let reply = reply.map_err(|status| refused(&self.url, &status))?;
        Ok(Events {
            url: self.url.clone(),
            stream: reply.into_inner(),
        })
    }
}

/// A stream of events from a coordinator.
pub struct Events {
    url: String,
    stream: Streaming<v1::Json>,
}

impl Events {
    /// The next event of a preparation.
    pub async fn next_of_preparation(&mut self) -> Result<Option<PrepareEvent>> {
        self.next().await
    }

    /// The next event of a run.
    pub async fn next_of_run(&mut self) -> Result<Option<NumberedEvent>> {
        self.next().await
    }

    /// The next steps of a run.
    pub async fn next_steps(&mut self) -> Result<Option<Vec<StepMetrics>>> {
        self.next().await
    }

    /// The next line of a ledger, as the coordinator wrote it.
    pub async fn next_line(&mut self) -> Result<Option<Vec<u8>>> {
        let message = self.stream.message().await;
        let message = message.map_err(|status| refused(&self.url, &status))?;
        Ok(message.map(|message| message.json.into()))
    }

    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let message = self.stream.message().await;
        match message.map_err(|status| refused(&self.url, &status))? {
            Some(message) => understood(&message).map(Some),
            None => Ok(None),
        }
    }
}

/// A connection for bulk data.
pub struct Data {
    url: String,
    data: DataClient<Service>,
}

impl Data {
    /// Which files the coordinator lacks, and from which byte on.
    pub async fn missing(&mut self, hashes: Vec<String>) -> Result<Vec<v1::MissingFile>> {
        let reply = self.data.missing_files(v1::MissingRequest { hashes }).await;
        let reply = reply.map_err(|status| refused(&self.url, &status))?;
        Ok(reply.into_inner().files)
    }

    /// Sends a file, in pieces.
    pub async fn upload(
        &mut self,
        pieces: impl tokio_stream::Stream<Item = v1::FilePiece> + Send + 'static,
    ) -> Result<()> {
        let reply = self.data.upload_file(pieces).await;
        reply.map_err(|status| refused(&self.url, &status))?;
        Ok(())
    }

    /// The files of a run's checkpoint.
    pub async fn checkpoint_files(&mut self, run: &str, step: u64) -> Result<Files> {
        let reply = self.data.state_files(checkpoint(run, step)).await;
        let reply = reply.map_err(|status| refused(&self.url, &status))?;
        Ok(reply.into_inner().files)
    }

    /// Writes a file of a checkpoint to `target`, and compares it with its hash. `progress` hears of each piece.
    pub async fn fetch(
        &mut self,
        (run, step): (&str, u64),
        file: &v1::FileInfo,
        target: &Path,
        progress: &dyn Fn(u64),
    ) -> Result<()> {
        let request = v1::StateFileRequest {
            source: Some(checkpoint(run, step)),
            name: file.name.clone(),
        };
        let reply = self.data.state_file(request).await;
        let mut pieces = reply.map_err(|s| refused(&self.url, &s))?.into_inner();
        let cannot_write = || format!("cannot write `{}`", target.display());
        let mut out = tokio::fs::File::create(target)
            .await
            .with_context(cannot_write)?;
        let mut hasher = blake3::Hasher::new();
        while let Some(piece) = pieces.message().await.map_err(|s| refused(&self.url, &s))? {
            hasher.update(&piece.data);
            out.write_all(&piece.data)
                .await
                .with_context(cannot_write)?;
            progress(piece.data.len() as u64);
        }
        out.sync_all().await.with_context(cannot_write)?;
        let found = hasher.finalize().to_hex();
        if found.as_str() != file.hash {
            return Err(hinted(
                format!("`{}` of {run}@{step} arrived damaged", file.name),
                "try again; if it happens again, the coordinator's disk is damaged",
            ));
        }
        Ok(())
    }

    /// A small file of a checkpoint.
    pub async fn small_file(&mut self, run: &str, step: u64, name: &str) -> Result<Vec<u8>> {
        const LIMIT: usize = 256 << 20;
        let request = v1::StateFileRequest {
            source: Some(checkpoint(run, step)),
            name: name.into(),
        };
        let reply = self.data.state_file(request).await;
        let mut pieces = reply.map_err(|s| refused(&self.url, &s))?.into_inner();
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.message().await.map_err(|s| refused(&self.url, &s))? {
            bytes.extend_from_slice(&piece.data);
            if bytes.len() > LIMIT {
                return Err(anyhow!("`{name}` of {run}@{step} is too large"));
            }
        }
        Ok(bytes)
    }
}

fn named(name: &str) -> v1::Name {
    v1::Name { name: name.into() }
}

fn checkpoint(run: &str, step: u64) -> v1::StateSource {
    v1::StateSource {
        run: run.into(),
        from: Some(v1::state_source::From::Checkpoint(step)),
    }
}

fn understood<T: DeserializeOwned>(message: &v1::Json) -> Result<T> {
    wire::from_json(message).map_err(|error| {
        anyhow::Error::new(error).context(
            "the coordinator's answer cannot be understood; it may be of another version of Cohort",
        )
    })
}

/// What a coordinator says is a sentence for people; what the transport says needs a frame.
fn refused(url: &str, status: &Status) -> anyhow::Error {
    let message = status.message().trim();
    // What the coordinator says has no cause on this side; what the connection says has.
    let lost = std::error::Error::source(status).is_some();
    match status.code() {
        code if lost || code == Code::Unavailable => hinted(
            format!("the connection to the coordinator at {url} is lost: {message}"),
            "if it has ended, start it again; `cohort follow RUN` comes back to a run",
        ),
        Code::Unimplemented => hinted(
            format!("the coordinator at {url} does not know this call"),
            "use the same version of Cohort on both sides",
        ),
        _ if message.is_empty() => anyhow!("the coordinator at {url} failed: {}", status.code()),
        _ => anyhow!("{message}"),
    }
}

async fn connect(url: &str, credentials: &Credentials) -> Result<Channel, ConnectError> {
    net::connect(url, credentials.trust.as_ref(), Whom::Coordinator).await
}
