//! Cohort's coordinator.

pub mod store;
