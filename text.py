"""The text encoder."""

import re

import torch
import torch.nn.functional as F
from torch import nn


class TextEncoder(nn.Module):
    """Captions -> T5's last hidden state. One class, two sizes: the paper's frozen Flan-T5 Base
    from the hub, or a small T5 with its own tokenizer. Either is frozen, or trained along.

    `encoder(["slow piano waltz", ""]) -> text (B, S, d_text), mask (B, S), tempo (B,)`, S the
    longest caption's tokens with the closing </s>; the empty string, guidance's unconditional half,
    is </s> alone. The tempo is the bpm that a caption names, 0 if none.
    """

    TEMPO = re.compile(r"(\d+(?:\.\d+)?) ?(?:bpm|beats (?:per|a) minute)", re.IGNORECASE)

    def __init__(self, tokenizer, encoder, name, max_tokens):
        super().__init__()
        self.tokenizer, self.encoder, self.name = tokenizer, encoder, name
        self.max_tokens = max_tokens  # longer captions are cut
        self.fill = 0  # a batch of fewer tokens is filled up with </s>; if not 0, all of S is read

    @classmethod
    def small(cls, tokenizer_json: str, d_model=128, layers=2, max_tokens=128):
        """A new T5 of `layers` blocks for a tokenizer given as the text of its tokenizer.json."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json), pad_token="<pad>", eos_token="</s>"
        )
        config = T5Config(
            vocab_size=len(tokenizer), d_model=d_model, d_kv=32, d_ff=2 * d_model,
            num_layers=layers, num_heads=d_model // 32, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return cls(tokenizer, T5EncoderModel(config), "small", max_tokens)

    @classmethod
    def pretrained(cls, name="google/flan-t5-base", max_tokens=256):
        """A published encoder by its name on the hub, or from a folder; ValueError if neither."""
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer, encoder = (
                AutoTokenizer.from_pretrained(name),
                T5EncoderModel.from_pretrained(name),
            )
        except Exception as error:  # the hub's client raises many kinds; all mean the same here
            raise ValueError(
                f"the text encoder {name} could not be loaded ({type(error).__name__}): it needs "
                f"https://huggingface.co/{name} once, or give a folder that holds its files"
            ) from None
        return cls(tokenizer, encoder.requires_grad_(False).eval(), name, max_tokens)

    @property
    def d_text(self):
        return self.encoder.config.d_model

    @property
    def trained(self):
        """Whether it learns with the language model."""
        return any(p.requires_grad for p in self.parameters())

    def too_long(self, caption):
        return len(self.tokenizer(caption).input_ids) > self.max_tokens

    def forward(self, captions: list[str], multiple=1):
        """multiple: S is rounded up to a multiple of this (at most to max_tokens)."""
        batch = self.tokenizer(
            captions, truncation=True, max_length=self.max_tokens, return_tensors="pt",
            padding=True, pad_to_multiple_of=min(multiple, self.max_tokens),
        ).to(self.encoder.device)  # fmt: skip
        ids, mask = batch.input_ids, batch.attention_mask
        if (missing := self.fill - ids.shape[1]) > 0:
            ids = F.pad(ids, (0, missing), value=self.tokenizer.eos_token_id)
            mask = F.pad(mask, (0, missing))
        # T5 looks at the caption alone; with `fill`, the language model looks at all that follows.
        text = self.encoder(input_ids=ids, attention_mask=mask)[0]
        named = [self.TEMPO.search(caption) for caption in captions]
        tempo = torch.tensor([float(n[1]) if n else 0.0 for n in named], device=text.device)
        return text, mask.bool() | (self.fill > 0), tempo

    def pooled(self, captions):
        """-> (B, d_text), the mean over a caption's tokens; of the empty string that of </s>."""
        text, mask, _ = self(captions)
        mask = mask[..., None].to(text.dtype)
        return (text * mask).sum(1) / mask.sum(1)
