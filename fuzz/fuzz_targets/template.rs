//! See `cohort_fuzz::template`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cohort_fuzz::template(data));
