//! Cohort's coordinator.
