//! What the coordinator and the workers share: the words of the domain, the rules that make a result independent
//! of the cluster (lanes, order, tree, layout, ledger), the corpus, and the wire. Nothing here knows candle.
//!
//! Files marked **pure** in ARCHITECTURE.md do no I/O, read no clock and draw no random number.

pub mod layout;
pub mod order;
pub mod rng;
pub mod schedule;
pub mod spec;
