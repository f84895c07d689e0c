"""The contrastive loss over several processes: the same gradients from every backend, and how much travels."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from documented import assert_documented
from ranks import on_ranks
from torch import Tensor
from torch.nn.functional import normalize

from sacl_ds.errors import SharedError
from sacl_ds.losses import Keys, Regulation, similarity_regulated_loss, tiles
from sacl_ds.losses.distribution import weigh
from sacl_ds.training.objective import Targets

# uneven, a rank with a single pair, one with none
COUNTS = [[11], [7, 4], *(pytest.param(each, marks=pytest.mark.slow) for each in ([2, 8, 1], [0, 11], [5, 1, 3, 2]))]
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


def on_each_rank(rank: int, counts: list[int], folder: Path) -> None:
    tiles.TILE = (2, 3)
    world, start = len(counts), sum(counts[:rank])
    part = slice(start, start + counts[rank])
    found = {}
    for name, (dtype, _) in BACKENDS.items():
        for option, values in OPTIONS.items():
            values = values | ({"counts": counts} if option in TOLD else {})  # else the ranks ask each other
            for soft_weight in (None, 0.0, 0.4):
                of_pairs, least = gradients(name.split(",")[0], part, dtype, soft_weight, **values)
                dist.all_reduce(of_pairs[2])
                found[name, option, soft_weight] = [gradient / world for gradient in of_pairs], least
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_are_those_of_one_process(counts: list[int], tmp_path: Path) -> None:
    """An engine averages over ranks: the features' gradients reach the parameters divided by the world."""
    world = len(counts)
    on_ranks(world, on_each_rank, counts, tmp_path)
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


def what_ranks_disagree_on(rank: int, folder: Path) -> None:
    image, text, ids = drawn(0, 4), drawn(1, 4), torch.arange(4)

    def said(error: type[Exception] = ValueError, **own) -> str:
        """What this rank raises, which brings `own` where rank 0 brings what is usual."""
        brought = {"image": image, "text": text, "logit_scale": torch.tensor(9.0), "pair_ids": ids, "alpha": 0.5}
        brought |= {"teacher_image": text, "teacher_text": image} | (own if rank else {})
        with pytest.raises(error) as caught:
            similarity_regulated_loss(**brought)
        return str(caught.value)

    wide = {"image": drawn(0, 4)[:, :3], "text": drawn(1, 4)[:, :3]}
    found = {
        "pair_ids": said(pair_ids=None),
        "two ids": said(pair_ids=ids[:, None].repeat(1, 2)),
        "width": said(**wide),
        "type": said(image=image.float(), text=text.float()),
        "teacher's width": said(teacher_image=wide["image"], teacher_text=wide["text"]),
        "alpha": said(alpha=0.25),
        "no alpha": said(alpha=0.0),
        "sharpness": said(sharpness=2.0, teacher_sharpness=1.0),
        "drop_below": said(drop_below=0.5),
        "scale": said(logit_scale=torch.tensor(9.1)),
        "keys": said(keys=Keys(image, text)),
        "statistics": said(statistics=True),
        "backend": said(backend="reference"),
        "a mistake": said(soft_weight=2.0),
        "no teacher": said(teacher_image=None, teacher_text=None),
    }
    empty = {"image": image[:0], "text": text[:0], "teacher_image": text[:0], "teacher_text": image[:0]}
    out = similarity_regulated_loss(image, text, torch.tensor(9.0 * (1 + 1e-6 * rank)), pair_ids=ids)
    assert out.loss.isfinite()
    with pytest.raises(ValueError, match="there are no pairs"):
        similarity_regulated_loss(**empty, logit_scale=9.0, pair_ids=ids[:0])
    leaf = image.clone().requires_grad_()
    out = similarity_regulated_loss(leaf, text, 9.0, backend="reference")
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(out.loss, leaf, create_graph=True)
    torch.save(found, folder / f"{rank}.pt")


def test_ranks_that_disagree_say_so_alike(tmp_path: Path) -> None:
    on_ranks(2, what_ranks_disagree_on, tmp_path)
    found, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert found == other
    for name in ("alpha", "no teacher"):
        assert_documented(f"SharedError: {found[name]}")
    assert found == {
        name: f"ranks disagree on {what} on rank 0, {theirs} on rank 1; call with the same on all ranks"
        for name, what, theirs in (
            ("pair_ids", "pair_ids: '1 a pair'", "None"),
            ("two ids", "pair_ids: '1 a pair'", "'2 a pair'"),
            ("width", "the width and type of text: (6, torch.float64)", "(3, torch.float64)"),
            ("type", "the width and type of text: (6, torch.float64)", "(6, torch.float32)"),
            (
                "teacher's width",
                "the width and type of teacher_text: (6, torch.float64)",
                "(3, torch.float64)",
            ),
            ("alpha", "alpha: 0.5", "0.25"),
            ("no alpha", "alpha: 0.5", "0.0"),
            ("sharpness", "sharpness: 1.0", "2.0"),
            ("drop_below", "drop_below: None", "0.5"),
            ("scale", "logit_scale: 9.0", "9.100000381469727"),
            ("keys", "keys: None", "'without a queue'"),
            ("statistics", "statistics: False", "True"),
            ("backend", "the backend: 'tiles'", "'reference'"),
            ("a mistake", "arguments: None", "'soft_weight=2.0 must lie in [0, 1], and needs keys above 0'"),
            ("no teacher", "arguments: None", "'alpha=0.5 needs teacher_image and teacher_text'"),
        )
    }


def what_a_trainer_asks(rank: int) -> None:
    objective = tiny.objective(tiny.config(sharpness=3.0, backend="streaming"))
    gathered, gather = [], dist.all_gather_into_tensor

    def counted(*arguments: Any, **options: Any) -> Any:
        gathered.append(arguments[1].dtype)
        return gather(*arguments, **options)

    dist.all_gather_into_tensor = counted

    def asked(columns: int = 1, width: int = D, alpha: float = 0.5, taught: bool = True, **more: Any) -> bool:
        """Whether the ranks exchange more than features, ids and cosines."""
        gathered.clear()
        image, text, ids = drawn(0, 4).float(), drawn(1, 4).float(), torch.arange(4 * columns).view(4, columns)
        teacher = (image[:, :width], text[:, :width]) if taught else None
        objective.contrastive(image, text, torch.tensor(9.0), ids, Targets(teacher, alpha, None, even=True, **more))
        assert len(gathered) in (4, 5)
        return len(gathered) == 5

    assert [asked(1), asked(1), asked(2), asked(2)] == [True, False, False, False]
    keys = Keys(*2 * [drawn(4, 4).float()]) if rank else None
    own: dict[str, dict[str, Any]] = {
        "the width and type of teacher_text: .*3.* on rank 0, .*4.* on rank 1": {"width": 3 + rank},
        "alpha: 0.5 on rank 0, 0.25 on rank 1": {"alpha": 0.5 - 0.25 * rank},
        "alpha: 0.5 on rank 0, 0.0 on rank 1": {"taught": rank == 0},
        "statistics: False on rank 0, True on rank 1": {"statistics": rank == 1},
        "keys: None on rank 0, 'without a queue' on rank 1": {"keys": keys},
    }
    for line, brought in own.items():
        with pytest.raises(SharedError, match=f"^ranks disagree on {line}; call with the same on all ranks$"):
            asked(**brought)
        assert not asked()


def test_a_trainers_ranks_ask_each_other_once_and_compare_what_changes() -> None:
    on_ranks(2, what_a_trainer_asks)


def what_ranks_weigh(rank: int) -> None:
    image, text = drawn(0, 4), drawn(1, 4)
    for name, own in (("sharpness", {"sharpness": 3.0 + rank}), ("drop_below", {"drop_below": 0.5 + 0.1 * rank})):
        with pytest.raises(SharedError, match=f"^ranks disagree on {name}: "):
            weigh(image, text, 9.0, regulation=Regulation(**own))
    with pytest.raises(SharedError, match=r"^ranks disagree on lowest: 1 on rank 0, 2 on rank 1"):
        weigh(image, text, 9.0, regulation=Regulation(), lowest=1 + rank)
    with pytest.raises(SharedError, match=r"^ranks disagree on logit_scale: 9\.0 on rank 0, 10\.0 on rank 1"):
        weigh(image, text, 9.0 + rank, regulation=Regulation())
    assert weigh(image, text, 9.0, regulation=Regulation())[0].anchors == 8


def test_ranks_that_weigh_otherwise_say_so() -> None:
    on_ranks(2, what_ranks_weigh)
