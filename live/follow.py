"""Endless music that follows changing words: what the page and `sample.py --follow` play."""

import itertools
import shutil
import subprocess
import sys
import threading

import torch

from audio import FRAME_RATE
from codec import decode_stream
from sample import generate, remembered

PLAYERS = (
    ["aplay", "-q", "-f", "S16_LE", "-c", "1", "-r"],
    ["play", "-q", "-t", "raw", "-e", "signed", "-b", "16", "-c", "1", "-", "-r"],
)
ENDLESS = 1 << 40  # frames


def follow(system, wish):
    """Endless music that follows changing words -> yields audio (samples,), half a second each.

    wish() -> (prompt, seed, options of `generate` as a dict), asked before each unit of music
    (`unit_of`): what to play next. New words, or a new seed, begin other music on a beat, and with
    it the metronome; new options go on with what was played.
    """
    lm, encoder = system.lm, system.encoder
    kept = remembered(lm)

    def units():
        codes = torch.empty(system.codec.codebooks, 0, dtype=torch.long)  # what was played last
        playing = None, None, None
        for number in itertools.count():
            prompt, seed, options = wanted = wish()
            now = seed + (number << 32)
            if wanted[:2] != playing[:2]:
                codes = codes[:, :0]  # nothing in the new style begins with frames in the old one
                unit = unit_of(float(encoder([prompt])[2][0])) * FRAME_RATE
                count = begin = 0  # units and frames since the words changed
            if wanted != playing:
                playing = wanted
                frames = generate(
                    lm, encoder, [prompt], ENDLESS, [now], codes=codes[None, : len(lm.heads)],
                    before=begin, block=1, **options,
                )  # fmt: skip
            count += 1
            end = round(count * unit)
            made = torch.cat([*itertools.islice(frames, end - begin)], 2)[0]
            begin = end
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


def read_wishes(first):
    """-> [the latest prompt]: `first`, until a line of standard input brings another"""
    latest = [first]

    def read():
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        for line in sys.stdin:
            latest[0] = line.strip() or latest[0]

    threading.Thread(target=read, daemon=True).start()
    return latest


def play(chunks, sample_rate, to_stdout):
    """Plays chunks of audio (samples,) by a program that is installed, or writes 16-bit PCM to
    standard output. ValueError if there is no such program, or it fails."""
    player, sink = None, sys.stdout.buffer
    if not to_stdout:
        command = next((c for c in PLAYERS if shutil.which(c[0])), None)
        if command is None:
            raise ValueError("--play needs `aplay` or sox's `play`: apt-get install alsa-utils")
        player = subprocess.Popen([*command, str(sample_rate)], stdin=subprocess.PIPE)
        sink = player.stdin
    try:
        for chunk in chunks:
            sink.write(pcm(chunk))
            sink.flush()
        if player:
            player.stdin.close()
    except BrokenPipeError:
        if not player:
            raise  # the listener closed the stream: `entry` ends
    if player and player.wait():
        raise ValueError(f"{player.args[0]} could not play it")


def pcm(audio) -> bytes:
    """audio (S,) in [-1, 1] -> 16-bit samples, as players read them from a pipe."""
    return (audio.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes()
