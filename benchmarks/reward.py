r"""How fast and how right is the reward? (pip install math-verify; no GPU; about a minute)

1. Seconds for 1,000 fair pairs and for all hostile ones, and the slowest single pair.
2. How many re-spelled golds are accepted (should be all) and golds with one symbol changed (should
   be none): ours on all of them, then ours, exact match (but for spaces) and math-verify on a
   sample of 200, or as many as given.
Needs the authors' problem files in ../shared/data; without them it uses a few built-in answers.
"""

import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from math_verify import parse, verify

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bupo
import test_bupo

SECONDS = 5  # a call of math-verify that takes longer counts as a refusal


def ours(answer: str, gold: str) -> bool:
    return bupo.math_reward(rf"\boxed{{{answer}}}", gold) == 1.0


def exact(answer: str, gold: str) -> bool:
    return "".join(answer.split()) == "".join(gold.split())


def theirs(answer: str, gold: str) -> bool:
    sides = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(*sides, timeout_seconds=None))


class MathVerify:
    """math-verify in a child process; another one replaces it when a call takes too long."""

    pool: Any = None

    def __call__(self, answer: str, gold: str) -> bool:
        self.pool = self.pool or multiprocessing.Pool(1)
        try:
            return self.pool.apply_async(theirs, (answer, gold)).get(SECONDS)
        except Exception:  # too long, also since the child has died; or an error of math-verify
            self.pool.terminate()
            self.pool = None
            return False


def timed(name: str, pairs: list[tuple[str, str]]) -> None:
    seconds = []
    for pair in pairs:
        began = time.process_time()
        ours(*pair)
        seconds.append(time.process_time() - began)
    most = max(seconds)
    answer, gold = pairs[seconds.index(most)]
    print(
        f"{len(pairs):5} {name} pairs: {sum(seconds):.2f} s, slowest {1000 * most:.1f} ms", end=" "
    )
    print(f"({len(answer)} characters, {answer[:40]!r} for {gold[:40]!r})")


def main(count: int) -> None:
    rng, golds = random.Random(0), [gold for _, gold in test_bupo.pairs(test_bupo.RIGHT)]
    golds = sorted(set(test_bupo.paper_golds() if test_bupo.PAPER_FILES.is_dir() else golds))
    spelled = [(text, gold) for gold in golds for text in test_bupo.respellings(gold)]
    changed = [(text, gold) for gold in golds for text in test_bupo.mutations(gold, rng)]
    few = [rng.sample(pairs, min(500, len(pairs))) for pairs in (spelled, changed)]
    timed("fair", [*few[0], *few[1]])
    hostile = test_bupo.hostile_answers()
    short = [text[:395] for text in hostile]
    timed("hostile", [(text, rng.choice(short)) for text in hostile + short])

    graders: dict[str, Callable[[str, str], bool]] = {"ours": ours, "exact match": exact}
    graders["math-verify"] = MathVerify()
    for name, pairs in (("re-spelled golds", spelled), ("golds with one symbol changed", changed)):
        print(f"{len(pairs)} {name}, accepted: ours {sum(ours(*pair) for pair in pairs)}")
        sample = rng.sample(pairs, min(count, len(pairs)))
        told = [f"{way} {sum(grader(*p) for p in sample)}" for way, grader in graders.items()]
        print(f"{len(sample)} of them, accepted: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
