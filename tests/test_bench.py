"""The benchmarks run at small sizes, so that on a GPU they do not fail for a silly reason."""

import pytest

from experiments import bench
from paper import budget


@pytest.mark.parametrize("what, lines", [("ssd", 6), ("errors", 20), ("step", 4), ("decode", 10)])
def test_each_part_prints_a_table(what, lines, capsys, monkeypatch):
    monkeypatch.setattr(budget, "TIMED", 0.01)
    bench.main([what, "--rehearse"])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + lines
    assert len({line.count("|") for line in table}) == 1
    assert "nan" not in "".join(table)


def test_a_loss_that_does_not_fall_is_an_error(monkeypatch):
    assert "of the last ten" in bench.learn(bench.SMALL)
    monkeypatch.setattr(bench, "trainer", lambda lm, batch: lambda codes: 1.0)
    with pytest.raises(ValueError, match="last ten 1.000"):
        bench.learn(bench.SMALL)


def test_a_part_that_fails_does_not_stop_the_page(tmp_path, monkeypatch):
    def broken(sizes):
        raise RuntimeError("no such card")

    monkeypatch.setattr(bench, "ROOT", tmp_path)
    fine = lambda sizes: "fine"
    with pytest.raises(ValueError, match="broken failed"):
        bench.gpu(bench.SMALL, [fine, broken, fine])
    page = (tmp_path / "out/rehearsal.md").read_text()
    assert "no such card" in page
    assert page.count("fine") == 2
