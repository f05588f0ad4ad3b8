"""The text encoder: captions -> vectors, by Flan-T5 or by a small T5 of the same class."""

import re

import torch
import torch.nn.functional as F
from torch import nn

TYPICAL_LENGTH = 64  # tokens of a caption, to size batches and memory by


class TextEncoder(nn.Module):
    """Captions -> T5's last hidden states: the paper's frozen Flan-T5 Base from the hub, or a small
    T5 with its own tokenizer. Either may be frozen, or trained with the language model.

    `encoder(["slow piano waltz", ""]) -> text (B,S,d_text), mask (B,S), tempo (B,)`. S is the
    length of the longest caption, with the closing </s>. The empty string, the unconditional half
    of guidance, is </s> alone. tempo is the bpm that the caption names, 0 if it names none.

    Captions beyond `max_tokens` are cut, which `cut` counts.
    """

    TEMPO = re.compile(
        r"(?<![\d.])(\d{2,3}(?:\.\d+)?) ?(?:bpm|beats (?:per|a) minute)", re.IGNORECASE
    )

    def __init__(self, tokenizer, encoder, name, max_tokens):
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.name = name
        self.max_tokens = max_tokens
        self.cut = 0
        self.fill = 0  # captions are filled up to this many tokens, all of them read (authors' own)

    @classmethod
    def small(cls, tokenizer_json: str, d_model=128, layers=2, max_tokens=128):
        """A new T5 with `layers` blocks; tokenizer_json: the text of a tokenizer.json."""
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
        """A published encoder, by its name on the hub or from a folder; ValueError if neither."""
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            encoder = T5EncoderModel.from_pretrained(name)
        except Exception as error:  # the hub's client raises many kinds; all mean the same here
            raise ValueError(
                f"the text encoder {name} could not be loaded ({type(error).__name__}): it is "
                f"downloaded once from https://huggingface.co/{name}, or name a folder"
            ) from None
        return cls(tokenizer, encoder.requires_grad_(False).eval(), name, max_tokens)

    @property
    def d_text(self):
        return self.encoder.config.d_model

    @property
    def trained(self):
        """Whether it is trained with the language model."""
        return any(p.requires_grad for p in self.parameters())

    def is_too_long(self, caption):
        return len(self.tokenizer(caption).input_ids) > self.max_tokens

    def forward(self, captions: list[str], multiple=1):
        """multiple: S is rounded up to a multiple of this, at most to max_tokens."""
        batch = self.tokenizer(
            captions, truncation=True, max_length=self.max_tokens, return_tensors="pt",
            padding=True, pad_to_multiple_of=min(multiple, self.max_tokens),
        ).to(self.encoder.device)  # fmt: skip
        ids, mask = batch.input_ids, batch.attention_mask
        if (missing := self.fill - ids.shape[1]) > 0:
            ids = F.pad(ids, (0, missing), value=self.tokenizer.eos_token_id)
            mask = F.pad(mask, (0, missing))
        text = self.encoder(input_ids=ids, attention_mask=mask)[0]
        if self.fill:  # T5 sees the caption alone, the language model all that was filled in
            mask = torch.ones_like(mask)
        tempo = torch.tensor([self._tempo(caption) for caption in captions], device=text.device)
        return text, mask.bool(), tempo

    def _tempo(self, caption):
        """The bpm within the part of the caption that is kept."""
        if len(caption.encode()) >= self.max_tokens and self.is_too_long(caption):
            self.cut += 1
            kept = self.tokenizer(caption, truncation=True, max_length=self.max_tokens).input_ids
            caption = self.tokenizer.decode(kept, skip_special_tokens=True)
        found = self.TEMPO.search(caption)
        return float(found[1]) if found else 0.0

    def pooled(self, captions):
        """-> (B, d_text), the mean over a caption's tokens; of the empty string that of </s>."""
        text, mask, _ = self(captions)
        mask = mask[..., None].to(text.dtype)
        return (text * mask).sum(1) / mask.sum(1)
