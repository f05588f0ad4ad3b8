"""The text encoder: our T5 against transformers', a published folder, tempo and cut captions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import tokenizer_json
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from text import T5, TextEncoder

SHAPE = dict(vocab_size=50, d_model=48, num_layers=3, num_heads=5, d_kv=7, d_ff=33)


def theirs(**more):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**SHAPE, feed_forward_proj="gated-gelu", **more)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("length", [1, 2, 17, 301])  # farther apart than the last bucket
def test_t5_is_transformers(length):
    model, ours = theirs().double(), T5(**SHAPE).double().eval()
    weights = model.state_dict()
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    assert set(weights) - set(ours.state_dict()) <= {"encoder.embed_tokens.weight"}  # shared's
    ids = torch.randint(0, 50, (3, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    mask[2, 1:] = 0
    expected = model(input_ids=ids, attention_mask=mask)[0]
    # transformers' softmax is in fp32
    torch.testing.assert_close(
        ours(ids, mask.bool())[mask.bool()], expected[mask.bool()], atol=3e-6, rtol=0
    )


def test_a_published_folder_is_read(tmp_path):
    text = tokenizer_json()
    fast = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(text), pad_token="<pad>")
    model = theirs()
    model.resize_token_embeddings(len(fast))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    encoder = TextEncoder.pretrained(str(tmp_path), max_tokens=12)
    assert not encoder.trained and encoder.d_text == 48
    captions = ["slow piano waltz", "jazz", ""]
    batch = fast(captions, padding=True, return_tensors="pt")
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    found, mask, _ = encoder(captions)
    assert (mask == batch.attention_mask.bool()).all()
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)

    weights = load_file(tmp_path / "model.safetensors")  # the file of a whole T5 has a decoder too
    save_file(weights | {"decoder.x": torch.ones(1)}, tmp_path / "model.safetensors")
    TextEncoder.pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 3}))
    with pytest.raises(ValueError, match="could not be loaded"):
        TextEncoder.pretrained(str(tmp_path))


def _tokenizer(text):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


def test_pooled_text_is_the_mean_over_the_tokens_of_a_caption():
    encoder = TextEncoder.small(tokenizer_json(), d_model=32).eval()
    captions = ["slow piano waltz", "jazz", ""]
    alone = [encoder([caption])[0][0].mean(0) for caption in captions]
    torch.testing.assert_close(encoder.pooled(captions), torch.stack(alone))


def test_playing_does_not_import_transformers():
    import subprocess
    import sys
    from pathlib import Path

    program = "import sys, sample; sample.System('toy/lm'); print('transformers' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
