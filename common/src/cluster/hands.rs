//! Who has which pieces of the work in flight, which are lanes of a step or units of a validation, and who has the least
//! left. Whatever is asked while messages come in is answered without a look at everybody. **Pure.**

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::SessionId;

/// Pieces in the hands of workers.
#[derive(Debug, Default)]
pub(super) struct Hands {
    hands: BTreeMap<SessionId, Hand>,
    /// Who has each piece.
    holders: Vec<Vec<SessionId>>,
    /// Whether each piece is still wanted.
    open: Vec<bool>,
    /// Everybody, by the number of open pieces.
    by_load: BTreeSet<(usize, SessionId)>,
}

/// What one worker has.
#[derive(Debug, Default)]
struct Hand {
    pieces: BTreeSet<u32>,
    /// Those of them that are still wanted.
    open: usize,
}

impl Hands {
    /// So many pieces, all open, in nobody's hands.
    pub fn new(pieces: u32) -> Self {
        Self {
            holders: vec![Vec::new(); pieces as usize],
            open: vec![true; pieces as usize],
            ..Self::default()
        }
    }

    /// Gives pieces to a worker besides those that it has; none, to one that is only to be among them.
    pub fn give(&mut self, session: SessionId, pieces: impl IntoIterator<Item = u32>) {
        let hand = self.hands.entry(session).or_default();
        let before = hand.open;
        for piece in pieces {
            if hand.pieces.insert(piece) {
                self.holders[piece as usize].push(session);
                hand.open += usize::from(self.open[piece as usize]);
            }
        }
        let after = hand.open;
        self.by_load.remove(&(before, session));
        self.by_load.insert((after, session));
    }

    /// Takes a piece from a worker.
    pub fn take(&mut self, session: SessionId, piece: u32) {
        let Some(hand) = self.hands.get_mut(&session) else {
            return;
        };
        if hand.pieces.remove(&piece) {
            self.holders[piece as usize].retain(|holder| *holder != session);
            if self.open[piece as usize] {
                self.lighten(session);
            }
        }
    }

    /// A worker is gone. Gives its open pieces that nobody else has, ascending.
    pub fn leave(&mut self, session: SessionId) -> Vec<u32> {
        let Some(hand) = self.hands.remove(&session) else {
            return Vec::new();
        };
        self.by_load.remove(&(hand.open, session));
        let mut missing = Vec::new();
        for piece in hand.pieces {
            let holders = &mut self.holders[piece as usize];
            holders.retain(|holder| *holder != session);
            if holders.is_empty() && self.open[piece as usize] {
                missing.push(piece);
            }
        }
        missing
    }

    /// A piece is wanted no more. Whoever has it keeps it.
    pub fn close(&mut self, piece: u32) {
        if std::mem::replace(&mut self.open[piece as usize], false) {
            for i in 0..self.holders[piece as usize].len() {
                self.lighten(self.holders[piece as usize][i]);
            }
        }
    }

    /// All pieces are wanted again.
    pub fn reopen(&mut self) {
        self.open.fill(true);
        self.by_load.clear();
        for (session, hand) in &mut self.hands {
            hand.open = hand.pieces.len();
            self.by_load.insert((hand.open, *session));
        }
    }

    fn lighten(&mut self, session: SessionId) {
        let hand = self.hands.get_mut(&session).expect("it has a piece");
        self.by_load.remove(&(hand.open, session));
        hand.open -= 1;
        self.by_load.insert((hand.open, session));
    }

    /// Everybody, those with the least open pieces first, in the order of sessions where that is equal.
    pub fn by_load(&self) -> impl Iterator<Item = SessionId> {
        self.by_load.iter().map(|(_, session)| *session)
    }

    /// Pieces of a worker, ascending.
    pub fn all_of(&self, session: SessionId) -> impl Iterator<Item = u32> {
        let pieces = self.hands.get(&session).map(|hand| &hand.pieces);
        pieces.into_iter().flatten().copied()
    }

    /// Open pieces of a worker, ascending.
    pub fn open_of(&self, session: SessionId) -> impl Iterator<Item = u32> {
        let pieces = self.hands.get(&session).map(|hand| &hand.pieces);
        let open = |piece: &u32| self.open[*piece as usize];
        pieces.into_iter().flatten().copied().filter(open)
    }

    /// Pieces that a worker has, open or not.
    pub fn count(&self, session: SessionId) -> usize {
        self.hands.get(&session).map_or(0, |hand| hand.pieces.len())
    }

    /// Who has a piece.
    pub fn holders(&self, piece: u32) -> &[SessionId] {
        &self.holders[piece as usize]
    }

    /// Each worker and its pieces, ascending.
    pub fn all(&self) -> impl Iterator<Item = (SessionId, Vec<u32>)> {
        let copied = |(session, hand): (&SessionId, &Hand)| {
            (*session, hand.pieces.iter().copied().collect())
        };
        self.hands.iter().map(copied)
    }

    /// Open pieces that nobody has: there must be none.
    pub fn lost(&self) -> impl Iterator<Item = u32> {
        let all = (0u32..).zip(self.holders.iter().zip(&self.open));
        all.filter_map(|(piece, (holders, open))| (*open && holders.is_empty()).then_some(piece))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What can be done.
    #[derive(Clone, Debug)]
    enum Act {
        Give(u64, u32),
        Take(u64, u32),
        Leave(u64),
        Close(u32),
        Reopen,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            6 => (0u64..6, 0u32..9).prop_map(|(s, p)| Act::Give(s, p)),
            2 => (0u64..6, 0u32..9).prop_map(|(s, p)| Act::Take(s, p)),
            1 => (0u64..6).prop_map(Act::Leave),
            3 => (0u32..9).prop_map(Act::Close),
            1 => Just(Act::Reopen),
        ]
    }

    proptest! {
        /// Compared with a table of who has what, which is looked through from end to end.
        #[test]
        fn whatever_is_asked_is_what_a_look_at_everybody_finds(acts in proptest::collection::vec(act(), 0..60)) {
            let mut hands = Hands::new(9);
            let mut table: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
            let mut open = [true; 9];
            for act in acts {
                match act {
                    Act::Give(s, p) => {
                        hands.give(SessionId(s), [p]);
                        table.entry(s).or_default().insert(p);
                    }
                    Act::Take(s, p) => {
                        hands.take(SessionId(s), p);
                        if let Some(pieces) = table.get_mut(&s) {
                            pieces.remove(&p);
                        }
                    }
                    Act::Leave(s) => {
                        let found = hands.leave(SessionId(s));
                        let had = table.remove(&s).unwrap_or_default();
                        let missing = |p: &u32| open[*p as usize] && !table.values().any(|t| t.contains(p));
                        prop_assert_eq!(found, had.into_iter().filter(missing).collect::<Vec<_>>());
                    }
                    Act::Close(p) => {
                        hands.close(p);
                        open[p as usize] = false;
                    }
                    Act::Reopen => {
                        hands.reopen();
                        open = [true; 9];
                    }
                }
                let load = |s: u64| table[&s].iter().filter(|p| open[**p as usize]).count();
                let mut order: Vec<(usize, u64)> = table.keys().map(|s| (load(*s), *s)).collect();
                order.sort_unstable();
                let order: Vec<SessionId> = order.into_iter().map(|(_, s)| SessionId(s)).collect();
                prop_assert_eq!(hands.by_load().collect::<Vec<_>>(), order);
                for piece in 0..9 {
                    let mut holders = hands.holders(piece).to_vec();
                    holders.sort_unstable();
                    let expected: Vec<SessionId> = table.iter().filter(|(_, t)| t.contains(&piece)).map(|(s, _)| SessionId(*s)).collect();
                    prop_assert_eq!(holders, expected);
                }
                for (s, pieces) in &table {
                    let of = SessionId(*s);
                    prop_assert_eq!(hands.count(of), pieces.len());
                    let expected: Vec<u32> = pieces.iter().copied().filter(|p| open[*p as usize]).collect();
                    prop_assert_eq!(hands.open_of(of).collect::<Vec<_>>(), expected);
                }
            }
        }
    }
}
