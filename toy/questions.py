"""What evaluate.py asks in the toy world: prompts from held-out clips, and whether each is met."""

import operator
import re

import numpy as np
import torch

from data import Clips
from text import TextEncoder
from toy import corpus, songbook, words
from toy.judge import FACTORS, heard_in_real_clips

TEMPLATES = {"bpm": "{genre} at {tempo} bpm", "genre": "{genre}"}
KINDS = ("sentence", "words", "paragraph", *TEMPLATES)
SAMPLES = 4  # of one prompt, for diversity


def ask(codec, count, kinds=KINDS[:3]) -> dict:
    """Fields of an evaluate.Task. The prompts describe `count` held-out clips; the other held-out
    clips are the reference. Their audio does not ship, but what the judge heard in it does."""
    valid = Clips(corpus.folder(), "valid", codec.codebooks, codec.name)
    factors = [row["factors"] for row in Clips(corpus.folder(), "valid", 1).rows]
    heard = heard_in_real_clips()
    count = min(count, len(valid))
    alike = {}  # held-out clips that one prompt of mood and genre describes
    for i, f in enumerate(factors):
        if f["rhythm"] is None:  # no mixture of genres
            alike.setdefault(f"{f['mood']} {f['genre']}", []).append(i)
    alike = [(prompt, rows[:SAMPLES]) for prompt, rows in alike.items() if len(rows) >= SAMPLES]
    return dict(
        name="toy",
        about=f"{count} held-out clips; reference: the other {len(factors) - count} held-out clips."
        " Factors: of real clips and codec-K all count, of the others those that the prompt names",
        prompts={k: [prompt(k, f, i) for i, f in enumerate(factors[:count])] for k in kinds},
        codes=np.stack([valid.codes(i, 0, 862) for i in range(count)]),
        real=heard.of(range(count)),
        reference=torch.cat(heard.of(range(count, len(factors))).frames),
        factors=factors[:count],
        repeated={prompt: heard.of(rows).embedding for prompt, rows in alike[:8]},
        training=Clips(corpus.folder(), "train", 1),
    )


def prompt(kind, factors, i) -> str:
    if kind in TEMPLATES:
        return TEMPLATES[kind].format(**factors)
    return words.caption(factors, np.random.default_rng([words.LENGTHS.index(kind), i]), kind)


def same_tempo(asked, heard):
    """To within 4%."""
    return abs(heard - asked) <= 0.04 * asked


def in_time(asked, heard):
    """The same tempo, twice or half of it: listeners differ in what they take for the beat."""
    return any(same_tempo(m * asked, heard) for m in (0.5, 1, 2))


def as_asked(logits, factors, captions=None) -> dict:
    """Does the judge hear what was asked for? -> {factor: bools of the clips for which it counts}.

    logits {factor: (N, choices)}, factors and captions of N clips. A factor counts where the
    caption names it; without captions, everywhere. Of a mixture the judge hears the genre that
    lends the rhythm, so "genre" counts only where there is none.
    """
    named = [{*FACTORS}] * len(factors) if captions is None else map(mentioned, captions, factors)
    named = [names - ({"genre"} if f["rhythm"] else set()) for names, f in zip(named, factors)]
    verdicts = {}
    for row in ("genre", "lead", "tempo", "key", "mood", "tempo, half or double"):
        factor = row.split(",")[0]
        same = {"tempo": same_tempo, "tempo, half or double": in_time}.get(row, operator.eq)
        heard = [FACTORS[factor][i] for i in logits[factor].argmax(1)]
        pairs = [(f[factor], h) for f, h, names in zip(factors, heard, named) if factor in names]
        verdicts[row] = np.array([same(*pair) for pair in pairs], bool)
    return verdicts


def mentioned(caption, f) -> set:
    """Which of the factors f of its clip a caption names."""
    uses = lambda names: any(name in caption.lower() for name in names)
    named = dict(
        genre=uses([*songbook.GENRES[f["genre"]].words, f["genre"]]),
        lead=words.names_lead(caption, f),
        tempo=TextEncoder.TEMPO.search(caption),
        key=re.search(r"(?i)\b[a-g](#|b| sharp| flat)? (major|minor)\b", caption),
        mood=uses(songbook.MOODS[f["mood"]].words),
    )
    return {factor for factor, said in named.items() if said}
