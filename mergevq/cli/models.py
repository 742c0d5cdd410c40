"""How models are named on the command line, in words of the help that say which ones are there."""

from typing import Annotated

import tyro

from mergevq.model_files import shipped_names, shipped_roles


def model_help(*roles: str, first: str = "Model file") -> str:
    """Returns the help of an option that names a model.

    Args:
        roles: which of the models that come with the package it may be: tokenizer, merge_ar, random_ar. Where both
            generators may be meant, the second has "_random" behind its name.
        first: how the text begins.
    """
    there = [
        f"{name}_random" if role == "random_ar" and "merge_ar" in roles else name
        for name in shipped_names()
        for role in roles
        if role in shipped_roles(name)
    ]
    shipped = f"{' or '.join(there)} (comes with the package), " if there else ""
    return f"{first}, folder of a training run, {shipped}or Hugging Face hub id."


Tokenizer = Annotated[str, tyro.conf.arg(metavar="M", help=model_help("tokenizer"))]
Generator = Annotated[str, tyro.conf.arg(metavar="G", help=model_help("merge_ar", "random_ar"))]
TokenizerOf = Annotated[
    str, tyro.conf.arg(metavar="M", help=model_help("tokenizer", first="The tokenizer that made the tokens: file"))
]
"""Of given tokens, or of a generator."""
