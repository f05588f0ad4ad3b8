"""The benchmarks run at small sizes, so that on a GPU they do not fail for a silly reason."""

from types import SimpleNamespace

import pytest

from experiments import bench
from paper import budget

SMALL = SimpleNamespace(
    shapes=[(1, 40, 2, 16, 16)], chunk=16, errors=(1, 16, 16), lengths=(30, 60),
    lm=dict(blocks=2, d_model=64, d_state=16, headdim=16, chunk=16, attention_heads=4),
    musicgen=dict(num_hidden_layers=2, hidden_size=64, ffn_dim=64, num_attention_heads=4),
    train="--blocks 1 --d-model 32 --d-state 8 --headdim 16 --seconds 0.5 --crop 0.5 --steps 40",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", SMALL)
    monkeypatch.setattr(budget, "TIMED", 0.01)


@pytest.mark.parametrize("what, lines", [("ssd", 4), ("errors", 20), ("step", 4), ("decode", 5)])
def test_each_part_prints_a_table(what, lines, capsys):
    bench.main([what])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + lines
    assert len({line.count("|") for line in table}) == 1
    assert "nan" not in "".join(table)


def test_a_loss_that_does_not_fall_is_an_error(monkeypatch):
    monkeypatch.setattr(bench, "VARIANTS", ["simba"])
    monkeypatch.setattr(bench, "read_jsonl", lambda file: [dict(loss=3, seconds=1, tokens=1)] * 12)
    with pytest.raises(ValueError, match="simba: the loss went from 3.000 to 3.000"):
        bench.step()


def test_a_part_that_fails_does_not_stop_the_page(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "PARTS", {"fine": None, "broken": None, "good": None})

    def run(command, **_):
        ok = command[-1] != "broken"
        return SimpleNamespace(returncode=not ok, stdout=f"{command[-1]} it is", stderr="no card")

    monkeypatch.setattr(bench.subprocess, "run", run)
    with pytest.raises(ValueError, match="^broken failed"):
        bench.gpu()
    page = (tmp_path / "results/gpu.md").read_text()
    assert "fine it is" in page and "good it is" in page and page.count("no card") == 1
