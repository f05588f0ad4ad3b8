"""Endless music that follows changing words: what the page and `sample.py --follow` play."""

import itertools

import torch

from audio import FRAME_RATE
from codec import decode_stream
from sample import generate, remembered

TURN = 0.15  # seconds of the old music that are kept when the words change


def follow(system, wish):
    """Endless music that follows changing words -> yields audio (samples,), half a second each.

    wish() -> (prompt, seed, options of `generate` as a dict), asked before each unit of music
    (`unit_of`): what to play next. New words begin on a beat, and with them the metronome; a new
    seed starts other music.
    """
    turn = round(TURN * FRAME_RATE)

    def units():
        codes = torch.empty(system.codec.codebooks, 0, dtype=torch.long)
        playing = None, None
        for number in itertools.count():
            prompt, seed, options = wish()
            if (prompt, seed) != playing:
                codes = codes[:, -turn:] if seed == playing[1] else codes[:, :0]
                playing = prompt, seed
                unit = unit_of(float(system.encoder([prompt])[2])) * FRAME_RATE
                count = begin = 0  # units and frames since the words changed
            count += 1
            end = round(count * unit)
            heard = codes[: system.lm.config.codebooks]
            now = seed + (number << 32)
            blocks = generate(
                system.lm, system.encoder, [prompt], end - begin, [now], codes=heard[None],
                before=begin, **options,
            )  # fmt: skip
            made = torch.cat([*blocks], 2)[0]
            begin = end
            if system.second:
                made = torch.cat([*system.refine(prompt, [made], now, codes)], 1)
            codes = torch.cat([codes[: len(made)], made], 1)
            codes = codes[:, -remembered(system.lm) :]
            yield made

    return decode_stream(system.codec, units(), 43)


def unit_of(bpm):
    """The largest half, quarter, ... of a bar of four beats that takes at most a second; half a
    second to a second. bpm 0: unknown."""
    seconds = 240 / bpm if bpm else 1.0
    while seconds > 1.001:
        seconds /= 2
    return seconds
