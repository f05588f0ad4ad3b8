"""The toy world: reproducible music, true captions, a corpus that is what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import train
from checkpoint import load_checkpoint, read_config, read_tensors, save_checkpoint
from data import Clips
from model import LMConfig, MusicLM
from text import TextEncoder
from toy import __main__, band, composer, corpus, songbook, words

LENGTHS = (None, "words", "sentence", "paragraph")


def notes(parts):
    return [note for part in parts for note in part.notes]


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["toy", *map(str, words)])
    __main__.main()


def test_a_clip_is_determined_by_its_index():
    for index in (0, 7, 12345):
        clip = songbook.sample_clip(index)
        assert clip == songbook.sample_clip(index) != songbook.sample_clip(index + 1)
        assert notes(composer.compose(*clip)) == notes(composer.compose(*clip))
    assert songbook.sample_clip(0, split_seed=1) != songbook.sample_clip(0)


def test_factors_are_balanced_and_possible():
    clips = [songbook.sample_clip(i)[0] for i in range(4000)]
    genres = [f["genre"] for f in clips]
    assert len(songbook.GENRES) >= 16
    for genre in songbook.GENRES:
        assert genres.count(genre) / len(clips) == pytest.approx(1 / len(songbook.GENRES), rel=0.35)
    assert np.mean([f["rhythm"] is not None for f in clips]) == pytest.approx(0.15, abs=0.02)
    for f in clips:
        assert f["tempo"] in songbook.GENRES[f["rhythm"] or f["genre"]].tempo
        assert f["lead"] in songbook.GENRES[f["genre"]].leads


def test_a_corpus_may_have_more_mixtures_or_none():
    for share in (0.0, 0.4, 0.95):
        mixed = [
            songbook.sample_clip(i, mixtures=share)[0]["rhythm"] is not None for i in range(2000)
        ]
        assert np.mean(mixed) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    "words, why",
    [
        (["build", "--clips", "0"], "--clips must be in"),
        (["build", "--mixtures", "1"], r"--mixtures must be in \[0, 0.95\]"),
        (["ship", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_wrong_options_are_refused_before_any_work(monkeypatch, words, why):
    with pytest.raises(ValueError, match=why):
        command(monkeypatch, *words)


def test_what_ships_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    """All names in the training options of a shipped model mean something elsewhere."""
    lm = MusicLM(LMConfig(codebooks=1, blocks=1, d_model=64, d_text=128, codebook_size=1024))
    options = dict(data="/home/me/data", out="out/x", init_from="toy", text_encoder="toy", steps=3)
    extra = dict(train=options, step=3, best=0.5, codec="toy", sampling=dict(top_k=9, guidance=2))
    save_checkpoint(tmp_path / "run", lm, corpus.text_encoder(), extra)
    shipped_before = corpus.HERE
    monkeypatch.setattr(corpus, "HERE", tmp_path / "toy")
    command(monkeypatch, "ship", tmp_path / "run")
    config = read_config(tmp_path / "toy" / "lm")
    assert config["train"] == dict(init_from="toy", text_encoder="toy", steps=3)
    assert config["sampling"] == dict(top_k=9, guidance=2)
    assert config["step"] == 3 and config["best"] == 0.5 and config["codec"] == "toy"
    shipped = load_checkpoint(tmp_path / "toy" / "lm").state_dict()
    assert all((v.half() == shipped[k].half()).all() for k, v in lm.state_dict().items())
    stored = read_tensors(tmp_path / "toy" / "lm")
    assert {v.dtype for v in stored.values()} == {torch.float16}  # they are in the repository
    encoder = corpus.text_encoder()
    encoder.name = str(tmp_path)
    monkeypatch.setattr(TextEncoder, "pretrained", lambda name: encoder)
    save_checkpoint(tmp_path / "run", lm, encoder, extra)
    with pytest.raises(ValueError, match="text encoder is a folder"):
        command(monkeypatch, "ship", tmp_path / "run")
    for folder in ("lm", "refiner"):
        names = read_config(shipped_before / folder)["train"].values()
        assert {name for name in names if isinstance(name, str)} <= {"toy"}


def test_training_and_judging_need_no_midi_and_no_utf8_locale():
    """In a process of its own, where all text files are ASCII unless opened as UTF-8."""
    program = """
import sys, torch, train
from data import Clips
from toy import judge
folder = train.data_folder("toy")
assert len(Clips(folder, "train")) > 5000
print(train.new_encoder("toy").tokenizer.encode("jazz reggae").ids)
judge.load_judge().listen([torch.ones(88200)])
print([name for name in ("mido", "toy.composer", "toy.band") if name in sys.modules])
"""
    env = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    root = Path(corpus.HERE).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    tokens = corpus.text_encoder().tokenizer.encode("jazz reggae").ids
    assert done.stdout.decode().split("\n")[:2] == [str(tokens), "[]"]


def test_a_corpus_of_another_codec_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNPACKED", tmp_path)
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(ValueError, match="remove it"):
        command(monkeypatch, "build", "--out", tmp_path)
    with pytest.raises(ValueError, match="--out needs --corpus-only"):  # or it would not ship
        command(monkeypatch, "build", "--out", tmp_path / "elsewhere")
    (tmp_path / "plan.json").write_text("{}")  # the user's own music
    with pytest.raises(ValueError, match="holds other music"):
        command(monkeypatch, "build", "--corpus-only", "--out", tmp_path)


def test_every_genre_and_mood_plays_from_the_first_moment():
    for i, genre in enumerate(songbook.GENRES):
        for mood in songbook.MOODS:
            factors = songbook.sample_clip(i)[0] | dict(genre=genre, rhythm=None, mood=mood)
            factors["lead"] = next(iter(songbook.GENRES[genre].leads))
            heard = notes(composer.compose(factors, i))
            assert min(n[0] for n in heard) < 0.05
            assert max(n[1] for n in heard) <= 10.0
            assert len(heard) > 20


def test_moods_are_audible():
    def density(mood):
        clips = [(songbook.sample_clip(i)[0] | dict(mood=mood), i) for i in range(40)]
        return np.mean([len(notes(composer.compose(*clip))) for clip in clips])

    assert density("energetic") > 1.3 * density("calm")


@pytest.mark.parametrize("length", LENGTHS)
def test_captions_tell_the_truth(length):
    """No number, instrument or genre but the clip's own, over many captions."""
    rng = np.random.default_rng(0)
    leads = {name: lead for lead, row in songbook.LEADS.items() for name in row[3]}
    for _ in range(1500):
        f = songbook.sample_factors(rng)
        text = words.caption(f, rng, length).lower()
        assert not re.search(r"[{}|*/]|  | [,.]|,[,.]|\.\.|^,|,$|lead lead", text), text
        assert not re.search(r"\ba (?!one)[aeiou]|\ban [^aeiou]", text), text
        for number in re.findall(r"\d+(?= (?:bpm|beats))", text):
            assert int(number) == f["tempo"], text
        tempo = words.tempo_word(f["tempo"])
        if tempo != "slow":
            assert not re.search(r"\bslow\b", text), text
        if tempo != "fast":
            assert not re.search(r"\bfast\b", text), text
        for genre in songbook.GENRES:
            if genre not in (f["genre"], f["rhythm"]):
                g, r = songbook.GENRES[f["genre"]], songbook.GENRES[f["rhythm"] or f["genre"]]
                own = " ".join([*g.words, *g.band, *r.words, *r.beat, r.place])
                assert genre in own or not re.search(rf"\b{genre}\b", text), (genre, text)
        if f["rhythm"] and f["genre"] in text and f["rhythm"] in text:
            assert text.index(f["genre"]) < text.index(f["rhythm"]), text
        named = [
            lead for name, lead in leads.items() if re.search(rf"\b{name} (?:lead|melody)\b", text)
        ]
        assert set(named) <= {f["lead"]}, text


def test_caption_lengths_and_variety():
    rng = np.random.default_rng(0)
    f = songbook.sample_clip(3)[0]
    counts = {k: [len(words.caption(f, rng, k).split()) for _ in range(300)] for k in LENGTHS[1:]}
    assert np.mean(counts["words"]) < 5 < np.mean(counts["sentence"]) < 16
    assert 20 < np.mean(counts["paragraph"]) < 45
    assert len({words.caption(f, rng) for _ in range(300)}) > 200


def test_a_refiners_captions_name_the_lead():
    rng = np.random.default_rng(0)
    clips = [songbook.sample_clip(i)[0] for i in range(400)]
    names = lambda f, text: any(name in text.lower() for name in songbook.LEADS[f["lead"]][3])
    share = lambda draw: np.mean([names(f, draw(f, rng)) for f in clips])
    assert 0.5 < share(words.caption) < 0.8
    assert 0.9 < share(words.caption_with_lead) < 0.99
    assert share(lambda f, rng: train.caption_of(dict(factors=f), rng, refining=True)) > 0.9


def test_any_text_can_be_encoded_and_the_worlds_words_are_single_tokens():
    tokenizer = Tokenizer.from_file(str(corpus.TOKENIZER))
    assert tokenizer.get_vocab_size() <= 1000
    for text in ("jazz reggae", "été 🎷 \x00", "a techno track at 132 bpm", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text.lower().strip()
    assert len(tokenizer.encode("slow piano waltz").ids) == 4  # with the end token
    assert len(tokenizer.encode("techno 132 bpm").ids) == 4


def test_the_shipped_corpus_is_unpacked_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNPACKED", tmp_path / "data" / "toy")
    for _ in range(2):
        folder = corpus.folder()
    assert [p.name for p in folder.parent.iterdir()] == ["toy"]
    train, valid = Clips(folder, "train", codec="toy"), Clips(folder, "valid", codec="toy")
    assert len(train) > 10 * len(valid) > 3000
    assert len(Clips(folder, "train", codebooks=9)) >= 900
    for i in (0, 100):
        assert train.codes(i).shape == (1, 862) and train.codes(i).max() < 1024
    # The factors are those of the clips' indices: the captions describe this music.
    assert valid.rows[1]["factors"] == songbook.sample_clip(16)[0]
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match="unfinished corpus: remove it"):
        corpus.folder()


def test_music_is_rendered_or_the_missing_program_is_named(monkeypatch):
    if shutil.which("fluidsynth"):
        clips = [composer.compose(*songbook.sample_clip(i), 2.0) for i in range(2)]
        for audio in band.render_many(clips, 2.0):
            assert audio.shape == (88200,) and audio.dtype == np.float32
            assert 0.05 < np.sqrt(np.mean(audio**2)) < 0.12 and np.abs(audio).max() < 1
            assert np.sqrt(np.mean(audio[:22050] ** 2)) > 0.02
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get install fluidsynth"):
        band.render_many([composer.compose(*songbook.sample_clip(0), 1.0)], 1.0)


def test_the_text_encoder_knows_the_words():
    import torch

    encoder = corpus.text_encoder().eval()
    rng = np.random.default_rng(0)
    rows = [f for f in (songbook.sample_factors(rng) for _ in range(900)) if f["rhythm"] is None]
    genres = np.array([list(songbook.GENRES).index(f["genre"]) for f in rows])
    with torch.no_grad():
        said = encoder.pooled([words.caption(f, rng) for f in rows]).numpy()
    known, asked = said[:600], said[600:]
    means = np.stack([known[genres[:600] == g].mean(0) for g in range(len(songbook.GENRES))])
    nearest = np.linalg.norm(asked[:, None] - means, axis=2).argmin(1)
    assert (nearest == genres[600:]).mean() > 0.9
