"""docs/walk.ipynb: its stored outputs are complete, and it runs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "walk.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a cell prints and the value it ends with, without pictures and players."""
    values = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return [text for text in values if not text.startswith("<")]


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(FILE, as_version=4)


@pytest.fixture(scope="module")
def executed():
    """Run from the root; the stored outputs were made in docs/. A cell that fails raises."""
    notebook = nbformat.read(FILE, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=resources
    )
    return client.execute()


def test_stored_outputs_are_complete(stored):
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds == {"stream", "display_data", "execute_result"}  # no errors
    assert not [o for cell in cells for o in cell.outputs if o.get("name") == "stderr"]


def test_file_is_small_and_names_no_place_on_a_disk(stored):
    assert FILE.stat().st_size < 1_500_000
    for cell in code_cells(stored):
        for text in texts(cell):
            assert not any(place in text for place in ("/home", "/root", "/tmp", "/work", "C:\\"))


def test_it_runs_and_the_numbers_by_hand_are_those_stored(stored, executed):
    cells, new_cells = code_cells(stored), code_cells(executed)
    assert "1.0000,  2.5000,  5.2500, 10.6250" in texts(new_cells[2])[0]
    for cell, new in zip(cells[1:8], new_cells[1:8]):  # up to the sampling, the same anywhere
        assert texts(new) == texts(cell)
    for cell, new in zip(cells, new_cells):
        assert [o.output_type for o in new.outputs] == [o.output_type for o in cell.outputs]


def test_it_compares_what_it_says_is_equal(stored):
    source = "\n".join(cell.source for cell in code_cells(stored))
    for claim in (
        "assert torch.allclose(y_loop.flatten(), torch.tensor(y))",  # the loop by hand
        "assert torch.equal(M @ x, torch.tensor(y))",  # the matrix
        "assert torch.allclose(ssd_chunked(*four, chunk=Q)[0], y_loop)",  # the chunks
        "assert difference < 1e-3",  # at once and one by one
        "assert torch.equal(refined[:1], codes)",  # the refiner keeps codebook 1
    ):
        assert claim in source
