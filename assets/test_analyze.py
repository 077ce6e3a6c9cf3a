"""The numbers and pictures of analyze.py, by direct computation."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_bupo import (  # isort: skip  # first: it hides the GPU and the Hub
    every_family,
    naive_entropy,
    random_sequences,
    saved_model,
    small_model,
    write_rows,
)

import analyze
import bupo

PROFILED = random_sequences([(3, 6), (9, 2), (1, 1), (4, 11)])


@torch.no_grad()
def naive_measures(model, prompt, completion, low=0, norm=True):
    """{(name, layer): (N,)} of one completion, by the formulas; {(state, layer): policy (N, V)}."""
    at, ids = slice(len(prompt) - 1, -1), torch.tensor([prompt + completion])
    blocks = [[part[0, at] for part in block] for block in bupo.residual_stream(model, ids)]
    found, pi = {}, model(ids).logits[0, at].log_softmax(-1)
    streams, policies = [blocks[0][0], *(h + a + f for h, _, a, _, f in blocks)], {}
    for k, stream in enumerate(streams):
        if k:
            before, attention_input, attention, ffn_input, ffn = blocks[k - 1]
            modules = [("attention", before, attention_input, attention)]
            modules += [("ffn", before + attention, ffn_input, ffn)]
            for name, joined, read, written in modules:
                policies[name, k] = model.lm_head(written).log_softmax(-1)
                found[name, k] = naive_entropy(policies[name, k])
                found[f"{name}_change", k] = found[name, k] - naive_entropy(model.lm_head(read))
                found[f"cos_{name}", k] = torch.cosine_similarity(written, joined, dim=-1)
        plain, normed = model.lm_head(stream), model.lm_head(model.model.norm(stream))
        policy = (normed if norm or stream is streams[-1] else plain).log_softmax(-1)
        policies["stream", k], found["policy", k] = policy, naive_entropy(policy)
        found["without_norm", k] = naive_entropy(normed if stream is streams[-1] else plain)
        found["kl", k] = (pi.exp() * (pi - policy)).sum(-1)
        found["top1", k] = (pi.argmax(-1) == policy.argmax(-1)).float()
        found["nll", k] = -policy.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        if k:
            found["layer_change", k] = found["policy", k] - found["policy", k - 1]
        if k > low > 0:
            lower = policies["stream", low]
            found["low_kl", k] = (lower.exp() * (lower - policy)).sum(-1)
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


FEW = ["--problems", "3", "--max-new-tokens", "5", "--device", "cpu"]
FEW += ["--dataset", "tiny/heldout.jsonl"]


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


@torch.no_grad()
def test_analyze_lens_shows_what_each_layer_and_module_says(tmp_path, monkeypatch):
    prompt, ids = random_sequences([(5, 30)])[0]
    line = json.dumps(dict(step=0, prompt_ids=prompt, ids=ids))
    (tmp_path / "one.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    folders = [saved_model(tmp_path / "a"), saved_model(tmp_path / "b", layers=20)]
    flags = "--completions", tmp_path / "one.jsonl", "--nth", 2
    found, figure = drawn(monkeypatch, tmp_path, "--lens", "--model", *folders, *flags)
    frames = [len(axis.patches) for axis in figure.axes[:-1]]  # but the color bar
    assert len(frames) == 2 * 3  # 30 tokens in bands of at most 13
    for m, (one, folder) in enumerate(zip(found["models"], folders, strict=True)):
        model, tokenizer = bupo.load_model(str(folder))
        _, policies = naive_measures(model, prompt, ids)
        streams = [logps for (state, _), logps in policies.items() if state == "stream"]
        for row, ((state, k), logps) in zip(one["rows"], policies.items(), strict=True):
            assert (row["state"], row["layer"]) == (state, k)
            next_logps = logps.gather(-1, torch.tensor(ids)[:, None])
            assert row["rank"] == (1 + (logps > next_logps).sum(-1)).tolist()
            assert row["top_ids"] == logps.topk(5).indices.tolist()
            assert row["top"][7] == [tokenizer.decode([i]) for i in row["top_ids"][7]]
            assert row["prob"] == pytest.approx(next_logps[:, 0].exp().tolist(), abs=1e-5)
            assert row["entropy"] == pytest.approx(naive_entropy(logps).tolist(), abs=1e-4)
            apart = (streams[-1].exp() * (streams[-1] - logps)).sum(-1).tolist()
            assert row["kl"] == pytest.approx(apart, abs=1e-4, rel=1e-4)
        for i, settled in enumerate(one["settled"]):
            on_top = [int(logps[i].argmax()) == ids[i] for logps in streams]
            first = min(k for k in range(len(on_top) + 1) if all(on_top[k:]))
            assert settled == (first if first < len(on_top) else None)
        assert sum(frames[m::2]) == sum(layer is not None for layer in one["settled"])


def test_analyze_lens_shows_spaces_and_escapes_what_the_font_lacks(recwarn, tmp_path, monkeypatch):
    assert analyze.cell_text(" a\n\t", 1) == "\u00b7a\u21b5\u21e5"
    assert analyze.cell_text("\u65e5\U0001f600\x00", 9) == "\\u65e5\\U0001f600\\x00"
    assert analyze.cell_text("abcdefghij", 0.34) == "abcd\u2026"
    flags = "--model", saved_model(tmp_path / "a"), "--text", "7 + \u65e5 $x_1$ <eos>"
    found, _ = drawn(monkeypatch, tmp_path, "--lens", *flags)
    assert "".join(found["models"][0]["next"])[:3] == " + "
    assert not [w for w in recwarn if "lyph" in str(w.message)]


def fabricated_run(folder, seed=0, steps=4, model="tiny", **changes):
    folder.mkdir()
    asked = dict(seed=seed, steps=steps, max_new_tokens=5, internal_steps=2) | changes
    config = bupo.configure("tiny", **asked)
    (folder / "settings.json").write_text(json.dumps(vars(config) | dict(model=str(model))))
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
    lens, _ = drawn(monkeypatch, tmp_path, "--lens", run)
    assert [m["model"] for m in lens["models"]] == [f"{run}/checkpoint-{step}" for step in saved]
    measures = [point["measures"] for point in found["points"]]
    assert [one == measures[0] for one in measures[1:]] == [step == 2 for step in saved]
    assert [*figure.axes[3].lines[0].get_ydata()] == [m["nll"]["mean"][-1] for m in measures]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model nowhere/at/all", "cannot be loaded"),
        ("--model gemma", "cannot run the blocks of Gemma2"),
        ("--model a --completions text.jsonl", "lacks prompt_ids"),
        ("--model a --completions large.jsonl", "lacks prompt_ids"),
        ("--lens --model a --completions text.jsonl --nth 7", "lacks prompt_ids"),
        ("--lens --model a --text 7", "lacks prompt_ids"),
        ("--lens --model a --text " + "7+" * 2100, "at most 4096 tokens"),
        ("--model a --max-new-tokens 4096 --dataset rows.jsonl", "at most 4096 tokens"),
        ("--model a --out text.jsonl/x", "text.jsonl"),
        ("--problems 0", "--problems must be"),
        ("--layer 2", "--model has no use for --layer"),
        ("--runs run --dataset x", "--runs has no use for --dataset"),
        ("--runs run run/../run", "one setting, one seed"),
        ("--overview run", "keeps no checkpoint"),
        ("--overview a", "has no settings.json"),
        ("--lens run", "keeps no checkpoint"),
        ("--lens --model a --nth 2 --dataset rows.jsonl", "no problem 2"),
    ],
)
def test_analyze_says_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved_model(tmp_path / "a")
    saved_model(tmp_path / "gemma", "Gemma2")
    fabricated_run(tmp_path / "run")
    write_rows(tmp_path / "rows.jsonl", [dict(question="1+1", answer="2")])
    (tmp_path / "text.jsonl").write_text('{"step": 0, "completion": "1+1"}\n')
    (tmp_path / "large.jsonl").write_text('{"step": 0, "prompt_ids": [1], "ids": [2, 1000]}\n')
    assert analyze.main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("analyze.py: ")
    assert sentence in said
    assert (said.count("\n"), [*tmp_path.glob("*.png")]) == (1, [])
