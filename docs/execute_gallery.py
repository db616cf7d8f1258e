"""Executes the notebooks of the gallery in a folder and keeps what they show: make gallery.

python docs/execute_gallery.py FOLDER [NOTEBOOK ...]
"""

import argparse
import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from escaip.files import write_aside


def smaller(picture: str) -> str:
    """Returns a PNG in base64 with at most 64 colors, a third of its size."""
    found = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(64).save(found, "PNG", optimize=True)
    return base64.b64encode(found.getvalue()).decode()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="where they run and leave their files")
parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(Path(__file__).parent.glob("gallery/*.ipynb")))
args = parser.parse_args()

for path in args.notebooks:
    print(path, flush=True)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(args.folder)}}
    NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=place).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    with write_aside(path) as aside:
        nbformat.write(notebook, aside)
