"""Peak memory of each worker of a run, with the moments of the optimizer on every worker and divided among them, on one host.

The workers share no memory with the coordinator and sum the gradients themselves in both cases, so that only the moments
differ. Figures are the kernel's, of each worker's process: VmHWM, and the most that was seen of RssAnon, which leaves out what
a file backs. Prints a line of JSON for each run; their states must be the same to the bit.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PATIENCE = 120

# 29 million parameters, nearly all of them in matrices, and few tokens: what a worker keeps outweighs what it computes.
SPEC = """
[model]
architecture = "llama"
hidden_size = {hidden}
num_hidden_layers = 8
num_attention_heads = 8
num_key_value_heads = 8
intermediate_size = {feed}
context = 64

[tokenizer]
kind = "bpe"
vocab_size = 512

[train]
steps = {steps}
lanes = 4
micro_batch = 1
learning_rate = 0.001
eval_every = 0
eval_samples = 4

[checkpoint]
every = 0
"""


def status(pid):
    """Lines of /proc/PID/status in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {f[0].rstrip(":"): int(f[1]) * 1024 / 1e6 for f in fields if f[-1] == "kB"}


def start(words, log, sign):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COHORT_")} | {"COHORT_LOG": "info"}
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, words)), stdout=out, stderr=out, env=environment)
    deadline = time.monotonic() + PATIENCE
    while sign not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"{words[1]} did not start:\n{log.read_text()}")
        time.sleep(0.02)
    return process


def measure(cohort, optimizer, workers, spec, text):
    with tempfile.TemporaryDirectory(prefix="cohort-memory-") as root:
        root = Path(root)
        (root / "spec.toml").write_text(spec)
        home = root / "home"
        flags = ["--exchange", "sharded", "--optimizer", optimizer]
        listen = [cohort, "coordinator", "--listen", "127.0.0.1:0", "--home", home, *flags]
        processes = [start(listen, root / "coordinator.log", "listening")]
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+", (root / "coordinator.log").read_text())[0]
            for n in range(workers):
                words = [cohort, "worker", "--coordinator", url, "--threads", 1, "--no-shared-memory", "--home", root / f"worker-{n}"]
                processes.append(start(words, root / f"worker-{n}.log", "joined"))
            words = [cohort, "pretrain", root / "spec.toml", "--corpus", text, "--coordinator", url, "--name", "memory", "--json"]
            words += ["--set", f"train.min_workers={workers}"]
            run = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
            anonymous = [0.0] * workers
            while run.poll() is None:
                for n, process in enumerate(processes[1:]):
                    anonymous[n] = max(anonymous[n], status(process.pid)["RssAnon"])
                time.sleep(0.01)
            events = [json.loads(line) for line in run.stdout]
            if run.returncode:
                sys.exit(f"the run failed: {events[-1:]}")
            peak = [status(process.pid)["VmHWM"] for process in processes[1:]]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    divided = any("are divided among" in e.get("text", "") for e in events)
    if divided != (optimizer == "sharded" and workers > 1):
        sys.exit(f"with `{optimizer}` on {workers} workers, moments divided: {divided}")
    speeds = [e["tokens_per_second"] for e in events if e["event"] == "step"]
    row = {"optimizer": optimizer, "workers": workers, "peak_mb": peak, "anonymous_mb": anonymous}
    return row | {"tokens_per_s": statistics.median(speeds), "state_hash": events[-1]["state_hash"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort")
    parser.add_argument("text")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sizes = {"hidden": 128, "feed": 256, "steps": 4} if args.quick else {"hidden": 512, "feed": 1408, "steps": 12}
    rows = []
    for workers in [1, 2] if args.quick else [1, 2, 4]:
        for optimizer in ["whole", "sharded"]:
            row = measure(args.cohort, optimizer, workers, SPEC.format(**sizes), args.text)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if len({row["state_hash"] for row in rows}) != 1:
        sys.exit("the states are not the same")


if __name__ == "__main__":
    main()
