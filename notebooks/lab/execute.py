"""Runs the notebooks from fresh kernels and keeps what they show.

    python notebooks/lab/execute.py [notebooks/01_linear_attention.ipynb ...]

All of them without a name. A notebook that fails is left as it was. Prints each one's seconds.
"""
import base64
import hashlib
import io
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(HERE.glob("[0-9AB][0-9_]*.ipynb"))       # the lessons, and the appendices
LIBRARY = (HERE.parent / "dydilit.py").read_bytes()


def stamp(cell):
    """A fingerprint of a code cell and of dydilit.py. Kept, it tells when either has changed."""
    return hashlib.sha256(LIBRARY + cell.source.encode()).hexdigest()[:12]


def smaller(png):
    """A picture with 256 colours; base64 in and out. An animation stays as it is."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if getattr(image, "n_frames", 1) > 1:
        return png
    small = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3,
                                          dither=Image.Dither.NONE)     # else white turns beige
    out = io.BytesIO()
    small.save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path, and_then=()):
    """The notebook at path as a fresh kernel leaves it. and_then: sources of cells that follow."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in and_then]
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, resources={"metadata": {"path": str(HERE)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.metadata["executed"] = stamp(cell)
            for out in cell.outputs:
                if "image/png" in out.get("data", {}):
                    out.data["image/png"] = smaller(out.data["image/png"])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def main():
    for path in [pathlib.Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        start = time.time()
        notebook = execute(path)
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1024
        print(f"{path.name}: {time.time() - start:.0f} s, {size:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
