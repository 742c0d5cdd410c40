"""Class folders without images, which no data set of files knows of."""

from pathlib import Path, PurePosixPath

from mergevq.data.folder import PARTS, ImageFolder
from mergevq.data.images import holds_files


def empty_class_folders(images: ImageFolder) -> list[Path]:
    """Returns the folders beside those of the classes that hold no file, sorted; none of an archive. Reads no image.

    Args:
        images: of a folder; where they have no classes, the folder that they lie in is taken for one.
    """
    if not (images.root / images.name(0)).is_file():
        return []
    lie = {(PurePosixPath(images.name(i)).parts[:-1], label) for i, label in enumerate(images.labels)}
    level = _class_level(lie, images.classes, 1 if images.parts else 0)
    if level is None:
        return []
    above = {images.root.joinpath(*folders[:level]) for folders, _ in lie if len(folders) > level}
    beside = (folder for place in sorted(above) for folder in sorted(place.iterdir()) if folder.is_dir())
    return [folder for folder in beside if not (_is_aside(folder, level) or holds_files(folder))]


def _class_level(lie: set[tuple[tuple[str, ...], int]], classes: tuple[str, ...], first: int) -> int | None:
    """How many folders from the top classes are; None if images lie in no class, or classes on several levels.

    Args:
        lie: the folders of images, from the top, and labels.
        classes: their names; without any, images lie in folders of one class.
        first: the least.
    """
    if not classes:
        level = min(len(folders) for folders, _ in lie) - 1
        return level if level >= first else None
    own = [
        {level for level in range(first, len(folders)) if folders[level] == classes[label]}
        for folders, label in lie
        if label >= 0
    ]
    return min(set.intersection(*own), default=None) if own else None


def _is_aside(folder: Path, level: int) -> bool:
    """Whether a folder is hidden or, at the top, a part of the data set."""
    return folder.name.startswith(".") or folder.name == "__MACOSX" or (level == 0 and folder.name in PARTS)
