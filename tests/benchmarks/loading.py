"""Measure the time and memory of loading an archive of ViT-B/32's size, next to torch.jit.load.

    python -m tests.benchmarks.loading [FILE.pt]

Without a file, the benchmark writes OpenAI's CLIP with ViT-B/32's sizes and random weights, traced and saved
in float16 as OpenAI's archives are. Each load runs in a process of its own, with the file in the page cache.
The memory is the peak of the process minus its memory after the imports. On two x86-64 cores, torch 2.13:

    archive of 354 MB; best of 5 loads, in turn
    torch.jit.load          0.301 s   1.00 x torch's  peak   367 MB
    minclip.load            0.125 s   0.41 x torch's  peak   234 MB
    minclip.load, float16   0.097 s   0.32 x torch's  peak   161 MB
    the text tower in float32 is 254 MB
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.archives import openai_model, save_traced

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5

MEASURE = """
import sys, time
{imports}
def peak():  # bytes
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
model = {load}
print(time.perf_counter() - start, peak() - before)
"""
LOADERS = {
    "torch.jit.load": ("import torch", "torch.jit.load(sys.argv[1], map_location='cpu')"),
    "minclip.load": ("import minclip", "minclip.load(sys.argv[1])"),
    "minclip.load, float16": ("import minclip", "minclip.load(sys.argv[1], dtype='float16')"),
}


def make(path):
    """Write an archive of ViT-B/32's size."""
    sizes = {"embed_dim": 512, "image_resolution": 224, "vision_layers": 12, "vision_width": 768}
    sizes |= {"vision_patch_size": 32, "context_length": 77, "vocab_size": 49408}
    sizes |= {"transformer_width": 512, "transformer_heads": 8, "transformer_layers": 12}
    save_traced(openai_model(**sizes), path)


def measure(loader, path):
    """Return (seconds, bytes) of one load in a new process."""
    imports, load = LOADERS[loader]
    program = MEASURE.format(imports=imports, load=load)
    run = [sys.executable, "-W", "ignore", "-c", program, str(path)]
    seconds, peak = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(peak)


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "ViT-B-32.pt"
        if not path.exists():
            make(path)
        print(f"archive of {path.stat().st_size / 1e6:.0f} MB; best of {ROUNDS} loads, in turn")
        results = {loader: [] for loader in LOADERS}
        for _ in range(ROUNDS):
            for loader, figures in results.items():
                figures.append(measure(loader, path))
        torchs = min(seconds for seconds, _ in results["torch.jit.load"])
        for loader, figures in results.items():
            seconds, peak = min(s for s, _ in figures), max(p for _, p in figures)
            print(
                f"{loader:22} {seconds:6.3f} s  {seconds / torchs:5.2f} x torch's  peak {peak / 1e6:5.0f} MB"
            )
        print(f"the text tower in float32 is {63_428_096 * 4 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
