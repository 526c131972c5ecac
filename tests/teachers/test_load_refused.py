"""What is no teacher, or has no weights here: refused in a line that says what to type."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TEACHER, Bomb
from safetensors.torch import load_file, save_file

from milan.errors import TeacherError
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec


def test_unknown_names_suggest_the_nearest(teacher_files: dict[str, str], tmp_path: Path) -> None:
    """Unknown teacher, tag, weight file, and a teacher without weights."""
    for name, near in (("ViT-B16", "ViT-B-16"), ("ViT-B/16", "ViT-B-16"), ("vit-l-14", "ViT-L-14")):
        with pytest.raises(TeacherError, match=f"unknown teacher '{name}'.*try:.*{near}"):
            load_teacher(TeacherSpec(name, "openai"))
    with pytest.raises(TeacherError, match=r"openia is neither a file nor a tag.*try:.*openai"):
        load_teacher(TeacherSpec("ViT-B-32", "openia"))
    with pytest.raises(TeacherError, match=r"away\.safetensors is neither a file nor a tag"):
        load_teacher(TeacherSpec(teacher_files["teacher"], str(tmp_path / "away.safetensors")))
    with pytest.raises(TeacherError, match=r"ViT-B-32 without --pretrained.*try:.*openai"):
        load_teacher(TeacherSpec("ViT-B-32"))
    with pytest.raises(TeacherError, match=r"without --pretrained.*try: --pretrained FILE"):
        load_teacher(TeacherSpec(teacher_files["teacher"]))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("RN50", "its image tower is a ResNet"),
        ("convnext_base", "its image tower is timm's convnext_base"),
        ("swin_base_patch4_window7_224", "its image tower is timm's swin_base"),
        ("convnext_xxlarge", "its image tower is timm's convnext_xxlarge"),  # never built
        ("coca_ViT-B-32", "it pools by attention"),
    ],
)
def test_towers_without_these_targets_are_refused(name: str, why: str) -> None:
    """Features of another kind must not be stored as if they were a ViT's."""
    with pytest.raises(TeacherError, match=f"{name} cannot give targets: {why}"):
        load_teacher(TeacherSpec(name, "none"))


def test_weights_that_do_not_fit_are_refused(teacher_files: dict[str, str], tmp_path: Path) -> None:
    """Strictly: one missing, one too many, other shapes, no square of positions, no tensors."""
    state = load_file(teacher_files["pretrained"])
    proj, position = "visual.proj", "visual.positional_embedding"
    wrong = {
        "less": {k: v for k, v in state.items() if k != proj},
        "more": {**state, "visual.transformer.resblocks.2.ln_1.bias": torch.zeros(32)},
        "shape": {**state, proj: torch.zeros(32, 25)},
        "positions": {**state, position: torch.zeros(16, 32)},
        "text": {k: v for k, v in state.items() if not k.startswith("visual.")},
    }
    for name, weights in wrong.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
        spec = TeacherSpec(teacher_files["teacher"], str(tmp_path / f"{name}.safetensors"))
        with pytest.raises(TeacherError, match="do not fit the image tower") as error:
            load_teacher(spec, device="cpu")
        assert "\n" not in str(error.value)


def test_unsafe_and_broken_files_are_refused(
    teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No code of a weight file is ever run; a file that is none is told, not a traceback."""
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.proj": Bomb()}, "code.pt")
    Path("bare.pt").write_bytes(pickle.dumps(Bomb()))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
    Path("text.pt").write_text("not a model")
    Path("text.safetensors").write_text("not a model")
    Path("empty.pt").touch()
    Path("cut.safetensors").write_bytes(Path(teacher_files["pretrained"]).read_bytes()[:-100])
    torch.save([1, 2], "list.pt")
    torch.save({}, "nothing.pt")
    broken = ["code.pt", "bare.pt", "script.pt", "text.pt", "text.safetensors", "empty.pt"]
    for name in [*broken, "cut.safetensors", "list.pt", "nothing.pt"]:
        with pytest.raises(TeacherError, match=f"{name} cannot be loaded safely") as error:
            load_teacher(TeacherSpec(teacher_files["teacher"], name), device="cpu")
        assert "\n" not in str(error.value)
    assert not Path("exploded").exists()


def test_a_broken_config_is_refused(teacher_files: dict[str, str], tmp_path: Path) -> None:
    """No file, no JSON, no config, sizes that do not tile, a tower that cannot be built."""
    vision = TEACHER["vision_cfg"]
    texts = {
        "none": None,
        "cut": '{"embed_dim": 24',
        "list": "[1, 2]",
        "other": '{"lr": 0.1}',
        "flat": '{"embed_dim": 24, "vision_cfg": 3}',
        "unknown": json.dumps({**TEACHER, "vision_cfg": {**vision, "colour": 3}}),
        "heads": json.dumps({**TEACHER, "vision_cfg": {**vision, "head_width": 10}}),
        "tiles": json.dumps({**TEACHER, "vision_cfg": {**vision, "image_size": 36}}),
        "oblong": json.dumps({**TEACHER, "vision_cfg": {**vision, "image_size": [32, 60]}}),
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(TeacherError, match=r"config|cannot give targets") as error:
            load_teacher(TeacherSpec(str(path), "none"), device="cpu")
        assert name in str(error.value)


@pytest.mark.parametrize(("size", "near"), [(30, "24 or 32"), (33, "32 or 40"), (5, "8 or 16")])
def test_an_image_size_that_does_not_tile_names_two_that_do(
    teacher_files: dict[str, str], size: int, near: str
) -> None:
    """The patches must cover the view; the nearest sizes are named."""
    with pytest.raises(TeacherError, match=f"--img-size {size} is not .*try: --img-size {near}"):
        load_teacher(TeacherSpec(*teacher_files.values(), img_size=size), device="cpu")


# --- offline --------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every attempt to reach another machine, refused and written down; empty caches."""
    import huggingface_hub.constants as hub

    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("a test tried to use the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tried


@pytest.mark.parametrize(
    "name", ["ViT-B-16-quickgelu", "ViT-B-32", "hf-hub:example/clip"], ids=lambda n: n.split(":")[0]
)
def test_offline_says_which_file_to_place(no_network: list[Any], name: str) -> None:
    """--offline must not so much as look a name up, and must say what is missing."""
    named = name.startswith("hf-hub:")
    spec = TeacherSpec(name, None if named else "openai", offline=True)
    with pytest.raises(TeacherError) as error:
        load_teacher(spec, device="cpu")
    assert no_network == []
    text = str(error.value)
    if named:
        assert "example/clip" in text
        assert "--teacher local-dir:FOLDER" in text
    else:
        assert "--offline" in text
        assert "open_clip_model.safetensors of https://" in text
        assert "--pretrained FILE" in text


def test_the_network_is_seen_where_it_is_used(
    no_network: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The witness of the test above can see: without --offline the hub is asked, and missed."""
    import open_clip.pretrained as weights

    def download(entry: dict) -> str:
        socket.create_connection(("192.0.2.1", 443), timeout=0.1)  # TEST-NET, nobody's address
        return ""

    monkeypatch.setattr(weights, "download_pretrained", download)
    with pytest.raises(TeacherError, match=r"no network \(OSError\).*--pretrained FILE"):
        load_teacher(TeacherSpec("ViT-B-32", "openai"), device="cpu")
    assert no_network


def test_offline_with_a_file_needs_nothing(no_network: list[Any], teacher_files: dict) -> None:
    """A local teacher is loaded as ever."""
    spec = TeacherSpec(*teacher_files.values(), offline=True)
    assert load_teacher(spec, device="cpu").tokens == 17
    assert no_network == []
