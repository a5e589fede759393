"""The page to explore: complete, small, safe, without a network, and its numbers are the trace's."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

import minclip
from minclip import cli
from minclip.explorer import compare_page, run
from tests.support.browsers import chromium
from tests.support.oracles import random_params, random_tokens

TEXTS = ["a black cat sits on a chair", "a black dog sits on a chair", "two fish"]
HOSTILE = "</script><script>document.title='stolen'</script><img src=x onerror=alert(1)> & \u2028 \u202e cat"


@pytest.fixture(scope="module")
def page():
    return minclip.show(minclip.load(), minclip.tokenize(TEXTS), model="built-in")


def data_of(page):
    """Return the page's data, read as a browser reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', str(page), re.DOTALL)
    return json.loads(found[1])


def unpacked(stage):
    return np.frombuffer(base64.b64decode(stage["data"]), "<f2").reshape(stage["shape"])


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page, and the addresses that they name."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_complete_file_that_names_no_address(page):
    tags = Tags(str(page))
    assert tags.open == []
    assert tags.tags.count("script") == 2
    assert tags.addresses == ["data:,"]
    assert "default-src 'none'" in str(page)
    assert "://" not in str(page)


def test_every_number_of_the_page_is_the_traces(page):
    params, data = minclip.load(), data_of(page)
    for text, shown in zip(TEXTS, data["texts"], strict=False):
        tokens = minclip.tokenize(text)[:, : shown["eot"] + 1]
        traced = minclip.trace(params, tokens)
        assert shown["ids"] == tokens[0].tolist()
        for name, array in traced.items():
            stage = shown["stages"][name]
            if name == "eot" or name.endswith("attn.masked"):
                assert "data" not in stage
                continue
            array = array if name == "positional_embedding" else array[0]
            np.testing.assert_array_equal(unpacked(stage), array.astype(np.float16), err_msg=name)
            assert stage["norm"] == pytest.approx(np.linalg.norm(array), rel=1e-3)
    unit = minclip.normalize(minclip.encode_text(params, minclip.tokenize(TEXTS)))
    np.testing.assert_allclose(data["cosines"], unit @ unit.T, atol=1e-4)


def test_the_last_read_out_is_what_the_model_finds_nearest(page):
    emoji, names, pictures = minclip.pictures()
    unit = minclip.normalize(minclip.encode_text(minclip.load(), minclip.tokenize(TEXTS[0])))[0]
    best = np.argsort(-(pictures @ unit))[:5]
    data = data_of(page)
    found = data["texts"][0]["read_out"][-1][data["texts"][0]["eot"]]
    assert [index for index, _ in found] == best.tolist()
    assert data["labels"][best[0]] == [emoji[best[0]], names[best[0]]]
    np.testing.assert_allclose([cosine for _, cosine in found], (pictures @ unit)[best], atol=1e-4)


def test_texts_of_others_are_data_and_never_markup():
    page = minclip.show(minclip.load(), minclip.tokenize([HOSTILE, "a cat"]), model=HOSTILE)
    tags = Tags(str(page))
    assert tags.tags.count("script") == 2
    assert "img" not in tags.tags
    data = re.search(r'id="data">(.*?)</script>', str(page), re.DOTALL)[1]
    assert not set("<>&\u2028\u2029") & set(data)
    assert data_of(page)["model"]["name"] == HOSTILE
    assert data_of(page)["all_texts"][0] == minclip.decode(minclip.tokenize(HOSTILE))[0]


def test_the_page_of_the_built_in_model_is_small(page):
    twelve = "one two three four five six seven eight nine ten eleven twelve"
    assert len(str(minclip.show(minclip.load(), minclip.tokenize(twelve))).encode()) < 2e6


def test_a_large_model_leaves_out_stages_and_says_so(monkeypatch):
    params = random_params(width=128, layers=2, embed=32, vocabulary=99, context=20)
    tokens = random_tokens([20], context=20, vocabulary=99)
    whole = data_of(minclip.show(params, tokens))
    assert whole["left_out"] == []
    monkeypatch.setattr(run, "NUMBERS", 60_000)
    data = data_of(minclip.show(params, tokens))
    assert data["left_out"] == ["attn.k", "attn.q", "attn.v", "mlp.c_fc", "mlp.gelu"]
    stages = data["texts"][0]["stages"]
    assert "data" not in stages["transformer.resblocks.1.mlp.gelu"]
    assert "data" in stages["transformer.resblocks.1.attn.weights"]
    assert data["texts"][0]["words"][1].startswith("#")  # a vocabulary that is not OpenAI's


def test_a_tower_without_projection_reads_out_its_normed_stream():
    params = random_params(width=128, layers=2, vocabulary=99, context=20)
    del params["text_projection"]
    params = minclip.Params(params, activation="gelu", heads=2)
    tokens = random_tokens([5, 9], context=20, vocabulary=99)
    data = data_of(minclip.show(params, tokens))
    pooled = minclip.normalize(minclip.trace(params, tokens)["pooled"])
    np.testing.assert_allclose(data["cosines"], pooled @ pooled.T, atol=1e-4)
    assert not data["model"]["projection"]


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text to show"):
        minclip.show(minclip.load(), np.zeros((0, 77), int))


def test_jupyter_shows_the_page_in_a_frame_of_its_own(page):
    frame = Tags(page._repr_html_())
    assert frame.tags == ["iframe"]


def test_the_command_writes_the_page(tmp_path, capsys):
    assert cli.main(["show", *TEXTS, "-o", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    assert data_of((tmp_path / "page.html").read_text("utf-8"))["all_texts"] == TEXTS


@pytest.fixture
def browser():
    with chromium() as started:
        yield started


@pytest.mark.browser
def test_in_a_browser_clicks_show_the_right_numbers_and_nothing_is_requested(page, browser, tmp_path):
    path = tmp_path / "page.html"
    page.save(path)
    tab, complaints, requests = browser.new_page(viewport={"width": 1000, "height": 1400}), [], []
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    traced = minclip.trace(minclip.load(), minclip.tokenize(TEXTS[0])[:, :9])

    def shares(side):
        rows = tab.locator(f"#{side} li[data-position]").all()
        return {
            int(row.get_attribute("data-position")): [
                float(row.locator(part).inner_text()) for part in (".weight", ".share")
            ]
            for row in rows
        }

    for block, head, word in ((0, 0, 8), (2, 1, 3), (3, 0, 7)):
        tab.locator("#block").fill(str(block))
        tab.locator(f"[data-head='{head}']").click()
        tab.locator(f"[data-key='word {word}']").click()
        weights = traced[f"transformer.resblocks.{block}.attn.weights"][0, head]
        lengths = np.linalg.norm(traced[f"transformer.resblocks.{block}.attn.v"][0, head], axis=-1)
        parts = weights * lengths / (weights @ lengths)[:, None]
        up, down = shares("attends"), shares("attended")
        assert sorted(up) == list(range(word + 1))
        assert sorted(down) == list(range(word, 9))
        for j, found in up.items():
            np.testing.assert_allclose(found, [weights[word, j], parts[word, j]], atol=2e-3)
        for i, found in down.items():
            np.testing.assert_allclose(found, [weights[i, word], parts[i, word]], atol=2e-3)
    tab.locator("[data-key='stage ln_2']").click()
    assert tab.locator("#stage-title").inner_text() == "transformer.resblocks.3.ln_2"
    shown = [float(number) for number in tab.locator("#numbers span").all_inner_texts()]
    np.testing.assert_allclose(shown, traced["transformer.resblocks.3.ln_2"][0, 7], atol=5e-3)
    tab.locator("[data-key='word 8']").click()
    tab.locator("[data-depth='0']").click()
    first = tab.locator("#nearest li").first.inner_text()
    data = data_of(page)
    index, cosine = data["texts"][0]["read_out"][0][8][0]
    assert data["labels"][index][1] in first
    assert f"{cosine:.3f}" in first
    assert "diverge at position 3" in tab.locator("#two-note").inner_text()
    assert complaints == []
    assert requests == [path.as_uri()]


@pytest.mark.browser
@pytest.mark.parametrize("width", [420, 1000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_page_fits_its_window_and_obeys_the_keyboard(page, browser, tmp_path, width, scheme):
    page.save(tmp_path / "page.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("#block").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#attention-title").inner_text() == "Attention in block 1"
    tab.locator("[data-key='word 2']").focus()
    tab.keyboard.press("Enter")
    assert "black" in tab.locator("#attends-title").inner_text()
    assert tab.evaluate("document.activeElement.dataset.key") == "word 2"


SIZES = dict(width=128, layers=2, embed=32, vocabulary=99, context=20)


@pytest.fixture(scope="module")
def comparison():
    params, tokens = random_params(**SIZES), random_tokens([5, 9, 20], context=20, vocabulary=99)
    port = minclip.trace(minclip.Params(params, activation="gelu", heads=2), tokens)
    port["ln_final"][1, 3, 7] = np.nan
    del port["transformer.resblocks.1.attn.masked"]
    return minclip.compare(minclip.trace(params, tokens), dict(port))


def test_the_page_of_a_comparison_holds_its_figures(comparison):
    data = data_of(compare_page(comparison))
    assert data["verdict"] == comparison.verdict
    assert data["first"] == "transformer.resblocks.0.mlp.gelu"
    assert set(data["order"]) - set(data["stages"]) == {"transformer.resblocks.1.attn.masked"}
    for name, stage in comparison.stages.items():
        shown = data["stages"][name]
        assert shown["state"] == stage.state
        assert float(shown["error"]) == pytest.approx(stage.error, rel=1e-4)
        a, b = comparison.pairs[name]
        histogram = shown["histogram"]
        assert sum(histogram["counts"]) + histogram["equal"] + histogram["other"] == np.size(a)
    name = data["first"]
    a, b = comparison.pairs[name]
    errors = np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)
    errors[~comparison.text] = 0
    text, position, error = data["stages"][name]["worst"][0]
    assert (text, position) == np.unravel_index(errors.argmax(), errors.shape)
    assert error == pytest.approx(errors.max(), rel=1e-4)
    assert data["stages"]["ln_final"]["worst"][0] == [1, 3, "inf"]
    assert data["stages"]["token_embedding"]["worst"] == []


def test_the_page_of_a_comparison_is_small_and_its_names_are_data(comparison):
    assert len(str(compare_page(comparison)).encode()) / len(comparison.stages) < 2000
    params, tokens = random_params(**SIZES), random_tokens([5], context=20, vocabulary=99)
    traced = minclip.trace(params, tokens)
    page = compare_page(minclip.compare(traced, {**traced, HOSTILE: np.zeros((2, 2))}))
    assert Tags(str(page)).tags.count("script") == 2
    assert Tags(str(page)).open == []


@pytest.mark.browser
def test_in_a_browser_a_click_on_a_light_shows_its_stage(comparison, browser, tmp_path):
    path = tmp_path / "page.html"
    compare_page(comparison).save(path)
    tab, complaints, requests = browser.new_page(viewport={"width": 420, "height": 900}), [], []
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    assert tab.locator("#name").inner_text() == comparison.first
    tab.locator("[data-stage='transformer.resblocks.1.mlp']").click()
    assert tab.locator("#name").inner_text() == "transformer.resblocks.1.mlp"
    assert "inherits an error" in tab.locator("#facts").inner_text()
    tab.locator("[data-stage='transformer.resblocks.1.attn.masked']").click()
    assert "is not in the port" in tab.locator("#facts").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420
    assert complaints == []
    assert requests == [path.as_uri()]
