"""The composer."""

import re

import numpy as np
import pretty_midi

from toy.songbook import DRUMS, GENRES, LEADS, LOUD, MOODS, SCALES, TONICS, TR808, pick, voice


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
