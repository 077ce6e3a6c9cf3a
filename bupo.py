r"""Bottom-up Policy Optimization (BuPO, arXiv 2512.19673) in one file.

Block l of a language model adds what its attention and its FFN compute, A^l and F^l, to the
residual stream: H^l = H^(l-1) + A^l + F^l. The model draws each token from its policy
pi = softmax(E_u norm(H^L)): L is the last block, E_u the unembedding (lm_head). Send the hidden
state of a *lower* block through the same norm and lm_head and you have the logit lens at layer l.
BuPO takes it for a policy and trains it: the *internal layer policy* pi^l = softmax(E_u norm(H^l)).

GRPO samples G completions of each problem, compares the reward of each with the mean of its group,
and makes the better ones more likely, clipped so that no update goes far. BuPO is GRPO whose first
steps (phase 1) optimize one low pi^l and whose later steps (phase 2) optimize pi; so GRPO is BuPO
at l = L. Completions always come from pi; in phase 1 it is their probability under pi^l that is
raised or lowered. There is no KL term and no reference model.

Why it should help, says the paper: low layers explore (their FFNs raise the entropy), high ones
converge, and rewarding a low policy makes its layers find early what reasoning needs. The blocks
above l do not learn meanwhile (embeddings, lm_head and, if pi^l applies it, norm do), so a long
phase 1 makes pi collapse.

     1 Settings                  101 lines  Config: each setting with its default
     2 Problems                  151 lines  Problem, load_problems, the built-in task
     3 Reward                    132 lines  math_reward
     4 Model                     150 lines  load_model, check_model; the tiny model
     5 Rollouts                  148 lines  SlotCache, sample
     6 Internal policies         124 lines  internal_hidden, policy_logits, token_logps
     7 Objective                  25 lines  group_advantages, clipped_surrogate
     8 Evaluation                 28 lines  pass_at_k, evaluate
     9 Training                  299 lines  train, update, MasterAdamW
    10 Files and command line    219 lines  the run's folder, main

Start with `train`, `update`, `clipped_surrogate`, `internal_hidden` and `sample`: the method is in
them and in sections 5 to 8, a third of the lines; the others read data, check answers, load models
and keep runs. Equation and table numbers are those of the paper's version 3. On purpose, this file
departs from the paper (P) or from the authors' code (C):

  - pi^l applies the final norm; `--internal-norm none` does not, as Eq. 5 and C (Table 5: both).
  - Updates of phase 1 run blocks 1..l only; C runs all L and builds two full logit matrices.
  - The loss averages over all tokens, as C does; `--loss-average sequence` is P's Eq. 3 and 9.
  - The reward compares values; C compares text and calls \boxed{\text{Yes}} wrong if it is Yes.
  - A mini-batch without any advantage is skipped; C would still move weights, by momentum.
  - Layers count from 1, as in P; C counts from 0.
"""

import argparse
import cmath
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from operator import add, mul, neg, pos, sub, truediv
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any, TypeAlias

import jinja2  # for the errors of chat templates
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.integrations import sdpa_attention

Model: TypeAlias = Any  # a transformers.PreTrainedModel with a Llama-like decoder
Tokenizer: TypeAlias = Any  # a transformers.PreTrainedTokenizerBase
Sequences = list[tuple[list[int], list[int]]]  # (prompt, completion) pairs of token ids


class UsageError(ValueError):
    """Something the user can fix: one sentence that says what is wrong and what to do."""


@contextlib.contextmanager
def explain(problem: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises inside into one sentence: problem, its own words, fix."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) or out_of_memory(error):
            raise
        while error.__cause__:
            error = error.__cause__  # type: ignore[assignment]
        why = " ".join(str(error).split())[:200].rstrip(".:, ") or type(error).__name__
        raise UsageError(f"{problem} ({why}); {fix}.") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the GPU's or the machine's: torch and CUDA word it differently."""
    words = "out of memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


# 1 Settings =======================================================================================

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
COMMIT = "d3a85c698912d612c1cdb3edaa9011f450d23344"  # of the authors' repository
DATA = f"https://raw.githubusercontent.com/Trae1ounG/BuPO/{COMMIT}/data/"  # their problems


def setting(default: Any, help: str, least: float = 0, most: float = 1e12, **more: Any) -> Any:
    """A field of `Config`: default, help, range or `choices`, and `tiny`, the built-in task's."""
    shown = f"{default}, tiny: {more['tiny']}" if "tiny" in more else default
    text = f"{help} [{shown}]".replace("%", "%%")  # as argparse wants it
    return field(default=default, metadata=dict(help=text, least=least, most=most, **more))


@dataclass
class Config:
    """The settings of a run, each of them a flag. In parentheses: the paper's value."""

    model: str = setting("tiny", "tiny (built in), a Hub id, a folder, or the folder of a run")
    preset: str = setting("real", "which defaults to take", choices="real|tiny")
    dataset: str = setting(DATA + "deepmath-5k.parquet", "to train on", tiny="arithmetic")
    eval_dataset: str = setting(DATA + "math500.parquet", "held out", tiny="arithmetic-heldout")
    system: str = setting(SYSTEM, "system message of problems that bring none", tiny="")
    # The method:
    internal_layer: str = setting("auto", "l of phase 1", choices="auto|1|2|...", tiny="3")
    internal_steps: int = setting(30, "steps of phase 1; 0: plain GRPO (30 or 20)", tiny=10)
    internal_norm: str = setting("final", "norm in pi^l (Table 5: both)", choices="final|none")
    loss_average: str = setting(
        "token", "unit of the mean of the loss (both)", choices="token|sequence"
    )
    clip: float = setting(0.2, "clip ratio, epsilon (0.2)", least=1e-6)
    # The recipe:
    steps: int = setting(300, "training steps; 0 only evaluates (300)", tiny=60)
    prompts_per_step: int = setting(32, "problems in a rollout (128)", least=1)
    group_size: int = setting(8, "completions per problem, G (8)", least=2)
    mini_batch: int = setting(8, "problems per optimizer update (32)", least=1, tiny=16)
    lr: float = setting(1e-6, "learning rate of AdamW (1e-6)", most=1, tiny=1e-4)
    lr_warmup_steps: int = setting(1, "steps in which it rises to --lr (1)", least=1, tiny=5)
    temperature: float = setting(1.0, "of sampling and of all policies (1)", least=1e-6)
    max_prompt_tokens: int = setting(1024, "longer prompts are dropped (1,024)", least=1, tiny=40)
    max_new_tokens: int = setting(2048, "longer completions are cut (7,168)", least=1, tiny=40)
    # Evaluation:
    eval_every: int = setting(50, "steps between evaluations (30)", least=1, tiny=20)
    eval_problems: int = setting(100, "held-out problems; 0: no evaluation (all)", tiny=256)
    eval_k: int = setting(4, "completions of each, k of avg@k, pass@k (16; AIME: 32)", least=1)
    # The machine:
    rollout_rows: str = setting("auto", "sequences decoded at once", choices="auto|1|2|...")
    micro_batch_tokens: int = setting(16384, "tokens per forward and backward pass", least=1)
    gradient_checkpointing: bool = setting(True, "recompute activations: less memory", tiny=False)
    device: str = setting("auto", "to compute on", choices="auto|cpu|cuda|cuda:[0-9]")
    precision: str = setting("auto", "bfloat16 on CUDA", choices="auto|float32|bfloat16")
    optimizer_device: str = setting("auto", "of float32 masters", choices="auto|cpu|cuda")
    # The run:
    pretrain_steps: int = setting(700, "supervised steps first, for --model tiny only")
    seed: int = setting(0, "of everything random", most=2**63)
    save_every: int = setting(10, "steps between checkpoints", least=1)
    keep: int = setting(2, "checkpoints to keep; 0 keeps all", tiny=0)
    out: str = setting("", "folder to write, new or empty; default: runs/MODEL-DATE-TIME")

    def __post_init__(self):
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            words = f.metadata.get("choices", ".*")
            form = words.replace("1|2|...", "[1-9][0-9]{0,8}")
            right = re.fullmatch(form, str(value), re.DOTALL) is not None
            if f.type in (int, float):
                right = type(value) in (int, f.type) and least <= value <= most
                words = f"a number from {least} to {most:g}"
            if not right:
                name, words = f.name.replace("_", "-"), words.replace("|", " or ")
                raise UsageError(f"--{name} must be {words}, not {value!r}.")
        if not self.steps and not self.eval_problems:
            raise UsageError("--steps 0 only evaluates and --eval-problems 0 does not; raise one.")
        if self.prompts_per_step % self.mini_batch:
            raise UsageError("--mini-batch must divide --prompts-per-step.")


TINY = {f.name: f.metadata["tiny"] for f in fields(Config) if "tiny" in f.metadata}
ASKED: tuple[str, ...] = ("preset", "dataset", "eval_dataset", "system", "temperature")
ASKED += ("max_prompt_tokens", "max_new_tokens", "eval_problems", "eval_k")


def configure(model: str = "tiny", **given: Any) -> Config:
    """The settings given, else the preset's. If `model` is a run's folder or in one, the settings
    in ASKED are that run's, but not its recipe, such as its learning rate."""
    known: dict[str, Any] = dict(preset="tiny" if model == "tiny" else "real")
    folder = Path(model).expanduser()
    for run in (folder, folder.parent):
        if model != "tiny" and folder.exists() and (run / "metrics.jsonl").exists():
            known = {name: value for name, value in read_config(run).items() if name in ASKED}
    known.update(given)
    return Config(**{**(TINY if known["preset"] == "tiny" else {}), **known, "model": model})


def read_config(run: str | Path) -> dict[str, Any]:
    """The settings of the run in a folder."""
    with explain(f"There is no run in {run} that can be read", "name the folder that --out named"):
        saved = json.loads(Path(run, "config.json").expanduser().read_text(encoding="utf-8"))
        return {f.name: saved[f.name] for f in fields(Config)}


# 2 Problems =======================================================================================

QUESTIONS = ("prompt", "question", "problem", "input", "query", "messages", "conversations")
ANSWERS = ("reward_model", "final_answer", "answer", "ground_truth", "expected_answer", "solution")


@dataclass(frozen=True)
class Problem:
    """What the model is asked, as chat messages ({"role", "content"}), and the rewarded answer."""

    messages: list[dict]
    answer: str


def load_problems(
    source: str, limit: int | None = None, system: str = SYSTEM, fits: Callable | None = None
) -> list[Problem]:
    """Read problems, at most `limit`, and say which columns they came from. source: arithmetic or
    arithmetic-heldout (built in), a .parquet, .json, .jsonl, .csv or .tsv file or URL, also with
    .gz, or a data set on the Hub: ID, ID:SPLIT or ID:CONFIG:SPLIT. Rows without a question, or
    without one answer that can be earned, are dropped, as are problems that `fits` is False for."""
    if limit == 0:
        return []
    if source in ("arithmetic", "arithmetic-heldout"):
        task = list(arithmetic(source.endswith("heldout")).items())[:limit]
        return [Problem([dict(role="user", content=q)], find_boxes(s)[-1]) for q, s in task]
    rows = read_rows(source)
    names = getattr(rows, "column_names", None) or list(dict.fromkeys(itertools.chain(*rows)))
    question = next((name for name in QUESTIONS if name in names), "question")
    answer = next((name for name in ANSWERS if name in names), "answer")
    for name in (question, answer):
        if names and name not in names:
            raise UsageError(f"{source} has no {name} column, only {names}; rename one.")
    problems, unusable, too_long = [], 0, 0
    with explain(f"{source} cannot be read as chats", "fix it, or the model's chat template"):
        for row in tqdm(rows, "reading problems", leave=False, delay=2):
            messages = as_messages(row.get(question), system)
            problem = Problem(messages, as_answer(row.get(answer), answer == "solution"))
            if not (problem.messages and problem.answer):
                unusable += 1
            elif fits and not fits(problem):
                too_long += 1
            else:
                problems.append(problem)
            if len(problems) == limit:
                break
    found = f"question: {question}, answer: {answer}; dropped: {unusable} without question or "
    found += f"checkable answer, {too_long} too long"
    if not problems:
        raise UsageError(f"{source} has no usable row ({found}); give other data.")
    tqdm.write(f"Problems    {len(problems)} of {source} ({found})")
    return problems


def read_rows(source: str) -> Any:
    """The rows, dictionaries, of a file, a URL or a Hub data set; types may vary in a column."""
    kind = re.search(r"\.(parquet|jsonl?|csv|tsv)(\.gz)?(\?.*)?$", source.lower())
    with explain(f"The data set {source} cannot be loaded", "check name, content and connection"):
        if not kind:
            import datasets  # slow to import, and files need none of it

            name, *rest = source.split(":")
            if Path(source).expanduser().is_file():
                raise ValueError("its name ends in none of .parquet, .json, .jsonl, .csv and .tsv")
            found = datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else None)
            if isinstance(found, dict):  # of splits
                found = found["train"] if "train" in found else next(iter(found.values()))
            return found
        path = Path(source).expanduser()
        with urllib.request.urlopen(source) if "://" in source else open(path, "rb") as file:
            data = gzip.decompress(file.read()) if kind[2] else file.read()
        if kind[1] == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig").strip("\r\n ")  # the first name in a .tsv may be empty
        if kind[1] in ("csv", "tsv"):
            csv.field_size_limit(2**31 - 1)
            delimiter = "," if kind[1] == "csv" else "\t"
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        found, whole = [], text.startswith("[")  # a list of rows; else there is a row a line
        for n, line in enumerate([text] if whole else text.split("\n"), start=1):
            where = source if whole else f"{source}, line {n},"
            with explain(f"{where} is no JSON", "write a row a line, or a list of rows"):
                found += [json.loads(line, parse_float=Decimal)] if line.strip() else []
        return [row for row in (found[0] if whole else found) if isinstance(row, dict)]


def from_json(value: Any) -> Any:
    """Chat messages, a `reward_model` or a list of answers that somebody stored as JSON text."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", '["', '{"'):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def as_messages(question: Any, system: str) -> list[dict]:
    """A question, text or chat messages, as chat messages, system message first; [] without one."""
    question, messages = from_json(question), []
    for said in question if isinstance(question, list) else [dict(content=question)]:
        said = said if isinstance(said, dict) else {}
        role = said.get("role", said.get("from", "user"))  # "from" and "value" are ShareGPT's
        content = said.get("content", said.get("value"))
        if isinstance(content, list):  # of parts: text, or images, which nobody here can see
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "\n".join(map(str, parts)) if all(parts) else None
        if not isinstance(content, str) or not (content.strip() or role == "system"):
            return []
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        messages.append(dict(role=role, content=content))
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, dict(role="system", content=system))
    while messages and messages[-1]["role"] == "assistant":  # it may hold the answer
        messages.pop()
    return messages if messages and messages[-1]["role"] != "system" else []


def as_answer(value: Any, must_be_marked: bool = False) -> str:
    r"""The answer in a value, with all its digits: what is in \boxed{} (MATH) or after '####'
    (GSM8K), else, unless it `must_be_marked`, the whole text; '' if there is none, or several."""
    while isinstance(value := from_json(value), (dict, list)):
        if isinstance(value, list) and len(value) != 1:
            return ""
        value = value[0] if isinstance(value, list) else value.get("ground_truth")
    if isinstance(value, (float, Decimal)):  # 5e-05 is 0.00005
        value = f"{Decimal(str(value)):f}" if math.isfinite(value) else ""
    _, mark, text = str("" if value is None else value).rpartition("####")
    boxes = set(find_boxes(text))
    if len(boxes) > 1 or (must_be_marked and not boxes and not mark):
        return ""
    return boxes.pop() if boxes else text.strip()


def arithmetic(heldout: bool = False) -> dict[str, str]:
    r"""The built-in task: 3 or 4 additions and subtractions of digits, from left to right in 0..20.
    Questions and worked solutions: '7-1+3' -> '7-1=6;6+3=9\boxed{9}'. A guess is rarely right;
    writing down the partial results makes it easy. About an eighth of the questions is held out."""
    rng = Random(0)
    solutions: dict[str, str] = {}
    while len(solutions) < 20000:
        value = rng.randint(1, 9)
        question, lines = str(value), []
        for _ in range(rng.choice((3, 4))):
            digit = rng.randint(1, 9)
            change = rng.choice([x for x in (digit, -digit) if 0 <= value + x <= 20])
            lines.append(f"{value}{change:+d}={value + change}")
            question, value = f"{question}{change:+d}", value + change
        solutions[question] = ";".join(lines) + rf"\boxed{{{value}}}"
    return {q: s for q, s in solutions.items() if (zlib.crc32(q.encode()) % 8 == 0) == heldout}


# 3 Reward =========================================================================================

SYNONYMS = {  # the spelling kept: those it replaces. A set is «1,2», a matrix ((1,2),(3,4))
    "*": r"\cdot \times · × ⋅ ∗", "-": "− –", "±": r"\pm", "^": "**", "^{2}": "²", "%": r"\%",
    ":": r"\setminus \to \implies \otimes \circ \subset", "|": r"\lvert \rvert \vert \mid",
    "<": r"\lt", ">": r"\gt", "≤": r"\le \leq \leqslant", "≥": r"\ge \geq \geqslant", "∈": r"\in",
    "≠": r"\ne \neq", "≈": r"\approx", "∞": r"\infty", "((": r"\begin", "))": r"\end",
    "),(": r"\\", ",": r"; & ∪ \cup", "(": r"\langle", ")": r"\rangle", "«": r"\{ \lbrace",
    "»": r"\} \rbrace", r"\lceil{(": r"\lceil", r"\lfloor{(": r"\lfloor", ")}": r"\rceil \rfloor",
    r"\pi ": "π", r"\sqrt ": "√", r"\dots ": "...", r"\frac12 ": "½", r"\asin ": r"\arcsin",
    r"\acos ": r"\arccos", r"\atan ": r"\arctan", r"\emptyset ": r"∅ \varnothing",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom",
    r"\text": r"\textbf \textit \textrm \mathrm \mathbf \boldsymbol \mbox \operatorname",
    " ": r"$ \$ ~ ° \degree \left \right \bigl \bigr \, \: \; \! \( \) \quad \displaystyle \boxed",
}  # fmt: skip
SYNONYM = {old: new for new, olds in SYNONYMS.items() for old in olds.split()} | {"\\ ": " "}
GROUP = r"\{(?:[^{}\\]|\\.|" * 8 + r"\{(?:[^{}\\]|\\.)*\}" + r")*\}" * 8  # {...}, nine deep
FUNCTION = r"(?:sqrt|sin|cos|tan|exp|log|ln|pi)(?![a-z])"
NAME = rf"(?:\\(?!frac|cot|{FUNCTION})[a-z]+(?![a-z])|_?\{{[^{{}}]*\}}|[a-zA-Z'(), ])+"
SPELLINGS: list[tuple] = [  # what, by what[, a sign: only if exactly one of the two answers has it]
    (r",\\! *|\{,\}|\^ ?(\{\\circ\}|\\circ)|\[\w+pt\]|\{[pb]?matrix\}|\\\\ ?(?=\\end)", ""),
    (r"\\[a-zA-Z]+|\\.|\.{3}|\*\*|.", lambda m: SYNONYM.get(m[0], m[0])),  # \dfrac1π -> \frac1\pi
    (r"(^|(?<==)) *-?\d{1,3}([, ]\d{3})+(?![\d,])", lambda m: re.sub("[, ]", "", m[0])),  # 4,000
    (r"(?<=.)≈.*|[\s.,:]+$|\s+(?![a-zA-Z0-9\s])|(?<![a-zA-Z0-9])\s+", ""),  # 2 x + y. -> 2 x+y
    (r",?(\\text\{,?(and|or)\}| ?\b(and|or)\b ?)", ","),  # x=1\text{or}x=2 -> x=1,x=2
    (r"=(?=[^{}]*\}|[^,]*=)", ":"), (r"([A-Z])\^\{?(T|-1)\}?", r"\1:\2:"),  # \sum_{k:1}, A:T:B
    (rf"^\\text\{{([^{{}}]*?)\.?\}}$|\\text\{{([ei]|[\d.]+|{FUNCTION})\}}", r"\1\2"),  # \text{i}
    (r"(_|\^|\\mathbb|\\sqrt) ?(\d+|[\w+*])|(\\frac) ?(\d)", r"\1\3{\2\4}"),  # \frac1x -> \frac{1}x
    (rf"\\sqrt\[(\w+)\]({GROUP}|\w)", r"(\2^{1/\1})"),  # \sqrt[3]{x} -> ({x}^{1/3})
    (r"(?<![\w./^})])(\d+)(?:\\frac\{| )(\d+)[}/](\d+|\{\d+\})", r"(\1+\2/\3)"),  # 1 1/4 -> (1+1/4)
    (r"\\?log_(\{\w+\})", r"(1/\\log\1)\\log "), (r"(\d+|[a-zA-Z]|\([^()]*\))!", r"!{\1}"),  # 5!
    (r"(?<![\\a-zA-Z])([a-df-hj-zA-Z](?:_\{\w+\})?'*)\(([^-+()]*)\)", r"\1{(\2)}"),  # f(2)
    (r"(\\(?:Gamma|zeta|varphi|phi|psi|det|text\{\w+\})'*)\(([^()]*)\)", r"\1{(\2)}"),  # \zeta(2)
    (r"(^|∈)\\mathbb\{R\}$", r"\1(-∞,∞)"),  # x∈R
    (rf"(?<=[\d)}}]) ?(?![abcxyz]{{3}}|{FUNCTION})(([ckm]m|[a-zA-Z]{{3}})[a-zA-Z ]*)$",
     r"\\text{\1}"), (r"^[a-zA-Z ]{2,}$", lambda m: rf"\text{{{m[0].lower()}}}"),  # 5 miles, Yes
    (r"(?<![^,])[^,]*[>≥][^,]*", lambda m: "".join(re.split("([>≥])", m[0])[::-1])),  # 2>x -> x>2
    (">", "<"), ("≥", "≤"), (r"(?<![^,«])([^,«»]*)±([^,«»]*)", r"\1+\2,\1-\2"),  # 1±x -> 1+x,1-x
    (rf"^([^a-zA-Z=]+)=[a-zA-Z]$|(^|,){NAME}[=∈](?![a-zA-Z]*$)", r"\1\2", "[=∈]"),  # x=2 -> 2
    (r"\\text\{(for|where|with)\b[^{}]*\}.*$|(?<=[\w)}])\\text\{(?!.?(illion|hund|thou)|doz|squared"
     r"|or|,)[^{}]*\}(\^\{\d\})?(?=,|$)", "", r"\\text"),  # 27\text{miles} -> 27
    (r"(?<![^,])(?:([^<≤,]+)([<≤]))?\\?[a-zA-Z](?:([<≤])([^<≤,]+))?(?![^,])", lambda m:
     "[("[m[2] != "≤"] + f"{m[1] or '-∞'},{m[4] or '∞'}" + "])"[m[3] != "≤"], "[<≤]"),  # x<2
]  # fmt: skip
TOKEN = r"\\?(text\{[^{}]*\}|(?:\d*\.\d{1,8}|\d+)(?:[eE](?:\d\d?|-\d\d))?(?!\d)|(?:"
TOKEN += rf"(?<=\\)[a-zA-Z]+|{FUNCTION}|[a-zA-Z]{{4,}}|[a-zA-Z])'*(?:_\{{[^{{}}]*\}})?'*|\S)"
FUNCTIONS: dict = {name: f for name, f in vars(cmath).items() if callable(f)}  # sin, sqrt, ...
FUNCTIONS |= {"+": pos, "-": neg, "ln": cmath.log, "csc": lambda z: 1 / cmath.sin(z)}
FUNCTIONS |= {"cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z)}
FUNCTIONS["!"] = lambda n: (
    math.gamma(n + 1) if n % 1 or n > 999 else Fraction(math.factorial(int(n)))
)
CONSTANTS = {"e": math.e, "i": 1j, "pi": math.pi}  # other letters are random
BRACKETS = {"()": "(#)", "[]": "[#]", "(]": "(#]", "[)": "[#)", "{}": "{}", "«»": "{}"}
SIGNS: dict = {"+": add, "-": sub, "=": sub, "*": mul, "/": truediv, "^": pow}
BINDS = dict.fromkeys(FUNCTIONS, 3) | dict.fromkeys(")]}»,_|.0123456789", 0)  # how tightly; 2x: 4
BINDS |= {**dict.fromkeys("=<≤≠:∈", 1), "+": 2, "-": 2, "*": 3, "/": 3, "(": 3, "^": 5}


def find_boxes(text: str) -> list[str]:
    r"""The contents of all \boxed{...}, \fbox{...} and \boxed 7 of a text."""
    boxes = re.findall(rf"\\(?:boxed|fbox)\s*({GROUP}|-?[\d.]*\d)", text, re.DOTALL)
    return [box[1:-1].strip() if box[0] == "{" else box for box in boxes]


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} of a text, None if it has none."""
    return next(reversed(find_boxes(text)), None)


def math_reward(completion: str, answer: str) -> float:
    r"""1.0 if the last \boxed{} of the completion holds the answer, else 0.0; fast for any texts.

    Both get one spelling, then stand for numbers, exact or to ten digits. Letters are random ones:
    formulas equal at two points are equal (Schwartz, Zippel). What is no formula is compared as
    text. It does not know |-3|, 0.333..., \sin^2, sums, nor that sin(pi) is exactly 0.
    """
    given, gold = extract_boxed(completion[-100_000:]) or "", answer.strip()
    if given == gold or max(len(given), len(gold)) > 300:
        return float(given == gold != "")
    for pattern, by, *sign in SPELLINGS:
        if not sign or bool(re.search(sign[0], given)) != bool(re.search(sign[0], gold)):
            given, gold = re.sub(pattern, by, given), re.sub(pattern, by, gold)
    unit = Fraction(100) ** (("%" in given) - ("%" in gold))  # 50% is 50, or 0.5
    try:
        (a, b), (c, d) = [(value(given, point), value(gold, point)) for point in "pq"]
        if "=" in gold and a != c and b != d:  # an equation is the same times a factor
            a, b, c, d = a * d, b * c, 1, 1
        e = 0 if isinstance(a - b, Fraction) else 1e-10
        near = [abs(a - b * k) <= e * abs(a) and abs(c - d * k) <= e * abs(c) for k in (1, unit)]
        return float(any(near) and ("=" in given) == ("=" in gold))
    except Exception:  # IndexError, ZeroDivisionError, OverflowError, ...: not a formula
        return float(given == gold != "")


def value(text: str, point: str) -> Any:
    """The number that a formula stands for at a point of random letters, by a Pratt parser."""
    tokens = [")", "}", *re.findall(TOKEN, text.replace("%", " "), re.ASCII)[::-1], "{"]  # a stack

    def number(name: str, *items: Any) -> Any:  # of a letter; of (a, b), f{a}, a < b; of a set
        base = Fraction(Random(name + point).randint(1, 30_000), 10_007)
        return base + math.prod(number(name.replace("#", str(i))) - a for i, a in enumerate(items))

    def formula(level: int) -> Any:  # reads on while signs bind more tightly than level
        token = tokens.pop()
        if token in ("(", "[", "{", "«"):
            items = [formula(0)]
            while (end := tokens.pop()) == ",":
                items.append(formula(0))
            one = len(items) == 1 and token + end in ("()", "{}")
            a = items[0] if one else number(BRACKETS[token + end], *items)
        elif token == "frac":
            a = formula(5) / formula(5)
        elif token in FUNCTIONS:
            a = FUNCTIONS[token](formula(5 if tokens[-1] in "([{" and token not in "+-" else 3))
        else:
            a = Fraction(token) if token[-1].isdigit() else CONSTANTS.get(token) or number(token)
            while tokens[-1] == "{":
                a = number("f#", a, formula(5))
        while (rank := BINDS.get(tokens[-1], BINDS.get(tokens[-1][0], 4))) > level:
            sign = tokens.pop() if tokens[-1] in SIGNS or rank == 1 else "*"
            b = formula(4 if rank > 2 else rank)
            digits = len(str(a)) * abs(b) if sign == "^" else len(f"{a}{b}")
            safe = isinstance(a + b, Fraction) or rank > 2 or not (a and b)
            if digits > 4000 or not (safe or 1e-9 < abs(a / b) < 1e9):
                raise ValueError("digits would be lost, or too many")
            a = SIGNS[sign](a, b) if sign in SIGNS else number("#" + sign, a, b)
        return a

    return formula(0)


# 4 Model ==========================================================================================


def load_model(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Model, Tokenizer]:
    """A causal language model with weights of `dtype`, in evaluation mode, and its tokenizer. name:
    tiny (built in, drawn from `seed`), a Hub id, a folder in the Hugging Face layout, or that of a
    finished run. Only safetensors are read, and no code of a checkpoint is run."""
    if name == "tiny":
        model, tokenizer = tiny_model(seed)
    else:
        folder, fix = Path(name).expanduser(), "check its name, its files and the connection"
        if (folder / "metrics.jsonl").exists():
            folder, fix = folder / "model", "this run has not finished: name one of its checkpoints"
        if (folder / "adapter_config.json").exists():
            fix = "it is a LoRA adapter: merge it into its base model first"
        if (folder / "training.pt").exists():
            fix = "remove this checkpoint, and --resume continues from the one before"
        with explain(f"The model {name} cannot be loaded", fix):
            source = str(folder) if folder.exists() else name
            safe: Any = dict(trust_remote_code=False)  # the default is to ask, and a yes runs code
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safe)
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            safe |= dict(use_safetensors=True, dtype=torch.float32, output_loading_info=True)
            model, found = load(source, **safe)
            if missing := sorted(found["missing_keys"]):  # random numbers are in their place
                raise ValueError(f"it lacks {len(missing)} of its weights, such as {missing[0]}")
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                raise ValueError("its tokenizer has more tokens than the model has embeddings")
    check_model(model.eval())
    return place(model, device, dtype), tokenizer


def place(model: Model, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Bring the weights to a device and a dtype; buffers stay float32, as rotary ones need it."""
    for weight in model.parameters():
        weight.data = weight.data.to(device, dtype)
    return model.to(device)


@torch.no_grad()
def check_model(model: Model) -> None:
    """Give a model (float32, CPU) fused attention and norms; refuse it unless its logits are
    lm_head(norm(H^L)), H^l = H^(l-1) + A^l + F^l, and `sample` draws from what is scored."""
    for name, weight in model.named_parameters():
        if not weight.sum().isfinite():
            raise UsageError(f"The weight {name} is not finite; download the model again.")
    close = partial(torch.allclose, rtol=1e-3, atol=1e-3)
    problem = f"{type(model).__name__} is not Llama-like, so it has no internal policies"
    with explain(problem, "use a Llama, Mistral, Qwen2, Qwen3 or SmolLM2"):
        model.set_attn_implementation("sdpa")  # whatever its config.json says
        ids = torch.arange(8)[None] % model.get_input_embeddings().num_embeddings  # (1, 8)
        logits = model(input_ids=ids, use_cache=False).logits  # (1, 8, V)
        for norm in model.modules():  # transformers' own takes eight operations, this one takes one
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                shape, eps = norm.weight.shape, norm.variance_epsilon
                fused = partial(nn.functional.rms_norm, normalized_shape=shape, weight=norm.weight)
                norm.forward = partial(fused, eps=eps)
        *_, (hidden, _, attention, _, ffn) = residual_stream(model, ids)  # of block L
        if not close(policy_logits(model, hidden + attention + ffn), logits):
            raise ValueError("its logits are not lm_head(norm(H^L)), H^l = H^(l-1) + A^l + F^l")
        prompts = [ids[0, :5].tolist(), ids[0, :2].tolist()]
        completions = sample(model, prompts, 3, set(), generator=random_stream("cpu", 0, "check"))
        sequences = [(c.prompt, c.ids) for c in completions]
        scored, _ = token_logps(model, *pad(sequences, "cpu"), len(model.get_decoder().layers))
        if not close(torch.tensor([logp for c in completions for logp in c.logps]), scored):
            raise ValueError("with a cache it computes something else than without")


def tiny_model(seed: int) -> tuple[Model, Tokenizer]:
    r"""A Qwen3 of 6 blocks, 327 thousand parameters; its tokens are characters, and \boxed{."""
    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    tokens = [*special, r"\boxed{", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(special)
    backend.add_tokens([r"\boxed{"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = transformers.Qwen3Config(vocab_size=len(tokens), num_hidden_layers=6, hidden_size=64)
    config.intermediate_size, config.num_attention_heads, config.head_dim = 192, 4, 16
    config.num_key_value_heads, config.max_position_embeddings = 4, 512
    config.tie_word_embeddings, config.initializer_range = True, 0.08
    config.pad_token_id, config.eos_token_id = 0, 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen3ForCausalLM(config), tokenizer


def pretrain(model: Model, tokenizer: Tokenizer, steps: int, seed: int = 0) -> None:
    r"""Teach the built-in model what an answer looks like, so that RL has some reward to learn
    from. 40 % of the examples work the problem out, 60 % are careless: \boxed{n} at once, n off by
    up to 3. Which of the two pays is for RL to find out: accuracy and length rise together."""
    rng, solutions = Random(seed), list(arithmetic().items())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in tqdm(range(1, steps + 1), "pretraining", leave=False):
        batch = []
        for question, worked in rng.sample(solutions, 32):
            guess = max(0, int(find_boxes(worked)[-1]) + rng.randint(-3, 3))
            text = worked if rng.random() < 0.4 else rf"\boxed{{{guess}}}"
            prompt = encode(tokenizer, Problem([dict(role="user", content=question)], ""))
            batch.append((prompt, [*tokenizer(text).input_ids, tokenizer.eos_token_id]))
        logps, _ = token_logps(model, *pad(batch, model.device), len(model.get_decoder().layers))
        (-logps.mean()).backward()
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 50) * cosine
        optimizer.step()
        optimizer.zero_grad()


def encode(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The token ids of a problem, ready to be completed: by the chat template, or as plain text. A
    system message that the template refuses or ignores goes into the first user message."""
    first, *rest = problem.messages
    if tokenizer.chat_template is None:
        ids = tokenizer("\n\n".join(m["content"] for m in problem.messages) + "\n\n").input_ids
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some end every text
    settings = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)  # as in P
    render = partial(tokenizer.apply_chat_template, **settings)
    text, system = "", first["content"].strip() if first["role"] == "system" else None
    with contextlib.nullcontext() if system is None else contextlib.suppress(jinja2.TemplateError):
        text = render(problem.messages)
    if system is not None and (not text or system not in text):
        text = render([dict(rest[0], content=f"{system}\n\n{rest[0]['content']}"), *rest[1:]])
    if not text:
        raise UsageError("The model's chat template renders nothing; give it another one.")
    return tokenizer(text, add_special_tokens=False).input_ids


def end_tokens(model: Model, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a completion: the model's, the tokenizer's, and the special token with which
    the chat template closes an assistant's turn."""
    ids = model.generation_config.eos_token_id
    ends = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id}
    turn = [dict(role="user", content="2"), dict(role="assistant", content="THE ANSWER")]
    with contextlib.suppress(Exception):  # it has no template, or one that refuses such a turn
        text = tokenizer.apply_chat_template(turn, tokenize=False).partition("THE ANSWER")[2]
        after = tokenizer(text, add_special_tokens=False).input_ids
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        ends.update([i for i in after if i in special][:1])
    return ends - {None}


# 5 Rollouts =======================================================================================


@dataclass
class Completion:
    """A sampled completion."""

    ids: list[int] = field(default_factory=list)  # with the end token, if it came
    logps: list[float] = field(default_factory=list)  # as sampled, to check; not log pi_old
    entropies: list[float] = field(default_factory=list)  # of pi, in nats
    ended: bool = False  # by an end token, not by the length limit
    prompt: list[int] = field(default_factory=list)


class SlotCache:
    """Keys and values of the sequences that are being decoded; to transformers, a cache. Row i, the
    i-th running sequence, owns slot i, and column t holds the keys and values of its token t. So
    sequences of different lengths need no left padding, and a finished row's slot can be taken
    over. Columns beyond a row's position hold leftovers, masked until they are overwritten."""

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, -(-columns // 16) * 16
        self.blocks: list[list[Tensor]] = []  # keys, values: (slots, heads, columns, size) each

    def begin(self, rows: range, position: Tensor, width: int) -> None:
        """Next come T tokens of each of n rows, at positions (n, T), all of them below `width`."""
        self.span, self.position = slice(rows.start, rows.stop), position
        self.rows = torch.arange(rows.start, rows.stop, device=position.device)[:, None]  # (n, 1)
        self.width, self.mask = width, None  # prompts, from column 0 on, need no mask: causal
        if position.shape[1] < width:  # decoding, a token of each row
            self.width = -(-width // 16) * 16
            beyond = torch.arange(self.width, device=position.device) > position  # (n, width)
            mask = torch.zeros_like(beyond, dtype=self.blocks[0][0].dtype)  # (n, width)
            self.mask = mask.masked_fill_(beyond, -math.inf)[:, None, None]  # (n, 1, 1, width)

    def update(self, key: Tensor, value: Tensor, block: int, *_: Any, **__: Any) -> list[Tensor]:
        """Store keys and values (n, heads, T, size); returns those that can be attended to."""
        if block == len(self.blocks):  # all memory is allocated here, once
            shapes = [(self.slots, x.shape[1], self.columns, x.shape[3]) for x in (key, value)]
            self.blocks.append([key.new_zeros(shape) for shape in shapes])
        for store, x in zip(self.blocks[block], (key, value), strict=True):
            store[self.rows, :, self.position] = x.transpose(1, 2)
        return [store[self.span, :, : self.width] for store in self.blocks[block]]

    def copy(self, sources: list[int], targets: Iterable[int]) -> None:
        """Copy what is in some slots into others."""
        source, target = torch.tensor([sources, list(targets)], device=self.rows.device)
        for store in itertools.chain(*self.blocks):
            store[target] = store[source]


def read_prompts(model: Model, prompts: list[list[int]], cache: SlotCache, first: int) -> Tensor:
    """Read the first n prompts, equal ones once, into the free slots, `first` and on; n: as many as
    fit, at most slots / 8 of them different, since reading takes memory. Returns the hidden states
    (n, D) of their last tokens."""
    different: list[list[int]] = []  # k of them
    owner = []  # for each prompt, its index among them
    for prompt in prompts[: cache.slots - first]:
        if prompt not in different:
            if len(different) == max(1, cache.slots // 8):
                break
            different.append(prompt)
        owner.append(different.index(prompt))
    ids, _ = pad([(prompt, []) for prompt in different], model.device)  # (k, T)
    position = torch.arange(ids.shape[1], device=model.device)[None]  # (1, T)
    cache.begin(range(first, first + len(different)), position, ids.shape[1])
    hidden = internal_hidden(model, ids, len(model.get_decoder().layers), cache)  # (k, T, D)
    cache.copy([first + n for n in owner], range(first, first + len(owner)))
    return hidden[owner, [len(different[n]) - 1 for n in owner]]


def draw(logits: Tensor, temperature: float, generator: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A token for each row of logits (n, V), its log-probability, and the entropy; (n,) each."""
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (n, V)
    probs = logps.exp()  # (n, V)
    if temperature:  # the token at which the cumulative distribution passes a uniform number
        cumulative = probs.double().cumsum(-1)  # (n, V)
        uniform = torch.empty_like(cumulative[:, :1]).uniform_(generator=generator)  # (n, 1)
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (n, 1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    else:  # greedy
        tokens = logps.argmax(-1, keepdim=True)  # (n, 1)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0], -(probs * logps).sum(-1)  # Eq. 7


@torch.no_grad()
def sample(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: Iterable[int],
    temperature: float = 1.0,
    rows: int = 128,
    generator: torch.Generator | None = None,
    bar: str = "",
) -> list[Completion]:
    """Sample a completion of each prompt (token ids) from the full softmax of pi: no top-k, top-p.
    Equal prompts that enter together, as a group's do, are read once. At most `rows` sequences are
    decoded at once: a finished one leaves, and prompts enter when an eighth of the rows is free.
    generator: on the model's device; temperature 0 is greedy; bar: the name of a progress bar."""
    model.eval()
    ends, num_layers = set(eos_ids), len(model.get_decoder().layers)
    completions = [Completion(prompt=prompt) for prompt in prompts]
    cache = SlotCache(min(rows, len(prompts)), max(map(len, prompts), default=0) + max_new_tokens)
    running: list[Completion] = []  # one in each row
    waiting = completions
    hidden = model.get_input_embeddings().weight[:0]  # (n, D), of the last token of each row
    progress = tqdm(total=len(prompts), desc=bar, leave=False, disable=not bar)
    while running or waiting:
        # Prompts enter, several at a time, which is faster.
        free = cache.slots - len(running)
        if waiting and free >= min(len(waiting), max(1, cache.slots // 8)):
            last = read_prompts(model, [c.prompt for c in waiting], cache, len(running))  # (n, D)
            running, waiting = running + waiting[: len(last)], waiting[len(last) :]
            hidden = torch.cat([hidden, last])

        # Each row draws a token.
        drawn = draw(policy_logits(model, hidden), temperature, generator)  # (n,) each
        going = []
        numbers = torch.stack(drawn).tolist()  # one transfer; float32 is exact for ids
        for c, token, logp, entropy in zip(running, *numbers, strict=True):
            c.ids.append(int(token))
            c.logps.append(logp)
            c.entropies.append(entropy)
            c.ended = token in ends
            going.append(not c.ended and len(c.ids) < max_new_tokens)

        # Finished rows leave, the others read their token.
        order = [
            row for row, goes_on in enumerate(going) if goes_on
        ]  # slot -> row that it will hold
        freed = [slot for slot in range(len(order)) if not going[slot]]
        for slot in freed:  # the last row takes a finished one's place
            order.insert(slot, order.pop())
        if freed:
            cache.copy([order[slot] for slot in freed], freed)
        progress.update(len(running) - len(order))
        running, hidden = [running[row] for row in order], hidden[:0]
        if running:
            position = [len(c.prompt) + len(c.ids) - 1 for c in running]
            from_cpu = torch.tensor([order, position], device=model.device)  # (2, n), one transfer
            cache.begin(range(len(running)), from_cpu[1][:, None], max(position) + 1)
            ids = drawn[0][from_cpu[0]][:, None]  # (n, 1)
            hidden = internal_hidden(model, ids, num_layers, cache)[:, 0]  # (n, D)
    progress.close()
    return completions


# 6 Internal policies ==============================================================================

HEAD_TOKENS = 1024  # tokens that get logits at a time; those of all (B, T, V) would fill any GPU


def internal_hidden(
    model: Model, ids: Tensor, layer: int, cache: SlotCache | None = None, recompute: bool = False
) -> Tensor:
    """The residual stream H^l (B, T, D) after block l = 0..L, before any final norm; runs blocks
    1..l. ids (B, T), int64, padded on the right with anything: causal attention never looks there.
    recompute: redo activations in the backward pass. Values and gradients are those of
    `hidden_states[layer]`, except that transformers has already normed the last of these."""
    hidden = model.get_input_embeddings()(ids)  # (B, T, D)
    position = cache.position if cache else torch.arange(ids.shape[1], device=ids.device)[None]
    rotary, mask = model.get_decoder().rotary_emb(hidden, position), cache.mask if cache else None
    for block in model.get_decoder().layers[:layer]:  # without a mask, attention is causal
        run = partial(checkpoint, block, use_reentrant=False) if recompute else block
        hidden = run(hidden, mask, None, cache, position_embeddings=rotary)  # None: position ids
    return hidden


def policy_logits(model: Model, hidden: Tensor, norm: bool = True) -> Tensor:
    """Logits (..., V) of the policy that speaks from `hidden` (..., D): E_u norm(h), or E_u h. With
    H^L this is the policy (Eq. 1), with H^l an internal layer policy (Eq. 5, which has no norm),
    with A^l or F^l and no norm an internal modular policy (Eq. 6)."""
    return model.get_output_embeddings()(model.get_decoder().norm(hidden) if norm else hidden)


def pad(sequences: Sequences, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(prompt, completion) pairs -> ids (B, T), padded on the right, mask (B, T) of completions.
    The mask comes from the lengths, never from token values: a pad id may well be an end id."""
    tokens = [torch.tensor([*prompt, *completion]) for prompt, completion in sequences]
    marks = [torch.tensor([False] * len(p) + [True] * len(c)) for p, c in sequences]
    ids, mask = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (tokens, marks))
    return ids.to(device), mask.to(device)


def micro_batches(sequences: Sequences, tokens: int, indices: Iterable[int]) -> list[list[int]]:
    """Split the sequences of these indices into micro-batches of indices. Padded to its longest
    sequence, each holds at most `tokens` tokens, or is one sequence."""
    micros: list[list[int]] = []
    # Shortest first, so that little of them is padding.
    for length, i in sorted((sum(map(len, sequences[i])), i) for i in indices):
        if not micros or (len(micros[-1]) + 1) * length > tokens:
            micros.append([])
        micros[-1].append(i)
    return micros


def token_logps(
    model: Model,
    ids: Tensor,
    mask: Tensor,
    layer: int,
    norm: bool = True,
    temperature: float = 1.0,
    entropy: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi^l (N,) of the N tokens where mask is True, row by row, given all before each; and, if
    asked, entropies (N,) of pi^l, without gradient; float32, nats. ids, mask (B, T) as from `pad`.
    At layer = L the final norm always applies. Only the position before each token goes through
    lm_head, HEAD_TOKENS at a time. The backward pass recomputes each chunk's logits, but for the
    last chunk's, which it uses first."""
    norm = norm or layer == len(model.get_decoder().layers)
    targets = ids[:, 1:][mask[:, 1:]]  # (N,)
    hidden = internal_hidden(model, ids, layer, recompute=recompute)  # (B, T, D)
    hidden = hidden[:, :-1][mask[:, 1:]]  # (N, D), one position before each target

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = policy_logits(model, hidden, norm).float()  # (n, V)
        logps = (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # (n, V)
        chosen, constant = logps.gather(-1, targets[:, None])[:, 0], logps.detach()
        return chosen, -constant.exp().mul_(constant).sum(-1) if entropy else None  # (n,); Eq. 7

    *chunks, last = zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
    scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    scored.append(score(*last))
    logps, entropies = zip(*scored, strict=True)
    return torch.cat(logps), torch.cat(entropies) if entropy else None


def residual_stream(model: Model, ids: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """H^(l-1), LN(H^(l-1)), A^l, LN(H^(l-1) + A^l), F^l of each block l = 1..L; (B, T, D) each. For
    ids (B, T): the forward pass of a Llama-like decoder, spelt out."""
    hidden = internal_hidden(model, ids, 0)  # H^0, the embeddings
    positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
    rotary = model.get_decoder().rotary_emb(hidden, positions)
    for block in model.get_decoder().layers:
        attention_input = block.input_layernorm(hidden)
        attention, _ = block.self_attn(attention_input, rotary, attention_mask=None)  # causal
        ffn_input = block.post_attention_layernorm(hidden + attention)
        ffn = block.mlp(ffn_input)
        yield hidden, attention_input, attention, ffn_input, ffn
        hidden = hidden + attention + ffn


@torch.no_grad()
def ffn_entropy_change(model: Model, sequences: Sequences, tokens: int = 16384) -> list[float]:
    """H(F^l) - H(LN(H^(l-1) + A^l)), l = 1..L: by how much each FFN raises the entropy (Eq. 13).
    Mean over completion tokens, in nats, of internal modular policies; `tokens` per micro-batch."""
    change = [0.0] * len(model.get_decoder().layers)
    for micro in micro_batches(sequences, tokens, range(len(sequences))):
        ids, mask = pad([sequences[i] for i in micro], model.device)  # (B, T) each
        for i, (*_, before, after) in enumerate(residual_stream(model, ids)):
            for sign, tensor in ((-1, before), (1, after)):
                for hidden in tensor[:, :-1][mask[:, 1:]].split(HEAD_TOKENS):  # (n, D)
                    logps = policy_logits(model, hidden, norm=False).float().log_softmax(-1)
                    change[i] -= sign * float((logps.exp() * logps).sum())  # Eq. 7
    total = sum(len(completion) for _, completion in sequences)
    return [value / total for value in change]


def boundary_layer(ffn_entropy_change: list[float], tolerance: float = 0.1) -> int:
    """The last layer of the exploring region, the lowest run of layers whose FFN's entropy change
    is clearly positive: above `tolerance` times the largest. If there is none: L, pi itself."""
    threshold = tolerance * max(0.0, *ffn_entropy_change)
    changes = [*ffn_entropy_change, -math.inf]
    for layer, (change, above) in enumerate(itertools.pairwise(changes), start=1):
        if change > threshold >= above:
            return layer
    return len(ffn_entropy_change)


# 7 Objective ======================================================================================


def group_advantages(rewards: Tensor) -> Tensor:
    """A = (R - mean) / (std + 1e-6) over each problem's completions, std unbiased (Eq. 3). rewards
    and result: (problems, group), float. A group of equal rewards gets exactly 0."""
    centered = rewards - rewards.mean(-1, keepdim=True)  # (problems, group)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # (problems, 1)
    return (centered / (rewards.std(-1, keepdim=True) + 1e-6)).masked_fill(equal, 0.0)


def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A) per token, to be maximized: Eq. 9; at l = L, Eq. 3.
    All of one shape. rho = pi^l_new / pi^l_old, both of the policy being optimized, is how far the
    updates on this rollout have moved it. As in the paper, there is no importance weight pi^l / pi:
    a completion of pi counts the same however unlikely pi^l would have been to draw it."""
    ratio = (logps - old_logps).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def optimized_layer(step: int, internal_steps: int, internal_layer: int, num_layers: int) -> int:
    """The layer whose policy `step` optimizes, steps counted from 1: the phase switch (Eq. 10)."""
    return internal_layer if step <= internal_steps else num_layers


# 8 Evaluation =====================================================================================


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k is right, from c right ones of n >= k: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    model: Model, tokenizer: Tokenizer, problems: list[Problem], config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """avg@k and pass@1..k of pi, from k completions of each problem, and these completions, always
    from the same random stream. eval_se: standard error of eval_avg over problems."""
    k, samples = config.eval_k, []
    asked = [problem for problem in problems for _ in range(k)]
    completions, _ = rollout(model, tokenizer, asked, config, "evaluation")
    for problem, c in zip(asked, completions, strict=True):
        text = tokenizer.decode(c.ids, skip_special_tokens=True)
        said = dict(completion=text, ended=c.ended, reward=math_reward(text, problem.answer))
        samples.append(dict(asdict(problem), **said, prompt_ids=c.prompt, ids=c.ids))
    rewards = [record["reward"] for record in samples]
    right = [int(sum(rewards[i : i + k])) for i in range(0, len(rewards), k)]  # of each problem's k
    error = stdev(c / k for c in right) / len(right) ** 0.5 if len(right) > 1 else None
    passed = [fmean(pass_at_k(k, c, j) for c in right) for j in range(1, k + 1)]
    metrics = dict(eval_avg=fmean(rewards), eval_se=error, eval_pass=passed, eval_k=k)
    return dict(metrics, eval_problems=len(problems)), samples


# 9 Training =======================================================================================

GRAD_CLIP = 1.0  # largest norm of a gradient (paper: 1.0)


def train(config: Config, resume: bool = False) -> Path:
    """Run BuPO as `config` says and return the run's folder; resume: from its last checkpoint. What
    is drawn follows from the seed, the purpose and the step, so a resumed run repeats an
    undisturbed one, bit for bit on a CPU. Ctrl-C finishes the step and saves a checkpoint."""
    device, dtype = choose_device(config)
    out, start = run_folder(config, resume)
    model, tokenizer = load_model(str(start or config.model), seed=config.seed)
    held_out, problems = usable_problems(config, model, tokenizer)
    write_config(out, config, resume)  # nothing was written before
    if config.model == "tiny" and not start:
        pretrain(model, tokenizer, config.pretrain_steps, config.seed)
    optimizer = MasterAdamW(model, device, dtype, config.optimizer_device)
    state = load_checkpoint(start, optimizer)
    if config.steps and not start:
        save_checkpoint(config, model, tokenizer, optimizer, state)
    if held_out and state["step"] == 0:
        evaluate_and_log(0, model, tokenizer, held_out, config)
    history: list[dict[str, Any]] = []
    num_layers = len(model.get_decoder().layers)
    steps = range(state["step"] + 1, config.steps + 1)
    bar = tqdm(steps, "training", config.steps, initial=state["step"], disable=not steps)
    STOP["limit"] = 2  # from here on the first request to stop lets the step finish
    try:
        for step in bar:
            # 1 Draw problems, and G completions of each from the full policy pi, in either phase.
            times = [time.perf_counter()]
            indices = problems_of_step(step, len(problems), config.prompts_per_step, config.seed)
            asked = [problems[i] for i in indices for _ in range(config.group_size)]
            completions, sequences = rollout(model, tokenizer, asked, config, f"rollout {step}")
            times.append(time.perf_counter())

            # 2 Reward 1 for a right boxed answer, else 0.
            texts = tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
            rewards = [math_reward(text, p.answer) for text, p in zip(texts, asked, strict=True)]

            # 3 Normalize within each problem's group: (problems, group).
            advantages = group_advantages(torch.tensor(rewards).view(-1, config.group_size))

            # 4 Choose the policy to optimize: pi^l in phase 1, then pi.
            auto = config.internal_layer == "auto"
            if auto and step <= config.internal_steps and not state["boundary"]:
                state["boundary"] = find_boundary(model, sequences, config)
            low = state["boundary"] if auto else int(config.internal_layer)
            layer = optimized_layer(step, config.internal_steps, low, num_layers)

            # 5 Maximize the clipped surrogate of that policy, one optimizer update per mini-batch.
            error = sampling_error(model, completions, config.temperature)
            times.append(time.perf_counter())
            lr = config.lr * min(1.0, step / config.lr_warmup_steps)
            updated = update(model, optimizer, sequences, advantages.flatten(), layer, lr, config)

            # 6 Log, evaluate and save.
            told = describe(completions, rewards, advantages, times)
            metrics = {"step": step, "layer": layer, **told, **updated, "sampling_error": error}
            state["step"] = step
            log(out / "metrics.jsonl", metrics)
            if held_out and step % config.eval_every == 0:
                evaluate_and_log(step, model, tokenizer, held_out, config)
            STOP["limit"] = math.inf  # an impatient second Ctrl-C must not lose the checkpoint
            stop = STOP["asked"]
            if stop or step % config.save_every == 0 or step == config.steps:
                save_checkpoint(config, model, tokenizer, optimizer, state)
            STOP["limit"] = 2
            if stop:
                raise KeyboardInterrupt
            history.append(metrics)
            advise(bar, history)
    except OSError:  # a closed pipe or terminal, or a full disk: lose no step
        save_checkpoint(config, model, tokenizer, optimizer, state)
        raise
    STOP["limit"] = 1  # from here on the first request interrupts again
    if held_out and config.steps % config.eval_every:
        evaluate_and_log(config.steps, model, tokenizer, held_out, config)
    if config.steps:
        with whole_folder(out / "model", replace=True) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        command = f"python bupo.py --model {shlex.quote(str(out))} --steps 0"
        tqdm.write(f"Saved       {out}/model; to evaluate it: {command}")
    return out


def describe(
    completions: list[Completion], rewards: list[float], advantages: Tensor, times: list[float]
) -> dict[str, Any]:
    """What the log says of a step besides what `update` measures; entropies: mean, nats."""
    began, sampled, updating, ended = *times, time.perf_counter()
    tokens = sum(len(c.ids) for c in completions)
    learned = sum(len(c.ids) for c, a in zip(completions, advantages.view(-1), strict=True) if a)
    entropy = sum(sum(c.entropies) for c in completions) / tokens
    return dict(
        reward=fmean(rewards),
        entropy=entropy,  # of pi
        layer_entropy=entropy,  # of the policy optimized; in phase 1 `update` replaces it
        completion_tokens=tokens / len(completions),
        truncated=fmean(not c.ended for c in completions),
        zero_std_groups=fmean((advantages == 0).all(-1).tolist()),
        rollout_tokens_per_s=tokens / (sampled - began),
        update_tokens_per_s=learned / (ended - updating),
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 or None,
        seconds=ended - began,
    )


def evaluate_and_log(
    step: int, model: Model, tokenizer: Tokenizer, problems: list[Problem], config: Config
) -> None:
    """Evaluate, log it with a completion of each of the first eight problems, and show one."""
    metrics, samples = evaluate(model, tokenizer, problems, config)
    k, first, error = config.eval_k, samples[0], metrics["eval_se"]
    for record in samples[: 8 * k : k]:
        log(Path(config.out, "completions.jsonl"), dict(step=step, **record))
    log(Path(config.out, "metrics.jsonl"), dict(step=step, **metrics))
    known = "" if error is None else f" (standard error {error:.1%})"
    score = f"avg@{k} {metrics['eval_avg']:.1%}{known}, pass@{k} {metrics['eval_pass'][-1]:.1%}"
    tqdm.write(f"Evaluation  step {step}: {score}, {len(problems)} held-out problems")
    said = f"{first['messages'][-1]['content'][:150]} -> ... {first['completion'][-200:]}"
    said += f" [answer {first['answer']}, reward {first['reward']:.0f}]"
    tqdm.write(f"Completion  {' '.join(said.split())}")


def update(
    model: Model,
    optimizer: "MasterAdamW",
    sequences: Sequences,
    advantages: Tensor,
    layer: int,
    lr: float,
    config: Config,
) -> dict[str, float]:
    """Maximize the mean clipped surrogate of pi^layer, one optimizer update per mini-batch, for M
    (prompt, completion) pairs, those of a problem side by side, with advantages (M,). The mean is
    over all completion tokens of a mini-batch or, as in Eq. 3 and 9 (--loss-average sequence), per
    completion, then over completions. Completions without advantage count as zeros."""
    model.eval()  # in updates too: with dropout, rho would be a matter of chance
    internal, size = layer < len(model.get_decoder().layers), config.mini_batch * config.group_size
    lengths = torch.tensor([len(c) for _, c in sequences], device=model.device)  # (M,)
    totals = lengths.view(-1, size).sum(-1).repeat_interleave(size)  # (M,), of mini-batches
    weights = 1 / (totals if config.loss_average == "token" else size * lengths)  # (M,), of tokens

    def score(micro: list[int], entropy: bool) -> tuple[Tensor, Tensor | None]:
        ids, mask = pad([sequences[i] for i in micro], model.device)  # (B, T) each
        norm, recompute = config.internal_norm == "final", config.gradient_checkpointing
        return token_logps(model, ids, mask, layer, norm, config.temperature, entropy, recompute)

    # plan: the micro-batches of each mini-batch. Only completions with an advantage are in it.
    split = partial(micro_batches, sequences, config.micro_batch_tokens)
    learns = [i for i, advantage in enumerate(advantages.tolist()) if advantage != 0]
    plan = [split(i for i in learns if i // size == n) for n in range(len(sequences) // size)]
    plan = [micros for micros in plan if micros]
    rest = split(i for i in range(len(sequences)) if i not in learns) if internal else []

    # pi^l_old is pi^l before any update. The first mini-batch takes log pi^l_old from its own
    # forward pass (rho = 1); the later ones are scored here. In phase 1, completions without
    # advantage are scored, too, for the entropy in the log. Key: the first index of a micro-batch.
    with torch.no_grad():
        scored = {micro[0]: score(micro, internal) for micro in itertools.chain(*plan[1:], rest)}
    ratios, clipped, grad_norms = [], [], []
    for micros in plan:
        first = micros is plan[0]  # nothing has moved pi^l yet
        for micro in micros:
            logps, entropies = score(micro, internal and first)  # (N,) each, N completion tokens
            if first:
                scored[micro[0]] = (logps.detach(), entropies)
            old_logps, _ = scored[micro[0]]  # (N,)
            weight = weights[micro].repeat_interleave(lengths[micro])  # (N,)
            advantage = advantages.to(weight)[micro].repeat_interleave(lengths[micro])  # (N,)
            surrogate = clipped_surrogate(logps, old_logps, advantage, config.clip)  # (N,)
            (-(weight * surrogate).sum()).backward()
            ratios.append((logps.detach() - old_logps).exp())  # (N,)
            clipped.append(surrogate.detach() < ratios[-1] * advantage)  # (N,)
        grad_norms.append(optimizer.step(lr))
    metrics = dict(clip_fraction=0.0, ratio_max=1.0, grad_norm=0.0)
    if plan:
        metrics["clip_fraction"] = float(torch.cat(clipped).float().mean())
        metrics["ratio_max"] = float(torch.cat(ratios).max())
        metrics["grad_norm"] = fmean([x for x in grad_norms if math.isfinite(x)] or [math.nan])
    if internal:
        total = sum(float(entropy.sum()) for _, entropy in scored.values() if entropy is not None)
        metrics["layer_entropy"] = total / int(lengths.sum())
    return metrics


class MasterAdamW:
    """AdamW on float32 masters of the weights of a model of any precision: ZeRO-Offload's idea. In
    bfloat16 a weight is too coarse for a learning rate of 1e-6. So each has a float32 master, with
    AdamW's moments beside it, on the GPU or the CPU. A gradient goes to its master as soon as it is
    there; after a step the weights are the masters, rounded. In float32 on one device a weight is
    its own master. AdamW's defaults are the paper's settings."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, where: str):
        """The float32 weights of `model` become the masters, and it gets `dtype`. auto: the GPU if
        18 bytes a weight (itself, master, gradient, moments) fit into half of what is free."""
        self.weights, self.device = list(model.parameters()), torch.device("cpu")
        size = sum(weight.numel() for weight in self.weights)
        if device.type == "cuda" and where != "cpu":
            free, _ = torch.cuda.mem_get_info(device)
            self.device = device if where == "cuda" or 18 * size <= free / 2 else self.device
        self.masters = self.weights
        if dtype != torch.float32 or device != self.device:
            self.masters = [nn.Parameter(w.detach().to(self.device)) for w in self.weights]
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.register_post_accumulate_grad_hook(partial(self.take, master))
        place(model, device, dtype)
        self.adam = torch.optim.AdamW(self.masters, fused=True)
        kind = f"{type(model).__name__}, {size / 1e6:.1f} M parameters, {dtype} on {device}"
        tqdm.write(f"Model       {kind}, masters on {self.device}".replace("torch.", ""))

    @torch.no_grad()
    def take(self, master: Tensor, weight: Tensor) -> None:
        """Add the gradient of a weight to that of its master, in float32, and free it."""
        grad = weight.grad.to(master.device, torch.float32)  # type: ignore[union-attr]
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        weight.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip the gradient, whose norm is returned, update masters and weights. Weights without
        gradient, such as those above l in phase 1, stay bit-identical; a gradient that is not
        finite moves nothing."""
        norm = float(nn.utils.clip_grad_norm_(self.masters, GRAD_CLIP))
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            for weight, master in zip(self.weights, self.masters, strict=True):
                if master is not weight and master.grad is not None:
                    weight.copy_(master)
        self.adam.zero_grad()  # to None: zeros would let momentum and weight decay move masters
        return norm


def rollout(
    model: Model, tokenizer: Tokenizer, asked: list[Problem], config: Config, purpose: str
) -> tuple[list[Completion], Sequences]:
    """A completion of each problem from pi, drawn as seed and purpose say; and the ids of both."""
    prompts = [encode(tokenizer, problem) for problem in asked]
    ends, stream = end_tokens(model, tokenizer), random_stream(model.device, config.seed, purpose)
    most, rows = config.max_new_tokens, rollout_rows(model, max(map(len, prompts)), config)
    completions = sample(model, prompts, most, ends, config.temperature, rows, stream, purpose)
    torch.cuda.empty_cache()  # an update needs blocks of other sizes
    return completions, [(c.prompt, c.ids) for c in completions]


def rollout_rows(model: Model, longest_prompt: int, config: Config) -> int:
    """--rollout-rows; auto: as many as fit into 90 % of a GPU's free memory (a CPU: 4 GB). A row
    takes keys and values, a share in reading prompts, and 32 bytes per vocabulary entry."""
    if config.rollout_rows != "auto":
        return int(config.rollout_rows)
    memory, c = 4e9, model.config
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        memory = 0.9 * torch.cuda.mem_get_info(model.device)[0]
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    column = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim  # numbers in the cache
    reading = longest_prompt / 8 * (8 * c.hidden_size + 4 * c.intermediate_size)  # an eighth reads
    numbers = column * (longest_prompt + config.max_new_tokens + 16) + reading
    return max(1, int(memory // (numbers * model.dtype.itemsize + 32 * c.vocab_size)))


def random_stream(device: str | torch.device, seed: int, purpose: str) -> torch.Generator:
    """A generator that seed and purpose determine: nothing to save, and none disturbs another."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


def find_boundary(model: Model, sequences: Sequences, config: Config) -> int:
    """What `--internal-layer auto` means: the boundary layer, by 32 tokens of 16 completions."""
    windows = []
    for n, (prompt, completion) in enumerate(sequences[:: max(1, len(sequences) // 16)][:16]):
        start = n * max(0, len(completion) - 32) // 15  # early in the first, late in the last
        windows.append((prompt + completion[:start], completion[start : start + 32]))
    change = ffn_entropy_change(model, windows, config.micro_batch_tokens)
    layer, rounded = boundary_layer(change), " ".join(f"{value:+.2f}" for value in change)
    found = f"layer {layer}" if max(change) > 0 else "none, so phase 1 is GRPO"
    tqdm.write(f"Boundary    {found}; FFN entropy change of each layer, in nats: {rounded}")
    return layer


@torch.no_grad()
def sampling_error(model: Model, completions: list[Completion], temperature: float) -> float:
    """Mean |log pi as sampled - as scored|, nats, of 1 completion in 16, about 8 at most."""
    num_layers, errors = len(model.get_decoder().layers), []
    for c in completions[:: max(16, len(completions) // 8)]:
        ids, mask = pad([(c.prompt, c.ids)], model.device)  # (1, T) each
        scored, _ = token_logps(model, ids, mask, num_layers, temperature=temperature)
        errors += (scored.cpu() - torch.tensor(c.logps)).abs().tolist()
    return fmean(errors)


def problems_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """The indices of a step's problems: all come once in each epoch, in an order of its own."""
    epoch = cache(lambda n: Random(f"{seed} {n}").sample(range(count), count))
    return [epoch(i // count)[i % count] for i in range((step - 1) * size, step * size)]


# 10 Files and command line ========================================================================

LOGS = ("metrics.jsonl", "completions.jsonl")
STOP: dict[str, float] = dict(asked=0, limit=1)  # requests to stop; how many interrupt


def ask_to_stop(number: int, frame: Any) -> None:
    """In training, the first Ctrl-C, SIGTERM or SIGHUP lets the step finish, and a Ctrl-C after it
    interrupts (not a SIGHUP: a terminal that closes may send two). Otherwise the first one does."""
    STOP["asked"] = max(1, STOP["asked"] + (number == signal.SIGINT))
    if STOP["asked"] >= STOP["limit"]:
        raise KeyboardInterrupt


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and the precision to compute in."""
    name, native = config.device, False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        with explain(f"--device {name} cannot be used", "give cpu or auto"):
            torch.cuda.init()
            torch.cuda.set_device(device.index or 0)
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, so at each token
    if config.preset == "tiny":
        torch.set_num_threads(1)  # more make so small a model slower
    if config.optimizer_device == "cuda" and device.type == "cpu":
        raise UsageError("--optimizer-device cuda needs --device cuda; give auto.")
    low = config.precision == "bfloat16" or (config.precision == "auto" and native)
    if device.type == "cuda" and not low:  # no fused kernel there shares keys between query heads
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False  # so copy the keys: T^2 memory otherwise
    return device, torch.bfloat16 if low else torch.float32


def usable_problems(
    config: Config, model: Model, tokenizer: Tokenizer
) -> tuple[list[Problem], list[Problem]]:
    """Held-out and training problems with short prompts; refuses what the model cannot take."""
    num_layers = len(model.get_decoder().layers)
    if config.internal_layer != "auto" and int(config.internal_layer) > num_layers:
        raise UsageError(f"--internal-layer must be auto or 1 to {num_layers} for this model.")
    limits = ["max_position_embeddings", "sliding_window"]
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this length its rotary embeddings are others
        limits.append("original_max_position_embeddings")
    most = min(getattr(model.config, name, None) or rope.get(name) or math.inf for name in limits)
    if config.max_prompt_tokens + config.max_new_tokens > most:
        both = "--max-prompt-tokens plus --max-new-tokens"
        raise UsageError(f"{both} must be at most {most}, which is as far as this model reads.")

    def fits(problem: Problem) -> bool:
        return len(encode(tokenizer, problem)) <= config.max_prompt_tokens

    held_out = load_problems(config.eval_dataset, config.eval_problems, config.system, fits)
    some = None if config.steps else 0
    return held_out, load_problems(config.dataset, some, config.system, fits)


def run_folder(config: Config, resume: bool) -> tuple[Path, Path | None]:
    """The folder of the run and the checkpoint to resume it from; nothing is written yet."""
    name = Path(config.model).name + time.strftime("-%Y%m%d-%H%M%S")
    out = Path(config.out or Path("runs", name)).expanduser()
    config.out, found = str(out), checkpoints(out)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; --resume it, or give another --out.")
    if resume and not found and ((out / "metrics.jsonl").exists() or (out / "model").exists()):
        raise UsageError(f"{out} has no checkpoint to resume from; start anew with another --out.")
    if found and config.steps < int(found[-1].name[11:]):
        raise UsageError(f"--steps {config.steps} is less than {found[-1]} has; raise it.")
    return out, found[-1] if found else None


@contextlib.contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets its name at the end of this context: whole, or not at all."""
    with explain(f"{folder} cannot be written", "make room, or give another --out"):
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if replace:
                shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)  # fails if there is one that is not empty: no two runs share
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_config(out: Path, config: Config, resume: bool) -> None:
    """Write config.json, never half of it: into a new folder, or over that of the run to resume."""
    with contextlib.nullcontext(out) if resume else whole_folder(out) as folder:
        text = json.dumps(asdict(config), indent=2) + "\n"
        (folder / ".config.json").write_text(text, encoding="utf-8")
        (folder / ".config.json").replace(folder / "config.json")


def save_checkpoint(
    config: Config, model: Model, tokenizer: Tokenizer, optimizer: MasterAdamW, state: dict
) -> None:
    """Write checkpoint-STEP, with the masters, for --resume and --model; remove all but --keep."""
    out, names = Path(config.out), [name for name, _ in model.named_parameters()]
    if (out / f"checkpoint-{state['step']}").exists():
        return
    with whole_folder(out / f"checkpoint-{state['step']}") as folder:
        masters = dict(zip(names, optimizer.masters, strict=True))
        model.save_pretrained(folder, state_dict=masters, max_shard_size="1TB")
        model.config.dtype = "float32"  # which the masters are, whatever the model computes in
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        logs = {name: (out / name).read_text("utf-8") for name in LOGS if (out / name).exists()}
        torch.save(dict(state, logs=logs, adam=optimizer.adam.state_dict()), folder / "training.pt")
    for old in checkpoints(out)[: -config.keep] if config.keep else []:
        shutil.rmtree(old)


def load_checkpoint(start: Path | None, optimizer: MasterAdamW) -> dict[str, Any]:
    """The state of the run at the start; restores AdamW's moments and the logs."""
    if start is None:
        return dict(step=0, boundary=None)
    fix = "remove this checkpoint, and --resume continues from the one before"
    with explain(f"The checkpoint {start} is damaged or of another model", fix):
        state = torch.load(start / "training.pt", optimizer.device, weights_only=True)
        optimizer.adam.load_state_dict(state.pop("adam"))
    for name in LOGS:
        (start.parent / name).unlink(missing_ok=True)
    for name, text in state.pop("logs").items():
        (start.parent / name).write_text(text, encoding="utf-8")
    tqdm.write(f"Resumed     after step {state['step']}, from {start}")
    return state


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [folder for folder in out.glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))


def log(file: Path, record: dict[str, Any]) -> None:
    """Append a record to a file, as a line of JSON; what is not finite becomes null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(finite) + "\n")


def advise(bar: tqdm, history: list[dict[str, Any]]) -> None:
    """Show the last step on the bar, say once what to do about it, end a run that cannot learn."""
    last, note = history[-1], ""
    bar.set_postfix({name: last[name] for name in ("layer", "reward", "completion_tokens")})
    if len(history) >= 20 and not any(step["reward"] for step in history[-20:]):
        note = "no reward in 20 steps: are answers boxed, problems too hard? See completions.jsonl"
    elif last["truncated"] > 0.5:
        note = "most completions are cut off: raise --max-new-tokens"
    elif last["entropy"] < 0.02:
        note = "the entropy is nearly 0, nothing is left to explore: lower --lr"
    if note and all(step.get("note") != note for step in history):
        tqdm.write(f"Note        {note} (step {last['step']})")
        last["note"] = note
    if len(history) >= 10 and all(math.isnan(step["grad_norm"]) for step in history[-10:]):
        fix = "resume with a lower --lr or --precision float32"
        raise UsageError(f"Ten steps in a row had no finite gradient; {fix}.")


def parse(arguments: list[str] | None = None) -> tuple[Config, bool]:
    """The `Config` of a command line, of which every field is a flag, and whether to resume."""
    parser = argparse.ArgumentParser(description="BuPO: (paper) [default]", usage=argparse.SUPPRESS)
    for f in fields(Config):
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        kind: Any = dict(type=f.type, metavar=f.metadata.get("choices", ""))
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)
    parser.add_argument("--resume", metavar="", help="folder of a run; flags given change it")
    given = vars(parser.parse_args(arguments))
    folder = given.pop("resume")
    if folder is None:
        return configure(**given), False
    if "out" in given or "model" in given:
        raise UsageError("--resume takes neither --out nor --model: a run keeps its own.")
    return Config(**{**read_config(folder), **given, "out": folder}), True


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for what the user can fix; 130 after a request to stop."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    STOP.update(asked=0, limit=1)
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, ask_to_stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)
    config = None
    try:
        config, resume = parse(arguments)
        train(config, resume)
        return 0
    except KeyboardInterrupt:
        code, said = 130, "stopped"
    except (UsageError, OSError, RuntimeError, MemoryError) as error:
        code, said = 2, str(error).rstrip(".")
        if out_of_memory(error):
            said = "out of memory; lower --rollout-rows or --micro-batch-tokens"
        elif isinstance(error, RuntimeError):
            raise  # a bug
        elif isinstance(error, BrokenPipeError):  # Python would complain of it at its end
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(OSError):  # of a pipe or a terminal that is gone
        if config and os.path.exists(config.out) and checkpoints(Path(config.out)):
            said += f"; resume with --resume {config.out}" * ("--resume" not in said)
        print(f"bupo.py: {said}.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
