"""The operator's page as a person meets it: empty, busy, among strangers' names, by keyboard, and with a thousand peers."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Open, picture
from crowd import Crowd
from lab import Lab
from playwright.sync_api import Browser, Page, expect

FILM = random.Random(3).randbytes(48 << 20)
# Markup, quotes, another direction, invisible characters, marks on marks, and nothing to break a line at.
HOSTILE = [
    "<img src=x onerror=broken.push(1)>.txt",
    "'\"><script>broken.push(2)<",
    "\u05e9\u05dc\u05d5\u05dd exe.\u05d2\u05e4\u05d2",
    "zero\u200dwidth\u00adname\U000e0041.bin",
    "\u017a" + "\u0301" * 90 + ".md",
    "x" * 200 + ".iso",
    "${7*7}{{7*7}}&lt;b&gt;%3Cb%3E.pdf",
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def empty() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def swarm(lab: Lab) -> Lab:
    """Three that have, four that want; slow enough to be watched."""
    for n in range(3):
        lab.peer(f"has{n}", {"models/llama-70b-q4.gguf": FILM, f"notes/day-{n}.txt": b"note %d" % n})
        lab.sprat(f"has{n}", "limit", "--upload", "400k")
    for n in range(4):
        lab.peer(f"wants{n}", {f"footage/reel-{n}.mov": FILM[: (n + 1) << 18]})
        lab.sprat(f"wants{n}", "limit", "--upload", "150k")
    return lab


@pytest.fixture
def downloads(swarm: Lab) -> Iterator[list[subprocess.Popen[bytes]]]:
    running = [swarm.get(f"wants{n}", "models/llama-70b-q4.gguf") for n in range(4)]
    yield running
    for get in running:
        get.kill()
        get.wait()


@pytest.fixture(scope="module")
def crowd() -> Iterator[Lab]:
    """A tracker with a thousand members, who offer a hundred thousand files."""
    with Lab() as lab, Crowd(lab.link(1000), 1000, 100_000, moving=160):
        yield lab


def accessible(page: Page) -> None:
    """axe-core finds nothing, contrast included."""
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []


def figure(page: Page, name: str) -> str:
    return page.locator(f"#g-{name}").inner_text()


def test_an_empty_network_says_what_to_do(empty: Lab, open_page: Open) -> None:
    for scheme in ("light", "dark"):
        page = open_page(empty.url, color_scheme=scheme)
        expect(page.locator("#swarm-empty")).to_contain_text("sprat join LINK")
        expect(page.locator("#files-empty")).to_contain_text("sprat share FOLDER")
        expect(page.locator("#g-health")).to_have_text("Good")
        accessible(page)
        picture(page, f"idle-{scheme}")
    empty.sprat("new", "join", empty.link())
    expect(page.locator("#members-table tbody tr")).to_have_count(1)
    expect(page.locator("#members-table tbody")).to_contain_text("not seen")
    expect(page.locator("#swarm-empty")).to_contain_text("Nobody is online")


def test_a_busy_swarm_is_drawn_while_it_moves(
    swarm: Lab, open_page: Open, downloads: list[subprocess.Popen[bytes]]
) -> None:
    page = open_page(swarm.url)
    page.evaluate("window.same = true")
    expect(page.locator("#transfers tr")).to_have_count(4)
    expect(page.locator("#transfers tr").first).to_contain_text("llama-70b-q4.gguf")
    expect(page.locator("#picture")).to_have_attribute("aria-label", re.compile("^4 transfers at .* between 7 peers"))
    expect(page.locator("#picture .flow").nth(11)).to_be_attached()
    expect(page.locator("#chart .curve")).to_be_attached()
    expect(page.locator("#g-rate")).to_have_text(re.compile(r"^[\d.]+ [KM]iB/s$"))
    bar = page.locator("#transfers tr").first.locator("td").nth(1)
    before = bar.inner_text()
    expect(bar).not_to_have_text(before)
    row = page.locator("#files-table tr", has_text="models/llama-70b-q4.gguf")
    expect(row).to_contain_text("3, 4 parts")
    expect(page.locator("#files-table tr", has_text="day-0")).to_contain_text("last copy")
    accessible(page)
    picture(page, "busy-light")
    dark = open_page(swarm.url, color_scheme="dark")
    expect(dark.locator("#transfers tr")).to_have_count(4)
    accessible(dark)
    picture(dark, "busy-dark")
    calm = open_page(swarm.url, reduced_motion="reduce")
    expect(calm.locator("#picture .flow").first).to_be_attached()
    assert calm.locator("#picture .run").evaluate_all("all => all.every(one => getComputedStyle(one).display === 'none')")
    for get in downloads:
        get.kill()
    expect(page.locator("#transfers-empty")).to_contain_text("Nothing moves now")
    assert page.evaluate("window.same"), "all of it without loading the page again"


def test_who_goes_is_seen_to_go(swarm: Lab, open_page: Open) -> None:
    page = open_page(swarm.url)
    expect(page.locator("#g-online")).to_have_text("7")
    peer_id = swarm.peer("guest", {"guest/only here.bin": b"guest"})
    expect(page.locator("#g-online")).to_have_text("8")
    swarm.sprat("tracker", "tracker", "revoke", peer_id)
    row = page.locator("#members-table tbody tr", has_text=peer_id)
    expect(row).to_contain_text("revoked")
    expect(page.locator("#g-online")).to_have_text("7")
    expect(page.locator("#files-table tbody")).not_to_contain_text("only here")


def test_hostile_names_are_text(swarm: Lab, open_page: Open) -> None:
    swarm.peer("stranger", {f"strange/{name}": name.encode() for name in HOSTILE})
    page = open_page(swarm.url)
    page.get_by_label("Search").first.fill("strange/")
    rows = page.locator("#files-table tbody tr")
    expect(rows).to_have_count(len(HOSTILE))
    shown = rows.locator("bdi").all_inner_texts()
    assert "strange/<img src=x onerror=broken.push(1)>.txt" in shown
    assert r"strange/zero\u{200d}width\u{ad}name\u{e0041}.bin" in shown
    assert page.locator("main img, main script, main iframe, main b b").count() == 0
    for at in range(len(HOSTILE)):
        rows.locator("button.open").nth(at).click()
    expect(page.locator(".opened")).to_have_count(len(HOSTILE))
    expect(page.locator(".opened").first).to_contain_text("Held by 1")
    wide = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(wide), "nothing pushes the page apart"
    tall = rows.filter(has_text="\u017a\u0301").first.evaluate("row => row.offsetHeight")
    assert tall < 60, "marks on marks stay in their row"
    accessible(page)


def test_everything_can_be_reached_by_keyboard(swarm: Lab, open_page: Open) -> None:
    page = open_page(swarm.url)
    focused = "() => document.activeElement.textContent.trim() || document.activeElement.name"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the figures"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate(focused))
        outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("() => document.activeElement === document.body"), page.evaluate(focused)
    assert {"text", "Size", "Copies", "As a table"} <= seen
    page.locator("#files-table button[data-sort=size]").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#files-table th[aria-sort]")).to_have_text("Size")
    expect(page.locator("#said")).to_have_text(re.compile(r"^\d+ files, page 1 of 1$"))
    page.locator("#files-table button.open").first.focus()
    page.keyboard.press("Space")
    expect(page.locator("#files-table button.open").first).to_have_attribute("aria-expanded", "true")
    for _ in range(2):
        with page.expect_response("**/api/files?*") as again:
            again.value.finished()
    assert page.evaluate("() => document.activeElement.className") == "open", "focus stays through updates"
    page.get_by_label("Dark").focus()
    page.keyboard.press("Space")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(13, 19, 20)"
    page.reload()
    page.wait_for_selector("#live[data-state=live]")
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark", "the choice is kept"
    page.get_by_label("System").check()
    assert page.evaluate("() => document.documentElement.dataset.theme") is None


def test_a_thousand_peers_and_a_hundred_thousand_files(crowd: Lab, open_page: Open) -> None:
    page = open_page(crowd.url)
    expect(page.locator("#g-online")).to_have_text("1,000")
    expect(page.locator("#g-bytes-more")).to_have_text("100,000 files, 100,000 contents")
    expect(page.locator("#g-rate-more")).to_have_text("160 transfers, 160 peers")
    expect(page.locator("#picture .node")).to_have_count(40)
    expect(page.locator("#picture")).to_contain_text("+120")
    expect(page.locator("#swarm-note")).to_have_text("160 moving, 840 quiet")
    picture(page, "crowd-light")
    search = page.locator("#files-form input")
    search.fill("SHARD-00043")
    expect(page.locator("#files-pager")).to_contain_text("of 100,000 files match")
    expect(page.locator("#files-table tbody tr").first).to_contain_text("shard-00043")
    search.fill("")
    page.locator("#files-form select").select_option("last")
    expect(page.locator("#files-table tbody tr").first).to_contain_text("last copy")
    page.locator("#files-form select").select_option("all")
    expect(page.locator("#files-pager")).not_to_contain_text("match")
    page.locator("#files-table button[data-sort=size]").click()
    page.locator("#files-table button[data-sort=size]").click()
    expect(page.locator("#files-table tbody tr").first).to_contain_text("4.0 GiB")
    page.locator("#files-pager input").fill("4000")
    page.locator("#files-pager input").press("Enter")
    expect(page.locator("#said")).to_have_text("100,000 files, page 4000 of 4,000")
    expect(page.locator("#files-table tbody tr")).to_have_count(25)
    expect(page.locator("#files-pager button").last).to_be_disabled()
    assert page.locator("*").count() < 5000, "what is not looked at is not in the page"
    accessible(page)
    dark = open_page(crowd.url, color_scheme="dark")
    expect(dark.locator("#picture .node")).to_have_count(40)
    picture(dark, "crowd-dark")


def test_the_page_that_was_asked_for_last_is_shown(crowd: Lab, open_page: Open) -> None:
    page = open_page(crowd.url)
    page.locator("#files-form select").select_option("last")
    expect(page.locator("#said")).to_have_text(re.compile("page 1 of"))
    # Before the table has begun to follow the choice.
    page.evaluate(
        """() => {
            const choice = document.querySelector('#files-form select');
            choice.value = 'all';
            choice.dispatchEvent(new Event('input', { bubbles: true }));
            const number = document.querySelector('#files-pager input');
            number.value = 4000;
            number.dispatchEvent(new Event('change'));
        }"""
    )
    expect(page.locator("#said")).to_have_text("100,000 files, page 4000 of 4,000")
    for _ in range(2):
        with page.expect_response("**/api/files?*") as again:
            again.value.finished()
    expect(page.locator("#said")).to_have_text("100,000 files, page 4000 of 4,000")


def test_a_tracker_that_is_gone_is_said_to_be_gone(browser: Browser) -> None:
    with Lab() as lab:
        page = browser.new_page()
        page.goto(lab.url)
        page.wait_for_selector("#live[data-state=live]")
        lab.kill("tracker")
        page.wait_for_selector("#live[data-state=lost]")
        expect(page.locator("#said")).to_have_text("The tracker does not answer")
        expect(page.locator("body")).to_have_class("stale")
        page.close()
