"""A page: one HTML file, complete in itself."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from minclip.checkpoint.tensor_files import only_when_complete


class Page:
    """An HTML page: `save` writes it, str() is its source, and Jupyter shows it in a frame."""

    def __init__(self, source: str):
        self.source = source

    @classmethod
    def from_template(cls, name: str, title: str, data: Mapping[str, Any]) -> Page:
        """Return the template of that name with its title and data, in which no text is markup."""
        source = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        for character in "<>&\u2028\u2029":
            source = source.replace(character, f"\\u{ord(character):04x}")
        template = resources.files(__package__).joinpath(name).read_text("utf-8")
        return cls(template.replace("{{title}}", html.escape(title)).replace("{{data}}", source))

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"Page of {len(self.source.encode()) / 1e6:.1f} MB: .save('page.html') writes it"

    def _repr_html_(self) -> str:
        frame = 'style="width:100%;height:860px;border:0" title="The encoder, to explore"'
        return f'<iframe srcdoc="{html.escape(self.source)}" {frame}></iframe>'

    def save(self, path: str | Path) -> None:
        """Write the page to path, where it appears only once it is complete."""
        with only_when_complete(path) as partial:
            Path(partial).write_text(self.source, encoding="utf-8")
