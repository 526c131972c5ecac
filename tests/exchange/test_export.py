"""`milan export`: each format opened by its own library, and features compared with the encoder's.

One file, so that one process imports transformers. mmpretrain and detectron2 cannot be installed
here: their names and shapes are written out, and detectron2's pass is written down.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import Notes, run_here
from torch import nn

import milan
from milan.errors import CacheError, ConfigError, MilanError
from milan.models.classifier import CLASSIFIER, load_classifier, seeded_classifier
from milan.models.encoder import build_encoder, create_vit
from milan.models.export import ENCODER, load_encoder, save_encoder
from milan.models.foreign import read_foreign
from milan.models.published import load_published

MEAN, STD = (0.41, 0.52, 0.63), (0.2, 0.3, 0.25)  # of no library: a default would show
VIT = "vit_base_patch16_224"
ARGS = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
CLASSES = ["ape", "bee", "cow"]
TEACHER = {"name": "ViT-B-16", "pretrained": "openai", "random_weights": False, "licence": "MIT"}
MOST = 1e-5
"""How far features may be apart."""


def drawn(vit: Any) -> Any:
    """Every weight differs from every other, or a wrong place could not show."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in vit.named_parameters():
        if name != "pos_embed":
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return vit.eval()


def about(objective: str = "milan") -> dict[str, Any]:
    return {
        "model": VIT, "model_args": ARGS, "mean": MEAN, "std": STD, "input_size": 32,
        "objective": objective, "epochs": 3.0, "cache": "ab" * 32, "teacher": TEACHER,
        "milan": "0.1.0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders of two objectives, classifiers by the class token and by the mean of patches."""
    folder = tmp_path_factory.mktemp("runs")
    for objective in ("milan", "rils"):
        (folder / objective).mkdir()
        vit = drawn(build_encoder(VIT, img_size=32, args=ARGS))
        save_encoder(folder / objective / ENCODER, vit.state_dict(), about(objective))
    for pooling in ("token", "mean"):
        (folder / pooling).mkdir()
        vit = drawn(seeded_classifier(1, VIT, ARGS, size=32, classes=3, pooling=pooling))
        tuned = about() | {"classes": CLASSES, "pooling": pooling, "crop_share": 0.8}
        save_encoder(folder / pooling / CLASSIFIER, vit.state_dict(), tuned)
    (folder / "milan" / "knn.json").write_text(json.dumps({"k20": 80.25}))
    return folder


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exported("timm", "milan", size=48) -> the folder; made once for each."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(format: str, run: str = "milan", size: int | None = None) -> Path:
        key = (format, run, size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(format) / f"{run}-{size or 32}"
            milan.export(
                str(place / run), format=format, out=str(made[key]), size=size, progress=Notes()
            )
        return made[key]

    return make


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def ours(place: Path, run: str, size: int = 32) -> Any:
    """The network as milan opens it; at another size its sine-cosine positions are computed."""
    if (place / run / CLASSIFIER).exists():
        return load_classifier(place / run)
    trained = load_encoder(place / run)
    if size == 32:
        return trained
    vit = build_encoder(VIT, img_size=size, args=ARGS)
    state = {k: v for k, v in trained.state_dict().items() if k != "pos_embed"}
    assert vit.load_state_dict(state, strict=False).missing_keys == ["pos_embed"]
    return vit.eval()


@torch.no_grad()
def close(found: Any, expected: Any) -> None:
    """Features are the encoder's."""
    assert found.shape == expected.shape
    most = float((torch.as_tensor(found) - expected).abs().max())
    print(f"largest difference {most:.1e}")  # pytest -rP shows it: the table of docs/checkpoints.md
    assert most <= MOST


SIZES = pytest.mark.parametrize("size", [32, 48])


@SIZES
@torch.no_grad()
def test_timm(size: int, place: Path, exported: Callable[..., Path]) -> None:
    """Opened as it is; its mean is not timm's 0.5; pooling is what training trained."""
    x = images(size)
    for run in ("milan", "rils"):
        folder, vit = exported("timm", run, size if size != 32 else None), ours(place, run, size)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        tokens = vit.forward_features(x)
        close(model.forward_features(x), tokens)
        close(model(x), tokens[:, 0] if run == "milan" else tokens[:, 1:].mean(dim=1))
        if size == 32:
            close(vit(x), model(x))
        data = timm.data.resolve_model_data_config(model)
        assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)
        assert (tuple(data["input_size"]), data["crop_pct"]) == ((3, size, size), 0.875)
        assert data["interpolation"] == "bicubic"


@torch.no_grad()
def test_timms_own_arguments(exported: Callable[..., Path]) -> None:
    """A new head, grey pictures, other sizes, maps: as for timm's own weights."""
    name, x = f"local-dir:{exported('timm')}", images()
    plain = timm.create_model(name, pretrained=True).eval()
    headed = timm.create_model(name, pretrained=True, num_classes=5).eval()
    assert headed(x).shape == (2, 5)
    close(headed.forward_features(x), plain.forward_features(x))
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    close(grey(x[:, :1]), plain(x[:, :1].expand(-1, 3, -1, -1)))
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=[0, 1])
    assert maps.eval()(x)[-1].shape == (2, 64, 4, 4)
    any_size = timm.create_model(name, pretrained=True, dynamic_img_size=True).eval()
    close(any_size(x), plain(x))
    fixed = timm.create_model(name, pretrained=True, img_size=48).eval()
    close(any_size(images(48)), fixed(images(48)))


@pytest.mark.soak
@torch.no_grad()
def test_from_a_hub(
    place: Path, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as a hub's cache has it: timm and transformers open it without a network."""
    from huggingface_hub import constants
    from transformers import AutoModel

    repository = tmp_path / "models--me--encoder"
    shutil.copytree(exported("timm"), repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = ours(place, "milan").forward_features(images())
    model = timm.create_model("hf-hub:me/encoder", pretrained=True, cache_dir=tmp_path).eval()
    close(model.forward_features(images()), expected)
    same = AutoModel.from_pretrained("me/encoder", cache_dir=tmp_path).eval()
    close(same(images()).last_hidden_state, expected)


@pytest.mark.soak
@SIZES
@torch.no_grad()
def test_transformers(size: int, place: Path, exported: Callable[..., Path]) -> None:
    """timm's folder opens by a wrapper of timm; ViTModel opens without timm. Nothing is drawn
    anew, and what was written is read again."""
    from transformers import AutoImageProcessor, AutoModel

    x, changed = images(size), size if size != 32 else None
    tokens = ours(place, "milan", size).forward_features(x)
    wrapped = AutoModel.from_pretrained(exported("timm", "milan", changed)).eval()(x)
    folder = exported("transformers", "milan", changed)
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "ViTModel"
    assert not any(loading.values()), loading
    for found in (wrapped, model.eval()(x)):
        close(found.last_hidden_state, tokens)
        close(found.pooler_output, tokens[:, 0])
    processor = AutoImageProcessor.from_pretrained(folder)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)
    shown = processor(torch.zeros(3, 60, 90, dtype=torch.uint8), return_tensors="pt")
    assert shown["pixel_values"].shape == (1, 3, size, size)
    back = read_foreign(folder)
    assert (back.size, back.heads, tuple(back.mean)) == (size, 2, MEAN)
    for name, tensor in ours(place, "milan", size).state_dict().items():
        assert (back.encoder[name] - tensor).abs().max() <= 1e-6
    model.save_pretrained(folder.parent / "again")  # the names that transformers itself writes
    again = read_foreign(folder.parent / "again").encoder
    assert all(torch.equal(again[name], tensor) for name, tensor in back.encoder.items())


@pytest.mark.soak
@torch.no_grad()
def test_mae_of_transformers_itself(tmp_path: Path) -> None:
    """ViTMAE as the library writes it, with its decoder, without any table of ours."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=128, mask_ratio=0.0,
    )  # fmt: skip
    theirs = drawn(ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path)
    found = read_foreign(tmp_path)
    assert (found.size, found.heads) == (32, 2)
    vit = build_encoder(VIT, img_size=32, args=found.args)
    vit.load_state_dict(found.encoder)
    x, noise = images(), torch.arange(16.0).expand(2, -1)  # patches stay in their order
    close(vit.eval().forward_features(x), theirs.vit(x, noise=noise).last_hidden_state)
    assert found.decoder
    assert torch.equal(found.decoder["pred.weight"], theirs.decoder.decoder_pred.weight)
    assert "blocks.0.attn.qkv.weight" in found.decoder


@pytest.mark.soak
@torch.no_grad()
def test_norms_of_another_eps(tmp_path: Path) -> None:
    """It travels in the configuration, or in the Python that the card shows, with a note."""
    vit = drawn(build_encoder(VIT, img_size=32, args=ARGS | {"norm_eps": 1e-3}))
    (tmp_path / "run").mkdir()
    told = about() | {"model_args": ARGS | {"norm_eps": 1e-3}}
    save_encoder(tmp_path / "run" / ENCODER, vit.state_dict(), told)
    x, notes = 0.1 * images(), Notes()
    tokens = vit.forward_features(x)
    close(load_encoder(tmp_path / "run").forward_features(x), tokens)

    def use(format: str) -> dict[str, Any]:
        out = tmp_path / format
        made = milan.export(str(tmp_path / "run"), format=format, out=str(out), progress=notes)
        found: dict[str, Any] = {}
        if format not in ("mmpretrain", "detectron2"):
            exec(made["use"], found)
        return found

    opened = use("timm")
    close(opened["model"].forward_features(x), tokens)
    other = (opened["same"](x).last_hidden_state - tokens).abs().max()
    assert other > 1e-4, "the note is needed"
    assert "is 0.001: without `norm_layer` timm takes another" in " ".join(notes.lines)
    close(use("transformers")["model"](x).last_hidden_state, tokens)
    close(use("torchvision")["model"](x), tokens[:, 0])
    assert "without `norm_layer` torchvision takes another" in " ".join(notes.lines)
    use("official")
    assert "is 0.001, that of the authors' networks 1e-6" in " ".join(notes.lines)
    use("mmpretrain")
    settings: dict[str, Any] = {}
    exec((tmp_path / "mmpretrain/config.py").read_text(), settings)
    assert settings["model"]["backbone"]["norm_cfg"] == {"type": "LN", "eps": 1e-3}
    use("detectron2")
    assert "LayerNorm, eps=0.001)" in (tmp_path / "detectron2/config.py").read_text()


@pytest.mark.soak
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
@torch.no_grad()
def test_eps_of_transformers(eps: float, tmp_path: Path) -> None:
    """Features are those of the library's own ViT: by its config.json, for the folder and for its
    file; a file alone has the library's default, and the note says so."""
    from transformers import ViTConfig, ViTModel

    theirs = drawn(ViTModel(ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
        intermediate_size=256, layer_norm_eps=eps,
    )))  # fmt: skip
    theirs.embeddings.requires_grad_(False)
    for parameter in theirs.embeddings.parameters():
        parameter *= 0.01  # small tokens, in whose norms eps counts
    theirs.save_pretrained(tmp_path / "whole")
    expected = theirs(images()).last_hidden_state

    def features(path: Path, **args: Any) -> Any:
        found = read_foreign(path)
        vit = create_vit(found.model, img_size=found.size, args=found.args | args)
        vit.load_state_dict(found.encoder)
        return vit.eval().forward_features(images())

    weights = tmp_path / "whole/model.safetensors"
    for path in (tmp_path / "whole", weights):
        close(features(path), expected)
        assert "eps" not in read_foreign(path).said
    assert (features(weights, norm_eps=1e-6) - expected).abs().max() > MOST, "it counts"
    alone = Path(shutil.copy(weights, tmp_path))
    assert "eps of the norms is not in it: 1e-12 assumed" in read_foreign(alone).said
    assert ((features(alone) - expected).abs().max() <= MOST) == (eps == 1e-12)


@torch.no_grad()
def test_classifiers(place: Path, exported: Callable[..., Path]) -> None:
    """Logits and crop travel; what a library cannot hold is refused."""
    x = images()
    for run in ("token", "mean"):
        model = timm.create_model(f"local-dir:{exported('timm', run)}", pretrained=True).eval()
        close(model(x), ours(place, run)(x))
        assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.8
    close(of_torchvision(exported("torchvision", "token"))(x), ours(place, "token")(x))
    state = torch.load(exported("mmpretrain", "mean") / "model.pth", weights_only=True)
    assert state["state_dict"]["head.fc.weight"].shape == (3, 64)
    assert "backbone.ln2.weight" in state["state_dict"]
    for format, run in (("transformers", "mean"), ("torchvision", "mean"), ("detectron2", "token")):
        with pytest.raises(ConfigError) as error:
            exported(format, run)
        assert "--format timm" in error.value.fix


@pytest.mark.soak
@torch.no_grad()
def test_classifiers_in_transformers_and_onnx(place: Path, exported: Callable[..., Path]) -> None:
    """Names of classes travel."""
    import onnxruntime
    from transformers import AutoModelForImageClassification as Auto

    x = images()
    for format, run in (("timm", "token"), ("timm", "mean"), ("transformers", "token")):
        model = Auto.from_pretrained(exported(format, run)).eval()
        close(model(x).logits, ours(place, run)(x))
        assert model.config.id2label == dict(enumerate(CLASSES))
    session = onnxruntime.InferenceSession(exported("onnx", "mean") / "model.onnx")
    close(session.run(None, {"images": x.numpy()})[0], ours(place, "mean")(x))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES


def of_torchvision(folder: Path) -> Any:
    """As its card says."""
    from torchvision.models import VisionTransformer

    config = json.loads((folder / "config.json").read_text())
    assert (tuple(config["mean"]), tuple(config["std"])) == (MEAN, STD)
    model = VisionTransformer(**config["arguments"])
    if not config["classes"]:
        model.heads = nn.Identity()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    return model.eval()


@SIZES
@torch.no_grad()
def test_torchvision(size: int, place: Path, exported: Callable[..., Path]) -> None:
    """Its output is the class token; what was written is read again."""
    folder = exported("torchvision", "milan", size if size != 32 else None)
    vit = ours(place, "milan", size)
    close(of_torchvision(folder)(images(size)), vit(images(size)))
    back = read_foreign(folder / "model.pth").encoder
    assert all(
        (back[name] - tensor).abs().max() <= 1e-6 for name, tensor in vit.state_dict().items()
    )


@pytest.mark.soak
@SIZES
@torch.no_grad()
def test_onnx(size: int, place: Path, exported: Callable[..., Path]) -> None:
    """Any number of images; mean and deviation are in the file."""
    import onnxruntime

    vit, folder = (
        ours(place, "milan", size),
        exported("onnx", "milan", size if size != 32 else None),
    )
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for count in (1, 3):
        x = images(size, count)
        tokens, pooled = session.run(["tokens", "pooled"], {"images": x.numpy()})
        close(tokens, vit.forward_features(x))
        close(pooled, vit(x))
    assert json.loads(session.get_modelmeta().custom_metadata_map["mean"]) == list(MEAN)


@pytest.mark.soak
@pytest.mark.parametrize("size", [224, 256])
@torch.no_grad()
def test_the_published_size(size: int, tmp_path: Path) -> None:
    """ViT-B/16, at the size of training and at another, in every library that is installed."""
    import onnxruntime
    from transformers import AutoModel

    run, x = tmp_path / "run", images(size)
    run.mkdir()
    trained = drawn(build_encoder(VIT, img_size=224))
    whole = about() | {"model_args": {}, "input_size": 224}
    save_encoder(run / ENCODER, trained.state_dict(), whole)
    vit = build_encoder(VIT, img_size=size)
    state = {k: v for k, v in trained.state_dict().items() if k != "pos_embed"}
    vit.load_state_dict(state, strict=False)
    tokens = vit.eval().forward_features(x)
    for format in ("timm", "transformers", "torchvision", "onnx"):
        folder = tmp_path / format
        milan.export(str(run), format=format, out=str(folder), size=size, progress=Notes())
        print(format, end=": ")
        if format == "timm":
            close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
                  .forward_features(x), tokens)  # fmt: skip
        if format in ("timm", "transformers"):
            close(AutoModel.from_pretrained(folder).eval()(x).last_hidden_state, tokens)
        if format == "torchvision":
            close(of_torchvision(folder)(x), tokens[:, 0])
        if format == "onnx":
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            close(session.run(["tokens"], {"images": x.numpy()})[0], tokens)
        shutil.rmtree(folder)


MMPRETRAIN = {  # mmpretrain 1.2, VisionTransformer of two layers
    "cls_token": (1, 1, 64), "pos_embed": (1, 17, 64),
    "patch_embed.projection.weight": (64, 3, 8, 8), "patch_embed.projection.bias": (64,),
    "ln1.weight": (64,), "ln1.bias": (64,),
    **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in {
        "ln1.weight": (64,), "ln1.bias": (64,), "ln2.weight": (64,), "ln2.bias": (64,),
        "attn.qkv.weight": (192, 64), "attn.qkv.bias": (192,), "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,), "ffn.layers.0.0.weight": (256, 64), "ffn.layers.0.0.bias": (256,),
        "ffn.layers.1.weight": (64, 256), "ffn.layers.1.bias": (64,),
    }.items()},
}  # fmt: skip
DETECTRON2 = {  # detectron2, modeling/backbone/vit.py: no class token, no last norm
    "pos_embed": (1, 17, 64),
    "patch_embed.proj.weight": (64, 3, 8, 8), "patch_embed.proj.bias": (64,),
    **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in {
        "norm1.weight": (64,), "norm1.bias": (64,), "norm2.weight": (64,), "norm2.bias": (64,),
        "attn.qkv.weight": (192, 64), "attn.qkv.bias": (192,), "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,), "mlp.fc1.weight": (256, 64), "mlp.fc1.bias": (256,),
        "mlp.fc2.weight": (64, 256), "mlp.fc2.bias": (64,),
    }.items()},
}  # fmt: skip


@torch.no_grad()
def test_names_of_what_is_not_installed(place: Path, exported: Callable[..., Path]) -> None:
    """mmpretrain, detectron2 and MILAN's authors: every name and shape, and the configuration."""
    for size in (32, 48):
        changed, tokens = size if size != 32 else None, 1 + (size // 8) ** 2
        mm = exported("mmpretrain", "milan", changed)
        state = torch.load(mm / "model.pth", weights_only=True)["state_dict"]
        golden = MMPRETRAIN | {"pos_embed": (1, tokens, 64)}
        assert {k: tuple(v.shape) for k, v in state.items()} == {
            f"backbone.{name}": shape for name, shape in golden.items()
        }
        settings: dict[str, Any] = {}
        exec((mm / "config.py").read_text(), settings)
        assert settings["model"]["backbone"]["img_size"] == size
        assert settings["data_preprocessor"]["mean"] == [104.55, 132.6, 160.65]
        back = read_foreign(mm / "model.pth").encoder
        vit = ours(place, "milan", size)
        assert all((back[k] - v).abs().max() <= 1e-6 for k, v in vit.state_dict().items())

        folder = exported("detectron2", "milan", changed)
        held = torch.load(folder / "model.pth", weights_only=True)["model"]
        golden = DETECTRON2 | {"pos_embed": (1, tokens, 64)}
        assert {k: tuple(v.shape) for k, v in held.items()} == {
            f"backbone.net.{name}": shape for name, shape in golden.items()
        }
        compile((folder / "config.py").read_text(), "config.py", "exec")
        blocks = build_encoder(VIT, img_size=size, args=ARGS).blocks.eval()
        start = "backbone.net."
        blocks.load_state_dict(
            {k.removeprefix(start + "blocks."): v for k, v in held.items() if "blocks" in k}
        )
        x = images(size)
        weight, bias = (held[f"{start}patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        found = nn.functional.conv2d(x, weight, bias, stride=8).flatten(2).transpose(1, 2)
        found = blocks(found + held[start + "pos_embed"][:, 1:])
        expected = vit.blocks(vit.patch_embed(x) + vit.pos_embed[:, 1:])
        close(found, expected)
        official = torch.load(exported("official", "milan", changed) / "checkpoint.pth")["model"]
        assert {k: v.shape for k, v in official.items()} == {
            k: v.shape for k, v in vit.state_dict().items()
        }


def test_a_real_run(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """With its decoder in the official layout; its card names store, data, teacher and figures."""
    run = finished_run()
    for format in ("official", "timm"):
        done = run_here("export", run, "--format", format, "--out", tmp_path / format)
        assert done.code == 0, done.err
        assert "README.md" in done.out
    state = torch.load(tmp_path / "official" / "checkpoint.pth", weights_only=True)["model"]
    student = load_published(state, config={"num_heads": 2, "decoder_num_heads": 2})
    assert torch.equal(student.encoder.norm.weight, load_encoder(run).norm.weight)
    card = (tmp_path / "timm" / "README.md").read_text()
    for words in ("library_name: timm", "local-dir:timm", "| data |", "/photos", "| images | 24",
                  "RANDOM WEIGHTS" if "RANDOM" in card else "| teacher |",
                  "licence of the teacher's weights", "identity of the store", "epochs 7",
                  "training: loss", "Linear probe", "## Not measured"):  # fmt: skip
        assert words in card, words
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)


def test_the_card_of_what_was_measured(exported: Callable[..., Path]) -> None:
    """Figures in the run's folder stand there, and no protocol is both measured and not."""
    card = (exported("timm") / "README.md").read_text()
    assert "| k nearest neighbours, top-1 | k 20 % 80.2 |" in card
    assert "nearest" not in card.partition("## Not measured")[2]
    assert "| licence of the teacher's weights | MIT |" in card
    assert "an image as one vector | class token" in card
    assert "mean of patches" in (exported("timm", "rils") / "README.md").read_text()


def test_bad_input(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and no folder is left."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    (tmp_path / "page.pth").write_text("<html>sign in</html>")
    run = str(place / "milan")
    out = str(tmp_path / "out")
    cases: list[tuple[dict[str, Any], type[MilanError], str]] = [
        ({"checkpoint": run, "out": str(tmp_path / "full")}, ConfigError, "full exists"),
        ({"checkpoint": run, "size": 36}, ConfigError, "do not tile 36"),
        ({"checkpoint": run, "format": "onnx"}, ConfigError, r"milan-pretrain\[export\]"),
        ({"checkpoint": run, "format": "keras"}, ConfigError, "keras"),
        ({"checkpoint": str(tmp_path / "none")}, CacheError, "no encoder.safetensors at"),
        ({"checkpoint": str(tmp_path / "page.pth")}, ConfigError, "is a web page"),
        ({"checkpoint": str(tmp_path / "full")}, CacheError, "no encoder.safetensors"),
    ]
    for given, kind, found in cases:
        with pytest.raises(kind, match=found) as error:
            milan.export(**{"out": out, "progress": Notes()} | given)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "page.pth"]


@pytest.mark.soak
@torch.no_grad()
def test_the_encoder_in_torchs_own_tools(place: Path) -> None:
    """Copied, pickled, compiled without a break, and exported with a free number of images."""
    vit, x = load_encoder(place / "milan"), images()
    expected = vit(x)
    assert torch.equal(copy.deepcopy(vit)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(vit))(x), expected)
    close(torch.compile(vit, backend="eager", fullgraph=True)(x), expected)
    free = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(vit, (x,), dynamic_shapes=free).module()
    close(program(images(count=3)), vit(images(count=3)))
