"""The certificate: check real weights against the figures that other people have published for them.

Read in this order: published (the models, the sources and their tolerances), figures (a source's numbers, and
those of the weights), certificate (the result), causes (why figures disagree), checking (`verify`). The
numbers lie in published.npz, which tests/support/make_published.py makes from the published files.

The room is not named `verify`, so that `minclip.verify` is always the function.
"""

from minclip.verification.certificate import Certificate, SourceCheck
from minclip.verification.checking import verify

__all__ = ["Certificate", "SourceCheck", "verify"]
