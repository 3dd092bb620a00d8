#!/usr/bin/env python3
"""Trains from and to an S3 server of somebody else's (moto, from PyPI: `pip install 'moto[server]'`).

Text is read from a bucket. A run copies its checkpoints there; then coordinator and worker are killed with SIGKILL, the home
is deleted, and a coordinator on an empty home goes on from the store alone. Its end must be that of an undisturbed run, to the
bit. Between the processes and the server stands a proxy that, now and then, cuts a connection in the middle of a body, stalls,
or answers 503.

    python3 tests/store.py target/release/cohort

prints what it did as JSON. tests/store.rs runs it where python3 has moto.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SPEC = """
[model]
architecture = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 128
context = 32

[corpus]
split = "tail"

[tokenizer]
kind = "bpe"
vocab_size = 300

[train]
steps = {steps}
lanes = 4
micro_batch = 2
learning_rate = 0.01
warmup_steps = 2
eval_every = 50

[checkpoint]
every = 20
keep = 2
"""
DEADLINE = 240


def words(seed, count):
    choose = random.Random(seed)
    vocabulary = ["%s%s" % (a, b) for a in ("ba", "ne", "ti", "lo", "su") for b in ("r", "n", "st", "k", "")]
    return " ".join(choose.choice(vocabulary) for _ in range(count)) + "\n"


class Proxy:
    """Passes bytes between clients and the server, and disturbs every sixth connection."""

    def __init__(self, upstream):
        self.upstream = upstream
        self.faults = 0
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            self.connections += 1
            fault = self.connections % 18
            threading.Thread(target=self.serve, args=(client, fault), daemon=True).start()

    def serve(self, client, fault):
        if fault == 6:
            self.faults += 1
            client.recv(65536)
            client.sendall(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            client.close()
            return
        server = socket.create_connection(self.upstream)
        threading.Thread(target=self.pump, args=(client, server, None), daemon=True).start()
        # What comes back is cut after some bytes, or stands still for a while.
        after = {12: ("cut", 300), 17: ("stall", 300)}.get(fault)
        self.pump(server, client, after)

    def pump(self, source, sink, fault):
        passed = 0
        try:
            while data := source.recv(65536):
                if fault and passed + len(data) > fault[1]:
                    self.faults += 1
                    if fault[0] == "cut":
                        sink.sendall(data[: max(fault[1] - passed, 0)])
                        break
                    time.sleep(2)
                    fault = None
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()


class Scene:
    def __init__(self, binary, directory, store_url):
        self.binary, self.directory = binary, Path(directory)
        self.processes = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("COHORT_", "AWS_"))},
            "COHORT_HOME": str(self.directory / "home"),
            "AWS_ENDPOINT_URL": store_url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
        }
        self.directory.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments):
        log = open(self.directory / ("%s.log" % arguments[0]), "ab")
        process = subprocess.Popen(
            [self.binary, *arguments], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def run(self, *arguments):
        done = subprocess.run(
            [self.binary, *arguments, "--json"], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=DEADLINE)
        if done.returncode != 0:
            logs = "\n".join(p.read_text()[-2000:] for p in self.directory.glob("*.log"))
            sys.exit("cohort %s: %s\n%s" % (" ".join(arguments), done.stderr.decode(), logs))
        return [json.loads(line) for line in done.stdout.splitlines()]

    def cluster(self, *flags):
        """Starts a coordinator and a worker; gives the coordinator's address."""
        holder = self.directory / "home" / "lock"
        self.start("coordinator", "--listen", "127.0.0.1:0", *flags)
        url = wait(lambda: holder.exists() and address(holder.read_text()), "the coordinator")
        self.start("worker", "--coordinator", url, "--threads", "1", "--home", "cache")
        return url

    def kill(self):
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.processes = []

    def info(self, url, run):
        return next((r for r in self.run("runs", "--coordinator", url) if r["name"] == run), None)


def address(text):
    found = re.search(r"http://[0-9.:]+", text)
    return found and found.group()


def wait(holds, what):
    deadline = time.time() + DEADLINE
    while time.time() < deadline:
        if found := holds():
            return found
        time.sleep(0.05)
    sys.exit("not in time: %s" % what)


def finished(events):
    return next(e for e in reversed(events) if e.get("event") == "finished")


def main(binary, steps=1500):
    from moto.server import ThreadedMotoServer
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url="http://%s:%d" % (host, port), region_name="us-east-1",
                          aws_access_key_id="testing", aws_secret_access_key="testing")
    client.create_bucket(Bucket="bucket")
    proxy = Proxy((host, port))
    directory = Path(tempfile.mkdtemp(prefix="cohort-store-"))
    try:
        report = play(binary, directory, client, proxy, steps)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        server.stop()
    print(json.dumps(report, indent=1))


def play(binary, directory, client, proxy, steps):
    spec = SPEC.format(steps=steps)
    texts = {"books/%d.txt" % i: words(i, 6000) for i in range(6)}
    for key, text in texts.items():
        client.put_object(Bucket="bucket", Key=key, Body=text.encode())

    # Undisturbed, and from the same text on disk.
    whole = Scene(binary, directory / "whole", proxy.url)
    (whole.directory / "books").mkdir()
    for key, text in texts.items():
        (whole.directory / key).write_text(text)
    (whole.directory / "spec.toml").write_text(spec)
    expected = finished(whole.run("pretrain", "spec.toml", "--corpus", "books/", "--local", "1", "--name", "whole"))

    first = Scene(binary, directory / "first", proxy.url)
    (first.directory / "spec.toml").write_text(spec)
    store = ("--store", "s3://bucket/cohort")
    url = first.cluster(*store)
    line = ("pretrain", "spec.toml", "--corpus", "s3://bucket/books/", "--name", "cut", "--coordinator", url)
    first.run(*line, "--detach")
    stored = lambda: [s for s in (first.info(url, "cut") or {}).get("stored", {}).get("steps", []) if s >= 60]
    wait(stored, "a copy of a checkpoint")
    killed_at = first.info(url, "cut")["step"]
    first.kill()
    shutil.rmtree(first.directory)

    second = Scene(binary, directory / "second", proxy.url)
    began = time.time()
    url = second.cluster(*store)
    found = second.info(url, "cut")
    second.run("resume", "cut", "--coordinator", url)
    wait(lambda: second.info(url, "cut")["status"] == "running", "the run")
    back = time.time() - began
    last = finished(second.run("follow", "cut", "--coordinator", url))
    second.run("verify", "cut", "--coordinator", url)
    second.kill()
    keys = [o["Key"] for o in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
    same = last["state_hash"] == expected["state_hash"]
    report = {
        "same_bits": same,
        "state_hash": last["state_hash"],
        "steps": steps,
        "killed_at": killed_at,
        "resumed_from": found["step"],
        "seconds_until_it_trains_again": round(back, 2),
        "connections": proxy.connections,
        "faults": proxy.faults,
        "objects": len(keys),
    }
    if not same:
        sys.exit("another state: %s" % json.dumps(report))
    return report


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), *map(int, sys.argv[2:]))
