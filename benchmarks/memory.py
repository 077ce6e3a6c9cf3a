"""Which card for which model: the bytes that bupo.py needs, counted tensor by tensor.

    python benchmarks/memory.py    # any flag of bupo.py may be added

The count is of bfloat16 and of the worst case: prompts and completions of full length. It leaves
out numbers of which there is one per token, and what only CUDA knows: its context, fragments.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import bupo

CARDS, USABLE = (12, 16, 24, 48, 80), 0.97 * 2**30  # GB as sold; bytes of one that torch sees
CONTEXT, SPARE = 0.5e9, 0.95  # of CUDA itself; the share of the rest that an update may fill
SHAPES = {  # width, FFN, blocks, heads: huggingface.co/Qwen/Qwen3-1.7B/blob/main/config.json etc.
    "Qwen3-0.6B": (1024, 3072, 28, 16),
    "Qwen3-1.7B": (2048, 6144, 28, 16),
    "Qwen3-4B": (2560, 9728, 36, 32),
    "Qwen3-8B": (4096, 12288, 36, 32),
}


def qwen3(shape: tuple[int, ...], words: int = 151936, tied: bool = True) -> Any:
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    rest = dict(num_key_value_heads=8, head_dim=128, vocab_size=words, tie_word_embeddings=tied)
    return transformers.Qwen3Config(**dict(zip(names, shape, strict=True)), **rest)


def widths(c: Any) -> tuple[int, int, int, int, int]:
    """Numbers that a token has: hidden state, FFN, queries, keys (or values), logits."""
    queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    return c.hidden_size, c.intermediate_size, queries, keys, c.vocab_size


def rollout(c: Any, rows: int, config: bupo.Config) -> int:
    """Most bytes of `sample` beside the weights: the cache, and reading prompts (each for a group
    of 8 rows) or drawing tokens."""
    hidden, ffn, queries, keys, words = widths(c)
    columns = -(-(config.max_prompt_tokens + config.max_new_tokens) // 16) * 16
    cache = 2 * c.num_hidden_layers * rows * columns * keys * 2
    tokens = max(1, rows // 8) * config.max_prompt_tokens
    attention = 2 * hidden + queries + (2 + 8) * keys  # 8: keys on their way into 8 rows
    reading = 2 * tokens * max(2 * hidden + 3 * ffn, attention)
    drawing = rows * words * (2 + 4 + 4 + 8 + 8)  # logits, logps, probs, in float64, cumulative
    return cache + max(reading, drawing)


def update(c: Any, size: int, beside: bool, micro_batch: int, config: bupo.Config) -> int:
    """Most bytes of `update` at l = L beside weights, masters and moments; at l < L it takes less.
    Each block's input is kept, and one block's activations at a time (gradient checkpointing)."""
    hidden, ffn, queries, keys, words = widths(c)
    length = config.max_prompt_tokens + config.max_new_tokens
    rows = max(1, micro_batch // length)
    tokens, scored = rows * length, rows * config.max_new_tokens
    kept = 2 * tokens * hidden * c.num_hidden_layers
    head, states = 2 * words * hidden, 2 * scored * hidden
    chunk = min(bupo.HEAD_TOKENS, scored) * words
    log_softmax = 12 * chunk + head  # and the gradients on both its sides; the head's, so far
    product = 3 * head  # the head's gradient so far, what is new, and their sum
    block = 2 * tokens * (4 * hidden + 3 * queries + 3 * keys + 6 * ffn)
    tied = head * c.tie_word_embeddings  # the head's gradient waits for that of the embeddings
    end = 2 * tokens * hidden + head + 2 * tied
    most = max(kept + states + max(log_softmax, product), kept + block + tied, end)
    return 4 * size * beside + most  # with the masters' gradients


def chosen(
    c: Any, weights: list, masters: str, moments: bool, free: int, config: bupo.Config
) -> tuple[int, int]:
    """The tokens of a micro-batch and the rows that bupo.py takes if a GPU has this much free."""
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=c)
    optimizer = SimpleNamespace(device=torch.device(masters), masters=weights)
    optimizer.adam = SimpleNamespace(state=set(weights) if moments else set())
    with mock.patch.object(torch.cuda, "mem_get_info", return_value=(free, 0)):
        tokens = bupo.micro_batch_tokens(model, optimizer, c.num_hidden_layers, config)
        return tokens, bupo.rollout_rows(model, config.max_prompt_tokens, config)


def plan(name: str, card: int, config: bupo.Config) -> str:
    """A line of the table: what bupo.py chooses on this card, and what that needs."""
    c, total = qwen3(SHAPES[name], tied=name != "Qwen3-8B"), card * USABLE - CONTEXT
    with torch.device("meta"):
        weights = list(transformers.Qwen3ForCausalLM(c).parameters())
    size = sum(weight.numel() for weight in weights)
    beside = 18 * size <= total / 2  # as MasterAdamW decides
    always = (2 + 12 * beside) * size  # weights; masters and two moments
    free = int(total - always)
    tokens, rows = chosen(c, weights, "cuda" if beside else "cpu", True, free, config)
    rows = min(rows, config.prompts_per_step * config.group_size)
    takes = update(c, size, beside, tokens, config)
    if takes > SPARE * free:
        least = (always + takes / SPARE + CONTEXT) / 1e9
        return f"| {name} | {card} | does not fit: {least:.1f} GB are the least | | | | |"
    needs = (always + max(takes, rollout(c, rows, config))) / 1e9
    ram = (4 if beside else 16) * size / 1e9  # to load float32; masters, gradients, two moments
    where = "card" if beside else "CPU"
    return f"| {name} | {card} | {where} | {rows} | {tokens:,} | {needs:.1f} | {ram:.0f} |"


if __name__ == "__main__":
    config, _ = bupo.parse(["--model", "Qwen/Qwen3-1.7B", *sys.argv[1:]])
    print("| model | card, GB | masters on | rows | tokens | needs, GB | RAM, GB |")
    print(7 * "| --- " + "|")
    for name, card in itertools.product(SHAPES, CARDS):
        print(plan(name, card, config))
