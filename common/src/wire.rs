//! The only place where protobuf meets domain types. Everything that comes from the network is checked here; what
//! passes is well-formed.

mod evaluation;
mod figures;
mod holding;
mod sharing;

use std::sync::Arc;

use bytes::Bytes;
use cohort_proto::v1;
use prost::Message;
use thiserror::Error;

use crate::aggregate::RootTotals;
use crate::cluster::events::MemberInfo;
use crate::cluster::links::Link;
use crate::cluster::messages::{Commit, LaneSums, LoadState};
use crate::cluster::{FromWorker, StateSource, ToWorker};
use crate::home::RunName;
use crate::ids::{RunId, SessionId};
use crate::segment::Address;
use crate::spec::RunSpec;

pub use self::figures::{Heard, figures_to, heard_from, peak_from};
pub use self::holding::{holding_from, holding_to};
use evaluation::{split_from, split_to, unit_from, unit_to};
use holding::{proof_from, proof_to};
use sharing::{
    digests_from, keeper_from, keeper_to, kept_from, owners_from, owners_to, peer_from, peer_to,
    slice_from, slice_to,
};

/// Largest message that either end accepts: a chunk, a shard piece or a spec, with room to spare.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Largest piece of a file or byte stream.
pub const MAX_PIECE: usize = 512 << 10;

/// Metadata key of a worker's session.
pub const SESSION_KEY: &str = "cohort-session";

/// Metadata key of the run that an exchange stream is about.
pub const RUN_KEY: &str = "cohort-run";

/// A message that cannot be understood.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("malformed {message}: {problem}")]
pub struct WireError {
    message: &'static str,
    problem: String,
}

fn bad(message: &'static str, problem: impl Into<String>) -> WireError {
    let problem = problem.into();
    WireError { message, problem }
}

/// Checks a run's name.
pub fn run_id(name: &str) -> Result<RunId, WireError> {
    let name = RunName::new(name).map_err(|error| bad("run name", error.to_string()))?;
    Ok(RunId::new(name.as_str()))
}

/// A state's source on the wire.
pub fn source_to(run: &RunId, source: StateSource) -> v1::StateSource {
    use v1::state_source::From;
    v1::StateSource {
        run: run.as_str().into(),
        from: Some(match source {
            StateSource::Seed => From::Seed(v1::Empty {}),
            StateSource::Start => From::Start(v1::Empty {}),
            StateSource::Checkpoint(step) => From::Checkpoint(step),
            StateSource::Held(step) => From::Held(step),
        }),
    }
}

/// A state's source from the wire.
pub fn source_from(source: &v1::StateSource) -> Result<(RunId, StateSource), WireError> {
    use v1::state_source::From;
    let run = run_id(&source.run)?;
    let from = match source
        .from
        .ok_or_else(|| bad("StateSource", "it names no source"))?
    {
        From::Seed(_) => StateSource::Seed,
        From::Start(_) => StateSource::Start,
        From::Checkpoint(step) => StateSource::Checkpoint(step),
        From::Held(step) => StateSource::Held(step),
    };
    Ok((run, from))
}

/// A message to a worker, on the wire.
pub fn to_worker(message: &ToWorker) -> v1::ToWorker {
    use v1::to_worker::Kind;
    let kind = match message {
        ToWorker::Load(load) => Kind::Load(v1::Load {
            spec: serde_json::to_vec(&*load.spec)
                .expect("a spec is JSON")
                .into(),
            source: Some(source_to(&load.run, load.source)),
            step: load.source.step(),
            splits: load.splits.iter().map(split_to).collect(),
            keeper: load.keeper.as_ref().map(keeper_to),
            lanes_stay: load.lanes_stay,
        }),
        ToWorker::Compute {
            run,
            step,
            generation,
            lanes,
            owners,
        } => Kind::Compute(v1::Compute {
            run: run.as_str().into(),
            step: *step,
            generation: *generation,
            lanes: lanes.clone(),
            owners: Some(owners_to(owners)),
        }),
        ToWorker::Collect { run, step } => Kind::Collect(v1::Collect {
            run: run.as_str().into(),
            step: *step,
        }),
        ToWorker::Peers { run, gone, peers } => Kind::Peers(v1::Peers {
            run: run.as_str().into(),
            peers: peers.iter().map(peer_to).collect(),
            gone: gone.iter().map(|session| session.0).collect(),
        }),
        ToWorker::Skip { run, step, lanes } => Kind::Skip(v1::Skip {
            run: run.as_str().into(),
            step: *step,
            lanes: lanes.clone(),
        }),
        ToWorker::Ping { heartbeat_ms } => Kind::Ping(v1::Ping {
            heartbeat_ms: *heartbeat_ms,
        }),
        ToWorker::Commit { run, commit } => {
            let (entry, brief) = proof_to(&commit.proof);
            Kind::Commit(v1::Commit {
                run: run.as_str().into(),
                entry,
                brief,
                scale: commit.scale,
                hash_state: commit.hash_state,
                updates: commit.updates,
                safe: commit.safe,
            })
        }
        ToWorker::Evaluate {
            run,
            step,
            split,
            units,
        } => Kind::Evaluate(v1::Evaluate {
            run: run.as_str().into(),
            step: *step,
            split: *split,
            units: units.clone(),
        }),
        ToWorker::Snapshot { run, step, slices } => Kind::Snapshot(v1::Snapshot {
            run: run.as_str().into(),
            step: *step,
            slices: slices.as_ref().map(|slices| v1::Slices {
                slices: slices.iter().map(slice_to).collect(),
            }),
        }),
        ToWorker::Serve { run, step, chunks } => Kind::Serve(v1::Serve {
            run: run.as_str().into(),
            step: *step,
            slice: Some(slice_to(chunks)),
        }),
        ToWorker::Unload { run } => Kind::Unload(v1::Unload {
            run: run.as_str().into(),
        }),
    };
    v1::ToWorker { kind: Some(kind) }
}

/// A message to workers as it is put into frames: one that goes to many is encoded once.
pub fn to_worker_body(message: &v1::ToWorker) -> Bytes {
    message.encode_to_vec().into()
}

/// A message to a worker, from the wire. `Welcome` is not one of them: it opens the session.
pub fn to_worker_from(message: v1::ToWorker) -> Result<ToWorker, WireError> {
    use v1::to_worker::Kind;
    Ok(
        match message.kind.ok_or_else(|| bad("ToWorker", "it is empty"))? {
            Kind::Welcome(_) => return Err(bad("ToWorker", "a second Welcome")),
            Kind::Load(load) => load_from(load)?,
            Kind::Compute(c) => ToWorker::Compute {
                run: run_id(&c.run)?,
                step: c.step,
                generation: c.generation,
                lanes: c.lanes,
                owners: owners_from(c.owners)?,
            },
            Kind::Collect(c) => ToWorker::Collect {
                run: run_id(&c.run)?,
                step: c.step,
            },
            Kind::Peers(p) => ToWorker::Peers {
                run: run_id(&p.run)?,
                gone: p.gone.into_iter().map(SessionId).collect(),
                peers: p.peers.into_iter().map(peer_from).collect(),
            },
            Kind::Skip(s) => ToWorker::Skip {
                run: run_id(&s.run)?,
                step: s.step,
                lanes: s.lanes,
            },
            Kind::Ping(p) => ToWorker::Ping {
                heartbeat_ms: p.heartbeat_ms,
            },
            Kind::Commit(c) => ToWorker::Commit {
                run: run_id(&c.run)?,
                commit: Commit {
                    proof: proof_from("Commit", &c.entry, c.brief)?,
                    scale: c.scale,
                    hash_state: c.hash_state,
                    updates: c.updates,
                    safe: c.safe,
                },
            },
            Kind::Evaluate(e) => ToWorker::Evaluate {
                run: run_id(&e.run)?,
                step: e.step,
                split: e.split,
                units: e.units,
            },
            Kind::Snapshot(s) => ToWorker::Snapshot {
                run: run_id(&s.run)?,
                step: s.step,
                slices: match s.slices {
                    Some(of) => Some(
                        of.slices
                            .into_iter()
                            .map(slice_from)
                            .collect::<Result<_, _>>()?,
                    ),
                    None => None,
                },
            },
            Kind::Serve(s) => ToWorker::Serve {
                run: run_id(&s.run)?,
                step: s.step,
                chunks: slice_from(s.slice.unwrap_or_default())?,
            },
            Kind::Unload(u) => ToWorker::Unload {
                run: run_id(&u.run)?,
            },
        },
    )
}

/// 32 bytes, or none.
fn hash_from(message: &'static str, bytes: &[u8]) -> Result<Option<[u8; 32]>, WireError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let wrong = |_| {
        bad(
            message,
            format!("its hash has {} bytes, not 32", bytes.len()),
        )
    };
    bytes.try_into().map(Some).map_err(wrong)
}

fn hash_to(hash: Option<[u8; 32]>) -> Bytes {
    hash.map_or_else(Bytes::new, |h| h.to_vec().into())
}

fn load_from(load: v1::Load) -> Result<ToWorker, WireError> {
    let source = load
        .source
        .ok_or_else(|| bad("Load", "it names no source"))?;
    let (run, source) = source_from(&source)?;
    let spec: RunSpec =
        serde_json::from_slice(&load.spec).map_err(|error| bad("Load.spec", error.to_string()))?;
    let splits = load.splits.into_iter().map(split_from);
    Ok(ToWorker::Load(LoadState {
        run,
        spec: Arc::new(spec),
        source,
        splits: splits.collect::<Result<_, _>>()?,
        keeper: load.keeper.map(keeper_from).transpose()?,
        lanes_stay: load.lanes_stay,
    }))
}

/// A worker's message, on the wire.
pub fn from_worker(message: FromWorker) -> v1::FromWorker {
    use v1::from_worker::Kind;
    let name = |run: RunId| run.as_str().to_owned();
    let kind = match message {
        FromWorker::Heartbeat => Kind::Heartbeat(v1::Heartbeat {}),
        FromWorker::Leaving => Kind::Leaving(v1::Leaving {}),
        FromWorker::Loaded {
            run,
            step,
            state_hash,
        } => Kind::Loaded(v1::Loaded {
            run: name(run),
            step,
            state_hash: hash_to(state_hash),
        }),
        FromWorker::LaneDone {
            run,
            step,
            lane,
            sums,
            micros,
        } => Kind::LaneDone(v1::LaneDone {
            run: name(run),
            step,
            lane,
            loss: sums.loss,
            weight: sums.weight,
            micros,
        }),
        FromWorker::RootReady { run, step, totals } => Kind::RootReady(v1::RootReady {
            run: name(run),
            step,
            sum_of_squares: totals.sum_of_squares,
            hash: totals.hash.to_vec().into(),
        }),
        FromWorker::Reaches { run, peers } => Kind::Reaches(v1::Reaches {
            run: name(run),
            peers: peers.into_iter().map(|p| p.0).collect(),
        }),
        FromWorker::Link { run, peer, link } => Kind::Link(v1::Link {
            run: name(run),
            peer: peer.0,
            rtt_micros: link.rtt_micros,
            bytes_per_second: link.bytes_per_second,
        }),
        FromWorker::Held { run, step, lanes } => Kind::Held(v1::Held {
            run: name(run),
            step,
            lanes,
        }),
        FromWorker::SliceReady { run, step, digests } => Kind::SliceReady(v1::SliceReady {
            run: name(run),
            step,
            sums_of_squares: digests.iter().map(|d| d.sum_of_squares).collect(),
            hashes: digests
                .iter()
                .flat_map(|d| d.hash)
                .collect::<Vec<u8>>()
                .into(),
        }),
        FromWorker::RootHeld { run, step } => Kind::RootHeld(v1::RootHeld {
            run: name(run),
            step,
        }),
        FromWorker::Digested { run, step, digests } => Kind::Digested(v1::Digested {
            run: name(run),
            step,
            params: digests.params.to_vec().into(),
            kept: digests.kept.concat().into(),
        }),
        FromWorker::Applied {
            run,
            step,
            state_hash,
        } => Kind::Applied(v1::Applied {
            run: name(run),
            step,
            state_hash: hash_to(state_hash),
        }),
        FromWorker::UnitDone {
            run,
            step,
            split,
            unit,
            found,
        } => Kind::UnitDone(unit_to(&run, step, split, unit, found)),
        FromWorker::SnapshotLost { run, step } => Kind::SnapshotLost(v1::SnapshotLost {
            run: name(run),
            step,
        }),
        FromWorker::Failed {
            run,
            step,
            message,
            only_here,
        } => Kind::Failed(v1::RunFailed {
            run: name(run),
            step,
            message,
            only_here,
        }),
    };
    v1::FromWorker { kind: Some(kind) }
}

/// A worker's message, from the wire. `Register` is not one of them: it opens the session.
pub fn from_worker_from(message: v1::FromWorker) -> Result<FromWorker, WireError> {
    use v1::from_worker::Kind;
    let sums = |loss, weight| LaneSums { loss, weight };
    Ok(
        match message
            .kind
            .ok_or_else(|| bad("FromWorker", "it is empty"))?
        {
            Kind::Register(_) => return Err(bad("FromWorker", "a second Register")),
            Kind::Figures(_) => return Err(bad("FromWorker", "figures are not for the machine")),
            Kind::Heartbeat(_) => FromWorker::Heartbeat,
            Kind::Leaving(_) => FromWorker::Leaving,
            Kind::Loaded(m) => FromWorker::Loaded {
                run: run_id(&m.run)?,
                step: m.step,
                state_hash: hash_from("Loaded", &m.state_hash)?,
            },
            Kind::LaneDone(m) => FromWorker::LaneDone {
                run: run_id(&m.run)?,
                step: m.step,
                lane: m.lane,
                sums: sums(m.loss, m.weight),
                micros: m.micros,
            },
            Kind::RootReady(m) => FromWorker::RootReady {
                run: run_id(&m.run)?,
                step: m.step,
                totals: RootTotals {
                    sum_of_squares: m.sum_of_squares,
                    hash: hash_from("RootReady", &m.hash)?
                        .ok_or_else(|| bad("RootReady", "it has no hash"))?,
                },
            },
            Kind::Reaches(m) => FromWorker::Reaches {
                run: run_id(&m.run)?,
                peers: m.peers.into_iter().map(SessionId).collect(),
            },
            Kind::Link(m) => FromWorker::Link {
                run: run_id(&m.run)?,
                peer: SessionId(m.peer),
                link: Link {
                    rtt_micros: m.rtt_micros,
                    bytes_per_second: m.bytes_per_second,
                },
            },
            Kind::Held(m) => FromWorker::Held {
                run: run_id(&m.run)?,
                step: m.step,
                lanes: m.lanes,
            },
            Kind::SliceReady(m) => FromWorker::SliceReady {
                run: run_id(&m.run)?,
                step: m.step,
                digests: digests_from(&m)?,
            },
            Kind::RootHeld(m) => FromWorker::RootHeld {
                run: run_id(&m.run)?,
                step: m.step,
            },
            Kind::Digested(m) => FromWorker::Digested {
                run: run_id(&m.run)?,
                step: m.step,
                digests: kept_from(&m)?,
            },
            Kind::Applied(m) => FromWorker::Applied {
                run: run_id(&m.run)?,
                step: m.step,
                state_hash: hash_from("Applied", &m.state_hash)?,
            },
            Kind::UnitDone(m) => unit_from(m)?,
            Kind::SnapshotLost(m) => FromWorker::SnapshotLost {
                run: run_id(&m.run)?,
                step: m.step,
            },
            Kind::Failed(m) => FromWorker::Failed {
                run: run_id(&m.run)?,
                step: m.step,
                message: m.message,
                only_here: m.only_here,
            },
        },
    )
}

/// What a worker says of itself, from the wire.
pub fn member_from(register: v1::Register) -> MemberInfo {
    let short = |text: String| text.chars().take(200).collect();
    MemberInfo {
        host: short(register.host),
        pid: register.pid,
        device: short(register.device),
        threads: register.threads,
        fingerprint: short(register.fingerprint),
        listens: Some(short(register.listens)).filter(|address| !address.is_empty()),
        site: Some(short(register.site)).filter(|site| !site.is_empty()),
    }
}

/// Where a segment is found, on the wire.
pub fn segment_to(address: &Address) -> v1::Segment {
    v1::Segment {
        pid: address.pid,
        fd: address.fd,
        nonce: address.nonce.to_vec().into(),
        bytes: address.bytes,
    }
}

/// Where a segment is found, from the wire.
pub fn segment_from(segment: &v1::Segment) -> Result<Address, WireError> {
    let nonce = segment.nonce.as_ref().try_into();
    Ok(Address {
        pid: segment.pid,
        fd: segment.fd,
        nonce: nonce.map_err(|_| bad("Segment", "its nonce has not 16 bytes"))?,
        bytes: segment.bytes,
    })
}

/// A value of `api` as a message.
pub fn json(value: &impl serde::Serialize) -> v1::Json {
    v1::Json {
        json: serde_json::to_vec(value)
            .expect("api types are JSON")
            .into(),
    }
}

/// A value of `api` from a message.
pub fn from_json<T: serde::de::DeserializeOwned>(message: &v1::Json) -> Result<T, WireError> {
    serde_json::from_slice(&message.json).map_err(|error| bad("JSON", error.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::aggregate::ChunkDigest;
    use prost::Message;

    fn sums() -> impl Strategy<Value = LaneSums> {
        // Protobuf leaves out what equals zero, and -0.0 does; sums of losses and weights are never -0.0.
        let number = || any::<f64>().prop_filter("-0.0", |x| *x != 0.0 || x.is_sign_positive());
        (number(), number()).prop_map(|(loss, weight)| LaneSums { loss, weight })
    }

    fn run() -> RunId {
        RunId::new("tiny-1")
    }

    proptest! {
        #[test]
        fn worker_messages_come_back_to_the_bit(step: u64, lane: u32, sums in sums(), micros: u64) {
            let message = FromWorker::LaneDone { run: run(), step, lane, sums, micros };
            let bytes = from_worker(message).encode_to_vec();
            let back = from_worker_from(v1::FromWorker::decode(bytes.as_slice()).unwrap()).unwrap();
            let FromWorker::LaneDone { sums: found, .. } = back else { panic!("{back:?}") };
            prop_assert_eq!(found.loss.to_bits(), sums.loss.to_bits());
            prop_assert_eq!(found.weight.to_bits(), sums.weight.to_bits());
        }

        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            if let Ok(message) = v1::FromWorker::decode(bytes.as_slice()) {
                let _ = from_worker_from(message);
            }
            if let Ok(message) = v1::ToWorker::decode(bytes.as_slice()) {
                let _ = to_worker_from(message);
            }
            let _ = v1::Chunk::decode(bytes.as_slice());
        }
    }

    #[test]
    fn slices_follow_each_other_without_a_gap() {
        let read = |slices: &[(u32, u32)]| {
            let share = |&(first, below): &(u32, u32)| v1::Share {
                session: 7,
                first,
                below,
            };
            let shares = slices.iter().map(share).collect();
            let sites = Vec::new();
            let kind = v1::owners::Kind::Shares(v1::Shares { shares, sites });
            owners_from(Some(v1::Owners { kind: Some(kind) }))
        };
        let owners = read(&[(0, 3), (3, 4)]).unwrap();
        assert_eq!(owners_from(Some(owners_to(&owners))), Ok(owners));
        for wrong in [
            &[][..],
            &[(1, 3)],
            &[(0, 0)],
            &[(0, 3), (4, 5)],
            &[(0, 3), (2, 5)],
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
        assert!(owners_from(None).is_err());
    }

    #[test]
    fn sites_gather_the_whole_gradient_and_what_they_own() {
        let share = |(session, first, below): (u64, u32, u32)| v1::Share {
            session,
            first,
            below,
        };
        let read = |gathers: &[(u64, u32, u32)], lanes: &[(u32, u32)]| {
            let range = |&(first, below): &(u32, u32)| v1::LaneRange { first, below };
            let site = v1::Site {
                workers: vec![3, 5],
                lanes: lanes.iter().map(range).collect(),
                gathers: gathers.iter().copied().map(share).collect(),
            };
            let shares = v1::Shares {
                shares: [(3, 0, 4), (4, 4, 6), (5, 6, 9)].map(share).into(),
                sites: vec![site],
            };
            let kind = v1::owners::Kind::Shares(shares);
            owners_from(Some(v1::Owners { kind: Some(kind) }))
        };
        let right = [(3, 0, 5), (5, 5, 9)];
        let owners = read(&right, &[(0, 2), (3, 7)]).unwrap();
        assert_eq!(owners_from(Some(owners_to(&owners))), Ok(owners));
        assert!(read(&right, &[]).is_ok());
        for lanes in [&[(2, 2)][..], &[(0, 2), (2, 3)], &[(3, 4), (0, 1)]] {
            assert!(read(&right, lanes).is_err(), "{lanes:?}");
        }
        for gathers in [
            &[][..],
            &[(3, 0, 5), (5, 5, 8)],
            &[(3, 0, 3), (5, 3, 9)],
            &[(5, 0, 9), (3, 9, 9)],
            &[(7, 0, 9)],
        ] {
            assert!(read(gathers, &[(0, 2)]).is_err(), "{gathers:?}");
        }
    }

    #[test]
    fn digests_of_a_slice_come_back_to_the_bit() {
        let digests = vec![
            ChunkDigest {
                sum_of_squares: 0.1,
                hash: [7; 32],
            };
            3
        ];
        let message = FromWorker::SliceReady {
            run: run(),
            step: 5,
            digests,
        };
        let mut sent = from_worker(message.clone());
        assert_eq!(from_worker_from(sent.clone()), Ok(message));
        if let Some(v1::from_worker::Kind::SliceReady(slice)) = &mut sent.kind {
            slice.hashes.truncate(95);
        }
        assert!(from_worker_from(sent).is_err());
    }

    #[test]
    fn what_is_kept_comes_back_and_half_a_digest_does_not() {
        let shares = [(3, 0..2), (5, 2..7)].map(|(session, chunks)| crate::cluster::Share {
            session: SessionId(session),
            chunks,
        });
        let keeper = crate::cluster::Keeper {
            division: crate::cluster::Division::of(shares.into()),
            session: SessionId(5),
        };
        let sent = keeper_to(&keeper);
        assert_eq!(keeper_from(sent.clone()), Ok(keeper));
        let mut one = sent.clone();
        one.division.truncate(1);
        assert!(keeper_from(one).is_err());
        assert!(keeper_from(v1::Keeper::default()).is_err());
        let digests = crate::cluster::Digests {
            params: [1; 32],
            kept: vec![[2; 32], [3; 32]],
        };
        let message = FromWorker::Digested {
            run: run(),
            step: 5,
            digests,
        };
        let mut sent = from_worker(message.clone());
        assert_eq!(from_worker_from(sent.clone()), Ok(message));
        if let Some(v1::from_worker::Kind::Digested(digested)) = &mut sent.kind {
            digested.kept.truncate(63);
        }
        assert!(from_worker_from(sent).is_err());
        let message = ToWorker::Snapshot {
            run: run(),
            step: 5,
            slices: Some(vec![0..2, 5..6]),
        };
        assert_eq!(to_worker_from(to_worker(&message)), Ok(message));
        let none = v1::Serve {
            run: "tiny-1".into(),
            step: 5,
            slice: None,
        };
        let kind = Some(v1::to_worker::Kind::Serve(none));
        assert!(to_worker_from(v1::ToWorker { kind }).is_err());
    }

    #[test]
    fn a_run_name_cannot_leave_its_directory() {
        let message = v1::ToWorker {
            kind: Some(v1::to_worker::Kind::Unload(v1::Unload {
                run: "../../etc".into(),
            })),
        };
        assert!(to_worker_from(message).is_err());
    }
}
