"""Command lines made from dataclasses.

A script's options are the fields of a dataclass. Each field says its default, its help and the
values that are valid; `--help`, the check and the error message are made from that:

    @dataclass
    class TrainConfig:
        batch: int = option(4, "clips in a micro-batch", "[1, inf)")
        backbone: str = option("ssd", "what mixes the frames", ["ssd", "attention"])

        def __post_init__(self):
            check(self)
"""

import argparse
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path


def option(default, help, valid=None):
    """A dataclass field that is also a command-line option.

    valid: a list of strings to choose from, an interval such as "(0, 1]" for numbers, or None.
    """
    return field(default=default, metadata=dict(help=help, valid=valid))


def check(config):
    """ValueError, in one sentence, if a field of the dataclass is outside its valid values."""
    for item in fields(config):
        check_value(item.name, getattr(config, item.name), item.metadata.get("valid"))


def check_value(name, value, valid):
    """ValueError, in one sentence, unless `value` is valid (see `option`) or None."""
    if value is None or valid is None:
        return
    if isinstance(valid, str):
        low, high = (float(bound) for bound in valid[1:-1].split(","))
        above = value >= low if valid[0] == "[" else value > low
        below = value <= high if valid[-1] == "]" else value < high
        if not (above and below):  # NaN is neither
            raise ValueError(f"{flag(name)} must be in {valid}, not {value}")
    elif value not in valid:
        raise ValueError(f"unknown {flag(name)} {value!r}: choose {', '.join(valid)}")


def flag(name):
    """valid_every -> --valid-every"""
    return "--" + name.replace("_", "-")


def new_parser(description=None, **more):
    """An ArgumentParser that shows a script's docstring and takes no abbreviated options."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, formatter_class=formatter, allow_abbrev=False, **more
    )


def add_arguments(parser, config, **defaults):
    """Adds an option for each field of the dataclass `config`, with other defaults if given."""
    for item in fields(config):
        kind, default = item.type, defaults.get(item.name, item.default)
        kinds = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        text = item.metadata["help"] + ("" if default is None else f" [{default}]")
        text = text.replace("%", "%%")
        parser.add_argument(flag(item.name), default=default, help=text, **kinds)


def read_lines(file):
    """The non-empty lines of a text file, UTF-8 with or without a byte-order mark.

    ValueError, in one sentence, if it cannot be read.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} could not be read as UTF-8 text ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def entry(main):
    """Runs a script's main(). A ValueError or an OSError is printed as one sentence and ends the
    script with status 2, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows escapes instead
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def finish_step_on_signals():
    """Ctrl-C and SIGTERM set the event that this yields, instead of ending the process."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)
