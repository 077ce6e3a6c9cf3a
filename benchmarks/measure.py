"""Measuring: time in turn, memory in a fresh process, and what the machine can do."""

import gc
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

import bupo

DEVICE, BFLOAT16 = bupo.choose_device(bupo.Config())


def seconds(work: Callable) -> float:
    """Wall time of work(), the GPU's share included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(works: dict[str, Callable], turns: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each work in each turn, A B A B ..., after a turn that does not count."""
    for work in works.values() if warm_up else ():
        work()
    timed = [{name: seconds(work) for name, work in works.items()} for _ in range(turns)]
    return {name: [turn[name] for turn in timed] for name in works}


def line(part: str, what: str, values: list[float], unit: str, floor: str = "", **more) -> dict:
    """A line of the table: the median of the values and their range."""
    row = dict(part=part, what=what, median=statistics.median(values), low=min(values), high=max(values), unit=unit)
    row |= dict(floor=floor, values=values, **more)
    median, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (row["median"], row["low"], row["high"]))
    spread = f"{low}-{high}" if len(values) > 1 else ""
    print(f"{part:9}{what:62}{median:>8} {unit:9}{spread:14}{floor}", flush=True)
    return row


def ratios(times: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


def in_fresh_process(work: Callable, *arguments) -> object:
    """work(*arguments) in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory(peak: bool = False) -> float:
    """Bytes in use now, or their peak since `forget_peak`: allocated on the GPU, else resident (on Linux).

    Not `ru_maxrss`: a process begins with the peak of the one that started it, if that was larger.
    """
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status, name = Path("/proc/self/status").read_text(), "VmHWM" if peak else "VmRSS"
    return 1024.0 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def forget_peak() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict:
    """What it is, and what it can do: operations per second of a matrix product, bytes per second read from memory."""
    dtype = torch.bfloat16 if BFLOAT16 else torch.float32
    size, large = (8192, 2**30) if DEVICE.type == "cuda" else (2048, 2**26)
    square, vector = torch.randn(size, size, device=DEVICE, dtype=dtype), torch.ones(large, device=DEVICE)
    product = min(in_turn(dict(product=lambda: square @ square), 5)["product"])
    read = min(in_turn(dict(read=lambda: vector.sum()), 5)["read"])
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    cpu = (
        re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    name = cpu[1] if cpu and DEVICE.type == "cpu" else name
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    rates = dict(operations_per_s=2 * size**3 / product, bytes_per_s=4 * large / read)
    return dict(machine=name, threads=torch.get_num_threads(), dtype=str(dtype), **versions, **rates)
