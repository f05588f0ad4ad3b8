"""How good is generated music? Three metrics in full, and one table.

    python evaluate.py                              the model that ships
    python evaluate.py out/simba/best mine/         checkpoints, and folders of 000.wav, 001.wav ...
    python evaluate.py toy/lm+out/refiner/best      a checkpoint with this refiner; +none: without
    python evaluate.py toy/lm --prompts bpm genre   does the beat follow "jazz at 96 bpm"?
    python evaluate.py --ear musicnn                what an ear of real music says (paper/ear.py)
    python evaluate.py out/mine/best --data data/mine   held-out clips of your own, same ear
    python evaluate.py musicgen-small out/simba/best --musiccaps musiccaps-public.csv --clips clips/
    python evaluate.py MAMBA SIMBA TRANSFORMER --paper 1     with the paper's Table I in columns

  FD    is the set of clips like real music? A distance of two Gaussians, lower is better
  KL    has each clip the tags of the real clip that its prompt describes? Lower is better
  CLAP  does each clip fit its own words? A cosine, higher is better

Offline the toy world's judge listens (toy/judge.py), and hears whether genre, lead, tempo, key and
mood are as asked. With --musiccaps the paper's networks listen (paper/embedders.py). Real clips, as
they are and through the codec (codec-9, codec-1), show how good a system can be. Brackets are 95%
intervals. Samples are kept in out/eval, so an interrupted run continues.

N clips, W frames of a clip's embedding, D its size, C tags, K codebooks, T frames of tokens
"""

import csv
import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist
from scipy.special import rel_entr
from tqdm import tqdm

from audio import read_audio, replacing, write_audio, write_text
from checkpoint import read_config
from codec import load_codec
from options import check_value, entry, new_parser
from sample import ROOT, SHIPPED, System, generate, newest_checkpoint
from toy import questions
from toy.judge import load_judge

CACHE = Path("out/eval")
RESULTS = Path("results")
opened = functools.lru_cache(1)(System)  # the checkpoint that plays

# ------------------------------------------------------------------------------- the metrics ----


def frechet_distance(x, y):
    """The Fréchet distance between two sets of embeddings, x (n, D) and y (m, D).

    Each set is summarised by its mean mu and its covariance S, as if it were a Gaussian:

        |mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2))

    is the least mean squared displacement that turns one Gaussian into the other. No root is taken:
    its unit is that of the embedding, squared. Covariances are over n - 1.

    x and y hold the *frames* of all files, not a mean for each file. Few frames make the distance
    too large, because a set of n points seems flatter than it is: compare only figures over equally
    many clips, of the same embedding and windows. Mono that is embedded twice, as left and right,
    has exactly twice the distance. ValueError if a side has less than two frames.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"a Fréchet distance needs two frames a side, not {len(x)} and {len(y)}")
    return _frechet(*gaussian(x), *gaussian(y))


def gaussian(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), np.atleast_2d(np.cov(x.T))


def _frechet(mean_x, cov_x, mean_y, cov_y):
    # The eigenvalues of S_x S_y are those of S_x^(1/2) S_y S_x^(1/2). That one is symmetric, so
    # they are real, and below zero only by rounding.
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * trace)


def kl_divergences(p, q, eps=1e-6):
    """Kullback-Leibler divergences, in nats, of tag distributions p (..., C) from q (..., C).

    p is what a tagger hears in generated clips, q what it hears in the real clips that the prompts
    describe: sum p log(p / (q + eps)). The divergence is large where the generated clip has a tag
    that the real clip lacks; eps limits this to log 1e6. The other direction, which MusicGen's
    authors print, punishes *missing* tags; its figures do not compare with these.

    ValueError if p and q differ in shape.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"tag distributions come in pairs, not {p.shape} and {q.shape}")
    return rel_entr(p, q + eps).sum(-1)


def kl_divergence(p, q, eps=1e-6) -> float:
    """The mean over clips of KL(generated || reference), in nats; see `kl_divergences`."""
    return float(kl_divergences(p, q, eps).mean())


def clap_scores(audio, text):
    """Cosines (N,) between embeddings of clips (N, D) and of their own captions (N, D).

    The two encoders were trained to find each clip's caption among those of a batch. 1 is a perfect
    match, 0 no relation. Real clips stay far below 1: compare with those. The figure depends on the
    checkpoint, the sample rate and the windows; published ones differ by a factor of two.
    """
    return F.cosine_similarity(torch.as_tensor(audio), torch.as_tensor(text)).numpy()


def diversity(groups):
    """Mean distance (1 - cosine) between samples of one prompt. groups: for each prompt the
    embeddings (n, D) of its samples -> (prompts,). A model that always plays the same has 0."""
    return np.array([pdist(x, "cosine").mean() for x in groups])


def longest_copies(clips, training):
    """How many tokens in a row each clip shares with some place in the training set.

    clips, training: lists of 1-D arrays of first-codebook tokens -> (len(clips),) ints.
    """
    text = np.concatenate([np.append(clip, -1) for clip in training])  # -1 is in no clip
    places = np.argsort(text, kind="stable")
    tokens, first = np.unique(text[places], return_index=True)
    places = dict(zip(tokens.tolist(), np.split(places, first[1:])))
    nowhere = np.empty(0, np.int64)
    longest = []
    run = np.zeros(len(text), np.int32)  # of the clip's last tokens, so many end at this place
    for clip in clips:
        best, before = 0, nowhere
        for token in clip.tolist():
            here = places.get(token, nowhere)
            lengths = run[here - 1] + 1  # the last place, -1, is in no run
            run[before] = 0
            run[here] = lengths
            best = max(best, lengths.max(initial=0))
            before = here
        run[before] = 0
        longest.append(best)
    return np.array(longest)


def interval(values, statistic=np.mean, draws=500, seed=0):
    """A 95% interval of a statistic of `values` (N, ...), by bootstrap: draw N values with
    replacement, many times, and take the middle 95% of the results."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    return tuple(np.percentile(found, [2.5, 97.5]))


def frechet_interval(files, reference, draws=100, seed=0):
    """The bootstrap interval of a Fréchet distance of pooled frames. Files, a list of (W, D), are
    drawn with replacement; the reference (M, D) stays as it is."""
    rng = np.random.default_rng(seed)
    theirs = gaussian(reference)
    distance = lambda picks: _frechet(*gaussian(np.concatenate([files[i] for i in picks])), *theirs)
    found = [distance(rng.integers(len(files), size=len(files))) for _ in range(draws)]
    return around(distance(range(len(files))), found)


def around(value, found):
    """The middle 95% of bootstrap results, moved so that their median is `value`. A draw holds
    fewer different clips than there are, and that alone makes a Fréchet distance larger."""
    return tuple(value + np.percentile(found, [2.5, 97.5]) - np.median(found))


# ------------------------------------------------------------------------------- the systems ----


def music(system, prompts, seconds, task=None):
    """Plays prompts, each with its number as the seed -> audio files, and the tokens (T,) of each
    clip's codebook 1, or None. Clips in out/eval are not played again. task: needed for codec-K."""
    kind = type_of(system)
    if kind == "audio":
        return answers_in(Path(system), len(prompts)), None
    play, version = compose, fingerprint
    if kind == "codec":
        play = functools.partial(through_codec, task=task)
        version = lambda system: hashlib.sha1(task.codes.tobytes()).hexdigest()
    elif kind == "musicgen":
        from paper.musiccaps import musicgen as play

        version = str
    key = json.dumps([version(system), prompts, seconds])
    slug = re.sub(r"\W+", "-", str(system)).strip("-")[-40:]
    folder = CACHE / f"{slug}-{hashlib.sha1(key.encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03}.wav" for i in range(len(prompts))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    groups = [missing[i : i + 16] for i in range(0, len(missing), 16)]
    for group in tqdm(groups, f"playing {system}", disable=None, leave=False):
        clips = play(system, [prompts[i] for i in group], seconds, group)
        for i, (audio, codes) in zip(group, clips):
            if codes is not None:
                np.save(files[i].with_suffix(".npy"), codes[0].astype(np.uint16))
            write_audio(files[i], audio)  # last: a clip is complete when it has audio
    tokens = [file.with_suffix(".npy") for file in files]
    return files, [np.load(t) for t in tokens] if tokens[0].exists() else None


def type_of(system):
    if system == "musicgen-small":
        return "musicgen"
    if re.fullmatch(r"codec-[1-9]", str(system)):
        return "codec"
    is_audio = Path(system).is_dir() and not (Path(system) / "config.json").exists()
    return "audio" if is_audio else "checkpoint"


def through_codec(system, prompts, seconds, numbers, task):
    """codec-K: real clips in K codebooks -> yields (audio (S,), no tokens)."""
    for i in numbers:
        codes = torch.from_numpy(task.codes[i : i + 1, : int(system[-1])])
        yield task.codec.decode(task.codec.from_codes(codes))[0].numpy(), None


def compose(system, prompts, seconds, seeds):
    """Samples of a checkpoint, refined if it has a refiner, with the sampling options that it was
    stored with, or the paper's -> yields (audio (S,), codes (K, T))."""
    first, second = stages(system)
    system = opened(first, None if second == "none" else second)
    codec = system.codec
    frames = math.ceil(seconds * codec.sample_rate / codec.hop)
    blocks = generate(system.lm, system.encoder, prompts, frames, seeds, **system.sampling)
    for prompt, seed, codes in zip(prompts, seeds, torch.cat([*blocks], 2)):
        if system.second:
            codes = torch.cat([*system.refine(prompt, [codes], seed)], 1)
        yield codec.decode(codec.from_codes(codes[None]))[0].numpy(), codes.numpy()


def stages(system):
    """CHECKPOINT or CHECKPOINT+REFINER -> two folders; the second can be "none", or "" for the
    default."""
    first, _, second = str(system).partition("+")
    return (str(system), "") if Path(system).exists() else (first, second)


def fingerprint(system):
    """Changes with the weights, the options and the code that play a system."""
    first, second = stages(system)
    parts = [ROOT / f"{name}.py" for name in "model diffusion sample codec toy/codec".split()]
    for stage in (Path(first), Path(second or newest_checkpoint(refiner=True))):
        parts += [stage / "config.json", stage / "model.safetensors"] if stage.is_dir() else [stage]
    return hashlib.sha1(b"".join(p.read_bytes() for p in parts if p.exists())).hexdigest()


def answers_in(folder, count):
    """The files of a folder that are named by the number of a prompt: 000.wav, 001.wav, ..."""
    from curate import AUDIO

    files = [p for p in folder.iterdir() if p.stem.isdigit() and p.suffix.lower() in AUDIO]
    numbered = {int(p.stem): p for p in files}
    if missing := [i for i in range(count) if i not in numbered]:
        lack = f"{folder} lacks {len(missing)} of {count} clips, such as {missing[0]:03}.wav"
        raise ValueError(f"{lack}: clip NNN is for line NNN (from 0) of {CACHE / 'prompts.txt'}")
    return [numbered[i] for i in range(count)]


# -------------------------------------------------------------------------------- measuring ----


@dataclass
class Task:
    """What every system is asked to play, and what real music sounds like there."""

    name: str
    about: str
    prompts: dict  # {kind: captions (N)}
    seconds: float  # length of a clip
    codec: object
    codes: np.ndarray  # (N, K, T) of the real clips that the captions describe
    real: object  # what is heard in those clips
    reference: torch.Tensor  # (M, D), frames of real clips
    factors: list = None  # (N) of those clips, in the toy world
    repeated: dict = None  # {prompt: embeddings (n, D) of real clips that it describes}
    training: object = None  # data.Clips, from which a model should not copy


class Cell(NamedTuple):
    """A number in a table. low, high: its 95% interval; of: it is a share of so many clips."""

    value: float
    low: float = None
    high: float = None
    of: int = None

    def __str__(self):
        digits = 0 if abs(self.value) >= 100 else 1 if abs(self.value) >= 10 else 3
        number = lambda x: f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: never -0.000
        show = "{:.0%}".format if self.of else number
        bounds = f" [{show(self.low)}, {show(self.high)}]" if self.low is not None else ""
        return show(self.value) + bounds + (f" of {self.of}" if self.of else "")


def mean(values) -> Cell:
    """The mean of values (N,) with its interval; that of booleans is a share."""
    values = np.asarray(values)
    return Cell(values.mean(), *interval(values), len(values) if values.dtype == bool else None)


def measure(systems, ruler, task) -> dict:
    """Plays all systems and listens -> the table, {row: {column: Cell}}; real clips come first."""
    first = next(iter(task.prompts))
    captions = task.prompts[first]
    CACHE.mkdir(parents=True, exist_ok=True)
    write_text(CACHE / "prompts.txt", "".join(f"{caption}\n" for caption in captions))
    table = {"real clips": judged(ruler, task, task.real, captions, every_factor=True)}
    tokens = {"real clips": task.codes[:, 0]}  # {row: tokens of codebook 1}
    for system in dict.fromkeys([f"codec-{task.codes.shape[1]}", "codec-1", *map(str, systems)]):
        is_player = type_of(system) in ("checkpoint", "musicgen")  # others have a single answer
        kinds = [*task.prompts] if is_player else [first]
        for kind in kinds:
            row = f"{system}, {kind}" if len(kinds) > 1 else system
            files, tokens[row] = music(system, task.prompts[kind], task.seconds, task)
            heard = listen(ruler, files, row)
            is_codec = type_of(system) == "codec"
            table[row] = judged(ruler, task, heard, task.prompts[kind], every_factor=is_codec)
            if task.repeated and is_player and kind == first:
                counts = [len(clips) for clips in task.repeated.values()]
                prompts = np.repeat([*task.repeated], counts).tolist()
                heard = listen(ruler, music(system, prompts, task.seconds)[0], row)
                table[row]["diversity"] = mean(diversity(heard.embedding.split(counts)))
    if task.repeated:
        table["real clips"]["diversity"] = mean(diversity(task.repeated.values()))
    if task.training:  # held notes repeat a token, so real clips share long runs as well
        training = [task.training.codes(i)[0] for i in range(len(task.training))]
        for row, clips in tokens.items():
            if clips is not None:
                table[row]["copied"] = mean(longest_copies(clips, training))
    return table


def listen(ruler, files, title):
    clips = (read_audio(file)[0] for file in files)
    return ruler.listen(tqdm(clips, f"listening, {title}", len(files), disable=None, leave=False))


def judged(ruler, task, heard, captions, every_factor=False) -> dict:
    """All metrics of what was heard in N clips that answer N captions -> {column: Cell}."""
    fd = frechet_distance(torch.cat([*heard.frames]), task.reference)
    cells = {ruler.names["fd"]: Cell(fd, *frechet_interval(heard.frames, task.reference))}
    if "kl" not in ruler.names:
        return cells | ruler.cells(heard, captions)
    kl = kl_divergences(ruler.tags(heard), ruler.tags(task.real))
    cells[ruler.names["kl"]] = mean(kl.reshape(len(kl), -1).mean(1))  # over segments, if any
    cells[ruler.names["clap"]] = mean(clap_scores(heard.embedding, ruler.read(captions)))
    if task.factors:
        shares = questions.as_asked(heard.logits, task.factors, None if every_factor else captions)
        cells |= {factor: mean(right) for factor, right in shares.items() if len(right)}
    return cells


def report(name, title, table, about) -> str:
    """Prints a table {row: {column: Cell}}, and writes it to results/NAME.md and NAME.csv, where
    the ends of an interval have columns of their own -> the text."""
    columns = list(dict.fromkeys(c for cells in table.values() for c in cells))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    sheet = [["", *(c + part for c in columns for part in ("", " low", " high"))]]
    for row, cells in table.items():
        lines.append([row, *(str(cells.get(c, "")) for c in columns)])
        sheet.append([row, *(x for c in columns for x in cells.get(c, ("", "", ""))[:3])])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"{title}\n\n{text}\n\n{about}\n"
    print("\n" + text)
    file = RESULTS / f"{name}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    with (
        replacing(file.with_suffix(".csv")) as part,
        open(part, "w", encoding="utf-8", newline="") as out,
    ):
        csv.writer(out, lineterminator="\n").writerows(sheet)
    return text


# ------------------------------------------------------------------------------ command line ----


def parse_arguments(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("systems", nargs="*", help="checkpoints, folders of audio, codec-K, musicgen-small")
    add("--name", help="of the table [toy, or musiccaps]")
    add("--count", type=int, help="prompts [32; --musiccaps 200, or 50 beyond 10 seconds]")
    add("--seconds", type=float, nargs="+", default=[10.0], help="lengths, a table for each [10]")
    add("--prompts", nargs="+", choices=questions.KINDS, default=questions.KINDS[:3],
        metavar="KIND", help=f"{', '.join(questions.KINDS)} [the first three]")  # fmt: skip
    add("--ear", choices=("toy", "musicnn"), default="toy", help="who listens [toy]")
    add("--data", metavar="FOLDER", help="use a data folder's held-out clips; musicnn listens")
    add("--paper", type=int, choices=(1, 2, 4), help="add the figures of this table of the paper")
    add("--musiccaps", metavar="CSV", help="use the prompts and the networks of the paper")
    add("--clips", metavar="FOLDER", help="the clips of that table")
    add("--clap", default="", help="another checkpoint of laion-clap")
    add("--kl-average", default="clips", choices=("clips", "segments"), help="mean of KL over")
    args = parser.parse_args(argv)
    args.systems = args.systems or [os.path.relpath(SHIPPED)]
    for system in args.systems:
        folders = stages(system) if type_of(system) == "checkpoint" else ()
        for folder in set(folders) - {"", "none"}:
            read_config(folder)  # ValueError if there is none
    check_value("count", args.count, "[2, inf)")
    for seconds in args.seconds:
        check_value("seconds", seconds, "(0, inf)")
    if bool(args.musiccaps) != bool(args.clips):
        raise ValueError("--musiccaps CSV and --clips FOLDER belong together")
    if not args.musiccaps and (args.clap or args.kl_average != "clips"):
        raise ValueError("--clap and --kl-average need --musiccaps")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    torch.manual_seed(0)
    checkpoints = [stages(s)[0] for s in args.systems if type_of(s) == "checkpoint"]
    codec = load_codec(read_config(checkpoints[0])["codec"] if checkpoints else "toy")
    if args.musiccaps:
        from paper import embedders, musiccaps

        ruler = embedders.PaperRuler(args.clap, args.kl_average)
        clips = args.musiccaps, args.clips
        ask = lambda seconds: musiccaps.ask(ruler, codec, *clips, seconds, args.count)
    elif args.data or args.ear == "musicnn":
        from paper.ear import Ear, ask, ask_toy

        ruler, count = Ear(), args.count or 32
        ask_folder = functools.partial(ask, ruler, codec, args.data, count)
        toy = lambda seconds: ask_toy(ruler, codec, count, args.prompts)
        ask = ask_folder if args.data else toy
    else:
        ruler = load_judge()
        ask = lambda seconds: questions.ask(codec, args.count or 32, args.prompts)
    for seconds in args.seconds:
        task = Task(seconds=seconds, codec=codec, **ask(seconds))
        table = measure(args.systems, ruler, task)
        if args.paper:
            from paper.figures import add_published

            add_published(table, args.paper, seconds)
        name = (args.name or task.name) + (f"-{seconds:g}s" if len(args.seconds) > 1 else "")
        about = f"{task.about}; {ruler.settings}. Brackets: 95% intervals, bootstrap over clips."
        report(name, f"Clips of {seconds:g} s", table, about)


if __name__ == "__main__":
    entry(main)
