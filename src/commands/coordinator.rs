//! `cohort coordinator`: serves until Ctrl-C.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use cohort_common::cluster::Limits;
use cohort_common::home::SECURITY;
use cohort_common::security::Security;
use cohort_common::traces::COORDINATOR;
use cohort_coordinator::Topology;
use cohort_coordinator::access::Access;
use cohort_coordinator::{Error, FailoverConfig};
use tokio::net::{TcpListener, lookup_host};

use crate::cli::{CoordinatorArgs, ExchangeArg, Insecure, OptimizerArg};
use crate::context::{self, Secret};
use crate::failure::hinted;
use crate::local::{end_at_the_next_signal, shutdown};
use crate::traces;

/// How long a lease lasts if nothing is said.
const LEASE_SECONDS: f64 = 10.0;

/// Runs the verb.
pub async fn run(mut args: CoordinatorArgs) -> Result<()> {
    let again: Option<[String; 2]> = args.again.take().and_then(|again| again.try_into().ok());
    let was = again.map(|[was, listen]| {
        args.listen = listen;
        was
    });
    let home = context::home(&args.home)?;
    let access = access(&home, context::secret(&args.token)?, args.insecure)?;
    let guard = Guard {
        access: &access,
        insecure: args.insecure,
    };
    let listener = guard.listen("--listen", &args.listen).await?;
    let http = match &args.http {
        Some(address) => Some(guard.listen("--http", address).await?),
        None => None,
    };
    let bound = listener.local_addr()?;
    let failover = match args.failover {
        true => Some(failover(&args, &access, bound, was)?),
        false => None,
    };
    let holder = failover.as_ref().map(|failover| failover.holder.clone());
    let traces = traces::open(&args.observe, COORDINATOR)?;
    let config = cohort_coordinator::Config {
        home,
        access,
        certificate_life: Duration::from_secs_f64(args.certificate_hours * 3600.0),
        limits: Limits {
            divides: args.optimizer == OptimizerArg::Sharded,
            ..Limits::default()
        },
        // Whoever started it on this machine decides what happens to its run.
        grace: match args.exit_with_parent {
            true => Duration::ZERO,
            false => Duration::from_secs_f64(args.grace),
        },
        exchange: topology(args.exchange, args.optimizer)?,
        http,
        tensorboard: args.tensorboard,
        notify: args.notify.config(),
        store: args.store,
        failover,
        traces: traces.clone(),
    };
    let served =
        cohort_coordinator::serve(config, listener, asked_to_end(args.exit_with_parent)).await;
    traces::finish(traces).await;
    match (served, holder) {
        (Err(Error::Fenced(why)), Some(holder)) => Err(begin_again(&holder, bound, &why)),
        (served, _) => Ok(served?),
    }
}

/// How it takes part in failover.
fn failover(
    args: &CoordinatorArgs,
    access: &Access,
    bound: SocketAddr,
    was: Option<String>,
) -> Result<FailoverConfig> {
    let private = matches!(access, Access::Cluster(_));
    if let Some(url) = &args.advertise
        && url.starts_with("https://") != private
    {
        let (is, scheme) = match private {
            true => ("encrypted", "https"),
            false => ("not encrypted", "http"),
        };
        return Err(hinted(
            format!("`{url}` is no address of this coordinator, which is {is}"),
            format!("begin it with `{scheme}://`"),
        ));
    }
    let scheme = if private { "https" } else { "http" };
    let url = match &args.advertise {
        Some(url) => url.clone(),
        None if bound.ip().is_unspecified() => {
            let name = hostname::get().context("this machine has no name; give `--advertise`")?;
            format!("{scheme}://{}:{}", name.to_string_lossy(), bound.port())
        }
        None => format!("{scheme}://{bound}"),
    };
    Ok(FailoverConfig {
        lease: Duration::from_secs_f64(args.lease.unwrap_or(LEASE_SECONDS)),
        url,
        holder: FailoverConfig::new_holder(),
        was,
    })
}

/// Lets the process begin anew as one that stands by: nothing of one that was fenced may go on. Returns only if that cannot be
/// done.
#[cfg(unix)]
fn begin_again(holder: &str, bound: SocketAddr, why: &str) -> anyhow::Error {
    use std::os::unix::process::CommandExt;
    tracing::error!(
        why,
        "this coordinator leads no more; its process begins anew, and stands by"
    );
    // What it was told when it began anew before comes last.
    let arguments = std::env::args_os().skip(1);
    let arguments = arguments.take_while(|argument| argument != "--again");
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => return anyhow!(error).context("cannot tell where this program lies"),
    };
    let error = std::process::Command::new(own)
        .args(arguments)
        .args(["--again", holder, &bound.to_string()])
        .exec();
    anyhow!(error).context(format!(
        "this coordinator leads no more: {why}; it cannot begin anew"
    ))
}

/// The process ends; whatever watches over it starts it again.
#[cfg(not(unix))]
fn begin_again(_: &str, _: SocketAddr, why: &str) -> anyhow::Error {
    hinted(
        format!("this coordinator leads no more: {why}"),
        "start it again; it stands by then",
    )
}

/// Who sums gradients. Workers that keep a slice of the optimizer's moments each have to sum it, too.
fn topology(exchange: ExchangeArg, optimizer: OptimizerArg) -> Result<Topology> {
    match (optimizer, exchange) {
        (OptimizerArg::Sharded, ExchangeArg::Star) => Err(hinted(
            "`--optimizer sharded` needs workers that sum the gradients themselves, but `--exchange star` has the coordinator do that",
            "leave one of the two out",
        )),
        (OptimizerArg::Sharded, _) => Ok(Topology::Sharded),
        (OptimizerArg::Whole, exchange) => Ok(exchange.into()),
    }
}

/// Completes when the process is asked to end; a second signal ends it at once.
async fn asked_to_end(exit_with_parent: bool) {
    shutdown(exit_with_parent).await;
    tokio::spawn(end_at_the_next_signal());
}

/// What guards it: the home's authority where there is one, else the token that is given, if any.
fn access(home: &Path, secret: Option<Secret>, insecure: Option<Insecure>) -> Result<Access> {
    // A token of an initialised cluster is a client's, whose environment this process may share.
    let shared = secret.filter(|secret| !secret.is_of_cluster());
    let directory = home.join(SECURITY);
    let initialised = insecure.is_none() && Security::is_in(&directory);
    match (initialised, shared) {
        (true, None) => Ok(Access::Cluster(Arc::new(Security::open(&directory)?))),
        (true, Some(_)) => Err(hinted(
            format!(
                "a shared token is given, but `{}` has an authority whose tokens have roles",
                home.display()
            ),
            "leave the token out, and make others with `cohort token create`",
        )),
        (false, Some(secret)) => Ok(Access::Shared(secret.token)),
        (false, None) => Ok(Access::Open),
    }
}

/// What stands before the addresses that it listens on.
struct Guard<'a> {
    access: &'a Access,
    insecure: Option<Insecure>,
}

impl Guard<'_> {
    /// Listens on an address that is this machine's own, or that is guarded.
    async fn listen(&self, flag: &str, address: &str) -> Result<TcpListener> {
        let addresses: Vec<SocketAddr> = lookup_host(address)
            .await
            .with_context(|| {
                format!(
                    "`{address}` is no address to listen on; expected something like `127.0.0.1:7070`"
                )
            })?
            .collect();
        if !addresses.iter().all(|address| address.ip().is_loopback()) {
            self.check_open(address)?;
        }
        TcpListener::bind(&addresses[..]).await.map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => hinted(
                format!("cannot listen on {address}: the port is in use, perhaps by another coordinator"),
                format!("end that process, choose another port with `{flag}`, or let the system choose with `{flag} 127.0.0.1:0`"),
            ),
            _ => anyhow!(error).context(format!("cannot listen on {address}")),
        })
    }

    /// Whoever reaches a coordinator can read and delete what it keeps, and whoever is on the way can read what is said.
    fn check_open(&self, address: &str) -> Result<()> {
        match (self.access, self.insecure) {
            (Access::Cluster(_), _) | (_, Some(Insecure::Open)) => Ok(()),
            (Access::Shared(_), Some(Insecure::Plaintext)) => Ok(()),
            (Access::Shared(_), None) => Err(hinted(
                format!(
                    "refusing to listen on {address} without TLS: everybody on the way could read the token, the text and \
                     the weights, and change them"
                ),
                "make a cluster with `cohort init`, and leave the token out; or, on a network that you trust, add \
                 `--insecure plaintext`",
            )),
            (Access::Open, _) => Err(hinted(
                format!(
                    "refusing to listen on {address} without a token: everybody who reaches this machine could train here \
                     and read or delete what is there"
                ),
                "make a cluster with `cohort init`; its coordinator listens anywhere, encrypted",
            )),
        }
    }
}
