"""What bupo.py needs of a GPU's memory, counted part by part; and the count beside measured allocations.

python benchmarks/memory.py --model Qwen/Qwen3-1.7B --gpu 24   # counted: the parts, and the settings that fit
python benchmarks/memory.py --check                            # measured: small models on this CPU, beside their count

All flags of bupo.py are taken too. The count follows every tensor of bupo.py that grows with the model or with a
setting, in the worst case: all prompts and completions have their full length. Left out are numbers of which there is
one per token and head, and what only CUDA and its allocator know: context, workspaces, fragmentation.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import bupo

RESERVE = 0.05  # of the card, for what the count leaves out: a judgement, not a measurement
LEAST_ROWS, LEAST_COMPLETION = 8, 256  # no smaller settings are proposed
QWEN3_1_7B = dict(  # of its config.json, for machines that cannot reach the hub
    **dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, head_dim=128),
    **dict(num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=40960),
)
Parts = dict[str, int]  # bytes by part, under these names
NAMES = dict(
    masters="master weights, float32",
    moments="moments of AdamW",
    copy="bfloat16 copy for rollouts",
    cache="keys and values",
    read="keys and values of prompts, as read",
    widened="the tensor being widened",
    gradients="gradients, float32",
    kept="kept of all blocks for the backward pass",
    block="activations of one block",
    cast="matrices that autocast has cached",
    logits="logits",
    states="hidden states at the head",
    head="the head cast, and its gradient",
    tied="gradient of the tied head, waiting",
    embeddings="gradient of the embeddings",
)

# Counted ==============================================================================================================


def skeleton(name: str) -> bupo.Model:
    """The model on the meta device: shapes without weights. name: as for bupo.py; a folder with config.json will do."""
    if name == "tiny":
        return bupo.tiny_model(seed=0)[0].to("meta")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if name != "Qwen/Qwen3-1.7B":
            mend = "check the name and the connection, or name a folder that holds it"
            raise bupo.UsageError(f"The config.json of {name} cannot be read; {mend}.") from error
        config = transformers.Qwen3Config(**QWEN3_1_7B)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def shape(model: bupo.Model) -> SimpleNamespace:
    """What memory depends on: numbers of parameters (`all`, a `block`'s, the `head`'s), and widths of a token."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    block = decoder.layers[0]
    if not (hasattr(block.mlp, "gate_proj") and hasattr(block.self_attn, "q_proj")):
        raise bupo.UsageError(f"{type(model).__name__} has other blocks than Llama's, so the count would be wrong.")
    parameters = dict(all=model, block=block, head=head)
    return SimpleNamespace(
        **{name: sum(p.numel() for p in module.parameters()) for name, module in parameters.items()},  # tied: once
        tied=head.weight is decoder.embed_tokens.weight,
        layers=len(decoder.layers),
        vocabulary=head.out_features,
        hidden=head.in_features,
        ffn=block.mlp.gate_proj.out_features,
        query=block.self_attn.q_proj.out_features,
        key=block.self_attn.k_proj.out_features,
        query_norm=hasattr(block.self_attn, "q_norm"),  # as in Qwen3
    )


def total(parts: Parts) -> int:
    return sum(parts.values())


def persisting(s: SimpleNamespace, width: int, moment_bytes: float) -> Parts:
    """What is there at all times; width: 2 to compute in bfloat16, 4 in float32; moment_bytes: per parameter."""
    return dict(masters=4 * s.all, moments=int(moment_bytes * s.all), copy=2 * s.all if width == 2 else 0)


def rollout(s: SimpleNamespace, config: bupo.Config, width: int, sequences: int) -> Parts:
    """`sample`, for so many sequences, at the moment when it holds most, beside what persists."""
    rows = min(config.rows, sequences)
    token = s.layers * 2 * s.key * width  # keys and values of one token
    widenings = math.ceil((config.max_completion - 1) / 257)  # SlotCache grows by 1 + 256 columns at a time
    columns = config.max_prompt + 257 * widenings
    prompts = max(1, config.rows // 8) * config.max_prompt  # tokens that are read at once, if no two prompts are equal
    full = dict(cache=rows * columns * token)
    logits, working = 4 * rows * s.vocabulary, prompts * (4 * s.hidden + 3 * s.ffn) * width
    moments = [
        dict(read=prompts * token, block=working),  # the first prompts
        full | dict(logits=4 * logits),  # two of the last step, two on the way to the log-probabilities
        full | dict(logits=2 * logits, widened=rows * s.key * width * max(0, columns - 257)),  # one tensor exists twice
    ]
    if sequences > rows:  # the next prompts are read when all rows have ended at full length
        moments.append(full | dict(read=prompts * token, block=working, logits=2 * logits))
    return max(moments, key=total)


def update(s: SimpleNamespace, config: bupo.Config, width: int, layer: int) -> Parts:
    """`update` of pi^layer, likewise. A mini-batch has more than one micro-batch: the first one's gradients are there.

    Under autocast the residual stream stays float32, and so do norms; matrices and what they multiply are bfloat16.
    """
    low, length = width == 2, config.max_prompt + config.max_completion
    tokens = max(length, config.micro_tokens)
    scored = tokens * config.max_completion // length
    chunk = min(config.head_tokens, scored) * s.vocabulary  # elements of a chunk's logits
    states = 4 * scored * s.hidden  # H^l of the scored positions

    # The backward pass needs of each block its input, and the rest at once or, if recomputed, a block at a time.
    inputs, cast = 4 * tokens * s.hidden, 2 * s.block * low
    norms = (12 + (10 if low else 8)) * s.hidden  # two normed vectors, H + A; the inputs of five or two matrices
    attention = width * 2 * (s.query + s.key) + s.query_norm * (6 if low else 8) * (s.query + s.key)
    rest = tokens * (norms + attention + 4 * width * s.ffn) + cast
    kept = layer * (inputs if config.recompute else inputs + rest)
    deepest = inputs + 2 * width * tokens * s.ffn  # gradients within the FFN, where they are largest
    gradients = 4 * (layer * s.block + s.hidden + (1 if s.tied else 2) * s.head)
    always, tied, phase_1 = dict(gradients=gradients, kept=kept), 4 * s.head * s.tied, layer < s.layers
    moments = [
        # phase 1, before there are gradients: the entropies of a chunk, from logits, log-probabilities and p log p
        dict(cast=2 * low * (s.head + layer * s.block), logits=(12 + 2 * low) * chunk * phase_1, states=states),
        # the last chunk forward: autocast has cached each matrix that it met (without recomputing they are in `kept`)
        always | dict(cast=2 * low * (s.head + config.recompute * layer * s.block), logits=8 * chunk, states=states),
        # a chunk backward: log-softmax and the gradients of both its sides; the head's gradient so far
        always | dict(logits=12 * chunk, head=4 * s.head, states=2 * states),
        # its end: the chunk's gradient of the head is added, in float32 into a third matrix
        always | dict(logits=2 * chunk * low, head=(6 if low else 12) * s.head, states=2 * states),
        # the top block backward; the gradient of a tied head waits for that of the embeddings
        always | dict(block=deepest + config.recompute * rest, tied=tied),
        # the end
        dict(gradients=gradients, block=inputs, tied=tied, embeddings=4 * s.head),
    ]
    return max(moments, key=total)


def fit(s: SimpleNamespace, config: bupo.Config, width: int, room: float) -> bupo.Config | None:
    """The largest settings, none above `config`'s, with which rollouts and updates need `room` bytes at most, or None.

    Completions are cut, by halves, only where --rows, --micro-tokens and --head-tokens cannot make the room.
    """

    def halves(most: int, least: int) -> list[int]:
        return [most >> i for i in range(most.bit_length()) if most >> i >= least]

    for completion in halves(config.max_completion, min(config.max_completion, LEAST_COMPLETION)):
        length, change = completion + config.max_prompt, functools.partial(dataclasses.replace, config)
        pairs = itertools.product(halves(max(config.micro_tokens, length), length), halves(config.head_tokens, 64))
        passes = [change(max_completion=completion, micro_tokens=micro, head_tokens=head) for micro, head in pairs]
        passes = [c for c in passes if total(update(s, c, width, s.layers)) <= room]
        rows = [change(max_completion=completion, rows=n) for n in range(min(config.rows, LEAST_ROWS), config.rows + 1)]
        rows = [c.rows for c in rows if total(rollout(s, c, width, 2 * c.rows)) <= room]
        if passes and rows:
            largest = max(passes, key=lambda c: c.micro_tokens * c.head_tokens)
            return dataclasses.replace(largest, rows=rows[-1])
    return None


def report(config: bupo.Config, cards: list[float], moment_bytes: float) -> None:
    """Print the parts and what fits each card, in GB of 10^9 bytes."""
    s, width = shape(skeleton(config.model)), 4 if config.precision == "float32" else 2
    if config.internal_layer.isdecimal() and not 1 <= int(config.internal_layer) <= s.layers:
        raise bupo.UsageError(f"--internal-layer must be 1 to {s.layers} for {config.model}, or auto.")
    layer = int(config.internal_layer) if config.internal_layer.isdecimal() else max(1, s.layers // 5)
    columns = {
        "at all times": persisting(s, width, moment_bytes),
        "rollouts, at most": rollout(s, config, width, 2 * config.rows),
        "update of pi, at most": update(s, config, width, s.layers),
        f"update of pi^{layer}, at most": update(s, config, width, layer),
    }
    print(f"{config.model}: {s.all / 1e9:.2f} x 10^9 parameters. Counted, in GB:")
    for title, parts in columns.items():
        print(f"  {title:<44}{total(parts) / 1e9:8.2f}")
        print("".join(f"    {NAMES[name]:<42}{size / 1e9:8.2f}\n" for name, size in parts.items() if size), end="")
    always, rollouts, updates, _ = columns.values()
    peak = total(always) + max(total(rollouts), total(updates))
    print(f"  {'the most: at all times + rollouts or update':<44}{peak / 1e9:8.2f}")
    for card in cards:
        room = (1 - RESERVE) * card * 1e9 - total(always)
        fitting, least = fit(s, config, width, room), total(always) + updates["gradients"]
        changed = ("rows", "micro_tokens", "head_tokens", "max_completion") if fitting else ()
        changed = {n: getattr(fitting, n) for n in changed if getattr(fitting, n) != getattr(config, n)}
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
        if fitting:
            print(f"{card:g} GB: fits with {flags or 'these settings'}")
        elif updates["gradients"] > room:
            print(f"{card:g} GB: does not fit; weights, copy, moments and gradients alone are {least / 1e9:.1f} GB")
        else:
            print(f"{card:g} GB: does not fit, even with --rows {LEAST_ROWS} --max-completion {LEAST_COMPLETION}")


# Measured =============================================================================================================


def measured(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator gave out during `work()`, beyond what it had given out before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in events))


SMALL = dict(num_hidden_layers=4, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SMALL.update(hidden_size=64, vocab_size=2000, tie_word_embeddings=True)
WIDE, FEW = dict(SMALL, hidden_size=256), dict(micro_tokens=256, head_tokens=32)
MODELS = {  # (model, settings) that have their peaks at different moments
    "4 blocks": (SMALL, {}),
    "4 blocks, Llama": (SMALL, {}),
    "12 wide blocks": (dict(WIDE, num_hidden_layers=12, intermediate_size=768), FEW),
    "16,000 words": (dict(SMALL, vocab_size=16000, tie_word_embeddings=False), {}),
    "16,000 wide": (dict(WIDE, vocab_size=16000), FEW),
}


def check_count() -> list[dict]:
    """Rollouts and updates of small random models: bytes measured and counted, beside weights and moments."""
    records = []

    def record(what: str, work: Callable[[], object], counted: int):
        got = measured(work)
        ratio, sizes = counted / got, f"{got / 1e6:8.2f} MB measured, {counted / 1e6:8.2f} counted"
        print(f"{name:<16} {precision:<9} {what:<24} {sizes}, ratio {ratio:.3f}", flush=True)
        case = dict(model=name, precision=precision, what=what)
        records.append(dict(**case, measured=got, counted=counted, ratio=round(ratio, 4)))

    for (name, (sizes, settings)), precision in itertools.product(MODELS.items(), ("float32", "bfloat16")):
        low, width = precision == "bfloat16", 2 if precision == "bfloat16" else 4
        family = transformers.LlamaConfig if "Llama" in name else transformers.Qwen3Config
        model = transformers.AutoModelForCausalLM.from_config(family(**sizes))
        s, small = shape(model), dict(prompts=4, group=4, mini_batch=4, max_prompt=32, max_completion=96, rows=8)
        config = bupo.Config(model=name, **{**small, "micro_tokens": 1024, "head_tokens": 256, **settings})
        sequences = [([i, *range(1, config.max_prompt)], list(range(config.max_completion))) for i in range(16)]
        asked = ([prompt for prompt, _ in sequences], config.max_completion, set())  # no end token: full length
        actor = bupo.bfloat16_copy(model) if low else model
        rollouts = functools.partial(bupo.sample, actor, *asked, rows=config.rows)
        record("rollout", rollouts, total(rollout(s, config, width, len(sequences))))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)  # as on CUDA: without temporaries
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        optimizer.zero_grad()
        for recompute, layer in ((False, s.layers), (True, s.layers), (True, 1)):
            config = dataclasses.replace(config, recompute=recompute)
            if recompute:
                bupo.recompute_activations(model)
            step = (model, optimizer, sequences, torch.tensor([1.0, -1.0] * 8), layer, config, low)
            what = f"update of pi{'' if layer == s.layers else '^1'}{', recompute' if recompute else ''}"
            record(what, functools.partial(bupo.update, *step), total(update(s, config, width, layer)))
    return records


def check_head(vocabulary: int = 151_936, hidden: int = 256, most: float = 2.5e9) -> list[dict]:
    """Forward and backward pass of log pi^0, which is embeddings and head alone: in chunks, or all logits at once.

    The naive way is measured only where it should need at most `most` bytes: log-softmax and two gradients of its size.
    """
    sizes = dict(SMALL, hidden_size=hidden, vocab_size=vocabulary)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**sizes))

    def chunks(head_tokens: int, ids: torch.Tensor, mask: torch.Tensor):
        bupo.token_logps(model, ids, mask, layer=0, head_tokens=head_tokens)[0].sum().backward()

    def naive(ids: torch.Tensor, mask: torch.Tensor):
        states = bupo.internal_hidden(model, ids, 0)[:, :-1][mask[:, 1:]]  # (N, D)
        logps = bupo.policy_logits(model, states).log_softmax(-1)  # (N, V)
        logps.gather(-1, ids[:, 1:][mask[:, 1:]][:, None]).sum().backward()

    records = []
    print(f"Vocabulary {vocabulary:,}, width {hidden}, float32: MB beside the weights")
    for tokens in (512, 1024, 2048, 4096):
        ids, mask = bupo.pad([([1], list(range(2, 258)))] * (tokens // 256), "cpu")  # (tokens / 256, 257) each
        record = dict(tokens=tokens, naive_counted=12 * tokens * vocabulary)
        ways = {f"chunks_of_{n}_measured": functools.partial(chunks, n) for n in (256, 1024)}
        if record["naive_counted"] <= most:
            ways["naive_measured"] = naive
        for name, way in ways.items():
            model.zero_grad()
            record[name] = measured(functools.partial(way, ids, mask))
        sizes = ", ".join(f"{n.replace('_', ' ')} {size / 1e6:.0f}" for n, size in record.items() if n != "tokens")
        print(f"{tokens} tokens: {sizes}", flush=True)
        records.append(record)
    return records


def processor() -> str:
    known = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", known.read_text()) if known.exists() else []
    return names[0] if names else platform.processor()


def main(arguments: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Memory on a GPU, counted. Takes all flags of bupo.py too."
    )
    parser.add_argument("--gpu", type=float, nargs="+", default=[80, 48, 40, 24], metavar="GB", help="sizes of cards")
    parser.add_argument("--moment-bytes", type=float, default=8, metavar="", help="AdamW's, per parameter [8]")
    parser.add_argument("--check", action="store_true", help="compare the count with measured allocations, on a CPU")
    own, others = parser.parse_known_args(arguments)
    try:
        if not own.check:
            report(bupo.parse(others)[0], own.gpu, own.moment_bytes)
            return 0
    except bupo.UsageError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    machine = dict(processor=processor(), torch=torch.__version__, transformers=transformers.__version__)
    result = dict(**machine, bytes_beside_weights_and_moments=check_count(), head=check_head())
    file = Path(__file__).parent / "results" / "memory-cpu.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
