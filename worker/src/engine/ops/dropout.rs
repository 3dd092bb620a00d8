//! Dropout whose mask is a pure function of (seed, step, lane, micro-batch, site, element): any worker, forward or
//! backward, draws the same mask, and none is stored. An element is kept, and divided by 1 - p, with probability 1 - p.

use cohort_common::rng::{derive_key, philox};
use rayon::prelude::*;

use super::simd::{self, simd_fn};
use crate::engine::Site;

/// Elements in one task.
const BLOCK: usize = 16 * 1024;
/// Counters drawn at a time: one vector's worth.
const WIDE: usize = 16;

/// The mask of one place in the model.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    key: u64,
    threshold: u32,
    keep: f32,
}

impl Mask {
    /// The mask of `place` with probability `p`; `None` where nothing is dropped.
    pub fn new(site: Site, place: usize, p: f32) -> Option<Self> {
        (p > 0.0).then(|| {
            let Site {
                seed,
                step,
                lane,
                micro_batch,
            } = site;
            Self {
                key: derive_key(
                    seed,
                    &format!("dropout/{step}/{lane}/{micro_batch}/{place}"),
                ),
                threshold: (f64::from(p) * 4_294_967_296.0) as u32,
                keep: 1.0 / (1.0 - p),
            }
        })
    }

    /// Writes the factors (0 or 1/(1-p)) of elements `start..start + out.len()`; `start` is a multiple of four.
    pub fn factors(&self, start: u64, out: &mut [f32]) {
        assert_eq!(start % 4, 0, "a mask starts at a multiple of four");
        factors(self.key, self.threshold, self.keep, start / 4, out);
    }

    /// Multiplies `data`, whose first element is element `start` of the mask, by the factors.
    pub fn apply(&self, data: &mut [f32], start: u64) {
        data.par_chunks_mut(BLOCK)
            .enumerate()
            .for_each(|(index, data)| {
                let mut factors = [0.0; 1024 + 4];
                for (i, data) in data.chunks_mut(1024).enumerate() {
                    let at = start + (index * BLOCK + i * 1024) as u64;
                    let skipped = (at % 4) as usize;
                    let factors = &mut factors[..skipped + data.len()];
                    self.factors(at - at % 4, factors);
                    simd::multiply(data, &factors[skipped..]);
                }
            });
    }
}

/// The masks of consecutive samples of several lanes.
#[derive(Clone, Copy)]
pub struct Masks<'a> {
    /// One for each lane.
    pub lanes: &'a [Mask],
    /// Samples of a lane.
    pub samples: usize,
    /// The first sample, counted from the first lane's first.
    pub first: usize,
}

impl Masks<'_> {
    /// The mask of a sample's lane, and the sample's place in the lane.
    pub fn of(&self, sample: usize) -> (Mask, usize) {
        let sample = self.first + sample;
        (self.lanes[sample / self.samples], sample % self.samples)
    }

    /// Multiplies samples of `size` elements each by their factors.
    pub fn apply(&self, data: &mut [f32], size: usize) {
        data.par_chunks_mut(size)
            .enumerate()
            .for_each(|(sample, data)| {
                let (mask, place) = self.of(sample);
                mask.apply(data, (place * size) as u64);
            });
    }
}

simd_fn! {
    fn factors(key: u64, threshold: u32, keep: f32, counter: u64, out: &mut [f32]) {
        for (block, out) in out.chunks_mut(4 * WIDE).enumerate() {
            let words = philox_wide(key, counter + (block * WIDE) as u64);
            for (i, x) in out.iter_mut().enumerate() {
                *x = if words[i % 4][i / 4] >= threshold { keep } else { 0.0 };
            }
        }
    }
}

/// `philox(key, [counter + i, 0, 0])` for i in `0..WIDE`, word by word.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // one index walks four arrays
fn philox_wide(key: u64, counter: u64) -> [[u32; WIDE]; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    let mut c = [[0u32; WIDE]; 4];
    for i in 0..WIDE {
        let counter = counter + i as u64;
        (c[0][i], c[1][i]) = (counter as u32, (counter >> 32) as u32);
    }
    for _ in 0..10 {
        for i in 0..WIDE {
            let p0 = MULTIPLIERS[0] * u64::from(c[0][i]);
            let p1 = MULTIPLIERS[1] * u64::from(c[2][i]);
            c[0][i] = (p1 >> 32) as u32 ^ c[1][i] ^ k0;
            c[1][i] = p1 as u32;
            c[2][i] = (p0 >> 32) as u32 ^ c[3][i] ^ k1;
            c[3][i] = p0 as u32;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    debug_assert_eq!(
        [c[0][1], c[1][1], c[2][1], c[3][1]],
        philox(
            key,
            [(counter + 1) as u32, ((counter + 1) >> 32) as u32, 0, 0]
        )
    );
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITE: Site = Site {
        seed: 1,
        step: 2,
        lane: 3,
        micro_batch: 4,
    };

    #[test]
    #[allow(clippy::needless_range_loop)] // as above
    fn the_wide_generator_is_philox() {
        let key = 0x0123_4567_89ab_cdef;
        let words = philox_wide(key, u64::from(u32::MAX) - 3);
        for i in 0..WIDE {
            let counter = u64::from(u32::MAX) - 3 + i as u64;
            let expected = philox(key, [counter as u32, (counter >> 32) as u32, 0, 0]);
            assert_eq!(
                [words[0][i], words[1][i], words[2][i], words[3][i]],
                expected
            );
        }
    }

    #[test]
    fn a_mask_keeps_its_share_and_does_not_depend_on_how_it_is_cut() {
        let mask = Mask::new(SITE, 0, 0.25).expect("a mask");
        let mut whole = vec![1.0; 40_000];
        mask.apply(&mut whole, 0);
        let mut part = vec![0.0; 101];
        mask.factors(20_000, &mut part);
        assert_eq!(whole[20_000..20_101], part);
        let mut odd = vec![1.0; 3_001];
        mask.apply(&mut odd, 20_003);
        assert_eq!(whole[20_003..23_004], odd);
        let kept = whole.iter().filter(|&&x| x != 0.0).count() as f64 / 40_000.0;
        assert!((kept - 0.75).abs() < 0.01, "{kept}");
        assert!(
            whole
                .iter()
                .all(|&x| x == 0.0 || (x - 4.0 / 3.0).abs() < 1e-6)
        );
    }

    #[test]
    fn every_part_of_the_site_changes_the_mask() {
        let draw = |site, place| {
            let mut row = vec![1.0; 256];
            Mask::new(site, place, 0.5)
                .expect("a mask")
                .apply(&mut row, 0);
            row
        };
        let base = draw(SITE, 0);
        assert_eq!(base, draw(SITE, 0));
        assert_ne!(base, draw(SITE, 1));
        assert_ne!(base, draw(Site { seed: 9, ..SITE }, 0));
        assert_ne!(base, draw(Site { step: 9, ..SITE }, 0));
        assert_ne!(base, draw(Site { lane: 9, ..SITE }, 0));
        assert_ne!(
            base,
            draw(
                Site {
                    micro_batch: 9,
                    ..SITE
                },
                0
            )
        );
        assert!(Mask::new(SITE, 0, 0.0).is_none());
    }
}
