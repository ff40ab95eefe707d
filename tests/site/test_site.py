"""Opens the built book in a real browser: every page is whole, needs no other host and fits a phone."""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from playwright.sync_api import Browser, Page, Request, Route, sync_playwright

SITE = Path(__file__).parents[2] / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the book is not built; `make book` builds it"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; Debian's package is `chromium`"),
]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of a server on the loopback interface."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that was opened, and what happened meanwhile."""

    page: Page
    console: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


def open_page(browser: Browser, site: str, path: str) -> Visit:
    visit = Visit(browser.new_page(color_scheme="light"))

    def guard(route: Route, request: Request) -> None:
        if request.url.startswith((site, "data:", "blob:")):
            route.continue_()
        else:
            visit.elsewhere.append(request.url)
            route.abort()

    visit.page.route("**/*", guard)
    visit.page.on("console", lambda message: visit.console.append(message.text) if message.type == "error" else None)
    visit.page.on("pageerror", lambda error: visit.console.append(str(error)))
    visit.page.on("requestfailed", lambda request: visit.failed.append(request.url))
    visit.page.on("response", lambda response: visit.failed.append(response.url) if response.status >= 400 else None)
    visit.page.goto(site + path, wait_until="networkidle")
    visit.page.evaluate("window.MathJax?.startup?.promise")
    return visit


@pytest.fixture(scope="module", params=PAGES or ["index.html"])
def visit(browser: Browser, site: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    visit = open_page(browser, site, request.param)
    yield visit
    visit.page.close()


def test_page_asks_no_other_host(visit: Visit) -> None:
    assert visit.elsewhere == []


def test_page_loads_whole_and_without_errors(visit: Visit) -> None:
    assert visit.failed == []
    assert visit.console == []


def test_formulas_are_typeset(visit: Visit) -> None:
    assert visit.page.locator(".math:not(:has(mjx-container))").all_inner_texts() == []
    assert visit.page.locator("mjx-merror, [data-mjx-error]").all_inner_texts() == []
    assert visit.page.locator("mjx-container").count() > 0 or "01_sap" not in visit.page.url


def test_internal_links_resolve(visit: Visit, site: str) -> None:
    hrefs = visit.page.locator("a[href]").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    targets = {urljoin(visit.page.url, href) for href in hrefs}
    assert [url for url in sorted(targets) if url.startswith(site) and not resolves(url.removeprefix(site))] == []


def resolves(link: str) -> bool:
    """Whether a link within the site leads to a file and, if it names one, to a place in it."""
    path, fragment = urldefrag(link)
    file = SITE / unquote(path.split("?")[0] or "index.html")
    return file.is_file() and (not fragment or f'id="{unquote(fragment)}"' in file.read_text())


def test_images_load_and_have_alt_text(visit: Visit) -> None:
    images = visit.page.locator("img").all()
    assert len(images) > 1 or "01_sap" not in visit.page.url
    for image in images:
        source = str(image.get_attribute("src"))
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0, source
        alt = image.get_attribute("alt")
        assert alt, f"{source} has no alt text"
        assert Path(source).stem not in alt, f"{source} has its file name for alt text"


def test_page_fits_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 375, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 375


def test_dark_mode_switch_darkens_the_page(browser: Browser, site: str) -> None:
    page = open_page(browser, site, "index.html").page
    html = page.locator("html")
    brightness = {}
    for _ in range(3):  # auto, light, dark, in the theme's own order
        page.locator(".theme-switch-button:visible").first.click()
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        brightness[html.get_attribute("data-mode")] = sum(colour[:3])
    assert brightness.keys() == {"auto", "light", "dark"}
    assert brightness["dark"] < 200 < 600 < brightness["light"] == brightness["auto"]
    page.close()


def test_search_finds_a_word(browser: Browser, site: str) -> None:
    visit = open_page(browser, site, "search.html?q=multinomial")
    link = visit.page.locator("#search-results li a").first
    link.wait_for()
    assert resolves(urljoin(visit.page.url, link.get_attribute("href")).removeprefix(site).split("?")[0])
    assert visit.console == visit.failed == visit.elsewhere == []
    visit.page.close()
