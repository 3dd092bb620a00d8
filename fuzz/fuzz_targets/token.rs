//! See `cohort_fuzz::token`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cohort_fuzz::token(data));
