#!/usr/bin/env python3
"""Training over slow links: hosts in network namespaces, and between them a router in this process, which lets each host send
and receive so many bits a second and delays every packet.

    python3 bench/links.py --cohort target/release/cohort [--python PYTHON] [--links 100:25,1000:2.5] [--modes ...] [--json FILE]

A coordinator has one host, and each of four workers of one thread another. `--links` are Mbit/s and milliseconds of delay in
each direction; `0:0` is a link that bounds nothing; `--slow` makes the line of one worker slower. With `--sites` every two workers
are at one place: nothing is in the way between them, and they share the line to the others. The model has 12 million parameters (llama, 6 layers, 384 wide), a lane's
step 256 tokens. For each mode: tokens per second and bytes that passed the router per token, from the first step to the last;
with `--python` also torch's DistributedDataParallel over gloo, on four of the same hosts.

Needs Linux, `ip`, /dev/net/tun and the right to make namespaces. Exits with 77 where that is missing. Nothing outside the
namespaces is touched. What a run comes to does not depend on links: losses are measured without (`bench/run.py rounds`).
"""

import argparse
import fcntl
import heapq
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hosts import INSIDE, MISSING, Cluster, enter, ip

NETWORK = "10.77.0"
WORKERS = 4
TOKENS = 256
# Large packets, so that the router costs little of the two cores that train.
MTU = 32_000
# Seconds of backlog from which on a host's packets are dropped.
BACKLOG = 0.25

MODES = {
    "f32": (6, ""),
    "f32, one level": (6, ""),
    "f32, moments divided": (6, "", "--optimizer", "sharded"),
    "bf16": (6, "payload=bf16"),
    "int8": (10, "payload=int8"),
    "int8, one level": (10, "payload=int8"),
    "int4": (10, "payload=int4"),
    "diloco 10, int8": (6, "sync=diloco inner_steps=10 payload=int8"),
    "diloco 50, int8": (3, "sync=diloco inner_steps=50 payload=int8"),
    "diloco 50, int4": (3, "sync=diloco inner_steps=50 payload=int4"),
    "diloco 100, int8": (2, "sync=diloco inner_steps=100 payload=int8"),
}

# Only where workers are at several places: those of one do not add up first what goes to another.
ONE_LEVEL = [mode for mode in MODES if mode.endswith("one level")]

# Of runs whose speed is measured.
SHORT = ["eval_every=0", "eval_samples=1", "warmup_steps=0", f"min_workers={WORKERS}"]


class Router:
    """Carries packets between hosts 1 to `count`."""

    def __init__(self, count, sites):
        # Each host's line; two of a site have one.
        self.line = [host if host < 2 or not sites else 2 + (host - 2) // 2 for host in range(count + 1)]
        ip("link", "set", "lo", "up")
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
        os.mkdir("/run/netns")
        self.rates, self.delay, self.passed = [0.0] * (count + 1), 0.0, 0
        self.up, self.down = [0.0] * (count + 1), [0.0] * (count + 1)
        self.waiting, self.number, self.change = [], 0, threading.Condition()
        self.devices = [None]
        for n in range(1, count + 1):
            ip("netns", "add", f"h{n}")
            device = os.open("/dev/net/tun", os.O_RDWR)
            tun, no_header = 0x0001, 0x1000
            fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", f"t{n}".encode(), tun | no_header))
            ip("link", "set", f"t{n}", "netns", f"h{n}")
            on = ["-n", f"h{n}"]
            ip(*on, "addr", "add", f"{NETWORK}.{n}/24", "dev", f"t{n}")
            ip(*on, "link", "set", f"t{n}", "mtu", MTU, "up")
            ip(*on, "link", "set", "lo", "up")
            self.devices.append(device)
        for n in range(1, count + 1):
            threading.Thread(target=self.read, args=(n,), daemon=True).start()
        threading.Thread(target=self.deliver, daemon=True).start()

    def set(self, megabits, milliseconds, slow=None):
        """Every host's rate, but the last one's if `slow` is another."""
        with self.change:
            self.rates = [megabits * 1e6 / 8] * len(self.rates)
            self.rates[-1] = (slow or megabits) * 1e6 / 8
            self.delay = milliseconds / 1e3

    def read(self, source):
        while True:
            packet = os.read(self.devices[source], 1 << 16)
            # Only what is IPv4 and goes to a host.
            if packet[0] >> 4 != 4 or packet[16:19] != bytes(map(int, NETWORK.split("."))):
                continue
            target = packet[19]
            if not 0 < target < len(self.devices):
                continue
            out, into = self.line[source], self.line[target]
            if out == into:
                os.write(self.devices[target], packet)
                continue
            now = time.monotonic()
            with self.change:
                goes, comes = (len(packet) / rate if rate else 0.0 for rate in (self.rates[out], self.rates[into]))
                sent = max(now, self.up[out]) + goes
                if sent - now > BACKLOG:
                    continue
                self.up[out] = sent
                at = max(sent, self.down[into] + comes)
                if at - now > 2 * BACKLOG:
                    continue
                self.down[into] = at
                self.passed += len(packet)
                self.number += 1
                heapq.heappush(self.waiting, (at + self.delay, self.number, target, packet))
                self.change.notify()

    def deliver(self):
        while True:
            with self.change:
                while not self.waiting:
                    self.change.wait()
                left = self.waiting[0][0] - time.monotonic()
                if left > 0:
                    self.change.wait(left)
                    continue
                _, _, target, packet = heapq.heappop(self.waiting)
            os.write(self.devices[target], packet)


def cohort(args, router, root, mode, link):
    """Tokens per second and bytes per token of a run, from its first step to its last."""
    steps, settings, *flags = MODES[mode]
    place = root / f"{mode}-{link}".replace(" ", "-")
    place.mkdir()
    spec, corpus = Path(__file__).with_name("links.toml"), root / "text.txt"
    router.set(0, 0)
    alone = lambda host: ["--site", f"h{host}"] if mode in ONE_LEVEL else []
    cluster = Cluster(args.cohort, place, False, WORKERS, flags, alone)
    router.set(*link, args.slow)
    settings = [f"steps={steps}", *SHORT, *settings.split()]
    options = [word for setting in settings for word in ("--set", f"train.{setting}")]
    words = ["pretrain", spec, "--corpus", corpus, "--name", "links", "--home", cluster.home, "--json", "--new", *cluster.client]
    run = subprocess.Popen(cluster.on(1, [*words, *options]), stdout=subprocess.PIPE, text=True)
    seen = []
    for line in run.stdout:
        event = json.loads(line)
        if event["event"] == "step":
            seen.append((time.monotonic(), event["tokens"], router.passed))
    code = run.wait()
    router.set(0, 0)
    cluster.end()
    if code or len(seen) != steps:
        sys.exit(f"{mode}: the run failed")
    (begin, first, before), (end, last, after) = seen[0], seen[-1]
    return {"tokens_per_s": (last - first) / (end - begin), "bytes_per_token": (after - before) / (last - first)}


def ddp(args, router, link):
    """The same of torch over gloo, whose hosts are those of the workers."""
    router.set(*link, args.slow)
    script = Path(__file__).with_name("step_pytorch.py")
    command = [args.python, script, "links", "--threads", "1", "--ddp", "--json", "--steps", str(args.ddp_steps)]
    processes, before = [], router.passed
    for rank in range(WORKERS):
        host = rank + 2
        group = {"WORLD_SIZE": WORKERS, "RANK": rank, "MASTER_ADDR": f"{NETWORK}.2", "MASTER_PORT": 29400, "GLOO_SOCKET_IFNAME": f"t{host}"}
        environment = os.environ | {key: str(value) for key, value in group.items()}
        words = ["ip", "netns", "exec", f"h{host}", *map(str, command)]
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    rows = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    router.set(0, 0)
    # The parameters of the first are sent to the others once, before the steps.
    tokens = WORKERS * TOKENS * (args.ddp_steps + 1)
    return {"tokens_per_s": sum(row["tokens_per_s"] for row in rows), "bytes_per_token": (router.passed - before) / tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True, type=os.path.abspath)
    parser.add_argument("--python", help="one that has torch")
    parser.add_argument("--links", default="0:0,100:25,1000:2.5")
    parser.add_argument("--modes", default=";".join(mode for mode in MODES if mode not in ONE_LEVEL), help="separated by semicolons")
    parser.add_argument("--sites", action="store_true", help="every two workers are at one place")
    parser.add_argument("--slow", type=float, help="Mbit/s of the last worker's line, where it is another than the others'")
    parser.add_argument("--ddp-steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for what was found")
    args = parser.parse_args()
    if INSIDE not in os.environ:
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            print("there is no /dev/net/tun", file=sys.stderr)
            sys.exit(MISSING)
        enter()
    links = [tuple(map(float, link.split(":"))) for link in args.links.split(",")]
    router, rows = Router(WORKERS + 1, args.sites), []
    with tempfile.TemporaryDirectory(prefix="cohort-links-") as root:
        root = Path(root)
        sources = sorted((Path(__file__).parent.parent / "common" / "src").rglob("*.rs"))
        (root / "text.txt").write_text("\n".join(path.read_text() for path in sources)[:1_500_000])
        for link in links:
            names = ["ddp", *args.modes.split(";")] if args.python else args.modes.split(";")
            for mode in names:
                found = ddp(args, router, link) if mode == "ddp" else cohort(args, router, root, mode, link)
                rows.append({"mode": mode, "megabits": link[0], "delay_ms": link[1], **found})
                print(f"{link[0]:5.0f} Mbit/s {link[1]:5.1f} ms  {mode:18} {found['tokens_per_s']:8.0f} tokens/s {found['bytes_per_token']:10.0f} bytes per token", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
