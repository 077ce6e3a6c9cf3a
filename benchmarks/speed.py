"""How fast and how lean bupo.py is: ratios, each measured in one run, beside the least they can be.

    python benchmarks/speed.py --model FOLDER             # a real model, such as SmolLM2-135M
    python benchmarks/speed.py --only growth --turns 1    # does it run?

What is compared works in turn, A B A B ..., so that a busy machine slows both; a line is the median
of the turns and their range. On a GPU all of it computes in bfloat16, as bupo.py does.
"""

import argparse
import gc
import itertools
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import rivals  # which finds bupo.py
import torch
import transformers
from rivals import DEVICE, DTYPE, GPU

import bupo

FOLDERS: list[tempfile.TemporaryDirectory] = []  # vanish with the process
SUMS = str(Path(bupo.__file__).with_name("tiny") / "train.jsonl")
SPAWN = multiprocessing.get_context("spawn")
TQDM = bupo.tqdm  # whose bars, and what bupo.py tells by it, would break the table
bupo.tqdm = mock.Mock(side_effect=lambda *given, **how: TQDM(*given, **how | dict(disable=True)))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def memory(peak: bool = False) -> float:
    """Bytes in use now, or at most since a `Turn` began: allocated on a GPU, else resident."""
    if GPU:
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status, name = Path("/proc/self/status").read_text(), "VmHWM" if peak else "VmRSS"
    return 1024.0 * int(re.findall(rf"{name}:\s+(\d+)", status)[0])


class Turn:
    """A process that is told to begin each piece of work; then it tells seconds and peak memory."""

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
        taken = time.perf_counter() - self.began
        self.pipe.send((taken, (memory(peak=True) - self.idle) / 2**20))

    def repeat(self, work: Callable[[], object]) -> None:
        while True:
            self.begin()
            work()
            self.end()


def measure(title: str, ways: dict[str, Callable[[Turn], None]], turns: int) -> None:
    """Print seconds and peak memory of each way in each turn, A B A B ..., after one that warms up;
    and what they are divided by those of the first way, turn by turn."""
    pipes, told = {}, {name: [] for name in ways}
    for name, work in ways.items():
        pipes[name], theirs = SPAWN.Pipe()
        SPAWN.Process(target=Turn, args=(theirs, work)).start()
        theirs.close()  # so that a process that fails ends the pipe
    for _ in range(turns + 1):
        for name in list(told):
            try:
                pipes[name].send("go")
                told[name].append(pipes[name].recv())
            except (EOFError, OSError):
                print(f"{name} failed; its error stands above")
                del told[name]
    for pipe in pipes.values():
        pipe.close()
    for process in multiprocessing.active_children():
        process.join()
    for i, (what, unit) in enumerate((("time", "s"), ("peak memory", "MiB"))):
        values = {name: [turn[i] for turn in found[1:]] for name, found in told.items()}
        for name, found in values.items():
            line(f"{title}: {name}, {what}", found, unit)
        for first, other in itertools.product(list(values)[:1], list(values)[1:]):
            ratios = [a / b for a, b in zip(values[other], values[first], strict=True)]
            line(f"{title}: {other} / {first}, {what}", ratios, "x")


def line(what: str, values: list[float], unit: str) -> None:
    """Print a line of the table: the median of the values and their range."""
    median, *ends = (f"{f(values):.3g}" for f in (statistics.median, min, max))
    print(f"{what:64}{median:>8} {unit:4}{'-'.join(ends) if len(values) > 1 else ''}", flush=True)


def small_qwen3(layers: int = 8, hidden: int = 256, vocabulary: int = 8192) -> str:
    """The folder of a random Qwen3 with the tokenizer of tiny/, whose tokens are its first 102."""
    size = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)
    size |= dict(num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32)
    size |= dict(vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    FOLDERS.append(tempfile.TemporaryDirectory())
    config = transformers.Qwen3Config(**size, bos_token_id=None)
    for part in (transformers.Qwen3ForCausalLM(config), bupo.load_model("tiny")[1]):
        part.save_pretrained(FOLDERS[-1].name)
    return FOLDERS[-1].name


def random_tokens(count: int, length: int) -> list[list[int]]:
    return torch.randint(2048, (count, length), generator=torch.Generator()).tolist()


def step(args: argparse.Namespace, models: dict[str, str]) -> None:
    """Plain GRPO in two mini-batches, groups of 4: bupo.py and TRL. A real model has half of the
    problems and of the tokens: on 2 cores a step of SmolLM2-135M takes long enough so."""
    for name, folder in models.items():
        _, tokenizer = bupo.load_model(folder)
        source, half = (SUMS, 2) if name == "Qwen3" else (args.dataset, 1)
        problems = bupo.load_problems(source, 100)
        problems = [p for p in problems if len(bupo.encode(tokenizer, p)) <= 256]
        s = dict(model=folder, problems=[(p.messages, p.answer) for p in problems[: 2 * half]])
        s |= dict(prompts_per_step=2 * half, group_size=4, mini_batch=half, tokens=32 * half)
        s["steps"] = args.turns + 1
        ways = {"bupo": partial(rivals.bupo_steps, s=s)}
        for way in ("TRL", "TRL, continuous batching"):
            ways[way] = partial(rivals.trl_steps, s=s, continuous=way != "TRL")
        measure(f"{name}, step", ways, args.turns)


def by_bupo(model: bupo.Model, prompts: list[list[int]], lengths: list[int]) -> list[int]:
    """`bupo.sample`, where completion i ends after lengths[i] tokens."""
    left = iter(lengths)

    class Ending(bupo.Completion):
        ended = property(lambda self: len(self.ids) >= self.length, lambda self, value: None)

        def __init__(self, prompt):
            self.length = next(left)
            super().__init__(prompt=prompt)

    with mock.patch.object(bupo, "Completion", Ending):
        found = bupo.sample(model, prompts, max(lengths), set(), rows=len(prompts))
    return [len(c.ids) for c in found]


def sampling(turn: Turn, way: Callable, folder: str, prompts: list, lengths: list[int]) -> None:
    if way is by_bupo:
        model, _ = bupo.load_model(folder)
        bupo.MasterAdamW(model, DEVICE, DTYPE, "cpu")  # which moves and converts the model
    else:  # the model as transformers has it
        model = rivals.plain_model(folder, DTYPE)

    def work() -> None:
        if way(model, prompts, lengths) != lengths:
            raise RuntimeError(f"{way} gave completions of other lengths than asked for.")

    turn.repeat(work)


def rollouts(args: argparse.Namespace, models: dict[str, str]) -> None:
    """Completions of 8 to 80 tokens, 4 of each prompt, by each way to sample."""
    name, folder = list(models.items())[-1]
    _, tokenizer = bupo.load_model(folder)
    draw = random.Random(0)
    lengths = [round(8 * 10 ** draw.random()) for _ in range(32)]
    problems = bupo.load_problems(args.dataset, 8)
    prompts = [ids for p in problems for ids in [bupo.encode(tokenizer, p)] * 4]
    ways = {"bupo": by_bupo, "continuous batching": rivals.by_continuous_batching}
    for cache in ("dynamic", "static"):
        ways[f"generate, {cache} cache"] = partial(rivals.by_generate, cache=cache)
    given = dict(folder=folder, prompts=prompts, lengths=lengths)
    works = {said: partial(sampling, way=way, **given) for said, way in ways.items()}
    measure(f"{name}, rollouts", works, args.turns)


def training(
    turn: Turn, folder: str, problems: int, tokens: int, share: int, way: Callable, drawn: bool
) -> None:
    """Updates at l = L / share on groups of 2, in two mini-batches; `drawn`: after a rollout."""
    model, _ = bupo.load_model(folder)
    optimizer = bupo.MasterAdamW(model, DEVICE, DTYPE, "auto")
    size = dict(prompts_per_step=problems, group_size=2, mini_batch=problems // 2)
    config = bupo.Config("x/y", gradient_checkpointing=False, micro_batch_tokens="4096", **size)
    layer, advantages = len(model.get_decoder().layers) // share, torch.tensor([1, -1.0] * problems)
    prompts = [p for p in random_tokens(problems, tokens) for _ in range(2)]
    completions = random_tokens(2 * problems, tokens)

    def work() -> None:
        found = bupo.sample(model, prompts, tokens, set(), rows=32) if drawn else []
        sequences = list(zip(prompts, [c.ids for c in found] or completions, strict=True))
        way(model, optimizer, sequences, advantages, layer, 1e-6, config)

    turn.repeat(work)


def ceiling(folder: str) -> float:
    """The most operations that an update at L takes of one at L/5, counted: products with the
    blocks' weights and, for half of the tokens, lm_head."""
    model, _ = bupo.load_model(folder)
    layers, head = model.get_decoder().layers, model.get_output_embeddings().weight.numel() / 2
    blocks = sum(p.numel() for p in layers.parameters())
    return (blocks + head) / (len(layers) // 5 / len(layers) * blocks + head)


def phase1(args: argparse.Namespace, models: dict[str, str]) -> None:
    """Against an update of pi^l at l = L/5: one of pi, and one of pi^l the authors' way."""
    for name, folder in (models | {"Qwen3": small_qwen3(15, 256, 151936)}).items():
        run = partial(training, folder=folder, problems=4, tokens=64, drawn=False)
        ways = {"L/5": partial(run, share=5, way=bupo.update)}
        ways["L"] = partial(run, share=1, way=bupo.update)
        ways["authors' L/5"] = partial(run, share=5, way=rivals.authors_update)
        measure(f"{name}, update at l", ways, args.turns)
        line(f"{name}, update at l: L / L/5, counted, at most", [ceiling(folder)], "x")


def growth(args: argparse.Namespace, models: dict[str, str]) -> None:
    """A rollout, at most 32 rows at once, and its update, with 1, 4 and 16 times the problems,
    tokens (of prompts and of completions) or layers; attention takes up to the square of tokens."""
    run = partial(training, share=1, way=bupo.update, drawn=True)
    for axis, least in dict(problems=4, tokens=32, layers=2).items():
        ways = {}
        for n in (least, 4 * least, 16 * least):
            size = dict(problems=4, tokens=32, layers=2) | {axis: n}
            ways[str(n)] = partial(run, folder=small_qwen3(size.pop("layers"), 128, 2048), **size)
        measure(f"growth, {axis}", ways, args.turns)


PARTS = dict(step=step, rollouts=rollouts, phase1=phase1, growth=growth)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory; see the top of this file.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="the folder of a real model, beside a small random Qwen3")
    parser.add_argument("--dataset", default=SUMS, help="problems for it")
    parser.add_argument("--turns", type=int, default=6, help="of each way")
    args = parser.parse_args()
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name() if GPU else cpu[1] if cpu else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {torch.get_num_threads()} threads, {DTYPE}, {versions}")
    models = {"Qwen3": small_qwen3()} | ({Path(args.model).name: args.model} if args.model else {})
    for part in args.only:
        PARTS[part](args, models)


if __name__ == "__main__":
    main()
