#!/usr/bin/env python3
"""Reads a directory that Cohort wrote with TensorBoard's own readers, and compares it with `cohort metrics`.

    python3 -m venv venv && venv/bin/pip install tensorboard
    cohort metrics RUN --json > steps.jsonl
    cohort metrics RUN --tensorboard board
    venv/bin/python tests/tensorboard.py board/RUN steps.jsonl

Every record must pass TensorBoard's checks of its checksums, and every step must be there once, with the value that
`cohort metrics` has, as a 32-bit float. Prints what was found, and exits with 1 where something is wrong.
"""

import json
import pathlib
import struct
import sys

# This file has the name of the package, and its folder comes first.
sys.path.pop(0)

from tensorboard.backend.event_processing import event_accumulator, event_file_loader

CURVES = {
    "train/loss": "loss",
    "train/bits_per_byte": "bits_per_byte",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "train/tokens": "tokens",
    "train/tokens_per_second": "tokens_per_second",
    "train/mfu": "mfu",
}


def f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def main(directory, metrics):
    wrong = []
    for file in sorted(pathlib.Path(directory).glob("*tfevents*")):
        # Raises DataLossError at a record whose checksum is wrong.
        events = list(event_file_loader.LegacyEventFileLoader(str(file)).Load())
        print(f"{file.name}: {len(events)} events, {file.stat().st_size} bytes")
    unlimited = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    found = event_accumulator.EventAccumulator(str(directory), size_guidance=unlimited)
    found.Reload()
    rows = [json.loads(line) for line in open(metrics)]
    for tag, key in CURVES.items():
        expected = [(row["step"], f32(row[key])) for row in rows if row[key] is not None]
        if not expected:
            continue
        points = [(event.step, f32(event.value)) for event in found.Scalars(tag)]
        if points != expected:
            wrong.append(f"{tag}: {len(points)} points, {len(expected)} expected")
        times = [round(1000 * event.wall_time) for event in found.Scalars("train/loss")]
        if times != [row["time_ms"] for row in rows]:
            wrong.append(f"{tag}: the times differ")
    for tag in sorted(found.Tags()["scalars"]):
        points = found.Scalars(tag)
        print(f"{tag}: {len(points)} points, steps {points[0].step} to {points[-1].step}, last {points[-1].value:.6g}")
    for tag in sorted(found.Tags()["tensors"]):
        print(f"{tag}: {len(found.Tensors(tag))} texts")
    for sentence in wrong:
        print("wrong:", sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
