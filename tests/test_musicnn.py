"""musicnn: its checkpoint is read as TensorFlow wrote it, and it hears what it should."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import lines, tagged, tone, write_song

import curate
import data
import evaluate
from audio import read_audio
from codec import load_codec
from paper import ear, musicnn
from paper.musicnn import Musicnn, message, read_checkpoint, tempo
from toy import corpus

CLIPS = Path(__file__).parents[1] / "docs/clips"
installed = pytest.mark.skipif(
    importlib.util.find_spec("musicnn") is None, reason="pip install --no-deps musicnn"
)


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def block(pairs):
    """A block of a LevelDB table: a key leaves out what it shares with the key before."""
    data, before = b"", ""
    for key, value in pairs:
        left = len(os.path.commonprefix([before, key]))
        before = key
        sizes = varint(left) + varint(len(key) - left) + varint(len(value))
        data += sizes + key[left:].encode() + value
    return data + bytes(4) + (1).to_bytes(4, "little")


def test_a_tensorflow_checkpoint_is_read(tmp_path):
    a, b = np.arange(300, dtype=np.float32).reshape(100, 3), np.float32([7])
    field = lambda n, value: varint(n << 3 | 2) + varint(len(value)) + value
    number = lambda n, value: varint(n << 3) + varint(value)
    shape = lambda *sizes: field(2, b"".join(field(2, number(1, n)) for n in sizes))
    first = number(1, 1) + shape(100, 3) + number(5, 1200) + varint(6 << 3 | 5) + bytes(4)
    second = number(1, 1) + shape(1) + number(4, 1200) + number(5, 4)
    keys = [("model/a", first), ("model/a/Adam", first), ("model/b", second)]
    tensors = block([("", number(1, 1)), *keys]) + b"\0" + bytes(4)
    (tmp_path / ".index").write_bytes(tensors + varint(len(tensors)).ljust(48, b"\0"))
    (tmp_path / ".data-00000-of-00001").write_bytes(a.tobytes() + b.tobytes())
    tensors = read_checkpoint(tmp_path)
    assert tensors.keys() == {"model/a", "model/b"}
    assert np.array_equal(tensors["model/a"], a) and np.array_equal(tensors["model/b"], b)
    assert message(second)[5] == [4]


@installed
def test_it_hears_what_the_clips_are():
    ears = Musicnn()
    assert {sum(map(torch.numel, t.weights.values())) for t in ears.taggers.values()} == {792079}
    clips = {file.stem: read_audio(file)[0] for file in CLIPS.glob("*.mp4")}
    facts = {name: ears.facts(audio) for name, audio in clips.items()}
    assert facts["techno"]["genre"] == "techno electronic" and facts["techno"]["pace"] == "fast"
    assert "flute" in facts["bossa-nova"]["instrument"]
    assert "jazz" in facts["jazz-reggae"]["genre"]
    assert facts["piano-waltz"]["pace"] == "slow"
    pianos = {name: ears.listen(audio.numpy())[1]["piano"] for name, audio in clips.items()}
    assert max(pianos, key=pianos.get) == "piano-waltz"
    embeddings, scores = ears.listen(np.zeros(44100, np.float32))  # less than a patch
    assert embeddings.shape == (1, 200) and len(scores) == len({*sum(musicnn.TAGS.values(), [])})


def test_mel_bands_are_slaneys_and_peak_where_a_tone_is():
    mel = musicnn.patches(tone(4, 44100, 1000.0))
    assert mel.shape == (1, musicnn.PATCH, musicnn.MELS)
    # On Slaney's scale 1,000 Hz is 15 of hz_to_mel(8000) = 45.25, of 97 steps.
    assert abs(int(mel.mean((0, 1)).argmax()) + 1 - 97 * 15 / 45.25) < 1


@pytest.mark.parametrize("bpm", [66, 90, 120, 174])
def test_tempo_is_that_of_a_click(bpm):
    audio = np.random.default_rng(0).normal(size=44100 * 12).astype(np.float32) * 1e-3
    for beat in np.arange(0, 11.5, 60 / bpm):
        audio[int(44100 * beat) :][:2000] += np.hanning(2000).astype(np.float32)
    assert min(abs(tempo(audio) * m / bpm - 1) for m in (0.5, 1, 2)) < 0.03
    assert tempo(np.zeros(44100 * 12, np.float32)) is None


@installed
def test_clips_without_a_caption_are_described_by_what_is_heard(tmp_path, capsys):
    music = tmp_path / "music"
    music.mkdir()
    (music / "0.mp4").symlink_to(CLIPS / "techno.mp4")
    (music / "forest walk.mp4").symlink_to(CLIPS / "bossa-nova.mp4")
    tagged(music / "c.mp3", genre="Folk")
    write_song(music / "d.wav", tone(4), caption="a tone")
    out = tmp_path / "d"
    data.main(["folder", str(music), "--out", str(out), "--captioner", "musicnn"])
    rows = {row["track"]: row for row in lines(out / "manifest.jsonl")}
    assert rows["0.mp4"]["facts"]["genre"] == "techno electronic"
    assert rows["0.mp4"]["caption_from"] == "musicnn"
    assert rows["forest walk.mp4"]["facts"].keys() >= {"name", "instrument"}
    assert rows["forest walk.mp4"]["caption_from"] == "musicnn and names"
    assert rows["c.mp3"]["facts"]["genre"] == "folk"  # what you wrote comes before what is heard
    assert "facts" not in rows["d.wav"] and rows["d.wav"]["caption_from"] == "sidecar"
    draws = {data.caption_of(rows["0.mp4"], np.random.default_rng(i)) for i in range(20)}
    assert len(draws) > 5 and any("techno electronic" in draw for draw in draws)
    assert "musicnn and names (1)" in capsys.readouterr().out


def test_without_musicnn_nothing_is_begun(tmp_path, monkeypatch):
    curate.load_models.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_song(tmp_path / "music/d.wav", tone(4), caption=None)
    command = ["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d")]
    with pytest.raises(ValueError, match="pip install --no-deps musicnn"):
        data.main([*command, "--captioner", "musicnn"])
    monkeypatch.undo()
    data.main(command)  # the folder is not held by the command that failed
    assert data.Clips(tmp_path / "d", None).rows


def test_auc_counts_pairs():
    scores, named = np.array([0.9, 0.2, 0.5, 0.5]), np.array([1, 0, 1, 0])
    assert ear.auc(scores, named) == (1 + 1 + 1 + 0.5) / 4
    assert ear.auc(scores, np.ones(4)) == 0.5


def test_tags_count_where_enough_prompts_name_them():
    heard = SimpleNamespace(tags=np.zeros((10, len(ear.NAMED))))
    heard.tags[:5, ear.NAMED.index("techno")] = 1
    captions = ["fast Techno, 140 bpm"] * 4 + ["a techno-like beat"] + ["hip-hop with beats"] * 5
    cells = ear.Ear.cells(None, heard, captions)
    assert cells["techno (5)"].value == 1 and cells["hip-hop (5)"].value == 0.5
    assert cells["fast (4)"].value == 0.5 and cells["beats (5)"].value == 0.5
    assert cells["AUC"].value == np.mean([1, 0.5, 0.5, 0.5])
    assert ear.Ear.cells(None, heard, ["jazz"] * 10) == {}


def test_the_toy_world_has_a_prompt_for_each_clip_that_is_heard(monkeypatch):
    monkeypatch.setattr(corpus, "play_clips", lambda clips: [np.zeros(1) for _ in clips])
    heard = lambda clips: SimpleNamespace(
        frames=[torch.zeros(1, 2) for _ in clips], tags=np.eye(160)
    )
    asked = ear.ask_toy(SimpleNamespace(listen=heard), load_codec("toy"), 80, ["sentence"])
    count = len(asked["prompts"]["sentence"])
    assert count < 80 and len(asked["real"].tags) == len(asked["codes"]) == count


@installed
def test_held_out_music_is_what_a_system_is_compared_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        pitch = 200 + 100 * i
        caption = "techno" if i % 2 else "a slow piano"
        write_song(tmp_path / f"music/{i}.wav", tone(5, 44100, pitch), caption=caption)
    data.main(["folder", "music", "--out", "d", "--seconds", "2", "--valid", "0.9"])
    command = ["--data", "d", "--seconds", "2", "--count", "8", "codec-3"]
    evaluate.main(command)
    table = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line[:1] == "|"}
    assert rows.keys() >= {"real clips", "codec-9", "codec-1", "codec-3"}
    assert "FD_musicnn" in table and Path("results/d.md").exists()
    clips = data.Clips("d", "valid")
    row = next(row for row in clips.rows if row["start"] > 0)
    start = round(row["start"] * 44100)
    expected = read_audio(row["path"])[0][start : start + 44100]
    assert np.array_equal(ear.original(row, 1), expected)
    with pytest.raises(ValueError, match="was not made from audio files"):
        ear.ask(None, load_codec("toy"), corpus.folder(), 2, 2.0)
    with pytest.raises(ValueError, match="held-out clips of 99 s: 4 are needed"):
        evaluate.main(["--data", "d", "--seconds", "99"])
