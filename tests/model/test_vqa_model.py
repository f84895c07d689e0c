"""The VQA model: what it starts from, what the decoder may see, and how answers are ranked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor
from vqa_questions import PLACEMENTS, batch_of, pretrained, questions, ragged

from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.saved import write_tensors
from sacl_ds.tasks.vqa.model import VqaModel, VqaObjective


def vqa_model(selection: dict[str, object] | None = None, words: int = tiny.VOCABULARY) -> VqaModel:
    """In float64 and eval mode, with a decoder that is no copy of anything."""
    run = tiny.config(selection)
    return tiny.varied(VqaModel(pretrained(run), run.model, words), seed=6).double()  # type: ignore[return-value]


def states_of(model: VqaModel, asked: SimpleNamespace) -> Tensor:
    return model.encode_question(asked.images, asked.ids, asked.mask)


def loss_of_one(model: VqaModel, states: Tensor, answer: list[int]) -> float:
    """-log p of one answer to one question, token by token from its beginnings alone, without any padding or mask."""
    total = 0.0
    for length in range(1, len(answer)):
        seen = torch.tensor([answer[:length]])
        output = model.answer_decoder(seen, states[None], torch.ones(1, len(states)))
        logits = model.answer_decoder.token_logits(output[0, -1:])
        total -= float(logits.detach().log_softmax(1)[0, answer[length]])
    return total


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def test_starts_as_a_copy() -> None:
    run = tiny.config(PLACEMENTS["output"])  # text as wide as the image
    start = pretrained(run)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    model = VqaModel(start, run.model, tiny.VOCABULARY)
    own = model.state_dict()
    for name, value in before.items():
        if name.startswith(("image_encoder.", "text_encoder.", "fusion_encoder.")):
            assert torch.equal(own[name], value), name
    fusion = {name: value for name, value in before.items() if name.startswith("fusion_encoder.encoder.layer.")}
    assert len(fusion) == 26
    for name, value in fusion.items():
        mine = own[name.replace("fusion_encoder.", "answer_decoder.bert.")]
        assert torch.equal(mine, value), name
        assert mine.data_ptr() != own[name].data_ptr(), name
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        mine = own[f"answer_decoder.bert.embeddings.{name}.weight"]
        assert torch.equal(mine, before[f"text_encoder.bert.embeddings.{name}.weight"])
    states = torch.randn(5, 32)
    assert torch.equal(model.answer_decoder.token_logits(states), start.token_logits(states))
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"image_encoder", "text_encoder", "fusion_encoder", "answer_decoder"}


def test_keys_and_values_of_another_width_are_new() -> None:
    run = tiny.config()
    start = pretrained(run)
    model = VqaModel(start, run.model, tiny.VOCABULARY)
    mine = dict(model.answer_decoder.bert.encoder.named_parameters())
    for name, value in start.fusion_encoder.encoder.named_parameters():
        new = "crossattention.self.key.weight" in name or "crossattention.self.value.weight" in name
        if new:
            assert mine[name].shape == (24, 24)
            assert mine[name].detach().std() == pytest.approx(1.4 * 24**-0.5 if run.model.init_gain else 0.02, rel=0.2)
        else:
            assert torch.equal(mine[name], value), name


def test_vocabulary_grows() -> None:
    run = tiny.config()
    start = pretrained(run)
    old = {name: value.clone() for name, value in start.state_dict().items()}
    more = tiny.VOCABULARY + 3
    model = VqaModel(start, run.model, more).eval()
    for table in (
        model.text_encoder.bert.embeddings.word_embeddings,
        model.answer_decoder.bert.embeddings.word_embeddings,
    ):
        assert table.weight.shape == (more, 24)
        assert torch.equal(table.weight[:-3], old["text_encoder.bert.embeddings.word_embeddings.weight"])
        assert table.weight[-3:].abs().min() > 0
    assert torch.equal(model.answer_decoder.bert.embeddings.word_embeddings.bias[:-3], old["mlm_head.bias"])
    states = states_of(model, questions(2))
    ids = torch.tensor([[1, more - 1, 2], [1, more - 2, 2]])
    losses = model.answer_losses(states, questions(2).mask, ids, torch.ones(2, 3), torch.tensor([0, 1]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert model.answer_decoder.bert.embeddings.word_embeddings.weight.grad[-2:].abs().max() > 0
    with pytest.raises(ValueError, match="has 40 words already"):
        VqaModel(pretrained(run), run.model, tiny.VOCABULARY - 1)


def test_decoder_sees_no_later_word() -> None:
    model, asked = vqa_model(), questions(2)
    states = states_of(model, asked)
    ids, _ = ragged(2, 8, seed=5)
    whole = model.answer_decoder(ids, states, asked.mask)
    for place in range(8):
        other = ids.clone()
        other[:, place] = (other[:, place] + 7) % tiny.VOCABULARY
        changed = (model.answer_decoder(other, states, asked.mask) - whole).abs().amax(2)
        assert changed[:, :place].max() < 1e-12 if place else True
        assert changed[:, place:].min() > 1e-9  # and sees its own and all earlier ones


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_changes_nothing(placement: str) -> None:
    model, asked = vqa_model(PLACEMENTS[placement]), questions(4)
    answers, answer_mask = ragged(6, 5, seed=8)
    rows = torch.tensor([0, 0, 1, 2, 3, 3])

    def losses(extra: int, garbage: int) -> Tensor:
        ids = torch.nn.functional.pad(asked.ids, (0, extra)) + garbage * (
            1 - torch.nn.functional.pad(asked.mask, (0, extra))
        )
        mask = torch.nn.functional.pad(asked.mask, (0, extra))
        said_mask = torch.nn.functional.pad(answer_mask, (0, extra))
        said = torch.nn.functional.pad(answers, (0, extra)) + garbage * (1 - said_mask)
        return model.answer_losses(model.encode_question(asked.images, ids, mask), mask, said, said_mask, rows)

    plain = losses(0, 0)
    torch.testing.assert_close(losses(3, 0), plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses(2, 9), plain, rtol=1e-10, atol=1e-10)
    alone = []
    for row, answer in zip(rows.tolist(), unpadded(answers, answer_mask), strict=True):
        short = int(asked.mask[row].sum())
        states = model.encode_question(
            asked.images[row : row + 1], asked.ids[row : row + 1, :short], torch.ones(1, short)
        )
        alone.append(loss_of_one(model, states[0], answer))
    assert plain.tolist() == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("candidates", [1, 7, 30])
def test_ranking_is_brute_force(candidates: int, twice: bool) -> None:
    model, asked = vqa_model(), questions(3)
    ids, mask = ragged(candidates, 5, seed=candidates)
    if candidates > 4:
        ids[:4, 1] = ids[0, 1]  # some share their first token
    with torch.no_grad():
        states = states_of(model, asked)
        expected = torch.empty(3, candidates, dtype=torch.float64)
        for question in range(3):
            own = states[question, : int(asked.mask[question].sum())]
            for number, answer in enumerate(unpadded(ids, mask)):
                expected[question, number] = -loss_of_one(model, own, answer)
                if twice:
                    expected[question, number] -= loss_of_one(model, own, answer[:2])
        ranking = model.rank_answers(states, asked.mask, ids, mask, top=100, first_token_twice=twice)
    assert ranking.scores.shape == ranking.candidates.shape == (3, candidates)
    assert torch.equal(ranking.best, expected.argmax(1))
    assert torch.equal(ranking.candidates, expected.argsort(1, descending=True))
    torch.testing.assert_close(ranking.scores, expected.sort(1, descending=True).values)


def test_only_the_best_first_tokens_are_ranked() -> None:
    model, asked = vqa_model(), questions(3)
    ids, mask = ragged(25, 5, seed=4)
    with torch.no_grad():
        states = states_of(model, asked)
        every = model.rank_answers(states, asked.mask, ids, mask, top=25)
        some = model.rank_answers(states, asked.mask, ids, mask, top=10)
        start = model.answer_decoder(ids[:1, :1].expand(3, 1), states, asked.mask)[:, 0]
        first = model.answer_decoder.token_logits(start).softmax(1)[:, ids[:, 1]]
    for question in range(3):
        allowed = set(first[question].argsort(descending=True, stable=True)[:10].tolist())
        assert set(some.candidates[question].tolist()) == allowed
        expected = [number for number in every.candidates[question].tolist() if number in allowed]
        assert some.candidates[question].tolist() == expected


def test_among_equals_the_first_candidate_wins() -> None:
    model, asked = vqa_model(), questions(2)
    ids, mask = ragged(1, 4, seed=4)
    with torch.no_grad():
        states = states_of(model, asked)
        ranking = model.rank_answers(states, asked.mask, ids.expand(20, -1), mask.expand(20, -1), top=12)
    assert ranking.best.tolist() == [0, 0]
    assert ranking.candidates.tolist() == [list(range(12))] * 2


def test_ranking_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass of the decoder holds more than a few candidates of each question, and how many passes there are does not
    depend on the number of questions."""
    model = vqa_model()
    ids, mask = ragged(40, 5, seed=1)
    sizes: list[list[int]] = []
    model.answer_decoder.register_forward_hook(lambda module, inputs, output: sizes[-1].append(len(output)))
    for count in (1, 3):
        asked = questions(count)
        sizes.append([])
        with torch.no_grad():
            model.rank_answers(states_of(model, asked), asked.mask, ids, mask, top=37)
    assert sizes[0] == [1, 8, 8, 8, 8, 5]
    assert sizes[1] == [3, 24, 24, 24, 24, 15]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_objective(placement: str) -> None:
    model, batch = vqa_model(PLACEMENTS[placement]), batch_of(4)
    objective = VqaObjective(model)
    losses = objective(batch)
    assert losses.keys() == {"loss", "answer_loss"}
    states = model.encode_question(batch.images, batch.input_ids, batch.attention_mask)
    total = 0.0
    for answer, row, weight in zip(
        unpadded(batch.answer_ids, batch.answer_mask), batch.answer_question, batch.answer_weight, strict=True
    ):
        own = states[row, : int(batch.attention_mask[row].sum())]
        total += float(weight) * loss_of_one(model, own, answer)
    assert losses["loss"].item() == pytest.approx(total / 4, rel=1e-9)
    assert losses["answer_loss"].item() == losses["loss"].item()
    assert not losses["answer_loss"].requires_grad
    losses["loss"].backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # a bias of all keys shifts all scores of a query alike
    assert [name for name in without if not name.endswith(("key.bias", "qkv.bias"))] == []
    assert not any(p.grad is None for p in objective.parameters())


def test_round_trip(tmp_path: Path) -> None:
    run = tiny.config()
    model = vqa_model(words=tiny.VOCABULARY + 2).float()
    write_tensors(model.state_dict(), tmp_path / "model.safetensors")
    from safetensors.torch import load_file

    torch.manual_seed(9)
    words = tiny.VOCABULARY + 2
    other = VqaModel(SaclModel(run.model, words, pretrained=False), run.model, words).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    asked = questions(2)
    assert torch.equal(states_of(model, asked), states_of(other, asked))
