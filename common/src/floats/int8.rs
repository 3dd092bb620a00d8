//! Eight bits for an element: blocks of [`BLOCK`] elements share a scale, a power of two.
//!
//! A block's scale is the smallest 2ᵉ with |x| ≤ 127 · 2ᵉ for all of its elements, and an element becomes a whole number
//! of scales by stochastic rounding: ⌊x / 2ᵉ + u⌋ · 2ᵉ with a random 0 < u < 1, whose expectation is x (Gupta et al.,
//! "Deep learning with limited numerical precision", ICML 2015). As scales are powers of two, what was rounded stays as
//! it is when it is rounded or encoded again, whatever scale its block has then: nothing is lost on the way.
//!
//! u is a function of a key and the element's place in the whole gradient: 16 bits of SplitMix64 (Steele, Lea and Flood,
//! "Fast splittable pseudorandom number generators", OOPSLA 2014), of which a word serves four elements.

use super::widest;

/// Elements with a scale in common.
pub const BLOCK: usize = 64;

/// The largest whole number.
const MOST: u32 = 127;

/// Exponents that occur: below, scales would not be normal numbers.
const LEAST: i32 = -126;

/// Stands for the exponent of a block with something that is not finite, or above 127 · 2¹²¹, where what is rounded up could
/// be infinite. All of it becomes NaN.
const NOT_FINITE: i8 = i8::MIN;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes of so many elements.
pub fn int8_len(elements: usize) -> usize {
    elements + elements.div_ceil(BLOCK)
}

#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// 2ᵉ for an exponent of a normal number.
#[inline(always)]
fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The exponent of a block's scale; `None` if something in it is not finite, or above 127 · 2¹²¹.
#[inline(always)]
fn exponent(block: &[f32]) -> Option<i32> {
    const SIGN: u32 = 1 << 31;
    const MANTISSA: u32 = (1 << 23) - 1;
    // The mantissa of 127.
    const FULL: u32 = MOST << 17 & MANTISSA;
    const HIGHEST: u32 = 254 << 23 | FULL;
    let largest = block
        .iter()
        .fold(0, |most, x| most.max(x.to_bits() & !SIGN));
    let exponent = (largest >> 23) as i32 - 127;
    let over = i32::from(largest & MANTISSA > FULL);
    (largest <= HIGHEST).then_some((exponent - 6 + over).max(LEAST))
}

#[inline(always)]
fn round_block(block: &mut [f32], key: u64, place: usize) {
    let Some(exponent) = exponent(block) else {
        return block.fill(f32::NAN);
    };
    let (scale, inverse) = (power(exponent), power(-exponent));
    let first = (place / 4) as u64;
    for (word, four) in (first..).zip(block.chunks_mut(4)) {
        let random = mix(key.wrapping_add(word.wrapping_mul(GAMMA)));
        for (i, x) in four.iter_mut().enumerate() {
            let u = (f32::from((random >> (16 * i)) as u16) + 0.5) * (1.0 / 65536.0);
            *x = (*x * inverse + u).floor() * scale;
        }
    }
}

widest! {
    /// Rounds elements, of which the first has this place in the gradient.
    ///
    /// # Panics
    /// If no block begins at that place.
    pub fn round_to_int8(values: &mut [f32], key: u64, place: usize) {
        assert!(place.is_multiple_of(BLOCK), "a block begins at {place}");
        let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
        for (number, block) in blocks.iter_mut().enumerate() {
            round_block(block, key, place + number * BLOCK);
        }
        if !rest.is_empty() {
            round_block(rest, key, place + blocks.len() * BLOCK);
        }
    }
}

widest! {
    /// Rounded values as they travel: an exponent for each block, then a whole number for each element, all in a byte.
    pub fn to_int8(values: &[f32]) -> Vec<u8> {
        let mut out = vec![0; int8_len(values.len())];
        let (exponents, numbers) = out.split_at_mut(values.len().div_ceil(BLOCK));
        let blocks = values.chunks(BLOCK).zip(numbers.chunks_mut(BLOCK));
        for ((block, numbers), byte) in blocks.zip(exponents) {
            let exponent = exponent(block);
            *byte = exponent.map_or(NOT_FINITE, |e| e as i8) as u8;
            let inverse = power(-exponent.unwrap_or(0));
            for (number, x) in numbers.iter_mut().zip(block) {
                *number = (x * inverse) as i8 as u8;
            }
        }
        out
    }
}

widest! {
    /// What [`to_int8`] has written as values. Of other bytes something is made, too.
    pub fn from_int8(data: &[u8]) -> Vec<f32> {
        let blocks = data.len().div_ceil(BLOCK + 1);
        let (exponents, numbers) = data.split_at(blocks);
        let mut out = vec![0.0; numbers.len()];
        for ((out, numbers), &byte) in out.chunks_mut(BLOCK).zip(numbers.chunks(BLOCK)).zip(exponents) {
            let exponent = byte as i8;
            if exponent == NOT_FINITE {
                out.fill(f32::NAN);
                continue;
            }
            let scale = power(i32::from(exponent).max(LEAST));
            for (out, &number) in out.iter_mut().zip(numbers) {
                *out = f32::from(number as i8) * scale;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::floats::bytes_of;

    /// The largest that is rounded to something finite.
    const HIGHEST: f32 = 127.0 * f32::from_bits((121 + 127) << 23);

    #[test]
    fn nothing_is_rounded_to_infinity() {
        let above = f32::from_bits(HIGHEST.to_bits() + 1);
        for (most, finite) in [(HIGHEST, true), (above, false), (f32::MAX, false)] {
            for key in 0..100 {
                let mut block = [most, 1.0, -most];
                round_to_int8(&mut block, key, 0);
                assert!(
                    block
                        .iter()
                        .all(|x| x.is_finite() == finite && !x.is_infinite())
                );
                assert_eq!(bytes_of(&from_int8(&to_int8(&block))), bytes_of(&block));
            }
        }
    }

    fn any_values() -> impl Strategy<Value = Vec<f32>> {
        let value = prop_oneof![
            8 => -1.0f32..1.0,
            1 => any::<u32>().prop_map(f32::from_bits),
            1 => Just(0.0),
        ];
        prop::collection::vec(value, 0..200)
    }

    proptest! {
        #[test]
        fn what_is_rounded_survives_its_way_and_another_rounding(
            values in any_values(), key: u64, again: u64, block in 0usize..9,
        ) {
            let place = block * BLOCK;
            let mut rounded = values.clone();
            round_to_int8(&mut rounded, key, place);
            let sent = to_int8(&rounded);
            prop_assert_eq!(sent.len(), int8_len(values.len()));
            let come = from_int8(&sent);
            prop_assert_eq!(bytes_of(&come), bytes_of(&rounded));
            round_to_int8(&mut rounded, again, place);
            prop_assert_eq!(bytes_of(&come), bytes_of(&rounded));
            prop_assert_eq!(to_int8(&come), sent);
            for (block, rounded) in values.chunks(BLOCK).zip(rounded.chunks(BLOCK)) {
                let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let finite = block.iter().all(|x| x.abs() <= HIGHEST);
                for (x, r) in block.iter().zip(rounded) {
                    prop_assert_eq!(r.is_finite(), finite);
                    // A scale is less than 1/63 of the largest, but where that is smaller than any scale.
                    let bound = (most / 63.0).max(f32::MIN_POSITIVE);
                    prop_assert!(!finite || (x - r).abs() < bound, "{} became {}", x, r);
                }
            }
        }

        #[test]
        fn any_bytes_become_something(data in prop::collection::vec(any::<u8>(), 0..300)) {
            let values = from_int8(&data);
            prop_assert_eq!(values.len(), data.len() - data.len().div_ceil(BLOCK + 1));
        }

        #[test]
        fn parts_are_rounded_as_the_whole_is(key: u64, cut in 0usize..5, values in prop::collection::vec(-1.0f32..1.0, 300)) {
            let mut whole = values.clone();
            round_to_int8(&mut whole, key, 0);
            let mut parts = values;
            let (left, right) = parts.split_at_mut(cut * BLOCK);
            round_to_int8(left, key, 0);
            round_to_int8(right, key, cut * BLOCK);
            prop_assert_eq!(parts, whole);
        }
    }

    #[test]
    fn rounding_has_no_bias() {
        const ROUNDS: usize = 1 << 16;
        let values = [1.0, 0.3, -0.3, 1e-4, -1e-4, 0.501, -0.9999, 0.0];
        let mut sums = [0.0f64; 8];
        for round in 0..ROUNDS {
            let mut rounded = values;
            // Keys as they are: far apart.
            round_to_int8(
                &mut rounded,
                crate::rng::derive_key(round as u64, "test"),
                0,
            );
            sums.iter_mut()
                .zip(rounded)
                .for_each(|(s, x)| *s += f64::from(x));
        }
        // Five standard deviations of a mean, each of which is at most half a scale, 2⁻⁶.
        let bound = 5.0 * 0.5 / 64.0 / (ROUNDS as f64).sqrt();
        for (sum, value) in sums.iter().zip(values) {
            let mean = sum / ROUNDS as f64;
            assert!((mean - f64::from(value)).abs() < bound, "{mean} of {value}");
        }
    }

    /// Written down by NumPy: see `golden/int8.py`.
    #[test]
    fn bits_are_those_of_the_formula() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../golden/int8.json")).expect("JSON");
        let floats = |name: &str| -> Vec<f32> {
            let bits = golden[name].as_array().expect(name);
            let bits = bits.iter().map(|b| b.as_u64().expect("bits") as u32);
            bits.map(f32::from_bits).collect()
        };
        let mut values = floats("values");
        let key = golden["key"]
            .as_str()
            .expect("a key")
            .parse()
            .expect("a number");
        round_to_int8(
            &mut values,
            key,
            golden["place"].as_u64().expect("a place") as usize,
        );
        assert_eq!(bytes_of(&values), bytes_of(&floats("rounded")));
        let sent: Vec<u8> = serde_json::from_value(golden["sent"].clone()).expect("bytes");
        assert_eq!(to_int8(&values), sent);
    }
}
