r"""GRPO against BuPO, setting by setting and seed by seed, each run made by bupo.py's command line.

    python benchmarks/experiment.py                    # the built-in task: layers, lengths, no norm
    python benchmarks/experiment.py --model FOLDER     # small sums on a real model, such as SmolLM2

The runs of a seed meet the same problems in the same order, and on the built-in task start from the
same pretrained model, so differences to GRPO are taken seed by seed. Called again, it continues
where it was. Writes results/NAME.json and assets/NAME.png, and prints the table in Markdown.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
EXAMPLE = (("user", "What is 14 + 3?"), ("assistant", r"14 + 3 = \boxed{17}"))
CURVES = dict(reward="reward", entropy="entropy of the policy, nats", completion_tokens="tokens")


def run(out: Path, **flags: Any) -> Path:
    """A run of bupo.py in the folder `out`: begun, resumed, or left alone if it is finished."""
    if not (out / "model").exists():
        words = [
            word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)
        ]
        words = ["--resume", out] if (out / "config.json").exists() else ["--out", out, *words]
        command = list(map(str, [sys.executable, ROOT / "bupo.py", *words]))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        print(f"finished {out.name}", flush=True)
    return out


def write_problems(file: Path, rows: list[tuple[Any, Any]]) -> Path:
    file.write_text("".join(json.dumps(dict(prompt=p, answer=str(a))) + "\n" for p, a in rows))
    return file


def sums(folder: Path, model: str) -> dict[str, Any]:
    """What all runs on a real model share: a + b, asked after one worked example."""
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    asked = [(*EXAMPLE, ("user", f"What is {a} + {b}?")) for a, b in pairs]
    chats = [[dict(role=role, content=text) for role, text in said] for said in asked]
    rows = list(zip(chats, map(sum, pairs), strict=True))
    held_out = write_problems(folder / "held-out.jsonl", rows[:64])
    training = write_problems(folder / "training.jsonl", rows[64:])
    return dict(REAL, model=model, dataset=training, eval_dataset=held_out)


def built_in(folder: Path, seed: int) -> dict[str, Any]:
    """What all runs of a seed share: its pretrained model, and held-out problems from number 512
    on, by which no default was chosen. A step at a learning rate of 0 leaves the model as it is."""
    start = run(folder / f"start-{seed}", seed=seed, steps=1, lr=0.0, eval_problems=0)
    held_out = bupo.load_problems("arithmetic-heldout")[512:1512]
    rows = [(p.messages, p.answer) for p in held_out]
    held_out = write_problems(folder / f"held-out-{seed}.jsonl", rows)
    return dict(model=start, eval_problems=1000, eval_dataset=held_out)


def outcome(out: Path) -> dict[str, Any]:
    """What a run came to: accuracy at its end, all evaluations, the curves."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in log if "eval_avg" in record]
    curves = {name: [r[name] for r in log if name in r] for name in CURVES}
    return dict(accuracy=100 * evaluations[-1]["eval_avg"], evaluations=evaluations, **curves)


def print_table(found: dict[str, list[dict]]) -> None:
    def said(values: list[float], form: str) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{statistics.fmean(values):{form}} ({error:.1f})"

    print("\n| setting | accuracy, % | minus GRPO, seed by seed | entropy, nats | tokens |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(runs, found["GRPO"], strict=True)]
        cells = [said([one["accuracy"] for one in runs], ".1f"), said(gaps, "+.1f")]
        cells += [f"{statistics.fmean(one['entropy'][-1] for one in runs):.2f}"]
        cells += [f"{statistics.fmean(one['completion_tokens'][-1] for one in runs):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nIn brackets: standard errors over seeds.")


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
            width = 2.5 if name == "GRPO" else 1.2
            axis.plot(range(1, len(mean) + 1), mean, linewidth=width, label=name)
            axis.set(xlabel="step", ylabel=CURVES[key])
    dots.set(yticks=range(len(found)), yticklabels=list(found), xlabel="held-out accuracy, %")
    dots.invert_yaxis()
    labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**how)
    parser.add_argument("--model", help="a Hub id or a folder; without it the built-in task")
    parser.add_argument("--layer", type=int, default=28, help="l of BuPO with --model, 4 steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of training [60; with --model 12]")
    parser.add_argument("--only", nargs="+", default=[""], help="settings, by a part of their name")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    name, steps = ("real-model", 12) if args.model else ("sweep", 60)
    if args.steps:
        name, steps = f"{name}-{args.steps}", args.steps
    settings = {"GRPO": dict(internal_steps=0)}
    bupo_real = dict(internal_layer=args.layer, internal_steps=4)
    others = {f"BuPO, layer {args.layer}, 4 steps": bupo_real} if args.model else TINY
    settings |= {s: others[s] for s in others if any(part in s for part in args.only)}
    folder, seeds, common = Path("runs", name), range(args.seeds), dict(steps=steps)
    common |= dict(save_every=steps, eval_every=max(1, steps // 3))
    folder.mkdir(parents=True, exist_ok=True)

    def shared(seed: int) -> dict[str, Any]:
        return sums(folder, args.model) if args.model else built_in(folder, seed)

    def one(job: tuple[int, str]) -> dict[str, Any]:
        seed, setting = job
        out = folder / f"{setting.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
        return outcome(run(out, seed=seed, **common, **starts[seed], **settings[setting]))

    with ThreadPoolExecutor(args.jobs) as pool:
        starts = list(pool.map(shared, seeds))
        jobs = [(seed, setting) for seed in seeds for setting in settings]
        done = dict(zip(jobs, pool.map(one, jobs), strict=True))
    found = {setting: [done[seed, setting] for seed in seeds] for setting in settings}
    (ROOT / "assets").mkdir(exist_ok=True)
    results = ROOT / "benchmarks" / "results" / f"{name}.json"
    results.write_text(json.dumps(dict(steps=steps, settings=found), indent=1) + "\n")
    draw(found, ROOT / "assets" / f"{name}.png")
    print_table(found)


if __name__ == "__main__":
    main()
