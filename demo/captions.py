"""Captions for Fashion-MNIST images: a class name plus attributes measured from the pixels.

The embedded demo data and the teacher's training both take their captions from here.
"""

import re
from bisect import bisect

import numpy as np
from fashion_mnist import CLASS_NAMES

BACKGROUND = 20  # grey values up to this one belong to the (black) background

# A list of thresholds for the measured value, and one word more than thresholds.
TONES = ([95, 135, 165, 195], ["very dark", "dark", "grey", "light", "bright"])
WIDTHS = ([13, 18, 23], ["very slim", "slim", "medium-wide", "wide"])
HEIGHTS = ([13, 20, 26], ["flat", "low", "mid-height", "tall"])
CONTRASTS = ([40, 55], ["even shading", "some shading", "strong contrast"])
BALANCES = (
    [-12, 12],
    ["lighter at the bottom", "evenly lit from top to bottom", "lighter at the top"],
)

TEMPLATES = (
    "a photo of a {name}.",
    "a {tone} {name}.",
    "a {tone}, {width} {name}.",
    "a photo of a {tone} {name}, {surface}.",
    "a photo of a {height} {name} with {detail}.",
    "a {width} {name} with {detail}, {balance}.",
    "a {surface} {name} with {contrast}.",
    "a {tone}, {surface} {name} with {detail}.",
    "a product photo of a {tone} {name}, {balance}.",
    "a {width}, {height}, {tone} {name} with {contrast}.",
)
# For zero-shot classification: class names only, no attribute.
PROMPTS = (
    "a photo of a {name}.",
    "a product photo of a {name}.",
    "a {name}.",
    "a dark {name}.",
    "a grey {name}.",
    "a light {name}.",
)


def noun(class_name: str) -> str:
    """Return a class name as it stands inside a sentence."""
    return class_name if class_name.startswith("T-") else class_name.lower()


def _word(value: float, scale: tuple[list[int], list[str]]) -> str:
    thresholds, words = scale
    return words[bisect(thresholds, value)]


def _surface(image: np.ndarray, mask: np.ndarray) -> str:
    """Name the texture by the mean grey step between neighbours inside the garment."""
    inside = mask.copy()
    # The outline itself is a step, so only pixels whose four neighbours are garment count.
    inside[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    pairs_down, pairs_across = inside[1:] & inside[:-1], inside[:, 1:] & inside[:, :-1]
    down = float(np.abs(np.diff(image, axis=0))[pairs_down].sum() / max(pairs_down.sum(), 1))
    across = float(np.abs(np.diff(image, axis=1))[pairs_across].sum() / max(pairs_across.sum(), 1))
    if max(down, across) < 15:
        return "smooth"
    if max(down, across) < 24:
        return "lightly textured"
    if down > 1.5 * across:
        return "horizontally striped"
    if across > 1.5 * down:
        return "vertically striped"
    return "boldly patterned"


def _detail(label: int, mask: np.ndarray) -> str:
    """Name the part of the silhouette which varies most within the class."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    outline = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = outline.shape
    name = CLASS_NAMES[label]
    if name == "Trouser":
        gap = 1 - outline[height // 2 :, width // 2 - 1 : width // 2 + 1].any(axis=1).mean()
        return "separate legs" if gap > 0.3 else "legs close together"
    if name == "Bag":
        # A handle leaves the upper third mostly empty.
        return "a handle" if outline[: max(height // 3, 1)].mean() < 0.5 else "a full body"
    if name in ("Sandal", "Sneaker", "Ankle boot"):
        # A heel leaves a gap between the places where the shoe touches the ground.
        ground = np.flatnonzero(outline[-max(height // 8, 1) :].any(axis=0))
        return "a heel" if np.diff(ground).max(initial=1) > 3 else "a flat sole"
    if name == "Dress":
        waist = outline[height // 4 : height // 2].sum(axis=1).min()
        hem = outline[-height // 8 :].sum(axis=1).max()
        return "a flared hem" if hem > 1.5 * waist else "a straight hem"
    # Clothes for the upper body: how far down do the outermost columns reach?
    edge = max(width // 8, 1)
    sides = outline[:, :edge].any(axis=1) & outline[:, -edge:].any(axis=1)
    if sides.any() and np.flatnonzero(sides)[-1] < 0.6 * height:
        return "short sleeves"
    return "long sleeves" if width > 18 else "straight sides"


def attributes(image: np.ndarray, label: int) -> dict[str, str]:
    """Measure a 28x28 uint8 image and return the words which fill the templates."""
    image = image.astype(np.float32)
    mask = image > BACKGROUND
    pixels = image[mask]
    # At least two pixels in a row or column, so that a stray pixel does not count.
    rows = np.flatnonzero(mask.sum(axis=1) >= 2)
    columns = np.flatnonzero(mask.sum(axis=0) >= 2)
    middle = (rows[0] + rows[-1] + 1) // 2
    top, bottom = image[:middle][mask[:middle]], image[middle:][mask[middle:]]
    return {
        "name": noun(CLASS_NAMES[label]),
        "tone": _word(float(pixels.mean()), TONES),
        "contrast": _word(float(pixels.std()), CONTRASTS),
        "width": _word(int(columns[-1] - columns[0]) + 1, WIDTHS),
        "height": _word(int(rows[-1] - rows[0]) + 1, HEIGHTS),
        "balance": _word(float(top.mean() - bottom.mean()), BALANCES),
        "surface": _surface(image, mask),
        "detail": _detail(label, mask),
    }


def fill(template: str, words: dict[str, str]) -> str:
    """Fill a template, with "an" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", template.format(**words))


def caption(words: dict[str, str], rng: np.random.Generator) -> str:
    """Draw one template and fill it with the words of :func:`attributes`."""
    return fill(TEMPLATES[int(rng.integers(len(TEMPLATES)))], words)
