"""The console in a real browser, the system's Chromium: what operators do with it, by mouse, by keyboard, on a phone, in the dark.

Each page is looked over by axe (npm's axe-core). What is missing of the two is told when tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from console import OPERATOR_TOKEN, served
from console_flows import Flows
from databases import Databases

playwright_api = pytest.importorskip("playwright.sync_api", reason="no browser is driven: pip install playwright")
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright  # noqa: E402

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
AXE = Path(os.environ.get("AXE_CORE") or Path(__file__).parent.parent / "node_modules" / "axe-core" / "axe.min.js")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
LOOKED_OVER = (
    "rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})"
    ".then(found => found.violations.map(one => [one.id, one.nodes[0].html]))"
)
PHONE, DESK = {"width": 390, "height": 800}, {"width": 1280, "height": 900}
PLACES = (
    "/",
    "/workflows",
    "/waiting",
    "/due",
    "/dead-letters",
    "/dead-letters/retry",
    "/schedules",
    "/schedules/nightly",
)
PLACES = (*PLACES, "/limits", "/pauses", "/processes", "/cost", "/settings", "/login", "/nowhere")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
needs_axe = pytest.mark.skipif(
    not AXE.exists(), reason="no axe-core here: npm install axe-core, or name axe.min.js in AXE_CORE"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser. Of the module, not of the session: while Playwright runs, no other test of this thread may run an event loop."""
    with sync_playwright() as playwright:
        # Its own sandbox does not work as root; what it shows here is ours.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def flows(databases: Databases, template: str) -> Iterator[Flows]:
    """A database with a few of each."""
    name = databases.lend(template)
    made = Flows(databases.dsn(name))
    made.fill()
    yield made
    made.app.close()
    databases.take_back(name)


@pytest.fixture(scope="module")
def url(flows: Flows) -> Iterator[str]:
    """A console on it that wants a token."""
    with served(flows.app.client.dsn, operator_token=OPERATOR_TOKEN) as address:
        yield address


@pytest.fixture(scope="module")
def session(url: str, chromium: Browser) -> dict[str, object]:
    """The cookies of somebody who has logged in."""
    context = chromium.new_context(base_url=url)
    page = context.new_page()
    log_in(page, "/settings")
    state: dict[str, object] = context.storage_state()
    context.close()
    return state


Opened = Callable[..., Page]


@pytest.fixture
def opened(chromium: Browser, url: str, session: dict[str, object]) -> Iterator[Opened]:
    """``opened(path)``: a page of somebody who has logged in. None of them may have said that something is wrong.

    ``expecting``: what may be wrong all the same, as the browser tells it.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_(
        path: str,
        *,
        viewport: dict[str, int] = DESK,
        is_logged_in: bool = True,
        expecting: str = "404 (Not Found)",
        **options: object,
    ) -> Page:
        def note(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and expecting not in message.text:
                wrong.append(message.text)

        state = session if is_logged_in else None
        context = chromium.new_context(base_url=url, viewport=viewport, storage_state=state, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
        page.goto(path)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def log_in(page: Page, path: str) -> None:
    """By the form that the page leads to."""
    page.goto(path)
    page.get_by_label("Token").fill(OPERATOR_TOKEN)
    page.get_by_role("button", name="Log in").click()


def is_as_it_was(page: Page) -> bool:
    """Whether the page has not been loaded again since it was marked."""
    return bool(page.evaluate("window.marked === true"))


def width_at(page: Page, path: str) -> int:
    """How wide what is shown there is."""
    page.goto(path)
    return int(page.evaluate("document.documentElement.scrollWidth"))


def short_ids(page: Page) -> list[str]:
    """Of the workflows in its table."""
    return page.locator("main td a.id").all_inner_texts()


# Stories.


def test_somebody_logs_in_and_comes_to_what_they_asked_for(opened: Opened) -> None:
    page = opened("/workflows?status=stuck", is_logged_in=False, expecting="403 (Forbidden)")
    page.get_by_label("Token").fill("not the token of this console")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("opens nothing")
    page.get_by_label("Token").fill(OPERATOR_TOKEN)
    page.get_by_label("Your name").fill("Ada")
    page.get_by_role("button", name="Log in").click()
    expect(page).to_have_url(re.compile(r"/workflows\?status=stuck$"))
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    page.goto("/")
    expect(page.get_by_label("Token")).to_be_visible()


def test_a_workflow_that_is_started_appears_on_the_overview_by_itself(opened: Opened, flows: Flows) -> None:
    page = opened("/")
    expect(page.locator("[data-live-state]")).to_have_text("live")
    page.evaluate("window.marked = true")
    handle = flows.order.start({"id": 77})
    expect(page.locator("#newest")).to_contain_text(handle.id[:12], timeout=10_000)
    assert is_as_it_was(page)
    assert handle.id not in page.content()
    flows.run()


def test_a_workflow_is_found_looked_at_and_cancelled_by_whoever_says_so_twice(opened: Opened, flows: Flows) -> None:
    handle = flows.order.start({"id": 78, "password": "not for onlookers"}, attributes={"customer": "ada"})
    flows.run()
    page = opened("/workflows")
    page.get_by_label("Type").fill("order")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name=handle.id[:12]).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("order")
    expect(page.get_by_label("Input", exact=True).first).to_contain_text("•••")
    assert handle.id not in page.content()
    page.get_by_role("link", name="Cancel").click()
    assert handle.state().status == "running"  # a link only asks
    page.get_by_role("button", name="Cancel it").click()
    expect(page.get_by_role("status").first).to_contain_text("is asked to end")
    flows.run()
    page.reload()
    expect(page.locator("h1 .badge")).to_contain_text("cancelled")


def test_a_signal_is_sent_and_the_workflow_goes_on(opened: Opened, flows: Flows) -> None:
    handle = flows.order.start({"id": 79})
    flows.run()
    page = opened(f"/workflows/{handle.id[:12]}")
    page.get_by_role("link", name="Signal").click()
    page.get_by_label("Signal", exact=True).fill("approved")
    page.get_by_label("Payload").fill('{"limit": 500}')
    page.get_by_role("button", name="Send the signal").click()
    expect(page.get_by_role("status").first).to_contain_text("signal 'approved' is sent")
    flows.run()
    page.reload()
    expect(page.locator("h1 .badge")).to_contain_text("completed")
    assert handle.result()["said"] == {"limit": 500}


def test_dead_letters_are_taken_up_again_one_and_then_those_of_a_type(opened: Opened, flows: Flows) -> None:
    handles = flows.poison.start_many([f"vial {n}" for n in range(3)])
    flows.run()
    page = opened("/dead-letters")
    expect(page.get_by_text("<script>alert('in')</script> vial 1")).to_be_visible()
    page.get_by_role("link", name=handles[0].id[:12]).click()
    expect(page.get_by_label("Traceback")).to_contain_text("ValueError")
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("status").first).to_contain_text("goes on in step 'drink'")
    flows.mended = {f"vial {n}" for n in range(3)}
    flows.run()
    assert handles[0].result() == "it was water"
    page.goto("/dead-letters")
    page.get_by_label("Type").fill("poison")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name=re.compile("^Retry all")).click()
    page.get_by_role("button", name=re.compile("^Take [0-9]+ workflows up again$")).click()
    expect(page.get_by_role("status").first).to_contain_text("workflows go on")
    flows.run()
    assert [handle.state().status for handle in handles] == ["completed"] * 3


def test_a_limit_is_raised_and_what_waited_for_it_goes_on(opened: Opened, flows: Flows) -> None:
    flows.crawl.start("there")
    flows.run()
    page = opened("/limits")
    page.get_by_label("At once").fill("5")
    page.get_by_role("button", name="Set crawls").click()
    expect(page.get_by_role("status").first).to_contain_text("is set")
    flows.run()
    page.get_by_role("button", name=re.compile("^Reset crawls")).click()
    expect(page.get_by_role("status").first).to_contain_text("counts again as the code declares it")
    assert not flows.app.list("crawl", status="running")


# Everybody.


def test_the_theme_is_the_systems_until_somebody_switches_it_and_is_kept(opened: Opened) -> None:
    page = opened("/waiting", color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name=re.compile("^Theme: dark")).click()
    light = page.evaluate(ground)
    assert dark != light
    page.goto("/limits")
    assert page.evaluate(ground) == light
    page.get_by_role("button", name=re.compile("^Theme: light")).click()
    assert page.evaluate(ground) == dark


def test_on_a_phone_no_page_is_wider_than_the_screen(opened: Opened, flows: Flows) -> None:
    flows.poison.start("x" * 300)
    flows.run()
    page = opened("/dead-letters", viewport=PHONE)
    short = short_ids(page)[0]
    of_one = (f"/dead-letters/{short}", f"/workflows/{short}", f"/workflows/{short}/cancel")
    widths = {path: width_at(page, path) for path in (*PLACES, *of_one)}
    assert {path: width for path, width in widths.items() if width > PHONE["width"]} == {}


def test_the_keyboard_alone_leads_past_the_menu_to_a_row_and_into_it(opened: Opened, flows: Flows) -> None:
    page = opened("/workflows")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    first = page.locator("main td a.id").first
    for _ in range(80):
        page.keyboard.press("Tab")
        if first.evaluate("link => link === document.activeElement"):
            break
    expect(first).to_be_focused()
    assert first.evaluate("link => getComputedStyle(link).outlineStyle") == "solid"
    short = first.inner_text()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(f"/workflows/{short}$"))


def test_a_page_without_scripts_shows_the_same_and_does_the_same(opened: Opened, flows: Flows) -> None:
    handle = flows.order.start({"id": 80})
    flows.run()
    page = opened(f"/workflows/{handle.id[:12]}/pause", java_script_enabled=False)
    page.get_by_role("button", name="Pause it").click()
    expect(page.get_by_role("status").first).to_contain_text("is paused")
    page.goto("/")
    expect(page.locator("#newest")).to_contain_text(handle.id[:12])
    handle.resume()


@needs_axe
def test_axe_finds_nothing_on_any_page_in_light_and_no_faint_text_in_the_dark(opened: Opened, flows: Flows) -> None:
    flows.poison.start("for axe")
    handle = flows.family.start(2)
    flows.run()
    short = flows.app.list("poison", status="stuck", limit=1)[0].id
    page = opened("/", reduced_motion="reduce")  # no colour is on its way to another when it is looked at
    # By the debugger: the page's policy lets no script in that is not its own.
    page.add_init_script(path=AXE)
    found = []
    for path in (
        *PLACES,
        *(f"/workflows/{one}" for one in (short, handle.id[:12])),
        *(f"/workflows/{short}/{action}" for action in ("signal", "cancel")),
        f"/dead-letters/{short}",
        "/workflows?status=running&workflow=nobody",
    ):
        page.emulate_media(color_scheme="light")
        page.goto(path)
        for scheme, rules in (("light", RULES), ("dark", ["color-contrast"])):
            page.emulate_media(color_scheme=scheme)
            violations = page.evaluate(LOOKED_OVER, rules)
            found += [f"{path} ({scheme}): {rule}: {html}" for rule, html in violations]
    assert found == []


def test_a_script_that_got_into_a_page_would_not_run(opened: Opened) -> None:
    """Whatever is escaped: the policy is the second wall."""
    page = opened("/waiting", expecting="Executing inline script violates")
    refused = page.evaluate(
        "() => new Promise(done => { addEventListener('securitypolicyviolation', event => done(event.violatedDirective));"
        " const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        " document.body.append(script); setTimeout(() => done('nothing'), 3000) })"
    )
    assert refused.startswith("script-src")
    assert page.evaluate("window.ran") is None


def test_no_whole_id_is_in_any_page_of_a_busy_console(
    opened: Opened, flows: Flows, request: pytest.FixtureRequest
) -> None:
    with psycopg.connect(flows.app.client.dsn) as connection:
        known = {row[0] for row in connection.execute("select durable.hex(id) from durable.started")}
    page = opened("/")
    for path in PLACES:
        page.goto(path)
        text = page.content() + page.title() + page.url
        assert not known.intersection(re.findall("[0-9a-f]{32}", text)), path
