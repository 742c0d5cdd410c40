"""The data set that comes with the package: emoji of 64x64 pixels in nine classes, enough to train a small model.

What it holds, who drew it and under which licences is in `emoji_64/LICENSES.md`.
"""

from importlib.resources import files
from pathlib import Path

from mergevq.data.folder import ImageFolder
from mergevq.errors import ConfigError


class EmbeddedImages(ImageFolder):
    """Noto and Fluent 3D emoji, 64x64 pixels on white, labelled by category; decoded images stay in memory.

    Both drawings of a code point are in the same part, so nothing in "val" was seen in "train".

    Args:
        part: "train" (about nine tenths) or "val".

    Raises:
        ConfigError: another part is asked for.
    """

    def __init__(self, part: str) -> None:
        if part not in ("train", "val"):
            raise ConfigError(f"expected 'train' or 'val' as part of the embedded images, got {part!r}")
        super().__init__(Path(str(files("mergevq.data") / "emoji_64")), part=part, cache=True)
