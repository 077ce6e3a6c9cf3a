"""Kill a run 30 times, resume it each time, and compare it with an undisturbed one, bit for bit.

    python benchmarks/kill.py        # or with the number of kills

The kills take turns: at a random moment of the start-up; some steps later, in a rollout, an update,
a log line or an evaluation; and, some steps later too, while a checkpoint is being written.
"""

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
SETTINGS = "--steps 300 --save-every 1 --keep 2 --eval-every 50 --prompts-per-step 4 --mini-batch 2"
CLOCK = {"rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb", "seconds"}


def start(*arguments: object) -> subprocess.Popen:
    command = map(str, [sys.executable, BUPO, *arguments, "--eval-problems", 8])
    return subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def unfinished(run: Path) -> set[str]:
    """The checkpoints that are being written, or were when a process was killed."""
    return {path.name for path in run.glob(".checkpoint-*")}


def kill(process: subprocess.Popen, run: Path, where: str, rng: random.Random, up: float) -> bool:
    """Kill the process there, unless it ends before; whether a checkpoint was being written."""
    logged, old = len(lines(run)), unfinished(run)
    steps = 0 if where == "start-up" else rng.randint(1, 9)
    wait = {"start-up": up, "later": 0.5, "checkpoint": 0.0}[where]
    while process.poll() is None:
        if len(lines(run)) - logged >= steps and (wait or unfinished(run) - old):
            time.sleep(rng.uniform(0, wait))
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()
    return bool(unfinished(run) - old)


def content(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics without what a clock measured, and the weights."""
    metrics = [json.loads(line) for line in lines(run)]
    untimed = [{name: line[name] for name in line.keys() - CLOCK} for line in metrics]
    return untimed, load_file(run / "model" / "model.safetensors")


def main(kills: int) -> None:
    folder, rng, inside = Path(tempfile.mkdtemp()), random.Random(0), 0
    calm, wild = folder / "calm", folder / "wild"
    start("--out", folder / "begin", "--steps", 1).wait()  # with the pretraining
    settings, began = ["--model", folder / "begin", *SETTINGS.split()], time.perf_counter()
    undisturbed = start("--out", calm, *settings)
    while undisturbed.poll() is None and not lines(calm):
        time.sleep(0.01)
    start_up = time.perf_counter() - began
    undisturbed.wait()
    for n in range(kills):
        begun, where = (wild / "config.json").exists(), ("start-up", "later", "checkpoint")[n % 3]
        process = start(*(["--resume", wild] if begun else ["--out", wild, *settings]))
        inside += kill(process, wild, where, rng, start_up)
        last = max((int(f.name[11:]) for f in wild.glob("checkpoint-*")), default=0)
        print(f"kill {n + 1}, {where}: last checkpoint after step {last}", flush=True)
    start("--resume", wild).wait()
    (metrics, weights), (calm_metrics, calm_weights) = content(wild), content(calm)
    same = metrics == calm_metrics, all(torch.equal(weights[n], w) for n, w in calm_weights.items())
    updates = sum((line.get("grad_norm") or 0) > 0 for line in metrics)
    print(f"{kills} kills, {inside} of them inside a checkpoint; {updates} steps moved weights")
    print(f"metrics equal: {same[0]}, weights equal: {same[1]}")
    sys.exit(not all(same))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
