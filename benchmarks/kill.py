"""Kill a run 30 times, resume it each time, and compare it with an undisturbed one, bit for bit.

    python benchmarks/kill.py        # or with the number of kills

The kills take turns: at a random moment of the first ten seconds; some steps later, in a rollout,
an update, a log line or an evaluation; and, some steps later too, while a checkpoint is being
written. A run that is killed before its first checkpoint begins again.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BUPO = Path(__file__).parent.parent / "bupo.py"
SETTINGS = "--steps 300 --save-every 1 --keep 2 --eval-every 50 --eval-problems 8"
SETTINGS += " --prompts-per-step 4 --mini-batch 2"
CLOCK = {"rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb", "seconds"}


def start(arguments: str) -> subprocess.Popen:
    command = [sys.executable, BUPO, *arguments.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def last_checkpoint(run: Path) -> int:
    """Its step, or -1 if there is none."""
    return max((int(folder.name[11:]) for folder in run.glob("checkpoint-*")), default=-1)


def inside_checkpoint(run: Path, began: float) -> bool:
    """Whether a checkpoint is being written, or was when the process that began then was killed;
    what a process before it left may still be there, but is older."""
    try:
        return (run / ".checkpoint.tmp").stat().st_mtime > began
    except FileNotFoundError:
        return False


def kill(process: subprocess.Popen, run: Path, where: str, rng: random.Random) -> bool:
    """Kill the process there, unless it ends before; whether a checkpoint was being written."""
    last, began = last_checkpoint(run), time.time()
    steps = 0 if where == "start" else rng.randint(1, 9)
    wait = {"start": 10.0, "later": 0.5, "checkpoint": 0.0}[where]
    while process.poll() is None:
        if last_checkpoint(run) - last >= steps and (wait or inside_checkpoint(run, began)):
            time.sleep(rng.uniform(0, wait))
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()
    return inside_checkpoint(run, began)


def content(run: Path) -> dict[str, Any]:
    """The metrics without what a clock measured, the completions and the weights."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = [{name: line[name] for name in line.keys() - CLOCK} for line in metrics]
    last = run / f"checkpoint-{last_checkpoint(run)}" / "model.safetensors"
    completions = (run / "completions.jsonl").read_bytes()
    return dict(metrics=untimed, completions=completions, weights=last.read_bytes())


def main(kills: int) -> None:
    folder, rng, inside = Path(tempfile.mkdtemp()), random.Random(0), 0
    calm, wild = folder / "calm", folder / "wild"
    start(f"--out {calm} {SETTINGS}").wait()
    for n in range(kills + 1):
        begin_again = last_checkpoint(wild) < 0
        if begin_again:
            shutil.rmtree(wild, ignore_errors=True)
        process = start(f"--out {wild} {SETTINGS}" if begin_again else f"--resume {wild}")
        if n < kills:
            where = ("start", "later", "checkpoint")[n % 3]
            inside += kill(process, wild, where, rng)
            print(f"kill {n + 1}, {where}: last checkpoint {last_checkpoint(wild)}", flush=True)
    process.wait()
    ours, theirs = content(wild), content(calm)
    equal = {name: ours[name] == theirs[name] for name in ours}
    updates = sum((line.get("grad_norm") or 0) > 0 for line in ours["metrics"])
    print(f"{kills} kills, {inside} of them inside a checkpoint; {updates} steps moved weights")
    print(*(f"{name} equal: {same}" for name, same in equal.items()), sep=", ")
    sys.exit(not all(equal.values()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
