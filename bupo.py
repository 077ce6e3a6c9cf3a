r"""Bottom-up Policy Optimization (BuPO, arXiv 2512.19673) in one file.

A block l of a language model adds what its attention and its FFN compute, A^l and F^l, to the residual stream:
H^l = H^(l-1) + A^l + F^l. The model draws each token from its policy pi = softmax(E_u norm(H^L)), L being the last
block and E_u the unembedding, lm_head. Send the hidden state of a *lower* block through the same norm and lm_head and
you get an *internal layer policy* pi^l = softmax(E_u norm(H^l)).

GRPO draws G completions of each problem, compares the reward of each with its group's mean, and makes the better ones
likelier, clipped so that no update goes far. BuPO is GRPO whose first steps optimise one low pi^l, and whose later
steps optimise pi. Completions always come from pi; in phase 1 it is their probability under pi^l that is raised or
lowered. There is no KL term and no reference model. So GRPO is BuPO at l = L, and pi^l is simply the model with its
upper blocks taken away: training has one log-probability, one loss, and a layer number. In phase 1 blocks 1..l, the
embeddings, lm_head and, if pi^l has it, the final norm learn; the blocks above l stay as they are.

Why it should help, says the paper: low layers still explore (their FFNs raise entropy) while high ones converge, and
an internal policy that is rewarded makes its layers find early what reasoning needs, for the upper ones to build on.
Nothing keeps the upper blocks in step meanwhile, so phase 1 is short: 20 or 30 steps of 300 in the paper, where many
more make pi collapse.

    1 Configuration      Config
    2 Problems           Problem, load_problems, the built-in arithmetic task
    3 Reward             extract_boxed, math_reward
    4 Model              load_model, the built-in tiny Qwen3, warm_up
    5 Rollouts           sample
    6 Internal policies  internal_hidden, policy_logits, token_logps, entropy_profile, boundary_layer
    7 Objective          group_advantages, clipped_surrogate, optimised_layer
    8 Evaluation         pass_at_k, evaluate
    9 Training           train: the algorithm, in six numbered steps; update
                         (then, to be skipped at first: the machine, files and words)
    10 Command line      main

Where this file departs from the paper (P) or from the authors' code (C), on purpose:

  - pi^l applies the final norm; `--internal-norm none` does not (P Eq. 5, C). P's Table 5 has both.
  - Updates of phase 1 run blocks 1..l only. C runs all L, keeps every hidden state and builds two full logit matrices.
  - The loss averages over all completion tokens of a mini-batch, as C does; `--average sequence` is P's Eq. 3 and 9.
  - The reward compares mathematical values; C compares text, so that \boxed{\text{Yes}} is wrong for Yes.
  - A mini-batch in which no completion has an advantage is skipped: C would still move the weights, by momentum.
  - Layers count from 1, as in P; C counts from 0. Weights are float32, so that a learning rate of 1e-6 moves them.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import queue
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import jinja2  # of chat templates, as transformers reads them
import safetensors
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Model: TypeAlias = "transformers.PreTrainedModel"  # as text: what they name takes seconds to import
Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"
Sequences = list[tuple[list[int], list[int]]]  # (prompt, completion) pairs of token ids


class UsageError(ValueError):
    """Something the user can mend: the message is one sentence that says what is wrong and how."""


# 1 Configuration ======================================================================================================

DATA = "https://raw.githubusercontent.com/Trae1ounG/BuPO/HEAD/data/"  # the authors' problems
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
NORMS, AVERAGES, PRECISIONS = ("final", "none"), ("token", "sequence"), ("auto", "float32", "bfloat16")


def setting(tiny: Any, other: Any, help: str, least: float = 0, choices: tuple[str, ...] = ()) -> Any:
    """A `Config` field: its default for the built-in model and for other models, its --help, and what it may be."""
    return field(default=None, metadata=dict(tiny=tiny, other=other, help=help, least=least, choices=choices))


def flag(name: str) -> str:
    """The command-line flag of a field of `Config`."""
    return "--" + name.replace("_", "-")


@dataclass
class Config:
    """The settings of a run; each is a flag. What is not given takes the default of its model's column."""

    # setting(default for the built-in model, default for any other, what it is)
    model: str = setting("tiny", "tiny", "tiny (built in), a Hub id, a folder, or the folder of a run")
    # The problems:
    dataset: str = setting("arithmetic", DATA + "deepmath-5k.parquet", "training problems (paper: these 5,000)")
    eval_dataset: str = setting("arithmetic-heldout", DATA + "math500.parquet", "held-out problems (paper: 4 sets)")
    train_problems: int = setting(0, 0, "use only the first so many training problems; 0 is all (paper: all)")
    system: str = setting("", SYSTEM, "system message for problems that bring none (paper: this one)")
    thinking: bool = setting(False, False, "let Qwen3's template open a thinking block (paper: no)")
    # The method:
    internal_layer: str = setting("3", "auto", "l of phase 1, from 1; auto: the boundary layer (paper: Qwen3-4B 6)")
    internal_steps: int = setting(10, 30, "steps of phase 1, on pi^l; 0 is plain GRPO (paper: 30 or 20)")
    internal_norm: str = setting("final", "final", "norm before lm_head in pi^l (paper: both)", choices=NORMS)
    average: str = setting("token", "token", "what the loss is a mean over (paper: both)", choices=AVERAGES)
    clip: float = setting(0.2, 0.2, "clip ratio, epsilon (paper: 0.2)", least=1e-6)
    # The recipe:
    steps: int = setting(60, 300, "training steps, a rollout each; 0 only evaluates (paper: 300)")
    prompts: int = setting(32, 32, "problems per step (paper: 128)", least=1)
    group: int = setting(8, 8, "completions per problem, G (paper: 8)", least=2)
    mini_batch: int = setting(16, 8, "problems per optimizer update; divides --prompts (paper: 32)", least=1)
    lr: float = setting(1e-4, 1e-6, "learning rate of AdamW (paper: 1e-6)")
    lr_ramp: int = setting(5, 1, "steps in which the learning rate rises to --lr (paper: 1)", least=1)
    beta1: float = setting(0.9, 0.9, "AdamW's decay of the first moment (paper: 0.9)")
    beta2: float = setting(0.999, 0.999, "AdamW's decay of the second moment (paper: 0.999)")
    weight_decay: float = setting(0.01, 0.01, "AdamW's weight decay (paper: 0.01)")
    grad_clip: float = setting(1.0, 1.0, "largest gradient norm (paper: 1.0)", least=1e-6)
    temperature: float = setting(1.0, 1.0, "of rollouts and all log-probabilities (paper: 1.0)", least=1e-6)
    max_prompt: int = setting(40, 1024, "tokens; longer prompts are dropped and counted (paper: 1,024)", least=1)
    max_completion: int = setting(40, 2048, "tokens; the rest is cut off and counted (paper: 7,168)", least=1)
    # Evaluation:
    eval_every: int = setting(20, 50, "steps between evaluations, beside first and last (paper: 30)", least=1)
    eval_problems: int = setting(256, 100, "held-out problems to use; 0 evaluates nothing (paper: all)")
    eval_k: int = setting(4, 4, "completions per held-out problem, for avg@k and pass@k (paper: 16 or 32)", least=1)
    eval_temperature: float = setting(1.0, 1.0, "of evaluation; 0 is greedy (paper: 1.0)")
    # The machine:
    rows: int = setting(256, 128, "sequences decoded at once: bounds the memory of rollouts", least=1)
    micro_tokens: int = setting(16384, 16384, "tokens per forward and backward pass: bounds that of updates", least=1)
    head_tokens: int = setting(1024, 1024, "tokens that have logits at the same time", least=1)
    recompute: bool = setting(False, True, "recompute activations in the backward pass: slower, much less memory")
    device: str = setting("auto", "auto", "auto, cpu, cuda or cuda:N")
    precision: str = setting("auto", "auto", "to compute in; auto is bfloat16 on CUDA", choices=PRECISIONS)
    # The run:
    warm_up_steps: int = setting(700, 0, "supervised steps first, for --model tiny only")
    seed: int = setting(0, 0, "of everything random")
    save_every: int = setting(20, 10, "steps between checkpoints, beside the last", least=1)
    keep: int = setting(2, 2, "checkpoints to keep; 0 keeps all")
    out: str = setting("", "", "folder to write, new or empty; default: runs/MODEL-DATE-TIME")

    def __post_init__(self):
        self.model = self.model or "tiny"
        column = "tiny" if origin(self.model) == "tiny" else "other"
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, f.metadata[column])
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise UsageError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}.")
            if f.type in (int, float) and not f.metadata["least"] <= value < math.inf:
                raise UsageError(f"{flag(f.name)} must be a number from {f.metadata['least']} on, not {value}.")
        if max(self.beta1, self.beta2) >= 1:
            raise UsageError("--beta1 and --beta2 must be below 1.")
        if not self.steps and not self.eval_problems:
            raise UsageError("--steps 0 only evaluates, and --eval-problems 0 evaluates nothing; raise one of them.")
        if self.prompts % self.mini_batch:
            raise UsageError(f"--mini-batch {self.mini_batch} must divide --prompts {self.prompts}.")
        self.internal_layer = str(self.internal_layer)
        if self.internal_layer != "auto" and not self.internal_layer.isdecimal():
            raise UsageError(f"--internal-layer must be a number from 1 on, or auto, not {self.internal_layer!r}.")


def origin(model: str) -> str:
    """The model that a run began with, if `model` is its folder, its model/ or one of its checkpoints; else `model`."""
    for folder in (Path(model), Path(model).parent):
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if Path(model).is_dir() and "internal_layer" in settings:  # else it is a model's own config.json
                return origin(settings["model"])
    return model


# 2 Problems ===========================================================================================================


@dataclass(frozen=True)
class Problem:
    """What the model is asked, as chat messages ({"role", "content"} each), and the answer that earns the reward."""

    messages: list[dict]
    answer: str


QUESTION_COLUMNS = "prompt", "question", "problem", "input", "query"
ANSWER_COLUMNS = "reward_model", "final_answer", "answer", "ground_truth", "expected_answer", "solution", "target"


def load_problems(source: str, limit: int | None = None, system: str = SYSTEM) -> list[Problem]:
    r"""Read problems, `limit` of them at most, and say in a line which columns they came from.

    source: 'arithmetic' or 'arithmetic-heldout' (built in), a .parquet, .json, .jsonl or .csv file or its URL, or a
    data set on the Hub as ID, ID:SPLIT or ID:CONFIG:SPLIT. The question is the first of QUESTION_COLUMNS that is
    there, as text or as chat messages; the answer is the first of ANSWER_COLUMNS (of `reward_model`, its
    `ground_truth`), and of it what follows '####' (GSM8K) or stands in \boxed{} (MATH), if it has either. Rows without
    a question or an answer are dropped and counted. Raises UsageError if that leaves nothing.
    """
    if source in ("arithmetic", "arithmetic-heldout"):
        return arithmetic_problems(heldout=source.endswith("heldout"))[: limit or None]
    rows = read_rows(source)
    columns = [next((c for c in known if c in rows.column_names), None) for known in (QUESTION_COLUMNS, ANSWER_COLUMNS)]
    for kind, column in zip(("question", "answer"), columns, strict=True):
        if column is None:
            there = ", ".join(rows.column_names)
            raise UsageError(f"{source} has no {kind} column, only {there}; rename one to {kind}.")
    problems, rows = [], rows.select_columns(columns).select(range(min(limit or len(rows), len(rows))))
    for row in rows:
        messages, answer = as_messages(row[columns[0]], system), as_answer(row[columns[1]])
        if messages and answer:
            problems.append(Problem(messages, answer))
    if not problems:
        raise UsageError(f"{source} has no row with both a question and an answer; give a data set that has some.")
    dropped = f"; {len(rows) - len(problems)} rows lack one" if len(problems) < len(rows) else ""
    print(f"Problems    {len(problems)} of {source} (question: {columns[0]}, answer: {columns[1]}{dropped})")
    return problems


def read_rows(source: str) -> Any:
    """The rows of a file, a URL or a Hub data set, as a `datasets.Dataset`."""
    import datasets  # slow to import, and the built-in task needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    kinds = dict(parquet="parquet", json="json", jsonl="json", csv="csv")
    kind, local = kinds.get(source.partition("?")[0].rpartition(".")[2].lower()), "://" not in source
    try:
        if kind:
            return datasets.load_dataset(kind, data_files=source, split="train")
        name, *rest = source.split(":")
        found = datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else None)
        if isinstance(found, datasets.DatasetDict):
            found = found["train"] if "train" in found else next(iter(found.values()))
        return found
    except Exception as error:  # of many kinds, from the libraries that read foreign data
        if kind and local and not Path(source).is_file():
            raise UsageError(f"The file {source} does not exist; check the path.") from error
        empty = kind and local and not Path(source).stat().st_size
        if empty or isinstance(error, StopIteration) or "no data" in str(error):
            raise UsageError(f"{source} has no rows; give a data set that has some.") from error
        if kind and local:
            raise UsageError(f"{source} cannot be read as {kind}; give a {kind} file, in UTF-8.") from error
        mend = "check its name and the connection, or give a local parquet, json or csv file"
        raise UsageError(f"The data set {source} cannot be loaded ({first_line(error)}); {mend}.") from error


def as_messages(question: Any, system: str) -> list[dict]:
    """A question, text or chat messages, as chat messages, the system message first; [] where there is no question."""
    if isinstance(question, list):
        said = [m for m in question if isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str)]
        messages = [dict(role=m["role"], content=m["content"]) for m in said]
    else:
        text = "" if question is None else str(question).strip()
        messages = [dict(role="user", content=text)] if text else []
    if messages and messages[0]["role"] != "system" and system:
        return [dict(role="system", content=system), *messages]
    return messages


def as_answer(value: Any) -> str:
    """An answer of any type as text, '' if there is none."""
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None  # several answers are more than one box can hold
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # whole numbers with a gap among them are read as floats
    if value is None or value != value:  # nan is unequal to itself
        return ""
    text = str(value).rpartition("####")[2].strip()
    return extract_boxed(text) or text


def arithmetic_problems(heldout: bool = False, count: int = 20000) -> list[Problem]:
    r"""The built-in task: sums of 3 or 4 additions and subtractions of digits, worked from left to right within 0..20.

    A guess is rarely right; writing down the partial results (`worked_solution`) makes it easy. About an eighth of
    the problems, those whose text has a hash divisible by 8, are held out: no training ever sees them.
    """
    rng = random.Random(0)
    problems: dict[str, str] = {}  # text -> answer
    while len(problems) < count:
        value = rng.randint(1, 9)
        text = str(value)
        for _ in range(rng.choice((3, 4))):
            digit = rng.randint(1, 9)
            sign = rng.choice([s for s, v in (("+", value + digit), ("-", value - digit)) if 0 <= v <= 20])
            value += digit if sign == "+" else -digit
            text += sign + str(digit)
        problems[text] = str(value)
    return [
        Problem([{"role": "user", "content": text}], answer)
        for text, answer in problems.items()
        if (zlib.crc32(text.encode()) % 8 == 0) == heldout
    ]


def worked_solution(text: str) -> str:
    r"""'7-1+3-8' -> '7-1=6;6+3=9;9-8=1\boxed{1}'."""
    value, *rest = re.findall(r"[+-]?\d", text)
    lines, value = [], int(value)
    for term in rest:
        lines.append(f"{value}{term}={value + int(term)}")
        value += int(term)
    return ";".join(lines) + rf"\boxed{{{value}}}"


# 3 Reward: 1 if the boxed answer is right =============================================================================


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}) whose braces balance, None if there is none. Linear time."""
    last: tuple[int, str] | None = None  # where the last box begins, and what it holds
    open_braces: list[re.Match[str]] = []
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}" and open_braces:
            opener = open_braces.pop()
            if len(opener[0]) > 1 and (last is None or opener.start() > last[0]):
                last = opener.start(), text[opener.end() : token.start()]
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token)
    return last and last[1].strip()


def math_reward(completion: str, answer: str) -> float:
    r"""1.0 if the last \boxed{} of the completion holds the answer, else 0.0. Any text is legal, none takes long.

    Both sides are brought to one spelling and compared as text, two plain numbers as exact fractions. What is left
    goes to math-verify, unless it is very long or has what math-verify overlooks: a number base (52_8 would be 52), the
    order of letters (HTH would be HHT), a prime (f'(x) would be f(x)) or an ellipsis.
    """
    boxed = extract_boxed(completion)
    if boxed is None:
        return 0.0
    if len(boxed) > 1000:
        return float(boxed == answer.strip())
    (given, given_unit), (gold, gold_unit) = split_unit(normalise(boxed)), split_unit(normalise(answer))
    if not given or (given_unit and gold_unit and given_unit != gold_unit):
        return 0.0
    if without_spaces(given) == without_spaces(gold):
        return 1.0
    if len(given) + len(gold) > 600 or re.search(r"\d\s*_", given + " " + gold):
        return 0.0
    numbers = plain_number(given), plain_number(gold)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    if re.fullmatch("[a-zA-Z]{2,} [a-zA-Z]{2,}", f"{given} {gold}") or marks(given, gold) != marks(gold, given):
        return 0.0
    return float(same_value(gold, given))


SPELLINGS = [  # what is written in several ways -> the one way we keep
    (r"(?<!\\)\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])|(?<!\\)\\[!,;:()\[\] ]|\\?\$|~", " "),  # layout
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"([_^])\s*\{(\w)\}", r"\1\2"),
    (r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{", r"\\text{"),
    (r"\\text\{([ie])\}", r"\1"),  # upright, as some write them: not a unit
    (r"^\s*\\text\{([^{}]*)\}\s*$", r"\1"),  # \text{Yes} -> Yes
    (r"\s*(?:\^\s*\{?\\circ\}?|\\degree|\\?%)\s*$", ""),  # degrees and per cent
    (r"^\s*\(([A-Za-z])\)\s*$", r"\1"),  # (C) -> C, a multiple choice
]


def normalise(text: str) -> str:
    """One spelling of an answer: no layout or thousands separators, single spaces, plain words in lower case."""
    text = text.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text.strip().rstrip("."))
    text = " ".join(text.split())
    thousands = r"[-+]?\d{1,3}((,\d{3})+|( \d{3})+)(\.\d+)?"
    if re.fullmatch(rf"{thousands}( ?\\text.*| [a-z ]+)?", text):
        text = re.sub(r"(?<=\d)[, ](?=\d{3})", "", text)
    return text.lower() if re.fullmatch(r"(?i)no|[a-z]{3,}([ '-][a-z]+)*", text) else text


def without_spaces(text: str) -> str:
    """For comparison: all spaces go but those between two digits, as in 1 1/2."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def split_unit(text: str) -> tuple[str, str]:
    r"""'5 \text{ cm}^2' -> ('5', 'cm^2'): a number and the words after it; (text, '') for anything else."""
    words = "pi sin cos tan log ln exp sqrt or and mod hundred thousand million billion trillion dozen halves thirds"
    no_unit = rf"(?!\s*(?:{'|'.join([*words.split(), '[nxyz]', 'squared', 'cubed', 'factorial'])})\b)"
    word = r"([cmk]m|[mk]g|ft|[a-zA-Z]{3,}(?: [a-zA-Z]+)*)"
    unit = rf"(?:\\text\{{{no_unit}([^{{}}]*)\}}| {no_unit}{word})((?:\^[23])?)"
    match = re.fullmatch(rf"([-+]?(?:[\d.,/]+|\\frac\{{\d+\}}\{{\d+\}})) ?{unit}", text)
    return (match[1], (match[2] or match[3] or "").strip().lower() + match[4]) if match else (text, "")


def marks(text: str, other: str) -> tuple[int, bool]:
    """Primes, and whether there is an ellipsis, in an answer; of f'(x) = 2x only in 2x, if the other is no equation."""
    text = text if "=" in other else text.rpartition("=")[2]
    return len(re.findall(r"'|\\prime", text)), bool(re.search(r"\\[lc]?dots|\.\.\.", text))


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a quotient of integers, plain or as a LaTeX fraction; else None."""
    text = re.sub(r"^([-+]?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", without_spaces(text)).removeprefix("+")
    return Fraction(text) if re.fullmatch(r"-?(\d+\.?|\d*\.\d+|\d+/0*[1-9]\d*)", text, re.ASCII) else None


CHECK_SECONDS = 2  # a fair comparison takes milliseconds, the slowest of the paper's answers 0.4 s
CHECKER = rf"""
import faulthandler, json, os, sys
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
except (ImportError, ValueError, OSError):
    pass  # a system without such limits
sys.set_int_max_str_digits(0)
spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
latex = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]
nowhere = open(os.devnull, "w")
print("ready", flush=True)
for line in sys.stdin:
    faulthandler.dump_traceback_later({CHECK_SECONDS}, exit=True, file=nowhere)
    try:
        gold, given = (parse("\\boxed{{" + s + "}}", latex, parsing_timeout=None) for s in json.loads(line))
        same = verify(gold, given, timeout_seconds=None)
    except Exception:
        same = False
    faulthandler.cancel_dump_traceback_later()
    print(int(same), flush=True)
"""


class AnswerChecker:
    """math-verify in a child process, which its own watchdog ends when an answer such as 9^{9^{9^9}} takes too long.

    A child process because sympy can hold the interpreter for minutes where no time-out reaches it. The watchdog is a
    C thread inside the child, so this works from any thread and on any system; no answer can stall training.
    """

    child: Any = None

    def __call__(self, gold: str, given: str) -> bool:
        if self.child is None or self.child.poll() is not None:
            pipes: dict[str, Any] = dict(
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii"
            )
            self.child = subprocess.Popen([sys.executable, "-c", CHECKER], start_new_session=True, **pipes)
            if self.child.stdout.readline() != "ready\n":
                raise UsageError("math-verify cannot be started; install it with pip install -r requirements.txt.")
        verdict = ""
        try:
            self.child.stdin.write(json.dumps([gold, given]) + "\n")
            self.child.stdin.flush()
            verdict = self.child.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not verdict:  # the watchdog struck, or an interrupt left a verdict unread: a new child next time
                self.child.kill()
                self.child.wait()
                self.child = None
        return verdict == "1\n"


CHECKERS = 4  # several, so that one slow answer does not hold up the others
IDLE: queue.LifoQueue[AnswerChecker] = queue.LifoQueue()
for _ in range(CHECKERS):
    IDLE.put(AnswerChecker())


@functools.lru_cache(maxsize=100_000)
def same_value(gold: str, given: str) -> bool:
    """Whether math-verify takes the two answers for the same value. Remembered: in RL the same answers come often."""
    checker = IDLE.get()
    try:
        return checker(gold, given)
    finally:
        IDLE.put(checker)


def math_rewards(completions: list[str], answers: list[str]) -> list[float]:
    """`math_reward` of many pairs, a few at a time."""
    with ThreadPoolExecutor(CHECKERS) as pool:
        return list(pool.map(math_reward, completions, answers))


# 4 Model ==============================================================================================================


def load_model(name: str, device: str | torch.device = "cpu", seed: int = 0) -> tuple[Model, Tokenizer]:
    """A causal language model with float32 weights, in evaluation mode, and its tokenizer.

    name: 'tiny' (the built-in Qwen3 with random weights drawn from `seed`: see `warm_up`), a Hub id, a folder in the
    Hugging Face layout, or the folder of a finished run. Only safetensors are read, and no code of a checkpoint is run.
    Raises UsageError if the model cannot be had or is not Llama-like (`check_model`).
    """
    if name == "tiny":
        model, tokenizer = tiny_model(seed)
    else:
        run = Path(name, "metrics.jsonl").exists()
        source = str(Path(name, "model")) if run else name
        if run and not Path(source).exists():
            raise UsageError(f"The run {name} has no model/; finish it with --resume, or name a model or a checkpoint.")
        try:
            no_code: dict[str, Any] = dict(trust_remote_code=False)  # the default is to ask, and a yes runs it
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **no_code)
            settings = dict(dtype=torch.float32, use_safetensors=True, output_loading_info=True, **no_code)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **settings)
            model, found = loaded
        except Exception as error:  # of many kinds, from the libraries that read foreign files
            if out_of_memory(error):
                raise
            why = first_line(error)
            if not Path(name).exists():
                why = f"there is no such folder, and the Hub says: {why}"
            elif not Path(source, "config.json").exists():
                why = "it is no folder with a model in the Hugging Face layout"
            raise UsageError(f"The model {name} cannot be loaded ({why}); check name and connection.") from error
        if missing := sorted(found["missing_keys"]):  # transformers would train random numbers in their place
            raise UsageError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}; get it anew.")
        generation = model.generation_config
        if generation.temperature or generation.top_k or generation.top_p:
            generation.do_sample = True  # without it, transformers refuses to save such settings with the trained model
    check_model(model)
    for module in model.modules():  # no dropout: old and new log-probabilities are those of one network
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model.to(device=device), tokenizer  # type: ignore[call-arg]


def check_model(model: Model) -> None:
    """Refuse a model unless H^l = H^(l-1) + A^l + F^l in each block and its logits are lm_head(norm(H^L))."""

    def refuse(reason: str) -> None:
        use = "use a Llama, Mistral, Qwen2, Qwen3 or SmolLM2"
        raise UsageError(f"{type(model).__name__} is not Llama-like, so it has no internal policies ({reason}); {use}.")

    decoder, parts = model.get_decoder(), ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm") and model.get_output_embeddings() is not None):
        refuse("it lacks layers, a final norm or lm_head")
    if not all(hasattr(block, part) for block in decoder.layers for part in parts):
        refuse(f"a block lacks one of {', '.join(parts)}")
    if model.config._attn_implementation != "sdpa":
        refuse("it has no scaled dot-product attention, which the masks of SlotCache are made for")
    seen, ids = {}, torch.arange(8)[None] % model.config.vocab_size  # (1, 8)
    with torch.no_grad(), residual_stream(model, lambda name, layer, tensor: seen.update({(name, layer): tensor})):
        logits = model(input_ids=ids, use_cache=False).logits  # (1, 8, V)
        for layer in range(1, len(decoder.layers) + 1):
            sum_of_writes = seen["layer", layer - 1] + seen["attention", layer] + seen["ffn", layer]  # (1, 8, D)
            if not torch.allclose(sum_of_writes, seen["layer", layer], rtol=1e-3, atol=1e-3):
                refuse(f"block {layer} does not add its attention and its FFN to the residual stream")
        if not torch.allclose(policy_logits(model, seen["layer", len(decoder.layers)]), logits, rtol=1e-3, atol=1e-3):
            refuse("its logits are not lm_head(norm(H^L))")


def tiny_model(seed: int) -> tuple[Model, Tokenizer]:
    """A Qwen3 of 6 blocks and 327 thousand weights, and a tokenizer of a character per token, and `\\boxed{` is one."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    tokens = [*special, "\\boxed{", "\n", *map(chr, range(32, 127))]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"

    size: dict[str, Any] = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=6, vocab_size=len(tokens))
    heads: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=512)
    rest: dict[str, Any] = dict(tie_word_embeddings=True, initializer_range=0.08, pad_token_id=0, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(**size, **heads, **rest, bos_token_id=None)
        return transformers.Qwen3ForCausalLM(config).eval(), tokenizer


def warm_up(model: Model, tokenizer: Tokenizer, steps: int, seed: int = 0) -> None:
    r"""Teach the built-in model what an answer looks like, as pretraining would: `steps` batches of 32, cross-entropy.

    A random model earns no reward, so RL would have nothing to learn from. 40 % of the examples work the problem out
    (`worked_solution`) and 60 % are careless: `\boxed{n}` at once, n off by up to 3. The careless style is planted, as
    pretraining data have both styles too. Which of them pays is for RL to find out, from the reward alone: accuracy
    and completion length then rise together. No held-out problem is used.
    """
    rng, problems = random.Random(seed), arithmetic_problems()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for step in tqdm(range(1, steps + 1), desc="warm-up", leave=False):
        batch = []
        for problem in rng.sample(problems, 32):
            guess = max(0, int(problem.answer) + rng.randint(-3, 3))
            worked = worked_solution(problem.messages[0]["content"])
            text = worked if rng.random() < 0.4 else rf"\boxed{{{guess}}}"
            target = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            batch.append((encode(tokenizer, problem), target))
        logps, _ = token_logps(model, *pad(batch, model.device), layer=len(model.get_decoder().layers))  # (N,)
        (-logps.mean()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2  # a ramp, then a cosine
        optimizer.step()
        optimizer.zero_grad()


def encode(tokenizer: Tokenizer, problem: Problem, thinking: bool = False) -> list[int]:
    """The token ids of a problem, ready to be completed: by the chat template, or as plain text if there is none."""
    messages = problem.messages
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(m["content"] for m in messages) + "\n\n").input_ids
    if messages[0]["role"] == "system" and "system" not in str(tokenizer.chat_template):  # it knows no such role
        messages = [dict(role="user", content="\n\n".join(m["content"] for m in messages[:2])), *messages[2:]]
    settings: dict[str, Any] = dict(tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return tokenizer(tokenizer.apply_chat_template(messages, **settings), add_special_tokens=False).input_ids


def decode(tokenizer: Tokenizer, completion: "Completion") -> str:
    """The text of a completion, without special tokens."""
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True))


def end_tokens(model: Model, tokenizer: Tokenizer) -> set[int]:
    """Every token id that ends a completion: those of the generation settings, and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    return {i for i in (*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id) if i is not None}


# 5 Rollouts ===========================================================================================================


@dataclass
class Completion:
    """A sampled completion: its token ids (the end token too), and for each its log-probability and pi's entropy."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)  # nats
    ended: bool = False  # by an end token, not by the length limit


class SlotCache:
    """Keys and values of the n sequences being decoded: row i owns slot i < n, its token at position t owns column t.

    So sequences of different lengths need no left padding, a finished row's slot can be taken over, and a step writes
    one column per row. Columns beyond a row's position are masked: leftovers, to be overwritten as the row grows. One
    tensor of keys and one of values per block, (slots, kv_heads, columns, head_dim). It stands in for a transformers
    cache, of which the blocks ask only `update`.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def enter(self, first: int, prompts: Any, owner: list[int]) -> None:
        """Copy keys and values of prompts just read, a transformers cache: slot first + i takes those of owner[i]."""
        slots = slice(first, first + len(owner))
        for i, block in enumerate(prompts.layers):
            _, heads, columns, size = block.keys.shape
            if len(self.keys) == i:
                self.keys.append(block.keys.new_zeros(self.slots, heads, 0, size))
                self.values.append(block.values.new_zeros(self.slots, heads, 0, size))
            self.widen(i, columns)
            self.keys[i][slots, :, :columns] = block.keys[owner]
            self.values[i][slots, :, :columns] = block.values[owner]

    def widen(self, i: int, columns: int) -> None:
        """Make room for so many columns, and for 256 more, so that this is rare."""
        missing = columns - self.keys[i].shape[2]
        if missing > 0:
            self.keys[i] = F.pad(self.keys[i], (0, 0, 0, missing + 256))
            self.values[i] = F.pad(self.values[i], (0, 0, 0, missing + 256))

    def keep(self, going: list[bool]) -> list[int]:
        """Close the gaps that finished rows leave: the last rows move into their slots. Returns each slot's old row."""
        alive = [row for row in range(len(going)) if going[row]]
        order = list(range(len(alive)))
        holes = [slot for slot in order if not going[slot]]
        for hole in holes:
            order[hole] = alive.pop()
        if holes:
            for store in (*self.keys, *self.values):
                store[holes] = store[[order[hole] for hole in holes]]
        return order

    def seek(self, position: Tensor) -> Tensor:
        """Before a decoding step: the column of each row, (n,). Returns what each may see, (n, 1, 1, columns)."""
        self.columns, device = int(position.max()) + 1, position.device
        self.written = torch.arange(len(position), device=device), slice(None), position  # rows, all heads, columns
        return (torch.arange(self.columns, device=device) <= position[:, None])[:, None, None]

    def update(self, key: Tensor, value: Tensor, i: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by block i: write a key and a value per row, (n, kv_heads, 1, head_dim), and return all there are."""
        self.widen(i, self.columns)
        self.keys[i][self.written] = key[:, :, 0]  # (n, kv_heads, head_dim)
        self.values[i][self.written] = value[:, :, 0]
        return self.keys[i][: len(key), :, : self.columns], self.values[i][: len(key), :, : self.columns]


def with_cache(decoder: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that make the decoder read and write a cache, whose name depends on the release of transformers."""
    new_name = "cache" in inspect.signature(decoder.forward).parameters
    return {"cache" if new_name else "past_key_values": cache, "use_cache": True}


def next_prompts(waiting: deque[int], prompts: list[list[int]], free: int, most: int) -> list[int]:
    """Take the next indices off the queue: at most `free`, of at most `most` different prompts."""
    taken: list[int] = []
    seen: set[tuple[int, ...]] = set()
    while waiting and len(taken) < free and (tuple(prompts[waiting[0]]) in seen or len(seen) < most):
        taken.append(waiting.popleft())
        seen.add(tuple(prompts[taken[-1]]))
    return taken


def read_prompts(
    decoder: nn.Module, prompts: list[list[int]], cache: SlotCache, first: int, device: Any
) -> tuple[Tensor, Tensor]:
    """Read n prompts into the slots from `first` on, equal ones once; their last hidden states (n, D), lengths (n,)."""
    rows: dict[tuple[int, ...], int] = {}  # of each different prompt
    owner = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in rows], batch_first=True)  # (k, T)
    keys_and_values = transformers.DynamicCache()
    read = decoder(input_ids=ids.to(device), **with_cache(decoder, keys_and_values))
    cache.enter(first, keys_and_values, owner)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (n,)
    return read.last_hidden_state[owner, lengths - 1], lengths


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """A token for each row of logits (n, V), its log-probability and the entropy of the policy; (n,) each."""
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (n, V)
    probabilities = logps.exp()  # (n, V)
    tokens = probabilities.multinomial(1, generator=generator) if temperature else logps.argmax(-1, True)  # (n, 1)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0], -(probabilities * logps).sum(-1)  # Eq. 7


@torch.no_grad()
def sample(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: set[int] | list[int],
    temperature: float = 1.0,
    rows: int = 128,
    generator: torch.Generator | None = None,
    bar: str | None = None,
) -> list[Completion]:
    """Sample one completion of every prompt from the full softmax of the model: no top-k, no top-p, no penalties.

    prompts: lists of token ids; equal ones that enter together, as those of a group do, are read once. At most `rows`
    sequences are decoded at once; a finished one leaves the batch, and the next prompts enter as soon as an eighth of
    the rows is free, at most rows / 8 different ones at a time, for the sake of memory. Temperature 0 is greedy (its
    log-probabilities and entropies are those of temperature 1). generator: a torch.Generator on the model's device;
    bar: the name of a progress bar. Returns the completions in the order of the prompts, each of 1 to max_new_tokens
    tokens.
    """
    model.eval()  # in training mode with activation checkpointing, transformers drops the cache without a word
    decoder, lm_head, device = model.get_decoder(), model.get_output_embeddings(), model.device
    completions = [Completion() for _ in prompts]
    waiting = deque(range(len(prompts)))  # indices of prompts
    running: list[int] = []  # likewise; running[i] is in row i
    cache, eighth = SlotCache(min(rows, len(prompts))), max(1, rows // 8)
    hidden = torch.empty(0, model.config.hidden_size, dtype=model.dtype, device=device)  # (n, D), of each last token
    position = torch.empty(0, dtype=torch.long, device=device)  # (n,), of each row's next token
    progress = tqdm(total=len(prompts), desc=bar, leave=False, disable=None if bar else True)  # None: on a terminal
    while waiting or running:
        # New prompts enter.
        free = cache.slots - len(running)
        if waiting and free >= min(len(waiting), eighth):  # several prompts at a time are read faster
            new = next_prompts(waiting, prompts, free, eighth)
            last, lengths = read_prompts(decoder, [prompts[i] for i in new], cache, len(running), device)
            hidden, position = torch.cat([hidden, last]), torch.cat([position, lengths])  # (n, D), (n,)
            running += new

        # Each row draws a token.
        tokens, chosen, entropies = draw(lm_head(hidden), temperature, generator)  # (n,) each
        going = []
        for i, token, logp, entropy in zip(running, tokens.tolist(), chosen.tolist(), entropies.tolist(), strict=True):
            done = completions[i]
            done.ids.append(token)
            done.logps.append(logp)
            done.entropies.append(entropy)
            done.ended = token in eos_ids
            going.append(not done.ended and len(done.ids) < max_new_tokens)

        # Finished rows leave, the others read their token.
        order = cache.keep(going)
        progress.update(len(running) - len(order))
        running = [running[row] for row in order]
        hidden, position = hidden[:0], position[order]  # (0, D), computed anew if any row goes on; (n,)
        if running:
            inputs = dict(input_ids=tokens[order, None], position_ids=position[:, None])  # (n, 1) each
            mask = cache.seek(position)  # (n, 1, 1, columns)
            step = decoder(**inputs, attention_mask=mask, **with_cache(decoder, cache))
            hidden = step.last_hidden_state[:, 0]  # (n, D)
            position = position + 1
    progress.close()
    return completions


# 6 Internal policies ==================================================================================================


@contextlib.contextmanager
def first_layers(model: Model, layer: int, norm: bool = True) -> Iterator[None]:
    """Inside this context the model has only its first `layer` blocks, and no final norm if `norm` is False.

    So `model` *is* the internal policy pi^l: lm_head(norm(H^l)), or lm_head(H^l). Only forward passes belong inside; a
    backward pass may follow later. (parameters() and save_pretrained() would see the cut model.)
    """
    decoder = model.get_decoder()
    layers, final_norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = layers[:layer], final_norm if norm else nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, final_norm


def internal_hidden(model: Model, ids: Tensor, layer: int) -> Tensor:
    """The residual stream H^l after block l, before any final norm; runs blocks 1..l only.

    ids (B, T), int64, padded on the right with anything: causal attention never looks there. layer: 0..L, where H^0
    are the embeddings. Returns (B, T, D): values and gradients are those of `hidden_states[layer]` in a full forward
    pass, except that transformers has normed the last of these. Raises UsageError for a layer that is not there.
    """
    if not 0 <= layer <= len(model.get_decoder().layers):
        raise UsageError(f"There is no layer {layer}: this model has layers 1 to {len(model.get_decoder().layers)}.")
    with first_layers(model, layer, norm=False):
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def policy_logits(model: Model, hidden: Tensor, norm: bool = True) -> Tensor:
    """Logits (..., V) of the policy that speaks from `hidden` (..., D): E_u norm(h), or E_u h without the norm.

    With H^L this is the policy (Eq. 1), with H^l an internal layer policy (Eq. 5, which has no norm), with A^l or F^l
    and no norm an internal modular policy (Eq. 6).
    """
    return model.get_output_embeddings()(model.get_decoder().norm(hidden) if norm else hidden)


def pad(sequences: Sequences, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(prompt, completion) pairs of token ids -> ids (B, T), padded on the right, and mask (B, T), True on completions.

    The mask comes from the lengths, never from token values: a pad id may well be an end id.
    """
    tokens = [torch.tensor([*prompt, *completion]) for prompt, completion in sequences]
    marks = [torch.tensor([False] * len(prompt) + [True] * len(completion)) for prompt, completion in sequences]
    ids, mask = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (tokens, marks))  # (B, T) each
    return ids.to(device), mask.to(device)


def micro_batches(sequences: Sequences, tokens: int, numbers: Iterable[int] | None = None) -> list[list[int]]:
    """Split sequences, those of the given numbers or all, into micro-batches: lists of their numbers.

    A micro-batch, padded to its longest sequence, holds at most `tokens` tokens, or is a single sequence. Shortest
    first, so that little of it is padding.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    micros: list[list[int]] = []
    for i in sorted(range(len(lengths)) if numbers is None else numbers, key=lengths.__getitem__):
        if not micros or (len(micros[-1]) + 1) * lengths[i] > tokens:
            micros.append([])
        micros[-1].append(i)
    return micros


def predicting(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (B, T, D) -> (N, D): those one position before each of the N tokens where mask (B, T) is True."""
    return hidden[:, :-1][mask[:, 1:]]


def token_logps(
    model: Model,
    ids: Tensor,
    mask: Tensor,
    layer: int,
    norm: bool = True,
    temperature: float = 1.0,
    head_tokens: int = 1024,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi^l of each token where mask is True, given all tokens before it; if asked, the entropies of pi^l there too.

    ids and mask (B, T) as from `pad`. Returns log-probabilities (N,) of the N masked tokens, row by row, and entropies
    (N,), without gradient, or None; float32, nats. The final norm always applies at layer = L. Only the positions that
    predict a masked token go through lm_head, `head_tokens` at a time, and the backward pass computes their logits
    again: all logits at once, (B, T, V) in float32, are what runs a GPU out of memory.
    """
    norm = norm or layer == len(model.get_decoder().layers)
    hidden = predicting(internal_hidden(model, ids, layer), mask)  # (N, D)
    targets = ids[:, 1:][mask[:, 1:]]  # (N,)

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = policy_logits(model, hidden, norm).float()  # (n, V)
        logps = logits.div_(temperature).log_softmax(-1)  # (n, V)
        fixed = logps.detach()
        entropies = -fixed.exp().mul_(fixed).sum(-1) if entropy else None  # (n,) Eq. 7
        return logps.gather(-1, targets[:, None])[:, 0], entropies

    chunks = zip(hidden.split(head_tokens), targets.split(head_tokens), strict=True)
    logps, entropies = zip(*(checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks), strict=True)
    return torch.cat(logps), torch.cat(entropies) if entropy else None


@contextlib.contextmanager
def residual_stream(model: Model, visit: Callable[[str, int, Tensor], Any]) -> Iterator[None]:
    """Inside this context a forward pass calls visit(name, layer, tensor), tensor (B, T, D), as the blocks compute.

    The names, for l = 1..L: 'attention_input' LN(H^(l-1)), 'attention' A^l, 'ffn_input' LN(H^(l-1) + A^l), 'ffn' F^l
    and 'layer' H^l = H^(l-1) + A^l + F^l; before them comes ('layer', 0), the embeddings.
    """

    def watch(module: nn.Module, name: str, layer: int) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            visit(name, layer, output[0] if isinstance(output, tuple) else output)

        hooks.append(module.register_forward_hook(hook))

    hooks: list[Any] = []
    try:
        watch(model.get_input_embeddings(), "layer", 0)
        for layer, block in enumerate(model.get_decoder().layers, start=1):
            watch(block.input_layernorm, "attention_input", layer)
            watch(block.self_attn, "attention", layer)
            watch(block.post_attention_layernorm, "ffn_input", layer)
            watch(block.mlp, "ffn", layer)
            watch(block, "layer", layer)
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def entropy_profile(
    model: Model,
    sequences: Sequences,
    norm: bool = True,
    names: tuple[str, ...] = ("layer", "attention_input", "attention", "ffn_input", "ffn"),
    micro_tokens: int = 16384,
    head_tokens: int = 1024,
) -> dict[str, list[float]]:
    """Mean entropy, in nats per completion token, of every internal policy of the model (Eq. 5 to 7).

    sequences: (prompt, completion) pairs of token ids. Returns for each of `names` a list: under 'layer' L + 1 numbers,
    of H^0..H^L through the final norm, or without it if `norm` is False (H^L: always with it); under the others L
    numbers, of LN(H^(l-1)), A^l, LN(H^(l-1) + A^l) and F^l, without the final norm. The entropy changes are
    'layer'[l] - 'layer'[l-1] (Eq. 8, 11), 'attention' - 'attention_input' (Eq. 12) and 'ffn' - 'ffn_input' (Eq. 13).
    """
    model.eval()
    last = len(model.get_decoder().layers)
    sums = {name: [0.0] * (last + (name == "layer")) for name in names}
    for micro in micro_batches(sequences, micro_tokens):
        ids, mask = pad([sequences[i] for i in micro], model.device)  # (B, T) each

        def add(name: str, layer: int, tensor: Tensor, mask: Tensor = mask) -> None:
            if name not in names:
                return
            normed = name == "layer" and (norm or layer == last)
            place = layer if name == "layer" else layer - 1  # only this list begins with layer 0
            for hidden in predicting(tensor, mask).split(head_tokens):  # (n, D)
                logps = policy_logits(model, hidden, normed).float().log_softmax(-1)  # (n, V)
                sums[name][place] -= float((logps.exp() * logps).sum())

        with residual_stream(model, add):
            model.get_decoder()(input_ids=ids, use_cache=False)
    tokens = sum(len(completion) for _, completion in sequences)
    return {name: [value / tokens for value in values] for name, values in sums.items()}


def boundary_layer(ffn_entropy_change: list[float], tolerance: float = 0.1) -> int:
    """The last layer of the exploring region, counted from 1: the one whose internal policy the paper optimises.

    ffn_entropy_change: H(F^l) - H(LN(H^(l-1) + A^l)) of layers 1..L, in nats (Eq. 13). A layer explores if its change
    is clearly positive: above `tolerance` times the largest. The region begins with the first such layer and ends
    where the change turns to about zero or below. If no layer explores this is L, whose policy is pi itself.
    """
    threshold = tolerance * max(0.0, *ffn_entropy_change)
    explores = [change > threshold for change in ffn_entropy_change] + [False]  # above layer L nothing does
    # The index, from 0, of the first layer that explores no more is the number, from 1, of the last that does.
    return explores.index(False, explores.index(True)) if True in explores else len(ffn_entropy_change)


# 7 Objective ==========================================================================================================


def group_advantages(rewards: Tensor) -> Tensor:
    """A = (R - mean) / (std + 1e-6) over each problem's completions, std unbiased (Eq. 3).

    rewards and result: (problems, group), float. A group whose rewards are all equal gets exactly 0.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)  # (problems, group)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # (problems, 1)
    return (centred / (rewards.std(-1, keepdim=True) + 1e-6)).masked_fill(equal, 0.0)  # (problems, group)


def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A) per token, to be maximised: Eq. 9, and Eq. 3 at l = L.

    All of one shape; the log-probabilities are those of the policy being optimised, so rho = pi^l_new / pi^l_old is how
    far the updates on this rollout have moved it. It is no importance correction: completions always come from pi.
    """
    ratio = (logps - old_logps).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def optimised_layer(step: int, internal_steps: int, internal_layer: int, num_layers: int) -> int:
    """The layer whose policy `step` optimises, with steps counted from 1: the phase switch (Eq. 10)."""
    return internal_layer if step <= internal_steps else num_layers


# 8 Evaluation =========================================================================================================


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k is right, estimated from c right ones of n >= k: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    problems: list[Problem],
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    rows: int = 128,
    seed: int = 0,
    thinking: bool = False,
) -> tuple[dict, list[tuple[Problem, Completion, float]]]:
    """avg@k and pass@1..k of the full policy, from k completions of each problem.

    The random stream is the evaluation's own and the same at each call: it cannot disturb training. Returns metrics:
    eval_avg, the mean reward; eval_se, its standard error over problems (completions of one problem are not
    independent); eval_pass, the list of pass@1 to pass@k; eval_k; eval_problems. And samples: (problem, completion,
    reward), those of a problem side by side.
    """
    asked = [problem for problem in problems for _ in range(k)]
    prompts = [ids for problem in problems for ids in [encode(tokenizer, problem, thinking)] * k]
    generator, ends = random_stream(model.device, seed, "evaluation"), end_tokens(model, tokenizer)
    completions = sample(model, prompts, max_new_tokens, ends, temperature, rows, generator, "evaluation")
    rewards = math_rewards([decode(tokenizer, c) for c in completions], [p.answer for p in asked])
    right = [int(sum(rewards[i : i + k])) for i in range(0, len(rewards), k)]  # of each problem's k completions
    metrics = dict(
        eval_avg=statistics.fmean(rewards),
        eval_se=statistics.stdev(c / k for c in right) / len(right) ** 0.5 if len(right) > 1 else None,
        eval_pass=[statistics.fmean(pass_at_k(k, c, j) for c in right) for j in range(1, k + 1)],
        eval_k=k,
        eval_problems=len(problems),
    )
    return metrics, list(zip(asked, completions, rewards, strict=True))


def random_stream(device: str | torch.device, seed: int, purpose: str) -> torch.Generator:
    """A random generator that the seed and its purpose determine: nothing to save, and none disturbs another."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


# 9 Training ===========================================================================================================


def train(config: Config, resume: bool = False) -> Path:
    """Run BuPO as `config` says and return the folder of the run; with `resume`, go on from its last checkpoint.

    The folder holds config.json, metrics.jsonl (a line per training step and per evaluation), completions.jsonl (some
    of each evaluation), the last checkpoints and at the end model/, in the Hugging Face layout. Whatever is random
    follows from the seed, its purpose and the step, so a resumed run repeats an undisturbed one, bit for bit on a CPU.
    Raises UsageError for what the user can mend, and KeyboardInterrupt, after a checkpoint, when it is interrupted.
    """
    run = set_up(config, resume)
    device, bfloat16 = run.model.device, run.actor is not run.model
    bar = tqdm(total=config.steps, initial=run.done, desc="training", unit="step", disable=not config.steps)
    try:
        if run.done % config.eval_every == 0 or run.done == config.steps:  # a resumed run has lost this one
            evaluate_run(run)
        for step in range(run.done + 1, config.steps + 1):
            # 1 Draw problems, and G completions of each from the full policy pi, in either phase.
            began = time.perf_counter()
            drawn = [run.problems[i] for i in problems_of_step(step, len(run.problems), config.prompts, config.seed)]
            asked = [problem for problem in drawn for _ in range(config.group)]
            prompts = [ids for p in drawn for ids in [encode(run.tokenizer, p, config.thinking)] * config.group]
            ends, stream = end_tokens(run.model, run.tokenizer), random_stream(device, config.seed, f"rollout {step}")
            how = config.max_completion, ends, config.temperature, config.rows
            completions = sample(run.actor, prompts, *how, stream, "rollouts")
            sequences = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
            rollout_seconds = time.perf_counter() - began
            mismatch = sampling_error(run.actor, sequences, completions, config)

            # 2 Reward 1 for a right boxed answer, else 0.
            texts = [decode(run.tokenizer, completion) for completion in completions]
            rewards = math_rewards(texts, [problem.answer for problem in asked])

            # 3 Normalise within each problem's group.
            advantages = group_advantages(torch.tensor(rewards).view(-1, config.group))  # (problems, group)

            # 4 Choose the policy to optimise: pi^l in phase 1, then pi.
            if run.internal_layer is None:  # `auto`
                run.internal_layer = find_boundary(run.actor, sequences, config)
            layer = optimised_layer(step, config.internal_steps, run.internal_layer, run.num_layers)
            if step in (1, config.internal_steps + 1):
                say_phase(step, layer, run)

            with finish_first():  # Ctrl-C waits until the step is whole
                # 5 Climb the clipped surrogate of that policy, one optimizer update per mini-batch.
                run.whole, updating = False, time.perf_counter()
                for param_group in run.optimizer.param_groups:
                    param_group["lr"] = config.lr * min(1.0, step / config.lr_ramp)
                updated = update(run.model, run.optimizer, sequences, advantages.flatten(), layer, config, bfloat16)
                if bfloat16:
                    refresh(run.actor, run.model)
                update_seconds = time.perf_counter() - updating

                # 6 Log; save and evaluate now and then.
                metrics = dict(step=step, layer=layer) | rollout_metrics(completions, rewards, advantages) | updated
                tokens = sum(len(c.ids) for c in completions)
                metrics |= dict(
                    sampling_error=mismatch,
                    rollout_tokens_per_s=tokens / rollout_seconds,
                    update_tokens_per_s=tokens / update_seconds,
                    peak_memory_gb=peak_memory_gb(device),
                    seconds=time.perf_counter() - began,
                )
                log(run.out / "metrics.jsonl", metrics)
                run.done, run.whole = step, True
                run.log_sizes = {name: (run.out / name).stat().st_size for name in LOGS if (run.out / name).exists()}
                if step % config.save_every == 0 or step == config.steps:
                    save_checkpoint(run)
            say_step(bar, metrics, run)
            if step % config.eval_every == 0 or step == config.steps:
                for i in (0, -1):  # of two problems
                    say_completion(asked[i], texts[i], rewards[i])
                evaluate_run(run)
    except KeyboardInterrupt:
        if run.whole and config.steps:
            with finish_first():  # an impatient second Ctrl-C must not lose the checkpoint
                save_checkpoint(run)
        raise
    finally:
        bar.close()
    if config.steps:
        write_folder(run.out / "model", lambda folder: save_model(run.actor, run.tokenizer, folder))
        print(f"Saved       {run.out / 'model'}; to evaluate it again: python bupo.py {to_evaluate(config)}")
    return run.out


def update(
    model: Model,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    advantages: Tensor,
    layer: int,
    config: Config,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Climb the mean clipped surrogate of pi^layer (Eq. 9; Eq. 3 at l = L), one optimizer update per mini-batch.

    sequences: (prompt, completion) pairs of token ids, those of a problem side by side; advantages: one number each.
    A completion whose advantage is 0 has no gradient: its tokens count in the mean, but there is no backward pass. A
    mini-batch of nothing else makes no update, since momentum and weight decay would turn zeros into one. Returns what
    the log says.
    """
    model.train()
    size, everyone, signal = config.mini_batch * config.group, range(len(sequences)), (advantages != 0).tolist()
    plan = []  # (a mini-batch, what of it has an advantage, in micro-batches)
    for begin in everyone[::size]:
        mini_batch = everyone[begin : begin + size]
        if learning := [i for i in mini_batch if signal[i]]:
            plan.append((mini_batch, micro_batches(sequences, config.micro_tokens, learning)))
    advantages, internal = advantages.to(model.device), layer < len(model.get_decoder().layers)

    def score(micro: list[int], entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """log pi^l of the N completion tokens of a micro-batch (N,), and if asked the entropies of pi^l there (N,)."""
        ids, mask = pad([sequences[i] for i in micro], model.device)  # (B, T) each
        norm = config.internal_norm == "final"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            return token_logps(model, ids, mask, layer, norm, config.temperature, config.head_tokens, entropy)

    # Before the first update: pi^l_old, in the micro-batches of the updates, so that rho is 1 at first, rounding too.
    # And of an internal policy the entropy, of all completions; that of pi is known from the rollout.
    others = [i for i in everyone if not signal[i]] if internal else []
    old_logps, entropy_sum = {}, 0.0
    with torch.no_grad():
        for micro in itertools.chain(*(m for _, m in plan), micro_batches(sequences, config.micro_tokens, others)):
            old_logps[tuple(micro)], entropies = score(micro, entropy=internal)
            entropy_sum += 0.0 if entropies is None else float(entropies.sum())

    ratios, clipped, first_error = [], [], None  # of the completions that have an advantage
    grad_norms: list[float] = []
    for mini_batch, micros in plan:
        for micro in micros:
            old, (logps, _) = old_logps[tuple(micro)], score(micro)  # (N,) each
            weight, advantage = per_token(sequences, advantages, mini_batch, micro, config.average)  # (N,) each
            surrogate = clipped_surrogate(logps, old, advantage, config.clip)  # (N,)
            (-(weight * surrogate).sum()).backward()
            ratios.append((logps.detach() - old).exp())  # (N,)
            clipped.append(surrogate.detach() < ratios[-1] * advantage)  # (N,)
        if not grad_norms:
            first_error = float((torch.cat(ratios) - 1).abs().max())
        grad_norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)))
        if math.isfinite(grad_norms[-1]):
            optimizer.step()
        optimizer.zero_grad()  # to None: what lies above `layer` must get no zeros, which AdamW would act upon
    ratio = torch.cat(ratios) if ratios else torch.ones(1)
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    return dict(
        clipped=float(torch.cat(clipped).float().mean()) if clipped else 0.0,
        ratio_mean=float(ratio.mean()),
        ratio_max=float(ratio.max()),
        first_ratio_error=first_error,  # max |rho - 1| before the first update: anything but rounding is a bug
        grad_norm=statistics.fmean(finite) if finite else 0.0,
        skipped_updates=len(grad_norms) - len(finite),  # for a gradient that was not finite
        **(dict(layer_entropy=entropy_sum / sum(len(c) for _, c in sequences)) if internal else {}),
    )


def per_token(
    sequences: Sequences, advantages: Tensor, mini_batch: range, micro: list[int], average: str
) -> tuple[Tensor, Tensor]:
    """For the N completion tokens of a micro-batch: their weights in the mean over its mini-batch, and advantages.

    The mean is over all tokens of the mini-batch (average 'token'), or per completion and then over completions
    ('sequence'). Weighted so, gradients do not depend on how a mini-batch is split into micro-batches.
    """
    counts = torch.tensor([len(sequences[i][1]) for i in micro], device=advantages.device)  # (B,)
    weights = 1.0 / (len(mini_batch) * counts)  # (B,)
    if average == "token":
        weights = torch.full_like(weights, 1.0 / sum(len(sequences[i][1]) for i in mini_batch))  # (B,)
    return weights.repeat_interleave(counts), advantages[micro].repeat_interleave(counts)


def find_boundary(model: Model, sequences: Sequences, config: Config) -> int:
    """What `--internal-layer auto` optimises: the boundary layer, by 32 tokens of each of 16 completions."""
    windows = []
    for n, (prompt, completion) in enumerate(sequences[:: max(1, len(sequences) // 16)][:16]):
        start = n * max(0, len(completion) - 32) // 15  # n/15 of the way through: early in the first, late in the last
        windows.append((prompt + completion[:start], completion[start : start + 32]))
    limits = config.micro_tokens, config.head_tokens
    profile = entropy_profile(model, windows, True, ("ffn_input", "ffn"), *limits)
    change = [after - before for after, before in zip(profile["ffn"], profile["ffn_input"], strict=True)]
    layer, rounded = boundary_layer(change), " ".join(f"{c:+.2f}" for c in change)
    none = "; none explores, so phase 1 optimises pi itself" if max(change) <= 0 else ""
    tqdm.write(f"Boundary    layer {layer}{none}; FFN entropy changes from layer 1 on, in nats: {rounded}")
    return layer


@torch.no_grad()
def sampling_error(model: Model, sequences: Sequences, completions: list[Completion], config: Config) -> float:
    """Mean difference in nats between log pi of a token as sampled and as scored: rounding, or a bug. 8 completions."""
    numbers, errors = range(0, len(sequences), max(1, len(sequences) // 8))[:8], []
    for micro in micro_batches(sequences, config.micro_tokens, numbers):
        batch = pad([sequences[i] for i in micro], model.device)  # (B, T) each
        top, chunk = len(model.get_decoder().layers), config.head_tokens
        scored, _ = token_logps(model, *batch, top, temperature=config.temperature, head_tokens=chunk)  # (N,)
        sampled = torch.tensor([logp for i in micro for logp in completions[i].logps])  # (N,)
        errors.append((scored.cpu() - sampled).abs())
    return float(torch.cat(errors).mean())


def problems_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """The numbers of a step's problems: every problem comes once in each turn through the data, shuffled each time."""
    return [shuffled(count, f"{seed} turn {i // count}")[i % count] for i in range((step - 1) * size, step * size)]


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: str) -> list[int]:
    """The numbers 0..count-1 in the order that `seed` gives."""
    return random.Random(seed).sample(range(count), count)


# Below: the machine, files and words. Nothing of the method.


def rollout_metrics(completions: list[Completion], rewards: list[float], advantages: Tensor) -> dict[str, float]:
    """What the log says of a rollout."""
    tokens = sum(len(c.ids) for c in completions)
    entropy = sum(sum(c.entropies) for c in completions) / tokens
    return dict(
        reward=statistics.fmean(rewards),
        entropy=entropy,
        layer_entropy=entropy,  # if the policy optimised is pi; else `update` has it
        completion_tokens=tokens / len(completions),
        truncated=statistics.fmean(not c.ended for c in completions),
        no_signal=statistics.fmean((advantages == 0).all(-1).tolist()),
    )


@dataclass
class Run:
    """What a run works with; a checkpoint keeps the model, the optimizer and the fields of the second block."""

    config: Config
    out: Path
    model: Model  # float32 master weights
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    problems: list[Problem]
    held_out: list[Problem]
    num_layers: int

    internal_layer: int | None  # None until `auto` has found it
    done: int = 0  # steps
    log_sizes: dict[str, int] = field(default_factory=dict)  # bytes of each log after `done` steps

    actor: Any = None  # what completions are drawn from: the model itself, or its bfloat16 copy
    whole: bool = True  # False in the middle of a step
    no_reward_steps: int = 0  # in a row
    skipped_updates: int = 0  # in a row
    said: set[str] = field(default_factory=set)


def set_up(config: Config, resume: bool) -> Run:
    """Load, check and prepare everything; nothing is written before everything is checked."""
    device, bfloat16 = choose_device(config)
    if origin(config.model) == "tiny" and device.type == "cpu":
        torch.set_num_threads(1)  # more make so small a model no faster, and on a busy machine many times slower
    out = run_folder(config, resume)
    start = checkpoints(out)[-1] if resume and checkpoints(out) else None
    config.out = str(out)
    try:
        model, tokenizer = load_model(str(start or config.model), device, config.seed)
    except UsageError as error:
        if start is None:
            raise
        raise UsageError(DAMAGED.format(start)) from error
    num_layers, size = len(model.get_decoder().layers), sum(p.numel() for p in model.parameters()) / 1e6
    shape = f"{type(model).__name__}, {num_layers} layers, {size:.1f} M weights"
    print(f"Model       {config.model}: {shape}, {'bfloat16' if bfloat16 else 'float32'} on {device}")
    check_against_model(config, model, tokenizer)
    source, most = config.eval_dataset, config.eval_problems
    held_out = usable_problems(source, most, tokenizer, config) if most else []
    problems = usable_problems(config.dataset, config.train_problems, tokenizer, config) if config.steps else []
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=betas, weight_decay=decay, fused=True)
    layer: int | None = num_layers  # of plain GRPO
    if config.internal_steps:
        layer = None if config.internal_layer == "auto" else int(config.internal_layer)
    run = Run(config, out, model, tokenizer, optimizer, problems, held_out, num_layers, layer)
    if start:
        load_training_state(start, run)
        if config.steps < run.done:
            raise UsageError(f"--steps {config.steps} is less than the {run.done} that {start} has done; raise it.")
        print(f"Resumed     after step {run.done}, from {start}")
    run_folder(config, resume)  # again: another run may have begun there while this one was loading
    prepare_folder(out, config, run.log_sizes)
    if config.model == "tiny" and not start:
        print(f"Warm-up     {config.warm_up_steps} supervised steps on worked and careless answers")
        warm_up(model, tokenizer, config.warm_up_steps, config.seed)
    run.actor = bfloat16_copy(model) if bfloat16 else model
    if config.recompute:
        recompute_activations(model)
    return run


def evaluate_run(run: Run) -> None:
    """Evaluate on the held-out problems, if there are any, log it and say it."""
    if not run.held_out:
        return
    c = run.config
    draws = c.eval_k, c.max_completion, c.eval_temperature, c.rows, c.seed, c.thinking
    metrics, samples = evaluate(run.actor, run.tokenizer, run.held_out, *draws)
    log(run.out / "metrics.jsonl", dict(step=run.done, **metrics))
    for problem, completion, reward in samples[: 8 * c.eval_k : c.eval_k]:  # one of each of the first eight problems
        asked = dict(messages=problem.messages, answer=problem.answer)
        ids = dict(prompt_ids=encode(run.tokenizer, problem, c.thinking), ids=completion.ids)
        text = dict(completion=decode(run.tokenizer, completion), ended=completion.ended, reward=reward)
        log(run.out / "completions.jsonl", dict(step=run.done, **asked, **text, **ids))
    average, error, passed = metrics["eval_avg"], metrics["eval_se"], metrics["eval_pass"][-1]
    known = "" if error is None else f" (standard error {error:.1%})"
    score = f"avg@{c.eval_k} {average:.1%}{known}, pass@{c.eval_k} {passed:.1%}"
    tqdm.write(f"Evaluation  step {run.done}: {score}, {len(run.held_out)} held-out problems")


def choose_device(config: Config) -> tuple[torch.device, bool]:
    """The device, and whether to compute in bfloat16."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # a growing cache would leave holes
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length, so at each decoding step
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used ({first_line(error)}); give cpu or auto.") from error
    return device, config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def bfloat16_copy(model: Model) -> Model:
    """A copy with bfloat16 parameters; buffers stay, since rotary frequencies need float32."""
    actor = copy.deepcopy(model)
    for parameter in actor.parameters():
        parameter.data = parameter.data.bfloat16()
    return actor


@torch.no_grad()
def refresh(actor: Model, model: Model) -> None:
    """Bring the bfloat16 copy up to date with the float32 master weights."""
    for low, master in zip(actor.parameters(), model.parameters(), strict=True):
        low.copy_(master)


def recompute_activations(model: Model) -> None:
    """Activation checkpointing while training, under the name that this release of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Inside this context Ctrl-C and SIGTERM wait for its end; a second one does not."""
    asked: list[int] = []

    def wait(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


def check_against_model(config: Config, model: Model, tokenizer: Tokenizer) -> None:
    """Refuse what only the loaded model can tell: a layer it lacks, lengths it cannot take."""
    num_layers = len(model.get_decoder().layers)
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # type: ignore[arg-type]
        raise UsageError(f"The tokenizer of {config.model} has more tokens than its model; give a folder with both.")
    if config.internal_layer != "auto" and not 1 <= int(config.internal_layer) <= num_layers:
        raise UsageError(
            f"--internal-layer must be 1 to {num_layers} for {config.model}, or auto, not {config.internal_layer}."
        )
    for name in ("max_position_embeddings", "sliding_window"):
        most = getattr(model.config, name, None) or math.inf
        if config.max_prompt + config.max_completion > most:
            raise UsageError(
                f"--max-prompt plus --max-completion must be at most {most}, the {name} of {config.model}."
            )
    if tokenizer.chat_template is None:
        print("Prompts     the model has no chat template: problems are given to it as plain text")


def usable_problems(source: str, limit: int, tokenizer: Tokenizer, config: Config) -> list[Problem]:
    """The problems whose prompts have at most --max-prompt tokens; the others are counted, not cut."""
    problems = load_problems(source, limit, config.system)
    try:
        fitting = [p for p in problems if len(encode(tokenizer, p, config.thinking)) <= config.max_prompt]
    except jinja2.TemplateError as error:
        mend = 'give other messages, or no system message with --system ""'
        refused = f"The chat template of {config.model} refuses {source} ({first_line(error)})"
        raise UsageError(f"{refused}; {mend}.") from error
    if not fitting:
        raise UsageError(f"All prompts of {source} have more than {config.max_prompt} tokens; raise --max-prompt.")
    if len(fitting) < len(problems):
        print(f"Problems    {len(problems) - len(fitting)} dropped, of more than {config.max_prompt} tokens")
    return fitting


def run_folder(config: Config, resume: bool) -> Path:
    """The folder of the run. One that holds anything is never written to, but to resume it."""
    name = Path(config.model).name + time.strftime("-%Y%m%d-%H%M%S")
    out = Path(config.out) if config.out else Path("runs", name)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is there already and stays as it is; go on with --resume {out}, or give another --out."
        )
    return out


LOGS = ("metrics.jsonl", "completions.jsonl")


def prepare_folder(out: Path, config: Config, log_sizes: dict[str, int]) -> None:
    """Write the settings, and cut the logs back to what they were at the checkpoint."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / name for name in LOGS):
            if file.exists():
                os.truncate(file, log_sizes.get(file.name, 0))
        settings = out / ".config.json"
        settings.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        settings.replace(out / "config.json")  # at no moment is there half a file
    except OSError as error:
        with contextlib.suppress(OSError):
            (out / ".config.json").unlink()  # half a file, which would keep the next run out
        raise UsageError(f"{out} cannot be written ({error.strerror}); give another --out.") from error


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a folder, whole or not at all: under a temporary name, on disk, then renamed."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as written:
                    os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch.save has RuntimeError for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        mend = f"make room, then go on with --resume {folder.parent}"
        raise UsageError(f"{folder} cannot be written ({first_line(error)}); {mend}.") from error


def save_model(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer in the Hugging Face layout, in the model's own number format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-STEP, which --resume goes on from and --model loads; remove all but the last `keep`."""

    def write(folder: Path) -> None:
        save_model(run.model, run.tokenizer, folder)
        state = dict(done=run.done, internal_layer=run.internal_layer, log_sizes=run.log_sizes)
        torch.save(dict(**state, optimizer=run.optimizer.state_dict()), folder / "training.pt")

    folder = run.out / f"checkpoint-{run.done}"
    if not folder.exists():
        write_folder(folder, write)
    for old in checkpoints(run.out)[: -run.config.keep] if run.config.keep else []:
        shutil.rmtree(old)


DAMAGED = "The checkpoint {} is damaged or of another model; remove it, and --resume goes on from the one before."


def load_training_state(folder: Path, run: Run) -> None:
    """Restore what `save_checkpoint` wrote beside the model."""
    try:
        state = torch.load(folder / "training.pt", map_location=run.model.device, weights_only=True)
        run.optimizer.load_state_dict(state["optimizer"])
        run.done, run.internal_layer, run.log_sizes = state["done"], state["internal_layer"], state["log_sizes"]
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(DAMAGED.format(folder)) from error


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbers = {folder: folder.name.rpartition("-")[2] for folder in out.glob("checkpoint-*")}
    return sorted((f for f in numbers if numbers[f].isdecimal()), key=lambda folder: int(numbers[folder]))


def log(file: Path, record: dict) -> None:
    """Append one JSON object as a line."""
    try:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as error:
        mend = f"make room, then go on with --resume {file.parent}"
        raise UsageError(f"{file} cannot be written ({first_line(error)}); {mend}.") from error


def to_evaluate(config: Config) -> str:
    """The flags that evaluate a finished run again: those that matter, if they are not the defaults."""
    flags, default = ["--model", config.out, "--steps", "0"], Config(model=config.model)
    of_evaluation = ("eval_dataset", "eval_problems", "eval_k", "eval_temperature", "max_prompt", "max_completion")
    for name in (*of_evaluation, "system", "seed", "rows", "device", "precision"):
        if getattr(config, name) != getattr(default, name):
            flags += [flag(name), str(getattr(config, name))]
    return shlex.join(flags + ["--thinking"] * config.thinking)


def say_phase(step: int, layer: int, run: Run) -> None:
    """Say which policy is optimised from this step on."""
    low = f"the internal policy of layer {layer} of {run.num_layers}"
    name = low if layer < run.num_layers else "the policy pi (GRPO)"
    tqdm.write(f"Phase       {1 + (step > run.config.internal_steps)}, from step {step}: optimises {name}")


def say_completion(problem: Problem, text: str, reward: float) -> None:
    """Show a question, what the model made of it, and its reward."""
    question, text = (" ".join(t.split()) for t in (problem.messages[-1]["content"], text))
    text = text if len(text) < 300 else f"{text[:150]} ... {text[-150:]}"
    tqdm.write(f"Completion  {question[:150]} -> {text}  [answer {problem.answer}, reward {reward:.0f}]")


def say_step(bar: tqdm, metrics: dict, run: Run) -> None:
    """Move the bar, say once what a user should know, and stop after ten updates in a row without a finite gradient."""
    phase, numbers = 1 + (metrics["step"] > run.config.internal_steps), ("reward", "completion_tokens", "entropy")
    bar.set_postfix(phase=phase, **{name.partition("_")[0]: f"{metrics[name]:.3g}" for name in numbers})
    bar.update()
    run.no_reward_steps = 0 if metrics["reward"] else run.no_reward_steps + 1
    for sentence in advice(metrics, run.no_reward_steps) - run.said:
        run.said.add(sentence)
        tqdm.write(f"Note        {sentence} (step {metrics['step']})")
    run.skipped_updates = 0 if metrics["grad_norm"] else run.skipped_updates + metrics["skipped_updates"]
    if run.skipped_updates >= 10:
        save_checkpoint(run)
        mend = f"start anew, from --model {checkpoints(run.out)[-1]}, with a lower --lr or --precision float32"
        raise UsageError(f"Ten updates in a row had no finite gradient; {mend}.")


def advice(metrics: dict, no_reward_steps: int) -> set[str]:
    """What a user should know about a step, and what to do."""
    wrong_ratio = (metrics["first_ratio_error"] or 0.0) > 0.05
    notes = [
        (no_reward_steps >= 20, "no reward in 20 steps: read completions.jsonl; are answers boxed, problems too hard?"),
        (metrics["truncated"] > 0.5, "most completions are cut off: raise --max-completion"),
        (metrics["no_signal"] > 0.8, "most groups have equal rewards: raise --group, or change --dataset"),
        (metrics["entropy"] < 0.02, "the entropy is nearly 0, nothing is left to explore: lower --lr or stop earlier"),
        (wrong_ratio, "the ratio is not 1 before the first update: please report this bug"),
        (metrics["sampling_error"] > 0.1, "what is sampled is not what is scored: please report this bug"),
    ]
    return {sentence for true, sentence in notes if true}


def first_line(error: BaseException) -> str:
    """What an error says, in a line of at most 200 characters."""
    return str(error).strip().partition("\n")[0].rstrip(".")[:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the GPU's or the machine's: torch, CUDA and its libraries say it in their own ways."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory of the run so far, in GB: allocated on the GPU, else resident; None where no one tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# 10 Command line ======================================================================================================

# What --resume may change; the last four, for the sake of memory, change only rounding and the order of random draws.
MAY_CHANGE = ("steps", "save_every", "keep", "rows", "micro_tokens", "head_tokens", "recompute")


def parse(arguments: list[str] | None = None) -> tuple[Config, bool]:
    """The `Config` of a command line, of which every field is a flag, and whether to resume."""
    parser = argparse.ArgumentParser(description="Bottom-up Policy Optimization; defaults: [built-in model | others].")
    for f in fields(Config):
        defaults = dict.fromkeys(str(f.metadata[column]) for column in ("tiny", "other"))  # once, if they are the same
        choices = f"{', '.join(f.metadata['choices'])}: " if f.metadata["choices"] else ""
        text = f"{choices}{f.metadata['help']} [{' | '.join(defaults)}]".replace("%", "%%")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--resume", metavar="", help="folder of a run to go on with, from its last checkpoint")
    given = vars(parser.parse_args(arguments))
    folder = given.pop("resume")
    if folder is None:
        return Config(**given), False
    try:
        saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        saved = {f.name: saved[f.name] for f in fields(Config)}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"There is no run to resume in {folder}; name the folder that --out named.") from error
    for name in given:
        if given[name] != saved.get(name) and name not in MAY_CHANGE:
            allowed = ", ".join(map(flag, MAY_CHANGE))
            raise UsageError(f"{flag(name)} cannot change in a resumed run, only {allowed} can; start a new run.")
    return Config(**{**saved, **given, "out": folder}), True


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence for what the user can mend; 130 after Ctrl-C or SIGTERM."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # no letter of a completion may end a run, whatever the terminal knows
    config = None
    try:
        config, resume = parse(arguments)
        train(config, resume)
    except UsageError as error:
        print(f"bupo.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        flags = "--rows, --micro-tokens or --head-tokens"
        print(f"bupo.py: out of memory; lower {flags}{how_to_go_on(config)}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nbupo.py: stopped{how_to_go_on(config)}.", file=sys.stderr)
        return 130
    return 0


def how_to_go_on(config: Config | None) -> str:
    """The end of a sentence about a run that stopped: how to resume it, if it can be."""
    begun = config and config.steps and config.out and Path(config.out, "config.json").exists()
    return f"; go on with --resume {config.out}" if config and begun else ""


if __name__ == "__main__":
    sys.exit(main())
