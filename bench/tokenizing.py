"""Text to tokens: `cohort corpus prepare` with one and with two workers of one thread, against Hugging Face's `datasets` and
`tokenizers` with one and with two processes, on the same files and with the same tokenizer.

    pip install datasets tokenizers
    python bench/tokenizing.py --cohort target/release/cohort [--python PYTHON] [--copies N] [--rounds N] [--json FILE] FILES...

Each side starts with the files and ends with tokens on the disk, read, encoded and written. Cohort's time is that of the
whole command: it also hashes and checks the files, splits them, and counts its n-gram baselines. The other side loads the
files with `load_dataset("text")`, encodes with `map` in batches, and saves with `save_to_disk`; its caches are empty. The
files are there `--copies` times, under other names, so that a run takes seconds. Runs of both take turns.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PIPELINE = """
import sys, time
from datasets import load_dataset
from tokenizers import Tokenizer
files, tokenizer, out, processes = sys.argv[4:], sys.argv[1], sys.argv[2], int(sys.argv[3])
begin = time.perf_counter()
tokenizer = Tokenizer.from_file(tokenizer)
texts = load_dataset("text", data_files=files, sample_by="document", split="train")
encode = lambda batch: {"ids": [e.ids for e in tokenizer.encode_batch(batch["text"])]}
tokens = texts.map(encode, batched=True, batch_size=8, num_proc=processes if processes > 1 else None, remove_columns=["text"])
tokens.save_to_disk(out)
print(time.perf_counter() - begin)
"""


class Cluster:
    """A coordinator and workers of one thread, in a home of their own."""

    def __init__(self, binary, directory, workers):
        self.binary, self.home = binary, Path(directory) / "home"
        self.processes = [self.start("coordinator", "--listen", "127.0.0.1:0", "--home", self.home)]
        self.url = re.search(r"http://[0-9.:]+", self.wait_for("http://")).group()
        for number in range(workers):
            cache = Path(directory) / f"cache-{number}"
            options = ["--coordinator", self.url, "--threads", "1", "--home", cache]
            self.processes.append(self.start("worker", *options))
            self.wait_for("joined")

    def start(self, *arguments):
        command = [self.binary, *map(str, arguments)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait_for(self, text):
        for line in self.processes[-1].stderr:
            if text in line:
                return line
        sys.exit(f"`{text}` was not said")

    def prepare(self, *options):
        command = [self.binary, "corpus", "prepare", *map(str, options), "--coordinator", self.url, "--home", self.home, "--json"]
        begin = time.perf_counter()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - begin
        return seconds, json.loads(said.splitlines()[-1])["fingerprint"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def ours(binary, workers, tokenizer, files):
    with tempfile.TemporaryDirectory() as directory, Cluster(binary, directory, workers) as cluster:
        return cluster.prepare(*files, "--tokenizer", tokenizer)


def theirs(python, processes, tokenizer, files):
    with tempfile.TemporaryDirectory() as directory:
        threads = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": directory}
        command = [python, "-c", PIPELINE, str(tokenizer), f"{directory}/out", str(processes), *map(str, files)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
        return float(said.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--python", help="a Python that has datasets and tokenizers")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", default="8192")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        files = []
        for copy in range(args.copies):
            for file in args.files:
                files.append(Path(directory) / f"{copy}-{file.name}")
                shutil.copyfile(file, files[-1])
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        tokenizer = Path(directory) / "tokenizer.json"
        with tempfile.TemporaryDirectory() as home, Cluster(args.cohort, home, 0) as cluster:
            _, fingerprint = cluster.prepare(*args.files, "--vocab-size", args.vocab_size)
            shutil.copyfile(cluster.home / "corpora" / fingerprint / "tokenizer.json", tokenizer)
        found, fingerprints = {}, set()
        for _ in range(args.rounds):
            for workers in (1, 2):
                seconds, fingerprint = ours(args.cohort, workers, tokenizer, files)
                fingerprints.add(fingerprint)
                found.setdefault(f"ours {workers}", []).append(megabytes / seconds)
                if args.python:
                    speed = megabytes / theirs(args.python, workers, tokenizer, files)
                    found.setdefault(f"theirs {workers}", []).append(speed)
        if len(fingerprints) != 1:
            sys.exit(f"the corpus depends on the workers: {fingerprints}")
    for what, speeds in found.items():
        print(f"{what}: {statistics.median(speeds):.1f} MB/s of {sorted(round(s, 1) for s in speeds)}")
    if args.json:
        args.json.write_text(json.dumps({"megabytes": megabytes, "speeds": found}))


if __name__ == "__main__":
    main()
