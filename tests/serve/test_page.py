"""The page, driven in Chromium: it streams, stops, thinks or not, and shows text as text."""

import shutil

import pytest
from running import LONGEST, running, until

for package in ("starlette", "uvicorn", "playwright"):
    pytest.importorskip(package, reason=f"{package} is not installed")
BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is on the PATH")]
QUESTION = "3*7+5-2*4+1*3"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as tools:
        made = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"],
                                     timeout=1000 * LONGEST)
        yield made
        made.close()


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made


@pytest.fixture
def page(browser, server):
    """The page, which asks nobody but its server, and complains of nothing."""
    context = browser.new_context(viewport=dict(width=1000, height=700))
    context.set_default_timeout(1000 * LONGEST)
    made, asked, said = context.new_page(), [], []
    made.on("request", lambda request: asked.append(request.url))
    made.on("console", lambda message: said.append(message.text))
    made.on("pageerror", lambda error: said.append(str(error)))
    made.goto(server.url)
    until(lambda: made.evaluate("model !== null"))
    yield made
    assert all(url.startswith((server.url, "data:")) for url in asked)
    # Chromium also tells of a request that was refused, as one of the tests wants.
    assert [line for line in said if "400 (Bad Request)" not in line] == []
    context.close()


def ask(page, text: str = QUESTION, wait: bool = True, **settings) -> None:
    """Ask a question by keyboard."""
    page.select_option("#thinking", settings.pop("thinking", ""))
    for name, value in (dict(temperature=0, max_tokens="") | settings).items():
        page.fill(f"#{name}", str(value))
    before = page.evaluate("messages.length")
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        until(lambda: page.evaluate(f"messages.length > {before} && reply.done && !abort"))


def test_a_question_is_answered_with_its_thought_folded(page):
    page.fill("#temperature", "0")  # of 300 sampled replies one had no thought
    page.locator("#questions button").first.click()
    until(lambda: page.evaluate("reply?.done === true"))
    assert page.locator(".message.user").count() == 1
    thought = page.locator("details.thought")
    thinking = page.evaluate("reply.thinking")
    assert not thought.evaluate("fold => fold.open")
    assert thought.locator("summary").inner_text() == f"Thought: {thinking} tokens"
    assert page.locator(".message.assistant > .text").inner_text().isdigit()
    assert "tokens/s" in page.locator(".stats").inner_text()
    until(lambda: "context" in page.locator("#state").inner_text())
    context = page.evaluate("reply.context")
    assert f"context {context} of 256 tokens, cache" in page.locator("#state").inner_text()


def test_it_streams_and_stops(page, server):
    with server.standing_after(6) as stands:
        ask(page, wait=False, thinking="high")
        until(lambda: page.evaluate("reply?.tokens === 6"))
        stands()
        assert page.locator("details.thought .text").inner_text() == "3*7=1+"
        assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
        [job] = filter(None, server.engine.batch.jobs)
        page.keyboard.press("Escape")
        until(lambda: page.evaluate("reply.done === true"))
        until(lambda: job.cancelled)
    server.ended()
    assert "stopped" in page.locator(".stats").last.inner_text()
    assert page.locator("#send").is_visible()
    ask(page)
    assert page.evaluate("reply.reason") == "stop"


def test_thinking_is_switched_and_a_reload_keeps_all(page):
    ask(page, thinking="none")
    assert page.locator("details.thought").count() == 0
    ask(page, thinking="high", max_tokens=4)
    assert page.evaluate("[reply.thought, reply.content, reply.reason]") == ["3*7=", "", "length"]
    assert "cut off" in page.locator(".stats").last.inner_text()
    ask(page, temperature=9)  # refused, with the field's name
    assert "temperature" in page.locator(".error").inner_text()
    before = page.locator("#messages").inner_text()
    page.reload()
    until(lambda: page.evaluate("model !== null"))
    assert page.locator("#messages").inner_text() == before
    page.click("#new")
    assert page.locator(".message").count() == 0
    assert page.locator("#questions button").count() == 4


def test_what_a_model_writes_is_only_text(page, server, monkeypatch):
    bad = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
    decode = server.served.tokenizer.decode_bytes
    monkeypatch.setattr(server.served.tokenizer, "decode_bytes", lambda ids: decode(ids).replace(
        b"=", bad.encode()), raising=False)
    ask(page, bad, thinking="none", max_tokens=5)
    assert page.locator(".message.user").inner_text() == bad
    ask(page, thinking="high", max_tokens=5)
    if not page.locator("details.thought").evaluate("fold => fold.open"):
        page.locator("details.thought summary").click()
    assert bad in page.locator("details.thought .text").inner_text()
    page.click("#tab-inside")
    page.locator(".token").nth(3).click()
    assert page.locator("#detail code").first.is_visible()
    assert page.evaluate("window.broken === undefined")
    assert page.locator("main img, main script").count() == 0


def test_the_second_tab_shows_tokens_and_experts(page):
    ask(page, thinking="high")
    page.focus("#tab-talk")
    page.keyboard.press("ArrowRight")
    assert page.locator("#inside").is_visible() and not page.locator("#talk").is_visible()
    tokens = page.locator(".token")
    written = page.evaluate("reply.thought + reply.content")
    assert "".join(tokens.all_inner_texts()) == written
    tokens.nth(2).click()
    detail = page.locator("#detail")
    assert "written" in detail.inner_text() and detail.locator("tr").count() == 5
    assert detail.locator(".experts span").count() == 8
    assert detail.locator(".experts .hit").count() == 2
    visits = page.locator("#loads .experts span").all_inner_texts()
    assert sum(map(int, visits)) == 2 * tokens.count()


def test_the_request_can_be_copied_and_runs(page, server):
    ask(page, "3*7'+5")
    page.click("#copy")
    curl = page.locator("#command").inner_text()
    assert "3*7'\\''+5" in curl and f"{server.url}/v1/chat/completions" in curl
    page.click("#as-python")
    python = page.locator("#command").inner_text()
    compile(python, "copied", "exec")
    page.click("#close")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=360, height=640))
    page.reload()
    until(lambda: page.evaluate("model !== null"))
    assert not page.locator("#thinking").is_visible()  # folded: a phone has no room for them
    page.click("#settings-box summary")
    ask(page, thinking="high")
    for tab in ("talk", "inside"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 30)"
    assert dark == (scheme == "dark")


def test_who_reads_further_up_is_left_there(page, server):
    page.set_viewport_size(dict(width=500, height=420))
    for _ in range(3):
        ask(page, thinking="none")
    top = "document.querySelector('main').scrollTop"
    assert page.evaluate(top) > 0  # the newest is in view
    with server.standing():
        ask(page, wait=False, thinking="high")
        until(lambda: page.evaluate("abort !== null && reply.tokens === 0"))
        assert page.get_attribute("#messages", "aria-busy") == "true"
        page.evaluate("document.querySelector('main').scrollTop = 0")
    until(lambda: page.evaluate("reply.done === true"))
    assert page.evaluate(top) == 0
    assert page.get_attribute("#messages", "aria-busy") == "false"


def test_a_thought_is_folded_by_keyboard_while_it_grows(page, server):
    with server.standing_after(3) as stands:
        ask(page, wait=False, thinking="high")
        until(lambda: page.evaluate("reply?.tokens === 3"))
        stands()
        page.locator("details.thought summary").last.focus()
        page.keyboard.press("Enter")
        server.still.set()
        until(lambda: page.evaluate("reply.done === true"))
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert not page.locator("details.thought").last.evaluate("fold => fold.open")


def test_a_stream_that_breaks_off_is_told(page):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream",
        body='data: {"choices": [{"index": 0, "delta": {"content": "4"}}]}\n\n'))
    ask(page)
    assert "broke off" in page.locator(".error").inner_text()
    assert page.locator(".message.assistant > .text").inner_text() == "4"


def test_a_key_is_asked_for_where_a_phone_shows_it(browser):
    with running(limits=dict(key="secret"), rows=1) as server:
        made = browser.new_page(viewport=dict(width=360, height=640))
        made.set_default_timeout(1000 * LONGEST)
        made.goto(server.url)
        until(lambda: made.locator("#key").is_visible())
        assert "API key" in made.locator("#hint").inner_text()
        assert made.evaluate("document.activeElement.id") == "key"
        made.keyboard.type("secret")
        made.keyboard.press("Tab")
        until(lambda: made.evaluate("model !== null"))
        assert made.locator("#hint").inner_text() == ""
        made.close()


def test_a_base_model_has_a_box(browser):
    with running("data/r1/base", rows=1) as server:
        made = browser.new_page()
        made.set_default_timeout(1000 * LONGEST)
        made.goto(server.url)
        until(lambda: made.evaluate("model !== null"))
        assert not made.locator("#question").is_visible()
        made.fill("#temperature", "0")
        made.fill("#box", "3*7")
        made.press("#box", "Control+Enter")
        until(lambda: made.evaluate("reply?.done === true && !abort"))
        assert made.evaluate("document.getElementById('box').readOnly") is False
        text = made.evaluate("reply.content")
        assert text and made.input_value("#box") == "3*7" + text
        made.close()
