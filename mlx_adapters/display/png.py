"""Charts as PNG: everything, letters included, is drawn as strokes with smooth edges."""

import struct
import zlib

import numpy as np

from mlx_adapters.display.layout import INK, Box, Chart, Curve, Dot, Label, Mark, Points, Rule

SCALE = 2  # pixels per unit of the layout: sharp on screens of high density
# Letters as strokes on a grid: two digits a point (across, down), a space between strokes. The top of a capital
# is at 0, of an x at 2, the baseline at 6, the lowest point of a g at 8.
GLYPHS = {
    "0": "102031352616050110",
    "1": "011016",
    "2": "01103041420646",
    "3": "011030414233 13334445361605",
    "4": "36300444",
    "5": "400002324345361605",
    "6": "413010010516364544331304",
    "7": "004016",
    "8": "103041423313020110 1304051636454433",
    "9": "051636454130100102133342",
    "a": "4332120305163645 4246",
    "b": "0006 0312324345361605",
    "c": "4332120305163645",
    "d": "4046 4332120305163645",
    "e": "04444332120305163645",
    "f": "30201116 0232",
    "g": "4332120305163645 4247381807",
    "h": "0006 0312324346",
    "i": "0206 0000",
    "j": "121708 1010",
    "k": "0006 320436",
    "l": "0006",
    "m": "0206 03122326 23324346",
    "n": "0206 0312324346",
    "o": "123243453616050312",
    "p": "0208 0312324345361605",
    "q": "4248 4332120305163645",
    "r": "0206 031232",
    "s": "43321203143445361605",
    "t": "10152636 0232",
    "u": "0205163645 4246",
    "v": "022642",
    "w": "0216233642",
    "x": "0246 0642",
    "y": "0226 421808",
    "z": "02420646",
    "A": "062046 1434",
    "B": "06003041423303 3344453606",
    "C": "4130100105163645",
    "D": "00204244260600",
    "E": "40000646 0333",
    "F": "400006 0333",
    "G": "41301001051636454323",
    "H": "0006 4046 0343",
    "I": "0006",
    "J": "3035261605",
    "K": "0006 400346",
    "L": "000646",
    "M": "0600234046",
    "N": "06004640",
    "O": "103041453616050110",
    "P": "06003041423303",
    "Q": "103041453616050110 2446",
    "R": "06003041423303 2346",
    "S": "413010010213334445361605",
    "T": "0040 2026",
    "U": "000516364540",
    "V": "002640",
    "W": "0016233640",
    "X": "0046 0640",
    "Y": "002340 2326",
    "Z": "00400646",
    ".": "0606",
    ",": "1607",
    ":": "0303 0606",
    "-": "0434",
    "_": "0747",
    "+": "0444 2226",
    "=": "0343 0545",
    "/": "0640",
    "@": "361605011030414434322224 2434",
    "[": "20000626",
    "]": "00202606",
    "(": "10020416",
    ")": "00121406",
    "%": "0640 0010110100 3545463635",
    "±": "0444 2226 0747",
    "…": "0606 2626 4646",
    "'": "0001",
    "?": "0110304142232425 2626",
    "!": "0004 0606",
    "|": "0006",
    "<": "412345",
    ">": "012305",
    "~": "0413233343",
    "#": "1116 3136 0343 0545",
    "*": "2024 0143 0341",
    " ": "",
}
UNKNOWN = "0040460600"


def picture(chart: Chart) -> bytes:
    """A PNG of a chart on white, twice as many pixels each way."""
    canvas = np.ones((chart.height * SCALE, chart.width * SCALE, 3))
    for mark in chart.marks:
        _draw(canvas, mark)
    return _file(np.round(canvas * 255).astype(np.uint8))


def _draw(canvas: np.ndarray, mark: Mark) -> None:
    match mark:
        case Rule():
            _stroke(canvas, [[mark.start, mark.end]], mark.width, mark.color, mark.opacity)
        case Curve():
            _stroke(canvas, [mark.points], 2, mark.color)
            if mark.dots:
                _stroke(canvas, [[point] for point in mark.points], 5, mark.color)
        case Box():
            x0, y0, wide, high = (SCALE * v for v in (*mark.place, mark.width, mark.height))
            part = canvas[round(y0) : round(y0 + high), round(x0) : max(round(x0 + wide), round(x0) + 1)]
            _blend(part, np.ones(part.shape[:2]), mark.color, mark.opacity)
        case Dot():
            _stroke(canvas, [[mark.center]], 2 * mark.radius, mark.color, mark.opacity)
        case Label():
            _stroke(canvas, _letters(mark), mark.size / (6 if mark.bold else 9), INK)


def _letters(label: Label) -> list[Points]:
    """The strokes of a label at its place."""
    unit, across, strokes = 0.11 * label.size, 0.0, list[Points]()
    for character in label.text:
        glyph = GLYPHS.get(character, UNKNOWN)
        lines = [[(int(part[i]), int(part[i + 1])) for i in range(0, len(part), 2)] for part in glyph.split()]
        strokes += [[(across + x, float(y - 6)) for x, y in line] for line in lines]
        across += max((x for line in lines for x, _ in line), default=1) + 2
    shift = {"start": 0.0, "middle": (across - 2) / 2, "end": across - 2}[label.anchor]
    (x0, y0), narrow = label.place, 0.9 * unit  # as wide as a letter of an SVG
    if label.turned:
        return [[(x0 + y * unit, y0 - (x - shift) * narrow) for x, y in line] for line in strokes]
    return [[(x0 + (x - shift) * narrow, y0 + y * unit) for x, y in line] for line in strokes]


def _stroke(canvas: np.ndarray, lines: list[Points], width: float, color: str, opacity: float = 1.0) -> None:
    """Blend lines with round ends into the canvas. A pixel's share of ink follows from its distance."""
    if not lines:
        return
    paths, radius = [np.array(line) * SCALE for line in lines], width * SCALE / 2
    every = np.concatenate(paths)
    low = np.maximum(np.floor(every.min(axis=0) - radius - 1), 0).astype(int)
    high = np.ceil(every.max(axis=0) + radius + 1).astype(int)
    part = canvas[low[1] : high[1], low[0] : high[0]]  # all that is touched
    ink = np.zeros(part.shape[:2])
    for points in paths:
        for a, b in zip(points, points[1:] if len(points) > 1 else points, strict=False):
            _ink_segment(ink, a - low, b - low, radius)
    _blend(part, ink, color, opacity)


def _blend(canvas: np.ndarray, ink: np.ndarray, color: str, opacity: float) -> None:
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    share = (ink * opacity)[..., None]
    canvas[:] = canvas * (1 - share) + rgb * share


def _ink_segment(ink: np.ndarray, a: np.ndarray, b: np.ndarray, radius: float) -> None:
    low = np.maximum(np.floor(np.minimum(a, b) - radius - 1), 0).astype(int)
    high = np.ceil(np.maximum(a, b) + radius + 1).astype(int)
    box = ink[low[1] : high[1], low[0] : high[0]]
    y, x = np.mgrid[low[1] : low[1] + box.shape[0], low[0] : low[0] + box.shape[1]] + 0.5
    along = b - a
    t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / max(along @ along, 1e-12), 0, 1)
    distance = np.hypot(x - a[0] - t * along[0], y - a[1] - t * along[1])
    np.maximum(box, np.clip(radius + 0.5 - distance, 0, 1), out=box)


def _file(pixels: np.ndarray) -> bytes:
    """(height, width, 3) bytes as a PNG file: each line behind a 0, which says that it is stored as it is."""
    height, width, _ = pixels.shape
    lines = np.pad(pixels.reshape(height, 3 * width), ((0, 0), (1, 0))).tobytes()
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(lines, 9),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
