"""The probe's texts are few, short and safe to store as JSON."""

import json

import minclip


def test_the_probe_holds_at_most_60_short_texts():
    texts = minclip.probe_texts()
    assert len(texts) == len(set(texts)) <= 60
    assert sorted(map(len, texts))[-2] <= 60
    assert len(minclip.tokenize(texts[-1], context_length=200)[0]) > 77


def test_the_texts_survive_json():
    texts = minclip.probe_texts()
    assert json.loads(json.dumps(texts)) == texts
    assert json.loads(json.dumps(texts, ensure_ascii=False).encode("utf-8")) == texts
