"""What can go wrong in a router, as errors that the CLI knows."""

from records.errors import ReproError, UsageError


class RoutingError(UsageError):
    """A routing that cannot be: k above the number of experts, an expert that does not exist, shapes that disagree."""


class NonFiniteError(ReproError):
    """Router logits that hold NaN or infinity: the run has diverged. `layer` names where it was first seen."""

    def __init__(self, layer: str, found: str) -> None:
        self.layer = layer
        super().__init__(
            f"{layer}: expected finite router logits, found {found}; the run diverged at or before this layer: "
            "lower the learning rate, or look for the step at which the gradient norm left its range"
        )


class MoEMemoryError(UsageError):
    """The experts' activations do not fit the memory; the message says how many tokens would."""

    def __init__(self, tokens: int, token_bytes: int, free_bytes: int) -> None:
        fitting = free_bytes // token_bytes
        super().__init__(
            f"experts: {tokens} tokens need about {tokens * token_bytes / 2**30:.1f} GiB at once, "
            f"{free_bytes / 2**30:.1f} GiB are free; give at most about {fitting} tokens a step, or fewer experts a token"
        )
