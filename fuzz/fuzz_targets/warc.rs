//! See `cohort_fuzz::warc`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cohort_fuzz::warc(data));
