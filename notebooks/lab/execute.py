"""Runs the notebooks from fresh kernels and keeps what they show.

    python notebooks/lab/execute.py [notebooks/01_linear_attention.ipynb ...]

All of them without a name. A notebook that fails is left as it was. Prints the seconds that each took.
"""
import hashlib
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))


def stamp(cell):
    """A code cell's fingerprint; kept beside its outputs, it tells when the code has changed since."""
    return hashlib.sha256(cell.source.encode()).hexdigest()[:12]


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
