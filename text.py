"""The text encoder: captions -> vectors, by Flan-T5 or by a small T5 that ships.

T5's encoder (arXiv 1910.10683, with the gated GELU of v1.1) is a transformer that looks both ways.
Ours is `T5`; its weights have the names of transformers' `T5EncoderModel`, and give what it gives.
"""

import functools
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

TYPICAL_LENGTH = 64  # tokens of a caption, to size batches and memory by


class T5(nn.Module):
    """T5's encoder. ids (B,S), mask (B,S), True at real tokens -> hidden (B,S,d_model)."""

    EDGES = 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91  # between buckets of distances

    def __init__(self, vocab_size, d_model, num_layers, num_heads, d_kv, d_ff):
        super().__init__()
        self.d_model, self.layers, self.heads = d_model, num_layers, num_heads
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        norm = lambda: nn.RMSNorm(d_model, 1e-6)
        inner = num_heads * d_kv
        blocks = []
        for i in range(num_layers):
            attention = nn.ModuleDict({name: linear(d_model, inner) for name in "qkv"})
            attention["o"] = linear(inner, d_model)
            if i == 0:
                attention["relative_attention_bias"] = nn.Embedding(32, num_heads)
            gated = nn.ModuleDict(dict(wi_0=linear(d_model, d_ff), wi_1=linear(d_model, d_ff)))
            gated["wo"] = linear(d_ff, d_model)
            first = nn.ModuleDict({"SelfAttention": attention, "layer_norm": norm()})
            second = nn.ModuleDict({"DenseReluDense": gated, "layer_norm": norm()})
            blocks.append(nn.ModuleDict({"layer": nn.ModuleList([first, second])}))
        self.shared = nn.Embedding(vocab_size, d_model)
        self.encoder = nn.ModuleDict(dict(block=nn.ModuleList(blocks), final_layer_norm=norm()))
        self.dropout = nn.Dropout(0.1)
        for name, module in self.named_modules():  # T5 has no 1 / sqrt(d_kv): it is in q's weights
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if name.endswith(".q"):
                    module.weight.data /= math.sqrt(d_kv)

    def forward(self, ids, mask):
        h = self.dropout(self.shared(ids))
        first = self.encoder["block"][0]["layer"][0]["SelfAttention"]
        bias = first["relative_attention_bias"](self.buckets(ids.shape[1], ids.device))  # (S, S, H)
        bias = rearrange(bias, "i j h -> h i j").masked_fill(~mask[:, None, None], -1e9)
        for block in self.encoder["block"]:
            attention, gated = block["layer"]
            layer, x = attention["SelfAttention"], attention["layer_norm"](h)
            heads = lambda v: rearrange(v, "b s (h d) -> b h s d", h=self.heads)
            q, k, v = (heads(layer[name](x)) for name in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
            h = h + self.dropout(layer["o"](rearrange(y, "b h s d -> b s (h d)")))
            layer, x = gated["DenseReluDense"], gated["layer_norm"](h)
            y = layer["wo"](F.gelu(layer["wi_0"](x), approximate="tanh") * layer["wi_1"](x))
            h = h + self.dropout(y)
        return self.dropout(self.encoder["final_layer_norm"](h))

    def buckets(self, S, device):
        """(S, S): the bucket of the distance from token i to token j, 16 in each direction."""
        place = torch.arange(S, device=device)
        distance = place - place[:, None]
        edges = torch.tensor(self.EDGES, device=device)
        return torch.bucketize(distance.abs(), edges, right=True) + 16 * (distance > 0)


class TextEncoder(nn.Module):
    """Captions -> T5's last hidden states: the paper's frozen Flan-T5 Base from the hub, or a small
    T5 with its own tokenizer. Either may be frozen, or trained with the language model.

    `encoder(["slow piano waltz", ""]) -> text (B,S,d_text), mask (B,S), tempo (B,)`. S is the
    length of the longest caption, with the closing </s>. The empty string, the unconditional half
    of guidance, is </s> alone. tempo is the bpm that the caption names, 0 if it names none.

    Captions beyond `max_tokens` are cut, which `cut` counts.
    """

    TEMPO = re.compile(r"(?<![\d.])(\d{2,3}(?:\.\d+)?) ?(?:bpm|beats (?:per|a) minute)", re.I)

    def __init__(self, tokenizer_json, encoder, name, max_tokens):
        super().__init__()
        self.tokenizer_json = tokenizer_json
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.enable_truncation(max_tokens)
        self.encoder, self.d_text = encoder, encoder.d_model
        self.name, self.max_tokens = name, max_tokens
        self.cut = 0
        self.fill = 0  # captions are filled up to this many tokens, all of them read (authors' own)

    @classmethod
    def small(cls, tokenizer_json: str, d_model=128, layers=2, max_tokens=128):
        """A new T5 with `layers` blocks; tokenizer_json: the text of a tokenizer.json."""
        vocab_size = Tokenizer.from_str(tokenizer_json).get_vocab_size()
        encoder = T5(vocab_size, d_model, layers, d_model // 32, 32, 2 * d_model)
        return cls(tokenizer_json, encoder, "small", max_tokens)

    @classmethod
    def pretrained(cls, name="google/flan-t5-base", max_tokens=256):
        """A published T5 v1.1 (Flan-T5 is one), frozen: a name on the hub, from where it is loaded
        once, or a folder with config.json, model.safetensors and tokenizer.json. ValueError if it
        cannot be had, or is another kind of model."""
        from huggingface_hub import hf_hub_download

        get = functools.partial(hf_hub_download, name)
        if Path(name).is_dir():
            get = Path(name).joinpath
        try:
            config = json.loads(Path(get("config.json")).read_text(encoding="utf-8"))
            tokenizer_json = Path(get("tokenizer.json")).read_text(encoding="utf-8")
            shape = "vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff"
            encoder = T5(**{key: config[key] for key in shape})
            tensors = load_file(get("model.safetensors"))
            encoder.load_state_dict({key: tensors[key] for key in encoder.state_dict()})
        except Exception as error:  # the hub's client raises many kinds; all mean the same here
            raise ValueError(
                f"the text encoder {name} could not be loaded ({type(error).__name__}): it is "
                f"downloaded once from https://huggingface.co/{name}, or name a folder"
            ) from None
        return cls(tokenizer_json, encoder.requires_grad_(False).eval(), name, max_tokens)

    @property
    def trained(self):
        """Whether it is trained with the language model."""
        return any(p.requires_grad for p in self.parameters())

    def is_too_long(self, caption):
        return bool(self.tokenizer.encode(caption).overflowing)

    def forward(self, captions: list[str], multiple=1):
        """multiple: S is rounded up to a multiple of this, at most to max_tokens."""
        self.tokenizer.enable_padding(
            pad_id=self.tokenizer.token_to_id("<pad>"),
            pad_to_multiple_of=min(multiple, self.max_tokens),
        )
        batch = self.tokenizer.encode_batch(captions)
        tensor = functools.partial(torch.tensor, device=self.encoder.shared.weight.device)
        ids = tensor([one.ids for one in batch])
        mask = tensor([one.attention_mask for one in batch]).bool()
        tempo = tensor([*map(self._tempo, captions, batch)])
        missing = max(0, self.fill - ids.shape[1])
        ids = F.pad(ids, (0, missing), value=self.tokenizer.token_to_id("</s>"))
        mask = F.pad(mask, (0, missing))
        text = self.encoder(ids, mask)
        # T5 sees the caption alone, the language model all that was filled in.
        return text, torch.ones_like(mask) if self.fill else mask, tempo

    def _tempo(self, caption, encoding):
        """The bpm within the part of the caption that is kept."""
        if encoding.overflowing:
            self.cut += 1
            caption = self.tokenizer.decode(encoding.ids)
        found = self.TEMPO.search(caption)
        return float(found[1]) if found else 0.0

    def pooled(self, captions):
        """-> (B, d_text), the mean over a caption's tokens; of the empty string that of </s>."""
        text, mask, _ = self(captions)
        mask = mask[..., None].to(text.dtype)
        return (text * mask).sum(1) / mask.sum(1)
