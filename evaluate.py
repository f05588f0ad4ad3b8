"""Does the music do what the words asked, and does it sound like music? Measured.

    python evaluate.py                              the model that ships, beside real clips
    python evaluate.py out/simba/best mine/         checkpoints, and folders of 000.wav, 001.wav ...
    python evaluate.py toy/lm+out/refiner/best      a checkpoint, and the second stage it is to have
    python evaluate.py musicgen-small out/simba/best --musiccaps musiccaps-public.csv --clips clips/

Every table has the same columns, whatever listens: the toy world's judge (`judge.py`: FD_toy,
KL_toy, CLAP_toy and whether each factor is what was asked) or the paper's networks (`embedders.py`:
FD_openl3, KL, CLAP). Above the systems stand real clips, which say how good the ruler is, and real
clips through the codec with nine codebooks and with one, which say what a model of those tokens can
reach. Numbers in brackets are 95% intervals, from a bootstrap over clips.

What is made is kept in out/eval, so a run that was broken off goes on. Tables land in results/ as
Markdown and CSV. The paper's tables and figures, each one command (figures.py):

    python evaluate.py table1 MAMBA SIMBA CROSS-SIMBA TRANSFORMER
    python evaluate.py table2 SIMBA TRANSFORMER SIMBA-9      (both with a second stage)
    python evaluate.py table4 SIMBA-24 SIMBA-12 SIMBA-6
    python evaluate.py figure2 out/simba/step-* out/transformer/step-*
    python evaluate.py figure3 SIMBA TRANSFORMER             spectrograms of one prompt
    python evaluate.py kappa                                 the codec with 1 ... 9 codebooks
    python evaluate.py tempo                                 does the beat follow "at 96 bpm"?
    python evaluate.py study                                 all of it, in the toy world (study.py)

N clips · W frames of an embedding · D its size · C tags
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from audio import SAMPLE_RATE, mel_spectrogram, read_audio, write_audio, write_text
from checkpoint import load_checkpoint, read_config
from codec import load_codec
from data import Clips
from options import entry
from paper import figures
from paper.captions import mentions_vocals
from paper.sources import AUDIO, musiccaps_files, read_musiccaps
from sample import ROOT, SHIPPED, System, generate, newest_checkpoint
from text import TextEncoder
from toy import corpus, songbook, words
from toy.judge import FACTORS, heard_in_real_clips, in_time, load_judge, right


def frechet_distance(x, y):
    """The Fréchet distance between two clouds of embeddings, x (n, D) and y (m, D).

    Each cloud is summed up by its mean and its covariance, as if it were a Gaussian; the distance
    is the least mean squared displacement that turns one Gaussian into the other,

        |mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    It is 0 where both agree, has the unit of the embedding squared (no root is taken), and sees
    sets, not clips: audio of one clip repeated scores badly however good the clip is, and a system
    that ignores its prompts can score well. x and y hold the *frames* of all files together, not a
    mean for each file; covariances divide by n - 1. With few frames it is too large (a cloud of n
    points seems flatter than it is), so only figures over equally many clips compare; and nothing
    compares between embeddings, windows, or mono and duplicated stereo, where stacking the same
    vector twice doubles it exactly.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"a Fréchet distance needs two frames a side, not {len(x)} and {len(y)}")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _frechet(x.mean(0), np.atleast_2d(np.cov(x.T)), y.mean(0), np.atleast_2d(np.cov(y.T)))


def _frechet(mean_x, cov_x, mean_y, cov_y):
    # The eigenvalues of S_x S_y are those of the symmetric S_x^(1/2) S_y S_x^(1/2): all real, and
    # none below zero but by rounding.
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * trace)


def kl_divergences(p, q, eps=1e-6):
    """Kullback-Leibler divergences, in nats, of tag distributions p (..., C) from q (..., C).

    p is what a tagger hears in generated clips, q what it hears in the real clips that the prompts
    describe: sum p log(p / (q + eps)). It is large where the generated clip has a tag that the real
    one has not; eps bounds that at log 1e6. The other direction (which MusicGen's authors print)
    punishes what is *missing*, and its figures cannot be compared with these.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"tag distributions come in pairs, not {p.shape} and {q.shape}")
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q + eps)), 0).sum(-1)


def kl_divergence(p, q, eps=1e-6):
    """The mean over clips of KL(generated || reference); see kl_divergences."""
    return float(kl_divergences(p, q, eps).mean())


def clap_scores(audio, text):
    """Cosines (N,) between embeddings of clips (N, D) and of their own captions (N, D).

    A dual encoder was trained to tell each clip's caption from the others' in its batch: 1 would be
    a perfect match, 0 no relation. Real clips stay far below 1 and are the figure to compare with.
    The checkpoint, the sample rate and the windows belong to the number: published ones differ by a
    factor of two on those alone.
    """
    audio, text = (np.asarray(x, np.float64) for x in (audio, text))
    norms = np.linalg.norm(audio, axis=1) * np.linalg.norm(text, axis=1)
    return (audio * text).sum(1) / np.maximum(norms, 1e-12)


def diversity(groups):
    """Mean distance (1 - cosine) between the samples of one prompt. groups: one array (n, D) of
    embeddings a prompt -> (prompts,). A model that plays one good piece for each prompt has 0."""
    found = []
    for x in groups:
        x = np.asarray(x, np.float64)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        found.append(1 - (x @ x.T)[np.triu_indices(len(x), 1)].mean())
    return np.array(found)


def longest_copies(clips, training):
    """How many tokens in a row each clip has in common with some place in the training set.

    clips, training: lists of 1-D arrays of first-codebook tokens -> (len(clips),) ints. A suffix
    array: all suffixes of all clips are sorted by doubling (ranks of 1, 2, 4 ... tokens), so that
    the best match of a suffix is the nearest training suffix before or after it.
    """
    clips, training = ([np.asarray(c, np.int64) for c in side] for side in (clips, training))
    ends = np.cumsum([len(c) + 1 for c in clips + training])
    text = np.empty(ends[-1], np.int64)
    for i, (clip, end) in enumerate(zip(clips + training, ends)):
        text[end - 1 - len(clip) : end - 1], text[end - 1] = clip, -1 - i  # ends match nothing
    ranks, longest = [np.unique(text, return_inverse=True)[1].astype(np.int32)], 1
    while longest < max(map(len, clips)):
        last = ranks[-1].astype(np.int64)
        later = np.pad(last[longest:], (0, longest), constant_values=-1)
        ranks.append(np.unique(last * (len(text) + 1) + later, return_inverse=True)[1])
        ranks[-1] = ranks[-1].astype(np.int32)
        longest *= 2
    order = np.argsort(ranks[-1], kind="stable")
    mine = ends[len(clips) - 1]  # here the training set begins
    place = np.arange(len(text))
    before = np.maximum.accumulate(np.where(order >= mine, place, -1))
    after = np.minimum.accumulate(np.where(order >= mine, place, len(text))[::-1])[::-1]
    best = np.zeros(mine, np.int64)
    for neighbour in (before, after):
        there = (order < mine) & (neighbour >= 0) & (neighbour < len(text))
        suffix = order[there]
        a, b = suffix, order[neighbour[there]]
        for k in reversed(range(len(ranks))):  # do the next 2^k tokens agree?
            same = (ranks[k][a] == ranks[k][b]).astype(np.int64) << k
            a, b = a + same, b + same
        np.maximum.at(best, suffix, a - suffix)
    return np.maximum.reduceat(best, np.r_[0, ends[: len(clips) - 1]])


def interval(values, statistic=np.mean, draws=500, seed=0):
    """A bootstrap 95% interval of a statistic of `values` (N, ...): clips are drawn with
    replacement, as many as there are, and the middle 95% of the results is what is printed."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    return tuple(np.percentile(found, [2.5, 97.5]))


def frechet_interval(files, reference, draws=100, seed=0):
    """The bootstrap interval of the Fréchet distance of pooled frames: files, a list of (W, D), are
    drawn with replacement; reference (M, D) stays as it is."""
    rng = np.random.default_rng(seed)
    reference = np.asarray(reference, np.float64)
    ours = reference.mean(0), np.cov(reference.T)
    files = [np.asarray(f, np.float64) for f in files]

    def distance(picks):
        x = np.concatenate([files[i] for i in picks])
        return _frechet(x.mean(0), np.cov(x.T), *ours)

    found = [distance(rng.integers(len(files), size=len(files))) for _ in range(draws)]
    return around(distance(range(len(files))), found)


def around(value, found):
    """The middle 95% of bootstrap figures, moved so that their median is the figure itself: fewer
    different clips are in a draw than there are, which alone makes a Fréchet distance larger."""
    return tuple(value + np.percentile(found, [2.5, 97.5]) - np.median(found))


CACHE = Path("out/eval")
RESULTS = Path("results")
LENGTHS = ("words", "sentence", "paragraph")

# -------------------------------------------------------------------------------- the systems ----


def music(system, prompts, seconds, progress="") -> tuple[list, list]:
    """Plays the prompts (captions; the number is the seed) -> audio files, and the first codebook
    of each clip (T,) where the system writes codes. What was made once is found in out/eval."""
    if is_audio(system):
        return answers_in(Path(system), len(prompts)), None
    if system == "musicgen-small":
        play, seal = musicgen, "musicgen-small"
    else:
        play, seal = compose, fingerprint(system)
    about = json.dumps([seal, prompts, seconds])
    slug = re.sub(r"\W+", "-", str(system)).strip("-")[-40:]
    folder = CACHE / f"{slug}-{hashlib.sha1(about.encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03}.wav" for i in range(len(prompts))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    groups = [missing[i : i + 16] for i in range(0, len(missing), 16)]
    for group in tqdm(groups, f"playing {progress or system}", disable=None, leave=False):
        for i, (audio, codes) in zip(
            group, play(system, [prompts[i] for i in group], seconds, group)
        ):
            if codes is not None:
                np.save(files[i].with_suffix(".npy"), codes[0].astype(np.uint16))
            write_audio(files[i], audio)  # last: a clip is there when its audio is
    codes = [file.with_suffix(".npy") for file in files]
    return files, [np.load(c) for c in codes] if codes[0].exists() else None


def is_audio(system):
    """Whether a system is a folder of audio: it answers the first set of prompts only."""
    return Path(system).is_dir() and not (Path(system) / "config.json").exists()


def compose(system, prompts, seconds, seeds):
    """Samples of a checkpoint, with the settings it was shipped with or the paper's (guidance 3,
    temperature 1.2, top 250), and its first codebook refined -> yields (audio (S,), codes)."""
    system = opened(*stages(system))
    codec = system.codec
    frames = math.ceil(seconds * codec.sample_rate / codec.hop)
    blocks = generate(system.lm, system.encoder, prompts, frames, seeds, **system.sampling)
    for prompt, seed, codes in zip(prompts, seeds, torch.cat([*blocks], 2)):
        if system.second:
            pieces = system.refine(prompt, [codes], seed, **system.refining)
            codes = torch.cat([*pieces], 1)
        yield codec.decode(codec.from_codes(codes[None]))[0].numpy(), codes.numpy()


def stages(system):
    """CHECKPOINT or CHECKPOINT+REFINER -> the two folders, the second empty if it is to be found"""
    first, _, second = str(system).partition("+")
    return (str(system), "") if Path(system).exists() else (first, second)


opened = functools.lru_cache(1)(System)


def musicgen(name, prompts, seconds, seeds):
    """MusicGen-small through transformers, with its authors' settings."""
    from scipy.signal import resample_poly
    from transformers import AutoProcessor, MusicgenForConditionalGeneration

    try:
        model = MusicgenForConditionalGeneration.from_pretrained(f"facebook/{name}").eval()
        processor = AutoProcessor.from_pretrained(f"facebook/{name}")
    except OSError:
        raise ValueError(
            f"no weights of {name}: they come once from https://huggingface.co/facebook/{name}"
            f" (`huggingface-cli download facebook/{name}` fetches them)"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for prompt, seed in zip(prompts, seeds):
        torch.manual_seed(seed)
        inputs = processor(text=[prompt], padding=True, return_tensors="pt").to(device)
        audio = model.to(device).generate(
            **inputs,
            do_sample=True,
            guidance_scale=3.0,
            top_k=250,
            max_new_tokens=round(50 * seconds),
        )
        yield resample_poly(audio[0, 0].float().cpu().numpy(), 441, 320), None


def fingerprint(system):
    """A name for the weights and settings of a checkpoint, of the second stage that refines it, and
    for the code that plays both, that changes when they do."""
    first, second = stages(system)
    read_config(first)  # or says what is missing
    parts = [ROOT / f"{name}.py" for name in ("model", "diffusion", "codec")]
    for stage in (Path(first), Path(second or newest_checkpoint(refiner=True))):
        parts += [stage / "config.json", stage / "model.safetensors"] if stage.is_dir() else [stage]
    return hashlib.sha1(b"".join(p.read_bytes() for p in parts if p.exists())).hexdigest()


def answers_in(folder, count):
    """Files of a folder named by the prompt's number: 000.wav, 001.wav, ..."""
    numbered = {int(p.stem): p for p in folder.iterdir() if p.stem.isdigit() and p.suffix in AUDIO}
    missing = [i for i in range(count) if i not in numbered]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {count} clips, such as {missing[0]:03}.wav: clip NNN"
            f" answers line NNN (from 0) of {CACHE / 'prompts.txt'}"
        )
    return [numbered[i] for i in range(count)]


def through_codec(codes, codec, name):
    """Real clips as a codec gives them back: codes (N, k, T) -> audio files, kept in out/eval."""
    key = hashlib.sha1(np.ascontiguousarray(codes).tobytes()).hexdigest()[:10]
    folder = CACHE / f"codec-{codec.name}-{codes.shape[1]}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03}.wav" for i in range(len(codes))]
    todo = [(one, file) for one, file in zip(codes, files) if not file.exists()]
    for one, file in tqdm(todo, f"codec, {codes.shape[1]} codebook(s)", disable=None, leave=False):
        write_audio(file, codec.decode(codec.from_codes(torch.from_numpy(one)[None]))[0])
    return files


# ----------------------------------------------------------------------------------- the tasks ----
#
# A task says what is asked of every system, and what real music sounds like there:
#   prompts    {name: captions (N)}; the first set is the one that quality is measured on
#   seconds    the length of a clip
#   reference  frames (M, D) of real clips
#   tags       (N, C), what a tagger hears in the real clip behind each prompt
#   real       [(name, audio files or what was heard in them)], the rows above the systems
#   factors    (N) of the clips behind the prompts, in the toy world
#   codes      (N, 9, T) of those clips, there
#   again      {prompt number of the set "again": group}, several samples of one prompt

SAMPLES = 4  # of one prompt, for diversity


def toy_task(judge, count, codec):
    """Captions of the corpus's held-out clips. What the judge hears in those clips as they were
    rendered was written down when it was trained, because audio does not ship: the prompts' own
    clips are the row "real clips", the rest is the reference."""
    valid = Clips(corpus.folder(), "valid", codec.codebooks, codec.name)
    every, heard = Clips(corpus.folder(), "valid", 1, codec.name), heard_in_real_clips()
    count = min(count, len(valid))
    factors = [row["factors"] for row in every.rows]
    prompts = {}
    for length in ("sentence", "words", "paragraph"):
        draws = [np.random.default_rng([LENGTHS.index(length), i]) for i in range(count)]
        prompts[length] = [words.caption(f, rng, length) for f, rng in zip(factors, draws)]
    alike = {}  # held-out clips that a prompt of mood and genre does not tell apart
    for i, f in enumerate(factors):
        if f["rhythm"] is None:
            alike.setdefault(f"{f['mood']} {f['genre']}", []).append(i)
    alike = {prompt: rows[:SAMPLES] for prompt, rows in alike.items() if len(rows) >= SAMPLES}
    prompts["again"] = [p for p in [*alike][:8] for _ in range(SAMPLES)]
    codes = np.stack([valid.codes(i, 0, 862) for i in range(count)])
    mine = heard.of(range(count))
    real = [("real clips", mine)] + [
        (f"codec, {k} codebook{'s' * (k > 1)}", through_codec(codes[:, :k], codec, k))
        for k in (codec.codebooks, 1)
    ]
    return SimpleNamespace(
        name="toy", prompts=prompts, seconds=10.0, factors=factors[:count], real=real,
        reference=torch.cat(heard.of(range(count, len(every))).frames), tags=judge.tags(mine),
        alike=[heard.of(rows).embedding for rows in [*alike.values()][:8]],
        tokens=[every.codes(i)[0] for i in range(count)], codes=codes,
        about=f"{count} held-out clips; reference: the other {len(every) - count} held-out clips",
    )  # fmt: skip


def musiccaps(table, folder, seconds, count, seed=0):
    """The paper's choice of MusicCaps: captions without vocal terms, and of those a seeded choice.

    table: musiccaps-public.csv (columns ytid and caption); folder: audio files named by the ytid,
    as downloaders write them -> [(caption, file)]. Clips shorter than `seconds` are left
    out (a little less is a rounding of the downloader's).
    """
    import soundfile

    files, found = musiccaps_files(folder), []
    for ytid, caption in read_musiccaps(table).items():
        file = files.get(ytid)
        if file and not mentions_vocals(caption) and soundfile.info(file).duration > seconds - 0.1:
            found.append((caption, Path(file)))
    if len(found) < count:
        raise ValueError(
            f"{folder} holds {len(found)} clips of {seconds:g} s whose captions in {table} name no"
            f" vocals; {count} are wanted: download more, or ask for fewer with --count"
        )
    picks = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in picks]


def paper_task(ruler, table, folder, seconds, count, codec):
    """MusicCaps prompts; the reference is the clips behind them."""
    chosen = musiccaps(table, folder, seconds, count)
    audio = [read_audio(file)[0, : round(seconds * SAMPLE_RATE)] for _, file in chosen]
    heard = ruler.listen(tqdm(audio, "real clips", disable=None))
    codes = [codec.encode(a[None])[0].numpy() for a in audio]
    shortest = min(c.shape[1] for c in codes)
    codes = np.stack([c[:, :shortest] for c in codes])
    real = [(f"codec, {k} codebook{'s' * (k > 1)}", through_codec(codes[:, :k], codec, k))
            for k in (codec.codebooks, 1)]  # fmt: skip
    return SimpleNamespace(
        name=f"musiccaps-{seconds:g}s", prompts={"captions": [c for c, _ in chosen]},
        seconds=seconds, factors=None, reference=torch.cat(heard.frames), real=real,
        tags=ruler.tags(heard), alike=None, tokens=None,
        about=f"{count} MusicCaps prompts without vocal terms; reference: their own clips",
    )  # fmt: skip


# -------------------------------------------------------------------------------- measuring ----


def hear(ruler, files, title=""):
    """Audio files, or what was heard in them already -> what the ruler hears."""
    if not isinstance(files, list):
        return files
    clips = (read_audio(file)[0] for file in files)
    return ruler.listen(tqdm(clips, f"listening, {title}", len(files), disable=None, leave=False))


def quality(ruler, task, heard, captions) -> dict:
    """{column: (value, (low, high))} of the metrics that need no factors."""
    tags, references = ruler.tags(heard), task.reference
    kl = kl_divergences(tags, task.tags).reshape(len(tags), -1).mean(1)  # over segments, if any
    clap = clap_scores(heard.embedding, ruler.read(captions))
    fd = frechet_distance(torch.cat(list(heard.frames)), references)
    low, high = frechet_interval(heard.frames, references)
    figures = {ruler.names["fd"]: (fd, (low, high))}
    if "fd_doubled" in ruler.names:
        figures[ruler.names["fd_doubled"]] = 2 * fd, (2 * low, 2 * high)
    return figures | {
        ruler.names["kl"]: (kl.mean(), interval(kl)),
        ruler.names["clap"]: (clap.mean(), interval(clap)),
    }


def following(task, heard, captions=None) -> dict:
    """{factor: (share, interval, of how many)}: is each factor that was asked for what is heard?
    captions: counts a factor where the caption names it; None: everywhere (real clips)."""
    everywhere = np.ones(len(task.factors), bool)
    asked = mentioned(captions, task.factors) if captions else {}
    cells = {}
    for factor, values in right(heard.logits, task.factors).items():
        counted = asked.get(factor, everywhere)
        if factor == "genre":  # of a mixture the judge hears the rhythm's
            counted = counted & np.array([f["rhythm"] is None for f in task.factors])
        values = values[counted].astype(float)
        if len(values):
            cells[factor] = (values.mean(), interval(values), len(values))
    return cells


def mentioned(captions, factors):
    """Which captions name each factor: {factor: (N,) of bool}"""
    texts = [c.lower() for c in captions]
    uses = lambda words: np.array([any(w in t for w in ws) for t, ws in zip(texts, words)])
    said = lambda pattern: np.array([bool(re.search(pattern, t)) for t in texts])
    return {
        "genre": uses([[*songbook.GENRES[f["genre"]].words, f["genre"]] for f in factors]),
        "lead": np.array([words.names_lead(t, f) for t, f in zip(texts, factors)]),
        "tempo": said(TextEncoder.TEMPO),
        "key": said(r"\b[a-g](#|b| sharp| flat)? (major|minor)\b"),
        "mood": uses([songbook.MOODS[f["mood"]].words for f in factors]),
    }


def measure(systems, ruler, task) -> tuple[list, list]:
    """-> rows of the quality table, and of the table of factors: [(name, {column: cell})]"""
    first, captions = next(iter(task.prompts.items()))
    rows, factor_rows, tokens = [], [], {}
    for name, files in task.real:
        heard = hear(ruler, files, name)
        rows.append((name, quality(ruler, task, heard, captions)))
        if task.factors:
            factor_rows.append((f"{name}, every factor", following(task, heard)))
    if task.alike:
        spread = diversity(task.alike)
        rows[0][1]["diversity"] = (spread.mean(), interval(spread))
        tokens[rows[0][0]] = task.tokens
    CACHE.mkdir(parents=True, exist_ok=True)
    write_text(CACHE / "prompts.txt", "".join(f"{caption}\n" for caption in captions))
    for system in systems:
        asked = {first: captions} if is_audio(system) else task.prompts
        for kind, prompts in asked.items():
            files, codes = music(system, prompts, task.seconds, f"{system}, {kind}")
            heard = hear(ruler, files, f"{system}, {kind}")
            if kind == first:
                rows.append((str(system), quality(ruler, task, heard, captions)))
                tokens[str(system)] = codes
            elif kind == "again":
                groups = heard.embedding.reshape(-1, SAMPLES, heard.embedding.shape[1])
                spread = diversity(groups)
                rows[-1][1]["diversity"] = (spread.mean(), interval(spread))
            if task.factors and kind != "again":
                factor_rows.append((f"{system}, {kind}", following(task, heard, prompts)))
    if task.tokens:
        copied(rows, tokens)
    return rows, factor_rows


def copied(rows, tokens):
    """Adds the column of copying: tokens of the first codebook in a row that the training set of
    the toy world holds as well. Held notes repeat a token, so real clips share long runs, too."""
    train = Clips(corpus.folder(), "train", 1)
    known = {name: codes for name, codes in tokens.items() if codes is not None}
    mine = [clip for codes in known.values() for clip in codes]
    runs = longest_copies(mine, [train.codes(i)[0] for i in range(len(train))])
    cells = dict(rows)
    for name, codes in known.items():
        mine, runs = runs[: len(codes)], runs[len(codes) :]
        cells[name]["copied"] = (mine.mean(), interval(mine))


def report(name, title, rows, settings, paper=None):
    """Prints a table, and writes it to results/NAME.md and .csv."""
    text = f"{title}\n\n{markdown(rows, paper)}\n\n{settings}\n"
    print("\n" + text)
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.md", text)
    write_text(RESULTS / f"{name}.csv", sheet(rows))


def markdown(rows, paper=None):
    """rows: [(name, {column: (value, interval or None, perhaps of how many)})] -> a table.
    paper: {row: {column: text}}, the published figures, in columns of their own beside ours."""
    columns = list(dict.fromkeys(c for _, cells in rows for c in cells))
    theirs = list(dict.fromkeys(c for cells in (paper or {}).values() for c in cells))
    head = ["", *columns, *(f"{c}, paper" for c in theirs)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, cells in rows:
        shown = [cell_text(cells.get(c)) for c in columns]
        shown += [str((paper or {}).get(row, {}).get(c, "")) for c in theirs]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def sheet(rows):
    """The same as CSV, an interval's ends in columns of their own."""
    columns = list(dict.fromkeys(c for _, cells in rows for c in cells))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["", *(f"{c}{part}" for c in columns for part in ("", " low", " high"))])
    for row, cells in rows:
        found = (cells.get(c, ("", None)) for c in columns)
        found = ((value, *(bounds or ("", ""))) for value, bounds, *_ in found)
        lines.writerow([row, *(x for part in found for x in part)])
    return text.getvalue()


def cell_text(cell):
    if cell is None:
        return ""
    value, bounds, *count = cell
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    number = lambda x: f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: never -0.000
    show = (lambda x: f"{x:.0%}") if count else number
    text = show(value) + (f" [{show(bounds[0])}, {show(bounds[1])}]" if bounds else "")
    return text + (f" of {count[0]}" if count else "")


# ----------------------------------------------------------------- the paper's tables, figures ----


def shipped():
    """The model that ships, as one names it at the top of the repository."""
    return str(SHIPPED.relative_to(ROOT))


def named(system):
    """A system as the paper calls it, and its parameters in millions."""
    system = stages(system)[0]
    if not (Path(system) / "config.json").exists():
        return ("MusicGen-small" if system == "musicgen-small" else str(system)), None
    lm = load_checkpoint(system)
    name = figures.NAMES[lm.config.variant]
    name += f", {lm.config.codebooks} codebooks" if lm.config.codebooks > 1 else ""
    return name, sum(p.numel() for p in lm.parameters()) / 1e6


def step_of(system):
    return read_config(stages(system)[0]).get("step", 0)


def paper_table(number, args, published, seconds=(10.0,), label=None):
    """Tables I, II and IV: the quality table of the systems, under the paper's names, with the
    paper's own figures beside."""
    if not args.systems:
        raise ValueError(f"{args.command} needs checkpoints: python evaluate.py {args.command} ...")
    label = label or (lambda system: named(system)[0])
    for length in seconds:
        args.seconds = length
        ruler, task = open_task(args)
        task.seconds = length
        task.prompts = dict([next(iter(task.prompts.items()))])
        rows, _ = measure(args.systems, ruler, task)
        for i, system in enumerate(args.systems, len(task.real)):
            name, parameters = named(system)
            size = f", {parameters:.3g} M" if parameters else ""
            rows[i] = (f"{label(system)} ({system}{size})", rows[i][1])
        theirs, known = {}, published(length)
        for row, _ in rows:
            if (name := row.split(" (")[0]) in known:
                theirs[row] = figures.published(known[name])
        settings = (
            f"{task.about}; {ruler.settings}; {length:g} s. The paper's columns are FD_openl3, KL"
            " and CLAP on MusicCaps, of models of paper size: not the toy judge's ruler."
        )
        name, title = f"{args.command}-{task.name}-{length:g}s", f"Table {number}, {length:g} s"
        report(name, title, rows, settings, theirs)


def table1(args):
    """Four LMs at an early checkpoint, and real clips through one codebook."""
    paper_table("I", args, lambda seconds: figures.TABLE1)


def table2(args):
    """Two stages against one, 10 s and 25 s."""
    paper_table(
        "II", args, lambda s: {n: f[s > 10] for n, f in figures.TABLE2.items()}, (10.0, 25.0)
    )


def table4(args):
    """24, 12 and 6 blocks, 25 s."""
    blocks = lambda system: f"{read_config(stages(system)[0])['model'].get('blocks', 24)} blocks"
    theirs = {f"{n} blocks": f for n, f in figures.TABLE4.items()}
    paper_table("IV", args, lambda seconds: theirs, (25.0,), blocks)


def figure2(args):
    """The metrics against the training step, for each variant among the checkpoints."""
    if not args.systems:
        raise ValueError("figure2 needs checkpoints of one or more runs, at several steps")
    ruler, task = open_task(args)
    task.prompts = dict([next(iter(task.prompts.items()))])
    rows, _ = measure(args.systems, ruler, task)
    points = {}
    for system, (_, cells) in zip(args.systems, rows[len(task.real) :]):
        points.setdefault(named(system)[0], []).append((step_of(system), cells))
    series = {}
    for name, found in points.items():
        found.sort(key=lambda p: p[0])
        columns = {c: [cells[c] for _, cells in found] for c in drawn(ruler)}
        series[name] = ([step for step, _ in found], columns)
    name, cells = rows[len(task.real) - 1]  # what one codebook of real clips has
    levels = {name: {c: cells[c][0] for c in drawn(ruler)}}
    draw_metrics(RESULTS / f"figure2-{task.name}", series, ruler, "training step", levels)


def by_codebooks(ruler, task, codec):
    """What 1 ... 9 codebooks keep of the clips behind the prompts -> a table's rows"""
    captions, rows = next(iter(task.prompts.values())), []
    for k in range(1, codec.codebooks + 1):
        files = through_codec(task.codes[:, :k], codec, k)
        name = f"{k} codebook{'s' * (k > 1)}"
        heard = hear(ruler, files, name)
        cells = quality(ruler, task, heard, captions) | following(task, heard)
        rows.append((name, cells))
    return rows


def kappa(args):
    """The forerunner's Figure 1: what 1 ... 9 codebooks of the codec keep of real clips."""
    ruler, task = open_task(args)
    if not task.factors:
        raise ValueError("kappa reads the toy world's clips: leave out --musiccaps")
    rows = by_codebooks(ruler, task, load_codec("toy"))
    report("kappa", "The codec with 1 to 9 codebooks", rows, task.about)
    columns = {c: [cells[c] for _, cells in rows] for c in drawn(ruler)}
    real = quality(ruler, task, task.real[0][1], next(iter(task.prompts.values())))
    series = {"codec": ([*range(1, len(rows) + 1)], columns)}
    levels = {"real clips": {c: real[c][0] for c in drawn(ruler)}}
    draw_metrics(RESULTS / "kappa", series, ruler, "codebooks (κ)", levels)


def tempo(args):
    """Does the beat follow the number, and what becomes of prompts that name none?"""
    if args.musiccaps or any(is_audio(system) for system in args.systems):
        raise ValueError("tempo asks checkpoints for the toy world's genres: name no other systems")
    ruler, valid = load_judge(), Clips(corpus.folder(), "valid", 1)
    pure = [i for i, row in enumerate(valid.rows) if row["factors"]["rhythm"] is None]
    pure = pure[: args.count or 64]
    factors = [valid.rows[i]["factors"] for i in pure]
    asked = {"GENRE at N bpm": [f"{f['genre']} at {f['tempo']} bpm" for f in factors]}
    asked["GENRE"] = [f["genre"] for f in factors]

    def cells(heard, numbered=True):
        verdicts = right(heard.logits, factors)
        found = {"genre": verdicts["genre"]}
        if numbered:
            said = [FACTORS["tempo"][i] for i in heard.logits["tempo"].argmax(1)]
            twice = [in_time(f["tempo"], one) for f, one in zip(factors, said)]
            found |= {"tempo within 4%": verdicts["tempo"], "half, double too": np.array(twice)}
        return {k: (v.mean(), interval(v.astype(float)), len(v)) for k, v in found.items()}

    rows = [("real clips", cells(heard_in_real_clips().of(pure)))]
    for system in args.systems or [shipped()]:
        for kind, prompts in asked.items():
            title = f"{system}, {kind}"
            files, _ = music(system, prompts, 10.0, title)
            rows.append((title, cells(hear(ruler, files, title), kind != "GENRE")))
    about = f"Genre and bpm of {len(pure)} held-out clips that are no mixtures; {ruler.settings}."
    report("tempo", "Does the beat follow the number?", rows, about)


def figure3(args):
    """Mel spectrograms of what each system plays to the paper's jazz-reggae prompt."""
    if not args.systems:
        raise ValueError("figure3 needs one or more systems, such as checkpoints")
    clips = {}
    for system in args.systems:
        (file,), _ = music(system, [figures.JAZZ_REGGAE], 10.0)
        name, folder = named(system)[0], Path(stages(system)[0])
        if (folder / "config.json").exists():
            name += f", step {step_of(system):,}"
        mel = mel_spectrogram(read_audio(file))[0]
        clips[f"{name} ({folder.name})"] = mel
    title = figures.JAZZ_REGGAE.split(".")[0] + " ..."
    figures.spectrograms(RESULTS / "figure3", clips, title)
    print(f"{RESULTS / 'figure3'}.png and .svg")


def drawn(ruler):
    """The columns of a figure, and where better is."""
    return {ruler.names[k]: better for k, better in dict(fd="down", kl="down", clap="up").items()}


def draw_metrics(path, series, ruler, xlabel, levels):
    figures.curves(path, series, drawn(ruler), xlabel, levels)
    print(f"{path}.png and .svg")


def study(args):
    """The paper's questions, asked in the toy world: trains what it needs."""

    study(args.quick, args.data, args.seeds)


COMMANDS = dict(
    table1=table1, table2=table2, table4=table4, figure2=figure2, figure3=figure3, kappa=kappa,
    tempo=tempo, study=study,
)  # fmt: skip


# ------------------------------------------------------------------------------ command line ----


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("systems", nargs="*", help="checkpoints, folders of 000.wav ..., musicgen-small; before "
        "them, perhaps one of " + ", ".join(COMMANDS))  # fmt: skip
    add("--count", type=int, help="prompts [32; tempo 64; --musiccaps 200, 50 beyond 10 seconds]")
    add("--musiccaps", metavar="CSV", help="the paper's protocol, with its networks")
    add("--clips", metavar="FOLDER", help="... and the clips of that table")
    add("--seconds", type=float, default=10.0, help="length of a clip, with --musiccaps [10]")
    add("--clap", default="", help="another of laion-clap's checkpoints")
    add("--quick", action="store_true", help="a study of half an hour")
    add("--data", default="toy", help="what a study trains on: a folder that `toy.py build` made")
    add("--seeds", type=int, help="runs of each of a study's language models [3; --quick 1]")
    add("--kl-average", default="clips", choices=("clips", "segments"), help="of KL in long clips")
    args = parser.parse_args(argv)
    args.command = None
    if args.systems and args.systems[0] in COMMANDS:
        args.command = args.systems.pop(0)
    for system in args.systems:
        for stage in filter(None, stages(system)):
            if system != "musicgen-small" and not Path(stage).is_dir():
                read_config(stage)  # says that there is none
    if (args.quick or args.data != "toy" or args.seeds) and args.command != "study":
        raise ValueError("--quick, --data and --seeds go with `evaluate.py study`")
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {args.seeds}")
    if bool(args.musiccaps) != bool(args.clips):
        raise ValueError("--musiccaps CSV and --clips FOLDER belong together")
    if not args.musiccaps and (args.seconds != 10 or args.clap or args.kl_average != "clips"):
        raise ValueError("--seconds, --clap and --kl-average go with --musiccaps")
    if args.count is not None and args.count < 2:
        raise ValueError(f"--count must be at least 2, not {args.count}")
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be greater than 0, not {args.seconds}")
    return args


def open_task(args):
    """-> the ruler and the task that the command line asks for."""
    checkpoints = [f for f, _ in map(stages, args.systems) if (Path(f) / "config.json").exists()]
    codec = load_codec(read_config(checkpoints[0])["codec"] if checkpoints else "toy")
    if not args.musiccaps:
        judge = load_judge()
        return judge, toy_task(judge, args.count or 32, codec)
    from paper import embedders

    ruler = embedders.PaperRuler(args.clap or embedders.CLAP_NAME, args.kl_average)
    count = args.count or (200 if args.seconds <= 10 else 50)
    return ruler, paper_task(ruler, args.musiccaps, args.clips, args.seconds, count, codec)


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    if args.command:
        return COMMANDS[args.command](args)
    args.systems = args.systems or [shipped()]
    ruler, task = open_task(args)
    rows, factor_rows = measure(args.systems, ruler, task)
    about = f"{task.about}; {ruler.settings}. 95% intervals from a bootstrap over clips."
    report(task.name, "Quality", rows, about)
    if factor_rows:
        about = "Systems: how often a factor that the prompt names is what the judge hears."
        report(f"{task.name}-factors", "What was asked", factor_rows, about)


if __name__ == "__main__":
    entry(main)
