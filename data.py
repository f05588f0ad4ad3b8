"""Music as training tokens: the folder format, its reader, its seeded batches, a first source.

A data folder holds

    meta.json         {"codec": "toy", "codebooks": 9, "codebook_size": 1024, "frame_rate": 86.13}
    manifest.jsonl    one clip a line: shard, offset, codebooks K, frames T, split, caption (or the
                      factors it is drawn from), and its source (path, track, start in seconds)
    codes-00000.bin   uint16 codes, clip after clip, each a (K, T) table in C order
    skipped.jsonl     one line for each file that was left out, with the reason

Clips are memory-mapped. Batches are a pure function of (seed, number of the first sample): the data
order, the crops, the captions drawn and dropped. So a run that is resumed sees what it would have
seen, and G processes see together what one would have seen.

    python data.py folder ~/music --out data/mine      song.wav + song.txt, song.mp3 + song.txt, ...
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import entry

SHARD_BYTES = 256 << 20
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus", ".m4a")


class Clips:
    """The clips of one split of a data folder, those with at least `codebooks` codebooks.

    ValueError, one sentence, if the folder is missing, broken, empty or made by another codec.
    """

    def __init__(self, folder, split, codebooks=1, codec=None):
        folder = Path(folder)
        if not (folder / "manifest.jsonl").is_file() or not (folder / "meta.json").is_file():
            raise ValueError(
                f"no data at {folder}: make some with `python data.py folder MUSIC --out {folder}`"
            )
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            with open(folder / "manifest.jsonl", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            self.rows = [r for r in rows if r["split"] == split and r["codebooks"] >= codebooks]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the manifest of {folder} is broken ({error!r})") from None
        if codec and self.meta["codec"] != codec:
            raise ValueError(
                f"{folder} was made by the codec {self.meta['codec']!r}, the model reads {codec!r}"
            )
        if not self.rows:
            raise ValueError(f"{folder} has no {split} clips with {codebooks} codebook(s)")
        self.codebooks = codebooks
        self.shards = {
            shard: np.memmap(folder / f"codes-{shard:05}.bin", np.uint16, "r")
            for shard in {row["shard"] for row in self.rows}
        }

    def __len__(self):
        return len(self.rows)

    def codes(self, i, start=0, frames=None):
        """Codes (codebooks, frames) of clip i from frame `start`, padded with the special token."""
        row = self.rows[i]
        K, T = row["codebooks"], row["frames"]
        clip = self.shards[row["shard"]][row["offset"] : row["offset"] + K * T].reshape(K, T)
        clip = clip[: self.codebooks, start : T if frames is None else start + frames]
        missing = 0 if frames is None else frames - clip.shape[1]
        clip = np.pad(clip, ((0, 0), (0, missing)), constant_values=self.meta["codebook_size"])
        return clip.astype(np.int64)

    def batch(self, first, count, frames, seed, describe, caption_dropout=0.0):
        """Samples `first` ... `first + count - 1` of the endless seeded shuffle.

        describe(row, rng) -> caption. Returns codes (count, K, frames) int64, a random crop of each
        clip, and `count` captions, some dropped to the empty string (classifier-free guidance).
        """
        codes, captions = [], []
        for sample in range(first, first + count):
            epoch, place = divmod(sample, len(self))
            i = _permutation(len(self), seed, epoch)[place]
            rng = np.random.default_rng([seed, sample])
            start = rng.integers(max(self.rows[i]["frames"] - frames, 0) + 1)
            codes.append(self.codes(i, start, frames))
            caption = describe(self.rows[i], rng)
            captions.append("" if rng.random() < caption_dropout else caption)
        return torch.from_numpy(np.stack(codes)), captions


@functools.lru_cache(2)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


class Writer:
    """Appends clips to a data folder. What the manifest names is on disk whole; codes of a clip
    that was being written when the process died are overwritten by the next."""

    def __init__(self, folder, codec):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = dict(
            codec=codec.name,
            codebooks=codec.codebooks,
            codebook_size=codec.codebook_size,
            frame_rate=codec.sample_rate / codec.hop,
        )
        path = self.folder / "meta.json"
        if path.exists() and json.loads(path.read_text()) != meta:
            raise ValueError(f"{folder} was begun with another codec; choose another --out")
        path.write_text(json.dumps(meta))
        self.shard, self.offset = 0, 0  # offset in codes, of two bytes
        for row in self.rows():
            self.shard, self.offset = row["shard"], row["offset"] + row["codebooks"] * row["frames"]

    def rows(self):
        path = self.folder / "manifest.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:  # a line that was being written
            path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def add(self, clips):
        """clips: [(codes (K, T), row)]; all of them enter the manifest, or none."""
        lines = []
        for codes, row in clips:
            if 2 * self.offset > SHARD_BYTES:
                self.shard, self.offset = self.shard + 1, 0
            path = self.folder / f"codes-{self.shard:05}.bin"
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.seek(2 * self.offset)
                file.write(np.ascontiguousarray(codes, np.uint16).tobytes())
            where = dict(shard=self.shard, offset=self.offset)
            lines.append(where | dict(codebooks=codes.shape[0], frames=codes.shape[1]) | row)
            self.offset += codes.size
        with open(self.folder / "manifest.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def skip(self, path, reason):
        with open(self.folder / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(path=str(path), reason=reason)) + "\n")


def add_folder(music, out, codec, seconds=30.0, valid=0.1):
    """Encodes every captioned audio file below `music` into the data folder `out`, in clips of
    `seconds`. A track belongs to train or valid as a whole. -> (clips, skipped) counts."""
    from codec import read_audio

    files = sorted(p for p in Path(music).rglob("*") if p.suffix.lower() in AUDIO)
    if not files:
        raise ValueError(f"no audio below {music}: expected files such as song.wav with song.txt")
    writer = Writer(out, codec)
    done = {row["path"] for row in writer.rows()}
    frames, clips, skipped = round(seconds * codec.sample_rate / codec.hop), 0, 0
    for path in tqdm(files, unit="file", disable=None):
        if str(path) in done:
            continue
        try:
            caption = _sidecar(path)
            audio = read_audio(path)  # (1, samples)
            if audio.abs().max() < 1e-4:
                raise ValueError(f"{path} is silent")
        except ValueError as error:
            writer.skip(path, str(error))
            skipped += 1
            continue
        # zlib's sum of the name is the same on every machine, so a track keeps its split.
        split = "valid" if _hash(path.name) < valid else "train"
        found = []
        for start in range(0, audio.shape[1], frames * codec.hop):
            piece = audio[:, start : start + frames * codec.hop]
            if start and piece.shape[1] < codec.sample_rate:
                continue  # a second or less is left over
            row = dict(path=str(path), track=path.stem, start=start / codec.sample_rate)
            with torch.inference_mode():
                found.append(
                    (codec.encode(piece)[0].numpy(), row | dict(split=split, caption=caption))
                )
        writer.add(found)
        clips += len(found)
    return clips, skipped


def _sidecar(path):
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{path} has no caption: expected {text.name} beside it")
    try:
        caption = text.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{text} is not UTF-8 text") from None
    if not caption:
        raise ValueError(f"{text} is empty")
    return caption


def _hash(name):
    import zlib

    return zlib.crc32(name.encode()) / 2**32


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    folder = commands.add_parser("folder", help="audio files with a caption in a .txt beside each")
    folder.add_argument("music", help="folder of audio, searched to any depth")
    folder.add_argument("--out", required=True, help="data folder to make, or to go on with")
    folder.add_argument("--codec", default="toy", help="toy (ships here) or dac (the paper's)")
    folder.add_argument("--seconds", type=float, default=30.0, help="length of a clip (default 30)")
    folder.add_argument(
        "--valid", type=float, default=0.1, help="share of tracks kept for validation"
    )
    args = parser.parse_args()
    from codec import load_codec

    clips, skipped = add_folder(
        args.music, args.out, load_codec(args.codec), args.seconds, args.valid
    )
    print(f"{args.out}: {clips} clips added, {skipped} files skipped (see skipped.jsonl)")


if __name__ == "__main__":
    entry(main)
