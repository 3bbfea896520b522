"""The size of an ordinary JPEG from its first bytes, several times as fast as Pillow's reader.

Most images of a dataset are ordinary: one frame, at most one EXIF block that is in order. For everything else the
answer is None and Pillow is asked. Markers: ITU-T T.81, annex B; EXIF is a TIFF directory (CIPA DC-008).
"""

from __future__ import annotations

import struct

from anyres_vlm.geometry import Size

HEAD = 32_768  # bytes to read: what stands before the pixels of most files, an EXIF thumbnail included

SOF, SOS, DQT = (0xC0, 0xC1, 0xC2), 0xDA, 0xDB
IGNORED = (0xC4, 0xDD, 0xFE)  # Huffman tables, restart interval, comment
APP0, APP1, APP2, APP14 = 0xE0, 0xE1, 0xE2, 0xEE
TABLE = 65  # bytes of an 8-bit quantisation table with its number

ORIENTATION = 0x0112
SHORT = 3
UNITS = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # bytes of a value of each TIFF type
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that swap height and width


def ordinary_jpeg_size(head: bytes) -> Size | None:
    """Height and width as shown, from the first bytes of a file; None if there is anything unusual about them.

    Raises `UsageError`, as a size does, for a side of 0 pixels.
    """
    frame: bytes | None = None
    orientation = 0  # 0 stands for no EXIF so far
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], head[at + 2] << 8 | head[at + 3]
        end = at + 2 + length
        if length < 2 or end > len(head):
            return None
        body = head[at + 4 : end]
        at = end
        if marker == SOS:
            return None if frame is None else _upright(frame, orientation)
        if marker in SOF and frame is None:
            frame = body
        elif marker == APP1 and orientation == 0 and body.startswith(b"Exif\0\0"):
            found = _orientation(body[6:])
            if found is None:
                return None
            orientation = found
        elif not _harmless(marker, body):
            return None
    return None


def _harmless(marker: int, body: bytes) -> bool:
    """A segment that says nothing about the size, and that Pillow does not refuse."""
    if marker == DQT:
        return len(body) % TABLE == 0 and all(body[at] < 16 for at in range(0, len(body), TABLE))
    if marker == APP0:
        return len(body) >= 14
    if marker == APP2:
        return body.startswith(b"ICC_PROFILE\0") and len(body) >= 14
    return marker in IGNORED or (marker == APP14 and len(body) >= 12)


def _upright(frame: bytes, orientation: int) -> Size | None:
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if orientation in QUARTER_TURNS:
        height, width = width, height
    return Size(height=height, width=width)


def _orientation(tiff: bytes) -> int | None:
    """The value of the first directory, 1 where it has none; None for a directory that is not in order."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return None
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start < 8 or start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    if start + 2 + 12 * count + 4 > len(tiff):
        return None
    value: int | None = None
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, place = struct.unpack_from(f"{order}HHII", tiff, entry)
        size = UNITS[kind] * number if 0 < kind < len(UNITS) else 0
        if size == 0 or (size > 4 and place + size > len(tiff)):
            return None
        if tag == ORIENTATION:
            if kind != SHORT or number != 1 or value is not None:
                return None
            (value,) = struct.unpack_from(f"{order}H", tiff, entry + 8)
    return value or 1
