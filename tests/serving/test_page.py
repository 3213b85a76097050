"""The page of `serve`, in a browser: one question at a time, whose answers belong to the conversation that asked.

Answers are made up here; scripts/check_page.py asks a real model.
"""

import hashlib
import json
from pathlib import Path

import httpx
import pytest
from helpers.adapters import random_adapter
from helpers.browser import BROWSER, Page
from helpers.serving import running

from mlx_adapters.generation.live import load_model
from mlx_adapters.serving.app import PAGE, POLICY
from mlx_adapters.sources.registry import register

FAKE = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(tmp_path_factory.mktemp("page-home")))
        model = load_model(tiny_model("llama"))
        for i, name in enumerate(("one", "two")):
            register(random_adapter(model, seed=i + 1), name)
        with running(tiny_model("llama"), [("one", "one"), ("two", "two")]) as (address, _):
            yield address


def test_vendored_files_are_the_published_ones():
    told = json.loads((PAGE / "vendor" / "vendor.json").read_text())
    assert {one["file"] for one in told} == {path.name for path in (PAGE / "vendor").glob("*.js")}
    for one in told:
        assert hashlib.sha256((PAGE / "vendor" / one["file"]).read_bytes()).hexdigest() == one["sha256"]
        assert one["version"] in (PAGE / "vendor" / one["file"]).read_text()[:400]
        assert (PAGE / "vendor" / one["file"]).with_suffix(".LICENSE").exists()


def test_the_page_and_its_files(server):
    page = httpx.get(server + "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"] == POLICY and "unsafe" not in POLICY and "http" not in POLICY
    for path in sorted(PAGE.rglob("*.*")):
        there = f"{server}/page/{path.relative_to(PAGE)}"
        answer = httpx.get(there)
        assert answer.content == path.read_bytes() and answer.headers["cache-control"] == "no-cache"
        again = httpx.get(there, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and again.headers["cache-control"] == "no-cache"
    assert httpx.get(server + "/page/../app.py").status_code == 404
    assert httpx.get(server + "/page/%2e%2e/app.py").status_code == 404


if BROWSER:

    @pytest.fixture(scope="module")
    def browser():
        with Page() as page:
            yield page

    @pytest.fixture
    def page(browser, server):
        """The page as somebody sees it who has never been there."""
        kept = True
        while kept:  # what a page keeps as it is left may come after it was cleared
            browser.open("about:blank")
            browser.call("Storage.clearDataForOrigin", origin=server, storageTypes="local_storage")
            browser.open(server + "/")
            browser.until("document.querySelectorAll('.pane').length === 2")
            kept = browser.evaluate("document.querySelectorAll('#history li').length > 0")
        browser.evaluate(FAKE)
        browser.complaints.clear()
        yield browser
        assert browser.complaints == []

    def ask(page, text):
        page.evaluate("document.getElementById('text').focus()")
        page.write(text)
        page.press("Enter")

    def answered(page, text, first=0):
        page.evaluate(f"answer(asked.slice({first}), {json.dumps(text)})")
        page.until("!busy()")

    def sent(page, index):
        return [message["content"] for message in page.evaluate(f"asked[{index}].messages")]

    def test_enter_waits_as_send_does_and_a_composed_word_is_not_sent(page):
        ask(page, "one")
        ask(page, "two")  # it has to wait, and is not lost
        assert page.evaluate("[asked.length, document.getElementById('text').value]") == [2, "two"]
        assert [one["model"] for one in page.evaluate("asked")] == ["base", "one"]
        answered(page, "first")
        page.press("Enter", windowsVirtualKeyCode=229)  # it ends a word in an input method
        assert page.evaluate("asked.length") == 2
        page.press("Enter")
        assert sent(page, 2) == ["one", "first", "two"] == sent(page, 3)
        assert page.evaluate("texts('.said')") == ["one", "two"]

    def test_a_new_conversation_ends_the_answer_and_keeps_it_out(page):
        ask(page, "one")
        page.evaluate("asked[0].say('half')")
        page.until("texts('.text')[0] === 'half'")
        page.evaluate("document.getElementById('new').click()")
        assert page.evaluate("[asked[0].ended, asked[1].ended, busy()]") == [True, True, False]
        page.evaluate("answer(asked, 'late')")
        ask(page, "two")
        assert sent(page, 2) == ["two"]
        answered(page, "fresh", 2)
        assert page.evaluate("texts('.text')") == ["fresh", "fresh"]
        assert page.evaluate("texts('#history li button:first-child')") == ["two", "one"]

    def test_a_lost_or_refused_answer_is_none_and_a_stopped_one_counts(page):
        ask(page, "one")
        page.evaluate("asked[0].say('cut'), asked[0].lose(), answer([asked[1]], 'whole')")
        page.until("!busy()")
        assert page.evaluate("texts('.error')") == ["The connection was lost.", ""]
        ask(page, "two")
        assert sent(page, 2) == ["two"] and sent(page, 3) == ["one", "whole", "two"]
        page.evaluate("asked[2].say('half'), answer([asked[3]], 'whole')")
        page.until("texts('.text').at(-2) === 'half'")
        page.press("Escape")
        page.until("!busy()")
        assert page.evaluate("texts('.answer header em')")[-2:] == ["stopped", ""]
        page.evaluate("window.refusal = new Response('<h1>Bad gateway</h1>', {status: 502, statusText: 'Bad Gateway'})")
        ask(page, "three")
        page.until("!busy()")
        assert sent(page, 4) == ["two", "half", "three"]
        assert "502 Bad Gateway" in page.evaluate("texts('.error')")

    def test_events_come_in_any_pieces_with_comments_between_them(page):
        ask(page, "one")
        page.evaluate("""(() => {
            const chunk = JSON.stringify({choices: [{delta: {content: "日本 ü"}}]}), alive = ": keep-alive\\n\\n";
            const text = `${alive}data: ${chunk}\\n\\n${alive}`;
            for (const byte of new TextEncoder().encode(text)) asked[0].bytes(new Uint8Array([byte]));
            asked[0].end("length"), answer([asked[1]], "");
        })()""")
        page.until("!busy()")
        assert page.evaluate("texts('.text')") == ["日本 ü", ""]
        assert page.evaluate("texts('.answer header em')") == ["stopped at the most tokens", ""]
        assert page.evaluate("texts('.figures')[0]").startswith("3 tokens")

    def test_a_question_is_edited_and_asked_again(page):
        for text in ("one", "two"):
            ask(page, text)
            answered(page, f"to {text}", -2)
        page.press("ArrowUp")
        page.evaluate("document.activeElement.value = ''")
        page.write("other")
        page.press("Enter")
        assert sent(page, 4) == ["one", "to one", "other"]
        answered(page, "to other", 4)
        assert page.evaluate("texts('.said')") == ["one", "other"]
        page.evaluate("press('Again')")
        assert page.evaluate("asked.length") == 7 and sent(page, 6) == ["one", "to one", "other"]
        answered(page, "better", 6)
        assert page.evaluate("texts('.text')")[-2:] == ["to other", "better"]

    def test_conversations_and_settings_stay_in_the_browser_and_the_key_does_not(page, server):
        for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("key", "secret-secret-secret")):
            page.evaluate(f"""(() => {{ const found = document.getElementById('{name}'); found.value = '{value}';
                for (const kind of ['input', 'change']) found.dispatchEvent(new Event(kind)); }})()""")
        ask(page, "one")
        assert page.evaluate("[asked[0].temperature, asked[0].key]") == [0.5, "Bearer secret-secret-secret"]
        answered(page, "**kept**")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.open(server + "/#ask=Why%3F")  # a link fills the box, and burns nothing
        page.evaluate(FAKE)
        assert page.evaluate("[document.getElementById('text').value, asked.length]") == ["Why?", 0]
        assert page.evaluate("document.getElementById('key').value") == ""
        page.evaluate("document.querySelector('#history button').click()")
        assert page.evaluate("[texts('.said'), texts('.text'), document.title]") == [["one"], ["kept"] * 2, "one"]
        page.press("Enter")
        assert sent(page, 0) == ["Be brief.", "one", "**kept**", "Why?"]
        page.evaluate("document.querySelector('#history button.quiet').click()")
        page.evaluate("document.querySelector('#history button.quiet').click()")
        assert page.evaluate("[asked[0].ended, Object.keys(localStorage)]") == [True, ["mlx_adapters.settings"]]

    def test_a_closed_window_keeps_what_was_written_and_strange_entries_are_left_alone(page, server):
        ask(page, "one")
        page.evaluate("asked[0].say('half'), Object.assign(localStorage, {'mlx_adapters.talk.x': '{\"turns\": [1]}'})")
        page.until("texts('.text')[0] === 'half'")
        page.open(server + "/#ask=%E0%A4%A")
        page.evaluate(FAKE)
        assert page.evaluate("texts('#history li button:first-child')") == ["one"]
        page.evaluate("document.querySelector('#history button').click()")
        assert page.evaluate("[texts('.text')[0], texts('.answer header em')]") == ["half", ["stopped"] * 2]
        assert page.evaluate("localStorage['mlx_adapters.talk.x']") == '{"turns": [1]}'

    def test_a_full_browser_loses_no_conversation_and_says_so(page):
        ask(page, "one")
        answered(page, "kept")
        page.evaluate("""(() => {
            let size = 1 << 22;  // until not even a character fits
            for (let name = 0; size >= 1; name++)
                try { localStorage["filled" + name] = "x".repeat(size); } catch { size >>= 1; }
        })()""")
        ask(page, "two")
        answered(page, "written", 2)
        assert "no room" in page.evaluate("document.getElementById('notice').innerText")
        assert page.evaluate("texts('.text')")[-1] == "written"
        stored = page.evaluate(
            "Object.keys(localStorage).filter(name => name.startsWith('mlx_adapters.talk')).map("
            "name => JSON.parse(localStorage[name]).turns.length)"
        )
        assert stored == [1]

    def test_what_a_model_writes_is_shown_and_nothing_of_it_is_run_or_loaded(page):
        ask(page, "one")
        hostile = [
            "<img src=x onerror='document.title = 1'><script>document.title = 1</script>",
            "[a](javascript:document.title=1) [b](data:text/html,x) [c](//evil.example) [d](https://example.org/?q)",
            "![e](https://evil.example/x.png) <iframe src=https://evil.example></iframe>",
            "- [x] done\n\n| h |\n| - |\n| 1 |\n\n```py\n1 < 2\n```\n**bold**",
        ]
        answered(page, "\n\n".join(hostile))
        one = "document.querySelector('.text')"
        links = page.evaluate(
            f"[...{one}.querySelectorAll('a')].map(a => [a.innerText, a.getAttribute('href'), a.rel])"
        )
        rel = "noopener noreferrer"
        wanted = [["d", "https://example.org/?q", rel], ["e", "https://evil.example/x.png", rel]]
        assert [link for link in links if link[1]] == wanted
        assert page.evaluate(f"{one}.querySelectorAll('img, script, iframe, style, [onerror]').length") == 0
        assert page.evaluate(f"[...{one}.querySelectorAll('td, strong, pre')].map(x => x.innerText.trim())") == [
            "1",
            "1 < 2",
            "bold",
        ]
        shown = page.evaluate("texts('.text')[0]")
        assert "<script>document.title = 1</script>" in shown and "☑ done" in shown
        origins = page.evaluate("performance.getEntriesByType('resource').map(one => new URL(one.name).origin)")
        assert set(origins) == {page.evaluate("location.origin")} and page.evaluate("document.title") == "one"

    def test_up_to_four_models_side_by_side(page):
        ask(page, "one")
        answered(page, "first")
        for _ in range(2):
            page.evaluate("document.getElementById('compare').click()")
        assert page.evaluate("document.getElementById('compare').hidden")
        ask(page, "two")  # a model that comes later goes on from the first one's answers
        assert [one["model"] for one in page.evaluate("asked")][2:] == ["base", "one", "two", "base"]
        assert sent(page, 4) == ["one", "first", "two"]
        answered(page, "second", 2)
        page.evaluate("document.querySelector('.pane button').click()")
        ask(page, "three")
        assert [one["model"] for one in page.evaluate("asked")][6:] == ["one", "two", "base"]

    def test_tokens_are_colored_and_reasoning_is_apart(page):
        page.evaluate("document.getElementById('colors').click()")
        ask(page, "one")
        assert page.evaluate("[asked[0].logprobs, asked[0].top_logprobs]") == [True, 5]
        page.evaluate("""(() => {
            const token = (token, logprob) => ({token, logprob, top_logprobs: [{token: "x", logprob: -1}]});
            asked[0].think("Hm.", {logprobs: {content: [], reasoning_content: [token("Hm.", -1)]}});
            asked[0].say("a", {logprobs: {content: [token("a", -0.1)]}});
            asked[0].say("é!", {logprobs: {content: [token("\\ufffd", -1), token("\\ufffd", -1), token("!", 0)]}});
            asked[0].end();
            asked[1].end();
        })()""")
        page.until("!busy()")
        assert page.evaluate("texts('.tokens span')") == ["Hm.", "a", "é", "!"]
        assert page.evaluate("document.querySelectorAll('.tokens span')[1].title").startswith(
            '"a": 90.5 %\nlikeliest:\n36.8 %'
        )
        assert "perplexity" in page.evaluate("texts('.figures')[0]")
        page.evaluate("document.getElementById('colors').click()")
        assert page.evaluate("[document.querySelector('.tokens').hidden, texts('.text')[0]]") == [True, "aé!"]
        page.evaluate("document.querySelector('details').open = true")
        assert page.evaluate("texts('.thought')[0]") == "Hm."

    def test_it_fits_a_phone_and_a_wide_window(page, server):
        ask(page, "one " * 40)
        wide = "```\n" + "x" * 300 + "\n```\n\n|" + "column|" * 20 + "\n|" + "-|" * 20
        answered(page, wide + "\n\n" + "unbroken" * 40)
        for width in (390, 1200):
            for dark in (False, True):
                page.look(width, 800, dark)
                assert page.evaluate("document.documentElement.scrollWidth") == width
                edges = page.evaluate(
                    "[...document.querySelectorAll('.answer')].map(x => x.getBoundingClientRect().right)"
                )
                assert max(edges) <= width and (len(set(edges)) == 1) == (width == 390)  # below each other on a phone
        page.look(1200, 800)
