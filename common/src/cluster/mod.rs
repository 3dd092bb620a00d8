//! The cluster's logic, free of sockets, clocks, files and random numbers: what the coordinator decides
//! ([`coordinator::Machine`]) and the messages that it exchanges with workers. The same code runs in the real
//! coordinator, in the tests and in the simulation.

pub mod coordinator;
pub mod messages;
mod progress;
mod run;
#[cfg(test)]
mod simulation;

pub use coordinator::{Action, Event, Limits, Machine};
pub use messages::{FromWorker, StateSource, ToWorker};
pub use run::{EvalSplit, RunPlan};
