//! All targets in one program, so that continuous integration links once: `COHORT_FUZZ_TARGET` says which one it is.
#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("COHORT_FUZZ_TARGET").expect("COHORT_FUZZ_TARGET names a target");
    let found = cohort_fuzz::TARGETS
        .iter()
        .find(|(known, _)| *known == name);
    found.expect("COHORT_FUZZ_TARGET is a target").1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
