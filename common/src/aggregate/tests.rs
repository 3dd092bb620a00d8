use proptest::prelude::*;

use super::*;

/// Two chunks, the second of them short.
const LEN: usize = CHUNK_LEN + 3;

/// Five chunks, the last of them short.
const LONG: usize = 4 * CHUNK_LEN + 3;

fn gradient(lane: Lane, len: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 31 + lane as usize * 977) % 1009) as f32 * 0.123 - 61.7;
    (0..len).map(value).collect()
}

const STEP: Step = 7;

const PAYLOADS: [Payload; 4] = [Payload::F32, Payload::Bf16, Payload::Int8, Payload::Int4];

fn payload() -> impl Strategy<Value = Payload> {
    prop::sample::select(&PAYLOADS[..])
}

fn shape(lanes: u32, len: usize, payload: Payload) -> Shape {
    Shape {
        lanes,
        len,
        payload,
        seed: 3,
    }
}

/// What a worker holds of a node.
fn node_sum(payload: Payload, node: Node, len: usize) -> Vec<f32> {
    let rounding = shape(1, len, payload).rounding(STEP).of(node);
    match node.children() {
        None => {
            let mut gradient = gradient(node.first, len);
            leaf(rounding, &mut gradient);
            gradient
        }
        Some((left, right)) => {
            let mut sum = node_sum(payload, left, len);
            parent(rounding, &mut sum, &node_sum(payload, right, len));
            sum
        }
    }
}

/// How a chunk comes.
#[derive(Clone, Copy, Debug)]
enum Way {
    Wire,
    Shared,
    Here,
}

const WAYS: [Way; 3] = [Way::Wire, Way::Shared, Way::Here];

fn way() -> impl Strategy<Value = Way> {
    prop::sample::select(&WAYS[..])
}

fn data(payload: Payload, sum: &[f32], index: usize, way: Way) -> Data {
    let chunk = &sum[chunk_range(index, sum.len())];
    match way {
        Way::Wire => {
            let data: Bytes = payload.to_wire(chunk).into();
            let check = checksum(&data);
            Data::Wire { data, check }
        }
        Way::Shared => {
            let segment = Arc::new(Segment::private(chunk.len() * 4));
            // SAFETY: nobody else has the segment.
            unsafe { segment.floats_mut(0..chunk.len()) }.copy_from_slice(chunk);
            Data::Shared(Part::new(&segment, 0, chunk.len() * 4).unwrap())
        }
        Way::Here => Data::Here(encode(chunk)),
    }
}

fn private() -> MakeRoot {
    Box::new(|bytes| Arc::new(Segment::private(bytes)))
}

fn aggregator(lanes: u32, payload: Payload) -> Aggregator {
    Aggregator::with_root(shape(lanes, LEN, payload), STEP, 0..2, private())
}

/// The root, as far as it is owned.
fn root_of(sums: &Aggregator, payload: Payload) -> Vec<f32> {
    let chunk = |index| {
        let chunk = sums.root(index).unwrap();
        assert_eq!(chunk.check, checksum(&chunk.data));
        payload.from_wire(&chunk.data, chunk_range(index, sums.len()).len())
    };
    sums.slice().flat_map(chunk).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whoever computes which lanes, and however they come, the root is the same.
    #[test]
    fn the_root_depends_on_the_lanes_alone(
        lanes in 1u32..7,
        payload in payload(),
        ranges in prop::collection::vec((0u32..7, 0u32..7, way()), 0..6),
    ) {
        let tree = Tree::new(lanes);
        let sums = aggregator(lanes, payload);
        // Some work, then all of it.
        let all = (0..lanes).map(|lane| (lane, lane + 1, WAYS[lane as usize % 3]));
        let mut delivered = Vec::new();
        let mut complete = 0;
        for (a, b, way) in ranges.into_iter().chain(all) {
            for node in tree.cover(a.min(b).min(lanes)..a.max(b).min(lanes)) {
                let sum = node_sum(payload, node, LEN);
                for index in sums.slice().rev() {
                    let data = data(payload, &sum, index, way);
                    let offered = sums.offer(node, index, data, SessionId(1)).unwrap();
                    delivered.extend(offered.delivered);
                    complete += usize::from(offered.all_complete);
                }
            }
        }
        delivered.sort_unstable();
        prop_assert_eq!(delivered, (0..lanes).collect::<Vec<_>>());
        prop_assert_eq!(complete, 1);
        let root = node_sum(payload, tree.root(), LEN);
        prop_assert_eq!(sums.totals(), Some(totals_of(&root)));
        prop_assert_eq!(root_of(&sums, payload), root);
    }

    /// However the gradient is cut, its owners have the bits of the whole.
    #[test]
    fn slices_add_up_to_the_whole(
        lanes in 1u32..5,
        payload in payload(),
        cuts in (0usize..=5, 0usize..=5),
        ways in (way(), way()),
    ) {
        let shape = shape(lanes, LONG, payload);
        let (a, b) = (cuts.0.min(cuts.1), cuts.0.max(cuts.1));
        let mut roots = Vec::new();
        let mut digests = Vec::new();
        for slice in [0..a, a..b, b..5] {
            let sums = Aggregator::with_root(shape, STEP, slice.clone(), private());
            let mut delivered = Vec::new();
            for lane in 0..lanes {
                let sum = node_sum(payload, Node::leaf(lane), LONG);
                let way = if lane % 2 == 0 { ways.0 } else { ways.1 };
                for index in 0..5 {
                    let last = lane + 1 == lanes;
                    prop_assert!(sums.root(index).is_none() || last);
                    let data = data(payload, &sum, index, way);
                    let offered = sums.offer(Node::leaf(lane), index, data, SessionId(1));
                    if !slice.contains(&index) {
                        let slice = slice.clone();
                        prop_assert_eq!(offered, Err(OfferError::NotOwned { index, slice }));
                        continue;
                    }
                    let offered = offered.unwrap();
                    delivered.extend(offered.delivered);
                    prop_assert_eq!(offered.chunk_complete, last);
                    prop_assert_eq!(offered.all_complete, last && index + 1 == slice.end);
                    prop_assert_eq!(sums.leading(), if last { index + 1 } else { slice.start });
                }
            }
            let all = if slice.is_empty() { 0 } else { lanes };
            prop_assert_eq!(delivered, (0..all).collect::<Vec<_>>());
            if !slice.is_empty() {
                let elements = (slice.end * CHUNK_LEN).min(LONG) - slice.start * CHUNK_LEN;
                prop_assert_eq!(sums.segment().len(), elements * 4);
            }
            roots.extend(root_of(&sums, payload));
            digests.extend(sums.digests().unwrap());
        }
        let root = node_sum(payload, Tree::new(lanes).root(), LONG);
        let expected: Vec<ChunkDigest> = root.chunks(CHUNK_LEN).map(ChunkDigest::of).collect();
        prop_assert_eq!(digests, expected);
        prop_assert!(roots == root);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whoever is in which site, and whatever comes when: what each site passes on makes up the root.
    #[test]
    fn sites_that_add_up_first_make_the_same_root(
        payload in payload(),
        sites in prop::collection::vec(0usize..3, 1..8),
        owned in (0usize..3, 0usize..3),
        order in any::<prop::sample::Index>(),
    ) {
        let lanes = sites.len() as u32;
        let tree = Tree::new(lanes);
        let (shape, session) = (shape(lanes, LEN, payload), SessionId(1));
        let (start, end) = (owned.0.min(owned.1), owned.0.max(owned.1));
        let owner = Aggregator::with_root(shape, STEP, 0..2, private());
        let mut delivered = 0;
        for site in 0..3 {
            let own = (0..lanes).filter(|lane| sites[*lane as usize] == site);
            let mut own: Vec<Lane> = own.collect();
            let ranges = crate::lanes::ranges(&own);
            let passes: Vec<Node> = ranges.into_iter().flat_map(|r| tree.cover(r)).collect();
            let duty = Duty { chunks: 0..2, owned: start..end, passes: passes.clone() };
            let gathers = Aggregator::with_root(shape, STEP, duty, private());
            prop_assert_eq!(gathers.slice(), start..end);
            if !own.is_empty() {
                let middle = order.index(own.len());
                own.rotate_left(middle);
            }
            for lane in own {
                let sum = node_sum(payload, Node::leaf(lane), LEN);
                for (index, way) in [(1, Way::Here), (0, Way::Wire)] {
                    let data = data(payload, &sum, index, way);
                    let offered = gathers.offer(Node::leaf(lane), index, data.clone(), session).unwrap();
                    delivered += offered.delivered.len();
                    let mut up = Some((Node::leaf(lane), data)).filter(|_| (start..end).contains(&index));
                    if let Some(passed) = offered.passed {
                        prop_assert!(passes.contains(&passed.node) && passed.index == index);
                        prop_assert!(gathers.leading() <= index);
                        let sum = node_sum(payload, passed.node, LEN);
                        prop_assert_eq!(&passed.sum, &encode(&sum[chunk_range(index, LEN)]));
                        up = Some((passed.node, Data::Here(passed.sum)));
                        gathers.passed_on(index);
                    }
                    // Whoever owns a chunk here gets everything, too.
                    if let Some((node, data)) = up {
                        owner.offer(node, index, data, session).unwrap();
                    }
                }
            }
            let all = start == end || sites.iter().all(|s| *s == site);
            prop_assert_eq!(gathers.leading() == 2, all, "{}", gathers.leading());
        }
        prop_assert_eq!(delivered as u32, lanes);
        prop_assert_eq!(root_of(&owner, payload), node_sum(payload, tree.root(), LEN));
    }
}

#[test]
fn lanes_of_other_sites_are_not_gathered() {
    let shape = shape(4, LONG, Payload::F32);
    let passes = vec![Node { first: 0, size: 2 }];
    let duty = Duty {
        chunks: 1..4,
        owned: 2..3,
        passes,
    };
    let sums = Aggregator::with_root(shape, STEP, duty, private());
    let sum = gradient(3, LONG);
    let offer = |index: usize| {
        let data = data(Payload::F32, &sum, index, Way::Wire);
        sums.offer(Node::leaf(3), index, data, SessionId(1))
    };
    let refused = "chunk 1 of lane 3 belongs to another owner, and is not to be passed on here";
    assert_eq!(offer(1).unwrap_err().to_string(), refused);
    assert_eq!(offer(2).unwrap().delivered, [3]);
}

/// Two workers, and what they say of lane 0 of 2, in every mixture of ways.
#[test]
fn copies_are_compared_whatever_way_they_take() {
    for payload in PAYLOADS {
        for (first, second) in WAYS.iter().flat_map(|&a| WAYS.map(|b| (a, b))) {
            let sums = aggregator(2, payload);
            let right = node_sum(payload, Node::leaf(0), LEN);
            let mut wrong = right.clone();
            wrong[7] = 1e4;
            let push = |node, sum: &[f32], way, from| {
                sums.offer(node, 0, data(payload, sum, 0, way), SessionId(from))
            };
            push(Node::leaf(0), &right, first, 1).unwrap();
            assert_eq!(
                push(Node::leaf(0), &right, second, 2),
                Ok(Offered::default())
            );
            let mismatch = OfferError::Mismatch {
                index: 0,
                node: Node::leaf(0),
                first: SessionId(1),
                second: SessionId(2),
            };
            assert_eq!(
                push(Node::leaf(0), &wrong, second, 2),
                Err(mismatch.clone())
            );
            // Summed by now, but the step is not complete: the second chunk is missing.
            let sibling = node_sum(payload, Node::leaf(1), LEN);
            push(Node::leaf(1), &sibling, first, 1).unwrap();
            assert_eq!(push(Node::leaf(0), &wrong, second, 2), Err(mismatch));
            let again = push(Node::leaf(0), &right, second, 2);
            assert_eq!(again, Ok(Offered::default()));
        }
    }
}

#[test]
fn what_was_shared_says_nothing_once_the_step_is_complete() {
    let sums = aggregator(1, Payload::F32);
    let root = node_sum(Payload::F32, Node::leaf(0), LEN);
    for index in 0..2 {
        let data = data(Payload::F32, &root, index, Way::Wire);
        sums.offer(Node::leaf(0), index, data, SessionId(1))
            .unwrap();
    }
    let overwritten = vec![0.0; LEN];
    let late = data(Payload::F32, &overwritten, 0, Way::Shared);
    let offered = sums.offer(Node::leaf(0), 0, late, SessionId(2));
    assert_eq!(offered, Ok(Offered::default()));
    for way in [Way::Wire, Way::Here] {
        let late = data(Payload::F32, &overwritten, 0, way);
        assert!(sums.offer(Node::leaf(0), 0, late, SessionId(2)).is_err());
    }
}

/// A node that was replaced, the one that replaced it, and one that came too late: none is held when the root is there.
#[test]
fn what_lies_here_is_held_until_the_root_is_complete() {
    let sums = aggregator(2, Payload::F32);
    let owner = Arc::new(node_sum(Payload::F32, Node::leaf(0), LEN));
    struct Owned(Arc<Vec<f32>>);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0[chunk_range(0, LEN)])
        }
    }
    let root = Node { first: 0, size: 2 };
    let mut held = Vec::new();
    for node in [Node::leaf(0), root, Node::leaf(1)] {
        let here = Data::Here(Bytes::from_owner(Owned(owner.clone())));
        sums.offer(node, 0, here, SessionId(1)).unwrap();
        held.push(Arc::strong_count(&owner) - 1);
    }
    assert_ne!(held[0], 0);
    assert_eq!(held[1..], [0, 0]);
    // They are compared all the same.
    for node in [Node::leaf(0), root, Node::leaf(1)] {
        let wrong = data(Payload::F32, &gradient(5, LEN), 0, Way::Wire);
        let offered = sums.offer(node, 0, wrong, SessionId(2));
        assert!(matches!(offered, Err(OfferError::Mismatch { .. })));
    }
}

#[test]
fn a_chunk_of_another_slice_is_refused() {
    let shape = shape(1, LONG, Payload::F32);
    let sums = Aggregator::with_root(shape, STEP, 1..3, private());
    let sum = gradient(0, LONG);
    let refused = |index: usize, of: usize| {
        let data = data(Payload::F32, &sum, of, Way::Wire);
        let offered = sums.offer(Node::leaf(0), index, data, SessionId(1));
        offered.unwrap_err().to_string()
    };
    let other = "chunk 0 belongs to another owner; this one has chunks 1..3";
    assert_eq!(refused(0, 0), other);
    let outside = "chunk 5 lies outside the 5 chunks of this gradient";
    assert_eq!(refused(5, 4), outside);
    assert_eq!(sums.leading(), 1);
    assert!(sums.root(0).is_none() && sums.root(5).is_none());
}

#[test]
fn chance_is_another_one_for_each_node_step_and_seed() {
    let key = |seed, step, node| {
        let shape = Shape {
            seed,
            ..shape(8, LEN, Payload::Int8)
        };
        let mut values = gradient(0, 256);
        shape.rounding(step).of(node).round(&mut values, 0);
        values
    };
    let one = key(1, 1, Node::leaf(0));
    assert_eq!(one, key(1, 1, Node::leaf(0)));
    let others = [
        key(2, 1, Node::leaf(0)),
        key(1, 2, Node::leaf(0)),
        key(1, 1 + (1 << 32), Node::leaf(0)),
        key(1, 1, Node::leaf(1)),
        key(1, 1, Node { first: 0, size: 2 }),
    ];
    assert!(others.iter().all(|other| *other != one));
}
