"""The proof: one test or more for each equation of the method and each promise of the README."""

import gzip
import itertools
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test may wait for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more do not help models as small as these

import datasets
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file
from torch import Tensor

import analyze
import bupo

torch.set_num_threads(1)

# The paper's problems, where somebody has put them:
PAPER_FILES = Path(__file__).resolve().parent.parent / "shared" / "data"


def small_model(family: str = "Qwen3", layers: int = 4, **settings):
    """A random model whose logits are far from uniform; two query heads share keys and values."""
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    heads |= dict(attention_dropout=0.5)  # which must never be active: rho would be chance
    ends = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None, max_position_embeddings=4096)
    config = getattr(transformers, f"{family}Config")(**{**shape, **heads, **ends, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:  # with weights of 1, to norm twice would be to norm once
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def saved_model(folder: Path, family: str = "Qwen3", **settings) -> Path:
    """A random model of any family with the built-in tokenizer, as a folder for `--model`."""
    tokenizer = bupo.load_model("tiny")[1]
    small_model(family, vocab_size=len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_sequences(lengths, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of the given lengths, in which 0, the pad id, is like any other."""
    rng = random.Random(seed)
    return [tuple([rng.randrange(50) for _ in range(n)] for n in pair) for pair in lengths]


def gradients(model, loss: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients of those parameters that have one, those of a loss if it is given; freed."""
    if loss is not None:
        model.zero_grad()
        loss.backward(retain_graph=True)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4):
    """The same parameters have a gradient, and the same up to rounding."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


FAMILIES = [(family, tied) for family in ("Qwen3", "Qwen2", "Llama") for tied in (True, False)]
every_family = pytest.mark.parametrize(("family", "tied"), FAMILIES)
IDS = torch.tensor([[5, 9, 33, 2, 41, 17, 8], [7, 7, 12, 49, 3, 20, 0]])  # (2, 7)
UPPER = ("model.layers.2.", "model.layers.3.")  # the blocks above layer 2 of 4


# Internal policies (Eq. 1, 5, 6) ==================================================================


@every_family
def test_top_layer_is_the_policy_and_lower_layers_are_its_hidden_states(family, tied):
    model, ran = small_model(family, tie_word_embeddings=tied), []
    full = model(IDS, output_hidden_states=True)
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: ran.append(1))
    for layer, expected in enumerate(full.hidden_states):
        ran.clear()
        hidden = bupo.internal_hidden(model, IDS, layer)
        assert len(ran) == layer  # blocks 1..l only
        normed, plain = (bupo.policy_logits(model, hidden, norm) for norm in (True, False))
        assert torch.equal(plain, model.lm_head(hidden))
        if layer == 4:
            assert torch.equal(normed, full.logits)  # hidden_states[4] is normed already
        else:
            assert torch.equal(hidden, expected)
            assert torch.equal(normed, model.lm_head(model.model.norm(hidden)))


@every_family
def test_a_lower_layer_has_gradients_in_only_the_blocks_below_it(family, tied):
    """Eq. 14 and 15: those of hidden_states[l]; in embeddings, norm and lm_head, too."""
    model = small_model(family, tie_word_embeddings=tied)
    both = bupo.internal_hidden(model, IDS, 2), model(IDS, output_hidden_states=True)[-1][2]
    policies = [bupo.policy_logits(model, hidden).log_softmax(-1) for hidden in both]
    ours, theirs = (gradients(model, policy[..., 3].sum()) for policy in policies)
    assert_near(ours, theirs, tolerance=0)
    names = [name for name, _ in model.named_parameters()]
    assert list(ours) == [name for name in names if not name.startswith(UPPER)]


@every_family
def test_residual_stream_is_what_the_modules_read_and_write(family, tied):
    model, seen = small_model(family, tie_word_embeddings=tied), []

    def remember(module, inputs, options, output):
        seen.append(inputs[0] if inputs else options["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        theirs = seen[:]  # LN(H), A, LN(H + A), F of each block
        stream = list(bupo.residual_stream(model, IDS))
    assert len(stream) == 4
    for i, ours in enumerate(stream):
        torch.testing.assert_close(list(ours), [states[i], *theirs[4 * i : 4 * i + 4]])


# Log-probabilities and entropies (Eq. 7) ==========================================================

SEQUENCES = random_sequences([(3, 5), (6, 2), (2, 9), (4, 1), (5, 7)], seed=1)


def naive_entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def naive_logps(model, prompt, completion, layer, norm, temperature) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from one unpadded sequence and its full logits."""
    ids = torch.tensor([prompt + completion])
    hidden = model(ids, output_hidden_states=True).hidden_states[layer]
    if norm and layer < 4:
        hidden = model.model.norm(hidden)  # the last hidden state is normed already
    logits = model.lm_head(hidden[0, len(prompt) - 1 : -1]) / temperature  # (T, V)
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
    return chosen, naive_entropy(logits).detach()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_chunked_logps_and_entropies_equal_the_naive_ones_with_gradients(layer, norm, monkeypatch):
    model, sizes = small_model(), []
    monkeypatch.setattr(bupo, "HEAD_TOKENS", 4)
    naive = [naive_logps(model, *pair, layer, norm, 0.7) for pair in SEQUENCES]
    expected, entropy = (torch.cat(values) for values in zip(*naive, strict=True))
    weights, ids_and_mask = torch.linspace(-1, 1, len(expected)), bupo.pad(SEQUENCES, "cpu")
    theirs = gradients(model, (weights * expected).sum())
    model.lm_head.register_forward_hook(lambda m, i, o: sizes.append(o[..., 0].numel()))
    for recompute in (False, True):
        sizes.clear()
        how = dict(entropy=True, recompute=recompute)
        logps, entropies = bupo.token_logps(model, *ids_and_mask, layer, norm, 0.7, **how)
        torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropies, entropy)
        assert sum(sizes) == 24  # completion tokens only
        assert_near(gradients(model, (weights * logps).sum()), theirs)
        assert max(sizes) == 4  # of how many tokens logits exist at a time


# Entropy change and boundary layer (Eq. 8, 13) ====================================================


def test_ffn_entropy_change_equals_a_direct_computation_for_any_batching(monkeypatch):
    model, expected = small_model(), [0.0] * 4
    tokens = sum(len(completion) for _, completion in SEQUENCES)
    for prompt, completion in SEQUENCES:
        stream = bupo.residual_stream(model, torch.tensor([prompt + completion]))
        for i, (*_, read, written) in enumerate(stream):
            for sign, hidden in ((-1, read), (1, written)):
                entropies = naive_entropy(model.lm_head(hidden[0, len(prompt) - 1 : -1]))
                expected[i] += sign * entropies.sum().item() / tokens
    for micro_batch_tokens, head_tokens in ((9, 3), (99, 99)):
        monkeypatch.setattr(bupo, "HEAD_TOKENS", head_tokens)
        change = bupo.ffn_entropy_change(model, SEQUENCES, micro_batch_tokens)
        assert change == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_boundary_layer():
    for change, layer in [
        ([1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.02, -0.1, 0.0, -0.5], 6),  # explores low, like Qwen3
        ([0.5] * 26 + [-0.2, -3.0], 26),  # explores almost to the top, like Llama
        ([-0.4, 0.9, 0.7, 0.05, -0.1], 3),  # the first layer does not explore yet
        ([-1.0, -2.0, -3.0], 3),  # no layer explores: pi itself
        ([0.0, -2.0, -3.0], 3),  # nor does one that changes nothing
        ([0.9, 0.8, -0.2, 0.5, -0.1], 2),  # what explores again above is another region
        ([0.04, 0.03, 0.001, -0.2], 2),  # clearly positive: next to the largest, not in nats
    ]:
        assert bupo.boundary_layer(change) == layer, change


# The objective (Eq. 3, 9, 10) =====================================================================


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    advantages = bupo.group_advantages(rewards).tolist()
    first, third = math.sqrt(1 / 3), math.sqrt(0.75 / 3)  # unbiased standard deviations
    assert advantages[0] == pytest.approx([s * 0.5 / (first + 1e-6) for s in (1, -1, -1, 1)])
    assert advantages[1] == [0.0] * 4  # exactly, not nearly
    assert advantages[2] == pytest.approx([d / (third + 1e-6) for d in (-0.25, -0.25, -0.25, 0.75)])
    equal = torch.tensor([[0.1], [0.3], [0.7]]).repeat(1, 8)  # whose mean is a little off
    assert bupo.group_advantages(equal).tolist() == [[0.0] * 8] * 3


def test_clipped_surrogate():
    cases = [  # rho, A, surrogate, slope
        (1.5, 2.0, 2.4, 0.0),  # gained enough: clipped at 1.2 A, no gradient
        (0.5, 2.0, 1.0, 1.0),  # lost although good: the gradient stays
        (1.5, -2.0, -3.0, -3.0),  # gained although bad: the gradient stays
        (0.5, -2.0, -1.6, 0.0),  # lost enough: clipped at 0.8 A
        (1.0, 2.0, 2.0, 2.0),  # at rho = 1 the gradient is the policy gradient, A grad log pi
    ]
    ratio, advantage, expected, slope = torch.tensor(cases).T
    logps, old_logps = (ratio.log() - 1).requires_grad_(), torch.full((5,), -1.0)
    surrogate = bupo.clipped_surrogate(logps, old_logps, advantage, 0.2)
    surrogate.sum().backward()
    torch.testing.assert_close([surrogate, logps.grad], [expected, slope])


def test_the_phase_switches_after_exactly_internal_steps():
    assert [bupo.optimized_layer(step, 3, 6, 28) for step in range(1, 6)] == [6, 6, 6, 28, 28]
    assert bupo.optimized_layer(1, 0, 6, 28) == 28  # plain GRPO


class Spy:
    """An optimizer that keeps the gradients; in its first `moves` steps weights follow them."""

    def __init__(self, model, moves: int = 0):
        self.model, self.moves, self.seen = model, moves, []

    @torch.no_grad()
    def step(self, lr: float) -> float:
        self.seen.append(gradients(self.model))
        for name, gradient in self.seen[-1].items() if len(self.seen) <= self.moves else ():
            self.model.get_parameter(name).sub_(lr * gradient)
        return 1.0


update_settings = partial(bupo.Config, prompts_per_step=4, group_size=2, mini_batch=2)
ROLLOUT = random_sequences([(3, 5), (3, 2), (6, 9), (6, 1), (5, 7), (5, 3), (2, 4), (2, 12)])
TOKENS = [len(completion) for _, completion in ROLLOUT]
ADVANTAGES = torch.tensor([0.7, -0.7, 0.0, 0.0, 0.7, -0.7, -0.7, 0.7])


@pytest.mark.parametrize(("norm", "temperature"), [("final", 1.0), ("none", 0.7)])
@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("layer", [2, 4])
def test_the_update_is_the_gradient_of_the_formula(layer, average, norm, temperature):
    """Completions without advantage count in the mean and in pi^l's entropy, but do not learn."""
    model, loss, embedded, entered = small_model(), 0.0, [], []
    naive = [naive_logps(model, *p, layer, norm == "final", temperature) for p in ROLLOUT]
    for (logps, _), advantage in zip(naive, ADVANTAGES.tolist(), strict=True):
        weight = 1 / sum(TOKENS) if average == "token" else 1 / (8 * len(logps))
        loss = loss - weight * (logps - logps.detach()).exp().sum() * advantage  # rho = 1
    expected, entropy = gradients(model, loss), torch.cat([e for _, e in naive]).mean().item()
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: embedded.append(i[0].numel()))
    model.model.layers[0].register_forward_pre_hook(lambda *_: entered.append(1))
    how = dict(loss_average=average, internal_norm=norm, temperature=temperature, mini_batch=4)
    passes = {1: 6, 1000: 1} if layer == 4 else {1: 8, 1000: 2}
    for tokens, recompute in ((1, False), (30, True), (1000, False)):
        how |= dict(micro_batch_tokens=tokens, gradient_checkpointing=recompute)
        spy, _ = Spy(model), (embedded.clear(), entered.clear())
        config = update_settings(**how)
        metrics = bupo.update(model.train(), spy, ROLLOUT, ADVANTAGES, layer, 0.0, config)
        (found,) = spy.seen
        assert_near(found, expected)
        assert metrics["ratio_max"] == 1.0  # exactly: it is the first mini-batch
        assert layer == 4 or metrics["layer_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert tokens == 30 or len(embedded) == passes[tokens]
        assert max(embedded) <= max(tokens, 15)  # or one sequence, of at most 15 tokens
        assert (len(entered) > len(embedded)) == recompute


@pytest.mark.parametrize("clip", [0.2, 0.01])
@pytest.mark.parametrize("layer", [2, 4])
def test_the_second_mini_batch_is_clipped_against_the_policy_before_the_first(layer, clip):
    model, loss, clipped = small_model(), 0.0, 0
    before = [naive_logps(model, *pair, layer, True, 1.0)[0].detach() for pair in ROLLOUT]
    spy = Spy(model, moves=1)  # after which the model stays as the second gradient was taken of it
    config = update_settings(clip=clip)
    metrics = bupo.update(model, spy, ROLLOUT, ADVANTAGES, layer, 0.3, config)
    for i in range(4, 8):
        ratio = (naive_logps(model, *ROLLOUT[i], layer, True, 1.0)[0] - before[i]).exp()
        plain, bounded = ratio * ADVANTAGES[i], ratio.clamp(1 - clip, 1 + clip) * ADVANTAGES[i]
        loss = loss - torch.minimum(plain, bounded).sum() / sum(TOKENS[4:])
        clipped += int((bounded < plain).sum())
    assert 0 < clipped < sum(TOKENS[4:])
    learning = sum(TOKENS[:2] + TOKENS[4:])  # 2 and 3 have no advantage
    assert metrics["clip_fraction"] == pytest.approx(clipped / learning)
    assert len(spy.seen) == 2
    assert_near(spy.seen[1], gradients(model, loss), tolerance=1e-3)


# The masters (Eq. 14, 15) =========================================================================

masters_of = partial(bupo.MasterAdamW, device=torch.device("cpu"), where="auto")
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_float32_an_update_is_one_of_adamw_on_the_model_itself_bit_for_bit():
    """With the paper's settings; and a weight is its own master."""
    model, twin, config = small_model(), small_model(), update_settings(mini_batch=4)
    optimizer, weights = masters_of(model, dtype=torch.float32), list(twin.parameters())
    paper = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    adam = torch.optim.AdamW(weights, fused=True, **paper)
    for layer, lr in ((2, 1e-3), (2, 1e-3), (4, 5e-4)):
        spy = Spy(twin)
        metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, layer, lr, config)
        bupo.update(twin, spy, ROLLOUT, ADVANTAGES, layer, lr, config)
        for name, gradient in spy.seen[0].items():
            twin.get_parameter(name).grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        assert metrics["grad_norm"] == norm > 1  # so that clipping matters
        adam.param_groups[0]["lr"] = lr
        adam.step()
        adam.zero_grad()
        assert all_equal(model.parameters(), weights)
    assert all(a is b for a, b in zip(optimizer.masters, model.parameters(), strict=True))


def test_bfloat16_weights_follow_float32_masters_at_the_papers_learning_rate():
    """bfloat16 weights alone would stay where they are at 1e-6."""
    how = dict(initializer_range=0.02, tie_word_embeddings=True)
    model, spy = small_model(**how), Spy(small_model(**how))
    optimizer, config = masters_of(model, dtype=torch.bfloat16), update_settings(mini_batch=4)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    bupo.update(spy.model, spy, ROLLOUT, ADVANTAGES, 4, 1e-6, config)
    norm = math.sqrt(sum(gradient.square().sum() for gradient in spy.seen[0].values()))
    for tokens in (1, 30, 1000):  # whose gradients add up in the masters
        config = update_settings(mini_batch=4, micro_batch_tokens=tokens)
        before = deepcopy(optimizer.masters)
        metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-6, config)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=0.05)
        assert metrics["ratio_max"] == 1.0
        for weight, master, old in zip(model.parameters(), optimizer.masters, before, strict=True):
            assert (master != old).float().mean() > 0.9
            assert (master - old).abs().max() < 2e-6
            assert torch.equal(weight, master.bfloat16())


@every_precision
def test_phase_1_moves_what_is_below_the_layer_and_nothing_above(dtype):
    """Not even by momentum or weight decay."""
    model, config = small_model(tie_word_embeddings=False), update_settings()
    optimizer = masters_of(model, dtype=dtype)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)  # so there is momentum
    before = deepcopy(optimizer.masters)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 2, 1e-2, config)
    together = zip(model.named_parameters(), optimizer.masters, before, strict=True)
    for (name, weight), master, old in together:
        assert torch.equal(master, old) == name.startswith(UPPER), name
        assert torch.equal(weight, master.to(dtype)), name


@every_precision
def test_a_step_without_advantage_or_with_a_gradient_that_is_not_finite_moves_nothing(dtype):
    model, config = small_model(), update_settings()
    optimizer = masters_of(model, dtype=dtype)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)  # so there is momentum
    before = deepcopy(optimizer.masters)
    for advantages in (torch.zeros(8), ADVANTAGES * math.inf):
        bupo.update(model, optimizer, ROLLOUT, advantages, 4, 1e-2, config)
        assert all_equal(optimizer.masters, before)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)
    assert all(master.isfinite().all() for master in optimizer.masters)
    assert not torch.equal(optimizer.masters[0], before[0])  # the next step counts again


# Rollouts =========================================================================================

PROMPT_LENGTHS = [(n, 0) for n in (3, 11, 1, 7, 2, 9, 5, 4, 6, 8, 3)]
PROMPTS = [prompt for prompt, _ in random_sequences(PROMPT_LENGTHS, seed=4)]


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers renames arguments
@every_family
def test_greedy_samples_equal_generate_with_more_prompts_than_rows(family, tied):
    model, shapes, ends = small_model(family, tie_word_embeddings=tied), [], [1, 7, 9, 30]
    hook = model.model.layers[0].register_forward_hook(lambda m, i, o: shapes.append(o.shape[:2]))
    completions = bupo.sample(model.train(), PROMPTS, 25, ends, temperature=0, rows=4)
    hook.remove()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        how = dict(max_new_tokens=25, do_sample=False, eos_token_id=ends, pad_token_id=0)
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert completion.ids == expected[0, len(prompt) :].tolist()
        assert completion.ended == (completion.ids[-1] in ends)
    decoded = [rows for rows, tokens in shapes if tokens == 1]
    tokens = sum(len(c.ids) - 1 for c in completions)  # each row leaves as it finishes
    assert tokens <= sum(decoded) <= tokens + 1  # one prompt is a token long
    assert max(decoded) == 4
    assert {c.ended for c in completions} == {True, False}


@pytest.mark.parametrize("rows", [1, 3, 16, 100])  # at 16, two prompts enter while others run
def test_returned_logps_and_entropies_equal_a_teacher_forced_pass(rows):
    model, prompts = small_model(), [prompt for prompt in PROMPTS for _ in range(3)]  # groups
    state = torch.get_rng_state()
    streams = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    draws = [bupo.sample(model, prompts, 12, {1}, 0.8, rows, stream) for stream in streams]
    for prompt, completion in zip(prompts, draws[0], strict=True):
        logps, entropies = naive_logps(model, prompt, completion.ids, 4, True, 0.8)
        assert completion.logps == pytest.approx(logps.tolist(), abs=1e-4)
        assert completion.entropies == pytest.approx(entropies.tolist(), abs=1e-4)
        assert 1 not in completion.ids[:-1]
    assert [other == draws[0] for other in draws] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone


def test_a_prompt_is_read_once_for_its_whole_group_and_without_left_padding():
    model, read = small_model(), []
    model.model.embed_tokens.register_forward_hook(lambda m, inputs, o: read.append(inputs[0]))
    bupo.sample(model, [[5, 6, 7]] * 8 + [[8, 9]] * 8, 1, {1})  # one token each: no further pass
    assert [ids[:, :2].tolist() for ids in read] == [[[5, 6], [8, 9]]]


def test_sampled_frequencies_are_the_exact_probabilities_whatever_the_generation_settings():
    model = small_model(vocab_size=20, initializer_range=0.1)
    unwanted = dict(do_sample=True, temperature=0.3, top_k=3, top_p=0.5, repetition_penalty=2.0)
    model.generation_config.update(**unwanted)
    stream = torch.Generator().manual_seed(0)
    completions = bupo.sample(model, [[4, 2, 6]] * 8000, 1, {1}, 1.3, 8000, stream)
    expected = 8000 * (model(torch.tensor([[4, 2, 6]])).logits[0, -1] / 1.3).softmax(-1)
    observed = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=20)
    assert expected.min() > 5  # as chi-square needs
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 19 + 4 * math.sqrt(2 * 19)  # four standard deviations


def test_every_end_token_counts():
    """The model's, the tokenizer's, and what the chat template ends an assistant's turn with."""
    model, tokenizer = bupo.load_model("tiny")
    eos, user = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    turns = "{% for m in messages %}<|assistant|>{{ m.content }}<|user|>\n{% endfor %}"
    no_turn = "<|user|>{{ messages[0].content }}<|assistant|>"
    cases = [(turns, 7, {7, eos, user}), (no_turn, 7, {7, eos}), (None, None, {eos})]
    for template, of_model, ends in [(tokenizer.chat_template, [7, 9], {7, 9, eos}), *cases]:
        tokenizer.chat_template, model.generation_config.eos_token_id = template, of_model
        assert bupo.end_tokens(model, tokenizer) == ends


def test_as_many_rows_are_decoded_as_fit_or_as_the_flag_says(monkeypatch):
    model, config = small_model(), update_settings(max_new_tokens=100)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**9, 10**10))
    row = 2 * 4 * 2 * 8 * 120 * 4  # keys and values, blocks, heads, size, columns, bytes
    assert 0.1 < bupo.rollout_rows(model, 20, config) * row / 10**9 < 0.95
    assert bupo.rollout_rows(model, 20, update_settings(rollout_rows="7")) == 7


# Problems and evaluation ==========================================================================


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(system, asked, role: str = "user") -> list[dict]:
    return [dict(role="system", content=system), dict(role=role, content=asked)]


CHAT, PARTS = chat("s", "u"), chat("s", [dict(type="text", text="u")])
LEAK = [*CHAT, dict(role="assistant", content=r"The answer is \boxed{4}")]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "u", "answer": "6 / 2 = 3\n#### 1,003"}, "1,003"),  # GSM8K
        ({"problem": "u", "solution": r"so \boxed{2x}", "answer": "x^2"}, "x^2"),  # MATH-500
        ({"problem": "u", "solution": r"so \boxed{\frac{1}{2}}"}, r"\frac{1}{2}"),  # MATH
        ({"problem": "u", "solution": r"$x = 1/2$ or $x = 2$: $\boxed 2$."}, "2"),
        ({"question": "u", "final_answer": "Yes", "difficulty": 3.5}, "Yes"),  # DeepMath
        ({"question": "u", "final_answer": [42.0]}, "42.0"),
        ({"question": "u", "answer": 1e-5}, "0.00001"),
        ({"prompt": CHAT, "reward_model": {"ground_truth": "9"}, "question": "other"}, "9"),
        ({"prompt": json.dumps(CHAT), "reward_model": json.dumps({"ground_truth": "9"})}, "9"),
        ({"prompt": PARTS, "answer": "4"}, "4"),
        ({"prompt": LEAK, "answer": "4"}, "4"),  # the answer is cut off
        ({"conversations": [{"from": "human", "value": "u"}], "answer": "4"}, "4"),
    ],
)
def test_load_problems_finds_the_usual_columns(row, answer, tmp_path):
    (problem,) = bupo.load_problems(write_rows(tmp_path / "x.jsonl", [row]), system="s")
    assert problem == bupo.Problem(CHAT, answer)


def test_rows_without_a_question_or_one_checkable_answer_are_dropped_and_counted(tmp_path, capsys):
    picture = [dict(type="image"), dict(type="text", text="u")]
    questions = [None, " ", chat("s", None), chat("s", picture), chat("s", "4", role="assistant")]
    answers = [None, " ", ["1", "2"], '["1", "2"]', {"value": 4}, math.nan, r"\boxed{1}, \boxed{2}"]
    rows = [dict(question=question, answer="1") for question in questions]
    rows += [dict(question="u", answer=answer) for answer in (*answers, "5")]
    (problem,) = bupo.load_problems(write_rows(tmp_path / "x.jsonl", rows))
    assert problem.answer == "5"
    assert re.search("question.*answer.* 12 ", capsys.readouterr().out)
    proof = dict(problem="Prove that 2m + 2n is even.", solution="It is 2(m + n).")
    with pytest.raises(bupo.UsageError, match=r"no usable row .* 1 "):
        bupo.load_problems(write_rows(tmp_path / "proof.jsonl", [proof]))


def test_files_of_every_kind_are_read_and_a_type_may_vary(tmp_path, monkeypatch):
    rows = [dict(question="a", answer=i) for i in range(10001)] + [dict(question="b", answer="x")]
    cells = [(i, *row.values()) for i, row in enumerate(rows)]  # with an index, as pandas writes it
    table = "\n".join([",question,answer", *("{},{},{}".format(*row) for row in cells)])
    (tmp_path / "x.csv").write_text(table)
    (tmp_path / "x.tsv").write_text(table.replace(",", "\t"))
    text = Path(write_rows(tmp_path / "x.jsonl", rows)).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    texts = [dict(row, answer=str(row["answer"])) for row in rows]
    datasets.Dataset.from_list(texts).to_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)  # whose cache may be full or read-only
    for file in list(tmp_path.iterdir()):
        for source in (str(file), file.as_uri()):  # a URL
            found = bupo.load_problems(source, system="")
            assert [len(found), found[-2].answer] == [10002, "10000"]
            assert found[-1] == bupo.Problem([dict(role="user", content="b")], "x")


def test_data_sets_of_the_hub_by_split_and_configuration(monkeypatch):
    rows = datasets.Dataset.from_list([dict(question="u", answer="1")])
    splits = datasets.DatasetDict(test=rows.select([]), train=rows)
    load = Mock(side_effect=lambda *_, split=None: rows if split else splits)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("a/b", "a/b:test", "a/b:main:test"):
        assert bupo.load_problems(source, system="") == [bupo.Problem(CHAT[1:], "1")]
    asked = [(*call.args, call.kwargs.get("split")) for call in load.call_args_list]
    assert asked == [("a/b", None), ("a/b", "test"), ("a/b", "main", "test")]


def test_the_arithmetic_task_is_right_fits_and_keeps_its_held_out_problems_apart():
    training, held_out = bupo.arithmetic(False), bupo.arithmetic(True)
    both, (_, tokenizer) = {**training, **held_out}, bupo.load_model("tiny")
    assert 0.1 < len(held_out) / len(both) < 0.15
    assert len(both) == len(training) + len(held_out)
    for question, solution in both.items():
        assert bupo.extract_boxed(solution) == str(eval(question))
        lines = re.findall(r"([\d+-]+)=(\d+)", solution)
        assert all(eval(left) == int(right) for left, right in lines)
    longest = tokenizer(max(both.values(), key=len)).input_ids
    assert len(longest) + 1 <= bupo.TINY["max_new_tokens"]
    (problem,) = bupo.load_problems("arithmetic-heldout", limit=1)
    assert bupo.extract_boxed(held_out[problem.messages[0]["content"]]) == problem.answer


def test_pass_at_k_equals_brute_force():
    for n, c in [(5, 0), (5, 2), (5, 5), (6, 3)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert bupo.pass_at_k(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_evaluate_counts_rightly_and_draws_from_its_own_stream(monkeypatch):
    (model, tokenizer), state = bupo.load_model("tiny"), torch.get_rng_state()
    problems, config = bupo.load_problems("arithmetic-heldout", 3), bupo.configure(max_new_tokens=5)
    results = itertools.cycle([1.0, 0.0, 0.0, 0.0] + [1.0] * 4 + [0.0] * 4)
    monkeypatch.setattr(bupo, "math_reward", lambda text, answer: next(results))
    metrics, samples = bupo.evaluate(model, tokenizer, problems, config)
    error = torch.tensor([0.25, 1.0, 0.0]).std().item() / math.sqrt(3)
    assert (metrics["eval_avg"], metrics["eval_se"]) == pytest.approx((5 / 12, error))
    assert metrics["eval_pass"] == pytest.approx([5 / 12, (1 / 2 + 1) / 3, (3 / 4 + 1) / 3, 2 / 3])
    assert bupo.evaluate(model, tokenizer, problems, config) == (metrics, samples)
    config.seed = 1
    assert bupo.evaluate(model, tokenizer, problems, config)[1] != samples
    assert torch.equal(torch.get_rng_state(), state)


# Models ===========================================================================================


def edit(file: Path, **changes) -> None:
    """Change some of the settings in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


TEXT = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
VISION = dict(TEXT, num_attention_heads=2, image_size=28, patch_size=14)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8)
LATENT |= dict(v_head_dim=8, num_key_value_heads=4, head_dim=4)  # keys unlike values
ROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64)
ROPE |= dict(short_factor=[1.0] * 4, long_factor=[8.0] * 4)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "GPT2", "Olmo2", "Cohere", "Granite"])
def test_models_that_are_not_llama_like_are_refused(family, tmp_path):
    own = dict(residual_multiplier=0.5) if family == "Granite" else {}
    if family == "Gemma3":
        own = dict(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    folder = saved_model(tmp_path / "m", family, **own)
    with pytest.raises(bupo.UsageError, match=f"{family}.*(not Llama-like|does not support)"):
        bupo.load_model(str(folder))


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama", "Mistral", "Starcoder2", "Youtu"])
def test_llama_like_models_are_loaded_whatever_precision_they_ask_for(family, tmp_path):
    """And sampled from what is scored, which load_model checks."""
    folder = saved_model(tmp_path / "m", family, **(LATENT if family == "Youtu" else {}))
    edit(folder / "config.json", _attn_implementation="eager", dtype="bfloat16")
    model, _ = bupo.load_model(str(folder))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
CODE = "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model"


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda f: edit(f / "config.json", num_hidden_layers=5), "lacks .*model.layers.4."),
        (poison, "model.norm.weight .* finite"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "LoRA adapter"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),  # a pickle is left
        (lambda f: edit(f / "config.json", model_type="own", auto_map=OWN), "cannot be loaded"),
    ],
)
def test_damaged_and_unsafe_models_are_refused(damage, word, tmp_path, monkeypatch):
    folder = saved_model(tmp_path / "m", "Llama")
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n{CODE}\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # if it is asked
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    damage(folder)
    with pytest.raises(bupo.UsageError, match=word):
        bupo.load_model(str(folder))
    assert not (folder / "ran").exists()


def test_prompts_with_templates_of_every_kind():
    _, tokenizer = bupo.load_model("tiny")
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}<|assistant|>"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + users
    processor = tokenizers.processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = processor
    assert tokenizer("1").input_ids[-1] == 1  # an end that no prompt must have
    for template, text in [
        (tokenizer.chat_template, "<|user|>S<|user|>1+1<|assistant|>"),
        (refuses, "S\n\n1+1<|assistant|>"),
        (users, "S\n\n1+1<|assistant|>"),  # ignores a system message
        (None, "S\n\n1+1\n\n"),
    ]:
        tokenizer.chat_template = template
        ids = bupo.encode(tokenizer, bupo.Problem(chat("S", "1+1"), "2"))
        assert tokenizer.decode(ids) == text
    tokenizer.chat_template = refuses
    ids = bupo.encode(tokenizer, bupo.Problem(chat(" ", "1+1"), "2"))
    assert tokenizer.decode(ids).strip() == "1+1<|assistant|>"


# The command line =================================================================================

SHORT = dict(pretrain_steps=1, prompts_per_step=4, group_size=2, mini_batch=2, internal_steps=1)
SHORT |= dict(eval_problems=4, eval_k=2, max_new_tokens=12)


def flags(**settings) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def run(code: int = 0, **settings) -> Path | None:
    """Run a command line, which must end with the given exit code; returns its --out."""
    assert bupo.main(flags(**settings)) == code
    return settings.get("out")


@pytest.fixture(scope="module")
def guessing(tmp_path_factory) -> dict:
    """Settings of a run from a model that has learned to guess: each step has some signal."""
    folder, sums = tmp_path_factory.mktemp("guessing"), list(bupo.arithmetic().items())[:36]
    rows = [dict(question=q, answer=bupo.extract_boxed(solution)) for q, solution in sums]
    file = write_rows(folder / "x.jsonl", rows)
    model = run(out=folder / "m", **SHORT | dict(pretrain_steps=120, steps=1, lr=0.0))
    edit(model / "model/generation_config.json", pad_token_id=-1)  # invalid, says transformers
    asked = dict(dataset=file, eval_dataset=file, temperature=0.9, max_new_tokens=12)
    sizes = dict(prompts_per_step=8, group_size=8, mini_batch=4, internal_steps=2, save_every=1)
    sizes |= dict(steps=5, eval_every=2, eval_problems=4, eval_k=2, keep=0)
    return dict(model=model, precision="bfloat16", **asked, **sizes)


@pytest.fixture(scope="module")
def finished(guessing, tmp_path_factory) -> Path:
    """A finished run in bfloat16, of two steps in phase 1 and three in phase 2."""
    return run(out=tmp_path_factory.mktemp("finished") / "a", **guessing)


def lines(file: Path) -> list[dict]:
    """The objects of a log; NaN is no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_run(a: Path, b: Path) -> None:
    """Two runs have the same weights and the same logs, but for what was measured with a clock."""
    timed = ("rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb", "seconds")
    for file in ("metrics.jsonl", "completions.jsonl"):
        first, second = ([line | dict.fromkeys(timed) for line in lines(f / file)] for f in (a, b))
        assert first == second
    for name in ("model", bupo.checkpoints(a)[-1].name):
        assert all_equal(weights_of(a / name).values(), weights_of(b / name).values())


STEP = """step layer reward entropy layer_entropy completion_tokens truncated zero_std_groups
clip_fraction ratio_max grad_norm sampling_error rollout_tokens_per_s update_tokens_per_s
peak_memory_gb seconds"""
EVALUATION = "step eval_avg eval_se eval_pass eval_k eval_problems"


def test_a_run_writes_its_settings_metrics_completions_and_model(finished):
    config, metrics = bupo.read_config(finished), lines(finished / "metrics.jsonl")
    assert (config["preset"], config["internal_layer"], config["steps"]) == ("tiny", "3", 5)
    expected = [(i, STEP) for i in range(1, 6)] + [(i, EVALUATION) for i in (0, 2, 4, 5)]
    found = [(line["step"], sorted(line)) for line in metrics]
    assert sorted(found) == sorted((i, sorted(k.split())) for i, k in expected)
    steps = [line for line in metrics if "layer" in line]
    assert [line["layer"] for line in steps] == [3, 3, 6, 6, 6]
    assert all(line["grad_norm"] > 0 for line in steps)  # each moved the weights
    assert 0 < max(line["sampling_error"] for line in steps) < 0.05
    assert [line["layer_entropy"] == line["entropy"] for line in steps] == [False] * 2 + [True] * 3
    assert {line["step"] for line in lines(finished / "completions.jsonl")} == {0, 2, 4, 5}
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    assert "<|assistant|>" in tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_run_in_bfloat16_keeps_float32_masters(finished):
    masters = weights_of(finished / "checkpoint-5")
    for name, rounded in weights_of(finished / "model").items():
        assert torch.equal(rounded, masters[name].bfloat16())
        assert not torch.equal(masters[name], rounded.float())


def test_a_run_from_a_run_asks_what_that_asked(guessing, finished, tmp_path, capsys):
    for place in (finished, finished / "model", finished / "checkpoint-2"):
        config = bupo.configure(str(place), eval_k=3)
        assert (config.temperature, config.dataset) == (0.9, guessing["dataset"])
        assert (config.lr, config.steps, config.eval_k) == (1e-4, 60, 3)
    config = bupo.configure("Qwen/Qwen3-1.7B")
    assert (config.preset, config.lr, config.system) == ("real", 1e-6, bupo.SYSTEM)
    a, b = shutil.copytree(finished, tmp_path / "a b"), tmp_path / "b"
    run(resume=a)  # evaluates the last step again
    said = capsys.readouterr().out
    assert re.search(r"avg@2 [\d.]+% \(standard error [\d.]+%\), pass@2 .* 4 held-out", said)
    command = shlex.split(re.search(r"python bupo.py (--model .*)", said)[1])
    assert bupo.main([*command, *flags(precision="bfloat16", out=b)]) == 0
    for log in ("metrics.jsonl", "completions.jsonl"):
        assert lines(b / log)[-1] == {**lines(finished / log)[-1], "step": 0}
    assert not (b / "model").exists()


def test_a_problem_comes_once_an_epoch_in_an_order_of_its_own(guessing, tmp_path, monkeypatch):
    seen, settings = [], dict(prompts_per_step=2, group_size=2, mini_batch=2, eval_problems=0)
    rows = [dict(question=f"1+{i}", answer=i) for i in range(6)]
    settings |= dict(dataset=write_rows(tmp_path / "x.jsonl", rows), steps=9)
    monkeypatch.setattr(bupo, "math_reward", lambda _, answer: seen.append(int(answer)) or 0.0)
    run(out=tmp_path / "a", **guessing | settings)
    epochs = [seen[i : i + 12 : 2] for i in (0, 12, 24)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    metrics = lines(tmp_path / "a" / "metrics.jsonl")
    assert len({line["entropy"] for line in metrics}) == 9  # each step has draws of its own


def test_the_rate_rises_and_a_run_says_its_layer_and_notes(tmp_path, monkeypatch, capsys):
    rates, step = [], bupo.MasterAdamW.step
    monkeypatch.setattr(bupo.MasterAdamW, "step", lambda s, lr: rates.append(lr) or step(s, lr))
    results = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(bupo, "math_reward", lambda *_: next(results))
    changes = dict(lr_warmup_steps=2, lr=1e-3, internal_layer="auto", max_new_tokens=3)
    run(out=tmp_path / "a", steps=3, **SHORT | changes)
    assert rates == [5e-4] * 2 + [1e-3] * 4
    said = capsys.readouterr().out
    assert re.search(r"Boundary +layer [1-6]", said)
    assert "raise --max-new-tokens" in said


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_short_run_learns_in_either_precision(precision, guessing, tmp_path):
    """From guesses to the one that is always right."""
    file = write_rows(tmp_path / "x.jsonl", [dict(question=f"{i}+1", answer=7) for i in range(9)])
    settings = dict(dataset=file, eval_dataset=file, eval_problems=9, eval_k=8, lr=1e-3, steps=15)
    settings |= dict(precision=precision, eval_every=15, lr_warmup_steps=1, save_every=15)
    a = run(out=tmp_path / "a", **guessing | settings)
    before, after = (line["eval_avg"] for line in lines(a / "metrics.jsonl") if "eval_avg" in line)
    assert before < 0.3
    assert after > 0.8


# Nothing lost =====================================================================================


def test_a_resumed_run_repeats_an_undisturbed_one_bit_for_bit(guessing, tmp_path):
    """Wherever its data are by then, and however many steps it was to make at first."""
    settings = guessing | dict(precision="float32", save_every=2)
    a = run(out=tmp_path / "a", **settings | dict(steps=4))
    b = run(out=tmp_path / "b", **settings | dict(steps=3))
    moved = str(shutil.copy(guessing["dataset"], b / "moved.jsonl"))
    run(resume=b, steps=4, dataset=moved, device="cpu")
    os.remove(moved)  # not a log of the run's, so it was left alone
    same_run(a, b)
    errors = [line.get("sampling_error", 0) for line in lines(b / "metrics.jsonl")]
    assert max(errors) < 1e-5  # rounding in float32
    config, resumed = bupo.parse(flags(resume=b, lr=0.5))
    assert (config.lr, config.steps, config.dataset, resumed) == (0.5, 4, moved, True)


def test_a_run_killed_again_and_again_ends_like_another(guessing, finished, tmp_path):
    out, limit = tmp_path / "b", time.monotonic() + 240
    out.mkdir()  # empty: as good as new
    arguments = flags(out=out, **guessing)
    for disturbed in (
        lambda: (out / "config.json").exists(),  # before any checkpoint
        lambda: list(out.glob(".checkpoint-[1-5].*")),  # inside a checkpoint
    ):
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen([sys.executable, bupo.__file__, *arguments], **quiet)
        while not disturbed():
            assert process.poll() is None, "the run ended before it could be disturbed"
            assert time.monotonic() < limit
            time.sleep(0.001)
        process.kill()
        process.wait()
        arguments = flags(resume=out)
    run(resume=out)
    same_run(finished, out)
    assert not list(out.glob(".*"))  # what the second one left


STOPS = [(what, "update", 1) for what in ("SIGINT", "SIGINT twice", "SIGTERM", "SIGHUP SIGHUP")]
STOPS += [("stdout", "update", 2), ("SIGINT", "evaluate_and_log", 0), ("SIGINT", "shlex.quote", 5)]
STOPS += [("SIGINT SIGINT", "update", 0)]


@pytest.mark.parametrize(("what", "function", "saved"), STOPS)
def test_a_request_to_stop_or_a_reader_that_goes_away_saves_a_checkpoint(
    what, function, saved, guessing, finished, tmp_path, monkeypatch, capsys
):
    out, save = tmp_path / "b", torch.save

    def stop(function, *arguments):
        if what.endswith("twice"):  # within the checkpoint
            patch.setattr(torch, "save", save if function is save else partial(stop, save))
        for name in re.findall("SIG[A-Z]+", what):
            os.kill(os.getpid(), getattr(signal, name))
        return function(*arguments)

    def gone(function, *arguments):
        patch.setattr(sys.stdout, "write", Mock(side_effect=BrokenPipeError))
        return function(*arguments)

    with monkeypatch.context() as patch:
        whole = operator.attrgetter(function)(bupo)
        patch.setattr(f"bupo.{function}", partial(gone if what == "stdout" else stop, whole))
        signal.signal(getattr(signal, what.split()[0], signal.SIGINT), Mock())  # not as nohup does
        run(out=out, code=2 if what == "stdout" else 130, **guessing | dict(save_every=9))
    assert f"--resume {out}" in capsys.readouterr().err
    assert bupo.checkpoints(out)[-1].name == f"checkpoint-{saved}"
    run(resume=out)
    same_run(finished, out)


def test_damaged_and_foreign_checkpoints_are_named(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "a")
    before = (folder / "metrics.jsonl").read_text()
    model, state = (folder / "checkpoint-5" / n for n in ("model.safetensors", "training.pt"))
    ran = dict(__reduce__=lambda _: (os.mkdir, (str(tmp_path / "ran"),)))  # what a pickle can do
    hostile = type("Hostile", (), ran)()
    for file, content in ((model, None), (state, None), (state, {}), (state, hostile)):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        if content is not None:
            torch.save(content, file)
        run(resume=folder, code=2)
        assert "checkpoint-5" in capsys.readouterr().err
        file.write_bytes(whole)
    assert (folder / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(folder / "checkpoint-5")
    run(resume=folder)  # from the one before
    same_run(finished, folder)


def test_only_a_checkpoint_lets_a_log_be_cut(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "a")
    for checkpoint in bupo.checkpoints(folder):
        shutil.rmtree(checkpoint)
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    run(resume=folder, code=2)
    assert "no checkpoint" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()} == before


def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(tmp_path, monkeypatch, capsys):
    load_model = bupo.load_model

    def load_while_another_begins(*arguments, **settings):
        monkeypatch.setattr(bupo, "load_model", load_model)
        run(out=tmp_path / "a", steps=1, **SHORT)
        return load_model(*arguments, **settings)

    monkeypatch.setattr(bupo, "load_model", load_while_another_begins)
    run(out=tmp_path / "a", code=2, steps=1, **SHORT)
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    run(out="~/b", steps=1, **SHORT)  # with the same seed
    same_run(tmp_path / "a", tmp_path / "b")


# One sentence for what the user can fix ===========================================================


def test_running_out_of_memory_names_the_flags(finished, monkeypatch, capsys):
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(cublas), MemoryError()]
    for fail in (*(Mock(side_effect=e) for e in errors), lambda *_, **__: torch.empty(2**50)):
        monkeypatch.setattr(torch, "load", fail)
        run(resume=finished, code=2)
        said = capsys.readouterr().err
        assert "out of memory; lower --rollout-rows or --micro-batch-tokens" in said
        assert "damaged" not in said  # the checkpoint that was being read
    monkeypatch.setattr(bupo, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        bupo.main([])


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bupo, "group_advantages", lambda rewards: rewards * math.nan)
    changes = dict(eval_problems=0, save_every=1, keep=3, steps=12)
    a = run(out=tmp_path / "a", code=2, **SHORT | changes)
    assert "Ten steps in a row" in capsys.readouterr().err
    assert [line["grad_norm"] for line in lines(a / "metrics.jsonl")] == [None] * 10
    assert [folder.name[11:] for folder in bupo.checkpoints(a)] == ["8", "9", "10"]


def test_every_setting_is_a_flag_with_help_and_both_defaults(capsys):
    for arguments, code in ((["--help"], 0), (["--no-such-flag", "3"], 2)):
        with pytest.raises(SystemExit) as stopped:
            bupo.main(arguments)
        assert stopped.value.code == code
    said, settings = capsys.readouterr(), bupo.configure().__dict__
    assert len(said.err.splitlines()) == 1
    assert "30 or 20) [30, tiny: 10]" in " ".join(said.out.split())
    assert all(re.search(f"--{name.replace('_', '-')}[ ,\n]", said.out) for name in settings)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--model nobody/no-such-model", "cannot be loaded"),
        ("--dataset {tmp}/none.parquet", "none.parquet"),
        ("--dataset nobody/no-such-data", "cannot be loaded"),
        ("--dataset {tmp}/noise.parquet", "cannot be loaded"),
        ("--dataset {tmp}/columns.jsonl", "'a', 'b'"),
        ("--dataset {tmp}/long.jsonl --max-prompt-tokens 3", "1 too long"),
        ("--steps 0 --eval-problems 0", "--steps 0"),
        ("--out {tmp}", "--out"),
        ("--out {tmp}/{long}", "name too long"),
        ("--model {tmp}/longrope --max-new-tokens 99", "at most 64"),
        ("--model {tmp}/silent --eval-dataset {tmp}/long.jsonl", "renders nothing"),
        ("--dataset {tmp}/torn.jsonl", "line 2"),
        ("--internal-layer 7", "1 to 6"),
        ("--internal-layer low", "--internal-layer must be auto or"),
        ("--mini-batch 3", "--mini-batch must divide"),
        ("--lr nan", "--lr must be"),
        ("--seed 18446744073709551616", "--seed must be"),
        ("--max-new-tokens 1000", "at most 512"),
        ("--device cuda:99", "cuda:99"),
        ("--optimizer-device cuda", "--optimizer-device cuda"),
        ("--resume {run} --steps 1", "--steps 1 is less"),
        ("--resume {tmp}/nothing", "no run"),
        ("--resume {run} --out {tmp}/x", "--out"),
        ("--resume {run}/checkpoint-2", "no run"),  # its config.json is the model's
    ],
)
def test_bad_input_gets_one_sentence(arguments, word, finished, tmp_path, capsys):
    (tmp_path / "noise.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "torn.jsonl").write_text('{"question": "1", "answer": 1}\n{"quest')
    write_rows(tmp_path / "columns.jsonl", [dict(a=1, b=2)])
    write_rows(tmp_path / "long.jsonl", [dict(question="1+2+3", answer=6)])
    if "longrope" in arguments:
        own = dict(rope_parameters=ROPE, original_max_position_embeddings=64)
        saved_model(tmp_path / "longrope", "Phi3", **own)
    if "silent" in arguments:
        (saved_model(tmp_path / "silent") / "chat_template.jinja").write_text("{# nothing #}")
    before, names = sorted(tmp_path.rglob("*")), dict(tmp=tmp_path, run=finished, long="x" * 300)
    own = [argument.format(**names) for argument in arguments.split()]
    short = flags(**SHORT, steps=1, preset="tiny", out=tmp_path / "new")
    assert bupo.main([*([] if "--resume" in own else short), *own]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert word in error
    assert error.endswith(".")
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing lost


# The reward =======================================================================================


def test_find_boxes():
    for text, boxes in [
        (r"\boxed{1} then \boxed{2}", ["1", "2"]),
        (r"\boxed{ \frac{1}{2} } and \fbox{8}", [r"\frac{1}{2}", "8"]),
        (r"\boxed {7}, \boxed 7 or $\boxed -2.5$", ["7", "7", "-2.5"]),
        (r"\boxed{\{1, 2\}} \boxed{\left\{x \right.}", [r"\{1, 2\}", r"\left\{x \right."]),
        (r"\boxed{4} and then \boxed{5", ["4"]),  # the last is cut off
        (r"} { \boxed{6}", ["6"]),
        (r"\boxedx{6} boxed{6} \boxed{", []),
    ]:
        assert bupo.find_boxes(text) == boxes
        assert bupo.extract_boxed(text) == (boxes[-1] if boxes else None)


RIGHT = r"""
# fractions, decimals, mixed numbers
\frac12 | 0.5    \dfrac{3}{4} | 3/4    \frac{-1}{2} | -\frac{1}{2}    -1/2 | \frac{-1}{2}
\frac{6}{8} | \frac{3}{4}    \frac1{72} | \frac{1}{72}    \frac{1+a}c | \frac{1+a}{c}
1 1/4 | \frac54    1\frac14 | 1.25    11 \frac{2}{3} | \frac{35}{3}    -1\frac{1}{2} | -1.5
2\dfrac{1}{2} | 5/2    137 \frac{1}{2} | 137.5    1\frac{1}{4}\pi | \frac{5\pi}{4}
# percent, degrees
62.5\% | \frac58    50\% | 0.5    0.5 | 50\%    50 | 50\%    50\% | 50    10\% | 10
5.10\% | 5.1\%    12.5% | \frac{1}{8}    50 \% | 50\%    50\text{ percent} | 50\%    90^\circ | 90
90° | 90^\circ    90 | 90^{\circ}    74° | 74    \frac{270}{7}^\circ | \frac{270}7\text{ degrees}
45^{\circ} | 45°    90 degrees | 90^\circ
# currency, units
\$5 | 5    $5 | 5    5 dollars | 5    \$10,080 | 10080    \$18.90 | 18.90    \$18.90 | 18.9
5 dollars | \$5    5\text{ dollars} | \$5    27\text{ miles} | 27    27 miles | 27
# thousands, scientific
10,080 | 10080    10{,}080 | 10080    10\,080 | 10080    14,\!400 | 14400    14,\!400 | 14,400
11,\! 111,\! 111,\! 100 | 11111111100    1,000,000 | 1000000    335670 | 335{,}670
1.6\times10^{-19} | 1.6 \cdot 10^{-19}    1.6e-19 | 1.6\times 10^{-19}    3\times10^8 | 300000000
1.5 \times 10^{3} | 1500    1e6 | 1000000    6.02e23 | 6.02\times10^{23}    10^{-3} | 0.001
# roots, surds, pi, e
3\cdot\sqrt[3]{2} | 3\sqrt[3]{2}    \sqrt[3]{54} | 3\sqrt[3]{2}    \sqrt{12} | 2\sqrt{3}
\sqrt2 | \sqrt{2}    \sqrt 2 | \sqrt{2}    \frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}
\sqrt[3]{8} | 2    \sqrt[3]{4} | 4^{1/3}
# complex
6 + 9 i | 6+9i    5\mathrm{i} | 5i    \frac{1+i\sqrt{3}}{2} | \frac12+\frac{\sqrt3}{2}i
9i+6 | 6+9i    (1+i)^2 | 2i    14.0 + -1.0i | 14-i    e^{i\pi} | -1    e^{\frac{i\pi}{2}} | i
# functions, factorials, binomials, floor, abs
\log 2 | \log{2}    \ln(4) | 2\ln(2)    \ln 2 | \log 2    \log_2 8 | 3    \log_{10} 100 | 2
\log_{2}(x) | \frac{\ln x}{\ln 2}    \tan x | \frac{\sin x}{\cos x}    \sin(2x) | 2\sin x\cos x
\frac{1}{\tan x} | \cot x    \arctan 1 | \frac{\pi}{4}    \sec x | \frac{1}{\cos x}    40!/39! | 40
\pi \approx 3.14 | \pi    \sqrt{51} \approx 7.14 | \sqrt{51}    \mathbb{R} | (-\infty,\infty)
5! | 120    (n+1)! | (n+1) n!    144 \times 23! | 144\cdot23!    \lvert x\rvert | |x|
# polynomials
x^2+2x+1 | (x+1)^2    (x-2)(x+1) | x^2-x-2    3(n+1) | 3n+3    x**2 | x^2    3*x | 3x
n(n-1) | n^2-n    a(7-2\pi) | 7a-2\pi a    p(p^2-1) | p^3-p    \frac{x^2-1}{x-1} | x+1
# equations
x=5 | 5    5 | x=5    2=x | 2    2 | 2=x    y=2x+1 | 2x+1    2x+1 | y=2x+1    y=2x+1 | 2x-y+1=0
x = 5 | x=5    5=x | x=5    f(x)=x^2 | x^2    f(x) = x^2 | f(x)=x^2    m_{\max}=3 | 3
# lists
2,1 | 1,2    1, 2 | 1,2    a=-2, b=-2 | -2,-2    x=1 \text{ or } x=2 | 1,2    x=1 or x=2 | x=1, x=2
1 \text{ and } 2 | 1,2    x=1, x=2 | 1,2    3, 5, 7 | 7,5,3
# intervals
(-\infty, 2] | (-\infty,2]    (-∞,3] | (-\infty,3]    \left(-\infty,3\right] | (-\infty,3]
[0,\infty) | [0,+\infty)    (0,9)\cup(9,36) | (9,36)\cup(0,9)    x \le 3 | (-\infty,3]
# sets, tuples, vectors, matrices
\{1,2\} | \{2, 1\}    \{1,2\} | 1,2    \left\{1,2\right\} | \{1,2\}    \{\frac12, 3\} | \{0.5,3\}
(1, 2) | (1,2)    (1,4.5) | (1,\frac92)    \left( 3, \frac{\pi}{2} \right) | (3,\frac{\pi}{2})
# ratios, bases, choices, words
8:7:3 | 8 : 7 : 3    52_{8} | 52_8    10001_2 | 10001_{2}    (C) | C    \text{C} | C    C. | C
\text{(B)} | B    B | \text{(B)}    \textbf{A} | A    \mathrm{C} | C    \textbf{(D)} | D
# letters, wrappers, layout
\displaystyle \frac{a}{b} | \frac{a}{b}    $5$ | 5    \(5\) | 5    \text{5} | 5    5 . | 5
\mathbf{X} | X    \mathbb R | \mathbb{R}    f(x)=x^2+C | x^2+C    \infty | ∞    −3 | -3
"""
WRONG = r"""
f(1,2) | f(2,1)    f(x,y) | f(y,x)    3\zeta(2) | 2\zeta(3)    \Gamma(2n) | 2\Gamma(n)
\arctan 2x | 2\arctan x    \cot 2x | 2\cot x    J_0(2) | 2J_0(1)    \text{Var}(2X) | 2\text{Var}(X)
\lfloor n^2/2\rfloor | n\lfloor n/2\rfloor    5\text{ thousand} | 5    20!+1 | 20!    x=1=2 | 1
# numbers
\% | 1    5%0 | 50    [] | 1    \{\} | 1
5 | 6    50 | 5    -5 | 5    2t | 2    2\pi | 2    52_8 | 52_1    52_8 | 52    52 | 52_8
52_8 | 52_9    1,2,3 | 123    0.333333 | 1/3    0.333 | \frac13    0.33 | \frac13    3.14 | \pi
# conditions and equations
\cot x = 1 | 1    5\text{ or more} | 5    5 \text{ if } n>2 | 5    f(x)=2x | g(x)=2x
\log x=2 | 2    n!=6 | 6    |x|=3 | 3    x\neq 3 | 3    x<3 | 3    \sqrt{x}=3 | 3    x+1=3 | 3
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """The pairs 'one | other' of a table whose cells are apart by two spaces or more, both ways."""
    cells = [cell.split(" | ") for cell in re.split(r" {2,}|\n", table.strip()) if cell[:1] != "#"]
    return [(a, b) for a, b in cells] + [(b, a) for a, b in cells]


def reward(answer: str, gold: str) -> float:
    return bupo.math_reward(rf"So \boxed{{{answer}}}.", gold)


def test_rewards_of_right_and_wrong_answers():
    assert [pair for pair in pairs(RIGHT) if reward(*pair) != 1] == []
    assert [pair for pair in pairs(WRONG) if reward(*pair) != 0] == []


def test_the_reward_is_for_the_last_box_and_only_a_box():
    assert bupo.math_reward(r"\boxed{4} or rather \boxed{5}", "5") == 1
    assert bupo.math_reward(r"\boxed{5} or rather \boxed{4}", "5") == 0
    assert bupo.math_reward("5", "5") == bupo.math_reward(r"\boxed{}", "") == 0


def paper_golds() -> list[str]:
    if not PAPER_FILES.is_dir():
        pytest.skip("the paper's problem files are not beside this checkout")
    pandas = pytest.importorskip("pandas")
    tables = [pandas.read_parquet(file) for file in sorted(PAPER_FILES.glob("*.parquet"))]
    return [row["ground_truth"] for table in tables for row in table["reward_model"]]


RESPELLINGS = [  # what in a gold may be written how
    (r"\\d?frac(?=\{)", r"\\tfrac"),
    (r"\^(\w)", r"^{\1}"),
    (r"\\d?frac\{(\w+)\}\{(\w+)\}$", r"(\1)/(\2)"),
    (r"(?<=\d) ?(?=\\pi|\\sqrt)", r" \\cdot "),
    (r"\\sqrt\{(\d+)\}$", r"\\sqrt{4 \\times \1}/2"),
    (r"^([a-zA-Z]{2,})$", r"\\text{\1}"),
    (r"^([a-zA-Z]{2,})$", r"\\textbf{\1}"),
]


def respellings(gold: str) -> list[str]:
    """Other ways to write the same answer."""
    spelled = [f"${gold}$", f"{gold}.", rf"\displaystyle {gold}", rf"\, {gold} \;"]
    spelled += [re.sub(pattern, by, gold) for pattern, by in RESPELLINGS]
    right = re.sub(r"(?<!right)([)\]])", r"\\right\1", gold)
    spelled += [gold.replace(" ", "  "), re.sub(r"(?<!left)([(\[])", r"\\left\1", right)]
    signs = gold.replace(r"\pi", "π").replace(r"\infty", "∞")
    spelled.append(signs.replace("-", "−").replace(r"\geq", "≥"))
    if re.fullmatch(r"-?\d{4,}", gold):
        spelled += [f"{int(gold):,}".replace(",", comma) for comma in (",", "{,}", r"\,")]
    if re.fullmatch(r"-?\d+", gold) and len(gold) < 300:
        spelled += [f"{gold}.0", f"x = {gold}", rf"{gold} \text{{ units}}"]
        spelled.append(rf"\frac{{{2 * int(gold)}}}{{2}}")
    if match := re.fullmatch(r"\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        top, bottom = int(match[1]), int(match[2])
        spelled.append(rf"\frac{{{3 * top}}}{{{3 * bottom}}}")
        spelled += [str(top / bottom)] if 1000 % bottom == 0 else []
    if match := re.fullmatch(r"\\\{([^{}\\|]*)\\\}", gold):
        spelled.append(rf"\left\{{ {', '.join(match[1].split(',')[::-1])} \right\}}")
    return [text for text in dict.fromkeys(spelled) if text != gold]


def test_a_reward_for_the_golds_of_the_paper_and_for_other_spellings_of_them():
    golds = sorted(set(paper_golds()))
    assert [gold for gold in golds if reward(gold, gold) != 1] == []
    cases = [(text, gold) for gold in golds for text in respellings(gold)]
    missed = [pair for pair in cases if reward(*pair) != 1]
    assert len(cases) > 10_000
    assert len(missed) <= 0.02 * len(cases), missed


SWAPS = {**dict(zip("+()[]<>^/", "-[]()><_*", strict=True)), "!": "", "'": "''"}


def mutations(gold: str, rng: random.Random) -> list[str]:
    """Golds with one symbol changed (digit, sign, letter, power, bracket) or a term dropped."""
    changed = []
    is_word = re.fullmatch(r"[a-zA-Z]{2,}|\\text\{.*\}", gold)  # whose case is free
    for token in re.finditer(r"\\[a-zA-Z]+|\\.|.", gold):
        old, by = token[0], []
        if old.isdecimal():
            by = [rng.choice([d for d in "0123456789" if d != old])]
        elif re.fullmatch("[a-zA-Z]", old):
            by = [rng.choice([c for c in "abckmnpqrstuvxyz" if c != old])]
            by += [old.swapcase()] if not is_word else []
        elif old in ("-", r"\sqrt", r"\pi"):
            by = [""]
        elif old in SWAPS:
            by = [SWAPS[old]]
        changed += [gold[: token.start()] + new + gold[token.end() :] for new in by]
    terms = re.finditer(r"[+-] ?[^-+(){}\[\]=,]+", gold)
    changed += [gold[: term.start()] + gold[term.end() :] for term in terms]
    return [text for text in changed if text.strip() not in ("", gold)]


def test_no_reward_for_golds_with_one_wrong_symbol():
    rng = random.Random(0)
    cases = [(text, gold) for gold in sorted(set(paper_golds())) for text in mutations(gold, rng)]
    accepted = [pair for pair in cases if reward(*pair) != 0]
    assert len(cases) > 5_000
    assert len(accepted) <= 0.001 * len(cases), accepted


NUMBERED = r"""9^{9^{9^{%d}}}  (10^{%d})!  10^{10^{%d}}  %d^{%d^{%d}}  \frac{%d}{0}  ((%d!)!)!
\int_0^{%d} x^{x^x} dx  \binom{10^{%d}}{10^5}  \sum_{k=1}^{10^{%d}} k^k  2^%d!!!!  1.%de999999999
\sqrt[%d]{\sqrt{-1}^{\pi}}  __import__('os')._exit(%d)  $(kill -9 %d)  '; exit %d #  1e%d
\frac{1}{3^{4000}} + %d"""
REPEATED = r"{ } - ( 2^ +- ! | , x ½ ± 1½ 1, \frac \sin \text{ a= ±1 ≥x"
AROUND = [("{", "1", "}"), ("(", "x", ")"), (r"\frac{", "1", "}{2}"), ("9", "/", "8")]
AROUND += [("", "1", "+1"), ("", "x", "(x+1)"), ("3^{2000}/7^{2500}+", "1", "")]
AROUND += [("900!/899!+", "1", "")]


def hostile_answers() -> list[str]:
    """Answers that a model under RL might give and that stall, crash or fool careless graders."""
    shapes, rng = re.split(r" {2,}|\n", NUMBERED), random.Random(0)
    answers = [s % ((n,) * s.count("%d")) for s in shapes for n in (8, 30, 99, 12345)]
    answers += [r"\boxed{" + "{" * n + r"\a" * 40 for n in range(12)]  # boxes that never close
    for n in (20, 60, 99, 399, 50_000):
        answers += [text * n for text in REPEATED.split()]
        answers += [left * n + middle + right * n for left, middle, right in AROUND]
    latex, plain = r"\{}boxedfrac123_^$&", "".join(map(chr, range(1, 255)))
    for alphabet in (latex, "0123456789^!().", plain, "\u0660²∞七\ud800\0"):
        sizes = [size for size in (10, 100, 299, 1000, 50_000) for _ in range(5)]
        answers += ["".join(rng.choices(alphabet, k=size)) for size in sizes]
    return answers


def test_the_reward_of_hostile_answers_comes_at_once():
    pieces = ("{", "}", "{}", r"\boxed{", r"\boxed{}", r"\boxed ", "\\", r"\fbox{1", " ")
    long = [piece * (400_000 // len(piece)) for piece in pieces]
    for answer in [*hostile_answers(), *(a[:395] for a in hostile_answers()), *long]:
        began = time.process_time()
        assert reward(answer, "x+7") in (0.0, 1.0)
        assert bupo.math_reward(answer + r"\boxed{7}", "7") in (0.0, 1.0)
        assert bupo.math_reward(r"\boxed{7}", answer) in (0.0, 1.0)
        seconds = time.process_time() - began  # a safety net: milliseconds as a rule
        assert seconds < (1 if len(answer) < 400_000 - 9 else 10), answer[:80]


@settings(deadline=None, max_examples=300)
@given(
    strategies.one_of(strategies.text(), strategies.text(r"\{}frac123()[]+-*/^_=<,.|!$% exi²√π∞±")),
    strategies.text(r"\{}frac12(x)+-^=<,|! sin"),
)
def test_any_two_texts_get_a_reward_of_0_or_1(answer, gold):
    assert reward(answer, gold) in (0.0, 1.0)
    assert bupo.math_reward(answer, gold) in (0.0, 1.0)


# Pictures (analyze.py) ============================================================================

PROFILED = random_sequences([(3, 6), (9, 2), (1, 1), (4, 11)])


@torch.no_grad()
def naive_measures(model, prompt, completion, low=0, norm=True):
    """{(name, layer): (N,)} of one completion, by the formulas; and each policy, (N, V)."""
    at, ids = slice(len(prompt) - 1, -1), torch.tensor([prompt + completion])
    blocks = [[part[0, at] for part in block] for block in bupo.residual_stream(model, ids)]
    found, pi = {}, model(ids).logits[0, at].log_softmax(-1)
    streams, policies = [blocks[0][0], *(h + a + f for h, _, a, _, f in blocks)], []
    for k, stream in enumerate(streams):
        if k:
            before, attention_input, attention, ffn_input, ffn = blocks[k - 1]
            modules = [("attention", before, attention_input, attention)]
            modules += [("ffn", before + attention, ffn_input, ffn)]
            for name, joined, read, written in modules:
                found[name, k] = naive_entropy(model.lm_head(written))
                found[f"{name}_change", k] = found[name, k] - naive_entropy(model.lm_head(read))
                found[f"cos_{name}", k] = torch.cosine_similarity(written, joined, dim=-1)
        plain, normed = model.lm_head(stream), model.lm_head(model.model.norm(stream))
        policies.append((normed if norm or stream is streams[-1] else plain).log_softmax(-1))
        found["policy", k] = naive_entropy(policies[k])
        found["without_norm", k] = naive_entropy(normed if stream is streams[-1] else plain)
        found["kl", k] = (pi.exp() * (pi - policies[k])).sum(-1)
        found["top1", k] = (pi.argmax(-1) == policies[k].argmax(-1)).float()
        found["nll", k] = -policies[k].gather(-1, torch.tensor(completion)[:, None])[:, 0]
        if k:
            found["layer_change", k] = found["policy", k] - found["policy", k - 1]
        if k > low > 0:
            found["low_kl", k] = (policies[low].exp() * (policies[low] - policies[k])).sum(-1)
            found["low_cosine", k] = torch.cosine_similarity(streams[low], stream, dim=-1)
    return found, policies


@every_family
@pytest.mark.parametrize(("layers", "low", "norm"), [(4, 1, True), (6, 0, False), (1, 0, True)])
def test_analyze_every_number_by_direct_computation(family, tied, layers, low, norm, monkeypatch):
    monkeypatch.setattr(bupo, "HEAD_TOKENS", 30)
    count = min(4, layers)  # completions; one has no standard error
    model = small_model(family, layers, tie_word_embeddings=tied, initializer_range=0.1)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    found = analyze.profile(model, PROFILED[:count], 30, norm, low)
    measures = found["measures"]
    naive = [naive_measures(model, *sequence, low, norm)[0] for sequence in PROFILED[:count]]
    assert {(name, k) for name, one in measures.items() for k in one["layer"]} == naive[0].keys()
    for name, layer in naive[0]:
        one, values = measures[name], [n[name, layer].double() for n in naive]
        overall, i = torch.cat(values).mean(), one["layer"].index(layer)
        squares = sum(float((v - overall).sum()) ** 2 for v in values)
        want = (squares * count / max(1, count - 1)) ** 0.5 / sum(map(len, values))
        assert one["mean"][i] == pytest.approx(float(overall), abs=1e-4), (name, layer)
        assert one["se"][i] == (pytest.approx(want, abs=1e-4) if count > 1 else None), (name, layer)
    assert math.exp(found["max_entropy"]) == pytest.approx(50)
    assert found["boundary_layer"] == bupo.boundary_layer(measures["ffn_change"]["mean"])


FEW = ["--dataset", "arithmetic", "--problems", "3", "--max-new-tokens", "5", "--device", "cpu"]


def drawn(monkeypatch, tmp_path, *arguments):
    """What a command line writes to the JSON file, and its figure."""
    figures: list = []
    monkeypatch.setattr(analyze.plt, "close", figures.append)
    assert analyze.main([*map(str, arguments), "--out", str(tmp_path / "made" / "x.png")]) == 0
    assert (tmp_path / "made" / "x.png").stat().st_size > 10_000
    return json.loads((tmp_path / "made" / "x.json").read_text()), figures[0]


def test_analyze_profiles_models_side_by_side(tmp_path, capsys, monkeypatch):
    models = [saved_model(tmp_path / "a"), saved_model(tmp_path / "b", "Llama", layers=2)]
    found, figure = drawn(monkeypatch, tmp_path, "--model", *models, *FEW)
    assert [(m["layers"], m["completions"]) for m in found["models"]] == [(4, 3), (2, 3)]
    said = capsys.readouterr().out
    assert all(f"--internal-layer {m['boundary_layer']}" in said for m in found["models"])
    columns = zip(found["models"], (figure.axes[::2], figure.axes[1::2]), strict=True)
    for one, axes in columns:  # what is drawn, from layer 1 on, is in the file
        known = [measure["mean"][-one["layers"] :] for measure in one["measures"].values()]
        drawn_lines = [line for axis in axes for line in axis.lines if line.get_marker() != "None"]
        assert sorted(list(line.get_ydata()) for line in drawn_lines) == sorted(known)


def test_analyze_scores_the_token_ids_of_a_file(tmp_path, monkeypatch):
    rows = [json.dumps(dict(step=1, prompt_ids=prompt, ids=ids)) for prompt, ids in PROFILED]
    (tmp_path / "some.jsonl").write_text("\n".join([*rows, '{"step": 9, "id']))
    flags = "--completions", tmp_path / "some.jsonl", "--problems", 3, "--device", "cpu"
    found, _ = drawn(monkeypatch, tmp_path, "--model", saved_model(tmp_path / "a"), *flags)
    model, one = bupo.load_model(str(tmp_path / "a"))[0], found["models"][0]["measures"]
    ours = analyze.profile(model, PROFILED[-3:], 99)["measures"]  # of the newest
    assert one["policy"]["mean"] == pytest.approx(ours["policy"]["mean"], abs=1e-5)


@pytest.mark.parametrize("color", ["entropy", "prob", "rank", "kl"])
def test_analyze_lens_shows_what_each_layer_says(color, tmp_path, monkeypatch):
    prompt, ids = random_sequences([(5, 30)])[0]
    line = json.dumps(dict(step=0, prompt_ids=prompt, ids=ids))
    (tmp_path / "one.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    folders = [saved_model(tmp_path / "a"), saved_model(tmp_path / "b", layers=20)]
    flags = "--completions", tmp_path / "one.jsonl", "--nth", 2, "--color", color
    found, figure = drawn(monkeypatch, tmp_path, "--lens", "--model", *folders, *flags)
    frames = [len(axis.patches) for axis in figure.axes[:-1]]  # but the color bar
    assert len(frames) == 2 * 3  # 30 tokens in bands of at most 13
    for m, (one, folder) in enumerate(zip(found["models"], folders, strict=True)):
        model, tokenizer = bupo.load_model(str(folder))
        naive, policies = naive_measures(model, prompt, ids)
        assert (one["ids"], [r["layer"] for r in one["rows"]]) == (ids, [*range(len(policies))])
        for k, (row, logps) in enumerate(zip(one["rows"], policies, strict=True)):
            assert row["rank"] == (1 + (logps > -naive["nll", k][:, None]).sum(-1)).tolist()
            assert row["top_ids"] == logps.topk(5).indices.tolist()
            assert row["top"][7] == [tokenizer.decode([i]) for i in row["top_ids"][7]]
            assert row["prob"] == pytest.approx((-naive["nll", k]).exp().tolist(), abs=1e-5)
            assert row["entropy"] == pytest.approx(naive["policy", k].tolist(), abs=1e-4)
            assert row["kl"] == pytest.approx(naive["kl", k].tolist(), abs=1e-4)
        shown = [r["top_ids"] for r in one["rows"][:: -2 if len(policies) > 17 else 1]]
        assert sum(frames[m::2]) == sum(row[i][0] == ids[i] for row in shown for i in range(30))


def test_analyze_lens_shows_spaces_and_escapes_what_the_font_lacks(recwarn, tmp_path, monkeypatch):
    assert analyze.cell_text(" a\n\t", 1) == "\u00b7a\u21b5\u21e5"
    assert analyze.cell_text("\u65e5\U0001f600\x00", 9) == "\\u65e5\\U0001f600\\x00"
    assert analyze.cell_text("abcdefghij", 0.34) == "abcd\u2026"
    flags = "--model", saved_model(tmp_path / "a"), "--text", "7 + \u65e5 $x_1$ <eos>"
    found, _ = drawn(monkeypatch, tmp_path, "--lens", *flags)
    assert "".join(found["models"][0]["next"])[:3] == " + "
    assert not [w for w in recwarn if "lyph" in str(w.message)]


def fabricated_run(folder, seed=0, steps=4, **changes):
    folder.mkdir()
    asked = dict(model="tiny", seed=seed, steps=steps, max_new_tokens=5, internal_steps=2) | changes
    config = bupo.configure(**asked, dataset="arithmetic", eval_dataset="arithmetic")
    (folder / "config.json").write_text(json.dumps(vars(config), default=str))
    lines = [dict(step=0, eval_avg=0.25, eval_se=0.05, eval_k=2, eval_pass=[0.2, 0.3])]
    for step in range(1, steps + 1):
        layer = 3 if step <= config.internal_steps else 4
        lines.append(dict(step=step, layer=layer, reward=0.1 * step + 0.2 * seed, entropy=1.0))
        lines[-1] |= dict(completion_tokens=10.0 * step, layer_entropy=None)
    lines.append(dict(lines[0], step=steps, eval_avg=0.5 + 0.1 * seed, eval_pass=[0.4, 0.6]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_analyze_draws_runs_with_seeds_as_one(tmp_path, capsys, monkeypatch):
    runs = [fabricated_run(tmp_path / "s0"), fabricated_run(tmp_path / "s1", seed=1, steps=5)]
    with open(tmp_path / "s1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "layer": 4, "rew')  # the run is writing
    runs.append(fabricated_run(tmp_path / "grpo", internal_steps=0))
    found, figure = drawn(monkeypatch, tmp_path, "--runs", *runs)
    both, grpo = found["settings"]
    assert both["label"].startswith("BuPO, layer 3 for 2 steps: ")
    assert grpo["label"].startswith("GRPO: ")
    assert both["curves"]["reward"]["mean"] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert both["curves"]["eval_avg"] == dict(step=[0], mean=[0.25], se=[0.0])  # of both alone
    assert grpo["curves"]["eval_avg"] == dict(step=[0, 4], mean=[0.25, 0.5], se=[0.05, 0.05])
    assert grpo["curves"]["eval_pass"] == dict(step=[1, 2], mean=[0.4, 0.6], se=[None, None])
    assert "held-out accuracy 50.0% (standard error 5.0%)" in capsys.readouterr().out
    means = [one["curves"]["reward"]["mean"] for one in (both, grpo)]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines[:2]] == means


@pytest.mark.parametrize(
    ("saved", "seen", "phase"), [((2, 3, 10), [0, 2, 10], 2), ((1,), [0, 1], 2), ((4,), [0, 4], 0)]
)
def test_analyze_follows_a_run(saved, seen, phase, tmp_path, monkeypatch):
    start = saved_model(tmp_path / "start")
    run = fabricated_run(tmp_path / "run", model=start, internal_steps=phase)
    for step in saved:  # 2 is the start itself, the others are another model
        saved_model(f"{run}/checkpoint-{step}", rms_norm_eps=1e-6 if step == 2 else 0.5)
    found, figure = drawn(monkeypatch, tmp_path, "--overview", run, "--problems", 3)
    assert [point["step"] for point in found["points"]] == seen
    assert ("GRPO" in figure.axes[1].get_title("left")) == (not phase)
    arguments = "--layers-over-training", run, "--problems", 3, "--layer", 3
    found, figure = drawn(monkeypatch, tmp_path, *arguments)
    assert [point["step"] for point in found["points"]] == [0, *saved]
    measures = [point["measures"] for point in found["points"]]
    assert [one == measures[0] for one in measures[1:]] == [step == 2 for step in saved]
    assert [*figure.axes[3].lines[0].get_ydata()] == [m["nll"]["mean"][-1] for m in measures]


def test_analyze_samples_from_internal_policies_of_a_base_model(tmp_path, capsys):
    folder = str(saved_model(tmp_path / "a"))
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert analyze.main(["--model", folder, "--sample-layer", "1", "3", *FEW]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"layer {k} of 4: ") for k in (1, 3, 4)] == [3, 3, 3]
    config, model, tokenizer = analyze.load(folder, analyze.parse(FEW)[1])
    model.model.layers = model.model.layers[:3]
    problems = bupo.load_problems("arithmetic", 3)
    for _, ids in analyze.complete(config, model, tokenizer, problems):  # of pi^3, nothing else
        assert " ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model nowhere/at/all", "cannot be loaded"),
        ("--model gemma", "is not Llama-like"),
        ("--model a --completions text.jsonl", "lacks prompt_ids"),
        ("--model a --completions large.jsonl", "lacks prompt_ids"),
        ("--lens --model a --completions text.jsonl --nth 7", "lacks prompt_ids"),
        ("--lens --model a --text 7", "lacks prompt_ids"),
        ("--model a --sample-layer 5", "must be from 1 to 4"),
        ("--model a --out text.jsonl/x", "text.jsonl"),
        ("--problems 0", "--problems must be"),
        ("--layer 2", "--model has no use for --layer"),
        ("--runs run --dataset x", "--runs has no use for --dataset"),
        ("--runs run run/../run", "one setting, one seed"),
        ("--overview run", "keeps no checkpoint"),
    ],
)
def test_analyze_says_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved_model(tmp_path / "a")
    saved_model(tmp_path / "gemma", "Gemma2")
    fabricated_run(tmp_path / "run")
    (tmp_path / "text.jsonl").write_text('{"step": 0, "completion": "1+1"}\n')
    (tmp_path / "large.jsonl").write_text('{"step": 0, "prompt_ids": [1], "ids": [2, 1000]}\n')
    assert analyze.main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("analyze.py: ")
    assert sentence in said
    assert (said.count("\n"), [*tmp_path.glob("*.png")]) == (1, [])
