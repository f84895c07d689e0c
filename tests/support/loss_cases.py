"""Settings and features that every backend of the contrastive loss is tried with, and how two results are compared."""

import torch
from torch import Tensor

from sacl_ds.losses import Keys, similarity_regulated_loss

OPTIONS = {
    "infonce": {"sharpness": 0.0},
    "literal": {"sharpness": 1.0},
    "sharp": {"sharpness": 6.0},
    "as steep as the logits": {"sharpness": 14.0},
    "teacher": {"alpha": 0.6, "sharpness": 4.0},
    "teacher alone": {"alpha": 1.0, "sharpness": 4.0},
    "two sharpnesses": {"alpha": 0.3, "sharpness": 4.0, "teacher_sharpness": 9.0},
    "blunt student": {"alpha": 0.5, "sharpness": 0.0, "teacher_sharpness": 3.0},
    "very sharp": {"alpha": 0.5, "sharpness": 30.0, "teacher_sharpness": 60.0},
    "mass": {"sharpness": 3.0, "negative_mass": 0.03},
    "dropped": {"alpha": 0.5, "sharpness": 5.0, "drop_below": 0.9},
    "infonce, dropped": {"sharpness": 0.0, "drop_below": 1.5},
}


def features(n: int, d: int, seed: int, d_teacher: int = 5, kind: str = "free") -> list[Tensor]:
    """Images, texts and the teacher's, float64, unit length. kind: free, near 0, near 1, mixed (of both signs)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        x = torch.randn(n, width, generator=generator, dtype=torch.float64)
        if kind == "near 1":
            x = 0.05 * x + torch.ones(width)
        if kind == "mixed":
            x = 0.3 * x + torch.ones(width) * (torch.arange(n) % 2 * 2 - 1)[:, None]
        return torch.nn.functional.normalize(x, dim=1)

    if kind == "near 0":
        basis = torch.linalg.qr(torch.randn(2 * n, 2 * n, generator=generator, dtype=torch.float64))[0]
        return [basis[:n], basis[n:], draw(d_teacher), draw(d_teacher)]
    return [draw(d), draw(d), draw(d_teacher), draw(d_teacher)]


def loss_and_gradients(
    backend: str,
    pairs: list[Tensor],
    scale: float,
    ids: Tensor | None,
    dtype: torch.dtype,
    keys: Keys | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    image, text = (x.to(dtype).requires_grad_() for x in pairs[:2])
    teacher = [x.to(dtype) for x in pairs[2:]] if options.get("alpha", 0) > 0 else [None, None]
    logit_scale = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    out = similarity_regulated_loss(
        image, text, logit_scale, *teacher, pair_ids=ids, backend=backend, keys=keys, **options
    )
    out.loss.backward()
    return out.loss.detach(), out.image_to_text, out.text_to_image, [image.grad, text.grad, logit_scale.grad]


def assert_agree(got, expected, tolerance: float) -> None:
    """Relative to the largest element; for the scale's gradient, whose terms may cancel, to the size of the terms."""
    terms = -torch.expm1(-torch.cat(expected[1:3])).mean().item()  # share of the anchors that pull
    flat = (*got[:3], *got[3]), (*expected[:3], *expected[3])
    for name, a, b in zip(("loss", "images", "texts", "d image", "d text", "d scale"), *flat, strict=True):
        assert a.isfinite().all(), name
        base = max(b.abs().max().item(), terms if name == "d scale" else 0.0, 1e-12)
        assert (a.double() - b.double()).abs().max().item() <= tolerance * base, name


def ids_of(n: int, columns: int) -> Tensor | None:
    if not columns:
        return None
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 2 * n, (n, columns), generator=generator)
    return ids[:, 0] if columns == 1 else ids
