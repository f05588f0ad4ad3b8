"""Music as training tokens: the data folder, its reader, and how to make one from audio.

    meta.json         codec, codebooks, codebook_size, frame_rate
    manifest.jsonl    one clip a line: shard and offset of its codes, codebooks K, frames T, split,
                      caption, source (path, track, start in seconds, licence, ...)
    codes-00000.bin   uint16 codes, clip after clip, each a (K, T) table in C order
    skipped.jsonl     each file, or clip (with "start"), that was left out, and why
    summary.json      hours, clips, licences, reasons
    tracks/           one file a track: after a song is added, only that song is encoded
    plan.json         the options; a command with other options does not change the folder

    python data.py folder ~/music --out data/mine      song.wav + song.txt, song.mp3 + song.txt, ...
    python data.py jamendo mtg-jamendo-dataset /audio --out data/jamendo        the paper's corpus
    python data.py musiccaps musiccaps-public.csv /clips --out data/musiccaps   the paper's test set
    python data.py show data/mine                      look at clips and listen to them

Audio becomes mono at 44.1 kHz and is cut into clips; what is left out or removed is an option. The
folder is built from tracks/, whose files depend on their track and the options only. So a command
that was killed can be repeated, with any --workers: the folder is the same to the last byte.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch

from audio import FRAME_RATE
from options import entry
from text import TYPICAL_LENGTH

# ------------------------------------------------------------------------------- the folder ----


def read_jsonl(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Clips:
    """The clips of one split of a data folder that have at least `codebooks` codebooks. None: of
    all splits, and all codebooks.

    ValueError, one sentence, if the folder is missing, broken, empty or made by another codec.
    """

    def __init__(self, folder, split, codebooks=1, codec=None):
        folder = Path(folder)
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            rows = [r for r in read_jsonl(folder / "manifest.jsonl") if split in (r["split"], None)]
            self.rows = [row for row in rows if row["codebooks"] >= (codebooks or 1)]
            numbers = [self.meta["codebook_size"]]
            for row in self.rows:
                numbers += [row[key] for key in ("shard", "offset", "frames", "codebooks")]
                if not isinstance(row.get("caption", ""), str):
                    raise ValueError(f"the caption {row['caption']!r}")
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a number is missing")
            made = self.meta["codec"]
        except OSError:
            make = f"make some with `python data.py folder MUSIC --out {folder}`"
            raise ValueError(f"no data at {folder}: {make}") from None
        except (ValueError, KeyError, TypeError) as error:
            broken = f"the manifest or meta.json of {folder} is broken ({error!r})"
            raise ValueError(broken) from None
        if codec not in (None, made):
            raise ValueError(f"{folder} was made by the codec {made!r}, the model reads {codec!r}")
        if not self.rows:
            raise ValueError(f"{folder} has no {split} clips with {codebooks} codebook(s)")
        self.folder, self.codebooks = folder, codebooks
        shards = {row["shard"] for row in self.rows}
        self.shards = {i: np.memmap(folder / f"codes-{i:05}.bin", np.uint16, "r") for i in shards}
        for row in self.rows:
            end = row["offset"] + row["codebooks"] * row["frames"]
            if end > len(self.shards[row["shard"]]):
                raise self.damaged(row)

    def damaged(self, row):
        return ValueError(f"{self.folder}/codes-{row['shard']:05}.bin is damaged; make it again")

    def __len__(self):
        return len(self.rows)

    def codes(self, i, start=0, frames=None):
        """Codes (codebooks, frames) of clip i from frame `start`, padded with the special token."""
        row = self.rows[i]
        K, T, size = row["codebooks"], row["frames"], self.meta["codebook_size"]
        clip = self.shards[row["shard"]][row["offset"] : row["offset"] + K * T]
        frames = T - start if frames is None else frames
        clip = clip.reshape(K, T)[: self.codebooks, start : start + frames].astype(np.int64)
        if clip.max(initial=0) >= size:
            raise self.damaged(row)
        missing = (0, 0), (0, frames - clip.shape[1])
        return np.pad(clip, missing, constant_values=size)

    def batch(self, first, count, frames, seed, describe, caption_dropout=0.0, window=0):
        """Samples `first` ... `first + count - 1` of an endless shuffle: a pure function of the
        seed and the sample's number, however a run is resumed or split over processes.

        describe(row, rng) -> caption. Returns codes (count, K, frames) int64, the beginning of a
        random `window` (of so many frames, at least `frames`) of each clip, and `count` captions,
        some dropped to the empty string (for classifier-free guidance).
        """
        codes, captions = [], []
        for sample in range(first, first + count):
            epoch, place = divmod(sample, len(self))
            i = _permutation(len(self), seed, epoch)[place]
            rng = np.random.default_rng([seed, sample])
            start = rng.integers(max(self.rows[i]["frames"] - max(frames, window), 0) + 1)
            codes.append(self.codes(i, start, frames))
            caption = describe(self.rows[i], rng)
            captions.append("" if rng.random() < caption_dropout else caption)
        return torch.from_numpy(np.stack(codes)), captions


@functools.lru_cache(2)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


# ------------------------------------------------------------------ what a training step reads ----


def data_folder(name):
    """--data: a folder, or toy, the corpus that ships."""
    if name != "toy":
        return Path(name)
    from toy import corpus

    return corpus.folder()


def caption_of(row, rng, refining=False):
    """A caption for a row of a manifest. Toy clips have factors, from which it is drawn."""
    if "facts" in row:
        from curate import sentence

        return sentence(row["facts"], rng)
    if "factors" not in row:
        return row["caption"]
    from toy import words

    # Codebook 1 tells a refiner the genre already; the words are for the lead instrument.
    return (words.caption_with_lead if refining else words.caption)(row["factors"], rng)


def stages(config):
    """-> [(the step at which it ends, frames of a clip, clips of a micro-batch)].

    Training starts with short crops, many per batch; their length doubles in equal stages until
    clips are whole. A model learns what the words mean from how music begins, so many beginnings
    teach it fast; whole clips then teach the long run.
    """
    whole, crop = (max(1, round(s * FRAME_RATE)) for s in (config.seconds, config.crop))
    doublings = max(0, round(math.log2(whole / crop)))
    ends = [round(config.steps * config.crop_until * (i + 1) / doublings) for i in range(doublings)]
    lengths = [crop << i for i in range(doublings)]
    text = TYPICAL_LENGTH  # about as many tokens per batch, with the text, at every length
    clips = [config.batch * (whole + text) // (frames + text) for frames in lengths]
    return [*zip(ends, lengths, clips), (config.steps, whole, config.batch)]


def shape_at(step, config):
    """-> frames of a clip and clips of a micro-batch"""
    return next((frames, clips) for end, frames, clips in stages(config) if step < end)


def seen_before(step, config):
    """The samples and the tokens (of one codebook) before this step. The number of a sample decides
    its clip, crop and caption; every clip is seen once before any is seen again."""
    samples = tokens = begin = 0
    for end, frames, clips in stages(config):
        count = config.accumulate * clips * max(0, min(step, end) - begin)
        samples += count
        tokens += count * frames
        begin = end
    return samples, tokens


def share(step, config, rank, ranks):
    """A process's part of a step -> micro-batches [(first sample, samples, frames)]"""
    frames, batch = shape_at(step, config)
    first = seen_before(step, config)[0]
    total = batch * config.accumulate
    if total < ranks:
        raise ValueError(f"{ranks} processes are too many for {total} clips a step")
    begin, end = (total * r // ranks for r in (rank, rank + 1))
    return [(first + i, min(batch, end - i), frames) for i in range(begin, end, batch)]


def main(argv=None):
    """The commands that make a data folder from audio, or look at one: curate.py"""
    import curate

    curate.main(argv)


if __name__ == "__main__":
    entry(main)
