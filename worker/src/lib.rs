//! Cohort's worker.

pub mod engine;
