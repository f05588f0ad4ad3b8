"""The band: the notes of clips become audio, played by fluidsynth and a General MIDI sound font."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import mido
import numpy as np
from scipy.signal import butter, oaconvolve, sosfilt

from audio import SAMPLE_RATE
from toy.songbook import RMS

FONTS = [
    "/usr/share/sounds/sf3/FluidR3Mono_GM.sf3", "/usr/share/soundfonts/FluidR3Mono_GM.sf3",
    "/usr/share/sounds/sf2/FluidR3_GM.sf2", "/usr/share/soundfonts/FluidR3_GM.sf2",
]  # fmt: skip
KNEE = 0.7  # peaks above it are bent; none reaches 1
# fluidsynth reads its clock in whole milliseconds, once in each buffer of 64 samples. 640 ms are
# exactly 441 buffers, so clips that start at multiples of 640 ms are rounded alike. Then a clip's
# audio does not depend on the clips before it (to -50 dB; usually to the bit).
PERIOD = 640  # ms
VOICES = 128  # notes that can sound at once


def render_many(pieces: list, seconds: float) -> list[np.ndarray]:
    """Play pieces, lists of parts -> float32 mono audio, round(seconds * SAMPLE_RATE) samples each.

    Starting fluidsynth takes as long as playing several clips. So all clips go into one file, at
    equal distances, and its audio is cut up. ValueError if fluidsynth or its font is missing.
    """
    font = next(filter(os.path.exists, FONTS), None)
    if not (font and shutil.which("fluidsynth")):
        raise ValueError(
            "playing the toy world's music needs fluidsynth and its sound font: "
            "apt-get install fluidsynth fluidr3mono-gm-soundfont"
        )
    distance = int(np.ceil((seconds + 0.1) * 1000 / PERIOD)) * PERIOD  # ms
    with tempfile.TemporaryDirectory() as folder:
        song, raw, settings = (Path(folder, n) for n in ("clips.mid", "clips.raw", "settings"))
        midi_file(pieces, distance, int(seconds * 1000) + 10).save(song)
        settings.write_text("interp 1\n")  # linear interpolation: a fifth faster, sounds the same
        command = f"fluidsynth -niq -r {SAMPLE_RATE} -T raw -O float -z 512 -R 0 -C 0".split()
        command += ["-o", f"synth.polyphony={VOICES}", "-f", settings, "-F", raw, font, song]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not raw.exists():
            raise ValueError(f"fluidsynth failed: {done.stderr.strip()}")
        stereo = np.fromfile(raw, "<f4")
    audio = stereo[0::2] + stereo[1::2]
    clips = []
    for i, parts in enumerate(pieces):
        start = round((PERIOD + i * distance) * SAMPLE_RATE / 1000)
        clip = audio[start:][: round(seconds * SAMPLE_RATE)]
        clips.append(master(clip, reverb=parts[0].controls[91] / 127))
    return clips


def midi_file(pieces: list, distance: int, length: int) -> mido.MidiFile:
    """A MIDI file with a clip every `distance` ms, each cut off after `length` ms."""
    events = []  # (ms, order among simultaneous events, bytes of the message)
    for i, parts in enumerate(pieces):
        begin = PERIOD + i * distance
        # A synthesiser's voice keeps a trace of the last note it played. So before each clip all
        # voices play the same inaudible note of program 80.
        for k in range(VOICES):
            channel = k % 8
            events.append((begin - 90, 0, (0xC0 + channel, 80)))
            events.append((begin - 50, 3, (0x90 + channel, 40 + k // 8, 1)))
            events.append((begin - 20, 4, (0xB0 + channel, 120, 0)))
        channels = iter([c for c in range(16) if c != 9])
        for part in parts:
            channel = 9 if part.is_drum else next(channels)
            events.append((begin, 0, (0xC0 + channel, part.program)))
            for number, value in part.controls.items():
                events.append((begin, 1, (0xB0 + channel, number, value)))
            for start, end, pitch, velocity in part.notes:
                events.append((begin + round(start * 1000), 3, (0x90 + channel, pitch, velocity)))
                events.append((begin + round(end * 1000), 2, (0x80 + channel, pitch, 0)))
            for number in (120, 121):  # all sound off, at once; controllers back to normal
                events.append((begin + length, 4, (0xB0 + channel, number, 0)))
    # A "quarter note" takes 1 s and has 1000 ticks.
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=1_000_000)])
    now = 0
    for ms, _, message in sorted(events, key=lambda event: event[:2]):
        track.append(mido.Message.from_bytes(message, ms - now))
        now = ms
    return mido.MidiFile(type=0, ticks_per_beat=1000, tracks=[track])


# A room: noise that decays by 60 dB in 1.4 s, without bass, of unit energy.
_TIME = np.arange(int(0.8 * SAMPLE_RATE)) / SAMPLE_RATE
_NOISE = np.random.default_rng(0).standard_normal(len(_TIME)) * np.exp(-6.9 * _TIME / 1.4)
_NOISE = np.diff(_NOISE, append=0) + 0.15 * _NOISE
ROOM = (_NOISE / np.linalg.norm(_NOISE)).astype(np.float32)
NO_RUMBLE = butter(2, 25, "high", fs=SAMPLE_RATE, output="sos")


def master(audio: np.ndarray, reverb: float) -> np.ndarray:
    """Reverberation, one loudness for all, bent peaks, a short fade at the end."""
    audio = sosfilt(NO_RUMBLE, audio).astype(np.float32)  # some programs have an offset
    audio += reverb * oaconvolve(audio, ROOM)[: len(audio)]
    for _ in range(2):  # bending lowers the loudness; the second pass restores it
        audio *= RMS / max(float(np.sqrt(np.mean(audio**2))), 1e-6)
        bent = (1 - KNEE) * np.tanh((np.abs(audio) - KNEE).clip(0) / (1 - KNEE))
        audio = np.copysign(np.abs(audio).clip(max=KNEE) + bent, audio)
    end = audio[-SAMPLE_RATE // 20 :]
    end *= np.linspace(1, 0, len(end))
    return audio
