"""The pages that readers open, as paths from the repository's root."""

ROOMS = ("fast", "corpus", "checkpoint", "porting", "verification")
# Their commands and examples are run.
PAGES = (
    *("README.md", "minclip/README.md", *(f"minclip/{room}/README.md" for room in ROOMS)),
    "tests/benchmarks/README.md",
)
