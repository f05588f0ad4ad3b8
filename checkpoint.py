"""Checkpoints."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from model import LMConfig, MusicLM
from paper.authors import is_authors, read_authors
from text import TextEncoder


def save_checkpoint(folder, lm, encoder, extra=None, files=None, dtype=None, weights=None):
    """Writes a checkpoint folder under a temporary name and renames it: it is there whole or not.

    extra: more entries for config.json; files: {name: {key: tensor}} written beside the model as
    safetensors; dtype: the weights' type on disk, None for their own; weights: the language model's
    state_dict, where it is not its own.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    _remove(new)
    new.mkdir(parents=True)
    text = {"name": encoder.name, "stored": encoder.trained or encoder.name == "small"}
    text |= {"fill": encoder.fill} if encoder.fill else {}
    config = {"model": asdict(lm.config), "text": text, **(extra or {})}
    weights = {f"lm.{k}": v for k, v in (weights or lm.state_dict()).items()}
    if encoder.name == "small":
        t5 = encoder.encoder.config
        text |= dict(d_model=t5.d_model, layers=t5.num_layers, max_tokens=encoder.max_tokens)
        (new / "tokenizer.json").write_text(encoder.tokenizer.backend_tokenizer.to_str())
    if text["stored"]:
        weights |= {f"text.{k}": v for k, v in encoder.encoder.state_dict().items()}
        weights.pop("text.encoder.embed_tokens.weight", None)  # another name of text.shared.weight
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in weights.items()}
    for name, tensors in {"model.safetensors": weights, **(files or {})}.items():
        save_file(tensors, new / name)
    (new / "config.json").write_text(json.dumps(config, indent=1))
    while new.exists():
        if folder.exists():
            _remove(old)
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # else another process, reading, has just put the old one back
                raise
    _remove(old)


def read_config(folder) -> dict:
    """A checkpoint's config.json. ValueError, one sentence, if there is none or it is broken."""
    if is_authors(folder):
        return read_authors(folder)[0]
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # killed between the two renames of save_checkpoint
        with contextlib.suppress(OSError):  # unless another process is between them now
            os.rename(old, folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no checkpoint at {folder}: expected a folder with config.json, as train.py makes, "
            "or the .ckpt file of the paper's authors"
        )
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError:
        raise ValueError(
            f"{folder / 'config.json'} is not valid JSON; the checkpoint is broken"
        ) from None


def load_checkpoint(folder) -> MusicLM:
    """The language model of a checkpoint folder, in fp32 and ready to sample from."""
    known = {field.name for field in fields(LMConfig)}
    values = read_config(folder).get("model")
    if not isinstance(values, dict) or set(values) - known:
        raise ValueError(f"{folder}/config.json does not describe a language model of this program")
    lm = MusicLM(LMConfig(**values))
    file = folder if is_authors(folder) else Path(folder) / "model.safetensors"
    load_weights(lm, file, "lm.")
    return lm.eval()


def load_text_encoder(folder) -> TextEncoder:
    """The text encoder that a checkpoint's language model was trained with."""
    folder, config = Path(folder), read_config(folder).get("text", {})
    if config.get("name") == "small":
        shape = {k: config[k] for k in ("d_model", "layers", "max_tokens")}
        encoder = TextEncoder.small((folder / "tokenizer.json").read_text(), **shape)
    else:
        encoder = TextEncoder.pretrained(config.get("name", "google/flan-t5-base"))
    if config.get("stored"):
        load_weights(encoder.encoder, folder / "model.safetensors", "text.")
    encoder.fill = config.get("fill", 0)
    return encoder.eval()


def load_weights(module, file, prefix=""):
    """Fills a module with those tensors of a checkpoint's file whose name begins with `prefix`."""
    tensors = read_tensors(file)
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for name in [name for name in tensors if name.endswith("shared.weight")]:
        tensors[name.replace("shared", "encoder.embed_tokens")] = tensors[name]
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} holds weights of another shape than is expected: {reason}"
        ) from None


def read_tensors(file) -> dict:
    """The tensors of a checkpoint's file. ValueError, one sentence, if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if is_authors(file):
        return read_authors(file)[1]
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is missing, cut short or not a safetensors file ({error})"
        ) from None


def _remove(path):
    if Path(path).exists():
        shutil.rmtree(path)
