//! The state hash: BLAKE3 over the digests of the layout's chunks, each over the little-endian bytes of that chunk of
//! the parameters, of the first and of the second moment. Chunks are hashed in parallel.

use cohort_common::layout::{chunk_count, chunk_range};
use rayon::prelude::*;

/// The hash of flat buffers of one length, in their order.
pub fn state_hash(buffers: &[&[f32]]) -> [u8; 32] {
    let len = buffers[0].len();
    assert!(
        buffers.iter().all(|buffer| buffer.len() == len),
        "buffers of one length"
    );
    let digests: Vec<[u8; 32]> = (0..chunk_count(len))
        .into_par_iter()
        .map(|chunk| {
            let mut hasher = blake3::Hasher::new();
            for buffer in buffers {
                update(&mut hasher, &buffer[chunk_range(chunk, len)]);
            }
            hasher.finalize().into()
        })
        .collect();
    *blake3::hash(digests.as_flattened()).as_bytes()
}

fn update(hasher: &mut blake3::Hasher, values: &[f32]) {
    let mut bytes = [[0u8; 4]; 4096];
    for values in values.chunks(bytes.len()) {
        for (bytes, value) in bytes.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
        hasher.update(bytes[..values.len()].as_flattened());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cohort_common::layout::CHUNK_LEN;

    #[test]
    fn every_bit_of_every_buffer_counts() {
        let len = 2 * CHUNK_LEN + 5;
        let (a, b) = (vec![1.0; len], vec![2.0; len]);
        let base = state_hash(&[&a, &b]);
        assert_eq!(base, state_hash(&[&a.clone(), &b.clone()]));
        for at in [0, CHUNK_LEN - 1, CHUNK_LEN, len - 1] {
            let mut changed = b.clone();
            changed[at] = f32::from_bits(changed[at].to_bits() ^ 1);
            assert_ne!(base, state_hash(&[&a, &changed]));
        }
        assert_ne!(base, state_hash(&[&b, &a]));
    }
}
