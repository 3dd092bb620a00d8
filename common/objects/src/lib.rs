//! Data where it lies: in object stores, on the web, on the Hugging Face hub, named by URLs. Depends on no other crate here.
//!
//! In reading order: `location.rs` * (what a URL names, and how it is shown without secrets), `guard.rs` * (which addresses
//! may be called on somebody's behalf), `error.rs` * (what went wrong, and what to do), `web/` (HTTP, on which all stores stand),
//! `bucket.rs` (an object store: list, read, write, delete, sign) with `credentials.rs` (who calls it), `fetch.rs` (one file to
//! this disk, going on where it was cut off), `put.rs` (one file to a store), `patience.rs` (asking again). A star marks what is pure.
//!
//! What is *not* here: which files a corpus is made of, and what a coordinator keeps in a store. Both are the coordinator's.

mod bucket;
mod credentials;
mod error;
mod fetch;
mod guard;
mod location;
mod patience;
mod put;
#[cfg(test)]
mod tests;
pub mod web;

pub use bucket::{Bucket, Meta, Version};
pub use error::ObjectError;
pub use fetch::{Download, Fetched, Source, WebFile};
pub use guard::Reach;
pub use location::{
    BucketKind, BucketUrl, Dataset, Location, LocationError, Selection, is_location, shown,
};
