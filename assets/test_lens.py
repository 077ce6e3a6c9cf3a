"""The page of analyze.py --lens in a real browser, headless Chromium, driven through its pipe."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test may wait for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import tokenizers
import torch
import transformers

import analyze

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --disable-quic --remote-debugging-pipe"
HOSTILE = ["</script><script>document.title='!'</script>", "<svg onload=document.title='!'>", " x"]
HOSTILE += ["<img src=x onerror='document.title=1'>", "&lt;b&gt;", "a\nb", "\u202egnp", "\u2028"]
HOSTILE += ["\u05e9\u05dc\u05d5\u05dd", "\U0001f600", "'\"`${1}", "<!--", "]]>", "\x00", "DATA"]


class Browser:
    """A page in a browser that is asked through the DevTools protocol."""

    def __init__(self, folder: Path):
        asked, self.ask = os.pipe()
        self.answers, answered = os.pipe()
        command = f'exec "$@" 3<&{asked} 4>&{answered}'  # the numbers that the protocol has
        flags = [*QUIET.split(), f"--user-data-dir={folder}", "about:blank"]
        command = ["bash", "-c", command, "bash", CHROMIUM, *flags]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(command, pass_fds=(asked, answered), stderr=log)
        os.close(asked)
        os.close(answered)
        self.count, self.rest, self.heard, self.session = 0, b"", [], {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = dict(sessionId=session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")
        self.size(1280)
        # What is drawn on a canvas, and where, is kept: its cells are no elements of the page.
        code = """window.drawn = {};
            const pen = CanvasRenderingContext2D.prototype, {fillText, fillRect, strokeRect} = pen;
            let box;
            pen.fillRect = function (...at) {
              if (at[3] > 1) drawn[box = `${at[0]},${at[1]}`] = {shade: this.fillStyle};
              else drawn[box].underlined = true;
              fillRect.apply(this, at);
            };
            pen.fillText = function (text, ...at) {
              Object.assign(drawn[box], {text, ink: this.fillStyle});
              fillText.call(this, text, ...at);
            };
            pen.strokeRect = function (...at) {
              drawn[box].frame = this.strokeStyle;
              strokeRect.apply(this, at);
            };"""
        self.do("Page.addScriptToEvaluateOnNewDocument", source=code)

    def do(self, method: str, **parameters) -> dict:
        self.count += 1
        message = dict(id=self.count, method=method, params=parameters, **self.session)
        os.write(self.ask, json.dumps(message).encode() + b"\0")
        while (answer := self.hear()).get("id") != self.count:
            self.heard.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def hear(self) -> dict:
        while b"\0" not in self.rest:
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser has gone"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def size(self, width: int) -> None:
        screen = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.do("Emulation.setDeviceMetricsOverride", **screen)

    def open(self, page: Path, state: str = "") -> None:
        self.do("Page.navigate", url="about:blank")
        self.js("0")
        self.heard.clear()
        self.do("Page.navigate", url=f"{page.as_uri()}{state}")
        self.js("document.readyState == 'complete' || new Promise(done => onload = done)")

    def js(self, code: str):
        found = self.do("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


def mouse(browser: Browser, kind: str, x: float, y: float) -> None:
    button = {} if kind == "mouseMoved" else dict(button="left", clickCount=1)
    browser.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)


def press(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.do("Input.dispatchKeyEvent", type=kind, key=key)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium to open the page in")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.do("Browser.close")
    assert browser.process.wait(timeout=20) == 0


@pytest.fixture
def browser(chromium):
    """The browser; after the test: nothing was requested but the page, nothing went wrong."""
    chromium.size(1280)
    yield chromium
    wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in chromium.heard if event.get("method") in wrong]
    sent = [e for e in chromium.heard if e.get("method") == "Network.requestWillBeSent"]
    assert {e["params"]["request"]["url"].partition(":")[0] for e in sent} <= {"file"}
    assert chromium.js("document.title") == "What each layer would say"
    assert chromium.js("document.querySelectorAll('script').length") == 2
    assert chromium.js("document.querySelectorAll('img, iframe, link, svg svg').length") == 0


@pytest.fixture(scope="module")
def lens(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The page of three models, one of fewer layers, with tokens that nobody wants; its JSON."""
    folder = tmp_path_factory.mktemp("lens")
    vocabulary = {word: i for i, word in enumerate([*HOSTILE, *"abcdefghij"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    shape = dict(vocab_size=len(vocabulary) + 1, hidden_size=32, intermediate_size=48)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    for name, layers in (("a&amp;<b>", 4), ("b", 4), ("c", 2)):
        config = transformers.Qwen3Config(**shape, num_hidden_layers=layers)
        with torch.random.fork_rng():
            torch.manual_seed(layers + len(name))
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    ids = [*range(len(HOSTILE)), *rng.choices(range(len(vocabulary)), k=25)]
    line = dict(step=0, prompt_ids=[0, 1, 5, 8], ids=ids)
    (folder / "one.jsonl").write_text(json.dumps(line) + "\n")
    models = [str(folder / name) for name in ("a&amp;<b>", "b", "c")]
    flags = ["--completions", str(folder / "one.jsonl"), "--device", "cpu"]
    assert analyze.main(["--lens", "--model", *models, *flags, "--out", str(folder / "x")]) == 0
    return folder / "x.html", json.loads((folder / "x.json").read_text())["models"]


def visible(word: str) -> str:
    """How the page writes a token: escapes for what has no shape of its own."""
    known = {" ": "\u00b7", "\n": "\u21b5"}
    hidden = {c: f"\\u{{{ord(c):x}}}" for c in word if unicodedata.category(c)[0] in "CZ"}
    return "".join(({**hidden, **known}).get(c, c) for c in word)


def label(row: dict) -> str:
    return dict(stream="", attention="A", ffn="F")[row["state"]] + str(row["layer"])


def values(row: dict, color: str, first: dict | None) -> list[float]:
    """What colors the cells of a row, minus the same of the first model's row if one is given."""
    scaled = [math.log10(x) if color == "rank" else round(1000 * x) / 1000 for x in row[color]]
    others = values(first, color, None) if first else [0] * len(scaled)
    return [a - b for a, b in zip(scaled, others, strict=True)]


@pytest.mark.parametrize("color", ["entropy", "prob", "rank", "kl"])
@pytest.mark.parametrize(
    ("m", "sub", "diff"), [(0, 0, 0), (1, 1, 0), (1, 0, 1), (2, 1, 1), (2, 0, 0), (0, 1, 1)]
)
def test_cells_show_the_numbers_of_the_json(m, sub, diff, color, lens, browser):
    page, models = lens
    state = f"#model={m + 1}&color={color}&token=3&row=1&rows={'sub' if sub else ''}&diff={diff}"
    browser.open(page, state)
    shown = [[row for row in model["rows"] if sub or row["state"] == "stream"] for model in models]
    firsts = {label(row): row for row in models[0]["rows"]} if diff else {}
    of_all = [values(row, color, firsts.get(label(row))) for rows in shown for row in rows]
    most = 1 if color == "prob" and not diff else max(abs(x) for row in of_all for x in row)
    least, palette = -most if diff else 0, browser.js("LESS_MORE" if diff else "VIRIDIS")
    ends = [float(browser.js(f"$('{end}').textContent")) for end in ("low", "high")]
    wanted = [10**x for x in (least, most)] if color == "rank" else [least, most]
    assert ends == pytest.approx(wanted, rel=0.006)
    drawn, wide, letters = (browser.js(name) for name in ("drawn", "wide", "letters"))
    columns = range(int((1256 - 36) / wide))
    for r, row in enumerate(reversed(shown[m])):
        first = firsts.get(label(row))
        assert drawn[f"0,{21 * (r + 1)}"]["text"] == label(row)
        for i in columns:
            cell, text = drawn[f"{36 + wide * i},{21 * (r + 1)}"], visible(row["top"][i][0])
            text = text if len(text) <= letters else text[: letters - 1] + "\u2026"
            part = (values(row, color, first)[i] - least) / (most - least) * (len(palette) - 1)
            assert cell["text"] == text
            assert cell["shade"] in {palette[math.floor(part + 0.5 + e)] for e in (-1e-9, 1e-9)}
            changed = first is not None and first["top"][i][0] != row["top"][i][0]
            assert cell.get("underlined", False) == changed
            settled = row["state"] == "stream" and models[m]["settled"][i] == row["layer"]
            frame = "#d55e00" if settled else "rgba(0, 0, 0, 0)"
            assert cell["frame"] == (cell["ink"] if (i, label(row)) == (2, "1") else frame)
    for i in columns:
        top, end = visible(models[m]["next"][i]), drawn[f"{36 + wide * i},0"]["text"]
        assert end == (top if len(top) <= letters else top[: letters - 1] + "\u2026")


CELLS = [(0, 1, "4"), (1, 7, "A2"), (1, 40, "0"), (2, 9, "F1")]


@pytest.mark.parametrize(("m", "token", "row"), CELLS)
def test_a_cell_tells_its_top_tokens_and_numbers(m, token, row, lens, browser):
    page, models = lens
    browser.open(page, f"#model={m + 1}&token={token}&row={row}&rows=sub&diff=1")
    said = browser.js("[...document.querySelectorAll('#cell pre')].map(one => one.textContent)")
    assert browser.js("document.querySelector('#cell h2').textContent").startswith(f"Row {row}, ")
    wanted = models[:1] + models[m : m + 1] if m else models[:1]
    assert len(said) == len(wanted)
    for text, model in zip(said, wanted, strict=True):
        (one,), i = [r for r in model["rows"] if label(r) == row], token - 1
        tops = zip(one["top"][i], one["top_probs"][i], strict=True)
        lines = [f"{round(1000 * p) / 10:5.1f} %  {visible(word)}" for word, p in tops]
        prob, nats = round(1000 * one["prob"][i]) / 10, (one[k][i] for k in ("entropy", "kl"))
        came = f"Next came  {visible(model['next'][i])}: {prob:.1f} %, rank {one['rank'][i]}"
        name, *rest = text.split("\n")
        assert (name, rest[:6]) == (model["model"], [*lines, came])
        numbers = [float(line.split()[1]) for line in rest[6:]]
        assert numbers == pytest.approx([*nats], abs=0.006)


def test_a_pinned_token_is_plotted_over_the_layers_of_each_model(lens, browser):
    page, models = lens
    browser.open(page, "#model=2&pin=6&token=2")
    lines = browser.js("[...$('lines').children].map(one => one.getAttribute('points'))")
    assert browser.js("$('plotted').textContent") == f"Token 6, pinned: {visible(HOSTILE[5])}"
    for m, model in enumerate(models):
        rows = [row for row in model["rows"] if row["state"] == "stream"]
        for points, probs in (
            (lines[2 * m], [row["prob"][5] for row in rows]),
            (lines[2 * m + 1], [row["top_probs"][5][0] for row in rows]),
        ):
            found = [tuple(map(float, point.split(","))) for point in points.split()]
            step = 400 / (len(rows) - 1)
            wanted = [(34 + step * k, 146 - 140 * p) for k, p in enumerate(probs)]
            assert len(found) == len(wanted)
            for a, b in zip(found, wanted, strict=True):
                assert a == pytest.approx(b, abs=0.08)  # a thousandth is 0.14
    widths = browser.js("[...$('lines').children].map(one => parseFloat(one.style.strokeWidth))")
    assert [w > 2 for w in widths] == [False, False, True, True, False, False]
    names = browser.js("[...$('keys').children].map(one => one.textContent)")
    assert names == [model["model"] for model in models]


def test_whatever_tokens_say_stays_text(lens, browser):
    page, models = lens
    data = page.read_text(encoding="utf-8").partition('type="application/json">')[2]
    assert data.partition("</script>")[0].count("<") == 0
    browser.open(page, "#rows=sub&model=9&color=toString&pin=-3&token=1e9&row=<b>&diff=x")
    words = browser.js("[...words.children].map(one => one.textContent)")
    shown = [visible(word) for word in models[0]["next"]]
    assert words == [word.replace("\u00b7", " ").replace("\u21b5", "\u21b5\n") for word in shown]
    assert browser.js("$('prompt').textContent") == models[0]["prompt"]
    assert browser.js("words.children[0].tagName") == "BDI"
    assert browser.js("words.querySelectorAll('bdi *').length") == 0
    state = browser.js("[slider.value, color.value, pinned, token, label]")
    assert state == ["3", "entropy", 0, 1, "2"]
    assert browser.js("$('keys').textContent").count("a&amp;<b>") == 1


def test_pointer_keys_and_controls_move_through_the_page(lens, browser):
    page, models = lens
    browser.open(page)
    left, top = browser.js("[grid.getBoundingClientRect().x, grid.getBoundingClientRect().y]")
    wide = browser.js("wide")
    place = left + 36 + wide * 4.5, top + 21 * 2.5  # token 5, the second row from above
    mouse(browser, "mouseMoved", *place)
    assert browser.js("[token, label]") == [5, "3"]
    for kind in ("mousePressed", "mouseReleased"):
        mouse(browser, kind, *place)
    address = "location.hash"
    assert browser.js(address) == "#model=1&color=entropy&diff=0&pin=5&rows=layers&token=5&row=3"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):
        press(browser, key)
    assert browser.js(address).endswith("&pin=5&rows=layers&token=6&row=2")
    for _ in range(60):
        press(browser, "ArrowRight")
    assert browser.js(address).endswith(f"&token={len(models[0]['next'])}&row=2")
    x, width = browser.js("[36 + wide * token - view.scrollLeft, view.clientWidth]")
    assert 36 + wide <= x <= width + 1  # it came into view
    press(browser, "Enter")
    press(browser, "Enter")
    assert "pin=0" in browser.js(address)
    browser.js("sub.click(), diff.click(), slider.focus()")
    press(browser, "ArrowRight")
    browser.js("slider.value = 2, slider.dispatchEvent(new Event('input', {bubbles: true}))")
    browser.js("slider.dispatchEvent(new Event('change', {bubbles: true}))")
    assert browser.js(address).startswith("#model=2&color=entropy&diff=1&pin=0&rows=sub&")
    assert browser.js("rows.length") == 13
    browser.js("location.hash = '#model=3&color=kl&pin=2'")
    browser.js("new Promise(done => setTimeout(done, 100))")
    assert browser.js("[chosen.value, color.value, pinned]") == [models[2]["model"], "kl", 2]
    browser.js("words.children[0].click()")
    assert browser.js("[token, view.scrollLeft]") == [1, 0]


def test_a_large_page_is_small_and_fast(tmp_path, browser):
    rng, count = random.Random(0), 96
    letters = [chr(97 + i) for i in range(26)]
    words = [" " + "".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(20_000)]

    def row(layer: int, state: str) -> dict:
        probs = [sorted((rng.random() ** 4 for _ in range(5)), reverse=True) for _ in range(count)]
        numbers = {name: [10 * rng.random() for _ in range(count)] for name in ("entropy", "kl")}
        numbers |= dict(prob=[rng.random() ** 3 for _ in range(count)])
        numbers |= dict(rank=[int(10 ** (5 * rng.random())) for _ in range(count)])
        top = [rng.choices(words, k=5) for _ in range(count)]
        return dict(numbers, layer=layer, state=state, top=top, top_probs=probs)

    parts = [(0, "stream"), *((k, s) for k in range(1, 41) for s in ("attention", "ffn", "stream"))]
    said, models = rng.choices(words, k=count), []
    for m in range(4):
        one = dict(model=f"runs/x/checkpoint-{m}", settled=[None] * count, prompt="p", read=said)
        models.append(dict(one, next=said, rows=[row(*part) for part in parts]))
    page = tmp_path / "large.html"
    page.write_text(analyze.lens_page(models), encoding="utf-8")
    assert page.stat().st_size < 3e6
    soon = "new Promise(done => requestAnimationFrame(() => setTimeout(() => done({}))))"
    opened, moved, pointed = [], [], []
    for k in range(5):
        browser.open(page, "#rows=sub&diff=1")
        opened.append(browser.js(soon.format("performance.now()")))
        to_move, to_point = f"slider.value = {k % 4 + 1}, draw()", f"token = {k + 2}, point()"
        for times, code in ((moved, to_move), (pointed, to_point)):
            took = soon.format("performance.now() - began")
            times.append(browser.js(f"{{const began = performance.now(); {code}; {took}}}"))
    print(f"bytes {page.stat().st_size}, ms: opened {opened}, moved {moved}, pointed {pointed}")
    assert min(opened) < 1000
    assert min(moved) < 200
    assert min(pointed) < 100


@pytest.mark.parametrize(
    ("decoder", "words", "texts"),
    [
        ("ByteLevel", ["\u0120a", "\u00f0", "\u00c3\u00a9"], [" a", "\\xf0", "\u00e9"]),
        ("Metaspace", ["\u2581a", "b", "<0xF0>"], [" a", "b", "<0xF0>"]),
    ],
)
def test_tokens_are_told_apart_whatever_bytes_they_are(decoder, words, texts):
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="b")
    words = tokenizers.Tokenizer(model)
    words.decoder = getattr(tokenizers.decoders, decoder)()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert [analyze.token_text(tokenizer, i) for i in range(4)] == [*texts, "[3]"]


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off_at_any_width(width, lens, browser):
    browser.size(width)
    browser.open(lens[0], "#diff=1&model=2&rows=sub")
    assert browser.js("document.documentElement.scrollWidth") <= width
