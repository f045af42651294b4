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
import numpy as np
from matplotlib.colors import to_rgb
from nbclient import NotebookClient
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from lab import figures  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(HERE.glob("[0-9AB][0-9_]*.ipynb"))       # the lessons, and the appendix
LIBRARY = (HERE.parent / "dydilit.py").read_bytes()
OURS = np.array([to_rgb(colour) for colour in {*figures.COLOURS, *(look[0] for look in figures.LOOKS.values())}]) * 255
OURS = OURS.round().astype(np.uint8)                        # (n, 3), colours that mean the same in all lessons
os.environ["LAB_STATIC"] = "1"              # the kernels inherit it: sliders show their static picture only


def stamp(cell):
    """A fingerprint of a code cell and of dydilit.py; kept beside the outputs, it tells when either has changed since."""
    return hashlib.sha256(LIBRARY + cell.source.encode()).hexdigest()[:12]


def reduced(image, total, kept):
    """A picture with `total` colours. The course's own and the most frequent, `kept` in all, stay as they are."""
    colours, where, counts = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    ours = (colours[:, None] == OURS).all(-1).any(-1)
    order = np.where(ours, counts.max() + 1, counts).argsort()[::-1]
    palette, rest = colours[order[:kept]], np.repeat(colours[order[kept:]], counts[order[kept:]], axis=0)
    if len(rest):
        others = Image.fromarray(rest[None]).quantize(total - kept, method=Image.Quantize.MEDIANCUT).getpalette()
        palette = np.concatenate([palette, np.array(others, np.uint8).reshape(-1, 3)])
    nearest = np.concatenate([((part[:, None].astype(int) - palette) ** 2).sum(-1).argmin(1)
                              for part in np.array_split(colours, len(colours) // 1000 + 1)])
    out = Image.fromarray(nearest[where.ravel()].astype(np.uint8).reshape(image.shape[:2]), "P")
    out.putpalette(palette.tobytes())
    return out


def smaller(png):
    """A picture with 64 colours, or with 256 where fewer would show; base64 in and out. An animation stays as it is."""
    opened = Image.open(io.BytesIO(base64.b64decode(png)))
    if getattr(opened, "n_frames", 1) > 1:
        return png
    image = np.asarray(opened.convert("RGB"))
    for total, kept in [(64, 32), (256, 96)]:
        small = reduced(image, total, kept)
        if abs(np.asarray(small.convert("RGB")).astype(int) - image).mean() < 0.3:          # of 255
            break
    out = io.BytesIO()
    small.save(out, "png", optimize=True)
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
