"""The contrastive loss over several processes: the same gradients from every backend, and how much travels."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor
from torch.nn.functional import normalize

from sacl_ds.losses import Keys, similarity_regulated_loss, tiles

COUNTS = {1: [11], 2: [7, 4], 3: [2, 8, 1], 4: [5, 1, 3, 2]}  # uneven, and a rank with a single pair
N, D, QUEUE = 11, 6, 5
OPTIONS = {
    "infonce": {"sharpness": 0.0},
    "sharp": {"sharpness": 5.0},
    "teacher": {"alpha": 0.6, "sharpness": 4.0},
    "teacher alone": {"alpha": 1.0, "sharpness": 4.0},
    "dropped": {"alpha": 0.5, "sharpness": 5.0, "drop_below": 0.9},
}
TOLD = ("sharp", "dropped")
BACKENDS = {
    "reference": (torch.float64, 1e-12),
    "streaming": (torch.float64, 1e-12),
    "streaming, float32": (torch.float32, 1e-5),
    "triton": (torch.float32, 1e-5),
}


def drawn(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1)


def gradients(
    backend: str, part: slice, dtype: torch.dtype, soft_weight: float | None, **options
) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """Gradients of the pairs in `part`, and of the scale; and what drop_below keeps. soft_weight: None without keys."""
    image, text = (drawn(seed, N)[part].to(dtype).requires_grad_() for seed in (0, 1))
    teacher = [drawn(seed, N)[part].to(dtype) if options.get("alpha") else None for seed in (2, 3)]
    scale = torch.tensor(14.0, dtype=dtype, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 3, 4, 2, 6, 7, 0, 9, 10])
    keys = None
    if soft_weight is not None:
        old = [drawn(seed, QUEUE).to(dtype) for seed in (6, 7, 8, 9)]
        momentum = (drawn(seed, N)[part].to(dtype) for seed in (4, 5))
        keys = Keys(*momentum, *old, queue_ids=torch.tensor([1, 20, 21, 22, 23]))
    options |= {"keys": keys, "soft_weight": soft_weight or 0.0, "backend": backend}
    out = similarity_regulated_loss(image, text, scale, *teacher, pair_ids=ids[part], **options)
    out.loss.backward()
    return [image.grad, text.grad, scale.grad], out.least_kept


def on_each_rank(rank: int, world: int, folder: Path) -> None:
    tiles.TILE = (2, 3)
    start = sum(COUNTS[world][:rank])
    part = slice(start, start + COUNTS[world][rank])
    found = {}
    for name, (dtype, _) in BACKENDS.items():
        for option, values in OPTIONS.items():
            values = values | ({"counts": COUNTS[world]} if option in TOLD else {})  # else the ranks ask each other
            for soft_weight in (None, 0.0, 0.4):
                of_pairs, least = gradients(name.split(",")[0], part, dtype, soft_weight, **values)
                dist.all_reduce(of_pairs[2])
                found[name, option, soft_weight] = [gradient / world for gradient in of_pairs], least
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("world", [1, 2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))])
def test_gradients_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """An engine averages over ranks: the features' gradients reach the parameters divided by the world."""
    on_ranks(world, on_each_rank, world, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name, (_, tolerance) in BACKENDS.items():
        for option, values in OPTIONS.items():
            for soft_weight in (None, 0.0, 0.4):
                expected, bounds = gradients("reference", slice(None), torch.float64, soft_weight, **values)
                ranks, least = zip(*(of_rank[name, option, soft_weight] for of_rank in found), strict=True)
                assert (bounds is not None) == ("drop_below" in values)
                if bounds is not None:
                    for of_ranks, bound in zip(zip(*least, strict=True), bounds, strict=True):
                        torch.testing.assert_close(torch.cat(of_ranks), bound, rtol=tolerance, atol=tolerance)
                got = [torch.cat([r[0] for r in ranks]), torch.cat([r[1] for r in ranks]), ranks[0][2]]
                for a, b in zip(got, expected, strict=True):
                    error = (a.double() - b).abs().max() / b.abs().max()
                    assert error < tolerance, f"{name}, {option}, soft weight {soft_weight}: {error:.1e}"


# what a rank sends, of a ring: (world - 1) parts of what it holds, twice for a sum that all get
SENT = {
    "all_gather_into_tensor": lambda out, mine, w: (w - 1) * mine.nbytes,
    "all_gather": lambda outs, mine, w: (w - 1) * mine.nbytes,
    "reduce_scatter_tensor": lambda mine, parts, w: (w - 1) * mine.nbytes,
    "all_reduce": lambda value, *rest: 2 * (rest[-1] - 1) / rest[-1] * value.nbytes,
    "all_to_all": lambda outs, ins, w: (w - 1) * ins[0].nbytes,
    "scatter": lambda out, ins, w: (w - 1) * out.nbytes if ins else 0,
}


def counting_ranks(rank: int, world: int, folder: Path) -> None:
    from open_clip.loss import ClipLoss

    sent = Counter()

    def counted(name: str):
        call = getattr(dist, name)

        def wrapper(*args, **kwargs):
            sent[current] += SENT[name](*args[:2], world)
            return call(*args, **kwargs)

        return wrapper

    for name in SENT:
        setattr(dist, name, counted(name))
    b, d = 64, 512
    peer = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(rank)
        features = [normalize(torch.randn(b, d, generator=generator), dim=1).to(dtype) for _ in range(4)]
        image, text = (x.requires_grad_() for x in features[:2])
        scale = torch.tensor(14.0, requires_grad=True)
        current = f"open_clip {dtype}"
        peer(image, text, scale).backward()
        current = f"ours {dtype}"
        similarity_regulated_loss(image, text, scale, sharpness=3.0).loss.backward()
        current = f"ours with teacher {dtype}"
        similarity_regulated_loss(image, text, scale, *features[2:], alpha=0.5, sharpness=3.0).loss.backward()
    if rank == 0:
        torch.save(dict(sent), folder / "sent.pt")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_sent(world: int, tmp_path: Path) -> None:
    """Beside open_clip's gathered local loss, 64 pairs a rank of width 512, the teacher's too."""
    pytest.importorskip("open_clip")
    on_ranks(world, counting_ranks, world, tmp_path)
    sent = torch.load(tmp_path / "sent.pt", weights_only=True)
    for dtype in (torch.float32, torch.bfloat16):
        peer = sent[f"open_clip {dtype}"]
        assert peer == pytest.approx(4 * (world - 1) * 64 * 512 * dtype.itemsize, rel=0.01)
        shares = [sent[f"{name} {dtype}"] / peer for name in ("ours", "ours with teacher")]
        print(f"{world} ranks, {dtype}: {shares[0]:.3f} of open_clip's bytes, with teacher {shares[1]:.3f}")
        assert 0.5 <= shares[0] <= 0.55
        assert 0.75 <= shares[1] <= 0.8
