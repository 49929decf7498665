"""Heavy processes encode as transformers does, also where the tokenizer's class overrides tokenizer.json."""

from transformers import AutoTokenizer

from rlhfctl.models.tokenizer import load_encoder
from rlhfctl.templates.encode import ChatEncoder

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEXTS = ("Hello  world", " leading", "a\n\nb", "12+30=42")


def test_ids_are_autotokenizers_and_a_difference_is_said(shared, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    path = str(shared / "tokenizers/llama-2-class-override")
    said = []
    encoder = load_encoder(path, str(template), say=said.append)
    tokenizer = AutoTokenizer.from_pretrained(path)
    light = ChatEncoder.from_path(path, str(template))
    for text in TEXTS:
        assert encoder.encode_text(text) == tokenizer.encode(text, add_special_tokens=False)
    assert any(encoder.encode_text(text) != light.encode_text(text) for text in TEXTS)
    assert len(said) == 1
    assert "K014" in said[0]


def test_nothing_is_said_where_both_agree(shared):
    said = []
    encoder = load_encoder(str(shared / "models/stories260k"), say=said.append)
    assert said == []
    assert encoder.stop_ids[0] == 2
