"""The machine: the MoE core, the language model, one training loop, data, evaluation, the verdicts and the CLI."""

__version__ = "0.1.0"
