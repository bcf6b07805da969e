"""Damage files as failing disks and interrupted copies do."""

from pathlib import Path


def damage(path: Path, change: str, offset: int | None = None) -> None:
    """Flip the lowest bit of a byte, zero a block of 512 bytes, cut, empty or remove a file.

    Args:
        change: `flipped`, `zeroed`, `cut`, `emptied` or `removed`.
        offset: Position of the damage; by default the middle of the file.
    """
    if change == "removed":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    position = len(content) // 2 if offset is None else offset
    if change == "flipped":
        content[position] ^= 1
    elif change == "zeroed":
        content[position : position + 512] = bytes(len(content[position : position + 512]))
    else:
        del content[0 if change == "emptied" else position :]
    path.write_bytes(content)
