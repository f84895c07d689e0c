"""VQA model: a pre-trained model and an answer decoder, which ranks answers token by token; its objective."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear
from transformers import BertModel

from sacl_ds.config import ModelConfig
from sacl_ds.data.batch import take
from sacl_ds.model.sacl import SaclModel
from sacl_ds.model.text import bert_config
from sacl_ds.tasks.vqa.batch import QuestionBatch


class WordTable(nn.Embedding):
    """Word embeddings that also serve as the output matrix, with its bias.

    Both uses go through this module: under ZeRO 3 it gathers its own weights for each, in an engine's pass and out of
    it. What transformers has in its place is read through the attribute `weight`, which ZeRO 3 fills in the first only.
    """

    def __init__(self, words: int, width: int, padding_idx: int | None) -> None:
        super().__init__(words, width, padding_idx)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, input: Tensor) -> Tensor:
        """int64 ids (...) -> (..., width); states (..., width) -> (..., words) logits."""
        return linear(input, self.weight, self.bias) if input.is_floating_point() else super().forward(input)


class AnswerDecoder(nn.Module):
    """Text decoder with the fusion encoder's depth and initial weights, and word embeddings of its own."""

    def __init__(self, start: SaclModel, config: ModelConfig) -> None:
        """Copy start's fusion encoder, text embeddings and MLM head.

        Keys and values of the cross-attention are drawn anew where images are of another width than text.
        """
        super().__init__()
        words = start.text_encoder.bert.embeddings
        width = config.text_width
        bert = bert_config(
            vocab_size=words.word_embeddings.num_embeddings,
            width=width,
            layers=config.fusion_layers,
            heads=config.text_heads,
            max_positions=words.position_embeddings.num_embeddings,
            dropout=config.dropout,
            image_width=width,  # of what its cross-attention reads
            init_std=start.fusion_encoder.encoder.config.initializer_range,
        )
        self.bert = BertModel(bert, add_pooling_layer=False)
        self.bert.embeddings.word_embeddings = WordTable(bert.vocab_size, width, padding_idx=bert.pad_token_id)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=bert.layer_norm_eps)
        head = start.mlm_head
        self.bert.embeddings.load_state_dict(words.state_dict() | {"word_embeddings.bias": head.bias.detach()})
        self.dense.load_state_dict(head.dense.state_dict())
        self.norm.load_state_dict(head.norm.state_dict())
        pretrained = start.fusion_encoder.encoder.state_dict()
        fresh = self.bert.encoder.state_dict()
        # of another shape: keys and values of images that are wider or narrower than text
        fitting = {name: value for name, value in pretrained.items() if value.shape == fresh[name].shape}
        self.bert.encoder.load_state_dict(fresh | fitting)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes each layer's activations instead of storing them."""
        if on:
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.bert.gradient_checkpointing_disable()

    def forward(self, answer_ids: Tensor, question_states: Tensor, question_mask: Tensor) -> Tensor:
        """(A, La) int64, (A, L, width), (A, L) int64 or bool -> (A, La, width); state i has seen ids 0 .. i only, so
        padding at the end changes nothing before it."""
        length, asked = answer_ids.shape[1], question_states.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=answer_ids.device).tril()
        output = self.bert(
            input_ids=answer_ids,
            attention_mask=causal.expand(len(answer_ids), 1, -1, -1),
            encoder_hidden_states=question_states,
            encoder_attention_mask=question_mask[:, None, None, :].bool().expand(-1, 1, length, asked),
        )
        return output.last_hidden_state

    def token_logits(self, states: Tensor) -> Tensor:
        """Compute the next token's logits: (n, width) states -> (n, vocabulary) float32."""
        logits = self.bert.embeddings.word_embeddings(self.norm(gelu(self.dense(states))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


_CANDIDATES_AT_ONCE = 8  # of each question; independent of the batch, so that all ranks run equally many passes


class AnswerRanking(NamedTuple):
    """Ranking of answers. best: (b,) int64, the candidate ranked first. scores: (b, top) float32, log-likelihoods,
    falling. candidates: (b, top) int64, whose they are."""

    best: Tensor
    scores: Tensor
    candidates: Tensor


class VqaModel(nn.Module):
    """Model of questions and answers. b: questions, L: tokens of one, A: answers, La: tokens of one, [CLS] and [SEP]
    too."""

    def __init__(self, start: SaclModel, config: ModelConfig, vocab_size: int) -> None:
        """Take over start's encoders, but not its projections and heads, which VQA has no use for.

        config: start's. vocab_size: of the tokenizer; where that has grown (`data.vocabulary`), the embeddings do.
        Raises ValueError where it is smaller than start's.
        """
        super().__init__()
        _grow(start, vocab_size)
        self.image_encoder = start.image_encoder
        self.text_encoder = start.text_encoder
        self.fusion_encoder = start.fusion_encoder
        self.answer_decoder = AnswerDecoder(start, config)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Set whether backward recomputes the activations of encoders and decoder instead of storing them."""
        for part in (self.image_encoder, self.text_encoder, self.fusion_encoder, self.answer_decoder):
            part.checkpoint_activations(on)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Run each block of the encoders compiled by torch.compile; the decoder runs as it is."""
        for part in (self.image_encoder, self.text_encoder, self.fusion_encoder):
            part.compile_layers(backend)

    def encode_question(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode images (b, 3, H, W) uint8 and questions (b, L) -> (b, L, width). With patch selection, the question
        chooses."""
        states = self.text_encoder(input_ids, attention_mask)
        image_states = self.image_encoder(images, guide=states[:, 0])
        return self.fusion_encoder(states, attention_mask, image_states.tokens)

    def answer_losses(
        self, question_states: Tensor, question_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, rows: Tensor
    ) -> Tensor:
        """(A,) float32: -log p of each answer's tokens after [CLS], [SEP] included, summed.

        question_states (b, L, width), question_mask (b, L), answer_ids and answer_mask (A, La), rows (A,) int64: which
        question each answers.
        """
        states = self.answer_decoder(answer_ids[:, :-1], take(question_states, rows), question_mask[rows])
        predicted = answer_mask[:, 1:].bool()
        logits = self.answer_decoder.token_logits(states[predicted])
        losses = torch.zeros(predicted.shape, dtype=logits.dtype, device=logits.device)
        losses[predicted] = cross_entropy(logits, answer_ids[:, 1:][predicted], reduction="none")
        return losses.sum(1)

    def rank_answers(
        self,
        question_states: Tensor,
        question_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        top: int,
        first_token_twice: bool = True,
    ) -> AnswerRanking:
        """The most likely of K candidate answers, (K, La) ids and mask, to each question, in ALBEF's two steps.

        The `top` candidates by the probability of their first token get their full likelihood; with as many as there
        are, it is the likeliest of all. ALBEF adds the first token's log-probability to a likelihood that holds it
        already; first_token_twice=False leaves that out. Ties go to the candidate that comes first. Memory goes with b,
        not with K or top, save for the (b, K) probabilities. Under ZeRO 3 all ranks run equally many passes, whatever b
        is.
        """
        b, top = len(question_states), min(top, len(candidate_ids))
        own = torch.arange(b, device=question_states.device)
        start = candidate_ids[:1, :1].expand(b, 1)
        states = self.answer_decoder(start, question_states, question_mask)
        of_first = self.answer_decoder.token_logits(states[:, 0]).log_softmax(1)[:, candidate_ids[:, 1]]
        first, chosen = (x[:, :top] for x in of_first.sort(dim=1, descending=True, stable=True))
        # among equal first tokens the order above is the list's, and so it is in this one among equal scores
        chosen, order = chosen.sort(dim=1)
        first = first.gather(1, order)
        parts = []
        for part in chosen.split(_CANDIDATES_AT_ONCE, dim=1):
            flat, rows = part.flatten(), own.repeat_interleave(part.shape[1])
            ids, mask = candidate_ids[flat], candidate_mask[flat]
            parts.append(-self.answer_losses(question_states, question_mask, ids, mask, rows).view(b, -1))
        scores = torch.cat(parts, 1) + (first if first_token_twice else 0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        candidates = chosen.gather(1, order)
        return AnswerRanking(candidates[:, 0], scores, candidates)


def _grow(model: SaclModel, words: int) -> None:
    """Add rows to the word embeddings and the MLM head for so many tokens; new ones are drawn as at the start."""
    embeddings, head = model.text_encoder.bert.embeddings, model.mlm_head
    known, bert = embeddings.word_embeddings, model.text_encoder.bert.config
    more = words - known.num_embeddings
    if more < 0:
        raise ValueError(f"vocab_size={words}: the pre-trained model has {known.num_embeddings} words already")
    if not more:
        return
    grown = nn.Embedding(words, known.embedding_dim, padding_idx=known.padding_idx)
    with torch.no_grad():
        nn.init.normal_(grown.weight, std=bert.initializer_range)
        grown.weight[: known.num_embeddings] = known.weight
        head.bias = nn.Parameter(torch.cat([head.bias, head.bias.new_zeros(more)]))
    embeddings.word_embeddings = grown.to(known.weight)
    for each in (bert, model.fusion_encoder.encoder.config):
        each.vocab_size = words


class VqaObjective(nn.Module):
    """Likelihood of people's answers, each by its share of them (ALBEF's, without its momentum model)."""

    def __init__(self, model: VqaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: QuestionBatch) -> dict[str, Tensor]:
        """Compute 0-dim `loss`, to be minimised, and `answer_loss`, the same without gradient.

        The sum over answers of weight times -log p, by the number of questions. That number is equal on all ranks, so
        the mean over ranks is the value for the whole global batch, and so are the gradients.
        """
        states = self.model.encode_question(batch.images, batch.input_ids, batch.attention_mask)
        losses = self.model.answer_losses(
            states, batch.attention_mask, batch.answer_ids, batch.answer_mask, batch.answer_question
        )
        loss = (batch.answer_weight.to(losses.dtype) * losses).sum() / len(batch)
        return {"loss": loss, "answer_loss": loss.detach()}
