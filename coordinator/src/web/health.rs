//! Health, for whoever starts and stops processes: is it up, and can it do its work.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use tokio::time::timeout;
use tonic::Status;

use super::Web;
use super::error::Failure;
use crate::driver::Command;
use crate::store::Store;

/// How long driver and database may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// `GET /healthz`: the process answers.
pub async fn alive() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: the driver answers, and the database can be read.
pub async fn ready(State(web): State<Arc<Web>>) -> Result<&'static str, Failure> {
    let look = async {
        web.cluster.ask(Command::Describe).await?;
        web.cluster.read(Store::last_event).await?;
        Ok::<_, Status>(())
    };
    let why = match timeout(PATIENCE, look).await {
        Ok(Ok(())) => return Ok("ok\n"),
        Ok(Err(status)) => status.message().to_owned(),
        Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
    };
    Err(Failure::new(
        StatusCode::SERVICE_UNAVAILABLE,
        format!("the coordinator is not ready: {why}"),
    ))
}
