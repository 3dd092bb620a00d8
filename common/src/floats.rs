//! The loops over gradients: sums, squares, rounding, bytes. Each gives the same bits on every processor; where wider
//! instructions are there, they are found at run time and used.

mod blocks;

use bytemuck::{cast_slice, cast_slice_mut};

#[cfg(target_endian = "big")]
compile_error!("gradients are little-endian on the wire and are sent as they lie in memory");

/// Partial sums of squares. They decide bits: it is a part of what a gradient norm is.
const PARTS: usize = 16;

/// Compiles a loop three times, for what processors can do, and takes the widest that this one can. No loop here
/// contracts or reorders, so all three give the same bits.
macro_rules! widest {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? $body:block) => {
        $(#[$doc])*
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    plain($($argument),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    plain($($argument),*)
                }

                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has these instructions.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has these instructions.
                    return unsafe { avx2($($argument),*) };
                }
            }
            plain($($argument),*)
        }
    };
}
pub(crate) use widest;

pub use blocks::{
    BLOCK, block_len, from_int4, from_int8, round_to_int4, round_to_int8, to_int4, to_int8,
};

widest! {
    /// `sum += other`, element by element.
    ///
    /// # Panics
    /// If they differ in length.
    pub fn add(sum: &mut [f32], other: &[f32]) {
        assert_eq!(sum.len(), other.len());
        for (a, b) in sum.iter_mut().zip(other) {
            *a += b;
        }
    }
}

widest! {
    /// `out = a + b`, where `a` and `b` are bytes of f32, wherever they begin.
    ///
    /// # Panics
    /// If they differ in length.
    pub fn add_bytes(out: &mut [f32], a: &[u8], b: &[u8]) {
        assert!(a.len() == out.len() * 4 && b.len() == a.len());
        for ((out, a), b) in out.iter_mut().zip(a.as_chunks().0).zip(b.as_chunks().0) {
            *out = f32::from_le_bytes(*a) + f32::from_le_bytes(*b);
        }
    }
}

/// The weight of a place in a [`stamp`]: odd, so that no single difference is lost.
#[inline(always)]
fn weight(place: usize) -> u64 {
    u64::from((place as u32).wrapping_mul(0x9e37_79b1) | 1)
}

widest! {
    /// What tells a copy of these bytes of f32 from something else: Σ bits · weight of the place, modulo 2⁶⁴, with places
    /// from `from` on. Stamps of parts add up to that of the whole. A single element that differs always shows.
    pub fn stamp(values: &[u8], from: usize) -> u64 {
        let values = values.as_chunks().0.iter().enumerate();
        values.fold(0, |sum: u64, (i, x)| {
            sum.wrapping_add(u64::from(u32::from_le_bytes(*x)) * weight(from + i))
        })
    }
}

widest! {
    /// [`add_bytes`], and the stamps of both, which cost little where the sum waits for memory.
    ///
    /// # Panics
    /// If they differ in length.
    pub fn add_stamped(out: &mut [f32], a: &[u8], b: &[u8], from: usize) -> (u64, u64) {
        assert!(a.len() == out.len() * 4 && b.len() == a.len());
        let (mut of_a, mut of_b) = (0u64, 0u64);
        let both = a.as_chunks().0.iter().zip(b.as_chunks().0);
        for (i, (out, (a, b))) in out.iter_mut().zip(both).enumerate() {
            *out = f32::from_le_bytes(*a) + f32::from_le_bytes(*b);
            let weight = weight(from + i);
            of_a = of_a.wrapping_add(u64::from(u32::from_le_bytes(*a)) * weight);
            of_b = of_b.wrapping_add(u64::from(u32::from_le_bytes(*b)) * weight);
        }
        (of_a, of_b)
    }
}

widest! {
    /// Whether no element is infinite or NaN.
    pub fn are_finite(values: &[f32]) -> bool {
        // The bits of what is infinite or NaN are the largest, but for the sign.
        let largest = values.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
        largest < f32::INFINITY.to_bits()
    }
}

widest! {
    /// Σ x² in f64: 16 partial sums over the elements with the same remainder of their index, then those in order.
    pub fn sum_of_squares(values: &[f32]) -> f64 {
        let mut parts = [0.0f64; PARTS];
        let (blocks, rest) = values.as_chunks::<PARTS>();
        for block in blocks {
            for (part, &x) in parts.iter_mut().zip(block) {
                *part += f64::from(x) * f64::from(x);
            }
        }
        for (part, &x) in parts.iter_mut().zip(rest) {
            *part += f64::from(x) * f64::from(x);
        }
        parts.iter().sum()
    }
}

/// Copies bytes of f32, wherever they begin, past the caches: for what is read next by another process, or long after. The caches
/// would fetch the memory that is overwritten, and hold it in the place of what is needed sooner.
///
/// # Panics
/// If they differ in length.
pub fn copy_out(out: &mut [f32], bytes: &[u8]) {
    assert_eq!(out.len() * 4, bytes.len());
    #[cfg(target_arch = "x86_64")]
    if out.as_ptr().addr().is_multiple_of(16) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_sfence, _mm_stream_ps};
        let (blocks, rest) = out.as_chunks_mut::<4>();
        let (from, from_rest) = bytes.as_chunks::<16>();
        for (block, from) in blocks.iter_mut().zip(from) {
            // SAFETY: both are 16 bytes, and blocks of so many are aligned as the first is.
            unsafe { _mm_stream_ps(block.as_mut_ptr(), _mm_loadu_ps(from.as_ptr().cast())) };
        }
        cast_slice_mut(rest).copy_from_slice(from_rest);
        // SAFETY: every processor of this architecture has it. What is said after it comes after what was written.
        unsafe { _mm_sfence() };
        return;
    }
    cast_slice_mut(out).copy_from_slice(bytes);
}

/// The nearest bf16, ties to even; what is not a number stays so.
#[inline(always)]
fn nearest(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    match x.is_nan() {
        true => (bits >> 16) as u16 | 0x40,
        false => rounded,
    }
}

widest! {
    /// Rounds each element to the nearest bf16, ties to even.
    pub fn round_to_bf16(values: &mut [f32]) {
        for value in values {
            *value = f32::from_bits(u32::from(nearest(*value)) << 16);
        }
    }
}

widest! {
    /// Bytes of bf16 as f32; a rest of one byte is left out.
    pub fn from_bf16(data: &[u8]) -> Vec<f32> {
        let widen = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        data.as_chunks().0.iter().map(widen).collect()
    }
}

widest! {
    /// Values as bytes of bf16. Those that are no bf16 are rounded.
    pub fn to_bf16(values: &[f32]) -> Vec<u8> {
        let narrow: Vec<u16> = values.iter().map(|&x| nearest(x)).collect();
        cast_slice(&narrow).to_vec()
    }
}

/// f32 values as they lie in memory, which is little-endian.
pub fn bytes_of(values: &[f32]) -> &[u8] {
    cast_slice(values)
}

/// Bytes of f32 as values; a rest of less than four bytes is left out.
pub fn floats_of(data: &[u8]) -> Vec<f32> {
    data.as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    proptest! {
        #[test]
        fn bf16_is_rounded_as_the_half_crate_does(bits: u32) {
            let x = f32::from_bits(bits);
            let mut rounded = [x];
            round_to_bf16(&mut rounded);
            let expected = bf16::from_f32(x);
            prop_assert_eq!(rounded[0].to_bits(), u32::from(expected.to_bits()) << 16);
            prop_assert_eq!(to_bf16(&rounded), expected.to_bits().to_le_bytes());
            prop_assert_eq!(from_bf16(&to_bf16(&rounded))[0].to_bits(), rounded[0].to_bits());
        }

        #[test]
        fn bytes_are_added_wherever_they_begin(
            pairs in prop::collection::vec((-1e3f32..1e3, -1e3f32..1e3), 0..70),
            (a, b) in (0usize..4, 0usize..4),
        ) {
            let (left, right): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let shifted = |by: usize, values: &[f32]| {
                let mut bytes = vec![0; by];
                bytes.extend_from_slice(bytes_of(values));
                bytes
            };
            let mut sum = left.clone();
            add(&mut sum, &right);
            let mut out = vec![0.0; sum.len()];
            add_bytes(&mut out, &shifted(a, &left)[a..], &shifted(b, &right)[b..]);
            prop_assert_eq!(&out, &sum);
            prop_assert_eq!(floats_of(bytes_of(&sum)), sum.clone());
            let (a, b) = (shifted(a, &left)[a..].to_vec(), shifted(b, &right)[b..].to_vec());
            let mut again = vec![0.0; sum.len()];
            prop_assert_eq!(add_stamped(&mut again, &a, &b, 9), (stamp(&a, 9), stamp(&b, 9)));
            prop_assert_eq!(again, sum);
        }

        #[test]
        fn stamps_add_up_and_a_changed_element_shows(
            values in prop::collection::vec(any::<u32>(), 1..200),
            (cut, place, bits) in (any::<Index>(), any::<Index>(), 1u32..),
        ) {
            let bytes = |values: &[u32]| -> Vec<u8> { cast_slice(values).to_vec() };
            let (left, right) = values.split_at(cut.index(values.len()));
            let whole = stamp(&bytes(&values), 0);
            prop_assert_eq!(stamp(&bytes(left), 0).wrapping_add(stamp(&bytes(right), left.len())), whole);
            let mut changed = values.clone();
            changed[place.index(values.len())] ^= bits;
            prop_assert_ne!(stamp(&bytes(&changed), 0), whole);
            let mut turned = values.clone();
            turned.reverse();
            prop_assert_eq!(stamp(&bytes(&turned), 0) == whole, turned == values);
        }

        #[test]
        fn squares_are_summed_in_sixteen_parts(values in prop::collection::vec(-1e3f32..1e3, 0..100)) {
            let mut parts = [0.0f64; 16];
            for (i, &x) in values.iter().enumerate() {
                parts[i % 16] += f64::from(x) * f64::from(x);
            }
            let expected = parts.into_iter().fold(0.0, |sum, part| sum + part);
            prop_assert_eq!(sum_of_squares(&values).to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn one_element_that_is_not_finite_is_enough() {
        let mut values = vec![f32::MAX; 100];
        values[40] = f32::MIN;
        assert!(are_finite(&values) && are_finite(&[]));
        for bad in [
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            -f32::NAN,
            f32::from_bits(0x7f80_0001),
        ] {
            for at in [0, 63, 99] {
                let mut values = values.clone();
                values[at] = bad;
                assert!(!are_finite(&values), "{bad} at {at}");
            }
        }
    }

    #[test]
    fn a_copy_is_one_wherever_it_begins() {
        let values: Vec<f32> = (0..103).map(|i| i as f32).collect();
        for begin in 0..5 {
            let mut bytes = vec![0; begin];
            bytes.extend_from_slice(bytes_of(&values));
            let mut out = vec![-1.0; 110];
            copy_out(&mut out[begin..begin + 103], &bytes[begin..]);
            assert_eq!(out[begin..begin + 103], values);
            assert!(out[begin + 103..].iter().all(|x| *x == -1.0));
        }
    }

    #[test]
    fn ties_go_to_the_even_neighbour() {
        let one_up = f32::from_bits(0x3f81_0000);
        let mut values = [
            f32::from_bits(0x3f80_8000),
            f32::from_bits(0x3f81_8000),
            f32::from_bits(0x3f80_8001),
            f32::MAX,
            f32::NAN,
        ];
        round_to_bf16(&mut values);
        assert_eq!(values[0], 1.0);
        assert_eq!(values[1], f32::from_bits(0x3f82_0000));
        assert_eq!(values[2], one_up);
        assert_eq!(values[3], f32::INFINITY);
        assert!(values[4].is_nan());
    }
}
