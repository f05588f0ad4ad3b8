"""Does long music keep to its words? The measures, on a model that reads again after a second."""

import numpy as np
import pytest
import torch

import sample
from experiments import words


@pytest.fixture
def forgetful(monkeypatch):
    class Forgetful(sample.System):
        def __init__(self, folder, refiner=""):
            super().__init__(folder, refiner)
            self.lm.config.trained_frames = 60

    monkeypatch.setattr(sample, "System", Forgetful)
    monkeypatch.setattr(words, "TEN", 100)


def test_each_way_is_measured_at_both_ends(forgetful):
    table, curves = words.measure({"toy": sample.SHIPPED}, 3.5, 2)
    never = "toy, never read again"
    ends = [f"{way}: {end} 10 s" for way in ("toy", never) for end in ("first", "last")]
    assert {*table} == {*ends, "toy: readings", "toy: elsewhere"}
    assert all(
        {"distance", "told", "FD_toy", "KL_toy", "CLAP_toy"} <= {*table[row]} for row in ends
    )
    assert all(0 < table[row]["distance"].value < 1 for row in ends)
    assert all("repeated" in table[row] for row in ends if "last" in row)
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


def test_what_is_repeated_is_the_longest_run_without_overlap():
    tokens = np.array([1, 2, 3, 4, 9, 8, 2, 3, 4, 7])
    assert words.repeated(tokens) == 3 / words.FRAME_RATE
    assert words.repeated(np.zeros(10)) == 5 / words.FRAME_RATE  # the half, not all but one


def test_a_prompt_is_told_by_what_was_played_to_it():
    """By a model for which those codes are likely that are the length of the prompt, and as many
    more as there were frames before: it has a metronome."""

    class Head(torch.nn.Linear):
        def forward(self, codes):
            return 9.0 * torch.nn.functional.one_hot(codes, 40)

    class Model:
        heads = [Head(1, 1)]
        delay = staticmethod(lambda codes: codes)

        def read(self, columns, text, past):
            wanted = torch.tensor([[len(prompt) + past] for prompt in text])
            return wanted.expand(-1, columns.shape[2]), None

    system = type("System", (), dict(lm=Model(), encoder=lambda self, prompts: [prompts]))
    prompts = ["a" * n for n in range(1, 10)]
    codes = torch.tensor(range(1, 10))[:, None, None].expand(-1, 1, 7)
    later = words.told(system(), codes + 20, prompts, 20)
    assert later.tolist() == [True] * 9  # the last among eight, too
    assert not words.told(system(), codes.flip(0)[1:], prompts[:8], 0)[0]
    assert not words.told(system(), codes + 20, prompts, 0)[1:].any()
