r"""How fast and how right is the reward? python benchmarks/reward.py (no GPU, about two minutes)

1. Seconds for 1,000 fair and 100 hostile pairs, and the slowest single pair.
2. The share of re-spelled golds that is accepted (should be 100 %) and of golds with one symbol
   changed (should be 0 %): ours, math-verify (pip install math-verify) and exact match.
Needs the authors' problem files in ../shared/data; without them it uses a few built-in answers.
"""

import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bupo
import test_bupo

SECONDS = 5  # a call of math-verify that takes longer counts as a refusal
Grader = Callable[[str, str], bool]


def golds() -> list[str]:
    try:
        return sorted(set(test_bupo.paper_golds()))
    except BaseException as error:  # pytest's skip is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return [gold for _, gold in test_bupo.pairs(test_bupo.RIGHT)]


def ours(answer: str, gold: str) -> bool:
    return bupo.math_reward(rf"\boxed{{{answer}}}", gold) == 1.0


def exact_match(answer: str, gold: str) -> bool:
    return answer.strip() == gold.strip()


def serve(connection: Connection) -> None:
    from math_verify import parse, verify

    while True:
        answer, gold = connection.recv()
        sides = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
        connection.send(bool(verify(*sides, timeout_seconds=None)))


class MathVerify:
    """math-verify in a child process, which is killed when a call takes too long or ends it."""

    child: multiprocessing.Process | None = None

    def __call__(self, answer: str, gold: str) -> bool:
        if self.child is None or not self.child.is_alive():
            self.connection, other = multiprocessing.Pipe()
            self.child = multiprocessing.Process(target=serve, args=(other,), daemon=True)
            self.child.start()
            other.close()
        try:
            self.connection.send((answer, gold))
            if self.connection.poll(SECONDS):
                return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        self.child.kill()
        self.child.join()
        return False


def timed(name: str, pairs: list[tuple[str, str]]) -> None:
    seconds = []
    for answer, gold in pairs:
        began = time.process_time()
        ours(answer, gold)
        seconds.append(time.process_time() - began)
    slowest = pairs[seconds.index(max(seconds))]
    print(
        f"{len(pairs):5} {name} pairs: {sum(seconds):.2f} s, slowest {1000 * max(seconds):.1f} ms",
        end=" ",
    )
    print(f"({slowest[0][:40]!r} for {slowest[1][:40]!r})")


def main() -> None:
    rng = random.Random(0)
    answers = golds()
    spelled = [(text, gold) for gold in answers for text in test_bupo.respellings(gold)]
    changed = [(text, gold) for gold in answers for text in test_bupo.mutations(gold, rng)]
    timed(
        "fair",
        rng.sample(spelled, min(500, len(spelled))) + rng.sample(changed, min(500, len(changed))),
    )
    hostile = test_bupo.hostile_answers()
    short = [text[:395] for text in hostile]
    timed("hostile", [(text, rng.choice(short)) for text in rng.sample(hostile + short, 100)])

    graders: dict[str, Grader] = {"ours": ours, "exact match": exact_match}
    try:
        import math_verify  # noqa: F401

        graders["math-verify"] = MathVerify()
    except ImportError:
        print("math-verify is not installed (pip install math-verify); its column is left out.")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print("| accepted | " + " | ".join(graders) + " |\n| --- |" + " --- |" * len(graders))
    for name, pairs in (("re-spelled golds", spelled), ("one symbol changed", changed)):
        sample = rng.sample(pairs, min(count, len(pairs)))
        cells = [f"{sum(grader(*pair) for pair in sample)}" for grader in graders.values()]
        print(f"| {name}, {len(sample)} of {len(pairs)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
