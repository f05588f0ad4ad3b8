"""Command lines made from dataclasses. An option is a field, which says its default, its help and
its valid values: train.TrainConfig shows it. Help, checks and error messages are made from that."""

import os
import signal
import sys
import threading
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import ExitStack, contextmanager
from dataclasses import field, fields
from pathlib import Path


def option(default, help, valid=None):
    """A dataclass field. valid: strings to choose from, an interval such as "(0, 1]", or None."""
    return field(default=default, metadata=dict(help=help, valid=valid))


def check(config):
    """ValueError, in one sentence, if a field is of another type or outside its valid values."""
    for item in fields(config):
        value = getattr(config, item.name)
        if type(value) is not item.type and (item.type, type(value)) != (float, int):
            raise ValueError(f"{flag(item.name)} must be {item.type.__name__}, not {value!r}")
        check_value(item.name, value, item.metadata.get("valid"))


def check_value(name, value, valid):
    """ValueError, in one sentence, unless `value` is valid (see `option`), or a number None."""
    if isinstance(valid, str) and value is not None:
        low, high = (float(bound) for bound in valid[1:-1].split(","))
        at_an_end = value == low and valid[0] == "[" or value == high and valid[-1] == "]"
        if not (low < value < high or at_an_end):  # NaN is neither
            raise ValueError(f"{flag(name)} must be in {valid}, not {value}")
    elif isinstance(valid, list) and value not in valid:
        raise ValueError(f"unknown {flag(name)} {value!r}: choose {', '.join(valid)}")


def flag(name):
    """valid_every -> --valid-every"""
    return "--" + name.replace("_", "-")


def new_parser(description=None, **more):
    """An ArgumentParser that shows a script's docstring and takes no abbreviated options."""
    more |= dict(formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    return ArgumentParser(description=description, **more)


def add_arguments(parser, config, **defaults):
    """Adds an option for each field of the dataclass `config`, with other defaults if given."""
    for item in fields(config):
        default = defaults.get(item.name, item.default)
        text = item.metadata["help"] + ("" if default is None else f" [{default}]")
        kind = dict(action=BooleanOptionalAction) if item.type is bool else dict(type=item.type)
        parser.add_argument(flag(item.name), default=default, help=text.replace("%", "%%"), **kind)


def read_lines(file, empty=False):
    """The lines of a UTF-8 text file; those that are empty too, if asked. ValueError if it cannot
    be read."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} could not be read as UTF-8 text ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip() or empty]


def entry(main):
    """Runs main(). A ValueError or OSError becomes one sentence, after the name that was typed."""
    if module := sys.modules["__main__"].__spec__:  # started with -m
        sys.argv[0] = f"python -m {module.name.removesuffix('.__main__')}"
    sys.stdout.reconfigure(errors="backslashreplace")  # in a terminal without UTF-8; as stderr does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished files are removed
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as error:
        end(error)
    except (MemoryError, RuntimeError) as error:  # torch's are of the second kind
        if "memory" not in repr(error).lower():
            raise
        end("out of memory: smaller sizes, --batch above all, need less")
    except KeyboardInterrupt:
        sys.exit(130)


def end(reason):
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def finish_step_on_signals():
    """Ctrl-C and SIGTERM set the event that this yields, instead of ending the process."""
    stop = threading.Event()
    with ExitStack() as before:
        for number in (signal.SIGINT, signal.SIGTERM):
            before.callback(signal.signal, number, signal.signal(number, lambda *_: stop.set()))
        yield stop
