"""Checkpoints: a folder with

    config.json           the model's shape, the text encoder, the codec, how it was trained
    model.safetensors     the weights, "lm." the model's (also a refiner's), "text." the encoder's
    tokenizer.json        of a small text encoder
    trainer.safetensors   for --resume: all that training needs to continue exactly (train.py)
    README.md             for whoever finds it: the data, their licences, the loss

or its name on the Hugging Face hub, USER/MODEL, or the .ckpt file of the paper's authors
(paper/authors.py). Each file is written under another name and then renamed, so a killed run
leaves the checkpoint before it intact.
"""

import functools
import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from audio import replacing, write_text
from model import LMConfig, MusicLM
from text import TextEncoder


def save_checkpoint(folder, model, encoder, extra=None, dtype=None, weights=None):
    """Writes a checkpoint folder, or replaces it file by file.

    model: a MusicLM or a Refiner; encoder: its TextEncoder; extra: more entries for config.json;
    dtype: of the weights on disk, None for their own; weights: the model's state_dict, if it is
    not the model's own. OSError if a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    small = encoder.name == "small"
    text = dict(
        name=encoder.name, stored=encoder.trained or small, fill=encoder.fill,
        d_model=encoder.d_text, layers=encoder.encoder.layers, max_tokens=encoder.max_tokens,
    )  # fmt: skip
    if small:
        write_text(folder / "tokenizer.json", encoder.tokenizer_json)
    tensors = {f"lm.{k}": v for k, v in (weights or model.state_dict()).items()}
    if text["stored"]:
        tensors |= {f"text.{k}": v for k, v in encoder.encoder.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, dtype=dtype)
    config = {"model": asdict(model.config), "text": text, **(extra or {})}
    write_text(folder / "config.json", json.dumps(config, indent=1))


def write_tensors(file, tensors, metadata=None, dtype=None):
    """{name: tensor} -> a safetensors file, which appears when complete. OSError if it cannot."""
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}
    try:
        with replacing(Path(file)) as part:
            save_file(tensors, part, metadata)
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from None


def read_config(folder) -> dict:
    """A checkpoint's config.json. ValueError, one sentence, if there is none or it is broken."""
    if theirs := of_authors(folder):
        return theirs[0]
    file = local(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config | dict(model=dict(config["model"]))
    except OSError:
        raise ValueError(
            f"no checkpoint at {folder}: neither a folder with config.json, as train.py makes, nor "
            "a .ckpt file of the paper's authors, nor a model that huggingface.co would give"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is broken: it describes no model ({error!r})") from None


@functools.lru_cache(None)
def local(name) -> Path:
    """A path as it is. USER/MODEL, if there is no such path, is downloaded from the hub, once."""
    if not Path(name).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        from huggingface_hub import snapshot_download

        files = ["*.json", "model.safetensors"]
        with suppress(Exception):  # its client raises many kinds; `read_config` says what to do
            return Path(snapshot_download(str(name), allow_patterns=files))
    return Path(name)


def load_checkpoint(folder) -> MusicLM:
    """The language model of a checkpoint, in fp32 and eval mode."""
    lm = MusicLM(read_model_config(folder, LMConfig))
    load_weights(lm, folder, "lm.")
    return lm.eval()


def read_model_config(folder, kind):
    """A checkpoint's LMConfig or RefinerConfig. ValueError, one sentence, if it is of another."""
    try:
        return kind(**read_config(folder)["model"])
    except (KeyError, TypeError):  # another name, or a value of another type
        what = "language model" if kind is LMConfig else "refiner"
        raise ValueError(f"{folder} holds no {what} of this program") from None


def load_text_encoder(folder) -> TextEncoder:
    """The text encoder that a checkpoint's model was trained with, in eval mode."""
    folder, config = local(folder), read_config(folder).get("text")
    try:
        name, fill = config["name"], config.get("fill", 0)
        if name == "small":
            tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
            shape = (config[key] for key in ("d_model", "layers", "max_tokens"))
            encoder = TextEncoder.small(tokenizer, *shape)
    except Exception as error:  # tokenizers raises bare ones
        reason = f"its config.json or tokenizer.json is broken ({error!r})"
        raise ValueError(f"{folder} holds no text encoder: {reason}") from None
    if name != "small":
        encoder = TextEncoder.pretrained(name)
    encoder.fill = fill
    if config.get("stored"):
        load_weights(encoder.encoder, folder, "text.")
    return encoder.eval()


def load_weights(module, file, prefix=""):
    """Fills a module with the tensors of a file, or checkpoint, whose names begin with `prefix`."""
    tensors = read_tensors(file)
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} holds weights of another shape than expected: {reason}") from None
    if not all(v.isfinite().all() for v in tensors.values()):
        raise ValueError(f"{file} holds weights that are not numbers: its training diverged")


def read_tensors(file) -> dict:
    """The tensors of a file, or of a checkpoint. ValueError, one sentence, if they are missing or
    broken."""
    if theirs := of_authors(file):
        return theirs[1]
    file = local(file)
    if file.is_dir():
        file = file / "model.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = f"is missing, cut short or not a safetensors file ({error})"
        raise ValueError(f"{file} {reason}") from None


def of_authors(path):
    """The config and the tensors in a file of the paper's authors. None for any other path."""
    if Path(path).suffix not in (".ckpt", ".pt", ".pth") or not Path(path).is_file():
        return None
    from paper.authors import read_authors

    return read_authors(path)


# ------------------------------------------------------------------------------------------------
# What --resume needs
#
# trainer.safetensors alone is enough to continue a run exactly, so that replacing this one file
# replaces the checkpoint: the trained weights ("trained."), AdamW's moments, the averaged weights
# ("kept."), and as metadata the step, the best loss and a fingerprint of the data.


def save_trainer(folder, parameters, optimizer, averaged, about, processes):
    """parameters: {name: parameter} that are trained; averaged: torch's AveragedModel, or None;
    about: numbers and strings; processes: all of a run's take part, the first one writes."""
    tensors = {}
    for name, p in parameters.items():
        tensors[f"trained.{name}"] = processes.whole(p)
        for key, v in optimizer.state.get(p, {}).items():  # empty before the first step
            tensors[f"{key}.{name}"] = processes.whole(v)
    if averaged:
        tensors |= {f"kept.{k}": v for k, v in averaged.module.state_dict().items()}
    if processes.rank == 0:
        file = Path(folder) / "trainer.safetensors"
        write_tensors(file, tensors, {"about": json.dumps(about)})


@torch.no_grad()
def load_trainer(folder, parameters, optimizer, averaged, processes) -> dict:
    """Fills what `save_trainer` was given -> its `about`. ValueError if the file does not fit."""
    file = Path(folder) / "trainer.safetensors"
    tensors = read_tensors(file)
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        about = dict(step=int(about["step"]), best=float(about["best"]), data=about["data"])
        share = lambda name, p: processes.share_of(tensors[name].to(p.device), p)
        for name, p in parameters.items():
            p.copy_(share(f"trained.{name}", p))
            if f"step.{name}" in tensors:  # not before the first step
                state = optimizer.state[p]
                state["step"] = tensors[f"step.{name}"].to(p.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = share(f"{key}.{name}", p)
        if averaged:
            kept = averaged.module
            kept.load_state_dict({k: tensors[f"kept.{k}"] for k in kept.state_dict()})
            averaged.n_averaged.fill_(about["step"])  # at 0 an update would replace the average
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit the run ({error!r})") from None
    return about
