"""How fast and how lean bupo.py is, as ratios, each measured in one run.

    python benchmarks/speed.py --model FOLDER             # a real model, such as SmolLM2-135M

What is compared works in turn, A B A B ..., so that a busy machine slows both; a ratio is the
median of the turns, with their range. On a GPU all computes in bfloat16.
"""

import argparse
import itertools
import multiprocessing
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bupo  # noqa: E402

DEVICE, DTYPE = bupo.choose_device(bupo.Config())
GPU = DEVICE.type == "cuda"
SUMS = str(ROOT / "tiny" / "train.jsonl")
UPDATE = bupo.update
SPAWN = multiprocessing.get_context("spawn")
FOLDERS: list[tempfile.TemporaryDirectory] = []  # vanish with the process
TQDM = bupo.tqdm  # whose bars, and what bupo.py tells by it, would break the table
bupo.tqdm = mock.Mock(side_effect=lambda *given, **how: TQDM(*given, **how | dict(disable=True)))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def peak_memory() -> float:
    """MiB that this process has had at most: allocated on a GPU, else resident."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**10


class Turn:
    """A process that is told to begin each piece of work; then it tells seconds and peak memory."""

    def __init__(self, pipe: Connection, work: Callable[["Turn"], None]):
        self.pipe, self.idle = pipe, peak_memory()
        work(self)

    def begin(self) -> None:
        try:
            self.pipe.recv()
        except EOFError:
            sys.exit()  # there are no more turns
        self.began = time.perf_counter()

    def end(self) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.pipe.send((time.perf_counter() - self.began, peak_memory() - self.idle))

    def repeat(self, work: Callable[[], object]) -> None:
        while True:
            self.begin()
            work()
            self.end()


def measure(title: str, ways: dict[str, Callable[[Turn], None]], turns: int) -> None:
    """Print seconds and peak memory of each way, over turns A B A B ... after one that warms up,
    and their ratios to those of the first way, turn by turn."""
    pipes, told = {}, {name: [] for name in ways}
    for name, work in ways.items():
        pipes[name], theirs = SPAWN.Pipe()
        SPAWN.Process(target=Turn, args=(theirs, work), daemon=True).start()
        theirs.close()  # so that a process that fails ends the pipe
    for _, name in itertools.product(range(turns + 1), ways):
        pipes[name].send(True)
        told[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.close()
    for process in multiprocessing.active_children():
        process.join()
    first, *_ = ways
    for name in ways:
        print(f"{title}: {name}", end="")
        for i, unit in enumerate(("s", "MiB")):
            values, base = ([turn[i] for turn in told[way][1:]] for way in (name, first))
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            print(f", {median(values):.4g} {unit}", end="")
            if name != first:
                print(f" = {median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})", end="")
        print(flush=True)


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


def plain_model(folder: str, dtype: torch.dtype) -> Any:
    """The model as transformers has it, without a checkpoint's top-k and top-p."""
    how = dict(dtype=dtype, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).to(DEVICE)
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def bupo_steps(turn: Turn, folder: str, problems: list, size: dict, update: Any = None) -> None:
    """Steps of `bupo.train`, GRPO unless `size` says more; with `update` only that part of a step
    counts, done by this function. Rewards are 0, 1, 0, 1, ..., and no token is an end."""
    rewards, draw = itertools.cycle((0.0, 1.0)), bupo.problems_of_step

    def timed_update(*given: Any) -> Any:
        turn.begin()
        metrics = update(*given)
        turn.end()
        return metrics

    if update:
        bupo.update, bupo.log = timed_update, lambda *_: None
    else:
        bupo.problems_of_step = lambda *given: turn.begin() or draw(*given)
        bupo.log = lambda *_: turn.end()
    bupo.load_problems = lambda _, limit, *__: problems[:limit]
    bupo.math_reward, bupo.end_tokens = lambda *_: next(rewards), lambda *_: set()
    bupo.save_checkpoint = lambda *_: None
    how = dict(internal_steps=0, eval_problems=0, gradient_checkpointing=False) | size
    with tempfile.TemporaryDirectory() as out:
        bupo.train(bupo.Config(folder, **how, max_prompt_tokens=256, out=out))


def trl_steps(turn: Turn, folder: str, problems: list, size: dict) -> None:
    """The same steps by TRL's GRPOTrainer."""
    import datasets
    import trl

    updates, tokens = size["prompts_per_step"] // size["mini_batch"], size["max_new_tokens"]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completion_ids))]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            return None if state.global_step % updates else turn.begin()

        def on_step_end(self, args, state, control, **_):
            return None if state.global_step % updates else turn.end()

    how = dict(num_generations=size["group_size"], max_completion_length=tokens)
    how |= dict(steps_per_generation=updates, max_steps=updates * size["steps"])
    how["per_device_train_batch_size"] = size["mini_batch"] * size["group_size"]
    how |= dict(beta=0.0, loss_type="bnpo", top_k=0, learning_rate=1e-6)  # as ours
    how |= dict(generation_kwargs=dict(min_new_tokens=tokens), gradient_checkpointing=False)
    how |= dict(bf16=DTYPE.itemsize == 2, use_cpu=not GPU, report_to="none", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as out:
        trl.GRPOTrainer(
            model=plain_model(folder, torch.float32),
            reward_funcs=reward,
            args=trl.GRPOConfig(out, **how, save_strategy="no", logging_strategy="no"),
            train_dataset=datasets.Dataset.from_list([dict(prompt=p.messages) for p in problems]),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
        ).train()


def step(args: argparse.Namespace, models: dict[str, str]) -> None:
    """Plain GRPO in two mini-batches, groups of 4; half as many and as long with a real model."""
    for name, folder in models.items():
        _, tokenizer = bupo.load_model(folder)
        source, half = (SUMS, 2) if name == "Qwen3" else (args.dataset, 1)
        problems = bupo.load_problems(source, 100)
        problems = [p for p in problems if len(bupo.encode(tokenizer, p)) <= 256][: 2 * half]
        size = dict(prompts_per_step=2 * half, group_size=4, mini_batch=half)
        size |= dict(max_new_tokens=32 * half, steps=args.turns + 1)
        given = dict(folder=folder, problems=problems, size=size)
        ways = dict(bupo=partial(bupo_steps, **given), TRL=partial(trl_steps, **given))
        measure(f"{name}, step", ways, args.turns)


def bupo_rollouts(turn: Turn, folder: str, prompts: list, lengths: list[int]) -> None:
    """`bupo.sample`, where completion i ends after lengths[i] tokens."""
    model, _ = bupo.load_model(folder)
    bupo.MasterAdamW(model, DEVICE, DTYPE, "cpu")  # which moves and converts the model
    left = itertools.cycle(lengths)

    class Ending(bupo.Completion):
        ended = property(lambda self: len(self.ids) >= self.length, lambda self, value: None)

        def __init__(self, prompt):
            self.length = next(left)
            super().__init__(prompt=prompt)

    def work() -> None:
        found = bupo.sample(model, prompts, max(lengths), set(), rows=len(prompts))
        assert [len(c.ids) for c in found] == lengths

    bupo.Completion = Ending
    turn.repeat(work)


def generate_rollouts(turn: Turn, folder: str, prompts: list, lengths: list[int]) -> None:
    """`model.generate`, left-padded, where all rows go on until the longest is done."""
    model, width = plain_model(folder, DTYPE), max(map(len, prompts))
    rows = [([0] * (width - len(p)) + p, [0] * (width - len(p)) + [1] * len(p)) for p in prompts]
    ids, mask = torch.tensor(rows, device=DEVICE).unbind(1)  # (n, T) each
    how = dict(attention_mask=mask, max_new_tokens=max(lengths), pad_token_id=0)
    turn.repeat(lambda: model.generate(ids, **how, do_sample=True, top_k=0, top_p=1.0))


def continuous_rollouts(turn: Turn, folder: str, prompts: list, lengths: list[int]) -> None:
    """transformers' continuous batching, whose cache holds all sequences, as ours does."""
    model, tokens = plain_model(folder, DTYPE), sum(map(len, prompts)) + sum(lengths)
    cache = dict(page_size=64, num_blocks=tokens // 64 + 2 * len(prompts))
    cache["max_batch_tokens"] = 8192 if GPU else 512
    draw = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    how = dict(generation_config=transformers.GenerationConfig(**draw))
    how["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**cache)

    def work() -> None:
        with model.continuous_batching_context_manager(**how) as manager:
            for prompt, length in zip(prompts, lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            done = 0
            while done < len(prompts):
                result = manager.get_result(timeout=1)
                done += result is not None and result.is_finished()
                assert manager.is_running() or done == len(prompts)

    turn.repeat(work)


def rollouts(args: argparse.Namespace, models: dict[str, str]) -> None:
    """Completions of 8 to 80 tokens, 4 of each prompt, by each way to sample."""
    name, folder = list(models.items())[-1]
    _, tokenizer = bupo.load_model(folder)
    draw = random.Random(0)
    lengths = [round(8 * 10 ** draw.random()) for _ in range(32)]
    problems = bupo.load_problems(args.dataset, 8)
    prompts = [bupo.encode(tokenizer, p) for p in problems for _ in range(4)]
    given = dict(folder=folder, prompts=prompts, lengths=lengths)
    ways = dict(bupo=partial(bupo_rollouts, **given), generate=partial(generate_rollouts, **given))
    ways["continuous batching"] = partial(continuous_rollouts, **given)
    measure(f"{name}, rollouts", ways, args.turns)


def authors_logps(model, ids: Tensor, mask: Tensor, layer: int, **_: Any) -> tuple[Tensor, ...]:
    """log pi^l (N,) as in their code: all blocks, all hidden states, both full logit matrices.
    `bupo.update` also logs entropies: zeros in their place cost nothing."""
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    internal = bupo.policy_logits(model, out.hidden_states[layer])  # (B, T, V)
    both = [logits.float() for logits in (out.logits, internal)]  # pi's go unused
    logps = both[1][:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T-1)
    logps = logps[mask[:, 1:]]  # (N,)
    return logps, torch.zeros_like(logps)


def authors_update(model, optimizer, sequences, advantages, layer, lr, config) -> dict:
    """`bupo.update` their way, which scores the first mini-batch before its update, too."""
    first = sequences[: config.mini_batch * config.group_size]
    with torch.no_grad():
        authors_logps(model, *bupo.pad(first, model.device), layer)
    with mock.patch.object(bupo, "token_logps", authors_logps):
        return UPDATE(model, optimizer, sequences, advantages, layer, lr, config)


def phase1(args: argparse.Namespace, models: dict[str, str]) -> None:
    """Against an update of pi^l at l = L/5: one of pi, and one of pi^l the authors' way."""
    steps = args.turns + 1
    size = dict(prompts_per_step=4, group_size=2, mini_batch=2, max_new_tokens=64, steps=steps)
    for name, folder in (models | {"Qwen3": small_qwen3(15, 256, 151936)}).items():
        layers = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
        size |= dict(internal_steps=steps, internal_layer=str(layers // 5))
        run = partial(bupo_steps, folder=folder, problems=bupo.load_problems(SUMS, 4))
        ways = {"L/5": partial(run, size=size, update=UPDATE)}
        ways["L"] = partial(run, size=size | dict(internal_steps=0), update=UPDATE)
        ways["authors' L/5"] = partial(run, size=size, update=authors_update)
        measure(f"{name}, update at l", ways, args.turns)


PARTS = dict(step=step, rollouts=rollouts, phase1=phase1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory; see the top of this file.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="the folder of a real model, beside a small random Qwen3")
    parser.add_argument("--dataset", default=SUMS, help="problems for it")
    parser.add_argument("--turns", type=int, default=6, help="of each way")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {DTYPE}, torch {torch.__version__}, transformers {transformers.__version__}")
    models = {"Qwen3": small_qwen3()} | ({Path(args.model).name: args.model} if args.model else {})
    for part in args.only:
        PARTS[part](args, models)


if __name__ == "__main__":
    main()
