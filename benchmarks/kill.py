"""Kill a run 30 times, resume it each time, and compare it with an undisturbed one, bit for bit.

    python benchmarks/kill.py        # or with the number of kills

The kills take turns: at a random moment of the first ten seconds; some steps later; and, some steps
later too, while a checkpoint is being written. A run without a checkpoint begins again.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

BUPO = Path(__file__).parent.parent / "bupo.py"
SETTINGS = "--steps 300 --save-every 1 --keep 2 --eval-every 50 --eval-problems 8"
SETTINGS += " --prompts-per-step 4 --mini-batch 2"
UNFINISHED = ".checkpoint.tmp"  # a checkpoint that is being written, or was at a kill
CLOCK = {"peak_memory_gb", "seconds"}


def start(flags: str) -> Popen:
    return Popen([sys.executable, BUPO, *flags.split()], stdout=DEVNULL, stderr=DEVNULL)


def last_checkpoint(run: Path) -> int:  # its step, or -1 if there is none
    return max((int(folder.name[11:]) for folder in run.glob("checkpoint-*")), default=-1)


def wait(process: Popen, run: Path, where: str, rng: random.Random) -> None:
    """Until it is time to kill the process, or until it ends."""
    step = last_checkpoint(run) + rng.randint(1, 9)
    while where != "start" and process.poll() is None and last_checkpoint(run) < step:
        time.sleep(0.0005)
    while where == "checkpoint" and process.poll() is None and not (run / UNFINISHED).exists():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, {"start": 10, "later": 0.5, "checkpoint": 0}[where]))


def content(run: Path) -> dict[str, Any]:
    """The metrics without what a clock measured, the completions and the weights."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: line[name] for name in line.keys() - CLOCK} for line in log]
    weights = (run / f"checkpoint-{last_checkpoint(run)}" / "model.safetensors").read_bytes()
    completions = (run / "completions.jsonl").read_bytes()
    return dict(metrics=metrics, completions=completions, weights=weights)


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
            wait(process, wild, where := ("start", "later", "checkpoint")[n % 3], rng)
            process.kill()
            process.wait()
            inside += where != "start" and (wild / UNFINISHED).exists()  # and not an older one's
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
