//! Drives the real binary in real processes. One crate, so that it is linked once; one module for each theme.

#[cfg(unix)]
mod adapters;
#[cfg(unix)]
mod chaos;
mod chat;
mod cluster;
mod deploy;
mod exchange;
#[cfg(unix)]
mod faults;
mod hub;
mod messages;
mod protocol;
mod runs;
mod support;
mod training;
mod transfer;
mod verify;
mod web;
