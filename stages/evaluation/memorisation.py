"""Are generated deltas copies of training ones? Cosines with the truth, and with what could have been copied."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation.from_run import class_numbers
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.seeds import generator


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ / (‖a‖ ‖b‖): (Q, out, in) twice to (Q,); 0 where one is zero."""
    return F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1)


@torch.no_grad()
def memorisation(
    subject: Subject, training: StoredDeltas, evaluated: EvaluatedSamples, size: int, count: int, class_means: Tensor | None
) -> dict[str, Any]:
    """Mean cosines of one generated delta a sample, and of true ones, with what they may resemble, on `count` test samples;
    `class_means` are (classes, out, in).

    Returns:
        generated_true: of the generated delta with the one that the sample's own label gives; generated_nearest: with the
        nearest training delta; true_nearest: of the sample's own delta with its nearest training delta; training_nearest: of a
        training delta with its nearest other one; generated_class_mean, generated_mean; copies: the share of samples whose
        generated delta is nearer to a training delta than 95 % of the training deltas are to each other. Degenerate samples,
        whose true delta is rounding noise, are not left out.
    """
    generated, true, of_class = _gathered(subject, evaluated, size, count, class_means)
    nearest = _nearest(subject.seed, training, generated, true)
    cosines = {"generated_true": cosine(generated, true), **nearest}
    cosines["generated_mean"] = cosine(generated, training.mean.cpu().expand_as(generated))
    if class_means is not None:
        cosines["generated_class_mean"] = cosine(generated, of_class)
    # As near to each other as a twentieth of the training deltas are.
    close = nearest["training_nearest"].double().quantile(0.95)
    figures = {name: float(value.double().mean()) for name, value in cosines.items()}
    return {"samples": len(generated), **figures, "copies": float((nearest["generated_nearest"] > close).double().mean())}


def _gathered(
    subject: Subject, evaluated: EvaluatedSamples, size: int, count: int, class_means: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One generated delta a sample, the true one, and the mean of its class, (Q, out, in) each."""
    generated, true, of_class = [], [], []
    for positions in evaluated.order[:count].split(size):
        batch = Batch(subject, evaluated, positions)
        generated.append(batch.generated[0].member(0).matrices().cpu())
        true.append(batch.overfitted.cpu())
        if class_means is not None:
            of_class.append(class_means[class_numbers(batch)].cpu())
    return torch.cat(generated), torch.cat(true), torch.cat(of_class) if of_class else None


def _nearest(seed: int, training: StoredDeltas, generated: Tensor, true: Tensor) -> dict[str, Tensor]:
    """The cosines of generated and true deltas, and of as many training deltas, with their nearest (other) training delta."""
    usable = training.usable
    order = torch.randperm(len(usable), generator=generator(seed, "evaluate", "memorisation"))
    picked, nowhere = usable[order[: len(generated)]], torch.full((len(generated),), -1)
    queries = torch.cat([generated, true, training.take(picked)])
    own = torch.cat([nowhere, nowhere, picked])
    found = training.nearest_cosines(queries, own).split([len(generated), len(true), len(picked)])
    return dict(zip(("generated_nearest", "true_nearest", "training_nearest"), found, strict=True))
