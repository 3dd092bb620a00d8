//! The gRPC contract of Cohort, generated from `cohort/v1/*.proto`. No logic lives here: domain types and
//! their conversions are in `cohort_common::wire`.
#![allow(clippy::all, missing_docs)]

/// Messages and services of protocol version 1.
pub mod v1 {
    tonic::include_proto!("cohort.v1");
}
