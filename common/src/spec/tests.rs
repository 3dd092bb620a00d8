//! The spec from outside.
