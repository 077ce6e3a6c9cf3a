"""The proof: one test or more for each equation of the method and each promise of the README.

python -m pytest -q test_bupo.py
"""

import errno
import gzip
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test may wait for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more do not help models as small as these

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file
from torch import Tensor

import analyze
import bupo

torch.set_num_threads(1)

PAPER_FILES = (
    Path(__file__).resolve().parent.parent / "shared" / "data"
)  # the paper's problems, where somebody has put them


def small_model(family: str = "Qwen3", layers: int = 4, **settings):
    """A random model whose logits are far from uniform; two query heads share keys and values."""
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    ends = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None, max_position_embeddings=256)
    config = getattr(transformers, f"{family}Config")(**{**shape, **heads, **ends, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:  # with weights of 1, to norm twice would be to norm once
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def random_sequences(lengths, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of the given lengths."""
    rng = random.Random(seed)
    return [tuple([rng.randrange(2, 50) for _ in range(n)] for n in pair) for pair in lengths]


def gradients(model) -> dict[str, Tensor]:
    """The gradients of those parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
    model, ran, found = small_model(family, tie_word_embeddings=tied), [], []
    full = model(IDS, output_hidden_states=True)
    for i, block in enumerate(model.model.layers, start=1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for layer, expected in enumerate(full.hidden_states):
        ran.clear()
        hidden = bupo.internal_hidden(model, IDS, layer)
        assert ran == list(range(1, layer + 1))  # blocks 1..l only
        normed = bupo.policy_logits(model, hidden)
        assert torch.equal(bupo.policy_logits(model, hidden, norm=False), model.lm_head(hidden))
        if layer == 4:
            assert torch.equal(normed, full.logits)  # hidden_states[4] is normed already
        else:
            assert torch.equal(hidden, expected)
            assert torch.equal(normed, model.lm_head(model.model.norm(hidden)))
    for hidden in (bupo.internal_hidden(model, IDS, 2), full.hidden_states[2]):
        model.zero_grad()
        bupo.policy_logits(model, hidden).log_softmax(-1)[..., 3].sum().backward()
        found.append(gradients(model))
    assert_near(*found, tolerance=0)
    assert not any(name.startswith(UPPER) for name in found[0])  # Eq. 14 and 15
    below = {"model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert below <= found[0].keys()


@every_family
def test_residual_stream_is_what_the_modules_read_and_write(family, tied):
    model, seen = small_model(family, tie_word_embeddings=tied), {}

    def remember(module, inputs, options, output):
        written = output[0] if isinstance(output, tuple) else output
        seen[module] = inputs[0] if inputs else options["hidden_states"], written

    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        theirs, stream = dict(seen), list(bupo.residual_stream(model, IDS))
    for block, state, (hidden, *ours) in zip(model.model.layers, states, stream, strict=False):
        expected = *theirs[block.self_attn], *theirs[block.mlp]  # LN(H), A, LN(H + A), F
        for a, b in zip((hidden, *ours), (state, *expected), strict=True):
            torch.testing.assert_close(a, b)
    assert len(stream) == 4


# Log-probabilities and entropies (Eq. 7) ==========================================================

SEQUENCES = random_sequences([(3, 5), (6, 2), (2, 9), (4, 1), (5, 7)])


def naive_logps(model, prompt, completion, layer, norm, temperature) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from one unpadded sequence and its full logits."""
    ids = torch.tensor([prompt + completion])
    hidden = model(ids, output_hidden_states=True).hidden_states[layer]
    if norm and layer < 4:
        hidden = model.model.norm(hidden)  # the last hidden state is normed already
    logits = model.lm_head(hidden)[0].float() / temperature
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # (T, V)
    chosen = logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]
    return chosen, -(logps.exp() * logps).sum(-1).detach()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_chunked_logps_and_entropies_equal_the_naive_ones_with_gradients(layer, norm, monkeypatch):
    model, sizes, found = small_model(), [], []
    monkeypatch.setattr(bupo, "HEAD_TOKENS", 4)
    naive = [naive_logps(model, *pair, layer, norm, 0.7) for pair in SEQUENCES]
    expected, entropy = (torch.cat(values) for values in zip(*naive, strict=True))
    model.lm_head.register_forward_hook(lambda m, i, o: sizes.append(o[..., 0].numel()))
    ids, mask = bupo.pad(SEQUENCES, "cpu")
    for recompute in (False, True):
        settings = dict(entropy=True, recompute=recompute)
        logps, entropies = bupo.token_logps(model, ids, mask, layer, norm, 0.7, **settings)
        torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropies, entropy)
        for values in (logps, expected):
            model.zero_grad()
            weighted = torch.linspace(-1, 1, len(values)) * values
            weighted.sum().backward(retain_graph=True)
            found.append(gradients(model))
        assert_near(*found[-2:])
    assert max(sizes) == 4  # of how many tokens logits exist at a time
    assert sum(sizes[:6]) == 24  # completion tokens only


def test_pad_masks_by_length_even_where_tokens_look_like_padding():
    ids, mask = bupo.pad([([0, 3], [0, 0]), ([5], [0])], "cpu")
    assert ids.tolist() == [[0, 3, 0, 0], [5, 0, 0, 0]]
    assert mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_micro_batches_hold_every_sequence_once_within_the_budget():
    rng = random.Random(0)
    sequences = random_sequences([(rng.randint(1, 39), rng.randint(0, 59)) for _ in range(100)])
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    groups = bupo.micro_batches(sequences, 128)
    assert sorted(itertools.chain(*groups)) == list(range(100))
    assert all(len(group) * max(lengths[i] for i in group) <= 128 for group in groups)
    assert len(groups) < 60  # so they are filled
    assert bupo.micro_batches(random_sequences([(300, 200), (1, 2)]), 128) == [(1,), (0,)]


# Entropy change and boundary layer (Eq. 8, 13) ====================================================


def test_ffn_entropy_change_equals_a_direct_computation_for_any_batching(monkeypatch):
    model, changes, rows = small_model(), [], {}
    for micro_batch_tokens, head_tokens in ((9, 3), (99, 99)):
        monkeypatch.setattr(bupo, "HEAD_TOKENS", head_tokens)
        changes.append(bupo.ffn_entropy_change(model, SEQUENCES, micro_batch_tokens))
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, inputs, o, i=i: rows.update({i: (inputs[0], o)}))
    expected, tokens = [0.0] * 4, sum(len(completion) for _, completion in SEQUENCES)
    for prompt, completion in SEQUENCES:
        model(torch.tensor([prompt + completion]))
        for i, sign in itertools.product(range(4), (0, 1)):  # what the FFN reads, what it writes
            hidden = rows[i][sign][0, len(prompt) - 1 : -1]
            logps = model.lm_head(hidden).log_softmax(-1).detach()
            expected[i] -= (2 * sign - 1) * (logps.exp() * logps).sum().item() / tokens
    for change in changes:
        assert change == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        ([1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.02, -0.1, 0.0, -0.5], 6),  # explores low, like Qwen3
        ([0.5] * 26 + [-0.2, -3.0], 26),  # explores almost to the top, like Llama
        ([-0.4, 0.9, 0.7, 0.05, -0.1], 3),  # the first layer does not explore yet
        ([-1.0, -2.0, -3.0], 3),  # no layer explores: pi itself
        ([0.0, -2.0, -3.0], 3),  # nor does one that changes nothing
        ([0.9, 0.8, -0.2, 0.5, -0.1], 2),  # what explores again above is another region
        ([0.04, 0.03, 0.001, -0.2], 2),  # clearly positive: next to the largest, not in nats
    ],
)
def test_boundary_layer(change, layer):
    assert bupo.boundary_layer(change) == layer


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


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.5, 2.0, 2.4, 0.0),  # gained enough: clipped at 1.2 A, no gradient
        (0.5, 2.0, 1.0, 1.0),  # lost although good: the gradient stays
        (1.5, -2.0, -3.0, -3.0),  # gained although bad: the gradient stays
        (0.5, -2.0, -1.6, 0.0),  # lost enough: clipped at 0.8 A
        (1.0, 2.0, 2.0, 2.0),  # at rho = 1 the gradient is the policy gradient, A grad log pi
    ],
)
def test_clipped_surrogate(ratio, advantage, expected, slope):
    logps = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    surrogate = bupo.clipped_surrogate(logps, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(expected)
    assert logps.grad.item() == pytest.approx(slope)


def test_the_phase_switches_after_exactly_internal_steps():
    assert [bupo.optimized_layer(step, 3, 6, 28) for step in range(1, 6)] == [6, 6, 6, 28, 28]
    assert bupo.optimized_layer(1, 0, 6, 28) == 28  # plain GRPO


def update_settings(**changes) -> bupo.Config:
    sizes = dict(prompts_per_step=4, group_size=2, mini_batch=2, gradient_checkpointing=False)
    return bupo.Config(**{**sizes, **changes})


class Spy:
    """An optimizer that keeps the gradients; in its first `moves` steps weights follow them."""

    def __init__(self, model, moves: int = 0):
        self.model, self.moves, self.seen = model, moves, []

    @torch.no_grad()
    def step(self, lr: float) -> float:
        self.seen.append(gradients(self.model))
        for weight in self.model.parameters():
            if weight.grad is not None and len(self.seen) <= self.moves:
                weight -= lr * weight.grad
        self.model.zero_grad()
        return 1.0


ROLLOUT = random_sequences([(3, 5), (3, 2), (6, 9), (6, 1), (5, 7), (5, 3), (2, 4), (2, 12)])
TOKENS = [len(completion) for _, completion in ROLLOUT]
ADVANTAGES = torch.tensor([0.7, -0.7, 0.0, 0.0, 0.7, -0.7, -0.7, 0.7])


@pytest.mark.parametrize(("norm", "temperature"), [("final", 1.0), ("none", 0.7)])
@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("layer", [2, 4])
def test_the_update_is_the_gradient_of_the_formula(layer, average, norm, temperature):
    """Completions without advantage count in the mean and in pi^l's entropy, but not in passes."""
    model, loss, embedded, entered = small_model(), 0.0, [], []
    naive = [naive_logps(model, *p, layer, norm == "final", temperature) for p in ROLLOUT]
    for (logps, _), advantage in zip(naive, ADVANTAGES.tolist(), strict=True):
        weight = 1 / sum(TOKENS) if average == "token" else 1 / (8 * len(logps))
        loss = loss - weight * (logps - logps.detach()).exp().sum() * advantage  # rho = 1
    loss.backward()
    expected, entropy = gradients(model), torch.cat([e for _, e in naive]).mean().item()
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: embedded.append(i[0].numel()))
    model.model.layers[0].register_forward_pre_hook(lambda *_: entered.append(1))
    settings = dict(loss_average=average, internal_norm=norm, temperature=temperature, mini_batch=4)
    for tokens, recompute in ((1, False), (30, True), (1000, False)):
        model.zero_grad()
        changes = dict(micro_batch_tokens=tokens, gradient_checkpointing=recompute)
        spy, config = Spy(model), update_settings(**settings, **changes)
        metrics = bupo.update(model, spy, ROLLOUT, ADVANTAGES, layer, 0.0, config)
        (found,) = spy.seen
        assert_near(found, expected)
        assert metrics["ratio_max"] == 1.0  # exactly: it is the first mini-batch
        assert layer == 4 or metrics["layer_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert tokens > 1 or len(embedded) == (6 if layer == 4 else 8)
        assert max(embedded) <= max(tokens, 15)  # or one sequence, of at most 15 tokens
        assert (len(entered) > len(embedded)) == recompute
        embedded.clear()
        entered.clear()


@pytest.mark.parametrize("clip", [0.2, 0.01])
@pytest.mark.parametrize("layer", [2, 4])
def test_the_second_mini_batch_is_clipped_against_the_policy_before_the_first(layer, clip):
    model = small_model()
    before = [naive_logps(model, *pair, layer, True, 1.0)[0].detach() for pair in ROLLOUT]
    spy = Spy(model, moves=1)  # after which the model stays as the second gradient was taken of it
    config = update_settings(clip=clip)
    metrics = bupo.update(model, spy, ROLLOUT, ADVANTAGES, layer, 0.3, config)
    loss, clipped = 0.0, 0
    for i in range(4, 8):
        ratio = (naive_logps(model, *ROLLOUT[i], layer, True, 1.0)[0] - before[i]).exp()
        plain, bounded = ratio * ADVANTAGES[i], ratio.clamp(1 - clip, 1 + clip) * ADVANTAGES[i]
        loss = loss - torch.minimum(plain, bounded).sum() / sum(TOKENS[4:])
        clipped += int((bounded < plain).sum())
    loss.backward()
    assert 0 < clipped < sum(TOKENS[4:])
    run = sum(TOKENS[:2] + TOKENS[4:])  # 2 and 3 have no advantage
    assert metrics["clip_fraction"] == pytest.approx(clipped / run)
    assert len(spy.seen) == 2
    assert_near(spy.seen[1], gradients(model), tolerance=1e-3)


# The masters ======================================================================================

every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def masters_of(model, dtype=torch.float32) -> bupo.MasterAdamW:
    return bupo.MasterAdamW(model, torch.device("cpu"), dtype, "auto")


def copies(weights) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_float32_an_update_is_one_of_adamw_on_the_model_itself_bit_for_bit():
    """With the paper's settings; and a weight is its own master."""
    model, twin, paper = small_model(), small_model(), dict(betas=(0.9, 0.999), eps=1e-8)
    optimizer, weights = masters_of(model), list(twin.parameters())
    adam = torch.optim.AdamW(weights, weight_decay=0.01, fused=True, **paper)
    for layer, lr in ((2, 1e-3), (2, 1e-3), (4, 5e-4)):
        config, spy = update_settings(mini_batch=4), Spy(twin)
        metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, layer, lr, config)
        bupo.update(twin, spy, ROLLOUT, ADVANTAGES, layer, lr, config)
        for name, weight in twin.named_parameters():
            weight.grad = spy.seen[0].get(name)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        assert metrics["grad_norm"] == norm > 1  # so that clipping matters
        adam.param_groups[0]["lr"] = lr
        adam.step()
        adam.zero_grad()
        assert all_equal(model.parameters(), twin.parameters())
    assert all(a is b for a, b in zip(optimizer.masters, optimizer.weights, strict=True))


def test_bfloat16_weights_follow_float32_masters_at_the_papers_learning_rate():
    """bfloat16 weights alone would stay where they are at 1e-6."""
    model = small_model(initializer_range=0.02, tie_word_embeddings=True)
    optimizer = masters_of(model, torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    for _ in range(3):
        before, config = copies(optimizer.masters), update_settings(mini_batch=4)
        metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-6, config)
        assert metrics["ratio_max"] == 1.0
        for weight, master, old in zip(optimizer.weights, optimizer.masters, before, strict=True):
            assert master.dtype == torch.float32
            assert (master != old).float().mean() > 0.9
            assert (master - old).abs().max() < 2e-6
            assert torch.equal(weight, master.bfloat16())


@every_precision
def test_phase_1_moves_what_is_below_the_layer_and_nothing_above(dtype):
    model, config, grads = small_model(tie_word_embeddings=False), update_settings(), []
    optimizer = masters_of(model, dtype)
    names = [name for name, _ in model.named_parameters()]
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)  # so there is momentum
    before, step = copies(optimizer.masters), optimizer.adam.step
    optimizer.adam.step = lambda: step() or grads.append([m.grad for m in optimizer.masters])
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 2, 1e-2, config)
    assert len(grads) == 2
    for i, (name, master) in enumerate(zip(names, optimizer.masters, strict=True)):
        above = name.startswith(UPPER)
        assert torch.equal(master, before[i]) == above, name
        assert torch.equal(optimizer.weights[i], master.to(dtype)), name
        assert all((seen[i] is None) == above for seen in grads), name


def test_gradients_reach_the_masters_in_float32_summed_over_micro_batches():
    """Those of tied embeddings, which a pass reads twice, once; none stays on the model."""
    model, expected = small_model(tie_word_embeddings=True), []
    optimizer = masters_of(model, torch.bfloat16)
    for pair in SEQUENCES[:3]:
        loss = bupo.token_logps(model, *bupo.pad([pair], "cpu"), 4)[0].sum()
        grads = torch.autograd.grad(loss, optimizer.weights, retain_graph=True)
        expected.append([grad.float() for grad in grads])
        loss.backward()
        assert all(weight.grad is None for weight in optimizer.weights)
    for master, first, second, third in zip(optimizer.masters, *expected, strict=True):
        assert master.grad.dtype == torch.float32
        assert torch.equal(master.grad, first + second + third)


@every_precision
def test_a_step_without_advantage_or_with_a_gradient_that_is_not_finite_moves_nothing(dtype):
    model, config = small_model(), update_settings()
    optimizer = masters_of(model, dtype)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)  # so there is momentum
    before = copies(optimizer.masters)
    for advantages in (torch.zeros(8), ADVANTAGES * math.inf):
        bupo.update(model, optimizer, ROLLOUT, advantages, 4, 1e-2, config)
        assert all_equal(optimizer.masters, before)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)
    assert all(master.isfinite().all() for master in optimizer.masters)
    assert not torch.equal(optimizer.masters[0], before[0])  # the next step counts again


@pytest.mark.parametrize("family", ["Qwen3", "Starcoder2"])  # the latter has it as a function
def test_dropout_is_never_active(family):
    """rho would be a matter of chance."""
    found = []
    for chance in (0.0, 0.5):
        model = small_model(family, attention_dropout=chance)
        model.config.residual_dropout = chance
        for block in model.model.layers if family == "Starcoder2" else ():
            block.self_attn.residual_dropout = block.mlp.residual_dropout = chance
        completions, spy = bupo.sample(model.train(), PROMPTS, 9, {1}, temperature=0), Spy(model)
        bupo.update(model.train(), spy, ROLLOUT, ADVANTAGES, 4, 0.0, update_settings())
        found.append((completions, spy.seen[0]))
    assert found[0][0] == found[1][0]
    assert_near(found[0][1], found[1][1], tolerance=0)


# Rollouts =========================================================================================

PROMPT_LENGTHS = [(n, 0) for n in (3, 11, 1, 7, 2, 9, 5, 4, 6, 8, 3)]
PROMPTS = [prompt for prompt, _ in random_sequences(PROMPT_LENGTHS, seed=4)]


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers renames arguments
@every_family
def test_greedy_samples_equal_generate_with_more_prompts_than_rows(family, tied):
    model, shapes = small_model(family, tie_word_embeddings=tied), []
    hook = model.model.layers[0].register_forward_hook(lambda m, i, o: shapes.append(o.shape[:2]))
    completions = bupo.sample(model, PROMPTS, 25, {1, 7, 9, 30}, temperature=0, rows=4)
    hook.remove()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        settings = dict(max_new_tokens=25, do_sample=False, eos_token_id=[1, 7, 9, 30])
        expected = model.generate(torch.tensor([prompt]), **settings, pad_token_id=0)
        assert completion.ids == expected[0, len(prompt) :].tolist()
        assert completion.ended == (completion.ids[-1] in (1, 7, 9, 30))
        assert completion.ended or len(completion.ids) == 25
    decoded = [rows for rows, tokens in shapes if tokens == 1]
    tokens = sum(len(c.ids) - 1 for c in completions)  # each row leaves as it finishes
    assert tokens <= sum(decoded) <= tokens + 1  # one prompt is a token long
    assert max(decoded) == 4
    assert len({len(c.ids) for c in completions}) > 3


@pytest.mark.parametrize("rows", [1, 3, 16, 100])  # at 16, two prompts enter while others run
def test_returned_logps_and_entropies_equal_a_teacher_forced_pass(rows):
    model, prompts = small_model(), [prompt for prompt in PROMPTS for _ in range(3)]  # groups
    state = torch.get_rng_state()
    completions = bupo.sample(model, prompts, 12, {1}, 0.8, rows, stream(3))
    for prompt, completion in zip(prompts, completions, strict=True):
        logps, entropies = naive_logps(model, prompt, completion.ids, 4, True, 0.8)
        assert completion.logps == pytest.approx(logps.tolist(), abs=1e-4)
        assert completion.entropies == pytest.approx(entropies.tolist(), abs=1e-4)
        assert 1 not in completion.ids[:-1]
    again = (bupo.sample(model, prompts, 12, {1}, 0.8, rows, stream(seed)) for seed in (3, 4))
    assert [other == completions for other in again] == [True, False]
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
    prompt, n = [4, 2, 6], 8000
    completions = bupo.sample(model, [prompt] * n, 2, {1}, 1.3, n, stream(0))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, token] for token in range(20)])).logits
    first, second = ((logits[:, i] / 1.3).softmax(-1).tolist() for i in (2, 3))
    expected = {(1,): n * first[0][1]}
    for a, b in itertools.product({*range(20)} - {1}, range(20)):
        expected[a, b] = n * first[0][a] * second[a][b]
    observed = dict.fromkeys(expected, 0)
    for completion in completions:
        observed[tuple(completion.ids)] += 1
    assert min(expected.values()) > 5  # as chi-square needs
    chi_square = sum((observed[key] - e) ** 2 / e for key, e in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_every_end_token_counts():
    """The model's, the tokenizer's, and what the chat template ends an assistant's turn with."""
    model, tokenizer = bupo.load_model("tiny")
    eos, user = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    turns = "{% for m in messages %}<|assistant|>{{ m.content }}<|user|>\n{% endfor %}"
    no_turn = "<|user|>{{ messages[0].content }}<|assistant|>"
    for template, of_model, ends in [
        (tokenizer.chat_template, [7, 9], {7, 9, eos}),
        (None, None, {eos}),
        (turns, 7, {7, eos, user}),
        (no_turn, 7, {7, eos}),
    ]:
        tokenizer.chat_template, model.generation_config.eos_token_id = template, of_model
        assert bupo.end_tokens(model, tokenizer) == ends


def test_as_many_rows_are_decoded_as_fit_or_as_the_flag_says(monkeypatch):
    model, config = small_model(), update_settings(max_new_tokens=100)
    few, more = (bupo.rollout_rows(model, longest, config) for longest in (200, 20))
    assert 1 < few < more
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**9, 10**10))
    row = 2 * 4 * 2 * 8 * 120 * 4  # keys and values, blocks, heads, size, columns, bytes
    assert 0.1 < bupo.rollout_rows(model, 20, config) * row / 10**9 < 0.95
    config.rollout_rows = "7"
    assert bupo.rollout_rows(model, 20, config) == 7


# Problems =========================================================================================


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
        ({"question": "u", "answer": 42.0}, "42"),
        ({"question": "u", "final_answer": ["42"]}, "42"),
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
    assert "question: question, answer: answer; dropped: 12 " in capsys.readouterr().out
    proof = dict(problem="Prove that 2m + 2n is even.", solution="It is 2(m + n).")
    with pytest.raises(bupo.UsageError, match=r"no usable row .*dropped: 1 "):
        bupo.load_problems(write_rows(tmp_path / "proof.jsonl", [proof]))


def test_files_of_every_kind_are_read_and_a_type_may_change_late(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # whose cache may be full or read-only
    rows = [dict(question="a", answer=i) for i in range(10001)] + [dict(question="b", answer="x")]
    table = "\n".join(["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)])
    (tmp_path / "x.csv").write_text(table)
    (tmp_path / "x.tsv").write_text(table.replace(",", "\t"))
    text = Path(write_rows(tmp_path / "x.jsonl", rows)).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    texts = pyarrow.Table.from_pylist([dict(row, answer=str(row["answer"])) for row in rows])
    pyarrow.parquet.write_table(texts, tmp_path / "x.parquet")
    for file in list(tmp_path.iterdir()):
        for source in (str(file), file.as_uri()):  # a URL
            found = bupo.load_problems(source, system="")
            assert [len(found), found[-2].answer, found[-1].answer] == [10002, "10000", "x"]
            assert found[-1].messages == [dict(role="user", content="b")]


def test_data_sets_of_the_hub_by_split_and_configuration(monkeypatch):
    asked, rows = [], datasets.Dataset.from_list([dict(question="u", answer="1")])

    def load_dataset(*names, split=None):
        asked.append((*names, split))
        return rows if split else datasets.DatasetDict(test=rows.select([]), train=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("a/b", "a/b:test", "a/b:main:test"):
        assert bupo.load_problems(source, system="") == [bupo.Problem(CHAT[1:], "1")]
    assert asked == [("a/b", None), ("a/b", "test"), ("a/b", "main", "test")]


def test_the_arithmetic_task_is_right_fits_and_keeps_its_held_out_problems_apart():
    training, held_out = bupo.arithmetic(False), bupo.arithmetic(True)
    both, (_, tokenizer) = {**training, **held_out}, bupo.load_model("tiny")
    assert len(both) == len(training) + len(held_out)
    assert 0.1 < len(held_out) / len(both) < 0.15
    for question, solution in both.items():
        assert bupo.extract_boxed(solution) == str(eval(question))
        lines = re.findall(r"([\d+-]+)=(\d+)", solution)
        assert all(eval(left) == int(right) for left, right in lines)
    longest = tokenizer(max(both.values(), key=len)).input_ids
    assert len(longest) + 1 <= bupo.TINY["max_new_tokens"]
    (problem,) = bupo.load_problems("arithmetic-heldout", limit=1)
    assert bupo.extract_boxed(held_out[problem.messages[0]["content"]]) == problem.answer


# Evaluation =======================================================================================


def test_pass_at_k_equals_brute_force():
    for n, c in [(5, 0), (5, 2), (5, 5), (6, 3)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert bupo.pass_at_k(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_evaluate_counts_rightly_and_draws_from_its_own_stream(monkeypatch):
    (model, tokenizer), state = bupo.load_model("tiny"), torch.get_rng_state()
    problems, config = bupo.load_problems("arithmetic-heldout", 3), bupo.configure(max_new_tokens=5)
    results = iter(([1.0, 0.0, 0.0, 0.0] + [1.0] * 4 + [0.0] * 4) * 2)
    monkeypatch.setattr(bupo, "math_reward", lambda text, answer: next(results))
    metrics, samples = bupo.evaluate(model, tokenizer, problems, config)
    error = torch.tensor([0.25, 1.0, 0.0]).std().item() / math.sqrt(3)
    assert (metrics["eval_avg"], metrics["eval_se"]) == pytest.approx((5 / 12, error))
    assert metrics["eval_pass"] == pytest.approx([5 / 12, (1 / 2 + 1) / 3, (3 / 4 + 1) / 3, 2 / 3])
    assert bupo.evaluate(model, tokenizer, problems, config) == (metrics, samples)
    assert torch.equal(torch.get_rng_state(), state)


# Models ===========================================================================================


def saved_model(folder: Path, family: str = "Llama", **settings) -> Path:
    """A random model of any family, with the built-in tokenizer, as a folder for `--model`."""
    shape = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1)
    config = getattr(transformers, f"{family}Config")(**{**shape, **heads, **ends, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    bupo.load_model("tiny")[1].save_pretrained(folder)
    return folder


def edit(file: Path, **changes) -> None:
    """Change some of the settings in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


TEXT = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
VISION = dict(TEXT, num_attention_heads=2, image_size=28, patch_size=14)
OTHERS = [(family, {}) for family in ("Gemma2", "GPT2", "Olmo2", "Cohere")]
OTHERS += [("Granite", dict(residual_multiplier=0.5))]
OTHERS += [("Gemma3", dict(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4))]


@pytest.mark.parametrize(("family", "settings"), OTHERS)
def test_models_that_are_not_llama_like_are_refused(family, settings, tmp_path):
    folder = saved_model(tmp_path / "m", family, **settings)
    with pytest.raises(bupo.UsageError, match=f"{family}.*(not Llama-like|does not support)"):
        bupo.load_model(str(folder))


LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8)
LATENT |= dict(v_head_dim=8, num_key_value_heads=4)  # keys and values of different sizes


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama", "Mistral", "Starcoder2", "Youtu"])
def test_llama_like_models_are_sampled_from_what_is_scored(family, tmp_path):
    folder = saved_model(tmp_path / "m", family, **(LATENT if family == "Youtu" else {}))
    edit(folder / "config.json", _attn_implementation="eager", dtype="bfloat16")
    model, _ = bupo.load_model(str(folder))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}  # whatever it says
    prompts, config = [[5, 6, 7], [8]] * 3, update_settings()
    completions = bupo.sample(model, prompts, 9, {1}, 1.0, 4, stream(0))
    sequences = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
    assert bupo.sampling_error(model, sequences, completions, config) < 1e-5
    other = update_settings(temperature=0.5)  # than was sampled at
    assert bupo.sampling_error(model, sequences, completions, other) > 0.05


UP = "model.layers.1.mlp.up_proj.weight"
OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
CODE = "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model"


def change(folder: Path, edit_weights) -> None:
    weights = load_file(folder / "model.safetensors")
    edit_weights(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: change(f, lambda w: w.pop(UP)), f"lacks 1 of its weights, such as {UP}"),
        (lambda f: change(f, lambda w: w[UP][0].fill_(math.nan)), f"{UP} is not finite"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "LoRA adapter"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),  # a pickle is left
        (lambda f: edit(f / "config.json", model_type="own", auto_map=OWN), "cannot be loaded"),
    ],
)
def test_damaged_and_unsafe_models_are_refused(damage, sentence, tmp_path, monkeypatch):
    folder, asked = saved_model(tmp_path / "m"), []
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n{CODE}\n")
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    damage(folder)
    with pytest.raises(bupo.UsageError, match=re.escape(sentence)):
        bupo.load_model(str(folder))
    assert not asked
    assert not (folder / "ran").exists()


def test_prompts_with_templates_of_every_kind():
    _, tokenizer = bupo.load_model("tiny")
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}<|assistant|>"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + users
    processor = bupo.tokenizers.processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
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


# The command line =================================================================================

SHORT = dict(pretrain_steps=1, prompts_per_step=4, group_size=2, mini_batch=2, internal_steps=1)
SHORT |= dict(eval_problems=4, eval_k=2, max_new_tokens=12)


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def flags(**settings) -> list[str]:
    return [
        text
        for name, value in settings.items()
        for text in ("--" + name.replace("_", "-"), str(value))
    ]


def run(out: Path, code: int = 0, **settings) -> Path:
    """A run from the command line, which must end with the given exit code."""
    assert bupo.main(flags(out=out, **settings)) == code
    return out


def resume(out: Path, code: int = 0, **settings) -> None:
    assert bupo.main(flags(resume=out, **settings)) == code


@pytest.fixture(scope="module")
def guessing(tmp_path_factory) -> dict:
    """Settings of a run from a model that boxes any digit, so that each step has some signal."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("guessing"), bupo.load_model("tiny")
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9) if a + b < 10]
    file = write_rows(
        folder / "x.jsonl", [dict(question=f"{a}+{b}", answer=a + b) for a, b in sums]
    )
    prompts = [bupo.encode(tokenizer, p) for p in bupo.load_problems(file, system="")[::4]]
    ends = [[*tokenizer(rf"\boxed{{{i}}}").input_ids, tokenizer.eos_token_id] for i in range(1, 10)]
    batch = bupo.pad(list(itertools.product(prompts, ends)), "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        (-bupo.token_logps(model, *batch, 6)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "m")
    sizes = dict(prompts_per_step=8, group_size=8, mini_batch=4, internal_steps=2)
    short = dict(eval_problems=4, eval_k=2, max_new_tokens=12)
    data = dict(model=folder / "m", preset="tiny", dataset=file, eval_dataset=file)
    return {**data, **sizes, **short}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a short finished run of two steps, one in each phase."""
    return run(tmp_path_factory.mktemp("run") / "a", steps=2, lr=1e-3, temperature=0.9, **SHORT)


def five_steps(guessing: dict) -> dict:
    often = dict(steps=5, save_every=1, eval_every=2, keep=0)
    return {**guessing, **often, "precision": "bfloat16"}


@pytest.fixture(scope="module")
def undisturbed(guessing, tmp_path_factory) -> Path:
    """A finished run in bfloat16, to compare disturbed ones with."""
    folder = run(tmp_path_factory.mktemp("undisturbed") / "a", **five_steps(guessing))
    steps = [line for line in lines(folder / "metrics.jsonl") if "layer" in line]
    assert all(line["grad_norm"] > 0 for line in steps)  # each step moved the weights
    return folder


def lines(file: Path) -> list[dict]:
    """The objects of a log; NaN is no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_run(a: Path, b: Path) -> None:
    """Two runs have the same weights and the same logs, but for what was measured with a clock."""
    timed = {"rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb", "seconds"}
    for file in ("metrics.jsonl", "completions.jsonl"):
        logs = [[line.items() for line in lines(folder / file)] for folder in (a, b)]
        first, second = ([[i for i in line if i[0] not in timed] for line in log] for log in logs)
        assert first == second
    for name in ("model", bupo.checkpoints(a)[-1].name):
        assert all_equal(weights_of(a / name).values(), weights_of(b / name).values())


STEP = """step layer reward entropy layer_entropy completion_tokens truncated zero_std_groups
clip_fraction ratio_max grad_norm sampling_error rollout_tokens_per_s update_tokens_per_s
peak_memory_gb seconds"""
EVALUATION = "step eval_avg eval_se eval_pass eval_k eval_problems"


def test_a_run_writes_its_settings_metrics_completions_and_model(finished):
    config, metrics = bupo.read_config(finished), lines(finished / "metrics.jsonl")
    assert (config["model"], config["preset"], config["internal_layer"]) == ("tiny", "tiny", "3")
    expected = [(0, EVALUATION), (1, STEP), (2, STEP), (2, EVALUATION)]
    found = [(line["step"], sorted(line)) for line in metrics]
    assert found == [(i, sorted(k.split())) for i, k in expected]
    first, second = metrics[1:3]
    assert (first["layer"], second["layer"]) == (3, 6)
    assert second["layer_entropy"] == second["entropy"]  # pi's in phase 2
    assert first["layer_entropy"] != first["entropy"]
    assert max(first["sampling_error"], second["sampling_error"]) < 1e-5
    assert {line["step"] for line in lines(finished / "completions.jsonl")} == {0, 2}
    assert [folder.name for folder in bupo.checkpoints(finished)] == [
        "checkpoint-0",
        "checkpoint-2",
    ]
    for folder in (finished / "model", finished / "checkpoint-2"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert "<|assistant|>" in tokenizer.chat_template
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_run_from_a_run_asks_what_that_asked(guessing, finished, tmp_path, capsys):
    for place in (finished, finished / "model", finished / "checkpoint-2"):
        config = bupo.configure(str(place), eval_k=3)
        assert (config.preset, config.temperature, config.max_new_tokens) == ("tiny", 0.9, 12)
        assert (config.lr, config.steps, config.eval_k) == (1e-4, 60, 3)
    config = bupo.configure("Qwen/Qwen3-1.7B")
    assert (config.preset, config.lr, config.system) == ("real", 1e-6, bupo.SYSTEM)
    file = Path(shutil.copy(guessing["dataset"], tmp_path / "held out.jsonl"))
    with file.open("a") as rows:
        rows.write(json.dumps(dict(question="1" * 50, answer=1)) + "\n")
    changes = dict(eval_dataset=file, system="Think.", eval_problems=99)
    a = run(tmp_path / "a b", steps=1, **{**guessing, **changes})  # fails: not quoted below
    said = capsys.readouterr().out
    assert re.search("36 of .*held out.jsonl .* 1 too long", said)
    assert re.search(r"avg@2 [\d.]+% \(standard error [\d.]+%\), pass@2 .* 36 held-out", said)
    edit(a / "config.json", model=str(a))  # trained from a run whose place it then took
    command = shlex.split(re.search(r"python bupo.py (--model .*)", said)[1])
    assert bupo.main([*command, "--out", str(tmp_path / "b")]) == 0
    for log in ("metrics.jsonl", "completions.jsonl"):
        assert lines(tmp_path / "b" / log)[-1] == {**lines(a / log)[-1], "step": 0}
    assert not (tmp_path / "b" / "model").exists()


def test_a_bfloat16_run_keeps_float32_masters_and_phase_1_leaves_their_upper_blocks(undisturbed):
    start, phase_1, masters = (weights_of(undisturbed / f"checkpoint-{i}") for i in (0, 2, 5))
    for name, rounded in weights_of(undisturbed / "model").items():
        assert torch.equal(rounded, masters[name].bfloat16())
        assert not torch.equal(masters[name], rounded.float())
        above = name.startswith(tuple(f"model.layers.{i}." for i in (3, 4, 5)))  # layer 3 of 6
        assert torch.equal(phase_1[name], start[name]) == above, name
    model, _ = bupo.load_model(str(undisturbed))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    errors = [line.get("sampling_error", 0) for line in lines(undisturbed / "metrics.jsonl")]
    assert 0 < max(errors) < 0.05


def test_a_problem_comes_once_an_epoch_and_a_step_has_its_own_draws(guessing, tmp_path):
    epochs = [bupo.problems_of_step(step, 8, 8, 0) for step in (1, 2, 3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    singles = [bupo.problems_of_step(step, 3, 1, 0)[0] for step in range(1, 9)]
    assert bupo.problems_of_step(1, 3, 8, 0) == singles
    one = write_rows(tmp_path / "one.jsonl", [dict(question="1+2", answer=3)] * 2)
    settings = dict(dataset=one, prompts_per_step=1, mini_batch=1, lr=0.0, eval_problems=0)
    a = run(tmp_path / "a", steps=3, **{**guessing, **settings})  # where only draws can differ
    assert len({line["entropy"] for line in lines(a / "metrics.jsonl")}) == 3


def test_the_rate_rises_and_a_run_says_its_layer_and_notes(tmp_path, monkeypatch, capsys):
    rates, step = [], bupo.MasterAdamW.step
    monkeypatch.setattr(bupo.MasterAdamW, "step", lambda s, lr: rates.append(lr) or step(s, lr))
    results = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(bupo, "math_reward", lambda *_: next(results))
    settings = dict(lr_warmup_steps=2, lr=1e-3, internal_layer="auto", max_new_tokens=3)
    run(tmp_path / "a", steps=3, **{**SHORT, **settings})
    assert rates == [5e-4] * 2 + [1e-3] * 4
    said = capsys.readouterr().out
    assert re.search(r"Boundary +layer [1-6]", said)
    assert "raise --max-new-tokens" in said


# Nothing lost =====================================================================================


def test_a_resumed_run_repeats_an_undisturbed_one_bit_for_bit(guessing, tmp_path):
    """Wherever its data are by then, and however many steps it was to make at first."""
    settings = dict(eval_every=2, save_every=2, **guessing)
    a, b = run(tmp_path / "a", steps=4, **settings), run(tmp_path / "b", steps=3, **settings)
    moved = str(shutil.copy(guessing["dataset"], tmp_path / "moved.jsonl"))
    resume(b, steps=4, dataset=moved, device="cpu")
    same_run(a, b)
    config, resumed = bupo.parse(flags(resume=b, lr=0.5))
    assert (config.lr, config.steps, config.dataset, resumed) == (0.5, 4, moved, True)


def test_a_run_killed_again_and_again_ends_like_another(guessing, undisturbed, tmp_path):
    out, limit = tmp_path / "b", time.monotonic() + 240
    arguments = flags(out=out, **five_steps(guessing))
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
    resume(out)
    same_run(undisturbed, out)
    assert not list(out.glob(".*"))  # what the second one left


@pytest.mark.parametrize("name", ["SIGINT", "SIGINT twice", "SIGTERM", "SIGHUP", "EPIPE", "EIO"])
def test_a_request_to_stop_or_a_terminal_that_goes_away_saves_a_checkpoint(
    name, guessing, undisturbed, tmp_path, monkeypatch, capsys
):
    out, update, save = tmp_path / "b", bupo.update, torch.save

    def stop(*_):
        os.kill(os.getpid(), getattr(signal, name.split()[0]))

    def disturbed(*arguments):
        if name in ("EPIPE", "EIO"):
            gone = OSError(getattr(errno, name), "gone")
            patch.setattr(sys.stdout.stream, "write", raising(gone))
        else:
            stop()
        if name.endswith("twice"):  # within the checkpoint
            patch.setattr(torch, "save", lambda *a: stop() or save(*a))
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bupo, "update", disturbed)
        run(out, code=130, **{**five_steps(guessing), "save_every": 9})
    assert f"resume with --resume {out}" in capsys.readouterr().err
    last = bupo.checkpoints(out)[-1].name  # a run notices that its terminal is gone as it writes
    assert last == "checkpoint-1" or (name in ("EPIPE", "EIO") and last == "checkpoint-2")
    resume(out)
    same_run(undisturbed, out)


def test_damaged_and_foreign_checkpoints_are_named(undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed, tmp_path / "a")
    before = (folder / "metrics.jsonl").read_text()
    training, model = (folder / "checkpoint-5" / n for n in ("training.pt", "model.safetensors"))
    adam = torch.load(training)["adam"]
    ran = dict(__reduce__=lambda _: (os.mkdir, (str(tmp_path / "ran"),)))  # what a pickle can do
    damages = [(model, None), (training, None), (training, {}), (training, dict(adam=adam))]
    for file, content in (*damages, (training, type("Hostile", (), ran)())):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        if content is not None:
            torch.save(content, file)
        resume(folder, code=2)
        assert "checkpoint-5" in capsys.readouterr().err
        file.write_bytes(whole)
    assert (folder / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(folder / "checkpoint-5")
    resume(folder)  # from the one before
    same_run(undisturbed, folder)


def test_only_a_checkpoint_lets_a_log_be_cut(undisturbed, finished, tmp_path, capsys):
    folder = shutil.copytree(undisturbed, tmp_path / "a")
    log = folder / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))  # shorter than it says
    resume(folder)
    assert [line["step"] for line in lines(log)] == [0, 1, 2, 5]
    for checkpoint in bupo.checkpoints(folder):
        shutil.rmtree(checkpoint)
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    resume(folder, code=2)
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()} == before
    resume(finished, code=2, steps=1)
    assert "--steps 1 is less than" in capsys.readouterr().err
    assert bupo.read_config(finished)["steps"] == 2


def test_what_a_kill_left_before_the_first_checkpoint_can_be_used(finished, tmp_path, monkeypatch):
    """An empty folder as a new one; settings alone by --resume, from the beginning."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    run("~/a", steps=0, **SHORT)
    assert (tmp_path / "a" / "metrics.jsonl").exists()
    (tmp_path / "b").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "b")
    resume("~/b")
    same_run(finished, tmp_path / "b")


def test_a_full_disk_ends_a_run_with_a_sentence_and_loses_nothing(undisturbed, tmp_path, capsys):
    resource = pytest.importorskip("resource")  # Windows has none
    folder = shutil.copytree(undisturbed, tmp_path / "full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # a checkpoint takes 1.3 MB
    try:
        resume(folder, code=2, steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"cannot be written .*resume with --resume {folder}\.$", said)
    resume(folder, steps=5)
    same_run(undisturbed, folder)


def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(tmp_path, monkeypatch, capsys):
    load_model = bupo.load_model

    def load_while_another_begins(*arguments, **settings):
        monkeypatch.setattr(bupo, "load_model", load_model)
        run(tmp_path / "a", steps=1, **SHORT)
        return load_model(*arguments, **settings)

    monkeypatch.setattr(bupo, "load_model", load_while_another_begins)
    run(tmp_path / "a", code=2, steps=1, **SHORT)
    assert "cannot be written" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "a" / "metrics.jsonl")] == [0, 1, 1]


# One sentence for what the user can fix ===========================================================


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CUBLAS), MemoryError()]


def test_running_out_of_memory_names_the_flags(finished, monkeypatch, capsys):
    fills_the_machine = lambda *_, **__: torch.empty(2**50)  # noqa: E731
    for fail in (fills_the_machine, *map(raising, MEMORY)):
        monkeypatch.setattr(torch, "load", fail)
        resume(finished, code=2)
        said = capsys.readouterr().err
        assert "out of memory; lower --rollout-rows or --micro-batch-tokens" in said
        assert "damaged" not in said  # the checkpoint that was being read
    monkeypatch.setattr(bupo, "train", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        bupo.main([])


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bupo, "group_advantages", lambda rewards: rewards * math.nan)
    settings = {**SHORT, "eval_problems": 0, "save_every": 1, "keep": 3}
    a = run(tmp_path / "a", code=2, steps=12, **settings)
    assert "Ten steps in a row" in capsys.readouterr().err
    assert [line["grad_norm"] for line in lines(a / "metrics.jsonl")] == [None] * 10
    kept = bupo.checkpoints(a)
    assert [folder.name for folder in kept] == ["checkpoint-8", "checkpoint-9", "checkpoint-10"]
    assert all_equal(weights_of(kept[0]).values(), weights_of(kept[2]).values())


def test_every_setting_is_a_flag_with_help_and_both_defaults(capsys):
    for arguments, code in ((["--help"], 0), (["--no-such-flag", "3"], 2)):
        with pytest.raises(SystemExit) as stopped:
            bupo.main(arguments)
        assert stopped.value.code == code
    text, settings = " ".join(capsys.readouterr().out.split()), bupo.configure().__dict__
    assert "30 or 20) [30 | tiny: 10]" in text
    assert all(f"{'--' + name.replace('_', '-')} " in text for name in settings)
    assert len(settings) <= 34


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model nobody/no-such-model", "cannot be loaded"),
        ("--model {tmp}/longrope", "at most 64, the original_max_position_embeddings"),
        ("--model {tmp}/silent", "renders nothing"),
        ("--dataset {tmp}/none.parquet", "No such file"),
        ("--dataset nobody/no-such-data", "cannot be loaded"),
        ("--dataset {tmp}/noise.parquet", "cannot be loaded"),
        ("--dataset {tmp}/columns.jsonl", "column, only a, b"),
        ("--dataset {tmp}/empty.csv", "no usable row"),
        ("--dataset {tmp}/long.jsonl --max-prompt-tokens 3", "1 too long"),
        ("--steps 0 --eval-problems 0", "raise one"),
        ("--out {tmp}/{long}", "name too long"),
        ("--out {tmp}", "is there already"),
        ("--internal-layer 7", "1 to 6"),
        ("--internal-layer low", "auto or a number from 1 on"),
        ("--mini-batch 3", "must divide"),
        ("--temperature 1e-40", "--temperature must be"),
        ("--lr nan", "--lr must be"),
        ("--seed 18446744073709551616", "--seed must be"),
        ("--max-new-tokens 1000", "at most 512, the max_position_embeddings"),
        ("--device cuda:99", "cannot be used"),
        ("--device meta", "--device meta cannot be used"),
        ("--out .", "has no name of its own"),
        ("--optimizer-device cuda", "needs --device cuda"),  # fails: ignored on a CPU
        ("--resume {tmp}/nothing", "no run"),
        ("--resume {run}/checkpoint-2", "no run"),  # its config.json is the model's
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence, finished, tmp_path, capsys):
    (tmp_path / "noise.parquet").write_bytes(b"no parquet at all")
    write_rows(tmp_path / "columns.jsonl", [dict(a=1, b=2)])
    write_rows(tmp_path / "long.jsonl", [dict(question="1+2+3", answer=6)])
    (tmp_path / "empty.csv").write_text("question,answer\n")
    if "longrope" in arguments:
        rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64)
        rope |= dict(short_factor=[1.0] * 4, long_factor=[8.0] * 4)
        both = dict(rope_parameters=rope, original_max_position_embeddings=64)
        saved_model(tmp_path / "longrope", "Phi3", **both)
    if "silent" in arguments:
        (saved_model(tmp_path / "silent") / "chat_template.jinja").write_text("{# nothing #}")
    before = sorted(tmp_path.rglob("*"))
    paths = dict(tmp=tmp_path, run=finished, long="x" * 300)
    own = [argument.format(**paths) for argument in arguments.split()]
    short = {**SHORT, "steps": 1, "max_new_tokens": 99, "preset": "tiny", "out": tmp_path / "new"}
    if "--model" in own:
        short["dataset"] = short["eval_dataset"] = tmp_path / "long.jsonl"
    assert bupo.main([*flags(**({} if "--resume" in own else short)), *own]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert sentence in errors[0]
    assert errors[0].endswith(".")
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing lost


# The whole ========================================================================================


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_short_run_learns_in_either_precision(precision, guessing, tmp_path):
    """From guesses among nine digits to the one that is always right."""
    file = write_rows(tmp_path / "x.jsonl", [dict(question=f"{i}+1", answer=7) for i in range(9)])
    settings = dict(dataset=file, eval_dataset=file, eval_problems=9, eval_k=8, lr=1e-3)
    settings |= dict(precision=precision, eval_every=15, lr_warmup_steps=1)
    a = run(tmp_path / "a", steps=15, **{**guessing, **settings})
    before, after = (line["eval_avg"] for line in lines(a / "metrics.jsonl") if "eval_avg" in line)
    assert before < 0.3
    assert after > 0.8


# The reward =======================================================================================


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"\boxed{1} then \boxed{2}", ["1", "2"]),
        (r"\boxed{ \frac{1}{2} } and \fbox{8}", [r"\frac{1}{2}", "8"]),
        (r"\boxed {7}, \boxed 7 or $\boxed -2.5$", ["7", "7", "-2.5"]),
        (r"\boxed{\{1, 2\}} \boxed{\left\{x \right.}", [r"\{1, 2\}", r"\left\{x \right."]),
        (r"\boxed{4} and then \boxed{5", ["4"]),  # the last is cut off
        (r"} { \boxed{6}", ["6"]),
        (r"\boxedx{6} boxed{6} \boxed{", []),
        ("", []),
    ],
)
def test_find_boxes(text, boxes):
    assert bupo.find_boxes(text) == boxes
    assert bupo.extract_boxed(text) == (boxes[-1] if boxes else None)


RIGHT = r"""
# roots of an order
3\cdot\sqrt[3]{2} | 3\sqrt[3]{2}    \sqrt[3]{54} | 3\sqrt[3]{2}
# fractions, decimals
\frac12 | 0.5    \dfrac{3}{4} | 3/4    \frac{-1}{2} | -\frac{1}{2}    -1/2 | \frac{-1}{2}
\frac{6}{8} | \frac{3}{4}    \frac1{72} | \frac{1}{72}    \frac{1+a}c | \frac{1+a}{c}
# mixed
1 1/4 | \frac54    1\frac14 | 1.25    11 \frac{2}{3} | \frac{35}{3}    -1\frac{1}{2} | -1.5
2\dfrac{1}{2} | 5/2    137 \frac{1}{2} | 137.5    1\frac{1}{4}\pi | \frac{5\pi}{4}
# percent
62.5\% | \frac58    50\% | 0.5    0.5 | 50\%    50 | 50\%    50\% | 50    10\% | 10
5.10\% | 5.1\%    12.5% | \frac{1}{8}    50 \% | 50\%    50\text{ percent} | 50\%
# degrees
90^\circ | 90    90° | 90^\circ    90 | 90^{\circ}    74° | 74
\frac{270}{7}^\circ | \frac{270}7\text{ degrees}    45^{\circ} | 45°    90 degrees | 90^\circ
# currency, units
\$5 | 5    $5 | 5    5 dollars | 5    \$10,080 | 10080    \$18.90 | 18.90    \$18.90 | 18.9
5 dollars | \$5    5\text{ dollars} | \$5    27\text{ miles} | 27    27 miles | 27
# thousands
10,080 | 10080    10{,}080 | 10080    10\,080 | 10080    14,\!400 | 14400    14,\!400 | 14,400
11,\! 111,\! 111,\! 100 | 11111111100    1,000,000 | 1000000    335670 | 335{,}670
# scientific
1.6\times10^{-19} | 1.6 \cdot 10^{-19}    1.6e-19 | 1.6\times 10^{-19}    3\times10^8 | 300000000
1.5 \times 10^{3} | 1500    1e6 | 1000000    6.02e23 | 6.02\times10^{23}    10^{-3} | 0.001
# surds, pi, e
\sqrt{12} | 2\sqrt{3}    \sqrt2 | \sqrt{2}    \sqrt 2 | \sqrt{2}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}    \sqrt[3]{8} | 2    \sqrt[3]{4} | 4^{1/3}
# complex
6 + 9 i | 6+9i    5\mathrm{i} | 5i    \frac{1+i\sqrt{3}}{2} | \frac12+\frac{\sqrt3}{2}i
9i+6 | 6+9i    (1+i)^2 | 2i    14.0 + -1.0i | 14-i    e^{i\pi} | -1    e^{\frac{i\pi}{2}} | i
# functions
\log 2 | \log{2}    \ln(4) | 2\ln(2)    \ln 2 | \log 2    \log_2 8 | 3    \log_{10} 100 | 2
\log_{2}(x) | \frac{\ln x}{\ln 2}    \tan x | \frac{\sin x}{\cos x}    \sin(2x) | 2\sin x\cos x
# factorials, binomials, floor, abs
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
# a sign that stands alone, digits around one
\% | 1    5%0 | 50    [] | 1    \{\} | 1
5 | 6    50 | 5    -5 | 5    2t | 2    2\pi | 2    52_8 | 52_1    52_8 | 52    52 | 52_8
52_8 | 52_9    1,2,3 | 123    0.333333 | 1/3    0.333 | \frac13    0.33 | \frac13    3.14 | \pi
# found later
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


def test_the_last_box_counts_and_only_a_box():
    assert bupo.math_reward(r"\boxed{4} or rather \boxed{5}", "5") == 1
    assert bupo.math_reward(r"\boxed{5} or rather \boxed{4}", "5") == 0
    assert bupo.math_reward("5", "5") == bupo.math_reward(r"\boxed{}", "") == 0
    assert bupo.math_reward(r"so $\boxed 7$", "7") == 1


def paper_golds() -> list[str]:
    if not PAPER_FILES.is_dir():
        pytest.skip("the paper's problem files are not beside this checkout")
    pandas = pytest.importorskip("pandas")
    files = sorted(PAPER_FILES.glob("*.parquet"))
    return [
        row["ground_truth"] for file in files for row in pandas.read_parquet(file)["reward_model"]
    ]


def test_every_gold_answer_of_the_paper_is_right_against_itself():
    golds = paper_golds()
    assert len(golds) == 5600
    assert [gold for gold in set(golds) if reward(gold, gold) != 1] == []


def respellings(gold: str) -> list[str]:
    """Other ways to write the same answer."""
    spelled = [
        f"${gold}$",
        f"{gold}.",
        rf"\displaystyle {gold}",
        rf"\, {gold} \;",
        gold.replace(" ", "  "),
    ]
    spelled.append(re.sub(r"\\d?frac(?=\{)", r"\\tfrac", gold))
    spelled.append(re.sub(r"\^(\w)", r"^{\1}", gold))
    spelled.append(re.sub(r"\\d?frac\{(\w+)\}\{(\w+)\}$", r"(\1)/(\2)", gold))
    spelled.append(
        re.sub(r"(?<!left)([(\[])", r"\\left\1", re.sub(r"(?<!right)([)\]])", r"\\right\1", gold))
    )
    spelled.append(re.sub(r"(?<=\d) ?(?=\\pi|\\sqrt)", r" \\cdot ", gold))
    spelled.append(
        gold.replace(r"\pi", "π").replace(r"\infty", "∞").replace("-", "−").replace(r"\geq", "≥")
    )
    spelled.append(re.sub(r"\\sqrt\{(\d+)\}$", r"\\sqrt{4 \\times \1}/2", gold))
    if re.fullmatch(r"-?\d{4,}", gold):
        spelled += [
            f"{int(gold):,}",
            f"{int(gold):,}".replace(",", "{,}"),
            f"{int(gold):,}".replace(",", r"\,"),
        ]
    if re.fullmatch(r"-?\d+", gold) and len(gold) < 300:
        spelled += [
            f"{gold}.0",
            f"x = {gold}",
            rf"\frac{{{2 * int(gold)}}}{{2}}",
            rf"{gold} \text{{ units}}",
        ]
    if match := re.fullmatch(r"\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        top, bottom = int(match[1]), int(match[2])
        spelled.append(rf"\frac{{{3 * top}}}{{{3 * bottom}}}")
        spelled += [str(top / bottom)] if 1000 % bottom == 0 else []
    if re.fullmatch(r"[a-zA-Z]{2,}", gold):
        spelled += [rf"\text{{{gold}}}", rf"\textbf{{{gold}}}", f"{gold}."]
    if match := re.fullmatch(r"\\\{([^{}\\|]*)\\\}", gold):
        spelled.append(rf"\left\{{ {', '.join(match[1].split(',')[::-1])} \right\}}")
    return [text for text in dict.fromkeys(spelled) if text != gold]


def test_other_spellings_of_the_golds_are_accepted():
    cases = [(text, gold) for gold in sorted(set(paper_golds())) for text in respellings(gold)]
    missed = [pair for pair in cases if reward(*pair) != 1]
    assert len(cases) > 10_000
    assert len(missed) <= 0.02 * len(cases), missed


def mutations(gold: str, rng: random.Random) -> list[str]:
    """Golds with one symbol changed (digit, sign, letter, power, bracket) or a term dropped."""
    changed = []
    is_word = re.fullmatch(r"[a-zA-Z]{2,}|\\text\{.*\}", gold)  # whose case is free
    swaps = {
        "+": "-",
        "(": "[",
        ")": "]",
        "[": "(",
        "]": ")",
        "<": ">",
        ">": "<",
        "^": "_",
        "/": "*",
        "!": "",
        "'": "''",
    }
    for token in re.finditer(r"\\[a-zA-Z]+|\\.|.", gold):
        before, old, after = gold[: token.start()], token[0], gold[token.end() :]
        if old.isdecimal():
            changed.append(before + rng.choice([d for d in "0123456789" if d != old]) + after)
        elif re.fullmatch("[a-zA-Z]", old):
            changed.append(before + rng.choice([c for c in "abckmnpqrstuvxyz" if c != old]) + after)
            changed += [before + old.swapcase() + after] if not is_word else []
        elif old in ("-", r"\sqrt", r"\pi"):
            changed.append(before + after)
        elif old in swaps:
            changed.append(before + swaps[old] + after)
    changed += [
        gold[: m.start()] + gold[m.end() :] for m in re.finditer(r"[+-] ?[^-+(){}\[\]=,]+", gold)
    ]
    return [text for text in changed if text.strip() not in ("", gold)]


def test_golds_with_one_symbol_changed_are_refused():
    rng = random.Random(0)
    cases = [(text, gold) for gold in sorted(set(paper_golds())) for text in mutations(gold, rng)]
    accepted = [pair for pair in cases if reward(*pair) != 0]
    assert len(cases) > 5_000
    assert len(accepted) <= 0.001 * len(cases), accepted


def hostile_answers() -> list[str]:
    """Answers that a model under RL might give and that stall, crash or fool careless graders."""
    shapes = "9^{9^{9^{%d}}}  (10^{%d})!  10^{10^{%d}}  %d^{%d^{%d}}  \\frac{%d}{0}  "
    shapes += "\\int_0^{%d} x^{x^x} dx  "
    shapes += "\\binom{10^{%d}}{10^5}  \\sum_{k=1}^{10^{%d}} k^k  \\sqrt[%d]{\\sqrt{-1}^{\\pi}}  "
    shapes += "((%d!)!)!  2^%d!!!!  "
    shapes += "__import__('os')._exit(%d)  $(kill -9 %d)  '; exit %d #  1e%d  "
    shapes += "\\frac{1}{3^{4000}} + %d  1.%de999999999"
    answers = [
        s % ((n,) * s.count("%d")) for s in re.split(" {2,}", shapes) for n in (8, 30, 99, 12345)
    ]
    for n in (20, 60, 99, 399, 50_000):
        answers += [
            s * n
            for s in (
                "{",
                "}",
                "-",
                "(",
                "2^",
                "+-",
                "!",
                "|",
                ",",
                "x",
                "½",
                "±",
                "1½",
                "1,",
                "\\frac",
                "\\sin",
                "\\text{",
                "a=",
            )
        ]
        answers += [
            "{" * n + "1" + "}" * n,
            "(" * n + "x" + ")" * n,
            r"\frac{" * n + "1" + "}{2}" * n,
            "9" * n + "/" + "8" * n,
        ]
        answers += [
            "1" + "+1" * n,
            "x" + "(x+1)" * n,
            "3^{2000}/7^{2500}+" * n + "1",
            "900!/899!+" * n + "1",
            "±1" * n,
            "≥x" * n,
        ]
    rng = random.Random(0)
    for alphabet in (
        r"\{}boxedfrac123_^$&",
        "0123456789^!().",
        "".join(map(chr, range(1, 255))),
        "\u0660²∞七\ud800\0",
    ):
        answers += [
            "".join(rng.choices(alphabet, k=size))
            for size in (10, 100, 299, 1000, 50_000)
            for _ in range(5)
        ]
    return answers


def test_hostile_answers_get_their_verdict_at_once():
    for answer in [*hostile_answers(), *(a[:395] for a in hostile_answers())]:
        began = time.process_time()
        assert reward(answer, "x+7") in (0.0, 1.0)
        assert bupo.math_reward(r"\boxed{7}", answer) in (0.0, 1.0)
        assert time.process_time() - began < 1, answer[:80]  # a safety net: milliseconds as a rule


def test_a_long_text_of_braces_is_searched_in_linear_time():
    for piece in ("{", "}", "{}", r"\boxed{", r"\boxed{}", r"\boxed ", "\\", r"\fbox{1", " "):
        text = piece * (400_000 // len(piece))
        began = time.process_time()
        assert bupo.math_reward(text + r"\boxed{7}", "7") in (0.0, 1.0)
        assert time.process_time() - began < 5, piece


@settings(deadline=None, max_examples=300)
@given(
    strategies.one_of(strategies.text(), strategies.text(r"\{}frac123()[]+-*/^_=<,.|!$% exi²√π∞±")),
    strategies.text(r"\{}frac12(x)+-^=<,|! sin"),
)
def test_any_two_texts_get_a_verdict(answer, gold):
    assert reward(answer, gold) in (0.0, 1.0)
    assert bupo.math_reward(answer, gold) in (0.0, 1.0)


# analyze.py =======================================================================================


# Pictures (analyze.py) ============================================================================

PROFILED = [(3, 6), (9, 2), (1, 1), (4, 11)]  # (prompt, completion) lengths


def naive_policy(model, hidden, norm):
    return torch.log_softmax(model.lm_head(model.model.norm(hidden) if norm else hidden), -1)


def naive_entropy(logps):
    return torch.distributions.Categorical(logits=logps).entropy()


@torch.no_grad()
def naive_measures(model, prompt, completion, low=0, norm=True):
    """{(name, layer): (N,)} of one completion: an unpadded pass that keeps all, the formulas."""
    written = []
    keep = lambda m, i, o: written.append(o[0] if isinstance(o, tuple) else o)  # noqa: E731
    for part in (part for block in model.model.layers for part in (block.self_attn, block.mlp)):
        part.register_forward_hook(keep)
    ids = torch.tensor([prompt + completion])
    full = model(ids, output_hidden_states=True, use_cache=False)
    last, stream, found = len(model.model.layers), full.hidden_states[0], {}
    pi, following = full.logits.log_softmax(-1), ids.roll(-1, 1)[..., None]
    for k in range(last + 1):
        if k:
            block, outputs = model.model.layers[k - 1], written[2 * k - 2 : 2 * k]
            norms = block.input_layernorm, block.post_attention_layernorm
            for name, input_norm, output in zip(("attention", "ffn"), norms, outputs, strict=True):
                found[name, k] = naive_entropy(model.lm_head(output))
                before = naive_entropy(model.lm_head(input_norm(stream)))
                found[f"{name}_change", k] = found[name, k] - before
                found[f"cos_{name}", k] = torch.cosine_similarity(output, stream, dim=-1)
                stream = stream + output
        policy = naive_policy(model, stream, norm or k == last)
        found["policy", k] = naive_entropy(policy)
        found["without_norm", k] = naive_entropy(naive_policy(model, stream, k == last))
        found["kl", k] = (pi.exp() * (pi - policy)).sum(-1)
        found["top1", k] = (pi.argmax(-1) == policy.argmax(-1)).float()
        found["nll", k] = -policy.gather(-1, following)[..., 0]
        if k:
            found["layer_change", k] = found["policy", k] - found["policy", k - 1]
        if k == low:
            low_policy, low_stream = policy, stream
        if k > low > 0:
            found["low_kl", k] = (low_policy.exp() * (low_policy - policy)).sum(-1)
            found["low_cosine", k] = torch.cosine_similarity(low_stream, stream, dim=-1)
    positions = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return {key: values[0, positions] for key, values in found.items()}


def assert_equals_naive(found, model, sequences, **how):
    naive = [naive_measures(model, *sequence, **how) for sequence in sequences]
    assert {(n, k) for n, one in found["measures"].items() for k in one["layer"]} == naive[0].keys()
    for name, one in found["measures"].items():
        for layer, mean, error in zip(*(one[key] for key in ("layer", "mean", "se")), strict=True):
            values = [n[name, layer].double() for n in naive]
            overall, count = torch.cat(values).mean(), len(values)
            squares = sum(float((v - overall).sum()) ** 2 for v in values)
            want = (squares * count / max(1, count - 1)) ** 0.5 / sum(map(len, values))
            assert mean == pytest.approx(float(overall), abs=1e-4), (name, layer)
            assert error == (pytest.approx(want, abs=1e-4) if count > 1 else None), (name, layer)


@every_family
@pytest.mark.parametrize(("layers", "low", "count"), [(4, 1, 4), (4, 3, 4), (1, 0, 1), (40, 0, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_analyze_numbers_equal_formulas(family, tied, layers, low, count, norm, monkeypatch):
    monkeypatch.setattr(bupo, "HEAD_TOKENS", 30)
    model = small_model(family, layers, tie_word_embeddings=tied, initializer_range=0.1)
    sequences = random_sequences(PROFILED)[:count]
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    found = analyze.profile(model, sequences, 30, norm, low)
    assert_equals_naive(found, model, sequences, low=low, norm=norm)
    assert math.exp(found["max_entropy"]) == pytest.approx(50)
    assert found["boundary_layer"] == bupo.boundary_layer(found["measures"]["ffn_change"]["mean"])


def test_analyze_agrees_with_the_sampler_and_with_auto():
    model, prompts = small_model(), [prompt for prompt, _ in random_sequences(PROFILED)]
    completions = bupo.sample(model, prompts, 12, {1}, generator=torch.Generator().manual_seed(0))
    sequences = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
    found = analyze.profile(model, sequences, 99)["measures"]
    entropies = torch.tensor([entropy for c in completions for entropy in c.entropies])
    logps = torch.tensor([logp for c in completions for logp in c.logps])
    assert found["policy"]["mean"][-1] == pytest.approx(float(entropies.mean()), abs=1e-5)
    assert found["nll"]["mean"][-1] == pytest.approx(float(-logps.mean()), abs=1e-5)
    change = bupo.ffn_entropy_change(model, sequences, 99)
    assert found["ffn_change"]["mean"] == pytest.approx(change, abs=1e-5)


def test_analyze_bounds_logits(monkeypatch):
    model, sequences, sizes = small_model(), random_sequences(PROFILED), []
    model.lm_head.register_forward_hook(lambda m, i, logits: sizes.append(logits[..., 0].numel()))
    monkeypatch.setattr(bupo, "HEAD_TOKENS", 12)
    analyze.profile(model, sequences, 4096)
    assert max(sizes) == 3  # a few policies at a time: 12 tokens have logits
    assert sum(sizes) == 20 * (3 + 4 * 6)  # pi, pi^0 twice; with a block modules and inputs, too


def test_analyze_standard_error_is_that_of_independent_completions():
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (400, 40), generator=rng).double()
    sums = counts * (2 + torch.randn(400, 40, generator=rng).double())  # tokens of one: all alike
    means, errors = torch.tensor([*map(analyze.mean_and_error, sums, counts)]).T
    assert errors.mean() == pytest.approx(float(means.std()), rel=0.12)


def folder_of(folder, family="Qwen3", **settings):
    """The folder of a random model with the tokenizer of the built-in one."""
    tokenizer = bupo.load_model("tiny")[1]
    model = small_model(family, vocab_size=len(tokenizer), max_position_embeddings=4096, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


FEW = ["--dataset", "arithmetic", "--problems", "3", "--max-new-tokens", "5", "--device", "cpu"]


def drawn(monkeypatch, tmp_path, *arguments):
    """What a command line writes to the JSON file, and its figure."""
    figures: list = []
    monkeypatch.setattr(analyze.plt, "close", figures.append)
    assert analyze.main([*map(str, arguments), "--out", str(tmp_path / "made" / "x.png")]) == 0
    assert (tmp_path / "made" / "x.png").stat().st_size > 10_000
    return json.loads((tmp_path / "made" / "x.json").read_text()), figures[0]


def test_analyze_profiles_models_side_by_side(tmp_path, capsys, monkeypatch):
    models = [folder_of(tmp_path / "a"), folder_of(tmp_path / "b", "Llama", layers=2)]
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
    sequences = random_sequences(PROFILED)
    lines = [json.dumps(dict(step=1, prompt_ids=p, ids=ids)) for p, ids in sequences]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, '{"step": 9, "id']))
    flags = "--completions", tmp_path / "some.jsonl", "--problems", 3, "--device", "cpu"
    found, _ = drawn(monkeypatch, tmp_path, "--model", folder_of(tmp_path / "a"), *flags)
    model, one = bupo.load_model(str(tmp_path / "a"))[0], found["models"][0]["measures"]
    ours = analyze.profile(model, sequences[-3:], 99)["measures"]  # of the newest
    assert one["policy"]["mean"] == pytest.approx(ours["policy"]["mean"], abs=1e-5)


@pytest.mark.parametrize("color", ["entropy", "prob", "rank", "kl"])
def test_analyze_lens_shows_what_each_layer_says(color, tmp_path, monkeypatch):
    prompt, ids = random_sequences([(5, 30)])[0]
    line = json.dumps(dict(step=0, prompt_ids=prompt, ids=ids))
    (tmp_path / "one.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    folders = [folder_of(tmp_path / "a"), folder_of(tmp_path / "b", layers=20)]
    flags = "--completions", tmp_path / "one.jsonl", "--nth", 2, "--color", color
    found, figure = drawn(monkeypatch, tmp_path, "--lens", "--model", *folders, *flags)
    frames = [len(axis.patches) for axis in figure.axes[:-1]]  # but the color bar
    assert len(frames) == 2 * 3  # 30 tokens in bands of at most 13
    for m, (one, folder) in enumerate(zip(found["models"], folders, strict=True)):
        model, tokenizer = bupo.load_model(folder)
        naive, last = naive_measures(model, prompt, ids), len(model.model.layers)
        with torch.no_grad():
            states = model(torch.tensor([prompt + ids]), output_hidden_states=True).hidden_states
        assert (one["ids"], [r["layer"] for r in one["rows"]]) == (ids, [*range(last + 1)])
        for k, row in enumerate(one["rows"][:-1]):
            logps = naive_policy(model, states[k], norm=True)[0, 4:34]
            following = logps.gather(-1, torch.tensor(ids)[:, None])
            assert row["rank"] == (1 + (logps > following).sum(-1)).tolist()
            assert row["top_ids"] == logps.topk(5).indices.tolist()
            assert row["top"][7] == [tokenizer.decode([i]) for i in row["top_ids"][7]]
            assert row["prob"] == pytest.approx((-naive["nll", k]).exp().tolist(), abs=1e-5)
            assert row["entropy"] == pytest.approx(naive["policy", k].tolist(), abs=1e-4)
            assert row["kl"] == pytest.approx(naive["kl", k].tolist(), abs=1e-4)
        shown = [r["top_ids"] for r in one["rows"][:: -2 if last > 16 else 1]]
        assert sum(frames[m::2]) == sum(row[i][0] == ids[i] for row in shown for i in range(30))


def test_analyze_lens_shows_spaces_and_escapes_what_the_font_lacks(recwarn, tmp_path, monkeypatch):
    assert analyze.cell_text(" a\n\t", 1) == "\u00b7a\u21b5\u21e5"
    assert analyze.cell_text("\u65e5\U0001f600\x00", 9) == "\\u65e5\\U0001f600\\x00"
    assert analyze.cell_text("abcdefghij", 0.34) == "abcd\u2026"
    flags = "--model", folder_of(tmp_path / "a"), "--text", "7 + \u65e5 $x_1$ <eos>"
    found, _ = drawn(monkeypatch, tmp_path, "--lens", *flags)
    assert "".join(found["models"][0]["next"])[:3] == " + "
    assert not [w for w in recwarn if "lyph" in str(w.message)]


def fabricated_run(folder, seed=0, steps=4, **changes):
    folder.mkdir()
    asked = dict(model="tiny", seed=seed, steps=steps, max_new_tokens=5, internal_steps=2) | changes
    config = bupo.configure(**asked, dataset="arithmetic", eval_dataset="arithmetic")
    (folder / "config.json").write_text(json.dumps(vars(config)))
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


RUNS = [((2, 3, 10), [0, 2, 10], 2), ((1,), [0, 1], 2), ((4,), [0, 4], 0)]


@pytest.mark.parametrize(("saved", "seen", "phase"), RUNS)
def test_analyze_follows_a_run(saved, seen, phase, tmp_path, monkeypatch):
    start = folder_of(tmp_path / "start")
    run = fabricated_run(tmp_path / "run", model=start, internal_steps=phase)
    for step in saved:  # 2 is the start itself, the others are another model
        folder_of(f"{run}/checkpoint-{step}", rms_norm_eps=1e-6 if step == 2 else 0.5)
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
    folder = folder_of(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert analyze.main(["--model", folder, "--sample-layer", "1", "3", *FEW]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"layer {k} of 4: ") for k in (1, 3, 4)] == [3, 3, 3]
    config, model, tokenizer = analyze.load(folder, analyze.parse(FEW)[1])
    model.model.layers = model.model.layers[:3]
    problems = bupo.load_problems("arithmetic", 3)
    for _, ids in analyze.complete(config, model, tokenizer, problems):  # of pi^3, nothing else
        assert " ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) in said


MISTAKES = {
    "--model nowhere/at/all": "cannot be loaded",
    "--model gemma": "is not Llama-like",
    "--model a --completions text.jsonl": "lacks prompt_ids",
    "--model a --completions large.jsonl": "lacks prompt_ids",
    "--lens --model a --completions text.jsonl --nth 7": "lacks prompt_ids",
    "--lens --model a --text 7": "lacks prompt_ids",
    "--model a --sample-layer 5": "must be from 1 to 4",
    "--model a --out text.jsonl/x": "text.jsonl",
    "--problems 0": "--problems must be",
    "--layer 2": "--model has no use for --layer",
    "--runs run --dataset x": "--runs has no use for --dataset",
    "--runs run run/../run": "one setting, one seed",
    "--overview run": "keeps no checkpoint",
}


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES.items())
def test_analyze_says_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "a")
    folder_of(tmp_path / "gemma", "Gemma2")
    fabricated_run(tmp_path / "run")
    (tmp_path / "text.jsonl").write_text('{"step": 0, "completion": "1+1"}\n')
    (tmp_path / "large.jsonl").write_text('{"step": 0, "prompt_ids": [1], "ids": [2, 1000]}\n')
    assert analyze.main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("analyze.py: ")
    assert sentence in said
    assert (said.count("\n"), [*tmp_path.glob("*.png")]) == (1, [])
