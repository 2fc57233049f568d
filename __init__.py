"""FewRef: a benchmark suite for few-shot referring video object segmentation."""

__version__ = "0.1.0"
