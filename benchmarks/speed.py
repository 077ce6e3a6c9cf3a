"""How fast and how lean bupo.py is: ratios, each measured in one run, beside the least that they could be.

    python benchmarks/speed.py                                   # with small random models
    python benchmarks/speed.py --model FOLDER                    # a real model where one matters, such as SmolLM2-135M
    python benchmarks/speed.py --only phase1 rollouts step growth start --quick

Whatever is compared runs in turn, A B A B ..., so that a busy machine slows both; a line says the median of the turns'
ratios and the range (`step`: of its steps; each way runs in a process of its own, one after the other). The floor is
counted, in operations or bytes, not measured. Lines and seconds also go to results/speed-MACHINE.json. On a GPU all of
it computes in bfloat16, as bupo.py does. The built-in task and the test suite take too long for this script.
"""

import argparse
import gc
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from unittest import mock

import rivals
import torch
import transformers
from measure import BFLOAT16, DEVICE, forget_peak, in_fresh_process, in_turn, line, machine, memory, ratios
from torch import Tensor

import bupo

HERE = Path(__file__).parent
PARTS = ("phase1", "rollouts", "step", "growth", "start")

# Work =================================================================================================================


def small_qwen3(layers: int = 8, hidden: int = 256, vocabulary: int = 8192) -> tuple[bupo.Model, bupo.Tokenizer]:
    """A random Qwen3 in float32, with the tokenizer of the built-in model, whose tokens are the first 102."""
    _, tokenizer = bupo.tiny_model(0)
    size = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=vocabulary)
    heads = dict(num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32)
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**size, **heads, **ends, max_position_embeddings=4096)
    )
    return model.to(DEVICE).eval(), tokenizer


def load(which: dict) -> tuple[bupo.Model, bupo.Tokenizer]:
    """`which`: dict(folder=...) of a real model, or the sizes of a small Qwen3."""
    return bupo.load_model(which["folder"], DEVICE) if "folder" in which else small_qwen3(**which)


def random_sequences(model: bupo.Model, count: int, prompt: int, completion: int) -> bupo.Sequences:
    draw, top = random.Random(0), model.config.vocab_size
    ids = [[draw.randrange(top) for _ in range(prompt + completion)] for _ in range(count)]
    return [(row[:prompt], row[prompt:]) for row in ids]


def settings(problems: int, group: int, **more) -> bupo.Config:
    return bupo.Config(prompts=problems, group=group, mini_batch=max(1, problems // 2), **more)


def adam(model: bupo.Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)


def operations(model: bupo.Model, layer: int, sequences: bupo.Sequences, authors: bool = False) -> float:
    """Operations that an update at `layer` cannot do without: forward for the old policy, forward, backward.

    2 per weight and token in blocks 1..layer, 4 per pair of tokens and channel in their attention, and 2 per weight of
    lm_head and completion token; a backward pass is two forward passes. The authors' way runs all blocks forward, and
    lm_head on every token, and once more forward for the policy that it does not use.
    """
    block, config, top = model.get_decoder().layers[0], model.config, len(model.get_decoder().layers)
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    one_block = 2 * weights * sum(lengths) + 4 * pairs * config.num_attention_heads * config.head_dim
    head = 2 * config.vocab_size * config.hidden_size  # per token
    if authors:
        return one_block * (2 * top + 2 * layer) + head * (4 + 2) * sum(lengths)
    return 4 * (one_block * layer + head * sum(len(completion) for _, completion in sequences))


# Phase 1 ==============================================================================================================


def updates(model: bupo.Model, optimizer: torch.optim.Optimizer, quick: bool) -> tuple[dict, bupo.Sequences]:
    """Four ways to update on the same sequences, of 4 problems x 2 completions, in two mini-batches.

    "low" is `bupo.update` at l = L/5, "top" at l = L, "quarter" at l = L where one problem of four has no signal, and
    "authors" the authors' way at l = L/5.
    """
    sequences = random_sequences(model, 8, *((16, 16) if quick else (64, 64)))
    config, top = settings(4, 2, recompute=False), len(model.get_decoder().layers)
    signal, quarter = torch.tensor([1.0, -1.0] * 4), torch.tensor([0.0, 0.0] + [1.0, -1.0] * 3)

    def update(how: Callable, advantages: Tensor, layer: int) -> Callable:
        return lambda: how(model, optimizer, sequences, advantages, layer, config, BFLOAT16)

    ways = dict(low=update(bupo.update, signal, top // 5), top=update(bupo.update, signal, top))
    ways |= dict(quarter=update(bupo.update, quarter, top), authors=update(rivals.authors_update, signal, top // 5))
    return ways, sequences


def update_peak(which: dict, way: str, quick: bool) -> tuple[float, float]:
    """(peak bytes of a process that updates, above what it began with; bytes it cannot do without).

    The latter: all weights, and a gradient and two moments of each weight that the update reaches, in float32.
    """
    idle = memory()
    model, _ = load(which)
    optimizer, blocks = adam(model), model.get_decoder().layers
    above = blocks[len(blocks) if way == "top" else len(blocks) // 5 :]  # which the update does not reach
    reached = [p for p in model.parameters() if id(p) not in {id(q) for q in above.parameters()}]
    for p in reached:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    ways, _ = updates(model, optimizer, quick)
    forget_peak()
    ways[way]()
    counted = 4 * sum(p.numel() for p in model.parameters()) + 12 * sum(p.numel() for p in reached)
    return memory(peak=True) - idle, counted


def phase1(args: argparse.Namespace, about: dict) -> list[dict]:
    models = {"Qwen3": dict(layers=5 if args.quick else 15, hidden=256, vocabulary=151936)}
    if args.model:
        models = {Path(args.model).name: dict(folder=args.model)} | models
    lines = []
    for name, which in models.items():
        model, _ = load(which)
        ways, sequences = updates(model, adam(model), args.quick)
        times, top = in_turn(ways, 1 if args.quick else 3), len(model.get_decoder().layers)
        low, high = (operations(model, layer, sequences) for layer in (top // 5, top))
        theirs = operations(model, top // 5, sequences, authors=True)
        speed = [high / s / about["operations_per_s"] for s in times["top"]]
        del model, ways  # the processes below want the memory
        gc.collect()
        told = {way: in_fresh_process(update_peak, which, way, args.quick) for way in ("low", "top", "authors")}
        peaks, counted = ({way: [both[i]] for way, both in told.items()} for i in (0, 1))
        measured = {"time": ratios(times, "low", "top"), "peak memory": ratios(peaks, "low", "top")}
        least = {"time": low / high, "peak memory": ratios(counted, "low", "top")[0]}
        add = partial(line, "phase1")
        for what, values in measured.items():
            remark = f"{least[what]:.3f}; measured/floor {statistics.median(values) / least[what]:.2f}"
            lines.append(add(f"{name}: {what}, l = {top // 5} / l = {top}", values, "x", remark))
        against = ratios(times, "authors", "low")
        lines.append(add(f"{name}: time, the authors' way / ours", against, "x", f"{theirs / low:.2f}", seconds=times))
        lines.append(add(f"{name}: peak memory, the authors' way / ours", ratios(peaks, "authors", "low"), "x"))
        saved = ratios(times, "quarter", "top")
        lines.append(add(f"{name}: time, a quarter of groups without signal / none", saved, "x", "0.75, tokens"))
        lines.append(add(f"{name}: speed at l = {top} / of a large matrix product", speed, "x", "1"))
        for way, (peak, bytes_counted) in told.items():
            remark = f"{bytes_counted / 2**20:.0f}, weights, gradients, moments"
            lines.append(add(f"{name}: peak memory, {way}", [peak / 2**20], "MiB", remark))
    return lines


# Rollouts =============================================================================================================


def with_lengths(lengths: list[int]):
    """Inside this context completion i of `bupo.sample` ends after lengths[i] tokens."""
    left = iter(lengths)

    class Ending(bupo.Completion):
        ended = property(lambda self: len(self.ids) >= self.length, lambda self, value: None)

        def __init__(self):
            self.length = next(left)
            super().__init__()

    return mock.patch.object(bupo, "Completion", Ending)


def by_bupo(model, prompts, lengths) -> list[int]:
    with with_lengths(lengths):
        return [len(c.ids) for c in bupo.sample(model, prompts, max(lengths), set(), rows=len(prompts))]


def rollouts(args: argparse.Namespace, about: dict) -> list[dict]:
    name = Path(args.model).name if args.model else "Qwen3"
    model, tokenizer = load(dict(folder=args.model) if args.model else dict(layers=8))
    model.generation_config = transformers.GenerationConfig()  # a checkpoint's own top-k and top-p would stay else
    actor = bupo.bfloat16_copy(model) if BFLOAT16 else model
    count, shortest = (8, 2) if args.quick else (32, 8)
    draw = random.Random(0)
    lengths = [round(shortest * 10 ** draw.random()) for _ in range(count)]
    problems = bupo.load_problems(args.dataset, count // 4)
    prompts = [ids for p in problems for ids in [bupo.encode(tokenizer, p)] * 4]
    ways = {
        "bupo": lambda: by_bupo(actor, prompts, lengths),
        "generate, dynamic cache": lambda: rivals.by_generate(actor, prompts, lengths, "dynamic"),
        "generate, static cache": lambda: rivals.by_generate(actor, prompts, lengths, "static"),
        "continuous batching": lambda: rivals.by_continuous_batching(actor, prompts, lengths),
    }
    for way, work in ways.items():
        if work() != lengths:
            raise RuntimeError(f"{way} gave completions of other lengths than asked for.")
    times = in_turn(ways, 1 if args.quick else 3, warm_up=False)  # the check was one
    print(f"{name}, {count} rows, lengths {min(lengths)}-{max(lengths)}, {sum(lengths)} tokens in all")

    # The least: every distinct prompt is read once, every token costs its products, every step reads all weights once.
    blocks = sum(p.numel() for p in model.get_decoder().layers.parameters())
    head = model.get_output_embeddings().weight.numel()
    read = 2 * blocks * sum(len(p) for p in {tuple(p) for p in prompts})
    operations = read + 2 * (blocks + head) * sum(lengths)
    moved = max(lengths) * (blocks + head) * actor.get_output_embeddings().weight.element_size()
    least = max(operations / about["operations_per_s"], moved / about["bytes_per_s"])
    lines = []
    for way, values in times.items():
        computed = max(lengths) * count / sum(lengths) if "generate" in way else 1.0  # generate goes on for the longest
        remark = f"{sum(lengths) / least:.0f}; computes {computed:.2f} x the tokens"
        rate = [sum(lengths) / s for s in values]
        lines.append(line("rollouts", f"{name}: {way}", rate, "tokens/s", remark))
    best = min((w for w in ways if w != "bupo"), key=lambda w: statistics.median(times[w]))
    what = f"{name}: bupo / the best other ({best})"
    lines.append(line("rollouts", what, ratios(times, best, "bupo"), "x", "", seconds=times))
    return lines


# A whole step =========================================================================================================


def step(args: argparse.Namespace, about: dict) -> list[dict]:
    if not util.find_spec("trl"):
        print("step     skipped: TRL is not installed (pip install trl).")
        return []
    lines, temporary = [], tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    model, tokenizer = small_qwen3()
    model.save_pretrained(folder / "qwen3")
    tokenizer.save_pretrained(folder / "qwen3")
    models = {"small Qwen3": (str(folder / "qwen3"), "arithmetic")}
    if args.model:
        models = {Path(args.model).name: (args.model, args.dataset)} | models
    dtype = "bfloat16 autocast" if BFLOAT16 else "float32"
    print(f"step     TRL {metadata.version('trl')}: {dtype}, no activation checkpointing, beta 0, num_iterations 1,")
    print("         loss bnpo, a mini-batch per device; its own generation, then transformers' continuous batching")
    ways = ("bupo", "trl default", "trl continuous")
    for name, (model_folder, dataset) in models.items():
        _, tokenizer = bupo.load_model(model_folder)
        lengths, problems = [], []
        for problem in bupo.load_problems(dataset, 100):
            if len(problems) < 4 and len(ids := bupo.encode(tokenizer, problem)) <= 256:
                lengths.append(len(ids))
                problems.append(json.dumps(dict(prompt=problem.messages, answer=problem.answer)))
        (folder / "problems.jsonl").write_text("\n".join(problems))
        size = dict(prompts=4, group=4, mini_batch=2, tokens=8 if args.quick else 64, max_prompt=max(lengths))
        size |= dict(steps=2 if args.quick else 3, model=model_folder, dataset=str(folder / "problems.jsonl"))
        told = {}
        for way in ways:
            call = [sys.executable, str(HERE / "trl_step.py"), json.dumps(dict(size, way=way))]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
            told[way] = json.loads(done.stdout.splitlines()[-1])
            told[way]["seconds"] = told[way]["seconds"][1:]  # the first warms up
            each = told[way]["seconds"]
            rate = 16 * size["tokens"] / statistics.median(each)
            remark = f"{rate:.0f} tokens/s, peak {told[way]['peak'] / 2**20:.0f} MiB"
            lines.append(line("step", f"{name}: {way}", each, "s", remark, peak=told[way]["peak"]))
        times = {way: told[way]["seconds"] for way in ways}
        for way in ways[1:]:
            memory_ratio = told[way]["peak"] / told["bupo"]["peak"]
            lines.append(line("step", f"{name}: {way} / bupo, time", ratios(times, way, "bupo"), "x"))
            lines.append(line("step", f"{name}: {way} / bupo, peak memory", [memory_ratio], "x"))
    return lines


# Growth ===============================================================================================================

BASE = dict(problems=4, group=2, length=32, layers=2, vocabulary=2048)
EXPECTED = dict(problems="1", group="1", length="1 to 2 (attention)", layers="1", vocabulary="1")  # at most


def one_step(problems: int, group: int, length: int, layers: int, vocabulary: int) -> tuple[float, float]:
    """(seconds of a rollout and its update at l = L; peak bytes above those the process began with)."""
    idle = memory()
    model, _ = small_qwen3(layers, 128, vocabulary)
    actor = bupo.bfloat16_copy(model) if BFLOAT16 else model
    config, optimizer = settings(problems, group, rows=32, micro_tokens=4096, recompute=False), adam(model)
    prompts = [prompt for prompt, _ in random_sequences(model, problems, 16, 0) for _ in range(group)]
    advantages = torch.tensor([1.0, -1.0] * (problems * group // 2))

    def work():
        completions = bupo.sample(actor, prompts, length, set(), rows=config.rows)
        sequences = [(p, c.ids) for p, c in zip(prompts, completions, strict=True)]
        bupo.update(model, optimizer, sequences, advantages, layers, config, BFLOAT16)

    times = in_turn(dict(step=work), 3)["step"]
    return statistics.median(times), memory(peak=True) - idle


def growth(args: argparse.Namespace, about: dict) -> list[dict]:
    """The slope of log time and log memory over a factor of 16, from three points; below 1 where fixed costs weigh."""
    lines, factors = [], (1, 4) if args.quick else (1, 4, 16)
    print(f"growth   a step of a small Qwen3, at most 32 rows and 4,096 tokens at once, over a factor of {factors[-1]}")
    base = in_fresh_process(one_step, *BASE.values())
    for axis, most in EXPECTED.items():
        grown = [in_fresh_process(one_step, *(BASE | {axis: BASE[axis] * f}).values()) for f in factors[1:]]
        times, peaks = zip(base, *grown, strict=True)
        for what, values, unit in (("time", times, "s"), ("peak", [p / 2**20 for p in peaks], "MiB")):
            logs = [math.log(v) for v in values]
            slope = statistics.linear_regression([math.log(f) for f in factors], logs).slope
            last = math.log(values[-1] / values[-2]) / math.log(factors[-1] / factors[-2])
            ends = f"{values[0]:.3g} to {values[-1]:.3g} {unit}"
            remark = f"at most {most}; {last:.2f} over the last factor of 4"
            lines.append(line("growth", f"{what} by {axis}: {ends}", [slope], "exponent", remark, points=values))
    return lines


# Start-up =============================================================================================================


def start(args: argparse.Namespace, about: dict) -> list[dict]:
    call = [sys.executable, str(HERE.parent / "bupo.py"), "--help"]
    times = in_turn(dict(help=lambda: subprocess.run(call, capture_output=True, check=True)), 1 if args.quick else 5)
    return [line("start", "python bupo.py --help", times["help"], "s", "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", help="the folder of a real model; without it small random ones do")
    parser.add_argument("--dataset", default="arithmetic", help="problems, as bupo.py takes them")
    parser.add_argument("--quick", action="store_true", help="does it run? Small sizes, one turn, nothing written")
    args = parser.parse_args()
    about = machine()
    print(
        ", ".join(f"{key} {value:.3g}" if key.endswith("_per_s") else f"{key} {value}" for key, value in about.items())
    )
    if not args.model:
        print(
            "Without --model small random Qwen3 models stand for a real one: these are not the figures of the README."
        )
    print(f"{'part':9}{'what':62}{'median':>8} {'':9}{'range':14}floor (counted), or remark")
    lines = [row for part in args.only for row in globals()[part](args, about)]
    if args.quick:
        return
    name = re.sub(r"\W+", "-", about["machine"]).strip("-").lower()
    parts = "" if set(args.only) == set(PARTS) else "-" + "-".join(args.only)
    out = HERE / "results" / f"speed-{name}{parts}.json"
    out.parent.mkdir(exist_ok=True)
    model = args.model and Path(args.model).name
    out.write_text(
        json.dumps(dict(**about, model=model, dataset=Path(args.dataset).name, lines=lines), indent=1) + "\n"
    )
    print(f"Written to {out}")


if __name__ == "__main__":
    main()
