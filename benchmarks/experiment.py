r"""GRPO, BuPO and its rivals on one task, pair by pair, each run made by bupo.py's command line.

    python benchmarks/experiment.py                     # the built-in task, everything: hours
    python benchmarks/experiment.py --part settings     # or: beta, blocks, long, cost, picture
    python benchmarks/experiment.py --model FOLDER      # small sums on a real model, 12 steps

A pair is a base model and a seed: its runs start from the same weights and meet the same problems,
so differences to GRPO are taken pair by pair. Base model 0 is tiny/, others are made by its make.py
with another seed. The rivals are variants of bupo.py, by exercises/check.py. Called again, it
continues where it was: a run that is in results/ is not made again. Prints the tables in Markdown.
"""

import argparse
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median, stdev
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "exercises"), str(ROOT / "tiny")]

import check  # noqa: E402

How = tuple[str, dict[str, Any], dict[str, Any]]  # variant of bupo.py, its numbers, flags
Pair = tuple[int, int]  # base model, seed
Runs = list[dict[str, Any]]
BETA = 1.0  # of align: the largest of --part beta whose reward is not clearly behind the best


def bupo_at(layer: int, steps: int = 10, norm: str = "final") -> How:
    return "", {}, dict(internal_layer=layer, internal_steps=steps, internal_norm=norm)


def rival(name: str, **numbers: float) -> How:
    return name, numbers, dict(internal_steps=0)


# The boundary layer of tiny/ is 4 of L = 6.
SETTINGS = {
    "GRPO": rival(""),
    "BuPO, layer 4": bupo_at(4),
    "BuPO, layer 5": bupo_at(5),
    "BuPO, layer 4, no norm": bupo_at(4, norm="none"),
    "low rate above layer 4": rival("low-rate", layer=4),
    "align, layer 4": rival("align", layer=4, beta=BETA),
    "align, layer 5": rival("align", layer=5, beta=BETA),
}
BETAS = {f"align, beta {b}": rival("align", layer=4, beta=b) for b in (0.1, 1.0, 10.0)}
BLOCKS = {f"block {k} alone": rival("one-block", layer=k) for k in range(1, 7)}
PAIRS = [(base, seed) for seed in range(5) for base in (0, 1)]  # base model 2 chooses
PARTS: dict[str, tuple[int, dict[str, How], list[Pair]]] = {  # training steps, settings, pairs
    "beta": (30, BETAS, [(2, 0)]),
    "settings": (60, SETTINGS, PAIRS),
    "blocks": (60, BLOCKS, PAIRS[:5]),
    "long": (150, SETTINGS, PAIRS),
}
REAL: dict[str, Any] = dict(prompts_per_step=4, mini_batch=2, lr=2e-5, max_new_tokens=24)
REAL |= dict(max_prompt_tokens=128, system="You are a careful calculator.")
EXAMPLE: list[dict[str, str]] = [dict(role="user", content="What is 14 + 3?")]
EXAMPLE += [dict(role="assistant", content=r"14 + 3 = \boxed{17}")]


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
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    asked = [dict(role="user", content=f"What is {a} + {b}?") for a, b in pairs]
    rows = [([*EXAMPLE, last], sum(pair)) for last, pair in zip(asked, pairs, strict=True)]
    held_out = write_problems(folder / "held-out.json", rows[:64])
    training = write_problems(folder / "training.json", rows[64:])
    return dict(REAL, dataset=training, eval_dataset=held_out)


def base_model(folder: Path, number: int) -> Path:
    """A base model of the built-in task; made, if it is not there."""
    out = folder / f"base-{number}" if number else ROOT / "tiny"
    if not out.exists():
        command(ROOT / "tiny" / "make.py", seed=number, out=out)
    return out


def code(folder: Path, setting: str, how: How) -> Path:
    """The bupo.py of a setting; once written, it stays for all runs of this folder."""
    (variant, numbers, _), name = how, setting.replace(", ", "-").replace(" ", "-")
    file = folder / "code" / f"{name}.py"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        source = check.variant(variant, **numbers) if variant else (ROOT / "bupo.py").read_text()
        file.write_text(source)
    return file


def make_run(script: Path, out: Path, steps: int, flags: dict, common: dict) -> dict[str, Any]:
    """Train, then evaluate the last checkpoint; what a result file says of it."""
    judged = out.with_name(f"{out.name}-judged")
    for unfinished in (out, judged):
        shutil.rmtree(unfinished, ignore_errors=True)
    common = dict(common, seed=flags["seed"])
    how = dict(common, **flags, steps=steps, save_every=steps, keep=1)
    command(script, **how, eval_problems=0, out=out)
    last = out / f"checkpoint-{steps}"
    command(script, **common, model=last, steps=0, eval_problems=1000, out=judged)
    shutil.rmtree(last)  # the logs stay
    said = json.loads((judged / "metrics.jsonl").read_text())
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("reward", "entropy", "completion_tokens")
    curves = {name: [round(record[name], 4) for record in log] for name in names}
    return dict(accuracy=100 * said["eval_avg"], error=100 * said["eval_se"], **curves)


def runs_of(file: Path) -> Runs:
    return json.loads(file.read_text())["runs"] if file.exists() else []


def save(file: Path, runs: Runs, **facts: Any) -> None:
    """A result file, a run a line; never half of it."""
    text = "".join(f'"{name}": {json.dumps(fact)},\n' for name, fact in facts.items())
    lines = ",\n".join(map(json.dumps, runs))
    file.with_suffix(".tmp").write_text(f'{{\n{text}"runs": [\n{lines}\n]\n}}\n')
    file.with_suffix(".tmp").replace(file)


def play(folder: Path, file: Path, part: tuple, common: dict, base: Any, jobs: int) -> None:
    """Make the runs of a part that its result file lacks, pair after pair."""
    steps, settings, pairs = part
    runs, writing = runs_of(file), Lock()
    known = [(run["setting"], tuple(run["pair"])) for run in runs]
    bases = {number: base(number) for number, _ in pairs}

    def one(setting: str, pair: Pair) -> None:
        script = code(folder, setting, settings[setting])
        flags = dict(settings[setting][2], model=bases[pair[0]], seed=pair[1])
        out = folder / f"{steps}-{script.stem}-base-{pair[0]}-seed-{pair[1]}"
        run = make_run(script, out, steps, flags, common)
        with writing:
            runs.append(dict(setting=setting, pair=pair, **run))
            save(file, sorted(runs, key=lambda run: run["pair"]), steps=steps)
        said = f"{steps} steps, {setting}, base {pair[0]}, seed {pair[1]}: {run['accuracy']:.1f} %"
        print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        todo = [(s, pair) for pair in pairs for s in settings if (s, pair) not in known]
        for job in [pool.submit(one, *what) for what in todo]:
            job.result()


def cost(folder: Path, turns: int) -> None:
    """The processor time of a step, as a share of one of GRPO in the same turn. A setting's first
    steps, so BuPO's are of phase 1."""
    shares: dict[str, list[float]] = {}

    def cpu_seconds(script: Path, steps: int, flags: dict) -> float:
        shutil.rmtree(out := folder / "cost", ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command(script, **flags, model=ROOT / "tiny", steps=steps, eval_problems=0, out=out)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for _ in range(turns):
        spent: dict[str, float] = {}
        for setting, how in (SETTINGS | BLOCKS).items():
            script = code(folder, setting, how)
            begun, more = (cpu_seconds(script, steps, how[2]) for steps in (1, 9))
            spent[setting] = more - begun  # of 8 steps
            shares.setdefault(setting, []).append(spent[setting] / spent["GRPO"])
    save(RESULTS / "rivals-cost.json", [dict(setting=s, shares=x) for s, x in shares.items()])


def differences(runs: Runs, setting: str, grpo: Runs) -> list[tuple[Pair, float]]:
    """(pair, accuracy minus GRPO's) of all pairs that have both."""
    plain = {tuple(run["pair"]): run["accuracy"] for run in grpo if run["setting"] == "GRPO"}
    mine = {tuple(run["pair"]): run["accuracy"] for run in runs if run["setting"] == setting}
    return [(pair, mine[pair] - plain[pair]) for pair in sorted(mine) if pair in plain]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return fmean(values or [math.nan]), stdev(values) if len(values) > 1 else math.nan


def print_table(runs: Runs, grpo: Runs, heading: str) -> None:
    """Accuracy, with its standard deviation over pairs; the difference to GRPO's, with its standard
    error and the number of pairs; a step's cost, median of the turns."""
    shares = {one["setting"]: one["shares"] for one in runs_of(RESULTS / "rivals-cost.json")}
    print(f"\n| {heading} | accuracy, % | minus GRPO | a step |\n| --- | --- | --- | --- |")
    for setting in dict.fromkeys(run["setting"] for run in runs):
        final = [run["accuracy"] for run in runs if run["setting"] == setting]
        gaps = [gap for _, gap in differences(runs, setting, grpo)]
        (mean, spread), (gap, each) = mean_and_spread(final), mean_and_spread(gaps)
        cell = f"{gap:+.1f} ({each / max(1, len(gaps)) ** 0.5:.1f}; {len(gaps)})"
        cell = "" if setting == "GRPO" else cell
        step = f"{median(shares[setting]):.2f}" if setting in shares else ""
        print(f"| {setting} | {mean:.1f} ({spread:.1f}) | {cell} | {step} |", flush=True)


def draw(parts: dict[str, Runs]) -> None:
    """Differences to GRPO: a dot a pair, and the mean with a bar of two standard errors."""
    from analyze import plt  # in the style of all pictures

    titles = dict(settings="60 steps", blocks="60 steps, one block alone", long="150 steps")
    shown = {part: runs for part, runs in parts.items() if part in titles and runs}
    figure, axes = plt.subplots(1, len(shown), figsize=(3.3 * len(shown), 2.6), squeeze=False)
    for axis, (part, runs) in zip(axes.flat, shown.items(), strict=True):
        grpo = parts["settings"] if part == "blocks" else runs
        names = [s for s in PARTS[part][1] if s != "GRPO" and differences(runs, s, grpo)]
        for y, name in enumerate(names):
            gaps = differences(runs, name, grpo)
            for base, color in ((0, "#0072B2"), (1, "#D55E00")):
                x = [gap for pair, gap in gaps if pair[0] == base]
                how: Any = dict(color=color, label=f"base model {base}" if y == 0 else None)
                axis.plot(x, [y - 0.12 + 0.24 * base] * len(x), "o", alpha=0.6, **how)
            mean, spread = mean_and_spread([gap for _, gap in gaps])
            bar: Any = dict(fmt="|", color="black", markersize=10)
            axis.errorbar(mean, y, xerr=2 * spread / len(gaps) ** 0.5, **bar)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="accuracy minus GRPO's, points", yticks=range(len(names)))
        axis.set_yticklabels(names)
        axis.set_title(titles[part], loc="left")
        axis.invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Difference to GRPO, a dot a pair; black: mean and two standard errors")
    figure.savefig(ROOT / "assets" / "rivals.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO, BuPO and rivals; see the top of this file.")
    parts = [*PARTS, "cost", "picture"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--only", nargs="+", default=[""], help="settings, by a part of their name")
    parser.add_argument("--model", help="a Hub id or a folder; without it the built-in task")
    parser.add_argument("--layer", type=int, default=28, help="l of BuPO with --model, 4 steps")
    parser.add_argument("--seeds", type=int, default=4, help="with --model")
    parser.add_argument("--folder", type=Path, default=Path("runs", "experiment"))
    parser.add_argument("--turns", type=int, default=3, help="of --part cost")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.model:
        settings = {"GRPO": rival(""), f"BuPO, layer {args.layer}": bupo_at(args.layer, 4)}
        part, file = (
            (12, settings, [(0, s) for s in range(args.seeds)]),
            RESULTS / "real-model.json",
        )
        play(args.folder, file, part, sums(args.folder), lambda _: args.model, args.jobs)
        return print_table(runs_of(file), runs_of(file), "12 steps")
    common, found = built_in(args.folder), {}
    for name, (steps, settings, pairs) in PARTS.items():
        file = RESULTS / f"rivals-{name}.json"
        if name in args.part:
            part = (
                steps,
                {s: settings[s] for s in settings if any(t in s for t in args.only)},
                pairs,
            )
            play(args.folder, file, part, common, lambda n: base_model(args.folder, n), args.jobs)
        found[name] = runs_of(file)
    if "cost" in args.part:
        cost(args.folder, args.turns)
    for run in found["beta"]:
        print(f"{run['setting']}: reward of the last 20 steps {fmean(run['reward'][-20:]):.3f}")
    for name in ("settings", "blocks", "long"):
        grpo = found["settings" if name == "blocks" else name]
        print_table(found[name], grpo, f"{name}, {PARTS[name][0]} steps")
    if "picture" in args.part and found["settings"]:
        draw(found)


if __name__ == "__main__":
    main()
