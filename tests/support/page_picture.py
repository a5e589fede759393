"""Take the README's picture of the page to explore: `python -m tests.support.page_picture` writes page.png.

It needs playwright, chromium and Pillow, as the tests with the marker `browser` do.
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import minclip

PICTURE = Path(__file__).with_name("page.png")
TEXT = "a black cat sits on a chair"


def main():
    page = minclip.show(minclip.load(), minclip.tokenize(TEXT), model="built-in, a small CLIP-style one")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder, "page.html")
        page.save(path)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        tab = browser.new_page(viewport={"width": 1000, "height": 1010})
        tab.goto(path.as_uri())
        tab.locator("[data-key='word 3']").click()
        png = tab.screenshot()
        browser.close()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(96).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
