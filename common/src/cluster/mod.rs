//! The cluster's logic, free of sockets, clocks, files and random numbers: what the coordinator decides
//! ([`coordinator::Machine`]), what a worker remembers from session to session ([`worker::WorkerMachine`]), and the
//! messages between them. The same code runs in the real processes, in the tests and in the simulation.

mod agreement;
mod boundary;
pub mod coordinator;
mod dividing;
mod division;
mod evaluating;
pub mod events;
mod hands;
mod joining;
pub mod lease;
pub mod links;
pub mod messages;
mod redoing;
mod run;
pub mod sequence;
mod sharing;
pub mod silence;
#[cfg(test)]
mod simulation;
mod sites;
mod stepping;
mod verdict;
mod watchdog;
pub mod worker;

pub use coordinator::{Limits, Machine};
pub use division::{Digests, Division, Keeper};
pub use events::{Action, Event};
pub use messages::{
    Found, FromWorker, Holding, LoadState, Owners, Peer, Proof, Scores, Share, Shares, Site,
    StateSource, ToWorker,
};
pub use run::{BASE_SPLIT, EvalSplit, EvalWork, OWN_SPLIT, Prompt, RunPlan, SAMPLES_SPLIT};
pub use verdict::{Losses, Verdict};
pub use watchdog::{Anomaly, History, Pause};
