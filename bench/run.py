#!/usr/bin/env python3
"""Benchmarks of Cohort, each beside what people would use otherwise.

    python3 bench/run.py engine            one training step against PyTorch: tokens/s and peak memory
    python3 bench/run.py lanes             eight lanes against one lane of the same tokens
    python3 bench/run.py workers           two workers of one thread against one, and DDP over gloo
    python3 bench/run.py overhead          `--local 1` against the same steps in one process without a cluster
    python3 bench/run.py exchange          the exchange alone, gloo, and a ring over TCP
    python3 bench/run.py text TEXT         from raw text to a trained nanoGPT character model, against PyTorch
    python3 bench/run.py preset TEXT       the preset shakespeare-cpu
    python3 bench/run.py dedup TEXT        preparing a corpus, with and without filters and duplicates: MB/s
    python3 bench/run.py gpu               one training step on the first NVIDIA GPU, against PyTorch
    python3 bench/run.py page              a run of a million steps with 64 workers, looked at
    python3 bench/run.py watching          what a run pays for being watched
    python3 bench/run.py tls               what encryption costs between three hosts, in network namespaces
    python3 bench/run.py rounds TEXT       losses after equal tokens, exchanged in every step and after rounds of inner steps
    python3 bench/run.py trained TEXT      the same, of runs that begin with weights that were trained in steps
    python3 bench/run.py memory            peak memory of each worker, with moments that are divided among them and without
    python3 bench/run.py uneven            one slow line of four: slices that follow the lines, and equal ones
    python3 bench/run.py sites             two places with two workers each: what goes from one to the other is added up first, and is not
    python3 bench/run.py links             speed over slow links, in network namespaces, beside DistributedDataParallel
    python3 bench/run.py scale             the coordinator with 10 to 1,000 workers, and with 8 cores 2,000: what a step costs it
    python3 bench/run.py tokenize BOOKS    text to tokens on one and two workers, beside Hugging Face's datasets and tokenizers
    python3 bench/run.py failover          how long a run stands when the coordinator's machine is gone, and what standing by costs
    python3 bench/run.py table             BENCHMARKS.md from the results
    python3 bench/run.py smoke             the smallest run of each that needs neither a GPU nor a browser

Options: --python PATH (an interpreter with torch: `python3 -m venv v && v/bin/pip install torch numpy`; without one, the
other side is left out), --rounds N (pairs; default 5), --seconds S (of one measurement; default 3), --quick (the smallest
run that shows that all still works; leaves the results alone, and needs no TEXT), --mode M (of `rounds` and `trained`, may be
repeated: measures this way of exchanging alone, and keeps the results of the others), --profile P (default `release`; `dev` is
built sooner, for --quick), --step PATH (the bench `step`, where it was built elsewhere), --cohort PATH (the binary, likewise).

What is compared runs in turn, so that a change of the machine's mood meets both. Figures are medians over the rounds, and a
ratio is the median of the rounds' ratios. Results lie in bench/results/NAME.json, with every single measurement.
"""

import argparse
import atexit
import concurrent.futures
import contextlib
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
median = statistics.median


def run(command, env=None):
    """The JSON lines that a command prints."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"failed with code {done.returncode}: {' '.join(map(str, command))}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def bench_binary(args, name, options=()):
    """Builds a bench and returns where it lies."""
    command = ["cargo", "bench", "--bench", name, "--profile", args.profile, "--no-run", "--message-format=json", *options]
    found = [m for m in run(command) if m.get("target", {}).get("name") == name and m.get("executable")]
    return found[-1]["executable"]


def cohort(args):
    """Builds the binary, unless it is given, and returns where it lies."""
    if args.cohort:
        return args.cohort
    command = ["cargo", "build", "--bin", "cohort", "--profile", args.profile, "--message-format=json"]
    return [m for m in run(command) if m.get("target", {}).get("name") == "cohort" and m.get("executable")][-1]["executable"]


def machine(args):
    facts = {"date": time.strftime("%Y-%m-%d"), "system": platform.platform(terse=True), "cores": os.cpu_count()}
    try:
        info = Path("/proc/cpuinfo").read_text()
        facts["processor"] = next(l.split(":")[1].strip() for l in info.splitlines() if l.startswith("model name"))
        flags = next(l for l in info.splitlines() if l.startswith("flags")).split()
        wanted = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
        facts["features"] = " ".join(f for f in wanted if f in flags)
    except (OSError, StopIteration):
        facts["processor"] = platform.processor()
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpu"] = subprocess.check_output(query, text=True).strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts["commit"] = commit.stdout.strip()
    if args.python:
        # One environment has what one comparison needs.
        find = "import importlib.util as u, importlib.metadata as m; print(*(p + ' ' + m.version(p) for p in ['torch', 'datasets', 'tokenizers'] if u.find_spec(p)), sep=', ')"
        facts["python"] = subprocess.check_output([args.python, "-c", find], text=True).strip()
    return facts


def save(args, name, rows, rounds=None):
    result = {"machine": machine(args), "rounds": rounds or args.rounds, "rows": rows}
    if args.quick:
        print(f"{name} works")
    else:
        print(json.dumps(result, indent=1))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def engine(args):
    ours, rows = bench_binary(args, "step"), []
    models = ["a"] if args.quick else ["a", "b-llama", "b-gpt2", "b-llama --bf16", "b-gpt2 --bf16", "c", "b-llama --gradient-checkpointing"]
    for model in models:
        row = {"model": model.replace(" --", " ").replace("-checkpointing", " checkpointing"), "ours": [], "theirs": []}
        for _ in range(args.rounds):
            row["ours"] += run([ours, *model.split(), "--seconds", str(args.seconds), "--json"])
            if args.python:
                script = ["bench/step_pytorch.py", *model.split(), "--seconds", str(args.seconds), "--json"]
                row["theirs"] += run([args.python, *script, "--threads", str(os.cpu_count())])
        rows.append(row)
    # With AMX the rows in bf16 say something else, and without AVX-512 all of them do.
    features = machine(args).get("features", "").split()
    save(args, "engine_amx" if "amx_bf16" in features else "engine" if "avx512f" in features else "engine_avx2", rows)


def gpu(args):
    ours, rows = args.step or bench_binary(args, "step", ["-p", "cohort-worker", "--features", "cuda"]), []
    models = ["b-llama"] if args.quick else ["gpt2", "gpt2 --bf16", "b-llama", "b-llama --bf16", "c", "c --bf16"]
    for model in models:
        row = {"model": model.replace(" --", " "), "ours": [], "theirs": []}
        options = ["--device", "cuda:0", "--seconds", str(args.seconds), "--json"]
        for _ in range(args.rounds):
            row["ours"] += run([ours, *model.split(), *options])
            if args.python:
                row["theirs"] += run([args.python, "bench/step_pytorch.py", *model.split(), *options])
        rows.append(row)
    save(args, "gpu", rows)


def lanes(args):
    command = [bench_binary(args, "step"), "lanes", "--seconds", str(args.seconds), "--json"]
    if args.quick:
        command += ["--tokens", "64"]
    save(args, "lanes", [r for _ in range(args.rounds) for r in run(command)])


# Specs whose steps are those of the models of the engine's bench: A with its own text, B on 8 lanes of one sample.
SPECS = {
    "a": ["--preset", "nanogpt-shakespeare-cpu", "--set", "train.eval_every=0"],
    "b": ["--preset", "small", "--set", "train.micro_batch=1", "--set", "train.eval_every=0"],
}


def train(binary, spec, text, workers, threads, steps):
    """Tokens per second of a run on a private cluster: the median over twenty stretches of it, after its first tenth.

    Of single steps the times are told in whole milliseconds, which is too coarse for a step of 27."""
    home = tempfile.mkdtemp(prefix="cohort-bench-")
    try:
        command = [binary, "pretrain", *spec, "--corpus", text, "--local", str(workers), "--threads", str(threads)]
        options = ["--home", home, "--json", "--set", f"train.steps={steps}", "--set", "train.eval_samples=16"]
        events = run([*command, *options])
        speeds = [e["tokens_per_second"] for e in events if e["event"] == "step"][steps // 10 :]
        each = max(1, len(speeds) // 20)
        stretches = [speeds[begin : begin + each] for begin in range(0, len(speeds) - each + 1, each)]
        return median([each / sum(1 / speed for speed in stretch) for stretch in stretches])
    finally:
        shutil.rmtree(home)


def text_for_runs():
    """Some text that every checkout has: the project's own sources. It is gone with this process."""
    directory = tempfile.mkdtemp(prefix="cohort-bench-text-")
    atexit.register(shutil.rmtree, directory)
    file = Path(directory) / "sources.txt"
    sources = sorted(p for p in ROOT.glob("*/src/**/*.rs"))
    file.write_text("\n".join(p.read_text() for p in sources))
    return file


def workers(args):
    binary, text, rows = cohort(args), text_for_runs(), []
    models = {"a": 20} if args.quick else {"a": 300, "b": 12}
    for model, steps in models.items():
        row = {"model": model, "one": [], "two": [], "ddp_one": [], "ddp_two": []}
        for _ in range(args.rounds):
            row["one"].append(train(binary, SPECS[model], text, 1, 1, steps))
            row["two"].append(train(binary, SPECS[model], text, 2, 1, steps))
            if args.python:
                name = {"a": "a", "b": "b-llama"}[model]
                row["ddp_one"].append(ddp(args.python, name, 1))
                row["ddp_two"].append(ddp(args.python, name, 2))
        rows.append(row)
    save(args, "workers", rows)


def ddp(python, model, world):
    """Tokens per second of all processes of one thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "bench/step_pytorch.py", model, "--threads", "1", "--ddp", "--json"]
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **group, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("DistributedDataParallel failed")
    return sum(json.loads(line)["tokens_per_s"] for out in outputs for line in out.splitlines() if line.startswith("{"))


def overhead(args):
    binary, text, rows = cohort(args), text_for_runs(), []
    ours = bench_binary(args, "step")
    models = {"a": 20} if args.quick else {"a": 400, "b": 12}
    for model, steps in models.items():
        row = {"model": model, "cluster": [], "alone": []}
        for _ in range(args.rounds):
            row["cluster"].append(train(binary, SPECS[model], text, 1, os.cpu_count(), steps))
            plain = {"a": ["a", "--lanes", "4"], "b": ["b-llama-8", "--lanes", "8"]}[model] + ["--as-a-run"]
            row["alone"] += [r["tokens_per_s"] for r in run([ours, *plain, "--seconds", str(args.seconds), "--json"])]
        rows.append(row)
    save(args, "overhead", rows)


def exchange(args):
    ours, rows = bench_binary(args, "exchange"), []
    cases = [(size, workers) for size in ([1] if args.quick else [1, 10, 100]) for workers in (2, 4)]

    def results(command, size, workers):
        with tempfile.NamedTemporaryFile() as file:
            options = ["--megabytes", str(size), "--workers", str(workers), "--seconds", str(args.seconds), "--json", file.name]
            subprocess.run([*command, *options], cwd=ROOT, check=True)
            return json.load(open(file.name))["results"]

    for _ in range(args.rounds):
        row = {"ours": [], "theirs": []}
        for case in cases:
            row["ours"] += results([ours], *case)
            if args.python and not args.quick:
                row["theirs"] += results([args.python, "bench/allreduce_gloo.py"], *case)
        rows.append(row)
    save(args, "exchange", rows)


def train_whole(binary, home, words):
    """Wall-clock seconds of a whole command, data preparation and validations included, and its validation losses."""
    begin = time.perf_counter()
    command = [binary, *words, "--local", "1", "--home", home, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    evals = []
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "eval" and event["split"] == "validation":
            evals.append([event["step"], event["loss"], time.perf_counter() - begin])
    if process.wait():
        sys.exit("the run failed")
    return {"all_s": time.perf_counter() - begin, "evals": evals}


def pretrain_whole(binary, spec, text, options=()):
    with tempfile.TemporaryDirectory(prefix="cohort-bench-") as home:
        return train_whole(binary, home, ["pretrain", *spec, "--corpus", text, *options])


QUICK = ["--set", "train.steps=3", "--set", "train.eval_samples=16"]


def text(args):
    binary, row = cohort(args), {"quick": [], "ours": [], "theirs": []}
    for _ in range(args.rounds):
        options = QUICK if args.quick else []
        row["quick"].append(pretrain_whole(binary, ["--preset", "shakespeare-quick"], args.text, options))
        row["ours"].append(pretrain_whole(binary, ["--preset", "nanogpt-shakespeare-cpu"], args.text, options))
        if args.python:
            script = ["bench/shakespeare_pytorch.py", args.text, "--threads", str(os.cpu_count())]
            row["theirs"] += run([args.python, *script, *(["--steps", "20"] if args.quick else [])])
    save(args, "text", [row])


def preset(args):
    options = QUICK if args.quick else []
    save(args, "preset", [pretrain_whole(cohort(args), ["--preset", "shakespeare-cpu"], args.text, options)], 1)


# Equal tokens in each: as many steps of all lanes, exchanged one by one, or after rounds of them.
ROUNDS_STEPS = 600
ROUNDS = {
    "f32": (1, ""),
    "bf16": (1, "payload=bf16"),
    "int8": (1, "payload=int8"),
    "int4": (1, "payload=int4"),
    "diloco 10, int8": (10, "sync=diloco inner_steps=10 payload=int8"),
    "diloco 50, int8": (50, "sync=diloco inner_steps=50 payload=int8"),
    "diloco 50, int4": (50, "sync=diloco inner_steps=50 payload=int4"),
    "diloco 100, int8": (100, "sync=diloco inner_steps=100 payload=int8"),
}


def by_mode(args, name, modes, train):
    """Validation losses of the modes that are asked for, after shares of the tokens; results of others are kept."""
    before = RESULTS / f"{name}.json"
    rows = json.loads(before.read_text())["rows"] if args.mode and before.exists() else []
    for mode in args.mode or (["int8", "diloco 10, int8"] if args.quick else modes):
        found = train(mode)
        last = found["evals"][-1][0]
        rows = [row for row in rows if row["mode"] != mode]
        rows.append({"mode": mode, "all_s": found["all_s"], "evals": [[step / last, loss] for step, loss, _ in found["evals"]]})
        rows.sort(key=lambda row: list(ROUNDS).index(row["mode"]))
        save(args, name, rows, 1)


def settings(mode, all_steps, learning_rate):
    """Options for a run of so many inner steps."""
    inner, more = ROUNDS[mode]
    steps = all_steps // inner
    found = [*more.split(), f"steps={steps}", f"warmup_steps={max(1, steps // 20)}", f"eval_every={max(1, steps // 6)}"]
    found += [f"learning_rate={learning_rate}", "eval_samples=256"]
    return [word for setting in found for word in ("--set", f"train.{setting}")]


def small(args):
    """Options that make the model of links.toml tiny, where only that all works is to be seen."""
    return ["--set", "model.hidden_size=24", "--set", "tokenizer.vocab_size=300"] if args.quick else []


def rounds(args):
    """Validation loss after equal tokens, in each way of exchanging. It does not depend on the machine's speed or on the cluster."""
    binary, spec, steps = cohort(args), [ROOT / "bench" / "links.toml"], 20 if args.quick else ROUNDS_STEPS
    by_mode(args, "rounds", ROUNDS, lambda mode: pretrain_whole(binary, spec, args.text, settings(mode, steps, 1e-3) + small(args)))


# What comes before in `trained`: three times as many steps.
TRAINED_STEPS = 1800
TRAINED = ["f32", "diloco 50, int8", "diloco 100, int8", "diloco 10, int8"]


def trained(args):
    """As `rounds`, begun with the weights of a run that exchanged in every step."""
    binary, spec = cohort(args), ROOT / "bench" / "links.toml"
    before, steps = (20, 20) if args.quick else (TRAINED_STEPS, ROUNDS_STEPS)
    # As in links.toml; its model and tokenizer are the checkpoint's.
    same = ["corpus.split=tail", "train.lanes=4", "train.micro_batch=2", "checkpoint.every=0"]
    same = [word for setting in same for word in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="cohort-bench-") as home:
        base = ["pretrain", spec, "--corpus", args.text, "--name", "base", *settings("f32", before, 1e-3), *small(args)]
        train_whole(binary, home, base)
        again = ["finetune", "--from", "base@last", "--corpus", args.text, *same]
        by_mode(args, "trained", TRAINED, lambda mode: train_whole(binary, home, [*again, *settings(mode, steps, 5e-4)]))


@contextlib.contextmanager
def coordinator(binary):
    """The home of a coordinator without workers."""
    with tempfile.TemporaryDirectory(prefix="cohort-bench-") as home:
        command = [binary, "coordinator", "--listen", "127.0.0.1:0", "--home", home]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            next(line for line in process.stderr if "http://" in line)
            yield home
        finally:
            process.kill()
            process.wait()


SELECTIONS = {
    "nothing left out": [],
    "lengths and language": ["--min-chars", "200", "--language", "en"],
    "exact duplicates": ["--dedup", "exact"],
    "near duplicates": ["--dedup", "near"],
}


def dedup(args):
    binary, rows = cohort(args), [{"what": what, "mb_per_s": []} for what in SELECTIONS]
    files = [args.text] if Path(args.text).is_file() else [p for p in Path(args.text).rglob("*") if p.is_file()]
    megabytes = sum(Path(file).stat().st_size for file in files) / 1e6
    for _ in range(args.rounds):
        for row, options in zip(rows, SELECTIONS.values()):
            with coordinator(binary) as home:
                begin = time.perf_counter()
                found = run([binary, "corpus", "prepare", args.text, "--home", home, "--json", *options])[0]
                row["mb_per_s"].append(megabytes / (time.perf_counter() - begin))
            row.update(megabytes=megabytes, documents=sum(found[side]["documents"] for side in ("train", "validation")))
    save(args, "dedup", rows)


def script(args, name, *options):
    """What a benchmark that is a script of its own has found."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "found.json"
        command = [sys.executable, f"bench/{name}", "--cohort", cohort(args), "--json", found, *map(str, options)]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(found.read_text())


def page(args):
    options = ["--steps", 5000, "--workers", 4, "--times", 1] if args.quick else []
    save(args, "page", [script(args, "watch.py", *options)], 1)


def watching(args):
    options = ["--phases", 4, "--seconds", 2] if args.quick else []
    save(args, "watching", [script(args, "watching.py", *options)])


def tls(args):
    options = ["--rounds", 1, "--steps", 6, "--hidden", 32] if args.quick else ["--rounds", args.rounds + 1]
    save(args, "tls", [script(args, "hosts.py", *options)])


def links(args):
    options = ["--modes", "f32", "--links", "0:0"] if args.quick else ["--python", args.python] if args.python else []
    save(args, "links", script(args, "links.py", *options), 1)


def uneven(args):
    """One line of four slower: slices that follow the lines, and equal ones, which is what moments are divided into."""
    modes = "f32;f32, moments divided"
    options = ["--links", "0:0" if args.quick else "100:25", "--slow", 20, "--modes", modes]
    rounds = 1 if args.quick else min(args.rounds, 3)
    save(args, "uneven", [r for _ in range(rounds) for r in script(args, "links.py", *options)], rounds)


def sites(args):
    """Two places with two workers each and a line between them: one reduction, and one in two levels."""
    modes = "f32;f32, one level;int8;int8, one level"
    options = ["--sites", "--links", "0:0" if args.quick else "100:25", "--modes", modes]
    rounds = 1 if args.quick else min(args.rounds, 3)
    save(args, "sites", [r for _ in range(rounds) for r in script(args, "links.py", *options)], rounds)


def scale(args):
    ours, rows = bench_binary(args, "scale"), []
    cases = [(20, 60, [])] if args.quick else [(10, 1000, []), (100, 500, []), (300, 200, []), (1000, 60, [])]
    cases += [(2000, 30, [])] if not args.quick and os.cpu_count() >= 8 else []
    for workers, steps, options in cases:
        with tempfile.NamedTemporaryFile() as file:
            subprocess.run([ours, "--workers", str(workers), "--steps", str(steps), "--json", file.name, *options], cwd=ROOT, check=True)
            rows += json.load(open(file.name))["rows"]
    save(args, "scale", rows, 1)


def failover(args):
    options = ["--rounds", 1, "--steps", 1500, "--leases", 2] if args.quick else ["--rounds", args.rounds]
    save(args, "failover", [script(args, "failover.py", *options)])


def memory(args):
    options = ["--quick"] if args.quick else []
    save(args, "memory", [r for _ in range(args.rounds) for r in run([sys.executable, "bench/memory.py", cohort(args), text_for_runs(), *options])])


def tokenize(args):
    path = Path(args.text)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    options = ["--rounds", 1, "--vocab-size", 300] if args.quick else ["--rounds", args.rounds, "--copies", 4]
    python = ["--python", args.python] if args.python else []
    save(args, "tokenize", [script(args, "tokenizing.py", *options, *python, *files)])


def ratios(above, below):
    return [a / b for a, b in zip(above, below)]


# What the losses of `rounds` are of, in tokens.
LINKS_TOKENS = ROUNDS_STEPS * 4 * 2 * 128
MINUTES = [5, 10, 20, 40, 80]


def equal_time(rows, at, way, name, out, lines):
    """Losses after equal time on a link: those after equal tokens, at the speed that was measured on it."""
    curves = {}
    for row in rows:
        if speed := at.get((row["mode"], *way)):
            all_minutes = LINKS_TOKENS / speed["tokens_per_s"] / 60
            curves[row["mode"]] = [(share * all_minutes, loss) for share, loss in row["evals"]]

    def after(curve, minutes):
        if minutes >= curve[-1][0]:
            return f"**{curve[-1][1]:.4f}**"
        later = next(i for i, (at, _) in enumerate(curve) if at > minutes)
        (a, x), (b, y) = curve[later - 1 if later else 0], curve[later]
        return f"{x + (y - x) * (minutes - a) / (b - a):.4f}" if later else ""

    out += [f"Losses after equal time, {name}; in bold that of a run that is over by then:", ""]
    lines(["gradients are exchanged in", *(f"{m} min" for m in MINUTES)], [[mode, *(after(curve, m) for m in MINUTES)] for mode, curve in curves.items()])
    picture = f"links-{way[0]:.0f}.svg"
    (ROOT / "docs" / picture).write_text(drawing(f"Validation loss over time, {name}", curves))
    out += [f"![Validation loss over time, {name}](docs/{picture})", ""]


def drawing(title, curves):
    """Curves over minutes, on a logarithmic axis, as SVG."""
    width, height, left, right, top, bottom = 960, 540, 60, 190, 60, 50
    points = [point for curve in curves.values() for point in curve if point[0] > 0]
    low, high = (math.log10(f(x for x, _ in points)) for f in (min, max))
    least, most = min(y for _, y in points), max(y for _, y in points)
    x = lambda minutes: left + (math.log10(minutes) - low) / (high - low) * (width - left - right)
    y = lambda loss: top + (most - loss) / (most - least) * (height - top - bottom)
    text = lambda at_x, at_y, words, more="": f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{words}</text>'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="Ubuntu, Verdana, sans-serif" font-size="13" fill="#444">']
    out += [f'<rect width="{width}" height="{height}" fill="#fff"/>', text(24, 32, title, 'font-size="19" fill="#222"')]
    for minutes in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if low <= math.log10(minutes) <= high:
            out += [f'<path d="M{x(minutes):.1f} {top}V{height - bottom}" stroke="#e4e4e4"/>', text(x(minutes), height - bottom + 20, f"{minutes} min", 'text-anchor="middle"')]
    for tenth in range(math.ceil(10 * least), math.floor(10 * most) + 1, max(1, round((most - least) * 10 / 6))):
        out += [f'<path d="M{left} {y(tenth / 10):.1f}H{width - right}" stroke="#e4e4e4"/>', text(left - 8, y(tenth / 10) + 4, f"{tenth / 10:.1f}", 'text-anchor="end"')]
    colours = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf"]
    for number, (mode, curve) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        path = " ".join(f"{x(m):.1f},{y(loss):.1f}" for m, loss in curve if m > 0)
        out += [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', text(width - right + 12, top + 16 + 20 * number, mode, f'fill="{colour}"')]
    return "\n".join([*out, "</svg>", ""])


def table(_args):
    """BENCHMARKS.md."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    out = [(ROOT / "bench" / "head.md").read_text().rstrip(), ""]

    def section(name, title, command):
        if name not in found:
            return None
        facts = found[name]["machine"]
        where = ", ".join(filter(None, [facts.get("gpu"), facts["processor"], f"{facts['cores']} cores", facts.get("features")]))
        versions = f"; {facts['python']}" if "python" in facts else ""
        out.extend([f"## {title}", "", f"`python3 bench/run.py {command}`; {found[name]['rounds']} round{'s' * (found[name]['rounds'] != 1)}, {facts['date']}, commit {facts['commit']}; {where}{versions}.", ""])
        return found[name]["rows"]

    def lines(head, rows):
        out.extend(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""])

    kinds = {"engine": "", "engine_amx": " on a processor with AMX", "engine_avx2": " on a processor without AVX-512"}
    for name, title in ((name, f"One training step{where}") for name, where in kinds.items()):
        rows = section(name, title, "engine")
        if not rows:
            continue
        body = []
        for row in rows:
            ours = [r["tokens_per_s"] for r in row["ours"]]
            theirs = [r["tokens_per_s"] for r in row["theirs"]]
            memory = [median(r["peak_mb"] for r in row[side]) if row[side] else float("nan") for side in ("ours", "theirs")]
            line = [row["model"], f"{median(ours):,.0f}", f"{median(r['gflops'] for r in row['ours']):.0f}"]
            line += [f"{median(theirs):,.0f}", f"**{median(ratios(ours, theirs)):.2f}**"] if theirs else ["", ""]
            body.append([*line, f"{memory[0]:,.0f}", f"{memory[1]:,.0f}", f"{memory[0] / memory[1]:.2f}"])
        lines(["model", "tokens/s", "GFLOP/s", "PyTorch tokens/s", "ratio", "peak MB", "PyTorch peak MB", "ratio"], body)
    if rows := section("gpu", "One training step on a GPU", "gpu"):
        body = []
        for row in rows:
            ours, theirs = ([r["tokens_per_s"] for r in row[side]] for side in ("ours", "theirs"))
            compared = [f"{median(theirs):,.0f}", f"**{median(ratios(ours, theirs)):.2f}**"] if theirs else ["", ""]
            body.append([row["model"], f"{median(ours):,.0f}", f"{median(r['gflops'] for r in row['ours']):,.0f}", *compared])
        lines(["model", "tokens/s", "GFLOP/s", "PyTorch tokens/s", "ratio"], body)
    if rows := section("lanes", "Lanes", "lanes"):
        tokens = sorted({r["tokens"] for r in rows})
        lines(["tokens in a lane", "8 lanes in the time of one"], [[str(t), f"{median(r['ratio'] for r in rows if r['tokens'] == t):.3f}"] for t in tokens])
    if rows := section("workers", "Two workers of one thread", "workers"):
        body = []
        for row in rows:
            line = [row["model"], f"{median(row['one']):,.0f}", f"{median(row['two']):,.0f}", f"**{100 * median(ratios(row['two'], row['one'])) / 2:.0f} %**"]
            if row["ddp_one"]:
                line += [f"{median(row['ddp_one']):,.0f}", f"{median(row['ddp_two']):,.0f}", f"{100 * median(ratios(row['ddp_two'], row['ddp_one'])) / 2:.0f} %"]
            body.append(line + [""] * (7 - len(line)))
        lines(["model", "one", "two", "of twice one", "DDP one", "DDP two", "of twice one"], body)
    if rows := section("overhead", "The cluster's price", "overhead"):
        lines(["model", "`--local 1`, tokens/s", "without a cluster", "ratio"], [[r["model"], f"{median(r['cluster']):,.0f}", f"{median(r['alone']):,.0f}", f"**{100 * median(ratios(r['cluster'], r['alone'])):.1f} %**"] for r in rows])
    if rows := section("exchange", "The exchange alone", "exchange"):
        exchange_table(rows, lines)
    if rows := section("text", "From raw text to a trained model", "text TEXT"):
        row = rows[0]
        theirs = [r["training_s"] for r in row["theirs"]]
        body = []
        for side, name in {"quick": "Cohort, its preset shakespeare-quick, everything included", "ours": "Cohort, nanoGPT's recipe, everything included"}.items():
            times = [r["all_s"] for r in row[side]]
            compared = f"**{median(ratios(times, theirs)):.2f}**" if theirs else ""
            body.append([name, f"{median(times):.1f} s", compared, f"{median(r['evals'][-1][1] for r in row[side]):.3f}"])
        if theirs:
            body.append(["PyTorch, nanoGPT's recipe, training alone", f"{median(theirs):.1f} s", "1", f"{median(r['loss'] for r in row['theirs']):.3f}"])
        lines(["Tiny Shakespeare, by characters", "time", "of PyTorch's", "validation loss, nats"], body)
    if rows := section("preset", "The preset shakespeare-cpu", "preset TEXT"):
        lines(["step", "validation loss, nats", "seconds since the start"], [[str(step), f"{loss:.4f}", f"{seconds:.0f}"] for step, loss, seconds in rows[0]["evals"]])
    for command, title in {"rounds": "Losses after equal tokens", "trained": "Losses after equal tokens, from trained weights"}.items():
        if rows := section(command, title, f"{command} TEXT"):
            f32 = next(row["evals"][-1][1] for row in rows if row["mode"] == "f32")
            shares = [share for share, _ in rows[0]["evals"]]
            nearest = lambda row, share: min(row["evals"], key=lambda e: abs(e[0] - share))[1]
            more = lambda row: f"{100 * (row['evals'][-1][1] / f32 - 1):+.1f} %"
            body = [[row["mode"], *(f"{nearest(row, share):.4f}" for share in shares), more(row)] for row in rows]
            lines(["gradients are exchanged in", *(f"{100 * share:.0f} % of the tokens" for share in shares), "against f32"], body)
    if rows := section("links", "Slow links", "links"):
        ways = sorted({(r["megabits"], r["delay_ms"]) for r in rows})
        at = {(r["mode"], r["megabits"], r["delay_ms"]): r for r in rows}
        body = []
        for mode in dict.fromkeys(r["mode"] for r in rows):
            speeds = [at.get((mode, *way)) for way in ways]
            free = speeds[0]["tokens_per_s"] if speeds[0] and not ways[0][0] else None
            shown = [f"{r['tokens_per_s']:,.0f}" + (f" ({100 * r['tokens_per_s'] / free:.0f} %)" if free and r is not speeds[0] else "") if r else "" for r in speeds]
            body.append([mode, *shown, f"{speeds[-1]['bytes_per_token']:,.0f}" if speeds[-1] else ""])
        name = lambda way: f"{way[0]:,.0f} Mbit/s, {2 * way[1]:g} ms there and back" if way[0] else "nothing in the way"
        lines(["tokens/s", *map(name, ways), "bytes per token"], body)
        for way in ways if "rounds" in found else []:
            if way[0]:
                equal_time(found["rounds"]["rows"], at, way, name(way), out, lines)
    if rows := section("uneven", "One slow line of four", "uneven"):
        speed = {mode: [r["tokens_per_s"] for r in rows if r["mode"] == mode] for mode in dict.fromkeys(r["mode"] for r in rows)}
        follow, equal = speed.values()
        body = [["slices that follow the lines", f"{median(follow):,.0f}", f"**{median(ratios(follow, equal)):.2f}**"], ["equal slices", f"{median(equal):,.0f}", "1"]]
        lines(["four workers at 100 Mbit/s, but one at 20; 50 ms there and back", "tokens/s", "ratio"], body)
    if rows := section("sites", "Two places with a slow line between them", "sites"):
        of = lambda mode, what: [r[what] for r in rows if r["mode"] == mode]
        body = []
        for mode in ("f32", "int8"):
            one = f"{mode}, one level"
            speeds, before = of(mode, "tokens_per_s"), of(one, "tokens_per_s")
            passed, all_passed = (median(of(m, "bytes_per_token")) for m in (mode, one))
            gain = f"**{median(ratios(speeds, before)):.2f}**"
            body.append([mode, f"{median(speeds):,.0f}", f"{median(before):,.0f}", gain, f"{passed:,.0f}", f"{all_passed:,.0f}"])
        head = ["two workers at each; 100 Mbit/s, 50 ms there and back", "tokens/s, two levels", "one level", "ratio", "bytes per token between places, two levels", "one level"]
        lines(head, body)
    if rows := section("dedup", "Preparing a corpus", "dedup TEXT"):
        body = [[r["what"], f"{r['documents']:,}", f"{median(r['mb_per_s']):.1f}"] for r in rows]
        lines([f"{rows[0]['megabytes']:.0f} MB of text, tokenizer and baselines included", "documents left", "MB/s"], body)
    if rows := section("tokenize", "Text to tokens", "tokenize BOOKS"):
        speeds = rows[0]["speeds"]
        body = []
        for count in ("1", "2"):
            ours, theirs = speeds[f"ours {count}"], speeds.get(f"theirs {count}", [])
            compared = [f"{median(theirs):.1f}", f"**{median(ratios(ours, theirs)):.1f}**"] if theirs else ["", ""]
            body.append([count, f"{median(ours):.1f}", *compared])
        head = ["workers, or processes, of one thread", "`corpus prepare`, MB/s", "datasets and tokenizers, MB/s", "ratio"]
        lines(head, body)
    if rows := section("memory", "Memory of a worker", "memory"):
        body = []
        for workers in sorted({r["workers"] for r in rows}):
            of = {how: [r for r in rows if (r["workers"], r["optimizer"]) == (workers, how)] for how in ("whole", "sharded")}
            largest = {how: [median(max(r[key]) for r in of[how]) for key in ("anonymous_mb", "peak_mb")] for how in of}
            speed = median(ratios([r["tokens_per_s"] for r in of["sharded"]], [r["tokens_per_s"] for r in of["whole"]]))
            same = len({r["state_hash"] for how in of.values() for r in how}) == 1
            figures = [f"{largest[how][n]:,.0f}" for n in (0, 1) for how in ("whole", "sharded")]
            body.append([str(workers), *figures, f"{speed:.2f}", "yes" if same else "no"])
        lines(["workers", "anonymous MB", "divided", "resident MB", "divided", "tokens/s, divided to whole", "same bits"], body)
    if rows := section("page", "Looking at a long run", "page"):
        row = rows[0]
        figures = {"all answers of the page's first requests": "{}_s", "the page's charts drawn in a browser": "page_{}_s"}
        found_in = [[name, *(f"{1e3 * row[key.format(when)]:.0f} ms" for when in ("cold", "warm"))] for name, key in figures.items() if key.format("cold") in row]
        lines([f"{row['steps']:,} steps, {row['workers']} workers", "of a coordinator that was just started", "again"], found_in)
    if rows := section("tls", "Encryption", "tls"):
        row = rows[0]
        body = [[f"{median(row['encrypted']):.1f} ms", f"{median(row['plain']):.1f} ms", f"**{row['ratio']:.3f}**"]]
        lines(["a step, encrypted", "in plain text", "ratio"], body)
    if rows := section("scale", "The coordinator at scale", "scale"):
        body = []
        for row in rows:
            line = [f"{row['workers']:,}", f"{row['cpu_ms_per_step']:.1f} ms", f"{1e3 * row['cpu_ms_per_step'] / row['workers']:.0f} µs"]
            line += [f"{row['latency_p50_ms']:.0f} ms", f"{row['latency_p99_ms']:.0f} ms", f"{row['step_ms']:.0f} ms"]
            line += [f"{row['messages_per_step']:,.0f}", f"{row['bytes_per_step'] / 1e3:,.0f} KB", f"{row['rss_bytes'] / 1e6:,.0f} MB"]
            body.append(line)
        head = ["workers, a lane each", "the coordinator's CPU time of a step", "for each worker", "last lane to last update, median", "99th percentile"]
        lines([*head, "whole step", "control messages of a step", "their bytes", "the coordinator's memory"], body)
    if rows := section("watching", "Being watched", "watching"):
        row = rows[0]
        coordinator = [median(p["coordinator_percent"] for p in row["phases"] if p["watched"] == watched) for watched in (False, True)]
        body = [["time of a step", f"{100 * (row['ratio'] - 1):+.2f} % (half of the comparisons from {100 * (row['quartiles'][0] - 1):+.2f} to {100 * (row['quartiles'][1] - 1):+.2f} %)"]]
        body.append(["the coordinator, of a core", f"{coordinator[0]:.1f} %, watched {coordinator[1]:.1f} %"])
        lines(["page open and metrics scraped, on the same two cores", ""], body)
    if rows := section("failover", "The coordinator's machine is gone", "failover"):
        row, body = rows[0], []
        for lost in row["lost"]:
            seconds = [found["seconds"] for found in lost["lost"]]
            lease = f"{lost['lease_s']:g} s" if lost["lease_s"] else ""
            recomputed = max(found["recomputed"] for found in lost["lost"])
            body.append([lost["what"], lease, f"**{median(seconds):.1f} s**", f"{min(seconds):.1f} to {max(seconds):.1f} s", str(recomputed)])
        lines(["the coordinator is killed, and", "lease", "until the next step is committed", "", "steps computed again, at most"], body)
        lines(["undisturbed steps with `--failover`, against `--store` alone", ""], [["time", f"**{row['ratio']:.3f}**"]])
    (ROOT / "BENCHMARKS.md").write_text("\n".join(out).rstrip() + "\n")


def exchange_table(rows, lines):
    cases, ratios = {}, {}
    for row in rows:
        speeds = {(c["what"], c["workers"], c["megabytes"]): c["gb_per_s"] for c in [*row["ours"], *row["theirs"]]}
        for key, speed in speeds.items():
            gloo = speeds.get(("gloo", *key[1:]))
            cases.setdefault(key, []).append(speed)
            ratios.setdefault(key, []).append(speed / gloo if gloo else math.nan)
    lines(
        ["what", "workers", "MB", "GB/s", "of gloo's"],
        [[*map(str, key), f"{median(speeds):.2f}", f"{median(ratios[key]):.2f}"] for key, speeds in sorted(cases.items())],
    )


def smoke(args):
    commands = [engine, lanes, workers, overhead, exchange, text, preset, rounds, trained, memory, dedup, scale, tokenize]
    # Two at a time, as no figure counts here and most wait for something now and then.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for command in [pool.submit(command, args) for command in commands]:
            command.result()


def main():
    commands = [engine, gpu, lanes, workers, overhead, exchange, text, preset, dedup, page, watching, tls, rounds, trained, memory, links, uneven, sites, scale, tokenize, failover, table, smoke]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[c.__name__ for c in commands])
    parser.add_argument("text", nargs="?")
    parser.add_argument("--python")
    parser.add_argument("--step", type=os.path.abspath)
    parser.add_argument("--cohort", type=os.path.abspath)
    parser.add_argument("--mode", choices=list(ROUNDS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", default="release")
    args = parser.parse_args()
    args.quick |= args.command == "smoke"
    if args.quick:
        args.rounds, args.seconds = 1, 0.1
        args.text = args.text or text_for_runs()
    if args.command in ("text", "preset", "dedup", "tokenize", "rounds", "trained") and not args.text:
        parser.error(f"{args.command} needs a text file")
    next(c for c in commands if c.__name__ == args.command)(args)


if __name__ == "__main__":
    main()
