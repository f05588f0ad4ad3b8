"""The published weights: the function that their authors' formulas give, and nothing else runs."""

import io
import math
import pickle

import pytest
import torch
from test_model import CAPTIONS, tokenizer_json

import checkpoint
from codec import load_codec
from paper.authors import FILL, read_authors
from text import TextEncoder

D, P, N, H, TEXT, SPECIAL = 64, 64, 16, 2, 32, 1024


def small_encoder(fill=FILL):
    torch.manual_seed(1)
    encoder = TextEncoder.small(tokenizer_json(), d_model=TEXT, layers=2, max_tokens=24).eval()
    encoder.fill = fill
    return encoder


def published(codebooks=1, blocks=2):
    """A state_dict with the names and the layout of theirs, of random values. Heads forget slowly,
    so that the whole text shows in what follows."""
    torch.manual_seed(0)
    shapes = {"condition_linear.weight": (D, TEXT), "condition_linear.bias": (D,)}
    shapes |= {"condition_norm.weight": (D,), "condition_norm.bias": (D,)}
    for k in range(codebooks):
        shapes |= {
            f"embedding.{k}.weight": (SPECIAL + 1, D),
            f"lm_head.{k}.weight": (SPECIAL + 1, D),
        }
    for i in range(blocks):
        mamba, ff = f"backbone.{i}.mamba.", f"backbone.{i}.ff."
        shapes |= {
            mamba + "norm.weight": (D,),
            mamba + "mamba.in_proj.weight": (2 * H * P + 2 * N + H, D),
            mamba + "mamba.conv1d.weight": (H * P + 2 * N, 1, 4),
            mamba + "mamba.conv1d.bias": (H * P + 2 * N,),
            mamba + "mamba.dt_bias": (H,),
            mamba + "mamba.A_log": (H,),
            mamba + "mamba.D": (H,),
            mamba + "mamba.norm.weight": (H * P,),
            mamba + "mamba.out_proj.weight": (D, H * P),
            ff + "norm.weight": (D,),
            ff + "feed_forward.0.weight": (2 * D, D),
            ff + "feed_forward.0.bias": (2 * D,),
            ff + "feed_forward.3.weight": (D, 2 * D),
            ff + "feed_forward.3.bias": (D,),
        }
    weights = {f"music_model.{k}": torch.randn(s) / s[-1] ** 0.5 for k, s in shapes.items()}
    for name, value in weights.items():
        if name.endswith("A_log"):
            value.uniform_(0.01, 0.1).log_()
        if "head" in name:
            value.mul_(3)
    return weights


def saved(weights, **more):
    """The bytes of such a file: the text encoder, the optimizer and the settings are in it too."""
    file = io.BytesIO()
    checkpoint = {
        "epoch": 3,
        "state_dict": {"text_encoder.shared.weight": torch.ones(5, 2)} | weights,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}}],
        "hyper_parameters": {"config": {"model": {"layers": 2, "is_incontext": True}}},
    }
    torch.save(checkpoint | more, file)
    return file.getvalue()


def write(folder, content):
    file = folder / "simba.ckpt"
    file.write_bytes(content)
    return file


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def slow(weights, columns, text):
    """Their model by its formulas, in fp64, one position and one head at a time.

    columns (K, L), begin token and delay included, text (S, TEXT) -> logits (K, L, V)
    """
    w = {k.removeprefix("music_model."): v.double() for k, v in weights.items()}
    text = text.double() @ w["condition_linear.weight"].T + w["condition_linear.bias"]
    text = text - text.mean(-1, keepdim=True)
    text = text / torch.sqrt((text * text).mean(-1, keepdim=True) + 1e-5)
    text = text * w["condition_norm.weight"] + w["condition_norm.bias"]
    music = sum(w[f"embedding.{k}.weight"][column] for k, column in enumerate(columns))
    x = torch.cat([text, music])  # (S + L, D)
    angles = [[t / 10000 ** (i / (D / 2 - 1)) for i in range(D // 2)] for t in range(len(x))]
    x = x + torch.tensor([[*map(math.cos, a), *map(math.sin, a)] for a in angles]).double()
    for i in range(sum(name.endswith("A_log") for name in w)):
        m = {k.split("mamba.mamba.")[-1]: v for k, v in w.items() if f"{i}.mamba.mamba" in k}
        h = rms_norm(x, w[f"backbone.{i}.mamba.norm.weight"])
        z, xBC, dt = (h @ m["in_proj.weight"].T).split([H * P, H * P + 2 * N, H], 1)
        state, out = [torch.zeros(P, N).double() for _ in range(H)], []
        for t in range(len(x)):
            taps = [m["conv1d.weight"][:, 0, 3 - j] * xBC[t - j] for j in range(min(4, t + 1))]
            u, B, C = silu(sum(taps) + m["conv1d.bias"]).split([H * P, N, N])
            u, delta = u.view(H, P), torch.log(1 + torch.exp(dt[t] + m["dt_bias"]))
            y = []
            for head in range(H):
                decay = torch.exp(-delta[head] * torch.exp(m["A_log"][head]))
                state[head] = decay * state[head] + delta[head] * torch.outer(u[head], B)
                y.append(state[head] @ C + m["D"][head] * u[head])
            out.append(rms_norm(torch.cat(y) * silu(z[t]), m["norm.weight"]))
        x = x + torch.stack(out) @ m["out_proj.weight"].T
        f = {k.split("ff.")[-1]: v for k, v in w.items() if f"{i}.ff." in k}
        h = rms_norm(x, f["norm.weight"]) @ f["feed_forward.0.weight"].T + f["feed_forward.0.bias"]
        h = h / 2 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ f["feed_forward.3.weight"].T + f["feed_forward.3.bias"]
    return torch.stack([x[len(text) :] @ w[f"lm_head.{k}.weight"].T for k in range(len(columns))])


def delayed(codes):
    """(K, L) -> (K, L + K): codebook k moves right by k + 1 and leaves the special token."""
    K, L = codes.shape
    columns = torch.full((K, L + K), SPECIAL)
    for k in range(K):
        columns[k, k + 1 : k + 1 + L] = codes[k]
    return columns


@pytest.mark.parametrize("codebooks", [1, 9])
@torch.no_grad()
def test_logits_are_those_of_the_formulas_at_once_and_step_by_step(codebooks, tmp_path):
    """Over 60 positions of text, nearly all of them filling, and 12 frames of music."""
    weights, encoder = published(codebooks), small_encoder()
    lm = checkpoint.load_checkpoint(write(tmp_path, saved(weights)))
    text, mask, _ = encoder(["jazz"])
    assert text.shape == (1, 60, TEXT) and mask.all()
    codes = torch.randint(1024, (1, codebooks, 12))
    columns = delayed(codes[0])
    expected = slow(weights, columns, text[0])  # (K, L + K, V)
    assert expected.std() > 1
    logits = lm(codes, text, mask)[0]
    for k in range(codebooks):
        torch.testing.assert_close(logits[k], expected[k, k : k + 12].float(), atol=1e-4, rtol=0)

    logits, state = lm.prefill(text, mask, codes=codes[:, :, :5])
    for s in range(6, columns.shape[1]):
        torch.testing.assert_close(logits[0], expected[:, s - 1].float(), atol=1e-4, rtol=0)
        logits = lm.step(columns[None, :, s], state)

    caption = slow(weights, columns, small_encoder(fill=0)(["jazz"])[0][0])
    assert (caption - expected).abs().max() > 0.1  # the filling does make a difference


def test_the_shape_is_read_from_the_tensors(tmp_path):
    config, tensors = read_authors(write(tmp_path, saved(published(9))))
    assert config == {
        "model": dict(
            variant="simba", codebooks=9, blocks=2, d_model=D, d_state=N, headdim=P, d_text=TEXT,
            trained_frames=2644, dropout=0.0,
        ),
        "text": {"name": "google/flan-t5-base", "fill": 60},
        "codec": "dac",
    }  # fmt: skip
    names = [name for name in tensors if name.startswith("lm.")]
    assert "lm.blocks.1.layers.0.in_proj.weight" in names and len(names) == 4 + 2 * 9 + 2 * 14


@torch.no_grad()
def test_captions_are_filled_with_the_end_token_which_t5_does_not_see():
    captions = [CAPTIONS[0], "jazz", ""]
    plain, filled = small_encoder(fill=0), small_encoder(fill=60)
    seen = []
    filled.encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    text, mask, _ = plain(captions)
    longer, all_read, _ = filled(captions)
    ids = torch.tensor([one.ids for one in plain.tokenizer.encode_batch(captions)])
    S = text.shape[1]
    assert S < 24 and (seen[0][0][:, :S] == ids).all()
    assert (seen[0][0][:, S:] == 1).all() and plain.tokenizer.token_to_id("</s>") == 1
    assert (seen[0][1][:, :S] == mask).all()
    assert (seen[0][1][:, S:] == 0).all()
    assert longer.shape == (3, 60, TEXT) and all_read.dtype == torch.bool and all_read.all()
    torch.testing.assert_close(longer[:, :S][mask], text[mask], atol=1e-5, rtol=1e-5)

    filled.fill = 2  # a batch that is longer stays as it is, and its padding is read all the same
    text2, all_read, _ = filled(captions)
    assert (text2 == text).all() and all_read.all() and not mask.all()


def test_sample_plays_the_file(tmp_path, monkeypatch):
    """From the command line to a sound file, with small stand-ins for what comes from the net."""
    import sample

    asked = []  # of the net
    monkeypatch.chdir(tmp_path)
    encoder = lambda name: asked.append(name) or small_encoder(fill=0)
    monkeypatch.setattr(TextEncoder, "pretrained", encoder)
    monkeypatch.setattr(sample, "load_codec", lambda name: asked.append(name) or load_codec("toy"))
    file = write(tmp_path, saved(published()))
    assert checkpoint.load_text_encoder(file).fill == 60
    sample.main(["jazz", "--checkpoint", str(file), "--seconds", "0.2", "--no-refiner"])
    assert asked == ["google/flan-t5-base", "google/flan-t5-base", "dac"]
    assert (tmp_path / "jazz.wav").stat().st_size > 10_000


class Harmful:
    def __reduce__(self):
        return open, ("harm", "w")  # what a pickle names is called when it is read


def refusal(folder, content):
    """The sentence that a bad file gets. Nothing that is pickled in it may have run."""
    file = write(folder, content)
    with pytest.raises(ValueError) as error:
        checkpoint.load_checkpoint(file)
    assert [p.name for p in folder.iterdir()] == [file.name]
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (lambda: saved(published(), extra=Harmful()), "might run code"),
        (lambda: pickle.dumps(Harmful()), "part of a file, or another model"),
        (lambda: saved(published())[:-5000], "part of a file"),
        (lambda: b"", "part of a file"),
        (lambda: saved({}, state_dict=[1, 2]), "another model"),
        (lambda: saved({"epoch": 3}), "no 'lm.embeddings.0.weight'"),
    ],
)
def test_a_broken_file_gets_one_sentence_and_runs_nothing(content, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(tmp_path, content())


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        (
            "backbone.1.ff.norm.weight",
            None,
            'Missing key(s) in state_dict: "blocks.1.norms.1.weight"',
        ),
        ("gate", torch.ones(1), 'Unexpected key(s) in state_dict: "gate"'),
        ("backbone.0.mamba.mamba.dt_bias", torch.ones(0), "another model"),
        ("backbone.0.mamba.mamba.dt_bias", torch.ones(()), "another model"),
        ("backbone.1.mamba.mamba.norm.weight", torch.ones(H * P + 1), "another shape"),
    ],
)
def test_another_model_gets_one_sentence(name, value, sentence, tmp_path):
    weights = published() | {f"music_model.{name}": value}
    weights = {name: value for name, value in weights.items() if value is not None}
    assert sentence in refusal(tmp_path, saved(weights))
