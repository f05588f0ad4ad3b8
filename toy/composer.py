"""The composer: factors and a seed become the notes of a clip.

`compose` writes drums, bass, comping (chords) and lead from the genre's page of the songbook. Each
part has its own random generator: a change to one leaves the others.

Pitches are MIDI numbers; a step is a sixteenth note. `bar` and `own_bar` are the lengths in steps
of a bar of the clip and of the genre. v is a `comp` line, p a pitch.
"""

import re
from typing import NamedTuple

import numpy as np

from toy.songbook import DRUMS, GENRES, LEADS, LOUDNESS, MOODS, SCALES, TONICS, chord_of, pick

HITS = {"X": 112, "x": 92, "O": 90, "o": 58}  # velocities
TR808 = 25  # a drum kit 3 dB louder than the others


class Part(NamedTuple):
    """What one instrument plays."""

    program: int  # of General MIDI; of a drum kit
    is_drum: bool
    controls: dict  # MIDI controller: value
    notes: list  # (start, end, pitch, velocity), times in seconds


def fill_bars(part: str, own_bar: int, bar: int, bars: int) -> str:
    """Repeat a part over `bars` bars. Each of its bars is cut or stretched to `bar` steps."""
    own = [part[i : i + own_bar] for i in range(0, len(part), own_bar)]
    return "".join((p + p[-4:] * 3)[:bar] for p in own * bars)[: bar * bars]


def onsets(line: str):
    """(step, character, length in steps) of every note of a line of tablature."""
    return [(m.start(), m[0][0], len(m[0])) for m in re.finditer(r"[^.\-]-*", line)]


def change_density(line: str, density: float, bar: int, rng) -> str:
    """Below 1 weak notes are tied to the one before; above 1 long notes are split."""
    changed = list(line)
    for step, char, length in onsets(line):
        if density < 1 and step % bar and rng.random() < (1 - density) * (1 if step % 4 else 0.6):
            changed[step] = "-"
        elif density > 1 and length > 1 and rng.random() < density - 1:
            changed[step + length // 2] = char
    return "".join(changed)


def closest_voicing(tones, low: int, high: int, previous: list | None) -> list:
    """The pitch classes `tones` in close position in [low, high], near the previous voicing."""
    middle = (low + high) / 2
    voicings = []
    for bottom in range(low, low + 12):
        if bottom % 12 in tones:
            pitches = np.array(sorted(bottom + (t - bottom) % 12 for t in tones))
            voicings += [pitches + lift for lift in range(0, max(high - pitches[-1], 0) + 1, 12)]

    near = lambda v: np.abs(v[:, None] - (previous or [middle])).min(1).sum()
    return min(voicings, key=lambda v: near(v) + 0.3 * abs(v.mean() - middle)).tolist()


class Piece:
    """A clip while it is written. `hand` draws the unevenness of human hands."""

    def __init__(self, factors, seed, seconds):
        rng, drum_rng, bass_rng, lead_rng, self.hand = np.random.default_rng(seed).spawn(5)
        self.factors, self.seconds, self.parts = factors, seconds, []
        self.genre = GENRES[factors["genre"]]  # its page gives harmony, comping and lead
        self.rhythm = GENRES[factors["rhythm"] or factors["genre"]]  # drums, bass and timing
        self.mood = MOODS[factors["mood"]]
        tonic, self.mode = factors["key"].split()
        self.tonic = TONICS.index(tonic)
        self.bar, self.own_bar = 4 * self.rhythm.beats, 4 * self.genre.beats
        self.step_seconds = 15 / factors["tempo"]
        self.bars = int(np.ceil(seconds / (self.bar * self.step_seconds)))
        song = pick(rng, self.genre.chords[self.mode]).split("|")
        self.chords = [[chord_of(numeral) for numeral in bar.split()] for bar in song]
        self.drums(drum_rng)
        self.bass(bass_rng)
        self.comping(rng)
        self.lead(lead_rng)

    def seconds_at(self, step: float) -> float:
        """When a step begins. Swing gives the first note of a pair more than half of its time."""
        unit, ratio = self.rhythm.swing
        pair = 32 // unit  # steps in two notes of the swinging value
        whole, x = divmod(step / pair, 1)
        x = x * 2 * ratio if x < 0.5 else ratio + (x - 0.5) * 2 * (1 - ratio)
        return (whole + x) * pair * self.step_seconds

    def chord_at(self, step: int) -> tuple[int, tuple]:
        """(pitch class of the root, pitch classes of the chord)"""
        here = self.chords[step // self.bar % len(self.chords)]
        root, tones = here[step % self.bar * len(here) // self.bar]
        root += self.tonic
        return root % 12, tuple((root + t) % 12 for t in tones)

    def add_part(self, program: int, level: float, is_drum=False):
        """A new part at `level` dB."""
        own = (4 if program == TR808 else 1) if is_drum else LOUDNESS.get(program, 2)
        volume = 100 * 10 ** ((level - own) / 40)  # controller 7 is squared by the synthesiser
        reverb = 127 * (self.genre.room + self.rhythm.room) / 2
        controls = {7: int(np.clip(volume, 1, 127)), 91: int(reverb)}
        self.parts.append(Part(program, is_drum, controls, []))
        return self.parts[-1]

    def add_note(self, part, pitch, step, length, velocity, delay=0.0):
        """One note, a little early or late, a little loud or soft."""
        begin = self.seconds_at(step)
        start = begin + delay + max(self.hand.normal(0, self.rhythm.loose / 1000), -begin)
        end = min(max(self.seconds_at(step + length) - 0.01, start + 0.05), self.seconds)
        velocity += self.mood.velocity + self.hand.normal(0, 4)
        if start < end:
            part.notes.append((start, end, int(pitch), int(np.clip(velocity, 20, 127))))

    def drums(self, rng):
        """The pattern, thinner or richer by mood, with a fill at the end of a phrase."""
        fill, sparse = self.rhythm.fill, self.mood.density < 0.6
        kit = pick(rng, self.rhythm.drums) if self.rhythm.drums else {}
        extra = dict(self.mood.drums) if kit else {}
        part = self.add_part(self.rhythm.kit, 0, is_drum=True)
        phrase = self.bar * self.mood.phrase  # steps
        for letter, pattern in (kit | extra).items():
            line = fill_bars(pattern, 16 if letter in extra else self.bar, self.bar, self.bars)
            for step, char, _ in onsets(line):
                weak = char == "o" or (char == "x" and step % 4 and letter not in "KSPERV")
                filled = step % phrase >= phrase - len(fill) and letter not in "KDC"
                if not (filled or weak and sparse):
                    self.add_note(part, DRUMS[letter], step, 1, HITS[char])
        for end in range(phrase, self.bars * self.bar + 1, phrase):
            for i, letter in enumerate("" if sparse else fill):
                self.add_note(part, DRUMS[letter], end - len(fill) + i, 1, 88 + 4 * i)

    def bass(self, rng):
        """Degrees of the chord, or a walk that steps to the next chord's root."""
        bar = self.bar
        part = self.add_part(pick(rng, self.rhythm.bass_programs), 2)
        line = fill_bars(pick(rng, self.rhythm.bass), bar, bar, self.bars)
        pitch = 36
        for step, char, length in onsets(line):
            root, tones = self.chord_at(step)
            next_beat = (step // 4 + 1) * 4
            next_root = self.chord_at(next_beat)[0]
            bottom, ahead = (28 + (r - 28) % 12 for r in (root, next_root))
            third = 3 if (root + 3) % 12 in tones else 4
            degrees = {"R": 0, "3": third, "5": 7, "6": 9, "7": 10, "8": 12}
            named = {c: bottom + d for c, d in degrees.items()} | {"n": ahead, "a": ahead - 1}
            if char in named:
                pitch = named[char]
            elif step % bar == 0 or self.chord_at(step - 1)[0] != root:
                pitch = bottom + 12 * (38 <= pitch and bottom < 34)
            elif next_root != root or next_beat % bar == 0:
                ahead += 12 * (pitch - ahead > 6)
                pitch = ahead + pick(rng, (-1, 1, -2, 2))
            else:
                near = [p for p in range(28, 50) if p % 12 in tones and 0 < abs(p - pitch) < 8]
                pitch = pick(rng, near)
            self.add_note(part, pitch, step, length, 92 + 6 * (step % bar == 0))

    def comping(self, rng):
        """The chords, voice-led, in the styles of the genre and one of the mood."""
        mood, lead_program = self.mood, self.genre.leads[self.factors["lead"]]
        as_genre = self.own_bar, mood.density, int(mood.register * 0.7)
        for v in self.genre.comp + mood.comp:
            own_bar, density, shift = (16, 1, 0) if v in mood.comp else as_genre
            programs = [p for p in v.programs if p != lead_program] or v.programs
            part = self.add_part(pick(rng, programs), v.level - 3)
            line = fill_bars(pick(rng, v.parts), own_bar, self.bar, self.bars)
            line = change_density(line, density, self.bar, rng)
            voicing = chord = None
            for step, char, length in onsets(line):
                if self.chord_at(step) != chord:
                    root, tones = chord = self.chord_at(step)
                    upper = tones[1:] if len(tones) > 3 else tones  # the bass has the root
                    voicing = closest_voicing(upper, v.low + shift, v.high + shift, voicing)
                    full = [*voicing, voicing[0] + 12]
                    ladder = full + voicing[:0:-1]  # up and down
                    count = 0  # of notes on this chord
                rung = ladder[count % len(ladder)]
                bottom = v.low + (root + (int(char) if char.isdigit() else 0) - v.low) % 12
                pitches = dict(
                    block=voicing,
                    strum=full,
                    arp=[rung],
                    octaves=[rung, rung + 12],
                    alberti=[(voicing * 2)[(0, 2, 1, 2)[count % 4]]],
                    power=[bottom, bottom + 7, bottom + 12],
                )[v.style]
                count += 1
                length *= mood.length if length > 1 else 1
                for i, pitch in enumerate(pitches):
                    delay = 0.012 * i if v.style == "strum" else 0.0
                    self.add_note(part, pitch, step, length, 82 + 8 * (step % 8 == 0), delay)

    def lead(self, rng):
        """Two motifs in the form A A B A, on changing chords. Strong and long notes are chord
        tones; the others move along the scale."""
        mood, bar = self.mood, self.bar
        low, high, sustains, _ = LEADS[self.factors["lead"]]
        part = self.add_part(self.genre.leads[self.factors["lead"]], 5)
        if sustains:
            part.controls[1] = 24  # vibrato
        centre = np.clip((low + high) / 2 + mood.register, low + 5, high - 5)
        scale = SCALES[mood.scale or self.genre.scale[self.mode == "minor"]]
        scale = [(self.tonic + s) % 12 for s in scale]
        motifs = []
        for i in range(2):
            line = fill_bars(pick(rng, self.genre.line), self.own_bar, bar, 1)
            rhythm = change_density(line, mood.density, bar, rng)
            if i == 0 and not onsets(rhythm[:4]):
                rhythm = "x" + rhythm[1:]  # the lead plays from the first beat
            moves = rng.choice([-3, -2, -1, -1, 1, 1, 2, 3], size=bar)
            motifs.append((rhythm.lstrip("-").rjust(bar, "."), moves))
        pitch = int(centre)
        for i in range(self.bars):
            rhythm, moves = motifs[i % 4 == 2]
            arch = (0, 2, 5, -1)[i % 4]  # the phrase rises to its third bar and falls back
            if i % 4 == 3:
                half = bar // 8 * 4  # whole beats
                rhythm = rhythm[:half] + "x" + "-" * (bar - half - 3) + ".."
            elif i % 4 == 1:
                moves = moves * np.where(np.arange(bar) < bar // 2, 1, -1)  # an answer
            for k, (step, _, length) in enumerate(onsets(rhythm)):
                tones = self.chord_at(i * bar + step)[1]
                # A scale note a semitone above a chord tone would grate.
                passing = [s for s in scale if s not in tones and (s - 1) % 12 not in tones]
                pool = tones if k == 0 or step % 8 == 0 or length > 3 else [*tones, *passing]
                pool = [p for p in range(low, high + 1) if p % 12 in pool and abs(p - centre) < 10]
                goal, move = (pitch, moves[k]) if k else (centre + arch, 0)
                nearest = int(np.argmin([abs(p - goal) for p in pool]))
                if not 0 <= nearest + move < len(pool):
                    move = -move
                pitch = pool[int(np.clip(nearest + move, 0, len(pool) - 1))]
                length *= min(mood.length, 1)
                velocity = 96 + 8 * (step % 4 == 0)
                self.add_note(part, pitch, i * bar + step, length, velocity)
                if mood.octaves:
                    self.add_note(part, pitch - 12, i * bar + step, length, velocity - 14)


def compose(factors: dict, seed: int, seconds: float = 10.0) -> list[Part]:
    """The same arguments give the same notes."""
    return Piece(factors, seed, seconds).parts
