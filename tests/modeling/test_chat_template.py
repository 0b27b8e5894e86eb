"""Chat templates: as transformers renders them, on any day alike, and never without end."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from calibrant.errors import CalibrantError
from calibrant.modeling.template_process import LimitError, RefusedError, TemplateProcess
from calibrant.modeling.tokenizer import Tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "what is it?", "name": "ann"},
    {"role": "assistant", "reasoning_content": "hm", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "sun", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def with_template(llama: Path, folder: Path, template: str) -> Tokenizer:
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content or '' }}{{ m.name }}\n{% endfor %}",
    "{{ tools | tojson(indent=1) }}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.reasoning_content }}{{ m.thinking }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% continue %}{% endif %}{{ eos_token }}{% endfor %}",
    "{% if add_generation_prompt %}<a>{% endif %}{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}",
])  # fmt: skip
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_conversation_is_written_as_transformers_writes_it(llama: Path, tmp_path: Path, template, tools) -> None:
    tokenizer = with_template(llama, tmp_path / "m", template)
    for prompt in (False, True):
        expected = tokenizer.hf.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.chat_template.render(MESSAGES, tools, prompt) == expected


def test_the_date_is_the_same_on_every_day(llama: Path, tmp_path: Path) -> None:
    template = "{% if not date is defined %}{% set date = strftime_now('%d %b %Y, %H:%M') %}{% endif %}{{ date }}"
    assert with_template(llama, tmp_path / "m", template).chat_template.render(MESSAGES) == "26 Jul 2024, 00:00"


@pytest.mark.parametrize(("template", "said"), [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages[7].content }}", "has no element 7"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ [].append.__globals__ }}", "unsafe"),
    ("{{ range(10000000) | list }}", "Range too big"),
])  # fmt: skip
def test_what_a_template_refuses(llama: Path, tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        with_template(llama, tmp_path / "m", template).chat_template.render(MESSAGES)


@pytest.fixture(scope="module")
def process() -> TemplateProcess:
    return TemplateProcess(seconds=0.3)


def request(template: str) -> dict[str, Any]:
    return {"conversations": [MESSAGES], "chat_template": template}


@pytest.mark.parametrize(("template", "said"), [
    ("{{ 'a' * 1000000000 }}", "512 MiB"),
    ("{{ '%1000000000d' % 1 }}", "512 MiB"),
    ("{{ 'a' | center(900000000) }}", "512 MiB"),
    ("{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "MiB"),
    ("{% for i in range(20) %}{{ messages[0].content * 99999 }}{% endfor %}", "more than 16,000,000 characters"),
])  # fmt: skip
def test_a_template_that_writes_too_much_is_stopped(process: TemplateProcess, template: str, said: str) -> None:
    with pytest.raises(LimitError, match=said):
        process.render(request(template))


def test_a_template_that_never_ends_is_stopped_and_the_next_is_rendered(process: TemplateProcess) -> None:
    with pytest.raises(LimitError, match=r"more than 0.3 seconds"):
        process.render(request("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3))
    assert process.render(request("{{ messages[0].content }}")) == "what is it?"


def test_limits_name_the_template(llama: Path, tmp_path: Path) -> None:
    said = f"{tmp_path / 'm'}: the tokenizer's chat template cannot be used: it takes more than 512"
    template = with_template(llama, tmp_path / "m", "{{ 'a' * 1000000000 }}").chat_template
    with pytest.raises(CalibrantError, match=said):
        _ = template.takes_parts
    for _ in range(2):
        with pytest.raises(RefusedError, match="it takes more than 512 MiB"):
            template.render(MESSAGES)
    with pytest.raises(CalibrantError, match=said):
        template.render(MESSAGES)


@pytest.mark.parametrize("over", ["{{ 'a' * 1000000000 }}", "{{ 'a' * 17000000 }}", "{{ 'a' | center(900000000) }}"])
def test_single_conversations_over_a_limit_are_refused_alone(llama: Path, tmp_path: Path, over: str) -> None:
    text = "{% if messages[0].content == 'odd' %}" + over + "{% else %}{{ messages[0].content }}{% endif %}"
    template = with_template(llama, tmp_path / "m", text).chat_template
    for _ in range(3):
        with pytest.raises(RefusedError, match=r"it (takes|writes) more than"):
            template.render([{"role": "user", "content": "odd"}])
        assert template.render(MESSAGES) == "what is it?"


@pytest.mark.parametrize("template", [
    "{{ range(100000) | random }}",
    "{{ lipsum(2) }}",
    "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}{{ lipsum(n=1, html=False) }}",
    "{% for i in range(20) %}{{ 'abcdefghij' | random }}{% endfor %}",
])  # fmt: skip
def test_what_a_template_draws_is_the_same_every_time(process: TemplateProcess, template: str) -> None:
    assert len({process.render(request(template)) for _ in range(3)}) == 1


@pytest.mark.parametrize(("template", "takes"), [
    ("{{ messages[0].content }}", False),
    ("{{ messages[0].content | trim }}", False),
    ("{{ messages[0].content | tojson }}", False),
    ("{{ 'a' + messages[0].content }}", False),
    ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", True),
    ("{% if messages[0].content is string %}s{% else %}{{ messages[0].content[0].text }}{% endif %}", True),
])  # fmt: skip
def test_templates_that_take_parts_are_known_by_what_they_write(llama, tmp_path: Path, template: str, takes) -> None:
    assert with_template(llama, tmp_path / "m", template).chat_template.takes_parts is takes


@pytest.mark.parametrize(("template", "only"), [
    ("{{ messages[0].content }}", False),
    ("{% if messages[0].content is string %}{{ messages[0].content }}{% else %}"
     "{{ messages[0].content[0].text }}{% endif %}", False),
    ("{{ raise_exception('no') }}", False),
    ("{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}", True),
    ("{% for p in messages[0].content %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}", True),
    ("{{ messages[0].content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}", True),
    ("{% if messages[0].content is string %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content[0].text }}",
     True),
])  # fmt: skip
def test_templates_that_take_only_parts_are_known(llama: Path, tmp_path: Path, template: str, only: bool) -> None:
    assert with_template(llama, tmp_path / "m", template).chat_template.takes_only_parts is only


@pytest.mark.parametrize(("key", "value"), [
    ("model_max_length", [1]),
    ("model_max_length", "many"),
    ("model_max_length", {}),
    ("chat_template", 7),
    ("eos_token", 3),
    ("added_tokens_decoder", [1]),
    ("extra_special_tokens", 5),
])  # fmt: skip
def test_settings_of_a_wrong_type_are_refused_or_harmless(llama: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, key: value}))
    problem = ""
    try:
        assert Tokenizer(folder).encode("abc") == Tokenizer(llama).encode("abc")
    except CalibrantError as error:
        problem = str(error)
    assert key != "model_max_length" or problem
    assert not problem or problem.startswith(f"{folder}: no usable tokenizer (")
    assert "\n" not in problem


@pytest.mark.parametrize(("name", "content", "installed", "said"), [
    ("tokenizer.model", b"\n\x0e\n\x05<unk>", (), "pip install 'calibrant[sentencepiece]'"),
    ("tokenizer.model", b"\n\x0e\n\x05<unk>", ("google.protobuf",), "pip install 'calibrant[sentencepiece]'"),
    ("tokenizer.model", b"\n\x0e\n\x05<unk>", ("sentencepiece",), "pip install 'calibrant[sentencepiece]'"),
    ("spiece.model", b"\n\x0e\n\x05<unk>", (), "pip install 'calibrant[sentencepiece]'"),
    ("source.spm", b"\n\x0e\n\x05<unk>", (), "pip install 'calibrant[sentencepiece]'"),
    ("tokenizer.model", b"IQ== 0\nIg== 1\n", (), "pip install tiktoken"),
    ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", (), "pip install tiktoken"),
])  # fmt: skip
def test_the_library_that_is_missing_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, installed, said: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("calibrant.modeling.tokenizer.find_spec", lambda module: module in installed or None)

    def fails(*args: Any, **options: Any) -> Any:
        raise ImportError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    with pytest.raises(CalibrantError, match=re.escape(said)):
        Tokenizer(folder)
