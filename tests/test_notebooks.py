"""The notebooks run, their exercises can be solved, and what is committed is what they show."""
import functools
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

from lab.execute import HERE, NOTEBOOKS, execute, stamp

ROOT = HERE.parent

WRONG = """
sound = {name}
{name} = (lambda *args: sound(*args) * 1.5 + 1) if callable(sound) else torch.as_tensor(sound) * 1.5 + 1
"""


def committed(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """{number: (name to fill in, code of the solution, code of the check)}."""
    cells, found = code_cells(notebook), {}
    solutions = dict(re.findall(r"<summary>Exercise (\d+)</summary>.*?```python\n(.*?)```", notebook.cells[-1].source, re.S))
    for cell, following in zip(cells, cells[1:]):
        name = re.search(r"^(\w+) = \.\.\.$|^def (\w+)\(.*\n(?:    .*\n)*    return \.\.\.$", cell.source, re.M)
        if name:
            number = re.search(r"check\((\d+),", following.source)[1]
            found[number] = (name[1] or name[2], solutions[number], following.source)
    assert set(found) == set(solutions)
    return found


def texts(cell):
    return "".join(out.text if out.output_type == "stream" else out.get("data", {}).get("text/plain", "")
                   for out in cell.outputs)


def kinds(cell):
    return [out.name if out.output_type == "stream" else sorted(out.data) for out in cell.outputs]


@functools.cache
def run(path):
    """The notebook run afresh, and the outputs of each exercise's check: with its solution, then with a wrong answer."""
    before = committed(path)
    tasks = exercises(before)
    extra = [source for name, solution, check in tasks.values()
             for source in (solution, check, WRONG.format(name=name), check)]
    after = execute(path, and_then=extra)
    checked = after.cells[len(before.cells):]
    verdicts = {number: (texts(checked[4 * i + 1]), texts(checked[4 * i + 3])) for i, number in enumerate(tasks)}
    return after.cells[:len(before.cells)], verdicts


def test_the_set_is_complete():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, len(NOTEBOOKS) + 1)]
    syllabus = (HERE / "README.md").read_text()
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", syllabus) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_committed_outputs_are_whole_and_belong_to_the_code(self, path):
        cells = code_cells(committed(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            assert cell.metadata.get("executed") == stamp(cell), f"run notebooks/lab/execute.py: changed since\n{cell.source}"

    def test_committed_outputs_hold_no_path_warning_or_trail(self, path):
        for cell in code_cells(committed(path)):
            for out in cell.outputs:
                assert out.output_type in ("stream", "display_data", "execute_result"), cell.source
                assert out.get("name", "stdout") == "stdout", cell.source
            assert not re.search(r"/home/|/Users/|/root/|/tmp/|\bC:\\|site-packages|Warning|object at 0x|it/s|\r", texts(cell))
            assert str(ROOT) not in texts(cell)

    def test_shows_pictures_and_says_what_one_learns(self, path):
        notebook = committed(path)
        assert notebook.cells[0].source.startswith(f"# {int(path.name[:2])} · ")
        assert "After this notebook you" in notebook.cells[0].source and "CPU" in notebook.cells[0].source
        assert sum("image/png" in kind for cell in code_cells(notebook) for kind in kinds(cell)) >= 3
        assert 2 <= len(exercises(notebook)) <= 4
        setup = code_cells(notebook)[0].source
        assert setup.split("import dydilit")[0] == code_cells(committed(NOTEBOOKS[0]))[0].source.split("import dydilit")[0]

    def test_runs_from_a_fresh_kernel_and_shows_what_is_committed(self, path):
        cells, _ = run(path)
        for fresh, kept in zip(cells, committed(path).cells, strict=True):
            assert fresh.source == kept.source
            if fresh.cell_type == "code":
                assert kinds(fresh) == kinds(kept), kept.source

    def test_solutions_are_right_and_wrong_answers_wrong(self, path):
        _, verdicts = run(path)
        for number, (solved, wrong) in verdicts.items():
            assert solved == f"Exercise {number}: right.\n"
            assert wrong == f"Exercise {number}: not right yet.\n"


@pytest.mark.parametrize("folder", ["notebooks", ".", "tests", "above"])
def test_the_first_cell_finds_the_library_wherever_jupyter_starts(folder, tmp_path):
    (tmp_path / "clone").symlink_to(ROOT)
    setup = code_cells(committed(NOTEBOOKS[0]))[0].source
    done = subprocess.run([sys.executable, "-c", setup + "\nprint(dydilit.__file__)"], capture_output=True, text=True,
                          cwd=tmp_path if folder == "above" else ROOT / folder)
    assert done.stdout.strip() == str(ROOT / "dydilit.py"), done.stderr
