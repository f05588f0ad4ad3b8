"""Does long music keep to its words? The measures, on a model that reads again after a second."""

import numpy as np
import pytest
import torch

import sample
from experiments import words


@pytest.fixture
def forgetful(monkeypatch):
    class Forgetful(sample.System):
        def __init__(self, folder):
            super().__init__(folder)
            self.lm.config.trained_frames = 60

    monkeypatch.setattr(sample, "System", Forgetful)
    monkeypatch.setattr(words, "TEN", 100)


def test_each_way_is_measured_at_both_ends(forgetful):
    table, curves = words.measure({"toy": sample.SHIPPED}, 3.5, 2)
    never = "toy, never read again"
    ends = [f"{way}: {end} 10 s" for way in ("toy", never) for end in ("first", "last")]
    assert {*table} == {*ends, "toy: readings", "toy: elsewhere"}
    assert all({"distance", "FD_toy", "KL_toy", "CLAP_toy"} <= {*table[row]} for row in ends)
    assert all(0 < table[row]["distance"].value < 1 for row in ends)
    assert curves["toy"].shape == curves[never].shape == (301,)
    same = slice(0, 58)  # until the first reading
    assert np.array_equal(curves["toy"][same], curves[never][same])
    assert not np.array_equal(curves["toy"], curves[never])


def test_playing_is_watched_and_not_changed(forgetful):
    system = sample.System(sample.SHIPPED)
    codes, distance = words.play(system, ["jazz"], 70)
    made = sample.generate(system.lm, system.encoder, ["jazz"], 70, [0], **system.sampling)
    assert torch.equal(codes, torch.cat([*made], 2)) and distance.shape == (1, 70)


def test_bands_rise_at_a_note():
    level = torch.zeros(1, 8, 50)
    level[:, :, 20:] = 6.0
    codec = type("Codec", (), dict(from_codes=lambda self, codes: codes))()
    assert words.rise(codec, level, [20]).value == 6 and words.rise(codec, level, [30]).value == 0
