r"""GRPO against BuPO on the built-in task: five seeds of each setting, from the command line as anyone would run them.

    python benchmarks/sweep.py                # on two cores about half an hour; killed, it goes on where it was
    python benchmarks/sweep.py --seeds 1      # a first look, in about 6

The runs of a seed start from the same warmed-up model and meet the same problems in the same order, so differences are
taken seed by seed. They differ in the flags of SETTINGS alone; all else is the preset, which was chosen for GRPO and
BuPO together. Accuracy is avg@4 on the held-out problems from number 512 on: no setting was ever chosen by them.

Writes benchmarks/results/sweep.json and assets/sweep.png, and prints the table in Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

import bupo

ROOT = Path(bupo.__file__).parent
STEPS = 60  # of training, as preset
SETTINGS = {
    "GRPO": dict(internal_steps=0),
    "BuPO, layer 3, 10 steps (preset)": dict(internal_layer=3, internal_steps=10),
    "BuPO, boundary layer, 10 steps": dict(internal_layer="auto", internal_steps=10),
    "BuPO, layer 5 = L - 1, 10 steps": dict(internal_layer=5, internal_steps=10),
    "BuPO, layer 3, 20 steps": dict(internal_layer=3, internal_steps=20),
    "BuPO, layer 3, 40 steps": dict(internal_layer=3, internal_steps=40),
    "BuPO, layer 3, 60 steps (all)": dict(internal_layer=3, internal_steps=60),
    "BuPO, layer 3, 10 steps, no norm": dict(internal_layer=3, internal_steps=10, internal_norm="none"),
}


def run(out: Path, **flags: object) -> Path:
    """A run of bupo.py in the folder `out`: begun, gone on with, or left alone if finished. True makes a bare flag."""
    if not (out / "model").exists():
        begun = (out / "config.json").exists()
        words = ["--resume", out] if begun else ["--out", out]
        if not begun:
            for name, value in flags.items():
                words += ["--" + name.replace("_", "-"), *([] if value is True else [value])]
        command = [sys.executable, ROOT / "bupo.py", *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
        print(f"finished {out.name}", flush=True)
    return out


def all_runs(folder: Path, seeds: int, jobs: int) -> dict[str, list[Path]]:
    """Every run of every setting, in the order of the seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = folder / "held-out.jsonl"
    rows = [dict(question=p.messages[0]["content"], answer=p.answer) for p in bupo.load_problems("arithmetic-heldout")]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[512:1512]))
    common = dict(eval_dataset=held_out, eval_problems=1000, eval_every=STEPS, save_every=STEPS)
    with ThreadPoolExecutor(jobs) as pool:
        # A step at a learning rate of 0 changes nothing: what it saves is the model after its warm-up.
        start = dict(steps=1, lr=0.0, eval_problems=0)
        starts = list(pool.map(lambda seed: run(folder / f"start-{seed}", seed=seed, **start), range(seeds)))

        def one(job: tuple[int, str]) -> Path:
            seed, name = job
            out = folder / f"{list(SETTINGS).index(name)}-seed-{seed}"
            return run(out, model=starts[seed], seed=seed, **common, **SETTINGS[name])

        names = [(seed, name) for seed in range(seeds) for name in SETTINGS]
        done = dict(zip(names, pool.map(one, names), strict=True))
    return {name: [done[seed, name] for seed in range(seeds)] for name in SETTINGS}


def summary(runs: list[Path], grpo: list[Path]) -> dict:
    """What a setting came to: per seed, and as mean and standard deviation over seeds."""
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in runs]
    base = [json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval_avg"] for out in grpo]
    evaluations = [[line for line in log if "eval_avg" in line] for log in lines]
    steps = [[line for line in log if "reward" in line] for log in lines]
    final = [evaluation[-1]["eval_avg"] for evaluation in evaluations]
    assert all(evaluation[-1]["step"] == log[-1]["step"] for evaluation, log in zip(evaluations, steps, strict=True))
    return dict(
        before=[evaluation[0]["eval_avg"] for evaluation in evaluations],
        final=final,
        difference_from_grpo=[a - b for a, b in zip(final, base, strict=True)],
        layers=[log[0]["layer"] for log in steps],
        **{name: [log[-1][name] for log in steps] for name in ("reward", "entropy", "completion_tokens")},
        curves={
            name: [[line[name] for line in log] for log in steps] for name in ("reward", "entropy", "completion_tokens")
        },
    )


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(found: dict[str, dict]) -> None:
    print("\n| setting | accuracy, % | minus GRPO, seed by seed | entropy, nats | tokens |")
    print("| --- | --- | --- | --- | --- |")
    for name, one in found.items():
        mean, spread = mean_and_spread([100 * x for x in one["final"]])
        difference, sd = mean_and_spread([100 * x for x in one["difference_from_grpo"]])
        error = sd / len(one["final"]) ** 0.5
        gap = "" if name == "GRPO" else f"{difference:+.1f} (standard error {error:.1f})"
        entropy, tokens = statistics.fmean(one["entropy"]), statistics.fmean(one["completion_tokens"])
        print(f"| {name} | {mean:.1f} ({spread:.1f}) | {gap} | {entropy:.2f} | {tokens:.1f} |")


def draw(found: dict[str, dict], file: Path) -> None:
    """Final accuracy by setting, a dot per seed; and reward, entropy and length over training, means over seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    names = list(found)
    for y, name in enumerate(names):
        final = [100 * x for x in found[name]["final"]]
        axes[0, 0].plot(final, [y] * len(final), "o", color="#0072B2", alpha=0.5, markersize=5)
        axes[0, 0].plot(statistics.fmean(final), y, "|", color="black", markersize=16, markeredgewidth=2)
    before = 100 * statistics.fmean(found["GRPO"]["before"])
    axes[0, 0].axvline(before, color="grey", linestyle=":", label="before RL")
    axes[0, 0].axvline(100 * statistics.fmean(found["GRPO"]["final"]), color="grey", linestyle="--", label="GRPO, mean")
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, xlabel=f"held-out accuracy after {STEPS} steps, %")
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(loc="lower left", fontsize=8)
    shown = {
        "GRPO": ("#000000", "-"),
        "BuPO, layer 3, 10 steps (preset)": ("#0072B2", "--"),
        "BuPO, layer 3, 20 steps": ("#009E73", "-."),
        "BuPO, layer 3, 40 steps": ("#E69F00", ":"),
        "BuPO, layer 3, 60 steps (all)": ("#D55E00", (0, (5, 1, 1, 1, 1, 1))),
    }
    panels = [
        ("reward", "reward"),
        ("entropy", "entropy of the policy, nats"),
        ("completion_tokens", "tokens a completion"),
    ]
    for axis, (key, label) in zip(axes.flat[1:], panels, strict=True):
        for name, (colour, dashes) in shown.items():
            mean = [statistics.fmean(values) for values in zip(*found[name]["curves"][key], strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linestyle=dashes, label=name)
        axis.set(xlabel="step", ylabel=label)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO against BuPO on the built-in task.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="of the runs")
    options = parser.parse_args()
    runs = all_runs(options.folder, options.seeds, options.jobs)
    found = {name: summary(outs, runs["GRPO"]) for name, outs in runs.items()}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "sweep.json").write_text(
        json.dumps(dict(seeds=options.seeds, steps=STEPS, settings=found), indent=1) + "\n"
    )
    draw(found, ROOT / "assets" / "sweep.png")
    print_table(found)


if __name__ == "__main__":
    main()
