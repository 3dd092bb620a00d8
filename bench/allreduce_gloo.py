"""What `bench/exchange.rs` is compared with: PyTorch's gloo, and a plain ring over TCP (sockets and numpy).

    pip install torch numpy
    python bench/allreduce_gloo.py [--megabytes 1,10,100] [--workers 2,4] [--seconds S] [--json FILE]

Each worker is a process of one thread. GB/s = bytes of one gradient / time of one all-reduce, the median over steps. The
ring sends each worker's slices around twice, adds in numpy, and checks nothing: it is what the sockets give.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WARM = 3


def steps_for(megabytes, seconds):
    return min(max(int(seconds * 1e3 / megabytes), 5), 200) + WARM


def gloo(rank, workers, length, steps, port, times):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    gradient = torch.zeros(length)
    for _ in range(steps):
        began = time.perf_counter()
        dist.all_reduce(gradient)
        if rank == 0:
            times.append(time.perf_counter() - began)
    dist.destroy_process_group()


def ring(rank, workers, length, steps, port, times):
    """Reduce-scatter, then all-gather; every worker listens on `port + rank` and dials its right neighbour."""
    listener = socket.create_server(("127.0.0.1", port + rank))
    right = dial(port + (rank + 1) % workers)
    left, _ = listener.accept()
    for end in (left, right):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    gradient = np.zeros(length, dtype=np.float32)
    slices = np.array_split(gradient, workers)
    incoming = np.empty_like(slices[0])

    def exchange(send, receive):
        sender = threading.Thread(target=right.sendall, args=(memoryview(slices[send]).cast("B"),))
        sender.start()
        view, got = memoryview(receive).cast("B"), 0
        while got < len(view):
            got += left.recv_into(view[got:])
        sender.join()

    for _ in range(steps):
        began = time.perf_counter()
        for hop in range(workers - 1):
            send, take = (rank - hop) % workers, (rank - hop - 1) % workers
            part = incoming[: len(slices[take])]
            exchange(send, part)
            slices[take] += part
        for hop in range(workers - 1):
            exchange((rank + 1 - hop) % workers, slices[(rank - hop) % workers])
        if rank == 0:
            times.append(time.perf_counter() - began)


def dial(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def free_ports(count):
    """As many consecutive ports that nobody has now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
        try:
            for one in range(count):
                socket.create_server(("127.0.0.1", port + one)).close()
            return port
        except OSError:
            continue


def main():
    numbers = lambda kind: lambda text: [kind(one) for one in text.split(",")]
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=numbers(float), default=[1.0, 10.0, 100.0])
    parser.add_argument("--workers", type=numbers(int), default=[2, 4])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json")
    args = parser.parse_args()
    results = []
    print(f"{'':>6} {'MB':>8} {'workers':>8} {'ms':>10} {'GB/s':>8}")
    for name, run in (("gloo", gloo), ("ring", ring)):
        for megabytes in args.megabytes:
            for workers in args.workers:
                length = int(megabytes * 1e6 / 4)
                with mp.Manager() as manager:
                    times = manager.list()
                    steps = steps_for(megabytes, args.seconds)
                    mp.spawn(run, (workers, length, steps, free_ports(workers), times), workers)
                    counted = sorted(list(times)[WARM:])
                median = statistics.median(counted)
                speed = length * 4 / median / 1e9
                print(f"{name:>6} {megabytes:>8} {workers:>8} {median * 1e3:>10.2f} {speed:>8.2f}")
                results.append(
                    {
                        "what": name,
                        "megabytes": megabytes,
                        "workers": workers,
                        "median_s": median,
                        "min_s": counted[0],
                        "max_s": counted[-1],
                        "gb_per_s": speed,
                    }
                )
    if args.json:
        machine = {
            "cpu": platform.processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        with open(args.json, "w") as file:
            json.dump({"what": "gloo and ring", "machine": machine, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
