//! Eight or four bits for an element: blocks of [`BLOCK`] elements share a scale, a power of two.
//!
//! With `most` the largest whole number, 127 or 7, a block's scale is the smallest 2ᵉ with |x| ≤ most · 2ᵉ for all of its
//! elements, and an element becomes a whole number of scales by stochastic rounding: ⌊x / 2ᵉ + u⌋ · 2ᵉ with a random 0 < u < 1,
//! whose expectation is x (Gupta et al., "Deep learning with limited numerical precision", ICML 2015). As scales are powers of
//! two, what was rounded stays as it is when it is rounded or encoded again, whatever scale its block has then: nothing is
//! lost on the way.
//!
//! u is a function of a key and the element's place in the whole gradient: 16 bits of SplitMix64 (Steele, Lea and Flood,
//! "Fast splittable pseudorandom number generators", OOPSLA 2014), of which a word serves four elements.
//!
//! What travels is a byte for the exponent of each block, and then the numbers: a byte each, or two in a byte, the first in its lower
//! half.

use super::widest;

/// Elements with a scale in common.
pub const BLOCK: usize = 64;

/// Exponents that occur: below, scales would not be normal numbers.
const LEAST: i32 = -126;

/// Stands for the exponent of a block with something that is not finite, or so large that what is rounded up could be infinite.
/// All of it becomes NaN.
const NOT_FINITE: i8 = i8::MIN;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bytes of so many elements, of so many bits each.
pub fn block_len(bits: usize, elements: usize) -> usize {
    (elements * bits).div_ceil(8) + elements.div_ceil(BLOCK)
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

/// The exponent of a block's scale; `None` if something in it is not finite, or above most · 2¹²⁷ / 2^(BITS − 2).
#[inline(always)]
fn exponent<const BITS: u32>(block: &[f32]) -> Option<i32> {
    const SIGN: u32 = 1 << 31;
    const MANTISSA: u32 = (1 << 23) - 1;
    // The mantissa of `most`, which has BITS − 1 ones.
    let full = MANTISSA & !(MANTISSA >> (BITS - 2));
    let largest = block
        .iter()
        .fold(0, |most, x| most.max(x.to_bits() & !SIGN));
    let exponent = (largest >> 23) as i32 - 127;
    let over = i32::from(largest & MANTISSA > full);
    let is_finite = largest <= 254 << 23 | full;
    is_finite.then_some((exponent - (BITS as i32 - 2) + over).max(LEAST))
}

#[inline(always)]
fn round_block<const BITS: u32>(block: &mut [f32], key: u64, place: usize) {
    let Some(exponent) = exponent::<BITS>(block) else {
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

#[inline(always)]
fn round<const BITS: u32>(values: &mut [f32], key: u64, place: usize) {
    assert!(place.is_multiple_of(BLOCK), "a block begins at {place}");
    let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
    for (number, block) in blocks.iter_mut().enumerate() {
        round_block::<BITS>(block, key, place + number * BLOCK);
    }
    if !rest.is_empty() {
        round_block::<BITS>(rest, key, place + blocks.len() * BLOCK);
    }
}

#[inline(always)]
fn encode<const BITS: u32>(values: &[f32]) -> Vec<u8> {
    let mut out = vec![0; block_len(BITS as usize, values.len())];
    let (exponents, numbers) = out.split_at_mut(values.len().div_ceil(BLOCK));
    let blocks = values
        .chunks(BLOCK)
        .zip(numbers.chunks_mut(BLOCK * BITS as usize / 8));
    for ((block, numbers), byte) in blocks.zip(exponents) {
        let exponent = exponent::<BITS>(block);
        *byte = exponent.map_or(NOT_FINITE, |e| e as i8) as u8;
        let inverse = power(-exponent.unwrap_or(0));
        let number = |x: &f32| (x * inverse) as i8 as u8;
        if BITS == 8 {
            for (out, x) in numbers.iter_mut().zip(block) {
                *out = number(x);
            }
        } else {
            for (out, pair) in numbers.iter_mut().zip(block.chunks(2)) {
                let high = pair.get(1).map_or(0, number);
                *out = number(&pair[0]) & 0xf | high << 4;
            }
        }
    }
    out
}

#[inline(always)]
fn decode<const BITS: u32>(data: &[u8], elements: usize) -> Vec<f32> {
    assert_eq!(data.len(), block_len(BITS as usize, elements));
    let (exponents, numbers) = data.split_at(elements.div_ceil(BLOCK));
    let mut out = vec![0.0; elements];
    let blocks = out
        .chunks_mut(BLOCK)
        .zip(numbers.chunks(BLOCK * BITS as usize / 8));
    for ((out, numbers), &byte) in blocks.zip(exponents) {
        let exponent = byte as i8;
        if exponent == NOT_FINITE {
            out.fill(f32::NAN);
            continue;
        }
        let scale = power(i32::from(exponent).max(LEAST));
        if BITS == 8 {
            for (out, &number) in out.iter_mut().zip(numbers) {
                *out = f32::from(number as i8) * scale;
            }
        } else {
            for (pair, &both) in out.chunks_mut(2).zip(numbers) {
                // Both halves have a sign of their own.
                let halves = [(both << 4) as i8 >> 4, both as i8 >> 4];
                for (out, half) in pair.iter_mut().zip(halves) {
                    *out = f32::from(half) * scale;
                }
            }
        }
    }
    out
}

widest! {
    /// Rounds elements to 8 bits, of which the first has this place in the gradient.
    ///
    /// # Panics
    /// If no block begins at that place.
    pub fn round_to_int8(values: &mut [f32], key: u64, place: usize) {
        round::<8>(values, key, place)
    }
}

widest! {
    /// Values that were rounded to 8 bits, as they travel.
    pub fn to_int8(values: &[f32]) -> Vec<u8> {
        encode::<8>(values)
    }
}

widest! {
    /// What [`to_int8`] has written of so many values. Of other bytes something is made, too.
    ///
    /// # Panics
    /// If these are not as many bytes as so many values have.
    pub fn from_int8(data: &[u8], elements: usize) -> Vec<f32> {
        decode::<8>(data, elements)
    }
}

widest! {
    /// Rounds elements to 4 bits, of which the first has this place in the gradient.
    ///
    /// # Panics
    /// If no block begins at that place.
    pub fn round_to_int4(values: &mut [f32], key: u64, place: usize) {
        round::<4>(values, key, place)
    }
}

widest! {
    /// Values that were rounded to 4 bits, as they travel.
    pub fn to_int4(values: &[f32]) -> Vec<u8> {
        encode::<4>(values)
    }
}

widest! {
    /// What [`to_int4`] has written of so many values. Of other bytes something is made, too.
    ///
    /// # Panics
    /// If these are not as many bytes as so many values have.
    pub fn from_int4(data: &[u8], elements: usize) -> Vec<f32> {
        decode::<4>(data, elements)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::floats::bytes_of;

    /// A width, and what there is of it.
    #[derive(Clone, Copy, Debug)]
    struct Width {
        bits: usize,
        round: fn(&mut [f32], u64, usize),
        to: fn(&[f32]) -> Vec<u8>,
        from: fn(&[u8], usize) -> Vec<f32>,
    }

    const WIDTHS: [Width; 2] = [
        Width {
            bits: 8,
            round: round_to_int8,
            to: to_int8,
            from: from_int8,
        },
        Width {
            bits: 4,
            round: round_to_int4,
            to: to_int4,
            from: from_int4,
        },
    ];

    impl Width {
        /// The largest whole number.
        fn most(self) -> f32 {
            ((1 << (self.bits - 1)) - 1) as f32
        }

        /// The largest that is rounded to something finite.
        fn highest(self) -> f32 {
            self.most() * power(127 - (self.bits as i32 - 2))
        }

        fn there_and_back(self, values: &[f32]) -> Vec<f32> {
            (self.from)(&(self.to)(values), values.len())
        }
    }

    #[test]
    fn nothing_is_rounded_to_infinity() {
        for width in WIDTHS {
            let highest = width.highest();
            let above = f32::from_bits(highest.to_bits() + 1);
            for (most, finite) in [(highest, true), (above, false), (f32::MAX, false)] {
                for key in 0..100 {
                    let mut block = [most, 1.0, -most];
                    (width.round)(&mut block, key, 0);
                    assert!(
                        block
                            .iter()
                            .all(|x| x.is_finite() == finite && !x.is_infinite())
                    );
                    assert_eq!(bytes_of(&width.there_and_back(&block)), bytes_of(&block));
                }
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
            width in prop::sample::select(WIDTHS.to_vec()),
            values in any_values(), key: u64, again: u64, block in 0usize..9,
        ) {
            let place = block * BLOCK;
            let mut rounded = values.clone();
            (width.round)(&mut rounded, key, place);
            let sent = (width.to)(&rounded);
            prop_assert_eq!(sent.len(), block_len(width.bits, values.len()));
            let come = (width.from)(&sent, values.len());
            prop_assert_eq!(bytes_of(&come), bytes_of(&rounded));
            (width.round)(&mut rounded, again, place);
            prop_assert_eq!(bytes_of(&come), bytes_of(&rounded));
            prop_assert_eq!((width.to)(&come), sent);
            for (block, rounded) in values.chunks(BLOCK).zip(rounded.chunks(BLOCK)) {
                let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let finite = block.iter().all(|x| x.abs() <= width.highest());
                for (x, r) in block.iter().zip(rounded) {
                    prop_assert_eq!(r.is_finite(), finite);
                    // A scale is less than 1/63 of the largest, or 1/3, but where that is smaller than any scale.
                    let part = ((width.most() - 1.0) / 2.0).floor();
                    let bound = (most / part).max(f32::MIN_POSITIVE);
                    prop_assert!(!finite || (x - r).abs() < bound, "{} became {}", x, r);
                }
            }
        }

        #[test]
        fn any_bytes_become_something(
            width in prop::sample::select(WIDTHS.to_vec()), elements in 0usize..300, data in prop::collection::vec(any::<u8>(), 400),
        ) {
            let data = &data[..block_len(width.bits, elements)];
            prop_assert_eq!((width.from)(data, elements).len(), elements);
        }

        #[test]
        fn parts_are_rounded_as_the_whole_is(
            width in prop::sample::select(WIDTHS.to_vec()),
            key: u64, cut in 0usize..5, values in prop::collection::vec(-1.0f32..1.0, 300),
        ) {
            let mut whole = values.clone();
            (width.round)(&mut whole, key, 0);
            let mut parts = values;
            let (left, right) = parts.split_at_mut(cut * BLOCK);
            (width.round)(left, key, 0);
            (width.round)(right, key, cut * BLOCK);
            prop_assert_eq!(parts, whole);
        }
    }

    #[test]
    fn rounding_has_no_bias() {
        const ROUNDS: usize = 1 << 16;
        let values = [1.0, 0.3, -0.3, 1e-4, -1e-4, 0.501, -0.9999, 0.0];
        for width in WIDTHS {
            let mut sums = [0.0f64; 8];
            for round in 0..ROUNDS {
                let mut rounded = values;
                // Keys as they are: far apart.
                let key = crate::rng::derive_key(round as u64, "test");
                (width.round)(&mut rounded, key, 0);
                sums.iter_mut()
                    .zip(rounded)
                    .for_each(|(s, x)| *s += f64::from(x));
            }
            // Five standard deviations of a mean, each of which is at most half a scale, 2⁻⁶ or 2⁻².
            let scale = 4.0 / (1u32 << width.bits) as f64;
            let bound = 5.0 * 0.5 * scale / (ROUNDS as f64).sqrt();
            for (sum, value) in sums.iter().zip(values) {
                let mean = sum / ROUNDS as f64;
                assert!((mean - f64::from(value)).abs() < bound, "{mean} of {value}");
            }
        }
    }

    /// Written down by NumPy: see `golden/blocks.py`.
    #[test]
    fn bits_are_those_of_the_formula() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../golden/blocks.json")).expect("JSON");
        let floats = |value: &serde_json::Value| -> Vec<f32> {
            let bits = value.as_array().expect("an array").iter();
            let bits = bits.map(|b| b.as_u64().expect("bits") as u32);
            bits.map(f32::from_bits).collect()
        };
        let key = golden["key"].as_str().expect("a key");
        let key = key.parse().expect("a number");
        let place = golden["place"].as_u64().expect("a place") as usize;
        for width in WIDTHS {
            let expected = &golden[width.bits.to_string()];
            let mut values = floats(&golden["values"]);
            (width.round)(&mut values, key, place);
            assert_eq!(bytes_of(&values), bytes_of(&floats(&expected["rounded"])));
            let sent: Vec<u8> = serde_json::from_value(expected["sent"].clone()).expect("bytes");
            assert_eq!((width.to)(&values), sent);
        }
    }
}
