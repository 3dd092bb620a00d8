//! Where runs are read: a coordinator that is running, or else the home directory.

use std::path::PathBuf;

use anyhow::Result;
use cohort_common::api::{History, HistoryRequest, MetricsRequest, RunInfo, RunView, StepMetrics};
use cohort_coordinator::offline;

use crate::cli::ConnectArgs;
use crate::client::Client;
use crate::context::Context;

/// Where runs are read.
pub enum Source {
    /// A coordinator.
    Live(Box<Client>),
    /// A home directory without one.
    Home(PathBuf),
}

impl Source {
    /// The coordinator that is named or runs on the home directory; without one, that directory.
    pub async fn of(args: &ConnectArgs) -> Result<Self> {
        Self::found(&Context::of(args)?).await
    }

    /// The same of arguments that are understood already.
    pub async fn found(context: &Context) -> Result<Self> {
        Ok(match context.connect_if_running().await? {
            Some(client) => Self::Live(Box::new(client)),
            None => Self::Home(context.home.clone()),
        })
    }

    /// All runs, oldest first.
    pub async fn runs(&mut self) -> Result<Vec<RunInfo>> {
        match self {
            Self::Live(client) => client.runs().await,
            Self::Home(home) => Ok(offline::runs(home)?),
        }
    }

    /// What a person sees of a run.
    pub async fn view(&mut self, run: &str) -> Result<RunView> {
        match self {
            Self::Live(client) => client.view_run(run).await,
            Self::Home(home) => Ok(offline::view(home, run)?),
        }
    }

    /// The steps of a run, put together to some points.
    pub async fn history(&mut self, request: &HistoryRequest) -> Result<History> {
        match self {
            Self::Live(client) => client.history(request).await,
            Self::Home(home) => Ok(offline::history(home, request)?),
        }
    }

    /// The steps of a run, each as it is kept, in order, until `take` fails.
    pub async fn metrics(
        &mut self,
        request: &MetricsRequest,
        mut take: impl FnMut(&StepMetrics) -> std::io::Result<()>,
    ) -> Result<std::io::Result<()>> {
        let mut taken = Ok(());
        let mut all = |page: Vec<StepMetrics>| {
            taken = page.iter().try_for_each(&mut take);
            taken.is_ok()
        };
        match self {
            Self::Live(client) => {
                let mut pages = client.metrics(request).await?;
                while let Some(page) = pages.next_steps().await? {
                    if !all(page) {
                        break;
                    }
                }
            }
            Self::Home(home) => offline::metrics(home, request, all)?,
        }
        Ok(taken)
    }
}
