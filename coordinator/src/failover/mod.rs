//! Several coordinators for one cluster, of which one leads and the others stand by (`--failover`).
//!
//! `lease.rs` holds the lease in the object store, around the pure machine in `cohort_common::cluster::lease`; `front.rs` is what
//! a coordinator that stands by answers; `standby.rs` is what it does meanwhile: it follows what the one that leads writes to
//! the store (`remote/mirror.rs`), until it leads itself.
//!
//! A leader that may not lead any more ends: nothing of the process may go on, and the machine that decided is void. Its
//! process starts anew as one that stands by.

mod front;
mod lease;
mod standby;

use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};

use crate::driver::now_ms;

pub use front::Front;
pub use lease::Leadership;
pub use standby::{Standby, Taken};

/// How a coordinator takes part in failover.
#[derive(Clone, Debug)]
pub struct FailoverConfig {
    /// How long a lease lasts that it holds.
    pub lease: Duration,
    /// Where others reach it.
    pub url: String,
    /// The name of this process, which no other has.
    pub holder: String,
    /// The name that it had before it was fenced, if it was.
    pub was: Option<String>,
}

impl FailoverConfig {
    /// The longest lease.
    pub const LONGEST: Duration = Duration::from_secs(600);

    /// A name for a process that no other has.
    pub fn new_holder() -> String {
        let mut random = [0; 8];
        // Without random bytes the moment and the process tell it apart.
        let _ = SystemRandom::new().fill(&mut random);
        let (now, pid) = (now_ms(), std::process::id());
        format!("{:016x}-{now:x}-{pid:x}", u64::from_le_bytes(random))
    }
}

/// The object of the lease.
pub const LEASE: &str = "coordinator.json";
