r"""Bottom-up Policy Optimization (BuPO, arXiv 2512.19673) in one file.

    $ python bupo.py --out runs/x         # 2 to 3 minutes on one core; no GPU, no network
    Evaluation  step 0: avg@4 39.5% (standard error 1.6%), pass@4 84.4%, 256 held-out problems
    Boundary    layer 4; FFN entropy change by layer, in nats: +0.70 +0.42 +0.32 +1.00 -0.03 +0.25
    Evaluation  step 60: avg@4 77.1% (standard error 1.6%), pass@4 97.7%, 256 held-out problems

A language model is a stack of blocks. BuPO reads it at two heights:

    ids -> E -> block 1 -> ... -> block l -> ... -> block L -> norm -> E_u -> softmax = pi
                                     |
                                     +-------> norm -> E_u -> softmax = pi^l

    Phase 1 trains pi^l: E, blocks 1..l, norm and E_u move, the blocks above l do not. (The norm
    is part of pi^l by default; with `--internal-norm none` it is not, and does not move.)
    Phase 2 trains pi: everything moves. In both phases, pi writes the text.

The idea, in seven steps:

 1. Each block adds what its attention and its FFN compute to the residual stream. H^l is this
    stream after block l of L, and the model's policy is pi = softmax(E_u norm(H^L)), where E_u is
    the unembedding (`lm_head`).
 2. Send the H^l of a lower block through the same norm and E_u, and it answers, too: a logit lens.
    This is the internal layer policy, pi^l = softmax(E_u norm(H^l)), with or without the norm.
 3. GRPO (group relative policy optimization) samples G completions of a problem from pi. Those
    whose boxed answer is right get the reward 1, the others 0.
 4. The advantage A of a completion is its reward, normalized within its group of G.
 5. GRPO makes tokens with A > 0 likelier under pi and those with A < 0 less likely, clipped so that
    no update goes far. There is no KL term, no reference model and no value network.
 6. BuPO does this to pi^l of one low layer l, for the first `internal_steps` steps (phase 1), and
    then to pi (phase 2). So GRPO is BuPO with l = L.
 7. The paper's reason: low layers explore (their FFNs raise the entropy), high ones converge, and
    rewarding a low policy makes its layers find early what the reasoning needs.

An example: the rewards 1 0 0 1 have the mean 0.5 and the (unbiased) standard deviation 0.577, so A
is +-0.866. A step is a rollout and some updates. Let rho be a token's probability now, divided by
that before the first of these updates, such as 0.13 / 0.10 = 1.3:

    A = +0.866, rho = 1.1   counts as rho A = +0.95; its gradient makes the token likelier still
    A = +0.866, rho = 1.3   counts as 1.2 A = +1.04; clipped: no more gradient
    A = -0.866, rho = 0.7   counts as 0.8 A = -0.69; clipped: no more gradient
    A = -0.866, rho = 1.3   counts as rho A = -1.13; it went the wrong way and is made less likely

At rho = 1 the gradient of rho A is A grad log pi^l: the policy gradient.

The letters, with their sizes:          tiny/      1.7B (Qwen3)

    L   blocks, l: the one of phase 1       6        28
    D   numbers in a hidden state          64     2,048
    V   tokens in the vocabulary          102   151,936
    G   completions of a problem            8         8
        problems in a step                 32        32    that is, 256 completions
        problems in a mini-batch           16         8    an update each: 2 or 4 a step
    B   completions in a micro-batch, that is, in one forward and backward pass
    T   tokens of the longest of them, prompt included; the others are padded
    N   completion tokens of a micro-batch: these are trained, those of prompts are not

Why no importance weight pi^l / pi, although pi wrote what pi^l learns from? The paper has none and
gives no reason: it is a heuristic. Why are the sampler's log-probabilities not the old ones in rho?
In phase 1 they are of pi, not of pi^l; in phase 2, decoding with a cache rounds them differently.
Why is phase 1 short? The blocks above l read a stream that changes under them: a long one ruins pi.

On purpose, this file departs from the paper (P) or from the authors' code (C):

  - pi^l applies the final norm; Eq. 5 and C do not (`--internal-norm none`); Table 5 tries both.
  - Updates of phase 1 run blocks 1..l only; C runs all L and builds two full logit matrices.
  - The loss averages over a mini-batch's tokens; C over a micro-batch's, P by completion.
  - The reward compares values; C compares text.
  - A mini-batch without any advantage is skipped; C would still move weights, by momentum.
  - Where A < 0 any rho counts; C stops at 10 (dual clip). Layers count from 1; C's from 0.

Equation and table numbers are those of the paper's version 3. The map:

     1 Settings                 lines 133-189   Config
     2 Internal policies        lines 192-275   internal_hidden, policy_logits, token_logps
     3 Objective                lines 278-300   group_advantages, clipped_surrogate
     4 Training                 lines 303-463   train, update
     5 Rollouts                 lines 466-632   SlotCache, sample
     6 Which layer              lines 635-696   residual_stream, boundary_layer
     7 Masters                  lines 699-768   MasterAdamW
     8 Evaluation               lines 771-796   evaluate
    The storeroom, from line 799 on: you may stop there.
     9 Reward                   lines 804-933   math_reward
    10 Problems                 lines 936-1068  load_problems
    11 Model                    lines 1071-1284  load_model, check_model, encode
    12 Files and command line   lines 1287-1508  main
"""

from __future__ import annotations

import argparse
import cmath
import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import partial
from operator import add, mul, sub, truediv
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any, Literal
from urllib.request import urlopen

import huggingface_hub
import jinja2
import torch
import transformers  # 5.23 or later: blocks and caches are called as it calls them
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.integrations import sdpa_attention

Model = Any  # a transformers.PreTrainedModel with a Llama-like decoder
Tokenizer = Any  # a transformers.PreTrainedTokenizerBase
Sequences = list[tuple[list[int], list[int]]]  # (prompt, completion) pairs of token ids


# 1 Settings =======================================================================================

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
COMMIT = "d3a85c698912d612c1cdb3edaa9011f450d23344"  # of the authors' repository
DATA = f"https://raw.githubusercontent.com/Trae1ounG/BuPO/{COMMIT}/data/"  # their problems


def setting(default: Any, meaning: str) -> Any:
    """A field of `Config`: its default, and what `--help` says of it."""
    return field(default=default, metadata=dict(help=meaning))


@dataclass
class Config:
    """The settings of a run; each is a flag of the command line. In parentheses: the paper's value.
    settings.json in a model's folder changes the defaults: in tiny/, to 60 steps, 10 in phase 1."""

    model: str = setting("tiny", "a folder, that of a run, or an id on the Hub")
    dataset: str = setting(DATA + "deepmath-5k.parquet", "to train on: a file, a URL, a Hub id")
    eval_dataset: str = setting(DATA + "math500.parquet", "held out, to evaluate")
    system: str = setting(SYSTEM, "system message of problems that bring none")
    # The method:
    internal_layer: str = setting("auto", "l of phase 1: a number, or auto (Qwen3-4B: 6)")
    internal_steps: int = setting(30, "steps of phase 1; 0: plain GRPO (30 or 20)")
    internal_norm: Literal["final", "none"] = setting("final", "norm in pi^l (the paper: both)")
    loss_average: Literal["token", "sequence"] = setting("token", "unit of the mean (sequence)")
    clip: float = setting(0.2, "clip ratio, epsilon (0.2)")
    # The recipe:
    steps: int = setting(300, "training steps; 0 only evaluates (300)")
    prompts_per_step: int = setting(32, "problems in a rollout (128)")
    group_size: int = setting(8, "completions of a problem, G (8)")
    mini_batch: int = setting(8, "problems in an optimizer update (32)")
    lr: float = setting(1e-6, "learning rate of AdamW (1e-6)")
    lr_warmup_steps: int = setting(1, "steps in which it rises to --lr (1)")
    temperature: float = setting(1.0, "of sampling and of what is trained (1)")
    max_prompt_tokens: int = setting(1024, "longer prompts are dropped (1,024)")
    max_new_tokens: int = setting(2048, "longer completions are cut (7,168)")
    # Evaluation:
    eval_every: int = setting(50, "steps between evaluations (30)")
    eval_problems: int = setting(100, "held-out problems; 0: no evaluation (all)")
    eval_k: int = setting(4, "completions of each, k of avg@k and pass@k (16; AIME: 32)")
    # The machine:
    rollout_rows: str = setting("auto", "sequences decoded at once: a number, or as many as fit")
    micro_batch_tokens: str = setting("auto", "tokens in a forward and backward pass, or auto")
    gradient_checkpointing: bool = setting(True, "recompute activations?")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "to compute on")
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on a GPU")
    optimizer_device: Literal["auto", "cpu", "cuda"] = setting("auto", "of the float32 masters")
    threads: int = setting(0, "of the CPU; 0: torch decides")
    # The run:
    seed: int = setting(0, "of everything random")
    save_every: int = setting(10, "steps between checkpoints")
    keep: int = setting(2, "checkpoints to keep; 0 keeps all")
    out: str = setting("", "folder to write, new or empty; default: runs/MODEL-DATE-TIME")

    def __post_init__(self) -> None:
        check_settings(self)


# 2 Internal policies ==============================================================================

HEAD_TOKENS = 1024  # tokens that get logits at a time; those of all (B, T, V) would fill any GPU


def internal_hidden(
    model: Model, ids: Tensor, layer: int, cache: SlotCache | None = None, recompute: bool = False
) -> Tensor:
    """The residual stream H^l (B, T, D) after block l = 0..L, before any final norm.
    Runs blocks 1..l only: the slice `layers[:layer]` defines pi^l, saves the work of the blocks
    above, and leaves them without gradients (Eq. 14-15). ids: (B, T), int64, padded on the right
    with anything, since causal attention never looks there. recompute: redo activations in the
    backward pass. It equals transformers' `hidden_states[layer]`, but for layer L, normed there."""
    decoder = model.get_decoder()
    hidden = model.get_input_embeddings()(ids)  # (B, T, D)
    position = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
    attention_mask = None  # causal
    if cache:
        position, attention_mask = cache.position, cache.attention_mask
    rotary = decoder.rotary_emb(hidden, position)
    for block in decoder.layers[:layer]:
        run = partial(checkpoint, block, use_reentrant=False) if recompute else block
        # None: position ids; by place, since versions name the cache differently
        hidden = run(hidden, attention_mask, None, cache, position_embeddings=rotary)  # (B, T, D)
    return hidden


def policy_logits(model: Model, hidden: Tensor, norm: bool = True) -> Tensor:
    """Logits (..., V) of the policy that speaks from `hidden` (..., D): E_u norm(h), or E_u h.
    `hidden` is H^L for pi (Eq. 1), H^l for pi^l (Eq. 5, which has no norm), and A^l or F^l for an
    internal modular policy (Eq. 6, no norm)."""
    return model.get_output_embeddings()(model.get_decoder().norm(hidden) if norm else hidden)


def log_policy(model: Model, hidden: Tensor, norm: bool = True, temperature: float = 1.0) -> Tensor:
    """log pi(. | hidden), float32, (..., V), in nats; hidden: (..., D)."""
    logits = policy_logits(model, hidden, norm).float()  # (..., V)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def entropy(logps: Tensor) -> Tensor:
    """-sum p log p (Eq. 7), in nats, without gradient, of distributions given as log p (..., V)."""
    logps = logps.detach()
    return -logps.exp().mul_(logps).sum(-1)  # (...); in place, since (..., V) is large


def token_logps(
    model: Model,
    ids: Tensor,
    mask: Tensor,
    layer: int,
    norm: bool = True,
    temperature: float = 1.0,
    with_entropies: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi^l (N,) of the N tokens where mask is True, row by row, given all tokens before each;
    and, if wanted, the entropies (N,) of pi^l there, without gradient; float32, nats. ids, mask
    (B, T): as from `pad`. At layer = L the final norm always applies: that is the policy.
    Only the position before each of the N tokens goes through lm_head, HEAD_TOKENS at a time, and
    the backward pass computes these logits again: only (HEAD_TOKENS, V) are ever in memory."""
    norm = norm or layer == len(model.get_decoder().layers)
    targets = ids[:, 1:][mask[:, 1:]]  # (N,)
    hidden = internal_hidden(model, ids, layer, recompute=recompute)  # (B, T, D)
    hidden = hidden[:, :-1][mask[:, 1:]]  # (N, D), one position before each target

    def score_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logps = log_policy(model, hidden, norm, temperature)  # (n, V)
        chosen = logps.gather(-1, targets[:, None])[:, 0]  # (n,)
        return chosen, entropy(logps) if with_entropies else None

    chunks = zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
    scored = [checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    logps, entropies = zip(*scored, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropies else None


def pad(sequences: Sequences, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(prompt, completion) pairs -> ids (B, T), padded on the right, and mask (B, T), bool, of the
    completions. The mask comes from lengths, never from token values: a pad id may be an end id."""
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in sequences]
    marks = [torch.arange(len(p) + len(c)) >= len(p) for p, c in sequences]
    ids, mask = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, marks))  # (B, T)
    return ids.to(device), mask.to(device)


# 3 Objective ======================================================================================


def group_advantages(rewards: Tensor) -> Tensor:
    """A = (R - mean) / (std + 1e-6) over each problem's completions, std unbiased (Eq. 3). rewards
    and result: (problems, G), float. A group whose rewards are all equal gets exactly 0."""
    centered = rewards - rewards.mean(-1, keepdim=True)  # (problems, G)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # (problems, 1)
    return (centered / (rewards.std(-1, keepdim=True) + 1e-6)).masked_fill(equal, 0.0)


def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A) per token, to be maximized: Eq. 9; at l = L, Eq. 3.
    All tensors have one shape. rho = pi^l_new / pi^l_old, both of the policy being optimized, says
    how far the updates of this step have moved it. It is no importance weight pi^l / pi: a
    completion of pi counts the same however unlikely pi^l would have been to write it."""
    ratio = (logps - old_logps).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def optimized_layer(step: int, internal_steps: int, internal_layer: int, num_layers: int) -> int:
    """The layer whose policy `step` optimizes, steps counted from 1: the phase switch (Eq. 10)."""
    return internal_layer if step <= internal_steps else num_layers


# 4 Training =======================================================================================


def train(config: Config, resume: bool = False) -> Path:
    """Run BuPO as `config` says and return the folder of the run; resume: from its last checkpoint.
    What is drawn depends on nothing but the seed, the purpose, the step and the number of rows, so
    a resumed run repeats an undisturbed one, on a CPU bit for bit."""
    out, start = run_folder(config, resume)
    device, dtype = choose_device(config)
    model, tokenizer = load_model(str(start or config.model))
    num_layers = len(model.get_decoder().layers)
    held_out, problems = usable_problems(config, model, tokenizer)
    optimizer = MasterAdamW(model, device, dtype, config.optimizer_device)
    write_settings(config)  # nothing was written before
    done, internal_layer = load_checkpoint(start, optimizer) if start else (0, 0)  # 0: unknown
    if config.internal_layer != "auto":
        internal_layer = int(config.internal_layer)
    stop = stop_requests()

    def between_steps(step: int) -> None:
        """After `step` steps: save, evaluate, and end here if the user has asked for it. Saved
        first, since --resume cuts the logs to the checkpoint and evaluates again."""
        last = step == config.steps
        evaluates = bool(held_out) and (last or step % config.eval_every == 0)
        if config.steps and (stop or last or evaluates or step % config.save_every == 0):
            state = dict(step=step, internal_layer=internal_layer)
            save_checkpoint(config, model, tokenizer, optimizer, state)
        if evaluates and not stop:
            evaluate_and_log(step, model, tokenizer, held_out, config)
        if stop:
            raise KeyboardInterrupt

    between_steps(done)
    steps = range(done + 1, config.steps + 1)
    bar = tqdm(steps, "training", total=config.steps, initial=done, disable=not steps)
    for step in bar:
        # 1 Draw problems, and G completions of each from the full policy pi, in either phase.
        began = time.perf_counter()
        indices = problems_of_step(step, len(problems), config.prompts_per_step, config.seed)
        batch = [problems[i] for i in indices for _ in range(config.group_size)]
        completions = rollout(model, tokenizer, batch, config, f"rollout {step}")
        mismatch = sampling_error(model, completions, config.temperature)

        # 2 Reward 1 for a right boxed answer, else 0.
        texts = tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        rewards = [math_reward(text, p.answer) for text, p in zip(texts, batch, strict=True)]

        # 3 Normalize within each problem's group: (problems, G).
        advantages = group_advantages(torch.tensor(rewards).view(-1, config.group_size))

        # 4 Choose the policy to optimize: pi^l in phase 1, pi in phase 2.
        sequences = [(c.prompt, c.ids) for c in completions]
        if not internal_layer and step <= config.internal_steps:  # --internal-layer auto
            internal_layer = find_boundary(model, sequences)
        layer = optimized_layer(step, config.internal_steps, internal_layer, num_layers)

        # 5 Maximize the clipped surrogate of that policy, one optimizer update per mini-batch.
        lr = config.lr * min(1.0, step / config.lr_warmup_steps)
        updated = update(model, optimizer, sequences, advantages.flatten(), layer, lr, config)

        # 6 Log, save and evaluate.
        metrics = {"step": step, "layer": layer, "sampling_error": mismatch}
        metrics |= describe(completions, rewards, advantages, began) | updated
        log(out / "metrics.jsonl", metrics)
        bar.set_postfix({name: metrics[name] for name in ("layer", "reward", "completion_tokens")})
        between_steps(step)
    return out


def update(
    model: Model,
    optimizer: MasterAdamW,
    sequences: Sequences,
    advantages: Tensor,
    layer: int,
    lr: float,
    config: Config,
) -> dict[str, float | None]:
    """Maximize the mean clipped surrogate of pi^layer, one optimizer update per mini-batch.
    sequences: M (prompt, completion) pairs, those of a problem side by side; advantages: (M,).
    Completions without advantage count in the mean with zeros, so they need no forward pass.
    Returns what the log says of the update; layer_entropy is a mean over the tokens trained."""
    model.eval()  # in updates, too: with dropout, rho would be a matter of chance
    optimizer.zero_grad()  # an update that failed may have left gradients
    internal = layer < len(model.get_decoder().layers)
    size = config.mini_batch * config.group_size  # completions in a mini-batch
    lengths = torch.tensor([len(completion) for _, completion in sequences])  # (M,)
    weights = token_weights(lengths, size, config.loss_average)  # (M,)
    limit = micro_batch_tokens(model, optimizer, layer, config)

    def score(micro: list[int], with_entropies: bool) -> tuple[Tensor, Tensor | None]:  # (N,) each
        ids, mask = pad([sequences[i] for i in micro], model.device)  # (B, T) each
        norm, recompute = config.internal_norm == "final", config.gradient_checkpointing
        how: Any = dict(norm=norm, temperature=config.temperature, recompute=recompute)
        return token_logps(model, ids, mask, layer, with_entropies=with_entropies, **how)

    # The plan: mini-batches, each a list of micro-batches of completions with an advantage:
    # of completions 0 1 2 3 with advantages 0 + - +, two in a mini-batch, [[1]] and [[2, 3]].
    starts = range(0, len(sequences), size)
    learning = [[i for i in range(s, s + size) if advantages[i] != 0] for s in starts]
    plan = [micro_batches(sequences, limit, indices) for indices in learning if indices]

    # pi^l_old is pi^l before any update of this step. The first mini-batch has log pi^l_old for
    # free, in its own forward pass (None here). The later ones are scored here, in advance.
    with torch.no_grad():
        later = [[score(micro, False)[0] for micro in micros] for micros in plan[1:]]
    old = [[None for _ in micros] for micros in plan[:1]] + later

    ratios, clipped, entropies, grad_norms = [], [], [], []
    for micros, olds in tqdm(list(zip(plan, old, strict=True)), "updating", leave=False, delay=2):
        for micro, old_logps in zip(micros, olds, strict=True):
            logps, nats = score(micro, internal)  # (N,) each
            entropies += [] if nats is None else [nats]
            if old_logps is None:  # the first mini-batch: rho = 1
                old_logps = logps.detach()  # (N,)
            owner = torch.tensor(micro).repeat_interleave(lengths[micro])  # (N,), as 7 7 9 9 9
            advantage, weight = advantages[owner].to(logps), weights[owner].to(logps)  # (N,) each
            surrogate = clipped_surrogate(logps, old_logps, advantage, config.clip)  # (N,)
            loss = -(weight * surrogate).sum()
            loss.backward()
            ratios.append((logps.detach() - old_logps).exp())  # (N,)
            clipped.append(surrogate.detach() < ratios[-1] * advantage)  # (N,): the clip lowered it
        grad_norms.append(optimizer.step(lr))
    metrics: dict[str, float | None] = dict(clip_fraction=0.0, ratio_max=1.0, grad_norm=0.0)
    if plan:
        metrics["clip_fraction"] = float(torch.cat(clipped).float().mean())
        metrics["ratio_max"] = float(torch.cat(ratios).max())
        metrics["grad_norm"] = fmean(grad_norms)
    if internal:
        metrics["layer_entropy"] = float(torch.cat(entropies).mean()) if plan else None
    return metrics


def token_weights(lengths: Tensor, size: int, average: str) -> Tensor:
    """What each token of M completions weighs in the loss: (M,). lengths: (M,), int64, in tokens,
    in mini-batches of `size` completions. average token: the mean over all completion tokens of the
    mini-batch; sequence: over the tokens of each completion, then over completions (Eq. 3, 9). The
    denominator is that of the mini-batch, so how it is split into micro-batches changes nothing."""
    if average == "token":
        return 1 / lengths.view(-1, size).sum(-1).repeat_interleave(size)
    return 1 / (size * lengths)


def micro_batches(sequences: Sequences, tokens: int, indices: Iterable[int]) -> list[list[int]]:
    """Split the sequences of these indices into micro-batches of indices. Padded to its longest
    sequence, each holds at most `tokens` tokens, or is one sequence."""
    micros: list[list[int]] = []
    # Shortest first, so that little of them is padding.
    for length, i in sorted((sum(map(len, sequences[i])), i) for i in indices):
        if not micros or (len(micros[-1]) + 1) * length > tokens:
            micros.append([])
        micros[-1].append(i)
    return micros


def problems_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """The indices of a step's problems: all come once in each epoch, in an order of its own."""
    places = range((step - 1) * size, step * size)
    epochs = {place // count for place in places}
    orders = {n: Random(f"{seed} {n}").sample(range(count), count) for n in epochs}
    return [orders[place // count][place % count] for place in places]


# 5 Rollouts =======================================================================================


@dataclass
class Completion:
    """What pi wrote after a prompt."""

    ids: list[int] = field(default_factory=list)  # with the end token, if it came
    logps: list[float] = field(default_factory=list)  # as sampled, to check; not log pi_old
    entropies: list[float] = field(default_factory=list)  # of pi, in nats
    ended: bool = False  # by an end token, not by the length limit
    prompt: list[int] = field(default_factory=list)


def rollout(
    model: Model, tokenizer: Tokenizer, batch: list[Problem], config: Config, purpose: str
) -> list[Completion]:
    """A completion of each problem from pi, drawn as the seed and the purpose say."""
    prompts = [encode(tokenizer, problem) for problem in batch]
    end_ids = end_tokens(model, tokenizer)
    rows = rollout_rows(model, max(map(len, prompts)), config)
    stream, most = random_stream(model.device, config.seed, purpose), config.max_new_tokens
    completions = sample(model, prompts, most, end_ids, config.temperature, rows, stream, purpose)
    torch.cuda.empty_cache()  # an update needs blocks of other sizes
    return completions


def random_stream(device: str | torch.device, seed: int, purpose: str) -> torch.Generator:
    """A generator that seed and purpose determine: nothing to save, and none disturbs another."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


@torch.no_grad()
def sample(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: Iterable[int],
    temperature: float = 1.0,
    rows: int = 128,
    generator: torch.Generator | None = None,
    bar: str = "",
) -> list[Completion]:
    """Sample a completion of each prompt (token ids) from the full softmax of pi: no top-k, top-p.
    At most `rows` sequences are decoded at once: one that ends leaves, and prompts enter when an
    eighth of the rows is free, equal ones together. generator: on the model's device."""
    model.eval()
    end_ids, num_layers = set(eos_ids), len(model.get_decoder().layers)
    completions = [Completion(prompt=prompt) for prompt in prompts]
    cache = SlotCache(min(rows, len(prompts)), max(map(len, prompts), default=0) + max_new_tokens)
    running, waiting = completions[:0], completions  # running: n, one in each row, that is, slot
    hidden = model.get_input_embeddings().weight[:0]  # (n, D), of the last token of each row
    progress = tqdm(total=len(prompts), desc=bar, leave=False, disable=not bar)
    while running or waiting:
        # Prompts enter, several at a time, which is faster.
        free = cache.slots - len(running)
        if waiting and free >= min(len(waiting), max(1, cache.slots // 8)):
            last = read_prompts(model, [c.prompt for c in waiting], cache, len(running))  # (k, D)
            running, waiting = running + waiting[: len(last)], waiting[len(last) :]
            hidden = torch.cat([hidden, last])  # (n, D)

        # Each row draws a token.
        logps = log_policy(model, hidden, temperature=temperature)  # (n, V)
        tokens = draw(logps, generator)  # (n,)
        chosen = logps.gather(-1, tokens[:, None])[:, 0]  # (n,)
        drawn = torch.stack([tokens, chosen, entropy(logps)]).tolist()  # one transfer
        for c, token, logp, nats in zip(running, *drawn, strict=True):
            c.ids.append(int(token))  # exact in float32, up to 16 million
            c.logps.append(logp)
            c.entropies.append(nats)
            c.ended = c.ids[-1] in end_ids

        # Those that have ended leave, and the last rows fill the gaps: A B C D without B is A D C.
        going = [not c.ended and len(c.ids) < max_new_tokens for c in running]
        n = sum(going)
        gaps = [row for row in range(n) if not going[row]]
        movers = [row for row in range(n, len(running)) if going[row]][::-1]
        if gaps:
            cache.copy(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            running[gap] = running[mover]
        progress.update(len(running) - n)
        running, hidden = running[:n], hidden[:0]  # hidden: none as yet

        # The others read the token that they have drawn.
        if running:
            newest = [c.ids[-1] for c in running]
            places = [len(c.prompt) + len(c.ids) - 1 for c in running]
            ids, position = torch.tensor([newest, places], device=model.device)[..., None]  # (n, 1)
            cache.begin_tokens(position, max(places))
            hidden = internal_hidden(model, ids, num_layers, cache)[:, 0]  # (n, D)
    progress.close()
    return completions


def draw(logps: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token (n,) for each row of log-probabilities (n, V): the first at which the cumulative
    distribution passes a uniform number. float64 keeps rare tokens possible; torch.multinomial
    would need n * V random numbers."""
    cumulative = logps.exp().double().cumsum(-1)  # (n, V)
    uniform = torch.empty_like(cumulative[:, :1]).uniform_(generator=generator)  # (n, 1)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (n, 1)
    return tokens[:, 0].clamp_(max=logps.shape[-1] - 1)


def read_prompts(model: Model, prompts: list[list[int]], cache: SlotCache, first: int) -> Tensor:
    """Read prompts into the slots from `first` on, until these are full or an eighth of all slots
    has been read into, which takes memory. Equal prompts are read once, and their slot is copied.
    Returns the hidden states (n, D) of the last tokens of the n prompts that are in."""
    different: dict[tuple[int, ...], int] = {}  # prompts A A B: A is 0, B is 1
    which: list[int] = []  # prompts A A B: 0 0 1
    for prompt in map(tuple, prompts[: cache.slots - first]):
        if prompt not in different and len(different) == max(1, cache.slots // 8):
            break
        which.append(different.setdefault(prompt, len(different)))
    ids, _ = pad([(list(prompt), []) for prompt in different], model.device)  # (k, T)
    cache.begin_prompts(first, ids)
    hidden = internal_hidden(model, ids, len(model.get_decoder().layers), cache)  # (k, T, D)
    cache.copy([first + i for i in which], list(range(first, first + len(which))))
    last = [len(prompt) - 1 for prompt in different]
    return hidden[which, [last[i] for i in which]]  # (n, D)


class SlotCache:
    """Keys and values of the sequences being decoded. The i-th running sequence owns slot i, and
    column t holds what belongs to its token t. So sequences of different lengths need no left
    padding, and when one ends, another can have its slot. Columns beyond its last token hold
    leftovers, which the mask hides until they are overwritten. Before a forward pass one calls
    begin_prompts or begin_tokens; `internal_hidden` reads position and attention_mask;
    transformers' attention calls `update`."""

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, (columns // 16 + 1) * 16  # a multiple of 16 suits GPUs
        self.blocks: list[list[Tensor]] = []  # keys, values: (slots, heads, columns, size) each

    def begin_prompts(self, first: int, ids: Tensor) -> None:
        """Next come all tokens of n prompts, ids (n, T), into slots `first` and on."""
        self.position = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        self.slot = torch.arange(first, first + len(ids), device=ids.device)[:, None]  # (n, 1)
        self.attention_mask: Tensor | None = None  # causal
        self.read = slice(first, first + len(ids)), slice(None), slice(ids.shape[1])

    def begin_tokens(self, position: Tensor, longest: int) -> None:
        """Next comes a token of each of n sequences, at position (n, 1), at most `longest`."""
        width = (longest // 16 + 1) * 16  # columns that are read
        self.position = position
        self.slot = torch.arange(len(position), device=position.device)[:, None]  # (n, 1)
        beyond = torch.arange(width, device=position.device) > position  # (n, width)
        mask = beyond.to(self.blocks[0][0].dtype).masked_fill_(beyond, -math.inf)  # 0, -inf beyond
        self.attention_mask = mask[:, None, None]  # (n, 1, 1, width)
        self.read = slice(len(position)), slice(None), slice(width)

    def update(self, key: Tensor, value: Tensor, block: int, *_: Any, **__: Any) -> list[Tensor]:
        """Store keys and values (n, heads, T, size); returns those that can be attended to."""
        if block == len(self.blocks):  # all memory is allocated here, once
            shapes = [(self.slots, x.shape[1], self.columns, x.shape[3]) for x in (key, value)]
            self.blocks.append([key.new_zeros(shape) for shape in shapes])
        for store, x in zip(self.blocks[block], (key, value), strict=True):
            # Indexed by slot (n, 1) and position (n or 1, T), the left side is (n, T, heads, size).
            store[self.slot, :, self.position] = x.transpose(1, 2)
        return [store[self.read] for store in self.blocks[block]]

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy slots into others. All sources are read before a target is written."""
        source, target = torch.tensor([sources, targets], device=self.slot.device)
        for store in itertools.chain(*self.blocks):
            store[target] = store[source]


# 6 Which layer ====================================================================================


def residual_stream(model: Model, ids: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The forward pass of a Llama-like decoder for ids (B, T), spelt out. For each block l = 1..L,
    (B, T, D) each: H^(l-1), LN(H^(l-1)), A^l, LN(H^(l-1) + A^l), F^l, where A^l and F^l are what
    attention and FFN add, H^l = H^(l-1) + A^l + F^l, and LN is the norm before each of them."""
    hidden = internal_hidden(model, ids, 0)  # H^0, the embeddings
    positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
    rotary = model.get_decoder().rotary_emb(hidden, positions)
    for block in model.get_decoder().layers:
        attention_input = block.input_layernorm(hidden)
        attention, _ = block.self_attn(attention_input, rotary, attention_mask=None)  # causal
        ffn_input = block.post_attention_layernorm(hidden + attention)
        ffn = block.mlp(ffn_input)
        yield hidden, attention_input, attention, ffn_input, ffn
        hidden = hidden + attention + ffn


@torch.no_grad()
def ffn_entropy_change(model: Model, sequences: Sequences, tokens: int = 16384) -> list[float]:
    """By how much the FFN of each block l = 1..L raises the entropy (Eq. 13): the entropy of
    softmax(E_u F^l) minus that of softmax(E_u LN(H^(l-1) + A^l)), both without the final norm. Mean
    over completion tokens, in nats; `tokens` in a micro-batch."""
    change = [0.0] * len(model.get_decoder().layers)

    def total_entropy(states: Tensor) -> float:  # (N, D), of as many policies
        chunks = states.split(HEAD_TOKENS)
        return sum(float(entropy(log_policy(model, chunk, norm=False)).sum()) for chunk in chunks)

    for micro in micro_batches(sequences, tokens, range(len(sequences))):
        ids, mask = pad([sequences[i] for i in micro], model.device)  # (B, T) each
        for i, (_, _, _, ffn_input, ffn) in enumerate(residual_stream(model, ids)):
            change[i] += total_entropy(ffn[:, :-1][mask[:, 1:]])
            change[i] -= total_entropy(ffn_input[:, :-1][mask[:, 1:]])
    count = sum(len(completion) for _, completion in sequences)
    return [total / count for total in change]


def boundary_layer(ffn_entropy_change: list[float], tolerance: float = 0.1) -> int:
    """The last layer of the exploring region, the lowest run of layers whose FFN raises the entropy
    clearly. The paper reads it off a plot; "more than `tolerance` times the largest change" is this
    file's rule. Without such a region: L, that is, pi."""
    threshold = tolerance * max(0.0, *ffn_entropy_change)
    explores = [change > threshold for change in ffn_entropy_change]
    if not any(explores):
        return len(explores)
    layer = explores.index(True) + 1  # the first that explores; layers count from 1
    while layer < len(explores) and explores[layer]:  # the next one explores, too
        layer += 1
    return layer


def find_boundary(model: Model, sequences: Sequences) -> int:
    """What `--internal-layer auto` means: the boundary layer, by the first 64 tokens of 16 of the
    completions, which are enough for a mean."""
    some = sequences[:: max(1, len(sequences) // 16)][:16]
    change = ffn_entropy_change(model, [(prompt, completion[:64]) for prompt, completion in some])
    layer, rounded = boundary_layer(change), " ".join(f"{value:+.2f}" for value in change)
    verdict = f"layer {layer}" if max(change) > 0 else "none, so phase 1 is GRPO"
    tqdm.write(f"Boundary    {verdict}; FFN entropy change by layer, in nats: {rounded}")
    return layer


# 7 Masters ========================================================================================

GRAD_CLIP = 1.0  # largest norm of a gradient (paper: 1.0)
PIECE = 1 << 20  # numbers of a gradient that travel or are summed at once


class MasterAdamW:
    """AdamW on float32 masters of the weights of a model of any precision: ZeRO-Offload's idea. In
    bfloat16 a weight is too coarse for a learning rate of 1e-6. So each has a float32 master, with
    AdamW's moments beside it, on the GPU or the CPU. A gradient goes to its master as soon as it is
    there; after a step the weights are the masters, rounded. In float32 on one device a weight is
    its own master. On a CPU new memory is slow: gradients keep theirs, and arrive in pieces."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, where: str):
        """The float32 weights of `model` become the masters, and it gets `dtype`. where: the device
        of the masters; auto: the GPU if all that it would hold fits into half of what is free."""
        self.weights = list(model.parameters())
        size = sum(weight.numel() for weight in self.weights)
        needed = size * (2 + 4 + 4 + 8)  # bytes: bfloat16 weight, master, its gradient, two moments
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        fits = where == "cuda" or (where == "auto" and needed <= free / 2)
        self.device = device if fits else torch.device("cpu")  # of the masters
        self.masters = self.weights
        if dtype != torch.float32 or device != self.device:
            self.masters = [nn.Parameter(w.detach().to(self.device)) for w in self.weights]
            pin = device != self.device
            self.buffer = torch.empty(PIECE, dtype=dtype, device=self.device, pin_memory=pin)
            for weight, master in zip(self.weights, self.masters, strict=True):
                kept = torch.empty_like(master) if self.device.type == "cpu" else None
                weight.register_post_accumulate_grad_hook(partial(self.take, master, kept))
        for weight in self.weights:  # buffers stay float32, as rotary ones need it
            weight.data = weight.data.to(device, dtype)
        model.to(device)
        recipe: Any = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        self.adam = torch.optim.AdamW(self.masters, **recipe, fused=True)
        kind = f"{type(model).__name__}, {size / 1e6:.1f} M parameters, {dtype} on {device}"
        tqdm.write(f"Model       {kind}, masters on {self.device}".replace("torch.", ""))

    @torch.no_grad()
    def take(self, master: Tensor, kept: Tensor | None, weight: Any) -> None:
        """Add the gradient of a weight to that of its master, in float32, and free it."""
        if master.grad is None:
            master.grad = torch.zeros_like(master) if kept is None else kept.zero_()
        totals, parts = (x.view(-1).split(PIECE) for x in (master.grad, weight.grad))
        for total, part in zip(totals, parts, strict=True):
            total.add_(self.buffer[: len(part)].copy_(part))  # copy_ returns when it is done
        weight.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip the gradient, whose norm is returned, update masters and weights. Weights without
        gradient, such as those above l in phase 1, stay bit-identical."""
        grads = [master.grad.flatten() for master in self.masters if master.grad is not None]
        pieces = [piece for grad in grads for piece in grad.split(PIECE)]  # a CPU sums in float32
        grad_norm = nn.utils.get_total_norm(pieces)
        nn.utils.clip_grads_with_norm_(self.masters, GRAD_CLIP, grad_norm)
        if not math.isfinite(grad_norm):  # it must not move anything
            raise UsageError("A gradient is not finite; try a lower --lr or --precision float32.")
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight and master.grad is not None:
                weight.copy_(master)
        self.zero_grad()
        return float(grad_norm)

    def zero_grad(self) -> None:
        """To None: by momentum and weight decay AdamW would move what has a gradient of zeros."""
        for tensor in (*self.weights, *self.masters):
            tensor.grad = None


# 8 Evaluation =====================================================================================


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k is right, from c right ones of n >= k: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    model: Model, tokenizer: Tokenizer, problems: list[Problem], config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """avg@k and pass@1..k of pi, from k completions of each problem, and these completions, always
    drawn from the same random stream. eval_se: the standard error of eval_avg over problems."""
    k, samples = config.eval_k, []
    batch = [problem for problem in problems for _ in range(k)]
    completions = rollout(model, tokenizer, batch, config, "evaluation")
    for problem, one in zip(batch, completions, strict=True):
        text = tokenizer.decode(one.ids, skip_special_tokens=True)
        outcome = dict(completion=text, ended=one.ended, reward=math_reward(text, problem.answer))
        samples.append(dict(asdict(problem), **outcome, prompt_ids=one.prompt, ids=one.ids))
    rewards = [one["reward"] for one in samples]
    right = [int(sum(rewards[i : i + k])) for i in range(0, len(rewards), k)]  # of each problem's k
    error = stdev(c / k for c in right) / len(right) ** 0.5 if len(right) > 1 else None
    passed = [fmean(pass_at_k(k, c, j) for c in right) for j in range(1, k + 1)]
    metrics = dict(eval_avg=fmean(rewards), eval_se=error, eval_pass=passed, eval_k=k)
    return dict(metrics, eval_problems=len(problems)), samples


# The storeroom ####################################################################################
#
# What follows checks answers, reads problems, loads models and keeps runs; it may be skipped.


# 9 Reward =========================================================================================

# Answers get one spelling for each symbol, one layout, and one meaning, a number if they have one.
SYMBOL = {old: new for new, olds in {  # the spelling kept: those that become it
    "*": r"\cdot \times", "/": ": per", "-": "−", "^2": "²", "^3": "³", "≈": r"\approx",
    "≤": r"\le \leq", "≥": r"\ge \geq", "∞": r"\infty", "%": r"\% percent", "|": r"\lvert \rvert",
    "{": r"\{", "}": r"\}", "∈": r"\in", "±": r"\pm", "°": r"^\circ ^{\circ} degrees",
    " ": r"$ ~ \left \right \, \: \; \! \( \) \displaystyle", ",": r"& ∪ \cup and or", "T": r"\top",
    "((": r"\begin", "))": r"\end", "),(": r"\\", "": r",\! {,} {pmatrix} {bmatrix}",
    r"\frac": r"\dfrac \tfrac", r"\binom": r"\dbinom", r"\text": r"\textbf \mathrm \mathbf \mbox",
    r"\sin^{-1}": r"\arcsin", r"\cos^{-1}": r"\arccos", r"\tan^{-1}": r"\arctan", r"\pi ": "π pi",
    r"\text{dollars}*": r"\$", "in": "inch inches", "ft": "foot feet", "m": "meter meters",
}.items() for old in olds.split()}  # fmt: skip
UNIT = r"(?:(?:cubic )?(?:[ckm]?m|in|ft|s|h|k?g|Hz|[LNJV]|mph|people|(?:unit|second|minute|hour|"
UNIT += r"day|week|month|year|mile|dollar|cent|student|apple|cup|integer|point|term|way)s?)\b/?)+"
LAYOUT: list[tuple] = [  # what, by what  # an example
    (r"\^\{?\\circ\}?|,\\!|\{(?:,|.matrix)\}|\\?[a-zA-Z]+|\\.|.", lambda m: SYMBOL.get(m[0], m[0])),
    (r"(^|[=*]) *-?\d{1,3}([, ]\d{3})+(?![\d,])", lambda m: re.sub("[, ]", "", m[0])),  # 4,000
    (r"\}/\\text\{", "/"), (r"square (\w+\}?)", r"\1^2"),  # }/\text{ -> /; square in -> in^2
    (rf"(?<=[\d)}}i])( +|(?!\w\b))({UNIT})(?=(\^\d)?\W*$)", r"\\text{\2}"),  # 5 ft -> 5\text{ft}
    (r"\\?\s+(?![\w\s])|(?<!\w)\\?\s+|(?<=.)≈.*|[.,]+\s*$|(?<=\d)th$", ""),  # 2 x ≈ 3. -> 2 x
    (r"^\\text\{([^{}]*?)\.?\}$|\\text\{([ei°%,])\}", r"\1\2"),  # \text{a.} -> a, 2\text{i} -> 2i
    (r"^(?i:yes|no|(?!sqrt)[a-z]{4,})\b", lambda m: m[0].upper()),  # Yes -> YES
    (r"(_|\^|\\mathbb|\\sqrt) ?(\d+|[\w+*])|(\\frac|\\binom) ?(\d)", r"\1\3{\2\4}"),  # x^2 -> x^{2}
    (r"(\d+|[a-zA-Z]|\([^()]*\))!", r"!{\1}"), (r"([^,±]*)±([^,]*)", r"\1+\2,\1-\2"),  # 5!, 1±x
    (r"\\binom\{([^{}]*)\}\{?([^{}]*)\}?", r"\\frac{!{\1}}{!{\2}!{\1-(\2)}}"),  # 5!/(2!(5-2)!)
    (r"(?<![\w.^}])(\d+)(?:\\frac\{| )(\d+)[}{/]+(\d+)\}?", r"(\1+\2/\3)"),  # 1 1/4 -> (1+1/4)
    (r"\^\{?[T*]|[A-Z]\^\{-|\\(l[fc]|angle|bar|vec|sqrt\[|log_)|[^-+,=<≤]∞|∞[^]),<≤]", r"|\g<0>"),
    (r"^([^<>≤≥]*)>([^<>≤≥]*)$", r"\2<\1"), (r"^([^<>≤≥]*)≥([^<>≤≥]*)$", r"\2≤\1"),  # 2>x -> x<2
    (r"(^|[({\[,=<>≤≥+])([+-])", r"\g<1>0\2"),  # -x -> 0-x
]  # what gets a | is text, no formula: A^T, A^{-1}, \vec{v}, 2∞  # fmt: skip
KNOWN = r"(?:\\[a-z]+(?![a-z])|[^a-df-z\\=])"  # all but an unknown: \tan, A, +, 2, e
LEFT = rf"^(?!.*\\n|{KNOWN}*([a-df-z])(?:{KNOWN}|\1)*=)(\([^()]*\)|[^,=<>≤≥∈()!])*=(?![a-zA-Z]*$)"
ONE_SIDED: list[tuple] = [  # only if exactly one of the two answers has this sign: what, by what
    ("[=∈]", r"(^|,)(?!\\n)(\\?[a-zA-Z]+(_\{.*?\})?|\w'*\([^()=]*\))[=∈](?![a-zA-Z]*$)", r"\1"),
    (r"\\text|[°%]", rf"^\\text\{{dollars\}}\*|([°%]|/?\\text\{{{UNIT}\}}(\^\{{\d\}})?)+$", ""),
    (r"^([A-J]|\([A-J]\)|YES|NO|TRUE|FALSE)$",
     r"^(\\text\{)?\(?([A-Ja-j](?!,)|YES|NO|TRUE|FALSE)[).};,]"
     r"(?!.*(\b([A-J]|(?i:yes|no|true|false|if|but))\b|\b[a-j]\))).*", lambda m: m[2].upper()),
]  # as x=2 and 2, 5\text{ft} and 5, (E) 12 and E  # fmt: skip
WORD = r"(?:text\{[^{}]*\}|(?<=\\)[a-zA-Z]+|[a-zA-Z]{4,}|[a-zA-Z])(?:_\{[^{}]*\}|')*"  # x_{1}, \pi
TOKEN = rf"\\?({WORD}|(?:\d{{0,15}}\.\d{{1,8}}(?:e-?\d\d?)?|\d{{1,15}}(?:e\d\d?)?)(?!\d)|\S)"
OPERATIONS: dict = {f: getattr(cmath, f) for f in ("sqrt", "exp", "log", "sin", "cos", "tan")} | {
    "ln": cmath.log, "!": lambda n: math.gamma(n + 1), "+": add, "-": sub, "*": mul, "/": truediv,
    "^": lambda a, b: a**b if a else math.nan, "=": lambda a, b: 31e-6 * compute("-", a, b) ** 2,
}  # =: the difference squared, so that x=2 is 2=x, times a number: it is not (x-2)^2  # fmt: skip
CONSTANTS = {"e": math.e, "i": 1j, "pi": math.pi, "|": math.nan}  # what has a | is no formula
RELATION, SUM, PRODUCT, ADJACENT, POWER = 1, 2, 3, 4, 5  # how tightly signs bind; ADJACENT: 2x
BINDS = dict.fromkeys([*OPERATIONS, "("], PRODUCT) | dict.fromkeys("=<>≤≥", RELATION)
BINDS |= {"+": SUM, "-": SUM, "^": POWER} | dict.fromkeys(")]},_.0123456789", 0)  # 0: the end
BRACKETS = {"()": "(#)", "[]": "[#]", "(]": "(#]", "[)": "[#)", "{}": "{}"}  # #: an item's place
GROUP = r"\{(?:[^{}\\]|\\(?!boxed|fbox).|" * 9 + "(?!)" + r")*\}" * 9  # {...}, nine deep, no box


def find_boxes(text: str) -> list[str]:
    r"""What is in each \boxed{...}, \fbox{...} and \boxed 7, unless it is empty or holds a box."""
    boxes = re.findall(rf"\\(?:boxed|fbox)\s*({GROUP}|-?[\d.]*\d)", text, re.DOTALL)
    return [inside for box in boxes if (inside := box[1:-1].strip() if box[0] == "{" else box)]


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} of a text, None if it has none."""
    return next(reversed(find_boxes(text)), None)


def math_reward(completion: str, answer: str) -> float:
    r"""1.0 if the last \boxed{} of the completion holds the answer, else 0.0; fast for any texts.
    Formulas are numbers, to ten digits, for random letters: so letters commute, and an unfinished
    formula counts, even the question's own (5 % of MATH500). All else is text, as |x|, \log_2 x."""
    given, gold = extract_boxed(completion[-20_000:]) or "", answer.strip()
    if given == gold or max(len(given), len(gold)) > 250:
        return float(given == gold != "")
    for pattern, by in LAYOUT:
        given, gold = re.sub(pattern, by, given), re.sub(pattern, by, gold)
    given = given if re.search("[=<>≤≥∈]", gold) else re.sub(LEFT, "", given)  # a+b=2
    for sign, pattern, by in ONE_SIDED:
        if bool(re.search(sign, given)) != bool(re.search(sign, gold)):
            given, gold = re.sub(pattern, by, given), re.sub(pattern, by, gold)
    with contextlib.suppress(Exception):  # KeyError, OverflowError, ...: not a formula
        pairs = [(value(given, point), value(gold, point)) for point in "pq"]
        return float(all(abs(a - b) <= min(1e-3, 1e-10 * abs(b)) for a, b in pairs))
    return float(given == gold != "")


def value(text: str, point: str) -> Any:
    """The number that a formula stands for at a point of random letters, by a Pratt parser."""
    # In reverse, for pop(). Braces make one formula or list of it; the last, ")", is never read.
    tokens = [")", "}", *re.findall(TOKEN, text)[::-1], "{"]

    def unknown(name: str, *items: Any) -> Any:  # a letter x; f(a) or (a,b), by name and items
        number: Any = Random(name + point).uniform(1, 2)
        for i, item in enumerate(items):
            number = compute("/", number, compute("-", unknown(name.replace("#", str(i))), item))
        return number

    def formula(level: int) -> Any:  # reads on while signs bind more tightly than level
        number = operand()
        while (binds := BINDS.get(tokens[-1], BINDS.get(tokens[-1][0], ADJACENT))) > level:
            sign = tokens.pop() if tokens[-1] in "+-*/^=<>≤≥" else "*"
            join = partial(compute, sign) if sign in OPERATIONS else partial(unknown, sign + "#")
            number = join(number, formula(ADJACENT if binds > SUM else binds))
        return number

    def operand() -> Any:
        token = tokens.pop()
        if token in "([{":
            items = [formula(0)]
            while (end := tokens.pop()) == ",":
                items.append(formula(0))
            one = len(items) == 1 and token + end in ("()", "{}")
            return items[0] if one else unknown(BRACKETS[token + end], *items)
        if token == "frac":
            return compute("/", operand(), operand())
        if token in OPERATIONS:
            return compute(token, formula(POWER if tokens[-1] in "([{" else PRODUCT))  # or sin 2x
        number = float(token) if token[-1].isdigit() else CONSTANTS.get(token) or unknown(token)
        while re.match(r".*\{$|([fghoFGHJOP]|(?!pi)[a-zA-Z]{2}).*\($", token + tokens[-1]):  # f(x)
            number = unknown("f#", number, operand())
        return number

    return formula(0) / (len(tokens) == 1)  # an error if something is left


def compute(name: str, *items: Any) -> Any:
    """a + b, sin a, ...; an error if it is 0, huge, tiny or a sum that lost seven digits."""
    number = OPERATIONS[name](*items)
    sizes = [abs(n) for n in (*items, number) if n]
    if not 1e-150 < abs(number) < 1e150 or (name in "+-" and min(sizes) < 1e-7 * max(sizes)):
        raise ArithmeticError("zero, infinite or inaccurate")
    return number


# 10 Problems ======================================================================================

QUESTIONS = ("prompt", "question", "problem", "input", "query", "messages")
ANSWERS = ("reward_model", "final_answer", "answer", "ground_truth", "expected_answer", "solution")
NO_ANSWERS = ("", "-", "?", "proof", "notfound", "noanswer", "unknown", "n/a", "nan", "null")
PARTS = r"(?i:.*(choice|option).*|context|passage|images?)|[A-H]"  # columns with more of a question


@dataclass(frozen=True)
class Problem:
    """What the model is asked, as chat messages ({"role", "content"}), and the rewarded answer."""

    messages: list[dict]
    answer: str


def load_problems(
    source: str, limit: int | None = None, system: str = "", fits: Callable | None = None
) -> list[Problem]:
    """At most `limit` problems of a source, each question once. Rows that cannot be asked or
    rewarded, or do not fit, are dropped and counted by reason."""
    if limit == 0:
        return []
    problems: list[Problem] = []
    seen, dropped = set(), Counter[str]()
    forms = ".parquet, .jsonl, .json, .csv, or on the Hub ID, ID:SPLIT or ID:CONFIG:SPLIT"
    with explain(f"{source} cannot be read", f"check the connection or name {forms}"):
        source, (question, answer, *parts), rows = read_rows(source)
        for row in tqdm(rows, "reading problems", leave=False, delay=2):
            if len(problems) == limit:
                break
            text = str(row.get(question))
            try:
                if text in seen:  # first, since everything else takes longer
                    raise ValueError("duplicate")
                if part := next((name for name in parts if row.get(name)), None):
                    raise ValueError(f"part of the question is in {part}")
                messages = find_messages(row.get(question), system)
                problem = Problem(messages, find_answer(row.get(answer)))
                seen.add(text)
                if fits and not fits(problem):
                    raise ValueError("over --max-prompt-tokens")
                problems.append(problem)
            except ValueError as reason:
                dropped[str(reason).rstrip(".")] += 1
    why = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common(9)) or "none"
    found = f"{source} (question: {question}, answer: {answer}; dropped: {why})"
    if not problems:
        raise UsageError(f"No usable row in {found}; a row needs a question and a short answer.")
    tqdm.write(f"Problems    {len(problems)} of {found}")
    return problems


def read_rows(source: str) -> tuple[str, list[str], Iterable[dict]]:
    """The source, with its split if it names none; the columns that matter; rows with them."""
    kind = re.search(r"\.(parquet|jsonl?|csv)(\?.*)?$", source.lower())
    if not kind:
        import datasets  # slow to import, and files need none of it

        name, *rest = re.split(r":(?![^\[]*\])", source)  # not at the colon of train[:200]
        data = datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else None)
        if not rest:
            split = "train" if "train" in data else next(iter(data))
            source, data = f"{source}:{split}", data[split]
        columns = find_columns(data.column_names)
        return source, columns, data.select_columns(columns)
    path = Path(source).expanduser()
    file: Any = io.BytesIO(urlopen(source).read()) if "://" in source else path.open("rb")
    if kind[1] == "parquet":
        import pyarrow.parquet

        parquet = pyarrow.parquet.ParquetFile(file)
        columns = find_columns(parquet.schema_arrow.names)
        tables = parquet.iter_batches(1000, columns=columns)
        return source, columns, (row for table in tables for row in table.to_pylist())
    text = file.read().decode("utf-8-sig").strip()
    if kind[1] == "csv":
        csv.field_size_limit(2**31 - 1)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey=""))
    else:
        if not text.startswith("["):  # a row a line
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        records = json.loads(text, parse_float=Decimal)  # 0.10 keeps its digits
        rows = [row if isinstance(row, dict) else {} for row in records]
    return source, find_columns(dict.fromkeys(itertools.chain(*rows))), rows


def find_columns(names: Iterable[str]) -> list[str]:
    """The columns of the question, of the answer, and of other parts of the question."""
    columns = list(names)
    question, answer = ([x for x in known if x in columns][:1] for known in (QUESTIONS, ANSWERS))
    if not (question and answer):
        names = ", ".join(ANSWERS if question else QUESTIONS)
        raise UsageError(f"None of the columns {columns} is called {names}; rename one.")
    return question + answer + [name for name in columns if re.fullmatch(PARTS, name)]


def find_messages(question: Any, system: str) -> list[dict]:
    """A question, text or chat messages, as chat messages, system message first."""
    if isinstance(question, str):
        question = [dict(role="user", content=question)]
    if isinstance(question, dict):  # of lists, as `datasets` stores a Sequence of messages
        lists = zip(*question.values(), strict=True)
        question = [dict(zip(question, one, strict=True)) for one in lists]
    with contextlib.suppress(LookupError, TypeError, AttributeError):  # not what it should be
        messages = [dict(role=m["role"], content=m["content"]) for m in question]
        while messages[-1]["role"] == "assistant":  # it may hold the answer
            messages.pop()
        if system and messages[0]["role"] != "system":
            messages.insert(0, dict(role="system", content=system))
        if messages[-1]["role"] == "user" and all(m["content"].strip() for m in messages):
            return messages
    raise ValueError("no question as text or as chat messages")


def find_answer(value: Any) -> str:
    r"""The answer in a value: what is in \boxed{} (MATH) or after '####' (GSM8K), else the whole
    text, if it is short."""
    if isinstance(value, dict):  # reward_model
        value = value.get("ground_truth")
    if isinstance(value, (float, Decimal)):
        value = f"{Decimal(str(value)):f}"  # 5e-05 is 0.00005
    text = str(value).rpartition("####")[2].strip() if isinstance(value, (str, int)) else ""
    boxes = set(find_boxes(text))
    if len(boxes) > 1:
        raise ValueError("several answers")
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text)
    if not boxes and ("\n" in text or len(words) > 10 or len(text) > 300):
        raise ValueError("prose for an answer")
    answer = boxes.pop() if boxes else text
    if re.sub(r"\\text|[\s_{}$.]", "", answer.lower()) in NO_ANSWERS:
        raise ValueError("no answer")
    return answer


# 11 Model =========================================================================================


def load_model(name: str) -> tuple[Model, Tokenizer]:
    """A causal language model, float32, on the CPU, in evaluation mode, and its tokenizer. name: a
    Hub id, a folder in the Hugging Face layout, or that of a run, whose last checkpoint it is. Only
    safetensors are read, and no code of a checkpoint is run."""
    for library in (transformers, huggingface_hub):
        library.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # of downloads
    folder = model_folder(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        if not checkpoints(folder):
            raise UsageError(f"{folder} has neither config.json nor a checkpoint of a run.")
        folder = checkpoints(folder)[-1]
    fix = "no folder has this name; the Hub needs a connection or `hf auth login`"
    source, fix = (str(folder), "check its files") if folder.exists() else (name, fix)
    with explain(f"The model {name} cannot be loaded", fix):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if any(hasattr(c, "quantization_config") for c in (config, config.get_text_config())):
            raise ValueError("it is quantized: name the model that it was made from")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if type(tokenizer).__name__ == "MistralCommonBackend":
            raise ValueError("mistral-common reads its tokenizer: run without that package")
        how: Any = dict(use_safetensors=True, output_loading_info=True, trust_remote_code=False)
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, report = load(source, dtype=torch.float32, **how)
        if missing := sorted(report["missing_keys"]):  # random numbers are in their place
            raise ValueError(f"it lacks {len(missing)} of its weights, such as {missing[0]}")
    check_model(model.eval())
    return model, tokenizer


def model_folder(name: str) -> Path:
    """The folder that --model names, here or beside this file, as tiny/ is."""
    here, beside = Path(name).expanduser(), Path(__file__).resolve().parent / name
    return beside if beside.exists() and not here.exists() else here


@torch.no_grad()
def check_model(model: Model) -> None:
    """Give a model (float32, CPU) fused attention and norms, and refuse it unless transformers'
    forward pass, ours, and that of `sample` with its cache agree on a few tokens."""
    problem = f"This program cannot run the blocks of {type(model).__name__}"
    with explain(problem, "use a Llama, Mistral, Qwen2, Qwen3 or SmolLM2"):
        model.set_attn_implementation("sdpa")  # whatever its config.json says
        ids = torch.arange(8)[None] % model.get_input_embeddings().num_embeddings  # (1, 8)
        logits = model(input_ids=ids, use_cache=False).logits  # (1, 8, V)
        for module in model.modules():  # transformers' norm takes eight operations, this one one
            if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
                how: Any = dict(normalized_shape=module.weight.shape, eps=module.variance_epsilon)
                module.forward = partial(nn.functional.rms_norm, weight=module.weight, **how)
        *_, (below, _, attention, _, ffn) = residual_stream(model, ids)  # of block L
        ours = policy_logits(model, below + attention + ffn)  # (1, 8, V)
        if not torch.allclose(ours, logits, rtol=1e-3, atol=1e-3):
            raise ValueError("its logits are not lm_head(norm(H^L)), H^l = H^(l-1) + A^l + F^l")
        prompts = [ids[0, :5].tolist(), ids[0, :2].tolist()]
        completions = sample(model, prompts, 3, set(), generator=random_stream("cpu", 0, "check"))
        if not all(sampling_error(model, [c], 1.0) < 1e-3 for c in completions):
            raise ValueError("with a cache it computes something else than without")


def encode(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The token ids of a problem, ready to be completed: by the chat template, or as plain text. A
    system message that the template refuses or ignores goes into the first user message."""
    first, *rest = problem.messages
    if tokenizer.chat_template is None:
        ids = tokenizer("\n\n".join(m["content"] for m in problem.messages) + "\n\n").input_ids
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some end every text
    else:
        text, system = render(tokenizer, problem.messages), first["content"].strip()
        if first["role"] == "system" and (not text or system not in text):
            joined = dict(rest[0], content=f"{system}\n\n{rest[0]['content']}")
            text = render(tokenizer, [joined, *rest[1:]])
        ids = tokenizer(text, add_special_tokens=False).input_ids
    # Templates may leave out text, tokenizers lose spaces, questions be rendered already.
    texts = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)]
    texts += [m["content"] for m in problem.messages if m["role"] == "user"]
    prompt, *asked = (" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts)
    if not all(question in prompt for question in asked):
        fix = "it may have been rendered before, or the model's template or tokenizer changes it"
        raise UsageError(f"A question is not as it was in its prompt; {fix}.")
    return ids


def render(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """Chat messages by the model's template, without thinking, as in the paper; "" if it refuses
    them. Templates that write the date get a fixed one, so that each day asks the same."""
    template = "{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}"
    template += tokenizer.get_chat_template()
    how: Any = dict(add_generation_prompt=True, enable_thinking=False, tokenize=False)
    with contextlib.suppress(jinja2.TemplateError):
        return tokenizer.apply_chat_template(messages, chat_template=template, **how)
    return ""


def end_tokens(model: Model, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a completion: the model's, the tokenizer's, and the special token with which
    the chat template closes an assistant's turn."""
    ids = model.generation_config.eos_token_id
    ends = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id}
    turn = [dict(role="user", content="2"), dict(role="assistant", content="THE ANSWER")]
    with contextlib.suppress(Exception):  # it has no template, or one that refuses such a turn
        text = tokenizer.apply_chat_template(turn, tokenize=False).partition("THE ANSWER")[2]
        after = tokenizer(text, add_special_tokens=False).input_ids
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        ends.update([i for i in after if i in special][:1])
    return ends - {None}


def usable_problems(
    config: Config, model: Model, tokenizer: Tokenizer
) -> tuple[list[Problem], list[Problem]]:
    """Held-out and training problems with short prompts; refuses what the model cannot take."""
    num_layers = len(model.get_decoder().layers)
    if config.internal_layer != "auto" and int(config.internal_layer) > num_layers:
        raise UsageError(f"--internal-layer must be auto or 1 to {num_layers} for this model.")
    check_lengths(model, config.max_prompt_tokens + config.max_new_tokens)

    def fits(problem: Problem) -> bool:
        ids = encode(tokenizer, problem)
        if max(ids) >= model.get_input_embeddings().num_embeddings:
            raise UsageError("A prompt has a token that the model does not have.")
        return len(ids) <= config.max_prompt_tokens

    held_out = load_problems(config.eval_dataset, config.eval_problems, config.system, fits)
    limit = None if config.steps else 0
    return held_out, load_problems(config.dataset, limit, config.system, fits)


def check_lengths(model: Model, tokens: int) -> None:
    """Refuse more tokens, prompt and completion, than the model reads as it was trained to."""
    limits = ["max_position_embeddings", "sliding_window"]
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this length its rotary embeddings are others
        limits.append("original_max_position_embeddings")
    most = min(getattr(model.config, name, None) or rope.get(name) or math.inf for name in limits)
    if tokens > most:
        lower = "lower --max-prompt-tokens or --max-new-tokens"
        raise UsageError(f"This model reads at most {most} tokens, not {tokens}; {lower}.")


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and precision to compute in. A GPU that torch cannot use is an error."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    driver = torch.version.cuda and shutil.which("nvidia-smi")  # which a driver brings
    if not cuda and (config.device == "cuda" or (config.device == "auto" and driver)):
        fix = "update its driver, install torch for the driver's CUDA, or give --device cpu"
        raise UsageError(f"torch finds no NVIDIA GPU that it can use; {fix}.")
    if config.optimizer_device == "cuda" and not cuda:
        raise UsageError("--optimizer-device cuda needs a GPU; give auto.")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, so at each token
    torch.set_num_threads(config.threads or torch.get_num_threads())
    auto = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    low = config.precision == "bfloat16" or (config.precision == "auto" and auto)
    if cuda and not low:  # else attention would take T^2 memory
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    return torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if low else torch.float32


def free_memory(device: torch.device) -> float:
    """The bytes that may be used: 90 % of a GPU's free memory; 4 GB of a CPU's."""
    if device.type == "cpu":
        return 4e9
    torch.cuda.empty_cache()
    return 0.9 * torch.cuda.mem_get_info(device)[0]


def rollout_rows(model: Model, longest_prompt: int, config: Config) -> int:
    """--rollout-rows; auto: as many as fit into free memory. A row takes keys and values, a share
    in reading prompts, and 32 bytes per vocabulary entry."""
    if config.rollout_rows != "auto":
        return int(config.rollout_rows)
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    column = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim  # numbers in the cache
    reading = longest_prompt / 8 * (8 * c.hidden_size + 4 * c.intermediate_size)  # an eighth reads
    numbers = column * (longest_prompt + config.max_new_tokens + 16) + reading
    row = numbers * model.dtype.itemsize + 32 * c.vocab_size  # bytes
    return max(1, int(free_memory(model.device) // row))


def micro_batch_tokens(model: Model, optimizer: MasterAdamW, layer: int, config: Config) -> int:
    """--micro-batch-tokens; auto: as many as fit on a GPU, 4,096 to 16,384, or to 32,768 if each
    micro-batch sends its gradients to the CPU."""
    if config.micro_batch_tokens != "auto" or model.device.type == "cpu":
        return 16384 if config.micro_batch_tokens == "auto" else int(config.micro_batch_tokens)
    free, most = free_memory(model.device), 32768
    if optimizer.device.type == "cuda":  # then gradients of masters, and moments yet to be made
        most, made = 16384, optimizer.adam.state
        free -= sum((4 if master in made else 12) * master.numel() for master in optimizer.masters)
    c, size = model.config, model.dtype.itemsize  # bytes of a number
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = head_dim * (c.num_attention_heads + c.num_key_value_heads)
    block = size * (4 * c.hidden_size + 3 * heads + 6 * c.intermediate_size)  # of a token
    kept = layer * (size * c.hidden_size if config.gradient_checkpointing else block)  # of a token
    head = size * c.vocab_size * c.hidden_size  # the gradient of lm_head
    logits = 12 * HEAD_TOKENS * c.vocab_size  # log-probabilities and two gradients in float32
    in_head = (free - head - max(logits, 2 * head)) / (kept + size * c.hidden_size)
    in_block = (free - head * c.tie_word_embeddings) / (kept + block)
    return int(max(4096, min(most, in_head, in_block)))


@torch.no_grad()
def sampling_error(model: Model, completions: list[Completion], temperature: float) -> float:
    """Mean |log pi as sampled - log pi as scored|, in nats, of 1 completion in 16, about eight at
    most. Decoding and scoring are one network, so more than rounding would be a bug."""
    num_layers, differences = len(model.get_decoder().layers), []
    for c in completions[:: max(16, len(completions) // 8)]:
        ids, mask = pad([(c.prompt, c.ids)], model.device)  # (1, T) each
        scored, _ = token_logps(model, ids, mask, num_layers, temperature=temperature)  # (N,)
        differences += (scored.cpu() - torch.tensor(c.logps)).abs().tolist()
    return fmean(differences)


# 12 Files and command line ========================================================================

AUTO = ("internal_layer", "rollout_rows", "micro_batch_tokens")  # auto or a number
LEAST = dict(group_size=2, clip=1e-6, temperature=1e-6, internal_steps=0, steps=0, eval_problems=0)
LEAST |= dict(threads=0, seed=0, keep=0)  # of others: 1 of integers, else 0


class UsageError(ValueError):
    """Something the user can fix: one sentence that says what is wrong and what to do."""


@contextlib.contextmanager
def explain(problem: str, fix: str) -> Iterator[None]:
    """Turn what a library raises into one sentence: the problem, its first one, the fix."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        first = re.split(r"\. |\n(?=[A-Z])", str(error).strip())[0]
        why = " ".join(first.split())[:200].rstrip(".:, ") or type(error).__name__
        raise UsageError(f"{problem} ({why}); {fix}.") from error


def check_settings(config: Config) -> None:
    """Refuse settings that cannot work."""
    for name, value in asdict(config).items():
        flag, least = "--" + name.replace("_", "-"), LEAST.get(name, 1 if type(value) is int else 0)
        if type(value) in (int, float) and not least <= value < math.inf:
            raise UsageError(f"{flag} must be {least} or more, not {value}.")
        if name in AUTO and not re.fullmatch("auto|[1-9][0-9]*", value):
            raise UsageError(f"{flag} must be auto or a number, not {value!r}.")
    if config.prompts_per_step % config.mini_batch:
        raise UsageError("--mini-batch must divide --prompts-per-step.")
    if not config.steps and not config.eval_problems:
        raise UsageError("--steps 0 only evaluates and --eval-problems 0 does not; raise one.")


def configure(model: str = "tiny", **given: Any) -> Config:
    """The settings given; else those of settings.json in the folder of the model or its parent, as
    tiny/ and runs have it; else the defaults of `Config`."""
    folder = model_folder(model)
    places = [place for place in (folder, folder.parent) if (place / "settings.json").exists()]
    known = read_settings(places[0]) if places else {}
    return Config(**{**known, **given, "model": model})


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What settings.json in a folder says. Data may be named by their place in this folder."""
    folder = Path(folder).expanduser()
    with explain(f"{folder} has no settings.json that fits", "name the folder of a run"):
        saved = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        Config(**saved)
        for name in saved.keys() & {"dataset", "eval_dataset"}:
            if (folder / saved[name]).exists():
                saved[name] = str((folder / saved[name]).resolve())
    return saved


def parse(arguments: list[str] | None = None) -> tuple[Config, bool]:
    """The `Config` of a command line, of which every field is a flag, and whether to resume."""
    fields: Any = Config
    about = "In parentheses: the paper's. settings.json of a model, as of tiny, changes defaults."
    how: Any = dict(description=about, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser = transformers.HfArgumentParser(fields, **how)
    parser.add_argument("--resume", metavar="RUN", help="folder of a run; flags given change it")
    first, _ = parser.parse_known_args(arguments)
    saved = read_settings(first.resume) if first.resume else asdict(configure(first.model))
    parser.set_defaults(**saved)
    given = vars(parser.parse_args(arguments))
    run = given.pop("resume")
    return Config(**{**given, "out": run or given["out"]}), run is not None


def run_folder(config: Config, resume: bool) -> tuple[Path, Path | None]:
    """The folder of the run and the checkpoint to resume it from; nothing is written yet."""
    name = Path(config.model).resolve().name + time.strftime("-%Y%m%d-%H%M%S")
    out = Path(config.out or Path("runs", name)).expanduser()
    config.out, saved = str(out), checkpoints(out)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; --resume it, or give another --out.")
    if resume and not saved:
        raise UsageError(f"{out} has no checkpoint to resume from; start anew with another --out.")
    return out, saved[-1] if resume else None


def write_settings(config: Config) -> None:
    """Write settings.json into the folder of the run, never half of it."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    (out / ".settings").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / ".settings").replace(out / "settings.json")


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [folder for folder in out.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def save_checkpoint(
    config: Config, model: Model, tokenizer: Tokenizer, optimizer: MasterAdamW, state: dict
) -> None:
    """Write checkpoint-STEP, with the masters, for --resume and --model; remove all but --keep."""
    out, folder = Path(config.out), Path(config.out, f"checkpoint-{state['step']}")
    temporary = out / ".checkpoint.tmp"
    if folder.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    saved = {name: x for name, x in model.named_buffers() if name in model.state_dict()}
    saved |= zip((name for name, _ in model.named_parameters()), optimizer.masters, strict=True)
    logs = {file.name: file.stat().st_size for file in out.glob("*.jsonl")}
    state |= dict(logs=logs, adam=optimizer.adam.state_dict())
    with explain(f"{folder} cannot be written", "make room for it"):
        model.save_pretrained(temporary, state_dict=saved)
        model.config.dtype = "float32"  # which the masters are, whatever the model computes in
        model.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        torch.save(state, temporary / "training.pt")
        temporary.rename(folder)  # so it is whole, or not there at all
    for old in checkpoints(out)[: -config.keep] if config.keep else []:
        shutil.rmtree(old)


def load_checkpoint(start: Path, optimizer: MasterAdamW) -> tuple[int, int]:
    """The steps done and the layer of phase 1, 0 if unknown; restores AdamW's moments, and
    cuts from the logs what was written after the checkpoint."""
    with explain(f"{start} is damaged", "remove it to --resume from the one before"):
        state = torch.load(start / "training.pt", optimizer.device, weights_only=True)
        optimizer.adam.load_state_dict(state["adam"])
    for name in ("metrics.jsonl", "completions.jsonl"):
        with open(start.parent / name, "a") as file:
            file.truncate(state["logs"].get(name, 0))
    tqdm.write(f"Resumed     after step {state['step']}, from {start}")
    return state["step"], state["internal_layer"]


def log(file: Path, record: dict[str, Any]) -> None:
    """Append a record to a file, as a line of JSON; what is not finite becomes null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(finite) + "\n")


def describe(
    completions: list[Completion], rewards: list[float], advantages: Tensor, began: float
) -> dict[str, Any]:
    """What the log says of a step besides its update. Entropies are means over completion tokens,
    in nats; began: when the step did, in seconds."""
    tokens = sum(len(c.ids) for c in completions)
    mean_entropy = sum(sum(c.entropies) for c in completions) / tokens
    return dict(
        reward=fmean(rewards),
        entropy=mean_entropy,  # of pi
        layer_entropy=mean_entropy,  # of the policy optimized: in phase 1 `update` measures pi^l
        completion_tokens=tokens / len(completions),
        truncated=fmean(not c.ended for c in completions),
        zero_std_groups=fmean((advantages == 0).all(-1).tolist()),
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 or None,
        seconds=time.perf_counter() - began,
    )


def evaluate_and_log(
    step: int, model: Model, tokenizer: Tokenizer, problems: list[Problem], config: Config
) -> None:
    """Evaluate, log it with a completion of each of the first eight problems, and show one."""
    metrics, samples = evaluate(model, tokenizer, problems, config)
    for one in samples[: 8 * config.eval_k : config.eval_k]:
        log(Path(config.out, "completions.jsonl"), dict(step=step, **one))
    log(Path(config.out, "metrics.jsonl"), dict(step=step, **metrics))
    k, error = config.eval_k, metrics["eval_se"]
    known = "" if error is None else f" (standard error {error:.1%})"
    score = f"avg@{k} {metrics['eval_avg']:.1%}{known}, pass@{k} {metrics['eval_pass'][-1]:.1%}"
    tqdm.write(f"Evaluation  step {step}: {score}, {len(problems)} held-out problems")
    shown = samples[0]
    text = f"{shown['messages'][-1]['content'][:150]} -> ... {shown['completion'][-200:]}"
    text += f" [answer {shown['answer']}, reward {shown['reward']:.0f}]"
    tqdm.write(f"Completion  {' '.join(text.split())}")


def stop_requests() -> list[int]:
    """A list that gets the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    requests: list[int] = []

    def handle(number: int, frame: Any) -> None:
        requests.append(number)
        signal.signal(number, signal.default_int_handler)
        tqdm.write("Stopping    after this step; once more to stop at once", sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return requests


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for what the user can fix; 130 after a request to stop."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = None
    try:
        config, resume = parse(arguments)
        tqdm.write(f"Written     {train(config, resume)}")
        return 0
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except Exception as error:
        code, message = 2, str(error).rstrip(".")
        if re.search("out of memory|allocate memory|ALLOC_FAILED|MemoryError", repr(error)):
            message = "out of memory; lower --rollout-rows or --micro-batch-tokens"
        elif not isinstance(error, (UsageError, OSError)):
            raise  # a bug
    run = config.out if config and "--resume" not in message else ""
    if os.path.isdir(run) and checkpoints(Path(run)):
        message += f"; resume with --resume {run}"
    print(f"bupo.py: {message}.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
