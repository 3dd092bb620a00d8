"""What it takes to look at a long run: a million steps and 64 workers, asked of a coordinator that was just started.

    python bench/watch.py --cohort target/release/cohort [--steps N] [--workers N] [--times N] [--home DIR] [--json FILE]

Trains a tiny model for a few steps, fills the database up with steps of a made-up run, and starts a cluster on it; then asks
for all that the page asks for, each on a connection of its own, as a browser does when nothing is cached. The first round
finds a coordinator that has not read a step. Where there is `chromedriver`, a browser then opens the run's page, at first at
another such coordinator: seconds from navigation until the charts are drawn. `--home` keeps the filled home; where it has one already, that one is used.
`--serve` waits with the cluster running, so that the page can be looked at.
"""

import argparse
import http.client
import json
import math
import os
import random
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time

from browser import Browser, found as browser_found

RUN = "long-1"
SPEC = """
[model]
architecture = "llama"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 64
context = 32

[tokenizer]
kind = "bpe"
vocab_size = 300

[train]
steps = 2
lanes = 64
micro_batch = 1
warmup_steps = 1
"""
WORDS = "lane tree step root the a sums of and worker holds sends cluster gradient commit".split()


def template(cohort, home, directory):
    """A real run of two steps, whose spec the made-up one gets."""
    random.seed(1)
    text, spec = os.path.join(directory, "text.txt"), os.path.join(directory, "spec.toml")
    with open(text, "w") as file:
        file.write(" ".join(random.choice(WORDS) for _ in range(40_000)))
    with open(spec, "w") as file:
        file.write(SPEC)
    line = [cohort, "pretrain", spec, "--corpus", text, "--local", "1", "--home", home, "--name", "template-1", "--json"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def fill(home, steps):
    """A finished run with as many steps, a validation every thousand, and a lost worker now and then."""
    base = sqlite3.connect(os.path.join(home, "cohort.db"))
    base.execute("PRAGMA synchronous = OFF")
    columns = [row[1] for row in base.execute("PRAGMA table_info(runs)")]
    values = dict(zip(columns, base.execute("SELECT * FROM runs WHERE name = 'template-1'").fetchone()))
    spec = json.loads(values["spec_json"])
    spec["train"]["steps"] = steps
    values.update(name=RUN, spec_json=json.dumps(spec), step=steps, identity="made up", created_ms=values["created_ms"] + 1)
    marks = ",".join("?" * len(columns))
    base.execute(f"INSERT INTO runs ({','.join(columns)}) VALUES ({marks})", [values[c] for c in columns])
    noise = random.Random(2)
    begin = values["created_ms"]

    def rows():
        for step in range(1, steps + 1):
            loss = 1.5 + 4 * math.exp(-step / (steps / 8)) + noise.gauss(0, 0.05)
            yield (RUN, step, loss, 1 + noise.random(), 1e-3 * (1 - step / steps), step * 2048, 5e4 + noise.gauss(0, 2e3),
                   begin + step * 40, steps, step / 1e4, loss / math.log(2) / 3, 0.4)

    base.executemany(
        "INSERT INTO steps (run, step, loss, grad_norm, learning_rate, tokens, tokens_per_second, time_ms, horizon, epoch,"
        " bits_per_byte, mfu) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", rows())
    numbers = range(1, steps + 1)
    base.executemany("INSERT INTO events (run, time_ms, kind, text) VALUES (?,?,'step',?)",
                     ((RUN, begin + step * 40, str(step)) for step in numbers))
    base.executemany("INSERT INTO ledger (run, step, first_position, samples, loss_sum, weight, grad_norm, learning_rate, hash,"
                     " entry) VALUES (?,?,?,64,?,2048,1,1e-3,?,?)",
                     ((RUN, step, step * 64, 4e3, os.urandom(32), os.urandom(180)) for step in numbers))
    base.executemany("INSERT INTO evals (run, step, split, loss, bits_per_byte, weight, bytes) VALUES (?,?,'validation',?,?,1e4,3e4)",
                     ((RUN, step, 1.6 + 4 * math.exp(-step / (steps / 8)), 0.9) for step in range(1000, steps + 1, 1000)))
    for step in range(steps // 50, steps, max(steps // 50, 1)):
        lost = {"event": "worker_lost", "run": RUN, "worker": f"w{step % 64}", "step": step, "reason": "its connection ended"}
        base.execute("INSERT INTO events (run, time_ms, kind, text) VALUES (?,?,'worker_lost',?)",
                     (RUN, begin + step * 40, json.dumps(lost)))
        base.execute("INSERT INTO faults (run, step, time_ms, kind, worker, text) VALUES (?,?,?,'worker_lost',?,'lost')",
                     (RUN, step, begin + step * 40, lost["worker"]))
    base.commit()
    base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    base.close()


def start(cohort, home, workers):
    """A cluster; gives its process, its address, the coordinator's process id, and the seconds until it listened."""
    began = time.perf_counter()
    line = [cohort, "local", "--workers", str(workers), "--threads", "1", "--listen", "127.0.0.1:0", "--home", home]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if found := re.search(r"http://([\d.]+:\d+)", line):
            address = found.group(1)
        if found := re.search(r"coordinator +process (\d+)", line):
            coordinator = int(found.group(1))
        if "Ctrl-C" in line:
            return process, address, coordinator, time.perf_counter() - began
    sys.exit("the cluster did not start")


def cpu_seconds(pid):
    """What a process has used of the processors; on a machine that is busy otherwise, this and not the time counts."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(address, path):
    connection = http.client.HTTPConnection(address, timeout=60)
    began = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    seconds = time.perf_counter() - began
    assert answer.status == 200, (path, answer.status, body[:200])
    connection.close()
    return seconds, len(body)


def measure(address, coordinator):
    """Answers by path, and what they cost the coordinator's processors."""
    paths = ["/", "/api/cluster", "/api/runs", f"/api/runs/{RUN}", f"/api/runs/{RUN}/history?points=600"]
    before = cpu_seconds(coordinator)
    answers = {path: ask(address, path) for path in paths}
    return answers, cpu_seconds(coordinator) - before


def loads(address, times):
    """Seconds until the page is drawn, each time in a browser of its own."""
    seconds = []
    for _ in range(times):
        browser = Browser()
        try:
            seconds.append(browser.seconds_until_drawn(f"http://{address}/runs/{RUN}"))
        finally:
            browser.end()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", default="target/release/cohort")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--home")
    parser.add_argument("--json")
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    cohort = os.path.abspath(arguments.cohort)
    with tempfile.TemporaryDirectory() as directory:
        home = os.path.abspath(arguments.home or os.path.join(directory, "home"))
        if not os.path.exists(os.path.join(home, "cohort.db")):
            template(cohort, home, directory)
            fill(home, arguments.steps)
        size = os.path.getsize(os.path.join(home, "cohort.db"))
        rounds = []
        for number in range(arguments.times):
            process, address, coordinator, started = start(cohort, home, arguments.workers)
            try:
                (cold, cold_cpu), (warm, warm_cpu) = measure(address, coordinator), measure(address, coordinator)
                total = sum(seconds for seconds, _ in cold.values())
                again = sum(seconds for seconds, _ in warm.values())
                rounds.append({"started_s": started, "cold_s": total, "cold_cpu_s": cold_cpu, "warm_s": again, "warm_cpu_s": warm_cpu})
                print(f"started in {started:.2f} s; asked the first time {total * 1e3:.0f} ms ({cold_cpu * 1e3:.0f} ms of a core), "
                      f"again {again * 1e3:.0f} ms ({warm_cpu * 1e3:.0f} ms)")
                for path, (seconds, size_of) in cold.items():
                    again, _ = warm[path]
                    print(f"  {path:40} {seconds * 1e3:7.1f} ms {again * 1e3:7.1f} ms {size_of:9} bytes")
                if arguments.serve and number == arguments.times - 1:
                    print(f"http://{address}/runs/{RUN}; Ctrl-C ends it")
                    process.wait()
            except KeyboardInterrupt:
                pass
            finally:
                process.terminate()
                process.wait()
        pages = []
        for _ in range(arguments.times if browser_found() else 0):
            process, address, _, _ = start(cohort, home, arguments.workers)
            try:
                first, *again = loads(address, 4)
            finally:
                process.terminate()
                process.wait()
            pages.append({"page_cold_s": first, "page_warm_s": statistics.median(again)})
            print(f"page drawn in {first * 1e3:.0f} ms the first time, in {pages[-1]['page_warm_s'] * 1e3:.0f} ms again")
        result = {"steps": arguments.steps, "workers": arguments.workers, "database_bytes": size, "rounds": rounds, "pages": pages}
        for figure in ["cold_s", "cold_cpu_s", "warm_s", "warm_cpu_s"]:
            result[figure] = statistics.median(entry[figure] for entry in rounds)
        for figure in ["page_cold_s", "page_warm_s"] if pages else []:
            result[figure] = statistics.median(entry[figure] for entry in pages)
        print(json.dumps(result))
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(result, file, indent=1)
                file.write("\n")


if __name__ == "__main__":
    main()
