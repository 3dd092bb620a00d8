use proptest::prelude::*;

use super::*;
use crate::floats::floats_of;

/// Two chunks, the second of them short.
const LEN: usize = CHUNK_LEN + 3;

fn gradient(lane: Lane) -> Vec<f32> {
    let value = |i: usize| ((i * 31 + lane as usize * 977) % 1009) as f32 * 0.123 - 61.7;
    (0..LEN).map(value).collect()
}

/// What a worker holds of a node.
fn node_sum(payload: Payload, node: Node) -> Vec<f32> {
    match node.children() {
        None => {
            let mut gradient = gradient(node.first);
            leaf(payload, &mut gradient);
            gradient
        }
        Some((left, right)) => {
            let mut sum = node_sum(payload, left);
            parent(payload, &mut sum, &node_sum(payload, right));
            sum
        }
    }
}

fn data(payload: Payload, sum: &[f32], index: usize, shared: bool) -> Data {
    let chunk = &sum[chunk_range(index, LEN)];
    if shared {
        let segment = Arc::new(Segment::private(chunk.len() * 4));
        // SAFETY: nobody else has the segment.
        unsafe { segment.floats_mut(0..chunk.len()) }.copy_from_slice(chunk);
        return Data::Shared(Part::new(&segment, 0, chunk.len() * 4).unwrap());
    }
    let data: Bytes = match payload {
        Payload::F32 => encode(chunk),
        Payload::Bf16 => to_bf16(chunk).into(),
    };
    let check = checksum(&data);
    Data::Wire { data, check }
}

fn aggregator(lanes: u32, payload: Payload) -> Aggregator {
    let shape = Shape {
        lanes,
        len: LEN,
        payload,
    };
    Aggregator::with_root(shape, Box::new(|bytes| Arc::new(Segment::private(bytes))))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whoever computes which lanes, and however they come, the root is the same.
    #[test]
    fn the_root_depends_on_the_lanes_alone(
        lanes in 1u32..7,
        bf16: bool,
        ranges in prop::collection::vec((0u32..7, 0u32..7, any::<bool>()), 0..6),
    ) {
        let payload = if bf16 { Payload::Bf16 } else { Payload::F32 };
        let tree = Tree::new(lanes);
        let sums = aggregator(lanes, payload);
        // Some work, then all of it.
        let all = (0..lanes).map(|lane| (lane, lane + 1, lane % 2 == 0));
        let mut delivered = Vec::new();
        let mut complete = 0;
        for (a, b, shared) in ranges.into_iter().chain(all) {
            for node in tree.cover(a.min(b).min(lanes)..a.max(b).min(lanes)) {
                let sum = node_sum(payload, node);
                for index in (0..sums.chunks()).rev() {
                    let data = data(payload, &sum, index, shared);
                    let offered = sums.offer(node, index, data, SessionId(1)).unwrap();
                    delivered.extend(offered.delivered);
                    complete += usize::from(offered.all_complete);
                }
            }
        }
        delivered.sort_unstable();
        prop_assert_eq!(delivered, (0..lanes).collect::<Vec<_>>());
        prop_assert_eq!(complete, 1);
        let root = node_sum(payload, tree.root());
        prop_assert_eq!(sums.totals(), Some(totals_of(&root)));
        let found: Vec<f32> = (0..sums.chunks())
            .flat_map(|index| {
                let chunk = sums.root(index).unwrap();
                assert_eq!(chunk.check, checksum(&chunk.data));
                if bf16 { from_bf16(&chunk.data) } else { floats_of(&chunk.data) }
            })
            .collect();
        prop_assert_eq!(found, root);
    }
}

/// Two workers, and what they say of lane 0 of 2, in every mixture of ways.
#[test]
fn copies_are_compared_whatever_way_they_take() {
    for payload in [Payload::F32, Payload::Bf16] {
        for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
            let sums = aggregator(2, payload);
            let right = node_sum(payload, Node::leaf(0));
            let mut wrong = right.clone();
            wrong[7] = 1e4;
            let push = |node, sum: &[f32], shared, from| {
                sums.offer(node, 0, data(payload, sum, 0, shared), SessionId(from))
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
            push(Node::leaf(1), &node_sum(payload, Node::leaf(1)), first, 1).unwrap();
            assert_eq!(push(Node::leaf(0), &wrong, second, 2), Err(mismatch));
        }
    }
}

#[test]
fn what_was_shared_says_nothing_once_the_step_is_complete() {
    let sums = aggregator(1, Payload::F32);
    let root = node_sum(Payload::F32, Node::leaf(0));
    for index in 0..2 {
        let data = data(Payload::F32, &root, index, false);
        sums.offer(Node::leaf(0), index, data, SessionId(1))
            .unwrap();
    }
    let overwritten = vec![0.0; LEN];
    let late = data(Payload::F32, &overwritten, 0, true);
    let offered = sums.offer(Node::leaf(0), 0, late, SessionId(2));
    assert_eq!(offered, Ok(Offered::default()));
    let late = data(Payload::F32, &overwritten, 0, false);
    assert!(sums.offer(Node::leaf(0), 0, late, SessionId(2)).is_err());
}
