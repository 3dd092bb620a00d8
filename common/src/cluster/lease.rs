//! Who of several coordinators leads: whoever holds the lease, a small object that can only be replaced by somebody who has
//! seen its newest version. **Pure**: the store and the clock belong to whoever asks and answers.
//!
//! It is the leader election of Kubernetes (`client-go/tools/leaderelection`) over the conditional writes of an object store,
//! and as there, no clock of one machine is compared with that of another:
//!
//! - **Who follows** notes when, by its own clock, it first saw the version that lies there. Only if that version is still
//!   there after the whole time that a lease lasts, it tries to replace it. The store lets one replacement of a version
//!   through, whoever tries.
//! - **Who leads** replaces the lease by a newer one again and again. It may lead for two thirds of the time that a lease lasts,
//!   counted from the moment at which it *sent* the last renewal that it knows to have been done. After that it is fenced, for
//!   good.
//!
//! Whoever follows saw a renewal after it was sent, and waits for longer than its sender may lead. So no two lead at once, as
//! long as the clocks of two machines do not differ in *speed* by half ([`FENCE`]); what they show does not matter, nor
//! how long anything is on its way. An answer that is lost says nothing about what was done: then the lease is read again.

use serde::{Deserialize, Serialize};

/// The share of a lease for which its holder may lead, in thirds. The rest is for clocks that run at different speeds.
pub const FENCE: u64 = 2;

/// Renewals, and looks at the lease of another, in the time that a lease lasts.
const LOOKS: u64 = 5;

/// The longest time between two looks at the lease of another, in milliseconds: it may be given back.
const LONGEST_LOOK: u64 = 2_000;

/// The lease, as it lies in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The process that holds it; each start of a coordinator is another.
    pub holder: String,
    /// The home that it works on.
    pub home: String,
    /// Where it is reached.
    pub url: String,
    /// Grows by one with each holder.
    pub generation: u64,
    /// The high half of the holder's session numbers: it only grows, whatever the clocks of the machines say.
    pub epoch: u64,
    /// How long it lasts after each renewal, in milliseconds.
    pub lasts_ms: u64,
    /// Grows by one with each renewal, so that no two versions have the same content.
    pub renewals: u64,
    /// The holder has ended, and has given it back.
    pub released: bool,
}

/// Who would hold the lease.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// This process.
    pub holder: String,
    /// The process that this one was before it was fenced: it leads no more.
    pub was: Option<String>,
    /// The home that it works on.
    pub home: String,
    /// Where it is reached.
    pub url: String,
    /// How long a lease lasts that it holds.
    pub lasts_ms: u64,
}

/// What is asked of the store. `V` is a version, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask<V> {
    /// Read the lease.
    Read,
    /// Write it, if the version that lies there is still this one; without one, if none lies there.
    Write {
        /// What.
        lease: Lease,
        /// Over what.
        over: Option<V>,
    },
}

/// What the store answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<V> {
    /// It was read; `None` if there is none.
    Found(Option<(Lease, V)>),
    /// It was written, and is this version now.
    Written(V),
    /// Another version lies there, or one, or none.
    Refused,
    /// Nobody knows whether it was done: the store cannot be reached, or its answer was lost.
    Unknown,
}

/// Why a leader leads no more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fenced {
    /// Too long without a renewal.
    #[error(
        "the lease was not renewed for {for_ms} ms, and it may lead for {allowed_ms} ms without"
    )]
    NotRenewed {
        /// The time since the last one was sent.
        for_ms: u64,
        /// What is allowed.
        allowed_ms: u64,
    },
    /// Somebody else holds the lease.
    #[error("{url} holds the lease now (generation {generation})")]
    Taken {
        /// Where that one is reached.
        url: String,
        /// Its generation.
        generation: u64,
    },
    /// The lease was deleted.
    #[error("the lease was deleted from the store")]
    Deleted,
}

/// A lease that was seen.
#[derive(Clone, Debug)]
struct Seen<V> {
    lease: Lease,
    /// `None` once it was seen to be gone.
    version: Option<V>,
    /// When this version was first seen, by this machine's clock.
    since_ms: u64,
}

#[derive(Debug)]
enum State<V> {
    /// Looks at what lies there.
    Following {
        seen: Option<Seen<V>>,
        /// Whether it was read since the last attempt to write.
        read: bool,
    },
    Leading {
        lease: Lease,
        version: V,
        /// It may lead up to here.
        until_ms: u64,
        /// What became of the last renewal is not known.
        unsure: bool,
    },
    Fenced,
}

/// What is under way.
#[derive(Debug)]
struct Asked {
    sent_ms: u64,
    /// What is being written, if anything.
    lease: Option<Lease>,
}

/// One coordinator's side of the election.
#[derive(Debug)]
pub struct Elector<V> {
    me: Candidate,
    state: State<V>,
    asked: Option<Asked>,
    due_ms: u64,
}

impl<V: Clone + PartialEq> Elector<V> {
    /// A coordinator that has not looked yet.
    pub fn new(me: Candidate) -> Self {
        Self {
            me,
            state: State::Following {
                seen: None,
                read: false,
            },
            asked: None,
            due_ms: 0,
        }
    }

    /// When there is something to ask.
    pub fn due_ms(&self) -> u64 {
        self.due_ms
    }

    /// Up to when it may lead; `None` if it does not. It never goes back while it leads.
    pub fn leads_until_ms(&self) -> Option<u64> {
        match &self.state {
            State::Leading { until_ms, .. } => Some(*until_ms),
            State::Following { .. } | State::Fenced => None,
        }
    }

    /// Whether it may lead now.
    pub fn leads(&self, now_ms: u64) -> bool {
        self.leads_until_ms().is_some_and(|until| now_ms < until)
    }

    /// The lease that it holds, or the newest that it has seen.
    pub fn lease(&self) -> Option<&Lease> {
        match &self.state {
            State::Leading { lease, .. } => Some(lease),
            State::Following { seen, .. } => seen.as_ref().map(|seen| &seen.lease),
            State::Fenced => None,
        }
    }

    /// What is to be asked now, if it is time. One thing is asked at a time; whatever becomes of it is an answer. `second` is
    /// the time of the day, which only sees to it that session numbers grow from start to start where there is no lease.
    pub fn ask(&mut self, now_ms: u64, second: u64) -> Option<Ask<V>> {
        assert!(self.asked.is_none(), "one thing at a time");
        if now_ms < self.due_ms {
            return None;
        }
        let ask = match &self.state {
            State::Fenced => return None,
            State::Leading { unsure: true, .. } => Ask::Read,
            State::Leading { lease, version, .. } => Ask::Write {
                lease: Lease {
                    renewals: lease.renewals + 1,
                    ..lease.clone()
                },
                over: Some(version.clone()),
            },
            State::Following { seen, read } => match seen {
                _ if !read => Ask::Read,
                Some(seen) if !self.me.may_take(seen, now_ms) => Ask::Read,
                _ => Ask::Write {
                    lease: self
                        .me
                        .taking(seen.as_ref().map(|seen| &seen.lease), second),
                    over: seen.as_ref().and_then(|seen| seen.version.clone()),
                },
            },
        };
        let lease = match &ask {
            Ask::Read => None,
            Ask::Write { lease, .. } => Some(lease.clone()),
        };
        self.asked = Some(Asked {
            sent_ms: now_ms,
            lease,
        });
        Some(ask)
    }

    /// Takes in what the store answered, or did not.
    pub fn answer(&mut self, now_ms: u64, answer: Answer<V>) -> Result<(), Fenced> {
        let asked = self.asked.take().expect("something was asked");
        let pause = self.me.lasts_ms / LOOKS;
        // What is soon asked again: in time, but not in a circle.
        let soon = now_ms + (pause / 4).max(1);
        self.due_ms = now_ms + pause.max(1);
        match (&mut self.state, answer) {
            (State::Fenced, _) => {}
            (State::Following { seen, read }, Answer::Found(found)) => {
                *read = true;
                note(seen, found, now_ms);
                self.due_ms = match seen {
                    Some(seen) if !self.me.may_take(seen, now_ms) => {
                        now_ms + (seen.lease.lasts_ms / LOOKS).clamp(1, LONGEST_LOOK)
                    }
                    _ => now_ms,
                };
            }
            (State::Following { .. }, Answer::Written(version)) => {
                let lease = asked.lease.expect("only what was asked is answered");
                let until_ms = asked.sent_ms + fence(&lease);
                self.state = if now_ms < until_ms {
                    self.due_ms = asked.sent_ms + pause;
                    State::Leading {
                        lease,
                        version,
                        until_ms,
                        unsure: false,
                    }
                } else {
                    // The answer took too long. The lease is its own, and can be taken again.
                    self.due_ms = now_ms;
                    let mut seen = None;
                    note(&mut seen, Some((lease, version)), now_ms);
                    State::Following { seen, read: true }
                };
            }
            (State::Following { read, .. }, Answer::Refused | Answer::Unknown) => {
                *read = false;
                self.due_ms = soon;
            }
            (
                State::Leading {
                    lease,
                    version,
                    until_ms,
                    unsure,
                },
                answer,
            ) => match (answer, asked.lease) {
                (Answer::Written(newer), Some(written)) => {
                    *until_ms = asked.sent_ms + fence(&written);
                    (*lease, *version) = (written, newer);
                    self.due_ms = asked.sent_ms + pause;
                }
                (Answer::Found(Some((found, at))), _) if found.holder == self.me.holder => {
                    // A renewal of its own, which one is not asked: the next one counts.
                    (*lease, *version, *unsure) = (found, at, false);
                    self.due_ms = now_ms;
                }
                (Answer::Found(Some((found, _))), _) => {
                    self.state = State::Fenced;
                    return Err(Fenced::Taken {
                        url: found.url,
                        generation: found.generation,
                    });
                }
                (Answer::Found(None), _) => {
                    self.state = State::Fenced;
                    return Err(Fenced::Deleted);
                }
                (Answer::Refused | Answer::Unknown | Answer::Written(_), _) => {
                    *unsure = true;
                    self.due_ms = soon;
                }
            },
        }
        self.check(now_ms)
    }

    /// Notices that it may lead no more.
    pub fn check(&mut self, now_ms: u64) -> Result<(), Fenced> {
        let State::Leading {
            until_ms, lease, ..
        } = &self.state
        else {
            return Ok(());
        };
        if now_ms < *until_ms {
            return Ok(());
        }
        let allowed_ms = fence(lease);
        let for_ms = now_ms - (*until_ms - allowed_ms);
        self.state = State::Fenced;
        Err(Fenced::NotRenewed { for_ms, allowed_ms })
    }

    /// Leads no more, because it ends: what is to be written, so that the next one need not wait.
    pub fn release(&mut self) -> Option<Ask<V>> {
        let State::Leading { lease, version, .. } =
            std::mem::replace(&mut self.state, State::Fenced)
        else {
            return None;
        };
        self.asked = None;
        Some(Ask::Write {
            lease: Lease {
                renewals: lease.renewals + 1,
                released: true,
                ..lease
            },
            over: Some(version),
        })
    }
}

impl Candidate {
    /// Whether nobody leads by a lease any more.
    fn may_take<V>(&self, seen: &Seen<V>, now_ms: u64) -> bool {
        let holder = &seen.lease.holder;
        let mine = *holder == self.holder || self.was.as_ref() == Some(holder);
        mine || seen.lease.released || now_ms >= seen.since_ms + seen.lease.lasts_ms
    }

    /// The lease with which it takes over from another, if there is one.
    fn taking(&self, from: Option<&Lease>, second: u64) -> Lease {
        Lease {
            holder: self.holder.clone(),
            home: self.home.clone(),
            url: self.url.clone(),
            generation: from.map_or(0, |from| from.generation) + 1,
            epoch: second.max(from.map_or(0, |from| from.epoch + 1)),
            lasts_ms: self.lasts_ms,
            renewals: from.map_or(0, |from| from.renewals) + 1,
            released: false,
        }
    }
}

/// How long a holder may lead after it has sent a renewal.
fn fence(lease: &Lease) -> u64 {
    lease.lasts_ms * FENCE / 3
}

/// Notes what lies there. A lease that is gone is waited for like one that stays: somebody may still lead by it.
fn note<V: PartialEq>(seen: &mut Option<Seen<V>>, found: Option<(Lease, V)>, now_ms: u64) {
    match (seen, found) {
        (Some(seen), None) => seen.version = None,
        (None, None) => {}
        (Some(seen), Some((_, version))) if seen.version.as_ref() == Some(&version) => {}
        (seen, Some((lease, version))) => {
            *seen = Some(Seen {
                lease,
                version: Some(version),
                since_ms: now_ms,
            });
        }
    }
}

#[cfg(test)]
mod tests;
