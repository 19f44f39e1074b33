"""A real browser for the tests of pages: what it shows, what it fetches, and what it complains of."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
DRIVER = shutil.which("chromedriver") or ""
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)

# What a browser is asked: the smallest contrast of a text with what lies behind it, and how wide the page is.
CONTRAST = """
const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const onColour = getComputedStyle(document.documentElement).getPropertyValue('--on-colour').trim();
const probe = document.createElement('i'); probe.style.color = onColour; document.body.append(probe);
const spare = getComputedStyle(probe).color; probe.remove();
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
  if (!text || !e.getClientRects().length) continue;
  const inSvg = e instanceof SVGElement;
  const colour = inSvg ? getComputedStyle(e).fill : getComputedStyle(e).color;
  if (inSvg && colour === spare) continue;
  const [a, b] = [light(parse(colour)), light(behind(inSvg ? e.closest('figure') : e))].sort((x, y) => y - x);
  const height = inSvg ? e.getBoundingClientRect().height : parseFloat(getComputedStyle(e).fontSize);
  found.push({text, contrast: (a + 0.05) / (b + 0.05), height});
}
return found;
"""


class Browser:
    """One window of Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def look_as(self, width: int, scheme: str) -> None:
        """From now on at this width, of a phone below 600 pixels, and for a reader who likes it light or dark."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def open(self, address: str) -> list[str]:
        """Shows the page, and returns what was fetched for it, itself included."""
        self.fetched()
        self.driver.get(address)
        return self.fetched()

    def fetched(self) -> list[str]:
        """The addresses that were asked for since the last call, also those that gave nothing."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """What the browser's console holds since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """The first element that a CSS selector finds."""
        return self.driver.find_element("css selector", selector)

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """What the script returns, as soon as that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda driver: driver.execute_script(script))


@contextmanager
def open_browser(profile: Path, *flags: str) -> Iterator[Browser]:
    """Chromium without a window, with its profile in an empty folder. Skips the test where there is none."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
