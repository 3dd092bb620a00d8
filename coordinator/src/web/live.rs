//! `GET /api/live?run=A&run=B`: what is new, as server-sent events, for as long as somebody reads. What all watchers have in
//! common comes from the [feed](super::feed); here is only which runs this one asked for, and what it missed while it was
//! away. One that reads too slowly is cut off, and may come back.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderMap, HeaderName};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cohort_common::home::RunName;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Web;
use super::error::Failure;
use super::feed::{News, Welcome};
use super::message::{ALIVE, of_rows, position, reload};
use super::query::{Query, run_name};
use crate::store::Store;

/// Streams at the same time.
pub const STREAMS: usize = 64;

/// Runs that one stream may be about.
const RUNS: usize = 16;

/// Events of a run that one who comes back is told; of more, it is told to ask for the history.
const MISSED: u32 = 512;

/// Pieces that wait for a slow reader.
const PIECES: usize = 8;

/// How long a reader may take until it has room for the next piece.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time between signs of life where nothing is new.
const QUIET: Duration = Duration::from_secs(10);

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Serves one stream.
pub async fn live(
    State(web): State<Arc<Web>>,
    query: RawQuery,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let query = Query::read(query, &["run"])?;
    let names: Vec<RunName> = query.all("run").map(run_name).collect::<Result<_, _>>()?;
    if names.len() > RUNS {
        let text = format!(
            "{} runs are asked for, but one stream is of {RUNS} at most",
            names.len()
        );
        return Err(Failure::invalid(text));
    }
    let last = last_seen(&headers)?;
    let place = web.streams.clone().try_acquire_owned().map_err(|_| {
        let text = format!("{STREAMS} live streams are open already; close some pages, or wait");
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, text)
    })?;
    for name in names.clone() {
        web.cluster.read(move |store| store.run(&name)).await?;
    }
    let welcome = web.feed.watch().await?;
    let mut first = String::new();
    if let Some(last) = last {
        first = missed(&web, &names, last, welcome.position).await?;
    }
    first += &position(welcome.position);
    let (out, pieces) = mpsc::channel(PIECES);
    let runs: Vec<String> = names.iter().map(ToString::to_string).collect();
    tokio::spawn(async move {
        let _place = place;
        tokio::select! {
            () = out.closed() => {}
            _ = send(first, welcome, &runs, &out) => {}
        }
    });
    let kind = [(CONTENT_TYPE, "text/event-stream")];
    let body = Body::from_stream(ReceiverStream::new(pieces));
    Ok((kind, body).into_response())
}

/// The newest event that the reader knows from before.
fn last_seen(headers: &HeaderMap) -> Result<Option<u64>, Failure> {
    let Some(value) = headers.get(LAST_EVENT_ID) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or("?");
    match text.parse() {
        Ok(id) => Ok(Some(id)),
        Err(_) if text.is_empty() => Ok(None),
        Err(_) => Err(Failure::invalid(format!(
            "`last-event-id` is `{text}`, but it must be a whole number, as `id:` said it"
        ))),
    }
}

/// What happened to runs after one event and up to another.
async fn missed(web: &Web, runs: &[RunName], after: u64, upto: u64) -> Result<String, Status> {
    let runs = runs.to_vec();
    let look = move |store: &Store| {
        let mut out = String::new();
        for run in &runs {
            let rows = store.events(Some(run), after, MISSED + 1)?;
            let unknown = after > upto || rows.len() > MISSED as usize;
            out += &match unknown {
                // Too much, or the reader knows another database.
                true => reload(run.as_str()),
                false => {
                    let rows = rows.into_iter().filter(|row| row.id <= upto);
                    of_rows(run.as_str(), rows.collect())
                }
            };
        }
        Ok(out)
    };
    web.cluster.read(look).await
}

/// Sends what is new until the reader has gone, is too slow, or the feed ends.
async fn send(
    first: String,
    welcome: Welcome,
    runs: &[String],
    out: &mpsc::Sender<Result<Bytes, Infallible>>,
) -> Option<()> {
    let Welcome { now, mut news, .. } = welcome;
    let put = async |piece: Bytes| timeout(PATIENCE, out.send(Ok(piece))).await.ok()?.ok();
    put(now).await?;
    put(first.into()).await?;
    loop {
        let piece = match timeout(QUIET, news.recv()).await {
            Ok(found) => {
                let piece = piece_of(&*found.ok()?, runs);
                if piece.is_empty() {
                    continue;
                }
                piece
            }
            Err(_) => Bytes::from_static(ALIVE.as_bytes()),
        };
        put(piece).await?;
    }
}

/// What a look has found for one who watches some runs.
fn piece_of(news: &News, runs: &[String]) -> Bytes {
    let mut piece = Vec::new();
    for run in runs {
        if news.missed {
            piece.extend_from_slice(reload(run).as_bytes());
        }
        if let Some(messages) = news.of_runs.get(run) {
            piece.extend_from_slice(messages);
        }
    }
    piece.extend_from_slice(&news.all);
    if !piece.is_empty() {
        piece.extend_from_slice(position(news.position).as_bytes());
    }
    piece.into()
}
