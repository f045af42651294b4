"""Runs the notebooks from fresh kernels and keeps what they show.

    python notebooks/lab/execute.py [notebooks/01_linear_attention.ipynb ...]

All of them without a name. A notebook that fails is left as it was. Prints the seconds that each took.
"""
import base64
import hashlib
import io
import os
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageChops, ImageStat

HERE = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(HERE.glob("[0-9A][0-9_]*.ipynb"))       # the lessons, and the appendix
LIBRARY = (HERE.parent / "dydilit.py").read_bytes()
os.environ["LAB_STATIC"] = "1"              # the kernels inherit it: sliders show their static picture only


def stamp(cell):
    """A fingerprint of a code cell and of dydilit.py; kept beside the outputs, it tells when either has changed since."""
    return hashlib.sha256(LIBRARY + cell.source.encode()).hexdigest()[:12]


def smaller(png):
    """A picture with 64 colours, or with 256 where fewer would show; base64 in and out."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    for colours in (64, 256):
        reduced = image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        if max(ImageStat.Stat(ImageChops.difference(reduced.convert("RGB"), image)).mean) < 0.3:      # of 255
            break
    out = io.BytesIO()
    reduced.save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path, folder=HERE, and_then=()):
    """The notebook at path as a fresh kernel in `folder` leaves it, sources in and_then run as cells after its own."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in and_then]
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.metadata["executed"] = stamp(cell)
            for out in cell.outputs:
                if "image/png" in out.get("data", {}):
                    out.data["image/png"] = smaller(out.data["image/png"])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    return notebook


def main():
    for path in [pathlib.Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        start = time.time()
        notebook = execute(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.time() - start:.0f} s, {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
