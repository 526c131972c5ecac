"""Tests of teachers: what the teacher says, and which teacher it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import TEACHER, Bomb
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import load_file, save_file

from milan.core.device import MEAN, STD, normalise
from milan.errors import ConfigError, TeacherError
from milan.models.state_dict import weights_digest
from pipeline.teachers.clip import load_clip
from pipeline.teachers.load import FAMILIES, Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.towers import Family, Loaded, class_attention

OPENAI_MEAN, OPENAI_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def load(files: dict[str, str], **more: Any) -> Teacher:
    return load_teacher(TeacherSpec(files["teacher"], files["pretrained"], **more), device="cpu")


@pytest.fixture(scope="module")
def teacher(teacher_files: dict[str, str]) -> Teacher:
    return load(teacher_files)


@pytest.fixture(scope="module")
def state(teacher_files: dict[str, str]) -> dict[str, torch.Tensor]:
    return load_file(teacher_files["pretrained"])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Six normalised images."""
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def open_clips(state: dict[str, torch.Tensor], **changes: Any) -> Any:
    """The same model by open_clip alone: the independent witness."""
    model = open_clip.CLIP(**{**TEACHER, **changes})
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def witness(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention as open_clip and nn.MultiheadAttention say them."""
    attn = model.visual.transformer.resblocks[-1].attn
    seen: dict[str, torch.Tensor] = {}
    handle = attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=args[0] if args else kwargs["query"]),
        with_kwargs=True,
    )
    model.visual.output_tokens = True
    _, patches = model.visual(images)
    model.visual.output_tokens = False
    handle.remove()
    tokens = torch.cat([model.encode_image(images)[:, None], patches @ model.visual.proj], dim=1)
    _, weights = attn(seen["x"], seen["x"], seen["x"], need_weights=True, average_attn_weights=True)
    return tokens, weights[:, 0, 1:]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- what it says ---------------------------------------------------------------------------------


def test_features_and_attention_are_the_models_own(
    teacher: Teacher, state: dict[str, torch.Tensor], images: torch.Tensor
) -> None:
    """Else every store is wrong: ln_post and proj of every token; the last block's attention."""
    tokens, attention = teacher.forward(images)
    expected_tokens, expected_attention = witness(open_clips(state), images)
    assert tokens.shape == (6, 17, 24)
    assert attention.shape == (6, 16)
    assert tokens.dtype == attention.dtype == torch.float32
    scale = expected_tokens.abs().max()
    assert (tokens - expected_tokens).abs().max() <= 1e-6 * scale
    assert (attention - expected_attention).abs().max() <= 1e-6
    assert attention.std() > 0.01, "this attention is too flat to tell anything apart"
    # Not renormalised: the class token keeps its own share.
    assert (attention.sum(dim=1) < 1 - 1e-4).all()


def test_a_family_from_outside(
    teacher: Teacher, teacher_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family is a test of the name and a loader; `load_teacher` needs nothing else of it."""

    def load_toy(spec: TeacherSpec) -> Loaded:
        return load_clip(replace(spec, name=spec.name.removeprefix("toy:")))

    toy = Family(lambda name: name.startswith("toy:"), load_toy)
    monkeypatch.setattr("pipeline.teachers.load.FAMILIES", (toy, *FAMILIES))
    ours = load({**teacher_files, "teacher": "toy:" + teacher_files["teacher"]})
    assert ours.identity == teacher.identity
    assert load(teacher_files).identity == teacher.identity


def test_targets_are_those_of_normalised_pixels(teacher: Teacher) -> None:
    """uint8 in, channels last; the teacher's own normalisation by its identity."""
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    tokens, attention = teacher.targets(pixels.numpy())
    mean = torch.tensor(OPENAI_MEAN)
    std = torch.tensor(OPENAI_STD)
    by_hand = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    expected_tokens, expected_attention = teacher.forward(by_hand)
    assert (tokens - expected_tokens).abs().max() <= 1e-4
    assert (attention - expected_attention).abs().max() <= 1e-5


def test_a_view_says_the_same_in_any_batch(teacher: Teacher, images: torch.Tensor) -> None:
    """Batch size is not in the fingerprint, so it may not matter."""
    whole, attention = teacher.forward(images)
    single = [teacher.forward(images[i : i + 1]) for i in range(len(images))]
    assert (whole - torch.cat([s[0] for s in single])).abs().max() <= 1e-5
    assert (attention - torch.cat([s[1] for s in single])).abs().max() <= 1e-6


def test_attention_is_positive_where_softmax_underflows(
    state: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path, teacher_files: dict
) -> None:
    """A zero weight could never be drawn by the mask: nearly one-hot attention stays > 0."""
    sharp = {k: v.clone() for k, v in state.items()}
    key = "visual.transformer.resblocks.1.attn.in_proj_weight"
    sharp[key][:64] *= 60  # queries and keys
    save_file(sharp, tmp_path / "sharp.safetensors")
    spec = TeacherSpec(teacher_files["teacher"], str(tmp_path / "sharp.safetensors"))
    _, attention = load_teacher(spec, device="cpu").forward(images)
    _, plain = witness(open_clips(sharp), images)
    assert (plain == 0).any(), "these weights are not sharp enough to underflow"
    assert (attention > 0).all()
    assert attention.isfinite().all()
    assert (attention - plain).abs().max() <= 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_points_the_same_way(
    teacher: Teacher, teacher_files: dict[str, str], images: torch.Tensor, precision: str
) -> None:
    """Autocast changes the last digits, not the direction that the student learns."""
    half = load(teacher_files, precision=precision)
    tokens, attention = half.forward(images)
    exact, exact_attention = teacher.forward(images)
    assert tokens.dtype == attention.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(tokens, exact, dim=-1)
    assert cosine.min() >= 0.999
    assert relative(tokens, exact) > 0
    assert relative(attention, exact_attention) <= 0.05
    assert half.identity["precision"] == precision
    assert half.identity != teacher.identity


def test_class_attention_knows_no_autocast(teacher: Teacher, images: torch.Tensor) -> None:
    """Masks are drawn from it: its softmax is computed in float32 under autocast too."""
    block = teacher.visual.transformer.resblocks[-1]
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = class_attention(block, x)
    assert torch.equal(inside, class_attention(block, x))


# --- QuickGELU ------------------------------------------------------------------------------------


@contextmanager
def registered(name: str, config: dict, folder: Path, tags: dict[str, dict]) -> Iterator[None]:
    """A small model in open_clip's own tables, as its users register theirs."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    _PRETRAINED[name] = tags
    try:
        yield
    finally:
        del _PRETRAINED[name], open_clip.factory._MODEL_CONFIGS[name]
        del open_clip.factory._MODEL_CONFIG_PATHS[:]
        open_clip.factory._MODEL_CONFIG_PATHS += [
            Path(open_clip.factory.__file__).parent / "model_configs/"
        ]


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32", "ViT-L-14"])
def test_open_clip_says_which_weights_want_quickgelu(name: str) -> None:
    """The trap as it is in the real tables: a GELU config, weights trained with QuickGELU."""
    assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"] is True
    assert not open_clip.get_model_config(name).get("quick_gelu", False)


def test_a_tag_decides_the_activation(
    state: dict[str, torch.Tensor], images: torch.Tensor, teacher_files: dict, tmp_path: Path
) -> None:
    """ViT-B-16 with openai weights silently ran GELU: the tag's activation wins, and says so."""
    gelu = {**TEACHER, "quick_gelu": False}
    held = {"file": teacher_files["pretrained"], "mean": OPENAI_MEAN, "std": OPENAI_STD}
    tags = {"openai": {**held, "quick_gelu": True}, "laion": held}
    with registered("small-vit", gelu, tmp_path, tags):
        quick = load_teacher(TeacherSpec("small-vit", "openai"), device="cpu")
        exact = load_teacher(TeacherSpec("small-vit", "laion"), device="cpu")
    assert quick.identity["architecture"]["quick_gelu"] is True
    assert "QuickGELU" in quick.about["notes"][0]
    assert quick.about["licence"] == "MIT"
    assert relative(quick.forward(images)[0], witness(open_clips(state), images)[0]) <= 1e-6
    assert exact.identity["architecture"]["quick_gelu"] is False
    assert exact.about["notes"] == []
    expected = witness(open_clips(state, quick_gelu=False), images)[0]
    assert relative(exact.forward(images)[0], expected) <= 1e-6
    assert relative(quick.forward(images)[0], exact.forward(images)[0]) > 1e-3
    assert quick.identity["weights"] == exact.identity["weights"]
    assert quick.identity != exact.identity


def test_a_tag_turns_quickgelu_off_too(teacher_files: dict, tmp_path: Path) -> None:
    """A -quickgelu name with weights that were trained with exact GELU."""
    held = {"file": teacher_files["pretrained"], "mean": OPENAI_MEAN, "std": OPENAI_STD}
    with registered("small-quickgelu", TEACHER, tmp_path, {"plain": held}):
        found = load_teacher(TeacherSpec("small-quickgelu", "plain"), device="cpu")
    assert found.identity["architecture"]["quick_gelu"] is False
    assert "exact GELU" in found.about["notes"][0]


def test_openais_state_dict_runs_quickgelu(
    teacher: Teacher, state: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path
) -> None:
    """A converted OpenAI file beside a GELU config: its extra keys give it away."""
    (tmp_path / "gelu.json").write_text(json.dumps({**TEACHER, "quick_gelu": False}))
    extra = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(8),
        "vocab_size": torch.tensor(64),
    }
    torch.save({**state, **extra}, tmp_path / "openai.pt")
    spec = TeacherSpec(str(tmp_path / "gelu.json"), str(tmp_path / "openai.pt"))
    found = load_teacher(spec, device="cpu")
    assert found.identity["architecture"]["quick_gelu"] is True
    assert "QuickGELU" in found.about["notes"][0]
    assert torch.equal(found.forward(images)[0], teacher.forward(images)[0])


# --- normalisation, identity, origin --------------------------------------------------------------


def test_normalisation_is_a_choice_that_is_kept(
    teacher: Teacher, teacher_files: dict[str, str]
) -> None:
    """The published results used ImageNet's numbers; a store must know which it has."""
    published = load(teacher_files, norm="imagenet")
    assert published.identity["normalisation"] == {"mean": list(MEAN), "std": list(STD)}
    assert published.about["normalisation"] == "imagenet"
    own = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}
    assert teacher.identity["normalisation"] == own
    assert teacher.about["normalisation"] == "own"
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = teacher.forward(normalise(pixels, MEAN, STD))[0]
    assert torch.equal(published.targets(pixels)[0], expected)
    assert relative(published.targets(pixels)[0], teacher.targets(pixels)[0]) > 1e-4
    with pytest.raises(TeacherError, match="--teacher-norm clip; expected: imagenet or own"):
        load(teacher_files, norm="clip")
    with pytest.raises(TeacherError, match="--precision fp8"):
        load(teacher_files, precision="fp8")
    with pytest.raises(ConfigError, match="--device abacus"):
        load_teacher(TeacherSpec(**_as_spec(teacher_files)), device="abacus")


def _as_spec(files: dict[str, str]) -> dict[str, str]:
    return {"name": files["teacher"], "pretrained": files["pretrained"]}


def test_with_no_flags_the_published_teacher() -> None:
    """ViT-B-16-quickgelu with ImageNet's normalisation; weights replaced, they are not here."""
    spec = TeacherSpec()
    assert (spec.name, spec.norm) == ("ViT-B-16-quickgelu", None)
    found = load_teacher(TeacherSpec(pretrained="none"), device="cpu")
    assert found.about["normalisation"] == "imagenet"
    assert found.identity["architecture"]["quick_gelu"] is True
    assert (found.size, found.patch, found.tokens, found.channels) == (224, 16, 197, 512)
    assert found.identity["precision"] == "fp32"


def test_identity_is_of_the_weights_not_of_the_file(
    teacher: Teacher, state: dict[str, torch.Tensor], teacher_files: dict, tmp_path: Path
) -> None:
    """A store must go on with the same weights from another file, and stop at others."""
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
               tmp_path / "trained.pt")  # fmt: skip
    same = load_teacher(
        TeacherSpec(teacher_files["teacher"], str(tmp_path / "trained.pt")), device="cpu"
    )
    assert same.identity == teacher.identity
    assert same.about["pretrained"] == "trained.pt"
    other = {k: v.clone() for k, v in state.items()}
    other["visual.ln_post.weight"][7] += 2**-20
    save_file(other, tmp_path / "other.safetensors")
    changed = load_teacher(
        TeacherSpec(teacher_files["teacher"], str(tmp_path / "other.safetensors")), device="cpu"
    )
    assert changed.identity["weights"] != teacher.identity["weights"]
    assert {k: v for k, v in changed.identity.items() if k != "weights"} == {
        k: v for k, v in teacher.identity.items() if k != "weights"
    }
    # The text tower says nothing of images.
    words = {k: v + 1 if not k.startswith("visual.") else v for k, v in state.items()}
    save_file(words, tmp_path / "words.safetensors")
    text = load_teacher(
        TeacherSpec(teacher_files["teacher"], str(tmp_path / "words.safetensors")), device="cpu"
    )
    assert text.identity == teacher.identity


def test_half_precision_files_are_read(
    state: dict[str, torch.Tensor], teacher_files: dict, images: torch.Tensor, tmp_path: Path
) -> None:
    """Published weights are often halves; their positions are interpolated all the same."""
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    for size in (None, 48):
        spec = TeacherSpec(
            teacher_files["teacher"], str(tmp_path / "half.safetensors"), img_size=size
        )
        found = load_teacher(spec, device="cpu")
        assert {p.dtype for p in found.visual.parameters()} == {torch.float32}


def test_image_size_interpolates_positions(
    teacher: Teacher, teacher_files: dict[str, str], images: torch.Tensor
) -> None:
    """32 to 48 pixels: 36 patches instead of 16, and a teacher of another identity."""
    larger = load(teacher_files, img_size=48)
    assert (larger.size, larger.tokens, larger.patch) == (48, 37, 8)
    assert larger.identity["image_size"] == 48
    assert larger.identity["weights"] != teacher.identity["weights"]
    tokens, attention = larger.forward(torch.randn(2, 3, 48, 48))
    assert tokens.shape == (2, 37, 24)
    assert attention.shape == (2, 36)
    before, after = teacher.visual.positional_embedding, larger.visual.positional_embedding
    assert torch.equal(before[0], after[0])
    corners = [0, 5, 30, 35]
    grid = after[1:][corners] - before[1:][[0, 3, 12, 15]]
    assert grid.abs().max() < before[1:].std()
    # The corner patches of the two grids agree better than any shuffled pairing would.
    assert (after[1:][corners] @ before[1:][[0, 3, 12, 15]].T).argmax(dim=1).tolist() == [
        0,
        1,
        2,
        3,
    ]
    same = load(teacher_files, img_size=32)
    assert same.identity == teacher.identity


def test_none_means_seeded_random_weights_that_say_so(teacher_files: dict[str, str]) -> None:
    """Equal twice, or a resumed store would mix two teachers; and no draw of the user's is used."""
    spec = TeacherSpec(teacher_files["teacher"], "none")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = load_teacher(spec, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    second = load_teacher(spec, device="cpu")
    assert first.identity == second.identity
    assert first.about["random_weights"] is True
    assert first.about["licence"] == "none (random weights)"
    assert weights_digest(first.visual) == first.identity["weights"]


def test_the_licence_is_what_the_file_states(
    teacher: Teacher, state: dict[str, torch.Tensor], teacher_files: dict, tmp_path: Path
) -> None:
    """NamedPatch where it is known, `unknown` otherwise: never guessed."""
    assert teacher.about["licence"] == "unknown"
    assert teacher.about["random_weights"] is False
    save_file(state, tmp_path / "free.safetensors", metadata={"licence": "CC0-1.0"})
    spec = TeacherSpec(teacher_files["teacher"], str(tmp_path / "free.safetensors"))
    assert load_teacher(spec, device="cpu").about["licence"] == "CC0-1.0"


def test_any_text_tower_will_do(images: torch.Tensor) -> None:
    """A native ViT beside a text tower of another library is a teacher like any other."""
    found = load_teacher(TeacherSpec("roberta-ViT-B-32", "none"), device="cpu")
    assert (found.tokens, found.channels) == (50, 512)


# --- local-dir ------------------------------------------------------------------------------------


def make_local_dir(folder: Path, state: dict[str, torch.Tensor], **preprocess: Any) -> str:
    folder.mkdir()
    whole = {"model_cfg": TEACHER, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_a_local_dir_brings_weights_and_normalisation(
    teacher: Teacher, state: dict[str, torch.Tensor], images: torch.Tensor, tmp_path: Path
) -> None:
    """The layout of open_clip's hub, as a folder: its own mean and std are `own`."""
    name = make_local_dir(tmp_path / "clip", state, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    found = load_teacher(TeacherSpec(name), device="cpu")
    assert found.identity["normalisation"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert found.identity["weights"] == teacher.identity["weights"]
    assert found.identity["architecture"] == teacher.identity["architecture"]
    assert torch.equal(found.forward(images)[0], teacher.forward(images)[0])
    random = load_teacher(TeacherSpec(name, "none"), device="cpu")
    assert random.about["random_weights"] is True
    assert random.identity["weights"] != teacher.identity["weights"]
    larger = load_teacher(TeacherSpec(name, img_size=48), device="cpu")
    assert larger.tokens == 37
    with pytest.raises(TeacherError, match=r"--img-size 50 .*--img-size 48 or 56"):
        load_teacher(TeacherSpec(name, img_size=50), device="cpu")
    with pytest.raises(TeacherError, match="brings its own weights"):
        load_teacher(TeacherSpec(name, "openai"), device="cpu")


@pytest.mark.parametrize(
    "breakage", ["absent", "no config", "no JSON", "empty", "no weights", "code", "other model"]
)
def test_a_broken_local_dir_is_one_clear_line(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str
) -> None:
    """Whatever is wrong inside: a TeacherError that names the folder, no traceback."""
    monkeypatch.chdir(tmp_path)
    name = make_local_dir(tmp_path / "clip", state)
    config = tmp_path / "clip" / "open_clip_config.json"
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    if breakage == "absent":
        name += "x"
    elif breakage == "no config":
        config.unlink()
    elif breakage == "no JSON":
        config.write_text("{")
    elif breakage == "empty":
        config.write_text('{"model_cfg": {}}')
    elif breakage == "no weights":
        weights.unlink()
    elif breakage == "code":
        weights.unlink()
        torch.save({"visual.proj": Bomb()}, tmp_path / "clip" / "open_clip_pytorch_model.bin")
    else:
        save_file({**state, "visual.proj": torch.zeros(32, 25)}, weights)
    with pytest.raises(TeacherError) as error:
        load_teacher(TeacherSpec(name), device="cpu")
    assert str(tmp_path / "clip") in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("exploded").exists()


def test_open_clips_log_is_quiet_and_comes_back(
    teacher_files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """open_clip warns on the root logger of random weights that milan flags itself."""
    with caplog.at_level(logging.INFO):
        load_teacher(TeacherSpec(teacher_files["teacher"], "none"), device="cpu")
    assert caplog.records == []
    assert logging.root.manager.disable == 0
