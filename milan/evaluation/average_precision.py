"""Average precision of boxes and masks as COCO has it, by torchmetrics over faster-coco-eval."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert

from milan.core import rng
from milan.evaluation.coco import BoxSet, check_dense, mask_functions

_KINDS = {"box": "bbox", "mask": "segm"}
"""Our words for torchmetrics'."""
_SURE = 0.5  # score and overlap (IoU) that a detection of the confusion table has
_MOST = 100  # detections of an image that count


class AveragePrecision:
    """Detections on images of a set, and how good they are."""

    def __init__(self, truth: BoxSet) -> None:
        """Raises ConfigError if torchmetrics or faster-coco-eval is not installed."""
        check_dense()
        from torchmetrics.detection import MeanAveragePrecision

        self.truth = truth
        self.kinds = ("box",) if truth.masks is None else ("box", "mask")
        kinds: Any = tuple(_KINDS[kind] for kind in self.kinds)
        # Ranks are joined here; by itself it would wait for ranks that do not compute.
        self.metric = MeanAveragePrecision(
            iou_type=kinds, class_metrics=True, backend="faster_coco_eval", sync_on_compute=False
        )
        self.metric.warn_on_many_detections = False
        self.positions: list[int] = []
        """Of the images that were added."""

    def add(self, position: int, detections: dict[str, torch.Tensor]) -> None:
        """What was found on an image: boxes [k, 4], labels from 1 on, scores, masks [k, 1, H, W].

        Boxes are left, top, right, bottom in pixels of the image.
        """
        truth, there = self.truth, self.truth.of_image(position)
        detected = {name: value.cpu() for name, value in detections.items() if name != "masks"}
        detected["labels"] = detected["labels"] - 1
        annotated = {
            "boxes": torch.from_numpy(truth.boxes[there]),
            "labels": torch.from_numpy(truth.labels[there]),
            "iscrowd": torch.from_numpy(truth.crowd[there].astype(np.int64)),
            "area": torch.from_numpy(truth.areas[there]),
        }
        if truth.masks is not None:
            height, width = truth.shapes[position].tolist()
            masks = [truth.mask(box, (height, width)) for box in range(there.start, there.stop)]
            stacked = np.stack(masks) if masks else np.empty((0, height, width), np.uint8)
            annotated["masks"] = torch.from_numpy(stacked).bool()
            detected["masks"] = (detections["masks"][:, 0] >= 0.5).cpu()
        self.metric.update([detected], [annotated])
        self.positions.append(position)

    def state(self) -> tuple[list[int], dict[str, list[Any]]]:
        """All that was added, to be sent to another process."""
        return self.positions, {name: getattr(self.metric, name) for name in self.metric._defaults}

    @classmethod
    def joined(cls, truth: BoxSet, states: list[tuple[list[int], dict[str, list[Any]]]]) -> Any:
        """That of several processes, in the order of the images."""
        whole = cls(truth)
        positions = [position for part, _ in states for position in part]
        order = np.argsort(positions, kind="stable").tolist()
        whole.positions = [positions[i] for i in order]
        for name in whole.metric._defaults:
            parts = [each for _, lists in states for each in lists[name]]
            if parts:  # of masks, where there are none
                setattr(whole.metric, name, [parts[i] for i in order])
        whole.metric._update_count = 1  # else it warns that nothing was added
        return whole

    def figures(self) -> dict[str, Any]:
        """AP, AP50 and AP75 of boxes and masks in percent, and AP of each class [K].

        By kind: box_ap, box_ap50, box_ap75, box_classes, and mask_...; None where no object is.
        """
        computed, figures = self.metric.compute(), dict[str, Any]()
        seen = computed["classes"].reshape(-1).tolist()
        for kind in self.kinds:
            prefix = f"{_KINDS[kind]}_" if len(self.kinds) > 1 else ""
            for ours, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
                figures[f"{kind}_{ours}"] = _percent(computed[f"{prefix}{theirs}"].item())
            of_class = dict(
                zip(seen, computed[f"{prefix}map_per_class"].reshape(-1).tolist(), strict=True)
            )
            figures[f"{kind}_classes"] = [
                _percent(of_class.get(label, -1.0)) for label in range(len(self.truth.classes))
            ]
        return figures

    def intervals(self, *, resamples: int = 200, seed: int = 0) -> dict[str, tuple[float, float]]:
        """box_ap_interval, mask_ap_interval: 95 % in percent, by bootstrap over images.

        Detections are matched once for each image; only the precision is computed for each of the
        resamples (seeded), from the matches of the images drawn.
        """
        import faster_coco_eval.faster_eval_api_cpp as accumulator

        intervals, count = dict[str, tuple[float, float]](), len(self.positions)
        classes = len(self.truth.classes)
        for kind in self.kinds:
            evaluation = self._matched(_KINDS[kind])
            matches, values = evaluation._evalImgs_cpp, list[float]()
            generator = rng.generator(seed)
            for _ in range(resamples):
                drawn = generator.integers(0, count, count).tolist()
                chosen = [matches[k * count + image] for k in range(classes) for image in drawn]
                table = accumulator.COCOevalAccumulate(evaluation._paramsEval, chosen)["precision"]
                there = table[table > -1]
                values.append(100 * float(there.mean()) if there.size else 0.0)
            low, high = np.percentile(values, [2.5, 97.5])
            intervals[f"{kind}_ap_interval"] = (round(float(low), 2), round(float(high), 2))
        return intervals

    def _matched(self, kind: str) -> Any:
        """faster-coco-eval's evaluation, with a match for each class and image."""
        from faster_coco_eval import COCO, COCOeval_faster

        metric: Any = self.metric
        images = [
            {"id": i, "height": int(h), "width": int(w)}
            for i, (h, w) in enumerate(self.truth.shapes[self.positions])
        ]
        common = {
            "images": images,
            "categories": [{"id": k, "name": n} for k, n in enumerate(self.truth.classes)],
        }
        sets = []
        for side in ("groundtruth", "detection"):
            annotations: list[dict[str, Any]] = []
            for image, labels in enumerate(getattr(metric, f"{side}_labels")):
                boxes = getattr(metric, f"{side}_box")[image].tolist()
                for n, label in enumerate(labels.tolist()):
                    entry = {
                        "id": len(annotations) + 1, "image_id": image, "category_id": label,
                        "bbox": boxes[n], "area": boxes[n][2] * boxes[n][3], "iscrowd": 0,
                    }  # fmt: skip
                    if kind == "segm":
                        size, counts = getattr(metric, f"{side}_mask")[image][n]
                        entry["segmentation"] = {"size": list(size), "counts": counts}
                    if side == "groundtruth":
                        entry["iscrowd"] = int(metric.groundtruth_crowds[image][n])
                    else:
                        entry["score"] = float(metric.detection_scores[image][n])
                    annotations.append(entry)
            sets.append(COCO(common | {"annotations": annotations}))
        evaluation = COCOeval_faster(
            *sets, iouType=kind, print_function=lambda *_: None, separate_eval=True
        )
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [_MOST]
        evaluation.evaluate()
        return evaluation

    def confusion(self) -> np.ndarray:
        """int64 [K + 1, K + 1]: objects of class i taken for class j; K: nothing there, not found.

        Of detections with a score of 0.5 and more, by falling score: each takes the object that it
        overlaps most, if by 0.5 (IoU) and not taken yet. Those on a crowd do not count.
        """
        metric, k = self.metric, len(self.truth.classes)
        counts = np.zeros((k + 1, k + 1), np.int64)
        for image, position in enumerate(self.positions):
            there = self.truth.of_image(position)
            labels, crowd = self.truth.labels[there], self.truth.crowd[there]
            scores = metric.detection_scores[image]
            sure = torch.argsort(scores, descending=True)[: int((scores >= _SURE).sum())]
            boxes = box_convert(metric.detection_box[image].reshape(-1, 4)[sure], "xywh", "xyxy")
            overlap = _overlaps(boxes.numpy(), self.truth.boxes[there], crowd)
            taken = np.zeros(len(labels), bool)
            for n, predicted in enumerate(metric.detection_labels[image][sure].tolist()):
                free = np.where(taken, -1.0, overlap[n]) if len(labels) else np.array([-1.0])
                best = int(free.argmax())
                if free[best] < _SURE:
                    counts[k, predicted] += 1
                elif crowd[best]:
                    continue
                else:
                    taken[best] = True
                    counts[labels[best], predicted] += 1
            np.add.at(counts[:, k], labels[~taken & ~crowd], 1)
        return counts

    def found_on(self, image: int) -> dict[str, Any]:
        """What was found on the image that was added as number `image`: boxes [k, 4] (left, top,
        right, bottom), labels from 0 on, scores, and the function `mask_of` to its masks [H, W]."""
        metric: Any = self.metric
        boxes, mask = metric.detection_box[image].reshape(-1, 4), mask_functions()

        def mask_of(n: int) -> np.ndarray:
            size, counts = metric.detection_mask[image][n]
            return mask.decode({"size": list(size), "counts": counts})

        return {
            "boxes": box_convert(boxes, "xywh", "xyxy").numpy(),
            "labels": metric.detection_labels[image].numpy(),
            "scores": metric.detection_scores[image].numpy(),
            "mask_of": mask_of,
        }


def _overlaps(detected: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """[k, n] IoU of boxes [k, 4] with those annotated [n, 4]; with a `crowd` the share of what was
    found that lies in it."""
    sides = np.minimum(detected[:, None, 2:], boxes[:, 2:]) - np.maximum(
        detected[:, None, :2], boxes[:, :2]
    )
    common = sides.clip(0).prod(axis=-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(axis=-1) for b in (detected, boxes)]
    union = areas[0][:, None] + np.where(crowd, 0, areas[1] - common)
    return common / union.clip(1e-12)


def _percent(share: float) -> float | None:
    """COCO says -1 where no object is."""
    return None if share < 0 else round(100 * share, 2)
