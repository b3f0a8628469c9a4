"""Qwen2-VL with a classification head, built as transformers builds its own classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Qwen2VLForConditionalGeneration, Qwen2VLPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class Qwen2VLForSequenceClassification(GenericForSequenceClassification, Qwen2VLPreTrainedModel):
    """``score`` on the last hidden state of the last token that is no padding."""


def with_head(base: Qwen2VLForConditionalGeneration, labels: Sequence[str]) -> Qwen2VLForSequenceClassification:
    """A classifier that shares ``base``'s weights, under a fresh head."""
    base.config.num_labels = len(labels)
    base.config.id2label = dict(enumerate(labels))
    base.config.label2id = {label: i for i, label in enumerate(labels)}
    model = Qwen2VLForSequenceClassification(base.config)
    model.model = base.model
    return model
