//! The state hash: one BLAKE3 over digests of fixed chunks of parameters and both moments, so that it can be made
//! inside the optimizer's pass, by many threads, or from a stream, and is the same each time. **Pure.**
//!
//! `digest_c = blake3(params[c] ‖ exp_avg[c] ‖ exp_avg_sq[c])` for each chunk `c` of the layout, all f32 little-endian;
//! `state_hash = blake3(digest_0 ‖ digest_1 ‖ …)`.

use rayon::prelude::*;

use crate::layout::{CHUNK_LEN, chunk_count, chunk_range};

#[cfg(target_endian = "big")]
compile_error!("state hash and checkpoints are little-endian and read memory as it is");

/// Bytes of one f32.
pub(super) const F32: u64 = 4;

/// The bytes of `values`: f32, little-endian.
pub fn bytes_of(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

/// Digest of one chunk. The three slices are the same elements of the three buffers.
///
/// # Panics
/// If the slices differ in length.
pub fn chunk_digest(params: &[f32], exp_avg: &[f32], exp_avg_sq: &[f32]) -> [u8; 32] {
    assert_eq!(params.len(), exp_avg.len());
    assert_eq!(params.len(), exp_avg_sq.len());
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes_of(params));
    hasher.update(bytes_of(exp_avg));
    hasher.update(bytes_of(exp_avg_sq));
    hasher.finalize().into()
}

/// One hash over the digests of all chunks, in chunk order.
pub fn combine_digests<'a>(digests: impl IntoIterator<Item = &'a [u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for digest in digests {
        hasher.update(digest);
    }
    hasher.finalize().into()
}

/// The hash of a whole state, by all threads of the current rayon pool.
///
/// # Panics
/// If the slices differ in length.
pub fn state_hash(params: &[f32], exp_avg: &[f32], exp_avg_sq: &[f32]) -> [u8; 32] {
    assert_eq!(params.len(), exp_avg.len());
    assert_eq!(params.len(), exp_avg_sq.len());
    let digests: Vec<[u8; 32]> = (0..chunk_count(params.len()))
        .into_par_iter()
        .map(|c| {
            let range = chunk_range(c, params.len());
            chunk_digest(
                &params[range.clone()],
                &exp_avg[range.clone()],
                &exp_avg_sq[range],
            )
        })
        .collect();
    combine_digests(&digests)
}

/// Makes the state hash from a stream: all parameters, then all first moments, then all second moments.
///
/// Keeps one hasher of about 2 KB per chunk, that is under 1 % of the state.
pub struct StateHasher {
    chunks: Vec<blake3::Hasher>,
    /// Bytes of one of the three buffers.
    buffer_bytes: u64,
    /// Bytes seen so far, over the three buffers.
    position: u64,
}

impl StateHasher {
    /// A hasher for three buffers of `len` elements each.
    pub fn new(len: usize) -> Self {
        Self {
            chunks: vec![blake3::Hasher::new(); chunk_count(len)],
            buffer_bytes: len as u64 * F32,
            position: 0,
        }
    }

    /// Takes the next bytes of the stream, cut anywhere.
    ///
    /// # Panics
    /// If the stream is longer than three buffers.
    pub fn update(&mut self, mut bytes: &[u8]) {
        const CHUNK_BYTES: u64 = CHUNK_LEN as u64 * F32;
        assert!(self.position + bytes.len() as u64 <= 3 * self.buffer_bytes);
        while !bytes.is_empty() {
            let within = self.position % self.buffer_bytes;
            let end = ((within / CHUNK_BYTES + 1) * CHUNK_BYTES).min(self.buffer_bytes);
            let take = bytes.len().min((end - within) as usize);
            self.chunks[(within / CHUNK_BYTES) as usize].update(&bytes[..take]);
            self.position += take as u64;
            bytes = &bytes[take..];
        }
    }

    /// The state hash.
    ///
    /// # Panics
    /// If the stream is not complete.
    pub fn finish(self) -> [u8; 32] {
        assert_eq!(self.position, 3 * self.buffer_bytes);
        let digests: Vec<[u8; 32]> = self.chunks.iter().map(|c| c.finalize().into()).collect();
        combine_digests(&digests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_cut_anywhere_gives_the_hash_of_the_whole() {
        let len = 2 * CHUNK_LEN + 17;
        let buffer = |k: u32| -> Vec<f32> { (0..len).map(|i| (i as u32 * k) as f32).collect() };
        let (p, m, v) = (buffer(1), buffer(3), buffer(7));
        let whole = state_hash(&p, &m, &v);
        for cut in [1_000_003, 262_144, 5 * 262_144 + 1] {
            let mut hasher = StateHasher::new(len);
            let stream: Vec<u8> = [&p, &m, &v]
                .into_iter()
                .flat_map(|b| bytes_of(b).to_vec())
                .collect();
            stream.chunks(cut).for_each(|piece| hasher.update(piece));
            assert_eq!(hasher.finish(), whole, "cut {cut}");
        }
    }

    #[test]
    fn the_definition_is_spelled_out() {
        let digest: [u8; 32] = blake3::hash(
            &[1.0f32, 2.0, 3.0]
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect::<Vec<_>>(),
        )
        .into();
        let expected: [u8; 32] = blake3::hash(&digest).into();
        assert_eq!(state_hash(&[1.0], &[2.0], &[3.0]), expected);
    }
}
