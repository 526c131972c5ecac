"""What an error tells one to type is typed: it must not lead to the same or the next refusal."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, STUDENT, last_wins, run_here

from milan.core.config_fields import check_fields
from milan.core.config_resolver import resolve
from milan.errors import ConfigError
from milan.evaluation.protocols import PROTOCOLS, Protocol
from milan.models.encoder import create_vit
from milan.models.student import build_student


def advice(error: str) -> list[str]:
    """The words of the first thing that a message proposes."""
    first = re.split(r" or |, | \(", error.split("; try: ")[1])[0]
    return first.split()


@pytest.mark.parametrize(
    "given",
    [
        ("--teacher", "ViT-B16"), ("--teacher", "vit-l-14"), ("--teacher", "ViT-B-16"),
        ("--teacher", "ViT-B-16-SigLIP"), ("--teacher", "RN50"), ("--teacher", "resnet50"),
        ("--teacher", "resnet50", "--pretrained", "openai"), ("--teacher", "convnext_base"),
        ("--teacher", "vit_base_patch16_224"), ("--teacher", "dinov2"), ("--teacher", "siglip"),
        ("--teacher", "timm:resnet50"), ("--teacher", "timm:vit_base_patch16"),
        ("--teacher", "timm:dinov3"), ("--teacher", "timm:vit_base_patch16_224.nonsense"),
        ("--teacher", "ViT-B-32", "--pretrained", "opnai"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_advice_on_teachers(given: tuple[str, ...], photos: Path, tmp_path: Path) -> None:
    """Followed, only the weights are missing: the name, the tower and the tag are right."""
    line = ["extract-targets", "--data", photos, "--offline", *given]
    first = run_here(*line, cwd=tmp_path)
    assert first.code == 1
    second = run_here(*last_wins(*line, *advice(first.err)), cwd=tmp_path)
    assert second.code == 1
    assert re.search("the weights .* are not here", second.err), (first.err, second.err)


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [
        ("vit_base_patch16_224", 28, None), ("vit_tiny_patch16_224", 28, None),
        ("vit_small_patch16_224", 224, 12), ("vit_small_patch16_224", 30, 16),
        ("resnet50", 32, None), ("vit_tiny", 32, None), ("swin_tiny_patch4_window7_224", 32, None),
        ("deit_tiny_distilled_patch16_224", 32, None),
        ("vit_base_patch16_siglip_224", 32, None), ("vit_bse_patch16_224", 32, None),
    ],
)  # fmt: skip
def test_advice_on_students(name: str, size: int, patch: int | None) -> None:
    """Followed, the student can be built: of pictures too that patches of 16 do not tile."""
    args = {"depth": 1} | ({"patch_size": patch} if patch else {})
    with pytest.raises(ConfigError) as error:
        create_vit(name, img_size=size, args=args)
    flag, value = advice(str(error.value))
    if flag == "--model":
        name = value
    else:
        key, _, text = value.removeprefix("model.").partition("=")
        args[key] = int(text) if text.isdecimal() else text
    assert create_vit(name, img_size=size, args=args).patch_embed.num_patches >= 4


@pytest.mark.parametrize(("width", "heads"), [(36, 8), (512, 12), (40, 7)])
def test_advice_on_decoders(width: int, heads: int) -> None:
    """Heads that divide the width."""
    settings = {"embed_dim": width, "depth": 1, "num_heads": heads}
    student = {"img_size": 32, "target_width": 8, "model_args": STUDENT["model_args"]}
    with pytest.raises(ConfigError) as error:
        build_student("vit_tiny_patch16_224", **student, decoder=settings)
    _, value = advice(str(error.value))
    settings["num_heads"] = int(value.removeprefix("decoder.num_heads="))
    build_student("vit_tiny_patch16_224", **student, decoder=settings)


@pytest.mark.parametrize(
    "given",
    [
        ("--codec", "float16"),
        ("--scale", "0.3", "1"),
        ("--min-cosine", "0.999999", "--out", "new.zarr"),
    ],
)
def test_advice_on_stores(
    given: tuple[str, ...], photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Each of the things proposed works; `--extend` is not proposed where it is refused."""
    line = ["extract-targets", "--data", photos, "--views", 1, "--shard-size", 8, "--limit", 8]
    line += [word for name, value in teacher_files.items() for word in (f"--{name}", value)]
    assert run_here(*line, cwd=tmp_path).code == 0
    refused = run_here(*last_wins(*line, *given), cwd=tmp_path)
    assert refused.code == 1
    assert run_here(*last_wins(*line, *given, *advice(refused.err)), cwd=tmp_path).code == 0
    extended = run_here(*last_wins(*line, *given, "--extend"), cwd=tmp_path)
    assert ("--extend" in refused.err) == (extended.code == 0), extended.err


def _of_evaluations() -> list[Path]:
    """Files of what measures, predicts and trains for a task."""
    trained = "supervised segment detect finetune stand_ins"
    files = [
        file
        for room in ("evaluation", "inference", "training")
        for file in sorted((ROOT / "milan" / room).glob("*.py"))
    ]
    return [
        f for f in files if f.parent.name != "training" or f.stem.startswith((*trained.split(),))
    ]


@pytest.mark.parametrize("file", _of_evaluations(), ids=lambda file: file.stem)
def test_every_error_says_what_to_type(file: Path) -> None:
    """No error of an evaluation, a prediction or a training for a task leaves one alone."""
    kinds = {"ConfigError", "DataError", "CacheError", "TrainError"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
            assert {"fix", None} & {word.arg for word in node.keywords}, f"{file}:{node.lineno}"


def _out_of_range(rule: Any) -> list[Any]:
    beyond = [rule[side] - 1 for side in ("least", "above") if side in rule]
    beyond += [rule[side] + 1 for side in ("most", "below") if side in rule]
    return ["nonsense"] if rule["choices"] else beyond


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_advice_on_ranges(protocol: Protocol) -> None:
    """Of every setting that has one: followed, the value is in it."""
    for field in dataclasses.fields(protocol.settings):
        for bad in _out_of_range(field.metadata) if field.metadata else ():
            value = (bad,) * 2 if isinstance(field.default, tuple) else bad
            with pytest.raises(ConfigError) as error:
                check_fields(protocol.settings(**{field.name: value}))
            fix, flag = error.value.fix, f"--{field.name.replace('_', '-')}"
            if field.metadata["choices"]:
                fix = f"{flag} {fix}"
            assert fix.startswith((f"{flag} ", f"without {flag}")), fix
            given = [] if "without" in fix else [f"{field.name}={fix.removeprefix(flag).strip()}"]
            check_fields(resolve(protocol.settings, section=protocol.name, sets=given))


def test_advice_on_settings_that_are_no_flags(tmp_path: Path) -> None:
    """By --set, and by the type of a value too."""
    line = ["pretrain", "--cache", "no.zarr"]
    said = run_here(*line, "--set", "mask_ratio=2", cwd=tmp_path).err
    assert said.rstrip().endswith("try: --set mask_ratio=0.75"), said
    said = run_here(*line, "--set", "epochs=many", cwd=tmp_path).err
    assert said.rstrip().endswith("expected: of type int; try: --epochs 400"), said
    (tmp_path / "run").mkdir()
    (tmp_path / "run/encoder.safetensors").write_bytes(b"")
    said = run_here("predict", "run", "photos", cwd=tmp_path).err  # another command's flag
    assert said.rstrip().endswith("try: milan finetune --checkpoint run"), said
    said = run_here(*line, "--set", "tf32=perhaps", cwd=tmp_path).err
    assert said.rstrip().endswith("try: --set tf32=true"), said
