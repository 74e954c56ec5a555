"""Tasks: what is learned. A task gives the loss, the metrics, the model's arguments, and checks."""

from dpopt.tasks.classification import Classification
from dpopt.tasks.language_modeling import LanguageModeling
from dpopt.tasks.sequence_classification import SequenceClassification

Task = Classification | LanguageModeling
TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "sequence_classification": SequenceClassification,
    "language_modeling": LanguageModeling,
}

__all__ = ["TASKS", "Classification", "LanguageModeling", "SequenceClassification", "Task"]
