//! The service of clients: rpcs of a few lines that check, ask and answer.

use cohort_common::api::{
    HeadRequest, HistoryRequest, MetricsRequest, PrepareCorpus, PrepareEvent, Removed, RunInfo,
    StepMetrics, Submit,
};
use cohort_common::home::RunName;
use cohort_common::net::Peer;
use cohort_common::wire::{from_json, json};
use cohort_proto::v1;
use cohort_proto::v1::client_server::Client;
use tokio::sync::{MutexGuard, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::access::{Access, Caller};
use crate::data::blocking;
use crate::driver::{Cluster, Command};
use crate::fetched::reach_of;
use crate::remote::Remote;
use crate::status::{chain, failed, invalid, refused, store_status};
use crate::store::Store;
use crate::{actions, audit, corpora, following, ledger, metrics, query, runs, view};

/// Serves [`Client`].
pub struct ClientService {
    /// The cluster.
    pub cluster: Cluster,
    /// Who may come in, and as what.
    pub access: Access,
}

type Reply = Result<Response<v1::Json>, Status>;
type JsonStream = ReceiverStream<Result<v1::Json, Status>>;

fn reply(value: &impl serde::Serialize) -> Reply {
    Ok(Response::new(json(value)))
}

fn parse<T: serde::de::DeserializeOwned>(request: Request<v1::Json>) -> Result<T, Status> {
    from_json(&request.into_inner()).map_err(invalid)
}

fn run_name(request: Request<v1::Name>) -> Result<RunName, Status> {
    RunName::new(&request.into_inner().name).map_err(invalid)
}

#[tonic::async_trait]
impl Client for ClientService {
    async fn cluster(&self, _: Request<v1::Empty>) -> Reply {
        reply(&self.cluster.ask(Command::Describe).await?)
    }

    async fn view_cluster(&self, _: Request<v1::Empty>) -> Reply {
        reply(&self.cluster.ask(Command::View).await?)
    }

    async fn view_run(&self, request: Request<v1::Name>) -> Reply {
        let name = run_name(request)?;
        reply(&view::live(&self.cluster, name).await?)
    }

    async fn history(&self, request: Request<v1::Json>) -> Reply {
        let request: HistoryRequest = parse(request)?;
        reply(&view::history(&self.cluster, request).await?)
    }

    type MetricsStream = JsonStream;

    async fn metrics(&self, request: Request<v1::Json>) -> Result<Response<JsonStream>, Status> {
        let request: MetricsRequest = parse(request)?;
        let name = RunName::new(&request.run).map_err(invalid)?;
        actions::describe(&self.cluster, name.clone()).await?;
        let database = self.cluster.home().database();
        let (out, outgoing) = mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            let send = |page: Vec<StepMetrics>| out.blocking_send(Ok(json(&page))).is_ok();
            // A connection of its own: the store's thread has steps to write.
            let read = Store::open_read_only(&database)
                .and_then(|store| metrics::read(&store, &name, &request, send));
            if let Err(error) = read {
                let _ = out.blocking_send(Err(store_status(error)));
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    type PrepareCorpusStream = JsonStream;

    async fn prepare_corpus(
        &self,
        request: Request<v1::Json>,
    ) -> Result<Response<JsonStream>, Status> {
        let peer = request.extensions().get::<Peer>();
        let reach = reach_of(peer.and_then(|peer| peer.address));
        let request: PrepareCorpus = parse(request)?;
        let cluster = self.cluster.clone();
        let home = cluster.home().clone();
        let tokenizing = cluster.tokenizing().clone();
        let (out, outgoing) = mpsc::channel(16);
        tokio::task::spawn_blocking(move || {
            // Progress that finds the channel full is left out: a newer one follows.
            let tell = |event: PrepareEvent| drop(out.try_send(Ok(json(&event))));
            let done = corpora::prepare(&home, request, reach, &tokenizing, &tell);
            if let (Ok(corpus), Some(remote)) = (&done, cluster.remote()) {
                remote.prepared(&corpus.fingerprint);
            }
            let last = done.map(|info| json(&PrepareEvent::Done(Box::new(info))));
            let _ = out.blocking_send(last);
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn list_corpora(&self, _: Request<v1::Empty>) -> Reply {
        let directory = self.cluster.home().corpora();
        reply(&blocking(move || corpora::list(&directory)).await?)
    }

    async fn show_corpus(&self, request: Request<v1::Name>) -> Reply {
        let name = request.into_inner().name;
        let directory = self.cluster.home().corpora();
        reply(&blocking(move || corpora::show(&directory, &name)).await?)
    }

    async fn head_corpus(&self, request: Request<v1::Json>) -> Reply {
        let request: HeadRequest = parse(request)?;
        let directory = self.cluster.home().corpora();
        reply(&blocking(move || corpora::head(&directory, &request)).await?)
    }

    async fn count_corpus(&self, request: Request<v1::Name>) -> Reply {
        let name = request.into_inner().name;
        let directory = self.cluster.home().corpora();
        reply(&blocking(move || corpora::count(&directory, &name)).await?)
    }

    async fn remove_corpus(&self, request: Request<v1::Name>) -> Reply {
        let name = request.into_inner().name;
        let runs = self.cluster.read_settled(query::runs).await?;
        let directory = self.cluster.home().corpora();
        let doomed = blocking(move || {
            let corpus = corpora::find(&directory, &name)?;
            let fingerprint = corpus.index().fingerprint.as_str();
            let needs = |r: &&RunInfo| {
                query::is_under_way(&r.status) && r.spec.training_corpora().contains(&fingerprint)
            };
            if let Some(run) = runs.iter().find(needs) {
                return Err(refused(format!(
                    "run `{}` needs this corpus; cancel it first",
                    run.name
                )));
            }
            Ok(corpus.index().fingerprint.clone())
        });
        let doomed = doomed.await?;
        let remote = self.cluster.remote();
        // Until it is gone here as well: what is copied meanwhile would be there again.
        let _alone = alone(remote).await;
        if let Some(remote) = remote {
            let removed = remote.remove_corpus(&doomed).await;
            removed
                .map_err(|error| refused(format!("nothing was deleted here: {}", chain(&error))))?;
        }
        let directory = self.cluster.home().corpora();
        reply(&blocking(move || corpora::remove(&directory, &doomed)).await?)
    }

    async fn submit(&self, request: Request<v1::Json>) -> Reply {
        let submit: Submit = parse(request)?;
        reply(&runs::submit(&self.cluster, submit).await?)
    }

    async fn list_runs(&self, _: Request<v1::Empty>) -> Reply {
        let mut runs = self.cluster.read_settled(query::runs).await?;
        let cluster = self.cluster.ask(Command::Describe).await?;
        for run in &mut runs {
            run.queue_place = query::place(&cluster.queued, &run.name);
            run.stored = actions::stored(&self.cluster, &run.name);
        }
        reply(&runs)
    }

    async fn get_run(&self, request: Request<v1::Name>) -> Reply {
        let name = run_name(request)?;
        reply(&actions::describe(&self.cluster, name).await?)
    }

    type FollowStream = JsonStream;

    async fn follow(
        &self,
        request: Request<v1::FollowRequest>,
    ) -> Result<Response<JsonStream>, Status> {
        let v1::FollowRequest { run, after } = request.into_inner();
        let name = RunName::new(&run).map_err(invalid)?;
        actions::describe(&self.cluster, name.clone()).await?;
        let (out, outgoing) = mpsc::channel(64);
        let cluster = self.cluster.clone();
        tokio::spawn(async move {
            if let Err(status) = following::send_events(&cluster, name, after, &out).await {
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn cancel(&self, request: Request<v1::Name>) -> Reply {
        reply(&actions::cancel(&self.cluster, run_name(request)?).await?)
    }

    async fn stop(&self, request: Request<v1::Name>) -> Reply {
        reply(&actions::stop(&self.cluster, run_name(request)?).await?)
    }

    async fn remove_run(&self, request: Request<v1::RemoveRequest>) -> Reply {
        let v1::RemoveRequest { run, dry_run } = request.into_inner();
        let name = RunName::new(&run).map_err(invalid)?;
        let info = actions::describe(&self.cluster, name.clone()).await?;
        if query::is_under_way(&info.status) {
            return Err(refused(format!(
                "run `{name}` is {}; cancel it first",
                info.status
            )));
        }
        let remote = self.cluster.remote().filter(|_| !dry_run);
        // Until it is gone here as well: what is copied meanwhile would be there again.
        let _alone = alone(remote).await;
        if let Some(remote) = remote {
            let removed = remote.remove_run(&name).await;
            removed
                .map_err(|error| refused(format!("nothing was deleted here: {}", chain(&error))))?;
        }
        let directory = self.cluster.home().run(&name);
        let removed = blocking(move || {
            let (bytes, files) = size(&directory).map_err(failed)?;
            if !dry_run && directory.exists() {
                std::fs::remove_dir_all(&directory).map_err(failed)?;
            }
            Ok((bytes, files))
        });
        let (bytes, files) = removed.await?;
        if !dry_run {
            let doomed = name.clone();
            let deleted = self.cluster.store().call(move |s| s.delete_run(&doomed));
            deleted.await.map_err(store_status)?;
            self.cluster.announce();
        }
        reply(&Removed {
            name: name.to_string(),
            bytes,
            files,
        })
    }

    async fn resolve(&self, request: Request<v1::Name>) -> Reply {
        let name = request.into_inner().name;
        reply(&query::resolve(&self.cluster, &name).await?)
    }

    type LedgerStream = JsonStream;

    async fn ledger(&self, request: Request<v1::Name>) -> Result<Response<JsonStream>, Status> {
        let name = run_name(request)?;
        actions::describe(&self.cluster, name.clone()).await?;
        let database = self.cluster.home().database();
        let (out, outgoing) = mpsc::channel(64);
        tokio::task::spawn_blocking(move || {
            let send = |line: String| {
                let json = line.into_bytes().into();
                out.blocking_send(Ok(v1::Json { json })).is_ok()
            };
            // A connection of its own: the store's thread has steps to write.
            let read = Store::open_read_only(&database).and_then(|s| ledger::read(&s, &name, send));
            if let Err(error) = read {
                let _ = out.blocking_send(Err(store_status(error)));
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn verify(&self, request: Request<v1::Name>) -> Reply {
        let name = run_name(request)?;
        let home = self.cluster.home().clone();
        let report = blocking(move || {
            let store = Store::open_read_only(&home.database()).map_err(store_status)?;
            audit::audit(&store, &home, &name, true).map_err(store_status)
        });
        reply(&report.await?)
    }

    async fn pause(&self, request: Request<v1::Name>) -> Reply {
        reply(&actions::pause(&self.cluster, run_name(request)?).await?)
    }

    async fn checkpoint(&self, request: Request<v1::Name>) -> Reply {
        reply(&actions::checkpoint(&self.cluster, run_name(request)?).await?)
    }

    async fn resume(&self, request: Request<v1::Name>) -> Reply {
        reply(&actions::resume(&self.cluster, run_name(request)?).await?)
    }

    async fn whoami(&self, request: Request<v1::Empty>) -> Reply {
        let caller = request.extensions().get::<Caller>();
        reply(&self.access.whoami(caller.copied()))
    }
}

/// Has nothing copied or written to the object store, if there is one, for as long as the answer lives.
async fn alone(remote: Option<&Remote>) -> Option<[MutexGuard<'_, ()>; 2]> {
    match remote {
        Some(remote) => Some([remote.alone().await, remote.unwritten().await]),
        None => None,
    }
}

/// Bytes and files below a directory.
fn size(directory: &std::path::Path) -> std::io::Result<(u64, u64)> {
    if !directory.exists() {
        return Ok((0, 0));
    }
    let mut total = (0, 0);
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let (bytes, files) = match entry.file_type()?.is_dir() {
            true => size(&entry.path())?,
            false => (entry.metadata()?.len(), 1),
        };
        total = (total.0 + bytes, total.1 + files);
    }
    Ok(total)
}
