"""Kill a run 30 times, resume it each time, and compare it with an undisturbed one, bit for bit.

    python benchmarks/kill.py            # about 5 minutes on 2 free cores

The kills take turns: at a random moment of the start-up; some steps later, in a rollout, an update, a log line or an
evaluation; and, some steps later too, while a checkpoint is being written.
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

BUPO = Path(__file__).parent.parent / "bupo.py"
SETTINGS = ["--steps", "300", "--save-every", "1", "--eval-every", "50"]
SETTINGS += ["--prompts", "4", "--mini-batch", "2", "--eval-problems", "8"]
CLOCK = {"rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb", "seconds"}  # differ from run to run


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(BUPO), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def content(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics without what a clock measured, and the weights."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = [{name: value for name, value in line.items() if name not in CLOCK} for line in metrics]
    return untimed, load_file(run / "model" / "model.safetensors")


def unfinished(run: Path) -> set[tuple[str, int]]:
    """The checkpoints that are being written, or were when a process was killed."""
    found = set()
    for path in run.glob(".checkpoint-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it has just been finished
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(process: subprocess.Popen, run: Path, where: str, rng: random.Random, start_up: float) -> bool:
    """Kill the process there, unless it comes to its end before; whether a checkpoint was being written."""
    began, lines, old = time.perf_counter(), logged(run), unfinished(run)
    moment, steps = rng.uniform(0, start_up), rng.randint(1, 9)
    while process.poll() is None:
        if where == "start-up" and time.perf_counter() - began > moment:
            break
        if where != "start-up" and logged(run) - lines >= steps:
            if where == "later":
                time.sleep(rng.uniform(0, 0.5))
                break
            if unfinished(run) - old:
                break
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    return bool(unfinished(run) - old)


def main(kills: int = 30) -> None:
    folder, rng, inside, done = Path(tempfile.mkdtemp()), random.Random(0), 0, 0
    calm, wild = folder / "calm", folder / "wild"
    start("--out", str(folder / "begin"), "--steps", "1", "--eval-problems", "0").communicate()  # with the warm-up
    settings, began = ["--model", str(folder / "begin"), *SETTINGS], time.perf_counter()
    process = start("--out", str(calm), *settings)
    while process.poll() is None and not logged(calm):
        time.sleep(0.01)
    start_up = time.perf_counter() - began
    process.communicate()
    while done < kills and not (wild / "model").exists():
        begun, where = (wild / "config.json").exists(), ("start-up", "later", "checkpoint")[done % 3]
        process = start(*(["--resume", str(wild)] if begun else ["--out", str(wild), *settings]))
        inside += kill(process, wild, where, rng, start_up)
        done += 1
        steps = [int(path.name.rpartition("-")[2]) for path in wild.glob("checkpoint-*")]
        print(f"kill {done}, {where}: last checkpoint after step {max(steps, default=0)}", flush=True)
    _, errors = start("--resume", str(wild)).communicate()
    (metrics, weights), (expected_metrics, expected_weights) = content(wild), content(calm)
    same_weights = all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    same_metrics = metrics == expected_metrics
    print(f"{done} kills, {inside} of them inside a checkpoint")
    updates = sum(line.get("grad_norm", 0) > 0 for line in metrics)
    print(f"metrics equal: {same_metrics}, weights equal: {same_weights}, after {updates} steps that moved them")
    if not (same_metrics and same_weights):
        sys.exit(errors.decode()[-2000:] or 1)


if __name__ == "__main__":
    main()
