//! What the coordinator and the workers share: the words of the domain, the rules that make a result independent
//! of the cluster (lanes, order, tree, layout, ledger), the corpus, and the wire. Nothing here knows candle.
//!
//! Files marked **pure** in ARCHITECTURE.md do no I/O, read no clock and draw no random number.

pub mod aggregate;
pub mod api;
pub mod checkpoint;
pub mod cluster;
pub mod corpus;
pub mod exchange;
pub mod figures;
pub mod floats;
pub mod hf;
pub mod home;
pub mod ids;
pub mod lanes;
pub mod layout;
pub mod ledger;
pub mod net;
pub mod order;
pub mod process;
pub mod protocol;
pub mod report;
pub mod rng;
pub mod schedule;
pub mod seal;
pub mod security;
pub mod segment;
pub mod spec;
pub mod supervised;
pub mod tensorboard;
pub mod traces;
pub mod tree;
pub mod wire;
