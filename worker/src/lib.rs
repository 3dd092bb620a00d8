//! Cohort's worker.
