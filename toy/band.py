"""The band."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from scipy.signal import butter, oaconvolve, sosfilt

from audio import SAMPLE_RATE

FONTS = [
    "/usr/share/sounds/sf3/FluidR3Mono_GM.sf3",
    "/usr/share/soundfonts/FluidR3Mono_GM.sf3",
    "/usr/share/sounds/sf2/FluidR3_GM.sf2",
    "/usr/share/soundfonts/FluidR3_GM.sf2",
]
MISSING = (
    "toy.py needs fluidsynth and its sound font to play music: "
    "apt-get install fluidsynth fluidr3mono-gm-soundfont"
)
RMS, KNEE = 0.08, 0.7  # loudness of every clip; above the knee peaks are bent, none reaches 1
# fluidsynth reads its clock in whole milliseconds, once in each buffer of 64 samples; 640 ms are
# 441 buffers, after which all rounding repeats. With ticks of exactly 1 ms and slots of whole
# 640 ms a clip's audio does not depend on the clips before it (to -50 dB; usually to the bit).
PERIOD = 640  # ms
VOICES = 128  # notes that can sound at once


def render_many(midis: list, seconds: float) -> list[np.ndarray]:
    """Play clips -> float32 mono audio of round(seconds * SAMPLE_RATE) samples each.

    Starting fluidsynth and reading the font costs as much as playing several clips, so clips are
    joined into one file, in slots of equal length, and the audio is cut at the slots.
    """
    font = next((f for f in FONTS if Path(f).exists()), None)
    if font is None:
        raise ValueError(MISSING)
    slot = int(np.ceil((seconds + 0.1) * 1000 / PERIOD)) * PERIOD  # ms
    with tempfile.TemporaryDirectory() as folder:
        song, raw, settings = (Path(folder, n) for n in ("clips.mid", "clips.raw", "settings"))
        song.write_bytes(join(midis, slot, int(seconds * 1000) + 10))
        settings.write_text("interp 1\n")  # linear interpolation: a fifth quicker, no audible loss
        command = f"fluidsynth -niq -r {SAMPLE_RATE} -T raw -O float -z 512 -R 0 -C 0".split()
        command += ["-o", f"synth.polyphony={VOICES}", "-f", settings, "-F", raw, font, song]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError(MISSING) from None
        if done.returncode or not raw.exists():
            raise ValueError(f"fluidsynth failed: {done.stderr.strip()}")
        audio = np.fromfile(raw, "<f4")
    audio = audio[0::2] + audio[1::2]  # (samples,)
    samples = [round((PERIOD + i * slot) * SAMPLE_RATE / 1000) for i in range(len(midis) + 1)]
    audio = np.pad(audio, (0, max(0, samples[-1] - len(audio))))
    n = round(seconds * SAMPLE_RATE)
    rooms = [
        next(c.value for c in m.instruments[0].control_changes if c.number == 91) for m in midis
    ]
    return [master(audio[start:][:n], room / 127) for start, room in zip(samples, rooms)]


def join(midis: list, slot: int, silence: int) -> bytes:
    """A MIDI file of clips at multiples of `slot` ms, each cut off after `silence` ms."""
    events = []  # (ms, order among simultaneous events, the message's bytes)
    for i, midi in enumerate(midis):
        start = PERIOD + i * slot
        # A synthesiser's voice keeps a trace of the note that it played last. Before each clip all
        # voices play the same inaudible note of preset 80, so that every clip finds them alike.
        for k in range(VOICES):
            channel, pitch = k % 8, 40 + k // 8
            events.append((start - 90, 0, bytes([0xC0 + channel, 80])))
            events.append((start - 50, 3, bytes([0x90 + channel, pitch, 1])))
            events.append((start - 20, 4, bytes([0xB0 + channel, 120, 0])))
        channels = iter([c for c in range(16) if c != 9])
        for part in midi.instruments:
            channel = 9 if part.is_drum else next(channels)
            events.append((start, 0, bytes([0xC0 + channel, part.program])))
            for c in part.control_changes:
                tick = start + round(c.time * 1000)
                events.append((tick, 1, bytes([0xB0 + channel, c.number, c.value])))
            for note in part.notes:
                tick, until = round(note.start * 1000), round(note.end * 1000)
                events.append((start + tick, 3, bytes([0x90 + channel, note.pitch, note.velocity])))
                events.append((start + until, 2, bytes([0x80 + channel, note.pitch, 0])))
            # 120: all sound off, at once; 121: controllers back to normal
            for control in (120, 121):
                events.append((start + silence, 4, bytes([0xB0 + channel, control, 0])))
    # A "quarter note" takes 1 s, as the first message says, and 1000 ticks, as the head says.
    chunks, now = [b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big")], 0
    for tick, _, message in sorted(events, key=lambda e: e[:2]):
        wait, now = tick - now, tick
        digits = [wait & 127]  # a variable-length number: seven bits a byte, the last without bit 8
        while wait := wait >> 7:
            digits.insert(0, wait & 127 | 128)
        chunks.append(bytes(digits) + message)
    track = b"".join(chunks) + b"\x00\xff\x2f\x00"
    head = b"MThd" + bytes([0, 0, 0, 6, 0, 0, 0, 1]) + (1000).to_bytes(2, "big")
    return head + b"MTrk" + len(track).to_bytes(4, "big") + track


def reverberation() -> np.ndarray:
    """A room: noise that decays by 60 dB in 1.4 s, without bass, of unit energy."""
    t = np.arange(int(0.8 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(t)) * np.exp(-6.9 * t / 1.4)
    noise = np.diff(noise, append=0) + 0.15 * noise
    return (noise / np.linalg.norm(noise)).astype(np.float32)


ROOM = reverberation()
NO_RUMBLE = butter(2, 25, "high", fs=SAMPLE_RATE, output="sos")


def master(audio: np.ndarray, room: float) -> np.ndarray:
    """Reverberation, one loudness for all, bent peaks, a short fade at the end."""
    audio = sosfilt(NO_RUMBLE, audio).astype(np.float32)  # some pads have an offset
    audio += room * oaconvolve(audio, ROOM)[: len(audio)]
    for _ in range(2):  # bending costs loudness, which the second pass gives back
        audio *= RMS / max(float(np.sqrt(np.mean(audio**2))), 1e-6)
        over = np.abs(audio) > KNEE
        bent = KNEE + (1 - KNEE) * np.tanh((np.abs(audio[over]) - KNEE) / (1 - KNEE))
        audio[over] = np.copysign(bent, audio[over])
    fade = min(len(audio), SAMPLE_RATE // 20)
    audio[len(audio) - fade :] *= np.linspace(1, 0, fade)
    return audio.astype(np.float32)
