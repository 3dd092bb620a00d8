//! Drives the real binary in real processes. One crate, so that it is linked once; one module for each theme.

#[cfg(unix)]
mod adapters;
#[cfg(unix)]
mod chaos;
mod chat;
mod cluster;
mod corpora;
mod deploy;
mod exchange;
#[cfg(unix)]
mod failover;
#[cfg(unix)]
mod faults;
mod figures;
mod files;
#[cfg(unix)]
mod health;
#[cfg(target_os = "linux")]
mod hostile;
mod hub;
#[cfg(unix)]
mod machine;
mod memory;
mod messages;
mod mixture;
#[cfg(unix)]
mod notify;
#[cfg(unix)]
mod page;
#[cfg(unix)]
mod plan;
mod protocol;
mod runs;
mod samples;
#[cfg(unix)]
mod security;
#[cfg(unix)]
mod store;
mod support;
mod tokenizing;
mod traces;
mod training;
mod transfer;
mod verify;
#[cfg(unix)]
mod watch;
#[cfg(unix)]
mod watchdog;
mod web;
