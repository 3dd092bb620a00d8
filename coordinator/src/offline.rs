//! Read-only access to a home directory, for clients where no coordinator runs.

use std::path::Path;

use cohort_common::api::{
    AuditReport, CorpusHead, CorpusInfo, CountedCorpus, HeadRequest, History, HistoryRequest,
    MetricsRequest, Resolved, RunInfo, RunView, StepMetrics,
};
use cohort_common::home::{Home, RunName};

use crate::history::Columns;
use crate::status::invalid;
use crate::store::{RunStatus, Store};
use crate::{Error, audit, corpora, ledger, metrics, query, view};

fn open(home: &Path) -> Result<(Home, Store), Error> {
    let home = Home::open_read_only(home)?;
    let store = Store::open_read_only(&home.database())?;
    Ok((home, store))
}

/// All runs, oldest first.
pub fn runs(home: &Path) -> Result<Vec<RunInfo>, Error> {
    let (home, store) = open(home)?;
    let runs = query::runs(&store)?.into_iter();
    Ok(runs.map(|run| at_rest(&home, run)).collect())
}

/// One run.
pub fn run(home: &Path, name: &str) -> Result<RunInfo, Error> {
    let name = RunName::new(name).map_err(invalid)?;
    let (home, store) = open(home)?;
    Ok(at_rest(&home, query::run(&store, &name)?))
}

/// What a person sees of a run.
pub fn view(home: &Path, name: &str) -> Result<RunView, Error> {
    let name = RunName::new(name).map_err(invalid)?;
    let (home, store) = open(home)?;
    let mut view = view::run(&store, &name, |spec| view::corpus_facts(&home, spec))?;
    view.info = at_rest(&home, view.info);
    Ok(view)
}

/// The steps of a run, put together to some points.
pub fn history(home: &Path, request: &HistoryRequest) -> Result<History, Error> {
    let name = RunName::new(&request.run).map_err(invalid)?;
    let (_, store) = open(home)?;
    store.run(&name)?;
    let columns = Columns::read(&store, &name)?;
    Ok(columns.history(request))
}

/// The steps of a run, each as it is kept, in order, for as long as `take` wants more.
pub fn metrics(
    home: &Path,
    request: &MetricsRequest,
    take: impl FnMut(Vec<StepMetrics>) -> bool,
) -> Result<(), Error> {
    let name = RunName::new(&request.run).map_err(invalid)?;
    let (_, store) = open(home)?;
    store.run(&name)?;
    Ok(metrics::read(&store, &name, request, take)?)
}

/// What a coordinator that was killed has left as running does not run.
fn at_rest(home: &Home, mut run: RunInfo) -> RunInfo {
    if query::is_under_way(&run.status) && home.holder().is_none() {
        run.status = RunStatus::Interrupted.to_string();
    }
    run
}

/// The checkpoint that `RUN`, `RUN@STEP`, `RUN@best` or `RUN@last` means.
pub fn resolve(home: &Path, reference: &str) -> Result<Resolved, Error> {
    Ok(query::find(&open(home)?.1, reference)?)
}

/// All corpora.
pub fn corpora(home: &Path) -> Result<Vec<CorpusInfo>, Error> {
    let home = Home::open_read_only(home)?;
    Ok(corpora::list(&home.corpora())?)
}

/// The first documents of a corpus.
pub fn head(home: &Path, request: &HeadRequest) -> Result<CorpusHead, Error> {
    let home = Home::open_read_only(home)?;
    Ok(corpora::head(&home.corpora(), request)?)
}

/// What is in a corpus, counted.
pub fn count(home: &Path, corpus: &str) -> Result<CountedCorpus, Error> {
    let home = Home::open_read_only(home)?;
    Ok(corpora::count(&home.corpora(), corpus)?)
}

/// The ledger of a run, entry by entry, as lines of JSON, for as long as `take` wants more.
pub fn ledger(home: &Path, name: &str, take: impl FnMut(String) -> bool) -> Result<(), Error> {
    let name = RunName::new(name).map_err(invalid)?;
    let (_, store) = open(home)?;
    Ok(ledger::read(&store, &name, take)?)
}

/// Checks the ledger and the checkpoints of a run in full.
pub fn audit(home: &Path, name: &str) -> Result<AuditReport, Error> {
    let name = RunName::new(name).map_err(invalid)?;
    let (home, store) = open(home)?;
    let mut report = audit::audit(&store, &home, &name, false)?;
    report.status = at_rest(&home, query::run(&store, &name)?).status;
    Ok(report)
}
