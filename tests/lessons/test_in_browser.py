"""Lessons in JupyterLab, as a reader opens them: they run, show every figure, and need no saving when opened.

`pytest -m browser tests/lessons`. With MINCLIP_SCREENSHOTS=FOLDER each lesson is also written there as a PNG.
"""

import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from tests.lessons.refresh import LESSONS, METADATA, lessons, read
from tests.support.browsers import chromium

pytestmark = pytest.mark.browser
OPENED = [path for path in lessons() if path.name[:2] in ("00", "04", "09", "13")]
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def settings(folder, theme):
    """JupyterLab's settings: this theme, no news, and all cells in the page, also those out of sight."""
    for name, value in {
        "apputils-extension/themes": {"theme": THEMES[theme]},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        file = folder / f"@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=THEMES)
def lab(request, tmp_path_factory):
    """(theme, address of a JupyterLab that serves a copy of the lessons, its token)."""
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    home, token, port = tmp_path_factory.mktemp("home"), secrets.token_hex(16), free_port()
    folder = home / "lessons"
    shutil.copytree(LESSONS, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in folder.glob("*.ipynb"):  # the version that the kernel will report
        notebook = read(path)
        notebook.metadata = nbformat.from_dict(METADATA)
        notebook.metadata["language_info"]["version"] = platform.python_version()
        nbformat.write(notebook, path)
    settings(home / "settings", request.param)
    package = os.pathsep.join([str(LESSONS.parent), os.environ.get("PYTHONPATH", "")])
    places = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "RUNTIME")}
    places |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0"]
    env = os.environ | places | {"PYTHONPATH": package, "IPYTHONDIR": str(home / "ipython")}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api?token={token}").close()
            break
        except OSError:
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
    yield request.param, address, token
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


SETTLED = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.context?.isReady && panel.sessionContext?.session?.kernel?.status === 'idle';
}"""
ERRORS = """() => {
    const errors = [];
    for (const cell of window.jupyterapp.shell.currentWidget.content.model.cells)
        for (const output of cell.toJSON().outputs ?? [])
            if (output.output_type === 'error' || output.name === 'stderr') errors.push([cell.id, output]);
    return errors;
}"""
IMAGES = """() => [...document.querySelectorAll('.jp-OutputArea-output img')].map(
    image => [image.alt, image.complete && image.naturalWidth > 0])"""
UNSAVED = ".lm-DockPanel-tabBar .jp-mod-dirty"


def full_picture(tab, path):
    """Write the whole notebook as one PNG, if a folder is named."""
    folder = os.environ.get("MINCLIP_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        height = tab.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
        tab.set_viewport_size({"width": 1200, "height": min(height + 150, 16_000)})
        tab.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
        tab.wait_for_timeout(1000)
        tab.screenshot(path=Path(folder) / path)


@pytest.mark.parametrize("path", OPENED, ids=lambda path: path.stem)
def test_a_lesson_opens_saved_runs_without_error_and_shows_every_figure(lab, browser, path):
    theme, address, token = lab
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=theme)
    tab.set_default_timeout(120_000)
    tab.goto(f"{address}/lab/tree/{path.name}?token={token}&reset")
    tab.wait_for_function(SETTLED)
    tab.wait_for_timeout(2000)
    assert tab.locator(UNSAVED).count() == 0, "opening the lesson marks it unsaved"
    before = tab.evaluate(IMAGES)
    tab.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    tab.wait_for_function(SETTLED)
    assert tab.evaluate(ERRORS) == []
    shown = tab.evaluate(IMAGES)
    assert len(before) >= 2
    assert len(shown) >= 2
    assert all(alt and loaded for alt, loaded in before + shown), "an image without alt text, or a broken one"
    full_picture(tab, f"{path.stem}-{theme}.png")
    tab.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    tab.wait_for_function(f"() => !document.querySelector('{UNSAVED}')")
    tab.close()


def test_the_lessons_metadata_are_what_a_kernel_reports():
    """JupyterLab marks a lesson unsaved where its kernel reports other metadata."""
    from ipykernel.ipkernel import IPythonKernel

    reported = IPythonKernel(user_ns={}).language_info
    info = METADATA["language_info"]
    assert info | {"version": reported["version"]} == reported
