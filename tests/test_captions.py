"""Captions and vocals: the words are read and made as claimed, and the code around the big models
holds on small ones of the same interface, with random weights."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import lines, tone, write_song

import data
from curate import VOCAL
from paper import captions
from paper.captions import Describer, LPMusicCaps, Separator, mentions_vocals, read_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "caption, vocal",
    [
        ("A woman sings a sad song over piano", True),
        ("Male vocalist, acoustic guitar", True),
        ("a choir and an organ", True),
        ("Rapping over a boom bap beat", True),
        ("No vocals, only strings", True),
        ("Lyrics in French", True),
        ("a soprano over strings", True),
        ("tenor sax and a baritone saxophone", False),
        ("A rapid single strings chorus effect in a classing key", False),
        ("The single has a passing bass", False),
        ("a rapid chorus of baritone saxophones, a trap beat", False),
        ("Using strings", False),
        ("A guitar moves between the left and right speakers", False),
        ("A man speaks", True),
    ],
)
def test_words_for_voices_are_found(caption, vocal):
    assert mentions_vocals(caption) is vocal


def test_tags_become_facts():
    tags = ["genre---triphop", "genre---funk", "instrument---piano", "instrument---drummachine",
            "instrument---voice", "mood/theme---dark"]  # fmt: skip
    facts = dict(genre="trip hop and funk", instrument="piano and drum machine", mood="dark")
    assert captions.facts_of(tags, vocals=False) == facts
    assert "voice" in captions.facts_of(tags, vocals=True)["instrument"]
    sung = [
        "instrument---voice",
        "genre---gangstarap",
        "genre---rapfrancais",
        "genre---christianrap",
    ]
    assert captions.facts_of(sung, vocals=False) == {}


def test_tables_of_captions_are_read_in_every_form(tmp_path):
    expected = {"a.wav": "one", "b/c.wav": 'two, "three"'}
    folder = tmp_path / "tsv and others"  # the extension counts, not the folder's name
    folder.mkdir()
    (folder / "t.csv").write_text('path,caption\na.wav,one\nb/c.wav,"two, ""three"""\n')
    (folder / "t.tsv").write_text('caption\tpath\none\ta.wav\ntwo, "three"\tb/c.wav\n')
    rows = [{"path": k, "caption": v} for k, v in expected.items()]
    rows += [{"path": "a.wav", "caption": "later"}, {"path": "d.wav", "caption": " "}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        assert read_table(str(folder / name)) == expected


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        (
            "t.csv",
            "file,words\na,b\n",
            "table with columns `path` and `caption`",
        ),
        ("t.jsonl", "no json", "could not be read as a table"),
        ("gone.csv", None, "could not be read as a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path, name, text, sentence):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_table(str(tmp_path / name))


def test_the_published_captions_are_found_and_two_numberings_told_apart(tmp_path, monkeypatch):
    """disco-eth/jamendo-fma-captions: FMA's ids have six digits, Jamendo's none in front."""
    ids = ["000140", "155320", "214", "1395508", "999999", "100000"]
    rows = [dict(id=i, chatgpt_texts=[f"of {i}", "more"], tags_text="x") for i in ids]
    rows += [dict(id="7", chatgpt_texts=[], tags_text="x")]
    monkeypatch.setattr(captions, "hf_hub_download", lambda name, file, repo_type: file)
    monkeypatch.setattr(captions, "read_rows", lambda file: rows)
    read_table.cache_clear()
    table = read_table("disco-eth/jamendo-fma-captions")
    assert table == {i: f"of {i}" for i in ("000140", "214", "1395508", "999999")}
    read_table.cache_clear()
    rows[:] = rows[1:]  # without FMA's there is one numbering
    assert read_table("someone/jamendo")["155320"] == "of 155320"
    read_table.cache_clear()


def test_parquet_is_read_where_pyarrow_is_there(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(dict(path=["a.wav", None], caption=["one", None]))
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    assert read_table(str(tmp_path / "t.parquet")) == {"a.wav": "one"}


def test_a_table_gives_a_folder_its_captions(tmp_path):
    for name in ("a", "b", "c"):
        write_song(tmp_path / f"music/{name}.wav", tone(2), caption=None)
    (tmp_path / "music/c.txt").write_text("from beside it")
    (tmp_path / "t.csv").write_text("path,caption\na.wav,from the table\n")
    table = ["--captions", str(tmp_path / "t.csv")]
    data.main(["folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), *table])
    found = {
        (r["track"], r["caption"], r["caption_from"]) for r in lines(tmp_path / "d/manifest.jsonl")
    }
    assert found == {
        ("a.wav", "from the table", "table"),
        ("b.wav", "music", "nothing"),
        ("c.wav", "from beside it", "sidecar"),
    }


# ------------------------------------------------------------------ stand-ins for the models ----


def tokenizer():
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_file(str(ROOT / "toy/tokenizer.json"))
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens(dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>"))
    return made


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A folder as LP-MusicCaps' users have it, with a small BART of random weights."""
    from transformers import BartConfig

    folder, words = tmp_path_factory.mktemp("lp-music-caps"), tokenizer()
    words.save_pretrained(folder)
    sizes = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1,
                 decoder_layers=1, encoder_attention_heads=2,
                 decoder_attention_heads=2)  # fmt: skip
    config = BartConfig(
        vocab_size=len(words), max_position_embeddings=200, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        decoder_start_token_id=words.eos_token_id, forced_eos_token_id=words.eos_token_id, **sizes,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(0)
    torch.save({"state_dict": {}}, folder / "transfer.pth")
    with pytest.raises(ValueError, match="holds no captioner.* it lacks"):
        LPMusicCaps(folder)
    with pytest.MonkeyPatch.context() as patch:  # let it start, and keep its weights
        patch.setattr(LPMusicCaps, "load_state_dict", lambda *_, **__: ([], []))
        weights = LPMusicCaps(folder).state_dict()
    published = {"audio_encoder.mel_encoder.mel_scale.fb": torch.zeros(513, 128)}
    torch.save({"state_dict": weights | published}, folder / "transfer.pth")
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, words = tmp_path_factory.mktemp("chat"), tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_captioner_describes_each_ten_seconds(captioner):
    model = LPMusicCaps(captioner)
    audio = torch.from_numpy(tone(30)).float()[None]
    assert len(model(audio)) == 3 and len(model(audio[:, : 44100 * 12])) == 2
    assert len(model(audio[:, :44100])) == 1, "short clips are filled up"
    assert model(audio) == model(audio) and all(isinstance(text, str) for text in model(audio))


def test_the_captioners_spectrogram_is_in_dB_of_mel_bands():
    mel = captions.log_mel(torch.from_numpy(tone(10, 16000, 1000.0)).float()[None])
    assert mel.shape == (1, 128, 1001)
    edges = 700 * np.expm1(np.linspace(0, np.log1p(8000 / 700), 130))
    assert abs(edges[1 + int(mel[0].mean(1).argmax())] - 1000) < 40, "its band holds the tone"
    assert mel.min() >= -100.001


@pytest.fixture
def describe(monkeypatch, chat_model):
    """Sentences -> what the chat model makes of them."""
    monkeypatch.setattr(captions, "LPMusicCaps", lambda name: torch.nn.Identity())
    return Describer("ear", str(chat_model))


def test_a_chat_model_makes_one_caption_of_three(describe, chat_model):
    parts = ["a calm piano", "a calm piano with drums", "drums"]
    said, by = describe(parts)
    assert said and said == describe(parts)[0] and by == f"ear, {chat_model}"
    assert not any(part in said for part in parts[:2])
    assert describe(parts[:1]) == (parts[0], "ear"), "one sentence is the caption"


def test_a_silent_chat_model_leaves_the_captions_as_they_are(describe):
    eos = describe.chat.tokenizer.eos_token_id
    describe.chat.model.generate = lambda input_ids, **_: torch.cat(
        [input_ids, torch.tensor([[eos]])], 1
    )
    assert describe(["one.", "two.", "one."])[0] == "one. two."


def test_a_model_that_does_not_chat_is_named(chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="could not be loaded.*chat_template"):
        Describer("ear", str(tmp_path / "m"))


@pytest.mark.parametrize(
    "answer, text",
    [
        ('Here is the description:\n\n"A calm piano piece."', "A calm piano piece."),
        ("A calm\n piano piece. ", "A calm piano piece."),
        ("  ", "one. two."),
    ],
)
def test_courtesies_are_cut(describe, answer, text):
    describe.chat = lambda question, **_: [dict(generated_text=answer)]
    assert describe(["one.", "two."])[0] == text


@pytest.fixture
def demucs(monkeypatch):
    """demucs.api's interface: four stems, the vocals being half of everything."""
    calls = []

    class Fake:
        def __init__(self, name, shifts):
            assert (name, shifts) == ("htdemucs", 0)

        def separate_tensor(self, audio):
            assert audio.shape[0] == 2
            calls.append(audio.shape[1])
            return audio, dict(drums=0.1 * audio, bass=0.2 * audio, vocals=0.5 * audio,
                               other=0.2 * audio)  # fmt: skip

    monkeypatch.setitem(sys.modules, "demucs", ModuleType("demucs"))
    monkeypatch.setitem(sys.modules, "demucs.api", SimpleNamespace(Separator=Fake))
    return calls


def test_vocals_are_taken_out_and_the_rest_keeps_its_level(demucs):
    audio = torch.from_numpy(tone(2)).float()[None]
    rest = Separator()(audio)
    assert rest.shape == audio.shape and torch.allclose(rest, audio / 2, atol=1e-4)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (Separator, "pip install demucs.*--keep-vocals"),
        (lambda: Describer("ear", "./no-such-model"), "--rephraser ./no-such-model could not be"),
        (lambda: LPMusicCaps("./no-such-model"), "facebook/bart-base"),
    ],
)
def test_a_missing_model_is_one_sentence_with_the_cure(monkeypatch, make, sentence):
    monkeypatch.setitem(sys.modules, "demucs", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_whole_road_vocals_out_and_captions_by_models(tmp_path, demucs, captioner, chat_model):
    write_song(tmp_path / "music/a.wav", np.r_[tone(22), tone(4, pitch=300.0)], caption=None)
    write_song(tmp_path / "music/sung.wav", tone(3), caption="a singer with a guitar")
    data.main([
        "folder", str(tmp_path / "music"), "--out", str(tmp_path / "d"), "--no-keep-vocals",
        "--no-keep-vocal-captions", "--captioner", str(captioner), "--rephraser", str(chat_model),
    ])  # fmt: skip
    (row,) = lines(tmp_path / "d/manifest.jsonl")
    assert row["caption"] and row["caption_from"] == f"{captioner}, {chat_model}"
    assert len(demucs) == 1, "a clip once, and none that its caption rules out"
    (skipped,) = lines(tmp_path / "d/skipped.jsonl")
    assert skipped["reason"] == VOCAL and skipped["path"].endswith("sung.wav")
