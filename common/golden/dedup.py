"""Near duplicates beside an outsider: which documents `cohort corpus prepare --dedup near` leaves out, which ones
datasketch's MinHash finds, and which ones a comparison of all pairs by their true Jaccard coefficient does.

    pip install datasketch
    python common/golden/dedup.py COHORT TEXT...

COHORT is the binary, TEXT are files of words. They are cut into documents of 60 to 600 words; of every third one, up to
four copies are planted, with 0.2 to 10 % of their words replaced. Both sides take the same shingles (five words in small
letters) and 128 permutations. datasketch runs twice: with the bands that it chooses itself, and with ours. Each document
begins with a number, by which it is known again.
"""

import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from datasketch import MinHash, MinHashLSH

THRESHOLD, PERMUTATIONS, SHINGLE, MOST = 0.8, 128, 5, 990
OUR_BANDS = (18, 7)


def documents(paths):
    """Cuts texts and plants copies; the same for the same texts."""
    draw = random.Random(7)
    words = [w for path in paths for w in Path(path).read_text().split()]
    made, at = [], 0
    while at < len(words) and len(made) < MOST:
        size = draw.randrange(60, 600)
        text = words[at : at + size]
        at += size
        made.append(text)
        for copy in range(draw.randrange(5) if len(made) % 3 == 0 else 0):
            changed = list(text)
            for _ in range(max(1, int(len(changed) * draw.choice([0.002, 0.01, 0.02, 0.04, 0.1])))):
                changed[draw.randrange(len(changed))] = draw.choice(words)
            made.insert(draw.randrange(len(made) + 1), changed)
    made = made[:MOST]
    return [f"n{number} " + " ".join(text) for number, text in enumerate(made)]


def shingles(text):
    words = re.findall(r"[^\W_]+", text.lower())
    if len(words) < SHINGLE:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def later_ones(count, pairs):
    """The documents that are not the first of what hangs together."""
    first = list(range(count))

    def find(x):
        while first[x] != x:
            first[x] = first[first[x]]
            x = first[x]
        return x

    for a, b in pairs:
        a, b = find(a), find(b)
        first[max(a, b)] = min(a, b)
    return {x for x in range(count) if find(x) != x}


def by_brute_force(sets):
    def near(a, b):
        small, large = sorted((len(sets[a]), len(sets[b])))
        if small < THRESHOLD * large:
            return False
        both = len(sets[a] & sets[b])
        return both >= THRESHOLD * (small + large - both)

    return later_ones(len(sets), [(a, b) for b in range(len(sets)) for a in range(b) if near(a, b)])


def by_datasketch(sets, params):
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, params=params)
    signatures, pairs = [], []
    for number, found in enumerate(sets):
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([s.encode() for s in found])
        for other in index.query(signature):
            if signature.jaccard(signatures[other]) >= THRESHOLD:
                pairs.append((other, number))
        index.insert(number, signature)
        signatures.append(signature)
    return later_ones(len(sets), pairs)


@contextlib.contextmanager
def coordinator(binary, home):
    command = [binary, "coordinator", "--listen", "127.0.0.1:0", "--home", home]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stderr if "http://" in line)
        yield
    finally:
        process.kill()
        process.wait()


def by_cohort(binary, texts):
    with tempfile.TemporaryDirectory() as home, coordinator(binary, home):
        lines = Path(home, "lines.jsonl")
        lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

        def run(*arguments):
            command = [binary, "corpus", *arguments, "--home", home, "--json"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return [json.loads(line) for line in done.stdout.splitlines()]

        selection = run("prepare", str(lines), "--name", "all", "--dedup", "near", "--dedup-threshold", str(THRESHOLD))[0]
        print(json.dumps(selection["selection"]))
        kept = set()
        for split in ["train", "validation"]:
            for document in run("head", "all", "-n", "1000", "--chars", "10", "--split", split):
                kept.add(int(document["text"].split()[0][1:]))
        return set(range(len(texts))) - kept


def compare(name, found, truth):
    hits = len(found & truth)
    precision, recall = hits / max(1, len(found)), hits / max(1, len(truth))
    print(f"{name:<28} left out {len(found):4}   precision {precision:.4f}   recall {recall:.4f}")


def main():
    binary, *paths = sys.argv[1:]
    texts = documents(paths)
    sets = [shingles(text) for text in texts]
    truth = by_brute_force(sets)
    print(f"{len(texts)} documents, of which {len(truth)} are near duplicates of earlier ones")
    ours = by_cohort(binary, texts)
    theirs, same_bands = by_datasketch(sets, None), by_datasketch(sets, OUR_BANDS)
    compare("cohort", ours, truth)
    compare("datasketch, its own bands", theirs, truth)
    compare("datasketch, the same bands", same_bands, truth)
    print(f"the decisions agree on {1 - len(ours ^ same_bands) / len(texts):.4f} of the documents")
    differ = len(ours ^ truth) + len(same_bands ^ truth)
    if len(ours ^ same_bands) > differ or len(ours ^ truth) > 0.02 * len(texts):
        sys.exit("more documents differ than an estimate explains")


main()
