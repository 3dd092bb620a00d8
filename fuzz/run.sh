#!/usr/bin/env bash
# Fuzzes every target for some seconds, and prints how often each ran: fuzz/run.sh [SECONDS] [TARGET…]
# Needs a C++ compiler, no nightly. What is found lies in fuzz/artifacts/TARGET; what was learned in fuzz/corpus/TARGET.
# COHORT_FUZZ_OPT_LEVEL=0 compiles what is fuzzed without optimisation: for runs shorter than what that takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-10}
shift || true
targets=("$@")
if [[ ${#targets[@]} == 0 ]]; then
    mapfile -t targets < <(ls fuzz/seeds)
fi

options=()
if [[ -n ${COHORT_FUZZ_OPT_LEVEL:-} ]]; then
    options=(--config "profile.dev.package.cohort-common.opt-level=$COHORT_FUZZ_OPT_LEVEL")
fi
# Not `-p`: with all packages selected, dependencies are the same as in `cargo build`, and are not built again.
RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/instrument.sh cargo build --quiet "${options[@]}" \
    --features cohort-fuzz/libfuzzer --bin all
program=${CARGO_TARGET_DIR:-target}/debug/all

# 2 GiB and 10 seconds are far more than any of these inputs may take.
fuzz() {
    local target=$1
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target"
    COHORT_FUZZ_TARGET=$target "$program" "fuzz/corpus/$target" "fuzz/seeds/$target" \
        -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="fuzz/artifacts/$target/" >"fuzz/artifacts/$target.log" 2>&1
}

figure() { sed -n "s/^stat::$2: *//p" "fuzz/artifacts/$1.log"; }

# As many at a time as there are cores.
cores=$(nproc)
failed=()
for ((begin = 0; begin < ${#targets[@]}; begin += cores)); do
    running=()
    for target in "${targets[@]:begin:cores}"; do
        fuzz "$target" &
        running+=("$!:$target")
    done
    for one in "${running[@]}"; do
        wait "${one%%:*}" || failed+=("${one#*:}")
    done
done

printf '%-12s %12s %10s %8s\n' target executions 'per second' inputs
for target in "${targets[@]}"; do
    printf '%-12s %12s %10s %8s\n' "$target" "$(figure "$target" number_of_executed_units)" \
        "$(figure "$target" average_exec_per_sec)" "$(find "fuzz/corpus/$target" -type f | wc -l)"
done
for target in "${failed[@]}"; do
    printf '\n== %s failed; its input is in fuzz/artifacts/%s\n' "$target" "$target"
    tail -n 30 "fuzz/artifacts/$target.log"
done
[[ ${#failed[@]} == 0 ]]
