//! What the page and programs ask for: figures as JSON, and actions on runs.

use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use cohort_common::api::{ClusterView, History, HistoryRequest, RunInfo, RunSummary, RunView};

use super::Web;
use super::auth::Deliberate;
use super::error::{Failure, Json};
use super::query::{Query, run_name};
use crate::driver::Command;
use crate::query::is_under_way;
use crate::{actions, prometheus, view};

/// Points of a history where nothing is said.
const POINTS: usize = 600;

/// Runs under way that are measured, at most.
const MEASURED: usize = 16;

type Answer<T> = Result<Json<T>, Failure>;

/// `GET /api/cluster`.
pub async fn cluster(State(web): State<Arc<Web>>) -> Answer<ClusterView> {
    Ok(Json(web.cluster.ask(Command::View).await?))
}

/// `GET /api/runs`.
pub async fn runs(State(web): State<Arc<Web>>) -> Answer<Vec<RunSummary>> {
    Ok(Json(view::summaries(&web.cluster).await?))
}

/// `GET /api/runs/NAME`.
pub async fn run(State(web): State<Arc<Web>>, Path(name): Path<String>) -> Answer<RunView> {
    Ok(Json(view::live(&web.cluster, run_name(&name)?).await?))
}

/// `GET /api/runs/NAME/history?from=&to=&points=`.
pub async fn history(
    State(web): State<Arc<Web>>,
    Path(name): Path<String>,
    query: RawQuery,
) -> Answer<History> {
    let query = Query::read(query, &["from", "to", "points"])?;
    let points = query.number("points")?.unwrap_or(POINTS);
    if points == 0 {
        return Err(Failure::invalid(
            "`points` is `0`, but it must be 1 or more",
        ));
    }
    let request = HistoryRequest {
        run: run_name(&name)?.to_string(),
        from: query.number("from")?,
        to: query.number("to")?,
        points,
    };
    Ok(Json(view::history(&web.cluster, request).await?))
}

/// `POST /api/runs/NAME/pause`.
pub async fn pause(
    _: Deliberate,
    State(web): State<Arc<Web>>,
    Path(name): Path<String>,
) -> Answer<RunInfo> {
    Ok(Json(actions::pause(&web.cluster, run_name(&name)?).await?))
}

/// `POST /api/runs/NAME/resume`.
pub async fn resume(
    _: Deliberate,
    State(web): State<Arc<Web>>,
    Path(name): Path<String>,
) -> Answer<RunInfo> {
    Ok(Json(actions::resume(&web.cluster, run_name(&name)?).await?))
}

/// `POST /api/runs/NAME/cancel`.
pub async fn cancel(
    _: Deliberate,
    State(web): State<Arc<Web>>,
    Path(name): Path<String>,
) -> Answer<RunInfo> {
    Ok(Json(actions::cancel(&web.cluster, run_name(&name)?).await?))
}

/// `POST /api/runs/NAME/checkpoint`.
pub async fn checkpoint(
    _: Deliberate,
    State(web): State<Arc<Web>>,
    Path(name): Path<String>,
) -> Answer<RunInfo> {
    let name = run_name(&name)?;
    Ok(Json(actions::checkpoint(&web.cluster, name).await?))
}

/// `GET /metrics`: the cluster and the runs under way, for Prometheus.
pub async fn metrics(State(web): State<Arc<Web>>) -> Result<Response, Failure> {
    let cluster = web.cluster.ask(Command::View).await?;
    let summaries = view::summaries(&web.cluster).await?;
    let under_way = summaries.iter().filter(|run| is_under_way(&run.status));
    let mut runs = Vec::new();
    for run in under_way.take(MEASURED) {
        // It may have been removed meanwhile.
        if let Ok(view) = view::live(&web.cluster, run_name(&run.name)?).await {
            runs.push(view);
        }
    }
    let kind = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, prometheus::text(&cluster, &runs)).into_response())
}
