"""`milan report`: one HTML file that compares runs; it needs no server and no network.

Everything is inside: figures as JSON, pictures as data URIs, style, script, and uPlot (MIT), which
draws the curves. The page's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from milan.core.paths import AnyPath
from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes
from milan.errors import ConfigError, MilanError
from milan.images.formats import open_picture
from milan.reporting.run_files import SHEET
from milan.reports import figures
from milan.reports.pictures import TEACHER, Alike, Panels, PictureSettings, Shown, shown_of
from milan.reports.sources import Run, find_store, read_sources
from milan.store.cache import TargetCache
from milan.store.describe import describe
from milan.version import __version__

_FILES = Path(__file__).parent / "page"
_DRAWN = 12  # runs with pictures: more would make the file large
_THUMB = 96  # pixels of a neighbour
_LOSSLESS = 64  # pixels up to which a picture is kept as it is
_ASKED = 4  # images whose neighbours are shown
_MOST_BYTES = 5_000_000
_QUALITY = 85  # of JPEGs
_OWN_PICTURES = {f"{SHEET}.png": "the sheet of the run", "predictions.png": "its predictions"}


def report(
    *what: str,
    out: str | Path = "report.html",
    images: int = 6,
    compared: int = 1000,
    data_root: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a page that compares runs and shows stores: `what` are their paths, or NAME=PATH.

    The stores of runs are found by themselves where they are still at their places. `images` are
    shown of each store (0: none), and neighbours sought among `compared` of its images (0: none).
    Returns the path. Raises MilanError.
    """
    runs, stores = read_sources(what)
    if not runs and not stores:
        raise ConfigError(
            "a report of nothing",
            expected="folders of runs, or stores",
            fix="milan report runs/pretrain",
        )
    settings = PictureSettings(images=images, compared=compared, data_root=data_root, device=device)
    return write_page(Path(out), runs, stores, settings, progress)


def write_page(
    out: Path,
    runs: Sequence[Run],
    stores: Sequence[AnyPath],
    settings: PictureSettings | None = None,
    progress: Progress | None = None,
) -> Path:
    """The page of these runs, and of `stores` with those of the runs. Raises MilanError."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}", expected="a name that ends with .html",
                          fix=f"--out {out.with_suffix('.html').name}")  # fmt: skip
    progress, settings = progress or NoProgress(), settings or PictureSettings()
    groups, notes = _by_store(runs, stores)
    shown = []
    for cache, its_runs in groups if settings.images else []:
        drawn = its_runs[:_DRAWN]
        if len(drawn) < len(its_runs):
            notes.append(f"Pictures are shown of the first {_DRAWN} of {len(its_runs)} runs.")
        try:
            shown.append(shown_of(cache, drawn, settings, progress))
        except MilanError as error:
            notes.append(f"No pictures of {cache.path}: {error.found}")
    for one in shown:
        notes += one.missing
    caches, images = [cache for cache, _ in groups], settings.images
    while len(data := _render(runs, caches, shown, notes)) > _MOST_BYTES and images:
        progress.note(f"{format_bytes(len(data))} with {images} images: half as many are shown")
        images //= 2
        shown = [one.first(images) for one in shown] if images else []
    _write(out, data)
    return out


def _by_store(
    runs: Sequence[Run], stores: Sequence[AnyPath]
) -> tuple[list[tuple[TargetCache, list[tuple[Run, TargetCache]]]], list[str]]:
    """(each store with the runs on it, and it as they know it; what is missing, in words)."""
    groups: dict[tuple[str, str], tuple[TargetCache, list[tuple[Run, TargetCache]]]] = {}
    notes = []
    for run in runs:
        if not run.pretrained:
            continue
        known = find_store(run, stores)
        if isinstance(known, str):
            notes.append(f"{run.name}: no pictures, for {known}. Name it: milan report … STORE")
            continue
        whole = TargetCache(known.path, layer=known.layer)
        place = str(known.path.resolve()) if isinstance(known.path, Path) else str(known.path)
        groups.setdefault((place, known.layer), (whole, []))[1].append((run, known))
    for path in stores:
        place = str(path.resolve()) if isinstance(path, Path) else str(path)
        if place not in {place for place, _ in groups}:
            cache = TargetCache(path)
            groups[place, cache.layer] = (cache, [])
    return list(groups.values()), notes


def _write(out: Path, data: bytes) -> None:
    """Write the page whole. Raises ConfigError if it cannot be written."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror}",
            expected="a file's name, on a disk with room",
            fix="another --out",
        ) from None


# --- the page -------------------------------------------------------------------------------------


def _render(
    runs: Sequence[Run], stores: list[TargetCache], shown: list[Shown], notes: list[str]
) -> bytes:
    import jinja2

    differ, every = figures.settings_tables(runs)
    paths = dict.fromkeys(str(cache.path) for cache in stores)
    numbers = {run.name: at for at, run in enumerate(runs)}
    loader = jinja2.FileSystemLoader(_FILES)
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = page.get_template("report.html.j2").render(
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=[{"number": at, "name": run.name} for at, run in enumerate(runs)],
        notes=notes,
        overview=figures.overview(runs) if runs else None,
        charts=figures.charts(runs),
        names=[run.name for run in runs],
        evaluations=figures.evaluation_tables(runs),
        differ=differ,
        settings=every,
        commands=figures.commands(runs),
        shown=[_pictures(one, numbers) for one in shown],
        own_pictures=_own_pictures(runs, shown),
        stores=[{"path": path, "tables": describe(path)} for path in paths],
        costs=figures.cost_tables(runs, stores),
        style=_inline("report.css") + _inline("uPlot.min.css"),
        licence=_inline("uPlot.LICENSE"),
        uplot=_inline("uPlot.iife.min.js"),
        script=_inline("report.js"),
    )
    return text.encode("utf-8", "backslashreplace")  # names that are no Unicode


def _inline(name: str) -> Any:
    """A file of ours, put into the page as it is."""
    from markupsafe import Markup

    return Markup((_FILES / name).read_text(encoding="utf-8"))


def _pictures(shown: Shown, numbers: dict[str, int]) -> dict[str, Any]:
    """The pictures of a store as the template takes them."""
    every = (panels for of in shown.students.values() for panels in of)
    cosines = [panels.cosine for panels in every if panels.cosine is not None]
    low = min((float(np.nanpercentile(c, 1)) for c in cosines), default=0.0)
    high = max((float(np.nanpercentile(c, 99)) for c in cosines), default=1.0)
    images = []
    for i, caption in enumerate(shown.captions):
        parts = [("view", shown.pixels[i], "the pixels that the teacher saw")]
        if shown.attention is not None and shown.target is not None:
            parts += [
                ("attention", shown.attention[i], "the teacher's, of the class token"),
                ("target", shown.target[i], "the teacher's patches by colour"),
            ]
        panels = [_panel(*part, caption) for part in parts]
        groups: list[dict[str, Any]] = [
            {"run": None, "name": "teacher", "below": "", "panels": panels}
        ]
        for run, of in shown.students.items():
            for student in of:
                groups.append(_predicted(student, i, run, numbers[run], caption, (low, high)))
        images.append({"caption": caption, "groups": groups})
    return {
        "title": str(shown.cache.path),
        "layer": shown.cache.layer if len(shown.cache.layers) > 1 else "",
        "images": images,
        "origin": shown.origin,
        "several": any(len(of) > 1 for of in shown.students.values()),
        "trained_on": shown.trained_on,
        "scale": None if not cosines else {
            "low": f"{low:.2f}", "high": f"{high:.2f}",
            "bar": _uri(_heat(np.linspace(low, high, 64)[None], low, high)),
        },
        "neighbours": _neighbours(shown, numbers),
    }  # fmt: skip


def _predicted(
    student: Panels, image: int, run: str, number: int, caption: str, scale: tuple[float, float]
) -> dict[str, Any]:
    """What a run's student predicts of one teacher for an image; cosines coloured by `scale`."""
    name = f"{run}, {student.teacher}" if student.teacher else run
    panels = []
    if student.target is None:  # seen with the first teacher's
        panels.append(_panel("input", student.visible[image], f"what {run} sees", caption))
    else:
        what = f"the patches of {student.teacher} by colour"
        panels.append(_panel("target", student.target[image], what, caption))
    panels.append(_panel("prediction", student.predicted[image], f"what {name} predicts", caption))
    mean = student.mean_cosine(image)
    below = "" if mean is None else f"cosine {mean:.3f} over masked patches"
    if student.cosine is not None:
        label = f"cosine to the target, {name}"
        label += "" if mean is None else f": {mean:.3f} over masked patches"
        panels.append(_panel("cosine", _heat(student.cosine[image], *scale), label, caption))
    return {"run": number, "name": name, "below": below, "panels": panels}


def _neighbours(shown: Shown, numbers: dict[str, int]) -> dict[str, Any] | None:
    """The nearest images of the first shown ones, and how teacher and students agree."""
    if shown.bank is None or not shown.alike:
        return None
    bank, captions = shown.bank, shown.bank_captions
    thumbs: dict[int, dict[str, Any]] = {}

    def thumb(place: int) -> dict[str, Any]:
        if place not in thumbs:
            picture = Image.fromarray(bank[place])
            picture.thumbnail((_THUMB, _THUMB))
            uri = _uri(np.asarray(picture))
            thumbs[place] = {"uri": uri, "what": captions[place]}
        return thumbs[place]

    def near(alike: Alike, i: int) -> list[dict[str, Any]]:
        pairs = zip(alike.places[i].tolist(), alike.cosines[i].tolist(), strict=True)
        classes = shown.bank_classes
        return [
            {
                **thumb(place),
                "cosine": f"{cosine:.2f}",
                "same": bool(classes[i] >= 0 and classes[place] == classes[i]),
            }
            for place, cosine in pairs
            if place >= 0
        ]

    teachers = list(dict.fromkeys(key for one in shown.alike.values() for key in one.shared))

    def named(key: str) -> str:
        """Of a run or a teacher; a teacher that is alone needs no name."""
        return key or f"teacher {shown.teacher}".strip()

    asked = [
        {
            **thumb(i),
            "caption": shown.captions[i],
            "of": [
                {"run": numbers.get(name), "name": named(name), "near": near(alike, i)}
                for name, alike in shown.alike.items()
            ],
        }
        for i in range(min(_ASKED, len(shown.captions)))
    ]
    rows = []
    for name, alike in shown.alike.items():
        cells = [figures.Cell(named(name))]
        for teacher in teachers or [TEACHER]:
            shared = alike.shared.get(teacher)
            cell = figures.number(shared and shared[0], "{:.0f} %")
            if shared:
                cell = figures.Cell(cell.text, cell.sort, "{1:.0f}–{2:.0f}".format(*shared))
            cells.append(cell)
        cells.append(figures.number(alike.same_class, "{:.0f} %"))
        rows.append(figures.Row(cells, numbers.get(name)))
    table = figures.Grid(
        "Ten nearest images",
        [
            "by",
            *(f"shared with the {named(teacher)}" for teacher in teachers or [TEACHER]),
            "of the image's class",
        ],
        rows,
    )
    return {
        "count": len(bank), "asked": asked, "table": table, "teacher": TEACHER in shown.alike,
        "several": len(teachers) > 1,
        "classes": bool((shown.bank_classes >= 0).any()),
    }  # fmt: skip


def _own_pictures(runs: Sequence[Run], shown: list[Shown]) -> list[dict[str, Any]]:
    """Pictures that runs drew themselves, of runs whose students are not shown."""
    students = {name for one in shown for name in one.students}
    pictures = []
    for at, run in enumerate(runs[:_DRAWN]):
        for file, what in _OWN_PICTURES.items():
            if run.name not in students and (run.folder / file).is_file():
                try:
                    picture = open_picture((run.folder / file).read_bytes())
                    pixels = np.asarray(picture.convert("RGB"))
                except OSError:
                    continue  # it is drawn anew in the next epoch
                pictures.append(
                    {"run": at, "name": run.name, "what": what, "uri": _uri(pixels),
                     "alt": f"{what}: {run.name}"}
                )  # fmt: skip
    return pictures


def _panel(name: str, pixels: np.ndarray, what: str, caption: str) -> dict[str, Any]:
    return {"name": name, "uri": _uri(pixels), "alt": f"{name}: {what}; {caption}"}


def _heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Cosines [g, g'] as colours, uint8 [g, g', 3]: dark is low, yellow high."""
    import matplotlib

    scaled = ((values - low) / max(high - low, 1e-6)).clip(0, 1)
    return (255 * matplotlib.colormaps["inferno"](scaled)[..., :3]).round().astype(np.uint8)


def _uri(pixels: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as a data URI: small ones as PNG, others as JPEG."""
    file, small = io.BytesIO(), max(pixels.shape[:2]) <= _LOSSLESS
    if small:
        Image.fromarray(pixels).save(file, format="png", optimize=True)
    else:
        Image.fromarray(pixels).save(file, format="jpeg", quality=_QUALITY)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
