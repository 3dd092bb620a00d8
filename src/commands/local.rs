//! `cohort local`: a standing cluster on this machine, until Ctrl-C.

use anyhow::Result;

use crate::cli::{LocalClusterArgs, ObserveArgs};
use crate::context;
use crate::local::{self, LocalCluster, Options};

/// Runs the verb.
pub async fn run(args: LocalClusterArgs) -> Result<()> {
    let options = Options {
        home: context::home(&args.home)?,
        listen: args.listen,
        http: args.http,
        workers: args.workers,
        threads: args.threads,
        optimizer: args.optimizer,
        secret: context::secret(&args.token)?,
        private: false,
        tensorboard: args.tensorboard,
        notify: args.notify.arguments(),
        variables: variables(&args.observe),
    };
    let mut cluster = LocalCluster::start(&options).await?;
    println!("coordinator at {}", cluster.url());
    println!("watch it at {}", cluster.page());
    for (name, pid) in cluster.processes() {
        println!("  {name:<12} process {pid}");
    }
    println!("logs in {}", cluster.logs().display());
    println!("Ctrl-C ends the cluster");
    let result = wait(&mut cluster).await;
    cluster.end().await;
    result
}

/// What the processes tell is decided here, and handed to them through their environment.
fn variables(args: &ObserveArgs) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("COHORT_LOG_FORMAT", args.log_format.word().to_owned()),
        ("COHORT_OTLP_EVERY", args.otlp_every.to_string()),
    ];
    variables.extend(args.otlp.clone().map(|url| ("COHORT_OTLP", url)));
    variables
}

async fn wait(cluster: &mut LocalCluster) -> Result<()> {
    let interrupt = local::interrupt();
    tokio::pin!(interrupt);
    loop {
        tokio::select! {
            () = &mut interrupt => {
                println!("ending");
                return Ok(());
            }
            loss = cluster.next_loss() => eprintln!("{}", loss?),
        }
    }
}
