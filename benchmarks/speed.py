"""How fast and how lean bupo.py is: ratios, each measured in one run, beside the least they can be.

    python benchmarks/speed.py --model FOLDER          # a real model, such as SmolLM2-135M
    python benchmarks/speed.py --only step --quick     # does it run? Nothing is written

What is compared works in turn, A B A B ..., so that a busy machine slows both; a line is the median
of the turns' ratios and their range. A floor is counted, not measured. Lines and values also go to
results/speed-MACHINE.json. On a GPU all of it computes in bfloat16, as bupo.py does.
"""

import argparse
import atexit
import functools
import gc
import json
import math
import multiprocessing
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import rivals
import torch
import transformers
from rivals import DEVICE, DTYPE, GPU

import bupo

SPAWN, MIB = multiprocessing.get_context("spawn"), 2**20


class Quiet(bupo.tqdm):
    """What bupo.py tells, and its bars, would break the table."""

    def __init__(self, *given, **how):
        super().__init__(*given, **how | dict(disable=True))

    @classmethod
    def write(cls, *_, **__):
        pass


bupo.tqdm = Quiet
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def memory(peak: bool = False) -> float:
    """Bytes in use now, or at most since a `Turn` began: allocated on a GPU, else resident."""
    if GPU:
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status, name = Path("/proc/self/status").read_text(), "VmHWM" if peak else "VmRSS"
    return 1024.0 * int(re.findall(rf"{name}:\s+(\d+)", status)[0])


class Turn:
    """A process that waits to be told before each piece of work, and then tells seconds and peak
    memory, above what it began with."""

    def __init__(self, pipe: Connection, work: Callable[["Turn"], None]):
        self.pipe, self.idle = pipe, memory()
        work(self)

    def begin(self) -> None:
        try:
            self.pipe.recv()
        except EOFError:
            sys.exit()  # there are no more turns
        gc.collect()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.began = time.perf_counter()

    def end(self) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.pipe.send((time.perf_counter() - self.began, memory(peak=True) - self.idle))

    def repeat(self, work: Callable[[], object]) -> None:
        while True:
            self.begin()
            work()
            self.end()


def in_turn(ways: dict[str, Callable[[Turn], None]], turns: int) -> dict[str, list[list[float]]]:
    """Seconds and peak bytes of each way in each turn, A B A B ..., after one that warms up."""
    pipes, processes, told = {}, [], {name: [] for name in ways}
    for name, work in ways.items():
        pipes[name], theirs = SPAWN.Pipe()
        processes.append(SPAWN.Process(target=Turn, args=(theirs, work)))
        processes[-1].start()
        theirs.close()  # so that a process that fails ends the pipe
    for _ in range(turns + 1):
        for name in list(told):
            try:
                pipes[name].send("go")
                told[name].append(pipes[name].recv())
            except (EOFError, OSError):
                print(f"{name} failed; its error stands above")
                del told[name]
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.close()
        process.join()
    return {name: list(map(list, zip(*found[1:], strict=True))) for name, found in told.items()}


def compare(title: str, told: dict, above: str, below: str, floors: Any = None) -> Iterator[dict]:
    """Lines of one way's time and peak memory divided by another's, turn by turn."""
    for i, what in enumerate(("time", "peak memory") if {above, below} <= set(told) else ()):
        found = [a / b for a, b in zip(told[above][i], told[below][i], strict=True)]
        over = (
            f"floor {floors[i]:.3f}, {statistics.median(found) / floors[i]:.2f} x" if floors else ""
        )
        yield line(f"{title}: {above} / {below}, {what}", found, "x", over)


def line(what: str, values: list[float], unit: str, remark: str = "") -> dict[str, Any]:
    """Print a line of the table, the median of the values and their range, and return it."""
    median, *ends = (f"{f(values):.3g}" for f in (statistics.median, min, max))
    spread = "-".join(ends) if len(values) > 1 else ""
    print(f"{what:64}{median:>8} {unit:9}{spread:13} {remark}", flush=True)
    return dict(what=what, median=statistics.median(values), unit=unit, values=values)


def small_qwen3(layers: int = 8, hidden: int = 256, vocabulary: int = 8192) -> str:
    """The folder of a random Qwen3 with the built-in tokenizer, whose tokens are its first 102."""
    size = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)
    size |= dict(num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32)
    size |= dict(vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = transformers.Qwen3Config(**size, bos_token_id=None)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    bupo.tiny_model(0)[1].save_pretrained(folder)
    return folder


def machine() -> dict[str, Any]:
    """Its name, and what runs on it."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.findall(r"model name\s*: (.+)", about) or [platform.processor()]
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    name = torch.cuda.get_device_name() if GPU else cpu[0]
    return dict(machine=name, threads=torch.get_num_threads(), dtype=str(DTYPE), **versions)


def random_sequences(model: bupo.Model, count: int, prompt: int, new: int) -> bupo.Sequences:
    draw, top = random.Random(0), model.config.vocab_size
    ids = [[draw.randrange(top) for _ in range(prompt + new)] for _ in range(count)]
    return [(row[:prompt], row[prompt:]) for row in ids]


def settings(problems: int) -> bupo.Config:
    """Groups of 2 in two mini-batches."""
    size = dict(prompts_per_step=problems, group_size=2, mini_batch=problems // 2)
    return bupo.Config("x/y", gradient_checkpointing=False, micro_batch_tokens=4096, **size)


def trainer(folder: str) -> tuple[bupo.Model, bupo.MasterAdamW]:
    """A model ready to be trained as bupo.py trains it, and its optimizer."""
    model, _ = bupo.load_model(folder)
    return model, bupo.MasterAdamW(model, DEVICE, DTYPE, "auto")


def step(args: argparse.Namespace, models: dict[str, str]) -> Iterator[dict]:
    """Plain GRPO, 4 problems x 4 completions in two mini-batches: bupo.py and TRL."""
    if not util.find_spec("trl"):
        return print("step: skipped, since TRL is not installed (pip install trl)")
    for name, folder in models.items():
        _, tokenizer = bupo.load_model(folder)
        source = "arithmetic" if name == "Qwen3" else args.dataset
        problems = bupo.load_problems(source, 100, system="")
        problems = [p for p in problems if len(bupo.encode(tokenizer, p)) <= 256][:4]
        s = dict(model=folder, problems=[(p.messages, p.answer) for p in problems])
        s |= dict(tokens=8 if args.quick else 64, steps=2 if args.quick else 8)
        s |= dict(prompts_per_step=4, group_size=4, mini_batch=2)
        ways = {"bupo": functools.partial(rivals.bupo_steps, s=s)}
        for way in ("TRL", "TRL, continuous batching"):
            ways[way] = functools.partial(rivals.trl_steps, s=s, continuous=way != "TRL")
        told = in_turn(ways, s["steps"] - 1)
        for way, (times, peaks) in told.items():
            remark = f"{16 * s['tokens'] / statistics.median(times):.0f} tokens/s, peak "
            yield line(f"{name}, step: {way}", times, "s", f"{remark}{max(peaks) / MIB:.0f} MiB")
        for way in list(told)[1:]:
            yield from compare(f"{name}, step", told, way, "bupo")


def by_bupo(model: bupo.Model, prompts: list[list[int]], lengths: list[int]) -> list[int]:
    """`bupo.sample`, where completion i ends after lengths[i] tokens."""
    left = iter(lengths)

    class Ending(bupo.Completion):
        ended = property(lambda self: len(self.ids) >= self.length, lambda self, value: None)

        def __init__(self):
            self.length = next(left)
            super().__init__()

    with mock.patch.object(bupo, "Completion", Ending):
        found = bupo.sample(model, prompts, max(lengths), set(), rows=len(prompts))
    return [len(c.ids) for c in found]


def sampling(turn: Turn, way: Callable, folder: str, prompts: list, lengths: list[int]) -> None:
    ours = way is by_bupo  # the others get the model as transformers has it
    model = bupo.load_model(folder, DEVICE, DTYPE)[0] if ours else rivals.plain_model(folder, DTYPE)

    def work() -> None:
        if way(model, prompts, lengths) != lengths:
            raise RuntimeError(f"{way} gave completions of other lengths than asked for.")

    turn.repeat(work)


def rollouts(args: argparse.Namespace, models: dict[str, str]) -> Iterator[dict]:
    """Completions of 8 to 80 tokens, 4 of each prompt: tokens a second of each way to sample."""
    name, folder = list(models.items())[-1]
    _, tokenizer = bupo.load_model(folder)
    draw, count = random.Random(0), 8 if args.quick else 32
    lengths = [round(8 * 10 ** draw.random()) for _ in range(count)]
    problems = bupo.load_problems(args.dataset, count // 4)
    prompts = [ids for p in problems for ids in [bupo.encode(tokenizer, p)] * 4]
    ways = {"bupo": by_bupo}
    for cache in ("dynamic", "static"):
        ways[f"generate, {cache} cache"] = functools.partial(rivals.by_generate, cache=cache)
    ways["generate_batch"] = rivals.by_continuous_batching
    given = dict(folder=folder, prompts=prompts, lengths=lengths)
    works = {name: functools.partial(sampling, way=way, **given) for name, way in ways.items()}
    told = in_turn(works, 1 if args.quick else 6)
    for way, (times, _) in told.items():
        yield line(f"{name}, rollouts: {way}", [sum(lengths) / t for t in times], "tokens/s")
    for way in list(told)[1:]:
        yield from compare(f"{name}, rollouts", told, way, "bupo")


def updating(turn: Turn, way: Callable, fifth: bool, folder: str, quick: bool) -> None:
    """Updates by 4 problems x 2 completions, at l = L/5 or at L."""
    model, optimizer = trainer(folder)
    sequences = random_sequences(model, 8, *((16, 16) if quick else (64, 64)))
    layer = len(model.get_decoder().layers) // (5 if fifth else 1)
    given = sequences, torch.tensor([1.0, -1.0] * 4), layer, 1e-6, settings(4)
    turn.repeat(functools.partial(way, model, optimizer, *given))


def floors(folder: str) -> tuple[float, float]:
    """The least that an update at L/5 can take of one at L: operations, and bytes.

    Operations are products with the blocks' weights and, for half of the tokens, lm_head; bytes are
    those of weights, and of a gradient and two moments of each weight that the update reaches.
    """
    model, _ = bupo.load_model(folder)
    size, head = model.num_parameters(), model.get_output_embeddings().weight.numel()
    blocks = sum(p.numel() for p in model.get_decoder().layers.parameters())
    low = len(model.get_decoder().layers) // 5 / len(model.get_decoder().layers)
    always = size * (6 if DTYPE.itemsize == 2 else 4)  # weights and masters
    least = always + 12 * (size - blocks + low * blocks)
    return (low * blocks + head / 2) / (blocks + head / 2), least / (always + 12 * size)


def phase1(args: argparse.Namespace, models: dict[str, str]) -> Iterator[dict]:
    """An update of pi^l at l = L/5 against one of pi, and the authors' way against ours."""
    large = small_qwen3(15, 256, 8192 if args.quick else 151936)
    for name, folder in (models | {"Qwen3": large}).items():
        run = functools.partial(updating, folder=folder, quick=args.quick)
        low, top, theirs = "l = L/5", "l = L", "authors' way, l = L/5"
        ways = {low: functools.partial(run, way=bupo.update, fifth=True)}
        ways[top] = functools.partial(run, way=bupo.update, fifth=False)
        ways[theirs] = functools.partial(run, way=rivals.authors_update, fifth=True)
        told = in_turn(ways, 1 if args.quick else 6)
        yield from compare(f"{name}, update", told, low, top, floors(folder))
        yield from compare(f"{name}, update", told, theirs, low)


def stepping(turn: Turn, problems: int, tokens: int, layers: int) -> None:
    """A rollout of a small Qwen3, at most 32 rows at once, and its update at L."""
    model, optimizer = trainer(small_qwen3(layers, 128, 2048))
    prompts = [p for p, _ in random_sequences(model, problems, 16, 0) for _ in range(2)]
    given = torch.tensor([1.0, -1.0] * problems), layers, 1e-6, settings(problems)

    def work() -> None:
        found = bupo.sample(model, prompts, tokens, set(), rows=32)
        sequences = [(p, c.ids) for p, c in zip(prompts, found, strict=True)]
        bupo.update(model, optimizer, sequences, *given)

    turn.repeat(work)


def growth(args: argparse.Namespace, models: dict[str, str]) -> Iterator[dict]:
    """Exponents of time and memory, from three sizes; attention has up to 2 in tokens."""
    base, factors = dict(problems=4, tokens=32, layers=2), (1, 4) if args.quick else (1, 4, 16)
    logs = [math.log(f) for f in factors]
    for axis, size in base.items():
        sizes = {f"x {f}": base | {axis: size * f} for f in factors}
        works = {name: functools.partial(stepping, **sizes[name]) for name in sizes}
        told = in_turn(works, 1 if args.quick else 3).values()
        for i, what in enumerate(("time, s", "peak memory, bytes")):
            values = [statistics.median(found[i]) for found in told]
            slope = statistics.linear_regression(logs, [math.log(v) for v in values]).slope
            remark = f"{values[0]:.3g} to {values[-1]:.3g} over a factor of {factors[-1]}"
            yield line(f"growth: {what}, by {axis}", [slope], "exponent", remark)


PARTS = dict(step=step, rollouts=rollouts, phase1=phase1, growth=growth)


def main() -> None:
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**how)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="the folder of a real model, beside a small random Qwen3")
    parser.add_argument("--dataset", default="arithmetic", help="problems for it")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    args, about = parser.parse_args(), machine()
    print(*(f"{name} {value}" for name, value in about.items()), sep=", ")
    models = {"Qwen3": small_qwen3()}
    if args.model:
        models[Path(args.model).name] = args.model
    lines = [row for part in args.only for row in PARTS[part](args, models)]
    if not args.quick:
        name = re.sub(r"\W+", "-", about["machine"]).strip("-").lower()
        some = "" if len(args.only) == len(PARTS) else "-" + "-".join(args.only)
        out = Path(__file__).parent / "results" / f"speed-{name}{some}.json"
        out.parent.mkdir(exist_ok=True)
        found = dict(**about, model=args.model and Path(args.model).name, lines=lines)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"Written to {out}")


if __name__ == "__main__":
    main()
