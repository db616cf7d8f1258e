"""What a pickle of data may be made of: its opcodes are walked over before anything is built."""

from __future__ import annotations

import pickletools

_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE "
    "TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL "
    "STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)

# What follows an opcode: a number of bytes, or one of these.
_REFUSED, _STOP, _LINES, _PUT, _COUNT1, _COUNT4, _COUNT8 = -1, -2, -3, -4, -5, -6, -7


class Refused(Exception):
    """Why a pickle is not read, without its place."""


def walk(data: bytes, start: int) -> int:
    """Walks one pickle and returns where it ends.

    Args:
        data: bytes that hold it.
        start: where it begins.

    Raises:
        Refused: an opcode that records do not use, a value that ends beyond the data, an impossible memo index (the
            unpickler written in C grows its memo to any index that a file names: 4 bytes can ask for 64 GB).
    """
    at, size = start, len(data)
    try:
        while True:
            code = data[at]
            width = _WIDTHS[code]
            if width >= 0:
                at += 1 + width
            elif width == _COUNT1:
                at += 2 + data[at + 1]
            elif width == _COUNT4:
                at += 5 + int.from_bytes(data[at + 1 : at + 5], "little")
            elif width == _STOP:
                return at + 1
            elif width == _PUT:
                if int.from_bytes(data[at + 1 : at + 5], "little") > size:
                    raise Refused("is a pickle with an impossible memo index")
                at += 5
            elif width == _LINES:
                at = data.index(b"\n", data.index(b"\n", at) + 1) + 1
            elif width == _COUNT8:
                at += 9 + int.from_bytes(data[at + 1 : at + 9], "little")
            else:
                raise Refused(f"is a pickle with the opcode {_NAMES.get(code, hex(code))}, which data do not need")
    except (IndexError, ValueError):
        raise Refused(f"ends within a value, {size - start} bytes after its start") from None


def _widths() -> tuple[list[int], dict[int, str]]:
    special = {"STOP": _STOP, "LONG_BINPUT": _PUT, "GLOBAL": _LINES}
    counts = {
        pickletools.TAKEN_FROM_ARGUMENT1: _COUNT1,
        pickletools.TAKEN_FROM_ARGUMENT4: _COUNT4,
        pickletools.TAKEN_FROM_ARGUMENT4U: _COUNT4,
        pickletools.TAKEN_FROM_ARGUMENT8U: _COUNT8,
    }
    used = _OPCODES.split()
    widths, names = [_REFUSED] * 256, {}
    for opcode in pickletools.opcodes:
        names[ord(opcode.code)] = opcode.name
        if opcode.name in used:
            width = 0 if opcode.arg is None else opcode.arg.n
            widths[ord(opcode.code)] = special.get(opcode.name, counts.get(width, width))
    return widths, names


_WIDTHS, _NAMES = _widths()
