//! Encodings keep every bit, and contradictions are named.

use super::*;
use proptest::prelude::*;

prop_compose! {
    fn any_entry()(
        step: u64, first_position: u64, samples: u64, skipped: bool,
        bits in prop::array::uniform4(any::<u64>()),
        root_hash: [u8; 32], state_hash_before: Option<[u8; 32]>, previous: [u8; 32],
        lanes in prop::collection::vec(prop::array::uniform2(any::<u64>()), 0..5),
    ) -> Entry {
        let lanes = lanes.into_iter().map(|l| {
            let [loss, weight] = l.map(f64::from_bits);
            LaneSums { loss, weight }
        }).collect();
        let [loss_sum, weight, grad_norm, learning_rate] = bits.map(f64::from_bits);
        Entry {
            step, first_position, samples, lanes, loss_sum, weight, grad_norm, learning_rate,
            root_hash, state_hash_before, skipped, previous,
        }
    }
}

fn entry(step: u64, previous: [u8; 32]) -> Entry {
    Entry {
        step,
        first_position: (step - 1) * 16,
        samples: 16,
        lanes: vec![LaneSums {
            loss: 123.456,
            weight: 1024.0,
        }],
        loss_sum: 123.456,
        weight: 1024.0,
        grad_norm: 0.1 + 0.2,
        learning_rate: 1e-3,
        root_hash: [step as u8; 32],
        state_hash_before: None,
        skipped: false,
        previous,
    }
}

fn chain(entries: &[Entry]) -> Result<Chain, ChainError> {
    let mut chain = Chain::new(1, 0, genesis(b"run"));
    for entry in entries {
        chain.push(entry)?;
    }
    Ok(chain)
}

fn three() -> Vec<Entry> {
    let one = entry(1, genesis(b"run"));
    let two = entry(2, one.hash());
    let three = entry(3, two.hash());
    vec![one, two, three]
}

proptest! {
    #[test]
    fn encoding_and_json_keep_every_bit(entry in any_entry()) {
        let bytes = entry.encode();
        prop_assert_eq!(Entry::decode(&bytes).unwrap().encode(), bytes.clone());
        prop_assert_eq!(Entry::from_json_line(&entry.to_json_line()).unwrap().encode(), bytes);
    }

    #[test]
    fn any_other_bytes_are_another_entry_or_none(entry in any_entry(), at in any::<prop::sample::Index>(), to: u8) {
        let mut bytes = entry.encode();
        let at = at.index(bytes.len());
        prop_assume!(bytes[at] != to);
        bytes[at] = to;
        if let Some(other) = Entry::decode(&bytes) {
            prop_assert_ne!(other.hash(), entry.hash());
            prop_assert!(entry.difference(&other).is_some());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Entry::decode(&bytes);
    }
}

#[test]
fn an_unbroken_chain_is_accepted() {
    let chain = chain(&three()).unwrap();
    assert_eq!((chain.next_step(), chain.next_position()), (4, 48));
    assert_eq!(chain.head(), three()[2].hash());
}

#[test]
fn contradictions_are_named() {
    let [one, two, three]: [Entry; 3] = three().try_into().unwrap();
    assert_eq!(
        chain(&[one.clone(), three.clone()]),
        Err(ChainError::Gap {
            expected: 2,
            found: 3
        })
    );
    assert_eq!(
        chain(&[one.clone(), one.clone()]),
        Err(ChainError::Duplicate { step: 1 })
    );
    let mut forged = two.clone();
    forged.loss_sum += 1.0;
    assert!(matches!(
        chain(&[one.clone(), forged, three]),
        Err(ChainError::BrokenLink { step: 3, .. })
    ));
    let mut skipping = two;
    skipping.first_position += 1;
    assert!(matches!(
        chain(&[one, skipping]),
        Err(ChainError::Position {
            step: 2,
            expected: 16,
            found: 17
        })
    ));
}

#[test]
fn a_difference_names_the_field_and_both_values() {
    let ours = entry(1, [0; 32]);
    let mut theirs = ours.clone();
    theirs.grad_norm = 0.3;
    let difference = ours.difference(&theirs).unwrap();
    assert_eq!(difference.field, "grad_norm");
    assert_eq!(
        difference.ours,
        "0.30000000000000004 (bits 3fd3333333333334)"
    );
    assert_eq!(difference.theirs, "0.3 (bits 3fd3333333333333)");
    assert_eq!(ours.difference(&ours), None);
}

#[test]
fn entries_without_a_flag_keep_their_line_and_their_hash() {
    let entry = entry(1, genesis(b"run"));
    let line = entry.to_json_line();
    assert!(!line.contains("skipped"), "{line}");
    assert_eq!(Entry::from_json_line(&line).unwrap(), entry);
    assert_eq!(entry.encode()[88], 0);
    let skipped = Entry {
        skipped: true,
        ..entry.clone()
    };
    assert_ne!(skipped.hash(), entry.hash());
    assert!(skipped.to_json_line().contains("\"skipped\":true"));
    assert_eq!(skipped.difference(&entry).unwrap().field, "skipped");
    let mut bytes = entry.encode();
    bytes[88] = 4;
    assert_eq!(Entry::decode(&bytes), None, "no flag that nobody knows");
}

#[test]
fn what_is_not_finite_has_one_encoding() {
    let of = |loss: f64, grad_norm: f64| {
        let mut entry = entry(1, [0; 32]);
        entry.lanes[0].loss = loss;
        entry.loss_sum = loss;
        entry.grad_norm = grad_norm;
        entry.canonical()
    };
    let finite = entry(1, [0; 32]);
    assert_eq!(finite.clone().canonical().encode(), finite.encode());
    let one = of(f64::NAN, f64::INFINITY);
    assert!(!one.is_finite());
    assert_eq!(one.root_hash, [0; 32]);
    assert_eq!(one.encode(), of(f64::NEG_INFINITY, -f64::NAN).encode());
    let json = Entry::from_json_line(&one.to_json_line()).unwrap();
    assert_eq!(json.encode(), one.encode());
}
