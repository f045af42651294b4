"""The notebooks run, their exercises can be solved, and what is committed is what they show."""
import ast
import base64
import functools
import io
import math
import re

import matplotlib
import nbformat
import pytest
import torch
from PIL import Image

from lab import figures, helpers
from lab.execute import HERE, NOTEBOOKS, execute, smaller, stamp

matplotlib.use("agg")                       # draws without a screen
ROOT = HERE.parent

WRONG = """
sound = {name}
def spoiled(answer):
    return torch.as_tensor(answer) * 1.5 + 1
{name} = (lambda *args: spoiled(sound(*args))) if callable(sound) else spoiled(sound)
"""


def committed(path):
    return nbformat.read(path, as_version=4)


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


def varies(cell):
    """Whether numbers may differ: the cell times something, or a comment begins with "varies"."""
    return bool(re.search(r"median_ms|perf_counter|# varies\b", cell.source))


def kinds(cell):
    return [out.name if out.output_type == "stream" else sorted(out.data) for out in cell.outputs]


@functools.cache
def run(path):
    """The notebook run afresh, and each check's outputs: with the solution, with a wrong answer."""
    before = committed(path)
    tasks = exercises(before)
    extra = [source for name, solution, check in tasks.values()
             for source in (solution, check, WRONG.format(name=name), check)]
    after = execute(path, and_then=extra)
    checked = after.cells[len(before.cells):]
    verdicts = {number: (texts(checked[4 * i + 1]), texts(checked[4 * i + 3]))
                for i, number in enumerate(tasks)}
    return after.cells[:len(before.cells)], verdicts


def name(path):
    """What its title begins with: a lesson's number, or the appendix's letter."""
    return path.stem.partition("_")[0].lstrip("0")


def test_the_set_is_complete():
    assert [name(path) for path in NOTEBOOKS] == [*map(str, range(1, 13)), "A", "B"]
    syllabus = (HERE / "README.md").read_text()
    assert re.findall(r"\]\((\w+\.ipynb)\)", syllabus) == [path.name for path in NOTEBOOKS]


def test_the_set_stays_small():
    sizes = [path.stat().st_size for path in NOTEBOOKS]
    assert max(sizes) <= 700_000 and sum(sizes) <= 7_000_000
    texts = [cell.source for path in NOTEBOOKS for cell in committed(path).cells
             if cell.cell_type == "markdown"]
    assert sum(len(text.split()) for text in texts) <= 27_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_committed_outputs_are_whole_and_belong_to_the_code(self, path):
        cells = code_cells(committed(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            assert cell.metadata.get("executed") == stamp(cell), \
                f"run notebooks/lab/execute.py: changed since\n{cell.source}"

    def test_committed_outputs_hold_no_path_warning_or_trail(self, path):
        for cell in code_cells(committed(path)):
            for out in cell.outputs:
                assert out.output_type in ("stream", "display_data", "execute_result"), cell.source
                assert out.get("name", "stdout") == "stdout", cell.source
            assert not re.search(r"/home/|/Users/|/root/|/tmp/|\bC:\\|site-packages|Warning|"
                                 r"object at 0x|it/s|\r", texts(cell))
            assert str(ROOT) not in texts(cell)

    def test_shows_pictures_and_says_what_one_learns(self, path):
        notebook = committed(path)
        assert notebook.cells[0].source.startswith(f"# {name(path)} · ")
        assert "After this notebook you" in notebook.cells[0].source
        assert "CPU" in notebook.cells[0].source
        shown = [kind for cell in code_cells(notebook) for kind in kinds(cell)]
        assert sum("image/png" in kind for kind in shown) >= 3
        assert 2 <= len(exercises(notebook)) <= 4

    def test_code_is_in_small_cells_and_the_first_is_one_import(self, path):
        first, *others = code_cells(committed(path))
        assert first.source == code_cells(committed(NOTEBOOKS[0]))[0].source
        assert [type(line) for line in ast.parse(first.source).body] == [ast.ImportFrom]
        for cell in others:
            assert len(cell.source.splitlines()) <= 20, cell.source

    @pytest.mark.slow
    def test_runs_from_a_fresh_kernel_and_shows_what_is_committed(self, path):
        cells, _ = run(path)
        for fresh, kept in zip(cells, committed(path).cells, strict=True):
            assert fresh.source == kept.source
            if fresh.cell_type == "code":
                assert kinds(fresh) == kinds(kept), kept.source
                assert varies(kept) or same_text(texts(fresh), texts(kept)), \
                    f"{kept.source}\n{texts(fresh)}\n{texts(kept)}"

    @pytest.mark.slow
    def test_solutions_are_right_and_wrong_answers_wrong(self, path):
        _, verdicts = run(path)
        for number, (solved, wrong) in verdicts.items():
            assert solved == f"Exercise {number}: right.\n"
            assert wrong == f"Exercise {number}: not right yet.\n"


def test_numbers_are_compared_as_they_are_printed():
    assert same_text("loss 0.101, 1,024 tokens", "loss 0.100, 1,024 tokens")
    assert same_text("error 5.2e-07", "error 5.3e-07")
    assert not same_text("loss 0.110", "loss 0.100")
    assert not same_text("loss 0.100", "error 0.100")
    assert not same_text("1 2", "1 2 3")


def test_each_kind_of_linear_attention_is_sharper_than_the_one_before():
    ex = helpers.example()
    maps = helpers.attention_maps("ReLU", "focused", "dynamic", "softmax")
    found = [helpers.shares(m[ex.query], ex) for m in maps.values()]
    for name, rises in [("face", True), ("sky", False), ("entropy", False)]:
        values = [getattr(one, name) for one in found]
        assert values == sorted(values, reverse=not rises)


def test_shares_by_hand():
    ex, row = helpers.example(), torch.zeros(256)
    row[ex.face.nonzero()[0]], row[ex.sky.nonzero()[0]], row[0] = 3.0, 1.0, -2.0
    found = helpers.shares(row, ex)
    assert (found.face, found.sky, found.negative) == pytest.approx((3 / 4, 1 / 4, 1 / 3))
    entropy = -sum(p * math.log(p) for p in (1 / 2, 1 / 6, 1 / 3)) / math.log(256)
    assert found.entropy == pytest.approx(entropy)


@pytest.mark.parametrize("draw", [figures.module_diagram, figures.transformer_diagram])
def test_a_diagram_lights_what_it_has(draw):
    draw("attention")
    with pytest.raises(ValueError, match="no such part: engine"):
        draw("engine")


def test_an_animation_keeps_its_frames(monkeypatch):
    shown = []
    monkeypatch.setattr(figures.display, "display", lambda image: shown.append(image.data))
    figures.animation(lambda x: figures.plt.figure(figsize=(2, 1)).text(x, 0.5, "o"), [0, 0.3, 0.6])
    png = base64.b64encode(shown[0]).decode()
    assert smaller(png) == png
    picture, frames = Image.open(io.BytesIO(shown[0])), set()
    for i in range(picture.n_frames):
        picture.seek(i)
        frames.add(picture.convert("RGB").tobytes())
    assert len(frames) == 3 and picture.info["loop"] == 0
