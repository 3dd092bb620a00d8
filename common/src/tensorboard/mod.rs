//! Event files of TensorBoard: what it draws curves and shows texts from.
//!
//! `format` has the bytes: records, checksums, messages. `board` has what Cohort says in them of a run, once per point,
//! however often a file is begun anew. Times are arguments: no clock is read here.

mod board;
mod format;

pub use board::Board;
pub use format::{Item, Writer, read};
