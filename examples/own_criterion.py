"""A criterion of one's own: the margin between the two largest logits decides.

Run: `python examples/own_criterion.py`. Takes a few seconds, needs no download.
"""

import torch

import attrfast
from attrfast import data, models


@attrfast.register_criterion("margin")
class Margin(attrfast.Criterion):
    """What a filter adds to the lead of the largest logit over the second."""

    def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        largest = logits.topk(2, dim=1).values
        return largest[:, 0] - largest[:, 1]


def main() -> None:
    torch.manual_seed(0)
    model = models.vgg_small()
    scores = attrfast.attribute(model, data.digits().train, criterion="margin", progress=False)
    for name in scores:
        print(f"{name:<14}{len(scores[name]):>5} filters, highest score {scores[name].max():.3f}")


if __name__ == "__main__":
    main()
