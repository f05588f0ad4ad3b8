"""Endless music that follows changing words: what the page and `sample.py --follow` play."""

import itertools

import torch

from audio import FRAME_RATE
from codec import decode_stream
from sample import faithful, generate, played, remembered

TURN = 0.15  # seconds of the old music that are kept when the words change


def follow(system, wish):
    """Endless music that follows changing words -> yields audio (samples,), half a second each.

    wish() -> (prompt, seed, options of `generate` as a dict), asked before each unit of music
    (`unit_of`): what to play next. New words begin on a beat, and with them the metronome; a new
    seed starts other music. What the language model hears is what it hears in `generate`.
    """
    lm, encoder = system.lm, system.encoder
    K, turn, kept = len(lm.heads), round(TURN * FRAME_RATE), remembered(lm)

    def units():
        codes = torch.empty(system.codec.codebooks, 0, dtype=torch.long)  # what was played last
        playing = None, None
        for number in itertools.count():
            prompt, seed, options = wish()
            if (prompt, seed) != playing:
                codes = codes[:, -turn:] if seed == playing[1] else codes[:, :0]
                playing = prompt, seed
                text = encoder([prompt, options.get("negative", "")])
                unit = unit_of(float(text[2][0])) * FRAME_RATE
                count = begin = 0  # units and frames since the words changed
                opening, heard = codes[:K, :0], codes[:K]  # what the language model hears
            count += 1
            end = round(count * unit)
            if lm.config.prefix and heard.shape[1] + end - begin > played(lm):
                on_device = [v[None].to(text[2].device) for v in (heard[:, -kept:], opening)]
                heard = faithful(lm, text, *on_device, begin - kept, 0)[0].cpu()
            now = seed + (number << 32)
            blocks = generate(
                lm, encoder, [prompt], end - begin, [now], codes=heard[None], before=begin,
                **options,
            )  # fmt: skip
            made = torch.cat([*blocks], 2)[0]
            begin = end
            heard = torch.cat([heard, made], 1)[:, -played(lm) :]
            opening = torch.cat([opening, made], 1)[:, : played(lm)]
            if system.second:
                made = torch.cat([*system.refine(prompt, [made], now, codes)], 1)
            codes = torch.cat([codes[: len(made)], made], 1)[:, -kept:]
            yield made

    return decode_stream(system.codec, units(), 43)


def unit_of(bpm):
    """The largest half, quarter, ... of a bar of four beats that takes at most a second; half a
    second to a second. bpm 0: unknown."""
    seconds = 240 / bpm if bpm else 1.0
    while seconds > 1.001:
        seconds /= 2
    return seconds
