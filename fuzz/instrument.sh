#!/usr/bin/env bash
# Stands before rustc, for the crates of this repository alone, so that what they are built of is built once for everything.
# These are stable options of rustc: LLVM's coverage for libFuzzer. (`cargo fuzz` adds AddressSanitizer, which needs nightly.)

# Build scripts run without libFuzzer.
case " $* " in *" --crate-name build_script_"*) exec "$@" ;; esac

exec "$@" -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
