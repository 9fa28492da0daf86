from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)
from transformers.image_processing_utils import BatchFeature
from transformers.utils import ModelOutput

from mask_llava_hf.processing.objects.detectors import ObjectDetector, class_probabilities


LABELS = {0: "cat", 1: "dog", 2: "mouse"}


def resnet():
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )


def deformable_detr():
    config = DeformableDetrConfig(
        backbone_config=resnet(), use_timm_backbone=False, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12,
        id2label=LABELS,
    )  # fmt: skip
    size = {"shortest_edge": 96, "longest_edge": 160}  # the fourth level still has more than one pixel
    return DeformableDetrForObjectDetection(config), DeformableDetrImageProcessor(size=size)


def detr():
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12,
        id2label=LABELS,
    )  # fmt: skip
    return DetrForObjectDetection(config), DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})


def rt_detr():
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[8, 16, 16], d_model=32,
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, decoder_layers=1, num_queries=12, num_denoising=0, anchor_image_size=None,
        id2label=LABELS,
    )  # fmt: skip
    return RTDetrForObjectDetection(config), RTDetrImageProcessor(size={"height": 64, "width": 64})


def yolos():
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[48, 64],
        num_detection_tokens=12, id2label=LABELS,
    )  # fmt: skip
    return YolosForObjectDetection(config), YolosImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})


FAMILIES = {"deformable_detr": deformable_detr, "rt_detr": rt_detr, "detr": detr, "yolos": yolos}


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request, tmp_path_factory):
    """A tiny detector with random weights in a folder, its logits spread so that classes and scores differ."""
    torch.manual_seed(0)
    model, image_processor = FAMILIES[request.param]()
    for name, parameter in model.named_parameters():
        if "class" in name or "bbox" in name:
            torch.nn.init.normal_(parameter, std=0.7 if "class" in name else 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [picture(60, 80), picture(60, 80, 1), picture(81, 50, 2), picture(30, 40, 3)]


def plain_candidates(detector, image, threshold, number):
    """One image, query by query."""
    inputs = detector.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    softmax = detector.model.config.model_type in ("detr", "yolos")
    found = []
    for query, (logits, (x, y, w, h)) in enumerate(zip(outputs.logits[0], outputs.pred_boxes[0].tolist(), strict=True)):
        scores = logits.softmax(0)[:-1] if softmax else logits.sigmoid()
        box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        box = [
            min(max(value * side, 0), side) for value, side in zip(box, [image.width, image.height] * 2, strict=True)
        ]
        if scores.max() >= threshold and box[2] > box[0] and box[3] > box[1]:
            found.append((-scores.max().item(), query, LABELS[int(scores.argmax())], box))
    return sorted(found)[:number]


def test_candidates_are_the_best_class_of_each_query(saved):
    detector = ObjectDetector.from_pretrained(saved)
    found = detector.detect(PICTURES, score_threshold=0.2, max_candidates=7)
    for image, objects in zip(PICTURES, found, strict=True):
        expected = plain_candidates(detector, image, 0.2, 7)
        assert len(expected) > 1 and objects.labels == [label for _, _, label, _ in expected]
        assert objects.image_hw == (image.height, image.width) and objects.masks is None
        torch.testing.assert_close(
            objects.scores, torch.tensor([-score for score, *_ in expected]), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            objects.boxes_xyxy, torch.tensor([box for *_, box in expected]), rtol=1e-3, atol=1e-3
        )


def test_an_image_is_detected_alike_alone_and_among_others(saved):
    detector = ObjectDetector.from_pretrained(saved)
    together = detector.detect(PICTURES, 0.2, 7)
    detector.batch_size = 1
    for image, objects in zip(PICTURES, together, strict=True):
        alone = detector.detect([image], 0.2, 7)[0]
        torch.testing.assert_close(objects.boxes_xyxy, alone.boxes_xyxy, rtol=1e-3, atol=1e-3)
        assert objects.labels == alone.labels


def test_the_layout_of_convolutions_changes_nothing(saved):
    detector = ObjectDetector.from_pretrained(saved)
    kernels = [kernel for kernel in detector.model.parameters() if kernel.ndim == 4]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    found = detector.detect(PICTURES, 0.2, 7)
    detector.model.to(memory_format=torch.contiguous_format)
    for objects, plain in zip(found, detector.detect(PICTURES, 0.2, 7), strict=True):
        torch.testing.assert_close(objects.scores, plain.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(objects.boxes_xyxy, plain.boxes_xyxy, rtol=0, atol=1e-3)


def test_the_threshold_can_leave_nothing_and_no_images_are_no_work(saved):
    detector = ObjectDetector.from_pretrained(saved)
    assert [len(objects) for objects in detector.detect(PICTURES[:2], score_threshold=1.0)] == [0, 0]
    assert [len(objects) for objects in detector.detect(PICTURES[:2], 0.0, max_candidates=0)] == [0, 0]
    assert detector.detect([]) == []


def test_what_is_found_may_be_changed(saved):
    boxes = ObjectDetector.from_pretrained(saved).detect(PICTURES[:1], 0.0, 3)[0].boxes_xyxy
    boxes += 1
    assert not boxes.is_inference()


def test_half_precision_runs(saved):
    detector = ObjectDetector.from_pretrained(saved, dtype=torch.bfloat16)
    assert next(detector.model.parameters()).dtype == torch.bfloat16
    assert len(detector.detect(PICTURES[:1], 0.0, 5)[0]) == 5


def test_nan_in_the_output_is_an_error(saved):
    detector = ObjectDetector.from_pretrained(saved)
    with torch.no_grad():
        for name, parameter in detector.model.named_parameters():
            if name.endswith("bias") and "class" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN in .* logits.*torch.float32"):
        detector.detect(PICTURES[:1])


class FixedOutputs(torch.nn.Module):
    """A detector with given outputs."""

    def __init__(self, logits, boxes, num_labels=3):
        super().__init__()
        self.logits, self.boxes = torch.tensor([logits]), torch.tensor([boxes])
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(num_labels=num_labels, id2label=LABELS, model_type="fixed")

    def forward(self, pixel_values, pixel_mask=None):
        return ModelOutput(logits=self.logits, pred_boxes=self.boxes)


def unpadded(images, return_tensors):
    return BatchFeature({"pixel_values": torch.zeros(1, 3, 8, 8)})


def test_degenerate_boxes_are_dropped_before_the_cut():
    boxes = [[0.5, 0.5, 0.5, 0.5], [1.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.0, 0.5], [0.0, 0.0, 0.5, 0.5]]
    detector = ObjectDetector(FixedOutputs([[0.0, -9, -9], [5, -9, -9], [4, -9, -9], [-9, -9, 0.0]], boxes), unpadded)
    objects = detector.detect([picture(40, 80)], 0.3, 2)[0]
    assert objects.boxes_xyxy.tolist() == [[20, 10, 60, 30], [0, 0, 20, 10]]
    assert objects.scores.tolist() == [0.5, 0.5] and objects.labels == ["cat", "mouse"]


def test_fixed_padding_is_undone():
    def padded(images, return_tensors):  # the image fills 6 of 8 rows and 4 of 8 columns
        mask = torch.zeros(1, 8, 8, dtype=torch.long)
        mask[:, :6, :4] = 1
        return BatchFeature({"pixel_values": torch.zeros(1, 3, 8, 8), "pixel_mask": mask})

    detector = ObjectDetector(FixedOutputs([[9.0, 0, 0]], [[0.25, 0.375, 0.5, 0.75]]), padded)
    objects = detector.detect([picture(60, 40)])[0]
    assert objects.boxes_xyxy.tolist() == [[0, 0, 40, 60]]


def test_a_padding_image_processor_and_its_own_training_boxes():
    processor = DetrImageProcessor(size={"max_height": 48, "max_width": 48}, pad_size={"height": 64, "width": 64})
    image = picture(60, 40)
    annotation = {
        "image_id": 0,
        "annotations": [{"bbox": [8, 12, 16, 24], "area": 384, "category_id": 1, "iscrowd": 0}],
    }
    target = processor(image, annotations=annotation, return_tensors="pt")["labels"][0]["boxes"]
    detector = ObjectDetector(FixedOutputs([[9.0, 0, 0]], target.tolist()), processor)
    torch.testing.assert_close(detector.detect([image])[0].boxes_xyxy, torch.tensor([[8.0, 12, 24, 36]]))


def test_the_kind_of_head_is_told_by_its_width():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    torch.testing.assert_close(class_probabilities(logits, 3), logits.sigmoid())
    torch.testing.assert_close(class_probabilities(logits, 2), logits.softmax(-1)[:, :2])
    with pytest.raises(ValueError, match=r"width 3, expected 5 .* or 6 .*num_labels=5"):
        class_probabilities(logits, 5)


def test_other_models_are_refused(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'clip', expected one that AutoModelForObjectDetection loads"):
        ObjectDetector.from_pretrained(tmp_path)
