"""How good is generated music? Three metrics in full, and one table.

    python evaluate.py                              the model that ships
    python evaluate.py out/simba/best mine/         checkpoints, and folders of 000.wav, 001.wav ...
    python evaluate.py toy/lm+out/refiner/best      a checkpoint with this refiner; +none: without
    python evaluate.py --ear musicnn                what an ear of real music says (paper/ear.py)
    python evaluate.py out/mine/best --data data/mine   held-out clips of your own, same ear
    python evaluate.py musicgen-small out/simba/best --musiccaps musiccaps-public.csv --clips clips/
    python evaluate.py MAMBA SIMBA TRANSFORMER --paper 1     with the paper's Table I in columns

  FD    is the set of clips like real music? A distance of two Gaussians, lower is better
  KL    has each clip the tags of the real clip that its prompt describes? Lower is better
  CLAP  does each clip fit its own words? A cosine, higher is better

Offline the toy world's judge listens (toy/judge.py), and hears whether genre, lead, tempo, key and
mood are as asked; with --musiccaps the paper's networks (paper/embedders.py). Real clips, as they
are and through the codec (codec-9, codec-1), show how good a system can be. Samples are kept in
out/eval, so an interrupted run continues.

N clips, W frames of a clip's embedding, D its size, C tags, K codebooks, T frames of tokens
"""

import csv
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist
from scipy.special import rel_entr
from tqdm import tqdm

from audio import SAMPLE_RATE, read_audio, write_audio, write_text
from checkpoint import read_config
from codec import load_codec
from data import Clips
from options import check_value, entry, new_parser
from sample import ROOT, SHIPPED, System, generate, newest_checkpoint
from toy import questions
from toy.judge import load_judge

CACHE = Path("out/eval")
RESULTS = Path("results")

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
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    S_x, S_y = np.cov(x.T), np.cov(y.T)
    # The eigenvalues of S_x S_y are those of S_x^(1/2) S_y S_x^(1/2). That one is symmetric, so
    # they are real, and below zero only by rounding.
    values, vectors = np.linalg.eigh(S_x)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ S_y @ root).clip(0)).sum()
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means + np.trace(S_x) + np.trace(S_y) - 2 * trace)


def kl_divergence(p, q, eps=1e-6) -> float:
    """Mean Kullback-Leibler divergence, in nats, of tag distributions p (..., C) from q (..., C).

    p is what a tagger hears in generated clips, q what it hears in the real clips that the prompts
    describe: sum p log(p / (q + eps)). The divergence is large where the generated clip has a tag
    that the real clip lacks; eps limits this to log 1e6. The other direction, which MusicGen's
    authors print, punishes *missing* tags; its figures do not compare with these.

    ValueError if p and q differ in shape.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape:
        raise ValueError(f"tag distributions come in pairs, not {p.shape} and {q.shape}")
    return float(rel_entr(p, q + eps).sum(-1).mean())


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
    order = text.argsort(kind="stable")  # the places of each token, token after token
    ranked = text[order]
    longest = []
    for clip in clips:
        run = np.zeros(len(text), np.int32)  # of the clip's last tokens, so many end at this place
        best, before = 0, order[:0]
        for token in clip:
            here = order[slice(*ranked.searchsorted([token, token + 1]))]
            lengths = run[here - 1] + 1  # the last place, -1, is in no run
            run[before] = 0
            run[here] = lengths
            best = max(best, lengths.max(initial=0))
            before = here
        longest.append(best)
    return np.array(longest)


def interval(values, statistic=np.mean, draws=500, around=None):
    """A 95% interval of a statistic of `values` (N, ...), by bootstrap: draw N values with
    replacement, many times, and take the middle 95% of the results. around: moves the interval, to
    have its median there. A Fréchet distance needs that: a draw holds fewer different clips than
    there are, and that alone makes it larger."""
    values, rng = np.asarray(values), np.random.default_rng(0)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, median, high = np.percentile(found, [2.5, 50, 97.5])
    return (low, high) if around is None else (low - median + around, high - median + around)


# ----------------------------------------------------------------------- playing, and a table ----


def music(system, prompts, seconds) -> list[Path]:
    """Plays prompts, each with its number as the seed. Clips in out/eval are not played again."""
    kind, play, version = type_of(system), compose, system
    if kind == "audio":
        return answers_in(Path(system), len(prompts))
    if kind == "checkpoint":
        version = fingerprint(system)
    else:
        from paper.musiccaps import musicgen as play
    key = json.dumps([version, prompts, seconds])
    slug = re.sub(r"\W+", "-", str(system)).strip("-")[-40:]
    folder = CACHE / f"{slug}-{hashlib.sha1(key.encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03}.wav" for i in range(len(prompts))]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    clips = play(system, [prompts[i] for i in missing], seconds, missing)
    for i, clip in zip(tqdm(missing, f"playing {system}", disable=None, leave=False), clips):
        audio, tokens = clip
        np.save(files[i].with_suffix(".npy"), tokens)
        write_audio(files[i], audio)  # last: a clip is complete when it has audio
    return files


def type_of(system):
    if re.fullmatch("codec-[1-9]|musicgen-small", str(system)):
        return str(system).split("-")[0]
    is_audio = Path(system).is_dir() and not (Path(system) / "config.json").exists()
    return "audio" if is_audio else "checkpoint"


def compose(system, prompts, seconds, seeds):
    """A checkpoint plays with its refiner and the options that it stores: yields audio (S,) and
    the tokens (T,) of codebook 1."""
    first, second = stages(system)
    system = System(first, None if second == "none" else second)
    frames = 1 + int(seconds * system.codec.sample_rate / system.codec.hop)
    nothing = torch.empty(system.codec.codebooks, 0, dtype=torch.long)
    for i in range(0, len(prompts), 16):
        group = prompts[i : i + 16], frames, seeds[i : i + 16]
        codes = torch.cat([*generate(system.lm, system.encoder, *group, **system.sampling)], 2)
        for prompt, seed, clip in zip(prompts[i:], seeds[i:], codes):
            yield torch.cat([*system.audio(prompt, seed, [clip], nothing)]), clip[0]


def stages(system):
    """CHECKPOINT+REFINER -> two folders; the second can be "none", or "" for the default"""
    if Path(system).exists():  # a + in its name
        return str(system), ""
    return str(system).partition("+")[::2]


def fingerprint(system):
    """Changes with the weights, the options and the code that play a system."""
    first, second = stages(system)
    files = [ROOT / f"{name}.py" for name in "model diffusion sample codec toy/codec".split()]
    refiner = second or newest_checkpoint(True, read_config(first).get("codec"))
    for stage in (Path(first), Path(refiner)):
        files += [stage, stage / "config.json", stage / "model.safetensors"]
    return hashlib.sha1(b"".join(f.read_bytes() for f in files if f.is_file())).hexdigest()


def answers_in(folder, count):
    """The files of a folder that are named by the number of a prompt: 000.wav, 001.wav, ..."""
    from curate import AUDIO

    files = {p.stem: p for p in folder.iterdir() if p.suffix.lower() in AUDIO}
    if missing := [i for i in range(count) if f"{i:03}" not in files]:
        lack = f"{folder} lacks {len(missing)} of {count} clips, such as {missing[0]:03}.wav"
        raise ValueError(f"{lack}: clip NNN is for line NNN (from 0) of {CACHE / 'prompts.txt'}")
    return [files[f"{i:03}"] for i in range(count)]


class Task(NamedTuple):
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
    training: Clips = None  # from which a model should not copy


class Cell(NamedTuple):
    """A number in a table. low, high: its 95% interval; of: it is a share of so many clips."""

    value: float
    low: float = None
    high: float = None
    of: int = None

    def __str__(self):
        digits = 0 if abs(self.value) >= 100 else 1 if abs(self.value) >= 10 else 3
        form = ".0%" if self.of else f"z.{digits}f"  # z: never -0.000
        bounds = "" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{bounds}" + (f" of {self.of}" if self.of else "")


def mean(values) -> Cell:
    """The mean of values (N,) with its interval; that of booleans is a share."""
    values = np.asarray(values)
    return Cell(values.mean(), *interval(values), len(values) if values.dtype == bool else None)


def measure(systems, ruler, task) -> dict:
    """Plays all systems and listens -> the table, {row: {column: Cell}}; real clips come first."""
    first = next(iter(task.prompts))
    CACHE.mkdir(parents=True, exist_ok=True)
    write_text(CACHE / "prompts.txt", "".join(f"{prompt}\n" for prompt in task.prompts[first]))
    table = {"real clips": judged(ruler, task, task.real)}
    tokens = {"real clips": task.codes[:, 0]}  # {row: clips}, of codebook 1
    for system in dict.fromkeys([f"codec-{task.codes.shape[1]}", "codec-1", *map(str, systems)]):
        if type_of(system) == "codec":
            codes = torch.from_numpy(task.codes)[:, : int(system[-1])]
            clips = (task.codec.decode(task.codec.from_codes(c[None]))[0] for c in codes)
            table[system] = judged(ruler, task, ruler.listen(clips))
            continue
        given = type_of(system) == "audio"  # by others, maybe of another length
        kinds = [first] if given else [*task.prompts]
        for kind in kinds:
            row = f"{system}, {kind}" if len(kinds) > 1 else system
            files = music(system, task.prompts[kind], task.seconds)
            heard = listen(ruler, files, row, task.seconds if given else 0)
            table[row] = judged(ruler, task, heard, task.prompts[kind])
            if type_of(system) != "checkpoint":
                continue
            if task.training:
                tokens[row] = [np.load(file.with_suffix(".npy")) for file in files]
            if task.repeated and kind == first:
                counts = [len(clips) for clips in task.repeated.values()]
                prompts = np.repeat([*task.repeated], counts).tolist()
                heard = listen(ruler, music(system, prompts, task.seconds), row)
                table[row]["diversity"] = mean(diversity(heard.embedding.split(counts)))
    if task.repeated:
        table["real clips"]["diversity"] = mean(diversity(task.repeated.values()))
    if task.training:  # held notes repeat a token, so real clips share long runs as well
        training = [task.training.codes(i)[0] for i in range(len(task.training))]
        for row, clips in tokens.items():
            table[row]["copied"] = mean(longest_copies(clips, training))
    return table


def listen(ruler, files, title, seconds=0):
    return ruler.listen(read_clip(file, seconds) for file in tqdm(files, title, disable=None))


def read_clip(file, seconds):
    """A file's audio (S,). ValueError if it is much shorter than `seconds`."""
    audio = read_audio(file)[0]
    if (length := len(audio) / SAMPLE_RATE) < 0.9 * seconds:
        raise ValueError(f"{file} lasts {length:.1f} s, where others play {seconds:g} s")
    return audio


def judged(ruler, task, heard, captions=None) -> dict:
    """All metrics of what was heard in N clips -> {column: Cell}. captions: what was asked, or None
    for the real clips and the codec, where every factor counts."""
    frames = lambda picks: np.concatenate([heard.frames[i] for i in picks])
    distance = lambda picks: frechet_distance(frames(picks), task.reference)
    files = range(len(heard.frames))
    fd = distance(files)
    cells = {ruler.names["fd"]: Cell(fd, *interval(files, distance, 100, around=fd))}
    asked = captions or next(iter(task.prompts.values()))
    if "kl" not in ruler.names:
        return cells | ruler.cells(heard, asked)
    pairs = zip(ruler.tags(heard), ruler.tags(task.real))  # of clips, or of all windows of a clip
    cells[ruler.names["kl"]] = mean([kl_divergence(p, q) for p, q in pairs])
    cells[ruler.names["clap"]] = mean(clap_scores(heard.embedding, ruler.read(asked)))
    if task.factors:
        shares = questions.as_asked(heard.logits, task.factors, captions)
        cells |= {factor: mean(right) for factor, right in shares.items() if len(right)}
    return cells


def report(name, title, table, about) -> str:
    """Prints a table {row: {column: Cell}}, and writes it to results/NAME.md and NAME.csv, where
    the ends of an interval have columns of their own -> the text."""
    columns = [*dict.fromkeys(c for cells in table.values() for c in cells)]
    rows = [[row, *(cells.get(c, "") for c in columns)] for row, cells in table.items()]
    text = f"{title}\n\n{markdown(['', *columns], rows)}\n\n{about}\n"
    print("\n" + text)
    file = RESULTS / f"{name}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    with open(file.with_suffix(".csv"), "w", encoding="utf-8", newline="") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(["", *(c + part for c in columns for part in ("", " low", " high"))])
        for row, *cells in rows:
            lines.writerow([row, *(x for cell in cells for x in (cell or [""] * 3)[:3])])
    return text


def markdown(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ------------------------------------------------------------------------------ command line ----


def parse_arguments(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("systems", nargs="*", default=[os.path.relpath(SHIPPED)],
        help="checkpoints, folders of audio, codec-K, musicgen-small")  # fmt: skip
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
    parts = [part for s in args.systems if type_of(s) == "checkpoint" for part in stages(s)]
    codecs = [read_config(part).get("codec") for part in parts if part not in ("", "none")]
    args.codec = codecs[0] if codecs else "toy"
    check_value("count", args.count, "[2, 1e9]")
    check_value("seconds", min(args.seconds), "[0.1, 3600]")
    if bool(args.musiccaps) != bool(args.clips):
        raise ValueError("--musiccaps CSV and --clips FOLDER belong together")
    if not args.musiccaps and (args.clap or args.kl_average != "clips"):
        raise ValueError("--clap and --kl-average need --musiccaps")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    codec = load_codec(args.codec)
    count = args.count or 32
    if args.musiccaps:
        from paper import embedders, musiccaps

        ruler = embedders.PaperRuler(args.clap, args.kl_average)
        clips = args.musiccaps, args.clips
        ask = lambda seconds: musiccaps.ask(ruler, codec, *clips, seconds, args.count)
    elif args.data or args.ear == "musicnn":
        from paper import ear

        ruler = ear.Ear()
        of_folder = lambda seconds: ear.ask(ruler, codec, args.data, count, seconds)
        of_toy = lambda seconds: ear.ask_toy(ruler, codec, count, args.prompts)
        ask = of_folder if args.data else of_toy
    else:
        ruler = load_judge()
        ask = lambda seconds: questions.ask(codec, count, args.prompts)
    for seconds in args.seconds:
        task = Task(seconds=seconds, codec=codec, **ask(seconds))
        table = measure(args.systems, ruler, task)
        if args.paper:
            from paper.musiccaps import add_published

            add_published(table, args.paper, seconds)
        name = (args.name or task.name) + (f"-{seconds:g}s" if len(args.seconds) > 1 else "")
        about = f"{task.about}; {ruler.settings}. Brackets: 95% intervals, bootstrap over clips."
        report(name, f"Clips of {seconds:g} s", table, about)


if __name__ == "__main__":
    entry(main)
