//! Who keeps the optimizer's moments where they are divided among the workers: each slice has an owner, and the next in the
//! ring as a second holder. **Pure.**
//!
//! Both holders get the root of the slice and make the same update of it; the owner sends the new parameters to everybody
//! else. So the second holder costs no bytes: what it gets is the root in the place of the parameters. And while one of the
//! two lives nothing is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::cluster::messages::Share;
use crate::ids::SessionId;

/// The slices that the moments are divided into. In index order they are all chunks, and there are two of them at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Division(Arc<[Share]>);

/// A division as one of its workers sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keeper {
    /// Who keeps what.
    pub division: Division,
    /// Which of them this worker is. It need not have a slice: there may be more workers than chunks.
    pub session: SessionId,
}

/// What a worker has found of its state: one hash over all parameters, and the digests of the chunks that it keeps, those of
/// its own slice first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// Over the parameters.
    pub params: [u8; 32],
    /// Of chunks of parameters and both moments.
    pub kept: Vec<[u8; 32]>,
}

impl Division {
    /// Equal slices for the first `most` of these workers; `None` where there are not two of them, or not two chunks.
    pub fn among(sessions: &BTreeSet<SessionId>, chunks: u32, most: usize) -> Option<Self> {
        let count = (sessions.len().min(most) as u64).min(u64::from(chunks));
        let cut = |i: u64| (u64::from(chunks) * i / count) as u32;
        let share = |(i, session): (u64, &SessionId)| Share {
            session: *session,
            chunks: cut(i)..cut(i + 1),
        };
        let owners = sessions.iter().take(count as usize);
        (count > 1).then(|| Self((0..).zip(owners).map(share).collect()))
    }

    /// Of these slices.
    ///
    /// # Panics
    /// If there are not two of them.
    pub fn of(shares: Arc<[Share]>) -> Self {
        assert!(shares.len() > 1, "{shares:?} divide nothing");
        Self(shares)
    }

    /// The slices and their owners.
    pub fn shares(&self) -> &Arc<[Share]> {
        &self.0
    }

    /// The second holder of a slice, by its place.
    fn second(&self, place: usize) -> SessionId {
        self.0[(place + 1) % self.0.len()].session
    }

    fn place(&self, session: SessionId) -> Option<usize> {
        self.0.iter().position(|share| share.session == session)
    }

    /// The second holder of a worker's slice.
    pub fn second_of(&self, owner: SessionId) -> Option<SessionId> {
        Some(self.second(self.place(owner)?))
    }

    /// The chunks that a worker keeps: its own slice, and the one that it is the second holder of. None without a slice.
    pub fn kept(&self, session: SessionId) -> Option<[Range<u32>; 2]> {
        let place = self.place(session)?;
        let before = (place + self.0.len() - 1) % self.0.len();
        Some([self.0[place].chunks.clone(), self.0[before].chunks.clone()])
    }

    /// Whether each slice has a holder among these.
    pub fn is_covered_by(&self, alive: &BTreeSet<SessionId>) -> bool {
        self.donors(alive).is_some()
    }

    /// Whether all owners are among these.
    pub fn is_whole_in(&self, alive: &BTreeSet<SessionId>) -> bool {
        self.0.iter().all(|share| alive.contains(&share.session))
    }

    /// Who of these can give which slices, so that each is given once; `None` if one is lost.
    pub fn donors(
        &self,
        alive: &BTreeSet<SessionId>,
    ) -> Option<BTreeMap<SessionId, Vec<Range<u32>>>> {
        let mut donors: BTreeMap<SessionId, Vec<Range<u32>>> = BTreeMap::new();
        for (place, share) in self.0.iter().enumerate() {
            let holders = [share.session, self.second(place)];
            let donor = holders.into_iter().find(|holder| alive.contains(holder))?;
            donors.entry(donor).or_default().push(share.chunks.clone());
        }
        Some(donors)
    }

    /// The same slices, of workers that have other names now. Those without one are gone.
    pub fn renamed(&self, names: &BTreeMap<SessionId, SessionId>) -> Self {
        let share = |share: &Share| Share {
            session: names.get(&share.session).copied().unwrap_or(share.session),
            chunks: share.chunks.clone(),
        };
        Self(self.0.iter().map(share).collect())
    }

    /// What the workers have found, as one hash of the state for each of them, which is what a worker that keeps everything
    /// would have found. Where two differ in what they should have alike, both get a hash of their own; so does who differs
    /// from most others in the parameters. `None` as long as nobody has spoken of some chunk.
    pub fn votes(
        &self,
        found: &BTreeMap<SessionId, Digests>,
    ) -> Option<BTreeMap<SessionId, [u8; 32]>> {
        let mut wrong = BTreeSet::new();
        let mut state = blake3::Hasher::new();
        for (place, share) in self.0.iter().enumerate() {
            let slice = share.chunks.len();
            let own = |found: &Digests| found.kept.get(..slice).map(<[_]>::to_vec);
            let second = |found: &Digests| {
                let last = found.kept.len().checked_sub(slice)?;
                found.kept.get(last..).map(<[_]>::to_vec)
            };
            let (owner, holder) = (share.session, self.second(place));
            let first = found.get(&owner).and_then(own);
            let second = found.get(&holder).and_then(second);
            if first.is_some() && second.is_some() && first != second {
                wrong.extend([owner, holder]);
            }
            for digest in first.or(second)? {
                state.update(&digest);
            }
        }
        let state: [u8; 32] = state.finalize().into();
        wrong.extend(odd_ones(found));
        let vote = |session: &SessionId| match wrong.contains(session) {
            true => blake3::hash(&[&state[..], &session.0.to_le_bytes()].concat()).into(),
            false => state,
        };
        Some(found.keys().map(|s| (*s, vote(s))).collect())
    }
}

/// Who has other parameters than most; everybody, where no parameters are those of most.
fn odd_ones(found: &BTreeMap<SessionId, Digests>) -> Vec<SessionId> {
    let mut camps: BTreeMap<[u8; 32], usize> = BTreeMap::new();
    for each in found.values() {
        *camps.entry(each.params).or_default() += 1;
    }
    let most = camps.iter().find(|(_, camp)| 2 * **camp > found.len());
    let most = most.map(|(params, _)| *params);
    let odd = |(s, each): (&SessionId, &Digests)| (Some(each.params) != most).then_some(*s);
    found.iter().filter_map(odd).collect()
}

impl Keeper {
    /// The chunks that this worker keeps: its own slice first, then the other. Nothing without a slice.
    pub fn kept(&self) -> Option<[Range<u32>; 2]> {
        self.division.kept(self.session)
    }

    /// Whether this worker keeps a chunk.
    pub fn keeps(&self, chunk: u32) -> bool {
        let kept = self.kept();
        kept.is_some_and(|kept| kept.iter().any(|slice| slice.contains(&chunk)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sessions(names: impl IntoIterator<Item = u64>) -> BTreeSet<SessionId> {
        names.into_iter().map(SessionId).collect()
    }

    fn digest(chunk: u32) -> [u8; 32] {
        blake3::hash(&chunk.to_le_bytes()).into()
    }

    /// What these workers find in a sound state.
    fn found(division: &Division, of: &BTreeSet<SessionId>) -> BTreeMap<SessionId, Digests> {
        let find = |session: &SessionId| {
            let kept = division.kept(*session).into_iter().flatten().flatten();
            let found = Digests {
                params: [1; 32],
                kept: kept.map(digest).collect(),
            };
            (*session, found)
        };
        of.iter().map(find).collect()
    }

    proptest! {
        #[test]
        fn every_chunk_has_two_holders_and_survives_either(
            count in 2u64..9, chunks in 2u32..40, lost: prop::sample::Index,
        ) {
            let all = sessions(1..=count);
            let division = Division::among(&all, chunks, 64).unwrap();
            let mut holders = vec![0; chunks as usize];
            for session in &all {
                let kept = division.kept(*session).into_iter().flatten();
                kept.flatten().for_each(|chunk| holders[chunk as usize] += 1);
            }
            prop_assert!(holders.iter().all(|holders| *holders == 2), "{:?}", holders);
            let mut rest = all.clone();
            rest.remove(&SessionId(1 + lost.index(count as usize) as u64));
            let donors = division.donors(&rest).unwrap();
            let mut given: Vec<u32> = donors.values().flatten().cloned().flatten().collect();
            given.sort_unstable();
            prop_assert_eq!(given, (0..chunks).collect::<Vec<_>>());
        }

        #[test]
        fn votes_are_the_hash_of_the_whole_state(count in 2u64..9, chunks in 2u32..40) {
            let all = sessions(1..=count);
            let division = Division::among(&all, chunks, 64).unwrap();
            let whole: Vec<[u8; 32]> = (0..chunks).map(digest).collect();
            let whole = crate::checkpoint::combine_digests(&whole);
            let votes = division.votes(&found(&division, &all)).unwrap();
            prop_assert_eq!(votes.len(), all.len());
            prop_assert!(votes.values().all(|vote| *vote == whole));
            // One of them is enough for each slice.
            let mut rest = all.clone();
            rest.remove(&SessionId(1));
            if let Some(votes) = division.votes(&found(&division, &rest)) {
                prop_assert!(votes.values().all(|vote| *vote == whole));
            }
        }
    }

    #[test]
    fn whoever_differs_gets_a_hash_of_its_own() {
        let all = sessions(1..=5);
        let division = Division::among(&all, 10, 64).unwrap();
        let sound = found(&division, &all);
        let good = division.votes(&sound).unwrap()[&SessionId(1)];
        let odd = |change: &dyn Fn(&mut Digests)| {
            let mut found = sound.clone();
            change(found.get_mut(&SessionId(3)).unwrap());
            let votes = division.votes(&found).unwrap();
            let odd = votes.iter().filter(|(_, vote)| **vote != good);
            odd.map(|(s, _)| s.0).collect::<Vec<_>>()
        };
        assert_eq!(odd(&|found| found.params = [2; 32]), [3]);
        // Its own slice, and that of the one before it.
        assert_eq!(odd(&|found| found.kept[3] = [0; 32]), [2, 3]);
        let votes = |digest: [u8; 32]| {
            let mut found = sound.clone();
            found.get_mut(&SessionId(3)).unwrap().kept[0] = digest;
            division.votes(&found).unwrap()
        };
        let votes = votes([0; 32]);
        assert_ne!(votes[&SessionId(3)], votes[&SessionId(4)]);
        assert_eq!(votes[&SessionId(2)], votes[&SessionId(1)]);
    }

    #[test]
    fn neighbours_that_are_lost_take_a_slice_along() {
        let division = Division::among(&sessions(1..=4), 8, 64).unwrap();
        assert!(division.is_covered_by(&sessions([1, 3])));
        assert!(!division.is_covered_by(&sessions([1, 4])), "2 and 3");
        assert!(!division.is_covered_by(&sessions([2, 3])), "4 and 1");
        assert_eq!(division.votes(&found(&division, &sessions([1, 4]))), None);
        let names = BTreeMap::from([(SessionId(2), SessionId(9))]);
        let renamed = division.renamed(&names);
        assert_eq!(renamed.kept(SessionId(9)), division.kept(SessionId(2)));
        assert_eq!(renamed.kept(SessionId(2)), None);
    }

    #[test]
    fn workers_beyond_the_chunks_keep_nothing() {
        let division = Division::among(&sessions(1..=5), 3, 64).unwrap();
        assert_eq!(division.kept(SessionId(4)), None);
        let few = Division::among(&sessions(1..=5), 9, 2).unwrap();
        assert_eq!(few.kept(SessionId(2)), Some([4..9, 0..4]));
        assert_eq!(few.kept(SessionId(3)), None);
        assert!(Division::among(&sessions([1]), 3, 64).is_none());
        assert!(Division::among(&sessions([1, 2]), 1, 64).is_none());
    }
}
