"""Make minclip/verification/published.npz from the files that others have published.

    python -m tests.support.make_published FOLDER

FOLDER holds clip_vitb32_text_refs.npz, clip_vitb32_word_vectors.npz and published/, whose files are named in
the code below; minclip/verification/published.py says where they come from. Vectors are kept in float16
(float32 where they were published so and are checked more finely): the first COMPLETE of a source
completely, of the others every step-th number, in turn.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from minclip.verification import figures, published

OUTPUT = Path(published.__file__).with_name("published.npz")
COMPLETE = 12
COCO_STUFF = """
person;bicycle;car;motorcycle;airplane;bus;train;truck;boat;traffic light;fire hydrant;
stop sign;parking meter;bench;bird;cat;dog;horse;sheep;cow;elephant;bear;zebra;giraffe;
backpack;umbrella;handbag;tie;suitcase;frisbee;skis;snowboard;sports ball;kite;
baseball bat;baseball glove;skateboard;surfboard;tennis racket;bottle;wine glass;cup;fork;
knife;spoon;bowl;banana;apple;sandwich;orange;broccoli;carrot;hot dog;pizza;donut;cake;
chair;couch;potted plant;bed;dining table;toilet;tv;laptop;mouse;remote;keyboard;
cell phone;microwave;oven;toaster;sink;refrigerator;book;clock;vase;scissors;teddy bear;
hair drier;toothbrush;banner;blanket;branch;bridge;building-other;bush;cabinet;cage;
cardboard;carpet;ceiling-other;ceiling-tile;cloth;clothes;clouds;counter;cupboard;curtain;
desk-stuff;dirt;door-stuff;fence;floor-marble;floor-other;floor-stone;floor-tile;floor-wood;
flower;fog;food-other;fruit;furniture-other;grass;gravel;ground-other;hill;house;leaves;
light;mat;metal;mirror-stuff;moss;mountain;mud;napkin;net;paper;pavement;pillow;plant-
other;plastic;platform;playingfield;railing;railroad;river;road;rock;roof;rug;salad;
sand;sea;shelf;sky-other;skyscraper;snow;solid-other;stairs;stone;straw;structural-other;
table;tent;textile-other;towel;tree;vegetable;wall-brick;wall-concrete;wall-other;wall-
panel;wall-stone;wall-tile;wall-wood;water-other;waterdrops;window-blind;window-other;wood"""
COCO_STUFF = COCO_STUFF.replace("\n", "").split(";")
COCO = COCO_STUFF[:80]
VOC = "aeroplane;bicycle;bird;boat;bottle;bus;car;cat;chair;cow;{};dog;horse;motorbike;"
VOC += "person;{};sheep;sofa;train;{}"
VOC_JOINED = VOC.format("diningtable", "pottedplant", "tvmonitor").split(";")
VOC_APART = VOC.format("dining table", "potted plant", "tv monitor").split(";")


def sources(folder):
    """Yield (id, words, vectors, step, dtype) of each source of published.py that has vectors."""

    def read(name):
        return np.load(folder / "published" / name)

    references, words = np.load(folder / "clip_vitb32_text_refs.npz"), folder / "clip_vitb32_word_vectors.npz"
    words, marqo = np.load(words), read("marqo_openclip_text_unit.npz")
    yield "npclip", ["a diagram", "a dog", "a cat"], read("npclip_vitb32_fp32.npy"), 1, "float32"
    yield "jina", references["jina_prompts"], references["jina_fp32"], 1, "float32"
    yield "detic-coco", without_a(references["coco_prompts"]), references["coco_fp16"], 4, "float16"
    yield "detic-words", without_a(words["prompts"]), words["fp16"], 8, "float16"
    zegclip = [read(f"zegclip_vitb16_{name}_fp16_unit.npy") for name in ("coco171", "voc20")]
    yield "zegclip", COCO_STUFF + VOC_JOINED, np.concatenate(zegclip), 4, "float16"
    vlpart = [read(f"vlpart_rn50_{name}_fp16.npy") for name in ("coco80", "voc20")]
    yield "vlpart", COCO + VOC_APART, np.concatenate(vlpart), 4, "float16"
    clipself = read("clipself_vitl14_336_coco133_multi_unit.npy")[:6]
    yield "clipself", COCO[:6], clipself, 1, "float16"
    yield "marqo-openai", marqo["texts"], marqo["fp16|ViT-B|32"], 1, "float16"
    for source in published.SOURCES:
        if source.id.startswith("marqo-") and "/" in source.model and source.id != "marqo-openai":
            kind = "onnx32|open_clip|" if source.model.endswith("quickgelu/laion400m_e32") else "open_clip|"
            vectors = marqo[kind + source.model.replace("/", "|")]
            yield source.id, marqo["texts"], vectors, 1, "float16"


def without_a(prompts):
    return [str(prompt).removeprefix("a ") for prompt in prompts]


def pack(sources):
    """Return the arrays of published.npz by name, of (id, words, vectors, step, dtype) each."""
    arrays, words = {}, {}
    for name, texts, vectors, step, dtype in sources:
        assert len(texts) == len(vectors), name
        words[name] = [str(text) for text in texts]
        n, E = vectors.shape
        complete = min(COMPLETE, n) if step > 1 else n
        arrays[f"{name}.complete"] = vectors[:complete].astype(dtype)
        kept = figures.stripes(complete, n, E, step)
        arrays[f"{name}.striped"] = vectors[kept].reshape(n - complete, E // step).astype(dtype)
        arrays[f"{name}.norms"] = np.linalg.norm(vectors.astype(np.float64), axis=1).astype("float32")
    text = json.dumps(words, ensure_ascii=False).encode()
    return arrays | {"words": np.frombuffer(text, np.uint8)}


def main():
    arrays = pack(sources(Path(sys.argv[1])))
    with zipfile.ZipFile(OUTPUT, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():  # without dates, so that the same numbers give the same file
            file = io.BytesIO()
            np.save(file, array)
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, file.getvalue())
    print(f"{OUTPUT}: {OUTPUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
