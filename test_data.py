"""Data folders: what goes in comes out, batches repeat, and bad files are named, not fatal."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import data
from data import Clips, Writer

CODEC = SimpleNamespace(name="toy", codebooks=9, codebook_size=1024, sample_rate=44100, hop=512)
ROOT = Path(__file__).parent


def some_clips(n, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        codes = rng.integers(1024, size=(9 if i % 2 else 1, 40 + i))
        yield codes, dict(split="valid" if i % 5 == 0 else "train", caption=f"clip {i}")


def describe(row, rng):
    return row["caption"]


def test_clips_come_back_as_written_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 2000)
    written = list(some_clips(20))
    for part in (written[:7], written[7:]):  # the second writer goes on where the first ended
        Writer(tmp_path, CODEC).add(part)
    assert len(list(tmp_path.glob("codes-*.bin"))) > 2
    for split in ("train", "valid"):
        clips = Clips(tmp_path, split, codebooks=1)
        expected = [(c, r) for c, r in written if r["split"] == split]
        assert len(clips) == len(expected)
        for i, (codes, row) in enumerate(expected):
            assert clips.rows[i]["caption"] == row["caption"]
            assert (clips.codes(i) == codes[:1]).all()
            assert (clips.codes(i, 5, 10) == codes[:1, 5:15]).all()
    full = Clips(tmp_path, "train", codebooks=9)
    assert [r["caption"] for r in full.rows] == [
        r["caption"] for c, r in written if r["split"] == "train" and len(c) == 9
    ]


def test_a_clip_that_was_being_written_when_the_process_died_is_gone(tmp_path):
    written = list(some_clips(6))
    Writer(tmp_path, CODEC).add(written[:4])
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write('{"shard": 0, "off')
    with open(tmp_path / "codes-00000.bin", "ab") as file:
        file.write(b"half a clip")
    Writer(tmp_path, CODEC).add(written[4:])
    clips = Clips(tmp_path, "train")
    assert [r["caption"] for r in clips.rows] == [f"clip {i}" for i in range(1, 5)]
    assert (clips.codes(3) == written[4][0][:1]).all()


def test_batches_are_a_function_of_seed_and_sample_number(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(20))
    clips = Clips(tmp_path, "train")
    codes, captions = clips.batch(0, 40, 32, 1, describe)
    assert codes.shape == (40, 1, 32)
    assert sorted(captions[:16]) == sorted(r["caption"] for r in clips.rows)  # an epoch: each once
    assert captions[:16] != captions[16:32]
    halves = [clips.batch(first, 20, 32, 1, describe) for first in (0, 20)]
    assert (np.concatenate([c.numpy() for c, _ in halves]) == codes.numpy()).all()
    other, _ = clips.batch(0, 40, 32, 2, describe)
    assert (other != codes).any()


def test_short_clips_are_padded_with_the_special_token(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(2))
    codes, _ = Clips(tmp_path, "train").batch(0, 1, 100, 0, describe)
    assert (codes[0, :, 41:] == 1024).all() and (codes[0, :, :41] < 1024).all()


def test_captions_are_dropped_at_the_rate_asked(tmp_path):
    Writer(tmp_path, CODEC).add(some_clips(20))
    _, captions = Clips(tmp_path, "train").batch(0, 4000, 4, 0, describe, caption_dropout=0.1)
    assert captions.count("") / 4000 == pytest.approx(0.1, abs=0.015)


def test_bad_folders_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no data at"):
        Clips(tmp_path / "none", "train")
    Writer(tmp_path, CODEC).add(some_clips(3))
    with pytest.raises(ValueError, match="made by the codec 'toy'"):
        Clips(tmp_path, "train", codec="dac")
    with pytest.raises(ValueError, match="no test clips"):
        Clips(tmp_path, "test")
    with pytest.raises(ValueError, match="begun with another codec"):
        Writer(tmp_path, SimpleNamespace(**{**vars(CODEC), "name": "dac"}))
    (tmp_path / "manifest.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="broken"):
        Clips(tmp_path, "train")


def test_a_folder_of_audio_becomes_clips_and_bad_files_are_named(tmp_path):
    music, out = tmp_path / "music", tmp_path / "data"
    (music / "deep").mkdir(parents=True)
    tone = 0.3 * np.sin(np.arange(5 * 44100) * 0.06)
    for name, audio, rate, caption in [
        ("good.wav", tone, 44100, "a tone"),
        ("deep/two words.flac", np.stack([tone, tone], 1), 48000, "two tones"),
        ("untold.wav", tone, 44100, None),
        ("silent.wav", 0 * tone, 44100, "nothing"),
        ("empty.wav", tone[:0], 44100, "less than nothing"),
        ("latin.wav", tone, 44100, "caf\xe9".encode("latin-1")),
    ]:
        soundfile.write(music / name, audio, rate)
        if caption is not None:
            caption = caption if isinstance(caption, bytes) else caption.encode()
            (music / name).with_suffix(".txt").write_bytes(caption)
    (music / "text.mp3").write_text("this is no music")
    (music / "text.txt").write_text("a caption")
    command = [sys.executable, ROOT / "data.py", "folder", music, "--out", out, "--seconds", "2"]
    for again in range(2):
        done = subprocess.run([*command, "--valid", "0"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{0 if again else 5} clips added" in done.stdout  # 5 s: 2 + 2 + 1; 4.6 s: 2 + 2
    skipped = [json.loads(line) for line in open(out / "skipped.jsonl")]
    assert {Path(s["path"]).name for s in skipped[:5]} == {
        "untold.wav", "silent.wav", "empty.wav", "latin.wav", "text.mp3",
    }  # fmt: skip
    clips = Clips(out, "train", codebooks=9, codec="toy")
    assert {row["caption"] for row in clips.rows} == {"a tone", "two tones"}


def test_no_audio_is_one_sentence_and_exit_2(tmp_path):
    command = [sys.executable, ROOT / "data.py", "folder", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no audio" in done.stderr
    assert not (tmp_path / "out").exists()
