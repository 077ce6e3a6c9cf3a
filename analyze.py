r"""Pictures of internal policies, of any Llama-like model, checkpoint or run of bupo.py.

    paper          command                                          what it draws
    Figure 1       python analyze.py --model Qwen/Qwen3-4B runs/x   entropies of layers and modules
    Figure 5       python analyze.py --layers-over-training runs/x  how the optimized layer moves
    Figures 4,6,7  python analyze.py --runs runs/a runs/b           entropy, length, pass@k, reward
    -              python analyze.py --lens --model tiny runs/x     token x layer: what each says
    -              python analyze.py --overview runs/x              entropy flow and reward of a run

Counterparts of figures of arXiv 2512.19673, version 3. Each writes FILE.png and FILE.json; --lens
also FILE.html, a page. Measured: sampled ids, at the positions that predict them, at temperature 1.
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

import bupo
from bupo import Config, Model, Sequences, Tokenizer, UsageError

# 1 Measures =======================================================================================

PANELS = {  # of the profile
    "policies": ("Entropy of the internal policies", "entropy (nats)"),
    "modules": ("Entropy change by attention and FFN", "entropy change (nats)"),
    "layer": (r"Entropy change $H(\pi^l) - H(\pi^{l-1})$", "entropy change (nats)"),
    "distance": (r"How far $\pi^l$ is from the policy $\pi$", "nats per token"),
    "top": (r"Top token of $\pi^l$ is that of $\pi$", "share of tokens"),
    "cosine": ("Cosine with the stream it is added to", "cosine similarity"),
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
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # of byte-level tokenizers
AT_ONCE = 2048  # tokens that are measured at a time; all their states are kept
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
    layers: of `layer_states`; tokens: (n,), those that followed; norm: whether pi^l has one."""
    found: Layers = []
    pi = low_policy = speak(model, layers[-1]["stream"], norm=True)  # (n, V)
    for layer, at in enumerate(layers):
        top, stream = layer == len(layers) - 1, layers[layer - 1]["stream"]
        policy = speak(model, at["stream"], norm or top)  # (n, V) Eq. 5
        one = dict(policy=entropy(policy), nll=-policy.gather(-1, tokens[:, None])[:, 0])
        one |= dict(kl=kl(pi, policy), top1=policy.argmax(-1) == pi.argmax(-1))
        one["without_norm"] = entropy(speak(model, at["stream"], norm=top))
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
    """The mean over all tokens, from sums and counts of tokens (C,) of completions, and its error:
    that of a ratio of two sums over completions, with residuals r_i = s_i - mean n_i, since tokens
    are not independent, but completions are. None if there is one completion."""
    mean, count = float(sums.sum() / counts.sum()), len(counts)
    residuals = sums - mean * counts  # (C,)
    variance = count / max(1, count - 1) * float((residuals**2).sum())
    return mean, math.sqrt(variance) / float(counts.sum()) if count > 1 else None


@torch.no_grad()
def read_tokens(model: Model, tokenizer: Tokenizer, prompt: list, ids: list, norm: bool) -> dict:
    """What each pi^l, and each A^l and F^l (Eq. 6), says where `ids` follow a prompt, with its five
    top tokens. settled: the layer from which on the token that came next is on top."""
    text = cache(partial(token_text, tokenizer))
    layers = layer_states(model, *bupo.pad([(prompt, ids)], model.device))
    following = torch.tensor(ids, device=model.device)[:, None]  # (n, 1)
    pi, rows, on_top = speak(model, layers[-1]["stream"], norm=True), [], []  # (n, V)
    for layer, at in enumerate(layers):
        for state in ("attention", "ffn", "stream")[0 if layer else 2 :]:
            normed = state == "stream" and (norm or layer == len(layers) - 1)
            policy = speak(model, at[state], normed)  # (n, V)
            top, said = policy.topk(5), policy.gather(-1, following)  # (n, 5), (n, 1)
            row = dict(entropy=entropy(policy), prob=said[:, 0].exp(), kl=kl(pi, policy))
            row |= dict(top_ids=top.indices, top_probs=top.values.exp())
            row["rank"] = 1 + (policy > said).sum(-1)
            one: dict = {name: value.tolist() for name, value in row.items()}
            names = [[text(token) for token in cell] for cell in one["top_ids"]]
            rows.append(dict(layer=layer, state=state, top=names, **one))
        on_top.append(top.indices[:, 0] == following[:, 0])  # (n,), of pi^l
    stays = torch.stack(on_top).flip(0).cumprod(0).sum(0)  # (n,), of how many layers from L down
    settled = [len(layers) - count if count else None for count in stays.tolist()]
    words = [text(token) for token in (prompt[-1], *ids)]
    facts = dict(prompt=tokenizer.decode(prompt), ids=ids, read=words[:-1], next=words[1:])
    return dict(facts, settled=settled, rows=rows)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token with its leading space; \\xf0 for a byte that is not a whole character."""
    name, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if "\ufffd" in text and all(char in BYTES for char in name):
        return bytes(BYTES[char] for char in name).decode(errors="backslashreplace")
    if name and name.startswith("\u2581"):  # how SentencePiece writes a space
        return name.replace("\u2581", " ")
    return text or f"[{token}]"  # lm_head may be larger than the vocabulary


# 2 Runs ===========================================================================================

CURVES = {  # what --runs draws of the logs
    "reward": ("Reward in training", "mean reward"),
    "eval_avg": ("Held-out accuracy, avg@k", "share of right answers"),
    "eval_pass": ("pass@k at each run's last evaluation", "share of problems solved"),
    "entropy": (r"Entropy of the policy $\pi$", "entropy (nats)"),
    "layer_entropy": ("Entropy of the policy being optimized", "entropy (nats)"),
    "completion_tokens": ("Completion length", "tokens per completion"),
}
FREE = {"seed", "out", "steps", "save_every", "keep", "device", "optimizer_device", "threads"}
FREE |= {"rollout_rows", "micro_batch_tokens", "gradient_checkpointing"}  # not of the setting


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
        run = bupo.read_settings(Path(folder))
        setting = json.dumps({name: value for name, value in run.items() if name not in FREE})
        groups[setting].append((folder, run, read_lines(Path(folder, "metrics.jsonl"))))
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
    with its name, or None. Of one title: one scale in a row. The same lines in all: one legend."""
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
    known = {c for c in token if c.isprintable() and glyphs.get_char_index(ord(c))}
    token = "".join(c if c in known else ascii(c)[1:-1] for c in token)
    most = int((width - 0.03) * 72 / (0.602 * FONT.get_size()))  # all its characters are as wide
    return token if len(token) <= most else token[: most - 1] + "\u2026"


def draw_lens(found: list[dict]) -> plt.Figure:
    """Token x layer: for each model bands of tokens; a layer is a row, what follows is on top."""
    found = found if len(found) < 4 else [found[0], found[-1]]
    count, models = len(found[0]["ids"]), len(found)
    bands = math.ceil(count / max(4, 26 // models))
    columns = math.ceil(count / bands)
    layers = [[row for row in one["rows"] if row["state"] == "stream"] for one in found]
    shown = [rows[:: -max(1, math.ceil((len(rows) - 1) / 16))][::-1] for rows in layers]
    cell = min(max(9.0 / (columns * models), 0.34), 0.6)  # inches of width; 0.2 of height
    size = max(6, models * (cell * columns + 0.5)), bands * (2 + max(map(len, shown))) * 0.2 + 1.1
    most = max(value for rows in shown for row in rows for value in row["entropy"])
    colors = plt.cm.ScalarMappable(plt.Normalize(0, most), "Blues_r")
    figure, axes = plt.subplots(bands, models, figsize=size, squeeze=False)
    how: Any = dict(ha="center", va="center_baseline", parse_math=False, font=FONT)
    for k, axis in enumerate(axes.flat):
        band, m = divmod(k, models)
        model, rows, part = found[m], shown[m], range(count)[band * columns : (band + 1) * columns]
        numbers = [[row["entropy"][i] for i in part] for row in rows]
        first = {i: model["settled"][i] for i in part if model["settled"][i] is not None}
        axis.pcolormesh(numbers, cmap=colors.cmap, norm=colors.norm, edgecolors="white", lw=0.6)
        for x, i in enumerate(part):
            axis.text(x + 0.5, -0.55, cell_text(model["read"][i], cell), color="#666666", **how)
            text = cell_text(model["next"][i], cell)
            axis.text(x + 0.5, len(rows) + 0.45, text, color=FRAME, **how)
            for y, row in enumerate(rows):
                light = sum(colors.to_rgba(row["entropy"][i])[:2]) > 0.95  # of blues: red and green
                text, ink = cell_text(row["top"][i][0], cell), "black" if light else "white"
                axis.text(x + 0.5, y + 0.45, text, color=ink, **how)
                if i in first and row["layer"] >= first[i]:
                    del first[i]
                    frame: Any = dict(fill=False, edgecolor=FRAME, linewidth=1.2)
                    axis.add_patch(plt.Rectangle((x + 0.05, y + 0.07), 0.9, 0.86, **frame))
        names = ["reads", *(row["layer"] for row in rows), "next"]
        axis.set(xlim=(0, columns), ylim=(-1, max(map(len, shown)) + 1), xticks=[], frame_on=False)
        axis.set_yticks([y - 0.5 for y in range(len(names))], names)
        axis.tick_params(length=0, pad=2, grid_linewidth=0)
        axis.set_title("" if band else f"layers of {model['model']}", loc="left", pad=2)
    title = "First choice of each layer; framed: from there up it is what came next"
    asked = cell_text(found[0]["prompt"][-90:], width=8)
    figure.suptitle(f"{asked} ...\n{title}", parse_math=False)
    bar: Any = dict(location="bottom", shrink=0.5, aspect=50, label=r"entropy of $\pi^l$ (nats)")
    figure.colorbar(colors, ax=axes, **bar)
    return figure


def lens_page(found: list[dict]) -> str:
    """The page: assets/lens.html with the data, which hold each text once and, instead of
    probabilities and nats, whole thousandths."""
    used = Counter(w for one in found for row in one["rows"] for cell in row["top"] for w in cell)
    number = {word: i for i, (word, _) in enumerate(used.most_common())}  # the commonest: shortest

    def compact(row: dict) -> dict:
        one: dict = {key: [round(1000 * x) for x in row[key]] for key in ("entropy", "prob", "kl")}
        one["probs"] = [round(1000 * x) for cell in row["top_probs"] for x in cell]
        one["top"] = [number[word] for cell in row["top"] for word in cell]
        kind = dict(stream="", attention="A", ffn="F")[row["state"]]
        return dict(one, rank=row["rank"], label=f"{kind}{row['layer']}")

    data = {k: found[0][k] for k in ("prompt", "read", "next")}
    data |= dict(words=list(number), models=[])
    for one in found:
        rows = list(map(compact, one["rows"]))
        data["models"].append(dict(name=one["model"], settled=one["settled"], rows=rows))
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag within
    template = Path(__file__).resolve().parent / "assets" / "lens.html"
    return template.read_text(encoding="utf-8").replace("DATA", text, 1)


# 4 Modes: load, get sequences, measure, print, draw ===============================================


def load(name: str, options: argparse.Namespace, run: str = "") -> tuple:
    """Settings (flags, else those of the run or of the model's folder), model and tokenizer."""
    given = {k: v for k, v in vars(options).items() if k in SETTINGS and v is not None}
    config = bupo.configure(run or name, **given)
    model, tokenizer = bupo.load_model(name)
    device, dtype = bupo.choose_device(config)
    for weight in model.parameters():  # buffers stay float32, as rotary ones need it
        weight.data = weight.data.to(device, dtype)
    return config, model.to(device), tokenizer


def get_sequences(config: Config, model: Model, tokenizer: Tokenizer, options: Any) -> Sequences:
    """(prompt, completion) pairs of token ids: of --text, of --completions, or sampled."""
    n, source, lens = options.nth or 1, options.completions or "--text", options.lens is not None
    count = n if lens else options.problems or 64
    part = slice(n - 1, n) if lens else slice(-count, None)  # of a file, the newest
    if options.text is not None:
        ids = tokenizer(options.text).input_ids
        sequences = [(ids[:1], ids[1:])]
    elif options.completions:
        records = read_lines(Path(source))[part]
        sequences = [(record.get("prompt_ids"), record.get("ids")) for record in records]
    else:
        config.steps, config.eval_problems = 0, count  # nothing is trained
        problems = bupo.usable_problems(config, model, tokenizer)[0][part]
        if not problems:
            raise UsageError(f"{config.eval_dataset} has no problem {n}; give a lower --nth.")
        rollout = bupo.rollout(model, tokenizer, problems, config, "analysis")
        sequences = [(c.prompt, c.ids) for c in rollout]
    size = len(model.get_output_embeddings().weight)
    for ids in (ids for pair in sequences or [((), ())] for ids in pair):
        if not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise UsageError(f"{source} lacks prompt_ids or ids of this model; give another.")
    bupo.check_lengths(model, max(len(prompt) + len(ids) for prompt, ids in sequences))
    return sequences


def profile_models(options: argparse.Namespace) -> tuple[dict, plt.Figure]:
    """Models side by side, and what to pass to --internal-layer."""
    found = []
    for name in options.model or ["tiny"]:
        config, model, tokenizer = load(name, options)
        sequences = get_sequences(config, model, tokenizer, options)
        one = profile(model, sequences, AT_ONCE)
        found.append(dict(model=name, **one))
        print(f"\n{name}: {one['tokens']:,} tokens; H, its change d, KL(pi || pi^l), NLL: nats")
        print("layer" + "".join(f"{column:>8}" for column, *_ in MEASURES.values()))
        for k in range(-one["layers"], 0):
            means = (one["measures"][key]["mean"][k] for key in MEASURES)
            print(f"{one['layers'] + k + 1:5}" + "".join(f"{mean:8.2f}" for mean in means))
        why = "Boundary layer" if one["explores"] else "No FFN raises the entropy: last layer"
        print(f"{why} {one['boundary_layer']}: pass --internal-layer {one['boundary_layer']}")
    panels = []
    for panel, (title, y) in PANELS.items():
        for one in found:
            names = {name: label for name, (_, where, label) in MEASURES.items() if where == panel}
            drawn = {label: one["measures"][name] for name, label in names.items()}
            lines = {k: {a: b[-one["layers"] :] for a, b in v.items()} for k, v in drawn.items()}
            marked = one["explores"] and panel == "modules"
            mark = (one["boundary_layer"], "boundary") if marked else None
            panels.append((title, f"layer $l$ of {one['model']}", y, lines, mark))
    tokens = (f"{m['model']}: {m['completions']} completions, {m['tokens']} tokens" for m in found)
    return dict(models=found), picture(panels, len(found) if found[1:] else 3, "\n".join(tokens))


def lens(options: argparse.Namespace) -> tuple[dict, plt.Figure, str]:
    """Token x layer, of one completion; of several models the first one samples it."""
    found: list[dict] = []
    saved = bupo.checkpoints(Path(options.lens)) if options.lens else []
    if options.lens and not saved:
        raise UsageError(f"{options.lens} keeps no checkpoint; name a run, or models with --model.")
    names = [*map(str, saved), *(options.model or [])] or ["tiny"]
    for name in names:
        config, model, tokenizer = load(name, options)
        if not found:
            ((prompt, ids),) = get_sequences(config, model, tokenizer, options)
            ids = ids[:96]  # what a page holds
            text = tokenizer.decode([*prompt, *ids])
            print(f"\n{text}")
        if tokenizer.decode([*prompt, *ids]) != text:
            raise UsageError(f"{name} has another tokenizer than {names[0]}; leave it out.")
        one = read_tokens(model, tokenizer, prompt, ids, config.internal_norm == "final")
        found.append(dict(model=name, **one))
    return dict(models=found), draw_lens(found), lens_page(found)


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
    phase = max(one["internal_steps"] for one in settings)
    return dict(settings=settings), picture(panels, 3, "Runs; gray: phase 1", phase)


def follow_run(options: argparse.Namespace) -> tuple[dict, plt.Figure]:
    """The start of a run and its checkpoints, on the same token ids: what moves is the network."""
    folder = options.overview or options.layers_over_training
    run, (logs,) = bupo.read_settings(Path(folder)), training_curves([folder])
    saved = {int(path.name.partition("-")[2]): path for path in bupo.checkpoints(Path(folder))}
    if not saved:
        raise UsageError(f"{folder} keeps no checkpoint; run bupo.py with --keep 0, or wait.")
    config, model, tokenizer = load(run["model"], options, folder)
    last, steps = len(model.get_decoder().layers), logs["internal_steps"]
    layer = options.layer or (logs["layers"] or [last])[0]
    if options.layers_over_training and layer >= last:
        raise UsageError(f"{folder} has no internal layer {layer}; name one below {last}: --layer.")
    sequences, points = get_sequences(config, model, tokenizer, options), []
    norm, kept = config.internal_norm == "final", {steps, max(saved)} if options.overview else saved
    for step in sorted({0, *saved.keys() & kept}):
        if step:
            _, model, _ = load(str(saved[step]), options, folder)
        found = profile(model, sequences, AT_ONCE, norm, layer)
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
        nll = dict(policy=over("nll", last))
        panels = [
            (f"Similarity of layers {layer} and k", STEP, "cosine of $H^l$ and $H^k$", near, None),
            (f"Entropy change of layer {layer}", STEP, "entropy change (nats)", change, None),
            (f"KL of layers {layer} and k", STEP, r"KL$(\pi^l \| \pi^k)$ (nats)", far, None),
            (r"Log-perplexity of $\pi$ on them", STEP, "nats per token", nll, None),
        ]
    whose = "" if options.completions else " of step 0"
    title = f"{folder}: the same {len(sequences)} completions{whose} throughout\ngray: phase 1"
    return dict(logs, run=folder, layer=layer, points=points), picture(panels, 2, title, steps)


# 5 Command line ===================================================================================

AS_IN_BUPO = "eval_dataset system max_prompt_tokens max_new_tokens temperature internal_norm seed"
SETTINGS = [*AS_IN_BUPO.split(), "device", "precision", "rollout_rows", "threads"]
OF_RUN = {*SETTINGS, "problems", "completions", "out"}
MODES: dict[str, tuple[Any, str, set[str]]] = {  # default FILE, and the other flags it uses
    "runs": (curves_of_runs, "curves", {"out"}),
    "lens": (lens, "lens", OF_RUN - {"problems"} | {"model", "text", "nth"}),
    "overview": (follow_run, "overview", OF_RUN),
    "layers_over_training": (follow_run, "over-training", OF_RUN | {"layer"}),
    "model": (profile_models, "layers", OF_RUN - {"internal_norm"}),  # it shows both
}


def parse(arguments: list[str] | None = None) -> tuple[tuple, argparse.Namespace]:
    """The mode of a command line, of MODES, and its options."""

    def flag(name: str) -> str:  # --dataset: the held-out one, since nothing is trained
        return "--" + name.removeprefix("eval_").replace("_", "-")

    parser = argparse.ArgumentParser(description="See internal policies.", usage=argparse.SUPPRESS)
    add: Any = parser.add_argument
    add("--model", nargs="+", help="tiny [default], Hub ids, folders, checkpoints, runs")
    add("--lens", nargs="?", const="", metavar="RUN", help="token x layer; of all its checkpoints")
    add("--runs", nargs="+", help="training curves of these runs")
    add("--overview", metavar="RUN", help="a run at a glance")
    add("--layers-over-training", metavar="RUN", help="a layer through a run's checkpoints")
    add("--layer", type=int, help="of --layers-over-training [the one that was optimized]")
    add("--text", help="what --lens reads in place of a completion")
    add("--nth", type=int, help="problem, or line of --completions, for --lens [1]")
    add("--problems", type=int, help="how many to complete [64]")
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
    try:
        (work, ending, _), options = parse(arguments)
        out = Path(options.out or ".")
        out = out / ending if out.is_dir() else Path(str(out).removesuffix(".png"))
        out.parent.mkdir(parents=True, exist_ok=True)  # better to fail before the work
        facts, figure, *page = work(options)
        Path(f"{out}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        figure.savefig(f"{out}.png", dpi=200)
        plt.close(figure)
        for text in page:
            Path(f"{out}.html").write_text(text, encoding="utf-8")
        print(f"Written     {out}.png, {out}.json{f' and {out}.html' if page else ''}")
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, UsageError) as error:
        said = str(error).rstrip(".")
    except torch.OutOfMemoryError:
        said = "out of memory; lower --rollout-rows, or take --device cpu"
    print(f"analyze.py: {said}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
