r"""The exercises of the README: their tests fail on a blank function and on each wrong answer below, and pass on ours.

python benchmarks/exercises.py                                           a table; exit code 1 if a wrong answer passes
python benchmarks/exercises.py --blank pass_at_k --out handout/bupo.py   bupo.py for a class, this function left to do
"""

import argparse
import ast
import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

HOME = Path(__file__).resolve().parent.parent
BODY = ""  # as the old text of a wrong answer: all that follows the docstring
FULL = "return model(ids, output_hidden_states=True).hidden_states[layer]"
NORMED = "model.get_decoder().norm(hidden) if norm else hidden"
CHOSEN = "ids, mask, layer"

# function: (its tests, as `pytest -k` takes them, [(a mistake, text of the function, what the mistake makes of it)])
EXERCISES = {
    "internal_hidden": (
        "top_layer or lower_layer_has or only_the_blocks",
        [
            ("one layer too low", "first_layers(model, layer,", "first_layers(model, max(0, layer - 1),"),
            ("final norm applied", "norm=False", "norm=True"),
            ("hidden_states[l], at L normed", BODY, FULL),
            ("all L blocks run", "with", f"if layer < len(model.get_decoder().layers):\n        {FULL}\n    with"),
            ("no gradient", ".last_hidden_state", ".last_hidden_state.detach()"),
        ],
    ),
    "policy_logits": (
        "top_layer",
        [
            ("always normed", " if norm else hidden", ""),
            ("never normed", NORMED, "hidden"),
            ("flag the wrong way round", "if norm else", "if not norm else"),
            ("embeddings for E_u", BODY, f"return F.linear({NORMED}, model.get_input_embeddings().weight)"),
        ],
    ),
    "entropy_profile": (
        "entropy_profile_equals",
        [
            ("at the token, not before it", "predicting(tensor, mask)", "tensor[mask]"),
            ("prompts and padding counted", "predicting(tensor, mask)", "tensor.flatten(0, 1)"),
            ("no norm at L", "(norm or layer == last)", "norm"),
            ("modules normed", 'name == "layer" and (norm or layer == last)', "norm or layer == last"),
            ("attention alone normed", 'name == "layer" and', 'name in ("layer", "attention") and'),
            ("its input alone normed", 'name == "layer" and', 'name in ("layer", "attention_input") and'),
            ("in bits", "logps).sum())", "logps).sum()) / math.log(2)"),
            ("chunks weigh the same", "logps).sum())", "logps).sum(-1).mean())"),
            ("per completion, not per token", "sum(len(completion) for _, completion in sequences)", "len(sequences)"),
            ("layer 0 forgotten", 'layer if name == "layer" else layer - 1', "layer - 1"),
        ],
    ),
    "boundary_layer": (
        "test_boundary_layer",
        [
            ("counted from 0", "(True)) if", "(True)) - 1 if"),
            ("the layer after", "(True)) if", "(True)) + 1 if"),
            ("any positive change explores", "tolerance * max(0.0, *ffn_entropy_change)", "0.0"),
            ("tolerance in nats", "tolerance * max(0.0, *ffn_entropy_change)", "tolerance"),
            ("region must begin at layer 1", "explores.index(True)) if", "0) if"),
            (
                "last exploring layer of all",
                "index(False, explores.index(True))",
                "__len__() - explores[::-1].index(True)",
            ),
            ("a change of 0 explores", "change > threshold", "change >= threshold"),
        ],
    ),
    "group_advantages": (
        "group_advantages",
        [
            ("biased std", "rewards.std(-1, keepdim=True)", "rewards.std(-1, correction=0, keepdim=True)"),
            ("mean over all problems", "rewards.mean(-1, keepdim=True)", "rewards.mean()"),
            ("mean over the wrong dimension", "rewards.mean(-1, keepdim=True)", "rewards.mean(0, keepdim=True)"),
            ("std over all problems", "rewards.std(-1, keepdim=True)", "rewards.std()"),
            ("variance for std", "rewards.std(", "rewards.var("),
            ("not divided by std", "(rewards.std(-1, keepdim=True) + 1e-6)", "1"),
            ("no epsilon", " + 1e-6)", ")"),
            ("equal rewards not exactly 0", ".masked_fill(equal, 0.0)", ""),
        ],
    ),
    "clipped_surrogate": (
        "clipped_surrogate",
        [
            ("clipped without the minimum", "torch.minimum(ratio * advantages, ", "(0.0 + "),
            ("not clipped", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
            ("maximum for minimum", "torch.minimum", "torch.maximum"),
            ("clipped above only", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
            ("clipped below only", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(min=1 - clip)"),
            ("lower bound 1 / (1 + eps)", "1 - clip", "1 / (1 + clip)"),
            ("rho upside down", "logps - old_logps", "old_logps - logps"),
            ("log rho clipped", "ratio.clamp(1 - clip, 1 + clip)", "(logps - old_logps).clamp(-clip, clip).exp()"),
            ("a loss, to be minimised", "return ", "return -"),
            ("no gradient", ".exp()", ".exp().detach()"),
        ],
    ),
    "optimised_layer": (
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
    "extract_boxed": (
        "extract_boxed or last_box",
        [
            ("first box", "(last is None or opener.start() > last[0])", "last is None"),
            ("outer of two nested boxes", "(last is None or opener.start() > last[0])", "True"),
            ("no braces inside", BODY, r'return (re.findall(r"\\(?:boxed|fbox)\s*{([^{}]*)}", text) or [None])[-1]'),
            ("up to the last brace", BODY, r'return (re.findall(r"\\(?:boxed|fbox)\s*{(.*)}", text) or [None])[-1]'),
            ("escaped braces counted", r"|\\.|", "|"),
            ("an empty box is no box", "last[1].strip()", "(last[1].strip() or None)"),
            ("spaces kept", "last[1].strip()", "last[1]"),
            (r"\fbox forgotten", "(?:boxed|fbox)", "boxed"),
        ],
    ),
    "update": (
        "gradient_of_the_formula or second_mini_batch or phase_1 or without_any_advantage",
        [
            ("gradients to 0, not to None", "optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"),
            ("rho always 1", "clipped_surrogate(logps, old,", "clipped_surrogate(logps, logps.detach(),"),
            ("objective descended", "(-(weight * surrogate).sum())", "((weight * surrogate).sum())"),
            ("phase 1 optimises pi", CHOSEN, CHOSEN.replace("layer", "len(model.get_decoder().layers)")),
            ("phase 2 optimises pi^2", CHOSEN, CHOSEN.replace("layer", "2")),
        ],
    ),
    "per_token": (
        "gradient_of_the_formula",
        [
            ("tokens of the micro-batch", "[1]) for i in mini_batch", "[1]) for i in micro"),
            (
                "zero advantages not counted",
                "[1]) for i in mini_batch",
                "[1]) for i in mini_batch if advantages[i] != 0",
            ),
            ("completions of the micro-batch", "len(mini_batch) * counts", "len(micro) * counts"),
            ("averages the wrong way round", 'average == "token"', 'average == "sequence"'),
            ("advantages of the first ones", "advantages[micro]", "advantages[: len(micro)]"),
        ],
    ),
}


def refuse(sentence: str) -> NoReturn:
    print(f"exercises.py: {sentence}", file=sys.stderr)
    sys.exit(2)


def with_body(source: str, name: str, change: Callable[[str], str]) -> str:
    """`source` with what follows the docstring of function `name`, a text of whole lines, put through `change`."""
    (function,) = (f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and f.name == name)
    lines = source.splitlines(keepends=True)
    begin, end = function.body[0].end_lineno, function.end_lineno  # 1-based: the docstring's last line, the function's
    return "".join(lines[:begin]) + change("".join(lines[begin:end])) + "".join(lines[end:])


def blank(source: str, name: str) -> str:
    return with_body(source, name, lambda body: f'    raise NotImplementedError("write {name}")\n')


def mistaken(source: str, name: str, old: str, new: str) -> str:
    def change(body: str) -> str:
        if old == BODY:
            return f"    {new}\n"
        if body.count(old) != 1:
            refuse(f"{name} holds {old!r} {body.count(old)} times, not once; adapt the wrong answer to bupo.py.")
        return body.replace(old, new)

    return with_body(source, name, change)


def failed_tests(folder: Path, source: str, tests: str) -> str:
    """What the first failure of the named tests with this bupo.py says, '' if there is none."""
    import pytest  # in this process, again and again: to start one takes longer than the tests

    (folder / "bupo.py").write_text(source, encoding="utf-8")
    for module in ("bupo", "analyze", "test_bupo"):
        sys.modules.pop(module, None)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        flags = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
        code = pytest.main([*flags, str(folder / "test_bupo.py"), "-k", tests])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        refuse(f"pytest -k {tests!r} did not run ({code!r}); try it by hand.")
    return said.getvalue() if code else ""


def prove(source: str, name: str, folder: Path) -> bool:
    """Print a line for the blank, each wrong answer and ours; whether all came out as they must."""
    tests, wrong = EXERCISES[name]
    print(f"\n{name}: pytest -k {tests!r}")
    answers = [
        ("blank", blank(source, name)),
        *((what, mistaken(source, name, *m)) for what, *m in wrong),
        ("ours", source),
    ]
    good = True
    for what, answer in answers:
        began, said = time.perf_counter(), failed_tests(folder, answer, tests)
        crashed = any(f"{error}Error" in said for error in ("Name", "Attribute", "Type", "Syntax"))  # proves nothing
        right = "NotImplementedError" in said if what == "blank" else bool(said) == (what != "ours") and not crashed
        good &= right
        verdict = ("fails" if said else "passes") + ("" if right else "  WRONG")
        print(f"    {what:32} {verdict}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return good


def hand_out(source: str, names: list[str], out: Path | None) -> None:
    """Write bupo.py with these functions blanked, to a new file, or to the screen."""
    for name in names:
        source = blank(source, name)
    if out is None:
        print(source, end="")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "x", encoding="utf-8") as file:
            file.write(source)
    except OSError as error:
        refuse(f"{out} cannot be written ({error.strerror}); give another --out, a file that is not there yet.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Prove the exercises, or hand out a bupo.py with functions to write.")
    parser.add_argument("--blank", nargs="+", metavar="NAME", default=[], help=f"of: {', '.join(EXERCISES)}")
    parser.add_argument("--out", type=Path, help="with --blank: the file to write; default: the screen")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(EXERCISES), help="prove only these")
    options = parser.parse_args()
    for name in options.blank + options.only:
        if name not in EXERCISES:
            refuse(f"There is no exercise on {name!r}; take one of {', '.join(EXERCISES)}.")
    source = (HOME / "bupo.py").read_text(encoding="utf-8")
    if options.blank:
        hand_out(source, options.blank, options.out)
        return 0
    began = time.perf_counter()
    sys.dont_write_bytecode = True  # two wrong answers of one length within a second would share a .pyc
    with tempfile.TemporaryDirectory() as folder:
        for file in ("test_bupo.py", "analyze.py"):
            shutil.copy(HOME / file, folder)
        sys.path.insert(0, folder)
        good = [prove(source, name, Path(folder)) for name in options.only]
    print(f"\n{sum(good)} of {len(good)} exercises proven, in {time.perf_counter() - began:.0f} s")
    return 0 if all(good) else 1


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # more do not help models as small as those of the tests
    sys.exit(main())
