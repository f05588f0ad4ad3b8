"""The study's machinery: it goes on where it stopped, and its figures follow from its logs."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import TINY

import evaluate
from checkpoint import read_config
from codec import load_codec
from data import Clips, Writer
from experiments import study
from toy.corpus import folder as corpus

OPTIONS = " ".join(TINY)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of two variants, too small to learn."""
    monkeypatch.setattr(study, "VARIANTS", ("simba", "transformer"))
    labels = {variant: f"--variant {variant} {OPTIONS}" for variant in study.VARIANTS}
    labels[study.NINE] = f"--codebooks 9 {OPTIONS}"
    monkeypatch.setattr(study, "LMS", labels)
    monkeypatch.setattr(study, "REFINERS", {})
    monkeypatch.setattr(study, "TUNED", {})
    monkeypatch.setattr(study.Study, "__init__", lambda self: None)
    made = study.Study()
    made.size = study.Size("small", 10, 5, 5, seeds=2, count=2, minute=1, valid_clips=2)
    made.out, made.results, made.sections, made.started = tmp_path, tmp_path / "results", [], 0.0
    made.data = "toy"
    made.results.mkdir()
    return made


def test_the_study_is_evaluates():
    with pytest.raises(ValueError, match="evaluate.py study"):
        study.one_run([])


def test_a_study_trains_goes_on_and_writes_what_came_out(small, tmp_path, capsys):
    small.train()
    runs = [tmp_path / f"{variant}-{seed}" for variant in study.VARIANTS for seed in (0, 1)]
    assert [read_config(run / "last")["step"] for run in runs] == [10] * 4
    nine = "simba-9-codebooks"
    assert [run.name for run in tmp_path.glob(f"{nine}-*")] == [f"{nine}-0"], "one seed, not two"
    assert all((run / "step-4").exists() and not [*run.glob("*.wav")] for run in runs)
    whole = (runs[0] / "log.jsonl").read_text()
    stamp = (runs[1] / "log.jsonl").stat().st_mtime_ns
    shutil.rmtree(runs[0])
    small.train()  # makes again what is missing, and nothing else
    losses = lambda text: [json.loads(line).get("loss") for line in text.splitlines()]
    assert losses((runs[0] / "log.jsonl").read_text()) == losses(whole)
    assert (runs[1] / "log.jsonl").stat().st_mtime_ns == stamp
    small.data = "elsewhere"
    with pytest.raises(ValueError, match="was trained on toy, not elsewhere"):
        small.train()

    small.losses()
    small.race()
    small.write()
    page = (small.results / "README.md").read_text()
    assert "| simba |" in page and "![" in page and "cores, torch" in page
    assert (small.results / "losses.png").stat().st_size > 5000
    head, _, *lines = (small.results / "losses.csv").read_text().splitlines()
    assert head.startswith("# ") and "commit" in head
    assert len(lines) == 3 and lines[0].startswith("simba,")
    last = [valid[-1]["right"] for _, valid in small.runs("simba")]
    assert f"{np.mean(last)},{min(last)},{max(last)}" in lines[0]


def test_what_will_be_heard_is_played_before(small, monkeypatch):
    asked, played = [], []

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, work, *columns):
            assert work is evaluate.music
            return [played.append((str(s), tuple(p), t)) for s, p, t in zip(*columns)]

    def measure(systems, judge, task):
        asked.extend((str(s), tuple(task.prompts["sentence"]), task.seconds) for s in systems)
        return [], []

    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(study, "read_config", lambda folder: {"model": {"codebooks": 1}})
    small.captions, small.judge = ["blues", "sad blues"], None
    small.task = SimpleNamespace(prompts=dict(sentence=small.captions), real=[])
    small.play()
    small.hear(small.systems())
    small.longer()
    small.merged(small.refined())
    assert sorted(asked) == sorted(job for job in played if job[2] != 60.0)
    assert [job[1:] for job in played if job[2] == 60.0] == [(("blues",), 60.0)] * 2


def test_a_run_that_fails_is_named(tmp_path):
    jobs = [["--out", str(tmp_path / "bad"), "--steps", "1", "--blocks", "many"]]
    with pytest.raises(ValueError, match="bad/train.log"):
        study.in_parallel(jobs)
    assert "blocks" in (tmp_path / "bad" / "train.log").read_text()


def test_the_race_is_run_between_validations():
    spent, losses = np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.0])
    assert study.reached(spent, losses, 1.5) == 25
    assert study.reached(spent, losses, 2.0) == 20
    assert study.reached(spent, losses, 4.0) == 10
    assert study.reached(spent, losses, 0.5) == np.inf


def test_own_tokens_are_the_models_and_all_else_is_the_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(Clips, "__len__", lambda self: 3)
    study.own_tokens(tmp_path, corpus())
    once = (tmp_path / "codes-00000.bin").read_bytes()
    study.own_tokens(tmp_path, corpus())
    assert (tmp_path / "codes-00000.bin").read_bytes() == once
    mine, real = Clips(tmp_path, "train", 9, "toy"), Clips(corpus(), "train", 9)
    for i in range(3):
        assert (mine.codes(i)[1:] == real.codes(i)[1:]).all()
        same = (mine.codes(i)[0] == real.codes(i)[0]).mean()
        assert 0.3 < same < 0.95, "near the true ones, as they come after true ones"
    assert len(Clips(tmp_path, "valid", 9)) == 3


def test_a_study_of_other_music_is_refused(tmp_path):
    writer = Writer(tmp_path / "mine", load_codec("toy"))
    codes = np.zeros((9, 50), np.uint16)
    writer.add([(codes, dict(split=split, caption="a song")) for split in ("train", "valid")])
    with pytest.raises(ValueError, match="mine was not made by `toy.py build`"):
        study.own_tokens(tmp_path / "own", tmp_path / "mine")
    assert not (tmp_path / "own").exists()


def test_figures_without_an_interval_and_without_an_end_are_shown():
    rows = [("a", {"x": (1.5, None), "y": (np.inf, (0.25, np.inf))}), ("b", {"x": (12.0, None)})]
    assert evaluate.markdown(rows).splitlines()[2] == "| a | 1.500 | inf [0, inf] |"
    assert evaluate.sheet(rows).splitlines()[1:] == ["a,1.5,,,inf,0.25,inf", "b,12.0,,,,,"]
