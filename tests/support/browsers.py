"""A headless chromium for tests that are marked `browser`."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium():
    """Yield playwright's browser, driving the chromium on the path; skip the test where one is missing."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no chromium on the path")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=quiet)
        yield started
        started.close()
