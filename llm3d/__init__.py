"""llm3d: LLaMA training under tensor, pipeline and data parallelism."""

__version__ = "0.1.0"
