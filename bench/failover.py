#!/usr/bin/env python3
"""How long a run stands when the coordinator's machine is gone for good, and what it pays for the others that stand by.

Two coordinators share an object store (one of this script's own, on this machine), two workers train. The one that leads is killed with
SIGKILL and its home is deleted; then the other leads. Measured is the time from the kill to the first step that is committed
after it, with leases of several lengths; beside it the time where the coordinator is started again on its home at once. The
run's end must be that of an undisturbed one, to the bit, and its ledger sound. At last, undisturbed steps with `--failover`
are compared with undisturbed steps with `--store` alone, in turn.

    python3 bench/failover.py --cohort target/release/cohort
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATIENCE = 240
SPEC = """
[model]
architecture = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 128
context = 64

[corpus]
split = "tail"

[tokenizer]
kind = "bpe"
vocab_size = 300

[train]
lanes = 4
micro_batch = 2
learning_rate = 0.01
warmup_steps = 2
eval_every = 100

[checkpoint]
every = 100
keep = 2
"""


class S3(BaseHTTPRequestHandler):
    """As much of S3's protocol as is asked for here, in memory: whole objects, lists, deletions, conditional writes."""

    protocol_version = "HTTP/1.1"
    objects, uploads, lock = {}, {}, threading.Lock()

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def key(self):
        parts = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(parts.path).lstrip("/"), urllib.parse.parse_qs(parts.query, keep_blank_values=True)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @staticmethod
    def tag(content):
        return '"%s"' % hashlib.md5(content).hexdigest()

    def do_GET(self):
        key, query = self.key()
        with self.lock:
            if "list-type" in query:
                bucket = key.rstrip("/")
                prefix = query.get("prefix", [""])[0]
                found = {k[len(bucket) + 1 :]: v for k, v in self.objects.items() if k.startswith(f"{bucket}/{prefix}")}
            content = self.objects.get(key)
        if "list-type" in query:
            rows = "".join(
                f"<Contents><Key>{k}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{self.tag(v)}</ETag><Size>{len(v)}</Size></Contents>"
                for k, v in sorted(found.items())
            )
            xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
            return self.answer(200, xml.encode())
        if content is None:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        headers = {"ETag": self.tag(content), "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if span := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], **headers)
        self.answer(200, content, **headers)

    do_HEAD = do_GET

    def do_PUT(self):
        key, query = self.key()
        content = self.body()
        with self.lock:
            if "uploadId" in query:
                self.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = content
                return self.answer(200, ETag=self.tag(content))
            old = self.objects.get(key)
            wanted = self.headers.get("If-Match")
            if wanted and (old is None or self.tag(old) != wanted):
                return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            if self.headers.get("If-None-Match") == "*" and old is not None:
                return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            self.objects[key] = content
        self.answer(200, ETag=self.tag(content))

    def do_POST(self):
        key, query = self.key()
        body = self.body().decode()
        with self.lock:
            if "uploads" in query:
                name = f"upload-{len(self.uploads)}"
                self.uploads[name] = {}
                xml = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            elif "uploadId" in query:
                parts = self.uploads.pop(query["uploadId"][0])
                self.objects[key] = b"".join(parts[n] for n in sorted(parts))
                xml = f"<CompleteMultipartUploadResult><ETag>{self.tag(self.objects[key])}</ETag></CompleteMultipartUploadResult>"
            else:
                bucket, names = key.rstrip("/"), re.findall(r"<Key>(.*?)</Key>", body)
                for name in names:
                    self.objects.pop(f"{bucket}/{name}", None)
                deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
                xml = f"<DeleteResult>{deleted}</DeleteResult>"
        self.answer(200, xml.encode())

    def do_DELETE(self):
        key, _ = self.key()
        with self.lock:
            self.objects.pop(key, None)
        self.answer(204)


class Cluster:
    """Processes in a directory of their own, on one store."""

    def __init__(self, binary, store):
        self.binary = binary
        self.directory = Path(tempfile.mkdtemp(prefix="cohort-failover-"))
        self.processes = []
        (self.directory / "spec.toml").write_text(SPEC)
        words = ["lane", "tree", "step", "root", "sums", "worker", "holds", "sends", "commit", "waits", "ledger"]
        (self.directory / "text.txt").write_text(" ".join(words[i * i % 11] + " " + words[i * 7 % 11] for i in range(20000)))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("COHORT_", "AWS_"))}
        self.environment.update(
            COHORT_HOME=str(self.directory / "client"), AWS_ENDPOINT_URL=store, AWS_ALLOW_HTTP="true", AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_REGION="us-east-1"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self, *arguments):
        process = subprocess.Popen(
            [self.binary, *map(str, arguments)], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        process.lines = []

        def read():
            for line in process.stderr:
                process.lines.append(line)

        threading.Thread(target=read, daemon=True).start()
        self.processes.append(process)
        return process

    def coordinator(self, home, *flags, listen="127.0.0.1:0"):
        process = self.start("coordinator", "--listen", listen, "--home", home, *flags)
        line = wait(lambda: next((l for l in process.lines if "listening" in l), None), "a coordinator")
        return process, re.search(r"https?://[0-9.:]+", line).group()

    def workers(self, urls):
        return [self.start("worker", "--coordinator", urls, "--threads", 1, "--home", f"worker-{n}") for n in (1, 2)]

    def run(self, *arguments):
        done = subprocess.run(
            [self.binary, *map(str, arguments), "--json"], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            sys.exit(f"cohort {' '.join(map(str, arguments))}: {done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def step(self, urls):
        runs = self.run("runs", "--coordinator", urls)
        return runs[0]["step"] if runs else 0


def wait(holds, what):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.02)
    sys.exit(f"not in time: {what}")


def pretrain(steps):
    return ["pretrain", "spec.toml", "--corpus", "text.txt", "--name", "run", "--set", f"train.steps={steps}"]


def expected(binary, store, steps):
    with Cluster(binary, store) as cluster:
        return next(e for e in cluster.run(*pretrain(steps), "--local", 1) if e.get("event") == "finished")["state_hash"]


def followed(cluster, urls, steps):
    """A command that follows the run, and when each of its events came."""
    process = subprocess.Popen(
        [cluster.binary, *pretrain(steps), "--coordinator", urls, "--json"], cwd=cluster.directory, env=cluster.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    cluster.processes.append(process)
    events = []

    def read():
        for line in process.stdout:
            events.append((time.monotonic(), json.loads(line)))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return process, thread, events


def newest(events):
    return max((e["step"] for _, e in events if e.get("event") == "step"), default=0)


def lose(binary, store, steps, lease, hash_expected, again):
    """Seconds until the next step that is committed, after the leader was killed: with its machine, or started again."""
    with Cluster(binary, store) as cluster:
        flags = ["--store", f"s3://bucket/{cluster.directory.name}"]
        flags += ["--failover", "--lease", lease] if lease else []
        first, one = cluster.coordinator("first", *flags)
        urls = one
        if not again:
            urls += "," + cluster.coordinator("second", *flags)[1]
        cluster.workers(urls)
        process, thread, events = followed(cluster, urls, steps)
        wait(lambda: newest(events) > steps // 8, "steps")
        first.send_signal(signal.SIGKILL)
        first.wait()
        killed = time.monotonic()
        before = newest(events)
        if again:
            cluster.coordinator("first", *flags, listen=one.split("://")[1])
            process.wait()
            process, thread, events = followed(cluster, urls, steps)
        else:
            shutil.rmtree(cluster.directory / "first")
        process.wait(timeout=PATIENCE)
        thread.join()
        texts = [(at, e.get("text", "")) for at, e in events if at > killed]
        came_back = [re.search(r"came back with the state of step (\d+)", text) for _, text in texts]
        loaded = [e["step"] for at, e in events if at > killed and e.get("event") == "loading"]
        held = max([int(found[1]) for found in came_back if found] + loaded)
        first_new = min(at for at, e in events if at > killed and e.get("event") == "step" and e["step"] > held)
        end = next(e for _, e in events if e.get("event") == "finished")
        cluster.run("verify", "run", "--coordinator", urls)
        if end["state_hash"] != hash_expected:
            sys.exit(f"another state: {end}")
        return {"seconds": first_new - killed, "recomputed": max(0, before - held)}


def speed(binary, store, steps, flags):
    """Seconds of an undisturbed run's steps; with flags of failover, while another coordinator stands by."""
    with Cluster(binary, store) as cluster:
        flags = ["--store", f"s3://bucket/{cluster.directory.name}", *flags]
        _, url = cluster.coordinator("first", *flags)
        if "--failover" in flags:
            cluster.coordinator("second", *flags)
        cluster.workers(url)
        process, thread, events = followed(cluster, url, steps)
        process.wait(timeout=PATIENCE)
        thread.join()
        at = {e["step"]: when for when, e in events if e.get("event") == "step"}
        return at[steps] - at[steps // 10]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True, type=os.path.abspath)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leases", type=float, nargs="+", default=[3, 10])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), S3)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store = f"http://127.0.0.1:{server.server_address[1]}"
    reference = expected(args.cohort, store, args.steps)
    rows = [{"what": "its machine is gone", "lease_s": lease, "lost": []} for lease in args.leases]
    rows.append({"what": "it is started again on its home", "lease_s": None, "lost": []})
    for _ in range(args.rounds):
        for row in rows:
            lost = lose(args.cohort, store, args.steps, row["lease_s"], reference, row["lease_s"] is None)
            row["lost"].append(lost)
    speeds = {"store": [], "failover": []}
    for _ in range(args.rounds):
        speeds["store"].append(speed(args.cohort, store, args.steps, []))
        speeds["failover"].append(speed(args.cohort, store, args.steps, ["--failover"]))
    ratio = statistics.median(b / a for a, b in zip(speeds["store"], speeds["failover"]))
    found = {"lost": rows, "same_bits": True, "steps": args.steps, "seconds": speeds, "ratio": ratio}
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
