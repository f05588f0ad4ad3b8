"""The toy world's music: a composer, a band, and someone who describes what they play.

A clip is made from a handful of *factors* (genre, rhythm, tempo, key, lead, mood) in three steps:

    factors --compose--> notes (pretty_midi) --render_many--> audio (fluidsynth)
    factors --caption--> text

All knowledge about music is in two tables: GENRES, a songbook with a page of tablature for each
genre, and MOODS, which bend whatever the songbook says: register, density, dynamics, mode, and one
voice or percussion of their own. A factor `rhythm` names a second genre whose drums, bass and feel
carry the first one's harmony, comping and lead: genre "jazz" with rhythm "reggae" is "jazz reggae".

Everything random comes from a generator seeded by the caller; a clip's index determines the clip.

    python toy.py listen --n 8 --out toy-clips     wav files, their factors and captions
    python toy.py build                            codec, tokenizer, text encoder and corpus, anew
    python toy.py build --corpus-only --clips 20000 --out data/toy-large      a larger corpus
    python toy.py ship out/simba/best              a trained model, made the one that ships

Units: pitches are MIDI numbers, times are seconds, and a *step* is a sixteenth note, the column of
the tablature. Loudness is in dB. A chord is (root above the tonic, its tones above the root).
"""

import argparse
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretty_midi
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.signal import butter, oaconvolve, sosfilt
from tqdm import tqdm

from codec import SAMPLE_RATE, ToyCodec, load_codec
from data import Writer
from diffusion import is_refiner, load_refiner
from model import (
    TextEncoder,
    entry,
    load_checkpoint,
    load_text_encoder,
    load_weights,
    read_config,
    save_checkpoint,
)

# ------------------------------------------------------------------------------ the songbook ----
#
# toy/songbook.txt has a page of tablature for each genre; how to read it stands at its head.

ROOT = Path(__file__).parent
SONGBOOK = re.sub(r"^#.*\n", "", (ROOT / "toy" / "songbook.txt").read_text(), flags=re.M)

DRUMS = dict(K=36, S=38, E=40, R=37, P=39, H=42, F=44, O=46, D=51, B=53, C=49, L=45, M=48)
DRUMS |= dict(T=54, A=70, W=56, G=63, g=64, V=75, I=65, J=73, Y=81)
# K kick, S E snares, R cross-stick, P clap, H F O closed, foot and open hi-hat, D B ride and its
# bell, C crash, L M toms, T tambourine, A maracas, W cowbell, G g congas, V claves, I timbale, J
# guiro, Y triangle

# An instrument of the melody: its range, whether it sustains (and so gets vibrato), its names.
LEADS = {
    "piano": (62, 88, False, ["piano", "grand piano"]),
    "organ": (60, 84, False, ["organ"]),
    "accordion": (62, 86, False, ["accordion"]),
    "harmonica": (62, 84, True, ["harmonica"]),
    "acoustic guitar": (55, 79, False, ["acoustic guitar"]),
    "electric guitar": (55, 81, True, ["electric guitar"]),
    "violin": (62, 91, True, ["violin", "fiddle"]),
    "trumpet": (60, 82, True, ["trumpet"]),
    "saxophone": (54, 80, True, ["saxophone", "sax"]),
    "flute": (67, 93, True, ["flute"]),
    "synth lead": (60, 88, True, ["synth lead", "lead synth", "synthesizer", "synth"]),
    "vibraphone": (62, 88, False, ["vibraphone", "vibes"]),
}

# A mood: velocity added; density of lead and comping, times; register added to lead and comping;
# length of notes, times; how often minor (None: as the genre); the part of the tempo range; its own
# voice (as a `comp` line) and percussion (as a `drums` line); its names.
MOOD_FIELDS = "velocity density register length minor tempo voice drums words"
MOODS = {
    "happy": (6, 1.15, 4, 0.7, 0.0, (0.2, 1), "9 arp 84-100 -7 x.....x...x.x...",
              "T ..x...x...x...x.", ["happy", "cheerful", "joyful", "sunny", "playful"]),
    "sad": (-16, 0.55, -3, 1.3, 1.0, (0, 0.5), "42 arp 48-64 +1 x-------x-------", "",
            ["sad", "melancholic", "sorrowful", "mournful", "wistful"]),
    "calm": (-30, 0.5, 0, 1.4, None, (0, 0.5), "89 block 57-78 -5 x---------------", "",
             ["calm", "peaceful", "relaxed", "gentle", "soothing"]),
    "energetic": (22, 1.6, 7, 0.85, None, (0.5, 1), "", "A xoxoxoxoxoxoxoxo C X...............",
                  ["energetic", "lively", "powerful", "high-energy", "intense"]),
    "dark": (0, 0.8, -9, 1.1, 1.0, (0, 0.8), "44 block 33-50 -2 x---------------",
             "L X.......x.......", ["dark", "brooding", "ominous", "gloomy", "sinister"]),
}  # fmt: skip
MOODS = {name: SimpleNamespace(**dict(zip(MOOD_FIELDS.split(), m))) for name, m in MOODS.items()}

TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
TEMPO_STEP = 4  # bpm
SLOW_BELOW, FAST_FROM = 88, 132  # what captions call slow and fast, whatever the genre
MIXTURES = 0.15  # the share of clips whose rhythm section belongs to another genre

SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10), "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "phrygian": (0, 1, 3, 5, 7, 8, 10), "harmonic": (0, 2, 3, 5, 7, 8, 11),
    "blues": (0, 3, 5, 6, 7, 10), "majpent": (0, 2, 4, 7, 9), "minpent": (0, 3, 5, 7, 10),
}  # fmt: skip

QUALITIES = {  # suffix: tones above the root of an upper-case and of a lower-case numeral
    "": ((0, 4, 7), (0, 3, 7)), "6": ((0, 4, 7, 9), (0, 3, 7, 9)),
    "7": ((0, 4, 7, 10), (0, 3, 7, 10)), "9": ((0, 4, 7, 10, 14), (0, 3, 7, 10, 14)),
    "5": ((0, 7), (0, 7)), "ø": ((0, 3, 6, 10),) * 2,
    "maj7": ((0, 4, 7, 11), (0, 3, 7, 11)), "maj9": ((0, 4, 7, 11, 14), (0, 3, 7, 11, 14)),
    "sus": ((0, 5, 7),) * 2, "add9": ((0, 4, 7, 14), (0, 3, 7, 14)),
}  # fmt: skip

# Loudness of the font's presets in dB, measured with one velocity (the others: about 2).
LOUD = {0: 0, 2: 0, 3: -2, 4: 5, 5: 1, 9: 1, 17: 7, 19: 3, 21: 0, 25: 0, 26: 5, 27: 6, 28: 0, 29: 4}
LOUD |= {30: 7, 32: -1, 33: 2, 36: -1, 38: -1, 39: 5, 44: -2, 56: 4, 57: 9, 59: 5, 61: 8, 65: 4}
LOUD |= {66: 4, 80: 6, 81: 6, 82: 0, 84: 7, 87: 3, 89: -9, 94: 0, 95: 4, 91: 5, 98: -6}
TR808 = 25  # a drum kit louder than the others


def chord(numeral: str) -> tuple:
    """'bVImaj7' -> (8, (0, 4, 7, 11)): semitones of the root above the tonic, tones above it."""
    flat, roman, quality = re.fullmatch(r"(b?)([IViv]+)(.*)", numeral).groups()
    degree = ["I", "II", "III", "IV", "V", "VI", "VII"].index(roman.upper())
    root = SCALES["major"][degree] - len(flat)
    return root, QUALITIES[quality][roman.islower()]


def progression(text: str) -> list:
    """'I | IV V' -> a list of bars, each a list of chords."""
    return [[chord(c) for c in bar.split()] for bar in text.split("|")]


def voice(line: str) -> SimpleNamespace:
    """A `comp` line of the songbook."""
    programs, style, span, level, parts = line.split(None, 4)
    low, high = map(int, span.split("-"))
    programs, parts = [int(p) for p in programs.split("|")], parts.split(" / ")
    return SimpleNamespace(
        programs=programs, style=style, low=low, high=high, level=int(level), parts=parts
    )


def page(text: str) -> tuple[str, SimpleNamespace]:
    """Read one genre's page of the songbook."""
    head, *lines = text.strip().split("\n")
    name, settings = head.split(": ")
    settings = settings.split()
    g = dict(swing="8/.5", drums=[], comp=[], fill="") | dict(zip(settings[::2], settings[1::2]))
    for key, value in (line.split(None, 1) for line in lines):
        if key in ("major", "minor"):
            g["chords_" + key] = [progression(p) for p in value.split(" / ")]
        elif key == "drums":
            letters = value.split()
            g["drums"].append(dict(zip(letters[::2], letters[1::2])))
        elif key == "comp":
            g["comp"].append(voice(value))
        elif key == "bass":
            programs, parts = value.split(": ")
            g |= dict(bass_programs=[int(p) for p in programs.split("|")], bass=parts.split(" / "))
        elif key == "line":
            g["line"] = value.split(" / ")
        elif key == "leads":
            g["leads"] = {k: int(p) for k, p in (i.rsplit(None, 1) for i in value.split(", "))}
        elif key in ("words", "beat", "band"):
            g[key] = value.split(", ")
        else:
            g[key] = value.split() if key == "scale" else value
    low, high = g["tempo"].split("-")
    unit, ratio = g["swing"].split("/")
    g |= dict(tempo=range(int(low), int(high) + 1, TEMPO_STEP), swing=(int(unit), float(ratio)))
    for k in ("minor", "room", "loose", "beats", "kit"):
        g[k] = int(g[k]) if k in ("beats", "kit") else float(g[k])
    return name, SimpleNamespace(**g)


GENRES = dict(page(text) for text in SONGBOOK.strip().split("\n\n"))

# ----------------------------------------------------------------------------------- factors ----


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def sample_factors(rng: np.random.Generator, mixtures: float = MIXTURES) -> dict:
    """Draw a clip: genre and tonic uniform, the rest plausible for that genre."""
    genre, rhythm = pick(rng, list(GENRES)), None
    # A waltz is its rhythm: in four beats nothing of it would be left.
    if rng.random() < mixtures * len(GENRES) / (len(GENRES) - 1) and genre != "waltz":
        rhythm = pick(rng, [name for name, g in GENRES.items() if g.drums and name != genre])
    g, mood = GENRES[genre], pick(rng, list(MOODS))
    tempos, (slowest, fastest) = GENRES[rhythm or genre].tempo, MOODS[mood].tempo
    tempos = tempos[int(slowest * len(tempos)) : int(np.ceil(fastest * len(tempos)))]
    minor = g.minor if MOODS[mood].minor is None else MOODS[mood].minor
    key = f"{pick(rng, TONICS)} {'minor' if rng.random() < minor else 'major'}"
    lead = pick(rng, list(g.leads))
    return dict(genre=genre, rhythm=rhythm, tempo=pick(rng, tempos), key=key, lead=lead, mood=mood)


def sample_clip(index: int, split_seed: int = 0, mixtures=MIXTURES) -> tuple[dict, int]:
    """Clip `index` of a split -> its factors and the seed that composes it."""
    rng = np.random.default_rng([split_seed, index])
    return sample_factors(rng, mixtures), int(rng.integers(2**31))


# --------------------------------------------------------------------------------- composing ----


def fit(part: str, own_bar: int, bar: int, bars: int) -> str:
    """Repeat a part over `bars` bars of `bar` steps; one of another metre is cut or stretched."""
    own = [part[i : i + own_bar] for i in range(0, len(part), own_bar)]
    own = [(p + p[-4:] * 3)[:bar] for p in own]
    return "".join(own[i % len(own)] for i in range(bars))


def onsets(line: str):
    """(step, character, length in steps) of every note of a part."""
    return [(m.start(), m[0][0], len(m[0])) for m in re.finditer(r"[^.\-]-*", line)]


def reweave(line: str, density: float, bar: int, rng) -> str:
    """Thin a part (density < 1: weak notes become holds) or thicken it (> 1: long notes split)."""
    line = list(line)
    for step, char, length in onsets("".join(line)):
        if density < 1 and step % bar and rng.random() < (1 - density) * (1 if step % 4 else 0.6):
            line[step] = "-"
        elif density > 1 and length > 1 and rng.random() < density - 1:
            line[step + length // 2] = char
    return "".join(line)


def closest_voicing(tones, low: int, high: int, previous: list | None) -> list:
    """Close-position voicing of the pitch classes `tones` in [low, high], near the previous one."""
    best, best_cost = None, np.inf
    target = previous or [(low + high) / 2]
    for bottom in range(low, low + 12):
        if bottom % 12 not in tones:
            continue
        pitches = [bottom + (t - bottom) % 12 for t in tones]
        for lift in range(0, max(high - max(pitches), 0) + 1, 12):
            lifted = sorted(p + lift for p in pitches)
            cost = sum(min(abs(p - q) for q in target) for p in lifted)
            cost += 0.3 * abs(np.mean(lifted) - (low + high) / 2)  # do not drift away
            if cost < best_cost:
                best, best_cost = lifted, cost
    return best


def compose(factors: dict, seed: int, seconds: float = 10.0) -> pretty_midi.PrettyMIDI:
    """Write the parts of a clip. The same arguments give the same notes."""
    # A generator a part, so that a change to one part leaves the others as they were.
    rng, drum_rng, bass_rng, lead_rng, hand = np.random.default_rng(seed).spawn(5)
    piece = Piece(factors, seconds, rng, hand)
    piece.drums(drum_rng)
    piece.bass(bass_rng)
    piece.comping(rng)
    piece.lead(lead_rng)
    return piece.midi


class Piece:
    """A clip while it is written, part by part. g is the genre that lends harmony, comping and
    lead; r the one that lends the rhythm; `hand` makes the small unevenness of people."""

    def __init__(self, factors, seconds, rng, hand):
        self.factors, self.seconds, self.hand = factors, seconds, hand
        self.g = GENRES[factors["genre"]]
        self.r = GENRES[factors["rhythm"] or factors["genre"]]
        self.mood = MOODS[factors["mood"]]
        tonic, self.mode = factors["key"].split()
        self.tonic = TONICS.index(tonic)
        self.bar, self.own_bar = 4 * self.r.beats, 4 * self.g.beats
        self.step_seconds = 15 / factors["tempo"]
        self.bars = int(np.ceil(seconds / (self.bar * self.step_seconds)))
        self.midi = pretty_midi.PrettyMIDI(initial_tempo=factors["tempo"])
        self.song = pick(rng, self.g.chords_minor if self.mode == "minor" else self.g.chords_major)

    def clock(self, step: float) -> float:
        """Steps -> seconds, swung: the first of a pair of notes gets more than half of its time."""
        unit, ratio = self.r.swing
        pair = 32 // unit  # steps in two notes of the swinging value
        whole, x = divmod(step / pair, 1)
        x = x * 2 * ratio if x < 0.5 else ratio + (x - 0.5) * 2 * (1 - ratio)
        return (whole + x) * pair * self.step_seconds

    def chord_at(self, step: int) -> tuple[int, tuple]:
        """(pitch class of the root, pitch classes of the chord)"""
        here = self.song[step // self.bar % len(self.song)]
        root, tones = here[step % self.bar * len(here) // self.bar]
        root += self.tonic
        return root % 12, tuple((root + t) % 12 for t in tones)

    def player(self, program: int, level: float, name: str, is_drum=False):
        part = pretty_midi.Instrument(program, is_drum, name)
        quiet = (4 if program == TR808 else 1) if is_drum else LOUD.get(program, 2)
        volume = 100 * 10 ** ((level - quiet) / 40)  # controller 7 is squared by the synthesiser
        part.control_changes += [
            pretty_midi.ControlChange(7, int(np.clip(volume, 1, 127)), 0),
            pretty_midi.ControlChange(91, int(127 * (self.g.room + self.r.room) / 2), 0),
        ]
        self.midi.instruments.append(part)
        return part

    def play(self, part, pitch, step, length, velocity, delay=0.0):
        """One note, by a human hand."""
        begin = self.clock(step)
        start = begin + delay + max(self.hand.normal(0, self.r.loose / 1000), -begin)
        end = min(max(self.clock(step + length) - 0.01, start + 0.05), self.seconds)
        velocity += self.mood.velocity + self.hand.normal(0, 4)
        if start < end:
            velocity = int(np.clip(velocity, 20, 127))
            part.notes.append(pretty_midi.Note(velocity, int(pitch), start, end))

    def drums(self, rng):
        """The pattern, thinner or richer by mood, with a fill at the end of a phrase."""
        r, bar, mood = self.r, self.bar, self.mood
        kit = pick(rng, r.drums) if r.drums else {}
        extra = mood.drums.split() if r.drums else []
        kit = kit | dict(zip(extra[::2], extra[1::2]))
        part = self.player(r.kit, 0, "drums", is_drum=True)
        phrase = 2 if self.factors["mood"] == "energetic" else 4
        loud = {"X": 112, "x": 92, "o": 58, "-": 60}
        for letter, pattern in kit.items():
            line = fit(pattern, 16 if letter in extra[::2] else bar, bar, self.bars)
            for step, char, _ in onsets(line):
                last = step // bar % phrase == phrase - 1
                fill = r.fill and last and step % bar >= bar - len(r.fill)
                weak = char == "o" or (char == "x" and step % 4 and letter not in "KSPERV")
                if (fill and letter not in "KDC") or (weak and mood.density < 0.6):
                    continue
                self.play(part, DRUMS[letter], step, 1, loud.get(char, 90))
        if r.fill and mood.density > 0.6:
            for end in range(phrase * bar, self.bars * bar + 1, phrase * bar):
                for i, letter in enumerate(r.fill):
                    self.play(part, DRUMS[letter], end - len(r.fill) + i, 1, 88 + 4 * i)

    def bass(self, rng):
        """Degrees of the chord, or a walk that steps to the next chord's root."""
        bar = self.bar
        part = self.player(pick(rng, self.r.bass_programs), 2, "bass")
        line = fit(pick(rng, self.r.bass), bar, bar, self.bars)
        pitch = 36
        for step, char, length in onsets(line):
            root, tones = self.chord_at(step)
            following = self.chord_at((step // 4 + 1) * 4)[0]
            bottom, ahead = 28 + (root - 28) % 12, 28 + (following - 28) % 12
            third = bottom + (3 if (root + 3) % 12 in tones else 4)
            degrees = {"R": bottom, "3": third, "5": bottom + 7, "6": bottom + 9, "7": bottom + 10}
            degrees |= {"8": bottom + 12, "n": ahead, "a": ahead - 1}
            if char != "w":
                pitch = degrees[char]
            elif step % bar == 0 or self.chord_at(step - 1)[0] != root:
                pitch = bottom if pitch < 38 else bottom + 12 * (bottom < 34)
            elif following != root or (step // 4 + 1) * 4 % bar == 0:
                ahead += 12 * (pitch - ahead > 6)
                pitch = ahead + pick(rng, (-1, 1, -2, 2))
            else:
                near = [p for p in range(28, 50) if p % 12 in tones and 0 < abs(p - pitch) < 8]
                pitch = pick(rng, near)
            self.play(part, pitch, step, length, 92 + 6 * (step % bar == 0))

    def comping(self, rng):
        """Voice-led chords, together, strummed or broken."""
        mood, lead_program = self.mood, self.g.leads[self.factors["lead"]]
        voices = self.g.comp + ([voice(mood.voice)] if mood.voice else [])
        for v in voices:
            programs = [p for p in v.programs if p != lead_program] or v.programs
            part = self.player(pick(rng, programs), v.level - 3, v.style)
            own = v is voices[-1] and mood.voice != ""
            line = fit(pick(rng, v.parts), 16 if own else self.own_bar, self.bar, self.bars)
            line = line if own else reweave(line, mood.density, self.bar, rng)
            shift = 0 if own or v.style == "power" else int(mood.register * 0.7)
            voicing, last, turn = None, None, 0
            for step, char, length in onsets(line):
                root, tones = self.chord_at(step)
                if (root, tones) != last:
                    upper = tones[1:] if len(tones) > 3 else tones  # the bass has the root
                    voicing = closest_voicing(upper, v.low + shift, v.high + shift, voicing)
                    last, turn = (root, tones), 0
                pitches = voicing
                if v.style == "power":
                    bottom = v.low + (root + (int(char) if char.isdigit() else 0) - v.low) % 12
                    pitches = [bottom, bottom + 7, bottom + 12]
                elif v.style in ("arp", "octaves"):
                    ladder = voicing + [voicing[0] + 12]
                    ladder += ladder[-2:0:-1]
                    pitches = [ladder[turn % len(ladder)]]
                    pitches += [pitches[0] + 12] * (v.style == "octaves")
                elif v.style == "alberti":
                    pitches = [(voicing * 2)[(0, 2, 1, 2)[turn % 4]]]
                elif v.style == "strum":
                    pitches = voicing + [voicing[0] + 12]
                turn += 1
                length *= mood.length if length > 1 else 1
                for i, p in enumerate(pitches):
                    delay = 0.012 * i if v.style == "strum" else 0.0
                    self.play(part, p, step, length, 82 + 8 * (step % 8 == 0), delay)

    def lead(self, rng):
        """Two one-bar motifs in the form A A B A; a motif comes back with its rhythm and contour,
        on other chords. Strong and long notes are chord tones, the others move along the scale."""
        mood, bar, energetic = self.mood, self.bar, self.factors["mood"] == "energetic"
        low, high, sustains, _ = LEADS[self.factors["lead"]]
        part = self.player(self.g.leads[self.factors["lead"]], 5, "lead")
        if sustains:
            part.control_changes.append(pretty_midi.ControlChange(1, 24, 0))
        centre = np.clip((low + high) / 2 + mood.register, low + 5, high - 5)
        scale = self.g.scale[self.mode == "minor"]
        scale = SCALES["phrygian" if self.factors["mood"] == "dark" else scale]
        scale = [(self.tonic + s) % 12 for s in scale]
        motifs = []
        for _ in "AB":
            rhythm = fit(pick(rng, self.g.line), self.own_bar, bar, 1)
            rhythm = reweave(rhythm, mood.density, bar, rng)
            if not motifs and not re.search(r"[^.\-]", rhythm[:4]):
                rhythm = "x" + rhythm[1:]  # the lead is heard from the first beat on
            contour = rng.choice([-3, -2, -1, -1, 1, 1, 2, 3], size=bar)
            motifs.append((rhythm.lstrip("-").rjust(bar, "."), contour))
        pitch = int(centre)
        for i in range(self.bars):
            rhythm, contour = motifs[i % 4 == 2]
            arch = (0, 2, 5, -1)[i % 4]  # the phrase rises to its third bar and comes home
            if i % 4 == 3:
                half = bar // 8 * 4  # a beat
                rhythm = rhythm[:half] + "x" + "-" * (bar - half - 3) + ".."
            elif i % 4 == 1:
                contour = contour * np.where(np.arange(bar) < bar // 2, 1, -1)  # an answer
            for k, (step, _, length) in enumerate(onsets(rhythm)):
                tones = self.chord_at(i * bar + step)[1]
                # A scale note a semitone above a chord tone grates; the strong ones are chord tones
                pool = [s for s in scale if s not in tones and (s - 1) % 12 not in tones]
                pool = tones if k == 0 or step % 8 == 0 or length > 3 else [*tones, *pool]
                pool = [p for p in range(low, high + 1) if p % 12 in pool]
                pool = [p for p in pool if abs(p - centre) < 10]
                goal = centre + arch if k == 0 else pitch
                nearest = int(np.argmin([abs(p - goal) for p in pool]))
                move = 0 if k == 0 else contour[k]
                move = -move if not 0 <= nearest + move < len(pool) else move
                pitch = pool[int(np.clip(nearest + move, 0, len(pool) - 1))]
                length *= mood.length if mood.length < 1 else 1
                loud = 96 + 8 * (step % 4 == 0)
                self.play(part, pitch, i * bar + step, length, loud)
                if energetic:
                    self.play(part, pitch - 12, i * bar + step, length, loud - 14)


# --------------------------------------------------------------------------------- rendering ----

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


# ---------------------------------------------------------------------------------- captions ----


def tempo_word(bpm: int) -> str:
    return "slow" if bpm < SLOW_BELOW else "mid-tempo" if bpm < FAST_FROM else "fast"


TEMPO_WORDS = {
    "slow": ["slow", "slow", "slow-paced", "unhurried"],
    "mid-tempo": ["mid-tempo", "mid-tempo", "medium-tempo", "moderate"],
    "fast": ["fast", "fast", "up-tempo", "fast-paced", "quick"],
}
NOUNS = "track track tune piece song instrumental groove music loop".split()
OPENERS = ["", "", "", "", "this is ", "play ", "i want ", "give me ", "make ", "we hear "]
MIXED = ["{}-flavoured {}", "{}-infused {}", "{} harmony over a {} groove", "{} with a {} beat"]
MIXED += ["{} chords and melody on a {} rhythm", "{} over a {} rhythm section"]


def caption(factors: dict, rng: np.random.Generator, length: str | None = None) -> str:
    """Describe a clip, anew at every call; length: words, sentence, paragraph or None (a mix)."""
    length = length or str(rng.choice(["words", "sentence", "paragraph"], p=[0.35, 0.4, 0.25]))
    text = dict(words=few_words, sentence=sentence, paragraph=paragraph)[length](factors, rng)
    text = re.sub(r"\b([Aa]) (?=[aeiou](?!ne))", r"\1n ", " ".join(text.split()).replace(" ,", ","))
    if rng.random() < (0.6 if length == "words" else 0.3):
        return text.lower()  # as people type
    text = re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text + "." if length != "words" and rng.random() < 0.7 else text


def caption_with_lead(factors: dict, rng: np.random.Generator) -> str:
    """A caption that names the lead instrument, but for one in twenty; of others one in three
    does not."""
    for _ in range(3):
        text = caption(factors, rng)
        if names_lead(text, factors):
            break
    return text


def names_lead(text: str, factors: dict) -> bool:
    return any(name in text.lower() for name in LEADS[factors["lead"]][3])


def name(factors: dict, rng, compound: bool = True) -> str:
    """The genre or the mixture, genre first; compound: fit to stand before a noun."""
    genre, rhythm = factors["genre"], factors["rhythm"]
    if rhythm is None:
        return pick(rng, GENRES[genre].words)
    if compound or rng.random() < 0.5:
        return f"{genre} {rhythm}"
    return pick(rng, MIXED).format(genre, rhythm)


def worded(factors: dict, rng) -> SimpleNamespace:
    """Each factor in words, as this caption will call it."""
    key = factors["key"].replace("#", " sharp" if rng.random() < 0.5 else "#")
    key = re.sub(r"^([A-G])b", r"\1 flat" if rng.random() < 0.5 else r"\1b", key)
    number = pick(rng, ["{} bpm", "{} BPM", "{} beats per minute", "{} bpm"]).format(
        factors["tempo"]
    )
    return SimpleNamespace(
        key=key,
        number=number,
        tempo=pick(rng, TEMPO_WORDS[tempo_word(factors["tempo"])]),
        mood=pick(rng, MOODS[factors["mood"]].words),
        lead=pick(rng, LEADS[factors["lead"]][3]),
        beat=pick(rng, GENRES[factors["rhythm"] or factors["genre"]].beat),
        band=pick(rng, GENRES[factors["genre"]].band),
        noun=pick(rng, NOUNS),
    )


FEW_WORDS = """
{name}|{name}|{name} {noun}|{mood} {name}|{mood} {name}|{tempo} {name}|{lead} {name}|{name} {lead}
{name} with {lead}|{tempo} {lead} {name}|{mood} {lead} {name}|{tempo} {mood} {name}|{name}, {mood}
{mood} {tempo} {name}|{name} {number}|{name} at {number}|{name} in {key}|{mood} {name} {lead}
{number} {name}|{mood} {name} at {number}|{lead} {name}, {number}|{name}, {number}
""".strip().replace("\n", "|").split("|")  # fmt: skip


def few_words(factors: dict, rng) -> str:
    w = worded(factors, rng)
    if rng.random() < 0.05:  # the only captions without a genre
        return pick(rng, ["{mood} {lead}", "{tempo} {mood} {lead}", "{mood} music"]).format(
            **vars(w)
        )
    shapes = FEW_WORDS[:10] if factors["rhythm"] else FEW_WORDS
    return pick(rng, shapes).format(name=name(factors, rng), **vars(w))


def adjectives_and_tails(w, rng, keep: float) -> tuple[str, list, set]:
    """Say each factor before the noun, after it or, with probability 1 - keep, not at all."""
    adjectives, tails, said = [], [], set()
    if rng.random() < keep:
        said.add("mood")
        if rng.random() < 0.75:
            adjectives.append(w.mood)
        else:
            tails.append(
                pick(rng, ["with a {} mood", "that sounds {}", "in a {} mood"]).format(w.mood)
            )
    if rng.random() < keep:
        said.add("tempo")
        if rng.random() < 0.3:
            adjectives.append(w.tempo)
        else:
            at = [
                "at {}",
                "at {}",
                "at a tempo of {}",
                "around {}",
                f"at a {w.tempo.split('-p')[0]} tempo",
            ]
            at = at[: 4 if "tempo" in w.tempo else 5]
            tails.append(pick(rng, at).format(w.number))
    if rng.random() < keep:
        said.add("lead")
        how = [
            "with {}",
            "with a {} lead",
            "featuring {}",
            "led by a {}",
            "with a {} melody",
            "for {}",
        ]
        tails.append(pick(rng, how).format(w.lead).replace("lead lead", "lead"))
    if rng.random() < keep * 0.35:
        said.add("key")
        tails.append(pick(rng, ["in {}", "in the key of {}"]).format(w.key))
    if rng.random() < keep * 0.3:
        said.add("beat")
        tails.append("with " + pick(rng, [w.beat, w.band]))
    adjectives = [adjectives[i] for i in rng.permutation(len(adjectives))]
    tails = [tails[i] for i in rng.permutation(len(tails))]
    return pick(rng, [" ", ", ", " and "]).join(adjectives), tails, said


def is_plural(thing: str) -> bool:
    head = thing.split(" with ")[0]
    return " and " in head or bool(re.search("[^s]s$", head) and not re.match("an? ", head))


def sentence(factors: dict, rng) -> str:
    w = worded(factors, rng)
    adjectives, tails, _ = adjectives_and_tails(w, rng, keep=0.65)
    form, glue = rng.random(), pick(rng, [" ", " ", ", "])
    tail = glue.join([""] + tails) if glue == " " else " " + glue.join(tails)
    if form < 0.45:  # "play a slow jazz reggae track with saxophone"
        article = "some" if w.noun == "music" else "a"
        return f"{pick(rng, OPENERS)}{article} {adjectives} {name(factors, rng)} {w.noun}{tail}"
    if form < 0.6:  # "slow and calm jazz reggae with saxophone"
        return f"{adjectives} {name(factors, rng, False)}{tail}"
    if form < 0.8:  # "jazz reggae, calm, saxophone, 84 bpm"
        tags = [
            w.mood,
            w.lead,
            pick(rng, [w.tempo, w.number, w.number]),
            w.key,
            re.sub("^an? ", "", w.beat),
        ]
        tags = [t for t, p in zip(tags, (0.7, 0.7, 0.7, 0.3, 0.2)) if rng.random() < p]
        tags.insert(
            0 if rng.random() < 0.6 else int(rng.integers(len(tags) + 1)), name(factors, rng)
        )
        return ", ".join(tags)
    if form < 0.93:  # "a saxophone plays a calm melody over a slow jazz reggae groove"
        verb = pick(rng, ["plays", "carries", "takes", "improvises"])
        what = pick(rng, ["melody", "tune", "theme", "line"])
        where = pick(rng, ["groove", "beat", "backing", "track"])
        tempo, mood = pick(rng, [w.tempo, "", ""]), pick(rng, [w.mood, w.mood, ""])
        end = pick(rng, ["", *[f" at {w.number}" if not tempo else ""] * 2, f" in {w.key}"])
        return f"a {w.lead} {verb} a {mood} {what} over a {tempo} {name(factors, rng)} {where}{end}"
    thing = pick(rng, ["something", "music that is", "a piece that is"])
    tempo = f" and {w.tempo}" if rng.random() < 0.5 else ""
    with_lead = f", with {w.lead}" if rng.random() < 0.5 else ""
    return f"{thing} {w.mood}{tempo}: {name(factors, rng, False)}{with_lead}"


def paragraph(factors: dict, rng) -> str:
    """Two or three sentences in the manner of MusicCaps."""
    w = worded(factors, rng)
    adjectives, tails, said = adjectives_and_tails(w, rng, keep=0.45)
    opener = pick(
        rng, ["", "this is ", "this is ", "the recording is ", "here is ", "this clip is "]
    )
    noun = pick(rng, ["instrumental", "track", "piece", "tune", "instrumental piece", "song"])
    which = name(factors, rng)
    first = f"{opener}a {adjectives} {which} {noun} {', '.join(tails)}"
    more = []
    if "lead" not in said:
        how = [
            "the {lead} {plays} the {main} melody",
            "a {lead} {plays} the {main} melody over {band}",
        ]
        how += ["the melody is played by a {lead}", "a {lead} takes the lead, over {beat}"]
        plays, main = pick(rng, ["plays", "carries", "takes"]), pick(rng, ["main", "lead", w.mood])
        more.append(pick(rng, how).format(plays=plays, main=main, **vars(w)))
    if "tempo" not in said:
        how = [
            "the tempo is {tempo}",
            "it is played at {number}",
            "the tempo is {number}",
            "it moves at {number}",
        ]
        in_key = pick(rng, [f", in {w.key}", f" and the key is {w.key}", "", ""]) * (
            "key" not in said
        )
        tempo = w.tempo.removesuffix("-tempo").removesuffix("-paced")
        tempo = {"mid": "moderate", "medium": "moderate", "up": "fast"}.get(tempo, tempo)
        more.append(pick(rng, how).format(tempo=tempo, number=w.number) + in_key)
    if "beat" not in said:
        how = [
            "{beat} {keep} it moving under {band}",
            "{band} {sit} on top of {beat}",
            "there {are} {beat}",
        ]
        how += ["it features {band} and {beat}", "behind it there {are} {beat}"]
        keep, are = ("keep", "are") if is_plural(w.beat) else ("keeps", "is")
        sit = "sit" if is_plural(w.band) else "sits"
        values = dict(beat=w.beat, band=w.band, keep=keep, are=are, sit=sit)
        more.append(pick(rng, how).format(**values))
    second = pick(rng, MOODS[factors["mood"]].words)
    feel = f"{w.mood} and {second}" if second != w.mood and "mood" not in said else second
    how = [f"the mood is {feel}", f"the atmosphere is {feel}", f"it sounds {feel}"]
    more.append(pick(rng, how))
    if rng.random() < 0.5:
        place = GENRES[factors["rhythm"] or factors["genre"]].place
        more[-1] += pick(rng, [", and one might hear it {}", ", like something heard {}"]).format(
            place
        )
    more = [more[i] for i in rng.permutation(len(more))]
    count = 1 + int(rng.random() < 0.8)
    while count < len(more) and len(" ".join([first, *more[:count]]).split()) < 25:
        count += 1
    return ". ".join([first.strip(), *more[:count]])


# -------------------------------------------------------------------------------- the corpus ----

TOKENIZER = ROOT / "toy" / "tokenizer.json"
TEXT = ROOT / "toy" / "text.safetensors"
PACKED = ROOT / "toy" / "corpus.tar.xz"
UNPACKED = ROOT / "data" / "toy"
SECONDS = 10.0  # of a clip
AT_ONCE = 128  # clips that one fluidsynth plays
VALID = 16  # one clip in so many is for validation


def corpus() -> Path:
    """The data folder of the corpus that ships here, unpacked on first use."""
    if not (UNPACKED / "manifest.jsonl").exists():
        if not PACKED.exists():
            raise ValueError(f"no {PACKED}: `git checkout -- toy/{PACKED.name}` restores it")
        temporary = UNPACKED.with_name(f"toy.{os.getpid()}")
        with tarfile.open(PACKED) as tar:
            # Debian's Python 3.11.2 has no filters yet, and takes no argument of that name.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(temporary)
        try:
            os.replace(temporary, UNPACKED)
        except OSError:  # another process was quicker; or a build ended before its first clips
            shutil.rmtree(temporary)
            if not (UNPACKED / "manifest.jsonl").exists():
                raise ValueError(f"{UNPACKED} is an unfinished corpus: remove it") from None
    return UNPACKED


def play_clips(indices, split_seed=0, seconds=SECONDS, mixtures=MIXTURES) -> list[np.ndarray]:
    clips = [sample_clip(i, split_seed, mixtures) for i in indices]
    return render_many([compose(*clip, seconds) for clip in clips], seconds)


def play_and_encode(indices, seconds, mixtures) -> np.ndarray:
    """Clips of these indices as codes (clips, 9, T), in a process of its own."""
    torch.set_num_threads(1)
    audio = torch.from_numpy(np.stack(play_clips(indices, seconds=seconds, mixtures=mixtures)))
    return load_codec("toy").encode(audio).numpy().astype(np.uint16)


def fit_codec(clips: int, workers: int):
    """Fits the toy codec to clips that no corpus has (split seed 1) and saves it to toy/codec."""
    with ProcessPoolExecutor(workers) as pool:
        parts = [range(i, min(i + AT_ONCE, clips)) for i in range(0, clips, AT_ONCE)]
        played = tqdm(pool.map(play_clips, parts, [1] * len(parts)), "codec", len(parts))
        audio = [clip for part in played for clip in part]
    ToyCodec.fit(audio).save(ROOT / "toy" / "codec")


def train_tokenizer(captions: int = 20000, entries: int = 1000):
    """A byte-level BPE of the captions' own words, so that any string can be encoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=entries,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(2)
    tokenizer.train_from_iterator(
        (caption(sample_factors(rng), rng) for _ in range(captions)), trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.save(str(TOKENIZER))


def text_encoder():
    """The small T5 that ships here: it knows the words of this world, as Flan-T5 knows English."""
    encoder = TextEncoder.small(TOKENIZER.read_text())
    load_weights(encoder.encoder, TEXT)
    return encoder


def train_text_encoder(steps: int = 1000, batch: int = 64, lr: float = 3e-3):
    """Teaches a new T5 to tell a clip's factors from its captions; it never meets music."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    encoder = TextEncoder.small(TOKENIZER.read_text()).train()
    answers = dict(genre=[*GENRES], rhythm=[None, *GENRES], lead=[*LEADS], mood=[*MOODS])
    answers["tempo"] = sorted({tempo for genre in GENRES.values() for tempo in genre.tempo})
    sizes = {name: len(values) for name, values in answers.items()}
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(encoder.d_text, n) for k, n in sizes.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), "text encoder")):
        factors = [sample_factors(rng) for _ in range(batch)]
        text, mask, _ = encoder([caption(f, rng) for f in factors])
        said = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = 0.0
        for name, values in answers.items():
            right = torch.tensor([values.index(f[name]) for f in factors])
            loss = loss + F.cross_entropy(heads[name](said), right)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    weights = {k: v.half() for k, v in encoder.encoder.state_dict().items()}
    weights.pop("encoder.embed_tokens.weight", None)  # another name of shared.weight
    save_file(weights, TEXT)


def write_corpus(
    folder: Path, clips: int, full: int, seconds: float, mixtures: float, workers: int
):
    """Renders and encodes clips 0 ... `clips` - 1 into a data folder: all nine codebooks of the
    first `full` clips, the first codebook alone of the others. Goes on where it was stopped."""
    writer = Writer(folder, load_codec("toy"))
    todo = range(len(writer.rows()), clips)
    parts = [todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)]
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(partial(play_and_encode, seconds=seconds, mixtures=mixtures), parts)
        encoded = tqdm(made, "corpus", len(parts), unit_scale=AT_ONCE)
        for part, codes in zip(parts, encoded):
            rows = [
                dict(
                    split="train" if i % VALID else "valid",
                    factors=sample_clip(i, mixtures=mixtures)[0],
                )
                for i in part
            ]
            writer.add([(c if i < full else c[:1], row) for i, c, row in zip(part, codes, rows)])


def build(args):
    """Makes the toy world from scratch: codec, tokenizer, text encoder, corpus."""
    if not 0 <= args.mixtures <= 0.95:  # waltzes, which never mix, are one in twenty
        raise ValueError(f"--mixtures is a share, of at most 0.95, not {args.mixtures:g}")
    other = (args.seconds, args.mixtures) != (SECONDS, MIXTURES)
    if other and Path(args.out).resolve() == UNPACKED.resolve():
        raise ValueError("clips of other lengths or mixtures do not ship: give an --out of its own")
    if not args.corpus_only:
        if (Path(args.out) / "manifest.jsonl").exists():
            raise ValueError(
                f"{args.out} holds clips of the codec that is to be made anew: remove it first, or"
                " go on with it by --corpus-only"
            )
        fit_codec(args.codec_clips, args.workers)
        train_tokenizer()
        train_text_encoder()
    write_corpus(Path(args.out), args.clips, args.full, args.seconds, args.mixtures, args.workers)
    if Path(args.out).resolve() == UNPACKED.resolve():
        # lp=1: the codes are pairs of bytes, and their high bytes resemble each other.
        filters = [dict(id=lzma.FILTER_LZMA2, preset=9, lp=1, lc=3, pb=1)]
        with (
            lzma.open(PACKED, "w", filters=filters) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for path in sorted(Path(args.out).iterdir()):
                tar.add(path, path.name)
        print(f"{PACKED}: {PACKED.stat().st_size / 1e6:.1f} MB")


# ------------------------------------------------------------------------------ command line ----


def listen(args):
    """Renders some clips to wav files and prints what they are."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    clips = [sample_clip(args.first + i) for i in range(args.n)]
    started = time.perf_counter()
    sounds = render_many([compose(*clip, args.seconds) for clip in clips], args.seconds)
    spent = time.perf_counter() - started
    for i, ((factors, _), sound) in enumerate(zip(clips, sounds), start=args.first):
        which = "-".join(filter(None, [factors["genre"], factors["rhythm"]])).replace(" ", "-")
        path = folder / f"{i:05d}-{which}.wav"
        soundfile.write(path, sound, SAMPLE_RATE)
        print(f"{path}  {factors}")
        rng = np.random.default_rng(i)
        for length in ("words", "sentence", "paragraph"):
            print("   ", caption(factors, rng, length))
    print(f"{args.n * args.seconds:.0f} s of music in {spent:.1f} s", file=sys.stderr)


def ship(args):
    """Makes a checkpoint the one that ships: in half precision, with its sampling options."""
    config = read_config(args.checkpoint)
    kept = {k: config[k] for k in ("train", "step", "best", "codec")}
    if is_refiner(config):
        load, folder = load_refiner, ROOT / "toy" / "refiner"
        options = ("steps", "guidance", "sketch_guidance")
    else:
        load, folder = load_checkpoint, ROOT / "toy" / "lm"
        options = ("guidance", "temperature", "top_k", "top_p")
    given = {option: getattr(args, option) for option in options}
    kept["sampling"] = {k: v for k, v in given.items() if v is not None}
    parts = load(args.checkpoint), load_text_encoder(args.checkpoint)
    save_checkpoint(folder, *parts, kept, dtype=torch.float16)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("listen", help=listen.__doc__)
    c.add_argument("--n", type=int, default=8, help="number of clips")
    c.add_argument("--first", type=int, default=0, help="index of the first clip")
    c.add_argument("--seconds", type=float, default=SECONDS, help="length of a clip")
    c.add_argument("--out", default="toy-clips", help="folder for the wav files")
    c.set_defaults(run=listen)
    c = commands.add_parser("build", help=build.__doc__)
    c.add_argument("--clips", type=int, default=6144, help="clips of the corpus [6144]")
    c.add_argument("--full", type=int, default=1024, help="clips with all nine codebooks [1024]")
    c.add_argument(
        "--codec-clips", type=int, default=320, help="clips the codec is fitted to [320]"
    )
    c.add_argument("--seconds", type=float, default=SECONDS, help="of a corpus' clip [10]")
    c.add_argument(
        "--mixtures", type=float, default=MIXTURES, help=f"share of mixed genres [{MIXTURES}]"
    )
    c.add_argument("--corpus-only", action="store_true", help="keep all but the corpus")
    c.add_argument("--out", default=str(UNPACKED), help="data folder; the default is packed, too")
    c.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    c.set_defaults(run=build)
    c = commands.add_parser("ship", help=ship.__doc__)
    c.add_argument("checkpoint", help="folder of a checkpoint, such as out/simba/best")
    for option in ("guidance", "temperature", "top-p"):
        c.add_argument(f"--{option}", type=float, help="[as sample.py has it]")
    c.add_argument("--top-k", type=int, help="[as sample.py has it]")
    c.add_argument("--steps", type=int, help="of a refiner [as sample.py has it]")
    c.add_argument("--sketch-guidance", type=float, help="of a refiner [as `refine` has it]")
    c.set_defaults(run=ship)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    entry(main)
