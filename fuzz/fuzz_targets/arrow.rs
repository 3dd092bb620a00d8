//! See `cohort_fuzz::arrow`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cohort_fuzz::arrow(data));
