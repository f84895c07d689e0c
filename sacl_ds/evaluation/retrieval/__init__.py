"""Image-text retrieval: features, a first stage by them, a second one by ITM, and figures of both, on all ranks."""

from sacl_ds.evaluation.retrieval.data import CocoIds, RetrievalSet, pictures_of, retrieval_set
from sacl_ds.evaluation.retrieval.evaluate import RetrievalResult, evaluate_retrieval
from sacl_ds.evaluation.retrieval.ranking import Listed, Ranking

__all__ = [
    "CocoIds",
    "Listed",
    "Ranking",
    "RetrievalResult",
    "RetrievalSet",
    "evaluate_retrieval",
    "pictures_of",
    "retrieval_set",
]
