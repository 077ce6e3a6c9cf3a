"""The proof: one test or more for each equation of the method and each promise of the README."""

import ast
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test may wait for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more do not help models as small as these

import datasets
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file
from torch import Tensor

import bupo

torch.set_num_threads(1)

TINY = Path(bupo.__file__).with_name("tiny")
# The paper's problems, where somebody has put them:
PAPER_FILES = Path(__file__).resolve().parent.parent / "shared" / "data"


def small_model(family: str = "Qwen3", layers: int = 4, **settings):
    """A random model whose logits are far from uniform; two query heads share keys and values."""
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    heads["attention_dropout"] = 0.5  # which must never be active: rho would be chance
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
    """A random model of any family with the tokenizer of tiny, as a folder for `--model`."""
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


# Internal policies, their entropies, the boundary layer (Eq. 1, 5 to 8, 13) =======================


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
    # Eq. 14 and 15: gradients, too, are those of hidden_states[l], none of them above block l.
    both = bupo.internal_hidden(model, IDS, 2), full.hidden_states[2]
    policies = [bupo.policy_logits(model, hidden).log_softmax(-1) for hidden in both]
    ours, theirs = (gradients(model, policy[..., 3].sum()) for policy in policies)
    assert_near(ours, theirs, tolerance=0)
    parameters = dict(model.named_parameters())
    assert list(ours) == [name for name in parameters if not name.startswith(UPPER)]


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
    expected = [[states[i], *theirs[4 * i : 4 * i + 4]] for i in range(4)]
    torch.testing.assert_close([list(ours) for ours in stream], expected)


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
        how = dict(with_entropies=True, recompute=recompute)
        logps, entropies = bupo.token_logps(model, *ids_and_mask, layer, norm, 0.7, **how)
        torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropies, entropy)
        assert sum(sizes) == 24  # completion tokens only
        assert_near(gradients(model, (weights * logps).sum()), theirs)
        assert max(sizes) == 4  # of how many tokens logits exist at a time


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
    assert not bupo.group_advantages(equal).any()


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
        self.model, self.moves, self.seen, self.zero_grad = model, moves, [], Mock()

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
    """Completions without advantage count in the mean, but are not scored."""
    model, loss, embedded, entered = small_model(), 0.0, [], []
    naive = [naive_logps(model, *p, layer, norm == "final", temperature)[0] for p in ROLLOUT]
    for logps, advantage in zip(naive, ADVANTAGES.tolist(), strict=True):
        weight = 1 / sum(TOKENS) if average == "token" else 1 / (8 * len(logps))
        loss = loss - weight * (logps - logps.detach()).exp().sum() * advantage  # rho = 1
    expected = gradients(model, loss)
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: embedded.append(i[0].numel()))
    model.model.layers[0].register_forward_pre_hook(lambda *_: entered.append(1))
    how = dict(loss_average=average, internal_norm=norm, temperature=temperature, mini_batch=4)
    for tokens, recompute, passes in ((1, False, 6), (30, True, None), (1000, False, 1)):
        how |= dict(micro_batch_tokens=str(tokens), gradient_checkpointing=recompute)
        spy, _ = Spy(model), (embedded.clear(), entered.clear())
        config = update_settings(**how)
        metrics = bupo.update(model.train(), spy, ROLLOUT, ADVANTAGES, layer, 0.0, config)
        assert_near(*spy.seen, expected)
        assert metrics["ratio_max"] == 1.0  # exactly: it is the first mini-batch
        assert passes in (None, len(embedded))
        assert max(embedded) <= max(tokens, 15)  # or one sequence, of at most 15 tokens
        assert (len(entered) > len(embedded)) == recompute


@pytest.mark.parametrize("clip", [0.2, 0.01])
@pytest.mark.parametrize("layer", [2, 4])
def test_the_second_mini_batch_is_clipped_against_the_policy_before_the_first(layer, clip):
    """And the entropy of pi^l is the mean over what has an advantage, as it is trained."""
    model, loss, clipped = small_model(), 0.0, 0
    naive = [naive_logps(model, *pair, layer, True, 1.0) for pair in ROLLOUT]
    spy = Spy(model, moves=1)  # after which the model stays as the second gradient was taken of it
    config = update_settings(clip=clip)
    metrics = bupo.update(model, spy, ROLLOUT, ADVANTAGES, layer, 0.3, config)
    entropies = [naive[0][1], naive[1][1]]
    for i in range(4, 8):
        logps, entropy = naive_logps(model, *ROLLOUT[i], layer, True, 1.0)
        entropies.append(entropy)
        ratio = (logps - naive[i][0].detach()).exp()
        plain, bounded = ratio * ADVANTAGES[i], ratio.clamp(1 - clip, 1 + clip) * ADVANTAGES[i]
        loss = loss - torch.minimum(plain, bounded).sum() / sum(TOKENS[4:])
        clipped += int((bounded < plain).sum())
    assert 0 < clipped < sum(TOKENS[4:])
    learning = sum(TOKENS[:2] + TOKENS[4:])  # 2 and 3 have no advantage
    assert metrics["clip_fraction"] == pytest.approx(clipped / learning)
    _, second = spy.seen
    assert_near(second, gradients(model, loss), tolerance=1e-3)
    if layer == 2:  # at L, that of the rollout is logged
        mean = torch.cat(entropies).mean().item()  # 2 and 3 are not trained
        assert metrics["layer_entropy"] == pytest.approx(mean, rel=1e-4)


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


@pytest.mark.parametrize("layer", [2, 4])
def test_bfloat16_weights_follow_float32_masters_at_the_papers_learning_rate(layer, monkeypatch):
    """bfloat16 weights alone would stay where they are at 1e-6. Gradients travel in pieces and add
    up in float32, rounded to bfloat16 once for each micro-batch, as autograd rounds them."""
    monkeypatch.setattr(bupo, "PIECE", 100)  # most weights are in several, unequal ones
    how = dict(initializer_range=0.02, tie_word_embeddings=True)
    model, twin, spy = small_model(**how), small_model(**how), Spy(small_model(**how))
    optimizer, config = masters_of(model, dtype=torch.bfloat16), update_settings(mini_batch=4)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    for weight in twin.parameters():
        weight.data = weight.data.bfloat16()
    masters = dict(zip(dict(model.named_parameters()), optimizer.masters, strict=True))
    for turn in range(2):  # in the second, kept memory holds what the first has left there
        sums, before = {}, deepcopy(masters)
        for sequence in ROLLOUT[turn : 4 + turn]:
            for one in (model, twin):
                bupo.token_logps(one, *bupo.pad([sequence], "cpu"), layer)[0].sum().backward()
            for name, gradient in gradients(twin).items():
                sums[name] = sums.get(name, 0) + gradient.float()
        assert gradients(model) == {}
        found = {name: master.grad for name, master in masters.items() if master.grad is not None}
        assert_near(found, sums, tolerance=0)
        optimizer.step(1e-6)
        for name, master in masters.items():
            moves = (master - before[name]).abs()
            assert (moves > 0).float().mean() > 0.9 if name in sums else not moves.any()
            assert moves.max() < 2e-6
            assert torch.equal(model.get_parameter(name), master.bfloat16())
            assert master.grad is None
        twin.load_state_dict(model.state_dict())
    bupo.update(spy.model, spy, ROLLOUT, ADVANTAGES, layer, 1e-6, config)
    norm = math.sqrt(sum(gradient.square().sum() for gradient in spy.seen[0].values()))
    for tokens in ("1", "30", "1000"):
        config.micro_batch_tokens = tokens
        metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, layer, 1e-6, config)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=0.05)
        assert metrics["ratio_max"] == 1.0


def test_the_norm_of_a_large_gradient_is_right():
    layer = torch.nn.Linear(2**12, 2**13, bias=False)
    optimizer = bupo.MasterAdamW(layer, torch.device("cpu"), torch.float32, "auto")
    layer.weight.grad = torch.randn(layer.weight.shape)
    norm = float(layer.weight.grad.double().norm())
    assert optimizer.step(1e-6) == pytest.approx(norm, rel=1e-4)  # one float32 sum: 2e-3 less


@every_precision
def test_phase_1_moves_nothing_above_the_layer_and_a_step_without_advantage_nothing_at_all(dtype):
    """Not even by momentum or weight decay."""
    model, config = small_model(tie_word_embeddings=False), update_settings()
    optimizer = masters_of(model, dtype=dtype)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)  # so there is momentum
    before = deepcopy(optimizer.masters)
    bupo.update(model, optimizer, ROLLOUT, torch.zeros(8), 4, 1e-2, config)
    assert all_equal(optimizer.masters, before)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 2, 1e-2, config)
    together = zip(model.named_parameters(), optimizer.masters, before, strict=True)
    for (name, weight), master, old in together:
        assert torch.equal(master, old) == name.startswith(UPPER), name
        assert torch.equal(weight, master.to(dtype)), name


@every_precision
def test_an_update_that_fails_moves_nothing_and_leaves_no_gradient_to_the_next(dtype, monkeypatch):
    model, twin, surrogate = small_model(), small_model(), bupo.clipped_surrogate
    optimizer, fresh = (masters_of(one, dtype=dtype) for one in (model, twin))
    config = update_settings(micro_batch_tokens="30", mini_batch=4)
    with pytest.raises(bupo.UsageError, match="finite"):
        bupo.update(model, optimizer, ROLLOUT, ADVANTAGES * math.inf, 4, 1e-2, config)
    with monkeypatch.context() as patch:  # memory runs out in the second micro-batch
        call = Mock(side_effect=[surrogate, torch.OutOfMemoryError])
        patch.setattr(bupo, "clipped_surrogate", lambda *arguments: call()(*arguments))
        with pytest.raises(torch.OutOfMemoryError):
            bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, 1e-2, config)
    assert any(master.grad is not None for master in optimizer.masters)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)  # on its way to a master
    assert all_equal(optimizer.masters, fresh.masters)
    for layer in (2, 4):
        both = ((model, optimizer), (twin, fresh))
        metrics = [bupo.update(*one, ROLLOUT, ADVANTAGES, layer, 1e-2, config) for one in both]
        assert metrics[0] == metrics[1]
    assert all_equal(optimizer.masters, fresh.masters)
    assert all_equal(model.parameters(), twin.parameters())


# Rollouts =========================================================================================

PROMPT_LENGTHS = [(n, 0) for n in (3, 11, 1, 7, 2, 9, 5, 4, 6, 8, 3)]
PROMPTS = [prompt for prompt, _ in random_sequences(PROMPT_LENGTHS, seed=4)]


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers renames arguments
@every_family
def test_near_temperature_0_samples_equal_generate_with_more_prompts_than_rows(family, tied):
    model, shapes, ends = small_model(family, tie_word_embeddings=tied), [], [1, 7, 9, 30]
    hook = model.model.layers[0].register_forward_hook(lambda m, i, o: shapes.append(o.shape[:2]))
    completions = bupo.sample(model.train(), PROMPTS, 25, ends, temperature=1e-6, rows=4)
    hook.remove()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert min(completion.logps) > -1e-3  # so chance has no part in it
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
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=3, top_p=0.5)
    stream = torch.Generator().manual_seed(0)
    completions = bupo.sample(model, [[4, 2, 6]] * 8000, 1, {1}, 1.3, 8000, stream)
    expected = 8000 * (model(torch.tensor([[4, 2, 6]])).logits[0, -1] / 1.3).softmax(-1)
    observed = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=20)
    assert expected.min() > 5  # as chi-square needs
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 19 + 4 * math.sqrt(2 * 19)  # four standard deviations


def test_as_many_rows_are_decoded_as_fit_or_as_the_flag_says(monkeypatch):
    model, config = small_model(), update_settings(max_new_tokens=100)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**9, 10**10))
    row = 2 * 4 * 2 * 8 * 120 * 4  # keys and values, blocks, heads, size, columns, bytes
    assert 0.1 < bupo.rollout_rows(model, 20, config) * row / 10**9 < 0.95
    assert bupo.rollout_rows(model, 20, update_settings(rollout_rows="7")) == 7


# Evaluation, problems, models =====================================================================


def test_pass_at_k_equals_brute_force():
    for n, c in [(5, 0), (5, 2), (5, 5), (6, 3)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert bupo.pass_at_k(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_evaluate_counts_rightly_and_draws_from_its_own_stream(monkeypatch):
    (model, tokenizer), config = bupo.load_model("tiny"), bupo.configure(max_new_tokens=5)
    problems, state = bupo.load_problems(config.eval_dataset, 3), torch.get_rng_state()
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


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(system, asked, role: str = "user") -> list[dict]:
    return [dict(role="system", content=system), dict(role=role, content=asked)]


CHAT = chat("s", "u")
ROWS = [
    (dict(question="u", answer="6 / 2 = 3\n#### 1,003"), "1,003"),  # GSM8K
    (dict(problem="u", solution=r"so \boxed{2x}", answer="x^2"), "x^2"),  # MATH-500
    (dict(problem="u", solution=r"so \boxed{\frac{1}{2}}"), r"\frac{1}{2}"),  # MATH
    (dict(problem="u", solution=r"$x = 1/2$ or $x = 2$: $\boxed 2$."), "2"),
    (dict(problem="u", solution="2x + 1", option_a=None), "2x + 1"),
    (dict(question="u", final_answer="Yes", difficulty=3.5), "Yes"),  # DeepMath
    (dict(prompt=CHAT, reward_model=dict(ground_truth="9"), question="other"), "9"),
    (dict(prompt=[*CHAT, dict(role="assistant", content="It is 4.")], answer="4"), "4"),  # cut off
    (dict(messages=dict(role=["system", "user"], content=["s", "u"]), ground_truth=7), "7"),
]


@pytest.mark.parametrize(("row", "answer"), ROWS)
def test_problems_are_found_in_the_usual_columns(row, answer, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row])
    assert bupo.load_problems(path, system="s") == [bupo.Problem(CHAT, answer)]


def test_rows_that_cannot_be_asked_or_rewarded_are_dropped_and_counted_by_reason(tmp_path, capsys):
    questions = [None, " ", chat("s", None), chat("s", "4", role="assistant")]
    answers = [None, " ", ["1", "2"], {"value": 4}, math.nan, r"\text{Not found.}", r"\boxed{N/A}"]
    answers += ["#### proof", "Let n be even.\nThen so is 2n.", "1+" * 151 + "1"]
    answers += ["The number of apples that Ann has left is then equal to five"]
    parts = ["option_a", "answer_choices", "B", "context", "image"]
    bad: list = [dict(question=question, solution="1") for question in questions]
    bad += [dict(question="q", solution=answer) for answer in [*answers, r"\boxed1 or \boxed2"]]
    bad += [dict(question="q", solution="1", **{name: "?"}) for name in parts] + ["no object", 7]
    text = json.dumps([*bad, dict(question="u", solution=0.5)]).replace("0.5", "0.10")
    (tmp_path / "x.json").write_text(text)
    assert bupo.load_problems(str(tmp_path / "x.json")) == [bupo.Problem(CHAT[1:], "0.10")]
    counts = ["8 x no answer", "3 x prose for an answer", "6 x no question", "1 x several answers"]
    counts += [f"1 x part of the question is in {name}" for name in parts]
    said = capsys.readouterr().out
    assert [count for count in counts if count not in said] == []
    with pytest.raises(bupo.UsageError, match="question: question, answer: solution; dropped: 8 x"):
        bupo.load_problems(write_rows(tmp_path / "y.jsonl", bad[:-2]))
    with pytest.raises(bupo.UsageError, match=r"\['question', 'label'\] is called .*answer"):
        bupo.load_problems(write_rows(tmp_path / "z.jsonl", [dict(question="u", label="1")]))


def test_equal_questions_count_once_and_are_rendered_once(tmp_path, capsys):
    answers = ["n/a"] * 3 + [str(i) for i in range(3, 90)]
    rows = [dict(prompt=chat("s", f"{i % 3}"), answer=answer) for i, answer in enumerate(answers)]
    fits = Mock(side_effect=lambda problem: problem.answer != "4")
    problems = bupo.load_problems(write_rows(tmp_path / "x.jsonl", rows), fits=fits)
    assert [problem.answer for problem in problems] == ["3", "5"]
    assert fits.call_count == 3
    said = capsys.readouterr().out
    assert re.search("84 x duplicate, 3 x no answer, 1 x over --max-prompt-tokens", said)


def test_numbers_of_files_stay_as_written_and_only_needed_columns_are_read(tmp_path, monkeypatch):
    answers = ["0.10", "007", "9", "x"]
    rows = [dict(question=f"{i}", answer=answer) for i, answer in enumerate(answers)]
    problems = [bupo.Problem(chat("", f"{i}")[1:], answers[i]) for i in range(4)]
    bare = json.dumps(rows, indent=1).replace('"0.10"', "0.10").replace('"9"', "9")
    (tmp_path / "x.json").write_text(bare)
    (tmp_path / "x.jsonl").write_text(re.sub(r"\n *", "", bare)[1:-1].replace("},", "}\n"))
    cells = [f"{i},{i},{answer}" for i, answer in enumerate(answers)]
    (tmp_path / "x.csv").write_text("\n".join([",question,answer", *cells]))  # with an index
    more = [dict(row, generations=["..."], question_id="1") for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(more), tmp_path / "x.parquet")
    read, asked = pyarrow.parquet.ParquetFile.iter_batches, []

    def spy(*arguments, columns):
        asked.append(columns)
        return read(*arguments, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    for file in tmp_path.iterdir():
        for source in (str(file), file.as_uri()):  # a URL
            assert bupo.load_problems(source) == problems, source
    assert asked == [["question", "answer"]] * 2


def test_of_the_hub_a_slice_of_a_split_is_read_and_the_split_named(monkeypatch, capsys):
    rows = datasets.Dataset.from_list([dict(question=q, answer="1", more="") for q in "abc"])
    load = Mock(side_effect=lambda *_, split: rows.select([2, 1]) if split else dict(cot=rows))
    monkeypatch.setattr(datasets, "load_dataset", load)
    for source, name, where, split in [
        ("a/b", "a/b:cot", ("a/b",), None),
        ("a/b:test", "a/b:test", ("a/b",), "test"),
        ("a/b:main:train[5%:20%]", "a/b:main:train[5%:20%]", ("a/b", "main"), "train[5%:20%]"),
    ]:
        found = [problem.messages[0]["content"] for problem in bupo.load_problems(source)]
        assert found == (["c", "b"] if split else ["a", "b", "c"])
        assert load.call_args == (where, dict(split=split))
        assert f"{len(found)} of {name} (" in capsys.readouterr().out
    load.side_effect = FileNotFoundError("not found")
    with pytest.raises(bupo.UsageError, match="ID:CONFIG:SPLIT"):
        bupo.load_problems("a/b")


ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
USERS = ALL.replace(" %}{{", " if m.role == 'user' %}{{") + "<|assistant|>"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + USERS
DATES = "{% macro day() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ day() }}"
LAST = "{{ messages[-1].content }}"


def test_prompts_hold_the_whole_question_whatever_the_template():
    _, tokenizer = bupo.load_model("tiny")
    processor = tokenizers.processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = processor
    assert tokenizer("1").input_ids[-1] == 1  # an end that no prompt must have
    for template, messages, text in [
        (tokenizer.chat_template, chat("S", "1+1"), "<|user|>S<|user|>1+1<|assistant|>"),
        (REFUSES, chat("S", "1+1"), "S\n\n1+1<|assistant|>"),
        (REFUSES, chat(" ", "1+1"), "1+1<|assistant|>"),
        (USERS, chat("S", "1+1"), "S\n\n1+1<|assistant|>"),  # ignores a system message
        (None, chat("S", "1+1"), "S\n\n1+1"),
        (DATES + ALL, chat("s", " 1 +\n1"), "01 Jan 2026s 1 +\n1"),  # asks the same every day
    ]:
        tokenizer.chat_template = template
        assert tokenizer.decode(bupo.encode(tokenizer, bupo.Problem(messages, "2"))).strip() == text
    for template, messages in [
        (LAST, [*chat("s", "1+1"), *chat("s", "so?")[1:]]),  # a turn is lost
        (LAST.replace("content", "content | length"), chat("s", "1+1")[1:]),
        (ALL, chat("s", "<|user|>1+1<|assistant|>")),  # rendered before
        (None, chat("s", "1+1<eos>")),
        (None, chat("s", "1 é 1")),  # no token has this sign
    ]:
        tokenizer.chat_template = template
        with pytest.raises(bupo.UsageError, match=r"rendered|changes a question"):
            bupo.encode(tokenizer, bupo.Problem(messages, "2"))


def edit(file: Path, **changes) -> None:
    """Change some of the settings in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_token_or_a_space_that_the_model_cannot_read_is_noticed_in_prompts(tmp_path):
    questions = [dict(question=question, answer="2") for question in ("1 + 1", "1+1")]
    config = bupo.Config(dataset=write_rows(tmp_path / "x.jsonl", questions), eval_problems=0)
    folder = saved_model(tmp_path / "m", max_position_embeddings=9999)
    tokenizer = bupo.load_model("tiny")[1]
    tokenizer.add_tokens([tokenizers.AddedToken("<end>", special=True)])
    tokenizer.save_pretrained(folder)
    model, tokenizer = bupo.load_model(str(folder))  # more tokens than embeddings
    assert len(tokenizer) > model.get_input_embeddings().num_embeddings
    assert len(bupo.usable_problems(config, model, tokenizer)[1]) == 2
    tokenizer.chat_template = ALL + "<end>"
    with pytest.raises(bupo.UsageError, match="a token that the model does not have"):
        bupo.usable_problems(config, model, tokenizer)
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")  # its signs are bytes
    tokenizer = bupo.load_model(str(folder))[1]
    (problem,) = bupo.usable_problems(config, model, tokenizer)[1]
    assert problem.messages[-1]["content"] == "1+1"


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


LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8)
LATENT |= dict(v_head_dim=8, num_key_value_heads=4, head_dim=4)  # keys unlike values
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1)
EXPERTS |= dict(topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
OTHERS = ["Gemma2", "GPT2", "Olmo2", "Cohere", "StableLm", "Mixtral", "Granite"]
LIKE_LLAMA = ["Llama", "Mistral", "Qwen2", "Qwen3", "Starcoder2", "Youtu"]


@pytest.mark.parametrize("family", [*LIKE_LLAMA, *OTHERS])
def test_only_llama_like_models_are_loaded_whatever_precision_they_ask_for(family, tmp_path):
    """And sampled from what is scored, which load_model checks."""
    own = dict(Youtu=LATENT, Granite=dict(residual_multiplier=0.5)).get(family, {})
    folder = saved_model(tmp_path / "m", family, **own)
    edit(folder / "config.json", _attn_implementation="eager", dtype="bfloat16")
    if family in OTHERS:
        with pytest.raises(bupo.UsageError, match=f"cannot run the blocks of {family}"):
            bupo.load_model(str(folder))
    else:
        model, _ = bupo.load_model(str(folder))
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("family", "own"), [("DeepseekV3", LATENT | EXPERTS), ("Dots1", EXPERTS)])
def test_a_checkpoint_holds_the_buffers_that_a_model_needs(family, own, tmp_path):
    model, tokenizer = bupo.load_model(str(saved_model(tmp_path / "m", family, **own)))
    bias = next(b for name, b in model.named_buffers() if "correction_bias" in name)
    bias.copy_(torch.arange(4) / 8)
    optimizer, config = masters_of(model, dtype=torch.bfloat16), bupo.Config(out=str(tmp_path))
    bupo.save_checkpoint(config, model, tokenizer, optimizer, dict(step=1))
    again, _ = bupo.load_model(str(tmp_path / "checkpoint-1"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(value.dtype), value), name


ROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64)
ROPE |= dict(short_factor=[1.0] * 4, long_factor=[8.0] * 4)


def test_a_model_reads_only_as_far_as_it_is_made_for():
    longrope = dict(rope_parameters=ROPE, original_max_position_embeddings=64)
    windows = dict(Qwen3=dict(max_position_embeddings=64), Mistral=dict(sliding_window=64))
    for family, own in dict(windows, Phi3=longrope).items():
        model = small_model(family, **own)
        bupo.check_lengths(model, 64)
        with pytest.raises(bupo.UsageError, match="at most 64 tokens"):
            bupo.check_lengths(model, 65)


def quantize(folder: Path) -> None:
    edit(folder / "config.json", quantization_config=dict(quant_method="fp8"))
    (folder / "model.safetensors").unlink()  # which must not be read, since it may be large


OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
CODE = "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model"
DAMAGES = [
    (lambda f: edit(f / "config.json", num_hidden_layers=5), "lacks .*model.layers.4."),
    (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),  # a pickle is left
    (lambda f: edit(f / "config.json", model_type="own", auto_map=OWN), "cannot be loaded"),
    (quantize, "quantized.*made from"),
    (lambda f: (f / "config.json").unlink(), "neither .* a checkpoint"),
]


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
def test_damaged_and_unsafe_models_are_refused(damage, word, tmp_path, monkeypatch):
    folder = saved_model(tmp_path / "m", "Llama")
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n{CODE}\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # if it is asked
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    damage(folder)
    with pytest.raises(bupo.UsageError, match=word):
        bupo.load_model(str(folder))
    assert not (folder / "ran").exists()


def test_a_gpu_that_torch_cannot_use_is_an_error_unless_the_cpu_is_asked_for(monkeypatch):
    """Such as with an old driver. In float32 keys that queries share would take T^2 memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases = itertools.product(("cpu", "auto", "cuda"), (None, "/bin/smi"), (None, "13.0"))
    for device, driver, build in cases:
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(bupo.shutil, "which", lambda name, driver=driver: driver)
        if device == "cuda" or (device == "auto" and driver and build):
            with pytest.raises(bupo.UsageError, match=r"update its driver.*--device cpu\.$"):
                bupo.choose_device(bupo.Config(device=device))
        else:
            assert bupo.choose_device(bupo.Config(device=device))[0].type == "cpu"
    attention, key = bupo.sdpa_attention, torch.zeros(1, 2, 3, 8)
    monkeypatch.setattr(attention, "use_gqa_in_sdpa", whole := attention.use_gqa_in_sdpa)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)  # as on a T4
    assert bupo.choose_device(bupo.Config()) == (torch.device("cuda"), torch.float32)
    assert [rule(None, key, key) for rule in (whole, attention.use_gqa_in_sdpa)] == [True, False]


# Runs =============================================================================================


def flags(**settings) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def run(code: int = 0, **settings) -> Path | None:
    """Run a command line, which must end with the given exit code; returns its --out."""
    assert bupo.main(flags(**settings)) == code
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return settings.get("out")


@pytest.fixture(scope="module")
def brief(tmp_path_factory) -> dict:
    """Settings of a brief run of a copy of tiny with fewer problems; each step has some signal."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("brief") / "m")
    for file in (folder / "train.jsonl", folder / "heldout.jsonl"):
        file.write_text("\n".join(file.read_text().splitlines()[:36]))
    edit(folder / "generation_config.json", pad_token_id=-1)  # invalid, says transformers
    sizes = dict(prompts_per_step=8, group_size=4, mini_batch=4, internal_steps=2, save_every=1)
    sizes |= dict(steps=5, eval_every=2, eval_problems=4, eval_k=2, max_new_tokens=12)
    method = dict(precision="bfloat16", internal_layer="3", temperature=0.9)
    return dict(model=str(folder), **method, **sizes)


@pytest.fixture(scope="module")
def finished(brief, tmp_path_factory) -> Path:
    """A finished run in bfloat16, of two steps in phase 1 and three in phase 2."""
    return run(out=tmp_path_factory.mktemp("finished") / "a", **brief)


def lines(file: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def same_run(a: Path, b: Path) -> None:
    """Two runs have the same weights and the same logs, but for what was measured with a clock."""
    timed = ("peak_memory_gb", "seconds")
    for file in ("metrics.jsonl", "completions.jsonl"):
        first, second = ([line | dict.fromkeys(timed) for line in lines(f / file)] for f in (a, b))
        assert first == second
    last = [load_file(bupo.checkpoints(out)[-1] / "model.safetensors") for out in (a, b)]
    assert all_equal(*(weights.values() for weights in last))


STEP = """step layer reward entropy layer_entropy completion_tokens truncated zero_std_groups
clip_fraction ratio_max grad_norm sampling_error peak_memory_gb seconds"""
EVALUATION = "step eval_avg eval_se eval_pass eval_k eval_problems"


def test_a_run_writes_metrics_completions_and_float32_masters_that_transformers_loads(finished):
    metrics, folder = lines(finished / "metrics.jsonl"), finished / "checkpoint-5"
    expected = [(i, STEP) for i in range(1, 6)] + [(i, EVALUATION) for i in (0, 2, 4, 5)]
    found = [(line["step"], sorted(line)) for line in metrics]
    assert sorted(found) == sorted((i, sorted(k.split())) for i, k in expected)
    steps = [line for line in metrics if "layer" in line]
    assert [line["layer"] for line in steps] == [3, 3, 6, 6, 6]
    assert all(line["grad_norm"] > 0 for line in steps)  # each moved the weights
    assert [line["layer_entropy"] == line["entropy"] for line in steps] == [False] * 2 + [True] * 3
    assert {line["step"] for line in lines(finished / "completions.jsonl")} == {0, 2, 4, 5}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, master in load_file(folder / "model.safetensors").items():
        weight = model.get_parameter(name)
        assert weight.dtype == master.dtype == torch.float32
        assert torch.equal(weight, master)
        assert not torch.equal(weight, weight.bfloat16().float())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert "<|assistant|>" in tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_settings_json_of_a_model_gives_the_defaults(brief, finished, tmp_path, monkeypatch):
    """From its folder or the one above."""
    monkeypatch.chdir(tmp_path)  # tiny is found beside bupo.py
    of_tiny, config = json.loads((TINY / "settings.json").read_text()), bupo.configure()
    of_tiny |= {name: str(TINY / of_tiny[name]) for name in ("dataset", "eval_dataset")}
    assert {name: getattr(config, name) for name in of_tiny} == of_tiny
    for model in (str(finished), str(finished / "checkpoint-2")):
        config = bupo.configure(model, eval_k=3)
        assert (config.model, config.dataset) == (model, f"{brief['model']}/train.jsonl")
        assert (config.steps, config.temperature, config.eval_k) == (5, 0.9, 3)
    assert bupo.configure("Qwen/Qwen3-1.7B") == bupo.Config(model="Qwen/Qwen3-1.7B")


def test_a_run_is_its_last_checkpoint_as_a_model(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(model=finished, steps=0)
    said = capsys.readouterr().out
    assert re.search(r"avg@2 [\d.]+% \(standard error [\d.]+%\), pass@2 .* 4 held-out", said)
    (out,) = Path("runs").iterdir()
    for log in ("metrics.jsonl", "completions.jsonl"):
        assert lines(out / log)[-1] == {**lines(finished / log)[-1], "step": 0}
    run(code=2, model=out, steps=0, out="b")  # which has only evaluated
    assert re.fullmatch("bupo.py: .*checkpoint.*\n", capsys.readouterr().err)
    last = Path(shutil.copytree(finished, "c"), "checkpoint-10")
    Path("c/checkpoint-5").rename(last)
    weights, norm = load_file(last / "model.safetensors"), "model.norm.weight"
    assert torch.equal(bupo.load_model("c")[0].get_parameter(norm), weights[norm])


def test_a_problem_comes_once_an_epoch_in_an_order_of_its_own(brief, tmp_path, monkeypatch):
    seen, settings = [], dict(prompts_per_step=2, group_size=2, mini_batch=2, eval_problems=0)
    rows = [dict(question=f"1+{i}", answer=i) for i in range(6)]
    settings |= dict(dataset=write_rows(tmp_path / "x.jsonl", rows), steps=9)
    monkeypatch.setattr(bupo, "math_reward", lambda _, answer: seen.append(int(answer)) or 0.0)
    out = bupo.train(bupo.configure(**brief | settings, out=str(tmp_path / "a")))
    epochs = [seen[i : i + 12 : 2] for i in (0, 12, 24)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    metrics = lines(out / "metrics.jsonl")
    assert len({line["entropy"] for line in metrics}) == 9  # each step has draws of its own


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_short_run_learns_in_either_precision(precision, brief, tmp_path, monkeypatch, capsys):
    """From guesses to the one that is always right; the rate rises; auto is found and said."""
    rates, step = [], bupo.MasterAdamW.step
    monkeypatch.setattr(bupo.MasterAdamW, "step", lambda s, lr: rates.append(lr) or step(s, lr))
    file = write_rows(tmp_path / "x.jsonl", [dict(question=f"{i}+1", answer=7) for i in range(9)])
    changes = dict(dataset=file, eval_dataset=file, eval_problems=9, eval_k=8, eval_every=99)
    changes |= dict(precision=precision, internal_layer="auto", lr=1e-3, lr_warmup_steps=2)
    changes |= dict(steps=9, group_size=8)
    metrics = lines(run(out=tmp_path / "a", **brief | changes) / "metrics.jsonl")
    before, after = (line["eval_avg"] for line in metrics if "eval_avg" in line)
    assert before < 0.3 < 0.8 < after
    assert sorted(set(rates)) == [5e-4, 1e-3] == [rates[0], rates[-1]]
    layer = int(re.search(r"Boundary +layer ([1-5])", capsys.readouterr().out)[1])
    assert [line["layer"] for line in metrics if "layer" in line] == [layer] * 2 + [6] * 7
    error = max(line.get("sampling_error", 0) for line in metrics)
    assert 0 < error < (0.05 if precision == "bfloat16" else 1e-5)  # rounding


KILLED = """import os, sys, bupo, torch
save, left = torch.save, [False, False, True]  # in the third
def torn(state, file):
    save(state, file)
    if left.pop(0):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), 9)
torch.save = torn
bupo.main(sys.argv[1:])"""


def test_a_checkpoint_in_which_a_run_is_killed_is_no_checkpoint(brief, finished, tmp_path):
    out, command = tmp_path / "b", [sys.executable, "-c", KILLED]
    killed = subprocess.run([*command, *flags(out=out, **brief)], cwd=TINY.parent, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    run(resume=out)
    same_run(finished, out)
    assert not list(out.glob(".*"))  # what the killed one left


STOPS = [("INT", "update", 1), ("TERM", "group_advantages", 1), ("INT INT", "update", 0)]


@pytest.mark.parametrize(("signals", "function", "saved"), STOPS)
def test_a_stopped_run_repeats_an_undisturbed_one(
    signals, function, saved, brief, finished, tmp_path, monkeypatch, capsys
):
    """A request to stop lets the step finish and saves it, a second one interrupts at once. Resumed
    with other flags and its data elsewhere, the run keeps the layer that auto has found."""
    out, whole, calls = tmp_path / "b", getattr(bupo, function), itertools.count()

    def stop(*arguments):
        for name in signals.split() if next(calls) == 1 - saved else ():
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return whole(*arguments)

    monkeypatch.setattr(bupo, function, stop)
    monkeypatch.setattr(bupo, "find_boundary", Mock(side_effect=[3] * (2 - saved)))
    run(out=out, code=130, **brief | dict(internal_layer="auto", save_every=9, steps=9))
    assert f"--resume {out}" in capsys.readouterr().err
    assert [folder.name for folder in bupo.checkpoints(out)][-1] == f"checkpoint-{saved}"
    moved = str(shutil.copy(f"{brief['model']}/train.jsonl", out / "moved.jsonl"))
    run(resume=out, steps=5, dataset=moved)
    same_run(finished, out)
    assert Path(moved).read_text() == Path(brief["model"], "train.jsonl").read_text()  # still there


ENDS = [(math.nan, "not finite"), (torch.OutOfMemoryError, "out of memory.*-rows.*-tokens")]


@pytest.mark.parametrize(("third", "said"), ENDS)
def test_what_ends_a_run_is_said_with_a_hint(third, said, brief, tmp_path, monkeypatch, capsys):
    advantages, factor = bupo.group_advantages, Mock(side_effect=[1, 1, third, 1])
    monkeypatch.setattr(bupo, "group_advantages", lambda rewards: advantages(rewards) * factor())
    a = run(out=tmp_path / "a", code=2, **brief | dict(eval_problems=0, keep=2))
    assert re.search(f"\nbupo.py: .*{said}.* --resume {a}.\n$", capsys.readouterr().err)
    assert [line["step"] for line in lines(a / "metrics.jsonl")] == [1, 2]  # the third is no step
    assert [folder.name[-2:] for folder in bupo.checkpoints(a)] == ["-1", "-2"]
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("a full disk")))
    run(resume=a, code=2)
    assert re.search(f"-3 cannot be written .*disk.* --resume {a}.\n$", capsys.readouterr().err)
    monkeypatch.setattr(bupo, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):  # whose traceback is shown
        bupo.main([])


def test_every_setting_is_a_flag_with_help_and_both_defaults(capsys):
    for arguments, code in ((["--help"], "0"), (["--no-flag"], "2"), (["--device", "gpu"], "2")):
        with pytest.raises(SystemExit, match=code):
            bupo.main(arguments)
    said, settings = capsys.readouterr(), vars(bupo.configure())
    assert len(said.err.splitlines()) == 2
    assert "30 or 20) (default: 30)" in " ".join(said.out.split())
    assert all(re.search(f"--{name.replace('_', '-')}[ ,\n]", said.out) for name in settings)


BAD_INPUT = [
    ("--model nobody/no-such-model", "cannot be loaded"),
    ("--dataset {tmp}/none.parquet", "none.parquet"),
    ("--dataset nobody/no-such-data", "no-such-data"),
    ("--dataset {tmp}/columns.jsonl", "'a', 'b'"),
    ("--dataset {tmp}/long.jsonl --max-prompt-tokens 3 --eval-problems 0", "1 x over --max"),
    ("--dataset {tmp}/torn.jsonl", "line 2"),
    ("--steps 0 --eval-problems 0", "--steps 0"),
    ("--out {run}", "--out"),
    ("--out {tmp}/{long}", "name too long"),
    ("--internal-layer 7", "1 to 6"),
    ("--mini-batch 3", "--mini-batch must divide"),
    ("--lr nan", "--lr must be"),
    ("--micro-batch-tokens 0", "--micro-batch-tokens must be auto"),
    ("--max-new-tokens 1000", "at most 512"),
    ("--device cuda", "no NVIDIA GPU"),  # which tests do not see
    ("--optimizer-device cuda", "--optimizer-device cuda"),
    ("--resume {tmp}/nothing", "has no settings.json"),
    ("--resume {tmp}/killed", "no checkpoint to resume from; start anew"),
    ("--resume {run}/checkpoint-2", "has no settings.json"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD_INPUT)
def test_bad_input_gets_one_sentence(arguments, word, brief, finished, tmp_path, capsys):
    (tmp_path / "killed").mkdir()  # before the first checkpoint
    shutil.copy(finished / "settings.json", tmp_path / "killed")
    (tmp_path / "torn.jsonl").write_text('{"question": "1", "answer": 1}\n{"quest')
    write_rows(tmp_path / "columns.jsonl", [dict(a=1, b=2)])
    write_rows(tmp_path / "long.jsonl", [dict(question="1+2+3", answer=6)])
    before = [(file, file.stat().st_size) for f in (tmp_path, finished) for file in f.rglob("*")]
    places = dict(tmp=tmp_path, run=finished, long="x" * 300)
    own = [argument.format(**places) for argument in arguments.split()]
    short = [] if "--resume" in own else flags(**brief | dict(out=tmp_path / "new"))
    assert bupo.main([*short, *own]) == 2
    assert re.fullmatch(f".*{re.escape(word)}.*\\.\n", capsys.readouterr().err)
    assert not bupo.huggingface_hub.utils.are_progress_bars_disabled()  # downloads take long
    after = [(file, file.stat().st_size) for f in (tmp_path, finished) for file in f.rglob("*")]
    assert after == before  # nothing written, nothing lost


# The file =========================================================================================

MOST_LINES, MOST_BYTES = 1508, 85_000
TRAIN_ENDS, STOREROOM_BEGINS = 450, 800


def test_the_method_stands_first_the_map_of_the_docstring_holds_and_the_file_stays_short():
    source = Path(bupo.__file__).read_text(encoding="utf-8")
    rows, tree = source.splitlines(), ast.parse(source)
    defined = {node.name: node for node in tree.body if hasattr(node, "name")}
    found = [re.fullmatch(r"# (\d+) (.+?) =+", row) for row in rows]
    headers = [(*match.groups(), str(i)) for i, match in enumerate(found, 1) if match]
    mapped = re.findall(r"(?m)^ +(\d+) (.+?)  +lines? (\d+)-(\d+) *(.*)", bupo.__doc__)
    assert [entry[:3] for entry in mapped] == headers
    ends = [int(first) - 1 for _, _, first in headers[1:]] + [len(rows)]
    for (_, title, first, last, named), end in zip(mapped, ends, strict=True):
        nodes = [defined[name] for name in re.findall(r"\w+", named) if name in defined]
        inside = [int(first) < node.lineno <= node.end_lineno <= int(last) for node in nodes]
        assert inside == [True] * max(1, len(nodes)), title
        assert not [row for row in rows[int(last) : end] if row and row[0] != "#"], title
    storeroom = [i for i, row in enumerate(rows, 1) if re.match("#.*storeroom", row, re.I)]
    assert defined["evaluate"].end_lineno < storeroom[0] < defined["math_reward"].lineno
    assert defined["train"].end_lineno <= TRAIN_ENDS
    assert storeroom[0] <= STOREROOM_BEGINS
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert [name for name, n in sizes.items() if n > (80 if name == "train" else 60)] == []
    assert len(rows) <= MOST_LINES
    assert len(source.encode()) <= MOST_BYTES
    assert max(map(len, rows)) <= 100


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
        (r"\boxed{2+3=\boxed{5}} and \boxed{6}. I put it in \boxed{} or \fbox{ }", ["5", "6"]),
    ]:
        assert bupo.find_boxes(text) == boxes
        assert bupo.extract_boxed(text) == (boxes[-1] if boxes else None)


RIGHT = r"""
# numbers: fractions, percent, degrees, currency, units, thousands, scientific
\frac12 | 0.5    \dfrac{3}{4} | 3/4    \frac{-1}{2} | -\frac{1}{2}    -1/2 | \frac{-1}{2}
\frac{6}{8} | \frac{3}{4}    \frac1{72} | \frac{1}{72}    \frac{1+a}c | \frac{1+a}{c}
1 1/4 | \frac54    1\frac14 | 1.25    11 \frac{2}{3} | \frac{35}{3}    -1\frac{1}{2} | -1.5
2\dfrac{1}{2} | 5/2    137 \frac{1}{2} | 137.5    1\frac{1}{4}\pi | \frac{5\pi}{4}    50 | 50\%
10\% | 10    5.10\% | 5.1\%    50 \% | 50\%    50\text{ percent} | 50\%    90^\circ | 90
90° | 90^\circ    90 | 90^{\circ}    74° | 74    \frac{270}{7}^\circ | \frac{270}7\text{ degrees}
45^{\circ} | 45°    90 degrees | 90^\circ    \$5 | 5    $5 | 5    5 dollars | 5    \$10,080 | 10080
\$18.90 | 18.90    \$18.90 | 18.9    5 dollars | \$5    5\text{ dollars} | \$5
27\text{ miles} | 27    27 miles | 27    10,080 | 10080    10{,}080 | 10080    10\,080 | 10080
14,\!400 | 14400    14,\!400 | 14,400    11,\! 111,\! 111,\! 100 | 11111111100
1,000,000 | 1000000    335670 | 335{,}670    1.6\times10^{-19} | 1.6 \cdot 10^{-19}
1.6e-19 | 1.6\times 10^{-19}    3\times10^8 | 300000000    1.5 \times 10^{3} | 1500    1e6 | 1000000
6.02e23 | 6.02\times10^{23}    10^{-3} | 0.001
# roots, pi, e, complex numbers, functions, factorials, binomials
\sqrt{12} | 2\sqrt{3}    \sqrt2 | \sqrt{2}    \sqrt 2 | \sqrt{2}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}    6 + 9 i | 6+9i    5\mathrm{i} | 5i
\frac{1+i\sqrt{3}}{2} | \frac12+\frac{\sqrt3}{2}i    9i+6 | 6+9i    (1+i)^2 | 2i
14.0 + -1.0i | 14-i    e^{i\pi} | -1    e^{\frac{i\pi}{2}} | i    \log 2 | \log{2}
\ln(4) | 2\ln(2)    \ln 2 | \log 2    \tan x | \frac{\sin x}{\cos x}    \sin(2x) | 2\sin x\cos x
40!/39! | 40    \pi \approx 3.14 | \pi    \sqrt{51} \approx 7.14 | \sqrt{51}    5! | 120
(n+1)! | (n+1) n!    144 \times 23! | 144\cdot23!    \lvert x\rvert | |x|
# polynomials, equations
x^2+2x+1 | (x+1)^2    (x-2)(x+1) | x^2-x-2    3(n+1) | 3n+3    3*x | 3x    n(n-1) | n^2-n
a(7-2\pi) | 7a-2\pi a    p(p^2-1) | p^3-p    \frac{x^2-1}{x-1} | x+1    x=5 | 5    y=2x+1 | 2x+1
y=2x+1 | 2x-y+1=0    x = 5 | x=5    5=x | x=5    f(x)=x^2 | x^2    f(x) = x^2 | f(x)=x^2
m_{\max}=3 | 3
# lists, intervals, sets, tuples, vectors, matrices
2,1 | 1,2    1, 2 | 1,2    a=-2, b=-2 | -2,-2    x=1 \text{ or } x=2 | 1,2    x=1 or x=2 | x=1, x=2
1 \text{ and } 2 | 1,2    x=1, x=2 | 1,2    3, 5, 7 | 7,5,3    (-\infty, 2] | (-\infty,2]
(-∞,3] | (-\infty,3]    \left(-\infty,3\right] | (-\infty,3]    [0,\infty) | [0,+\infty)
(0,9)\cup(9,36) | (9,36)\cup(0,9)    \{1,2\} | \{2, 1\}    \{1,2\} | 1,2
\left\{1,2\right\} | \{1,2\}    \{\frac12, 3\} | \{0.5,3\}    (1, 2) | (1,2)
(1,4.5) | (1,\frac92)    \left( 3, \frac{\pi}{2} \right) | (3,\frac{\pi}{2})
# ratios, bases, choices, words, units, ordinals, letters, layout
8:7:3 | 8 : 7 : 3    52_{8} | 52_8    10001_2 | 10001_{2}    (C) | C    \text{C} | C    C. | C
\text{(B)} | B    \textbf{A} | A    \mathrm{C} | C    \textbf{(D)} | D    25 ft | 25    50 Hz | 50
0.31 s | 0.31    1.4 m/s | 1.4    12th | 12    5\text{ months} | 5
4\mathrm{~km}/\mathrm{h} | 4 km/h    inches | \text{inches}    9 square inches | 9 \mbox{ inches}^2
9 in^2 | 9\text{ square inches}    20000/\pi square meters | \frac{20000}{\pi}    12 apples | 12
x³ | x^3    1:2 | \frac12    \{-4\} | -4    1 and -1 | \{1,-1\}    5.1e-2 | 0.051    \binom52 | 10
\arcsin x | \sin^{-1} x    1<a | a>1    0 \le n | n \ge 0    x < 2 | 2 > x
\displaystyle \frac{a}{b} | \frac{a}{b}    $5$ | 5    \(5\) | 5    \text{5} | 5    5 . | 5
\mathbf{X} | X    \mathbb R | \mathbb{R}    f(x)=x^2+C | x^2+C    \infty | ∞    −3 | -3
"""
GIVEN_RIGHT = r"""
f(-2)=18 | 18    \tan A=2 | 2    a+b+c=\frac65 | \frac65    24*24=576 | 576    m+n=73 | 73
\text{proj}_b a=\frac23 | \frac{2}{3}    \angle ABC = 50^\circ | 50    P(X=2)=\frac14 | \frac14
E) | E    E). | E    (e) | E    E. 12 | E    (E) 12 | (E)    \textbf{(E)}\ 12 | \text{(E)}
\text{B. }12 | B    Yes, it converges | Yes    \text{Yes, it is} | Yes    No, it does not | No
"""
GIVEN_WRONG = r"""
B. A | A    A, B | A    A or B | A    (A) or (B) | A    AB | A    12 | A    Yes, it converges | No
Yes or No | Yes    Yes, no | No    Yes, if n=1 | Yes    2a=6 | 6    x^2=4 | 4    e^x=5 | 5
5 trillion | 5    5\text{ thirds} | 5    5 cubed | 5    5\text{ at most} | 5    5\text{ minus 3} | 5
5\text{ in base 8} | 5    5\text{ for n=1, 6 otherwise} | 5    5 dozen | 5    5\text{ plus 2} | 5
0=0 | AB=BA    x=x | AB=BA    1=2 | x=1    isinf{5} | 0    phase{5} | 0    isfinite 5 | 1
5!! | 120    f(1)-f(0) | -1    \sin\pi | 0    \infty-\infty | 0    0\cdot\infty | 0
\frac{\infty}{\infty} | 1    e^{-1000} | 0    10^{-400}\cdot\pi | 0    \sqrt{10^{40}+1}-10^{20} | 0
0^0 | 1    \text{s} | 5    5\},6 | 5    Yes, NO | Yes    True or False | True    A or b | A
c) or d) | C    \not=5 | 5    N!=5 | 5    a+b>=5 | 5    H | (h,k)
"""
WRONG = r"""
b<a<c<d<e | a<b<c<d<e    2.0001 \le n \le 43 | 2 \le n \le 43    z=-i | z=i    y\log_2 x | x\log_2 y
\sqrt[3]{x}y | \sqrt[3]{y}x    10000000000.3 | 10000000000
A^{-1}B^{-1} | B^{-1}A^{-1}    v^Tv | vv^T    \angle ABC | \angle ACB    f(y-x) | -f(x-y)
0.25\text{ cents} | \$0.25    \$5.4 | 5.4\text{ cents}    30\text{ rad} | 30^\circ
5 m | 5\text{ cm}    5 ft | 5\text{ ft}^2    5\text{ apples} | 5\text{ pears}    \infty | -\infty
10^{20}+\pi | 10^{20}    f(1,2) | f(2,1)    f(x,y) | f(y,x)    3\zeta(2) | 2\zeta(3)
\Gamma(2n) | 2\Gamma(n)    \arctan 2x | 2\arctan x    \cot 2x | 2\cot x    J_0(2) | 2J_0(1)
\text{Var}(2X) | 2\text{Var}(X)    \lfloor n^2/2\rfloor | n\lfloor n/2\rfloor
5\text{ thousand} | 5    20!+1 | 20!    x=1=2 | 1    \% | 1    5%0 | 50    [] | 1    \{\} | 1
5 | 6    50 | 5    -5 | 5    2t | 2    2\pi | 2    52_8 | 52_1    52_8 | 52    52_8 | 52_9
1,2,3 | 123    0.333333 | 1/3    0.333 | \frac13    0.33 | \frac13    3.14 | \pi    \cot x = 1 | 1
5\text{ or more} | 5    5 \text{ if } n>2 | 5    f(x)=2x | g(x)=2x    \log x=2 | 2    n!=6 | 6
|x|=3 | 3    x\neq 3 | 3    x<3 | 3    \sqrt{x}=3 | 3    x+1=3 | 3
5\text{ sin} | 5    1\pm\sqrt2 | \pm\sqrt2    2^{53}+1 | 2^{53}    1.0142286126 | 1.0142286127
\bar x y | x\bar y    10^{9},1 | 10^{9}+1,1    2 \le n \le 63 | 2 \le n \le 43
"""


def pairs(table: str, both: bool = True) -> list[tuple[str, str]]:
    """The pairs 'one | other' of a table whose cells are apart by two spaces or more, both ways."""
    cells = [cell.split(" | ") for cell in re.split(r" {2,}|\n", table.strip()) if cell[:1] != "#"]
    return [(a, b) for a, b in cells] + [(b, a) for a, b in cells if both]


def reward(answer: str, gold: str) -> float:
    return bupo.math_reward(rf"So \boxed{{{answer}}}.", gold)


def test_rewards_of_right_and_wrong_answers():
    assert [pair for pair in pairs(RIGHT) if reward(*pair) != 1] == []
    assert [pair for pair in pairs(WRONG) if reward(*pair) != 0] == []
    assert [pair for pair in pairs(GIVEN_RIGHT, both=False) if reward(*pair) != 1] == []
    assert [pair for pair in pairs(GIVEN_WRONG, both=False) if reward(*pair) != 0] == []
    assert reward(r"4} or rather \boxed{5", "5") == 1  # the last box counts
    assert bupo.math_reward("5", "5") == reward(r"5} or \boxed{4", "5") == reward("", "") == 0


ATTACKS = r"""
\sqrt{2}\cdot100!\cdot100!  \pi\cdot10^{308}\cdot10
e^{200}\cdot{}e^{200}\cdot{}e^{200}\cdot{}e^{200}  \sqrt3\cdot2^{1023}\cdot2  2^{1023}i\pi  x<\infty
-\infty<x  z>-\infty  -\infty<x<\infty  \pm\infty  nan  inf  \sqrt{10^{-400}}  e^{e^{e^{e^e}}}
(\sqrt2)^{5000}  (\sqrt2)^{-5000}  171!\cdot\sqrt2  0^0  10^{-200}\cdot\pi\cdot10^{-200}  \infty^0
\infty\cdot0  (0.5)!\cdot{}e^{800}  i^{i^{10^{9}}}  \tan\infty  \frac{x-x}{x-x}  (\infty,\infty)
\{\}  []  ,  =  x=  \%  ^\circ  \text{cm}  \lfloor{x/9}\rfloor  1=2=3
"""
VALUES = r"""
A  C  n  x  \alpha  0  1  2  -1  7  \pi  2\pi  \sqrt{2}  e  i  1+i  \frac12  n!  x^2  2x+1  (0,1)
[0,1)  (1,2)  \{0,1\}  1,2  x=2y  AB=BA  Yes  No  f(x)  \mathbb{Z}  \emptyset  50\%  30^\circ  a>1
(-\infty,2]  3:5  2021_3  |n|
"""


def test_no_text_is_paid_for_many_answers():
    for attack in ATTACKS.split():
        assert [gold for gold in VALUES.split() if reward(attack, gold)] == [], attack


def paper_golds() -> list[str]:
    if not PAPER_FILES.is_dir():
        pytest.skip("the paper's problem files are not beside this checkout")
    pandas = pytest.importorskip("pandas")
    tables = [pandas.read_parquet(file) for file in sorted(PAPER_FILES.glob("*.parquet"))]
    return [row["ground_truth"] for table in tables for row in table["reward_model"]]


RESPELLINGS = [  # what in a gold may be written how
    (r"\\d?frac(?=\{)", r"\\tfrac"),
    (r"\\d?frac\{(\w+)\}\{(\w+)\}$", r"(\1)/(\2)"),
    (r"(?<=\d) ?(?=\\pi|\\sqrt)", r" \\cdot "),
    (r"\\sqrt\{(\d+)\}$", r"\\sqrt{4 \\times \1}/2"),
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
REPEATED = r"{ } - ( 2^ +- ! | , e ' is= x ½ ± 1½ 1, \frac \sin \text{ a= ±1 ≥x"
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
        assert seconds < 1, answer[:80]


@settings(deadline=None, max_examples=300)
@given(
    strategies.one_of(strategies.text(), strategies.text(r"\{}frac123()[]+-*/^_=<,.|!$% exi²√π∞±")),
    strategies.text(r"\{}frac12(x)+-^=<,|! sin"),
)
def test_any_two_texts_get_a_reward_of_0_or_1(answer, gold):
    assert reward(answer, gold) in (0.0, 1.0)
    assert bupo.math_reward(answer, gold) in (0.0, 1.0)
