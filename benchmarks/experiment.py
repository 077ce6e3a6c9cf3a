r"""GRPO, BuPO and its rivals on one task, pair by pair, each run made by bupo.py's command line.

    python benchmarks/experiment.py                     # the built-in task, everything: hours
    python benchmarks/experiment.py --part settings     # or: beta, blocks, long, cost, picture
    python benchmarks/experiment.py --model FOLDER      # small sums on a real model, 12 steps

A pair is a base model and a seed: its runs start from the same weights and meet the same problems.
Base model 0 is tiny/, others are made by its make.py with another seed. The rivals are variants of
bupo.py, by exercises/check.py. A run that is in results/ is not made again. Prints the tables.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median, stdev
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "exercises"), str(ROOT / "tiny")]

import check  # noqa: E402

Pair = tuple[int, int]  # base model, seed
Settings = dict[str, tuple[str, dict[str, Any]]]  # a variant and its numbers, or "" and flags
Part = tuple[int, Settings, list[Pair]]  # training steps, settings, pairs
Table = dict[str, dict[Pair, float]]  # accuracy by setting and pair

BETA = 1.0  # of align: the largest of --part beta whose reward is not clearly behind the best
BETAS: Settings = {f"align, beta {b}": ("align", dict(layer=4, beta=b)) for b in (0.1, 1.0, 10.0)}
BLOCKS: Settings = {f"block {k} alone": ("one-block", dict(layer=k)) for k in range(1, 7)}
SETTINGS: Settings = {  # the boundary layer of tiny/ is 4 of L = 6
    "GRPO": ("", dict(internal_steps=0)),
    "BuPO, layer 4": ("", dict(internal_layer=4, internal_steps=10)),
    "BuPO, layer 5": ("", dict(internal_layer=5, internal_steps=10)),
    "BuPO, layer 4, no norm": ("", dict(internal_layer=4, internal_steps=10, internal_norm="none")),
    "low rate above layer 4": ("low-rate", dict(layer=4)),
    "align, layer 4": ("align", dict(layer=4, beta=BETA)),
    "align, layer 5": ("align", dict(layer=5, beta=BETA)),
}
LONG = {name: SETTINGS[name] for name in ("GRPO", "align, layer 4", "align, layer 5")}
PAIRS = [(base, seed) for seed in range(5) for base in (0, 1)]  # base model 2 chooses
PARTS: dict[str, Part] = {
    "beta": (30, BETAS, [(2, 0)]),
    "settings": (60, SETTINGS, PAIRS),
    "blocks": (60, BLOCKS, PAIRS[:5]),
    "long": (150, LONG, PAIRS),
}


def command(script: Path, **flags: Any) -> None:
    """Run a script with these flags."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(words)} failed:\n{done.stderr[-2000:]}")


def write_problems(file: Path, rows: list[tuple[Any, Any]]) -> Path:
    file.write_text(json.dumps([dict(prompt=p, answer=str(a)) for p, a in rows]))
    return file


def built_in(folder: Path) -> dict[str, Any]:
    """The problems that judge: held-out ones from number 512 on; by none of them was any setting
    or number chosen. What else a run needs comes with its base model."""
    from make import arithmetic, extract_boxed

    rows = [(q, extract_boxed(s)) for q, s in arithmetic(heldout=True).items()][512:1512]
    return dict(eval_dataset=write_problems(folder / "judge.json", rows))


def sums(folder: Path) -> dict[str, Any]:
    """For a real model: a + b, asked after one worked example."""
    example = [dict(role="user", content="What is 14 + 3?")]
    example += [dict(role="assistant", content=r"14 + 3 = \boxed{17}")]
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    asked = [[*example, dict(role="user", content=f"What is {a} + {b}?")] for a, b in pairs]
    rows = list(zip(asked, map(sum, pairs), strict=True))
    flags = dict(prompts_per_step=4, mini_batch=2, max_prompt_tokens=128, max_new_tokens=24)
    flags |= dict(lr=2e-5, system="You are a careful calculator.")
    flags |= dict(dataset=write_problems(folder / "training.json", rows[64:]))
    return flags | dict(eval_dataset=write_problems(folder / "held-out.json", rows[:64]))


def base_model(folder: Path, number: int) -> Path:
    """A base model of the built-in task; made, if it is not there."""
    out = folder / f"base-{number}" if number else ROOT / "tiny"
    if not out.exists():
        command(ROOT / "tiny" / "make.py", seed=number, out=out)
    return out


def script_and_flags(folder: Path, settings: Settings, name: str) -> tuple[Path, dict[str, Any]]:
    """The bupo.py of a setting, which once written stays for all runs of this folder, and flags."""
    variant, numbers = settings[name]
    script = folder / "code" / f"{name.replace(', ', '-').replace(' ', '-')}.py"
    if not script.exists():
        script.parent.mkdir(parents=True, exist_ok=True)
        plain = (ROOT / "bupo.py").read_text()
        script.write_text(check.variant(variant, **numbers) if variant else plain)
    return script, dict(internal_steps=0) if variant else numbers


def train(script: Path, out: Path, **flags: Any) -> list[dict[str, Any]]:
    """The log of a run, all that stays of it."""
    shutil.rmtree(out, ignore_errors=True)  # one that was begun before
    command(script, **flags, out=out)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def runs_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["runs"] if file.exists() else []


def save(file: Path, runs: list[dict[str, Any]], steps: int) -> None:
    """A result file, a run a line; never half of it."""
    lines = ",\n".join(map(json.dumps, runs))
    file.with_suffix(".tmp").write_text(f'{{\n"steps": {steps},\n"runs": [\n{lines}\n]\n}}\n')
    file.with_suffix(".tmp").replace(file)


def make_runs(file: Path, part: Part, common: dict[str, Any], args: argparse.Namespace) -> None:
    """Make the runs of a part that its result file lacks, pair after pair."""
    steps, settings, pairs = part
    runs, writing = runs_of(file), Lock()
    known = [(run["setting"], tuple(run["pair"])) for run in runs]
    missing = [(name, pair) for pair in pairs for name in settings if (name, pair) not in known]
    models = {base: args.model or base_model(args.folder, base) for _, (base, _) in missing}
    codes = {name: script_and_flags(args.folder, settings, name) for name, _ in missing}
    often = dict(save_every=steps, eval_every=steps, eval_problems=1000)

    def make(name: str, pair: Pair) -> None:
        (script, flags), (base, seed) = codes[name], pair
        flags = dict(common, **flags, **often, steps=steps, model=models[base], seed=seed)
        log = train(script, args.folder / f"{steps}-{script.stem}-base-{base}-seed-{seed}", **flags)
        found = dict(accuracy=100 * log[-1]["eval_avg"], error=100 * log[-1]["eval_se"])
        for curve in ("reward", "entropy", "completion_tokens"):
            found[curve] = [round(line[curve], 4) for line in log if curve in line]
        with writing:
            runs.append(dict(setting=name, pair=list(pair), **found))
            save(file, sorted(runs, key=lambda run: run["pair"]), steps)
        print(f"{steps} steps, {name}, {pair}: {found['accuracy']:.1f} %", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(make, *what) for what in missing]:
            job.result()


def cost(folder: Path, turns: int) -> None:
    """The time of a step (2 to 9; BuPO's of phase 1), as a share of one of GRPO in its turn."""
    settings = SETTINGS | BLOCKS
    runs: dict[str, dict[str, Any]] = {name: dict(setting=name, shares=[]) for name in settings}
    for name in [*settings] * turns:
        script, flags = script_and_flags(folder, settings, name)
        log = train(script, folder / "cost", **flags, model="tiny", steps=9, eval_problems=0)
        seconds = median(line["seconds"] for line in log[1:])
        if name == "GRPO":  # which is the first of a turn
            grpo = seconds
        runs[name]["shares"].append(seconds / grpo)
    save(RESULTS / "rivals-cost.json", list(runs.values()), steps=9)


def table_of(file: Path) -> Table:
    table: Table = {name: {} for name in SETTINGS | BLOCKS}  # in this order
    for run in runs_of(file):
        table.setdefault(run["setting"], {})[tuple(run["pair"])] = run["accuracy"]
    return {name: accuracies for name, accuracies in table.items() if accuracies}


def differences(table: Table, name: str) -> dict[Pair, float]:
    """Accuracy minus GRPO's, of all pairs that have both."""
    grpo = table.get("GRPO", {})
    return {pair: own - grpo[pair] for pair, own in table[name].items() if pair in grpo}


def summary(values: list[float]) -> tuple[float, float, float]:
    """Mean, standard deviation, standard error of the mean."""
    deviation = stdev(values) if len(values) > 1 else math.nan
    return fmean(values or [math.nan]), deviation, deviation / max(1, len(values)) ** 0.5


def print_table(title: str, table: Table) -> None:
    """Accuracy (standard deviation); minus GRPO's (standard error; pairs); a step's cost."""
    shares = {run["setting"]: run["shares"] for run in runs_of(RESULTS / "rivals-cost.json")}
    print(f"\n| {title} | accuracy, % | minus GRPO | a step |\n| --- | --- | --- | --- |")
    for name, own in table.items():
        gaps = list(differences(table, name).values())
        (accuracy, deviation, _), (gap, _, error) = summary(list(own.values())), summary(gaps)
        cell = "" if name == "GRPO" else f"{gap:+.1f} ({error:.1f}; {len(gaps)})"
        step = f"{median(shares[name]):.2f}" if name in shares else ""
        print(f"| {name} | {accuracy:.1f} ({deviation:.1f}) | {cell} | {step} |")


def draw(tables: dict[str, Table]) -> None:
    from analyze import colors, plt  # in the style of all pictures

    figure, axes = plt.subplots(1, len(tables), figsize=(3.3 * len(tables), 2.6), squeeze=False)
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        for name in [name for name in table if name != "GRPO"]:
            gaps = differences(table, name)
            for (base, _), gap in gaps.items():
                axis.plot(gap, name, "o", color=colors[base], alpha=0.6)
            mean, _, error = summary(list(gaps.values()))
            axis.errorbar(mean, name, xerr=2 * error, fmt="|", color="black", markersize=10)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="accuracy minus GRPO's, points", ymargin=0.1)
        axis.invert_yaxis()
    figure.suptitle("A dot a pair (base model 0 blue, 1 orange),\nblack: mean, two standard errors")
    figure.savefig(ROOT / "assets" / "rivals.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO, BuPO and rivals; see the top of this file.")
    parts = [*PARTS, "cost", "picture"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--model", help="a Hub id or a folder; without it the built-in task")
    parser.add_argument("--layer", type=int, default=28, help="l of BuPO with --model")
    parser.add_argument("--folder", type=Path, default=Path("runs", "experiment"))
    parser.add_argument("--turns", type=int, default=3, help="of --part cost")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.model:
        file, bupo = RESULTS / "real-model.json", dict(internal_layer=args.layer, internal_steps=4)
        settings = {"GRPO": SETTINGS["GRPO"], f"BuPO, layer {args.layer}": ("", bupo)}
        make_runs(file, (12, settings, [(0, s) for s in range(4)]), sums(args.folder), args)
        return print_table("12 steps", table_of(file))

    files = {name: RESULTS / f"rivals-{name}.json" for name in PARTS}
    for name, part in PARTS.items():
        if name in args.part:
            make_runs(files[name], part, built_in(args.folder), args)
    if "cost" in args.part:
        cost(args.folder, args.turns)
    for run in runs_of(files["beta"]):
        print(f"{run['setting']}: reward of the last 20 steps {fmean(run['reward'][-20:]):.3f}")
    settings, blocks, long = (table_of(files[name]) for name in ("settings", "blocks", "long"))
    grpo = {pair: own for pair, own in settings.get("GRPO", {}).items() if pair in PAIRS[:5]}
    blocks = {"GRPO": grpo, **blocks}
    tables = {"60 steps": settings, "60 steps, one block alone": blocks, "150 steps": long}
    for title, table in tables.items():
        print_table(title, table)
    if "picture" in args.part and len(settings) > 1:
        draw({title: table for title, table in tables.items() if len(table) > 1})


if __name__ == "__main__":
    main()
