r"""GRPO and BuPO on a real pretrained model, for a few steps on a CPU: small sums, each asked after one worked example.

    python benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct   # or a folder; killed, it goes on
    python benchmarks/real_model.py --seeds 1                                     # a first look

Four settings: both methods, computed in float32 and as on a GPU, in bfloat16 with float32 weights. The runs of a seed
meet the same problems in the same order, so differences are taken seed by seed. Held-out problems are none of the
training problems. Writes benchmarks/results/real-model.json and assets/real-model.png, and prints a table in Markdown.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sweep import ROOT, print_table, run, summary

EXAMPLE = ("What is 14 + 3?", r"14 + 3 = \boxed{17}")
GRPO, BUPO = dict(internal_steps=0), dict(internal_steps=4, internal_layer=28)  # of 30; it has no boundary layer
SETTINGS = {
    "GRPO": dict(GRPO, precision="float32"),
    "BuPO, layer 28, 4 steps": dict(BUPO, precision="float32"),
    "GRPO, bfloat16": dict(GRPO, precision="bfloat16"),
    "BuPO, layer 28, 4 steps, bfloat16": dict(BUPO, precision="bfloat16"),
}
RECIPE = dict(steps=12, prompts=4, mini_batch=2, lr=2e-5, max_completion=24, no_recompute=True)
EVALUATION = dict(eval_every=12, eval_problems=64, save_every=12, system="You are a careful calculator.")


def problems() -> list[dict]:
    """All sums a + b of a from 1 to 20 and b from 1 to 9, shuffled, in the chat form that bupo.py reads."""
    sums = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    random.Random(0).shuffle(sums)
    question, worked = EXAMPLE
    shown = [dict(role="user", content=question), dict(role="assistant", content=worked)]
    return [dict(prompt=[*shown, dict(role="user", content=f"What is {a} + {b}?")], answer=str(a + b)) for a, b in sums]


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO and BuPO on a real model, on a CPU.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each holds 5 GB")
    parser.add_argument("--folder", type=Path, default=Path("runs/real-model"), help="of the runs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = problems()
    files = {name: options.folder / f"{name}.jsonl" for name in ("held-out", "training")}
    for file, part in zip(files.values(), (rows[:64], rows[64:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    data = dict(dataset=files["training"], eval_dataset=files["held-out"])

    def one(job: tuple[int, str]) -> Path:
        seed, name = job
        out = options.folder / f"{list(SETTINGS).index(name)}-seed-{seed}"
        run(out, model=options.model, seed=seed, **data, **RECIPE, **EVALUATION, **SETTINGS[name])
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # 1.6 GB each, and the run is finished
        return out

    jobs = [(seed, name) for seed in range(options.seeds) for name in SETTINGS]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = dict(zip(jobs, pool.map(one, jobs), strict=True))
    runs = {name: [done[seed, name] for seed in range(options.seeds)] for name in SETTINGS}
    found = {name: summary(outs, runs["GRPO"]) for name, outs in runs.items()}
    (ROOT / "benchmarks" / "results" / "real-model.json").write_text(
        json.dumps(dict(seeds=options.seeds, steps=RECIPE["steps"], settings=found), indent=1) + "\n"
    )
    shown = [str(out) for outs in list(runs.values())[:2] for out in outs]
    picture = str(ROOT / "assets" / "real-model.png")
    subprocess.run([sys.executable, str(ROOT / "analyze.py"), "--runs", *shown, "--out", picture], check=True)
    print_table(found)


if __name__ == "__main__":
    main()
