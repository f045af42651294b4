"""The notebooks run, their exercises can be solved, and what is committed is what they show."""
import base64
import io
import re

import matplotlib
import nbformat
import pytest
import torch
from PIL import Image, ImageSequence

from lab import figures, helpers
from lab.execute import HERE, NOTEBOOKS, execute, smaller, stamp

matplotlib.use("agg")                       # draws without a screen

WRONG = """
sound = {name}
def spoiled(answer):
    return torch.as_tensor(answer) * 1.5 + 1
{name} = (lambda *args: spoiled(sound(*args))) if callable(sound) else spoiled(sound)
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """{number: (name to fill in, code of the solution, code of the check)}."""
    cells, found = code_cells(notebook), {}
    solutions = dict(re.findall(r"<summary>Exercise (\d+)</summary>.*?```python\n(.*?)```",
                                notebook.cells[-1].source, re.S))
    for cell, following in zip(cells, cells[1:]):
        blank = re.search(r"^(\w+) = \.\.\.$|^def (\w+)\(.*\n(?:    .*\n)*    return \.\.\.$",
                          cell.source, re.M)
        if blank:
            number = re.search(r"check\((\d+),", following.source)[1]
            found[number] = (blank[1] or blank[2], solutions[number], following.source)
    assert set(found) == set(solutions)
    return found


def texts(cell):
    return "".join(out.text if out.output_type == "stream" else
                   out.get("data", {}).get("text/plain", "") for out in cell.outputs)


NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"


def same_text(fresh, kept):
    """The same words, and the same numbers but for 2 % or one unit of the last printed digit."""
    words = [[part.split() for part in re.split(NUMBER, text)] for text in (fresh, kept)]
    if words[0] != words[1]:
        return False
    for new, old in zip(re.findall(NUMBER, fresh), re.findall(NUMBER, kept)):
        new, old = new.replace(",", ""), old.replace(",", "")
        digits, _, power = old.partition("e")
        unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
        if abs(float(new) - float(old)) > max(1.01 * unit, 0.02 * abs(float(old))):
            return False
    return True


def kinds(cell):
    return [out.name if out.output_type == "stream" else sorted(out.data) for out in cell.outputs]


def name(path):
    """What its title begins with: a lesson's number, or the appendix's letter."""
    return path.stem.partition("_")[0].lstrip("0")


def test_the_set_is_complete_and_stays_small():
    assert [name(path) for path in NOTEBOOKS] == [*map(str, range(1, 13)), "A", "B"]
    syllabus = (HERE / "README.md").read_text()
    assert re.findall(r"\]\((\w+\.ipynb)\)", syllabus) == [path.name for path in NOTEBOOKS]
    sizes = [path.stat().st_size for path in NOTEBOOKS]
    assert max(sizes) <= 700_000 and sum(sizes) <= 7_000_000
    assert sum(len(cell.source.split()) for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells
               if cell.cell_type == "markdown") <= 27_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_committed_outputs_belong_to_the_code_and_hold_no_path_warning_or_trail(self, path):
        for count, cell in enumerate(code_cells(nbformat.read(path, 4)), 1):
            assert cell.execution_count == count and cell.metadata.get("executed") == stamp(cell), \
                f"run notebooks/lab/execute.py: changed since\n{cell.source}"
            for out in cell.outputs:
                assert out.output_type in ("stream", "display_data", "execute_result"), cell.source
                assert out.get("name", "stdout") == "stdout", cell.source
            assert not re.search(r"/home/|/Users/|/root/|/tmp/|\bC:\\|site-packages|Warning|it/s|"
                                 r"\r|object at 0x|" + re.escape(str(HERE.parent)), texts(cell))

    def test_says_what_one_learns_in_pictures_exercises_and_small_cells(self, path):
        notebook = nbformat.read(path, 4)
        title, (first, *others) = notebook.cells[0].source, code_cells(notebook)
        assert title.startswith(f"# {name(path)} · ")
        assert "After this notebook you" in title and "CPU" in title
        assert sum("image/png" in kind for cell in others for kind in kinds(cell)) >= 3
        assert 2 <= len(exercises(notebook)) <= 4
        assert re.fullmatch(r"from lab\.figures import \* *#.*", first.source)
        for cell in others:
            assert len(cell.source.splitlines()) <= 20, cell.source

    @pytest.mark.slow
    def test_runs_from_a_fresh_kernel_shows_what_is_committed_and_checks_answers(self, path):
        before = nbformat.read(path, 4)
        tasks = exercises(before)
        fresh_cells = execute(path, and_then=[
            source for name, solution, check in tasks.values()
            for source in (solution, check, WRONG.format(name=name), check)]).cells
        for fresh, kept in zip(fresh_cells, before.cells):
            assert fresh.source == kept.source
            if fresh.cell_type == "code":
                assert kinds(fresh) == kinds(kept), kept.source
                varies = re.search(r"median_ms|perf_counter|# varies\b", kept.source)     # timed
                assert varies or same_text(texts(fresh), texts(kept)), \
                    f"{kept.source}\n{texts(fresh)}\n{texts(kept)}"
        said = [texts(cell) for cell in fresh_cells[len(before.cells):]]
        assert said[1::4] == [f"Exercise {number}: right.\n" for number in tasks]
        assert said[3::4] == [f"Exercise {number}: not right yet.\n" for number in tasks]


def test_shares_by_hand():
    ex, row = helpers.example(), torch.zeros(256)
    row[ex.face.nonzero()[0]], row[ex.sky.nonzero()[0]], row[0] = 3.0, 1.0, -2.0
    found = helpers.shares(row, ex)
    assert (found.face, found.sky, found.negative) == pytest.approx((3 / 4, 1 / 4, 1 / 3))


def test_a_diagram_lights_only_what_it_has():
    with pytest.raises(ValueError, match="no such part: engine; there are X, shared projection"):
        figures.module_diagram("attention", "engine")


def test_an_animation_keeps_its_frames(monkeypatch):
    shown = []
    monkeypatch.setattr(figures.display, "display", lambda image: shown.append(image.data))
    figures.animation(lambda x: figures.plt.figure(figsize=(2, 1)).text(x, 0.5, "o"), [0, 0.3, 0.6])
    png = base64.b64encode(shown[0]).decode()
    assert smaller(png) == png
    picture = Image.open(io.BytesIO(shown[0]))
    frames = {frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(picture)}
    assert len(frames) == 3 and picture.info["loop"] == 0
