"""Makes the links of the README lead to the repository, for the page on PyPI."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the readme."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        for start, view in ((r"(!\[[^]]*\]\()", "raw"), (r"(\]\()", "blob")):
            text = re.sub(rf"{start}(?![a-z]+:|#)", rf"\1{metadata['urls']['Repository']}/{view}/main/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
