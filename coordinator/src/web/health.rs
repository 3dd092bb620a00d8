//! Health, for whoever starts and stops processes: is it up, and can it do its work.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;

use super::Web;
use super::error::Failure;

/// `GET /healthz`: the process answers.
pub async fn alive() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: the driver answers, the database can be read, and the process is not about to end.
pub async fn ready(State(web): State<Arc<Web>>) -> Result<&'static str, Failure> {
    match web.readiness.look().await {
        Ok(()) => Ok("ok\n"),
        Err(why) => Err(Failure::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("the coordinator is not ready: {why}"),
        )),
    }
}
