r"""See the internal policies: the pictures of BuPO (arXiv 2512.19673) for any Llama-like model, checkpoint or run.

    python analyze.py                                        the built-in model: its layers' policies, one figure
    python analyze.py --model Qwen/Qwen3-4B runs/x           several models side by side
    python analyze.py --runs runs/a runs/b                   training curves of runs of bupo.py
    python analyze.py --overview runs/x                      a run at a glance: entropy flow, phase switch, reward
    python analyze.py --layers-over-training runs/x          how the optimised layer moves, checkpoint by checkpoint
    python analyze.py --sample-layer 3 5 6                   what the policies of layers 3, 5 and 6 say

Each but the last writes FILE.png and FILE.json (every number drawn, mean and standard error) and prints a table.

    1 Measures           what is computed from the residual stream, token by token
    2 Averages           over completion tokens, with standard errors over completions
    3 Curves             what the logs of runs say, several seeds as one
    4 Pictures           draw what 2 and 3 found, and nothing else
    5 Command line       main

How it is measured. Completions are scored by the token ids that were sampled, never by text tokenised again; each
token counts at the position that predicts it, in float32, at temperature 1. Hooks see the residual stream pass
(`bupo.residual_stream`): a hidden state is measured as it comes and then forgotten, and at most --head-tokens tokens
have logits at a time. KL(pi || pi^l) = -H(pi) - E_pi[log pi^l] needs pi before the stream reaches its end. But
E_pi[log pi^l] is linear in the logits W norm(h), so the mean row of lm_head under pi, W^T pi, can stand for pi: a first
forward pass keeps D + 3 numbers per token (`final_policy`), not V. In all: two forward passes and 6 L heads, which take
nearly all of the time.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill

import matplotlib
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

import bupo
from bupo import Config, Sequences, UsageError, internal_hidden, policy_logits, residual_stream

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Record = Callable[[str, int, Tensor], None]  # takes a measure's name, its layer and its value at each of N tokens
Sums = dict[tuple[str, int], Tensor]  # (name, layer) -> (C,), float64: the sums over each completion's tokens

MODULES = ("attention_input", "attention", "ffn_input", "ffn")

# 1 Measures ===========================================================================================================


def entropy_of(logits: Tensor) -> Tensor:
    """H = -sum p log p of softmax(logits), in nats (Eq. 7). (..., V) -> (...)"""
    logps = logits.float().log_softmax(-1)  # (..., V)
    return -(logps.exp() * logps).sum(-1)


def in_chunks(measure: Callable, size: int, *tensors: Tensor) -> Tensor:
    """`measure` on at most `size` tokens at a time, so that no more of them have logits: (N, ...) each -> (N, ...)."""
    return torch.cat([measure(*chunk) for chunk in zip(*(t.split(size) for t in tensors), strict=True)])


def final_policy(model: Model, hidden: Tensor) -> Tensor:
    """What `compare` must know of pi = softmax(E_u norm(H^L)): (n, D) -> (n, D + 3).

    The columns: W^T pi (D of them), the mean of lm_head's bias under pi, H(pi) in nats, and pi's top token (exact in
    float32 up to 16 million).
    """
    head = model.get_output_embeddings()
    logits = policy_logits(model, hidden).float()  # (n, V)
    probabilities = logits.softmax(-1)  # (n, V)
    bias = probabilities @ head.bias if head.bias is not None else torch.zeros_like(hidden[:, 0])  # (n,)
    rest = torch.stack([bias, entropy_of(logits), logits.argmax(-1)], -1)  # (n, 3)
    return torch.cat([probabilities @ head.weight, rest], -1)  # (n, D + 3)


def compare(model: Model, hidden: Tensor, final: Tensor) -> Tensor:
    """pi^l next to pi: (n, D) of H^l and (n, D + 3) of `final_policy` -> (n, 3).

    The columns: H(pi^l) in nats; KL(pi || pi^l) in nats, what is lost by predicting pi with pi^l; 1 where both have the
    same top token, else 0.
    """
    mean_row, (bias, entropy, top) = final[:, :-3], final[:, -3:].unbind(-1)
    normed = model.get_decoder().norm(hidden)  # (n, D)
    logits = policy_logits(model, normed, norm=False).float()  # (n, V)
    expected = (mean_row * normed).sum(-1) + bias - logits.logsumexp(-1)  # (n,) E_pi[log pi^l]
    kl = (-entropy - expected).clamp(min=0)  # (n,); rounding may take it below 0
    return torch.stack([entropy_of(logits), kl, logits.argmax(-1) == top], -1)  # (n, 3)


def measure_all_layers(model: Model, ids: Tensor, mask: Tensor, record: Record, head_tokens: int = 1024) -> None:
    """Record every measure of every layer, at the N completion tokens of ids (B, T), mask (B, T) as from `bupo.pad`.

    Layers 0 (the embeddings) to L: 'policy', H(pi^l); 'kl', KL(pi || pi^l); 'top1', whether pi^l's top token is pi's;
    'policy_without_norm', H(softmax(E_u H^l)), but at L always with the norm. Layers 1 to L: 'attention' and 'ffn', the
    entropies of the modular policies softmax(E_u A^l) and softmax(E_u F^l) (Eq. 6); 'attention_input' and 'ffn_input',
    those of LN(H^(l-1)) and LN(H^(l-1) + A^l); 'attention_cosine' and 'ffn_cosine', those between A^l and H^(l-1), and
    between F^l and H^(l-1) + A^l: what a module writes, and the stream that it writes to.
    """
    last = len(model.get_decoder().layers)

    def at_completions(tensor: Tensor) -> Tensor:
        return tensor[:, :-1][mask[:, 1:]]  # (B, T, D) -> (N, D), the position before each completion token

    def entropies(hidden: Tensor, norm: bool) -> Tensor:
        return in_chunks(lambda h: entropy_of(policy_logits(model, h, norm)), head_tokens, hidden)  # (N,)

    final = in_chunks(partial(final_policy, model), head_tokens, at_completions(internal_hidden(model, ids, last)))
    stream = torch.empty(0)  # from the embeddings on (N, D): what the next module writes to

    def visit(name: str, layer: int, tensor: Tensor) -> None:
        nonlocal stream
        hidden = at_completions(tensor)  # (N, D)
        if name == "layer":
            stream = hidden
            policy, kl, top1 = in_chunks(partial(compare, model), head_tokens, hidden, final).unbind(-1)  # (N,) each
            record("policy", layer, policy)
            record("kl", layer, kl)
            record("top1", layer, top1)
            # All that the authors' plot has, at L too, where it is not the policy; theirs is of text tokenised again.
            record("policy_without_norm", layer, entropies(hidden, norm=False) if layer < last else policy)
        else:
            record(name, layer, entropies(hidden, norm=False))
        if name in ("attention", "ffn"):
            record(f"{name}_cosine", layer, F.cosine_similarity(hidden, stream, dim=-1))
            stream = stream + hidden  # (N, D)

    with residual_stream(model, visit):
        model.get_decoder()(input_ids=ids, use_cache=False)


def measure_one_layer(
    model: Model, ids: Tensor, mask: Tensor, record: Record, layer: int, norm: bool = True, head_tokens: int = 1024
) -> None:
    """Record how layer l relates to the layers k above it (`layers_above`), at the N completion tokens.

    'cosine' of H^l and H^k; 'kl', KL(pi^l || pi^k); the entropies whose differences are the entropy changes of layer l
    ('policy' at l - 1 and l, 'attention_input', 'attention', 'ffn_input', 'ffn' at l); and at L 'nll', -log pi of the
    token itself, whose exponential mean is the perplexity. norm: whether pi^l and pi^k, k < L, apply the final norm.
    """
    last = len(model.get_decoder().layers)
    top, later = layers_above(layer, last)
    needed, kept = {("layer", k) for k in (layer - 1, layer, *top, *later)}, {}
    needed |= {(name, layer) for name in MODULES}

    def visit(name: str, at: int, tensor: Tensor) -> None:
        if (name, at) in needed:
            kept[name, at] = tensor[:, :-1][mask[:, 1:]]  # (N, D)

    def logits(hidden: Tensor, at: int) -> Tensor:
        return policy_logits(model, hidden, norm or at == last).float()  # (n, V)

    def divergence(low: Tensor, high: Tensor, k: int) -> Tensor:
        low, high = logits(low, layer).log_softmax(-1), logits(high, k).log_softmax(-1)  # (n, V) each
        return (low.exp() * (low - high)).sum(-1)  # (n,)

    with residual_stream(model, visit):
        model.get_decoder()(input_ids=ids, use_cache=False)
    low = kept["layer", layer]  # (N, D)
    for k in top:
        record("cosine", k, F.cosine_similarity(low, kept["layer", k], dim=-1))
    for k in later:
        record("kl", k, in_chunks(partial(divergence, k=k), head_tokens, low, kept["layer", k]))
    for k in (layer - 1, layer):
        record("policy", k, in_chunks(lambda h, k=k: entropy_of(logits(h, k)), head_tokens, kept["layer", k]))
    for name in MODULES:
        hidden = kept[name, layer]  # (N, D)
        record(name, layer, in_chunks(lambda h: entropy_of(policy_logits(model, h, norm=False)), head_tokens, hidden))
    record("nll", last, -bupo.token_logps(model, ids, mask, last, head_tokens=head_tokens)[0])


def layers_above(layer: int, last: int) -> tuple[list[int], list[int]]:
    """The layers that layer l is compared with: the three top ones, and three from l + 1 to L; all of them above l."""
    spread = {layer + 1, (layer + 1 + last) // 2, last}
    return [k for k in range(last - 2, last + 1) if k > layer], sorted(k for k in spread if k > layer)


# 2 Averages ===========================================================================================================


@torch.no_grad()
def token_sums(
    model: Model, sequences: Sequences, measure: Callable, micro_tokens: int = 16384, per_token: int = 0
) -> Sums:
    """What `measure` records, summed over the tokens of each of the C completions: all that averages and errors need.

    per_token: how many numbers `measure` records of each token, for the progress bar.
    """
    model.eval()
    sums: Sums = defaultdict(lambda: torch.zeros(len(sequences), dtype=torch.float64))
    lengths = torch.tensor([len(completion) for _, completion in sequences])  # (C,)
    bar = tqdm(total=per_token * int(lengths.sum()) or None, desc="layers", leave=False, unit_scale=True)
    with bar:
        for group in bupo.micro_batches(sequences, micro_tokens):
            owner = torch.tensor(group).repeat_interleave(lengths[group])  # (N,), whose token each is

            def record(name: str, layer: int, values: Tensor, owner: Tensor = owner) -> None:
                sums[name, layer].index_add_(0, owner, values.double().cpu())
                bar.update(len(values))

            measure(model, *bupo.pad([sequences[i] for i in group], model.device), record)
    return sums


def mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """The mean over all tokens, from the sums (C,) and token counts (C,) of completions, and its standard error.

    The tokens of a completion are not independent, completions are: the error is that of a ratio of two sums over
    completions, with residuals r_i = s_i - mean n_i. One completion alone tells nothing of its error: None.
    """
    mean, count = float(sums.sum() / counts.sum()), len(counts)
    if count < 2:
        return mean, None
    residuals = sums - mean * counts  # (C,)
    return mean, math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(counts.sum())


def averages(sums: dict[str, dict[int, Tensor]], sequences: Sequences) -> dict:
    """{name: {layer: (C,)}} -> {name: {layer: [...], mean: [...], se: [...]}}, as the JSON file has them."""
    counts = torch.tensor([len(completion) for _, completion in sequences], dtype=torch.float64)  # (C,)
    found = {}
    for name, layers in sums.items():
        means, errors = zip(*(mean_and_error(layers[layer], counts) for layer in sorted(layers)), strict=True)
        found[name] = dict(layer=sorted(layers), mean=list(means), se=list(errors))
    return found


def with_changes(sums: Sums) -> dict[str, dict[int, Tensor]]:
    """{(name, layer): (C,)} -> {name: {layer: (C,)}}, joined by the entropy changes, token by token.

    'layer_change' is H(pi^l) - H(pi^(l-1)) (Eq. 8, 11), also '..._without_norm'; 'attention_change' is H(A^l) -
    H(LN(H^(l-1))) (Eq. 12), 'ffn_change' H(F^l) - H(LN(H^(l-1) + A^l)) (Eq. 13).
    """
    by_name: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, layer), values in sums.items():
        by_name[name][layer] = values
    for name, policy in (("layer_change", "policy"), ("layer_change_without_norm", "policy_without_norm")):
        entropy = by_name.get(policy, {})
        by_name[name] = {k: entropy[k] - entropy[k - 1] for k in entropy if k - 1 in entropy}
    for name in ("attention", "ffn"):
        by_name[f"{name}_change"] = {k: v - by_name[f"{name}_input"][k] for k, v in by_name[name].items()}
    return {name: layers for name, layers in by_name.items() if layers}


def profile(model: Model, sequences: Sequences, micro_tokens: int = 16384, head_tokens: int = 1024) -> dict:
    """Everything about a model's internal policies, as the JSON file has it; the measures are those of
    `measure_all_layers` and the entropy changes of `with_changes`, each with its mean and error per layer."""
    last = len(model.get_decoder().layers)
    measure = partial(measure_all_layers, head_tokens=head_tokens)
    sums = token_sums(model, sequences, measure, micro_tokens, per_token=10 * last + 4)
    found = averages(with_changes(sums), sequences)
    change = found["ffn_change"]["mean"]
    return dict(
        layers=last,
        completions=len(sequences),
        tokens=sum(len(completion) for _, completion in sequences),
        boundary_layer=bupo.boundary_layer(change),
        explores=max(change) > 0,
        max_entropy=math.log(model.get_output_embeddings().weight.shape[0]),  # nats, of a uniform policy
        measures=found,
    )


def layer_over_training(folder: str, options: argparse.Namespace) -> dict:
    """How one layer of a run moves: the averages of `measure_one_layer` at its start and at each of its checkpoints.

    The layer is --layer, by default the one that the run optimised.
    All of them are taken on the same token ids, completions of the model that the run started from (or those of
    --completions): what moves is the network, not the text. So perplexity says how far pi has left its start.
    """
    settings, records = run_config(folder), read_lines(Path(folder, "metrics.jsonl"))
    config = config_for(settings["model"], options, settings)
    saved = bupo.checkpoints(Path(folder))
    if not saved:
        raise UsageError(f"{folder} keeps no checkpoints; run bupo.py with --keep 0, which keeps them all.")
    model, tokenizer = load(config)
    last = len(model.get_decoder().layers)
    layer = next((r["layer"] for r in records if "layer" in r), last) if options.layer is None else options.layer
    if not 1 <= layer < last:
        wrong = (
            f"{folder} optimised no internal layer" if options.layer is None else f"There is no internal layer {layer}"
        )
        raise UsageError(f"{wrong}; name one from 1 to {last - 1} with --layer.")
    sequences = get_sequences(model, tokenizer, config, options)
    norm = config.internal_norm == "final"
    measure = partial(measure_one_layer, layer=layer, norm=norm, head_tokens=config.head_tokens)
    points = []
    for source in tqdm([None, *saved], desc="checkpoints"):
        if source is not None:
            model, _ = bupo.load_model(str(source), model.device)
        sums = token_sums(model, sequences, measure, config.micro_tokens)
        found = averages(with_changes(sums), sequences)
        mean, error = found["nll"]["mean"][0], found["nll"]["se"][0]
        error = None if error is None else math.exp(mean) * error  # to first order
        found["perplexity"] = dict(layer=[last], mean=[math.exp(mean)], se=[error])
        points.append(dict(step=int(source.name.rpartition("-")[2]) if source else 0, measures=found))
    tokens = sum(len(completion) for _, completion in sequences)
    facts = dict(run=short_name(folder), layer=layer, layers=last, internal_steps=settings["internal_steps"])
    return dict(facts, completions=len(sequences), tokens=tokens, points=points)


def run_at_a_glance(folder: str, options: argparse.Namespace) -> dict:
    """The entropy flow of a run at its start, at the end of phase 1 and at its last checkpoint; and its curves.

    H(pi^l) of every layer, on the same token ids each time: completions of the model that the run started from.
    """
    settings = run_config(folder)
    config = config_for(settings["model"], options, settings)
    steps = [int(source.name.rpartition("-")[2]) for source in bupo.checkpoints(Path(folder))]
    if settings["internal_steps"] not in steps[:-1]:
        keep = f"--keep 0, and a --save-every that divides its {settings['internal_steps']} steps of phase 1"
        raise UsageError(f"{folder} keeps no checkpoint of the end of phase 1; run bupo.py with {keep}.")
    (curves,) = training_curves([folder])
    model, tokenizer = load(config)
    sequences = get_sequences(model, tokenizer, config, options)
    points = []
    for step in (0, settings["internal_steps"], steps[-1]):
        if step:
            model, _ = bupo.load_model(str(Path(folder, f"checkpoint-{step}")), model.device)
        points.append(dict(step=step, **profile(model, sequences, config.micro_tokens, config.head_tokens)))
    return dict(run=short_name(folder), curves=curves, points=points)


# 3 Curves =============================================================================================================

CURVES = ("reward", "eval_avg", "entropy", "layer_entropy", "completion_tokens")
SAME_SETTING = ("seed", "out", *bupo.MAY_CHANGE)  # runs that differ in these only are repetitions of one setting


def read_lines(file: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UsageError(f"{file} is not a file of JSON lines; give one that bupo.py has written.") from error
    if not records or not all(isinstance(record, dict) and "step" in record for record in records):
        raise UsageError(f"{file} has no step in some line, or no lines; give one that bupo.py has written.")
    return records


def run_config(folder: str) -> dict:
    """The settings of a run, from its config.json."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        config = dict(json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        if {"model", "seed", "internal_layer", "internal_steps", "internal_norm"} <= config.keys():
            return config
    raise UsageError(f"{folder} is not the folder of a run; name one that bupo.py has written.")


def training_curves(folders: list[str]) -> list[dict]:
    """The curves of runs; runs of one setting become one curve each, with the standard error over the runs.

    Of a single run only eval_avg has an error, its own over problems. Steps that not all runs of a setting have reached
    are left out.
    """
    members: dict[str, dict[int, str]] = defaultdict(dict)  # setting -> seed -> folder
    for folder in folders:
        config = run_config(folder)
        setting = {name: value for name, value in config.items() if name not in SAME_SETTING}
        if not config["internal_steps"]:
            setting |= dict(internal_layer=None, internal_norm=None)  # plain GRPO has no use for them
        seeds = members[json.dumps(setting, sort_keys=True)]
        if config["seed"] in seeds:
            same = f"{seeds[config['seed']]} and {folder} are of one setting and one seed"
            raise UsageError(f"{same}, which tells nothing of the error; name one of them.")
        seeds[config["seed"]] = folder
    settings, configs = [], [json.loads(setting) for setting in members]
    for config, seeds in zip(configs, members.values(), strict=True):
        runs = [read_lines(Path(folder, "metrics.jsonl")) for folder in seeds.values()]
        training = [[record for record in run if "reward" in record] for run in runs]
        if not all(training):
            empty = list(seeds.values())[training.index([])]
            raise UsageError(f"{empty} has no training steps, so no curves; name another run.")
        settings.append(
            dict(
                runs=list(seeds.values()),
                internal_steps=config["internal_steps"],
                internal_layers=sorted({run[0]["layer"] for run in training}),  # differ where it was found by itself
                eval_k=next((record["eval_k"] for record in runs[0] if "eval_k" in record), None),
                curves={name: curve(runs, name) for name in CURVES},
            )
        )
    for setting, label in zip(settings, labels(settings, configs), strict=True):
        setting["label"] = label
    return settings


def curve(runs: list[list[dict]], name: str) -> dict:
    """One number of the logs against the step, the mean of the runs: {step: [...], mean: [...], se: [...]}."""
    values = [{r["step"]: r[name] for r in run if name in r} for run in runs]
    steps = sorted(set.intersection(*(set(v) for v in values)))
    columns = [[v[step] for v in values] for step in steps]
    if len(runs) > 1:
        errors = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
    else:
        own = {r["step"]: r["eval_se"] for r in runs[0] if name in r and name == "eval_avg"}
        errors = [own.get(step) for step in steps]
    return dict(step=steps, mean=[statistics.fmean(column) for column in columns], se=errors)


def labels(settings: list[dict], configs: list[dict]) -> list[str]:
    """What a legend calls each setting: its method, the other settings in which it differs, the number of its runs."""
    names = []
    differ = [n for n in configs[0] if len({str(c[n]) for c in configs if c.get(n) is not None}) > 1]
    for setting, config in zip(settings, configs, strict=True):
        layers, steps = "/".join(map(str, setting["internal_layers"])), setting["internal_steps"]
        parts = [f"BuPO, layer {layers} for {steps} steps" if steps else "GRPO"]
        known = ("internal_layer", "internal_steps")
        parts += [f"{n.replace('_', ' ')} {config[n]}" for n in differ if n not in known and config.get(n) is not None]
        names.append(", ".join(parts + [f"{len(setting['runs'])} seeds"] * (len(setting["runs"]) > 1)))
    twice = [
        f" ({setting['runs'][0]})" * (names.count(name) > 1) for name, setting in zip(names, settings, strict=True)
    ]
    return [name + folder for name, folder in zip(names, twice, strict=True)]


# 4 Pictures ===========================================================================================================

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito: also for the colour-blind
STYLES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("black", "X")]
plt.rc("font", size=8)
plt.rc("axes", titlesize=9, grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("lines", linewidth=1.3, markersize=3.5)
plt.rc("legend", fontsize=7, frameon=False)
plt.rc("grid", color="#e6e6e6")
plt.rc("figure.constrained_layout", use=True, w_pad=0.08)  # inches
plt.rc("savefig", dpi=200)


def line(axis: Axes, points: dict, label: str | None, style: int, dash: str = "-", scale: float = 1.0) -> None:
    """A mean with its band of one standard error; marks and dashes tell lines apart where colours do not.

    points: {layer or step: [...], mean: [...], se: [...]}.
    """
    x, mean, se = points.values()
    colour, mark = STYLES[style % len(STYLES)]
    every = max(1, len(x) // 12)
    y = [scale * m for m in mean]
    axis.plot(x, y, dash, color=colour, marker=mark, markevery=every, label=label)
    if None not in se:
        low, high = ([m + side * scale * e for m, e in zip(y, se, strict=True)] for side in (-1, 1))
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def finish(axis: Axes, title: str, x: str, y: str, rows: int = 1) -> None:
    """Name a panel and its axes; the legend, of so many rows, lies under the title, where it hides no line."""
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(title, loc="left", pad=5 + 9 * rows)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    handles = axis.get_legend_handles_labels()[0]
    if handles:
        columns = 1 if len(handles) <= rows else 2
        space = dict(borderaxespad=0.1, borderpad=0.0, columnspacing=1.2, labelspacing=0.2)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **space)


def draw_profiles(found: list[dict]) -> Figure:
    """Four panels for each model: a square for one model, columns side by side for several."""
    single = len(found) == 1
    figure = plt.figure(figsize=(7.2, 6.2) if single else (3.5 * len(found), 11.0))
    parts, columns = figure.subfigures(1, len(found), squeeze=False)[0], []
    names = [model["model"] if single else fill(model["model"], 42) for model in found]
    rows = max(name.count("\n") for name in names)
    for model, name, part in zip(found, names, parts, strict=True):
        space = " " if single else "\n" * (1 + rows - name.count("\n"))  # one height, so that the panels are level
        part.suptitle(f"{name}:{space}{model['completions']} completions, {model['tokens']:,} tokens")
        columns.append(list(part.subplots(*((2, 2) if single else (4, 1))).flat))
        draw_profile(model, columns[-1])
    for row in zip(*columns, strict=True):  # one scale for all models
        low, high = zip(*(axis.get_ylim() for axis in row), strict=True)
        for axis in row:
            axis.set_ylim(min(low), max(high))
    return figure


def draw_profile(model: dict, axes: list[Axes]) -> None:
    """The four panels of one model, from its `profile`. The embeddings, layer 0, are among the numbers only."""

    def draw(axis: Axes, name: str, label: str | None, style: int, dash: str = "-", scale: float = 1.0) -> None:
        measure = model["measures"][name]
        start = measure["layer"].index(1)
        line(axis, {key: values[start:] for key, values in measure.items()}, label, style, dash, scale)

    flow, change, agreement, cosine = axes
    draw(flow, "policy", r"layer $\pi^l$, with the final norm", 0)
    draw(flow, "policy_without_norm", r"layer $\pi^l$, without it", 3, "--")
    draw(flow, "attention", "attention $A^l$", 1, "-.")
    draw(flow, "ffn", "FFN $F^l$", 2, ":")
    flow.axhline(model["max_entropy"], color="black", linewidth=0.8, linestyle=(0, (1, 3)), label="uniform, ln V")
    finish(flow, "Entropy of the internal policies", "layer $l$", "entropy (nats)", rows=3)

    draw(change, "attention_change", "by attention", 1, "-.")
    draw(change, "ffn_change", "by the FFN", 2)
    change.axhline(0, color="black", linewidth=0.8)
    if model["explores"]:
        boundary = model["boundary_layer"]
        change.axvline(boundary, color="black", linewidth=0.9, linestyle="--", label=f"boundary layer {boundary}")
    else:
        change.plot([], [], " ", label="no layer explores")
    finish(change, "Entropy change within the block", "layer $l$", "entropy change (nats)", rows=3)

    right = agreement.twinx()
    draw(agreement, "kl", r"KL$(\pi \,\|\, \pi^l)$ (left)", 0)
    draw(right, "top1", None, 1, "--", 100)
    agreement.plot([], [], "--s", color=ORANGE, label="same top token (right)")
    right.set_ylabel("same top token (% of tokens)", color=ORANGE)
    right.set_ylim(-4, 104)
    right.grid(False)
    right.spines.right.set_visible(True)
    finish(agreement, r"Agreement with the final policy $\pi$", "layer $l$", "KL divergence (nats)")
    agreement.set_ylim(bottom=-0.04 * agreement.get_ylim()[1])  # the zeros of both axes at one height
    agreement.yaxis.label.set_color(BLUE)

    draw(cosine, "attention_cosine", r"$A^l$ and $H^{l-1}$", 1, "-.")
    draw(cosine, "ffn_cosine", r"$F^l$ and $H^{l-1}+A^l$", 2)
    cosine.axhline(0, color="black", linewidth=0.8)
    finish(cosine, "Writing and the stream written to", "layer $l$", "cosine similarity")
    for axis in axes:
        axis.set_xlim(0.6 - model["layers"] / 100, model["layers"] * 1.02 + 0.3)
        axis.set_xticks([1, *(k for k in axis.get_xticks() if 1 < k <= model["layers"])])  # layers count from 1


def shade_phase_1(axis: Axes, ends: list[int]) -> None:
    """Grey over the steps of phase 1, darker where several settings are in it."""
    for n, end in enumerate(sorted({end for end in ends if end})):
        axis.axvspan(0, end, color="black", alpha=0.08, linewidth=0, label=None if n else "phase 1")


def draw_curves(settings: list[dict]) -> Figure:
    """Reward, held-out accuracy, entropies and completion length against the step, all settings overlaid."""
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 6.0))
    (reward, accuracy, entropy, length), names = axes.flat, []
    for axis in axes.flat:
        shade_phase_1(axis, [setting["internal_steps"] for setting in settings])
    for style, setting in enumerate(settings):
        curves, (colour, mark) = setting["curves"], STYLES[style % len(STYLES)]
        line(reward, curves["reward"], None, style)
        line(entropy, curves["entropy"], None, style)
        line(entropy, curves["layer_entropy"], None, style, ":")
        line(length, curves["completion_tokens"], None, style)
        step, mean, se = curves["eval_avg"].values()
        bars = None if None in se else [100 * error for error in se]
        accuracy.errorbar(step, [100 * m for m in mean], bars, color=colour, marker=mark, capsize=2, elinewidth=0.9)
        names.append(Line2D([], [], color=colour, marker=mark, label=fill(setting["label"], 110)))
    entropy.plot([], [], "-", color="black", label=r"policy $\pi$")
    entropy.plot([], [], ":", color="black", label="policy being optimised")
    ks = "/".join(map(str, sorted({setting["eval_k"] for setting in settings if setting["eval_k"]})))
    finish(reward, "Reward in training", "training step", "mean reward")
    finish(accuracy, f"Held-out accuracy, avg@{ks}" if ks else "Held-out accuracy", "training step", "accuracy (%)")
    finish(entropy, "Entropy of the policies", "training step", "entropy (nats)", rows=2)
    finish(length, "Completion length", "training step", "tokens per completion", rows=2)
    short = len(settings) > 2 and max(len(setting["label"]) for setting in settings) < 50
    figure.legend(handles=names, loc="outside lower center", ncols=2 if short else 1)
    return figure


def draw_over_training(found: dict) -> Figure:
    """Figure 5 of the paper: what training does to the optimised layer, against the step."""
    layer, steps = found["layer"], [point["step"] for point in found["points"]]
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 6.0))
    similarity, change, divergence, perplexity = axes.flat

    def draw(axis: Axes, name: str, k: int, label: str | None, style: int, dash: str = "-") -> None:
        measures = [point["measures"][name] for point in found["points"]]
        mean, se = ([m[key][m["layer"].index(k)] for m in measures] for key in ("mean", "se"))
        line(axis, dict(step=steps, mean=mean, se=se), label, style, dash)

    for axis in axes.flat:
        shade_phase_1(axis, [found["internal_steps"]])
    above = found["points"][0]["measures"]
    for style, (k, dash) in enumerate(zip(above["cosine"]["layer"], ("-", "--", ":"), strict=False)):
        draw(similarity, "cosine", k, f"$H^{{{layer}}}$ and $H^{{{k}}}$", style, dash)
    for style, (k, dash) in enumerate(zip(above["kl"]["layer"], ("-", "--", ":"), strict=False)):
        draw(divergence, "kl", k, rf"KL$(\pi^{{{layer}}} \,\|\, \pi^{{{k}}})$", style, dash)
    draw(change, "layer_change", layer, "by the layer", 0)
    draw(change, "attention_change", layer, "by its attention", 1, "-.")
    draw(change, "ffn_change", layer, "by its FFN", 2, ":")
    change.axhline(0, color="black", linewidth=0.8)
    draw(perplexity, "perplexity", found["layers"], None, 0)
    finish(similarity, "Similarity to the top layers", "training step", "cosine similarity", rows=2)
    finish(change, f"Entropy change of layer {layer}", "training step", "entropy change (nats)", rows=2)
    finish(divergence, "Divergence from later layers", "training step", "KL divergence (nats)", rows=2)
    finish(perplexity, "Perplexity of the policy", "training step", "perplexity of the fixed completions", rows=2)
    tokens = f"{found['completions']} completions, {found['tokens']:,} tokens"
    figure.suptitle(f"{found['run']}: layer {layer} of {found['layers']}, {tokens}")
    return figure


def draw_overview(found: dict) -> Figure:
    """Left: the entropy of every layer's policy at three moments of a run. Right: reward and accuracy, with phase 1."""
    figure, (flow, reward) = plt.subplots(1, 2, figsize=(7.2, 3.0))
    names = ("before RL", "after phase 1", "at the end")
    for style, (name, point, dash) in enumerate(zip(names, found["points"], (":", "--", "-"), strict=True)):
        line(flow, point["measures"]["policy"], f"{name}, step {point['step']}", style, dash)
    setting = found["curves"]
    layer, last, curves = setting["internal_layers"][0], found["points"][0]["layers"], setting["curves"]
    flow.axvline(layer, color="black", linewidth=0.8, linestyle="--")
    flow.text(layer, 0.98, f" l = {layer}", transform=flow.get_xaxis_transform(), va="top")
    shade_phase_1(reward, [setting["internal_steps"]])
    line(reward, curves["reward"], "reward in training", 0)
    step, mean, se = curves["eval_avg"].values()  # points, no line: what lies between them was not measured
    bars = None if None in se else se
    accuracy = f"held-out accuracy, avg@{setting['eval_k']}"
    reward.errorbar(step, mean, bars, fmt="s", color=ORANGE, capsize=2, label=accuracy)
    finish(flow, "Entropy of each layer's policy", f"layer l of {last} (0: embeddings)", "entropy (nats)", rows=3)
    finish(reward, rf"Phase 1: $\pi^{{{layer}}}$, then $\pi$", "training step", "share of right answers", rows=3)
    return figure


# 5 Command line =======================================================================================================

OF_CONFIG = (  # flags that mean what they mean in bupo.py
    *("max_prompt", "max_completion", "temperature", "internal_norm", "system", "thinking", "seed"),
    *("device", "rows", "micro_tokens", "head_tokens"),
)


def config_for(model: str, options: argparse.Namespace, run: dict | None = None) -> Config:
    """bupo.py's settings for a model: the flags, then those of the run if there is one, then the defaults."""
    known = Config.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in known and value is not None}
    of_run = {name: value for name, value in (run or {}).items() if name in known}
    return Config(**{**of_run, **given, "model": model, "internal_layer": "auto", "out": ""})


def short_name(model: str) -> str:
    """What pictures call a model: its id on the Hub, or the name of its folder, after that of its run if it has one."""
    folder = Path(model).resolve()
    if not folder.exists():
        return model
    return f"{folder.parent.name}/{folder.name}" if (folder.parent / "metrics.jsonl").exists() else folder.name


def load(config: Config) -> tuple[Model, Tokenizer]:
    """The model that a run with these settings starts from, in float32."""
    model, tokenizer = bupo.load_model(config.model, bupo.choose_device(config)[0], config.seed)
    bupo.check_against_model(config, model, tokenizer)
    if config.model == "tiny":
        bupo.warm_up(model, tokenizer, config.warm_up_steps, config.seed)
    return model, tokenizer


def get_sequences(model: Model, tokenizer: Tokenizer, config: Config, options: argparse.Namespace) -> Sequences:
    """(prompt, completion) pairs of token ids: those of --completions, or sampled from the model."""
    count = 64 if options.problems is None else options.problems
    if options.completions:
        return read_completions(Path(options.completions), count, model.get_output_embeddings().weight.shape[0])
    problems = bupo.usable_problems(config.eval_dataset, count, tokenizer, config)
    prompts, completions = complete(model, tokenizer, problems, config)
    return [(prompt, completion.ids) for prompt, completion in zip(prompts, completions, strict=True)]


def complete(
    model: Model, tokenizer: Tokenizer, problems: list[bupo.Problem], config: Config
) -> tuple[list[list[int]], list[bupo.Completion]]:
    """One sampled completion of each problem: prompts as token ids, `bupo.Completion`s. The same draws at each call."""
    prompts = [bupo.encode(tokenizer, problem, config.thinking) for problem in problems]
    ends, stream = bupo.end_tokens(model, tokenizer), bupo.random_stream(model.device, config.seed, "analysis")
    limits = (config.max_completion, ends, config.temperature, config.rows)
    return prompts, bupo.sample(model, prompts, *limits, stream, "completions")


def read_completions(file: Path, count: int, vocabulary: int) -> Sequences:
    """The last so many completions of a file such as a run's completions.jsonl, as the token ids that were sampled."""
    records = read_lines(file)[-count:]
    steps = dict.fromkeys(str(record["step"]) for record in records)
    print(f"Completions {len(records)} of {file}, of training step {', '.join(steps)}")
    sequences: Sequences = [(record.get("prompt_ids", []), record.get("ids", [])) for record in records]
    for ids in (ids for pair in sequences for ids in pair):
        if not (isinstance(ids, list) and ids and all(type(i) is int for i in ids)):
            raise UsageError(f"{file} lacks prompt_ids or ids, lists of token ids; give a run's completions.jsonl.")
        if not all(0 <= i < vocabulary for i in ids):
            raise UsageError(f"{file} has token ids that the model lacks; give completions of its own tokenizer.")
    return sequences


def profile_models(options: argparse.Namespace) -> tuple[dict, Figure]:
    """Profile the models of --model one after the other; say what each table shows."""
    found = []
    for name in options.model or ["tiny"]:
        config = config_for(name, options)
        model, tokenizer = load(config)
        sequences = get_sequences(model, tokenizer, config, options)
        found.append(dict(model=short_name(name), **profile(model, sequences, config.micro_tokens, config.head_tokens)))
        say_profile(found[-1])
    return dict(models=found), draw_profiles(found)


COLUMNS = {  # of the table: the heading, and the measure under it
    "H(pi^l)": "policy",
    "no norm": "policy_without_norm",
    "H(A^l)": "attention",
    "H(F^l)": "ffn",
    "d layer": "layer_change",
    "d attn": "attention_change",
    "d FFN": "ffn_change",
    "KL": "kl",
    "top-1": "top1",
    "cos A": "attention_cosine",
    "cos F": "ffn_cosine",
}


def say_profile(found: dict) -> None:
    """A table of means, a line per layer, and what to pass to --internal-layer."""
    last, boundary, measures = found["layers"], found["boundary_layer"], found["measures"]
    print(f"\n{found['model']}: means of {found['tokens']:,} tokens. H: entropy, d: its change, KL(pi || pi^l): nats;")
    print("top-1: the share of tokens for which pi^l prefers what pi does; cos: A^l or F^l against the stream it joins")
    print("layer" + "".join(f"{heading:>8}" for heading in COLUMNS))
    for layer in range(1, last + 1):
        cells = [measures[name]["mean"][layer - measures[name]["layer"][0]] for name in COLUMNS.values()]
        print(f"{layer:5}" + "".join(f"{cell:8.2f}" for cell in cells))
    if not found["explores"]:
        print(f"No layer explores, no FFN entropy change being positive: --internal-layer {last} is plain GRPO.")
    elif boundary == last:
        print(f"The exploring region reaches layer {last}, the policy itself: --internal-layer {last} is plain GRPO.")
    else:
        print(f"Boundary layer {boundary} of {last}: pass --internal-layer {boundary} to bupo.py.")


def curves_of_runs(options: argparse.Namespace) -> tuple[dict, Figure]:
    """The curves of --runs; say the last accuracy of each."""
    settings = training_curves(options.runs)
    for setting in settings:
        for step, mean, error in list(zip(*setting["curves"]["eval_avg"].values(), strict=True))[-1:]:
            errors = "" if error is None else f" (standard error {100 * error:.1f})"
            print(f"{setting['label']}: held-out accuracy {100 * mean:.1f} %{errors} at step {step}")
    return dict(settings=settings), draw_curves(settings)


def follow_layer(options: argparse.Namespace) -> tuple[dict, Figure]:
    """Follow the layer of --layers-over-training; print a line per checkpoint."""
    found = layer_over_training(options.layers_over_training, options)
    shown = ("cosine", "kl", "layer_change", "ffn_change", "perplexity")
    print(f"\nLayer {found['layer']} of {found['layers']}; the cosine and KL to the top layer {found['layers']}; nats")
    print(" step" + "".join(f"{name.replace('_', ' '):>14}" for name in shown))
    for point in found["points"]:
        print(f"{point['step']:5}" + "".join(f"{point['measures'][name]['mean'][-1]:14.3f}" for name in shown))
    return found, draw_over_training(found)


def overview(options: argparse.Namespace) -> tuple[dict, Figure]:
    """A run at a glance: print the entropies of the layers' policies at the three moments."""
    found = run_at_a_glance(options.overview, options)
    for point in found["points"]:
        print(f"step {point['step']:4}: " + " ".join(f"{h:.2f}" for h in point["measures"]["policy"]["mean"]) + " nats")
    return found, draw_overview(found)


def speak_from_layers(options: argparse.Namespace) -> None:
    """Print completions drawn from pi^l for each l of --sample-layer, and from pi, for a few problems."""
    for name in options.model or ["tiny"]:
        config = config_for(name, options)
        model, tokenizer = load(config)
        last = len(model.get_decoder().layers)
        wrong = [layer for layer in options.sample_layer if not 1 <= layer <= last]
        if wrong:
            raise UsageError(f"--sample-layer {wrong[0]} is not there: {name} has layers 1 to {last}.")
        problems = bupo.usable_problems(config.eval_dataset, options.problems or 3, tokenizer, config)
        spoken = {}
        for layer in sorted({*options.sample_layer, last}):
            with bupo.first_layers(model, layer, norm=config.internal_norm == "final" or layer == last):
                spoken[layer] = complete(model, tokenizer, problems, config)[1]
        print(f"\n{short_name(name)}")
        for i, problem in enumerate(problems):
            print(f"\n{problem.messages[-1]['content']}  [answer {problem.answer}]")
            for layer, completions in spoken.items():
                who = f"layer {layer}" if layer < last else f"layer {last}, the policy itself"
                print(f"  {who}: {' '.join(bupo.decode(tokenizer, completions[i]).split()) or '(nothing)'}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; UsageError for those that do not go together."""
    parser = argparse.ArgumentParser(description="Pictures of internal policies and of runs; each with its numbers.")
    mode, add = parser.add_mutually_exclusive_group(), parser.add_argument
    mode.add_argument("--model", nargs="+", help="models to profile: tiny (default), Hub ids, folders, runs of bupo.py")
    mode.add_argument("--runs", nargs="+", help="draw the training curves of these runs instead")
    mode.add_argument(
        "--layers-over-training", metavar="RUN", help="follow a layer through a run's checkpoints instead"
    )
    mode.add_argument("--overview", metavar="RUN", help="show a run at a glance instead: entropy flow and phase switch")
    add("--layer", type=int, help="the layer to follow; default: the one that the run optimised")
    add("--sample-layer", type=int, nargs="+", help="only print completions drawn from these layers' policies")
    add("--dataset", dest="eval_dataset", help="problems to complete; default: as --eval-dataset of bupo.py")
    add("--problems", type=int, help="how many of them, or of --completions (64; 3 for --sample-layer)")
    add("--completions", help="score these instead of sampling: a run's completions.jsonl")
    add("--out", help="FILE for FILE.png and FILE.json; default: a name from the model or the run")
    for name in OF_CONFIG:
        f = Config.__dataclass_fields__[name]
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="")
        add("--" + name.replace("_", "-"), help="as in bupo.py: " + f.metadata["help"], **kind)
    options = parser.parse_args(arguments)
    if options.problems is not None and options.problems < 1:
        raise UsageError(f"--problems must be a number from 1 on, not {options.problems}.")
    given = {name for name, value in vars(options).items() if value is not None}
    of_runs = {"layers_over_training", "overview"}
    useless = {"runs": given - {"runs", "out"}, "sample_layer": given & {*of_runs, "completions", "out"}}
    for chosen in given & useless.keys():
        for other in sorted(useless[chosen]):
            flags = [f"--{name.removeprefix('eval_').replace('_', '-')}" for name in (chosen, other)]
            raise UsageError(f"{flags[0]} has no use for {flags[1]}; leave out one of them.")
    if options.layer is not None and not options.layers_over_training:
        raise UsageError("--layer goes with --layers-over-training; add it, or give --sample-layer.")
    return options


def prepare_out(options: argparse.Namespace) -> Path:
    """FILE without its ending, in a folder that is there: better to fail before the work than after it."""
    subjects, kind = options.model or ["tiny"], "layers"
    if options.runs:
        subjects, kind = options.runs, "curves"
    elif options.layers_over_training or options.overview:
        kind = "overview" if options.overview else "over-training"
        subjects = [options.overview or options.layers_over_training]
    names = [short_name(subject).replace("/", "-") for subject in subjects]
    out = Path(options.out or f"{'_'.join(names)}-{kind}")
    if options.out and (out.is_dir() or options.out.endswith(("/", os.sep))):
        raise UsageError(f"--out {options.out} is a folder; give a file in it, for FILE.png and FILE.json.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out.parent} cannot be written ({error.strerror}); give another --out.") from error
    return out.with_suffix("") if out.suffix in (".png", ".json") else out


def write(out: Path, numbers: dict, figure: Figure) -> None:
    """Write the numbers and the picture."""
    try:
        Path(f"{out}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        figure.savefig(f"{out}.png")
    except OSError as error:
        raise UsageError(f"{out}.png cannot be written ({error.strerror}); give another --out.") from error
    plt.close(figure)
    print(f"Written     {out}.png and {out}.json")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for what the user can mend; 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = parse(arguments)
        if options.sample_layer:
            speak_from_layers(options)
            return 0
        out = prepare_out(options)
        draw = profile_models
        if options.runs:
            draw = curves_of_runs
        elif options.overview:
            draw = overview
        elif options.layers_over_training:
            draw = follow_layer
        write(out, *draw(options))
    except UsageError as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not bupo.out_of_memory(error):
            raise
        print("analyze.py: out of memory; lower --rows, --micro-tokens or --head-tokens.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nanalyze.py: stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
