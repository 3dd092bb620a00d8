//! `cohort coordinator`: serves until Ctrl-C.

use std::io::ErrorKind;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, anyhow};
use cohort_common::cluster::Limits;
use cohort_common::traces::COORDINATOR;
use tokio::net::{TcpListener, lookup_host};

use crate::cli::CoordinatorArgs;
use crate::context::{self, Secret};
use crate::failure::hinted;
use crate::local::shutdown;
use crate::traces;

/// Runs the verb.
pub async fn run(args: CoordinatorArgs) -> Result<()> {
    let home = context::home(&args.home)?;
    let secret = context::secret(&args.token)?;
    let listener = listen("--listen", &args.listen, secret.as_ref()).await?;
    let http = match &args.http {
        Some(address) => Some(listen("--http", address, secret.as_ref()).await?),
        None => None,
    };
    let traces = traces::open(&args.observe, COORDINATOR)?;
    let config = cohort_coordinator::Config {
        home,
        token: secret.map(|secret| secret.token),
        limits: Limits::default(),
        exchange: args.exchange.into(),
        http,
        tensorboard: args.tensorboard,
        notify: args.notify.config(),
        traces: traces.clone(),
    };
    let served = cohort_coordinator::serve(config, listener, shutdown(args.exit_with_parent)).await;
    traces::finish(traces).await;
    Ok(served?)
}

/// Listens on an address that is this machine's own, or that a token guards.
async fn listen(flag: &str, address: &str, secret: Option<&Secret>) -> Result<TcpListener> {
    let addresses: Vec<SocketAddr> = lookup_host(address)
        .await
        .with_context(|| {
            format!(
                "`{address}` is no address to listen on; expected something like `127.0.0.1:7070`"
            )
        })?
        .collect();
    check_open(address, &addresses, secret)?;
    TcpListener::bind(&addresses[..]).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => hinted(
            format!("cannot listen on {address}: the port is in use, perhaps by another coordinator"),
            format!("end that process, choose another port with `{flag}`, or let the system choose with `{flag} 127.0.0.1:0`"),
        ),
        _ => anyhow!(error).context(format!("cannot listen on {address}")),
    })
}

/// Whoever reaches a coordinator can read and delete what it keeps.
fn check_open(address: &str, addresses: &[SocketAddr], secret: Option<&Secret>) -> Result<()> {
    if secret.is_some() || addresses.iter().all(|address| address.ip().is_loopback()) {
        return Ok(());
    }
    Err(hinted(
        format!(
            "refusing to listen on {address} without a token: everybody who reaches this machine could train here and \
             read or delete what is there"
        ),
        "make one with `openssl rand -hex 32 > token` and pass `--token-file token` here, to the workers and to clients",
    ))
}
