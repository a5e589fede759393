"""The models that can be verified, and every published figure for them, with its origin and tolerance.

A figure is allowed to differ by twice the largest disagreement that its own publisher, or a second one,
shows for the same text, or by the tolerance of its publisher's own test. The error of a vector is its
relative L2 error, that of printed digits the largest absolute one. The disagreements were measured on the
published files themselves:

- Detic, ViT-B/32, float16 on a GPU: 722 pairs of vectors of one text in four files differ by at most 1.5e-3
  (2.0e-3 on every eighth number). Two of the texts differ from NPCLIP's float32 by 5.5e-4 and 6.7e-4. The
  vectors of the two nearest different texts differ by 0.10.
- VLPart, RN50, float16: 220 pairs in four files differ by at most 6.3e-3 (9.2e-3 on every fourth number).
- ZegCLIP, ViT-B/16, float16: 14 pairs in two files differ by at most 5.1e-4 (1.0e-3 on every fourth number).
  Reruns share their rounding errors, so Detic's allowance for the same size of tower is used.
- "a photo of a cat", ViT-B/32: Bumblebee and Queryable print the same digits.
- ViT-L/14 as Stable Diffusion 1 uses it: three publishers print the same six digits for the start of text,
  which no later token changes. A fourth prints a row of one of them with numbers up to 6e-4 apart, so 1e-3
  is allowed.

Using a wrong activation moves OpenCLIP's ViT-B/32 by 0.2 to 0.4, far beyond every allowance.

Left out: figures whose texts are uncertain (VPD's ViT-L/14 states, UniDetector's averages, the astronaut of
openai-clip-js), clip-similarwords' cosines of float16 states, which say less than the printed states of the
same tower, and Marqo's figures for ViT-B-32 of LAION-400M, which were computed with another activation
than the weights were trained with.
"""

from __future__ import annotations

import dataclasses

from minclip.verification.figures import Printed, Vectors

HALF = 4e-3  # allowed for float16, see above


@dataclasses.dataclass(frozen=True)
class Model:
    """A model by its publisher, and the shape of its text tower: layers, width, embedding."""

    publisher: str
    layers: int
    width: int
    embedding: int


MODELS = {
    "RN50": Model("OpenAI", 12, 512, 1024),
    "RN101": Model("OpenAI", 12, 512, 512),
    "RN50x4": Model("OpenAI", 12, 640, 640),
    "RN50x16": Model("OpenAI", 12, 768, 768),
    "RN50x64": Model("OpenAI", 12, 1024, 1024),
    "ViT-B/32": Model("OpenAI", 12, 512, 512),
    "ViT-B/16": Model("OpenAI", 12, 512, 512),
    "ViT-L/14": Model("OpenAI", 12, 768, 768),
    "ViT-L/14@336px": Model("OpenAI", 12, 768, 768),
    "ViT-B-32-quickgelu/laion400m_e32": Model("OpenCLIP", 12, 512, 512),
    "ViT-B-32/laion2b_s34b_b79k": Model("OpenCLIP", 12, 512, 512),
    "ViT-B-16/laion2b_s34b_b88k": Model("OpenCLIP", 12, 512, 512),
    "ViT-L-14/laion400m_e32": Model("OpenCLIP", 12, 768, 768),
    "ViT-H-14-378-quickgelu/dfn5b": Model("OpenCLIP", 24, 1024, 1024),
    "RN50/yfcc15m": Model("OpenCLIP", 12, 512, 1024),
    "EVA02-B-16/merged2b_s8b_b131k": Model("OpenCLIP", 12, 512, 512),
    "convnext_base/laion400m_s13b_b51k": Model("OpenCLIP", 12, 512, 512),
    "convnext_base_w/laion_aesthetic_s13b_b82k": Model("OpenCLIP", 12, 640, 640),
    "convnext_large_d/laion2b_s26b_b102k_augreg": Model("OpenCLIP", 16, 768, 768),
    "convnext_large_d_320/laion2b_s29b_b131k_ft_soup": Model("OpenCLIP", 16, 768, 768),
    "convnext_xxlarge/laion2b_s34b_b82k_augreg_soup": Model("OpenCLIP", 24, 1024, 1024),
}


DETIC = "facebookresearch/Detic 436cda2, datasets/metadata/{} (Apache-2.0)"
MARQO = "marqo-ai/marqo 58efc24, tests/s2_inference/embeddings_reference (Apache-2.0)"
VILD = (  # the templates of ViLD, google-research/vild, as CLIPSelf fills them
    *("There is {a} {} in the scene.", "There is the {} in the scene."),
    *(f"This is a photo of {det} {{}} in the scene." for det in ("{a}", "the", "one")),
    *(f"itap of {det} {{}}." for det in ("{a}", "my", "the")),
    *(f"This is a photo of {det} {{}}." for det in ("{a}", "my", "the", "one", "many")),
    *(f"This is a {kind} photo of {det} {{}}." for kind in ("good", "bad") for det in ("{a}", "the")),
    *(f"This is a photo of {det} {kind} {{}}." for kind in ("nice", "cool", "weird") for det in ("a", "the")),
    *(f"This is a photo of {det} {kind} {{}}." for kind in ("small", "large") for det in ("a", "the")),
    *(f"This is a photo of {det} {kind} {{}}." for kind in ("clean", "dirty") for det in ("a", "the")),
    *(f"This is a {kind} photo of {det} {{}}." for kind in ("bright", "dark") for det in ("{a}", "the")),
    *(f"This is a photo of {det} hard to see {{}}." for det in ("a", "the")),
    *(
        f"This is a {kind} photo of {det} {{}}."
        for kind in ("low resolution", "cropped", "close-up", "jpeg corrupted", "blurry", "pixelated")
        for det in ("{a}", "the")
    ),
    *(f"This is a black and white photo of {det} {{}}." for det in ("the", "{a}")),
    *(
        f"This is {det} {kind} {{}}."
        for kind in ("plastic", "toy", "plushie", "cartoon")
        for det in ("a", "the")
    ),
    *("This is an embroidered {}.", "This is the embroidered {}."),
    *("This is a painting of the {}.", "This is a painting of a {}."),
)

SAME_DIGITS = "printed to four digits; Bumblebee and Queryable print the same"
STATES = "printed to four digits; three publishers print the same start of text"
BOS = [
    ("states", 0, 0, (-0.3884, 0.0229, -0.0522)),
    ("states", 0, -3, (-0.4899, -0.3066, 0.0675)),
]


def ends(position, *values):
    """Return the rows of a printed tensor's line: its first three and its last three numbers."""
    return [("states", position, 0, values[:3]), ("states", position, -3, values[3:])]


SOURCES: tuple[Vectors | Printed, ...] = (
    Vectors(
        "npclip",
        "ViT-B/32",
        "99991/NPCLIP 28bbf32, data/text_features.npy (MIT)",
        1e-4,
        "float32 on a CPU; the publisher's NumPy port agrees within 1e-5, Vespa prints the same first number",
    ),
    Vectors(
        "jina",
        "ViT-B/32",
        "jina-ai/jina-hub, encoders/nlp/CLIPTextEncoder/tests/expected_batch.npy (Apache-2.0)",
        1e-4,
        "float32; the publisher's own test allows four decimals",
    ),
    Printed(
        "vespa",
        "ViT-B/32",
        "vespa-engine/sample-apps, text-image-search, ModelsTest.java (Apache-2.0)",
        1e-5,
        "float32; the publisher's own test allows 1e-5",
        "a diagram",
        (("features", 0, 0, (5.4698e-02,)),),
    ),
    Printed(
        "bumblebee",
        "ViT-B/32",
        "elixir-nx/bumblebee, test/bumblebee/text/clip_text_test.exs (Apache-2.0)",
        1e-4,
        SAME_DIGITS,
        "a photo of a cat",
        (
            ("states", 1, 1, (-0.5844, 0.3685, -2.0744)),
            ("states", 2, 1, (-0.9600, 1.0018, -0.2415)),
            ("states", 3, 1, (-0.5957, -0.1719, 0.4689)),
            ("pooled", 0, 1, (0.1658, 0.8876, 10.6313)),
            ("features", 0, 1, (0.0733, -0.2448, -0.2212)),
        ),
    ),
    Printed(
        "queryable",
        "ViT-B/32",
        "mazzzystar/Queryable, issue 18",
        1e-4,
        SAME_DIGITS,
        "a photo of a cat",
        (
            (
                "features",
                0,
                0,
                (0.1555, 0.0733, -0.2448, -0.2212, -0.1934, 0.2052, -0.3175, -0.7824, -0.1816, 0.1943),
            ),
        ),
    ),
    Vectors(
        "detic-coco",
        "ViT-B/32",
        DETIC.format("coco_clip_a+cname.npy"),
        HALF,
        "float16 on a GPU; 722 reruns of its publisher differ by at most 2.0e-3",
        templates=("a {}",),
    ),
    Vectors(
        "detic-words",
        "ViT-B/32",
        DETIC.format("oid_clip_a+cname.npy and o365_clip_a+cnamefix.npy"),
        HALF,
        "float16 on a GPU; 722 reruns of its publisher differ by at most 2.0e-3",
        templates=("a {}",),
    ),
    Vectors(
        "marqo-openai",
        "ViT-B/32",
        MARQO,
        HALF,
        "float16, of norm 1; as Detic",
        unit=True,
    ),
    Vectors(
        "zegclip",
        "ViT-B/16",
        "ZiqinZhou66/ZegCLIP 9ba4bb5, text_embedding/{coco,voc12}_single.npy (MIT)",
        HALF,
        "float16 on a GPU, of norm 1; 14 reruns differ by at most 1.0e-3, Detic's at this size by 2.0e-3",
        templates=("a photo of a {}",),
        unit=True,
    ),
    Printed(
        "clipseg",
        "ViT-B/16",
        "huggingface/transformers, tests/models/clipseg (Apache-2.0)",
        1e-3,
        "the publisher's own test allows 1e-3; that the tower is OpenAI's ViT-B/16 is an inference",
        "a cat",
        (("features", 0, 0, (0.5601, -0.0314, 0.1980)),),
        strong=False,
    ),
    Vectors(
        "vlpart",
        "RN50",
        "facebookresearch/VLPart e48903a, datasets/metadata/{coco,voc}_clip_RN50_a+cname.npy (MIT)",
        2e-2,
        "float16 on a GPU; 220 reruns of its publisher differ by at most 9.2e-3",
        templates=("a {}",),
    ),
    Printed(
        "deep-dive",
        "ViT-L/14",
        "fastai/diffusion-nbs, Stable Diffusion Deep Dive.ipynb (Apache-2.0)",
        1e-3,
        STATES,
        "A picture of a puppy.",
        (
            *BOS,
            *ends(1, 0.0290, -1.3258, 0.3085, -0.5257, 0.9768, 0.6652),
            *ends(2, 0.6942, 0.3538, 1.0991, -1.5716, -1.2643, -0.0121),
        ),
        pad=49407,
    ),
    Printed(
        "onnxruntime",
        "ViT-L/14",
        "microsoft/onnxruntime, docs/tutorials/csharp/stable-diffusion-csharp.md (MIT)",
        1e-3,
        STATES,
        "make a picture of green tree with flowers around it and a red sky",
        (
            *BOS,
            *ends(1, 0.0520, -0.6046, 1.9268, -0.3985, 0.9645, -0.4424),
            *ends(2, -0.8027, -0.4533, 1.7525, -1.0365, 0.6296, 1.0712),
            *ends(-3, -0.6833, 0.3571, -1.1353, -1.4067, 0.0142, 0.3566),
            *ends(-2, -0.7049, 0.3517, -1.1524, -1.4381, 0.0090, 0.3777),
            *ends(-1, -0.6155, 0.4283, -1.1282, -1.4256, -0.0285, 0.3206),
        ),
        pad=49407,
    ),
    Printed(
        "wethinkin",
        "ViT-L/14",
        "an article on Stable Diffusion 1.5 by Rocky of WeThinkIn",
        1e-3,
        STATES,
        "1girl,beautiful",
        (
            *BOS,
            *ends(1, -0.8425, -1.1393, 1.2756, -0.2595, 1.6293, -0.7857),
            *ends(2, 0.1753, -0.9846, 0.1879, 0.0664, -1.4935, -1.2614),
            *ends(-3, 0.2039, -0.7296, -0.3212, 0.6748, -0.5813, -0.7323),
            *ends(-2, 0.1921, -0.7344, -0.3045, 0.6803, -0.5852, -0.7230),
            *ends(-1, 0.2114, -0.6436, -0.3047, 0.6624, -0.5575, -0.7586),
        ),
        pad=49407,
    ),
    Vectors(
        "clipself",
        "ViT-L/14@336px",
        "wusize/CLIPSelf 1c7fe9c, metadata/coco_panoptic_clip_hand_craft_ViTL14x336.npy",
        HALF,
        "63 prompts averaged, of norm 1; read from the publisher's script, no second publisher",
        strong=False,
        templates=VILD,
        unit=True,
    ),
    *(
        Vectors(
            f"marqo-{name.partition('/')[0]}",
            name,
            MARQO,
            HALF,
            "two sentences; the precision is not stated, so float16 is allowed"
            + ("; computed with erf GELU, whatever the weights were trained with" * (name == "RN50/yfcc15m")),
            strong=name != "RN50/yfcc15m",
            unit=unit,
        )
        for name, unit in (
            ("ViT-B-32-quickgelu/laion400m_e32", True),
            ("ViT-B-32/laion2b_s34b_b79k", False),
            ("ViT-B-16/laion2b_s34b_b88k", False),
            ("ViT-L-14/laion400m_e32", True),
            ("ViT-H-14-378-quickgelu/dfn5b", True),
            ("RN50/yfcc15m", False),
            ("EVA02-B-16/merged2b_s8b_b131k", False),
            ("convnext_base/laion400m_s13b_b51k", False),
            ("convnext_base_w/laion_aesthetic_s13b_b82k", False),
            ("convnext_large_d/laion2b_s26b_b102k_augreg", True),
            ("convnext_large_d_320/laion2b_s29b_b131k_ft_soup", True),
            ("convnext_xxlarge/laion2b_s34b_b82k_augreg_soup", True),
        )
    ),
)
