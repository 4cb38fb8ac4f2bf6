"""fused-post: a ``torch.compile`` backend for transposed convolutions and the pointwise work around them.

``torch.compile(model, backend="fused_post")`` needs no import of this package; ``explain`` says what it
does to a model.
"""

from fusion_backend.backend import fused_post
from fusion_backend.explain import explain
from fusion_backend.report import Report, SiteReport

__all__ = ["Report", "SiteReport", "explain", "fused_post"]
__version__ = "0.1.0"
