#!/usr/bin/env python3
"""Three hosts with addresses of their own, in network namespaces: a coordinator and two workers, joined by the printed line.
The same run locally, encrypted, and in plain text: the same bits, and what somebody sees who reads everything that
passes between the hosts.

    python3 bench/hosts.py --cohort target/release/cohort

Needs Linux, `ip`, and the right to make namespaces (as any user where user namespaces are allowed). Exits with 77 where that is
missing. Nothing outside the namespaces is touched.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

INSIDE = "COHORT_HOSTS_INSIDE"
MISSING = 77
NETWORK = "10.77.0"
# A run's spec goes to workers as JSON; its name is in many messages; the corpus's text is not sent to workers, only its tokens.
READABLE = [b"hidden_size", b"hosts-run"]
PATIENCE = 120


def enter():
    """Starts this script again in namespaces of its own."""
    can = shutil.which("unshare") and shutil.which("ip")
    probe = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if not can or subprocess.run([*probe, "true"], capture_output=True).returncode:
        print("no network namespaces can be made here", file=sys.stderr)
        sys.exit(MISSING)
    os.execvpe("unshare", [*probe, sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True)


def make_hosts(count):
    """Hosts 1 to count, each with an address of its own, on one bridge."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    os.mkdir("/run/netns")
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge", "type", "bridge")
    ip("link", "set", "bridge", "up")
    for n in range(1, count + 1):
        ip("netns", "add", f"h{n}")
        ip("link", "add", f"v{n}", "type", "veth", "peer", "name", "eth0", "netns", f"h{n}")
        ip("link", "set", f"v{n}", "master", "bridge", "up")
        ip("-n", f"h{n}", "addr", "add", f"{NETWORK}.{n}/24", "dev", "eth0")
        for device in ["eth0", "lo"]:
            ip("-n", f"h{n}", "link", "set", device, "up")


class Eavesdropper:
    """Keeps every byte that passes between the hosts."""

    def __init__(self, count):
        self.heard = bytearray()
        self.over = False
        self.threads = [threading.Thread(target=self.listen, args=(f"v{n}",)) for n in range(1, count + 1)]
        for thread in self.threads:
            thread.start()

    def listen(self, device):
        all_frames = socket.htons(0x0003)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, all_frames) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
            line.bind((device, 0))
            line.settimeout(0.2)
            while not self.over:
                try:
                    frame = line.recv(1 << 17)
                except TimeoutError:
                    continue
                # Of what a host sends and another receives, once is enough.
                if len(self.heard) < 1 << 28:
                    self.heard += frame

    def end(self):
        self.over = True
        for thread in self.threads:
            thread.join()
        return bytes(self.heard)


class Cluster:
    """A coordinator on the first host, and a worker on each of the others."""

    def __init__(self, cohort, root, encrypted, workers, flags=(), of_worker=lambda host: ()):
        self.cohort, self.root, self.processes = cohort, Path(root), []
        self.home = self.root / "coordinator"
        listen = ["coordinator", "--listen", "0.0.0.0:7070", "--home", self.home, *flags]
        if encrypted:
            line = self.output(["init", "--name", f"{NETWORK}.1", "--home", self.home])
            line = next(l for l in line.splitlines() if "cohort worker" in l).split()
            variable, token = line[0].split("=")
            join, secret = line[2:], {variable: token}
            self.secret = token.split("_")[3].encode()
            self.client = []
        else:
            file = self.root / "token"
            file.write_text("a-token-that-all-share\n")
            listen += ["--insecure", "plaintext", "--token-file", file]
            join = ["worker", "--coordinator", f"http://{NETWORK}.1:7070", "--token-file", file]
            secret, self.secret = {}, b"a-token-that-all-share"
            self.client = ["--token-file", file]
        self.start(1, "coordinator", listen, "listening")
        for n in range(2, workers + 2):
            # These hosts have one memory, which must not be noticed.
            words = [*join, "--threads", 1, "--no-shared-memory", "--home", self.root / f"worker-{n}", *of_worker(n)]
            self.start(n, f"worker-{n}", words, "joined", secret)

    def on(self, host, words):
        # A host has a name of its own.
        named = ["unshare", "--uts", "sh", "-c", f'hostname h{host} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", f"h{host}", *named, self.cohort, *map(str, words)]

    def output(self, words):
        return subprocess.check_output([self.cohort, *map(str, words)], text=True)

    def start(self, host, name, words, sign, variables=None):
        log = self.root / f"{name}.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COHORT_")}
        environment |= {"COHORT_LOG": "info", **(variables or {})}
        with log.open("w") as out:
            process = subprocess.Popen(self.on(host, words), stdout=out, stderr=out, env=environment)
        self.processes.append(process)
        deadline = time.monotonic() + PATIENCE
        while sign not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} did not start:\n{log.read_text()}")
            time.sleep(0.02)

    def train(self, spec, corpus, options):
        """The events of a run, submitted on the coordinator's host."""
        words = ["pretrain", spec, "--corpus", corpus, "--name", "hosts-run", "--home", self.home, "--json", "--new", *self.client, *options]
        done = subprocess.run(self.on(1, words), capture_output=True, text=True)
        if done.returncode:
            logs = "\n".join(log.read_text()[-2000:] for log in self.root.glob("*.log"))
            sys.exit(f"the run failed: {done.stderr}\n{logs}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def end(self):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(timeout=PATIENCE)


def last(events, kind):
    return [event for event in events if event["event"] == kind][-1]


def step_ms(events):
    """The median time of a step but the first tenth."""
    steps = [event for event in events if event["event"] == "step"]
    tokens = steps[1]["tokens"] - steps[0]["tokens"]
    return statistics.median(1e3 * tokens / s["tokens_per_second"] for s in steps[len(steps) // 10 :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True, type=os.path.abspath)
    parser.add_argument("--rounds", type=int, default=5, help="the first is listened to, and not measured")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--json", type=Path, help="file for what was found")
    args = parser.parse_args()
    if INSIDE not in os.environ:
        enter()
    make_hosts(3)
    with tempfile.TemporaryDirectory(prefix="cohort-hosts-") as root:
        root = Path(root)
        corpus, spec = root / "text.txt", root / "spec.toml"
        sources = sorted((Path(__file__).parent.parent / "common" / "src").rglob("*.rs"))
        corpus.write_text("\n".join(path.read_text() for path in sources)[:400_000])
        spec.write_text(SPEC.format(hidden=args.hidden, steps=args.steps))
        local = subprocess.check_output(
            [args.cohort, "pretrain", spec, "--corpus", corpus, "--local", "1", "--home", root / "local", "--json"],
            text=True,
            stderr=subprocess.DEVNULL,
        )
        expected = last([json.loads(line) for line in local.splitlines()], "finished")["state_hash"]
        found = {"encrypted": [], "plain": []}
        for number in range(args.rounds):
            for kind in found:
                place = root / f"{kind}-{number}"
                place.mkdir()
                # The first round is listened to, and not measured.
                eavesdropper = Eavesdropper(3) if number == 0 else None
                cluster = Cluster(args.cohort, place, kind == "encrypted", 2)
                events = cluster.train(spec, corpus, ["--set", "train.min_workers=2"])
                cluster.end()
                if last(events, "finished")["state_hash"] != expected:
                    sys.exit(f"{kind}: another state than locally")
                if not eavesdropper:
                    found[kind].append(step_ms(events))
                    continue
                heard = eavesdropper.end()
                read = [word.decode() for word in [*READABLE, cluster.secret] if word in heard]
                print(f"{kind}: the state of the local run; of {len(heard):,} bytes heard, readable: {read or 'nothing'}", flush=True)
                if bool(read) != (kind == "plain"):
                    sys.exit("that is not as it should be")
    result = {"steps": args.steps, "hidden": args.hidden, **found}
    if found["plain"]:
        ratios = [a / b for a, b in zip(found["encrypted"], found["plain"])]
        result["ratio"] = statistics.median(ratios)
        print(f"a step takes {statistics.median(found['encrypted']):.1f} ms encrypted, {statistics.median(found['plain']):.1f} ms in plain text: x {result['ratio']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


SPEC = """
[model]
architecture = "llama"
hidden_size = {hidden}
num_hidden_layers = 4
num_attention_heads = 4
context = 64

[corpus]
split = "tail"

[tokenizer]
kind = "char"

[train]
steps = {steps}
lanes = 4
micro_batch = 4
eval_every = 0
eval_samples = 16
"""

if __name__ == "__main__":
    main()
