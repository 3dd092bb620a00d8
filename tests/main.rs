//! Drives the real binary.

mod messages;
