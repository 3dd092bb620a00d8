#!/usr/bin/env python3
"""Reads Cohort's page for Prometheus with the parser of Prometheus' client for Python.

    python3 -m venv venv && venv/bin/pip install prometheus_client
    COHORT_PROMETHEUS_PAGE=/tmp/page cargo test -p cohort-coordinator the_page_can_be_checked_by_others
    venv/bin/python tests/prometheus.py /tmp/page
    curl -s http://127.0.0.1:7070/metrics | venv/bin/python tests/prometheus.py -

Each family must have a type and a help, and each series must be there once. Prints the families, and exits with 1 where
something is wrong.
"""

import sys

from prometheus_client.parser import text_string_to_metric_families


def main(path):
    text = sys.stdin.read() if path == "-" else open(path).read()
    families = list(text_string_to_metric_families(text))
    wrong, series = [], 0
    for family in families:
        print(f"{family.type:8} {len(family.samples):3} {family.name}")
        if family.type not in ("gauge", "counter"):
            wrong.append(f"{family.name} is of type {family.type}")
        if not family.documentation:
            wrong.append(f"{family.name} has no help")
        labels = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        if len(set(labels)) != len(labels):
            wrong.append(f"{family.name} has a series twice")
        series += len(labels)
    # A family whose samples stand apart, or whose name is there twice, is read as two.
    names = [family.name for family in families]
    if len(set(names)) != len(names):
        wrong.append("a family is there twice")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    if len(lines) != series:
        wrong.append(f"{len(lines)} lines with samples became {series} series")
    print(f"{len(families)} families, {series} series")
    for sentence in wrong:
        print("wrong:", sentence)
    return 1 if wrong or not families else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
