"""A model of timm's, scored and pruned as it is.

Run: `python examples/timm_model.py`. Takes some seconds, needs no download (the weights are random; with
`pretrained=True` timm fetches trained ones), and `pip install "attrfast[integrations]"`.
"""

import timm
import torch

import attrfast


def main(name: str = "test_resnet") -> attrfast.PruneResult:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10)
    loader = [(torch.randn(8, 3, 64, 64), torch.arange(8)) for _ in range(2)]
    result = attrfast.prune(model, loader, keep_ratio=0.8, progress=False)
    print(result.summary())
    return result


if __name__ == "__main__":
    main()
