//! See `cohort_fuzz::json`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cohort_fuzz::json(data));
