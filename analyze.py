r"""Pictures of internal policies, of any Llama-like model, checkpoint or run of bupo.py.

    paper          command                                          what it draws
    Figure 1       python analyze.py --model Qwen/Qwen3-4B runs/x   entropies of layers and modules
    Figure 5       python analyze.py --layers-over-training runs/x  how the optimized layer moves
    Figures 4,6,7  python analyze.py --runs runs/a runs/b           entropy, length, pass@k, reward
    -              python analyze.py --lens --model tiny runs/x     token x layer: what each says
    -              python analyze.py --overview runs/x              entropy flow and reward of a run
    -              python analyze.py --sample-layer 3 5             completions by these layers

Counterparts of figures of arXiv 2512.19673, version 3. All but the last write FILE.png, FILE.json.
Measured are the ids that were sampled, each at the position that predicts it, at temperature 1.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
from matplotlib.colors import LogNorm
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor, nn
from tqdm import tqdm

import bupo
from bupo import Config, Model, Sequences, Tokenizer, UsageError

# 1 Measures =======================================================================================

PANELS = {  # of the profile
    "policies": ("Entropy of the internal policies", "entropy (nats)"),
    "modules": ("Entropy change by attention and FFN", "entropy change (nats)"),
    "layer": (r"Entropy change $H(\pi^l) - H(\pi^{l-1})$", "entropy change (nats)"),
    "distance": (r"How far $\pi^l$ is from the policy $\pi$", "nats per token"),
    "top": (r"Top token of $\pi^l$ is that of $\pi$", "share of tokens"),
    "cosine": ("What is written, and the stream it joins", "cosine similarity"),
}
MEASURES = {  # of `measure`: the column in the table, panel and label in the profile
    "policy": ("H(pi^l)", "policies", r"layer $\pi^l$"),
    "without_norm": ("no norm", "policies", r"$\pi^l$ without norm"),
    "attention": ("H(A^l)", "policies", "attention $A^l$"),
    "ffn": ("H(F^l)", "policies", "FFN $F^l$"),
    "layer_change": ("d layer", "layer", r"layer $l$"),
    "attention_change": ("d attn", "modules", "by attention"),
    "ffn_change": ("d FFN", "modules", "by the FFN"),
    "kl": ("KL", "distance", r"KL$(\pi \| \pi^l)$"),
    "nll": ("NLL", "distance", r"$-\log\,\pi^l$(next token)"),
    "top1": ("top-1", "top", r"layer $\pi^l$"),
    "cos_attention": ("cos A", "cosine", "attention $A^l$"),
    "cos_ffn": ("cos F", "cosine", "FFN $F^l$"),
}
Layers = list[dict[str, Tensor]]  # 0..L: of each, name -> states (N, D) or measures (N,)


def layer_states(model: Model, ids: Tensor, mask: Tensor) -> Layers:
    """The states of layers l = 0..L (0: the embeddings) at the N completion tokens, (N, D) each.

    ids, mask: (B, T); each token is read at the position before it. 'stream' is H^l; for l > 0 also
    'attention_input' LN(H^(l-1)), 'attention' A^l, 'ffn_input' LN(H^(l-1) + A^l), 'ffn' F^l."""
    names = "stream", "attention_input", "attention", "ffn_input", "ffn"
    layers: Layers = []
    for block in bupo.residual_stream(model.eval(), ids):  # (B, T, D) each
        one = dict(zip(names, (h[:, :-1][mask[:, 1:]] for h in block), strict=True))  # (N, D) each
        layers = layers or [dict(stream=one["stream"])]
        layers.append(one | dict(stream=one["stream"] + one["attention"] + one["ffn"]))
    return layers


def speak(model: Model, state: Tensor, norm: bool = False) -> Tensor:
    """Log-probabilities (n, V) of the policy that speaks from a state (n, D)."""
    return bupo.policy_logits(model, state, norm).float().log_softmax(-1)


def entropy(logps: Tensor) -> Tensor:
    """H = -sum p log p, in nats (Eq. 7): (n, V) -> (n,)."""
    return -(logps.exp() * logps).sum(-1)


def kl(logps: Tensor, others: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), in nats: (n, V), (n, V) -> (n,)."""
    return (logps.exp() * (logps - others)).sum(-1)


def measure(model: Model, layers: Layers, tokens: Tensor, norm: bool, low: int) -> Layers:
    """The MEASURES (n,) of each layer 0..L at n tokens; above layer `low` (0: none) two more.

    layers: of `layer_states`; tokens: (n,), those that followed; norm: whether pi^l has one.
    """
    found: Layers = []
    pi = low_policy = speak(model, layers[-1]["stream"], norm=True)  # (n, V)
    for layer, at in enumerate(layers):
        top, stream = layer == len(layers) - 1, layers[layer - 1]["stream"]
        policy = speak(model, at["stream"], norm or top)  # (n, V) Eq. 5
        one = dict(policy=entropy(policy), kl=kl(pi, policy))
        one["top1"] = policy.argmax(-1) == pi.argmax(-1)
        one["without_norm"] = entropy(speak(model, at["stream"], norm=top))
        one["nll"] = -policy.gather(-1, tokens[:, None])[:, 0]
        if layer:
            one["layer_change"] = one["policy"] - found[-1]["policy"]  # Eq. 8
            for name in ("attention", "ffn"):  # Eq. 6, and Eq. 11 to 13
                one[name] = entropy(speak(model, at[name]))
                one[f"{name}_change"] = one[name] - entropy(speak(model, at[f"{name}_input"]))
                one[f"cos_{name}"] = torch.cosine_similarity(at[name].float(), stream.float())
                stream = stream + at[name]
        if layer == low:
            low_policy, low_stream = policy, at["stream"].float()
        if layer > low > 0:
            one["low_kl"] = kl(low_policy, policy)
            one["low_cosine"] = torch.cosine_similarity(low_stream, at["stream"].float())
        found.append(one)
    return found


@torch.no_grad()
def profile(model: Model, sequences: Sequences, size: int, norm: bool = True, low: int = 0) -> dict:
    """The measures of all layers, averaged over completion tokens, as the JSON file has them.
    size: tokens in a micro-batch, whose states are all kept; norm, low: as in `measure`."""
    counts = torch.tensor([len(completion) for _, completion in sequences])  # (C,)
    sums: dict = defaultdict(lambda: torch.zeros(len(counts)).double())  # (name, layer) -> (C,)
    batches = bupo.micro_batches(sequences, size, range(len(sequences)))
    for batch in tqdm(batches, desc="measuring", leave=False):
        ids, mask = bupo.pad([sequences[i] for i in batch], model.device)  # (B, T) each
        owner = torch.tensor(batch).repeat_interleave(counts[batch])  # (N,) whose token each is
        tokens, layers = ids[:, 1:][mask[:, 1:]], layer_states(model, ids, mask)
        for part in torch.arange(len(tokens)).split(max(1, bupo.HEAD_TOKENS // 4)):
            chunk = [{name: state[part] for name, state in at.items()} for at in layers]  # (n, D)
            for layer, found in enumerate(measure(model, chunk, tokens[part], norm, low)):
                for name, value in found.items():
                    sums[name, layer].index_add_(0, owner[part], value.double().cpu())
    measures: dict = defaultdict(lambda: dict(layer=[], mean=[], se=[]))
    for (name, layer), total in sums.items():
        mean, error = mean_and_error(total, counts)
        for key, number in dict(layer=layer, mean=mean, se=error).items():
            measures[name][key].append(number)
    change, uniform = measures["ffn_change"]["mean"], len(model.get_output_embeddings().weight)
    facts = dict(layers=len(change), completions=len(counts), tokens=int(counts.sum()))
    facts |= dict(boundary_layer=bupo.boundary_layer(change), explores=max(change) > 0)
    return facts | dict(max_entropy=math.log(uniform), measures=measures)


def mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """The mean over all tokens, from sums and counts of tokens (C,) of completions; its error.

    Completions are independent, not their tokens: the error is that of a ratio of two sums over
    completions, with residuals r_i = s_i - mean n_i. None if there is one completion.
    """
    mean, count = float(sums.sum() / counts.sum()), len(counts)
    residuals = sums - mean * counts  # (C,)
    variance = count / max(1, count - 1) * float((residuals**2).sum())
    return mean, math.sqrt(variance) / float(counts.sum()) if count > 1 else None


@torch.no_grad()
def read_tokens(model: Model, tokenizer: Tokenizer, prompt: list, ids: list, norm: bool) -> dict:
    """What each pi^l says where `ids` follow a prompt: COLORS, and its five top tokens."""

    def texts(tokens: list) -> list[str]:
        return tokenizer.batch_decode([[token] for token in tokens])

    layers = layer_states(model, *bupo.pad([(prompt, ids)], model.device))
    following, rows = torch.tensor(ids, device=model.device)[:, None], []  # (n, 1)
    pi = speak(model, layers[-1]["stream"], norm=True)  # (n, V)
    for layer, at in enumerate(layers):
        policy = speak(model, at["stream"], norm or layer == len(layers) - 1)  # (n, V)
        top, said = policy.topk(5), policy.gather(-1, following)  # (n, 5), (n, 1)
        row = dict(entropy=entropy(policy), prob=said[:, 0].exp(), rank=1 + (policy > said).sum(-1))
        row |= dict(kl=kl(pi, policy), top_ids=top.indices, top_probs=top.values.exp())
        one: dict = {name: value.tolist() for name, value in row.items()}
        rows.append(dict(layer=layer, top=[texts(cell) for cell in one["top_ids"]], **one))
    return dict(ids=ids, read=texts([prompt[-1], *ids[:-1]]), next=texts(ids), rows=rows)


# 2 Runs ===========================================================================================

CURVES = {  # what --runs draws of the logs
    "reward": ("Reward in training", "mean reward"),
    "eval_avg": ("Held-out accuracy, avg@k", "share of right answers"),
    "eval_pass": ("pass@k at the last evaluation", "share of problems solved"),
    "entropy": (r"Entropy of the policy $\pi$", "entropy (nats)"),
    "layer_entropy": ("Entropy of the policy being optimized", "entropy (nats)"),
    "completion_tokens": ("Completion length", "tokens per completion"),
}
FREE = {"seed", "out", "steps", "save_every", "keep", "device", "rollout_rows", "optimizer_device"}
FREE |= {"micro_batch_tokens", "gradient_checkpointing"}  # runs that differ in these: one setting


def read_lines(file: Path) -> list[dict]:
    """The objects of a file of JSON lines, but a last line that a run has not ended yet."""
    with bupo.explain(f"{file} has no JSON lines with a step", "give a file of bupo.py"):
        text = file.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text[: text.rindex("\n")].splitlines()]
        return [dict(record, step=record["step"]) for record in records]


def training_curves(folders: list[str]) -> list[dict]:
    """Curves of runs; those of one setting become one, with its error, as far as all runs got."""
    groups: dict[str, list[tuple]] = defaultdict(list)
    for folder in folders:
        config, records = bupo.read_config(folder), read_lines(Path(folder, "metrics.jsonl"))
        setting = {name: value for name, value in config.items() if name not in FREE}
        groups[json.dumps(setting)].append((folder, config, records))
    settings = []
    for group in groups.values():
        names, configs, runs = zip(*group, strict=True)
        if len({config["seed"] for config in configs}) < len(names):
            raise UsageError(f"{' and '.join(names)}: one setting, one seed; give each seed once.")
        layers = sorted({record["layer"] for run in runs for record in run if "layer" in record})
        steps = configs[0]["internal_steps"] if layers else 0
        method = f"BuPO, layer {layers[0]} for {steps} steps" if steps else "GRPO"
        label = f"{method if layers else 'evaluation'}: {', '.join(names)}"
        curves = {name: curve(runs, name) for name in CURVES}
        settings.append(dict(label=label, layers=layers, internal_steps=steps, curves=curves))
    return settings


def curve(runs: tuple[list[dict], ...], name: str) -> dict:
    """One number of the logs against the step, or pass@k against k, the mean of the runs."""
    values = [{r["step"]: r[name] for r in run if r.get(name) is not None} for run in runs]
    if name == "eval_pass":
        values = [dict(enumerate(v[max(v)], 1)) if v else {} for v in values]
    steps = sorted(set.intersection(*map(set, values)))
    columns = [[v[step] for v in values] for step in steps]
    errors: list[float | None] = [stdev(c) / len(c) ** 0.5 if len(c) > 1 else None for c in columns]
    if name == "eval_avg" and len(runs) == 1:  # has an error of its own, over problems
        own = {r["step"]: r.get("eval_se") for r in runs[0]}
        errors = [own[step] for step in steps]
    return dict(step=steps, mean=[fmean(column) for column in columns], se=errors)


# 3 Pictures =======================================================================================

FRAME, FONT = "#D55E00", FontProperties(family="DejaVu Sans Mono", size=6.5)  # points
COLORS = {  # of the lens
    "entropy": r"entropy of $\pi^l$ (nats)",
    "prob": r"probability of the next token under $\pi^l$",
    "rank": r"rank of the next token in $\pi^l$",
    "kl": r"KL$(\pi \| \pi^l)$ (nats)",
}
STEP = "training step"  # the x axis on which phase 1 is gray
plt.switch_backend("Agg")  # no window
plt.rc("font", size=8, family="DejaVu Sans")  # comes with matplotlib
colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black"]  # Okabe, Ito
plt.rc("axes", titlesize=9, grid=True, prop_cycle=plt.cycler(color=colors, marker=[*"os^DvPX"]))
plt.rc("axes.spines", top=False, right=False)
plt.rc("lines", linewidth=1.3, markersize=3.5)
plt.rc("legend", fontsize=7, frameon=False, columnspacing=1, labelspacing=0.2, borderpad=0)
plt.rc("grid", color="#e6e6e6")
plt.rc("figure.constrained_layout", use=True, w_pad=0.08)  # inches


def picture(panels: list, columns: int, title: str, phase: int = 0) -> plt.Figure:
    """Panels of means with bands of one standard error; gray up to step `phase`, phase 1's end.

    A panel: title, x, y, lines {label: {layer or step, mean, se: [...]}}, and a place on the x axis
    with its name, or None. Of one title: one scale in a row. The same lines in all: one legend.
    """
    rows, same = len(panels) // columns, len({panel[0] for panel in panels}) < len(panels)
    how: Any = dict(squeeze=False, sharey="row" if same else "none")
    figure, axes = plt.subplots(rows, columns, figsize=(3.15 * columns, 2.6 * rows), **how)
    one_legend = len({tuple(lines) for *_, lines, _ in panels}) == 1
    for axis, (name, x, y, lines, mark) in zip(axes.flat, panels, strict=True):
        for label, (at, mean, se) in ((label, line.values()) for label, line in lines.items()):
            (line,) = axis.plot(at, mean, label=label, markevery=max(1, len(at) // 12))
            if None not in se:
                low, high = ([m + s * e for m, e in zip(mean, se, strict=True)] for s in (-1, 1))
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if phase and x == STEP:
            axis.axvspan(0, phase, color="black", alpha=0.08, linewidth=0)
        if axis.get_ylim()[0] < 0 < axis.get_ylim()[1]:
            axis.axhline(0, color="black", linewidth=0.8)
        if mark:
            axis.axvline(mark[0], color="black", linestyle="--", label=f"{mark[1]} layer {mark[0]}")
        axis.set(xlabel=x, ylabel=y)
        axis.set_title(name, loc="left", pad=5 if one_legend else 23)
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if not one_legend:  # under the title, where it hides no line
            count = len(axis.get_legend_handles_labels()[0])
            axis.legend(ncols=(count + 1) // 2 or 1, loc="lower left", bbox_to_anchor=(-0.02, 0.98))
    if one_legend:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center")
    figure.suptitle(f"{title}; bands: one standard error")
    return figure


def cell_text(token: str, width: float) -> str:
    """A token in a cell of so many inches: spaces visible, escapes for what the font lacks; cut."""
    glyphs = get_font(findfont(FONT))
    token = token.translate({ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u21e5"})
    known = [c.isprintable() and glyphs.get_char_index(ord(c)) for c in token]
    token = "".join(c if k else ascii(c)[1:-1] for c, k in zip(token, known, strict=True))
    most = int((width - 0.03) * 72 / (0.602 * FONT.get_size()))  # all its characters are as wide
    return token if len(token) <= most else token[: most - 1] + "\u2026"


def draw_lens(found: list[dict], color: str) -> plt.Figure:
    """Token x layer: for each model bands of tokens; a layer is a row, what follows is on top."""
    count, models = len(found[0]["ids"]), len(found)
    bands = math.ceil(count / max(4, 26 // models))
    columns = math.ceil(count / bands)
    shown = [m["rows"][:: -max(1, math.ceil((len(m["rows"]) - 1) / 16))][::-1] for m in found]
    cell = min(max(9.0 / (columns * models), 0.34), 0.6)  # inches of width; 0.2 of height
    size = max(6, models * (cell * columns + 0.5)), bands * (2 + max(map(len, shown))) * 0.2 + 1.1
    values = [value for rows in shown for row in rows for value in row[color]]
    scale = LogNorm(1, max(2, *values)) if color == "rank" else plt.Normalize(0, max(1e-3, *values))
    colors = plt.cm.ScalarMappable(scale, "Blues" if color == "prob" else "Blues_r")
    figure, axes = plt.subplots(bands, models, figsize=size, squeeze=False)

    def write(axis: plt.Axes, x: float, y: float, token: str, color: str) -> None:
        how: Any = dict(ha="center", va="center_baseline", parse_math=False, font=FONT, color=color)
        axis.text(x + 0.5, y + 0.45, cell_text(token, cell), **how)

    for k, axis in enumerate(axes.flat):
        band, m = divmod(k, models)
        model, rows, part = found[m], shown[m], range(count)[band * columns : (band + 1) * columns]
        numbers = [[row[color][i] for i in part] for row in rows]
        axis.pcolormesh(numbers, cmap=colors.cmap, norm=scale, edgecolors="white", linewidth=0.6)
        for x, i in enumerate(part):
            write(axis, x, -1, model["read"][i], "#666666")
            write(axis, x, len(rows), model["next"][i], FRAME)
            for y, row in enumerate(rows):
                light = sum(colors.to_rgba(row[color][i])[:2]) > 0.95  # of blues: red and green
                write(axis, x, y, row["top"][i][0], "black" if light else "white")
                if row["top_ids"][i][0] == model["ids"][i]:
                    frame = plt.Rectangle((x + 0.05, y + 0.07), 0.9, 0.86, fill=False)
                    axis.add_patch(frame).set(edgecolor=FRAME, linewidth=1.2)
        names = ["reads", *(row["layer"] for row in rows), "next"]
        axis.set(xlim=(0, columns), ylim=(-1, max(map(len, shown)) + 1), xticks=[], frame_on=False)
        axis.set_yticks([y - 0.5 for y in range(len(names))], names)
        axis.tick_params(length=0, pad=2, grid_linewidth=0)
        axis.set_title("" if band else f"layers of {model['model']}", loc="left", pad=2)
    title = r"Top token of each layer's policy $\pi^l$; framed where it is the token that came next"
    figure.suptitle(title, fontsize=10)
    figure.colorbar(colors, ax=axes, location="bottom", shrink=0.5, aspect=50, label=COLORS[color])
    return figure


# 4 Modes: load, get sequences, measure, print, draw ===============================================


def load(name: str, options: argparse.Namespace, run: dict | None = None) -> tuple:
    """The settings for a model, by the flags given and what the run asked; model and tokenizer."""
    given = {k: v for k, v in vars(options).items() if k in SETTINGS and v is not None}
    asked = {k: run[k] for k in SETTINGS if run and k not in ("device", "precision")}
    config = bupo.configure(**{**asked, **given, "model": name})
    model, tokenizer = bupo.load_model(name, seed=config.seed)
    if name == "tiny":
        torch.set_num_threads(1)  # more make so small a model slower
        bupo.pretrain(model, tokenizer, config.pretrain_steps, config.seed)
    return config, bupo.place(model, *bupo.choose_device(config)), tokenizer


def get_sequences(config: Config, model: Model, tokenizer: Tokenizer, options: Any) -> Sequences:
    """(prompt, completion) pairs of token ids: of --text, of --completions, or sampled."""
    n, source = options.nth or 1, options.completions or "--text"
    count = n if options.lens else options.problems or 64
    part = slice(n - 1, n) if options.lens else slice(-count, None)  # of a file, the newest
    if options.text is not None:
        ids = tokenizer(options.text).input_ids
        sequences = [(ids[:1], ids[1:])]
    elif options.completions:
        records = read_lines(Path(source))[part]
        sequences = [(record.get("prompt_ids"), record.get("ids")) for record in records]
    else:
        source = config.eval_dataset
        problems = bupo.load_problems(source, count, config.system)[part]
        sequences = complete(config, model, tokenizer, problems)
    size = len(model.get_output_embeddings().weight)
    for ids in (ids for pair in sequences or [((), ())] for ids in pair):
        if not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise UsageError(f"{source} lacks prompt_ids or ids of this model; give another.")
    return sequences


def complete(config: Config, model: Model, tokenizer: Tokenizer, problems: list) -> Sequences:
    """A sampled completion of each problem, the same at each call."""
    prompts = [bupo.encode(tokenizer, problem) for problem in problems]
    rows = bupo.rollout_rows(model, max(map(len, prompts), default=0), config)
    stream = bupo.random_stream(model.device, config.seed, "analysis")
    how = config.max_new_tokens, bupo.end_tokens(model, tokenizer), config.temperature, rows
    found = bupo.sample(model, prompts, *how, stream)
    return [(prompt, completion.ids) for prompt, completion in zip(prompts, found, strict=True)]


def profile_models(options: argparse.Namespace) -> tuple[dict, plt.Figure]:
    """Models side by side, and what to pass to --internal-layer."""
    found = []
    for name in options.model or ["tiny"]:
        config, model, tokenizer = load(name, options)
        sequences = get_sequences(config, model, tokenizer, options)
        one = profile(model, sequences, config.micro_batch_tokens // 4)
        found.append(dict(model=name, **one))
        print(f"\n{name}: means of {one['tokens']:,} tokens; H, d, KL and NLL in nats")
        print("layer" + "".join(f"{column:>8}" for column, *_ in MEASURES.values()))
        for k in range(-one["layers"], 0):
            means = (one["measures"][key]["mean"][k] for key in MEASURES)
            print(f"{one['layers'] + k + 1:5}" + "".join(f"{mean:8.2f}" for mean in means))
        why = "Boundary layer" if one["explores"] else "No FFN raises the entropy: last layer"
        print(f"{why} {one['boundary_layer']}: pass --internal-layer {one['boundary_layer']}")
    panels = []
    for panel, (title, y) in PANELS.items():
        for one in found:
            x = f"layer $l$ of {one['model']}"
            names = {name: label for name, (_, where, label) in MEASURES.items() if where == panel}
            drawn = {label: one["measures"][name] for name, label in names.items()}
            lines = {k: {a: b[-one["layers"] :] for a, b in v.items()} for k, v in drawn.items()}
            mark = one["boundary_layer"], "boundary"
            marked = one["explores"] and panel == "modules"
            panels.append((title, x, y, lines, mark if marked else None))
    tokens = (f"{m['model']}: {m['completions']} completions, {m['tokens']} tokens" for m in found)
    return dict(models=found), picture(panels, len(found) if found[1:] else 3, "\n".join(tokens))


def lens(options: argparse.Namespace) -> tuple[dict, plt.Figure]:
    """Token x layer, of one completion; of several models the first one samples it."""
    found: list[dict] = []
    for name in options.model or ["tiny"]:
        config, model, tokenizer = load(name, options)
        if not found:
            ((prompt, ids),) = get_sequences(config, model, tokenizer, options)
            ids = ids[:96]  # what a page holds
            text = tokenizer.decode([*prompt, *ids])
            print(f"\n{text}")
        if tokenizer.decode([*prompt, *ids]) != text:
            raise UsageError(f"{name} has another tokenizer than {options.model[0]}; leave it out.")
        one = read_tokens(model, tokenizer, prompt, ids, config.internal_norm == "final")
        found.append(dict(model=name, **one))
    return dict(models=found), draw_lens(found, options.color or "entropy")


def curves_of_runs(options: argparse.Namespace) -> tuple[dict, plt.Figure]:
    """Training curves, and the held-out accuracies of each setting."""
    settings, panels = training_curves(options.runs), []
    for one in settings:
        for step, mean, error in zip(*one["curves"]["eval_avg"].values(), strict=True):
            errors = "" if error is None else f" (standard error {error:.1%})"
            print(f"{one['label']}: step {step}, held-out accuracy {mean:.1%}{errors}")
    for name, (title, y) in CURVES.items():
        lines = {one["label"]: one["curves"][name] for one in settings}
        panels.append((title, "k" if name == "eval_pass" else STEP, y, lines, None))
    end = max(one["internal_steps"] for one in settings)
    return dict(settings=settings), picture(panels, 3, "Runs; gray: phase 1", end)


def follow_run(options: argparse.Namespace) -> tuple[dict, plt.Figure]:
    """The start of a run and its checkpoints, on the same token ids: what moves is the network."""
    folder = options.overview or options.layers_over_training
    run, (logs,) = bupo.read_config(folder), training_curves([folder])
    saved = {int(path.name.partition("-")[2]): path for path in bupo.checkpoints(Path(folder))}
    if not saved:
        raise UsageError(f"{folder} keeps no checkpoint; run bupo.py with --keep 0, or wait.")
    config, model, tokenizer = load(run["model"], options, run)
    last, steps = len(model.get_decoder().layers), logs["internal_steps"]
    layer = options.layer or (logs["layers"] or [last])[0]
    if options.layers_over_training and layer >= last:
        raise UsageError(f"{folder} has no internal layer {layer}; name one below {last}: --layer.")
    sequences, points = get_sequences(config, model, tokenizer, options), []
    norm, kept = config.internal_norm == "final", {steps, max(saved)} if options.overview else saved
    for step in sorted({0, *saved.keys() & kept}):
        if step:
            model, _ = bupo.load_model(str(saved[step]), model.device, model.dtype)
        found = profile(model, sequences, config.micro_batch_tokens // 4, norm, layer)
        points.append(dict(step=step, **found))

    def over(name: str, k: int) -> dict:  # a measure of layer k against the step
        found = [point["measures"][name] for point in points]
        values = {key: [one[key][one["layer"].index(k)] for one in found] for key in ("mean", "se")}
        return dict(step=[point["step"] for point in points], **values)

    if options.overview:
        when = {max(saved): "last checkpoint", steps: "after phase 1", 0: "before RL"}
        flow = {f"step {p['step']}, {when[p['step']]}": p["measures"]["policy"] for p in points}
        x, mark = f"layer $l$ of {last} (0: embeddings)", (layer, "optimized") if steps else None
        title = rf"Phase 1: $\pi^{{{layer}}}$ (gray), then $\pi$" if steps else r"GRPO: $\pi$"
        names = dict(reward="reward in training", eval_avg="held-out accuracy")
        lines = {label: logs["curves"][key] for key, label in names.items()}
        panels: list = [("Entropy of each layer's policy", x, "entropy (nats)", flow, mark)]
        panels.append((title, STEP, "share of right answers", lines, None))
    else:
        above = sorted({layer + 1, (layer + 1 + last) // 2, last})
        near, far = ({f"k = {k}": over(f"low_{n}", k) for k in above} for n in ("cosine", "kl"))
        change = {n: over(f"{n.lower()}_change", layer) for n in ("layer", "attention", "FFN")}
        rest = [
            (f"Similarity of layers {layer} and k", "cosine of $H^l$ and $H^k$", near),
            (f"Entropy change of layer {layer}", "entropy change (nats)", change),
            (f"Divergence of layers {layer} and k", r"KL$(\pi^l \| \pi^k)$ (nats)", far),
            (r"Log-perplexity of $\pi$", "nats per token", {"policy": over("nll", last)}),
        ]
        panels = [(name, STEP, y, lines, None) for name, y, lines in rest]
    title = f"{folder}: the same {len(sequences)} completions at each step; gray: phase 1"
    facts = dict(logs, run=folder, layer=layer, points=points)
    return facts, picture(panels, 2, title, steps)


def speak_from_layers(options: argparse.Namespace) -> None:
    """Print completions by pi^l for each l of --sample-layer, and by pi, of a few problems."""
    for name in options.model or ["tiny"]:
        config, model, tokenizer = load(name, options)
        decoder, spoken = model.get_decoder(), {}
        blocks, norm, last = decoder.layers, decoder.norm, len(decoder.layers)
        if not all(1 <= layer <= last for layer in options.sample_layer):
            raise UsageError(f"--sample-layer must be from 1 to {last}, the layers of {name}.")
        problems = bupo.load_problems(config.eval_dataset, options.problems or 3, config.system)
        for layer in sorted({*options.sample_layer, last}):  # a model that ends there is pi^l
            normed = config.internal_norm == "final" or layer == last
            decoder.layers, decoder.norm = blocks[:layer], norm if normed else nn.Identity()
            spoken[layer] = complete(config, model, tokenizer, problems)
        for i, problem in enumerate(problems):
            print(f"\n{name}: {problem.messages[-1]['content']}  [{problem.answer}]")
            for layer, sequences in spoken.items():
                text = tokenizer.decode(sequences[i][1], skip_special_tokens=True)
                print(f"  layer {layer} of {last}: {' '.join(text.split())}")


# 5 Command line ===================================================================================

AS_IN_BUPO = "eval_dataset system max_new_tokens temperature internal_norm "
AS_IN_BUPO += "pretrain_steps seed device precision rollout_rows micro_batch_tokens"
SETTINGS = AS_IN_BUPO.split()
OF_RUN = {*SETTINGS, "problems", "completions", "out"}
MODES: dict[str, tuple[Callable, str, set[str]]] = {  # default FILE, and the other flags it uses
    "runs": (curves_of_runs, "curves", {"out"}),
    "lens": (lens, "lens", OF_RUN - {"problems"} | {"model", "text", "nth", "color"}),
    "overview": (follow_run, "overview", OF_RUN),
    "layers_over_training": (follow_run, "over-training", OF_RUN | {"layer"}),
    "sample_layer": (speak_from_layers, "", {*SETTINGS, "problems", "model"}),
    "model": (profile_models, "layers", OF_RUN),
}


def parse(arguments: list[str] | None = None) -> tuple[tuple, argparse.Namespace]:
    """The mode of a command line, of MODES, and its options."""

    def flag(name: str) -> str:  # --dataset: the held-out one, since nothing is trained
        return "--" + name.removeprefix("eval_").replace("_", "-")

    parser = argparse.ArgumentParser(description="See internal policies.", usage=argparse.SUPPRESS)
    add: Any = parser.add_argument
    add("--model", nargs="+", help="tiny [default], Hub ids, folders, checkpoints, runs")
    add("--lens", action="store_true", default=None, help="token x layer: what each layer says")
    add("--runs", nargs="+", help="training curves of these runs")
    add("--overview", metavar="RUN", help="a run at a glance")
    add("--layers-over-training", metavar="RUN", help="a layer through a run's checkpoints")
    add("--sample-layer", type=int, nargs="+", help="completions by the policies of these layers")
    add("--layer", type=int, help="of --layers-over-training [the one that was optimized]")
    add("--text", help="what --lens reads in place of a completion")
    add("--nth", type=int, help="problem, or line of --completions, for --lens [1]")
    add("--color", choices=COLORS, help="what the color of a cell of --lens shows [entropy]")
    add("--problems", type=int, help="how many to complete [64, for --sample-layer 3]")
    add("--completions", help="a run's completions.jsonl, to measure these instead of sampling")
    add("--out", help="FILE for FILE.png and FILE.json [named by the mode], or its folder")
    for name in SETTINGS:
        kind = type(getattr(Config, name))
        add(flag(name), dest=name, type=kind, metavar="", help="as in bupo.py")
    options = parser.parse_args(arguments)
    given = [name for name, value in vars(options).items() if value is not None]
    mode = next((mode for mode in MODES if mode in given), "model")
    for name in given:
        if name not in {mode, *MODES[mode][2]}:
            raise UsageError(f"{flag(mode)} has no use for {flag(name)}; leave out one of them.")
        if name in ("problems", "nth", "layer") and getattr(options, name) < 1:
            raise UsageError(f"--{name} must be a number from 1 on, not {getattr(options, name)}.")
    return MODES[mode], options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for what the user can fix; 130 after Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        (work, ending, _), options = parse(arguments)
        out = Path((options.out or ".").removesuffix(".png"))
        out = out / ending if out.is_dir() else out
        out.parent.mkdir(parents=True, exist_ok=True)  # better to fail before the work
        if found := work(options):
            Path(f"{out}.json").write_text(json.dumps(found[0], indent=1) + "\n", encoding="utf-8")
            found[1].savefig(f"{out}.png", dpi=200)
            plt.close(found[1])
            print(f"Written     {out}.png and {out}.json")
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, UsageError, RuntimeError, MemoryError) as error:
        memory = bupo.out_of_memory(error)
        if isinstance(error, RuntimeError) and not memory:
            raise
        said = "out of memory; lower --rollout-rows or --micro-batch-tokens." if memory else error
        print(f"analyze.py: {said}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
