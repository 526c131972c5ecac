"""Commands on finished stores and runs: inspect, verify, repair, visualise, report."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.config import ExtractConfig
from stages.options import settings_command

LAW = (
    "data", "split", "data_root", "views", "img_size", "img_width", "scale", "ratio", "hflip",
    "bands", "band_range", "seed",
)  # fmt: skip
Teacher = Annotated[
    str | None, typer.Option(help="The teacher's name or config, if its files have moved.")
]
Pretrained = Annotated[
    str | None, typer.Option(help="The teacher's weights, as in extract-targets.")
]
_SHOWN_AT = 224  # pixels of a view that no teacher has given a size


@settings_command(ExtractConfig, {"Views of a store to come": LAW}, "extract")
def visualise(
    *,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    cache: Annotated[
        str | None, typer.Argument(help="A finished store, or a run of rils or rils-cached.")
    ] = None,
    out: Annotated[str, typer.Option(help="The picture (PNG).")] = "sheet.png",
    images: Annotated[int, typer.Option(help="How many images.", min=1)] = 8,
    masks: Annotated[
        int, typer.Option(help="Masks of each image, each by its own seed.", min=1)
    ] = 3,
    codec_error: Annotated[
        bool,
        typer.Option(
            "--codec-error",
            help="Show what the codec changed, in place of masks; runs the store's teacher again.",
        ),
    ] = False,
    teacher: Teacher = None,
    pretrained: Pretrained = None,
    device: Annotated[
        str, typer.Option(help="Device of the teacher: auto, cuda, cpu, ...")
    ] = "auto",
) -> None:
    """Draw a sheet of a store: image with the crops of its views, a view, attention, masks,
    features; or, with --data or --params, the views that a store would have. Of a run: the
    sentences nearest to masked patches, student beside target.

    --seed is that of the choice of images and of the first mask; with --data that of the store.
    """
    from milan.errors import ConfigError
    from stages import console

    progress = console.ConsoleProgress()
    views = {f"--{n.replace('_', '-')}": flags[n] for n in LAW if n not in ("data_root", "seed")}
    given = [name for name, value in (views | {"--params": params, "--set": sets}).items() if value]
    if not (cache or given):
        raise typer.BadParameter("a store, or --data", param_hint="CACHE")
    if cache and given:
        raise ConfigError(
            f"{given[0]} with a store, whose views are fixed",
            expected="a store, or --data and how its views are drawn",
            fix=f"milan visualise {cache}",
        )
    if cache is None:
        path = _views_to_come(flags, params, sets, out, images, progress)
    else:
        shown: dict[str, Any] = {"out": out, "images": images, "seed": flags["seed"] or 0}
        shown["data_root"] = flags["data_root"]
        if _is_run(cache):
            from milan.training.sentence_sheet import sentence_sheet

            path = sentence_sheet(cache, **shown)
        elif codec_error:
            path = _codec_sheet(cache, _teacher(teacher, pretrained), device, shown)
        else:
            from milan.reporting.contact_sheet import contact_sheet

            path = contact_sheet(cache, masks=masks, **shown)
    console.out.print(f"picture: {path}", markup=False)


def _is_run(place: str) -> bool:
    from pathlib import Path

    from milan.reporting.run_files import RUN

    return (Path(place) / RUN).is_file()


def _codec_sheet(cache: str, named: Any, device: str, shown: dict[str, Any]) -> Any:
    from milan.reporting.contact_sheet import codec_sheet
    from milan.store.cache import TargetCache
    from pipeline.verify import teacher_of

    teacher = teacher_of(TargetCache(cache), named, device)
    return codec_sheet(cache, lambda pixels: teacher.targets(pixels)[0], **shown)


def _views_to_come(
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    out: str,
    images: int,
    progress: Any,
) -> Any:
    from milan.core.config_resolver import resolve
    from milan.reporting.view_sheet import view_sheet

    config = resolve(ExtractConfig, section="extract", params=params, sets=sets, flags=flags)
    config.check()
    # Crops are the same at any size: no teacher is needed to know it.
    size = config.view_size or _SHOWN_AT
    law = config.view_spec(size)
    return view_sheet(
        config.data, law, config.views, out=out, images=images, split=config.split,
        data_root=config.data_root, progress=progress,
    )  # fmt: skip


def report(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders of runs and stores to compare; NAME=PATH gives one a name.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The page.  [report.html]")] = None,
    params: Annotated[
        str | None,
        typer.Option(
            help="A pipeline's parameter file; its section report names the runs.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures of each store.", min=0)] = 6,
    compared: Annotated[
        int, typer.Option(help="Images in which neighbours are searched.", min=0)
    ] = 1000,
    data_root: Annotated[
        str | None, typer.Option(help="Where the images are, if not where the store says.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu, ...")] = "auto",
) -> None:
    """Compare runs on one page (HTML, no network): curves, evaluations, settings, pictures, cost.

    With --params also a pipeline's tables (report.txt), metrics.json and pictures.
    """
    from milan.errors import ConfigError
    from stages import console

    if params and (what or out):
        raise ConfigError(
            "--params beside " + ("runs" if what else "--out"),
            expected="one of them: the parameter file names runs, and report.out",
        )
    if not (params or what):
        raise typer.BadParameter("folders of runs, or stores, or --params", param_hint="WHAT")
    progress = console.ConsoleProgress()
    if not params:
        from milan.reports.page import report as compare

        page = compare(
            *what or (), out=out or "report.html", images=images, compared=compared,
            data_root=data_root, device=device, progress=progress,
        )  # fmt: skip
        console.out.print(f"page: {page}", markup=False)
        return
    from milan.reports.pictures import PictureSettings
    from milan.reports.pipeline import build_report

    settings = PictureSettings(images=images, compared=compared, data_root=data_root, device=device)
    written = build_report(params, settings, progress)
    with open(written.folder / "report.txt", "w", encoding="utf-8") as file:
        for place in (console.out, console.text_file(file)):
            for table in written.tables:
                console.table(*table, to=place)
            for picture in written.pictures:
                place.print(f"picture: {picture}", markup=False)
    console.out.print(f"page: {written.page}", markup=False)


Cache = Annotated[str, typer.Argument(help="A store.")]
DataRoot = Annotated[
    str | None, typer.Option(help="Where the images are, if not where the store says.")
]
Device = Annotated[str, typer.Option(help="auto, cuda, cpu, ...")]


def inspect(cache: Cache) -> None:
    """Describe a store: teacher, data, views, completeness, fidelity of the codec, size."""
    from milan.store.describe import describe
    from stages import console

    console.tables(describe(cache))


def verify(
    cache: Cache,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte.")] = False,
    audit: Annotated[int, typer.Option(help="Recompute this many views and compare.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the choice of audited views.")] = 0,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    pretrained: Pretrained = None,
    device: Device = "auto",
) -> None:
    """Check a store: exit code 0 good, 3 corrupt, 4 incomplete, 5 another teacher or data set."""
    from pipeline.verify import Audit
    from pipeline.verify import verify as run
    from stages import console

    verdict = run(
        cache,
        deep=deep,
        audit=Audit(audit, seed, data_root, _teacher(teacher, pretrained), device)
        if audit
        else None,
        progress=console.ConsoleProgress(),
    )
    _print_verdict(verdict)


def repair(
    cache: Cache,
    data_root: DataRoot = None,
    teacher: Teacher = None,
    pretrained: Pretrained = None,
    device: Device = "auto",
) -> None:
    """Rewrite the damaged shards of a store, and no others."""
    from pipeline.repair import repair as run
    from stages import console

    try:
        verdict = run(
            cache,
            data_root=data_root,
            teacher=_teacher(teacher, pretrained),
            device=device,
            progress=console.ConsoleProgress(),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "shards that were written again stay; the same line repairs the others"
        ) from None
    _print_verdict(verdict)


def _teacher(name: str | None, pretrained: str | None) -> Any:
    from pipeline.teachers.spec import TeacherSpec

    return TeacherSpec(name, pretrained) if name else None


def _print_verdict(verdict: Any) -> None:
    """Print a verdict, and exit with its code."""
    from milan.core.units import format_bytes
    from stages import console

    problems = {
        "corrupt": verdict.corrupt,
        "incomplete": verdict.incomplete,
        "foreign": verdict.foreign,
    }
    for kind, lines in problems.items():
        for line in lines:
            console.out.print(f"{kind}: {line}", markup=False)
    result = {0: "good", 3: "corrupt", 4: "incomplete", 5: "of another teacher or data set"}
    rows = [(what, f"{number:,}") for what, number in verdict.checked.items()]
    outcome = result[verdict.code]
    if verdict.unread and verdict.code == 0:
        outcome = "good, as far as it was read"
    console.table("Verified", ("what", ""), [*rows, (verdict.path, outcome)])
    if verdict.unread:
        console.out.print(
            f"not read: the contents of {format_bytes(verdict.unread)} of targets, only their "
            f"sizes and indexes; every byte: milan verify --deep {verdict.path}",
            markup=False,
        )
    if verdict.code == 3 and verdict.shards and verdict.repairable:
        console.out.print(f"try: milan repair {verdict.path}", markup=False)
    raise typer.Exit(verdict.code)
