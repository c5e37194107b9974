"""A model of Hugging Face's, with batches as its data collators make them.

Run: `python examples/hugging_face.py`. Takes some seconds, needs no download (the weights are random; take
`ResNetForImageClassification.from_pretrained(...)` for trained ones), and
`pip install "attrfast[integrations]"`.
"""

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import attrfast


def main() -> attrfast.PruneResult:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)
    loader = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8)} for _ in range(2)]
    result = attrfast.prune(model, loader, keep_ratio=0.8, progress=False)
    print(result.summary())
    return result


if __name__ == "__main__":
    main()
