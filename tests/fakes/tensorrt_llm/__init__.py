"""A stand-in for NVIDIA's tensorrt_llm: its LLM API as Baton uses it, with the behaviour and the traps of 1.1 to 1.3.

It computes arithmetic instead of a model: the next token is a digest of what is *read* from the KV cache, so KV that is
missing, stale or of another prompt gives another text. Two of them in two processes hand KV over through Unix sockets.
`_knobs.py` says which release it plays and what goes wrong. Imported as `tensorrt_llm`: tests put `tests/fakes` on the path.
"""

from . import _knobs
from .disaggregated_params import DisaggregatedParams
from .llm import LLM
from .sampling_params import SamplingParams

__version__ = _knobs.VERSION

__all__ = ["LLM", "DisaggregatedParams", "SamplingParams", "__version__"]
