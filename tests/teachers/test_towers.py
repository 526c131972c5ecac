"""Tests of towers: every kind of teacher beside open_clip's own ViT.

The models are real ones of timm made small, with random weights: shapes and equalities are tested
here, not what published weights say.
"""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from counting import GPU, fake_gpu, to_gpu
from helpers import TEACHER, Notes
from safetensors.torch import save_file
from small_towers import (
    CLASS_TOKENS,
    CLIPS,
    POOLED,
    alone,
    check,
    clip_config,
    last_attention,
    pool_attention,
    sharp,
    small,
    without_custom_text,
)
from timm.models import model_entrypoint, register_model
from torch.nn import functional as F

import pipeline.teachers.timm_vit
from milan.data.dataset import open_cache
from milan.errors import TeacherError
from milan.models.state_dict import weights_digest
from milan.store.codecs import codec_of
from pipeline.extract import extract_targets
from pipeline.extraction.worker import targets_of
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.towers import TimmTower
from pipeline.teachers.weights import read_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TeacherSpec of a small model with weights on disk, by name: of VITS or of CLIPS."""
    folder = tmp_path_factory.mktemp("towers")

    def spec(name: str, **more: Any) -> TeacherSpec:
        weights = folder / f"{name}.safetensors"
        config = folder / f"{name}.json"
        if not weights.exists():
            torch.manual_seed(2)
            if name in CLIPS:
                config.write_text(json.dumps(clip_config(name)))
                visual = open_clip.CustomTextCLIP(**without_custom_text(clip_config(name))).visual
                state = {f"visual.{k}": v for k, v in visual.state_dict().items()}
            else:
                state = timm.create_model(name, num_classes=0).state_dict()
            save_file({k: v.contiguous().clone() for k, v in sharp(state).items()}, weights)
        where = str(config) if name in CLIPS else f"timm:{name}"
        return TeacherSpec(where, str(weights), **more)

    return spec


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Five normalised images."""
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


# --- a class token --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_timm_vits_class_token_and_patches(files: Any, images: torch.Tensor, name: str) -> None:
    """Tokens after the final norm; registers left out of features and of attention."""
    teacher = load_teacher(files(name), device="cpu")
    model = alone(name, teacher)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        x = model.fc_norm(model.forward_features(images))
    full = last_attention(model, images)
    tokens = torch.cat([x[:, :1], x[:, prefix:]], dim=1)
    check(teacher, images, tokens, full[:, 0, prefix:])
    other = full[:, 1, prefix:]
    assert (full[:, 0, prefix:] - other).abs().max() > 1e-3, "another query would say the same"
    registers = {"small_dinov2": 4, "small_dinov3": 4, "small_dinov3_qkvb": 4, "small_distilled": 1}
    assert teacher.identity["left_out"] == teacher.about["left_out"] == prefix - 1
    assert prefix - 1 == registers.get(name, prefix - 1)
    assert teacher.identity["pooling"] == "token"
    assert teacher.about["class_token"] == "the class token"
    if model.global_pool == "token" and name != "small_distilled":  # that one outputs two
        with torch.no_grad():
            assert torch.allclose(tokens[:, 0], model(images), atol=1e-5)


def test_the_variants_are_what_they_are_for() -> None:
    """The list above covers nothing if timm's models change: each must have what it stands for."""
    model = {name: timm.create_model(name, num_classes=0) for name in CLASS_TOKENS}
    attn = {name: vit.blocks[-1].attn for name, vit in model.items()}
    assert attn["small_vit"].qkv.bias is not None
    assert attn["small_norms"].qkv.bias is None
    assert not isinstance(attn["small_norms"].q_norm, torch.nn.Identity)
    assert not isinstance(model["small_clip"].norm_pre, torch.nn.Identity)
    assert hasattr(model["small_dinov2"].blocks[0].ls1, "gamma")
    assert attn["small_eva"].q_bias is not None
    assert attn["small_eva02"].qkv is None
    assert model["small_eva02"].rope is not None
    assert not isinstance(model["small_beit"].fc_norm, torch.nn.Identity)
    if "small_dinov3" in model:
        assert model["small_dinov3"].rope is not None
        assert attn["small_dinov3_qkvb"].q_bias is not None
    if "small_mixed" in model:
        assert model["small_mixed"].rope_mixed
    if "small_grouped" in model:
        assert attn["small_grouped"].num_kv_groups > 1


def test_eva_clip(files: Any, images: torch.Tensor) -> None:
    """Every token by the projection to the joint width; row 0 is encode_image."""
    teacher = load_teacher(files("eva_clip"), device="cpu")
    visual = alone("eva_clip", teacher)
    with torch.no_grad():
        x = visual.trunk.head(visual.trunk.forward_features(images))
        assert torch.allclose(visual(images), x[:, 0], atol=1e-5)
    assert teacher.channels == 24 != visual.trunk.embed_dim
    check(teacher, images, x, last_attention(visual.trunk, images)[:, 0, 1:])
    assert (teacher.identity["pooling"], teacher.identity["left_out"]) == ("token", 0)


# --- no class token -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ("siglip", "pe") if n in POOLED])
def test_a_pooling_head(files: Any, images: torch.Tensor, name: str) -> None:
    """SigLIP: row 0 is the tower's own embedding, the attention that of its pooling query."""
    teacher = load_teacher(files(name), device="cpu")
    visual = alone(name, teacher)
    trunk = visual.trunk
    prefix = trunk.num_prefix_tokens
    with torch.no_grad():
        patches = trunk.head(trunk.forward_features(images))[:, prefix:]
        tokens = torch.cat([visual(images)[:, None], patches], dim=1)
    check(teacher, images, tokens, pool_attention(trunk, images)[:, -16:])
    assert (teacher.identity["pooling"], teacher.identity["left_out"]) == ("map", prefix)
    assert prefix == (0 if name == "siglip" else 1)
    assert "pooling head" in teacher.about["class_token"]
    assert "pooling head's query" in teacher.about["attention"]
    assert any("pooling head" in note for note in teacher.about["notes"])


@pytest.mark.parametrize("name", ["gap", "avg", "small_siglip_gap"])
def test_an_average(files: Any, images: torch.Tensor, name: str) -> None:
    """Row 0 is the average as the tower outputs it, the attention the mean of the patches'."""
    teacher = load_teacher(files(name), device="cpu")
    model = alone(name, teacher)
    trunk = model.trunk if name in CLIPS else model
    head = model.head if name in CLIPS else torch.nn.Identity()
    prefix = trunk.num_prefix_tokens
    with torch.no_grad():
        patches = head(trunk.fc_norm(trunk.forward_features(images)))[:, prefix:]
        whole = model(images)[:, None]
    mean = last_attention(trunk, images)[:, prefix:].mean(dim=1)[:, prefix:]
    found, seen = teacher.forward(images)
    assert (found - torch.cat([whole, patches], dim=1)).abs().max() <= 2e-5 * whole.abs().max()
    assert (seen - mean).abs().max() <= 2e-6
    assert (seen > 0).all()
    assert mean.std() > 0.003
    assert (teacher.identity["pooling"], teacher.identity["left_out"]) == ("avg", prefix)
    assert "average" in teacher.about["notes"][0]


def test_open_clips_own_vit_that_averages(images: torch.Tensor, tmp_path: Path) -> None:
    """CLIPA: a class token is there, but the embedding is the average of the patches."""
    vision = {**TEACHER["vision_cfg"], "pool_type": "avg", "final_ln_after_pool": True}
    config = {**TEACHER, "vision_cfg": vision}
    (tmp_path / "clipa.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = open_clip.CLIP(**config).eval()
    state = {k: v * 2 if v.ndim == 2 else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "c.safetensors")
    spec = TeacherSpec(str(tmp_path / "clipa.json"), str(tmp_path / "c.safetensors"))
    teacher = load_teacher(spec, device="cpu")

    seen: dict[str, torch.Tensor] = {}
    blocks = model.visual.transformer.resblocks
    blocks[-1].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    blocks[-1].register_forward_hook(lambda _, args, output: seen.update(y=output))
    with torch.no_grad():
        whole = model.encode_image(images)
        patches = model.visual.ln_post(seen["y"])[:, 1:] @ model.visual.proj
        y = blocks[-1].ln_1(seen["x"])
        _, full = blocks[-1].attn(y, y, y, need_weights=True, average_attn_weights=True)
    tokens = torch.cat([whole[:, None], patches], dim=1)
    check(teacher, images, tokens, full[:, 1:].mean(dim=1)[:, 1:])
    assert (teacher.identity["pooling"], teacher.identity["left_out"]) == ("avg", 1)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_eva02", "siglip", "gap"])
def test_attention_knows_no_autocast(files: Any, images: torch.Tensor, name: str) -> None:
    """Masks are drawn from it: queries, keys and softmax are float32 under autocast too."""
    exact = load_teacher(files(name), device="cpu")
    half = load_teacher(files(name, precision="bf16"), device="cpu")
    tokens, attention = half.forward(images)
    expected, expected_attention = exact.forward(images)
    assert tokens.dtype == attention.dtype == torch.float32
    assert F.cosine_similarity(tokens, expected, dim=-1).min() >= 0.995
    assert (attention - expected_attention).norm() / expected_attention.norm() <= 0.1
    with torch.inference_mode():
        exact.tower.tokens(images)
        with torch.autocast("cpu", torch.bfloat16):
            inside = exact.tower.attention()
    assert torch.equal(inside, expected_attention)


def test_attention_of_a_half_precision_input(files: Any) -> None:
    """A tower that hands its last block halves: the logits are computed in float32 all the same."""
    tower = load_teacher(files("small_eva02"), device="cpu").tower
    assert isinstance(tower, TimmTower)
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        tower._keep_input(tower.trunk, (x,), {})
        halves = tower.attention()
        tower._keep_input(tower.trunk, (x.float(),), {})
        assert torch.equal(halves, tower.attention())
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("name", ["small_dinov2", "siglip", "gap"])
def test_attention_stays_positive(files: Any, images: torch.Tensor, name: str) -> None:
    """Nearly one-hot attention, where a float32 softmax underflows, is drawn from too."""
    teacher = load_teacher(files(name), device="cpu")
    trunk = teacher.visual.trunk if name in CLIPS else teacher.visual
    last = trunk.attn_pool.kv if name == "siglip" else trunk.blocks[-1].attn.qkv
    last.weight.data *= 300
    _, attention = teacher.forward(images)
    assert (attention > 0).all()
    assert attention.isfinite().all()
    assert attention.min() < 1e-30, "these weights are not sharp enough to underflow"


# --- identity and origin --------------------------------------------------------------------------


def test_the_plain_kind_keeps_its_identity(teacher_files: dict[str, str]) -> None:
    """Finished stores of open_clip's own ViTs must go on: no field more, none less."""
    plain = load_teacher(
        TeacherSpec(teacher_files["teacher"], teacher_files["pretrained"]), device="cpu"
    )
    assert list(plain.identity) == [
        "weights", "architecture", "channels", "image_size", "patch_size", "normalisation",
        "precision",
    ]  # fmt: skip
    vision = {k: v for k, v in TEACHER["vision_cfg"].items() if k != "image_size"}
    assert plain.identity["architecture"] == {**vision, "quick_gelu": True}
    assert plain.about["notes"] == []
    assert plain.about["class_token"] == "the class token"


def test_identity_tells_towers_apart(files: Any) -> None:
    """The same weights pooled otherwise are another teacher; training's settings are none."""
    spec = files("avg")
    first = load_teacher(spec, device="cpu").identity
    assert first["architecture"] == {
        "timm_model_name": "small_avg_trunk", "timm_pool": "avg", "timm_proj": "mlp"
    }  # fmt: skip
    config = json.loads(Path(spec.name).read_text())
    config["vision_cfg"] |= {"timm_drop": 0.1, "timm_drop_path": 0.2, "patch_dropout": 0.5}
    config["quick_gelu"] = False  # timm's towers run their own activation
    other = Path(spec.name).with_name("trained.json")
    other.write_text(json.dumps(config))
    assert load_teacher(TeacherSpec(str(other), spec.pretrained), device="cpu").identity == first
    dino = load_teacher(files("small_dinov2"), device="cpu")
    assert dino.identity["architecture"] == {"timm_model_name": "small_dinov2"}
    assert dino.identity["channels"] == 48
    assert dino.about["name"] == "timm:small_dinov2"
    assert dino.about["pretrained"] == "small_dinov2.safetensors"
    assert any("left out" in note and "4" in note for note in dino.about["notes"])


def test_random_weights_are_the_same_twice() -> None:
    """And draw nothing of the user's; a resumed store would mix two teachers."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = load_teacher(TeacherSpec("timm:small_dinov2", "none"), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    second = load_teacher(TeacherSpec("timm:small_dinov2", "none"), device="cpu")
    assert first.identity == second.identity
    assert first.about["random_weights"] is True
    assert first.about["licence"] == "none (random weights)"


@pytest.mark.parametrize(
    ("name", "real"),
    [("timm:vit_tiny_patch16_224.augreg_in21k", "augreg_in21k"), ("timm:vit_tiny_patch16_224", "")],
)
def test_timms_published_weights(monkeypatch: pytest.MonkeyPatch, name: str, real: str) -> None:
    """A tag brings weights, licence and normalisation; the classifier stays behind."""
    torch.manual_seed(4)
    classes = 21843 if real else 1000
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes)
    asked: list[str] = []

    def hub(repository: str, *_: Any, weights_only: bool = False, **__: Any) -> dict:
        assert weights_only
        asked.append(repository)
        return {k: v.half() for k, v in model.state_dict().items()}

    monkeypatch.setattr(pipeline.teachers.timm_vit, "load_state_dict_from_hf", hub)
    teacher = load_teacher(TeacherSpec(name), device="cpu")
    real = real or timm.get_pretrained_cfg("vit_tiny_patch16_224").tag
    assert asked == [f"timm/vit_tiny_patch16_224.{real}"]
    assert teacher.about["pretrained"] == real
    assert teacher.about["licence"] == "apache-2.0"
    assert teacher.about["random_weights"] is False
    assert teacher.identity["normalisation"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert (teacher.size, teacher.patch, teacher.channels) == (224, 16, 192)
    model.reset_classifier(0)
    assert teacher.identity["weights"] == weights_digest(model.half())
    same = load_teacher(TeacherSpec("timm:vit_tiny_patch16_224", real), device="cpu")
    assert same.identity == teacher.identity
    imagenet = load_teacher(TeacherSpec(name, norm="imagenet"), device="cpu")
    assert imagenet.about["normalisation"] == "imagenet"


def test_weights_fit_to_the_last_tensor(files: Any, tmp_path: Path) -> None:
    """timm alone would leave what it does not find random, because the classifier is gone."""
    spec = files("small_vit")
    whole = timm.create_model("small_vit", num_classes=7).state_dict()
    with_classifier = {k: v.contiguous() for k, v in whole.items()}
    save_file(with_classifier, tmp_path / "classifier.safetensors")
    load_teacher(TeacherSpec(spec.name, str(tmp_path / "classifier.safetensors")), device="cpu")
    torch.save({"model": {f"module.{k}": v for k, v in whole.items()}}, tmp_path / "run.pt")
    load_teacher(TeacherSpec(spec.name, str(tmp_path / "run.pt")), device="cpu")
    wrong = {
        "less": {k: v for k, v in with_classifier.items() if k != "blocks.1.norm1.weight"},
        "more": {**with_classifier, "blocks.2.norm1.bias": torch.zeros(48)},
        "shape": {**with_classifier, "norm.weight": torch.ones(49)},
        "other": {"a": torch.zeros(1)},
    }
    for name, state in wrong.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(TeacherError, match="do not fit the image tower of timm:small") as error:
            load_teacher(
                TeacherSpec(spec.name, str(tmp_path / f"{name}.safetensors")), device="cpu"
            )
        assert "\n" not in str(error.value)


def test_a_clips_weights_fit_to_the_last_tensor(files: Any, tmp_path: Path) -> None:
    """A timm tower inside a CLIP is loaded as strictly as open_clip's own."""
    spec = files("siglip")
    state = read_weights(Path(spec.pretrained))
    del state["visual.trunk.attn_pool.latent"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(TeacherError, match=r"do not fit the image tower of .*siglip"):
        load_teacher(TeacherSpec(spec.name, str(tmp_path / "less.safetensors")), device="cpu")


def test_a_local_dir_with_a_timm_tower(files: Any, images: torch.Tensor, tmp_path: Path) -> None:
    """The layout of open_clip's hub: the way SigLIP and EVA-CLIP come from there."""
    spec = files("siglip")
    expected = load_teacher(spec, device="cpu")
    model = open_clip.CustomTextCLIP(**without_custom_text(clip_config("siglip")))
    model.visual.load_state_dict(expected.visual.state_dict())
    folder = tmp_path / "hub"
    folder.mkdir()
    config = {"model_cfg": clip_config("siglip"), "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    found = load_teacher(TeacherSpec(f"local-dir:{folder}"), device="cpu")
    assert torch.equal(found.forward(images)[0], expected.forward(images)[0])
    assert found.identity["weights"] == expected.identity["weights"]
    assert found.identity["normalisation"]["mean"] == [0.5] * 3
    larger = load_teacher(TeacherSpec(f"local-dir:{folder}", img_size=48), device="cpu")
    assert larger.tokens == 37


# --- image size -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n in ("small_dinov2", "small_dinov3", "eva_clip", "siglip", "gap")
             if n in CLASS_TOKENS + POOLED],
)  # fmt: skip
def test_image_size(files: Any, name: str) -> None:
    """32 to 48 pixels: 36 patches instead of 16; another teacher."""
    before = load_teacher(files(name), device="cpu")
    larger = load_teacher(files(name, img_size=48), device="cpu")
    tokens, attention = larger.targets(torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8))
    assert tokens.shape == (2, 37, larger.channels)
    assert attention.shape == (2, 36)
    assert (larger.size, larger.tokens, larger.patch) == (48, 37, 8)
    assert larger.identity != before.identity
    same = load_teacher(files(name, img_size=32), device="cpu")
    assert same.identity == before.identity
    with pytest.raises(TeacherError, match=r"--img-size 50 is not .*try: --img-size 48 or 56"):
        load_teacher(files(name, img_size=50), device="cpu")


def test_resized_positions_are_timms(files: Any) -> None:
    """Positions are resampled, not drawn anew: what timm makes of them when it loads the file."""
    spec = files("small_dinov2", img_size=48)
    teacher = load_teacher(spec, device="cpu")
    model = timm.create_model("small_dinov2", num_classes=0, img_size=48)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(
        read_weights(Path(spec.pretrained)), model
    )
    assert torch.allclose(teacher.visual.pos_embed, filtered["pos_embed"], atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timm:resnet18", "its image tower is timm's resnet18"),
        ("timm:convnextv2_huge", "its image tower is timm's convnextv2_huge"),  # never built
        ("timm:swin_large_patch4_window12_384", "its image tower is timm's swin_large"),
        ("timm:small_parallel", "its blocks have no attention of their own"),
        ("timm:small_max", "it pools by 'max'"),
        ("timm:of_the_users_own", "its image tower is a ResNet"),
        ("ViTamin-B-none", "unknown teacher"),
    ],
)
def test_models_without_tokens_are_refused(name: str, why: str) -> None:
    """By a line that lists what works; some before they are built."""
    with pytest.raises(TeacherError, match=why) as error:
        load_teacher(TeacherSpec(name, "none"), device="cpu")
    if "unknown" not in why:
        for works in ("ViT-B-16", "EVA02-B-16", "SigLIP", "timm:vit_base_patch14_reg4_dinov2"):
            assert works in str(error.value)


small("small_parallel", "vit_base_patch16_xp_224")
small("small_max", "vit_base_patch16_siglip_gap_224", global_pool="max")


@register_model
def of_the_users_own(pretrained: bool = False, **kwargs: Any) -> Any:
    return model_entrypoint("resnet10t")(pretrained, **kwargs)


def test_names_of_timm_that_are_not_there() -> None:
    """The nearest name, the model's tags."""
    with pytest.raises(TeacherError, match=r"unknown teacher.*try: --teacher timm:.*dinov2"):
        load_teacher(TeacherSpec("timm:vit_base_patch14_dino2"))
    with pytest.raises(TeacherError, match=r"a tag of timm:vit_small_patch14_dinov2: lvd142m"):
        load_teacher(TeacherSpec("timm:vit_small_patch14_dinov2.lvd"))
    with pytest.raises(TeacherError, match=r"openai is neither a file nor a tag.*try: .*lvd142m"):
        load_teacher(TeacherSpec("timm:vit_small_patch14_dinov2", "openai"))
    with pytest.raises(TeacherError, match="two tags"):
        load_teacher(TeacherSpec("timm:vit_tiny_patch16_224.augreg_in21k", "augreg_in21k_ft_in1k"))
    with pytest.raises(TeacherError, match=r"timm knows no weights.*--pretrained FILE, or none"):
        load_teacher(TeacherSpec("timm:small_vit"))


def test_offline_says_which_file_to_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--offline asks nobody, and names the file."""
    import huggingface_hub.constants as hub

    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("a test tried to use the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    spec = TeacherSpec("timm:vit_base_patch14_reg4_dinov2", offline=True)
    with pytest.raises(TeacherError) as error:
        load_teacher(spec, device="cpu")
    assert tried == []
    text = str(error.value)
    assert "--offline, and the weights lvd142m of timm:vit_base_patch14_reg4_dinov2" in text
    assert "place model.safetensors of https://huggingface.co/timm/" in text
    assert "--pretrained FILE" in text


# --- into a store ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siglip", "small_dinov2", "gap"])
def test_extraction(files: Any, photos: Path, tmp_path: Path, name: str) -> None:
    """A real store of such a teacher holds what it says, and tells what row 0 is."""
    spec, progress = files(name), Notes()
    path = tmp_path / "t.zarr"
    extract_targets(
        str(photos), out=str(path), teacher=spec.name, pretrained=spec.pretrained, views=1,
        shard_size=24, limit=5, codec="float16", executor="local", device="cpu", progress=progress,
    )  # fmt: skip
    teacher = load_teacher(spec, device="cpu")
    views = open_cache(path)
    cache = views.cache
    rows, zeros = np.arange(5), np.zeros(5, np.int64)
    tokens, attention = teacher.targets(views.pixels(rows, zeros))
    got = cache.read(rows, zeros)
    assert np.abs(got.attention - attention.numpy()).max() <= 1e-6
    assert got.codes is not None
    features = cache.codec.decode(torch.from_numpy(got.codes), None)
    assert (features - tokens).abs().max() <= 1e-3 * tokens.abs().max()
    assert (tokens[0] - tokens[1]).abs().max() > 1e-2 * tokens.abs().max()

    about = cache.attributes["about"]
    for key in ("class_token", "attention", "left_out", "notes"):
        assert about[key] == teacher.about[key]
    assert cache.spec.teacher == teacher.identity
    assert cache.spec.teacher["pooling"] == {"siglip": "map", "gap": "avg"}.get(name, "token")
    assert any(f"row 0 is {about['class_token']}" in note for note in progress.lines)
    assert (cache.spec.tokens, cache.spec.channels) == (17, teacher.channels)


# One of each kind of attention, positions and pooling; the others differ in weights.
_KINDS = ("small_vit", "small_dinov3", "small_mixed", "small_beit", "eva_clip", "siglip", "avg")


@pytest.mark.parametrize("name", ["native", *(n for n in _KINDS if n in CLASS_TOKENS + POOLED)])
def test_nothing_waits_for_a_gpu(
    files: Any, teacher_files: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch on its way to what is stored: no value is read, nothing is copied, on any tower."""
    native = TeacherSpec(teacher_files["teacher"], teacher_files["pretrained"])
    spec = replace(native if name == "native" else files(name), precision="fp16")
    teacher = load_teacher(spec, device="cpu")
    codecs = [codec_of("int8").fitted(torch.randn(64, teacher.channels))]
    codecs += [codec_of("float16")] * (name == "native")
    with fake_gpu(monkeypatch) as (fake, waits):
        to_gpu(teacher.visual, fake)
        teacher.device = GPU
        pixels = torch.zeros(2, teacher.size, teacher.size, 3, dtype=torch.uint8, device=GPU)
        waits.found.clear()
        for codec in codecs:
            targets = targets_of(teacher, codec, pixels)
            assert {t.device for t in targets.values()} == {GPU}
        assert waits.found == {}
