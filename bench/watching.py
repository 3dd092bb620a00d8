"""What it costs a run to be watched: steps' times with and without a page open, figures scraped and event files kept.

    cargo build --release
    python3 bench/watching.py [--cohort target/release/cohort] [--pairs 5] [--steps 400] [--json FILE]

Each pair is two runs of the same spec on a cluster of its own, one worker with one thread, watched and not watched in
turn. Watched means: a browser has the run's page open (where `chromium` is found; else the page's live stream is read and its
requests are made again every two seconds), `/metrics` is asked each second, and the coordinator keeps event files for TensorBoard.
The figure is the ratio of the medians of the steps' times, as the ledger's clock has them, over all pairs; beside it stands the
processor time of the coordinator. On a machine with more than one core the browser has cores of its own.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request

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
steps = {steps}
lanes = 4
micro_batch = 3
learning_rate = 1e-3
eval_every = 100
[checkpoint]
every = 100
"""

BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"]


def text(path):
    words = "the quick brown fox jumps over a lazy dog and then sleeps for an hour in the warm afternoon sun".split()
    with open(path, "w") as file:
        for i in range(60_000):
            file.write(words[(i * i + 7 * i) % len(words)] + ("\n" if i % 11 == 0 else " "))


class Cluster:
    """A coordinator and one worker of one thread."""

    def __init__(self, cohort, home, watched):
        line = [cohort, "local", "--workers", "1", "--threads", "1", "--listen", "127.0.0.1:0", "--home", home]
        if watched:
            line += ["--tensorboard", os.path.join(home, "events")]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if found := re.search(r"http://([\d.]+:\d+)", line):
                self.address = found.group(1)
            if found := re.search(r"coordinator +process (\d+)", line):
                self.coordinator = int(found.group(1))
            if "Ctrl-C" in line:
                return
        raise SystemExit("the cluster did not start")

    def cpu_seconds(self):
        with open(f"/proc/{self.coordinator}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path):
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return answer.read()

    def end(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


def every(seconds, stop, what):
    def run():
        while not stop.wait(seconds):
            what()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()


def measure(cohort, directory, number, steps, watched):
    """Seconds of each step, and the coordinator's processor seconds."""
    home = os.path.join(directory, f"home-{number}")
    cluster = Cluster(cohort, home, watched)
    stop, browser = threading.Event(), None
    spec, corpus = os.path.join(directory, "spec.toml"), os.path.join(directory, "text.txt")
    train = [cohort, "pretrain", spec, "--corpus", corpus, "--name", "run", "--coordinator", f"http://{cluster.address}", "--home", home]
    try:
        if watched:
            subprocess.run(train + ["--detach"], check=True, capture_output=True)
            chromium = shutil.which("chromium") or shutil.which("chromium-browser")
            if chromium:
                profile = os.path.join(directory, f"profile-{number}")
                line = [chromium, *BROWSER, f"--user-data-dir={profile}", f"http://{cluster.address}/runs/run"]
                browser = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            else:
                every(2, stop, lambda: (cluster.get("/api/runs/run"), cluster.get("/api/runs/run/history?points=600")))
            every(1, stop, lambda: cluster.get("/metrics"))
            subprocess.run([cohort, "follow", "run", "--coordinator", f"http://{cluster.address}", "--home", home], check=True, capture_output=True)
        else:
            subprocess.run(train, check=True, capture_output=True)
        cpu = cluster.cpu_seconds()
    finally:
        stop.set()
        if browser:
            os.killpg(browser.pid, signal.SIGTERM)
            browser.wait()
        cluster.end()
    rows = subprocess.run([cohort, "metrics", "run", "--json", "--home", home], check=True, capture_output=True, text=True)
    times = [json.loads(row)["time_ms"] for row in rows.stdout.splitlines()]
    # The first steps come before the page is open.
    seconds = [(b - a) / 1e3 for a, b in zip(times[20:], times[21:])]
    return seconds, cpu


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cohort", default="target/release/cohort")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    cohort = os.path.abspath(arguments.cohort)
    pairs = []
    with tempfile.TemporaryDirectory() as directory:
        text(os.path.join(directory, "text.txt"))
        with open(os.path.join(directory, "spec.toml"), "w") as file:
            file.write(SPEC.format(steps=arguments.steps))
        for number in range(arguments.pairs):
            pair = {}
            order = [False, True] if number % 2 == 0 else [True, False]
            for watched in order:
                seconds, cpu = measure(cohort, directory, f"{number}-{watched}", arguments.steps, watched)
                pair["watched" if watched else "alone"] = {"step_s": statistics.mean(seconds), "median_step_s": statistics.median(seconds), "coordinator_cpu_s": cpu}
            pair["ratio"] = pair["watched"]["step_s"] / pair["alone"]["step_s"]
            pairs.append(pair)
            print(f"alone {pair['alone']['step_s'] * 1e3:.2f} ms a step, watched {pair['watched']['step_s'] * 1e3:.2f} ms: "
                  f"{100 * (pair['ratio'] - 1):+.2f} %; coordinator {pair['alone']['coordinator_cpu_s']:.2f} s and "
                  f"{pair['watched']['coordinator_cpu_s']:.2f} s of a core", flush=True)
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    result = {"steps": arguments.steps, "pairs": pairs, "ratio": ratio}
    print(f"watching costs {100 * (ratio - 1):+.2f} % of a step (median of {len(pairs)} pairs)")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
