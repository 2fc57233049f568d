"""Draw strips of frames and masks (see `strips`) into one PNG, set in whole pixels.

Images are pasted unresampled, so that enlarged pixels stay crisp; text is drawn over them by matplotlib.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from fewref.benchmark.strips import Band, Section, Strip, collect
from fewref.episodes.errors import InputError, write_atomic
from fewref.episodes.readers import DatasetIndex

TRUTH, ANSWER = (0, 145, 255), (255, 95, 0)  # blue and orange, which the colour-blind tell apart too
BLACK, GREY, PAPER, CARD = (20, 20, 20), (105, 105, 105), (255, 255, 255), (243, 244, 246)
TINT, FADE, OUTLINE = 0.2, 0.45, 4  # share of colour inside a mask, of white outside; pixels of the line
TILE = (240, 320)  # height and width in pixels that a frame is fitted into
LABELS, GAP, MARGIN, LEAST_WIDTH = 256, 8, 24, 900
TITLE, BODY, SMALL = 34, 26, 20  # text sizes in pixels
DPI, POINTS = 64, 72  # a power of two: whole pixels stay whole
LIMIT = 1 << 16  # the rasteriser's, on either side
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei")
FONTS = (*FONTS, "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Noto Sans Devanagari")


def write_picture(
    path: Path,
    folders: Sequence[Path],
    indexes: Mapping[str, DatasetIndex],
    *,
    frames: int = 4,
    scoring: str | None = None,
) -> Path:
    """Write a PNG of one query per manifest with the masks of every run; equal runs give equal bytes.

    folders: run folders, finished or not; those that share a manifest make a strip, methods and strips in this order.
    indexes: dataset name -> its index. frames: shown per clip, at most. scoring: the protocol whose J and F are
    printed; None takes the first that all runs have. Which query is shown: see `fewref.benchmark.strips.choose`.
    Raises InputError for a folder without a run or without predictions, runs without a common finished query, a
    missing or other dataset, a scoring protocol that a run lacks and a place that cannot be written.
    """
    strips, caption = collect(folders, indexes, frames, scoring)
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
        canvas = FigureCanvasAgg(draw(strips, caption))
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    write_atomic(path, data.getvalue())
    return Path(path)


def fit(height: int, width: int) -> tuple[int, int]:
    """Size at which a frame is shown: enlarged by a whole number or reduced to fit `TILE`."""
    factor = min(TILE[0] / height, TILE[1] / width)
    factor = int(factor) if factor >= 1 else factor
    return max(1, round(height * factor)), max(1, round(width * factor))


def overlay(frame: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """A frame at its shown size: the mask tinted and outlined in full colour with a dark rim, the rest faded to white.

    The fading shows the mask on objects that have the outline's colour themselves, and leaves all colours to be told.
    frame: uint8 (3,H,W); mask: bool (H,W). Returns uint8 (h,w,3), (h,w) = `fit(H, W)`. Enlarged pixels stay squares;
    in a reduced mask a pixel is set where at least half of it was, or, if that leaves nothing, wherever it was touched.
    """
    height, width = fit(*mask.shape)
    pixels = frame.transpose(1, 2, 0)
    if height >= mask.shape[0] and width >= mask.shape[1]:
        factor = height // mask.shape[0]
        pixels, mask = (array.repeat(factor, axis=0).repeat(factor, axis=1) for array in (pixels, mask))
    else:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
        cover = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        cover = np.asarray(cover)
        mask = cover >= 0.5 if (cover >= 0.5).any() else cover > 0
    around = np.ones((3, 3), bool)
    tinted = (1 - TINT) * pixels + TINT * np.array(colour)
    faded = (1 - FADE) * pixels + FADE * np.array(PAPER)
    shown = np.where(mask[..., None], tinted, faded)
    shown[mask & ~binary_erosion(mask, around, iterations=OUTLINE)] = colour
    shown[binary_dilation(mask, around) & ~mask] = BLACK
    return shown.round().astype(np.uint8)


@dataclass(frozen=True)
class Words:
    """One line of text; x: left end, y: base line, both in pixels from the top left; size: in pixels."""

    x: int
    y: int
    text: str
    size: int
    bold: bool = False
    colour: tuple[int, int, int] = BLACK


@dataclass
class Sheet:
    """Images (x, y, uint8 (h,w,3)) and words that are being set from the top down; y: where the next goes."""

    images: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    words: list[Words] = field(default_factory=list)
    y: int = 0

    def write(self, x: int, y: int, lines: Sequence[str], size: int, **style: object) -> int:
        """Set lines below y; returns where the last one ends."""
        for line in lines:
            self.words.append(Words(x, y + size, line, size, **style))
            y += round(1.35 * size)
        return y


def draw(strips: Sequence[Strip], caption: str) -> Figure:
    """All strips as cards, two abreast where there are several, and the caption at the foot. Raises InputError."""
    measure = _measure()
    columns = min(2, len(strips))
    inner = max(_width(strip) for strip in strips)
    page, outer = Sheet(y=MARGIN), inner + 2 * MARGIN
    width = MARGIN + columns * (outer + MARGIN)
    for start in range(0, len(strips), columns):
        cards = [_set_strip(strip, inner, measure) for strip in strips[start : start + columns]]
        height = max(card.y for card in cards) + 2 * MARGIN
        for column, card in enumerate(cards):
            x, y = MARGIN + column * (outer + MARGIN), page.y
            page.images.append((x, y, np.broadcast_to(np.array(CARD, np.uint8), (height, outer, 3))))
            page.images += [(x + MARGIN + left, y + MARGIN + top, image) for left, top, image in card.images]
            page.words += [replace(word, x=x + MARGIN + word.x, y=y + MARGIN + word.y) for word in card.words]
        page.y += height + MARGIN
    lines = wrap(caption, width - 2 * MARGIN, lambda text: measure(text, SMALL, False))
    page.y = page.write(MARGIN, page.y, lines, SMALL, colour=GREY) + MARGIN
    if max(width, page.y) >= LIMIT:
        raise InputError(f"the picture would be {page.y} x {width} pixels, which is too large; give fewer runs")
    return _figure(page, width)


def wrap(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Lines no wider than `width`: broken between words, and inside a word only where it alone is too wide."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if measure(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            fits = not lines[-1] or measure(lines[-1] + letter) <= width
            lines = [*lines[:-1], lines[-1] + letter] if fits else [*lines, letter]
    return lines


def _width(strip: Strip) -> int:
    widths = [len(part.positions) * (_column(part) + GAP) - GAP for part in strip.sections]
    return max(LEAST_WIDTH, LABELS + max(widths))


def _column(section: Section) -> int:
    return max(fit(*band.masks.shape[1:])[1] for band in section.bands)


def _set_strip(strip: Strip, width: int, measure: Callable[[str, int, bool], float]) -> Sheet:
    sheet = Sheet()

    def put(x: int, text: str, size: int, bold: bool = False, colour: tuple[int, int, int] = BLACK) -> None:
        lines = wrap(text, width - x, lambda part: measure(part, size, bold))
        sheet.y = sheet.write(x, sheet.y, lines, size, bold=bold, colour=colour)

    put(0, strip.title, TITLE, bold=True)
    put(0, strip.subtitle, SMALL, colour=GREY)
    for section in strip.sections:
        sheet.y += 3 * GAP
        sheet.write(0, sheet.y, [section.heading], BODY, bold=True)
        put(LABELS, f"“{section.sentence.strip()}”" if section.sentence.strip() else "(no sentence)", BODY)
        for number, place in enumerate(section.positions):
            x = LABELS + number * (_column(section) + GAP)
            sheet.write(x, sheet.y, [f"frame {place + 1} of {section.total}"], SMALL, colour=GREY)
        sheet.y += round(1.5 * SMALL)
        for band in section.bands:
            _set_band(sheet, band, measure)
    return sheet


def _set_band(sheet: Sheet, band: Band, measure: Callable[[str, int, bool], float]) -> None:
    height, width = fit(*band.masks.shape[1:])
    colour = ANSWER if band.score else TRUTH
    for number, (frame, mask) in enumerate(zip(band.frames, band.masks, strict=True)):
        place = LABELS + number * (width + GAP), sheet.y
        sheet.images.append((*place, overlay(frame, mask, colour)))
    x, end = 2 * GAP, sheet.y
    head = [(text, BODY) for text in (band.label, band.score) if text]
    for text, size in (*head, *((note, SMALL) for note in band.notes)):
        bold = size == BODY
        lines = wrap(text, LABELS - x - GAP, lambda part, size=size, bold=bold: measure(part, size, bold))
        end = sheet.write(x, end, lines, size, bold=bold)
    bottom = max(sheet.y + height, end)
    sheet.images.append((0, sheet.y, np.broadcast_to(np.array(colour, np.uint8), (bottom - sheet.y, GAP, 3))))
    sheet.y = bottom + GAP


def _families() -> list[str]:
    return [name for name in FONTS if name in set(fontManager.get_font_names())]


def _measure() -> Callable[[str, int, bool], float]:
    """A function (text, size in pixels, bold) -> width in pixels."""
    renderer, families = RendererAgg(8, 8, DPI), _families()

    def width(text: str, size: int, bold: bool) -> float:
        weight = "bold" if bold else "normal"
        font = FontProperties(family=families, size=size * POINTS / DPI, weight=weight)
        return renderer.get_text_width_height_descent(text, font, False)[0]

    return width


def _figure(page: Sheet, width: int) -> Figure:
    canvas = np.full((page.y, width, 3), PAPER, np.uint8)
    for x, y, image in page.images:
        canvas[y : y + len(image), x : x + image.shape[1]] = image
    figure = Figure(figsize=(width / DPI, page.y / DPI), dpi=DPI)
    figure.figimage(canvas, origin="upper")
    families = _families()
    for word in page.words:
        figure.text(
            word.x,
            page.y - word.y,
            word.text,
            transform=None,
            verticalalignment="baseline",
            fontfamily=families,
            fontsize=word.size * POINTS / DPI,
            fontweight="bold" if word.bold else "normal",
            color=np.array(word.colour) / 255,
            parse_math=False,
        )
    return figure
