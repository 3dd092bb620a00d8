"""What it costs a run to be watched: steps' times with and without a page open and figures scraped.

    cargo build --release
    python3 bench/watching.py [--cohort target/release/cohort] [--phases 30] [--seconds 8] [--json FILE]

One run on one worker of one thread, in phases that take turns: watched by nobody, and watched. Watched means that a browser shows
the run's page (by `chromedriver`; without one, the page's stream is read, and what it asks for at first is asked for again every
two seconds) and that `/metrics` is asked each second. In the other phases the browser shows an empty page. The first quarter of a phase
is left out, and so are steps with a checkpoint. Of every three phases in a row, the middle one is compared with the mean of the
other two, so that a machine whose speed drifts misleads nobody; the figure is the median of those ratios. Event files for TensorBoard are
kept all the time. On a machine with more than one core the browser has cores of its own.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request

from browser import Browser, found as browser_found

SPEC = """
[model]
architecture = "llama"
num_hidden_layers = 4
hidden_size = 128
num_attention_heads = 4
context = 64
[tokenizer]
kind = "char"
[train]
steps = 1000000
lanes = 4
micro_batch = 3
learning_rate = 1e-3
eval_every = 0
[checkpoint]
every = 500
"""


def text(path):
    words = "the quick brown fox jumps over a lazy dog and then sleeps for an hour in the warm afternoon sun".split()
    with open(path, "w") as file:
        for i in range(60_000):
            file.write(words[(i * i + 7 * i) % len(words)] + ("\n" if i % 11 == 0 else " "))


def cpu_seconds(process):
    """Processor seconds of a process, or None if it has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def group_cpu_seconds(group):
    """Processor seconds of all processes of a group."""
    total = 0
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.getpgid(int(entry)) == group:
                total += cpu_seconds(int(entry)) or 0
        except OSError:
            pass
    return total


class Cluster:
    """A coordinator and one worker of one thread."""

    def __init__(self, cohort, home):
        line = [cohort, "local", "--workers", "1", "--threads", "1", "--listen", "127.0.0.1:0", "--home", home,
                "--tensorboard", os.path.join(home, "events")]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if found := re.search(r"http://([\d.]+:\d+)", line):
                self.address = f"http://{found.group(1)}"
            if found := re.search(r"coordinator +process (\d+)", line):
                self.coordinator = int(found.group(1))
            if "Ctrl-C" in line:
                return
        raise SystemExit("the cluster did not start")

    def get(self, path):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def end(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


def every(seconds, stop, what):
    def run():
        while not stop.wait(seconds):
            what()
    threading.Thread(target=run, daemon=True).start()


def stream(cluster, stop):
    """Reads the live stream, as a page does."""
    def run():
        with urllib.request.urlopen(f"{cluster.address}/api/live?run=run", timeout=60) as lines:
            while not stop.is_set() and lines.readline():
                pass
    threading.Thread(target=run, daemon=True).start()


def watch(cluster, browser, stop):
    every(1, stop, lambda: cluster.get("/metrics"))
    if browser:
        browser.show(f"{cluster.address}/runs/run")
        return
    stream(cluster, stop)
    every(2, stop, lambda: (cluster.get("/api/runs/run"), cluster.get("/api/runs/run/history?points=1000")))


def phases(cluster, browser, count, seconds):
    """When each phase counts, in milliseconds, and the processor seconds in it of coordinator and browser."""
    found = []
    for number in range(count):
        stop = threading.Event()
        if number % 2:
            watch(cluster, browser, stop)
        elif browser:
            browser.show("about:blank")
        time.sleep(seconds / 4)
        group = browser.process.pid if browser else 0
        before = [cpu_seconds(cluster.coordinator), group_cpu_seconds(group)]
        begin = 1e3 * time.time()
        time.sleep(0.75 * seconds)
        end = 1e3 * time.time()
        stop.set()
        after = [cpu_seconds(cluster.coordinator), group_cpu_seconds(group)]
        coordinator, page = (100 * (b - a) / (0.75 * seconds) for a, b in zip(before, after))
        found.append({"watched": bool(number % 2), "begin": begin, "end": end, "coordinator_percent": coordinator, "browser_percent": page})
    return found


def step_times(cohort, home):
    """End of each step and its milliseconds, without those that may have written a checkpoint."""
    line = [cohort, "metrics", "run", "--json", "--home", home]
    rows = [json.loads(row) for row in subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()]
    pairs = zip(rows, rows[1:])
    return [(b["time_ms"], b["time_ms"] - a["time_ms"]) for a, b in pairs if 5 <= b["step"] % 500 < 495]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cohort", default="target/release/cohort")
    parser.add_argument("--phases", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    cohort = os.path.abspath(arguments.cohort)
    browser = Browser() if browser_found() else None
    with tempfile.TemporaryDirectory() as directory:
        home, spec, corpus = (os.path.join(directory, name) for name in ["home", "spec.toml", "text.txt"])
        text(corpus)
        with open(spec, "w") as file:
            file.write(SPEC)
        cluster = Cluster(cohort, home)
        to = ["--coordinator", cluster.address, "--home", home]
        try:
            train = [cohort, "pretrain", spec, "--corpus", corpus, "--name", "run", "--detach", *to]
            subprocess.run(train, check=True, capture_output=True)
            time.sleep(arguments.seconds)
            found = phases(cluster, browser, arguments.phases, arguments.seconds)
            subprocess.run([cohort, "cancel", "run", *to], check=True, capture_output=True)
        finally:
            cluster.end()
            if browser:
                browser.end()
        times = step_times(cohort, home)
    for phase in found:
        own = [took for end, took in times if phase["begin"] <= end - took and end <= phase["end"]]
        phase["step_ms"], phase["steps"] = statistics.mean(own), len(own)
        print(f"{'watched' if phase['watched'] else 'alone  '} {phase['step_ms']:.2f} ms a step over {len(own)}; "
              f"coordinator {phase['coordinator_percent']:.1f} % of a core, browser {phase['browser_percent']:.1f} %")
    ratios = []
    for before, middle, after in zip(found, found[1:], found[2:]):
        ratio = middle["step_ms"] / statistics.mean([before["step_ms"], after["step_ms"]])
        ratios.append(ratio if middle["watched"] else 1 / ratio)
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"watching costs {100 * (ratio - 1):+.2f} % of a step (median of {len(ratios)}; half of them from "
          f"{100 * (low - 1):+.2f} to {100 * (high - 1):+.2f} %)")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"phases": found, "ratio": ratio, "quartiles": [low, high]}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
