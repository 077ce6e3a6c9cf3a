r"""The exercises: blanks for a class, variants to run, and a proof that tests notice mistakes.

python exercises/check.py                            # proves all; exit code 1 if a mistake passes
python exercises/check.py --blank pass_at_k --out handout/bupo.py       # this function left to do
python exercises/check.py --variant clip-higher --out handout/clip.py   # a variant, 11 to 15
"""

import argparse
import ast
import io
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

HOME = Path(__file__).resolve().parent.parent
BODY = ""  # as the old text of a wrong answer: all that follows the docstring
TOP = "len(model.get_decoder().layers)"
FULL = "return model(ids, output_hidden_states=True).hidden_states[layer]"
NORMED = "model.get_decoder().norm(hidden) if norm else hidden"
PLACES = "torch.arange(ids.shape[1])[None]"
EMBEDDINGS = "model.get_input_embeddings().weight"
CHOSEN = "ids, mask, layer"
TOKENS = "sum(len(completion) for _, completion in sequences)"
BEFORE = "[:, :-1][mask[:, 1:]]"
CHANGE = f"""change[i] += total_entropy(ffn{BEFORE})
            change[i] -= total_entropy(ffn_input{BEFORE})"""
LARGEST = "tolerance * max(0.0, *ffn_entropy_change)"
LAST = f"max((i for i, c in enumerate(ffn_entropy_change) if c > {LARGEST}), default=-1) + 1"
STD = "rewards.std(-1, keepdim=True)"
MEAN = "rewards.mean(-1, keepdim=True)"
BOTH = "ratio.clamp(1 - clip, 1 + clip)"
WEIGHT = "weights[owner]"
FIRST = "advantages[: len(micro)].repeat_interleave(lengths[micro])"
ZEROS = "self.adam.zero_grad(set_to_none=False)"
SWAPPED = "dict(token='sequence', sequence='token')[config.loss_average]"
# a solution of find_boxes, in which mistakes are made:
INSIDE = r"(?:[^{}\\]|\\(?!boxed|fbox).|\{(?:[^{}\\]|\\.)*\})*"
NUMBER = r"|(-?[\d.]*\d)"
RULE = rf"""found = re.findall(r"\\(?:boxed|fbox)\s*(?:\{{({INSIDE})\}}{NUMBER})", text, re.DOTALL)
    return [inside for box in found if (inside := "".join(box).strip())]"""
NESTED = r"(?:(?!\\boxed|\\fbox)[^{}]|\{[^{}]*\})*"

# function: (its tests, for `pytest -k`, [(a mistake, text of the function, what the mistake puts
# in its place)]); a text that the function does not hold exactly once is an error
EXERCISES = {
    "internal_hidden": (
        "top_layer or teacher_forced",
        [
            ("positions of the cache ignored", "cache.position, ", f"{PLACES}, "),
            ("mask of the cache ignored", ", cache.attention_mask", ", None"),
            ("one layer too low", "layers[:layer]", "layers[: max(0, layer - 1)]"),
            ("final norm applied", "return hidden", "return model.get_decoder().norm(hidden)"),
            ("hidden_states[l], at L normed", BODY, FULL),
            ("all L blocks run", "for block", f"if layer < {TOP}:\n        {FULL}\n    for block"),
            ("no gradient", "return hidden", "return hidden.detach()"),
        ],
    ),
    "policy_logits": (
        "top_layer",
        [
            ("always normed", " if norm else hidden", ""),
            ("never normed", NORMED, "hidden"),
            ("flag the wrong way round", "if norm else", "if not norm else"),
            ("embeddings for E_u", BODY, f"return ({NORMED}) @ {EMBEDDINGS}.T"),
        ],
    ),
    "ffn_entropy_change": (
        "ffn_entropy_change_equals",
        [
            ("at the token, not before it", CHANGE, CHANGE.replace(BEFORE, "[mask]")),
            ("prompts and padding counted", CHANGE, CHANGE.replace(BEFORE, ".flatten(0, 1)")),
            ("final norm applied", "norm=False", "norm=True"),
            ("what it writes normed", "(ffn[", "(model.get_decoder().norm(ffn)["),
            ("what it reads normed", "(ffn_input[", "(model.get_decoder().norm(ffn_input)["),
            ("what attention reads", "(_, _, _, ffn_input, ffn)", "(_, ffn_input, _, _, ffn)"),
            ("in bits", "sum()) for", "sum()) / math.log(2) for"),
            ("chunks weigh the same", "sum()) for", "mean()) for"),
            ("per completion, not per token", TOKENS, "len(sequences)"),
            ("a layer too low", "change[i] -=", "change[i - 1] -="),
            ("the wrong way round", "total / count", "-total / count"),
        ],
    ),
    "boundary_layer": (
        "test_boundary_layer",
        [
            ("counted from 0", "return layer", "return layer - 1"),
            ("the layer after", "return layer", "return layer + 1"),
            ("any positive change explores", LARGEST, "0.0"),
            ("tolerance in nats", LARGEST, "tolerance"),
            ("region must begin at layer 1", "explores.index(True) + 1", "0"),
            ("without a region: 0", "return len(explores)", "return 0"),
            ("last exploring layer of all", BODY, f"return {LAST} or len(ffn_entropy_change)"),
            ("a change of 0 explores", "> threshold", ">= threshold"),
        ],
    ),
    "group_advantages": (
        "group_advantages_by",
        [
            ("biased std", STD, "rewards.std(-1, correction=0, keepdim=True)"),
            ("mean over all problems", MEAN, "rewards.mean()"),
            ("mean over the wrong dimension", MEAN, "rewards.mean(0, keepdim=True)"),
            ("std over all problems", STD, "rewards.std()"),
            ("variance for std", "rewards.std(", "rewards.var("),
            ("not divided by std", f"({STD} + 1e-6)", "1"),
            ("no epsilon", " + 1e-6)", ")"),
            ("equal rewards not exactly 0", ".masked_fill(equal, 0.0)", ""),
        ],
    ),
    "clipped_surrogate": (
        "clipped_surrogate",
        [
            ("clipped without the minimum", "torch.minimum(ratio * advantages, ", "(0.0 + "),
            ("not clipped", BOTH, "ratio"),
            ("maximum for minimum", "torch.minimum", "torch.maximum"),
            ("clipped above only", BOTH, "ratio.clamp(max=1 + clip)"),
            ("clipped below only", BOTH, "ratio.clamp(min=1 - clip)"),
            ("lower bound 1 / (1 + eps)", "1 - clip", "1 / (1 + clip)"),
            ("rho upside down", "logps - old_logps", "old_logps - logps"),
            ("log rho clipped", BOTH, "(logps - old_logps).clamp(-clip, clip).exp()"),
            ("a loss, to be minimized", "return ", "return -"),
            ("no gradient", ".exp()", ".exp().detach()"),
        ],
    ),
    "optimized_layer": (
        "phase_switches",
        [
            ("a step too early", "<=", "<"),
            ("a step too late", "<= internal_steps", "<= internal_steps + 1"),
            ("phases swapped", "<=", ">"),
            ("no phase 2", BODY, "return internal_layer"),
            ("no phase 1", BODY, "return num_layers"),
        ],
    ),
    "pass_at_k": (
        "pass_at_k",
        [
            ("plug-in estimate", BODY, "return 1 - (1 - c / n) ** k"),
            ("share of right ones", BODY, "return c / n"),
            ("any right one of n", BODY, "return float(c > 0)"),
            ("chances added up", BODY, "return min(1.0, k * c / n)"),
            ("chance that all are wrong", "1.0 - ", ""),
            ("chance that one is wrong", "n - c, k", "c, k"),
        ],
    ),
    "find_boxes": (
        "find_boxes",
        [
            ("no braces inside", BODY, RULE.replace(INSIDE, "[^{}]*")),
            ("up to the last brace", BODY, RULE.replace(INSIDE, ".*")),
            ("escaped braces counted", BODY, RULE.replace(INSIDE, NESTED)),
            ("a number without braces ignored", BODY, RULE.replace(NUMBER, "")),
            (r"\fbox ignored", BODY, RULE.replace(r"(?:boxed|fbox)\s", r"boxed\s")),
            ("spaces kept", BODY, RULE.replace(".strip()", "")),
            ("braces kept", BODY, RULE.replace(rf"\{{({INSIDE})\}}", rf"(\{{{INSIDE}\}})")),
        ],
    ),
    "extract_boxed": (
        "find_boxes",
        [("first box", BODY, "return next(iter(find_boxes(text)), None)")],
    ),
    "update": (
        "gradient_of_the_formula or second_mini_batch or phase_1_moves",
        [
            ("rho always 1", "(logps, old_logps, a", "(logps, logps.detach(), a"),
            ("rho is 1 in each mini-batch", "if old_logps is None:", "if True:"),
            ("objective descended", "loss = -(weight", "loss = (weight"),
            ("phase 1 optimizes pi", CHOSEN, f"ids, mask, {TOP}"),
            ("phase 2 optimizes pi^2", CHOSEN, "ids, mask, 2"),
            ("tokens of the micro-batch", WEIGHT, "(1 / lengths[micro].sum()).repeat(len(owner))"),
            ("completions of the micro-batch", WEIGHT, f"({WEIGHT} * size / len(micro))"),
            ("zero advantages not counted", "(lengths, size", "(lengths * (advantages != 0), size"),
            ("a rollout is one mini-batch", "config.mini_batch *", "config.prompts_per_step *"),
            ("averages the wrong way round", "config.loss_average", SWAPPED),
            ("advantages of the first ones", "advantages[owner]", FIRST),
        ],
    ),
    "MasterAdamW.step": (
        "one_of_adamw or follow_float32_masters or phase_1_moves or update_that_fails",
        [
            ("gradients to 0, not to None", "self.zero_grad()", ZEROS),
            ("gradients kept", "self.zero_grad()", "pass"),
            ("not clipped", "(self.masters, GRAD_CLIP, ", "(self.masters, math.inf, "),
            ("norm after clipping", "return float(grad_norm)", "return GRAD_CLIP"),
            ("steps with what is not finite", "if not math.isfinite(grad_norm)", "if False"),
            ("AdamW's own learning rate", '["lr"] = lr', '["lr"]'),
            ("weights stay as they were", "weight.copy_(master)", "pass"),
        ],
    ),
}

# exercises 11 to 15: [(function, or FILE; its text; what the variant puts in its place)]; LAYER and
# BETA stand for numbers
FILE = ""  # the text stands once in the whole file
ADAM = "self.adam = torch.optim.AdamW(self.masters, **recipe, fused=True)"
UPPER = "{id(w) for block in model.get_decoder().layers[LAYER:] for w in block.parameters()}"
GROUPS = f"""upper = {UPPER}
        rates = [0.1 if id(w) in upper else 1 for w in self.weights]
        pairs = zip(self.masters, rates, strict=True)
        groups = [dict(params=[m], rate=r) for m, r in pairs]
        self.adam = torch.optim.AdamW(groups, **recipe, fused=True)"""
EACH = """for group in self.adam.param_groups:
            group["lr"] = lr * group["rate"]"""
FREEZE = """model.to(device)
        model.requires_grad_(False)  # embeddings, norm and lm_head, too
        model.get_decoder().layers[LAYER - 1].requires_grad_(True)"""
SCORE = "logps, nats = score(micro, internal)  # (N,) each"
KEEP = f"""with keep_states(model, LAYER, {TOP}) as states:
                {SCORE}"""
LOSS = "loss = -(weight * surrogate).sum()"
PULL = """_, mask = pad([sequences[i] for i in micro], model.device)  # (B, T)
            pull = advantage * divergence(model, *states, mask, config)  # (N,)
            loss = -(weight * (surrogate - BETA * pull)).sum()"""
ALIGN = '''@contextlib.contextmanager
def keep_states(model: Model, *layers: int) -> Iterator[list[Tensor]]:
    """A list that gets H^l (B, T, D) of these layers from the forward pass inside."""
    states: list[Tensor] = []
    blocks = [model.get_decoder().layers[layer - 1] for layer in layers]
    hooks = [b.register_forward_hook(lambda *seen: states.append(seen[-1])) for b in blocks]
    yield states
    for hook in hooks:
        hook.remove()


def divergence(model: Model, low: Tensor, top: Tensor, mask: Tensor, config: Config) -> Tensor:
    """The Jensen-Shannon divergence (N,) of pi^l and pi, from H^l and H^L (B, T, D), at each
    completion token, in nats. pi is the teacher: it gets no gradient."""
    norms = config.internal_norm == "final", True
    states = [hidden[:, :-1][mask[:, 1:]] for hidden in (low, top)]  # (N, D) each
    logits = [policy_logits(model, *pair).float() for pair in zip(states, norms, strict=True)]
    student, teacher = ((x / config.temperature).log_softmax(-1) for x in logits)  # (N, V) each
    teacher = teacher.detach()
    middle = torch.logaddexp(student, teacher) - math.log(2)  # (N, V), of their mean
    return sum((p.exp() * (p - middle)).sum(-1) for p in (student, teacher)) / 2


def update(
'''
VARIANTS = {
    "clip-higher": [("clipped_surrogate", "1 + clip", "1 + 1.4 * clip")],
    "no-std": [("group_advantages", f"centered / ({STD} + 1e-6)", "centered")],
    "low-rate": [
        ("MasterAdamW.__init__", ADAM, GROUPS),
        ("MasterAdamW.step", 'self.adam.param_groups[0]["lr"] = lr', EACH),
    ],
    "one-block": [("MasterAdamW.__init__", "model.to(device)", FREEZE)],
    "align": [(FILE, "def update(\n", ALIGN), ("update", SCORE, KEEP), ("update", LOSS, PULL)],
}


def refuse(sentence: str) -> NoReturn:
    print(f"check.py: {sentence}", file=sys.stderr)
    sys.exit(2)


def with_body(source: str, name: str, change: Callable[[str, str], str]) -> str:
    """`source` with what follows the docstring of function `name` put through `change`.

    change: (text of whole lines, their indentation) -> text. name: FUNCTION or CLASS.METHOD.
    """
    nodes = ast.parse(source).body
    for part in name.split("."):
        found = [node for node in nodes if getattr(node, "name", "") == part]
        if len(found) != 1:
            refuse(f"bupo.py has no single {name}; adapt the exercise.")
        nodes = found[0].body
    first = 1 if isinstance(nodes[0], ast.Expr) else 0  # after the docstring
    begin = nodes[first - 1].end_lineno if first else nodes[0].lineno - 1
    lines, end = source.splitlines(keepends=True), found[0].end_lineno
    body = change("".join(lines[begin:end]), " " * nodes[0].col_offset)
    return "".join([*lines[:begin], body, *lines[end:]])


def blank(source: str, name: str) -> str:
    what = f'raise NotImplementedError("write {name}")\n'
    return with_body(source, name, lambda _, indentation: indentation + what)


def changed(source: str, name: str, old: str, new: str) -> str:
    """`source` with one text of a function (or of FILE, all) replaced, or (BODY) all that follows
    its docstring."""

    def change(body: str, indentation: str) -> str:
        if old == BODY:
            return f"{indentation}{new}\n"
        if body.count(old) != 1:
            where = name or "bupo.py"
            refuse(
                f"{where} holds {old!r} {body.count(old)} times, not once; adapt check.py to it."
            )
        return body.replace(old, new)

    return with_body(source, name, change) if name else change(source, "")


def variant(name: str, layer: int = 4, beta: float = 1.0) -> str:
    """bupo.py with a variant's changes, for layer l or block k = `layer`, and this weight beta."""
    source = (HOME / "bupo.py").read_text(encoding="utf-8")
    for function, old, new in VARIANTS[name]:
        new = re.sub("LAYER|BETA", lambda m: str(dict(LAYER=layer, BETA=beta)[m[0]]), new)
        source = changed(source, function, old, new)
    return source


def failed_tests(folder: Path, source: str, tests: str) -> str:
    """What the first failure of the named tests with this bupo.py says, '' if there is none."""
    import pytest  # in this process, again and again: to start one takes longer than the tests

    (folder / "bupo.py").write_text(source, encoding="utf-8")
    for module in ("bupo", "test_bupo"):
        sys.modules.pop(module, None)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
        flags = ["-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider"]
        code = pytest.main([*flags, str(folder / "test_bupo.py"), "-k", tests])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        refuse(f"pytest -k {tests!r} did not run ({code!r}); try it by hand.")
    return said.getvalue() if code else ""


def prove(source: str, name: str, folder: Path) -> bool:
    """Print a line for the blank, each wrong answer and ours; whether all came out as they must."""
    tests, wrong = EXERCISES[name]
    print(f"\n{name}: pytest -k {tests!r}")
    answers = [("blank", blank(source, name))]
    answers += [(what, changed(source, name, *mistake)) for what, *mistake in wrong]
    answers += [("ours", source)]
    good = True
    for what, answer in answers:
        began, said = time.perf_counter(), failed_tests(folder, answer, tests)
        kinds = ("Name", "Attribute", "Type", "Syntax", "Indentation")
        crashed = any(f"{kind}Error" in said for kind in kinds)  # which would prove nothing
        right = bool(said) == (what != "ours") and not crashed
        good &= right and (what != "blank" or "NotImplementedError" in said)
        verdict = ("fails" if said else "passes") + ("" if right else "  WRONG")
        print(f"    {what:32} {verdict}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return good


def hand_out(source: str, out: Path | None) -> None:
    """Write a bupo.py to a new file, or to the screen."""
    if out is None:
        return print(source, end="")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "x", encoding="utf-8") as file:
            file.write(source)
    except OSError as error:
        refuse(f"{out} cannot be written ({error.strerror}); give another --out, a new file.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Hand out the exercises, or prove their tests.")
    names = f"of: {', '.join(EXERCISES)}"
    parser.add_argument("--blank", nargs="+", metavar="NAME", default=[], help=names)
    parser.add_argument("--variant", choices=VARIANTS, help="a bupo.py of exercises 11 to 15")
    parser.add_argument("--layer", type=int, default=4, help="l or block k of 13 to 15 [4]")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of `align` [1]")
    parser.add_argument("--out", type=Path, help="the file to write; default: the screen")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(EXERCISES), help=names)
    options = parser.parse_args()
    for name in options.blank + options.only:
        if name not in EXERCISES:
            refuse(f"There is no exercise on {name!r}; take one {names}.")
    source = (HOME / "bupo.py").read_text(encoding="utf-8")
    for name in options.blank:
        source = blank(source, name)
    if options.variant or options.blank:
        if options.variant:
            source = variant(options.variant, options.layer, options.beta)
        hand_out(source, options.out)
        return 0
    began = time.perf_counter()
    sys.dont_write_bytecode = True  # wrong answers of one length within a second share a .pyc
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HOME / "test_bupo.py", folder)
        sys.path.insert(0, folder)
        good = [prove(source, name, Path(folder)) for name in options.only]
    mistakes = f"{sum(len(EXERCISES[name][1]) for name in options.only)} wrong answers"
    took = f"{time.perf_counter() - began:.0f} s"
    print(f"\n{sum(good)} of {len(good)} exercises proven, with {mistakes}, in {took}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # more do not help models as small as those of the tests
    sys.exit(main())
