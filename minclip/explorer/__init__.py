"""Pages to explore: a run of the encoder, or a comparison, as one HTML file that needs no network.

Read in this order: page (a template and its data become one file), run and run.html (show: every stage of a
run), comparison and comparison.html (compare_page: every stage of a port beside the reference). The templates
are the whole pages: hand-written HTML, CSS and JavaScript.
"""

from minclip.explorer.comparison import compare_page
from minclip.explorer.page import Page
from minclip.explorer.run import show

__all__ = ["Page", "compare_page", "show"]
