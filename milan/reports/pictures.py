"""What students predict for the same images, beside their targets; which images they find alike.

All runs of a store are shown the same images, of those that none was trained on, if there are any.
B images, N patches, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from milan.core.device import MEAN, STD, normalise, pick_device
from milan.core.progress import Progress
from milan.data.dataset import CachedDataset, OwnChannels
from milan.data.loader import CachedBatches
from milan.data.sampler import Address, Kind
from milan.errors import MilanError
from milan.models.student import Student
from milan.objectives.base import Objective
from milan.reporting.panels import (
    Colours,
    as_bytes,
    attention_column,
    caption_of,
    class_tokens,
    patch_features,
    to_grid,
    visible_column,
)
from milan.reports.sources import Run
from milan.store.cache import TargetCache
from milan.store.joined import JoinedCache, short_names
from milan.training.build import run_order
from milan.training.channels import kept_channels
from milan.training.trained import config_of, load_trained
from milan.training.validation import sheet_inputs

_AT_ONCE = 32  # images whose features are computed together
_COMPARED = 10  # neighbours that teacher and student are compared by
_ASKED = 256  # images whose neighbours are compared, at most


@dataclass(frozen=True)
class PictureSettings:
    """How much is shown of each store, and what it takes."""

    images: int = 6
    """Images shown; 0: none."""
    compared: int = 1000
    """Images among which neighbours are sought; 0: none."""
    near: int = 6
    """Neighbours shown of an image."""
    data_root: str | None = None
    """Where the images lie, if not where the store says."""
    device: str = "auto"


@dataclass(frozen=True)
class Panels:
    """B images as one student saw them, and predicted one teacher."""

    visible: np.ndarray
    """[B, H, W, 3] uint8, masked patches in grey."""
    predicted: np.ndarray
    """[B, g, g, 3] uint8 in the colours of the target, a cell a patch; or the pixels predicted."""
    cosine: np.ndarray | None
    """[B, g, g] between prediction and target, not a number where nothing is learnt; None for
    targets that are no features."""
    masked: np.ndarray
    """[B, g, g] bool"""
    teacher: str = ""
    """Of several teachers the name of the one that is predicted."""
    target: np.ndarray | None = None
    """[B, g, g, 3] uint8, the patches of a teacher that is not the store's first, by colour."""

    def first(self, count: int) -> Panels:
        """Of so many images."""
        arrays: dict[str, Any] = {
            name: of[:count] for name, of in vars(self).items() if isinstance(of, np.ndarray)
        }
        return replace(self, **arrays)

    def mean_cosine(self, image: int) -> float | None:
        """Over the masked patches of an image; None where they are not learnt."""
        if self.cosine is None or not self.masked[image].any():
            return None
        values = self.cosine[image][self.masked[image]]
        return None if np.isnan(values).any() else float(values.mean())


@dataclass(frozen=True)
class Alike:
    """The nearest images of each shown one, by one network."""

    places: np.ndarray
    """[B, n] int64: places in Shown.bank, the nearest first; -1: nobody."""
    cosines: np.ndarray
    """[B, n]; NOBODY where there is none"""
    same_class: float | None
    """Percent of ten neighbours that are of the image's class, over images whose class has others;
    None without such."""
    shared: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Percent of ten neighbours that are a teacher's too, with its 95 % interval; of students, by
    the teacher's key."""


@dataclass
class Shown:
    """What is shown of a store and of the runs on it."""

    cache: TargetCache
    runs: list[Run]
    captions: list[str]
    pixels: np.ndarray
    """[B, H, W, 3] uint8: view 0 of each image."""
    attention: np.ndarray | None
    """[B, H, W, 3] uint8, on the views; None for a store without targets."""
    target: np.ndarray | None
    """[B, g, g, 3] uint8, the teacher's patches by colour."""
    origin: str
    """What colours are fitted to."""
    trained_on: list[str]
    """Names of the runs that were trained on these images."""
    students: dict[str, list[Panels]] = field(default_factory=dict)
    """By the name of the run: one for each of its teachers."""
    bank: np.ndarray | None = None
    """[m, H, W, 3] uint8: the images among which neighbours were sought, view 0."""
    bank_captions: list[str] = field(default_factory=list)
    bank_classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[m] int64, -1 where unknown."""
    alike: dict[str, Alike] = field(default_factory=dict)
    """By the name of the run; of teachers by TEACHER, and `teacher NAME` of further ones."""
    teacher: str = ""
    """The first teacher's name, where a run has several."""
    missing: list[str] = field(default_factory=list)
    """What could not be shown, and why: a sentence each."""

    def first(self, count: int) -> Shown:
        """Of so many images; neighbours as they are."""
        return replace(
            self, captions=self.captions[:count], pixels=self.pixels[:count],
            attention=None if self.attention is None else self.attention[:count],
            target=None if self.target is None else self.target[:count],
            students={
                name: [panels.first(count) for panels in of] for name, of in self.students.items()
            },
        )  # fmt: skip


TEACHER = ""
"""The key of the first teacher's neighbours, which no run is called."""
NOBODY = -2.0
"""In place of a cosine: no image."""


def shown_of(
    cache: TargetCache,
    runs: list[tuple[Run, TargetCache]],
    settings: PictureSettings,
    progress: Progress,
) -> Shown:
    """The pictures of a store, and of each run on it, with the store as the run knows it.

    Raises MilanError if images or targets cannot be read; a student that cannot be loaded is
    `missing`.
    """
    device = pick_device(settings.device)
    rows, trained_on = _rows(cache, runs, settings.images)
    first = np.zeros_like(rows)
    dataset = CachedDataset(cache, data_root=settings.data_root)
    pixels = dataset.pixels(rows, first)
    attention = target = colours = None
    if cache.spec.has_targets:
        colours = Colours.of_store(cache)
        attention = attention_column(pixels, cache.read(rows, first, features=False).attention)
        target = as_bytes(colours(patch_features(cache, rows, first), cache.view_spec.size))
    shown = Shown(
        cache, [run for run, _ in runs], [caption_of(dataset, row, 0) for row in rows.tolist()],
        pixels, None if attention is None else attention.panels, target,
        colours.origin if colours else "", trained_on,
    )  # fmt: skip
    bank = _Bank(shown, dataset, rows, settings, device, progress) if settings.compared else None
    for run, known in runs:
        try:
            student, objective = load_trained(run.folder, known, device, progress)
            inside = CachedDataset(known, data_root=settings.data_root)
            inside.channels = kept_channels(run.folder, inside)
            shown.students[run.name] = _panels(student, objective, inside, rows, colours, device)
        except (MilanError, OSError) as error:  # one that is gone: a run may be writing now
            why = getattr(error, "found", error)
            shown.missing.append(f"{run.name}: no predictions and no neighbours ({why})")
            continue
        if bank:
            bank.add(run.name, student, inside.channels, bank.teachers_of(known))
    return shown


def _rows(
    cache: TargetCache, runs: list[tuple[Run, TargetCache]], count: int
) -> tuple[np.ndarray, list[str]]:
    """(rows to show, names of the runs that were trained on them)."""
    held_out = {
        run.name: run_order(config_of(run.folder), known).validation_rows for run, known in runs
    }
    common = cache.good_rows()
    for rows in held_out.values():
        common = common[np.isin(common, rows)]
    if not len(common):  # of other seeds, or none is held out
        some = [rows for rows in held_out.values() if len(rows)]
        common = some[0] if some else cache.good_rows()
    rows = common[:count]
    return rows, [
        name for name, validation in held_out.items() if not np.isin(rows, validation).all()
    ]


def _panels(
    student: Student,
    objective: Objective,
    dataset: CachedDataset,
    rows: np.ndarray,
    colours: Colours | None,
    device: torch.device,
) -> list[Panels]:
    """The predictions of a student for view 0 of `rows`, masked as in its validation, of each of
    its teachers; `colours` are those of the first."""
    source = CachedBatches(
        dataset, objective.config.seed, objective.needs_features, student.patches,
        objective.needs_tokens, objective.needs_texts,
    )  # fmt: skip
    batch = source.load(Address(Kind.PICTURE, 0, rows, np.zeros_like(rows)))
    with torch.inference_mode():
        seen = sheet_inputs(student, objective, batch.to(device))
    visible = visible_column(seen.pixels, seen.masked).panels
    shape = (seen.pixels.shape[1], seen.pixels.shape[2])
    masked = to_grid(seen.masked, shape)
    if seen.features is None:
        return [Panels(visible, seen.prediction, None, masked)]
    parts = dataset.cache.parts
    widths = [part.spec.channels for part in parts]
    if seen.features.shape[2] != sum(widths):  # no features of a store
        widths, colours = [seen.features.shape[2]], None
    names = short_names(dataset.cache) if len(widths) > 1 else [""]
    ends = np.cumsum(widths)[:-1]
    pairs = (np.split(tokens, ends, axis=2) for tokens in (seen.features, seen.prediction))
    panels = list[Panels]()
    for name, target, predicted in zip(names, *pairs, strict=True):
        own = colours if colours is not None and not panels else Colours(target)
        ours, theirs = (torch.from_numpy(part).float() for part in (target, predicted))
        cosine = F.cosine_similarity(ours, theirs, dim=-1).numpy()
        panels.append(Panels(
            visible, as_bytes(own(predicted, shape)), to_grid(cosine, shape), masked, name,
            as_bytes(own(target, shape)) if panels else None,
        ))  # fmt: skip
    return panels


# --- neighbours -----------------------------------------------------------------------------------


class _Bank:
    """View 0 of some images of a store, the shown ones first, and who is near whom."""

    def __init__(
        self,
        shown: Shown,
        dataset: CachedDataset,
        rows: np.ndarray,
        settings: PictureSettings,
        device: torch.device,
        progress: Progress,
    ) -> None:
        good, cache = dataset.good, dataset.cache
        others = good[~np.isin(good, rows)][: max(0, settings.compared - len(rows))]
        self.rows, self.asked, self.near = np.concatenate([rows, others]), len(rows), settings.near
        self.shown, self.device, self.progress = shown, device, progress
        parts = [self.rows[at : at + _AT_ONCE] for at in range(0, len(self.rows), _AT_ONCE)]
        shown.bank = np.concatenate([dataset.pixels(p, np.zeros_like(p)) for p in parts])
        shown.bank_captions = [caption_of(dataset, row, 0) for row in self.rows.tolist()]
        self.labels = shown.bank_classes = dataset.labels[self.rows]
        self.ten: dict[str, np.ndarray] = {}
        """Of each teacher, by its key: the ten nearest of each image, [a, 10]; -1 for none."""
        self._whose: dict[str, str] = {}  # key of a further teacher -> its store and layer
        if cache.spec.has_targets:
            self._add_teacher(TEACHER, cache, self.rows)

    def teachers_of(self, known: TargetCache) -> list[str]:
        """Keys of the teachers of a run, by its store as it knows it; new ones are added."""
        keys = list(self.ten)[:1]
        if not isinstance(known, JoinedCache):
            return keys
        names = short_names(known)
        self.shown.teacher = names[0]
        for name, part, place in list(zip(names, known.parts, known.places, strict=True))[1:]:
            key, whose = f"teacher {name}", f"{part.path} ({part.layer})"
            if self._whose.get(key, whose) != whose:
                key = f"teacher {whose}"
            if key not in self.ten:
                self._whose[key] = whose
                self._add_teacher(key, part, place[self.rows])
            keys.append(key)
        return keys

    def _add_teacher(self, key: str, cache: TargetCache, rows: np.ndarray) -> None:
        """The neighbours by the class tokens of a layer, where `rows` are the images' or -1."""
        there = np.flatnonzero(rows >= 0)
        parts = np.split(there, range(_AT_ONCE, len(there), _AT_ONCE))
        tokens = np.concatenate([class_tokens(cache, rows[part]) for part in parts])
        vectors = torch.zeros(len(rows), tokens.shape[1])
        vectors[there] = torch.from_numpy(tokens).float()
        self.ten[key] = self._note(key, vectors, [])

    def add(
        self, name: str, student: Student, channels: OwnChannels | None, teachers: list[str]
    ) -> None:
        """The neighbours by what a probe sees of a student, which may see channels of its own, and
        how many of them are those of its `teachers`."""
        pixels = self.shown.bank
        assert pixels is not None
        features = []
        self.progress.begin(f"features of {name}", len(pixels), "images")
        with torch.inference_mode():
            for at in range(0, len(pixels), _AT_ONCE):
                if channels:
                    rows = self.rows[at : at + _AT_ONCE]
                    images = torch.from_numpy(channels.load(rows, np.zeros_like(rows))[1])
                    images = images.to(self.device)
                else:
                    part = torch.from_numpy(pixels[at : at + _AT_ONCE]).to(self.device)
                    images = normalise(part, MEAN, STD)
                features.append(student.pooled_features(images).float().cpu())
                self.progress.advance(min(at + _AT_ONCE, len(pixels)))
        self.progress.end()
        self._note(name, torch.cat(features), teachers)

    def _note(self, name: str, vectors: torch.Tensor, teachers: list[str]) -> np.ndarray:
        """Keep who is near whom by vectors [m, F], zeros where there is none; returns the ten
        nearest of each, [a, 10], -1 for none."""
        unit = F.normalize(vectors.float(), dim=1)
        asked = max(self.asked, min(_ASKED, len(unit)))
        cosine, there = unit[:asked] @ unit.T, vectors.any(dim=1)
        cosine[torch.arange(asked), torch.arange(asked)] = NOBODY  # not its own neighbour
        cosine[:, ~there] = NOBODY
        cosine[~there[:asked]] = NOBODY
        count = min(max(self.near, _COMPARED), len(unit) - 1)
        values, positions = (part.numpy() for part in cosine.topk(count, dim=1))
        positions = np.where(values > NOBODY, positions, -1)
        ten = positions[:, :_COMPARED]
        comparable = [c >= 0 and (self.labels == c).sum() > 1 for c in self.labels[:asked]]
        known = np.array(comparable, bool)[:, None] & (ten >= 0)
        same = (self.labels[ten] == self.labels[:asked, None])[known]
        shared = dict[str, tuple[float, float, float]]()
        for teacher in teachers if count else ():
            pairs = zip(ten, self.ten[teacher], strict=True)
            share = np.array([
                100 * np.isin(ours, theirs).mean() for ours, theirs in pairs if (theirs >= 0).any()
            ])  # fmt: skip
            if not len(share):
                continue
            spread = 1.96 * float(share.std(ddof=1)) / len(share) ** 0.5 if len(share) > 1 else 0.0
            mean = float(share.mean())
            shared[teacher] = mean, max(0.0, mean - spread), min(100.0, mean + spread)
        self.shown.alike[name] = Alike(
            positions[: self.asked, : self.near], values[: self.asked, : self.near],
            100 * float(same.mean()) if same.size else None, shared,
        )  # fmt: skip
        return ten
