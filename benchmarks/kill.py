"""Kill a run 30 times at random moments, resume it each time, and compare it with an undisturbed one, bit for bit.

    python benchmarks/kill.py            # about 8 minutes on 2 cores

Every third kill waits until a checkpoint is being written and strikes inside it; the others come after a random delay,
during start-up, warm-up, rollouts, updates or evaluations.
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


def main(kills: int = 30) -> None:
    folder, rng, inside, done = Path(tempfile.mkdtemp()), random.Random(0), 0, 0
    calm, wild = folder / "calm", folder / "wild"
    start("--out", str(folder / "begin"), "--steps", "1", "--eval-problems", "0").communicate()  # with the warm-up
    settings = ["--model", str(folder / "begin"), *SETTINGS]
    start("--out", str(calm), *settings).communicate()
    while done < kills:
        begun = (wild / "config.json").exists()
        process = start(*(["--resume", str(wild)] if begun else ["--out", str(wild), *settings]))
        limit = time.perf_counter() + (600 if done % 3 == 2 else rng.uniform(0, 12))  # seconds; start-up takes 5 or so
        while process.poll() is None and time.perf_counter() < limit:
            if done % 3 == 2 and any(wild.glob(".checkpoint-*.tmp")):
                break
            time.sleep(0.0005)
        if process.poll() is not None:
            break  # it came to its end: what was killed so far must do
        inside += any(wild.glob(".checkpoint-*.tmp"))
        process.kill()
        process.communicate()
        done += 1
        steps = [int(path.name.rpartition("-")[2]) for path in wild.glob("checkpoint-*")]
        print(f"kill {done}: last checkpoint after step {max(steps, default=0)}", flush=True)
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
