"""The page in a real browser: it streams, shows deaths and recoveries, holds 1,000 requests, and can be read by everybody."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from scripts.tritonserver import TritonServer
from tests.tools import require_program
from tests.triton.asking import metrics, total, wait_until_nothing_is_held, worker_process

pytestmark = pytest.mark.triton

MODEL = "smollm2-135m-instruct"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CONFIG = """
workers:
  - {role: prefill, engine: fake}
  - {role: decode, engine: fake}
  - {role: decode, engine: fake}
  - {role: aggregated, engine: fake}
engine: {kv_pool_mib: 32, fake: {prefill_us_per_token: 100, step_us: 8000}}
"""
SOON_MS = 10_000
RESTART_MS = 60_000
WIDE, NARROW = (1280, 900), (390, 844)
Theme = Literal["light", "dark"]
Motion = Literal["reduce", "no-preference"]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = require_program("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[TritonServer]:
    config = tmp_path_factory.mktemp("page") / "page.yaml"
    config.write_text(CONFIG)
    with TritonServer(config) as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, server: TritonServer) -> Iterator[Open]:
    """Opens the page, and afterwards looks that it had no error and asked no other host."""
    pages: list[Page] = []
    errors: list[str] = []
    hosts: set[str] = set()

    def open_it(
        size: tuple[int, int] = WIDE, theme: Theme = "light", motion: Literal["reduce", "no-preference"] = "reduce"
    ) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=theme, reduced_motion=motion)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(_url(server))
        expect(page.locator("#status")).to_have_text("All up", timeout=RESTART_MS)
        return page

    yield open_it
    for page in pages:
        page.context.close()
    assert errors == []
    assert hosts <= {f"{server.host}:{server.openai_port}"}


def _url(server: TritonServer, path: str = "/") -> str:
    return f"http://{server.host}:{server.openai_port}{path}"


def _ask(server: TritonServer, prompt: str, **fields: Any) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, **fields}
    with urllib.request.urlopen(_url(server, "/v1/completions"), json.dumps(body).encode(), timeout=60) as response:
        response.read()


def _send(page: Page, text: str, tokens: int) -> Locator:
    """Ask in the chat; the answer's message."""
    before = page.locator(".message.assistant").count()
    page.fill("#max-tokens", str(tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return page.locator(".message.assistant").nth(before)


def _rows(page: Page) -> Locator:
    return page.locator(".request:not([hidden])")


# --- chat --------------------------------------------------------------------------------------------------------------


def test_an_answer_streams_in_and_is_explained(open_page: Open) -> None:
    page = open_page()
    answer = _send(page, "Tell me about rivers.", tokens=150).locator(".text")
    expect(answer).not_to_be_empty(timeout=SOON_MS)
    lengths = set()
    while page.locator(".message.assistant .under button").count() == 0:
        lengths.add(len(answer.inner_text()))
        page.wait_for_timeout(50)
    assert len(lengths) > 5, "it came piece by piece"
    told = page.locator(".message.assistant .under")
    expect(told).to_contain_text(re.compile(r"(remote|local|cached) \(.*TTFT .* KV "))
    told.get_by_role("button", name="Show").click()
    details = page.get_by_role("region", name="Details of the selected request")
    for word in ("queue", "decode", "TTFT", "150"):
        expect(details).to_contain_text(word)


def test_stop_ends_it_at_the_server(open_page: Open, server: TritonServer) -> None:
    page = open_page()
    before = total(metrics(server), "baton_requests_total", outcome="cancelled")
    answer = _send(page, "Go on for ever.", tokens=4000)
    expect(answer.locator(".text")).not_to_be_empty(timeout=SOON_MS)
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".under")).to_have_text("Stopped")
    wait_until_nothing_is_held(server, within_s=3)
    end = time.monotonic() + 3  # metrics follow a few times a second
    while total(metrics(server), "baton_requests_total", outcome="cancelled") != before + 1:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_error_is_said_where_the_answer_would_be(open_page: Open) -> None:
    page = open_page()
    answer = _send(page, "word " * 40_000, tokens=5)
    expect(answer.locator(".under.bad")).to_contain_text("the prompt has", timeout=SOON_MS)


def test_both_ways_are_compared(open_page: Open) -> None:
    page = open_page()
    page.get_by_text("Compare", exact=True).click()
    page.fill("#compare-tokens", "24")
    page.get_by_role("button", name="Run both").click()
    expect(page.locator("#verdict")).to_contain_text("Disaggregated: first token", timeout=30_000)
    ways = page.locator(".way")
    expect(ways).to_have_count(2)
    for index, route in enumerate(("remote", "aggregated")):
        expect(ways.nth(index).locator(".why")).to_contain_text(f"{route}: ")
        for figure in ways.nth(index).locator("dd").all_inner_texts():
            assert re.fullmatch(r"[\d.]+ (ms|s)", figure)
    texts = [ways.nth(index).locator(".text").inner_text() for index in range(2)]
    assert texts[0] == texts[1] != "", "the same prompt, greedy: the same answer"


# --- deaths ------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_turns_red_and_back(open_page: Open, server: TritonServer) -> None:
    page = open_page()
    card = page.locator('.card[data-worker="decode_1"]')
    expect(card.locator(".state")).to_have_text("up")
    worker_process(server, "decode_1").kill()
    expect(card).to_have_class(re.compile("down"), timeout=SOON_MS)
    expect(card.locator(".state")).to_have_text(re.compile(r"down for \d+ s"))
    expect(page.locator("#status")).to_have_text("decode_1 down")
    expect(card.locator(".state")).to_have_text("up", timeout=RESTART_MS)
    expect(page.locator("#status")).to_have_text("All up")


def test_a_killed_router_is_told_and_the_stream_goes_on(open_page: Open, server: TritonServer) -> None:
    page = open_page()
    answer = _send(page, "A long answer, please.", tokens=150)
    expect(answer.locator(".text")).not_to_be_empty(timeout=SOON_MS)
    worker_process(server, "router").kill()
    expect(page.locator("#status")).to_have_text("Router gone", timeout=SOON_MS)
    expect(page.get_by_role("alert").first).to_contain_text("being started again")
    expect(page.locator(".card .state").first).to_have_text("unknown")
    expect(page.locator("#status")).to_have_text("All up", timeout=RESTART_MS)
    expect(page.locator("#notice")).to_be_hidden()
    expect(answer.locator(".under button")).to_be_visible(timeout=30_000)


def test_a_killed_front_end_is_told_and_found_again(open_page: Open, server: TritonServer) -> None:
    page = open_page()
    seen = page.locator("#counts").inner_text()
    guardian = psutil.Process(server.pid).parent()
    assert guardian is not None
    (front_end,) = [child for child in guardian.children() if "router.http" in child.cmdline()]
    front_end.kill()
    expect(page.locator("#status")).to_have_text("Front end gone", timeout=SOON_MS)
    expect(page.locator("#counts")).to_have_text(seen, timeout=100)
    expect(page.locator("#status")).to_have_text("All up", timeout=RESTART_MS)
    answer = _send(page, "Are you there?", tokens=5)
    expect(answer.locator(".under button")).to_be_visible(timeout=SOON_MS)


# --- history -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(server: TritonServer) -> TritonServer:
    """The server with at least 1,000 requests behind it, since its router came up."""
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: _ask(server, f"Request number {number} of many"), range(1000)))
    return server


def test_a_thousand_requests_stay_smooth(history: TritonServer, open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#counts")).to_contain_text(re.compile(r"^(1,\d{3}|2,000) of "), timeout=SOON_MS)
    assert _rows(page).count() < 40, "only the rows that are seen exist"
    frames: list[float] = page.evaluate(
        """async () => {
          const list = document.querySelector("#list"), times = [];
          for (let step = 0; step < 60; step += 1) {
            const began = performance.now();
            list.scrollTop = (list.scrollHeight * step) / 60;
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            times.push(performance.now() - began);
          }
          return times;
        }"""
    )
    assert sorted(frames)[len(frames) // 2] < 70, f"two frames took {sorted(frames)[len(frames) // 2]:.0f} ms"
    oldest = _rows(page).last.get_attribute("aria-posinset")
    assert oldest is not None
    assert int(oldest) > 900
    began = time.monotonic()
    page.fill("#filter", "no such request anywhere")
    expect(page.locator("#list .none")).to_be_visible()
    page.fill("#filter", "decode ok")
    expect(_rows(page).first).to_be_visible()
    assert time.monotonic() - began < 3


def test_requests_are_filtered_and_looked_at_by_keyboard(history: TritonServer, open_page: Open) -> None:
    page = open_page()
    _ask(history, "something of its own", baton={"route": "aggregated"})
    page.fill("#filter", "aggregated as asked")
    expect(_rows(page).first).to_have_attribute("aria-label", re.compile("^aggregated, ok"))
    page.fill("#filter", "")
    page.select_option("#outcome", "failed")
    expect(page.locator("#list .none")).to_be_visible()
    page.select_option("#outcome", "")
    page.focus("#list")
    selected = page.locator('.request[aria-selected="true"]')
    page.keyboard.press("ArrowDown")
    expect(selected).to_have_attribute("aria-posinset", "1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    expect(page.locator("#list")).to_have_attribute("aria-activedescendant", re.compile("row-"))
    page.keyboard.press("End")
    last = selected.get_attribute("aria-posinset")
    assert last == selected.get_attribute("aria-setsize")
    expect(page.locator("#details")).to_contain_text("TTFT")
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()


def test_the_prefix_cache_is_shown(history: TritonServer, open_page: Open) -> None:
    for _ in range(3):
        _ask(history, "The same beginning, again and again, long enough for several blocks of tokens. " * 3)
    page = open_page()
    cache = page.locator("#cache")
    expect(cache.locator(".sources")).to_contain_text(re.compile(r"\d+% reused of [\d,]+ tokens"))
    expect(cache.locator("tbody tr").first).to_contain_text(re.compile(r"[0-9a-f]{8}"))
    expect(cache.locator("#cache-sum")).to_contain_text("in the router's index")


# --- for everybody -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_keeps_anybody_out(
    history: TritonServer, open_page: Open, theme: Theme, size: tuple[int, int], tmp_path: Path
) -> None:
    """axe finds nothing to complain about (names, roles, contrast), and nothing is wider than the window."""
    page = open_page(size, theme)
    answer = _send(page, "Say something short.", tokens=8)
    answer.get_by_role("button", name="Show").click(timeout=SOON_MS)
    expect(page.locator("#details")).to_be_visible()
    expect(page.locator("#cache tbody tr").first).to_be_attached(timeout=SOON_MS)
    _look(page, tmp_path / "chat.png", size)
    page.get_by_text("Compare", exact=True).click()
    page.fill("#compare-tokens", "6")
    page.get_by_role("button", name="Run both").click()
    expect(page.locator("#verdict")).not_to_be_empty(timeout=30_000)
    _look(page, tmp_path / "compare.png", size)


def _look(page: Page, picture: Path, size: tuple[int, int]) -> None:
    page.screenshot(path=picture, full_page=True)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_alarm_colours_have_contrast_too(open_page: Open, server: TritonServer) -> None:
    for theme in ("light", "dark"):
        page = open_page(WIDE, theme)
        worker_process(server, "decode_1").kill()
        expect(page.locator(".card.down")).to_be_visible(timeout=SOON_MS)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        expect(page.locator(".card.down")).to_have_count(0, timeout=RESTART_MS)


def test_the_theme_can_be_chosen_and_stays(open_page: Open) -> None:
    page = open_page(WIDE, "light")
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    button = page.get_by_role("button", name=re.compile("^Theme"))
    button.click()
    expect(button).to_have_accessible_name("Theme: light")
    button.click()
    expect(button).to_have_accessible_name("Theme: dark")
    dark = page.evaluate(back)
    assert dark != light
    page.reload()
    assert page.evaluate(back) == dark


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_for_who_does_not_want_it(open_page: Open, motion: Motion) -> None:
    page = open_page(motion=motion)
    answer = _send(page, "Go on for a while.", tokens=300).locator(".text")
    expect(answer).not_to_be_empty(timeout=SOON_MS)
    animation = answer.evaluate("element => getComputedStyle(element, '::after').animationName")
    assert animation == ("none" if motion == "reduce" else "blink")
    page.get_by_role("button", name="Stop").click()


def test_a_key_is_asked_for_where_one_is_needed(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha\n")
    config = tmp_path / "guarded.yaml"
    config.write_text(f"workers: [{{role: aggregated, engine: fake}}]\nhttp: {{api_keys_file: {tmp_path}/keys}}\n")
    with TritonServer(config) as server:
        for path in ("/baton/events", "/baton/requests/latest"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(_url(server, path), timeout=10)
            assert refused.value.code == 401
            refused.value.close()
        page = browser.new_page()
        page.goto(_url(server))
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible(timeout=SOON_MS)
        dialog.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_be_visible(timeout=SOON_MS)
        dialog.get_by_label("API key").fill("alpha")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("All up", timeout=SOON_MS)
        answer = _send(page, "Hello", tokens=3)
        expect(answer.locator(".under")).to_contain_text("aggregated", timeout=SOON_MS)
        page.close()
