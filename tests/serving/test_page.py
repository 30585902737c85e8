"""The chat page in real Chromium: asking, comparing, looking, two languages, a phone's size."""

import base64
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import chiasm
import tiny

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOTS = os.environ.get("CHIASM_SCREENSHOTS")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; a request that leaves the server, or an error in the page, fails the test."""
    contexts, wrong = [], []

    def visit(address: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "locale": "en-GB", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: wrong.append(request.url) if not _own(request.url, address) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def _own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    tiny.picture().resize((300, 400)).save(path)
    return path


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def ask(page: Any, text: str, picture: Path | None = None, length: int = 24) -> None:
    page.evaluate(f"document.getElementById('length').value = {length}")
    if picture is not None:
        page.set_input_files("#file", picture)
        page.wait_for_selector("#pictures img")
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page: Any, count: int) -> list[str]:
    page.locator(".answer[aria-busy=false]").nth(count - 1).wait_for()
    return page.locator(".answer .text").all_inner_texts()


def test_a_question_its_answer_and_where_it_looked(
    address: Callable[..., str], visit: Callable[..., Any], picture: Path
) -> None:
    page = visit(address())
    shoot(page, "fresh")
    ask(page, "What is it?", picture)
    (text,) = answered(page, 1)
    assert text.strip()
    assert "token" in page.inner_text(".answer .note")
    page.click(".look")
    page.wait_for_selector(".seen canvas")
    words = page.locator(".answer .word")
    assert words.count() > 0
    words.last.click()
    assert words.last.get_attribute("aria-pressed") == "true"
    assert words.last.inner_text() in (page.get_attribute(".seen canvas", "aria-label") or "")
    assert page.locator(".seen canvas").evaluate(COLOURS) > 10
    shoot(page, "looked")
    ask(page, "Really?")
    assert len(answered(page, 2)) == 2
    assert page.locator(".turn .shown img").count() == 1
    page.click("#new")
    assert page.is_visible("#empty") and page.locator(".turn").count() == 0


def test_two_models_side_by_side(
    address: Callable[..., str], visit: Callable[..., Any], vlm: chiasm.VLM, chat_model: Any, picture: Path
) -> None:
    other = chiasm.connect(tiny.vision(seed=3), tiny.language(seed=4), tokenizer=tiny.tokenizer())
    page = visit(address(chat_model("mlp"), chat_model("q-former", other)))
    page.click("#compare")
    ask(page, "Which is it?", picture)
    answered(page, 2)
    assert page.locator(".answer h3").all_inner_texts() == ["mlp", "q-former"]
    own = [model.chat(picture, "Which is it?", max_new_tokens=24) for model in (vlm, other)]
    assert page.locator(".answer .text").all_text_contents() == own and own[0] != own[1]
    left, right = (page.locator(".answer").nth(n).bounding_box() for n in range(2))
    assert left["y"] == right["y"] and right["x"] > left["x"] + left["width"] - 1
    shoot(page, "compared")


def other(connector: str = "qformer", language: str = "llama", **options: Any) -> chiasm.VLM:
    parts = (tiny.vision(seed=3), tiny.language(language, seed=4))
    return chiasm.connect(*parts, connector=tiny.connector(connector, **options), tokenizer=tiny.tokenizer())


def look(page: Any, place: int, press: str) -> Any:
    """Opens the overlay of an answer, and gives its card."""
    card = page.locator(".answer").nth(place)
    getattr(card.locator(".look"), press)()
    card.locator(".seen canvas").wait_for()
    return card


@pytest.mark.parametrize(("name", "press", "options"), [("desktop", "click", {}), ("phone", "tap", PHONE)])
def test_where_both_models_looked(
    address: Callable[..., str],
    visit: Callable[..., Any],
    chat_model: Any,
    picture: Path,
    name: str,
    press: str,
    options: dict[str, Any],
) -> None:
    """An MLP has a map of its own patches, a Q-Former one through its queries: both are shown, each to its words."""
    page = visit(address(chat_model("mlp"), chat_model("q-former", other())), **options)
    getattr(page.locator("#compare"), press)()
    ask(page, "Which is it?", picture)
    answered(page, 2)
    cards = [look(page, place, press) for place in range(2)]
    for card in cards:
        assert card.locator("canvas").evaluate(COLOURS) > 10
        getattr(card.locator(".word").last, press)()
        word = card.locator(".word").last
        assert word.get_attribute("aria-pressed") == "true" and card.locator("[aria-pressed=true]").count() == 1
        assert word.inner_text().strip() in (card.locator("canvas").get_attribute("aria-label") or "")
        assert card.locator("canvas").evaluate(LIGHT) > 60 and card.locator(".even").is_visible()  # as chance has it
    captions = [card.locator("figcaption").inner_text() for card in cards]
    assert "queries" not in captions[0] and "queries" in captions[1]
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [card.locator("canvas").bounding_box() for card in cards]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 150 for box in boxes)
    shoot(page, f"looked-{name}")
    page.evaluate("document.getElementById('language').click()")
    assert "쿼리" in cards[1].locator("figcaption").inner_text()
    getattr(cards[0].locator(".look"), press)()
    assert not cards[0].locator("canvas").is_visible() and cards[1].locator("canvas").is_visible()
    assert cards[0].locator(".word:enabled").count() == 0 < cards[1].locator(".word:enabled").count()


def test_a_model_that_cannot_say_where_it_looked(
    address: Callable[..., str], visit: Callable[..., Any], chat_model: Any, picture: Path
) -> None:
    page = visit(address(chat_model("mlp"), chat_model("t5", other("mlp", "t5"))))
    page.click("#compare")
    ask(page, "Which is it?", picture)
    answered(page, 2)
    cards = page.locator(".answer")
    cards.nth(1).locator(".look").click()
    playwright.expect(cards.nth(1).locator(".note")).to_contain_text("not known where it looked")
    assert "token" in cards.nth(1).locator(".note").inner_text() and not cards.nth(1).locator(".look").is_visible()
    assert look(page, 0, "click").locator("canvas").evaluate(COLOURS) > 10
    shoot(page, "unseen")


def test_words_behind_characters_of_two_units(
    address: Callable[..., str], visit: Callable[..., Any], picture: Path
) -> None:
    """JavaScript counts an emoji twice, the server once."""
    page = visit(address())
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    assert page.evaluate(LOOK, url) == ["🐱🐶", "a", "cat", "🦊", "dog"]


def test_a_phone_in_korean(
    address: Callable[..., str], visit: Callable[..., Any], chat_model: Any, picture: Path
) -> None:
    page = visit(address(chat_model("mlp"), chat_model("q-former")), locale="ko-KR", color_scheme="dark", **PHONE)
    assert page.inner_text("#empty h2") == "사진에 대해 물어보세요" and page.get_attribute("html", "lang") == "ko"
    shoot(page, "phone-fresh")
    page.evaluate("document.getElementById('length').value = 24")
    page.tap("#compare")
    page.set_input_files("#file", picture)
    page.wait_for_selector("#pictures img")
    page.fill("#question", "이게 뭐예요?")
    page.tap("#send")
    answered(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    top, bottom = (page.locator(".answer").nth(n).bounding_box() for n in range(2))
    assert bottom["y"] > top["y"]
    for button in page.locator("header button:visible, #ask button:visible").all():
        box = button.bounding_box()
        assert box["height"] >= 40 and box["x"] >= 0 and box["x"] + box["width"] <= 390
    shoot(page, "phone")
    page.tap("#language")
    assert page.get_attribute("#question", "placeholder") == "Ask about the picture…"


def test_a_composed_letter_does_not_send(address: Callable[..., str], visit: Callable[..., Any]) -> None:
    page = visit(address())
    page.fill("#question", "안녕")
    page.evaluate(
        "document.getElementById('question').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.locator(".turn").count() == 0 and page.input_value("#question") == "안녕"


def test_dropping_stopping_and_removing(address: Callable[..., str], visit: Callable[..., Any], metronome: Any) -> None:
    metronome.engine.seconds = 0.02
    page = visit(address(metronome))
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 3000, height: 900});
            const blob = await new Promise((done) => canvas.toBlob(done));
            const data = new DataTransfer();
            data.items.add(new File([blob], 'wide.png', {type: 'image/png'}));
            data.items.add(new File(['<svg/>'], 'no.txt', {type: 'text/plain'}));
            for (const kind of ['dragenter', 'drop']) {
                document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
            }
        }"""
    )
    page.wait_for_selector("#pictures img")
    page.wait_for_selector("#pictures .wrong")
    size = page.evaluate(
        "(() => { const i = document.querySelector('#pictures img'); return [i.naturalWidth, i.naturalHeight]; })()"
    )
    assert size == [2048, 614]
    page.click("#pictures button")
    assert page.locator("#pictures img").count() == 0
    ask(page, "Count", length=4000)
    playwright.expect(page.locator(".answer .text")).to_contain_text("aaaaa")
    page.click("#stop")
    answered(page, 1)
    assert page.inner_text(".answer .note") == "stopped" and page.is_visible("#send")
    page.wait_for_timeout(300)
    assert metronome.engine.stats().running == 0


def test_a_new_conversation_while_an_answer_is_written(
    address: Callable[..., str], visit: Callable[..., Any], metronome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, submit = [], metronome.engine.submit_all

    def submit_all(messages: list[Any], *rest: Any) -> Any:
        asked.append([message["role"] for message in messages])
        return submit(messages, *rest)

    monkeypatch.setattr(metronome.engine, "submit_all", submit_all)
    metronome.engine.seconds = 0.02
    page = visit(address(metronome))
    ask(page, "A secret", length=4000)
    playwright.expect(page.locator(".answer .text")).to_contain_text("aaaaa")
    page.click("#new")
    ask(page, "First", length=5)
    answered(page, 1)
    ask(page, "Second", length=5)
    answered(page, 2)
    assert asked == [["user"], ["user"], ["user", "assistant", "user"]] and page.is_visible("#send")


def test_a_key_is_asked_for(address: Callable[..., str], visit: Callable[..., Any]) -> None:
    page = visit(address(api_keys=("secret",)))
    page.wait_for_selector("#settings[open]")
    page.fill("#key", "secret")
    page.click("#settings .primary")
    playwright.expect(page.locator("#model-0")).to_have_value("tiny")
    ask(page, "Hello")
    assert re.search(r"\S", answered(page, 1)[0])


def test_everything_has_a_name(address: Callable[..., str], visit: Callable[..., Any]) -> None:
    page = visit(address())
    assert page.evaluate(UNNAMED) == []
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        assert page.evaluate(CONTRAST) == []


COLOURS = """(canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
LIGHT = """(canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.reduce((sum, value, place) => sum + (place % 4 < 3 ? value : 0), 0) / (data.length * 3 / 4);
}"""
LOOK = """async (url) => {
  const { look } = await import('./look.js');
  const card = document.getElementById('answer').content.cloneNode(true).firstElementChild;
  document.getElementById('turns').append(card);
  const content = [{ type: 'image_url', image_url: { url } }, { type: 'text', text: 'What?' }];
  const messages = [{ role: 'user', content }, { role: 'assistant', content: '🐱🐶 a cat 🦊 dog' }];
  await look(card, { model: 'tiny', messages }, '');
  return [...card.querySelectorAll('.word')].map((one) => one.textContent);
}"""
CONTRAST = """(() => {
  const linear = (v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => linear(Number(v)));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const contrast = (node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  return [...document.querySelectorAll('h1, h2, p, button, select, label, textarea')]
    .filter((node) => node.checkVisibility() && node.textContent.trim() && contrast(node) < 4.5)
    .map((node) => node.outerHTML.slice(0, 90));
})()"""
UNNAMED = """[...document.querySelectorAll('button, select, textarea, input:not([hidden])')]
  .filter((node) => !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length))
  .map((node) => node.outerHTML)"""
