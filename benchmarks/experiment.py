r"""GRPO against BuPO, setting by setting and seed by seed, each run made by bupo.py's command line.

    python benchmarks/experiment.py                    # the built-in task: layers, lengths, no norm
    python benchmarks/experiment.py --model FOLDER     # small sums on a real model, such as SmolLM2

The runs of a seed meet the same problems in the same order, and on the built-in task start from the
same pretrained model, so differences to GRPO are taken seed by seed. Called again, it continues
where it was. Writes results/NAME.json and assets/NAME.png, and prints the table in Markdown.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

import bupo

ROOT = Path(bupo.__file__).parent
TINY = {"BuPO, layer 3, 10 steps, no norm": dict(internal_layer=3, internal_norm="none")}
for layer, steps in ((3, 10), (4, 10), (5, 10), (3, 20), (3, 40), (3, 60)):
    TINY[f"BuPO, layer {layer}, {steps} steps"] = dict(internal_layer=layer, internal_steps=steps)
REAL = dict(prompts_per_step=4, mini_batch=2, lr=2e-5, max_new_tokens=24, max_prompt_tokens=128)
REAL |= dict(eval_problems=64, system="You are a careful calculator.")
EXAMPLE = [dict(role="user", content="What is 14 + 3?")]
EXAMPLE += [dict(role="assistant", content=r"14 + 3 = \boxed{17}")]
CURVES = dict(reward="reward", entropy="entropy of the policy, nats", completion_tokens="tokens")


def run(out: Path, **flags: Any) -> Path:
    """A run of bupo.py in the folder `out`: begun, resumed, or left alone if it is finished."""
    if not (out / "model").exists():
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        words = [f"--resume={out}"] if (out / "config.json").exists() else [f"--out={out}", *words]
        done = subprocess.run([sys.executable, ROOT / "bupo.py", *words], capture_output=True)
        if done.returncode:
            raise SystemExit(f"{out.name} failed:\n{done.stderr.decode()[-2000:]}")
        print(f"finished {out.name}", flush=True)
    return out


def write_problems(file: Path, rows: list[tuple[Any, Any]]) -> Path:
    file.write_text(json.dumps([dict(prompt=p, answer=str(a)) for p, a in rows]))
    return file


def sums(folder: Path, model: str, _: int) -> dict[str, Any]:
    """What all runs on a real model share: a + b, asked after one worked example."""
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    asked = [dict(role="user", content=f"What is {a} + {b}?") for a, b in pairs]
    rows = [([*EXAMPLE, last], sum(pair)) for last, pair in zip(asked, pairs, strict=True)]
    held_out = write_problems(folder / "held-out.json", rows[:64])
    training = write_problems(folder / "training.json", rows[64:])
    return dict(REAL, model=model, dataset=training, eval_dataset=held_out)


def built_in(folder: Path, seed: int) -> dict[str, Any]:
    """What all runs of a seed share: its pretrained model, and held-out problems from number 512
    on, by which no default was chosen. A step at a learning rate of 0 leaves the model as it is."""
    start = run(folder / f"start-{seed}", seed=seed, steps=1, lr=0.0, eval_problems=0)
    rows = [(p.messages, p.answer) for p in bupo.load_problems("arithmetic-heldout")[512:1512]]
    held_out = write_problems(folder / f"held-out-{seed}.json", rows)
    return dict(model=start, eval_problems=1000, eval_dataset=held_out)


def outcome(out: Path) -> dict[str, Any]:
    """What a run came to: all evaluations, accuracy in % at its end, the curves."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in log if "eval_avg" in record]
    curves = {name: [record[name] for record in log if name in record] for name in CURVES}
    return dict(accuracy=100 * evaluations[-1]["eval_avg"], evaluations=evaluations, **curves)


def print_table(found: dict[str, list[dict]]) -> None:
    """In brackets the standard deviation over seeds, and the standard error of the difference."""
    print("\n| setting | accuracy, % | minus GRPO, seed by seed |\n| --- | --- | --- |")
    grpo = [one["accuracy"] for one in found["GRPO"]]
    for name, runs in found.items():
        final = [one["accuracy"] for one in runs]
        gaps = [a - b for a, b in zip(final, grpo, strict=True)]
        spread, error = (statistics.stdev(x) if len(x) > 1 else math.nan for x in (final, gaps))
        cell = f"{statistics.fmean(final):.1f} ({spread:.1f})"
        gap = f"{statistics.fmean(gaps):+.1f} ({error / len(gaps) ** 0.5:.1f})"
        print(f"| {name} | {cell} | {gap} |")


def draw(found: dict[str, list[dict]], file: Path) -> None:
    """Accuracy by setting, a dot a seed; reward, entropy and tokens by step, means over seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    dots = axes[0, 0]
    for y, (name, runs) in enumerate(found.items()):
        final = [one["accuracy"] for one in runs]
        dots.plot(final, [y] * len(final), "o", color="#0072B2", alpha=0.5)
        dots.plot(statistics.fmean(final), y, "|", color="black", markersize=16, markeredgewidth=2)
        for axis, key in zip(axes.flat[1:], CURVES, strict=True):
            mean = [statistics.fmean(v) for v in zip(*(one[key] for one in runs), strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, lw=2.5 if name == "GRPO" else 1.2, label=name)
            axis.set(xlabel="step", ylabel=CURVES[key])
    dots.set(yticks=range(len(found)), yticklabels=list(found), xlabel="held-out accuracy, %")
    dots.invert_yaxis()
    figure.legend(
        *axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO against BuPO; see the top of this file.")
    parser.add_argument("--model", help="a Hub id or a folder; without it the built-in task")
    parser.add_argument("--layer", type=int, default=28, help="l of BuPO with --model, 4 steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of training [60; with --model 12]")
    parser.add_argument("--only", nargs="+", default=[""], help="settings, by a part of their name")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    name, steps = "real-model" if args.model else "sweep", args.steps or (12 if args.model else 60)
    name += f"-{steps}" if args.steps else ""
    settings = {"GRPO": dict(internal_steps=0)}
    real = {f"BuPO, layer {args.layer}, 4 steps": dict(internal_layer=args.layer, internal_steps=4)}
    others = real if args.model else TINY
    settings |= {s: others[s] for s in others if any(part in s for part in args.only)}
    common = dict(steps=steps, save_every=steps, eval_every=max(1, steps // 3))
    (folder := Path("runs", name)).mkdir(parents=True, exist_ok=True)
    begin = partial(sums, folder, args.model) if args.model else partial(built_in, folder)

    def one(setting: str, seed: int) -> dict[str, Any]:
        out = folder / f"{setting.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
        return outcome(run(out, seed=seed, **common, **starts[seed], **settings[setting]))

    with ThreadPoolExecutor(args.jobs) as pool:
        starts = list(pool.map(begin, range(args.seeds)))
        runs = {s: [pool.submit(one, s, seed) for seed in range(args.seeds)] for s in settings}
        found = {setting: [job.result() for job in jobs] for setting, jobs in runs.items()}
    results = ROOT / "benchmarks" / "results" / f"{name}.json"
    results.write_text(json.dumps(dict(steps=steps, settings=found), indent=1) + "\n")
    draw(found, ROOT / "assets" / f"{name}.png")
    print_table(found)


if __name__ == "__main__":
    main()
