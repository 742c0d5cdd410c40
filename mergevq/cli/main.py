"""The command `mergevq`: finds the verb, runs it, and turns our errors into one line.

Nothing here and nothing at the top of a verb's file imports torch, so that `--help` answers at once. What takes a
moment to import, the parser too, is imported inside `main`, so that Ctrl-C is one line from the beginning.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from mergevq import __version__
from mergevq.errors import ConfigError, MergeVQError

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("mergevq.cli.demo:demo", "train small on the embedded images, round-trip held-out ones, write a report"),
    "encode": ("mergevq.cli.encode:encode", "images to a token file"),
    "decode": ("mergevq.cli.decode:decode", "a token file to images"),
    "show": ("mergevq.cli.show:show", "an image as tokens: maps, attention, sizes; what two images share"),
    "cache-tokens": ("mergevq.cli.cache_tokens:cache_tokens", "a data set to tokens that generators train on"),
    "cache-teacher": ("mergevq.cli.cache_teacher:cache_teacher", "a data set to a teacher's features, to align with"),
    "generate": ("mergevq.cli.generate:generate", "images from nothing but classes and a seed"),
    "train tokenizer": ("mergevq.cli.train:train_tokenizer", "train a tokenizer on a folder of images"),
    "train generator": ("mergevq.cli.train:train_generator", "train a generator on the tokens of a tokenizer"),
    "train recovery": ("mergevq.cli.train:train_recovery", "teach a tokenizer to predict its source maps"),
    "finetune": ("mergevq.cli.finetune:finetune", "train a tokenizer's encoder to classify labelled images"),
    "eval all": (
        "mergevq.cli.eval_all:eval_all",
        "how good is a tokenizer? every measure, one table, one page, a card",
    ),
    "eval reconstruction": ("mergevq.cli.eval:eval_reconstruction", "measure what encoding and decoding loses"),
    "eval generation": ("mergevq.cli.eval_generation:eval_generation", "measure generated images against real ones"),
    "eval representation": ("mergevq.cli.eval_representation:eval_representation", "probe features for classes"),
    "convert": ("mergevq.cli.convert:convert", "a checkpoint of the authors' release to a model file"),
    "info": ("mergevq.cli.info:info", "what is in a model, a token file or a result"),
}
"""Verb -> where its function is, and what it does. The function's signature is the verb's options."""

_TRAINING = ("train", "finetune")
"""First words of verbs whose options have the defaults of a preset."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 after one of our errors, 130 after Ctrl-C.

    Args:
        arguments: the words after `mergevq`; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _warnings_on_stderr():
            _run(words)
        sys.stdout.flush()
    except MergeVQError as error:
        return _fail(str(error))
    except BrokenPipeError:  # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt as stop:
        print(f"mergevq: interrupted{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    return 0


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(VERBS))
        return
    if words[0] in ("-V", "--version"):
        print(f"mergevq {__version__}")
        return
    for length in (2, 1):
        verb = " ".join(words[:length])
        if verb in VERBS:
            import tyro

            module, function = VERBS[verb][0].split(":")
            rest, run = words[length:], getattr(import_module(module), function)
            flags: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff,)
            lists = None
            if words[0] in _TRAINING:
                # The preset is named by the words. So an option may be on already, and each needs a word for off: the
                # same words with every preset.
                lists = import_module("mergevq.cli.runs").number_lists()
                run, flags = run(rest), ()
            tyro.cli(run, prog=f"mergevq {verb}", args=rest, config=flags, registry=lists)
            return
    below = {verb: what for verb, what in VERBS.items() if verb.startswith(f"{words[0]} ")}
    if below and words[1:2] in ([], ["-h"], ["--help"]):
        print(_help(below))
        return
    given = " ".join(words[: 2 if below else 1])
    import difflib

    near = difflib.get_close_matches(given, VERBS, n=2, cutoff=0.5) or list(below)
    hint = f"did you mean {' or '.join(near)}? See" if near else "see"
    raise ConfigError(f"expected a verb, got {given!r}: {hint} mergevq --help")


def _help(verbs: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, verbs)) + 2
    lines = [f"  {verb:<{width}}{what}" for verb, (_, what) in verbs.items()]
    return "\n".join(
        [
            "usage: mergevq VERB ...",
            "",
            "Image tokens merged by meaning: encode images to any number of tokens, decode, train, measure.",
            "",
            *lines,
            "",
            "mergevq VERB --help shows a verb's options, mergevq --version the version.",
        ]
    )


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Shows what the package logs, such as images that cannot be read, as lines of ours."""
    import logging

    log, handler = logging.getLogger("mergevq"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mergevq: %(levelname)s: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _fail(message: str) -> int:
    # The only advice that is written otherwise in Python.
    print("mergevq: error:", " ".join(message.split()).replace("force=True", "--force"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
